"""The method: from importance to a mask to a learning rate per weight. Pure functions on tensors.

In the order of use: `weight_importance` of each domain, `aggregate` over domains, `normalize`, `top_k_mask`; then, in
Phase 2, `unimportant_rate` of the epoch, `weight_rates`, and `step_with_rates`, which scales each weight's update.
All work on one network or on a stack of networks. `score_weights` takes the place of the first two for any criterion
of `CRITERIA`.

*Layers* are the tracked weight matrices of a network: a sequence of L tensors, each ``[out, in]`` for a single
network or ``[*stack, out, in]`` for a stack (``[S, out, in]`` for S seeds, for instance). Shapes may differ from
layer to layer, the leading axes may not. Every function treats all matrices of a network *together*, as n numbers.

The criterion of the project is the distance moved, ``|w_final − w_start|`` (its own; "movement pruning", Sanh et al.
2020, scores weights by Σ −g·w instead). An importance that is all equal or not finite does not rank the weights: for a
single network it raises `DegenerateImportanceError`; in a stack the result of that network is NaN (numbers) or all
False (masks), and `degenerate` marks such networks.

This module needs torch alone.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Layers = Sequence[Tensor]
Evidence = Mapping[str, Tensor]  # name -> [domains, *stack, n], see `Criterion`
PATH_DAMPING = 0.1  # ξ of Synaptic Intelligence (Zenke et al., ICML 2017, eq. 5)
SCOPES = ("global", "layer", "row")  # where a mask's weights compete, see `top_k_mask`


class DegenerateImportanceError(ValueError):
    """The importance of a single network is all equal or not finite."""


def weight_importance(initial: Layers, final: Layers) -> list[Tensor]:
    """How far each weight moved: ``|final − initial|``, shapes as given.

    Raises:
        ValueError: the two have different numbers of layers or different shapes.
    """
    if [w.shape for w in initial] != [w.shape for w in final]:
        raise ValueError("Initial and final weights must have the same layers and shapes.")
    return [(after - before).abs() for before, after in zip(initial, final, strict=True)]


def flatten(layers: Layers) -> Tensor:
    """Layers ``L × [*stack, out, in]`` -> ``[*stack, n]``, first layer first, row by row."""
    return torch.cat([layer.flatten(-2) for layer in layers], dim=-1)


def unflatten(flat: Tensor, like: Layers) -> list[Tensor]:
    """Inverse of `flatten`: ``[*stack, n]`` -> layers with the last two axes of `like`."""
    shapes = [layer.shape[-2:] for layer in like]
    parts = flat.split([shape.numel() for shape in shapes], dim=-1)
    return [part.unflatten(-1, shape) for part, shape in zip(parts, shapes, strict=True)]


def degenerate(layers: Layers) -> Tensor:
    """True where a network's numbers are all equal or not all finite: bool ``[*stack]``."""
    flat = flatten(layers)
    return ~flat.isfinite().all(-1) | (flat.amax(-1) == flat.amin(-1))


def _require_informative(layers: Layers) -> Tensor:
    """`degenerate`, raising where the layers are those of one network."""
    bad = degenerate(layers)
    if bad.ndim == 0 and bad:
        raise DegenerateImportanceError("The importance is all equal or not finite: it does not rank the weights.")
    return bad


def _rank(flat: Tensor) -> Tensor:
    """Fraction of a network's other weights that lie strictly below each weight, ``[*stack, n]`` in [0, 1]."""
    ordered = flat.sort(dim=-1).values.contiguous()
    below = torch.searchsorted(ordered, flat.contiguous())  # equal weights get equal ranks
    return below.to(_wide(flat)) / max(flat.shape[-1] - 1, 1)


def _normalized_sum(domains: Tensor) -> Tensor:
    domains = domains.to(_wide(domains))
    return (domains / domains.sum(-1, keepdim=True)).sum(0)


def _wide(values: Tensor) -> torch.dtype:
    """The type of `values`, float32 at least: float16 cannot hold every total and rank."""
    return torch.promote_types(values.dtype, torch.float32)


# name -> scores [*stack, n] from the importances of all domains [domains, *stack, n]
AGGREGATIONS = {
    "sum": lambda domains: domains.sum(0),
    "mean": lambda domains: domains.mean(0),
    "max": lambda domains: domains.amax(0),
    "min": lambda domains: domains.amin(0),
    "union": lambda domains: _rank(domains).amax(0),
    "intersection": lambda domains: _rank(domains).amin(0),
    "normalized_sum": _normalized_sum,
}


