"""The engine of the methods of `field`: pure functions of one network, run for all seeds by `torch.func.vmap`."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from engine.stack import Params, Rates


class Batch(NamedTuple):
    """What one network sees in a step.

    Shapes: `features` ``[B, D]``; `labels`, `domains` int64 ``[B]``. Domains are numbered 0 … n − 1 among the sources.
    A balanced batch is ordered by domain, `batch_size` rows of each.
    """

    features: Tensor
    labels: Tensor
    domains: Tensor


class Method(Protocol):
    """What the engine needs of a way to train; `field.Algorithm` documents each member."""

    setup: Any
    validate_every: float | None

    def extra_parameters(self, draw: torch.Generator) -> Params: ...
    def initial_state(self, params: Params) -> dict: ...
    def begin(self, params: Params, state: dict) -> Params: ...
    def draw(self, draw: torch.Generator, rows: int) -> dict: ...
    def update(self, params: Params, batch: Batch, state: dict, noise: dict) -> tuple[Params, dict, Tensor]: ...
    def validated(self, params: Params, state: dict, loss: Tensor) -> dict: ...
    def forward(self, params: Params, features: Tensor) -> Tensor: ...
    def logits(self, params: Params, state: dict, features: Tensor) -> Tensor: ...


class Validation(NamedTuple):
    """What a method is validated on while it trains: the rows of each seed, of all data.

    Shapes: `features` ``[N, D]``; `labels` int64 ``[N]``; `rows` int64 ``[S, n]``.
    """

    features: Tensor
    labels: Tensor
    rows: Tensor


class FunctionalEngine:
    """S networks, one per seed, trained by one method.

    Args:
        method: its functions see one network; here they run under `vmap`.
        start: initial parameters of the classifier, name -> ``[S, *shape]``, on the device and of the type to train in.
        draws: the `noise` stream of each seed, S CPU generators.
        sources: numbers of the source domains among all domains, in order.
        validation: the sources' `out` split; needed if the method sets `validate_every`.
        given: entries of the state that are known before training, such as masks: tensors ``[S, …]``, nested as there.

    Attributes:
        params, shape: see `engine.Engine`.
        state: current state of the method, name -> ``[S, …]``.
        steps_taken: number of steps so far.
    """

    def __init__(
        self,
        method: Method,
        start: Params,
        draws: Sequence[torch.Generator],
        sources: Sequence[int],
        validation: Validation | None = None,
        given: dict | None = None,
    ):
        self.method, self.draws, self.validation = method, draws, validation
        like, self.shape = next(iter(start.values())), torch.Size([len(draws)])
        params = start | stacked([method.extra_parameters(draw) for draw in draws], like)
        number = like.new_full((max(sources) + 1,), -1, dtype=torch.long)
        number[torch.as_tensor(sources, device=like.device)] = torch.arange(len(sources), device=like.device)
        self.number_of = number  # among all domains -> among the sources
        with torch.device(like.device):
            self.state = {**vmap(method.initial_state)(params), **(given or {})}
        self.params = vmap(method.begin)(params, self.state)
        every = method.validate_every
        self.interval = None if every is None else max(1, round(every * method.setup.steps_per_epoch))
        self.steps_taken = 0

    @torch.no_grad()
    def step(self, features: Tensor, targets: Tensor, rates: Rates, domains: Tensor) -> tuple[Tensor, Tensor]:
        """One step of each network on its own batch, see `engine.Engine`; `domains` are numbers among all domains.

        Returns:
            Loss before the step, and NaN for the right answers (they would take a second forward pass), ``[S]``.

        Raises:
            ValueError: `rates` is not empty.
        """
        if rates:
            raise ValueError("`rates` must be empty: a method scales its updates itself.")
        batch = Batch(features, targets, self.number_of[domains])
        noise = stacked([self.method.draw(draw, features.shape[1]) for draw in self.draws], features)
        self.params, self.state, loss = vmap(self.method.update)(self.params, batch, self.state, noise)
        self.steps_taken += 1
        if self.interval and self.steps_taken % self.interval == 0:
            self._validate()
        return loss, torch.full_like(loss, torch.nan)

    def _validate(self) -> None:
        features, labels, rows = self.validation
        if bool((rows == rows[:1]).all()):  # one split for all seeds
            logits = vmap(self.method.forward, in_dims=(0, None))(self.params, features[rows[0]])
        else:
            logits = vmap(lambda params, own: self.method.forward(params, features[own]))(self.params, rows)
        loss = F.cross_entropy(logits.movedim(1, 2), labels[rows], reduction="none").mean(-1)
        self.state = self.state | vmap(self.method.validated)(self.params, self.state, loss)

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """``[N, D]`` -> ``[S, N, classes]``."""
        return vmap(self.method.logits, in_dims=(0, 0, None))(self.params, self.state, features)

    def right(self, features: Tensor, targets: Tensor) -> Tensor:
        """Whether each network classifies the rows ``[N, D]`` as their targets ``[N]``: bool ``[S, N]``."""
        return self.logits(features).argmax(-1) == targets


def stacked(drawn: Sequence[dict], like: Tensor) -> dict:
    """One dictionary of tensors per seed -> tensors ``[S, …]`` on the device of `like`, floats in its type."""

    def join(*values: Tensor) -> Tensor:
        value = torch.stack(values)
        return value.to(like) if value.is_floating_point() else value.to(like.device)

    return tree_map(join, *drawn) if drawn[0] else {}
