"""Every default of the project, by the names the README uses.

Edit this file to change the experiment. In a notebook ``config.NAME = value`` works as well: settings
objects read the constants when they are made, not when this module is imported.
"""

import ast
import difflib
import hashlib
import json
import re
import sys
import types
import typing
from dataclasses import asdict, dataclass, fields

# Data
DATA_ROOT: str | None = None  # folder of domain folders of class folders; None = the bundled features
FEATURES_FILE: str | None = None  # features made elsewhere, in the format of data/README.md
VIT_MODEL: str = "google/vit-base-patch16-224-in21k"  # hub name or local directory; used with DATA_ROOT
CACHE_DIR: str = "cache"  # extracted features and content hashes
EXTRACTION_BATCH_SIZE: int | None = None  # images per forward pass; None = 8 on CPU, 256 on CUDA
EXTRACTION_WORKERS: int | None = None  # decoding processes; 0 = threads; None = 0 on CPU, one per core on CUDA

# Split
SPLIT_SEED: int | str = "seed"  # of the stratified in/out split: "seed" = each seed its own; a number = one for all
OUT_FRACTION: float = 0.2  # part of each domain kept for validation (`out`)

# Classifier
HIDDEN_SIZES: tuple[int, ...] = (10,) * 5  # five hidden layers have four weight matrices between them
BATCH_SIZE: int = 32  # images per training step, in both phases

# Phase 1: which weights move
PH1_NUM_EPOCHS: int = 10
PH1_LEARNING_RATE: float = 1e-3  # Adam
PH1_DATA: str = "all"  # "all" images of a domain, or "in" for its training split only

# Importance and masks
IMPORTANCE_THRESHOLD_PERCENTILE: float = 60.0  # per cent of the tracked weights KEPT as important
IMPORTANCE_AGGREGATION: str = "sum"  # over source domains: see importance.AGGREGATIONS

# Phase 2: training with the important weights favoured
PH2_NUM_EPOCHS: int = 10
PH2_LR_IMPORTANT: float = 1e-3  # Adam; also every parameter outside the tracked matrices
PH2_LR_UNIMPORTANT_START: float = 1e-4  # tracked weights outside the mask, first epoch
PH2_LR_DECAY_RATE: float = 0.5  # factor on it after each epoch
PH2_FREEZE_EPOCH: int = 7  # epochs after which it is exactly 0; 0 = from the start
PH2_INIT: str = "fresh"  # "fresh" random network, or "phase1" for Phase 1's own start

# Run
NUM_SEEDS: int = 10  # seeds 0 … N-1
SEEDS_PER_CHUNK: int = 50  # seeds trained together and written together
DEVICE: str | None = None  # "cpu" or "cuda"; None = CUDA where there is one
THREADS: int | None = None  # CPU threads; None = one to train, all to extract features
RESULTS_DIR: str = "results"

AGGREGATIONS = ("sum", "mean", "max", "min", "union", "intersection", "normalized_sum")


class InputError(ValueError):
    """Invalid input, explained to the user in one sentence (exit code 2)."""


def names() -> dict[str, object]:
    """The settings of this module: name -> declared type."""
    return typing.get_type_hints(sys.modules[__name__])


def parse(assignment: str) -> tuple[str, object]:
    """Turn ``NAME=VALUE`` into the name of a setting and a value of its declared type.

    Raises:
        InputError: no ``=``, an unknown name (the nearest known one is offered), or a value of another type.
    """
    name, equals, text = (part.strip() for part in assignment.partition("="))
    if not equals:
        raise InputError(f"--set wants NAME=VALUE, not '{assignment}'.")
    kind = _declared(name)
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        repeated = re.fullmatch(r"\((\d+),\)\s*\*\s*(\d{1,3})", text)  # (10,) * 5, as the constant is written
        value = (int(repeated[1]),) * int(repeated[2]) if repeated else text  # a bare word is a string
    if str in _options(kind) and type(value) not in (*_options(kind), str, type(None)):
        value = text  # RESULTS_DIR=1e3 is a name, not a number
    return name, _coerce(name, value, kind)


def _declared(name: str) -> object:
    """The declared type of a setting, or an `InputError` that offers the nearest name."""
    known = names()
    if name not in known:
        near = difflib.get_close_matches(name.upper(), known, n=1, cutoff=0)
        raise InputError(f"There is no setting '{name}'; the nearest is {near[0]}.")
    return known[name]


def _options(kind: object) -> tuple:
    """The types that a declared type allows."""
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


