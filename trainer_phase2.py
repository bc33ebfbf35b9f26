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
from models import FeedforwardClassifier
from stacks import Params, Rates
from training import BatchOrder, Problem, accuracies, raise_failure, random_start, train


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
        algorithms: V names.
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


def learning_rates(mask: Layers, epoch: int, settings: Settings, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Per-weight factors on the learning rate: 1 where the mask is True, `unimportant_rate` elsewhere."""
    low = unimportant_rate(epoch, settings)
    return [torch.full_like(marked, low, dtype=dtype).masked_fill_(marked, 1.0) for marked in mask]


def train_holdout(
    problem: Problem,
    holdout: str,
    seeds: Sequence[int],
    masks: Mapping[str, Layers],
    settings: Settings,
    *,
    failed: Tensor | None = None,
    strict: bool | None = None,
    on_epoch: Callable[[], None] = lambda: None,
) -> HoldoutNetworks:
    """Train S × V networks on the `in` split of all domains but `holdout`.

    Args:
        problem: features, labels and the split.
        holdout: name of the domain left out.
        seeds: S seeds; all variants of one share its start and its batches.
        masks: algorithm -> mask, L × bool ``[S, out, in]``; all True is ERM.
        settings: epochs, rates, decay, freeze and start.
        failed: ``[S, V]``, codes of networks whose mask is of no use; they count as failed.
        strict: raise for any failed network; None = only if there is a single seed.
        on_epoch: called after each epoch.

    Raises:
        TrainingFailedError: names seed, holdout and epoch.
    """
    what, algorithms = f"Phase 2, holdout {holdout}", tuple(masks)
    failed = torch.zeros(len(seeds), len(masks), dtype=torch.long) if failed is None else failed
    if strict or (strict is None and len(seeds) == 1):
        raise_failure(failed, seeds, what)
    sizes = (problem.features.shape[1], settings.hidden_sizes, len(problem.class_names))
    start = random_start(seeds, "start" if settings.ph2_init == "phase1" else "fresh_start", sizes)
    start = {name: value.unsqueeze(1).repeat_interleave(len(masks), 1) for name, value in start.items()}
    sources = problem.sources(holdout)
    result = train(
        problem,
        start,
        BatchOrder(seeds, f"phase2/{holdout}", problem.rows(sources, "in")),
        settings,
        epochs=settings.ph2_num_epochs,
        learning_rate=settings.ph2_lr_important,
        rates=_rates(list(masks.values()), settings, problem.features),
        on_epoch=on_epoch,
    )
    failed = torch.where(failed == 0, result.failed.cpu(), failed)
    if strict or (strict is None and len(seeds) == 1):
        raise_failure(failed, seeds, what)
    out = accuracies(result.correct, problem.totals)["out"]
    validation = out[..., [problem.domain_names.index(name) for name in sources]].mean(-1)
    final = {name: value.cpu() for name, value in result.params.items()}
    numbers = (result.loss, result.train_accuracy, validation, result.correct)
    return HoldoutNetworks(holdout, tuple(seeds), algorithms, start, final, *(n.cpu() for n in numbers), failed)


def _rates(masks: Sequence[Layers], settings: Settings, like: Tensor) -> Callable[[int], Rates]:
    """The factors of every epoch, for `training.train`: name -> ``[S, V, out, in]``."""
    names = FeedforwardClassifier(1, 1, settings.hidden_sizes).tracked_names
    stacked = [torch.stack(layers, dim=1).to(like.device) for layers in zip(*masks, strict=True)]

    def rates(epoch: int) -> Rates:
        return dict(zip(names, learning_rates(stacked, epoch, settings, like.dtype), strict=True))

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
