"""The hidden layers of a stack as compiled code, for large studies.

Batched products of 10×10 matrices run at a tenth of what a core can do. Written as sums over the ten units and given to
`torch.compile`, forward pass, loss and gradients of the hidden layers take less than half the time. Compiling takes
half a minute the first time (the compiler keeps the result), so a small study does without.
"""

import logging
from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from models import FeedforwardClassifier
from stacks import MatmulEngine, Params

log = logging.getLogger(__name__)

BLOCK = 192  # networks at a time: their activations stay in the cache
WORTH = 20_000_000  # steps × networks from which on compiling pays


def product(weight: Tensor, x: Tensor) -> Tensor:
    """``[K, o, i]`` times ``[K, i, B]``, as a sum over the i inputs that a compiler can unroll."""
    return sum(weight[:, :, i : i + 1] * x[:, i : i + 1, :] for i in range(weight.shape[2]))


def forward(first: Tensor, weights: list[Tensor], biases: list[Tensor]) -> list[Tensor]:
    """Activations of all layers, the last without ReLU: ``[K, units, B]`` each.

    Args:
        first: products of the first layer without bias, ``[K, units, B]``.
        weights: of the other layers, ``[K, out, in]``.
        biases: of all layers, ``[K, out, 1]``.
    """
    out = [(first + biases[0]).relu()]
    for weight, bias in zip(weights, biases[1:], strict=True):
        out.append((product(weight, out[-1]) + bias).relu())
    out[-1] = product(weights[-1], out[-2]) + biases[-1]
    return out


def loss_and_gradients(
    first: Tensor,
    targets: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    first_gradient: Tensor,
    weight_gradients: list[Tensor],
    bias_gradients: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """`MatmulEngine._loss_and_gradients` for a block of networks; the last three arguments are filled.

    Args:
        first: products of the first layer, ``[K, units, B]``.
        targets: ``[K, 1, B]``.
        weights: of the other layers, ``[K, out, in]``.
        biases: of all layers, ``[K, out, 1]``.
        first_gradient: of `first`.
        weight_gradients: of `weights`.
        bias_gradients: of all biases, ``[K, out]``.
    """
    out = forward(first, weights, biases)
    logits, classes, batch = out[-1], out[-1].shape[1], out[-1].shape[2]
    top = logits.amax(1, keepdim=True)
    powers = (logits - top).exp()
    total = powers.sum(1, keepdim=True)
    hit = torch.arange(classes, device=logits.device).view(1, -1, 1) == targets
    picked = torch.where(hit, logits, 0.0).sum(1, keepdim=True)
    loss = (total.log() + top - picked).sum((1, 2)) / batch
    right = (picked == top).sum((1, 2))
    gradient = (powers / total - hit.to(logits.dtype)) / batch
    for i in range(len(weights) - 1, -1, -1):
        weight_gradients[i].copy_((gradient.unsqueeze(2) * out[i].unsqueeze(1)).sum(-1))
        bias_gradients[i + 1].copy_(gradient.sum(-1))
        gradient = torch.where(out[i] > 0, product(weights[i].transpose(1, 2), gradient), 0.0)
    bias_gradients[0].copy_(gradient.sum(-1))
    first_gradient.copy_(gradient)
    return loss, right


@cache
def compiled(function):
    """`function` compiled for one thread."""
    return torch.compile(function, dynamic=False, options={"cpp.threads": 1})


def block_of(tensors: Sequence[Tensor], block: slice) -> list[Tensor]:
    """A block of networks of each tensor ``[K, …]``; the compiler is told that another may have another number."""
    views = [tensor[block] for tensor in tensors]
    for view in views:
        torch._dynamo.mark_dynamic(view, 0)
    return views


class CompiledEngine(MatmulEngine):
    """`MatmulEngine` with compiled hidden layers; batches of another than the usual length take its path.

    Args:
        template, params, learning_rate: as in `MatmulEngine`; two networks or more.
        batch_size: the usual length of a batch, for which code is compiled.
    """

    def __init__(self, template: FeedforwardClassifier, params: Params, learning_rate: float, batch_size: int = 32):
        super().__init__(template, params, learning_rate)
        count = len(self.weights[0])
        steps = torch.linspace(0, count, -(-count // BLOCK) + 1).round().long().tolist()
        blocks = [slice(*pair) for pair in pairwise(steps)]  # of nearly the same length
        self.targets = self.weights[0].new_empty(count, 1, batch_size, dtype=torch.long)
        rooms = self._buffers(batch_size)
        layers = [(block_of(self.weights[1:], b), block_of(self.biases, b)) for b in blocks]
        into = [(block_of(self.weight_gradients[1:], b), block_of(self.bias_gradients, b)) for b in blocks]
        ends = [block_of([rooms["out"][0], self.targets, rooms["gradient"][0]], b) for b in blocks]
        # The arguments of every call are the same views: made once.
        self.arguments = [(x, t, *of, g, *to) for (x, t, g), of, to in zip(ends, layers, into, strict=True)]

    def _loss_and_gradients(self, out: list[Tensor], gradients: list[Tensor], spread: Tensor) -> tuple[Tensor, Tensor]:
        if spread.shape != self.targets.shape:
            return super()._loss_and_gradients(out, gradients, spread)
        self.targets.copy_(spread)
        losses, right = zip(*(compiled(loss_and_gradients)(*arguments) for arguments in self.arguments), strict=True)
        return torch.cat(losses), torch.cat(right)


def usable(batch_size: int, sizes: tuple[int, int, Sequence[int]]) -> bool:
    """Whether compiling works here; compiles, in the calling thread, what later threads use.

    Args:
        batch_size: the usual length of a batch.
        sizes: (in_features, num_classes, hidden_sizes).
    """
    template = FeedforwardClassifier.outline(*sizes)
    params = {name: torch.zeros(16, 1, *value.shape) for name, value in template.named_parameters()}
    engine = CompiledEngine(template, params, 1e-3, batch_size)
    try:
        engine.step(torch.zeros(16, batch_size, sizes[0]), torch.zeros(16, batch_size).long(), {})
    except Exception as error:  # whatever a compiler that is missing or fails makes the library raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        log.info("Compiled training is not available here (%s): the usual path is taken.", reason)
        return False
    return True
