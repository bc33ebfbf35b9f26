"""The baseline, with both ways of making a batch."""

from algorithms.base import Algorithm
from algorithms.registry import register


@register
class ERM(Algorithm):
    """Empirical risk minimization (Vapnik 1998): mean cross-entropy over all source images."""


@register
class ERMBalanced(Algorithm):
    """`ERM` on balanced batches: the partner of every method that needs as many rows of each domain."""

    batches = "balanced"
