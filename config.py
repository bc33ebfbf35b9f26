"""Every default of the project, by the names the README uses.

Edit this file to change the experiment. In a notebook ``config.NAME = value`` works as well: settings
objects read the constants when they are made, not when this module is imported.
"""

import ast
import difflib
import hashlib
import json
import math
import re
import reprlib
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import ClassVar

# Data
DATA_ROOT: str | None = None  # folder of domain folders of class folders, or Parquet files; None = the bundled features
FEATURES_FILE: str | None = None  # features made elsewhere, in the format of data/README.md
VIT_MODEL: str = "google/vit-base-patch16-224-in21k"  # or another image model: hub name, "timm:NAME" or directory
POOLING: str = "auto"  # of its output: "cls" token, "mean" of patches, "pooler" of the model; "auto" = the first it has
FEATURE_LAYERS: str = "last"  # "last" = final [CLS]; "all" = [CLS] and mean patch of every block; with DATA_ROOT
CACHE_DIR: str | None = None  # extracted features and content hashes; None = cache/ beside this file
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
IMPORTANCE_CRITERION: str = "movement"  # what makes a weight important: see importance.CRITERIA
IMPORTANCE_AGGREGATION: str = "sum"  # over source domains: see importance.AGGREGATIONS
MASK_SCOPE: str = "global"  # the most important weights of all matrices together, or of each "layer" or "row"

# Phase 2: training with the important weights favoured
PH2_NUM_EPOCHS: int = 10
PH2_LR_IMPORTANT: float = 1e-3  # Adam; also every parameter outside the tracked matrices
PH2_LR_UNIMPORTANT_START: float = 1e-4  # tracked weights outside the mask, first epoch
PH2_LR_DECAY_RATE: float = 0.5  # factor on it after each epoch
PH2_FREEZE_EPOCH: int = 7  # epochs after which it is exactly 0; 0 = from the start
PH2_INIT: str = "fresh"  # "fresh" random network, "phase1" for Phase 1's own start, or its networks merged: `STARTS`

# Trained blocks: the same two phases on the last blocks of the ViT, instead of on frozen features (needs DATA_ROOT)
TRAINED_BLOCKS: int | str = 0  # how many of the last blocks; 0 = none; "all" = the whole model, from images (below)
# With blocks, these take the place of those above:
BLOCK_HIDDEN_SIZES: tuple[int, ...] = ()  # of the classifier on [CLS]; () = a linear layer
BLOCK_BATCH_SIZE: int = 64
BLOCK_EPOCHS: int = 5  # of both phases
BLOCK_PH1_LEARNING_RATE: float = 1e-4  # Adam; of blocks and classifier
BLOCK_PH1_DATA: str = "in"  # learning rates are chosen on `out`, so masks must not see it
BLOCK_SEEDS_PER_CHUNK: int = 1  # seeds trained and written together; these networks are large
BLOCK_FREEZE_EPOCH: int = 0  # unmarked weights are frozen from the start
BACKBONE_LEARNING_RATE: float = 1e-4  # Adam, Phase 2; of the blocks' marked weights, biases, norms; of transfer all
HEAD_START: str = "probe"  # of the classifier: "probe" (logistic regression, as in LP-FT) or "random"
PROBE_C: float = 0.01  # inverse of the penalty of that regression

# The whole model, from augmented images (TRAINED_BLOCKS = "all"), by DomainBed's protocol; all else as of blocks
IMAGE_STEPS: int = 5001  # updates of each network, in both phases
IMAGE_CHECKPOINTS: int = 17  # how often along them accuracy is measured: the epochs of results and schedules
IMAGE_BATCH_SIZE: int = 32  # images of each source domain per update
IMAGE_LEARNING_RATE: float = 5e-5  # Adam, of everything, in both phases
IMAGE_LR_UNIMPORTANT_START: float = 5e-6  # tracked weights outside the mask, first checkpoint

