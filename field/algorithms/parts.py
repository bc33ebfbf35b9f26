"""What methods are built of: linear layers, parameters as one vector, Adam. Pure functions of one network."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from engine import Params

PIECE_FLOATS = 2**19  # parameters that Adam updates at a time on a CPU: what its second-level cache holds
State = dict[str, Any]  # of one network: name -> tensor, or such a dictionary


def linear(params: Params, name: str, x: Tensor) -> Tensor:
    """The linear layer of that name: ``[*, inputs]`` -> ``[*, outputs]``."""
    return F.linear(x, params[f"{name}.weight"], params[f"{name}.bias"])


def linear_start(shape: tuple[int, ...], inputs: int, draw: torch.Generator) -> Tensor:
    """Initial weights or biases of PyTorch's linear layers: uniform within 1/sqrt(inputs) of 0."""
    return (2 * torch.rand(shape, generator=draw) - 1) / inputs**0.5


def new_linear(name: str, outputs: tuple[int, ...], inputs: int, draw: torch.Generator) -> Params:
    """Initial parameters of a linear layer, or of a stack of them: ``[*outputs, inputs]`` and ``[*outputs]``."""
    weight = linear_start((*outputs, inputs), inputs, draw)
    return {f"{name}.weight": weight, f"{name}.bias": linear_start(outputs, inputs, draw)}


def one_hot(numbers: Tensor, count: int, like: Tensor) -> Tensor:
    """``[*]`` -> ``[*, count]`` of the type of `like`.

    A product with it is how a method takes rows from a table of parameters: the gradient of indexing is summed in no
    fixed order on a GPU.
    """
    return (numbers.unsqueeze(-1) == torch.arange(count, device=numbers.device)).to(like)


def flatten(params: Params) -> Tensor:
    """All numbers of a dictionary of tensors in one vector, in the order of the dictionary."""
    return torch.cat([value.flatten() for value in params.values()])


def unflatten(flat: Tensor, like: Params) -> Params:
    """Inverse of `flatten`."""
    parts = flat.split([value.numel() for value in like.values()])
    return {name: part.view(value.shape) for (name, value), part in zip(like.items(), parts, strict=True)}


def is_zero(value: float | Tensor) -> bool:
    """Whether a hyperparameter is the number 0, so that what it multiplies need not be computed; a tensor never is."""
    return not isinstance(value, Tensor) and value == 0


def scalar(value: float | Tensor, like: Tensor) -> Tensor:
    """A hyperparameter, a number or a scalar tensor, as a tensor of the type and on the device of `like`."""
    return torch.as_tensor(value, dtype=like.dtype, device=like.device)


def adam_state(params: Params) -> State:
    """Moments of Adam before the first step."""
    zeros = torch.zeros_like(flatten(params))
    return {"mean": zeros, "square": zeros.clone(), "count": zeros.new_zeros(())}


def adam(
    params: Params,
    gradient: Params,
    state: State,
    learning_rate: float | Tensor,
    weight_decay: float | Tensor = 0.0,
    betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
) -> tuple[Params, State]:
    """One step of Adam (Kingma & Ba 2015) as a pure function, equal to `torch.optim.Adam`'s: parameters and state.

    Args:
        gradient: by name, for at least the names of `params`.
        state: of `adam_state` or the last step.
        learning_rate: a number, or a scalar tensor, as the others; or a tensor of one rate for each number ``[P]``.
        weight_decay: L2, added to the gradient.
        betas: decay of the two moments.

    Raises:
        NotImplementedError: the step is differentiated.
    """
    old, g = flatten(params), flatten({name: gradient[name] for name in params})
    if not is_zero(weight_decay):
        g = g + weight_decay * old
    count = state["count"] + 1
    factors = (each for beta in betas for each in (beta, 1 - beta, 1 - beta**count))
    given = (value.reshape(-1).to(old) if isinstance(value, Tensor) else value for value in (*factors, learning_rate))
    new, mean, square = _AdamStep.apply(old, g, state["mean"], state["square"], *given)
    return unflatten(new, params), {"mean": mean, "square": square, "count": count}


class _AdamStep(torch.autograd.Function):
    """A step of Adam on vectors, for whole stacks under `vmap`, a few networks at a time in memory that is used again.

    Its numbers are those of the same products under `vmap`, to the last bit; but there each of fifteen results would be
    as large as the parameters of all networks, and on trained blocks new memory takes longer than the arithmetic.
    """

    @staticmethod
    def forward(*args: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors, for each moment its decay, 1 − decay and the correction of its bias, and the learning rate.

        Shapes: vectors ``[*stack, P]``, the others numbers or ``[*stack, 1 or P]``, all broadcastable.
        """
        shape = torch.broadcast_shapes(*(value.shape for value in args if isinstance(value, Tensor)))
        found = [args[0].new_empty(shape) for _ in range(3)]
        rows = math.prod(shape[:-1])
        size = max(1, PIECE_FLOATS // shape[-1]) if args[0].device.type == "cpu" else rows
        spare = args[0].new_empty(min(size, rows), shape[-1])
        every = [_rows(value, shape) for value in (*found, *args)]
        for i in range(0, rows, size):
            part = [value[i : i + size] if isinstance(value, Tensor) else value for value in every]
            _adam_in_place(spare[: len(part[0])], *part)
        return tuple(found)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        """Nothing is kept: see `backward`."""

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        """Refused: no method here needs it."""
        raise NotImplementedError("A step of Adam cannot be differentiated: take the step outside of the loss.")

    @staticmethod
    def vmap(info: Any, dims: tuple, *args: Tensor | float) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """The same with one more axis in front."""
        given, moved = [*zip(args, dims, strict=True)], []
        depth = max(value.ndim - (dim is not None) for value, dim in given if isinstance(value, Tensor))
        for value, dim in given:
            if dim is not None:
                value = value.movedim(dim, 0)
                value = value.reshape(len(value), *(1,) * (depth + 1 - value.ndim), *value.shape[1:])
            moved.append(value)
        return _AdamStep.apply(*moved), (0, 0, 0)


def _rows(value: Tensor | float, shape: torch.Size) -> Tensor | float:
    """``[*stack, P]`` of a broadcast shape -> ``[rows, P]``, or of one number in place of P; numbers stay."""
    if not isinstance(value, Tensor):
        return value
    return value.expand(*shape[:-1], value.shape[-1]).reshape(-1, value.shape[-1])


def _adam_in_place(spare: Tensor, new: Tensor, mean: Tensor, square: Tensor, old: Tensor, g: Tensor, *rest) -> None:
    """Equations of `adam` on rows ``[R, P]``, results in `new`, `mean` and `square`."""
    old_mean, old_square, keep, add, bias, keep_square, add_square, bias_square, rate = rest
    torch.mul(old_mean, keep, out=mean).add_(torch.mul(g, add, out=spare))
    torch.mul(old_square, keep_square, out=square).add_(torch.mul(g, add_square, out=spare).mul_(g))
    torch.div(square, bias_square, out=spare).sqrt_().add_(1e-8)
    torch.div(mean, bias, out=new).mul_(rate).div_(spare)
    torch.sub(old, new, out=new)
