"""Describes masks: density, overlap, and what chance gives."""

from collections.abc import Mapping, Sequence

import pandas as pd
import scipy  # loads scipy.stats, which takes half a second, when it is used
import torch
from torch import Tensor

from importance import Layers, degenerate, flatten


def layer_statistics(importance: Layers, mask: Layers) -> list[dict[str, Tensor | str]]:
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
    often used ratio of expectations is not the same.) A count outside 0 … n is a ValueError.
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


def statistics_table(moved: Sequence[torch.Tensor], mask: Sequence[torch.Tensor]) -> pd.DataFrame:
    """`layer_statistics` of a stack, L × ``[S, out, in]``, as a table: means over the seeds that did not fail."""
    ok = ~degenerate(moved)
    rows = layer_statistics([layer[ok] for layer in moved], [layer[ok] for layer in mask])
    means = [{name: v if name == "layer" else float(v.double().mean()) for name, v in row.items()} for row in rows]
    return pd.DataFrame(means).set_index("layer")


def overlap_table(masks: Mapping[str, Sequence[torch.Tensor]]) -> tuple[pd.DataFrame, float]:
    """Mean IoU over seeds for every pair of masks (L × bool ``[S, out, in]``, of one density), and that of chance."""
    flat = flatten(next(iter(masks.values())))

    def agreement(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> float:
        both = flatten(a).any(-1) & flatten(b).any(-1)  # a failed network has an empty mask
        return float(overlap(a, b)[both].mean())

    values = [[agreement(a, b) for b in masks.values()] for a in masks.values()]
    count = int(flat.sum(-1).max())
    return pd.DataFrame(values, list(masks), list(masks)), expected_overlap(count, count, flat.shape[-1])


def group_means(layer: Tensor, groups: int, columns: bool = False) -> Tensor:
    """Mean of each of so many groups of neighbouring rows (or columns) of a matrix: ``[out, in]`` -> ``[groups]``."""
    parts = layer.double().tensor_split(groups, dim=1 if columns else 0)
    return torch.stack([part.mean() for part in parts])


def chance_densities(share: float, width: int, level: float = 0.95) -> tuple[float, float]:
    """Between which densities a row of `width` weights lies, if this share of all weights is marked at random."""
    low, high = scipy.stats.binom.interval(level, width, share)
    return float(low) / width, float(high) / width


def densities(mask: Layers) -> Mapping[str, Tensor]:
    """Share marked: overall and per layer, and how unevenly rows and columns are marked (standard deviation)."""
    flat = flatten(mask).double()
    values = {"overall": flat.mean(-1)}
    values |= {f"layer {i}": layer.double().mean((-2, -1)) for i, layer in enumerate(mask, start=1)}
    values["spread of rows"] = torch.stack([m.double().mean(-1).std(-1, correction=0) for m in mask]).mean(0)
    values["spread of columns"] = torch.stack([m.double().mean(-2).std(-1, correction=0) for m in mask]).mean(0)
    return values
