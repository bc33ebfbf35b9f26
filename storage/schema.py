"""What the files of a results directory must hold, declared once. Each is checked against this where it is read."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from config import InputError

Fault = tuple[str, str]  # where in a value, ".features.counts" or "[3]"; what is wrong there
Check = Callable[[object], Fault | None]  # of a value read from JSON: its first fault

# Kinds of JSON: a type (object = any), several (one of them), a list of one kind, {str: kind} for any names, or names
# with their kinds. A name that ends in "?" may be missing, and others may be there.
SHARES = ({"full": float, "in": float, "out": float}, None)
FACTS = {"feature_size": int, "model": ({"name": str}, None)}
JSON = {
    "record": {
        "key": str,
        "algorithm": str,
        "holdout": str,
        "seed": int,
        "selection": str,
        "settings": str,
        "failed": (str, None),
        "accuracy": SHARES,
        "balanced_accuracy": SHARES,
        "validation?": (float, None),
        "epoch?": (int, None),
        "note?": str,
        "trial?": int,
        "hyperparameters?": {str: object},
    },
    "transfer": {  # a record of the transfer study; accuracies by number of updates
        "key": str,
        "task": str,
        "protocol": str,
        "arm": str,
        "cut": int,
        "amount": float,
        "n": int,
        "repeat": int,
        "updates": int,
        "settings": str,
        "failed": (str, None),
        "accuracy": ({str: float}, None),
        "balanced_accuracy": ({str: float}, None),
        "seen_accuracy?": ({str: float}, None),
        "note?": str,
    },
    "settings": {
        "hash": str,
        "settings": {str: object},
        "features": FACTS | {"dataset": str, "fingerprint": str, "counts": {str: {str: int}}},
        "environments": [{str: object}],
        "holdouts?": {str: str},
    },
    "header": {
        "class_names": [str],
        "domain_names?": [str],
        "hidden_sizes": [int],
        "trained_blocks?": (int, str),
        "tokens?": str,
        "features": FACTS | {"preprocessing": ({str: object}, None)},
    },
}

# Files, a pattern -> arrays, patterns too -> "f" for floats, "i" integers or "b" booleans, and the axes. Axes of one
# capital letter are of one length: S seeds, E epochs, D domains, P parts (in, out), C classes. "?" as above.
CURVES = {"loss": "f SE", "validation_accuracy": "f SE", "failed": "i S"}
ARRAYS = {
    "weights/* of blocks": {"final.*": "f S*", "change.*": "f S*", "failed?": "i S"},
    "weights/*": {"final.*": "f S*", "failed?": "i S"},
    "histories/phase1_*": CURVES | {"train_accuracy": "f SE"},
    "histories/phase2_*": CURVES | {"train_accuracy": "f SE", "correct": "i SEDPC"},
    "histories/compare_*": CURVES | {"correct": "i SEDPC"},  # and what the method records
    "importance/phase1_* of blocks": {"importance_*": "f Soi"},
    "importance/holdout_* of blocks": {"bits_*": "i So*"},
    "importance/columns_*": {"scores": "f Sd"},
    "importance/*": {"importance_*": "f Soi", "normalized_*": "f Soi", "mask_*": "b Soi"},
    "evidence/*": {"layer_*": "f Soi"},
}


def check_json(where: str, value: object, kind: str) -> None:
    """Raise an `InputError` that names the first fault of a value read from JSON, a kind of `JSON`, if it has one."""
    if fault := _check(kind)(value):
        place, what = fault
        raise damaged(where, f"{place.removeprefix('.') or 'it'} {what}")


def damaged(where: str, fault: object) -> InputError:
    """The error of a file that cannot be used."""
    return InputError(f"{where} is damaged or not of this project ({fault}): restore it, or use another.")


@cache
def _check(kind: str) -> Check:
    """The check of a kind of `JSON`, composed once: a results directory holds many thousands of records."""
    return _check_of(JSON[kind])


def _check_of(kind: object) -> Check:
    """The check of a kind, as in `JSON`."""
    if isinstance(kind, tuple):
        return _one_of([_check_of(one) for one in kind])
    if isinstance(kind, list):
        return _each(list, _check_of(kind[0]), enumerate, "[{}]", "is no list")
    if isinstance(kind, dict):
        if str in kind:
            return _each(dict, _check_of(kind[str]), dict.items, ".{}", "is no object")
        return _named({name: _check_of(inner) for name, inner in kind.items()})
    return _plain(kind)


def _plain(kind: type | None) -> Check:
    """That a value is of exactly this type, as True is no int; an int is a float."""
    if kind is object:
        return lambda value: None
    types = {float: {float, int}, None: {type(None)}}.get(kind, {kind})
    fault = "", "is not null" if kind is None else f"is no {kind.__name__}"
    return lambda value: None if type(value) in types else fault


def _one_of(checks: Sequence[Check]) -> Check:
    """That a value passes one of the checks; its fault is that of the first."""

    def check(value: object) -> Fault | None:
        for one in checks:
            if one(value) is None:
                return None
        return checks[0](value)

    return check


def _each(container: type, inner: Check, items: Callable, name: str, otherwise: str) -> Check:
    """That a value is such a container, and that each item passes; `items` gives them with their names."""

    def check(value: object) -> Fault | None:
        if not isinstance(value, container):
            return "", otherwise
        for key, item in items(value):
            if fault := inner(item):
                return name.format(key) + fault[0], fault[1]
        return None

    return check


def _named(checks: Mapping[str, Check]) -> Check:
    """That a value is an object with these names, but for those that end in "?", and what each must pass."""
    entries = [(name.removesuffix("?"), name.endswith("?"), inner) for name, inner in checks.items()]

    def check(value: object) -> Fault | None:
        if not isinstance(value, dict):
            return "", "is no object"
        for name, optional, inner in entries:
            if name in value:
                if fault := inner(value[name]):
                    return f".{name}{fault[0]}", fault[1]
            elif not optional:
                return "", f"lacks {name}"
        return None

    return check


def check_arrays(kind: str, path: Path, arrays: Mapping[str, Tensor], header: object) -> None:
    """Raise an `InputError` that names the first fault of a file of networks ("weights", …), if it has one."""
    check_json(f"'{path}'", header, "header")
    if fault := next(_array_faults(f"{kind}/{path.stem}", arrays, header), None):
        raise damaged(f"'{path}'", fault)


def _array_faults(file: str, arrays: Mapping[str, Tensor], header: Mapping) -> Iterator[str]:
    seeds = arrays.get("seeds", torch.empty(0))
    if not 0 < seeds.numel() == seeds.unique().numel():
        yield "its seeds are missing, or one is there twice"
    if file.startswith(("importance/", "weights/")) and header.get("trained_blocks"):
        file += " of blocks"
    wanted = next((table for pattern, table in ARRAYS.items() if fnmatchcase(file, pattern)), {})
    wanted = {"seeds": "i S"} | wanted | {"*": "any S*"}
    lengths = {"P": 2, "C": len(header["class_names"])}
    for pattern, form in wanted.items():
        kind, axes = form.split()
        names = [name for name in arrays if fnmatchcase(name, pattern.removesuffix("?"))]
        if not names and not pattern.endswith("?"):
            yield f"it lacks {pattern}"
        for name in names:
            if not _fits(arrays[name], kind, axes, lengths):
                yield f"{name} cannot be {arrays[name].dtype} of shape {list(arrays[name].shape)}"


def _fits(value: Tensor, kind: str, axes: str, lengths: dict[str, int]) -> bool:
    """Whether an array is of a kind and has these axes; lengths of axes that are seen first are noted."""
    found = "f" if value.is_floating_point() else "b" if value.dtype == torch.bool else "i"
    sizes = [(axis, size) for axis, size in zip(axes, value.shape, strict=False) if axis.isupper()]
    same = all(lengths.setdefault(axis, size) == size for axis, size in sizes)
    return kind in (found, "any") and same and value.ndim >= 1 and (value.ndim == len(axes) or axes.endswith("*"))
