"""Features or tokens on a device with each seed's in/out split; the random streams and batch orders of a seed."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import repeat
from typing import Protocol

import torch
from torch import Tensor

from config import ImageSettings, InputError, Settings
from dataset import split
from engine.machine import free_memory
from engine.shortcut import ClsShortcut
from models import BackboneTail, FeedforwardClassifier, WholeBackbone


class Images(Protocol):
    """Images as the inputs of a network, decoded when they are asked for: uint8 ``[N, 3, H, W]``."""

    shape: torch.Size
    dtype: torch.dtype

    def __len__(self) -> int: ...
    def __getitem__(self, rows: int | slice | Tensor) -> Tensor: ...
    def split(self, size: int) -> Iterator[Tensor]: ...
    def to(self, device: torch.device | str) -> "Images": ...
    def augmented(self, rows: Tensor, draws: Sequence[torch.Generator]) -> Tensor:
        """Training images ``[S, B, 3, H, W]`` for row numbers ``[S, B]``, each seed's changed by its own stream."""


Network = FeedforwardClassifier | BackboneTail  # what is trained


@dataclass(frozen=True, eq=False)
class SplitFeatures:
    """Features on a device, with the in/out split of every seed.

    Features, and tokens where there are some, are as they are stored: for a CPU mapped into memory, so that processes
    share one copy, which the system drops where memory is short. Batches of them are converted to `dtype`. With
    `tokens`, the blocks `tail` after them are trained too, see `models.BackboneTail`.
    """

    features: Tensor  # float [N, D]
    labels: Tensor  # int64 [N], index into `class_names`
    domains: Tensor  # int64 [N], index into `domain_names`
    files: tuple[str, ...]  # unique name of each row; the split depends on it
    class_names: tuple[str, ...]
    domain_names: tuple[str, ...]
    split_seed: int | str  # a number for one split that all seeds share, or "seed" for a split per seed
    out_fraction: float  # part of each domain and class that is `out`; the counts are the same for every split
    tokens: Tensor | Images | None = None  # [N, T, D], as they are stored: on disk, for a CPU; or images
    tail: BackboneTail | None = None  # the pretrained blocks after them, or the whole model, without a classifier
    dtype: torch.dtype = torch.float32  # to train in
    _networks: dict[tuple[int, ...], Network] = field(default_factory=dict, repr=False)  # by hidden sizes
    probes: dict[tuple, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)  # see `networks.fit_probes`
    _splits: dict[int, Tensor] = field(default_factory=dict, repr=False)  # split seed -> bool [N], True = `in`

    @classmethod
    def from_features(cls, data, settings: Settings, device="cpu", dtype=torch.float32) -> "SplitFeatures":
        """Make it from a `storage.FeatureSet`, with the split of the settings.

        Raises:
            InputError: there is one class only, or a domain is too small to have any `out` images.
        """
        if len(data.class_names) < 2:
            raise InputError(f"There is one class only, '{data.class_names[0]}': two are needed to tell them apart.")
        features = data.features.to(device)
        if features.is_cuda and features.numel() * dtype.itemsize < free_memory("cuda") / 2:
            features = features.to(dtype)  # once for all batches
        tensors = features, data.labels.to(device), data.domains.to(device)
        names = tuple(data.files), tuple(data.class_names), tuple(data.domain_names)
        blocks = (None, None) if data.tail is None else (data.tokens.to(device), data.tail.to(device))
        made = cls(*tensors, *names, settings.split_seed, settings.out_fraction, *blocks, dtype)
        made.inside([0])  # raises for a domain that is too small
        return made

    @property
    def inputs(self) -> "Tensor | Images":
        """What networks are trained on: the tokens or images where there are some, else the features."""
        return self.features if self.tokens is None else self.tokens

    @cached_property
    def like(self) -> Tensor:
        """An empty tensor of the type to train in, on the device."""
        return self.features.new_empty(0, dtype=self.dtype)

    def network(self, hidden_sizes: Sequence[int]) -> Network:
        """The network for these inputs and classes; its classifier is an outline without weights."""
        sizes = tuple(hidden_sizes)
        if sizes not in self._networks:
            head = FeedforwardClassifier.outline(self.features.shape[1], len(self.class_names), sizes)
            self._networks[sizes] = head if self.tail is None else self.tail.with_head(head)
        return self._networks[sizes]

    @cached_property
    def shortcut(self) -> ClsShortcut | None:
        """What computes the features of `tail` for whole stacks; None where only the module itself does."""
        if self.tail is None or isinstance(self.tail, WholeBackbone):
            return None
        return ClsShortcut.where_it_fits(self.tail, self.tokens)

    def inside(self, seeds: Sequence[int]) -> Tensor:
        """Whether a row is in the `in` split of each seed: bool ``[S, N]``."""
        for number in {self._split_of(seed) for seed in seeds} - self._splits.keys():
            rows = self.files, self.labels.cpu(), self.domains.cpu(), self.domain_names, self.class_names
            self._splits[number] = split(*rows, number, self.out_fraction).to(self.features.device)
        return torch.stack([self._splits[self._split_of(seed)] for seed in seeds])

    def _split_of(self, seed: int) -> int:
        return seed if self.split_seed == "seed" else self.split_seed

    def all_rows(self, domains: Sequence[str]) -> Tensor:
        """Row numbers of the named domains: int64 ``[n]``."""
        wanted = torch.tensor([self.domain_names.index(name) for name in domains], device=self.domains.device)
        return torch.isin(self.domains, wanted).nonzero().squeeze(1)

    def rows(self, domains: Sequence[str], part: str, seeds: Sequence[int]) -> Tensor:
        """Row numbers of the named domains in part "in", "out" or "all" of each seed's split: int64 ``[S, n]``."""
        rows = self.all_rows(domains)
        if part == "all":
            return rows.expand(len(seeds), -1)
        inside = self.inside(seeds)[:, rows]
        chosen = inside if part == "in" else ~inside
        return rows.expand(len(seeds), -1)[chosen].view(len(seeds), -1)

    def sources(self, holdouts: str | Sequence[str]) -> tuple[str, ...]:
        """All domains but those held out, in order."""
        left_out = {holdouts} if isinstance(holdouts, str) else set(holdouts)
        return tuple(name for name in self.domain_names if name not in left_out)

    def cells(self, seeds: Sequence[int]) -> Tensor:
        """Cell of each row among domains × (in, out) × classes, as one number: int64 ``[S, N]``."""
        part = (~self.inside(seeds)).long()
        return (self.domains * 2 + part) * len(self.class_names) + self.labels

    @property
    def cell_shape(self) -> tuple[int, int, int]:
        """(domains, 2, classes): the shape in which correct answers are counted."""
        return len(self.domain_names), 2, len(self.class_names)

    @property
    def totals(self) -> Tensor:
        """Number of images per cell, the same for every split: int64 ``[domains, 2, classes]``."""
        size = math.prod(self.cell_shape)
        return torch.bincount(self.cells([0])[0], minlength=size).view(self.cell_shape)


