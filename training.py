"""The one training loop: many small networks at once.

A *stack* holds S seeds × V variants of the same classifier: every parameter has two leading axes ``[S, V, …]``.
Each seed has its own start and its own batch order; the variants of a seed (masks, algorithms) see the same batches,
so their differences are paired. How a stack computes a step is the business of `stacks`. Networks never mix: what one
does is the same, up to float rounding, whatever is trained beside it.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import captured
import compiled
import config
from captured import CapturedEngine
from compiled import WORTH, CompiledEngine
from dataset import split
from models import FeedforwardClassifier
from stacks import Engine, MatmulEngine, Params, Rates, VmapEngine, pieces

ENGINES = {"vmap": VmapEngine, "matmul": MatmulEngine, "compiled": CompiledEngine, "captured": CapturedEngine}


def choose_engine(network_steps: float, device: str, batch_size: int, sizes: tuple[int, int, Sequence[int]]) -> str:
    """The engine for a study: on CUDA recorded steps; on a CPU compiled ones where they pay and there is a compiler.

    Args:
        network_steps: steps of all its networks together. Of the whole study, not of what is left of an interrupted
            one: equal runs write equal bytes, and engines differ in rounding.
        device: "cpu" or "cuda".
        batch_size: images per step.
        sizes: (in_features, num_classes, hidden_sizes).
    """
    if device == "cuda":
        return "captured" if captured.usable(batch_size, sizes) else "matmul"
    return "compiled" if network_steps >= WORTH and compiled.usable(batch_size, sizes) else "matmul"


def prepare_machine() -> str:
    """Set CPU threads as `config.THREADS` says; the device to use: `config.DEVICE`, or CUDA where there is one.

    Raises:
        InputError: no thread, an unknown device, or CUDA is asked for and there is none.
    """
    if config.THREADS is not None:
        if config.THREADS < 1:
            raise config.InputError(f"THREADS must be at least 1, not {config.THREADS}.")
        torch.set_num_threads(config.THREADS)
    if config.DEVICE not in (None, "cpu", "cuda"):
        raise config.InputError(f"DEVICE must be 'cpu', 'cuda' or None, not '{config.DEVICE}'.")
    if config.DEVICE == "cuda" and not torch.cuda.is_available():
        raise config.InputError("There is no CUDA device here: use 'cpu' as DEVICE (--device cpu).")
    return config.DEVICE or ("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def training_threads() -> Iterator[int]:
    """`config.THREADS` CPU threads, one by default, and afterwards as many as before.

    The products are small: two threads gain little, and on a busy machine they wait for each other, which was seen to
    take thirty times as long. One thread also makes the result independent of the number of cores.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(config.THREADS or 1)
    try:
        yield config.THREADS or 1
    finally:
        torch.set_num_threads(before)


class TrainingFailedError(RuntimeError):
    """A network cannot be used: its loss is no longer finite, or its importance is all equal."""


@dataclass(frozen=True)
class Problem:
    """Features on a device, ready to be trained on.

    Shapes: `features` float ``[N, D]``; `labels`, `domains` int64 ``[N]``; `inside` bool ``[N]``, True = `in` split.
    """

    features: Tensor
    labels: Tensor
    domains: Tensor
    inside: Tensor
    class_names: tuple[str, ...]
    domain_names: tuple[str, ...]

    @classmethod
    def from_features(cls, data, settings: config.Settings, device="cpu", dtype=torch.float32) -> "Problem":
        """From a `features.FeatureSet`, split by the settings' seed and fraction."""
        inside = split(
            data.files,
            data.labels,
            data.domains,
            data.domain_names,
            data.class_names,
            seed=settings.split_seed,
            out_fraction=settings.out_fraction,
        )
        tensors = data.features.to(device, dtype), data.labels.to(device), data.domains.to(device), inside.to(device)
        return cls(*tensors, data.class_names, data.domain_names)

    def rows(self, domains: Sequence[str], part: str = "in") -> Tensor:
        """Row numbers of the domains named, of part "in", "out" or "all": int64 ``[n]``."""
        wanted = torch.tensor([self.domain_names.index(name) for name in domains], device=self.domains.device)
        chosen = torch.isin(self.domains, wanted)
        if part != "all":
            chosen &= self.inside if part == "in" else ~self.inside
        return chosen.nonzero().squeeze(1)

    def sources(self, holdout: str) -> tuple[str, ...]:
        """All domains but the one held out, in order."""
        return tuple(name for name in self.domain_names if name != holdout)

    @property
    def cells(self) -> Tensor:
        """Cell of each row among domains × (in, out) × classes, as one number: int64 ``[N]``."""
        part = (~self.inside).long()
        return (self.domains * 2 + part) * len(self.class_names) + self.labels

    @property
    def cell_shape(self) -> tuple[int, int, int]:
        """(domains, 2, classes): the shape in which correct answers are counted."""
        return len(self.domain_names), 2, len(self.class_names)

    @property
    def totals(self) -> Tensor:
        """Number of images per cell: int64 ``[domains, 2, classes]``."""
        size = torch.Size(self.cell_shape).numel()
        return torch.bincount(self.cells, minlength=size).view(self.cell_shape)