def aggregate(importances: Mapping[str, Layers] | Sequence[Layers], method: str = "sum") -> list[Tensor]:
    """One score per weight from the importances of several domains.

    Args:
        importances: layers per domain, as a mapping (domain -> layers) or a sequence.
        method: "sum" (default), "mean", "max", "min" of the importances; "union" and "intersection": max and min
            over domains of the weight's rank within its domain; "normalized_sum": the sum after each domain's
            importances were divided by their total, so that no domain outweighs another.

    Returns:
        Scores, layers of the same shapes. The mask is always the top k of them (`top_k_mask`).

    Raises:
        ValueError: no domain, an unknown method, or domains of different shapes.
    """
    domains = list(importances.values()) if isinstance(importances, Mapping) else list(importances)
    return unflatten(_known_aggregation(method)(_stacked(domains)), domains[0])


def _stacked(domains: Sequence[Layers]) -> Tensor:
    """Layers of several domains as numbers: ``[domains, *stack, n]``."""
    if not domains:
        raise ValueError("There is no domain to aggregate over.")
    if any([w.shape for w in layers] != [w.shape for w in domains[0]] for layers in domains):
        raise ValueError("All domains must have layers of the same shapes.")
    return torch.stack([flatten(layers) for layers in domains])


def _known_aggregation(method: str) -> Callable[[Tensor], Tensor]:
    if method not in AGGREGATIONS:
        raise ValueError(f"There is no aggregation '{method}'; known are {', '.join(AGGREGATIONS)}.")
    return AGGREGATIONS[method]


class Criterion(NamedTuple):
    """What makes a weight important. Everything it needs is measured per source domain in Phase 1.

    Evidence, by name, per domain and weight:
        start: w₀, where Phase 1 begins. change: w_final − w₀. distance: its absolute value.
        gradient: of the domain's mean loss at w₀. end_gradient: the same at w_final.
        squared_gradient: mean over the domain's images of the *squared* gradient of a single image's loss at w₀. (The
        square of the mean gradient is something else, and much smaller.)
        path: Σ −g·Δw over the steps of Phase 1, g being the gradient of the batch.

    Attributes:
        needs: names of its evidence.
        score: (evidence, share marked in [0, 1]) -> scores ``[*stack, n]`` where it `compares`, else importances of the
            single domains, ``[domains, *stack, n]``.
        meaning: one line.
        compares: it compares the domains itself; False: `aggregate` is what combines them.
    """

    needs: tuple[str, ...]
    score: Callable[[Evidence, float], Tensor]
    meaning: str
    compares: bool = True


def _agreement(domains: Tensor) -> Tensor:
    """``min_d |x_d|`` where all signs agree; where they do not, minus the most that the weaker side goes against it.

    In one formula ``max(min_d x_d, −max_d x_d)``: above 0 exactly where all domains have one (strict) sign, and lower
    the more they are at odds, so that a mask larger than the agreement goes on with the least conflict.
    """
    return torch.maximum(domains.amin(0), -domains.amax(0))


def _consensus(evidence: Evidence, share: float) -> Tensor:
    """Number of domains in whose own top share a weight lies; equal numbers are ordered by the summed distance."""
    distance = evidence["distance"]
    k = mask_size(distance.shape[-1], 100 * share)
    best = distance.argsort(dim=-1, descending=True, stable=True)[..., :k]
    chosen = torch.zeros_like(distance, dtype=_wide(distance)).scatter_(-1, best, 1.0).sum(0)
    return chosen + _rank(distance.sum(0)) / 2


