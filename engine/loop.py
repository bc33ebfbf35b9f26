"""The one training loop, for any engine that computes many networks at once.

An engine holds a stack of networks: parameters with leading axes ``[S, …]`` for S seeds, or ``[S, V, …]`` where V arms
of a seed see the same batches, so that their differences are paired. Networks never mix: what one does is the same, up
to float rounding, whatever is trained beside it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.data import BalancedOrder, BatchOrder, SplitFeatures
from engine.machine import training_threads
from engine.stack import MatmulEngine, Params, Rates
from engine.tail import TailEngine

PIECE_FLOATS = 2**20  # largest activation while many rows are classified
INPUT_FLOATS = 2**24  # and the largest piece of the inputs


class Engine(Protocol):
    """What `train` needs of a stack of networks."""

    params: Params  # as they are now, name -> [*stack, *shape]
    shape: torch.Size  # [*stack]; its first axis is S
    gradients: Params  # of the last step's loss; only of engines that `PathRecorder` can follow

    def step(self, features: Tensor, targets: Tensor, rates: Rates, domains: Tensor) -> tuple[Tensor, Tensor]:
        """One step on batches ``[S, B, …]``, ``[S, B]``, ``[S, B]``: loss and right answers before it, ``[*stack]``."""

    def right(self, features: Tensor, targets: Tensor) -> Tensor:
        """Whether each network classifies the rows ``[N, …]`` as their targets ``[N]``: bool ``[*stack, N]``."""


class TrainingFailedError(RuntimeError):
    """A network cannot be used: its loss is not finite, or its importance is all equal."""


@dataclass
class Trained:
    """A trained stack. E: epochs."""

    params: Params  # final parameters, name -> [*stack, *shape]
    loss: Tensor  # mean cross-entropy (nats) over each epoch's batches, [*stack, E]
    train_accuracy: Tensor  # over the epoch's own batches, as they were met, [*stack, E]; NaN where it is not counted
    correct: Tensor  # right answers after each epoch, int64 [*stack, E, domains, 2, classes] (2 = in, out); -1 = n/a
    failed: Tensor  # first epoch (from 1) whose loss or weights were not finite, 0 = none, [*stack]


def train(
    data: SplitFeatures,
    engine: Engine,
    seeds: Sequence[int],
    order: BatchOrder | BalancedOrder,
    epochs: int,
    *,
    rates: Callable[[int], Rates] = lambda epoch: {},
    every_epoch: bool = True,
    threads: int = 1,
    on_epoch: Callable[[], None] = lambda: None,
) -> Trained:
    """Train a stack of networks and count its right answers after every epoch, or after the last one.

    Args:
        data: networks train on its inputs, in its `dtype` and on the device of its features.
        engine: holds the networks and takes the steps.
        seeds: S seeds; right answers are counted by the split of each.
        order: each seed's batches.
        rates: epoch (from 0) -> {parameter name: factor on its update, broadcastable to ``[*stack, *shape]``}.
        every_epoch: count right answers after every epoch; False: after the last, those of the others are -1.
        threads: CPU threads. The products are small: a second thread gains little, and on a busy machine, threads
            that wait for one another can take thirty times as long.
        on_epoch: called after each epoch (progress).
    """
    losses, shares, correct, buffers = [], [], [], {}
    cells = data.cells(seeds)
    if bool((cells == cells[:1]).all()):  # one split for all seeds
        cells = cells[:1]
    failed = torch.zeros(engine.shape, dtype=torch.long, device=data.features.device)
    with training_threads(threads):
        for epoch in range(epochs):
            factors = rates(epoch)
            (loss_sum, right_sum), count = data.like.new_zeros(2, *engine.shape), 0
            for rows in order.next_epoch():  # [S, B]
                inputs = gather(data, rows, buffers, order.augmentation)
                loss, right = engine.step(inputs, data.labels.take(rows), factors, data.domains.take(rows))
                loss_sum += loss * rows.shape[1]
                right_sum += right
                count += rows.shape[1]
            losses.append(loss_sum / count)
            shares.append(right_sum / count)
            finite = [value.isfinite().reshape(*engine.shape, -1).all(-1) for value in engine.params.values()]
            fine = losses[-1].isfinite() & torch.stack(finite).all(0)
            failed = torch.where(fine | (failed > 0), failed, epoch + 1)
            if every_epoch or epoch == epochs - 1:
                correct.append(count_correct(engine, data, cells))
            else:
                correct.append(failed.new_full((*engine.shape, *data.cell_shape), -1))
            on_epoch()
    axis = len(engine.shape)
    params = {name: value.detach() for name, value in engine.params.items()}
    return Trained(params, torch.stack(losses, axis), torch.stack(shares, axis), torch.stack(correct, axis), failed)


def joined(parts: Sequence[Trained]) -> Trained:
    """Stacks ``[S, V, …]`` of the same seeds and epochs as one, their arms behind one another."""
    params = {name: torch.cat([part.params[name] for part in parts], 1) for name in parts[0].params}
    rest = ("loss", "train_accuracy", "correct", "failed")
    return Trained(params, *(torch.cat([getattr(part, name) for part in parts], 1) for name in rest))


def gather(
    data: SplitFeatures, rows: Tensor, buffers: dict[int, list[Tensor]], draws: Sequence[torch.Generator] = ()
) -> Tensor:
    """Inputs of some rows for each seed, in the type to train in: ``[S, B]`` -> ``[S, B, …]``.

    The caller keeps `buffers`, batch size -> tensors: new memory for each batch takes twenty times as long. Images are
    augmented, with the random stream of each seed from `draws`.
    """
    if not isinstance(data.inputs, Tensor):
        return data.inputs.augmented(rows, draws).to(data.dtype)
    size, shape = rows.shape[1], (rows.numel(), *data.inputs.shape[1:])
    if size not in buffers:
        types = dict.fromkeys((data.inputs.dtype, data.dtype))
        buffers[size] = [data.inputs.new_empty(shape, dtype=own) for own in types]
    stored, converted = buffers[size][0], buffers[size][-1]
    torch.index_select(data.inputs, 0, rows.reshape(-1), out=stored)
    if converted is not stored:
        converted.copy_(stored)
    return converted.view(*rows.shape, *shape[1:])


def rows_at_a_time(engine: Engine, inputs: Tensor) -> int:
    """How many of the inputs ``[N, …]`` to classify at a time; at least one.

    So that no activation exceeds `PIECE_FLOATS`, nor a piece of the inputs `INPUT_FLOATS`.
    """
    axes = len(engine.shape)
    widest = max(value.shape[axes] for value in engine.params.values() if value.ndim > axes)
    most = min(PIECE_FLOATS // (engine.shape.numel() * widest), INPUT_FLOATS // inputs[0].numel())
    return min(len(inputs), max(1, most))


def pieces(data: SplitFeatures, size: int) -> Iterator[Tensor]:
    """All inputs, `size` rows at a time, in the type to train in; a piece may take the place of the one before."""
    converted = None
    for rows in data.inputs.split(size):
        if rows.dtype == data.dtype:
            yield rows
            continue
        converted = rows.new_empty(rows.shape, dtype=data.dtype) if converted is None else converted
        yield converted[: len(rows)].copy_(rows)


def count_correct(engine: Engine, data: SplitFeatures, cells: Tensor) -> Tensor:
    """Right answers of each network in each cell: int64 ``[*stack, domains, 2, classes]``.

    `cells` are the `SplitFeatures.cells` of each seed, ``[S, N]``, or ``[1, N]`` for all seeds.
    """
    size = rows_at_a_time(engine, data.inputs)
    counts = data.like.new_zeros(*engine.shape, math.prod(data.cell_shape))  # a float counts up to 2**24 exactly
    parts = zip(pieces(data, size), data.labels.split(size), cells.split(size, dim=1), strict=True)
    for inputs, labels, cell in parts:
        right = engine.right(inputs, labels).to(counts.dtype)
        spread = cell.view(len(cell), *(1 for _ in engine.shape[1:]), -1).expand(right.shape)
        counts.scatter_add_(-1, spread, right)
    return counts.long().view(*engine.shape, *data.cell_shape)


def classify(engine: MatmulEngine | TailEngine, data: SplitFeatures, rows: Tensor) -> Tensor:
    """Most probable class of some rows, int64 ``[N]``, for every network: int64 ``[*stack, N]``."""
    parts = rows.split(min(len(rows), rows_at_a_time(engine, data.inputs)))
    return torch.cat([engine.classify(data.inputs[part].to(data.dtype)) for part in parts], dim=-1)


def raise_failure(failed: Tensor, seeds: Sequence[int], what: str) -> None:
    """Raise `TrainingFailedError` for the first failed network among `failed` ``[S]`` or ``[S, V]``, if any."""
    for seed, codes in zip(seeds, failed.reshape(len(seeds), -1).tolist(), strict=True):
        for code in filter(None, codes):
            raise TrainingFailedError(f"{what}, seed {seed}: {failure_reason(code)}.")


def failure_reason(code: int) -> str:
    """A failure code in words: the epoch (from 1) whose loss was not finite, or -1."""
    return f"the loss is no longer finite in epoch {code}" if code > 0 else "the importance is all equal or not finite"
