"""The last ``[CLS]`` of a block, for a stack of networks, without keys and values of all tokens.

For a single block the tokens below it are constants and only ``[CLS]`` is read above it. Then attention needs no keys
and values of all tokens: with X̂ the normalized tokens before the norm's affine part γ, β, the scores of a head are
``X̂ u / √d`` with ``u = γ ⊙ (W_kᵀ q)``, and its output is ``W_v (γ ⊙ m + β) + b_v`` with ``m = X̂ᵀ softmax(scores)``
(β and the key's bias add the same to every score, which the softmax cancels). X̂ itself is never made: it is ``a X + c``
with two numbers a, c of each token, which are put into scores and weights. This is exact, needs no gradient to the
tokens, and reads X once for all arms of a seed.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from logging import getLogger
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.roles import ACTIVATIONS, OPTIONAL, ROLES, heads_of, roles_of
from engine.stack import Params
from models import BackboneTail

log = getLogger(__name__)

NOTHING: Mapping[str, Tensor] = MappingProxyType({})
CHECKED_IMAGES = 4  # on which the shortcut must agree with the module
TOLERANCE = 1e-9  # of the shortcut's features, relative to the largest, in float64
ROUNDING = 1e-3  # of normalized tokens, in the float32 that is trained in


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
        modules, there, heads = dict(tail.blocks[0].named_modules()), roles_of(tail.blocks[0]), heads_of(tail.blocks[0])
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
