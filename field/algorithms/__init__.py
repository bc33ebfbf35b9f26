"""The methods of the field: one class each, a file per family, found here by name.

`Algorithm` says what a class holds and how to write a new one; `engine.FunctionalEngine` trains stacks of them.
"""

from engine import Batch
from field.algorithms import (  # noqa: F401 (importing a family registers its methods)
    adversarial,
    alignment,
    averaging,
    dmg,
    erm,
    experts,
    gradients,
    heads,
    masks,
    meta,
    penalties,
)
from field.algorithms.base import Algorithm, Hyperparameter, Noise, Setup, State
from field.algorithms.experts import expert_use
from field.algorithms.registry import ALGORITHMS, find, register

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "Batch",
    "Hyperparameter",
    "Noise",
    "Setup",
    "State",
    "expert_use",
    "find",
    "register",
]
