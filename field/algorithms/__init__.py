"""The methods of the field: one class each, a file per family, found here by name (importing a family registers it).

`Algorithm` says what a class holds and how to write a new one; `engine.FunctionalEngine` trains stacks of them.
"""

from engine import Batch
from field.algorithms import (  # noqa: F401
    adversarial,
    alignment,
    anchors,
    averaging,
    dmg,
    experts,
    gradients,
    heads,
    masks,
    meta,
    penalties,
    teachers,
)
from field.algorithms.base import ALGORITHMS, Algorithm, Hyperparameter, Noise, Setup, State, find, register
from field.algorithms.experts import expert_use

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
