"""Leave-one-domain-out training by any method of `field.algorithms`: the counterpart of Phase 2 for the field.

Start and split of a seed, and its batches if the method uses pooled ones, are those of Phase 2 with a fresh start, so
all methods are paired by seed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from config import BlockSettings, InputError, Settings
from engine import (
    BalancedOrder,
    BatchOrder,
    FunctionalEngine,
    Params,
    PureNetwork,
    SplitFeatures,
    Validation,
    accuracies,
    generator,
    network_start,
    train,
    updates_per_epoch,
)
from field.algorithms import Algorithm, Setup, State


@dataclass
class MethodNetworks:
    """One method with one set of hyperparameters, one set of held-out domains, S seeds.

    Attributes:
        holdouts: domains left out of training: one, or two for leave-one-domain-out validation.
        seeds: S seeds.
        method: the method, with its hyperparameters.
        params: final parameters, name -> ``[S, *shape]``, CPU.
        state: final state, which holds what the method recorded, name -> ``[S, …]``, CPU.
        loss, validation_accuracy: per epoch, ``[S, E]``; validation is the unweighted mean over source domains of the
            accuracy on their `out` split.
        correct: right answers after each epoch, ``[S, E, domains, 2, classes]``.
        failed: ``[S]``, first epoch (from 1) whose loss or weights were not finite, 0 = none.
    """

    holdouts: tuple[str, ...]
    seeds: tuple[int, ...]
    method: Algorithm
    params: Params
    state: State
    loss: Tensor
    validation_accuracy: Tensor
    correct: Tensor
    failed: Tensor


def train_method(
    data: SplitFeatures,
    holdouts: Sequence[str],
    seeds: Sequence[int],
    method: Callable[[Setup], Algorithm],
    settings: Settings,
    *,
    given: State | None = None,
    threads: int = 1,
    on_epoch: Callable[[], None] = lambda: None,
) -> MethodNetworks:
    """Train one network per seed on the `in` split of all domains but `holdouts`.

    Args:
        data: features, labels and splits.
        holdouts: names of the domains left out, one or two.
        seeds: S seeds.
        method: makes the method for its `Setup`: a class, or a `functools.partial` of one with hyperparameters.
        settings: batch size, hidden sizes and number of epochs are used; with trained blocks also how the classifier
            starts, and the blocks' learning rate as a fraction of `PH2_LR_IMPORTANT`.
        given: the entries of the state that the method does not make itself (`Algorithm.given`): tensors ``[S, …]``,
            nested as there; a mask is name of the tracked matrix -> bool ``[S, out, in]``.
        threads, on_epoch: see `engine.train`.

    Raises:
        InputError: an unknown hyperparameter.
        ValueError: the method needs an entry and did not get it.
    """
    options = {"given": None if given is None else [given], "threads": threads, "on_epoch": on_epoch}
    return train_trials(data, holdouts, seeds, [method], settings, **options)[0]


def train_trials(
    data: SplitFeatures,
    holdouts: Sequence[str],
    seeds: Sequence[int],
    methods: Sequence[Callable[[Setup], Algorithm]],
    settings: Settings,
    *,
    given: Sequence[State] | None = None,
    threads: int = 1,
    on_epoch: Callable[[], None] = lambda: None,
) -> list[MethodNetworks]:
    """`train_method` for several sets of hyperparameters, all in one stack: the same networks up to float rounding.

    Args:
        methods: make one class with T sets of hyperparameters, which differ in nothing but `Algorithm.tensors`.
        given: the entries for each of them.

    Returns:
        The networks of each set, in order.

    Raises:
        InputError: see `train_method`; or the method needs a number where it has a tensor.
        ValueError: an entry is missing, or methods that cannot be trained in one stack.
    """
    engine = _stack(data, holdouts, seeds, methods, settings, given)
    first, every = engine.methods[0], [*seeds] * len(methods)
    order, epochs = _order(data, holdouts, every, first), settings.ph2_num_epochs
    try:
        trained = train(data, engine, every, order, epochs, threads=threads, on_epoch=on_epoch)
    except RuntimeError as error:
        if not (engine.values and "vmap" in str(error)):
            raise
        raise InputError(
            f"{type(first).__name__} needs a number where it has a tensor, in one of the hyperparameters in which its "
            f"trials differ ({', '.join(engine.values)}): use torch.where instead of `if`, or declare it in the class "
            "as a Hyperparameter without tensor=True."
        ) from error
    sources = [data.domain_names.index(name) for name in data.sources(holdouts)]
    validation = accuracies(trained.correct, data.totals)["out"][..., sources].mean(-1)
    whole = trained.params, engine.state, trained.loss, validation, trained.correct, trained.failed
    return [
        MethodNetworks(
            tuple(holdouts),
            tuple(seeds),
            engine.methods[t * len(seeds)],
            *tree_map(lambda value, t=t: value.unflatten(0, (len(methods), -1))[t].cpu().clone(), whole),
        )
        for t in range(len(methods))
    ]


def _stack(
    data: SplitFeatures,
    holdouts: Sequence[str],
    seeds: Sequence[int],
    methods: Sequence[Callable[[Setup], Algorithm]],
    settings: Settings,
    given: Sequence[State] | None,
) -> FunctionalEngine:
    """The networks before the first step: those of all seeds with the first set of hyperparameters, then the second, …

    See `train_trials`.
    """
    sources, every = data.sources(holdouts), [*seeds] * len(methods)
    steps = updates_per_epoch(data, sources, settings)
    network, fraction = PureNetwork(data.network(settings.hidden_sizes), data.shortcut), backbone_rate(settings)
    setup = Setup(network, len(sources), settings.batch_size, steps, settings.ph2_num_epochs, fraction)
    trials = [method(setup) for method in methods]
    values, entries = _differing(trials), trials[0].given()
    if missing := [entry for entry in entries if given is None or any(entry not in own for own in given)]:
        raise ValueError(f"{type(trials[0]).__name__} must be given '{missing[0]}'.")
    known = [{entry: own[entry] for entry in entries} for own in given or ()]
    start = network_start(data, every, "fresh_start", settings, sources, "in")
    return FunctionalEngine(
        [trial for trial in trials for _ in seeds],
        {name: value.to(data.like) for name, value in start.items()},
        [generator(seed, "noise", "+".join(sorted(holdouts))) for seed in every],
        [data.domain_names.index(name) for name in sources],
        Validation(data.inputs, data.labels, data.rows(sources, "out", every)),
        tree_map(lambda *parts: torch.cat(parts), *known) if known else None,
        {name: value.repeat_interleave(len(seeds)) for name, value in values.items()},
    )


def backbone_rate(settings: Settings) -> float:
    """Learning rate of trained blocks as a fraction of that of the classifier; 1 without blocks."""
    if not isinstance(settings, BlockSettings):
        return 1.0
    return settings.backbone_learning_rate / settings.ph2_lr_important


def _differing(trials: Sequence[Algorithm]) -> dict[str, Tensor]:
    """Hyperparameters in which the trials of a stack differ: name -> ``[T]``, float64 or int64.

    Those in which they agree stay numbers: a single trial is trained with numbers alone.

    Raises:
        ValueError: the trials cannot be trained in one stack.
    """
    first = trials[0]
    values = {name: [trial.values[name] for trial in trials] for name in first.values}
    differing = {name: found for name, found in values.items() if any(value != found[0] for value in found)}
    if fixed := sorted({*differing} - {*first.tensors()}):
        raise ValueError(f"Trials of {type(first).__name__} that differ in {', '.join(fixed)} cannot share a stack.")
    return {name: torch.from_numpy(np.array(found)) for name, found in differing.items()}


def _order(data: SplitFeatures, holdouts: Sequence[str], seeds: Sequence[int], method: Algorithm):
    """The batches that the method asks for, the same number in an epoch whether pooled or balanced."""
    name, sources, setup = f"phase2/{'+'.join(sorted(holdouts))}", data.sources(holdouts), method.setup
    if method.batches == "pooled":
        return BatchOrder(seeds, name, data.rows(sources, "in", seeds), setup.batch_size)
    rows = [data.rows([source], "in", seeds) for source in sources]
    return BalancedOrder(seeds, f"{name}/balanced", rows, setup.steps_per_epoch, setup.batch_size)
