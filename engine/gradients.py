"""Gradients of the tracked weights: of a domain's mean loss, of single images, and along the steps of training."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from engine.data import SplitFeatures
from engine.loop import Engine
from engine.stack import Params, Rates
from engine.tail import stacked_head

ROWS = 256  # images at a time, for the gradient of their mean loss
IMAGE_FLOATS = 2**24  # largest array of the gradients of single images
Loss = Callable[[Params, Tensor, Tensor], Tensor]  # of tracked weights on inputs and labels, summed over images


def loss_gradients(
    data: SplitFeatures, hidden_sizes: Sequence[int], params: Params, rows: Tensor, squared: bool = False
) -> list[Tensor]:
    """Gradient of the mean cross-entropy on some images for the tracked weights of each network: L × ``[S, out, in]``.

    Args:
        params: of S networks, name -> ``[S, *shape]``.
        rows: of each network's images, int64 ``[S, n]``.
        squared: instead, the mean over images of the squared gradient of each image's own loss, the diagonal of the
            empirical Fisher information (Kunstner et al., NeurIPS 2019). The square of the mean gradient, or of a
            batch's, is something else.

    Returns:
        Of the type and on the device of the parameters.
    """
    network, like = data.network(hidden_sizes), next(iter(params.values()))
    found = []
    for s, own in enumerate(rows):
        single = {name: value[s].to(data.like) for name, value in params.items()}
        tracked = {name: single[name] for name in network.tracked_names}
        totals = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in tracked.items()}
        size = max(1, IMAGE_FLOATS // sum(value.numel() for value in tracked.values())) if squared else ROWS
        for gradient in _pieces(data, _loss(data, network, single), tracked, own.split(min(size, ROWS)), squared):
            for name, value in gradient.items():
                totals[name] += value
        found.append([(total / len(own)).to(like) for total in totals.values()])
    return [torch.stack(layers) for layers in zip(*found, strict=True)]


def _loss(data: SplitFeatures, network: torch.nn.Module, params: Params) -> Loss:
    """The summed cross-entropy of one network as a function of its tracked weights; the other parameters are given."""

    def loss(tracked: Params, inputs: Tensor, labels: Tensor) -> Tensor:
        own, inputs = {**params, **tracked}, inputs.to(data.dtype)
        if data.tail is not None and data.shortcut is not None:
            stack = {name: value[None, None] for name, value in own.items()}
            logits = stacked_head(stack, data.shortcut.representation(stack, inputs[None]))[0, 0]
        else:
            logits = functional_call(network, own, (inputs,))
        return F.cross_entropy(logits, labels, reduction="sum")

    return loss


def _pieces(
    data: SplitFeatures, loss: Loss, tracked: Params, pieces: Sequence[Tensor], squared: bool
) -> Iterator[Params]:
    """Sums over the images of each piece of rows: of their gradients, or of the squares of those of single images."""
    each = vmap(grad(loss), in_dims=(None, 0, 0))
    for rows in pieces:
        inputs, labels = data.inputs[rows], data.labels[rows]
        if squared:
            single = each(tracked, inputs[:, None], labels[:, None])
            yield {name: value.square_().sum(0) for name, value in single.items()}
        else:
            yield grad(loss)(tracked, inputs, labels)


class PathRecorder:
    """An engine that adds up −g·Δw over its steps: the part that each weight has in the fall of the loss.

    The path integral of Synaptic Intelligence (Zenke et al., ICML 2017, eq. 3), g being the gradient of the batch.

    Args:
        names: of the parameters whose path is recorded.

    Attributes:
        path: name -> ``[*stack, *shape]``.
    """

    def __init__(self, engine: Engine, names: Sequence[str]):
        self.engine, self.shape = engine, engine.shape
        self.path = {name: torch.zeros_like(engine.params[name]) for name in names}

    @property
    def params(self) -> Params:
        """Those of the engine."""
        return self.engine.params

    def step(self, features: Tensor, targets: Tensor, rates: Rates, domains: Tensor) -> tuple[Tensor, Tensor]:
        """A step of the engine, see `engine.Engine`."""
        before = {name: self.params[name].clone() for name in self.path}
        found = self.engine.step(features, targets, rates, domains)
        for name, value in before.items():
            self.path[name] -= self.engine.gradients[name] * (self.params[name] - value)
        return found

    def right(self, features: Tensor, targets: Tensor) -> Tensor:
        """As the engine answers."""
        return self.engine.right(features, targets)
