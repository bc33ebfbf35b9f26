"""Phase 2: leave-one-domain-out training, with a learning rate per weight.

Important weights, and every parameter outside the tracked matrices, learn at the full rate; the others at a small one
that decays each epoch and is exactly zero from the freeze epoch on. With every weight at the full rate this is
empirical risk minimization (ERM), the baseline that is trained beside it on the same seeds, starts and batches.

`rates_of_epoch` is the rate of every weight of one network, for the plain loop `trainer_phase1.train_network`;
`train_holdout` is Phase 2 for all seeds and arms.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import TypeVar

import torch
from torch import Tensor

from config import Settings
from engine import (
    Params,
    Rates,
    SplitFeatures,
    Trained,
    accuracies,
    groups_of,
    joined,
    make_engine,
    network_start,
    raise_failure,
    train,
    training_order,
)
from importance import Layers, degenerate, normalize, score_weights, top_k_mask, unimportant_rate, weight_rates

Item = TypeVar("Item")


@dataclass
class HoldoutMasks:
    """The masks for one holdout, made from Phase 1 of its source domains, never of the held-out one."""

    scores: list[Tensor]  # of `IMPORTANCE_CRITERION`, over all source domains, L × [S, out, in]
    normalized: list[Tensor]  # min–max over all layers, in [0, 1]
    mask: list[Tensor]  # bool, True = important
    failed: Tensor  # [S], code of the first source network that failed (see `trainer_phase1.DomainNetworks`), 0 = none


@dataclass
class HoldoutNetworks:
    """Phase 2 of one holdout: S seeds × V arms, E epochs."""

    holdout: str
    seeds: tuple[int, ...]
    start: Params  # name -> [S, V, *shape]; empty where they are not kept
    final: Params
    loss: Tensor  # of each epoch, [S, V, E]
    train_accuracy: Tensor  # [S, V, E]
    validation_accuracy: Tensor  # unweighted mean over source domains of that on their `out` split, [S, V, E]
    correct: Tensor  # right answers after each epoch, [S, V, E, domains, 2, classes]
    failed: Tensor  # [S, V], codes as in `trainer_phase1.DomainNetworks`


def masks_for(
    evidence: Mapping[str, Mapping[str, Layers]], failed: Mapping[str, Tensor], settings: Settings
) -> HoldoutMasks:
    """Score the weights by what Phase 1 of a holdout's source domains has measured, and mark the top per cent.

    Args:
        evidence: source domain -> name -> L × ``[S, out, in]``, see `trainer_phase1.DomainNetworks.evidence`.
        failed: source domain -> ``[S]``, codes as in `trainer_phase1.DomainNetworks`.
    """
    percent = settings.importance_threshold_percentile
    scores = score_weights(settings.importance_criterion, evidence, settings.importance_aggregation, percent)
    codes = torch.stack([failed[domain] for domain in evidence])
    first = codes.gather(0, (codes != 0).int().argmax(0, keepdim=True)).squeeze(0)
    first = torch.where((first == 0) & degenerate(scores), -1, first)
    mask = top_k_mask(scores, percent, settings.mask_scope)
    return HoldoutMasks(scores, normalize(scores), mask, first)


def low_rate(epoch: int, settings: Settings) -> float:
    """Rate of the unmarked weights in an epoch (from 0), as a factor on `PH2_LR_IMPORTANT`."""
    start, decay, freeze = settings.ph2_lr_unimportant_start, settings.ph2_lr_decay_rate, settings.ph2_freeze_epoch
    return unimportant_rate(epoch, start, decay, freeze) / settings.ph2_lr_important


def rates_of_epoch(tracked: Layers, mask: Layers, epoch: int, settings: Settings) -> dict[Tensor, Tensor]:
    """The rates of one network in an epoch (from 0), for `importance.step_with_rates`.

    `tracked` are its tracked parameters, L × ``[out, in]``; `mask` is bool, of the same shapes.
    """
    rate = low_rate(epoch, settings)
    return {w: weight_rates(marked, w.new_tensor(rate)) for w, marked in zip(tracked, mask, strict=True)}


@dataclass(frozen=True)
class Masking:
    """How the networks of one arm are trained on a holdout."""

    mask: Layers  # L × bool [S, out, in]; all True is ERM
    settings: Settings  # the start, and the schedule of the unmarked weights; all else must be the same in all arms
    prune: bool = False  # unmarked weights are zero from the start and never trained
    failed: Tensor | None = None  # [S], codes of seeds whose mask cannot be used: their networks count as failed
    learning_rate: float | None = None  # of the run, whatever the arm's own is; None = the same
    start: Params | None = None  # name -> [S, *shape], where it begins; None = as `PH2_INIT` draws it

    def low_rates(self) -> tuple[float, ...]:
        """Factor on the learning rate of the unmarked weights, for each epoch."""
        epochs = range(self.settings.ph2_num_epochs)
        return tuple(0.0 if self.prune else low_rate(epoch, self.settings) for epoch in epochs)

    @property
    def backbone_rate(self) -> float:
        """Learning rate of the blocks; 0 where there are none."""
        return getattr(self.settings, "backbone_learning_rate", 0.0)

    @property
    def speed(self) -> float:
        """Factor on the learning rate of the run."""
        own = self.settings.ph2_lr_important
        return own / (self.learning_rate or own)

    def same_training(self, other: "Masking") -> bool:
        """Whether two arms are the same networks by construction, so that they need training only once."""
        own, others = ((m.settings.ph2_init, m.settings.ph2_lr_important, m.backbone_rate) for m in (self, other))
        if own != others or self.start is not other.start:
            return False
        if not all(torch.equal(a, b) for a, b in zip(self.mask, other.mask, strict=True)):
            return False
        all_marked = all(bool(layer.all()) for layer in self.mask)  # then the schedule affects no weight
        return all_marked or (self.prune == other.prune and self.low_rates() == other.low_rates())


def train_holdout(
    data: SplitFeatures,
    holdout: str,
    seeds: Sequence[int],
    arms: Sequence[Masking],
    *,
    strict: bool | None = None,
    keep_params: bool = True,
    every_epoch: bool = True,
    threads: int = 1,
    on_epoch: Callable[[], None] = lambda: None,
) -> HoldoutNetworks:
    """Train S × V networks on the `in` split of all domains but `holdout`.

    Args:
        seeds: S seeds; all arms of one share its batches, and its start where they start the same way.
        arms: V arms. Those that are the same by construction are trained once and share the result.
        strict: raise for the first failed network; None = only if there is a single seed.
        keep_params: return starts and final parameters.
        every_epoch, threads, on_epoch: see `engine.train`.

    Raises:
        TrainingFailedError: a network failed or its mask cannot be used, see `strict`; names seed, holdout and epoch.
    """
    strict = len(seeds) == 1 if strict is None else strict
    none = torch.zeros(len(seeds), dtype=torch.long)
    unusable = torch.stack([none if arm.failed is None else arm.failed for arm in arms], dim=1)
    if strict:
        raise_failure(unusable, seeds, f"Phase 2, holdout {holdout}")
    distinct, source_of = _distinct(arms)
    size = data.network(distinct[0].settings.hidden_sizes).size
    sources, groups = data.sources(holdout), in_stacks(data, len(seeds), distinct, size)
    ticks = count(1)
    options = {"every_epoch": every_epoch, "threads": threads}
    options["on_epoch"] = lambda: on_epoch() if next(ticks) % len(groups) == 0 else None
    rate = distinct[0].learning_rate or distinct[0].settings.ph2_lr_important
    parts = [_train_group(data, holdout, seeds, group, rate, keep_params, options) for group in groups]
    start = {name: torch.cat([own[name] for own, _ in parts], 1) for name in parts[0][0]}
    trained = joined([part for _, part in parts])
    failed = torch.where(unusable == 0, trained.failed.cpu()[:, source_of], unusable)
    if strict:
        raise_failure(failed, seeds, f"Phase 2, holdout {holdout}")
    out = accuracies(trained.correct, data.totals)["out"]
    validation = out[..., [data.domain_names.index(name) for name in sources]].mean(-1)
    start, final = (
        {name: value.cpu()[:, source_of] for name, value in params.items()} for params in (start, trained.params)
    )
    numbers = (trained.loss, trained.train_accuracy, validation, trained.correct)
    return HoldoutNetworks(holdout, tuple(seeds), start, final, *(n.cpu()[:, source_of] for n in numbers), failed)


def in_stacks(data: SplitFeatures, seeds: int, arms: Sequence[Item], floats: int) -> list[Sequence[Item]]:
    """The arms of each stack that is trained: of classifiers on a CPU `engine.groups_of`, else all of them together.

    Args:
        seeds: their number.
        floats: numbers in a network.
    """
    return [arms] if data.tail is not None or data.features.is_cuda else groups_of(arms, seeds, floats)


def _train_group(
    data: SplitFeatures,
    holdout: str,
    seeds: Sequence[int],
    arms: Sequence[Masking],
    learning_rate: float,
    keep_params: bool,
    options: dict,
) -> tuple[Params, Trained]:
    """Train a stack: the starts ``[S, V, *shape]``, nothing if they are not kept, and the networks.

    `learning_rate` is that of the run; `options` are of `engine.train`.
    """
    settings = arms[0].settings
    start = _starts(data, holdout, seeds, arms)
    rates, heads = [arm.backbone_rate for arm in arms], [arm.settings.ph2_lr_important for arm in arms]
    engine = make_engine(data, settings, start, learning_rate, rates, heads)
    order = training_order(data, seeds, f"phase2/{holdout}", data.sources(holdout), "in", settings)
    trained = train(data, engine, seeds, order, settings.ph2_num_epochs, rates=_rates(data, arms), **options)
    return (start, trained) if keep_params else ({}, replace(trained, params={}))


def _distinct(arms: Sequence[Masking]) -> tuple[list[Masking], list[int]]:
    """The arms that differ, and for each arm the index of the one among them that is trained for it."""
    distinct, source_of = [], []
    for arm in arms:
        same = [i for i, other in enumerate(distinct) if arm.same_training(other)]
        source_of.append(same[0] if same else len(distinct))
        distinct += [] if same else [arm]
    return distinct, source_of


def _starts(data: SplitFeatures, holdout: str, seeds: Sequence[int], arms: Sequence[Masking]) -> Params:
    """Initial parameters of every arm: name -> ``[S, V, *shape]``."""
    network = data.network(arms[0].settings.hidden_sizes)
    purposes, trained_on = {"fresh": "fresh_start", "phase1": "start"}, (data.sources(holdout), "in")
    kinds = dict.fromkeys(arm.settings.ph2_init for arm in arms if arm.start is None)
    drawn = {kind: network_start(data, seeds, purposes[kind], arms[0].settings, *trained_on) for kind in kinds}
    each = [drawn[arm.settings.ph2_init] if arm.start is None else arm.start for arm in arms]
    start = {name: torch.stack([params[name].to(data.labels.device) for params in each], dim=1) for name in each[0]}
    for v, arm in enumerate(arms):
        if arm.prune:
            for weights, mask in zip(network.tracked(start), arm.mask, strict=True):
                weights[:, v].masked_fill_(~mask.to(weights.device), 0)
    return start


def _rates(data: SplitFeatures, arms: Sequence[Masking]) -> Callable[[int], Rates]:
    """The factors of every epoch, for `engine.train`: name -> ``[S, V, out, in]``.

    Where classifiers learn at rates of their own, all their parameters have factors.
    """
    network = data.network(arms[0].settings.hidden_sizes)
    names = network.tracked_names
    device = data.features.device
    masks = [torch.stack(layers, dim=1).to(device) for layers in zip(*(arm.mask for arm in arms), strict=True)]
    low_rates = [arm.low_rates() for arm in arms]
    speeds = data.like.new_tensor([arm.speed for arm in arms])
    others = {name: p.ndim for name, p in network.named_parameters() if name not in names}
    every = {name: speeds.view(1, -1, *[1] * axes) for name, axes in others.items()}

    def rates(epoch: int) -> Rates:
        low = data.like.new_tensor([of_arm[epoch] for of_arm in low_rates]).view(-1, 1, 1)
        tracked = {name: weight_rates(mask, low) for name, mask in zip(names, masks, strict=True)}
        if data.tail is not None or bool((speeds == 1).all()):  # the engine of blocks has rates for every arm
            return tracked
        return every | {name: rate * speeds.view(-1, 1, 1) for name, rate in tracked.items()}

    return rates


def select_epoch(validation_accuracy: Tensor, selection: str) -> Tensor:
    """Epoch (from 0) that a selection rule takes: ``[*, E]`` -> int64 ``[*]``.

    "last" is the last epoch; "val" the earliest of those with the best validation accuracy (training-domain
    validation, Gulrajani & Lopez-Paz 2021); epochs without one (NaN) cannot be chosen.

    Raises:
        ValueError: an unknown selection rule.
    """
    if selection == "last":
        return torch.full(validation_accuracy.shape[:-1], validation_accuracy.shape[-1] - 1)
    if selection == "val":
        known = validation_accuracy.nan_to_num(-1.0)
        best = known == known.amax(-1, keepdim=True)
        return best.int().argmax(-1)  # the first of equals
    raise ValueError(f"There is no selection rule '{selection}'; known are last, val.")
