"""Methods by name."""

from config import InputError
from field.algorithms.base import Algorithm

ALGORITHMS: dict[str, type[Algorithm]] = {}


def register(algorithm: type[Algorithm]) -> type[Algorithm]:
    """Make a class known by its name; a decorator.

    Raises:
        ValueError: a class of another module has that name.
    """
    there = ALGORITHMS.get(algorithm.__name__)
    if there and there.__module__ != algorithm.__module__:  # same module: its notebook cell was run again
        raise ValueError(f"The name '{algorithm.__name__}' is taken by a method in {there.__module__}.")
    ALGORITHMS[algorithm.__name__] = algorithm
    return algorithm


def find(name: str) -> type[Algorithm]:
    """The class with that name.

    Raises:
        InputError: there is none; the message lists the names.
    """
    if name == "Ensemble":
        raise InputError("Ensemble is not trained: every comparison with ERM reports the ensemble of its networks.")
    if name not in ALGORITHMS:
        raise InputError(f"There is no method '{name}'; there are {', '.join(sorted(ALGORITHMS))}.")
    return ALGORITHMS[name]