@dataclass
class Trained:
    """A trained stack.

    Attributes:
        params: final parameters, name -> ``[S, V, *shape]``.
        loss: mean cross-entropy (nats) over each epoch's batches, ``[S, V, E]``.
        train_accuracy: accuracy over the epoch's own batches, as they were met, ``[S, V, E]``; NaN where the engine
            does not count it.
        correct: right answers after each epoch, int64 ``[S, V, E, domains, 2, classes]`` (2 = in, out).
        failed: first epoch (from 1) whose loss or weights were not finite, 0 = none, ``[S, V]``.
    """

    params: Params
    loss: Tensor
    train_accuracy: Tensor
    correct: Tensor
    failed: Tensor


def generator(seed: int, purpose: str, name: str = "") -> torch.Generator:
    """The CPU generator of a seed for one purpose ("start", "order", …) and one domain or holdout.

    Different seeds, purposes and names give independent streams: the state is seeded with 63 bits of a SHA-256.
    """
    digest = hashlib.sha256(f"{seed}/{purpose}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def random_start(seeds: Sequence[int], purpose: str, sizes: tuple[int, int, Sequence[int]]) -> Params:
    """`nn.Linear`'s own initialization, once per seed: name -> ``[S, *shape]`` (float32, CPU).

    Args:
        seeds: one network for each.
        purpose: "start" (Phase 1) or "fresh_start" (Phase 2).
        sizes: (in_features, num_classes, hidden_sizes).
    """
    layers = FeedforwardClassifier.outline(*sizes).layers
    draws = [generator(seed, purpose) for seed in seeds]  # not the global generator: seeds may be drawn side by side
    params = {}
    for i, layer in enumerate(layers):
        params[f"layers.{i}.weight"] = torch.empty(len(seeds), *layer.weight.shape)
        params[f"layers.{i}.bias"] = torch.empty(len(seeds), *layer.bias.shape)
        bound = 1 / math.sqrt(layer.in_features)
        for s, draw in enumerate(draws):
            nn.init.kaiming_uniform_(params[f"layers.{i}.weight"][s], a=math.sqrt(5), generator=draw)
            nn.init.uniform_(params[f"layers.{i}.bias"][s], -bound, bound, generator=draw)
    return params


def tracked_names(hidden_sizes: Sequence[int]) -> tuple[str, ...]:
    """Parameter names of the tracked matrices, first to last."""
    return FeedforwardClassifier.outline(1, 1, hidden_sizes).tracked_names


def tracked(params: Params, hidden_sizes: Sequence[int]) -> list[Tensor]:
    """The tracked matrices of a stack, first to last: L tensors ``[*stack, out, in]``."""
    return [params[name] for name in tracked_names(hidden_sizes)]


class BatchOrder:
    """Order in which each seed meets its training images: a new permutation per epoch, drawn without replacement."""

    rows_per_step: int | None = None  # None = the settings' batch size

    def __init__(self, seeds: Sequence[int], name: str, rows: Tensor):
        self.generators = [generator(seed, "order", name) for seed in seeds]
        self.rows = rows

    def next_epoch(self) -> Tensor:
        """Row numbers of the problem, int64 ``[S, n]``."""
        order = torch.stack([torch.randperm(len(self.rows), generator=g) for g in self.generators])
        return self.rows[order.to(self.rows.device)]


class BalancedOrder:
    """As many rows of each domain in every step; a domain that is used up begins again in a new order.

    Args:
        seeds: S seeds.
        name: of the random streams.
        rows: row numbers of each domain.
        steps: updates in an epoch.
        batch_size: rows per step and domain.
    """

    def __init__(self, seeds: Sequence[int], name: str, rows: Sequence[Tensor], steps: int, batch_size: int):
        self.generators = [[generator(seed, "order", f"{name}/{d}") for d in range(len(rows))] for seed in seeds]
        self.rows, self.steps, self.batch_size = rows, steps, batch_size
        self.left = [[own.new_empty(0) for own in rows] for _ in seeds]  # of each domain's last shuffle
        self.rows_per_step = batch_size * len(rows)

    def next_epoch(self) -> Tensor:
        """Row numbers of the problem, int64 ``[S, steps · domains · batch_size]``, in each step ordered by domain."""
        epoch = []
        for draws, left in zip(self.generators, self.left, strict=True):
            domains = [self._take(d, draw, left) for d, draw in enumerate(draws)]
            epoch.append(torch.stack(domains, dim=1).flatten())
        return torch.stack(epoch)

    def _take(self, domain: int, draw: torch.Generator, left: list[Tensor]) -> Tensor:
        """The next rows of one domain: int64 ``[steps, batch_size]``."""
        rows, wanted, parts = self.rows[domain], self.steps * self.batch_size, [left[domain]]
        while sum(map(len, parts)) < wanted:
            parts.append(rows[torch.randperm(len(rows), generator=draw).to(rows.device)])
        every = torch.cat(parts)
        left[domain] = every[wanted:]
        return every[:wanted].view(self.steps, self.batch_size)


def predict(params: Params, features: Tensor, hidden_sizes: Sequence[int]) -> Tensor:
    """Most probable class of the rows ``[N, D]`` for every network of a stack: int64 ``[S, V, N]``."""
    classes = next(reversed(params.values())).shape[-1]
    template = FeedforwardClassifier.outline(features.shape[1], classes, hidden_sizes)
    params = {name: value.to(features) for name, value in params.items()}
    engine = MatmulEngine(template, params)
    parts = features.split(pieces(engine, len(features)))
    return torch.cat([engine.classify(part) for part in parts], dim=-1)


def count_correct(engine: Engine, problem: Problem) -> Tensor:
    """Right answers per domain, part and class: int64 ``[S, V, domains, 2, classes]``."""
    size, cells = pieces(engine, len(problem.labels)), problem.cells
    counts = None
    for features, labels, cell in zip(*(t.split(size) for t in (problem.features, problem.labels, cells)), strict=True):
        right = engine.right(features, labels).to(problem.features.dtype)
        member = nn.functional.one_hot(cell, math.prod(problem.cell_shape)).to(right.dtype)
        part = right @ member  # a float holds counts up to 2**24 exactly
        counts = part if counts is None else counts + part
    return counts.long().view(*counts.shape[:2], *problem.cell_shape)


def gather(features: Tensor, rows: Tensor, rooms: dict[int, Tensor]) -> Tensor:
    """Rows of the features for each seed: ``[N, D]`` at ``[S, B]`` -> ``[S, B, D]``, in room that is used again.

    Args:
        features: ``[N, D]``.
        rows: ``[S, B]``.
        rooms: kept by the caller; filled here. (New memory for each batch took twenty times as long.)
    """
    size = rows.shape[1]
    if size not in rooms:
        rooms[size] = features.new_empty(rows.numel(), features.shape[1])
    torch.index_select(features, 0, rows.reshape(-1), out=rooms[size])
    return rooms[size].view(*rows.shape, -1)


def accuracies(correct: Tensor, totals: Tensor, balanced: bool = False) -> dict[str, Tensor]:
    """Accuracy per domain on `full`, `in` and `out`, from counts of right answers.

    Args:
        correct: ``[*, domains, 2, classes]``.
        totals: ``[domains, 2, classes]``, the number of images in each cell.
        balanced: mean over classes of the recall (classes without images left out) instead of the plain share.

    Returns:
        part -> float64 ``[*, domains]``.
    """

    def share(right: Tensor, of: Tensor) -> Tensor:
        if balanced:
            return (right / of).nanmean(-1)
        return right.sum(-1) / of.sum(-1)

    correct, totals = correct.double(), totals.double()
    parts = {"full": (correct.sum(-2), totals.sum(-2))}
    parts |= {name: (correct[..., i, :], totals[:, i, :]) for i, name in enumerate(("in", "out"))}
    return {name: share(right, of) for name, (right, of) in parts.items()}


@training_threads()
def train(
    problem: Problem,
    start: Params,
    order: BatchOrder | BalancedOrder,
    settings: config.Settings,
    *,
    epochs: int,
    learning_rate: float,
    rates: Callable[[int], Rates] = lambda epoch: {},
    on_epoch: Callable[[], None] = lambda: None,
    engine: str | Engine = "matmul",
) -> Trained:
    """Train a stack with Adam on cross-entropy, batches drawn without replacement, the short last one kept.

    Args:
        problem: features and labels; networks train in its dtype and on its device.
        start: initial parameters, name -> ``[S, V, *shape]``.
        order: the rows to train on, and each seed's order of them.
        settings: `batch_size` and `hidden_sizes` are used.
        epochs: passes over the rows.
        learning_rate: Adam's, for every weight whose rate is 1.
        rates: epoch (from 0) -> {parameter name: factor on its update, broadcastable to ``[S, V, *shape]``}.
        on_epoch: called after each epoch (progress).
        engine: name in `ENGINES`: "matmul"; "vmap", the reference, the only one that runs the module's own `forward`
            (in the others its arithmetic is written out); "compiled"; "captured" (CUDA). Or an engine that holds its
            networks already, which `start` and `learning_rate` then do not change.
    """
    features, device = problem.features, problem.features.device
    template = FeedforwardClassifier.outline(features.shape[1], len(problem.class_names), settings.hidden_sizes)
    stack = engine
    if isinstance(engine, str):
        usual = {"batch_size": settings.batch_size} if engine in ("compiled", "captured") else {}
        params = {name: value.to(features) for name, value in start.items()}
        stack = ENGINES[engine](template, params, learning_rate, **usual)
    shape = next(iter(start.values())).shape[:2]
    losses, shares, correct, rooms = [], [], [], {}
    failed = torch.zeros(shape, dtype=torch.long, device=device)
    for epoch in range(epochs):
        rows, factors = order.next_epoch(), rates(epoch)
        loss_sum, right_sum = torch.zeros(2, *shape, dtype=features.dtype, device=device)
        for batch in rows.split(order.rows_per_step or settings.batch_size, dim=1):  # [S, B]
            x = gather(features, batch, rooms)
            loss, right = stack.step(x, problem.labels[batch], factors, problem.domains[batch])
            loss_sum += loss * batch.shape[1]
            right_sum += right
        losses.append(loss_sum / rows.shape[1])
        shares.append(right_sum / rows.shape[1])
        sound = [value.isfinite().reshape(*shape, -1).all(2) for value in stack.params.values()]
        failed = torch.where(losses[-1].isfinite() & torch.stack(sound).all(0) | (failed > 0), failed, epoch + 1)
        correct.append(count_correct(stack, problem))
        on_epoch()
    names = [*start, *(name for name in stack.params if name not in start)]
    params = {name: stack.params[name].detach() for name in names}
    return Trained(params, torch.stack(losses, 2), torch.stack(shares, 2), torch.stack(correct, 2), failed)


def raise_failure(failed: Tensor, seeds: Sequence[int], what: str) -> None:
    """Raise for the first failed network among `failed` ``[S]`` or ``[S, V]``, if there is one."""
    for seed, code in zip(seeds, failed.reshape(len(seeds), -1).tolist(), strict=True):
        for value in filter(None, code):
            raise TrainingFailedError(f"{what}, seed {seed}: {failure_reason(value)}.")


def failure_reason(code: int) -> str:
    """In words: an epoch (from 1) whose loss was not finite, or -1."""
    return f"the loss is no longer finite in epoch {code}" if code > 0 else "the importance is all equal or not finite"