CRITERIA: Mapping[str, Criterion] = {
    "movement": Criterion(
        ("distance",), lambda e, _: e["distance"], "|Δ_d|, the distance moved: the project's own", False
    ),
    "signed": Criterion(("change",), lambda e, _: e["change"].sum(0).abs(), "|Σ_d Δ_d|: opposite moves cancel"),
    "agree": Criterion(("change",), lambda e, _: _agreement(e["change"]), "min_d |Δ_d| where all moves have one sign"),
    "consensus": Criterion(
        ("distance",),
        _consensus,
        "in how many domains' own top share by |Δ_d| it lies (after TALL masks, Wang et al., ICML 2024, which compare "
        "|Δ_d| with a network of all domains)",
    ),
    "magnitude": Criterion(
        ("start",), lambda e, _: e["start"][0].abs(), "|w₀| (after Han et al., NeurIPS 2015, who take trained weights)"
    ),
    "gradient": Criterion(
        ("gradient",),
        lambda e, _: e["gradient"].mean(0).abs(),
        "|mean_d ḡ_d| at w₀, every domain counting the same (SAFT, arXiv 2407.03036)",
    ),
    "joint": Criterion(
        ("gradient",),
        lambda e, _: _agreement(e["gradient"]),
        "min_d |ḡ_d| at w₀ where all gradients have one sign (JPS, arXiv 2508.16976)",
    ),
    "snip": Criterion(
        ("gradient", "start"),
        lambda e, _: (e["gradient"].mean(0) * e["start"][0]).abs(),
        "|ḡ·w₀|, what leaving the weight out would do to the loss at the start (SNIP, Lee et al., ICLR 2019)",
    ),
    "taylor": Criterion(
        ("end_gradient", "start", "change"),
        lambda e, _: (e["end_gradient"] * (e["start"] + e["change"])).abs(),
        "|ḡ_d·w|, the same at the end of Phase 1 (Molchanov et al., CVPR 2019)",
        compares=False,
    ),
    "fisher": Criterion(
        ("squared_gradient",),
        lambda e, _: e["squared_gradient"],
        "mean squared gradient of single images at w₀ (FISH mask, Sung et al., NeurIPS 2021)",
        compares=False,
    ),
    "path": Criterion(
        ("path", "distance"),
        lambda e, _: e["path"].clamp(min=0) / (e["distance"] ** 2 + PATH_DAMPING),
        "Σ −g·Δw along Phase 1 / (Δ² + 0.1), 0 where the sum is negative (after Synaptic Intelligence, Zenke et al., "
        "ICML 2017, eq. 3 to 5)",
        compares=False,
    ),
}


def score_weights(
    criterion: str, evidence: Mapping[str, Mapping[str, Layers]], aggregation: str = "sum", percent: float = 60.0
) -> list[Tensor]:
    """One score per weight by any criterion, for `top_k_mask`.

    Args:
        criterion: a name of `CRITERIA`.
        evidence: source domain -> name -> layers, see `Criterion`.
        aggregation: of a criterion that scores each domain by itself, see `aggregate`; of no effect on the others.
        percent: that is going to be marked.

    Raises:
        ValueError: an unknown criterion or aggregation, no domain, or evidence that is missing or of other shapes.
    """
    if criterion not in CRITERIA:
        raise ValueError(f"There is no criterion '{criterion}'; known are {', '.join(CRITERIA)}.")
    needs, score, _, compares = CRITERIA[criterion]
    for domain, own in evidence.items():
        if missing := [name for name in needs if name not in own]:
            raise ValueError(f"The criterion '{criterion}' needs '{missing[0]}' of the domain '{domain}'.")
    scores = score({name: _stacked([own[name] for own in evidence.values()]) for name in needs}, percent / 100)
    like = next(iter(evidence.values()))[needs[0]]
    return unflatten(scores if compares else _known_aggregation(aggregation)(scores), like)


def normalize(scores: Layers) -> list[Tensor]:
    """Min–max over all layers of a network together: ``(s − min) / (max − min)``, in [0, 1].

    Raises:
        DegenerateImportanceError: one network, all equal or not finite. (In a stack: NaN for that network.)
    """
    bad = _require_informative(scores)
    flat = flatten(scores)
    low, high = flat.amin(-1, keepdim=True), flat.amax(-1, keepdim=True)
    return unflatten(((flat - low) / (high - low)).masked_fill(bad.unsqueeze(-1), torch.nan), scores)


def mask_size(n: int, percent: float) -> int:
    """How many of n weights `percent` per cent are: ``floor(percent·n/100 + 0.5)``.

    Raises:
        ValueError: `percent` is not in 0 … 100.
    """
    if not 0 <= percent <= 100:
        raise ValueError(f"The per cent of weights kept must lie in 0 … 100, not {percent}.")
    return math.floor(percent * n / 100 + 0.5)


