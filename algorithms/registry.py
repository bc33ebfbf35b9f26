"""Methods by name."""

import ast
import hashlib
import inspect
import textwrap

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


def code_of(algorithm: type[Algorithm]) -> str | None:
    """Fingerprint of the code of a class of one's own: 16 hex digits of a SHA-256 over its methods and attributes.

    It changes with what a method computes, not with comments, layout or docstrings. Functions that its methods call are
    no part of it. None for a class of this package, whose commit is noted instead, and where Python has no source.
    """
    own = [cls for cls in algorithm.__mro__ if not cls.__module__.startswith("algorithms.") and cls is not object]
    parts = []
    for cls in own:
        for name, value in sorted(vars(cls).items()):
            function = inspect.unwrap(getattr(value, "__func__", getattr(value, "fget", value)))
            if inspect.isfunction(function):
                try:
                    parts += [name, _bare(inspect.getsource(function))]
                except (OSError, SyntaxError):  # typed into an interpreter, or a lambda in the midst of something
                    return None
            elif isinstance(value, str | int | float | tuple | None) and not name.startswith("__"):
                parts += [name, repr(value)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16] if own else None


def _bare(source: str) -> str:
    """Python code without comments, docstrings and layout."""
    tree = ast.parse(textwrap.dedent(source))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)
