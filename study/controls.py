"""The arms of a study: importance masking, plain training, and the controls that each break one thing.

All masks of a study have the same density. `erm` (every weight at the full rate) and `importance` are the question.
`random` and `random_layer` forget the importance, `inverted` reverses it, `permuted` keeps the structure of the mask
but not its place, and `other_seed` takes the mask of another start. `frozen` and `prune` change what happens to the
unmarked weights. Each can begin from a fresh start, where a position in the mask means nothing yet, or from Phase 1's
start, where it does.

Of the last blocks of a ViT, which start from pretrained weights, two more can be asked for: `magnitude` marks the
largest of those weights, and `head` none, so that the classifier, biases and norms learn alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

import config
from config import InputError, Settings
from engine import Network, Params, generator
from importance import Layers, marked_weights, top_k_mask, unflatten
from study.merging import MERGES
from trainer_phase2 import HoldoutMasks, Masking

SWEPT = (
    "IMPORTANCE_CRITERION",
    "IMPORTANCE_THRESHOLD_PERCENTILE",
    "IMPORTANCE_AGGREGATION",
    "MASK_SCOPE",
    "PH2_LR_IMPORTANT",
    "PH2_FREEZE_EPOCH",
    "BLOCK_FREEZE_EPOCH",
    "BACKBONE_LEARNING_RATE",
)


class MaskSource(NamedTuple):
    """What the masks of a holdout are made from."""

    holdout: str  # names the random streams
    seeds: tuple[int, ...]
    own: Callable[[Settings], HoldoutMasks]  # masks of these seeds
    next_seed: Callable[[Settings], HoldoutMasks]  # masks of each next seed (s + 1)
    network: Network  # that is trained; with pretrained weights if it has some
    merged: Callable[[Settings], Params] | None = (
        None  # Phase 1's networks of these seeds merged into one, see `merging`
    )

    def per_seed(self, draw: Callable[[int, str, list[Tensor]], list[Tensor]], masks: HoldoutMasks) -> list[Tensor]:
        """A mask for each seed, stacked: `draw` makes it of seed, holdout and importance mask L × ``[out, in]``."""
        drawn = [draw(seed, self.holdout, [layer[s] for layer in masks.mask]) for s, seed in enumerate(self.seeds)]
        return [torch.stack(layers) for layers in zip(*drawn, strict=True)]


def random_mask(seed: int, holdout: str, like: Layers, percent: float, scope: str = "global") -> list[Tensor]:
    """As many of all weights as a mask of this scope marks, uniformly without replacement: L × bool ``[out, in]``."""
    n, marked = sum(layer.numel() for layer in like), marked_weights(like, percent, scope)
    flat = torch.zeros(n, dtype=torch.bool)
    flat[torch.randperm(n, generator=generator(seed, "random_mask", holdout))[:marked]] = True
    return unflatten(flat, like)


def random_layer_mask(seed: int, holdout: str, mask: Layers) -> list[Tensor]:
    """Random positions, but in each layer as many as `mask` marks there."""
    draw = generator(seed, "random_layer_mask", holdout)
    shuffled = [layer.flatten()[torch.randperm(layer.numel(), generator=draw)] for layer in mask]
    return [values.view_as(layer) for values, layer in zip(shuffled, mask, strict=True)]


def permuted_mask(seed: int, holdout: str, mask: Layers) -> list[Tensor]:
    """The mask with the hidden units permuted at random, consistently from layer to layer.

    Row and column counts, densities and paths through the layers stay; which unit they belong to does not.
    """
    draw = generator(seed, "permuted_mask", holdout)
    widths = [mask[0].shape[1], *(layer.shape[0] for layer in mask)]
    orders = [torch.randperm(width, generator=draw) for width in widths]
    return [layer[orders[i + 1]][:, orders[i]] for i, layer in enumerate(mask)]


def permuted_matrices(seed: int, holdout: str, mask: Layers) -> list[Tensor]:
    """The mask with the rows and the columns of each matrix permuted at random, in each in its own way.

    How many weights of a row and of a column are marked stays; which row and column they belong to does not.
    """
    draw = generator(seed, "permuted_mask", holdout)
    return [
        layer[torch.randperm(len(layer), generator=draw)][:, torch.randperm(layer.shape[1], generator=draw)]
        for layer in mask
    ]


def _importance(masks: HoldoutMasks, source: MaskSource, settings: Settings) -> Layers:
    return masks.mask


def _every(masks: HoldoutMasks, source: MaskSource, settings: Settings) -> Layers:
    return [torch.ones_like(layer) for layer in masks.mask]


def _inverted(masks: HoldoutMasks, source: MaskSource, settings: Settings) -> Layers:
    percent, scope = settings.importance_threshold_percentile, settings.mask_scope
    return top_k_mask([-layer for layer in masks.scores], percent, scope)


def _random(masks: HoldoutMasks, source: MaskSource, settings: Settings) -> Layers:
    percent, scope = settings.importance_threshold_percentile, settings.mask_scope
    return source.per_seed(lambda seed, holdout, mask: random_mask(seed, holdout, mask, percent, scope), masks)


def _random_layer(masks: HoldoutMasks, source: MaskSource, settings: Settings) -> Layers:
    return source.per_seed(random_layer_mask, masks)


def _permuted(masks: HoldoutMasks, source: MaskSource, settings: Settings) -> Layers:
    return source.per_seed(permuted_mask if source.network.chained else permuted_matrices, masks)


def _none(masks: HoldoutMasks, source: MaskSource, settings: Settings) -> Layers:
    return [torch.zeros_like(layer) for layer in masks.mask]


def _magnitude(masks: HoldoutMasks, source: MaskSource, settings: Settings) -> Layers:
    pretrained = source.network.tracked(dict(source.network.named_parameters()))
    percent, scope = settings.importance_threshold_percentile, settings.mask_scope
    largest = top_k_mask([weights.detach().cpu().abs() for weights in pretrained], percent, scope)
    return [layer.expand(len(source.seeds), -1, -1) for layer in largest]


@dataclass(frozen=True)
class Control:
    """One way to choose the weights that learn at the full rate, and what happens to the others.

    Attributes:
        mask: (masks by importance, their source, the arm's settings) -> mask, L × bool ``[S, out, in]``.
        meaning: one line on what it keeps and what it breaks.
        frozen: the unmarked weights keep their start.
        prune: the unmarked weights are zero from the start and stay so.
        next_seed: the mask comes from Phase 1 of the next seed, which must be trained too.
        learned: the mask comes from an importance: there is none of a network that failed, and with
            `PH1_DATA = "all"` it depends on the sources' validation images.
        pretrained: it is of pretrained weights only, with `TRAINED_BLOCKS`.
    """

    mask: Callable[[HoldoutMasks, MaskSource, Settings], Layers]
    meaning: str
    frozen: bool = False
    prune: bool = False
    next_seed: bool = False
    learned: bool = True
    pretrained: bool = False


CONTROLS: Mapping[str, Control] = {
    "erm": Control(_every, "every weight at the full rate", learned=False),
    "importance": Control(_importance, "the weights that moved most"),
    "random": Control(_random, "random positions", learned=False),
    "random_layer": Control(_random_layer, "random positions, with the importance mask's count in each layer"),
    "inverted": Control(_inverted, "as many of the least important weights"),
    "permuted": Control(_permuted, "the importance mask with units, of blocks rows and columns, permuted"),
    "other_seed": Control(_importance, "the importance mask of the next seed, from another start", next_seed=True),
    "prune": Control(_importance, "the importance mask; the other weights are zero", prune=True),
    "frozen": Control(_importance, "the importance mask; the other weights keep their start", frozen=True),
    "magnitude": Control(_magnitude, "the largest pretrained weights", learned=False, pretrained=True),
    "head": Control(
        _none, "no weight of the blocks; classifier, biases and norms alone", learned=False, pretrained=True
    ),
}


@dataclass(frozen=True)
class Arm:
    """One condition of a study: a control, where it starts, and which settings differ from the study's.

    Attributes:
        control: a name of `CONTROLS`.
        start: a name of `config.STARTS`; None = as `PH2_INIT` says.
        changes: settings of masks or schedule that differ, as (name, value) pairs; a mapping is accepted.

    Raises:
        InputError: an unknown control or start, or a setting that arms of the same batches cannot differ in.
    """

    control: str = "importance"
    start: str | None = None
    changes: tuple[tuple[str, object], ...] = ()

    def __post_init__(self) -> None:
        changes = self.changes.items() if isinstance(self.changes, Mapping) else self.changes
        object.__setattr__(self, "changes", tuple((name.upper(), value) for name, value in changes))
        if self.control not in CONTROLS:
            raise InputError(f"There is no control '{self.control}'; there are {', '.join(CONTROLS)}.")
        if self.start not in (None, *config.STARTS):
            raise InputError(f"There is no start '{self.start}'; there are {', '.join(config.STARTS)}.")
        for name, _ in self.changes:
            if name not in SWEPT:
                raise InputError(f"The arms of a study cannot differ in {name}; they can in {', '.join(SWEPT)}.")

    @property
    def name(self) -> str:
        """How tables, records and files call it: ``control[NAME=VALUE]@start``, as far as given."""
        changes = ",".join(f"{name}={value}" for name, value in self.changes)
        return self.control + (f"[{changes}]" if changes else "") + (f"@{self.start}" if self.start else "")

    @classmethod
    def of(cls, name: str) -> "Arm":
        """The arm that is called so."""
        chosen, _, start = name.partition("@")
        control, _, changes = chosen.removesuffix("]").partition("[")
        return cls(control, start or None, [config.parse(change) for change in changes.split(",") if change])

    def settings(self, settings: Settings) -> Settings:
        """The settings that this arm is trained with.

        With another `PH2_LR_IMPORTANT` the rate of the unmarked weights keeps its ratio to it.
        """
        known = {settings.constant(field.name): field.name for field in fields(settings)}
        if unknown := [name for name, _ in self.changes if name not in known]:
            raise InputError(f"{unknown[0]} is no setting of this training: the arm '{self.name}' cannot change it.")
        own = {known[name]: value for name, value in self.changes}
        if "ph2_lr_important" in own:
            ratio = settings.ph2_lr_unimportant_start / settings.ph2_lr_important
            own["ph2_lr_unimportant_start"] = ratio * own["ph2_lr_important"]
        if self.start:
            own["ph2_init"] = self.start
        if CONTROLS[self.control].frozen:
            own["ph2_freeze_epoch"] = 0
        return replace(settings, **own)

    def masking(self, source: MaskSource, settings: Settings) -> Masking:
        """Mask and schedule of this arm for the seeds of one holdout."""
        control, own = CONTROLS[self.control], self.settings(settings)
        masks = source.next_seed(own) if control.next_seed else source.own(own)
        merged = own.ph2_init in MERGES
        mask, failed = control.mask(masks, source, own), masks.failed if control.learned or merged else None
        start = source.merged(own) if merged else None
        return Masking(mask, own, control.prune, failed, settings.ph2_lr_important, start)

    @property
    def chooses(self) -> bool:
        """Whether its mask marks some weights and leaves out others."""
        return CONTROLS[self.control].mask not in (_every, _none)

    @property
    def needs_next_seed(self) -> bool:
        """Whether the mask comes from Phase 1 of each next seed, which must be trained too."""
        return CONTROLS[self.control].next_seed

    def saw_validation(self, settings: Settings) -> bool:
        """Whether the mask, or the start, depends on images that the networks are validated on."""
        from_phase1 = CONTROLS[self.control].learned or self.settings(settings).ph2_init in MERGES
        return from_phase1 and settings.ph1_data == "all"


ERM, IMPORTANCE = Arm("erm"), Arm("importance")
BOTH_STARTS = tuple(
    Arm(name, start) for start in (None, "phase1") for name, control in CONTROLS.items() if not control.pretrained
)


def check_arms(arms: Sequence[Arm], pretrained: bool = False) -> tuple[Arm, ...]:
    """Arms, each once; an `InputError` for anything else, or for one that needs `pretrained` weights without them."""
    if wrong := [arm for arm in arms if not isinstance(arm, Arm)]:
        raise InputError(f"An arm of a study is a study.Arm, not {wrong[0]!r}.")
    if not pretrained and (needy := [arm.name for arm in arms if CONTROLS[arm.control].pretrained]):
        raise InputError(f"The arm '{needy[0]}' is of pretrained weights: it needs TRAINED_BLOCKS.")
    return tuple(dict.fromkeys(arms))
