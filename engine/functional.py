"""The engine of the methods of `field`: pure functions of one network, run for a whole stack by `torch.func.vmap`."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from engine.stack import Params, Rates

INPUT_FLOATS = 2**24  # largest piece of the inputs that a network is validated on


class Batch(NamedTuple):
    """What one network sees in a step.

    Shapes: `features` ``[B, D]``, or tokens ``[B, T, D]`` of a network with trained blocks; `labels`, `domains` int64
    ``[B]``. Domains are numbered 0 … n − 1 among the sources. A balanced batch is ordered by domain, `batch_size` rows
    of each.
    """

    features: Tensor
    labels: Tensor
    domains: Tensor


class Method(Protocol):
    """What the engine needs of a way to train; `field.Algorithm` documents each member."""

    setup: Any
    validate_every: float | None

    def with_values(self, values: Mapping[str, Tensor]) -> "Method": ...
    def extra_parameters(self, draw: torch.Generator) -> Params: ...
    def initial_state(self, params: Params) -> dict: ...
    def begin(self, params: Params, state: dict) -> Params: ...
    def draw(self, draw: torch.Generator, rows: int) -> dict: ...
    def update(self, params: Params, batch: Batch, state: dict, noise: dict) -> tuple[Params, dict, Tensor]: ...
    def validated(self, params: Params, state: dict, loss: Tensor) -> dict: ...
    def forward(self, params: Params, features: Tensor) -> Tensor: ...
    def logits(self, params: Params, state: dict, features: Tensor) -> Tensor: ...


class Validation(NamedTuple):
    """What a method is validated on while it trains: the rows of each network, of all data.

    Shapes: `features` ``[N, D]``, or tokens ``[N, T, D]``; `labels` int64 ``[N]``; `rows` int64 ``[S, n]``.
    """

    features: Tensor
    labels: Tensor
    rows: Tensor


class FunctionalEngine:
    """A stack of S networks, trained by one method: of different seeds, or with different hyperparameters, or both.

    Args:
        methods: the method of each network. They are of one class and setup; what they draw has the same shapes. Their
            functions see one network; here they run under `vmap`.
        start: initial parameters of the network, name -> ``[S, *shape]``, on the device and of the type to train in.
        draws: the `noise` stream of each network, S CPU generators.
        sources: numbers of the source domains among all domains, in order.
        validation: the sources' `out` split; needed if the method sets `validate_every`.
        given: entries of the state that are known before training, such as masks: tensors ``[S, …]``, nested as there;
            they are moved to the device, and floats to the type, of `start`.
        values: hyperparameters in which the networks differ, name -> ``[S]``; under `vmap` the method has the network's
            own in their place, floats in the type to train in.

    Attributes:
        params, shape: see `engine.Engine`.
        state: current state of the method, name -> ``[S, …]``.
        steps_taken: number of steps so far.
    """

    def __init__(
        self,
        methods: Sequence[Method],
        start: Params,
        draws: Sequence[torch.Generator],
        sources: Sequence[int],
        validation: Validation | None = None,
        given: dict | None = None,
        values: Mapping[str, Tensor] | None = None,
    ):
        self.methods, self.draws, self.validation = methods, draws, validation
        like, self.shape = next(iter(start.values())), torch.Size([len(draws)])
        self.values = {name: _like(value, like) for name, value in (values or {}).items()}
        params = start | stacked([method.extra_parameters(draw) for method, draw in self._networks()], like)
        number = like.new_full((max(sources) + 1,), -1, dtype=torch.long)
        number[torch.as_tensor(sources, device=like.device)] = torch.arange(len(sources), device=like.device)
        self.number_of = number  # among all domains -> among the sources
        with torch.device(like.device):
            each = [{name: value[s] for name, value in params.items()} for s in range(len(draws))]
            states = [method.initial_state(own) for method, own in zip(methods, each, strict=True)]
            self.state = stacked(states, like) | tree_map(partial(_like, like=like), given or {})
        self.params = self._every("begin", params, self.state)
        every = methods[0].validate_every
        self.interval = None if every is None else max(1, round(every * methods[0].setup.steps_per_epoch))
        self.steps_taken = 0

    def _networks(self) -> Iterator[tuple[Method, torch.Generator]]:
        """Method and `noise` stream of each network."""
        return zip(self.methods, self.draws, strict=True)

    def _every(self, function: str, *args: Any, in_dims: int | tuple = 0) -> Any:
        """A function of the method, by name, for every network with its own hyperparameters."""

        def one(values: dict[str, Tensor], *args: Any) -> Any:
            method = self.methods[0].with_values(values) if values else self.methods[0]
            return getattr(method, function)(*args)

        dims = in_dims if isinstance(in_dims, tuple) else (in_dims,) * len(args)
        return vmap(one, in_dims=(0, *dims))(self.values, *args)

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
        noise = stacked([method.draw(draw, features.shape[1]) for method, draw in self._networks()], features)
        self.params, self.state, loss = self._every("update", self.params, batch, self.state, noise)
        self.steps_taken += 1
        if self.interval and self.steps_taken % self.interval == 0:
            self._validate()
        return loss, torch.full_like(loss, torch.nan)

    def _validate(self) -> None:
        features, labels, rows = self.validation
        dtype, size = next(iter(self.params.values())).dtype, max(1, INPUT_FLOATS // (len(rows) * features[0].numel()))
        shared = bool((rows == rows[:1]).all())  # one split for all seeds
        losses = []
        for part in rows.split(size, dim=1):
            inputs = features[part[0] if shared else part].to(dtype)
            logits = self._every("forward", self.params, inputs, in_dims=(0, None if shared else 0))
            losses.append(F.cross_entropy(logits.movedim(1, 2), labels[part], reduction="none"))
        loss = torch.cat(losses, dim=1).mean(-1)
        self.state = self.state | self._every("validated", self.params, self.state, loss)

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """``[N, D]``, or tokens ``[N, T, D]`` -> ``[S, N, classes]``."""
        return self._every("logits", self.params, self.state, features, in_dims=(0, 0, None))

    def right(self, features: Tensor, targets: Tensor) -> Tensor:
        """Whether each network classifies the rows ``[N, D]`` as their targets ``[N]``: bool ``[S, N]``."""
        return self.logits(features).argmax(-1) == targets


def stacked(drawn: Sequence[dict], like: Tensor) -> dict:
    """One dictionary of tensors per network -> tensors ``[S, …]`` on the device of `like`, floats in its type."""
    return tree_map(lambda *values: _like(torch.stack(values), like), *drawn) if drawn[0] else {}


def _like(value: Tensor, like: Tensor) -> Tensor:
    """On the device of `like`; floats in its type."""
    return value.to(like) if value.is_floating_point() else value.to(like.device)
