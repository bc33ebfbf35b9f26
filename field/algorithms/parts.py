"""What methods are built of: linear layers, parameters as one vector, Adam. Pure functions of one network."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from engine import Params

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


def variance(values: Tensor, dim: int = 0, correction: int = 0) -> Tensor:
    """Variance along a short axis, divided by its length minus `correction`; exactly 0 where all values are equal.

    `torch.var` takes ten times as long for a few values each, as those of the domains.
    """
    shifted = values - values.narrow(dim, 0, 1)
    centred = shifted - shifted.mean(dim, keepdim=True)
    return centred.square().sum(dim) / (values.shape[dim] - correction)


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
        learning_rate: a number, or a scalar tensor, as the others.
        weight_decay: L2, added to the gradient.
        betas: decay of the two moments.
    """
    old, g = flatten(params), flatten({name: gradient[name] for name in params})
    if not is_zero(weight_decay):
        g = g + weight_decay * old
    count = state["count"] + 1
    mean = betas[0] * state["mean"] + (1 - betas[0]) * g
    square = betas[1] * state["square"] + (1 - betas[1]) * g * g
    denominator = (square / (1 - betas[1] ** count)).sqrt() + 1e-8
    new = old - learning_rate * (mean / (1 - betas[0] ** count)) / denominator
    return unflatten(new, params), {"mean": mean, "square": square, "count": count}
