"""Empirical risk minimization, the baseline, on both kinds of batches."""

from field.algorithms.base import Algorithm
from field.algorithms.registry import register


@register
class ERM(Algorithm):
    """Empirical risk minimization (Vapnik 1998): mean cross-entropy over all source images."""


@register
class ERMBalanced(Algorithm):
    """`ERM` on balanced batches: the baseline of every method that needs equally many rows of each domain."""

    batches = "balanced"
