"""Which weights matter: pure functions on tensors, for one network or a stack of networks.

*Layers* are the tracked weight matrices of a network: a sequence of L tensors, each ``[out, in]`` for a single
network or ``[*stack, out, in]`` for a stack (``[S, out, in]`` for S seeds, for instance). Shapes may differ from
layer to layer, the leading axes may not. Every function treats all matrices of a network *together*, as n numbers.

The criterion is movement, ``|w_final − w_start|`` (this project's own; "movement pruning", Sanh et al. 2020, is
another thing: Σ −g·w). An importance that is all equal or not finite says nothing about which weight matters:
for a single network this raises `DegenerateImportanceError`; in a stack that network's result is NaN (numbers) or
all False (masks), and `degenerate` tells which those are.

This module needs torch alone.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Layers = Sequence[Tensor]


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
        raise DegenerateImportanceError("The importance is all equal or not finite: it marks no weight over another.")
    return bad


def _rank(flat: Tensor) -> Tensor:
    """Share of a network's other weights that lie strictly below each weight, ``[*stack, n]`` in [0, 1]."""
    ordered = flat.sort(dim=-1).values.contiguous()
    below = torch.searchsorted(ordered, flat.contiguous())  # equal weights get equal ranks
    return below.to(_wide(flat)) / max(flat.shape[-1] - 1, 1)


def _normalized_sum(domains: Tensor) -> Tensor:
    domains = domains.to(_wide(domains))
    return (domains / domains.sum(-1, keepdim=True)).sum(0)


def _wide(values: Tensor) -> torch.dtype:
    """The type of `values`, float32 at least: a total or a rank can be more than float16 holds."""
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
    if not domains:
        raise ValueError("There is no domain to aggregate over.")
    if method not in AGGREGATIONS:
        raise ValueError(f"There is no aggregation '{method}'; known are {', '.join(AGGREGATIONS)}.")
    if any([w.shape for w in layers] != [w.shape for w in domains[0]] for layers in domains):
        raise ValueError("All domains must have layers of the same shapes.")
    return unflatten(AGGREGATIONS[method](torch.stack([flatten(layers) for layers in domains])), domains[0])


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


def top_k_mask(scores: Layers, percent: float = 60.0) -> list[Tensor]:
    """Mark exactly the k highest scores over all layers together (``k = mask_size(n, percent)``).

    Equal scores are taken in order of position (earlier layer, row, column first), the same on every machine.

    Returns:
        Bool layers of the same shapes, True = important.

    Raises:
        DegenerateImportanceError: one network, all equal or not finite. (In a stack: all False for that network.)
        ValueError: `percent` is not in 0 … 100.
    """
    bad = _require_informative(scores)
    flat = flatten(scores)
    k = mask_size(flat.shape[-1], percent)
    best = flat.argsort(dim=-1, descending=True, stable=True)[..., :k]
    mask = torch.zeros_like(flat, dtype=torch.bool).scatter_(-1, best, True)
    return unflatten(mask & ~bad.unsqueeze(-1), scores)


def statistics(importance: Layers, mask: Layers) -> list[dict[str, Tensor | str]]:
    """Numbers that describe an importance and its mask, one dict per layer and a last one for "overall".

    Keys: `layer`, `weights` (count), `mean`, `std` (population), `min`, `max`, `marked`, `density` (share marked),
    `zero` (weights that never moved, e.g. of dead ReLU units) and `marked_zero` (of those, the marked ones).
    Values have the shape ``[*stack]``.
    """
    if [w.shape for w in importance] != [m.shape for m in mask]:
        raise ValueError("Importance and mask must have the same layers and shapes.")
    rows = [(f"{i + 1}", w.flatten(-2), m.flatten(-2)) for i, (w, m) in enumerate(zip(importance, mask, strict=True))]
    rows.append(("overall", flatten(importance), flatten(mask)))
    return [
        {
            "layer": name,
            "weights": torch.full(w.shape[:-1], w.shape[-1]),
            "mean": w.mean(-1),
            "std": w.std(-1, correction=0),
            "min": w.amin(-1),
            "max": w.amax(-1),
            "marked": m.sum(-1),
            "density": m.double().mean(-1),
            "zero": (w == 0).sum(-1),
            "marked_zero": ((w == 0) & m).sum(-1),
        }
        for name, w, m in rows
    ]


def overlap(mask_a: Layers, mask_b: Layers) -> Tensor:
    """Intersection over union of two masks (Jaccard index): float64 ``[*stack]`` in [0, 1]; two empty masks: 1."""
    a, b = flatten(mask_a), flatten(mask_b)
    union = (a | b).sum(-1).double()
    return torch.where(union > 0, (a & b).sum(-1) / union, torch.ones_like(union))


def expected_overlap(count_a: int, count_b: int, n: int) -> float:
    """The IoU that chance gives: mean over masks with these counts, placed independently and uniformly on n weights.

    Exact: the intersection i is hypergeometric, and the value is ``Σ P(i) · i / (count_a + count_b − i)``. (The
    often used ratio of expectations is not the same.)

    Raises:
        ValueError: a count outside 0 … n.
    """
    if not (0 <= count_a <= n and 0 <= count_b <= n):
        raise ValueError(f"Counts must lie in 0 … {n}, not {count_a} and {count_b}.")
    if count_a == count_b == 0:
        return 1.0
    shared = torch.arange(max(0, count_a + count_b - n), min(count_a, count_b) + 1, dtype=torch.float64)

    def log_choose(total: Tensor | float, chosen: Tensor | float) -> Tensor:
        total, chosen = torch.as_tensor(total, dtype=torch.float64), torch.as_tensor(chosen, dtype=torch.float64)
        return torch.lgamma(total + 1) - torch.lgamma(chosen + 1) - torch.lgamma(total - chosen + 1)

    log_p = log_choose(count_a, shared) + log_choose(n - count_a, count_b - shared) - log_choose(n, count_b)
    return float((log_p.exp() * shared / (count_a + count_b - shared)).sum())
