"""Stacks of `models.BackboneTail`: the last blocks of a vision transformer, trained for all seeds and arms at once.

For a single block the tokens below it are constants and only ``[CLS]`` is read above it. Then attention needs no keys
and values of all tokens: with X̂ the normalized tokens before the norm's affine part γ, β, the scores of a head are
``X̂ u / √d`` with ``u = γ ⊙ (W_kᵀ q)``, and its output is ``W_v (γ ⊙ m + β) + b_v`` with ``m = X̂ᵀ softmax(scores)``
(β and the key's bias add the same to every score, which the softmax cancels). X̂ itself is never made: it is ``a X + c``
with two numbers a, c of each token, which are put into scores and weights. This is exact, needs no gradient to the
tokens, and reads X once for all arms of a seed. `ClsShortcut` is this; other blocks, and several, take the module
itself, one network after the other.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from logging import getLogger
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.optim.adam import adam

from engine.stack import Params, Rates
from importance import scale_update
from models import HEAD, BackboneTail

log = getLogger(__name__)

ROLES = {  # role in a pre-norm block -> what implementations call the module
    "norm1": ("layernorm_before", "norm1", "layer_norm1"),
    "query": ("attention.q_proj", "self_attn.q_proj", "attention.attention.query"),
    "key": ("attention.k_proj", "self_attn.k_proj", "attention.attention.key"),
    "value": ("attention.v_proj", "self_attn.v_proj", "attention.attention.value"),
    "output": ("attention.o_proj", "self_attn.out_proj", "attention.output.dense"),
    "scale1": ("layer_scale1",),
    "norm2": ("layernorm_after", "norm2", "layer_norm2"),
    "gate": ("mlp.gate_proj",),  # of a SwiGLU
    "in": ("mlp.fc1", "mlp.up_proj", "intermediate.dense"),
    "out": ("mlp.fc2", "mlp.down_proj", "output.dense"),
    "scale2": ("layer_scale2",),
}
OPTIONAL = ("scale1", "gate", "scale2")
MLP = ("norm2", "gate", "in", "out", "scale2")  # the other roles are attention's
ACTIVATIONS = ("mlp.activation_fn", "mlp.act_fn", "intermediate.intermediate_act_fn")
NOTHING: Mapping[str, Tensor] = MappingProxyType({})
CHECKED_IMAGES = 4  # on which the shortcut must agree with the module
TOLERANCE = 1e-9  # of the shortcut's features, relative to the largest, in float64
ROUNDING = 1e-3  # of normalized tokens, in the float32 that is trained in


@dataclass(frozen=True)
class BlockMatrix:
    """A tracked weight matrix of a `BackboneTail`.

    Attributes:
        block: among the trained ones, from 0.
        role: what it does in the block, a key of `ROLES`; where that is not known, the module's own name.
        heads: number of attention heads, which share out the rows of query, key and value, and the columns of output;
            None where it is not known.
    """

    block: int
    role: str
    heads: int | None


def block_matrices(tail: BackboneTail) -> list[BlockMatrix]:
    """What the tracked matrices of a tail are, in its order of them."""
    known = {}
    for number, block in enumerate(tail.blocks):
        modules, heads = _roles(block), _heads(block)
        known |= {f"blocks.{number}.{name}.weight": BlockMatrix(number, r, heads) for r, name in modules.items()}
    parts = {name: name.split(".", 2) for name in tail.tracked_names}  # blocks, number, the module's own name
    return [
        known.get(name) or BlockMatrix(int(number), module.removesuffix(".weight"), None)
        for name, (_, number, module) in parts.items()
    ]


@dataclass(frozen=True)
class Half:
    """Attention or MLP of a block, with the norm before it: what it gives is added to what it was given.

    Attributes:
        names: of its parameters in a `BackboneTail`.
        matrices: those of `names` that are tracked.
        output: those of the linear layer that it ends with: where they are 0 it adds nothing; none where it is not
            known.
    """

    names: tuple[str, ...]
    matrices: tuple[str, ...]
    output: tuple[str, ...]


def tail_halves(tail: BackboneTail) -> list[Half]:
    """Two of each block, first to last; a block that does not say what all its parameters are for is one."""
    found = []
    for number, block in enumerate(tail.blocks):
        parts = _halves(block) or [([name for name, _ in block.named_parameters()], None)]
        for own, output in parts:
            names = tuple(f"blocks.{number}.{name}" for name in own)
            ends = () if output is None else tuple(n for n in names if n.startswith(f"blocks.{number}.{output}."))
            found.append(Half(names, tuple(name for name in names if name in tail.tracked_names), ends))
    return found


def _halves(block: nn.Module) -> list[tuple[list[str], str]] | None:
    """Names of the parameters of attention and of MLP, each with the linear layer that it ends with."""
    roles, parts = _roles(block), {True: [], False: []}
    if not roles.keys() >= ROLES.keys() - {*OPTIONAL}:
        return None
    inside = {mlp: {roles[role].split(".")[0] for role in roles if (role in MLP) == mlp} for mlp in (True, False)}
    if inside[True] & inside[False]:
        return None
    for name, _ in block.named_parameters():
        of = [mlp for mlp in (True, False) if name.split(".")[0] in inside[mlp]]
        if not of:
            return None
        parts[of[0]].append(name)
    return [(parts[False], roles["output"]), (parts[True], roles["out"])]


def _roles(block: nn.Module) -> dict[str, str]:
    """Role -> name of the module that has it in this block."""
    modules = {name for name, _ in block.named_modules()}
    found = {role: next((name for name in names if name in modules), None) for role, names in ROLES.items()}
    return {role: name for role, name in found.items() if name is not None}


def _heads(block: nn.Module) -> int | None:
    """Number of attention heads, as the module that holds the query says."""
    query = _roles(block).get("query")
    if query is None:
        return None
    attention = block.get_submodule(query.rpartition(".")[0])
    return getattr(attention, "num_attention_heads", None) or getattr(attention, "num_heads", None)


@dataclass(frozen=True)
class ClsShortcut:
    """``[CLS]`` after one block and the final norm, for a stack of networks.

    Attributes:
        names: role in the block, and "norm" -> prefix of its parameters in a `BackboneTail`; optional ones may lack.
        heads: number of attention heads.
        eps: of the norms, by role.
        activation: of the MLP, elementwise.
    """

    names: Mapping[str, str]
    heads: int
    eps: Mapping[str, float]
    activation: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, tail: BackboneTail, tokens: Tensor) -> "ClsShortcut | None":
        """The shortcut for a tail, or None if it does not cover it.

        Whether it does is decided by the numbers: in float64 both must give the same features on `tokens`
        ``[B, T, D]``, a few images' own, which must not be so far from 0 that float32 would lose what differs in them.
        """
        if len(tail.blocks) != 1:
            return None
        found = cls._find(tail)
        if found is None or _rounding(tokens.double(), found.eps["norm1"]) > ROUNDING:
            return None
        wide, tokens = BackboneTail(tail.blocks, tail.arguments, tail.norm, nn.Identity()).double(), tokens.double()
        params = {name: value.detach()[None, None] for name, value in wide.named_parameters()}
        with torch.no_grad():
            wanted = wide(tokens)
            try:
                given = found.representation(params, tokens[None])[0, 0]
            except (RuntimeError, KeyError):  # parameters of other shapes or names
                return None
        return found if bool(((given - wanted).abs() <= TOLERANCE * wanted.abs().max()).all()) else None

    @classmethod
    def where_it_fits(cls, tail: BackboneTail, tokens: Tensor) -> "ClsShortcut | None":
        """As `of`, from the first of all images' tokens; the log says it where every network must do without."""
        found = cls.of(tail, tokens[:CHECKED_IMAGES].to(next(tail.parameters()).device))
        if found is None:
            what = "this kind of block" if len(tail.blocks) == 1 else "more than one block"
            log.info("The shortcut does not cover %s: every network computes the whole block, which is slower.", what)
        return found

    @classmethod
    def _find(cls, tail: BackboneTail) -> "ClsShortcut | None":
        modules, there, heads = dict(tail.blocks[0].named_modules()), _roles(tail.blocks[0]), _heads(tail.blocks[0])
        activation = next((modules[name] for name in ACTIVATIONS if name in modules), None)
        if heads is None or activation is None or not there.keys() >= ROLES.keys() - {*OPTIONAL}:
            return None
        names = {role: f"blocks.0.{name}" for role, name in there.items()}
        norms = {"norm1": modules[there["norm1"]], "norm2": modules[there["norm2"]]}
        if not isinstance(tail.norm, nn.Identity):
            names["norm"], norms["norm"] = "norm", tail.norm
        if not all(isinstance(norm, nn.LayerNorm) for norm in norms.values()):
            return None
        eps = {role: norm.eps for role, norm in norms.items()}
        return cls(names, heads, eps, activation)

    def representation(
        self,
        params: Params,
        tokens: Tensor,
        factors: Mapping[str, Tensor] = NOTHING,
        mlp: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """The last ``[CLS]``.

        Args:
            params: of `BackboneTail`, name -> ``[S, V, *shape]``.
            tokens: before the block, ``[S, B, T, D]``; the V networks of a seed share them.
            factors: on the inputs of linear layers, by role (a gate's are those of "in"): ``[S, V, B, width]``, the
                same for all tokens of an image, so that they fold into u and m exactly.
            mlp: takes the place of the block's: rows ``[S, V, B, D]`` in and out.

        Returns:
            ``[S, V, B, D]``.
        """
        cls, of = tokens[:, None, :, 0], _Parameters(params, self.names, factors)
        attended = self._attention(of, tokens)
        cls = cls + of.scaled("scale1", of.linear("output", attended))
        hidden = of.norm("norm2", cls, self.eps)
        cls = cls + of.scaled("scale2", self._mlp(of, hidden) if mlp is None else mlp(hidden))
        return of.norm("norm", cls, self.eps) if "norm" in self.names else cls

    def _mlp(self, of: "_Parameters", rows: Tensor) -> Tensor:
        """``[S, V, B, D]`` -> ``[S, V, B, D]``."""
        if "gate" in self.names:
            hidden = self.activation(of.linear("gate", rows)) * of.linear("in", rows)
        else:
            hidden = self.activation(of.linear("in", rows))
        return of.linear("out", hidden)

    def _attention(self, of: "_Parameters", tokens: Tensor) -> Tensor:
        """Attention of ``[CLS]`` to all tokens: X ``[S, B, T, D]`` -> ``[S, V, B, D]``."""
        seeds, batch, _, width = tokens.shape
        scale, offset = normalization(tokens, self.eps["norm1"])  # a, c: [S, B, T]
        gain, shift = of("norm1", "weight"), of("norm1", "bias")  # γ, β: [S, V, D]
        cls = tokens[:, :, 0] * scale[:, :, :1] + offset[:, :, :1]
        seen = cls[:, None] * gain.unsqueeze(-2) + shift.unsqueeze(-2)
        query = of.linear("query", seen).unflatten(-1, (self.heads, -1)).movedim(-2, 2)  # [S, V, H, B, d]
        key, value = (of(role, "weight").unflatten(-2, (self.heads, -1)) for role in ("key", "value"))  # […, H, d, D]
        reads = (query @ key) * (gain[:, :, None, None] / math.sqrt(query.shape[-1]))  # u: [S, V, H, B, D]
        reads = of.times("key", reads)
        every = reads.movedim(3, 1).reshape(seeds * batch, -1, width)  # all arms and heads of an image in one product
        images, scale, offset = tokens.flatten(0, 1), *(x.flatten(0, 1).unsqueeze(1) for x in (scale, offset))
        scores = TimesConstant.apply(every, images.transpose(1, 2)) * scale + every.sum(-1, keepdim=True) * offset
        weights = scores.softmax(-1)  # [S · B, V · H, T]
        means = TimesConstant.apply(weights * scale, images) + (weights * offset).sum(-1, keepdim=True)
        means = means.view(seeds, batch, *reads.shape[1:3], width).movedim(1, 3)  # m: [S, V, H, B, D]
        means = of.times("value", means * gain[:, :, None, None] + shift[:, :, None, None])
        heads = means @ value.transpose(-1, -2)  # [S, V, H, B, d]
        attended = heads.movedim(2, 3).flatten(-2)
        return attended + of("value", "bias").unsqueeze(-2) if of.has("value", "bias") else attended


def normalization(tokens: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """A layer norm without its affine part as numbers of each token: ``[*, D]`` -> a, c ``[*]``, X̂ = a X + c.

    No tensor of the size of the tokens is made: its memory would take longer than the arithmetic.
    """
    mean = tokens.mean(-1)
    variance = torch.linalg.vector_norm(tokens, dim=-1).square() / tokens.shape[-1] - mean.square()
    scale = (variance.clamp(min=0) + eps).rsqrt()
    return scale, -mean * scale


def _rounding(tokens: Tensor, eps: float) -> float:
    """Largest error of a number of X̂ if `normalization` is computed in float32, for tokens in float64."""
    scale, offset = (value.double().unsqueeze(-1) for value in normalization(tokens.float(), eps))
    return float((tokens * scale + offset - F.layer_norm(tokens, tokens.shape[-1:], eps=eps)).abs().max())


class TimesConstant(torch.autograd.Function):
    """Products ``[B, M, K]`` with ``[B, K, N]`` that are not differentiated to the second: tokens, which are read once.

    Under `vmap`, rows of networks that share the constants become more rows of one product. PyTorch's own rule would
    copy the constants for every network.
    """

    @staticmethod
    def forward(rows: Tensor, constants: Tensor) -> Tensor:
        """``[B, M, N]``."""
        return rows @ constants

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        """The constants are all that the gradient needs."""
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Of the rows, itself differentiable.

        Raises:
            NotImplementedError: a gradient of the constants is wanted.
        """
        if ctx.needs_input_grad[1]:
            raise NotImplementedError("The shortcut gives no gradient of the tokens: use the block itself.")
        (constants,) = ctx.saved_tensors
        return TimesConstant.apply(gradient, constants.transpose(-1, -2)), None

    @staticmethod
    def vmap(info: Any, dims: tuple, rows: Tensor, constants: Tensor) -> tuple[Tensor, int]:
        """The products of several networks as one."""
        if dims[1] is None:
            rows = rows.movedim(dims[0], 1)
            return TimesConstant.apply(rows.flatten(1, 2), constants).unflatten(1, rows.shape[1:3]), 1
        constants = constants.movedim(dims[1], 0)
        rows = rows.expand(len(constants), *rows.shape) if dims[0] is None else rows.movedim(dims[0], 0)
        product = TimesConstant.apply(rows.flatten(0, 1), constants.flatten(0, 1))
        return product.unflatten(0, rows.shape[:2]), 0


class _Parameters:
    """The parameters of a stack by role in the block, and the factors on the inputs of its layers."""

    def __init__(self, params: Params, names: Mapping[str, str], factors: Mapping[str, Tensor]):
        self.params, self.names, self.factors = params, names, factors

    def __call__(self, role: str, kind: str) -> Tensor:
        return self.params[f"{self.names[role]}.{kind}"]

    def has(self, role: str, kind: str) -> bool:
        return role in self.names and f"{self.names[role]}.{kind}" in self.params

    def linear(self, role: str, rows: Tensor) -> Tensor:
        """``[S, V, B, in]`` -> ``[S, V, B, out]``."""
        rows = self.times("in" if role == "gate" else role, rows)
        rows = (self(role, "weight") @ rows.transpose(-1, -2)).transpose(-1, -2)  # its gradient is contiguous
        return rows + self(role, "bias").unsqueeze(-2) if self.has(role, "bias") else rows

    def times(self, role: str, rows: Tensor) -> Tensor:
        """Inputs of a layer ``[S, V, B, in]``, or ``[S, V, H, B, in]``, times its factors if it has some."""
        if role not in self.factors:
            return rows
        return rows * (self.factors[role] if rows.ndim == 4 else self.factors[role].unsqueeze(2))

    def norm(self, role: str, rows: Tensor, eps: Mapping[str, float]) -> Tensor:
        """Layer norm of the last axis of ``[S, V, B, D]``."""
        rows = F.layer_norm(rows, rows.shape[-1:], eps=eps[role])
        return rows * self(role, "weight").unsqueeze(-2) + self(role, "bias").unsqueeze(-2)

    def scaled(self, role: str, rows: Tensor) -> Tensor:
        """LayerScale, where the block has it."""
        return rows * self(role, "lambda1").unsqueeze(-2) if self.has(role, "lambda1") else rows


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
            scale_update(self.params[name], before[name], rate)

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
