"""A stack of S × V small classifiers computed at once: the reference by `vmap`, and a fast path by matrix products.

Every parameter of a stack has two leading axes ``[S, V, …]``: S seeds, each with its own batches, and V variants that
see the same batches of their seed. An engine holds the parameters, takes training steps and classifies rows.

- `VmapEngine` is the reference. The network is the ordinary `nn.Module`, stacked by `torch.func`; autograd gives the
  gradients, one Adam takes the step.
- `MatmulEngine` computes the same for a `FeedforwardClassifier` under cross-entropy, with the gradients written out:
  activations lie as ``[networks, units, batch]``, the first layer of all variants of a seed is one matrix product, and
  all parameters lie in one flat buffer, so that Adam is one kernel.

Both are tested against a plain PyTorch loop in float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

if TYPE_CHECKING:  # so that `step_with_rates` needs torch alone, whatever files lie beside a reader's notebook
    from models import FeedforwardClassifier

Params = dict[str, Tensor]  # parameter name -> [S, V, *shape]
Rates = Mapping[str, Tensor]  # parameter name -> factor on its update, broadcastable to [S, V, *shape]
PIECE_FLOATS = 2**20  # size of the largest activation made at once when many rows are classified


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


class Engine(Protocol):
    """What `training.train` needs of a stack of networks.

    Attributes:
        params: parameters, name -> ``[S, V, *shape]``.
    """

    params: Params

    def step(self, features: Tensor, targets: Tensor, rates: Rates, domains: Tensor) -> tuple[Tensor, Tensor]:
        """One step on batches ``[S, B, D]``, ``[S, B]``, ``[S, B]``: loss and right answers before it, ``[S, V]``."""

    def right(self, features: Tensor, targets: Tensor) -> Tensor:
        """Whether each network classifies the rows ``[N, D]`` as their targets ``[N]``: bool ``[S, V, N]``."""


class VmapEngine:
    """The reference.

    Args:
        template: the network as a module; its own weights are not used.
        params: initial parameters, name -> ``[S, V, *shape]``, on the device and of the type to train in.
        learning_rate: of Adam.
    """

    def __init__(self, template: FeedforwardClassifier, params: Params, learning_rate: float = 1e-3):
        self.template = template
        self.params = {name: value.clone().requires_grad_() for name, value in params.items()}
        self.optimizer = torch.optim.Adam(self.params.values(), lr=learning_rate, fused=True)

    def step(
        self, features: Tensor, targets: Tensor, rates: Rates, domains: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """One step of Adam on the mean cross-entropy of each network's batch.

        Args:
            features: ``[S, B, D]``.
            targets: ``[S, B]``.
            rates: parameter name -> factor on its update.
            domains: not used by this engine.

        Returns:
            Loss and number of right answers before the step, both ``[S, V]``.
        """
        logits = apply_stack(self.template, self.params, features)
        spread = targets.unsqueeze(1).expand(logits.shape[:3])
        loss = nn.functional.cross_entropy(logits.movedim(-1, 1), spread, reduction="none").mean(-1)
        self.optimizer.zero_grad()
        loss.sum().backward()  # networks share no parameter: each gets the gradient of its own loss
        factors = {self.params[name]: rate.expand_as(self.params[name]) for name, rate in rates.items()}
        step_with_rates(self.optimizer, factors)
        return loss.detach(), (logits.detach().argmax(-1) == spread).sum(-1)

    @torch.no_grad()
    def classify(self, features: Tensor) -> Tensor:
        """Most probable class of the rows ``[N, D]`` for every network: int64 ``[S, V, N]``."""
        return apply_stack(self.template, self.params, features).argmax(-1)

    def right(self, features: Tensor, targets: Tensor) -> Tensor:
        """Whether each network classifies the rows ``[N, D]`` as their targets ``[N]``: bool ``[S, V, N]``."""
        return self.classify(features) == targets


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


class MatmulEngine:
    """The fast path for `FeedforwardClassifier`; arguments and methods as in `VmapEngine`."""

    def __init__(self, template: FeedforwardClassifier, params: Params, learning_rate: float = 1e-3):
        self.shape = next(iter(params.values())).shape[:2]
        depth = len(template.layers)
        names = [f"layers.{i}.{kind}" for kind in ("weight", "bias") for i in range(depth)]
        like = params[names[0]]
        self.adam = FlatAdam(torch.cat([params[name].reshape(-1) for name in names]), learning_rate)
        self.params = self._views(self.adam.flat, {name: params[name] for name in names})
        self.gradients = self._views(self.adam.gradient, self.params)
        # Per layer, with the axes S and V as one: weights [K, out, in], biases [K, out, 1], and their gradients.
        self.weights = [self.params[f"layers.{i}.weight"].flatten(0, 1) for i in range(depth)]
        self.biases = [self.params[f"layers.{i}.bias"].flatten(0, 1).unsqueeze(-1) for i in range(depth)]
        self.weight_gradients = [self.gradients[f"layers.{i}.weight"].flatten(0, 1) for i in range(depth)]
        self.bias_gradients = [self.gradients[f"layers.{i}.bias"].flatten(0, 1) for i in range(depth)]
        self.first = self.weights[0].view(self.shape[0], -1, like.shape[-1])  # [S, V·out, D]
        self.first_gradient = self.weight_gradients[0].view_as(self.first)
        self._rooms: dict[int, dict[str, list[Tensor]]] = {}
        self._rates: Rates = {}

    @staticmethod
    def _views(flat: Tensor, like: Params) -> Params:
        parts = flat.split([value.numel() for value in like.values()])
        return {name: part.view_as(value) for (name, value), part in zip(like.items(), parts, strict=True)}

    def _buffers(self, batch: int) -> dict[str, list[Tensor]]:
        """Room for the activations of a batch of that size: asking the system for it anew costs more than the sums."""
        if batch not in self._rooms:
            shapes = [(len(weight), weight.shape[1], batch) for weight in self.weights]
            self._rooms[batch] = {kind: [self.weights[0].new_empty(s) for s in shapes] for kind in ("out", "gradient")}
        return self._rooms[batch]

    @torch.no_grad()
    def step(
        self, features: Tensor, targets: Tensor, rates: Rates, domains: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        self._obey(rates)
        return self._step(features, targets)

    def _step(self, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """A step at the rates of the last one."""
        batch = features.shape[1]
        rooms = self._buffers(batch)
        out, gradients = rooms["out"], rooms["gradient"]  # per layer [K, units, B]
        spread = targets.unsqueeze(1).expand(*self.shape, batch).reshape(-1, 1, batch)  # [K, 1, B]
        self._first(features, out[0])
        loss, right = self._loss_and_gradients(out, gradients, spread)
        torch.bmm(gradients[0].view(self.shape[0], -1, batch), features, out=self.first_gradient)
        self.adam.step()
        return loss.view(self.shape), right.view(self.shape)

    def _obey(self, rates: Rates) -> None:
        """Step at these rates from now on."""
        if rates is not self._rates:  # a new epoch
            self._rates = rates
            self.adam.scale({name: (self.params[name], rate) for name, rate in rates.items()})

    def _first(self, features: Tensor, out: Tensor) -> None:
        """Fill `out` ``[K, units, B]`` with the first layer's products, no bias: of ``[S, B, D]`` or ``[B, D]``."""
        if features.ndim == 3:  # all variants of a seed in one product
            torch.bmm(self.first, features.transpose(1, 2), out=out.view(self.shape[0], -1, features.shape[1]))
        else:
            torch.mm(self.first.flatten(0, 1), features.T, out=out.view(-1, len(features)))

    def _loss_and_gradients(self, out: list[Tensor], gradients: list[Tensor], spread: Tensor) -> tuple[Tensor, Tensor]:
        """From the first layer's products on: forward, loss ``[K]``, right answers ``[K]``, and back.

        Fills the gradients of all parameters but the first weights, and `gradients[0]`, that of the first products.
        """
        last, batch = len(self.weights) - 1, spread.shape[-1]
        self._rest(out)
        right = (out[last].gather(1, spread) == out[last].amax(1, keepdim=True)).sum(-1)  # argmax takes far longer
        log_p = torch.log_softmax(out[last], 1, out=gradients[last])
        loss = -log_p.gather(1, spread).mean(-1)
        log_p.exp_().scatter_add_(1, spread, log_p.new_full((), -1.0).expand_as(spread)).div_(batch)
        for i in range(last, 0, -1):
            torch.bmm(gradients[i], out[i - 1].transpose(1, 2), out=self.weight_gradients[i])
            torch.sum(gradients[i], 2, out=self.bias_gradients[i])
            below = torch.bmm(self.weights[i].transpose(1, 2), gradients[i], out=gradients[i - 1])
            torch.ops.aten.threshold_backward.grad_input(below, out[i - 1], 0, grad_input=below)  # of ReLU
        torch.sum(gradients[0], 2, out=self.bias_gradients[0])
        return loss, right

    def _rest(self, out: list[Tensor]) -> None:
        """From the first layer's products to the logits, in place: `out` per layer ``[K, units, B]``."""
        out[0].add_(self.biases[0]).relu_()
        for i in range(1, len(self.weights)):
            torch.baddbmm(self.biases[i], self.weights[i], out[i - 1], out=out[i])
            if i < len(self.weights) - 1:
                out[i].relu_()

    def _logits(self, features: Tensor) -> Tensor:
        """Rows ``[N, D]`` -> ``[K, classes, N]``; overwritten by the next call with as many rows."""
        out = self._buffers(len(features))["out"]
        self._first(features, out[0])
        self._rest(out)
        return out[-1]

    @torch.no_grad()
    def classify(self, features: Tensor) -> Tensor:
        return self._logits(features).argmax(1).view(*self.shape, -1)

    @torch.no_grad()
    def right(self, features: Tensor, targets: Tensor) -> Tensor:
        logits = self._logits(features)
        picked = logits.gather(1, targets.expand(len(logits), 1, -1))
        return (picked == logits.amax(1, keepdim=True)).view(*self.shape, -1)


