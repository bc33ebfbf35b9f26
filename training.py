"""The one training loop: many small networks at once.

A *stack* holds S seeds × V variants of the same classifier: every parameter has two leading axes ``[S, V, …]``.
Each seed has its own start and its own batch order; the variants of a seed (masks, algorithms) see the same batches,
so their differences are paired. The network is written once as an ordinary `nn.Module` and stacked with `torch.func`.
Networks never mix: what one does is the same, up to float rounding, whatever is trained beside it.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

import config
from dataset import split
from models import FeedforwardClassifier

Params = dict[str, Tensor]  # parameter name -> [S, V, *shape]
EVALUATION_FLOATS = 2**23  # size of the largest hidden activation made at once when whole domains are evaluated


def prepare_machine() -> str:
    """Set the CPU threads as `config.THREADS` says; the device is `config.DEVICE`, or CUDA where there is one.

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
        train_accuracy: accuracy over the epoch's own batches, as they were met, ``[S, V, E]``.
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


def random_start(seeds: Sequence[int], purpose: str, sizes: tuple[int, Sequence[int], int]) -> Params:
    """`nn.Linear`'s own initialization, once per seed: name -> ``[S, *shape]`` (float32, CPU).

    Args:
        seeds: one network for each.
        purpose: "start" (Phase 1) or "fresh_start" (Phase 2).
        sizes: (in_features, hidden_sizes, num_classes).
    """
    in_features, hidden, classes = sizes
    modules = []
    for seed in seeds:
        with torch.random.fork_rng(devices=[]):  # nn.Linear draws from the global generator: leave that as it was
            torch.manual_seed(generator(seed, purpose).initial_seed())
            modules.append(FeedforwardClassifier(in_features, classes, hidden))
    params, _ = stack_module_state(modules)
    return {name: value.detach() for name, value in params.items()}


def tracked(params: Params, hidden_sizes: Sequence[int]) -> list[Tensor]:
    """The tracked matrices of a stack, first to last: L tensors ``[*stack, out, in]``."""
    return [params[name] for name in FeedforwardClassifier(1, 1, hidden_sizes).tracked_names]


class BatchOrder:
    """Order in which each seed meets its training images: a new permutation per epoch, drawn without replacement."""

    def __init__(self, seeds: Sequence[int], name: str, rows: Tensor):
        self.generators = [generator(seed, "order", name) for seed in seeds]
        self.rows = rows

    def next_epoch(self) -> Tensor:
        """Row numbers of the problem, int64 ``[S, n]``."""
        order = torch.stack([torch.randperm(len(self.rows), generator=g) for g in self.generators])
        return self.rows[order.to(self.rows.device)]


def scaled_update(old: Tensor, new: Tensor, rate: Tensor) -> Tensor:
    """A part `rate` of an optimizer's update: ``old + rate·(new − old)``, exact at rate 1 and 0.

    Adam is invariant to the scale of the gradient, so a learning rate per weight has to scale the update itself.
    """
    return torch.where(rate == 1, new, torch.where(rate == 0, old, old + rate * (new - old)))


@torch.no_grad()
def step_with_rates(optimizer: torch.optim.Optimizer, rates: Mapping[Tensor, Tensor]) -> None:
    """``optimizer.step()`` with a learning rate per weight, for any optimizer.

    Args:
        optimizer: gradients are in place, its own learning rate is that of rate 1.
        rates: parameter -> factor on its update, of the same shape; parameters not named step in full.
            A weight of rate 0 keeps its exact bits, momentum and weight decay notwithstanding.
    """
    before = {parameter: parameter.detach().clone() for parameter in rates}
    optimizer.step()
    for parameter, rate in rates.items():
        parameter.copy_(scaled_update(before[parameter], parameter, rate))


def apply_stack(template: nn.Module, params: Params, features: Tensor) -> Tensor:
    """Logits of every network of a stack.

    Args:
        template: the network as a module (its own weights are not used).
        params: name -> ``[S, V, *shape]``.
        features: ``[S, B, D]``, one batch per seed shared by its variants, or ``[B, D]``, shared by all.

    Returns:
        ``[S, V, B, classes]``.
    """

    def one(network: Params, batch: Tensor) -> Tensor:
        return functional_call(template, network, (batch,))

    over_variants = vmap(one, in_dims=(0, None))
    return vmap(over_variants, in_dims=(0, 0 if features.ndim == 3 else None))(params, features)


