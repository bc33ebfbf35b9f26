"""Leave-one-domain-out training by any method of `field.algorithms`: the counterpart of Phase 2 for the field.

Start and split of a seed, and its batches if the method uses pooled ones, are those of Phase 2 with a fresh start, so
all methods are paired by seed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil

from torch import Tensor

from config import Settings
from engine import (
    BalancedOrder,
    BatchOrder,
    FunctionalEngine,
    Params,
    SplitFeatures,
    Validation,
    accuracies,
    generator,
    random_start,
    train,
)
from field.algorithms import Algorithm, Setup


@dataclass
class MethodNetworks:
    """One method, one set of held-out domains, S seeds.

    Attributes:
        holdouts: domains left out of training: one, or two for leave-one-domain-out validation.
        seeds: S seeds.
        method: the method, with its hyperparameters.
        engine: the trained stack; its `state` holds what the method recorded.
        params: final parameters, name -> ``[S, *shape]``, CPU.
        loss, validation_accuracy: per epoch, ``[S, E]``; validation is the unweighted mean over source domains of the
            accuracy on their `out` split.
        correct: right answers after each epoch, ``[S, E, domains, 2, classes]``.
        failed: ``[S]``, first epoch (from 1) whose loss or weights were not finite, 0 = none.
    """

    holdouts: tuple[str, ...]
    seeds: tuple[int, ...]
    method: Algorithm
    engine: FunctionalEngine
    params: Params
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
    mask: Params | None = None,
    threads: int = 1,
    on_epoch: Callable[[], None] = lambda: None,
) -> MethodNetworks:
    """Train one network per seed on the `in` split of all domains but `holdouts`.

    Args:
        data: features, labels and splits.
        holdouts: names of the domains left out, one or two.
        seeds: S seeds.
        method: makes the method for its `Setup`: a class, or a `functools.partial` of one with hyperparameters.
        settings: `BATCH_SIZE`, `HIDDEN_SIZES` and `PH2_NUM_EPOCHS` are used.
        mask: the mask of a method with a `control`, name of the tracked matrix -> bool ``[S, out, in]``.
        threads, on_epoch: see `engine.train`.

    Raises:
        InputError: an unknown hyperparameter.
        ValueError: the method needs a mask and got none.
    """
    network, sources = data.network(settings.hidden_sizes), data.sources(holdouts)
    steps = ceil(data.rows(sources, "in", seeds).shape[1] / settings.batch_size)
    sizes = data.features.shape[1], len(data.class_names), len(sources)
    made = method(Setup(*sizes, settings.hidden_sizes, settings.batch_size, steps, settings.ph2_num_epochs))
    if made.control is not None and mask is None:
        raise ValueError(f"{type(made).__name__} needs a mask.")
    start = {name: value.to(data.features) for name, value in random_start(seeds, "fresh_start", network).items()}
    numbers = [data.domain_names.index(name) for name in sources]
    engine = FunctionalEngine(
        made,
        start,
        [generator(seed, "noise", "+".join(sorted(holdouts))) for seed in seeds],
        numbers,
        Validation(data.features, data.labels, data.rows(sources, "out", seeds)),
        given=None if made.control is None else {"mask": {n: m.to(data.features.device) for n, m in mask.items()}},
    )
    order = _order(data, holdouts, seeds, made)
    trained = train(data, engine, seeds, order, settings.ph2_num_epochs, threads=threads, on_epoch=on_epoch)
    validation = accuracies(trained.correct, data.totals)["out"][..., numbers].mean(-1)
    params = {name: value.cpu() for name, value in trained.params.items()}
    found = (value.cpu() for value in (trained.loss, validation, trained.correct, trained.failed))
    return MethodNetworks(tuple(holdouts), tuple(seeds), made, engine, params, *found)


def _order(data: SplitFeatures, holdouts: Sequence[str], seeds: Sequence[int], method: Algorithm):
    """The batches that the method asks for, the same number in an epoch whether pooled or balanced."""
    name, sources, setup = f"phase2/{'+'.join(sorted(holdouts))}", data.sources(holdouts), method.setup
    if method.batches == "pooled":
        return BatchOrder(seeds, name, data.rows(sources, "in", seeds), setup.batch_size)
    rows = [data.rows([source], "in", seeds) for source in sources]
    return BalancedOrder(seeds, f"{name}/balanced", rows, setup.steps_per_epoch, setup.batch_size)