def marked_weights(layers: Layers, percent: float, scope: str = "global") -> int:
    """How many weights of one network `top_k_mask` marks; `layers` are L × ``[out, in]``."""
    if scope == "global":
        return mask_size(sum(layer.numel() for layer in layers), percent)
    if scope == "layer":
        return sum(mask_size(layer.numel(), percent) for layer in layers)
    return sum(layer.shape[0] * mask_size(layer.shape[1], percent) for layer in layers)


def top_k_mask(scores: Layers, percent: float = 60.0, scope: str = "global") -> list[Tensor]:
    """Mark exactly the k highest scores among the n weights that compete (``k = mask_size(n, percent)``).

    Equal scores are taken in order of position (earlier layer, row, column first), the same on every machine.

    Args:
        percent: of the weights that are marked.
        scope: which weights compete: "global", all of a network; "layer", those of each matrix; "row", the incoming
            weights of each unit, of which all get the same share (GPS, Zhang et al., CVPR 2024); that of few weights
            at a low per cent is none.

    Returns:
        Bool layers of the same shapes, True = important.

    Raises:
        DegenerateImportanceError: one network, all equal or not finite. (In a stack: all False for that network.)
        ValueError: `percent` is not in 0 … 100, or an unknown scope.
    """
    if scope not in SCOPES:
        raise ValueError(f"There is no scope '{scope}'; known are {', '.join(SCOPES)}.")
    bad = _require_informative(scores)
    if scope == "global":
        marked = unflatten(_top(flatten(scores), percent), scores)
    elif scope == "layer":
        marked = [_top(layer.flatten(-2), percent).view(layer.shape) for layer in scores]
    else:
        marked = [_top(layer, percent) for layer in scores]
    return [layer & ~bad[..., None, None] for layer in marked]


def _top(values: Tensor, percent: float) -> Tensor:
    """The highest so many per cent of the last axis: bool, of the same shape."""
    best = values.argsort(dim=-1, descending=True, stable=True)[..., : mask_size(values.shape[-1], percent)]
    return torch.zeros_like(values, dtype=torch.bool).scatter_(-1, best, True)


def unimportant_rate(epoch: int, start: float, decay: float, freeze_epoch: int) -> float:
    """Rate of the unmarked weights in an epoch (from 0): ``start · decay^epoch``, exactly 0 from `freeze_epoch` on.

    `start` is a learning rate or a factor on one; the result has the same unit.
    """
    return 0.0 if epoch >= freeze_epoch else start * decay**epoch


def weight_rates(mask: Tensor, rate: float | Tensor) -> Tensor:
    """A rate per weight: 1 where `mask` (bool, any shape) is True, `rate` elsewhere.

    `rate` is a number or a floating-point tensor that broadcasts to the mask; the result has its type.
    """
    return torch.where(mask, 1.0, rate)


def scaled_update(old: Tensor, new: Tensor, rate: Tensor) -> Tensor:
    """The fraction `rate` of an optimizer's update: ``old + rate·(new − old)``, `old` itself at 0 and `new` at 1.

    Adam is invariant to the scale of the gradient, so a learning rate per weight has to scale the update itself.
    """
    return torch.where(rate == 0, old, torch.lerp(old, new, rate.to(old.dtype)))


def scale_update_(parameter: Tensor, old: Tensor, rate: Tensor) -> None:
    """`scaled_update` in place: of a parameter that was `old` before the optimizer's step.

    On a CPU choosing takes ten times as long as interpolating, and only an update that is not finite needs it.
    """
    finite = parameter.device.type == "cpu" and bool(parameter.sum().isfinite())
    torch.lerp(old, parameter, rate.to(old.dtype), out=parameter)
    if not finite:
        torch.where(rate == 0, old, parameter, out=parameter)


@torch.no_grad()
def step_with_rates(optimizer: torch.optim.Optimizer, rates: Mapping[Tensor, Tensor]) -> None:
    """``optimizer.step()`` with a learning rate per weight, for any optimizer.

    Args:
        optimizer: has its gradients; its learning rate is that of a weight of rate 1.
        rates: parameter -> factor on its update, of the same shape. A weight of rate 0 keeps its exact value, momentum
            and weight decay notwithstanding; parameters that are not in `rates` step in full.
    """
    before = {parameter: parameter.clone() for parameter in rates}
    optimizer.step()
    for parameter, rate in rates.items():
        scale_update_(parameter, before[parameter], rate)
