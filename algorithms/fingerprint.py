"""Whether the code of a method is what it was: so that runs before and after an edit are not mixed."""

import hashlib
import inspect
from collections.abc import Mapping, Set
from functools import cached_property, partial
from types import CodeType, FunctionType

from torch import Tensor

from algorithms.base import Algorithm

PLAIN = (str, bytes, int, float, complex, type(None))


def code_of(algorithm: type[Algorithm]) -> str | None:
    """Fingerprint of a class of one's own: 16 hex digits of a SHA-256 over what its methods compute.

    It covers methods, attributes, and the functions and values of its own file or notebook that the methods use, and
    changes with none of comments, layout and docstrings. It does not cover what lies inside objects of other types than
    Python's own and tensors, nor hyperparameters, whose values are compared by themselves. It may differ from one
    version of Python to another.

    Returns:
        None for a class of this package, whose commit is noted instead.
    """
    own = [cls for cls in algorithm.__mro__ if not cls.__module__.startswith("algorithms.") and cls is not object]
    seen: set[int] = set()
    parts = [
        (name, _described(value, seen))
        for cls in own
        for name, value in sorted(vars(cls).items())
        if name != "hyperparameters" and (not name.startswith("__") or inspect.isfunction(value))
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16] if own else None


def _described(value: object, seen: set[int]) -> object:
    """A value as plain numbers and text, without addresses."""
    if isinstance(value, PLAIN):
        return repr(value)
    if isinstance(value, list | tuple):
        return [type(value).__name__, *(_described(item, seen) for item in value)]
    if isinstance(value, Mapping):
        return ["map", *((_described(key, seen), _described(item, seen)) for key, item in value.items())]
    if isinstance(value, Set):
        return ["set", *sorted(repr(_described(item, seen)) for item in value)]
    if isinstance(value, Tensor):
        return [str(value.dtype), list(value.shape), repr(value.detach().cpu().tolist())]
    if isinstance(value, partial):
        return [_described(part, seen) for part in (value.func, value.args, value.keywords)]
    if isinstance(value, property):
        return [_described(part, seen) for part in (value.fget, value.fset)]
    if isinstance(value, cached_property):
        return _described(value.func, seen)
    function = inspect.unwrap(getattr(value, "__func__", value))  # of a static or class method
    if isinstance(function, FunctionType):
        return _function(function, seen)
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"


def _function(function: FunctionType, seen: set[int]) -> object:
    """A function with its defaults, what it closes over, and what it uses of its own file."""
    if id(function) in seen:
        return function.__qualname__
    seen.add(id(function))
    names = set(_names(function.__code__))
    used = {name: function.__globals__[name] for name in sorted(names) if name in function.__globals__}
    here = (None, function.__module__)  # what has no module is a value or a module
    mine = {n: v for n, v in used.items() if isinstance(v, Tensor) or getattr(v, "__module__", None) in here}
    cells = [_content(cell, seen) for cell in function.__closure__ or ()]
    given = [_described(part, seen) for part in (function.__defaults__, function.__kwdefaults__ or {})]
    return [_code(function.__code__, function.__doc__, seen), given, cells, _described(mine, seen)]


def _content(cell: object, seen: set[int]) -> object:
    try:
        return _described(cell.cell_contents, seen)
    except ValueError:  # not filled yet
        return "empty"


def _code(code: CodeType, doc: str | None, seen: set[int]) -> list:
    """Instructions, constants (but for the docstring) and names; no line numbers."""
    constants = [None if doc is not None and i == 0 else c for i, c in enumerate(code.co_consts)]
    inner = [_code(c, None, seen) if isinstance(c, CodeType) else _described(c, seen) for c in constants]
    return [code.co_code.hex(), inner, code.co_names, code.co_varnames, code.co_freevars]


def _names(code: CodeType) -> list[str]:
    """Names that code looks up outside of itself, inner functions included."""
    inner = [name for c in code.co_consts if isinstance(c, CodeType) for name in _names(c)]
    return [*code.co_names, *inner]