# Transfer study: small networks, pretrained on some classes and fine-tuned on others; None = as suits the task
TRANSFER_CHANNELS: int | None = None  # of each of the six convolutions
TRANSFER_PRETRAINING: int | None = None  # updates of pretraining
TRANSFER_UPDATES: int | None = None  # of fine-tuning, as many for every amount of data
TRANSFER_BATCH_SIZE: int | None = None  # images per update of both; all there are where these are fewer
TRANSFER_LEARNING_RATE: float | None = None  # Adam, of both; with TRAINED_BLOCKS of the head

# Run
NUM_SEEDS: int = 10  # seeds 0 … N-1
SEEDS_PER_CHUNK: int = 50  # seeds trained together and written together
DEVICE: str | None = None  # "cpu" or "cuda"; None = CUDA where there is one
THREADS: int | None = None  # CPU threads; None = one to train, all to extract features
SCHEDULER: str | None = None  # of a Dask cluster, as tcp://HOST:8786, to train on; None = this machine's cores
RESULTS_DIR: str = "results"

AGGREGATIONS = ("sum", "mean", "max", "min", "union", "intersection", "normalized_sum")
CRITERIA = ("movement", "signed", "agree", "consensus", "magnitude", "gradient", "joint", "snip", "taylor", "fisher")
CRITERIA += ("path",)
AGGREGATED = ("movement", "taylor", "fisher", "path")  # criteria of each domain by itself; the others compare domains
WITHOUT_GRADIENTS = ("movement", "signed", "agree", "consensus", "magnitude")  # criteria that need no gradient
POOLINGS = ("auto", "cls", "mean", "pooler")
SCOPES = ("global", "layer", "row")
STARTS = ("fresh", "phase1", "merged_mean", "merged_ties", "merged_consensus")
ADDED_LATER = {"IMPORTANCE_CRITERION": "movement", "MASK_SCOPE": "global"}  # what held before there was the setting


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
        elif (option is float and type(value) is int and abs(value) < 1e300) or (option is str and value is not None):
            return option(value)
    wanted = " or ".join(getattr(option, "__name__", str(option)) for option in _options(kind))
    raise InputError(f"{name} must be of type {wanted.replace('NoneType', 'None')}, not {reprlib.repr(value)}.")


def apply(*assignments: dict[str, object]) -> None:
    """Set constants of this module by name, with the same checks as ``--set`` (for notebooks and papermill).

    Raises:
        InputError: a name that is unknown or in several of `assignments`, or a value that is no good: nothing is set.
    """
    values = {}
    for name, value in (pair for given in assignments for pair in given.items()):
        if name in values:
            raise InputError(f"{name} is given twice.")
        values[name] = _coerce(name, value, _declared(name))
        check(name, values[name])
    globals().update(values)  # all or none


def changed(name: str) -> bool:
    """Whether a setting has another value than in this file."""
    return globals()[name] != _as_written[name]


def without_effect(name: str, trained_blocks: int | str) -> str | None:
    """Why a setting has no effect with these `TRAINED_BLOCKS`, and what to do; None if it has one."""
    own, every = kind_of(trained_blocks), {kind: _read_by(kind) for kind in (Settings, BlockSettings, ImageSettings)}
    fields_of = {field for of_kind in every.values() for field, constant in of_kind.items() if constant == name}
    if name == "TRAINED_BLOCKS" or not fields_of or name in every[own].values():
        return None
    if trained_blocks and (instead := next((every[own][field] for field in fields_of if field in every[own]), None)):
        whole = " = 'all'" if own is ImageSettings else ""
        return f"{name} has no effect with TRAINED_BLOCKS{whole}, where {instead} takes its place: set that."
    needed = "TRAINED_BLOCKS" if name in every[BlockSettings].values() else "TRAINED_BLOCKS = 'all'"
    return f"{name} has no effect without {needed}: set that too, or leave it out."


def refuse_whole_model(what: str, trained_blocks: int | str | None = None) -> None:
    """Raise an `InputError` if `TRAINED_BLOCKS` (default: as it is now) is "all", for `what` trains less."""
    if (TRAINED_BLOCKS if trained_blocks is None else trained_blocks) == "all":
        raise InputError(f"{what} trains the last blocks at most: TRAINED_BLOCKS = 'all' is for run.")