class FlatAdam:
    """`torch.optim.Adam` with its defaults, on one flat buffer, with a learning rate per weight.

    It calls the very kernel that `torch.optim.Adam(fused=True)` calls: the optimizer around it takes ten times as
    long as the kernel for a small stack, and a second to be imported.

    Args:
        flat: the parameters; changed in place.
        learning_rate: that of rate 1.
    """

    def __init__(self, flat: Tensor, learning_rate: float):
        self.flat, self.gradient = flat, torch.zeros_like(flat)
        self.moments = torch.zeros_like(flat), torch.zeros_like(flat)
        self.count = torch.zeros((), device=flat.device)
        self.options = {"lr": learning_rate, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.0, "eps": 1e-8}
        self.options |= {"amsgrad": False, "maximize": False}
        self.scaled: Tensor | None = None
        self.stretch: tuple[int, int] | None = None  # of `flat` that `scaled` is

    def scale(self, rates: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """From now on a part of each update only. For the same parameters as last time, in the same memory.

        Args:
            rates: name -> (a view of `flat`, factor on its update, broadcastable to it); the rest steps in full.
        """
        if not rates:
            self.scaled = self.stretch = None
            return
        starts = {name: view.storage_offset() for name, (view, _) in rates.items()}
        first = min(starts.values())
        end = max(starts[name] + view.numel() for name, (view, _) in rates.items())
        if (first, end) != self.stretch:
            self.stretch, self.scaled = (first, end), self.flat[first:end]  # of all parameters named
            self.rate, self.before, self.part = (torch.empty_like(self.scaled) for _ in range(3))
            self.full, self.none = (torch.empty_like(self.scaled, dtype=torch.bool) for _ in range(2))
        self.rate.fill_(1)
        for name, (view, rate) in rates.items():
            at = starts[name] - first
            self.rate[at : at + view.numel()].view(view.shape).copy_(rate)
        torch.eq(self.rate, 1, out=self.full)
        torch.eq(self.rate, 0, out=self.none)

    def step(self) -> None:
        """One step along `gradient`."""
        if self.scaled is not None:
            self.before.copy_(self.scaled)
        self.count += 1
        mean, square = self.moments
        torch._fused_adam_([self.flat], [self.gradient], [mean], [square], [], [self.count], **self.options)
        if self.scaled is not None:
            part = torch.sub(self.scaled, self.before, out=self.part).mul_(self.rate).add_(self.before)
            torch.where(self.none, self.before, part, out=part)  # as `scaled_update`, without asking anew each step
            torch.where(self.full, self.scaled, part, out=self.scaled)


def pieces(engine: Engine, rows: int) -> int:
    """How many rows at a time keep the largest activation below `PIECE_FLOATS`; at least one, at most `rows`."""
    seeds, variants = next(iter(engine.params.values())).shape[:2]
    widest = max(value.shape[2] for value in engine.params.values() if value.ndim > 2)
    return min(rows, max(1, PIECE_FLOATS // (seeds * variants * widest)))
