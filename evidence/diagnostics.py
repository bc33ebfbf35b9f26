"""What explains a result: how masks agree, which weights never move, and whether a mask survives a new start."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pandas as pd
import scipy
import torch
from torch import Tensor
from torch.func import functional_call

from engine import Params
from importance import Layers, degenerate, mask_size
from models import FeedforwardClassifier
from study import (
    Run,
    densities,
    expected_overlap,
    overlap,
    overlap_table,
    permuted_mask,
    random_layer_mask,
    statistics_table,
)


def hidden_activations(network: FeedforwardClassifier, params: Params, features: Tensor) -> list[Tensor]:
    """Activations of a network's hidden layers, ``[N, units]`` each, with these parameters, on features ``[N, D]``."""
    hidden: list[Tensor] = []
    hooks = [layer.register_forward_pre_hook(lambda _, inputs: hidden.append(*inputs)) for layer in network.layers[1:]]
    try:
        functional_call(network, params, features)
    finally:
        for hook in hooks:
            hook.remove()
    return hidden


def match_units(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[np.ndarray]:
    """For each hidden layer, the unit of network b that corresponds to each unit of network a.

    The Hungarian assignment that maximizes the correlation of activations over the same images; a dead unit
    correlates 0 with every other. (After Li et al., "Convergent Learning", 2016.) Activations are ``[N, units]``.
    """
    matches = []
    for x, y in zip(a, b, strict=True):
        x, y = (t.double() - t.double().mean(0) for t in (x, y))
        scale = x.norm(dim=0)[:, None] * y.norm(dim=0)
        correlation = torch.where(scale > 0, x.T @ y / scale, torch.zeros_like(scale))
        matches.append(scipy.optimize.linear_sum_assignment(correlation.numpy(), maximize=True)[1])
    return matches


def rename_units(mask: Layers, matches: Sequence[np.ndarray]) -> list[Tensor]:
    """A mask of network b with its units in the order of network a: L × ``[out, in]``."""
    return [layer[matches[i + 1]][:, matches[i]] for i, layer in enumerate(mask)]


def chance_overlap(run: Run) -> float:
    """Expected overlap (IoU) of two random masks of the run's density."""
    parameters = dict(run.network.named_parameters())
    weights = sum(layer.numel() for layer in run.network.tracked(parameters))
    marked = mask_size(weights, run.settings.importance_threshold_percentile)
    return expected_overlap(marked, marked, weights)


def seed_stability(run: Run, pairs: int = 20) -> pd.DataFrame:
    """Overlap (IoU) of the single domains' masks from seed to seed, by position and after matching units.

    Units are matched by their activations on the domain's images, never by the masks. Beside it the overlap after the
    matched units are permuted at random: that of masks of the same structure in which units cannot be told apart.

    Args:
        run: with Phase 1 done.
        pairs: neighbouring seeds compared, at most.

    Returns:
        A row per domain: pairs, by_position, matched, matched_sd (over pairs), renamed (that is, permuted), chance.
    """
    rows, kinds = {}, ["by_position", "matched", "renamed"]
    for domain in run.domains:
        found = pd.DataFrame(_pair_overlaps(run, domain, pairs), columns=kinds, dtype=float)
        rows[domain] = {"pairs": len(found), **found.mean(), "matched_sd": found["matched"].std()}
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("domain").assign(chance=chance_overlap(run))
    return table[["pairs", "by_position", "matched", "matched_sd", "renamed", "chance"]]


def _pair_overlaps(run: Run, domain: str, pairs: int) -> list[tuple[float, float, float]]:
    """Overlap of each pair of neighbouring seeds by position, after matching, and after permuting the matched units."""
    networks = run.archive.phase1(domain)
    valid, masks, params = networks.ok.tolist(), networks.layers("mask"), networks.params()
    features = run.data.features[run.data.all_rows([domain])].to(run.data.dtype).cpu()
    network = run.network
    hidden = [
        hidden_activations(network, {name: value[s] for name, value in params.items()}, features)
        for s in range(min(len(valid), pairs + 1))
    ]
    found = []
    for a, b in pairwise(range(len(hidden))):
        if valid[a] and valid[b]:
            first, second = ([layer[s] for layer in masks] for s in (a, b))
            matched = rename_units(second, match_units(hidden[a], hidden[b]))
            permuted = permuted_mask(networks.seeds[b], domain, matched)
            found.append(tuple(float(overlap(first, other)) for other in (second, matched, permuted)))
    return found


def domain_overlap(run: Run) -> pd.DataFrame:
    """Mean overlap (IoU) over seeds of the masks that single domains give from the same start: domains × domains."""
    return overlap_table({domain: run.archive.phase1(domain).layers("mask") for domain in run.domains})[0]


def zero_importance(run: Run) -> pd.DataFrame:
    """Weights that never moved (of dead ReLU units) per domain: share_zero, and marked_zero, those a mask marks anyway.

    Means over seeds: of the share, and of the number.
    """
    rows = {}
    for domain in run.domains:
        networks = run.archive.phase1(domain)
        total = statistics_table(networks.layers("importance"), networks.layers("mask")).loc["overall"]
        rows[domain] = {"share_zero": total["zero"] / total["weights"], "marked_zero": total["marked_zero"]}
    return pd.DataFrame(rows).T.rename_axis("domain")


def mask_density(run: Run) -> pd.DataFrame:
    """Share marked per layer, and the spread of row and column densities, of the holdouts' masks; means over seeds.

    The spreads "by chance" beside them are those of masks with as many random positions in each layer.
    """
    rows = {}
    for holdout in run.holdouts:
        saved = run.archive.masks(holdout)
        valid = ~degenerate(saved.layers("importance"))  # a failed network has an empty mask
        mask = [layer[valid] for layer in saved.layers("mask")]
        rows[holdout] = {name: float(value.mean()) for name, value in densities(mask).items()}
        rows[holdout] |= {f"{name}, by chance": value for name, value in spread_by_chance(mask, holdout).items()}
    return pd.DataFrame(rows).T.rename_axis("holdout")


def spread_by_chance(mask: Layers, holdout: str) -> dict[str, float]:
    """Mean spread of row and of column densities of masks with as many random positions in each layer.

    `mask` is L × bool ``[S, out, in]``; the holdout names the random stream.
    """
    each = [random_layer_mask(s, holdout, [layer[s] for layer in mask]) for s in range(len(mask[0]))]
    found = densities([torch.stack(layers) for layers in zip(*each, strict=True)]) if each else {}
    return {name: float(value.mean()) for name, value in found.items() if name.startswith("spread")}
