"""Methods by name."""

from algorithms.base import Algorithm
from config import InputError

ALGORITHMS: dict[str, type[Algorithm]] = {}


def register(algorithm: type[Algorithm]) -> type[Algorithm]:
    """Make a class known by its name; a decorator.

    Raises:
        ValueError: another class has that name.
    """
    there = ALGORITHMS.get(algorithm.__name__)
    if there and there.__module__ != algorithm.__module__:  # the same class again: its notebook cell was run twice
        raise ValueError(f"There is another algorithm '{algorithm.__name__}', in {there.__module__}.")
    ALGORITHMS[algorithm.__name__] = algorithm
    return algorithm


def find(name: str) -> type[Algorithm]:
    """The class of a name.

    Raises:
        InputError: there is none; the known names are listed.
    """
    if name == "Ensemble":
        raise InputError("Ensemble is not trained: every comparison with ERM reports that of its networks.")
    if name not in ALGORITHMS:
        raise InputError(f"There is no algorithm '{name}'; there are {', '.join(sorted(ALGORITHMS))}.")
    return ALGORITHMS[name]
