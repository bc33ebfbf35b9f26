"""Leave-one-domain-out training by any method of `algorithms`: the counterpart of Phase 2 for the field.

The start, the split and (for methods on pooled batches) the batches of a seed are those of Phase 2 with a fresh start,
so every method is paired with every other by seed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil

from torch import Tensor

from algorithms import Algorithm, AlgorithmEngine, Setup
from algorithms.base import State
from config import Settings
from stacks import Params
from training import BalancedOrder, BatchOrder, Problem, accuracies, generator, random_start, train


@dataclass
class MethodNetworks:
    """One method, one set of held-out domains, S seeds.

    Attributes:
        holdouts: domains left out of training: one, or two for leave-one-domain-out validation.
        seeds: S seeds.
        algorithm: the method, with its hyperparameters.
        engine: the trained stack; its `state` holds what the method recorded.
        params: final parameters, name -> ``[S, *shape]``.
        loss, validation_accuracy: per epoch, ``[S, E]``; validation is the unweighted mean over source domains of the
            accuracy on their `out` split.
        correct: right answers after each epoch, ``[S, E, domains, 2, classes]``.
        failed: ``[S]``, first epoch (from 1) whose loss or weights were not finite, 0 = none.
    """

    holdouts: tuple[str, ...]
    seeds: tuple[int, ...]
    algorithm: Algorithm
    engine: AlgorithmEngine
    params: Params
    loss: Tensor
    validation_accuracy: Tensor
    correct: Tensor
    failed: Tensor


def train_algorithm(
    problem: Problem,
    holdouts: Sequence[str],
    seeds: Sequence[int],
    algorithm: type[Algorithm],
    values: dict[str, float | int | str],
    settings: Settings,
    *,
    given: State | None = None,
    on_epoch: Callable[[], None] = lambda: None,
) -> MethodNetworks:
    """Train one network per seed on the `in` split of all domains but `holdouts`.

    Args:
        problem: features, labels and the split.
        holdouts: names of the domains left out, one or two.
        seeds: S seeds.
        algorithm: class of the method.
        values: its hyperparameters, by name; the others have their defaults.
        settings: `BATCH_SIZE`, `HIDDEN_SIZES` and `PH2_NUM_EPOCHS` are used.
        given: entries of the method's state known before, name -> ``[S, …]`` (masks).
        on_epoch: called after each epoch.

    Raises:
        InputError: an unknown hyperparameter.
    """
    sources = tuple(name for name in problem.domain_names if name not in holdouts)
    numbers = [problem.domain_names.index(name) for name in sources]
    order, steps = _order(problem, sources, holdouts, seeds, algorithm.batches, settings)
    sizes = problem.features.shape[1], len(problem.class_names)
    setup = Setup(*sizes, len(sources), settings.hidden_sizes, settings.batch_size, steps, settings.ph2_num_epochs)
    method = algorithm(setup, **values)
    fresh = random_start(seeds, "fresh_start", (*sizes, settings.hidden_sizes))
    start = {name: value.unsqueeze(1).to(problem.features) for name, value in fresh.items()}
    outside = problem.rows(sources, "out")
    validation = problem.features[outside], problem.labels[outside]
    draws = [generator(seed, "noise", "+".join(sorted(holdouts))) for seed in seeds]
    engine = AlgorithmEngine(method, start, draws, numbers, validation, given)
    result = train(
        problem,
        start,
        order,
        settings,
        epochs=settings.ph2_num_epochs,
        learning_rate=method.learning_rate,
        on_epoch=on_epoch,
        engine=engine,
    )
    accuracy = accuracies(result.correct, problem.totals)["out"][..., numbers].mean(-1)
    params = {name: value.squeeze(1).cpu() for name, value in result.params.items()}
    found = (value.squeeze(1).cpu() for value in (result.loss, accuracy, result.correct, result.failed))
    return MethodNetworks(tuple(holdouts), tuple(seeds), method, engine, params, *found)


def _order(
    problem: Problem,
    sources: Sequence[str],
    holdouts: Sequence[str],
    seeds: Sequence[int],
    batches: str,
    settings: Settings,
) -> tuple[BatchOrder | BalancedOrder, int]:
    """The order of batches, and the number of them in an epoch: the same for both ways of making a batch."""
    name, pooled = f"phase2/{'+'.join(sorted(holdouts))}", problem.rows(sources, "in")
    steps = ceil(len(pooled) / settings.batch_size)
    if batches == "pooled":
        return BatchOrder(seeds, name, pooled), steps
    rows = [problem.rows([source], "in") for source in sources]
    return BalancedOrder(seeds, f"{name}/balanced", rows, steps, settings.batch_size), steps