def generator(seed: int, purpose: str, name: str = "") -> torch.Generator:
    """The CPU generator of a seed for one purpose ("start", "order", …) and one domain or holdout.

    Different seeds, purposes and names give independent streams: the state is seeded with 63 bits of a SHA-256.
    """
    digest = hashlib.sha256(f"{seed}/{purpose}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class BatchOrder:
    """Batches of each seed's `rows`, int64 ``[S, n]``: a new permutation per epoch, the short last batch kept.

    `name` is that of the random streams.
    """

    def __init__(self, seeds: Sequence[int], name: str, rows: Tensor, batch_size: int):
        self.generators = [generator(seed, "order", name) for seed in seeds]
        self.augmentation = [generator(seed, "augmentation", name) for seed in seeds]
        self.rows, self.batch_size = rows, batch_size

    def next_epoch(self) -> tuple[Tensor, ...]:
        """Row numbers of each step of an epoch: int64 ``[S, B]``."""
        order = torch.stack([torch.randperm(self.rows.shape[1], generator=draw) for draw in self.generators])
        return self.rows.gather(1, order.to(self.rows.device)).split(self.batch_size, dim=1)


class BalancedOrder:
    """Batches of `batch_size` rows of every domain; a domain that is used up starts again in a new order.

    `name` is that of the random streams, `rows` has ``[S, n]`` row numbers per domain, an epoch has `steps` updates, a
    number for all or one for each.
    """

    def __init__(
        self, seeds: Sequence[int], name: str, rows: Sequence[Tensor], steps: int | Sequence[int], batch_size: int
    ):
        self.augmentation = [generator(seed, "augmentation", name) for seed in seeds]
        self.generators = [[generator(seed, "order", f"{name}/{d}") for d in range(len(rows))] for seed in seeds]
        self.rows, self.batch_size = rows, batch_size
        self.steps = repeat(steps) if isinstance(steps, int) else iter(steps)
        self.left = [[own.new_empty(0) for own in rows] for _ in seeds]  # of each domain's last shuffle

    def next_epoch(self) -> tuple[Tensor, ...]:
        """Row numbers of each step of an epoch, ordered by domain: int64 ``[S, domains · batch_size]``."""
        steps = next(self.steps)
        epoch = [
            torch.stack([self._take(s, d, steps) for d in range(len(self.rows))], dim=1).flatten(1)
            for s in range(len(self.generators))
        ]
        return torch.stack(epoch, dim=1).unbind()

    def _take(self, s: int, d: int, steps: int) -> Tensor:
        """The next rows of one seed and domain: int64 ``[steps, batch_size]``."""
        rows, wanted, parts = self.rows[d][s], steps * self.batch_size, [self.left[s][d]]
        while sum(map(len, parts)) < wanted:
            parts.append(rows[torch.randperm(len(rows), generator=self.generators[s][d]).to(rows.device)])
        every = torch.cat(parts)
        self.left[s][d] = every[wanted:]
        return every[:wanted].view(steps, self.batch_size)


def updates_per_epoch(data: SplitFeatures, domains: Sequence[str], settings: Settings) -> int | tuple[int, ...]:
    """Updates in each epoch of training on the `in` part of these domains; of whole models, one number for each."""
    if isinstance(settings, ImageSettings):
        return settings.steps_per_epoch
    return math.ceil(data.rows(domains, "in", [0]).shape[1] / settings.batch_size)


def training_order(
    data: SplitFeatures, seeds: Sequence[int], name: str, domains: Sequence[str], part: str, settings: Settings
) -> BatchOrder | BalancedOrder:
    """Each seed's batches of these domains in both phases: pooled, or of the whole model as many of every domain."""
    if not isinstance(settings, ImageSettings):
        return BatchOrder(seeds, name, data.rows(domains, part, seeds), settings.batch_size)
    rows = [data.rows([domain], part, seeds) for domain in domains]
    return BalancedOrder(seeds, name, rows, settings.steps_per_epoch, settings.batch_size)


def accuracies(correct: Tensor, totals: Tensor, balanced: bool = False) -> dict[str, Tensor]:
    """Accuracy per domain on `full`, `in` and `out`, from counts of right answers.

    Args:
        correct: ``[*, domains, 2, classes]``.
        totals: ``[domains, 2, classes]``, the number of images in each cell.
        balanced: mean over classes of the recall (classes without images left out) instead of the plain share.

    Returns:
        part -> float64 ``[*, domains]``; NaN where answers were not counted (below 0).
    """
    correct, totals = torch.where(correct < 0, torch.nan, correct.double()), totals.double()
    parts = {"full": (correct.sum(-2), totals.sum(-2))}
    parts |= {name: (correct[..., i, :], totals[:, i, :]) for i, name in enumerate(("in", "out"))}
    if balanced:
        return {name: _mean_recall(right, of) for name, (right, of) in parts.items()}
    return {name: right.sum(-1) / of.sum(-1) for name, (right, of) in parts.items()}


def _mean_recall(right: Tensor, of: Tensor) -> Tensor:
    """Mean over the classes that have images: ``[*, domains, classes]`` -> ``[*, domains]``."""
    there = of > 0
    return torch.where(there, right / of, 0).sum(-1) / there.sum(-1)
