"""What the command asks for: a task by name, with the arms, cuts, amounts and lengths that suit it."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import config
from config import InputError
from engine import Params, check_memory, tail_halves
from features import get_features
from models import BackboneTail
from storage import FeatureSet, Results
from study import current_execution
from transfer import original
from transfer.arms import KINDS, LAYER_WISE, WEIGHT_WISE, arms_of
from transfer.blocks import TailNetworks, check_halves
from transfer.convnet import load_original
from transfer.features import FeatureNetworks, feature_tasks
from transfer.images import OWN, Classes, load_task
from transfer.networks import ConvNetworks, Networks
from transfer.original import OriginalSettings
from transfer.original_study import OriginalStudy
from transfer.report import clear
from transfer.study import TransferSettings, TransferStudy

FEATURES = "features"  # the task that is on a feature file or a backbone's images, not on small images
BLOCKS = "blocks"  # what it is called with TRAINED_BLOCKS
PROTOCOLS = ("updates", "original")
REPEATS = 20
MOST_REPEATS = max(map(original.repeats_of, original.AMOUNTS))  # of the original, with the smallest amounts
DEPTH = 6  # convolutions


@dataclass(frozen=True)
class Plan:
    """Defaults of a task."""

    kinds: tuple[str, ...]  # of arms
    cuts: tuple[int, ...] | None  # None = all
    amounts: tuple[float, ...]
    updates: int
    pretraining: int  # updates
    batch_size: int
    learning_rate: float = 1e-3
    channels: int = 16


PLANS = {
    "digits": Plan(
        (*LAYER_WISE, *WEIGHT_WISE),
        (0, 2, 4, 6),
        (0.01, 0.1, 1.0),
        updates=300,
        pretraining=300,
        batch_size=16,
        learning_rate=3e-3,
    ),
    FEATURES: Plan(KINDS, None, (0.01, 0.03, 0.1, 0.3, 1.0), 1000, pretraining=2000, batch_size=32),
    BLOCKS: Plan(KINDS, None, (0.01, 0.1, 1.0), 300, pretraining=500, batch_size=32),
}
IMAGES = Plan(
    ("scratch", "finetune", "frozen", "truncated"),
    tuple(range(DEPTH + 1)),
    original.AMOUNTS,
    updates=2000,
    pretraining=2000,
    batch_size=64,
)


def make_study(
    task: str = "digits",
    data: str | Path | None = None,
    *,
    classes: Classes | None = None,
    protocol: str = "updates",
    kinds: Iterable[str] | None = None,
    cuts: Iterable[int] | None = None,
    amounts: Iterable[float] | None = None,
    repeats: Sequence[int] | None = None,
    pretrained: str | Path | None = None,
    directory: str | Path | None = None,
    overwrite: bool = False,
) -> TransferStudy:
    """The transfer study of a task at the constants of `config`; what is not given is as suits the task.

    Args:
        task: of `images.PRESETS`; or "features", the package's own classifier on features, each domain held out in
            turn, and with `TRAINED_BLOCKS` the last blocks of the backbone; or "images", of one's own.
        data: where its images are, see `images.load_task`; a feature file (default `FEATURES_FILE`), unless features
            are those of `DATA_ROOT`.
        classes: of "images", those to pretrain on and those to fine-tune on.
        protocol: "updates", or "original" for `OriginalStudy`.
        kinds: of arms, see `arms.KINDS`.
        cuts: numbers of layers that are kept.
        amounts: shares of the training images.
        repeats: default 20, of the original as many as it has.
        pretrained: a network of the original (``.pth``) that all repeats start from.
        directory: default ``transfer/TASK`` below `RESULTS_DIR`, of the original ``transfer/TASK_original``.
        overwrite: delete what is there.

    Raises:
        InputError: see `TransferStudy`; images or a file that are missing or do not fit.
    """
    _refuse_together(task, protocol, classes, pretrained)
    kinds, cuts = (None if some is None else list(some) for some in (kinds, cuts))
    execution = current_execution()
    features = _features(data, execution.device, kinds, cuts) if task == FEATURES else None
    name = BLOCKS if features is not None and features.tokens is not None else task
    plan, like_original = PLANS.get(name, IMAGES), protocol == "original"
    tasks = [load_task(task, data, classes)] if features is None else feature_tasks(features)
    state = None if pretrained is None else load_original(pretrained)
    networks = _networks(plan, features, state, pretrained)
    about = {
        "network": networks.facts(),
        "pretrained": None if state is None else hashlib.sha256(Path(pretrained).read_bytes()).hexdigest()[:16],
    }
    settings = OriginalSettings.of(task, **about) if like_original else _settings(plan, about)
    if kinds is None:
        kinds = ("scratch", "frozen") if like_original else plan.kinds
    if cuts is None:
        cuts = range(networks.depth + 1) if like_original or plan.cuts is None else plan.cuts
    arms = arms_of(kinds, cuts, networks.depth)
    if name == BLOCKS:
        check_memory(networks.memory(len(arms)), execution.device, ("TRAINED_BLOCKS", "the number of arms"))
    amounts = amounts or (original.AMOUNTS if like_original else plan.amounts)
    repeats = repeats or range(MOST_REPEATS if like_original else REPEATS)
    folder = f"{task}_original" if like_original else name
    results = Results(Path(config.RESULTS_DIR) / "transfer" / folder if directory is None else directory)
    if overwrite:
        results.clear()
        clear(results.directory)
    made = OriginalStudy if like_original else TransferStudy
    return made(tasks, networks, settings, results, arms, amounts, repeats, state, execution)


def _refuse_together(task: str, protocol: str, classes: Classes | None, pretrained: str | Path | None) -> None:
    """Raise an `InputError` for what does not go together."""
    if protocol not in PROTOCOLS:
        raise InputError(f"There is no protocol '{protocol}'; there are {', '.join(PROTOCOLS)}.")
    if task == FEATURES and (protocol == "original" or pretrained is not None):
        raise InputError("The original has no networks on features: leave --protocol and --pretrained out.")
    if task == OWN and protocol == "original":
        raise InputError(f"The original has no task '{OWN}': leave --protocol out.")
    if task == FEATURES and classes is not None:
        raise InputError("The classes of features are the same before and after: leave --classes out.")
    if task == FEATURES:
        config.refuse_whole_model("transfer")
        if config.TRAINED_BLOCKS and config.SCHEDULER is not None:
            raise InputError("transfer trains blocks on this machine alone: leave out --scheduler.")


def _features(
    data: str | Path | None, device: str, kinds: Sequence[str] | None, cuts: Sequence[int] | None
) -> FeatureSet:
    """Of a file, or of images, with tokens on the device if blocks are trained."""
    if data is not None and config.DATA_ROOT is not None:
        raise InputError("A feature file (--data) and DATA_ROOT (--data-root) exclude each other: give one of them.")

    def check_tail(tail: BackboneTail) -> None:
        halves = tail_halves(tail)
        arms = arms_of(kinds or PLANS[BLOCKS].kinds, cuts or range(len(halves) + 1), len(halves))
        if any(arm.kind == "truncated" for arm in arms):
            check_halves(halves)

    file = data or config.FEATURES_FILE
    features = get_features(config.DATA_ROOT, file, device=device, check_tail=check_tail)
    return features if features.tokens is None else replace(features, tokens=features.tokens.to(device))


def _networks(plan: Plan, features: FeatureSet | None, state: Params | None, pretrained: str | Path | None) -> Networks:
    """What is trained; with a pretrained network, others of its shape."""
    if features is not None and features.tokens is not None:
        return TailNetworks.of(features, config.BACKBONE_LEARNING_RATE)
    if features is not None:
        return FeatureNetworks(tuple(config.HIDDEN_SIZES))
    if state is None:
        return ConvNetworks(config.TRANSFER_CHANNELS or plan.channels, DEPTH)
    channels = len(state["convs.0.weight"])
    if config.TRANSFER_CHANNELS not in (None, channels):
        raise InputError(f"'{pretrained}' has {channels} channels, and TRANSFER_CHANNELS is another number.")
    return ConvNetworks(channels, len(state) // 2 - 1)


def _settings(plan: Plan, about: dict[str, object]) -> TransferSettings:
    return TransferSettings(
        config.TRANSFER_UPDATES or plan.updates,
        config.TRANSFER_PRETRAINING or plan.pretraining,
        config.TRANSFER_BATCH_SIZE or plan.batch_size,
        config.TRANSFER_LEARNING_RATE or plan.learning_rate,
        **about,
    )


def without_effect(task: str, protocol: str, of_features: Iterable[str]) -> set[str]:
    """Settings that a task or protocol does not use, of those that the command knows.

    `of_features` are those that only the task on features reads.
    """
    if task == FEATURES:
        unused = {"TRANSFER_CHANNELS", "HIDDEN_SIZES" if config.TRAINED_BLOCKS else "BACKBONE_LEARNING_RATE"}
    else:
        unused = {*of_features}
    if protocol == "original":
        unused |= {f"TRANSFER_{name}" for name in ("UPDATES", "PRETRAINING", "BATCH_SIZE", "LEARNING_RATE")}
    return unused
