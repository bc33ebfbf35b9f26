"""Phase 1: which weights move while a network learns one domain.

One network per source domain and seed. All domains of a seed start from the same random parameters, so a position in
a tracked matrix means the same unit in each of them, and their importances can be added.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from config import Settings
from importance import degenerate, weight_importance
from stacks import Params
from training import BatchOrder, Problem, accuracies, raise_failure, random_start, tracked, train


@dataclass
class DomainNetworks:
    """Phase 1 of one domain: S networks (seeds).

    Attributes:
        domain: its name.
        seeds: S seeds.
        start, final: parameters, name -> ``[S, *shape]``.
        loss, train_accuracy, validation_accuracy: per epoch, ``[S, E]``; validation is the domain's `out` split.
        importance: how far each tracked weight moved, L × ``[S, out, in]``.
        failed: ``[S]``, epoch from 1 whose loss was not finite, 0 = none, -1 = the importance is all equal.
    """

    domain: str
    seeds: tuple[int, ...]
    start: Params
    final: Params
    loss: Tensor
    train_accuracy: Tensor
    validation_accuracy: Tensor
    importance: list[Tensor]
    failed: Tensor


def train_domain(
    problem: Problem,
    domain: str,
    seeds: Sequence[int],
    settings: Settings,
    *,
    strict: bool | None = None,
    engine: str = "matmul",
    on_epoch: Callable[[], None] = lambda: None,
) -> DomainNetworks:
    """Train one network per seed on one domain.

    Args:
        problem: features, labels and the split.
        domain: name of the domain.
        seeds: S seeds.
        settings: epochs, learning rate, and `PH1_DATA`: all images of the domain, or its `in` split only.
        strict: raise for any failed network; None = only if there is a single seed.
        engine: see `training.train`.
        on_epoch: called after each epoch.

    Raises:
        TrainingFailedError: names seed, domain and epoch.
    """
    sizes = (problem.features.shape[1], len(problem.class_names), settings.hidden_sizes)
    start = random_start(seeds, "start", sizes)
    order = BatchOrder(seeds, f"phase1/{domain}", problem.rows([domain], settings.ph1_data))
    result = train(
        problem,
        {name: value.unsqueeze(1) for name, value in start.items()},  # one variant
        order,
        settings,
        epochs=settings.ph1_num_epochs,
        learning_rate=settings.ph1_learning_rate,
        on_epoch=on_epoch,
        engine=engine,
    )
    final = {name: value.squeeze(1).cpu() for name, value in result.params.items()}
    moved = weight_importance(tracked(start, settings.hidden_sizes), tracked(final, settings.hidden_sizes))
    failed = result.failed.squeeze(1).cpu()
    failed = torch.where((failed == 0) & degenerate(moved), -1, failed)
    if strict or (strict is None and len(seeds) == 1):
        raise_failure(failed, seeds, f"Phase 1, domain {domain}")
    validation = accuracies(result.correct, problem.totals)["out"][..., problem.domain_names.index(domain)]
    histories = (result.loss, result.train_accuracy, validation)
    return DomainNetworks(domain, tuple(seeds), start, final, *(h.squeeze(1).cpu() for h in histories), moved, failed)