def _read_by(kind: type["Settings"]) -> dict[str, str]:
    """What a kind of training reads: field -> constant."""
    chunk = "SEEDS_PER_CHUNK" if kind is Settings else "BLOCK_SEEDS_PER_CHUNK"
    return {field.name: kind.constant(field.name) for field in fields(kind)} | {"seeds_per_chunk": chunk}


def kind_of(trained_blocks: int | str) -> type["Settings"]:
    """The class of the settings of training so many blocks, of `TRAINED_BLOCKS`."""
    if trained_blocks == "all":
        return ImageSettings
    return BlockSettings if trained_blocks else Settings


def reset() -> None:
    """Give every setting the value that it has in this file, whatever was set since it was read."""
    globals().update(_as_written)


LIMITS = {  # settings and options that are numbers: the smallest and the largest value, also of each in a tuple
    "EXTRACTION_BATCH_SIZE": (1, 10**5),
    "EXTRACTION_WORKERS": (0, 1000),
    "HIDDEN_SIZES": (1, 10**5),
    "BATCH_SIZE": (1, 10**6),
    "PH1_NUM_EPOCHS": (1, 10**5),
    "PH2_NUM_EPOCHS": (1, 10**5),
    "PH2_FREEZE_EPOCH": (0, 10**9),
    "TRAINED_BLOCKS": (0, 1000),
    "BLOCK_HIDDEN_SIZES": (1, 10**5),
    "BLOCK_BATCH_SIZE": (1, 10**6),
    "BLOCK_EPOCHS": (1, 10**5),
    "BLOCK_FREEZE_EPOCH": (0, 10**9),
    "BLOCK_SEEDS_PER_CHUNK": (1, 10**5),
    "IMAGE_STEPS": (1, 10**7),
    "IMAGE_CHECKPOINTS": (1, 10**5),
    "IMAGE_BATCH_SIZE": (1, 10**5),
    "IMPORTANCE_THRESHOLD_PERCENTILE": (0, 100),
    "TRANSFER_CHANNELS": (1, 4096),
    "TRANSFER_PRETRAINING": (1, 10**6),
    "TRANSFER_UPDATES": (1, 10**6),
    "TRANSFER_BATCH_SIZE": (1, 10**6),
    "NUM_SEEDS": (1, 10**5),
    "SEEDS_PER_CHUNK": (1, 10**5),
    "THREADS": (1, 1000),
    "--trials": (1, 1000),
}
MOST_LAYERS = 100  # of HIDDEN_SIZES
RULES = (  # other settings, what they must do, and whether a value does
    (
        ("SPLIT_SEED",),
        "be 'seed' or a whole number of at most 18 digits",
        lambda seed: seed == "seed" or (type(seed) is int and abs(seed) < 10**18),
    ),
    (("FEATURE_LAYERS",), "be 'last' or 'all'", lambda layers: layers in ("last", "all")),
    (("POOLING",), f"be one of {', '.join(POOLINGS)}", lambda pooling: pooling in POOLINGS),
    (("OUT_FRACTION",), "lie between 0 and 1", lambda part: 0 < part < 1),
    (("HIDDEN_SIZES",), "have two layers or more, to have a tracked matrix", lambda sizes: len(sizes) >= 2),
    (
        ("HIDDEN_SIZES", "BLOCK_HIDDEN_SIZES"),
        f"have {MOST_LAYERS} layers at most",
        lambda sizes: len(sizes) <= MOST_LAYERS,
    ),
    (
        (
            "PH1_LEARNING_RATE",
            "PH2_LR_IMPORTANT",
            "BLOCK_PH1_LEARNING_RATE",
            "BACKBONE_LEARNING_RATE",
            "IMAGE_LEARNING_RATE",
            "PROBE_C",
            "TRANSFER_LEARNING_RATE",
        ),
        "be positive and finite",
        lambda rate: rate is None or 0 < rate < math.inf,
    ),
    (
        ("PH2_LR_UNIMPORTANT_START", "PH2_LR_DECAY_RATE", "IMAGE_LR_UNIMPORTANT_START"),
        "be 0 or more and finite",
        lambda rate: 0 <= rate < math.inf,
    ),
    (("TRAINED_BLOCKS",), "be a number of blocks or 'all'", lambda blocks: blocks == "all" or type(blocks) is int),
    (("PH1_DATA", "BLOCK_PH1_DATA"), "be 'all' or 'in'", lambda part: part in ("all", "in")),
    (("PH2_INIT",), f"be one of {', '.join(STARTS)}", lambda start: start in STARTS),
    (("HEAD_START",), "be 'probe' or 'random'", lambda start: start in ("probe", "random")),
    (("IMPORTANCE_CRITERION",), f"be one of {', '.join(CRITERIA)}", lambda criterion: criterion in CRITERIA),
    (("IMPORTANCE_AGGREGATION",), f"be one of {', '.join(AGGREGATIONS)}", lambda method: method in AGGREGATIONS),
    (("MASK_SCOPE",), f"be one of {', '.join(SCOPES)}", lambda scope: scope in SCOPES),
    (
        ("SCHEDULER",),
        "be an address such as tcp://HOST:8786",
        lambda address: address is None or re.fullmatch(r"(\w+://)?[^\s/]+:\d+", address),
    ),
    (("RESULTS_DIR",), "name a directory", str.strip),
)


