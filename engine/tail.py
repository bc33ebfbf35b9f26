"""Stacks of `models.BackboneTail`: the last blocks of a vision transformer, trained for all seeds and arms at once.

A single block that `ClsShortcut` covers takes that; other blocks, and several, take the module itself, one network
after the other.
"""

from collections.abc import Mapping
from itertools import product

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F
from torch.optim.adam import adam

from engine.shortcut import ClsShortcut
from engine.stack import Params, Rates
from importance import scale_update_
from models import HEAD, BackboneTail


class TailEngine:
    """Stacks ``[S, V]`` of `models.BackboneTail`, trained by Adam on cross-entropy.

    Args:
        tail: the network; its parameters are not used.
        shortcut: computes its features for a stack; None = the module itself, one network after the other.
        start: initial parameters, name -> ``[S, V, *shape]``, on the device and of the type to train in. Copied.
        learning_rates: parameter name -> learning rate of Adam of each network, ``[S, V]``.

    Attributes:
        params, shape, gradients: see `engine.Engine`.
    """

    def __init__(
        self, tail: BackboneTail, shortcut: ClsShortcut | None, start: Params, learning_rates: Mapping[str, Tensor]
    ):
        self.tail, self.shortcut = tail, shortcut
        self.params = {name: value.clone(memory_format=torch.contiguous_format) for name, value in start.items()}
        self.shape = next(iter(self.params.values())).shape[:2]
        self.optimizer = StackedAdam(self.params, learning_rates)
        self.gradients: dict[str, Tensor | None] = {}

    def step(self, features: Tensor, targets: Tensor, rates: Rates, domains: Tensor) -> tuple[Tensor, Tensor]:
        """One step of every network on its seed's tokens ``[S, B, T, D]``, see `engine.Engine`.

        Parameters that are not in `rates` step in full; `domains` are not used.
        """
        differentiate = self._one_by_one if self.shortcut is None else self._together
        loss, logits, self.gradients = differentiate(features.to(next(iter(self.params.values())).dtype), targets)
        self._update(self.gradients, rates)
        return loss, (logits.argmax(-1) == targets[:, None]).sum(-1)

    def _together(self, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor | None]]:
        """Loss ``[S, V]``, logits ``[S, V, B, classes]`` and gradients, all networks at once."""
        leaves = {name: value.detach().requires_grad_() for name, value in self.params.items()}
        logits = self._logits(leaves, features)
        spread = targets[:, None].expand(logits.shape[:-1])
        loss = F.cross_entropy(logits.movedim(-1, 1), spread, reduction="none").mean(-1)
        gradients = torch.autograd.grad(loss.sum(), [*leaves.values()], allow_unused=True)
        return loss.detach(), logits.detach(), dict(zip(leaves, gradients, strict=True))

    def _one_by_one(self, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor | None]]:
        """The same, one network after the other: the activations of one alone are in memory."""
        losses, every, gradients = [], [], {name: torch.zeros_like(value) for name, value in self.params.items()}
        used = set()
        for s, v in product(*map(range, self.shape)):
            leaves = {name: value[s, v].detach().requires_grad_() for name, value in self.params.items()}
            logits = functional_call(self.tail, leaves, (features[s],))
            loss = F.cross_entropy(logits, targets[s])
            own = torch.autograd.grad(loss, [*leaves.values()], allow_unused=True)
            for name, gradient in zip(leaves, own, strict=True):
                if gradient is not None:
                    gradients[name][s, v] = gradient
                    used.add(name)
            losses.append(loss.detach())
            every.append(logits.detach())
        loss, logits = (torch.stack(values).unflatten(0, self.shape) for values in (losses, every))
        return loss, logits, {name: value if name in used else None for name, value in gradients.items()}

    @torch.no_grad()
    def _update(self, gradients: Mapping[str, Tensor | None], rates: Rates) -> None:
        before = {name: self.params[name].clone() for name in rates}
        self.optimizer.step(gradients)
        for name, rate in rates.items():
            scale_update_(self.params[name], before[name], rate)

    def _logits(self, params: Params, tokens: Tensor) -> Tensor:
        """Tokens ``[S, B, T, D]`` -> logits ``[S, V, B, classes]``."""
        tokens = tokens.to(next(iter(params.values())).dtype)
        if self.shortcut is not None:
            features = self.shortcut.representation(params, tokens)
            return stacked_head(params, features)
        grid = [[self._single(params, s, v, tokens[s]) for v in range(self.shape[1])] for s in range(len(tokens))]
        return torch.stack([torch.stack(row) for row in grid])

    def _single(self, params: Params, s: int, v: int, tokens: Tensor) -> Tensor:
        return functional_call(self.tail, {name: value[s, v] for name, value in params.items()}, (tokens,))

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """Tokens ``[N, T, D]`` -> logits ``[S, V, N, classes]``."""
        if self.shortcut is None:
            return self._logits(self.params, features.expand(self.shape[0], *features.shape))
        together = {name: value.flatten(0, 1).unsqueeze(0) for name, value in self.params.items()}  # [1, S · V, …]
        return self._logits(together, features.unsqueeze(0)).view(*self.shape, len(features), -1)

    def classify(self, features: Tensor) -> Tensor:
        """Most probable class of tokens ``[N, T, D]``: int64 ``[S, V, N]``."""
        return self.logits(features).argmax(-1)

    def right(self, features: Tensor, targets: Tensor) -> Tensor:
        """Whether each network classifies tokens ``[N, T, D]`` as their targets ``[N]``: bool ``[S, V, N]``."""
        return self.classify(features) == targets