def _coerce(name: str, value: object, kind: object) -> object:
    """`value` as the declared type `kind`, or an `InputError` that names the setting."""
    for option in _options(kind):
        if typing.get_origin(option) is tuple:
            items = value if isinstance(value, (tuple, list)) else (value,)
            if all(type(item) is int for item in items):
                return tuple(items)
        elif type(value) is option:
            return value
        elif (option is float and type(value) is int) or (option is str and value is not None):
            return option(value)
    wanted = " or ".join(getattr(option, "__name__", str(option)) for option in _options(kind))
    raise InputError(f"{name} must be of type {wanted.replace('NoneType', 'None')}, not {value!r}.")


def apply(assignments: dict[str, object]) -> None:
    """Set constants of this module by name, with the same checks as ``--set`` (for notebooks and papermill)."""
    values = {name: _coerce(name, value, _declared(name)) for name, value in assignments.items()}
    globals().update(values)  # all or none


def reset() -> None:
    """Give every setting the value that it has in this file, whatever was set since it was read."""
    globals().update(_as_written)


def _check(condition: bool, sentence: str) -> None:
    if not condition:
        raise InputError(sentence)


@dataclass(frozen=True)
class Settings:
    """What determines a result, besides features, seed and holdout. `Settings.current()` reads the constants.

    Fields have the constants' names in lower case; see the comments there for meanings and units.
    """

    split_seed: int | str
    out_fraction: float
    hidden_sizes: tuple[int, ...]
    batch_size: int
    ph1_num_epochs: int
    ph1_learning_rate: float
    ph1_data: str
    importance_threshold_percentile: float
    importance_aggregation: str
    ph2_num_epochs: int
    ph2_lr_important: float
    ph2_lr_unimportant_start: float
    ph2_lr_decay_rate: float
    ph2_freeze_epoch: int
    ph2_init: str

    @classmethod
    def current(cls, **overrides) -> "Settings":
        """The constants of this module as they are now, with `overrides` by field name."""
        values = {field.name: overrides.pop(field.name, globals()[field.name.upper()]) for field in fields(cls)}
        if overrides:
            raise InputError(f"There is no setting '{next(iter(overrides)).upper()}'.")
        return cls(**values)

    def __post_init__(self) -> None:
        for field in fields(self):  # equal settings are of equal types, and so of equal hash
            name = field.name.upper()
            object.__setattr__(self, field.name, _coerce(name, getattr(self, field.name), _declared(name)))
        sizes = self.hidden_sizes
        _check(len(sizes) >= 2, f"HIDDEN_SIZES needs two hidden layers or more to have a tracked matrix, not {sizes}.")
        _check(all(size > 0 for size in sizes), f"HIDDEN_SIZES must be positive, not {sizes}.")
        split = self.split_seed
        _check(split == "seed" or type(split) is int, f"SPLIT_SEED must be 'seed' or a whole number, not {split!r}.")
        _check(0 < self.out_fraction < 1, f"OUT_FRACTION must lie between 0 and 1, not {self.out_fraction}.")
        for name in ("batch_size", "ph1_num_epochs", "ph2_num_epochs"):
            _check(getattr(self, name) >= 1, f"{name.upper()} must be at least 1, not {getattr(self, name)}.")
        for name in ("ph1_learning_rate", "ph2_lr_important"):
            value = getattr(self, name)
            _check(0 < value < float("inf"), f"{name.upper()} must be positive and finite, not {value}.")
        for name in ("ph2_lr_unimportant_start", "ph2_lr_decay_rate"):
            value = getattr(self, name)
            _check(0 <= value < float("inf"), f"{name.upper()} must be 0 or more and finite, not {value}.")
        _check(self.ph2_freeze_epoch >= 0, f"PH2_FREEZE_EPOCH must be 0 or more, not {self.ph2_freeze_epoch}.")
        _check(self.ph1_data in ("all", "in"), f"PH1_DATA must be 'all' or 'in', not '{self.ph1_data}'.")
        _check(self.ph2_init in ("fresh", "phase1"), f"PH2_INIT must be 'fresh' or 'phase1', not '{self.ph2_init}'.")
        percent = self.importance_threshold_percentile
        _check(
            0 <= percent <= 100, f"IMPORTANCE_THRESHOLD_PERCENTILE must lie in 0 … 100 (per cent kept), not {percent}."
        )
        method, known = self.importance_aggregation, ", ".join(AGGREGATIONS)
        _check(method in AGGREGATIONS, f"IMPORTANCE_AGGREGATION must be one of {known}, not '{method}'.")

    def as_dict(self) -> dict[str, object]:
        """Settings by the constants' names, ready for JSON."""
        return {
            name.upper(): list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()
        }

    @property
    def hash(self) -> str:
        """First 12 hex digits of the SHA-256 of the settings as sorted JSON."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()[:12]


_as_written = {name: globals()[name] for name in names()}