@torch.no_grad()
def predict(template: nn.Module, params: Params, features: Tensor) -> Tensor:
    """Most probable class of every row for every network: int64 ``[S, V, N]``, in pieces that fit."""
    seeds, variants = next(iter(params.values())).shape[:2]
    widest = max(value.shape[2] for value in params.values())
    piece = max(1, EVALUATION_FLOATS // (seeds * variants * widest))
    parts = [apply_stack(template, params, rows).argmax(-1) for rows in features.split(piece)]
    return torch.cat(parts, dim=-1)


def count_correct(template: nn.Module, params: Params, problem: Problem) -> Tensor:
    """Right answers per domain, part and class: int64 ``[S, V, domains, 2, classes]``."""
    right = predict(template, params, problem.features) == problem.labels
    counts = torch.zeros(*right.shape[:2], problem.totals.numel(), dtype=torch.long, device=right.device)
    counts.index_add_(2, problem.cells, right.long())
    return counts.view(*right.shape[:2], *problem.cell_shape)


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


def train(
    problem: Problem,
    start: Params,
    order: BatchOrder,
    settings: config.Settings,
    *,
    epochs: int,
    learning_rate: float,
    rates: Callable[[int], Mapping[str, Tensor]] | None = None,
    on_epoch: Callable[[], None] = lambda: None,
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
    """
    features, device = problem.features, problem.features.device
    template = FeedforwardClassifier(features.shape[1], len(problem.class_names), settings.hidden_sizes).to(features)
    params = {k: v.to(device, features.dtype, copy=True).requires_grad_() for k, v in start.items()}
    optimizer = torch.optim.Adam(params.values(), lr=learning_rate, fused=True)
    shape = next(iter(params.values())).shape[:2]
    losses, accuracies, correct = [], [], []
    failed = torch.zeros(shape, dtype=torch.long, device=device)
    for epoch in range(epochs):
        factors = {params[name]: rate.expand_as(params[name]) for name, rate in (rates or _none)(epoch).items()}
        rows = order.next_epoch()
        loss_sum, right = torch.zeros(2, *shape, dtype=features.dtype, device=device)
        for batch in rows.split(settings.batch_size, dim=1):
            targets = problem.labels[batch]  # [S, B]
            logits = apply_stack(template, params, features[batch])
            loss = _cross_entropy(logits, targets)  # [S, V]
            optimizer.zero_grad()
            loss.sum().backward()  # networks share no parameter: each gets the gradient of its own loss
            step_with_rates(optimizer, factors)
            loss_sum += loss.detach() * batch.shape[1]
            right += (logits.detach().argmax(-1) == targets.unsqueeze(1)).sum(-1)
        losses.append(loss_sum / rows.shape[1])
        accuracies.append(right / rows.shape[1])
        finite = losses[-1].isfinite() & torch.stack([p.isfinite().flatten(2).all(2) for p in params.values()]).all(0)
        failed = torch.where(finite | (failed > 0), failed, epoch + 1)
        correct.append(count_correct(template, params, problem))
        on_epoch()
    params = {name: value.detach() for name, value in params.items()}
    return Trained(params, torch.stack(losses, 2), torch.stack(accuracies, 2), torch.stack(correct, 2), failed)


def _none(epoch: int) -> Mapping[str, Tensor]:
    return {}


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the batch for each network: logits ``[S, V, B, C]``, targets ``[S, B]`` -> ``[S, V]``."""
    seeds, variants, batch, _ = logits.shape
    spread = targets.unsqueeze(1).expand(seeds, variants, batch)
    loss = nn.functional.cross_entropy(logits.flatten(0, 2), spread.flatten(), reduction="none")
    return loss.view(seeds, variants, batch).mean(-1)


def raise_failure(failed: Tensor, seeds: Sequence[int], what: str) -> None:
    """Raise for the first failed network among `failed` ``[S]`` or ``[S, V]``, if there is one."""
    for seed, code in zip(seeds, failed.reshape(len(seeds), -1).tolist(), strict=True):
        for value in filter(None, code):
            raise TrainingFailedError(f"{what}, seed {seed}: {failure_reason(value)}.")


def failure_reason(code: int) -> str:
    """In words: an epoch (from 1) whose loss was not finite, or -1."""
    return f"the loss is no longer finite in epoch {code}" if code > 0 else "the importance is all equal or not finite"
