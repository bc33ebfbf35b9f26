"""What the files of a results directory must hold, declared once. Each is checked against this where it is read."""

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor

from config import InputError

# Kinds of JSON: a type (object = any), several (one of them), a list of one kind, {str: kind} for any names, or names
# with their kinds. A name that ends in "?" may be missing, and others may be there.
SHARES = ({"full": float, "in": float, "out": float}, None)
FACTS = {"feature_size": int, "model": ({"name": str}, None)}
RECORD = {
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
}
SETTINGS = {
    "hash": str,
    "settings": {str: object},
    "features": FACTS | {"dataset": str, "fingerprint": str, "counts": {str: {str: int}}},
    "environments": [{str: object}],
    "holdouts?": {str: str},
}
HEADER = {
    "class_names": [str],
    "domain_names?": [str],
    "hidden_sizes": [int],
    "features": FACTS | {"preprocessing": ({str: object}, None)},
}

# Files, a pattern -> arrays, patterns too -> "f" for floats, "i" integers or "b" booleans, and the axes. Axes of one
# capital letter are of one length: S seeds, E epochs, D domains, P parts (in, out), C classes. "?" as above.
CURVES = {"loss": "f SE", "validation_accuracy": "f SE", "failed": "i S"}
ARRAYS = {
    "weights/*": {"final.*": "f S*", "failed?": "i S"},
    "histories/phase1_*": CURVES | {"train_accuracy": "f SE"},
    "histories/phase2_*": CURVES | {"train_accuracy": "f SE", "correct": "i SEDPC"},
    "histories/compare_*": CURVES | {"correct": "i SEDPC"},  # and what the method records
    "importance/*": {"importance_*": "f Soi", "normalized_*": "f Soi", "mask_*": "b Soi"},
}


def check_json(where: str, value: object, kind: object) -> None:
    """Raise an `InputError` that names the first fault of a value read from JSON, if it has one."""
    if fault := next(_faults(value, kind, ""), None):
        raise damaged(where, fault)


def damaged(where: str, fault: object) -> InputError:
    """The error of a file that cannot be used."""
    return InputError(f"{where} is damaged or not of this project ({fault}): restore it, or use another.")


def _faults(value: object, kind: object, name: str) -> Iterator[str]:
    said = name or "it"
    if isinstance(kind, tuple):
        if all(any(_faults(value, one, name)) for one in kind):
            yield from _faults(value, kind[0], name)
    elif isinstance(kind, list):
        items = value if isinstance(value, list) else ()
        if items is not value:
            yield f"{said} is no list"
        for number, item in enumerate(items):
            yield from _faults(item, kind[0], f"{name}[{number}]")
    elif isinstance(kind, dict):
        items = value if isinstance(value, dict) else {}
        if items is not value:
            yield f"{said} is no object"
        for key, inner in (dict.fromkeys(items, kind[str]) if str in kind else kind).items():
            plain = key.removesuffix("?")
            if plain in items:
                yield from _faults(items[plain], inner, f"{name}.{plain}".removeprefix("."))
            elif plain == key and items is value:
                yield f"{said} lacks {key}"
    elif kind is None:
        if value is not None:
            yield f"{said} is not null"
    elif not (kind is object or type(value) is kind or (kind is float and type(value) is int)):
        yield f"{said} is no {kind.__name__}"


def check_arrays(kind: str, path: Path, arrays: Mapping[str, Tensor], header: object) -> None:
    """Raise an `InputError` that names the first fault of a file of networks ("weights", …), if it has one."""
    check_json(f"'{path}'", header, HEADER)
    if fault := next(_array_faults(f"{kind}/{path.stem}", arrays, header), None):
        raise damaged(f"'{path}'", fault)


def _array_faults(file: str, arrays: Mapping[str, Tensor], header: Mapping) -> Iterator[str]:
    seeds = arrays.get("seeds", torch.empty(0))
    if not 0 < seeds.numel() == seeds.unique().numel():
        yield "its seeds are missing, or one is there twice"
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