def check(name: str, value: object) -> None:
    """Raise an `InputError` if a value, of the right type, is not allowed for a setting or an option."""
    rules = [(words, good) for named, words, good in RULES if name in named]
    if name in LIMITS and value is not None and not isinstance(value, str):
        low, high = LIMITS[name]
        numbers = value if isinstance(value, tuple) else (value,)
        rules.append((f"lie in {low} … {high}", lambda _: all(low <= number <= high for number in numbers)))
    for words, good in rules:
        if not good(value):
            raise InputError(f"{name} must {words}, not {reprlib.repr(value)}.")


@dataclass(frozen=True)
class Settings:
    """What determines a result, besides features, seed and holdout. `Settings.current()` reads the constants.

    Fields have the constants' names in lower case; see the comments there for meanings and units.
    """

    constants: ClassVar[Mapping[str, str]] = {}  # field -> the constant that it is read from, where names differ

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
    importance_criterion: str
    mask_scope: str

    @classmethod
    def current(cls, **overrides) -> "Settings":
        """The constants of this module as they are now, with `overrides` by field name.

        With `TRAINED_BLOCKS` these are `BlockSettings` or `ImageSettings`.
        """
        kind = kind_of(overrides.get("trained_blocks", TRAINED_BLOCKS)) if cls is Settings else cls
        if kind is not cls:
            return kind.current(**overrides)
        values = {field.name: overrides.pop(field.name, globals()[cls.constant(field.name)]) for field in fields(cls)}
        if overrides:
            raise InputError(f"There is no setting '{next(iter(overrides)).upper()}'.")
        return cls(**values)

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> "Settings":
        """The settings that `as_dict` has written; what else it does not say is as the constants say."""
        values = ADDED_LATER | values
        kind = kind_of(values.get("TRAINED_BLOCKS", 0))
        constants = {field.name: kind.constant(field.name) for field in fields(kind)}  # one may be of several fields
        known = {field: values[constant] for field, constant in constants.items() if constant in values}
        return kind.current(**known, **{name: values[name] for name in values.keys() - constants.values()})

    @classmethod
    def constant(cls, field: str) -> str:
        """Name of the constant that a field is read from."""
        return cls.constants.get(field, field.upper())

    def __post_init__(self) -> None:
        for field in fields(self):  # equal settings are of equal types, and so of equal hash
            name = self.constant(field.name)
            object.__setattr__(self, field.name, _coerce(name, getattr(self, field.name), _declared(name)))
            check(name, getattr(self, field.name))
        if self.importance_criterion not in AGGREGATED and self.importance_aggregation != "sum":
            raise InputError(
                f"IMPORTANCE_AGGREGATION has no effect with IMPORTANCE_CRITERION = '{self.importance_criterion}', "
                "which compares the domains itself: leave it at 'sum'."
            )

    def as_dict(self) -> dict[str, object]:
        """Settings by the constants' names, ready for JSON.

        A setting of `ADDED_LATER` is left out where nothing differs from what was done before, so that results of that
        time are found again.
        """
        values = {self.constant(name): value for name, value in asdict(self).items()}
        values = {name: value for name, value in values.items() if (name, value) not in ADDED_LATER.items()}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @property
    def hash(self) -> str:
        """First 12 hex digits of the SHA-256 of the settings as sorted JSON."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class BlockSettings(Settings):
    """`Settings` of training the ViT's last blocks: network, batches and schedule have constants of their own."""

    constants: ClassVar[Mapping[str, str]] = {
        "hidden_sizes": "BLOCK_HIDDEN_SIZES",
        "batch_size": "BLOCK_BATCH_SIZE",
        "ph1_num_epochs": "BLOCK_EPOCHS",
        "ph1_learning_rate": "BLOCK_PH1_LEARNING_RATE",
        "ph1_data": "BLOCK_PH1_DATA",
        "ph2_num_epochs": "BLOCK_EPOCHS",
        "ph2_freeze_epoch": "BLOCK_FREEZE_EPOCH",
    }

    trained_blocks: int | str
    backbone_learning_rate: float
    head_start: str
    probe_c: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if kind_of(self.trained_blocks) is not type(self):
            raise InputError(f"TRAINED_BLOCKS = {self.trained_blocks!r} has other settings: make them anew.")
        values = {}  # a constant that is read for several fields says the same for all of them
        for field in fields(self):
            name, value = self.constant(field.name), getattr(self, field.name)
            if values.setdefault(name, value) != value:
                raise InputError(f"{name} is one value for all that it says, not {values[name]} and {value}.")
        if self.head_start == "probe" and self.hidden_sizes:
            raise InputError(
                "HEAD_START = 'probe' starts a linear classifier: BLOCK_HIDDEN_SIZES must be () with it, or HEAD_START "
                "be 'random'."
            )


