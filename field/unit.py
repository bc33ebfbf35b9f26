"""What a comparison trains and writes at a time: trials of one method, one choice of held-out domains, S seeds."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from engine import Params, raise_failure
from field.algorithms import Algorithm, expert_use
from field.phase1 import given_to
from field.train import MethodNetworks, train_trials
from study import Run

LARGEST_PIECE = 2**24  # numbers of the inputs for which experts are chosen at a time


class Unit(NamedTuple):
    """What is trained in one stack and written at a time."""

    method: type[Algorithm]
    trials: tuple[int, ...]  # numbers of sets of hyperparameters that can share a stack
    holdouts: tuple[str, ...]  # one or two domains left out of training
    seeds: tuple[int, ...]

    @property
    def runs(self) -> list[str]:
        """The runs that it consists of, one for each trial, in words."""
        return [f"{self.method.__name__}, trial {t}, holdout {'+'.join(self.holdouts)}" for t in self.trials]


class Trained(NamedTuple):
    """What is kept of one trial of a unit.

    Attributes:
        steps_per_epoch: updates in an epoch.
        history: "loss" and "validation_accuracy" ``[S, E]``, "correct" ``[S, E, domains, 2, classes]``, "failed"
            ``[S]``; and what the method records: "conflict_rate" and "conflict_strength" ``[S, E, tensors]``, or
            "expert_use" ``[S, domains, classes, experts]``.
        params: name -> ``[S, *shape]``.
    """

    steps_per_epoch: int
    history: dict[str, Tensor]
    params: Params


def train_unit(run: Run, unit: Unit, values: Sequence[Mapping], tick: Callable[[], None]) -> list[Trained]:
    """Train the networks of a unit, with the hyperparameters of each trial; `tick` is called after each epoch.

    A method that is given something of Phase 1 needs that on disk.

    Raises:
        TrainingFailedError: the run is strict, and a network failed or cannot use what it is given.
    """
    method, _, holdouts, seeds = unit
    given = [given_to(run, method, holdouts, seeds, own) for own in values]
    methods = [partial(method, **own) for own in values]
    options = {"given": [own.state for own in given], "threads": run.execution.threads, "on_epoch": tick}
    trials = train_trials(run.data, holdouts, seeds, methods, run.settings, **options)
    return [_kept(run, *each) for each in zip(unit.runs, trials, [own.failed for own in given], strict=True)]


def _kept(run: Run, name: str, networks: MethodNetworks, unusable: Tensor | None) -> Trained:
    """What is kept of the networks of a run, `name` in words; `unusable` is `Given.failed`."""
    failed, method = networks.failed, networks.method
    if unusable is not None:
        failed = torch.where(failed == 0, unusable, failed)
    if run.strict:
        raise_failure(failed, networks.seeds, name)
    history = {key: getattr(networks, key) for key in ("loss", "validation_accuracy", "correct")} | {"failed": failed}
    history |= {key: networks.state[key] for key in method.record_names}
    if method.routed:
        history["expert_use"] = _expert_use(run, networks)
    return Trained(method.setup.steps_per_epoch, history, networks.params)


def _expert_use(run: Run, networks: MethodNetworks) -> Tensor:
    """Mean share of each expert by domain and class, on all images: ``[S, domains, classes, experts]``."""
    data = run.data
    shape = len(data.domain_names), len(data.class_names)
    groups, found = data.domains * shape[1] + data.labels, []
    for s in range(len(networks.seeds)):
        params = {name: value[s].to(data.like) for name, value in networks.params.items()}
        parts = data.inputs.split(max(1, LARGEST_PIECE // data.inputs[0].numel()))
        with torch.no_grad():
            routing = torch.cat([networks.method.routing(params, part.to(data.dtype)) for part in parts])
        found.append(expert_use(routing, groups, shape[0] * shape[1]).view(*shape, -1).cpu())
    return torch.stack(found)
