"""Phase 1: which weights move while a network learns one domain.

One network per domain and seed. All domains of a seed start from the same random parameters, so a position in a tracked
matrix means the same unit in each of them, and their importances can be added.

`train_network` trains one network with a plain loop. `train_domain` is Phase 1 for all seeds.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from config import Settings
from engine import (
    Params,
    PathRecorder,
    SplitFeatures,
    accuracies,
    loss_gradients,
    make_engine,
    network_start,
    raise_failure,
    train,
    training_order,
)
from importance import degenerate, step_with_rates, weight_importance


def train_network(
    network: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    epochs: Iterable[Iterable[Tensor]],
    learning_rate: float,
    rates: Callable[[int], Mapping[Tensor, Tensor]] = lambda epoch: {},
) -> None:
    """Train one network in place, as anybody would write it. `engine` does the same for thousands at once.

    Args:
        network: any module, inputs ``[B, …]`` -> logits ``[B, classes]``.
        inputs, labels: ``[N, …]`` and int64 ``[N]``.
        epochs: the batches of each epoch; a batch is the row numbers of one step, int64 ``[B]``.
        learning_rate: of Adam, for every weight whose rate is 1.
        rates: epoch (from 0) -> {parameter: factor on its update, of the same shape}, see `importance.step_with_rates`.
    """
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate)
    for epoch, batches in enumerate(epochs):
        for rows in batches:
            optimizer.zero_grad()
            F.cross_entropy(network(inputs[rows]), labels[rows]).backward()
            step_with_rates(optimizer, rates(epoch))


@dataclass
class DomainNetworks:
    """Phase 1 of one domain: S networks (seeds), E epochs."""

    domain: str
    seeds: tuple[int, ...]
    start: Params  # name -> [S, *shape]
    final: Params
    loss: Tensor  # of each epoch, [S, E]
    train_accuracy: Tensor  # [S, E]
    validation_accuracy: Tensor  # on the domain's `out` split, [S, E]
    importance: list[Tensor]  # distance that each tracked weight moved, L × [S, out, in]
    failed: Tensor  # [S], epoch (from 1) whose loss was not finite; 0 = none; -1 = importance all equal or not finite
    measured: dict[str, list[Tensor]] = field(default_factory=dict)  # what else was asked for, see `evidence`

    @property
    def evidence(self) -> dict[str, list[Tensor]]:
        """What a criterion may judge weights by, name -> L × ``[S, out, in]``: "distance", and what was asked for."""
        return {"distance": self.importance} | self.measured


def train_domain(
    data: SplitFeatures,
    domain: str,
    seeds: Sequence[int],
    settings: Settings,
    *,
    evidence: Collection[str] = (),
    strict: bool | None = None,
    every_epoch: bool = True,
    threads: int = 1,
    on_epoch: Callable[[], None] = lambda: None,
) -> DomainNetworks:
    """Train one network per seed on one domain.

    Args:
        settings: epochs, learning rate, and `PH1_DATA`: all images of the domain, or its `in` split only.
        evidence: names of what the criterion needs, see `importance.Criterion`; measured on the same images.
        strict: raise for the first failed network; None = only if there is a single seed.
        every_epoch, threads, on_epoch: see `engine.train`.

    Raises:
        TrainingFailedError: a network failed, see `strict`; names seed, domain and epoch.
    """
    network, rate = data.network(settings.hidden_sizes), settings.ph1_learning_rate
    start = network_start(data, seeds, "start", settings, [domain], settings.ph1_data)
    engine = make_engine(data, settings, {name: value[:, None] for name, value in start.items()}, rate, [rate])
    if "path" in evidence:
        engine = PathRecorder(engine, network.tracked_names)
    rows = data.rows([domain], settings.ph1_data, seeds)
    order = training_order(data, seeds, f"phase1/{domain}", [domain], settings.ph1_data, settings)
    options = {"every_epoch": every_epoch, "threads": threads, "on_epoch": on_epoch}
    trained = train(data, engine, seeds, order, settings.ph1_num_epochs, **options)
    final = {name: value[:, 0].cpu() for name, value in trained.params.items()}
    importance = weight_importance(network.tracked(start), network.tracked(final))
    failed = trained.failed[:, 0].cpu()
    failed = torch.where((failed == 0) & degenerate(importance), -1, failed)
    if strict or (strict is None and len(seeds) == 1):
        raise_failure(failed, seeds, f"Phase 1, domain {domain}")
    validation = accuracies(trained.correct, data.totals)["out"][..., data.domain_names.index(domain)]
    curves = (curve[:, 0].cpu() for curve in (trained.loss, trained.train_accuracy, validation))
    measured = _measured(data, settings, start, final, rows, {*evidence} - {"distance", "path"})
    if "path" in evidence:
        measured["path"] = [value[:, 0].cpu() for value in engine.path.values()]
    return DomainNetworks(domain, tuple(seeds), start, final, *curves, importance, failed, measured)


def _measured(
    data: SplitFeatures, settings: Settings, start: Params, final: Params, rows: Tensor, names: Collection[str]
) -> dict[str, list[Tensor]]:
    """Evidence of trained networks, by name, see `importance.Criterion`.

    Raises:
        ValueError: a name that is not known.
    """
    tracked, sizes = data.network(settings.hidden_sizes).tracked, settings.hidden_sizes
    measures = {
        "start": lambda: tracked(start),
        "change": lambda: [after - before for before, after in zip(tracked(start), tracked(final), strict=True)],
        "gradient": lambda: loss_gradients(data, sizes, start, rows),
        "end_gradient": lambda: loss_gradients(data, sizes, final, rows),
        "squared_gradient": lambda: loss_gradients(data, sizes, start, rows, squared=True),
    }
    if unknown := {*names} - measures.keys():
        raise ValueError(f"There is no evidence '{min(unknown)}'; there are distance, path, {', '.join(measures)}.")
    return {name: measures[name]() for name in sorted(names)}
