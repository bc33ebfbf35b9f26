"""A stack of small classifiers computed at once, by batched matrix products with written-out gradients.

Every parameter of a stack has leading axes: ``[S, …]`` for S seeds, or ``[S, V, …]`` where V arms of a seed see the
same batches. Shapes below write ``[*stack]`` for them and K for the number of networks. Activations are stored as
``[K, units, batch]``, the first layer of all arms of a seed is one matrix product, and all parameters are views of one
flat tensor, so that a step of Adam is one kernel. The result equals that of the plain loop
`trainer_phase1.train_network` (tests/engine/test_loop.py).
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim.adam import adam

from importance import step_with_rates

Params = dict[str, Tensor]  # parameter name -> [*stack, *shape]
Rates = Mapping[str, Tensor]  # parameter name -> factor on its update, broadcastable to [*stack, *shape]


class FlatAdam:
    """Adam (Kingma & Ba 2015) on one tensor, by the function behind `torch.optim.Adam(fused=True)`: the same bits.

    The class of `torch.optim` imports PyTorch's compiler, which takes two seconds in every process that trains.
    What is trained is `flat`; its `grad` must be set.
    """

    def __init__(self, flat: Tensor, learning_rate: float):
        self.flat, self.learning_rate = flat, learning_rate
        self.mean, self.square = torch.zeros_like(flat), torch.zeros_like(flat)
        self.steps = torch.zeros((), device=flat.device)

    @torch.no_grad()
    def step(self) -> None:
        """One step with the gradient that is in place."""
        lists = [self.flat], [self.flat.grad], [self.mean], [self.square], [], [self.steps]
        options = {"beta1": 0.9, "beta2": 0.999, "lr": self.learning_rate, "weight_decay": 0.0, "eps": 1e-8}
        adam(*lists, fused=True, amsgrad=False, maximize=False, **options)


class MatmulEngine:
    """Networks of the shape of `models.FeedforwardClassifier`, trained by Adam on cross-entropy.

    Args:
        start: initial parameters in the module's order (``layers.0.weight``, ``layers.0.bias``, …), name ->
            ``[*stack, *shape]``, on the device and of the type to train in. They are copied.
        learning_rate: of Adam, for every weight whose rate is 1.

    Attributes:
        params, shape, gradients: see `engine.Engine`; parameters are in the order of `start`.
    """

    def __init__(self, start: Params, learning_rate: float = 1e-3):
        depth = len(start) // 2
        weights, biases = ([f"layers.{i}.{kind}" for i in range(depth)] for kind in ("weight", "bias"))
        first = start[weights[0]]
        self.shape = first.shape[:-2]
        # All weights first: those that have rates then lie side by side.
        self.flat = torch.cat([start[name].reshape(-1) for name in (*weights, *biases)])
        self.flat.grad = torch.zeros_like(self.flat)
        self.optimizer = FlatAdam(self.flat, learning_rate)
        views = self._views(self.flat, start, (*weights, *biases))
        gradients = self.gradients = self._views(self.flat.grad, start, (*weights, *biases))
        self.params = {name: views[name] for name in start}
        # Per layer, with the leading axes as one: weights [K, out, in], biases [K, out, 1], and their gradients.
        axes = len(self.shape) - 1
        self.weights = [views[name].flatten(0, axes) for name in weights]
        self.biases = [views[name].flatten(0, axes).unsqueeze(-1) for name in biases]
        self.weight_gradients = [gradients[name].flatten(0, axes) for name in weights]
        self.bias_gradients = [gradients[name].flatten(0, axes) for name in biases]
        self.first = self.weights[0].view(self.shape[0], -1, first.shape[-1])  # [S, V·out, D]
        self.first_gradient = self.weight_gradients[0].view_as(self.first)
        self._activations: dict[int, dict[str, list[Tensor]]] = {}
        self._rates: Rates = {}
        self._scaled: dict[Tensor, Tensor] = {}

    @staticmethod
    def _views(flat: Tensor, like: Params, names: tuple[str, ...]) -> Params:
        parts = flat.split([like[name].numel() for name in names])
        return {name: part.view(like[name].shape) for name, part in zip(names, parts, strict=True)}

    @torch.no_grad()
    def step(self, features: Tensor, targets: Tensor, rates: Rates, domains: Tensor) -> tuple[Tensor, Tensor]:
        """One step of every network on the mean cross-entropy of its seed's batch, see `engine.Engine`.

        Parameters that are not in `rates` step in full; `domains` are not used.
        """
        self._set_rates(rates)
        batch = features.shape[1]
        out, gradients = (self._buffers(batch)[kind] for kind in ("out", "gradient"))  # per layer [K, units, B]
        own = targets.view(self.shape[0], *(1 for _ in self.shape[1:]), batch)
        spread = own.expand(*self.shape, batch).reshape(-1, 1, batch)  # [K, 1, B]
        self._first_layer(features, out[0])
        loss, right = self._loss_and_gradients(out, gradients, spread)
        torch.bmm(gradients[0].view(self.shape[0], -1, batch), features, out=self.first_gradient)
        step_with_rates(self.optimizer, self._scaled)
        return loss.view(self.shape), right.view(self.shape)

    def _set_rates(self, rates: Rates) -> None:
        """Scale updates by these rates from now on, in the one stretch of `flat` that holds all parameters named."""
        if rates is self._rates:  # the same epoch
            return
        self._rates, self._scaled = rates, {}
        if rates:
            views = [self.params[name] for name in rates]
            first = min(view.storage_offset() for view in views)
            end = max(view.storage_offset() + view.numel() for view in views)
            factors = torch.ones_like(self.flat)
            for view, rate in zip(views, rates.values(), strict=True):
                at = view.storage_offset()
                factors[at : at + view.numel()].view(view.shape).copy_(rate)
            self._scaled = {self.flat[first:end]: factors[first:end]}

    def _buffers(self, batch: int) -> dict[str, list[Tensor]]:
        """Reusable activation buffers for a batch size; allocating them in every step costs more than the products."""
        if batch not in self._activations:
            shapes = [(len(weight), weight.shape[1], batch) for weight in self.weights]
            self._activations[batch] = {
                kind: [self.flat.new_empty(shape) for shape in shapes] for kind in ("out", "gradient")
            }
        return self._activations[batch]

    def _first_layer(self, features: Tensor, out: Tensor) -> None:
        """Fill `out` ``[K, units, B]`` with the first layer's products, no bias: of ``[S, B, D]`` or ``[B, D]``."""
        if features.ndim == 3:  # all arms of a seed in one product
            torch.bmm(self.first, features.transpose(1, 2), out=out.view(self.shape[0], -1, features.shape[1]))
        else:
            torch.mm(self.first.flatten(0, 1), features.T, out=out.view(-1, len(features)))

    def _hidden_layers(self, out: list[Tensor]) -> None:
        """From the first layer's products to the logits, in place: `out` per layer ``[K, units, B]``."""
        out[0].add_(self.biases[0])
        for i in range(1, len(self.weights)):
            torch.baddbmm(self.biases[i], self.weights[i], out[i - 1].relu_(), out=out[i])

    def _loss_and_gradients(self, out: list[Tensor], gradients: list[Tensor], spread: Tensor) -> tuple[Tensor, Tensor]:
        """From the products of the first layer: forward, loss ``[K]``, right answers ``[K]``, and backward.

        Fills the gradients of all parameters but the first weights, and `gradients[0]`, that of the first products.
        The activations in `out` are overwritten.
        """
        last, batch = len(self.weights) - 1, spread.shape[-1]
        self._hidden_layers(out)
        right = (out[last].gather(1, spread) == out[last].amax(1, keepdim=True)).sum(-1)  # argmax takes far longer
        log_p = torch.log_softmax(out[last], 1, out=gradients[last])
        loss = log_p.gather(1, spread).sum(-1) / -batch
        log_p.exp_().scatter_add_(1, spread, log_p.new_full((), -1.0).expand_as(spread)).div_(batch)
        for i in range(last, 0, -1):
            torch.bmm(gradients[i], out[i - 1].transpose(1, 2), out=self.weight_gradients[i])
            torch.sum(gradients[i], 2, out=self.bias_gradients[i])
            below = torch.bmm(self.weights[i].transpose(1, 2), gradients[i], out=gradients[i - 1])
            below.mul_(out[i - 1].sign_())  # ReLU's derivative is 1 above 0; comparing and filling takes far longer
        torch.sum(gradients[0], 2, out=self.bias_gradients[0])
        return loss, right

    def _logits(self, features: Tensor) -> Tensor:
        """Rows ``[N, D]`` -> ``[K, classes, N]``; the next call with the same number of rows overwrites it."""
        out = self._buffers(len(features))["out"]
        self._first_layer(features, out[0])
        self._hidden_layers(out)
        return out[-1]

    @torch.no_grad()
    def classify(self, features: Tensor) -> Tensor:
        """Most probable class of the rows ``[N, D]`` for every network: int64 ``[*stack, N]``."""
        return self._logits(features).argmax(1).view(*self.shape, -1)

    @torch.no_grad()
    def right(self, features: Tensor, targets: Tensor) -> Tensor:
        """Whether each network classifies the rows ``[N, D]`` as their targets ``[N]``: bool ``[*stack, N]``."""
        logits = self._logits(features)
        picked = logits.gather(1, targets.expand(len(logits), 1, -1))
        return (picked == logits.amax(1, keepdim=True)).view(*self.shape, -1)
