"""The neighbouring methods: one class each, a file per family, found here by name.

`base.Algorithm` says what a class holds and how to write one's own; `engine.AlgorithmEngine` trains stacks of them.
"""

from algorithms import adversarial, alignment, averaging, dmg, erm, experts, gradients, heads, masks, meta, penalties
from algorithms.base import Algorithm, Batch, Hyperparameter, Setup
from algorithms.engine import AlgorithmEngine
from algorithms.fingerprint import code_of
from algorithms.registry import ALGORITHMS, find, register

FAMILIES = (adversarial, alignment, averaging, dmg, erm, experts, gradients, heads, masks, meta, penalties)

__all__ = ["ALGORITHMS", "FAMILIES", "Algorithm", "AlgorithmEngine", "Batch", "Hyperparameter", "Setup", "find"]
__all__ += ["code_of", "register"]
