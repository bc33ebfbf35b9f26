"""A stack of networks trained by any `Algorithm`, as an engine of `training.train` (see `stacks`)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from algorithms.base import Algorithm, Batch, Noise, Params, State
from stacks import Rates


class AlgorithmEngine:
    """S networks, one per seed, under one method.

    Args:
        algorithm: the method; its functions see one network, here they run under `vmap`.
        start: initial parameters, name -> ``[S, 1, *shape]``, on the device and of the type to train in.
        draws: the `noise` stream of each seed, S CPU generators.
        sources: numbers of the source domains among the problem's domains, in order.
        validation: features ``[N, D]`` and labels ``[N]`` of the sources' `out` split; needed where the method's
            `validate_every` is set.
        given: entries of the state that are known before training (a mask), name -> ``[S, …]``.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        start: Params,
        draws: Sequence[torch.Generator],
        sources: Sequence[int],
        validation: tuple[Tensor, Tensor] | None = None,
        given: State | None = None,
    ):
        self.algorithm, self.draws, self.validation = algorithm, draws, validation
        like = next(iter(start.values()))
        extra = stacked([algorithm.extra_parameters(draw) for draw in draws], like)
        self.networks = {name: value.squeeze(1).clone() for name, value in start.items()} | extra  # name -> [S, *shape]
        number = like.new_full((max(sources) + 1,), -1, dtype=torch.long)
        number[torch.as_tensor(sources, device=like.device)] = torch.arange(len(sources), device=like.device)
        self.number_of = number  # among all domains -> among the sources
        with torch.device(like.device):
            state = vmap(algorithm.initial_state)(self.networks)
        self.state = {**state, **(given or {})}
        self.networks = vmap(algorithm.begin)(self.networks, self.state)
        setup, every = algorithm.setup, algorithm.validate_every
        self.interval = None if every is None else max(1, round(every * setup.steps_per_epoch))
        self.steps_taken = 0

    @property
    def params(self) -> Params:
        """Parameters with an axis for the one variant, as `training.train` wants them: name -> ``[S, 1, *shape]``."""
        return {name: value.unsqueeze(1) for name, value in self.networks.items()}

    @torch.no_grad()
    def step(self, features: Tensor, targets: Tensor, rates: Rates, domains: Tensor) -> tuple[Tensor, Tensor]:
        """One step of each network on its own batch.

        Args:
            features: ``[S, B, D]``.
            targets: ``[S, B]``.
            rates: must be empty; a method that has rates holds them itself.
            domains: numbers among the problem's domains, ``[S, B]``.

        Returns:
            Loss before the step, and NaN for the right answers (they would take a second forward pass), ``[S, 1]``.
        """
        if rates:
            raise ValueError("An algorithm has rates of its own.")
        batch = Batch(features, targets, self.number_of[domains])
        noise = stacked([self.algorithm.draw(draw, features.shape[1]) for draw in self.draws], features)
        self.networks, self.state, loss = vmap(self.algorithm.update)(self.networks, batch, self.state, noise)
        self.steps_taken += 1
        if self.interval and self.steps_taken % self.interval == 0:
            self._validate()
        return loss.unsqueeze(1), torch.full_like(loss, torch.nan).unsqueeze(1)

    def _validate(self) -> None:
        features, labels = self.validation
        logits = vmap(self.algorithm.forward, in_dims=(0, None))(self.networks, features)
        loss = F.cross_entropy(logits.movedim(1, 2), labels.expand(len(logits), -1), reduction="none").mean(-1)
        changes = vmap(self.algorithm.validated)(self.networks, self.state, loss)
        self.state = {**self.state, **changes}

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """``[N, D]`` -> ``[S, N, classes]``."""
        return vmap(self.algorithm.logits, in_dims=(0, 0, None))(self.networks, self.state, features)

    def classify(self, features: Tensor) -> Tensor:
        """Most probable class of the rows ``[N, D]`` for every network: int64 ``[S, 1, N]``."""
        return self.logits(features).argmax(-1).unsqueeze(1)

    def right(self, features: Tensor, targets: Tensor) -> Tensor:
        """Whether each network classifies the rows ``[N, D]`` as their targets ``[N]``: bool ``[S, 1, N]``."""
        return self.classify(features) == targets


def stacked(drawn: Sequence[Noise], like: Tensor) -> Noise:
    """One dictionary of tensors per seed -> tensors ``[S, …]`` on the device of `like`, floats in its type."""

    def join(*values: Tensor) -> Tensor:
        value = torch.stack(values)
        return value.to(like) if value.is_floating_point() else value.to(like.device)

    return tree_map(join, *drawn) if drawn[0] else {}
