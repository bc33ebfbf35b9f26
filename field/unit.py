"""What a comparison trains and writes at a time: one method and trial, one choice of held-out domains, S seeds."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from engine import Params, raise_failure
from field.algorithms import Algorithm, expert_use
from field.train import MethodNetworks, train_method
from study import Arm, Run, mask_source
from trainer_phase2 import Masking


class Unit(NamedTuple):
    """What is trained and written at a time."""

    method: type[Algorithm]
    trial: int  # number of its hyperparameters
    holdouts: tuple[str, ...]  # one or two domains left out of training
    seeds: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.method.__name__}, trial {self.trial}, holdout {'+'.join(self.holdouts)}"


class Trained(NamedTuple):
    """What is kept of a unit.

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


def train_unit(run: Run, unit: Unit, values: Mapping, tick: Callable[[], None]) -> Trained:
    """Train the networks of a unit with hyperparameters; `tick` is called after each epoch.

    A method with masks needs Phase 1 on disk.

    Raises:
        TrainingFailedError: the run is strict, and a network failed or its mask cannot be used.
    """
    masking = masking_of(run, unit, values)
    mask = None if masking is None else dict(zip(run.network.tracked_names, masking.mask, strict=True))
    method = partial(unit.method, **values)
    options = {"mask": mask, "threads": run.execution.threads, "on_epoch": tick}
    networks = train_method(run.data, unit.holdouts, unit.seeds, method, run.settings, **options)
    failed = networks.failed
    if masking is not None and masking.failed is not None:
        failed = torch.where(failed == 0, masking.failed, failed)
    if run.strict:
        raise_failure(failed, unit.seeds, str(unit))
    history = {key: getattr(networks, key) for key in ("loss", "validation_accuracy", "correct")} | {"failed": failed}
    history |= {key: networks.engine.state[key].cpu() for key in unit.method.record_names}
    if unit.method.routed:
        history["expert_use"] = _expert_use(run, networks)
    return Trained(networks.method.setup.steps_per_epoch, history, networks.params)


def masking_of(run: Run, unit: Unit, values: Mapping) -> Masking | None:
    """The masks that a method trains with, as the study makes them from the source domains; None without a mask."""
    if unit.method.control is None:
        return None
    arm = Arm(unit.method.control, changes={"IMPORTANCE_THRESHOLD_PERCENTILE": values["kept"]})
    return arm.masking(mask_source(run, unit.holdouts, unit.seeds), run.settings)


def _expert_use(run: Run, networks: MethodNetworks) -> Tensor:
    """Mean share of each expert by domain and class, on all images: ``[S, domains, classes, experts]``."""
    data = run.data
    shape = len(data.domain_names), len(data.class_names)
    groups, found = data.domains * shape[1] + data.labels, []
    for s in range(len(networks.seeds)):
        params = {name: value[s] for name, value in networks.engine.params.items()}
        routing = networks.method.routing(params, data.features).detach()
        found.append(expert_use(routing, groups, shape[0] * shape[1]).view(*shape, -1).cpu())
    return torch.stack(found)