@dataclass(frozen=True)
class ImageSettings(BlockSettings):
    """`BlockSettings` of training the whole model from images: batches of every domain, and a number of updates."""

    constants: ClassVar[Mapping[str, str]] = BlockSettings.constants | {
        "batch_size": "IMAGE_BATCH_SIZE",
        "ph1_num_epochs": "IMAGE_CHECKPOINTS",
        "ph2_num_epochs": "IMAGE_CHECKPOINTS",
        "ph1_learning_rate": "IMAGE_LEARNING_RATE",
        "ph2_lr_important": "IMAGE_LEARNING_RATE",
        "ph2_lr_unimportant_start": "IMAGE_LR_UNIMPORTANT_START",
        "backbone_learning_rate": "IMAGE_LEARNING_RATE",
    }

    image_steps: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.importance_criterion not in WITHOUT_GRADIENTS:
            raise InputError(
                f"With TRAINED_BLOCKS = 'all' IMPORTANCE_CRITERION must be one of {', '.join(WITHOUT_GRADIENTS)}: "
                "gradients on all images are too large."
            )
        if self.ph2_num_epochs > self.image_steps:
            raise InputError(
                f"There are more IMAGE_CHECKPOINTS ({self.ph2_num_epochs}) than IMAGE_STEPS ({self.image_steps})."
            )

    @property
    def steps_per_epoch(self) -> tuple[int, ...]:
        """Updates before each checkpoint since the one before, as equal as can be."""
        ends = [self.image_steps * i // self.ph2_num_epochs for i in range(self.ph2_num_epochs + 1)]
        return tuple(end - begin for begin, end in pairwise(ends))


_as_written = {name: globals()[name] for name in names()}