def stacked_head(params: Params, features: Tensor) -> Tensor:
    """The classifier ``head`` of a stack: ``[S, V, B, D]`` -> logits ``[S, V, B, classes]``."""
    depth = sum(name.startswith(f"{HEAD}layers.") and name.endswith(".weight") for name in params)
    for i in range(depth):
        weight, bias = params[f"{HEAD}layers.{i}.weight"], params[f"{HEAD}layers.{i}.bias"]
        features = features @ weight.transpose(-1, -2) + bias.unsqueeze(-2)
        features = torch.relu(features) if i < depth - 1 else features
    return features


class StackedAdam:
    """Adam (Kingma & Ba 2015) with a learning rate per network and parameter, by the function behind `torch.optim`.

    Args:
        params: name -> ``[S, V, *shape]``, contiguous; updated in place.
        learning_rates: name -> ``[S, V]``.
    """

    def __init__(self, params: Params, learning_rates: Mapping[str, Tensor]):
        self.names = [*params]
        means = {name: torch.zeros_like(value) for name, value in params.items()}
        squares = {name: torch.zeros_like(value) for name, value in params.items()}
        device = next(iter(params.values())).device
        self._groups = []  # (learning rate, parameters, means, squares, steps, their place among the gradients)
        networks = [_networks(kind) for kind in (params, means, squares)]
        for k in range(len(networks[0])):
            rates = {name: float(learning_rates[name].flatten()[k]) for name in self.names}
            for rate in dict.fromkeys(rates.values()):
                own = [name for name in self.names if rates[name] == rate]
                lists = [[kind[k][name] for name in own] for kind in networks]
                self._groups.append((rate, *lists, [*torch.zeros(len(own), device=device)], k, own))

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor | None]) -> None:
        """One step; a parameter without a gradient stays."""
        # The fused function reads all tensors in the order of their memory.
        known = _networks({name: value.contiguous() for name, value in gradients.items() if value is not None})
        for rate, *lists, k, names in self._groups:
            there = [i for i, name in enumerate(names) if name in known[k]]
            params, means, squares, steps = ([kind[i] for i in there] for kind in lists)
            grads = [known[k][names[i]] for i in there]
            options = {"beta1": 0.9, "beta2": 0.999, "lr": rate, "weight_decay": 0.0, "eps": 1e-8}
            adam(params, grads, means, squares, [], steps, fused=True, amsgrad=False, maximize=False, **options)


def _networks(params: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Stacked parameters ``[S, V, *shape]`` -> those of each network, views."""
    unbound = {name: value.flatten(0, 1).unbind(0) for name, value in params.items()}
    count = len(next(iter(unbound.values())))
    return [{name: values[k] for name, values in unbound.items()} for k in range(count)]
