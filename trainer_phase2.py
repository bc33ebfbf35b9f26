"""Phase 2: leave-one-domain-out training, with a learning rate per weight.

Important weights, and every parameter outside the tracked matrices, learn at the full rate; the others at a small one
that decays each epoch and is exactly zero from the freeze epoch on. With every weight at the full rate the method
is empirical risk minimization (ERM), the baseline that is trained beside it on the same seeds, starts and batches.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import importance
from config import Settings
from importance import Layers
from stacks import Params, Rates
from training import BatchOrder, Problem, accuracies, raise_failure, random_start, tracked_names, train


@dataclass
class HoldoutMasks:
    """What Phase 1 says for one holdout: from its source domains, never from the held-out one.

    Attributes:
        scores: aggregated importance, L × ``[S, out, in]``.
        normalized: min–max over all layers, in [0, 1].
        mask: bool, True = important.
        failed: ``[S]``, code of the first source network that failed (see `trainer_phase1.DomainNetworks`), 0 = none.
    """

    scores: list[Tensor]
    normalized: list[Tensor]
    mask: list[Tensor]
    failed: Tensor


@dataclass
class HoldoutNetworks:
    """Phase 2 of one holdout: S seeds × V algorithms.

    Attributes:
        holdout: domain left out of training.
        seeds: S seeds.
        algorithms: V names of arms.
        start, final: parameters, name -> ``[S, V, *shape]``.
        loss, train_accuracy, validation_accuracy: per epoch, ``[S, V, E]``; validation is the unweighted mean over
            source domains of the accuracy on their `out` split.
        correct: right answers after each epoch, ``[S, V, E, domains, 2, classes]``.
        failed: ``[S, V]``, codes as in `trainer_phase1.DomainNetworks`.
    """

    holdout: str
    seeds: tuple[int, ...]
    algorithms: tuple[str, ...]
    start: Params
    final: Params
    loss: Tensor
    train_accuracy: Tensor
    validation_accuracy: Tensor
    correct: Tensor
    failed: Tensor


def masks_for(importances: Mapping[str, Layers], failed: Mapping[str, Tensor], settings: Settings) -> HoldoutMasks:
    """Aggregate the importances of a holdout's source domains and mark the top per cent.

    Args:
        importances: source domain -> L × ``[S, out, in]``.
        failed: source domain -> ``[S]``, codes as in `trainer_phase1.DomainNetworks`.
        settings: aggregation and per cent kept.
    """
    scores = importance.aggregate(importances, settings.importance_aggregation)
    codes = torch.stack([failed[domain] for domain in importances])
    first = codes.gather(0, (codes != 0).int().argmax(0, keepdim=True)).squeeze(0)
    first = torch.where((first == 0) & importance.degenerate(scores), -1, first)
    mask = importance.top_k_mask(scores, settings.importance_threshold_percentile)
    return HoldoutMasks(scores, importance.normalize(scores), mask, first)


def unimportant_rate(epoch: int, settings: Settings) -> float:
    """Learning rate of the unmarked weights in an epoch (from 0), as a factor on `PH2_LR_IMPORTANT`."""
    if epoch >= settings.ph2_freeze_epoch:
        return 0.0
    return settings.ph2_lr_unimportant_start * settings.ph2_lr_decay_rate**epoch / settings.ph2_lr_important


@dataclass(frozen=True)
class Arm:
    """One way to train on a holdout; the arms of a seed share its batches.

    Attributes:
        mask: L × bool ``[S, out, in]``; all True is ERM.
        settings: start, rate, decay and freeze of the unmarked weights; everything else must be as in other arms.
        prune: unmarked weights are zero from the start and never trained.
        failed: ``[S]``, codes of seeds whose mask is of no use; their networks count as failed.
    """

    mask: Layers
    settings: Settings
    prune: bool = False
    failed: Tensor | None = None

    def same_training(self, other: "Arm") -> bool:
        """Whether two arms are the same networks by construction, so that they need training only once."""
        if self.settings.ph2_init != other.settings.ph2_init:
            return False
        if not all(torch.equal(a, b) for a, b in zip(self.mask, other.mask, strict=True)):
            return False
        every = all(bool(layer.all()) for layer in self.mask)  # then there is no unmarked weight to differ in
        return every or (self.prune == other.prune and self._lows() == other._lows())

    def _lows(self) -> list[float]:
        return [self.low(epoch) for epoch in range(self.settings.ph2_num_epochs)]

    def low(self, epoch: int) -> float:
        """Factor on the learning rate of the unmarked weights in an epoch (from 0)."""
        return 0.0 if self.prune else unimportant_rate(epoch, self.settings)


def train_holdout(
    problem: Problem,
    holdout: str,
    seeds: Sequence[int],
    arms: Mapping[str, Arm],
    *,
    strict: bool | None = None,
    engine: str = "matmul",
    on_epoch: Callable[[], None] = lambda: None,
) -> HoldoutNetworks:
    """Train S × V networks on the `in` split of all domains but `holdout`.

    Args:
        problem: features, labels and the split.
        holdout: name of the domain left out.
        seeds: S seeds; all arms of one share its batches, and its start where they start the same way.
        arms: name -> arm. Arms that are the same by construction are trained once and share the result.
        strict: raise for any failed network; None = only if there is a single seed.
        engine: see `training.train`.
        on_epoch: called after each epoch.

    Raises:
        TrainingFailedError: names seed, holdout and epoch.
    """
    what, strict = f"Phase 2, holdout {holdout}", len(seeds) == 1 if strict is None else strict
    none = torch.zeros(len(seeds), dtype=torch.long)
    failed = torch.stack([none if arm.failed is None else arm.failed for arm in arms.values()], dim=1)
    if strict:
        raise_failure(failed, seeds, what)
    distinct, source_of = _distinct(list(arms.values()))
    settings = distinct[0].settings
    sources = problem.sources(holdout)
    start = _starts(problem, seeds, distinct)
    result = train(
        problem,
        start,
        BatchOrder(seeds, f"phase2/{holdout}", problem.rows(sources, "in")),
        settings,
        epochs=settings.ph2_num_epochs,
        learning_rate=settings.ph2_lr_important,
        rates=_rates(distinct, problem.features),
        on_epoch=on_epoch,
        engine=engine,
    )
    failed = torch.where(failed == 0, result.failed.cpu()[:, source_of], failed)
    if strict:
        raise_failure(failed, seeds, what)
    out = accuracies(result.correct, problem.totals)["out"]
    validation = out[..., [problem.domain_names.index(name) for name in sources]].mean(-1)
    start, final = ({name: value.cpu()[:, source_of] for name, value in p.items()} for p in (start, result.params))
    numbers = (result.loss, result.train_accuracy, validation, result.correct)
    numbers = (number.cpu()[:, source_of] for number in numbers)
    return HoldoutNetworks(holdout, tuple(seeds), tuple(arms), start, final, *numbers, failed)


def _distinct(arms: Sequence[Arm]) -> tuple[list[Arm], list[int]]:
    """The arms that differ, and for each arm the number of the one that stands for it."""
    distinct, source_of = [], []
    for arm in arms:
        same = [i for i, other in enumerate(distinct) if arm.same_training(other)]
        source_of.append(same[0] if same else len(distinct))
        distinct += [] if same else [arm]
    return distinct, source_of


def _starts(problem: Problem, seeds: Sequence[int], arms: Sequence[Arm]) -> Params:
    """Initial parameters of every arm: name -> ``[S, V, *shape]``."""
    settings = arms[0].settings
    sizes = (problem.features.shape[1], len(problem.class_names), settings.hidden_sizes)
    purposes = {"fresh": "fresh_start", "phase1": "start"}
    kinds = {arm.settings.ph2_init for arm in arms}
    drawn = {kind: random_start(seeds, purposes[kind], sizes) for kind in kinds}
    start = {
        name: torch.stack([drawn[arm.settings.ph2_init][name] for arm in arms], dim=1) for name in drawn[min(kinds)]
    }
    for v, arm in enumerate(arms):
        if arm.prune:
            for name, mask in zip(tracked_names(settings.hidden_sizes), arm.mask, strict=True):
                start[name][:, v] *= mask
    return start


def _rates(arms: Sequence[Arm], like: Tensor) -> Callable[[int], Rates]:
    """The factors of every epoch, for `training.train`: name -> ``[S, V, out, in]``."""
    names = tracked_names(arms[0].settings.hidden_sizes)
    masks = [torch.stack(layers, dim=1).to(like.device) for layers in zip(*(arm.mask for arm in arms), strict=True)]

    def rates(epoch: int) -> Rates:
        low = like.new_tensor([arm.low(epoch) for arm in arms]).view(-1, 1, 1)
        return {name: torch.where(mask, like.new_ones(()), low) for name, mask in zip(names, masks, strict=True)}

    return rates


def select_epoch(validation_accuracy: Tensor, selection: str) -> Tensor:
    """Epoch (from 0) that a selection rule takes: ``[*, E]`` -> int64 ``[*]``.

    "last" is the last epoch; "val" the earliest of those with the best validation accuracy (training-domain
    validation, Gulrajani & Lopez-Paz 2021).
    """
    epochs = validation_accuracy.shape[-1]
    if selection == "last":
        return torch.full(validation_accuracy.shape[:-1], epochs - 1)
    if selection == "val":
        best = validation_accuracy == validation_accuracy.amax(-1, keepdim=True)
        return best.int().argmax(-1)  # the first of equals
    raise ValueError(f"There is no selection rule '{selection}'; known are last, val.")
