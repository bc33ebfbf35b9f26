"""What explains an answer: how masks agree, which weights never move, and whether a mask survives a new start."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from evaluation import overlap_table, statistics_table
from importance import Layers, degenerate, expected_overlap, flatten, overlap
from study import Study, layers_of
from training import Params
from variants import densities, permuted_mask, random_layer_mask


def hidden_activations(params: Params, features: Tensor, depth: int) -> list[Tensor]:
    """Activations of one network's hidden layers, ``[N, units]`` each.

    Args:
        params: name -> tensor of a single network.
        features: ``[N, D]``.
        depth: number of hidden layers.
    """
    hidden = []
    for i in range(depth):
        features = torch.relu(features @ params[f"layers.{i}.weight"].T + params[f"layers.{i}.bias"])
        hidden.append(features)
    return hidden


def match_units(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[np.ndarray]:
    """For each hidden layer, which unit of network b plays the part of each unit of network a.

    The Hungarian assignment that maximizes the correlation of activations over the same images; a dead unit
    correlates 0 with every other. (After Li et al., "Convergent Learning", 2016.)

    Args:
        a, b: per layer ``[N, units]``.
    """
    matches = []
    for x, y in zip(a, b, strict=True):
        x, y = (t.double() - t.double().mean(0) for t in (x, y))
        scale = x.norm(dim=0)[:, None] * y.norm(dim=0)
        correlation = torch.where(scale > 0, x.T @ y / scale, torch.zeros_like(scale))
        matches.append(linear_sum_assignment(correlation.numpy(), maximize=True)[1])
    return matches


def rename_units(mask: Layers, matches: Sequence[np.ndarray]) -> list[Tensor]:
    """A mask of network b with its units in the order of network a: L × ``[out, in]``."""
    return [layer[matches[i + 1]][:, matches[i]] for i, layer in enumerate(mask)]


def seed_stability(study: Study, pairs: int = 20) -> pd.DataFrame:
    """Overlap (IoU) of the single domains' masks from seed to seed, by position and after matching units.

    Units are matched on activations over the domain's images, never on the masks. Beside it the same with the matched
    units renamed at random: what masks of this structure overlap by when units are no longer told apart.

    Args:
        study: with Phase 1 done.
        pairs: neighbouring seeds compared, at most.

    Returns:
        Row per domain: pairs, by_position, matched, matched_sd (over pairs), renamed, chance.
    """
    rows, depth = [], len(study.settings.hidden_sizes)
    for domain in study.domains:
        arrays, _ = study.load("importance", f"phase1_{domain}")
        weights, _ = study.load("weights", f"phase1_{domain}")
        mask, sound = layers_of(arrays, "mask"), study.load("histories", f"phase1_{domain}")[0]["failed"] == 0
        features = study.problem.features[study.problem.rows([domain], "all")].cpu()
        final = {k.removeprefix("final."): v for k, v in weights.items() if k.startswith("final.")}
        hidden = [
            hidden_activations({k: v[s] for k, v in final.items()}, features, depth)
            for s in range(min(len(sound), pairs + 1))
        ]
        both = [(s, s + 1) for s in range(len(hidden) - 1) if sound[s] and sound[s + 1]]
        plain = [float(overlap([m[a] for m in mask], [m[b] for m in mask])) for a, b in both]
        matched, renamed = [], []
        for a, b in both:
            mine = [m[a] for m in mask]
            theirs = rename_units([m[b] for m in mask], match_units(hidden[a], hidden[b]))
            matched.append(float(overlap(mine, theirs)))
            renamed.append(float(overlap(mine, permuted_mask(b, domain, theirs))))
        flat = flatten(mask)
        k = int(flat.sum(-1).max())
        chance = expected_overlap(k, k, flat.shape[-1])
        plain, matched, renamed = (pd.Series(values, dtype=float) for values in (plain, matched, renamed))
        rows.append((domain, len(both), plain.mean(), matched.mean(), matched.std(), renamed.mean(), chance))
    columns = ["domain", "pairs", "by_position", "matched", "matched_sd", "renamed", "chance"]
    return pd.DataFrame(rows, columns=columns).set_index("domain")


def domain_overlap(study: Study) -> tuple[pd.DataFrame, float]:
    """Mean overlap (IoU) over seeds of the masks that single domains give from the same start; and chance."""
    return overlap_table({d: layers_of(study.load("importance", f"phase1_{d}")[0], "mask") for d in study.domains})


def zero_importance(study: Study) -> pd.DataFrame:
    """Weights that never moved (of dead ReLU units) per domain: their share, and how many a mask marks all the same."""
    rows = {}
    for domain in study.domains:
        arrays, _ = study.load("importance", f"phase1_{domain}")
        total = statistics_table(layers_of(arrays, "importance"), layers_of(arrays, "mask")).loc["overall"]
        rows[domain] = {"share_zero": total["zero"] / total["weights"], "marked_zero": total["marked_zero"]}
    return pd.DataFrame(rows).T.rename_axis("domain")


def mask_density(study: Study) -> pd.DataFrame:
    """Share marked per layer, and the spread of row and column densities, of the holdouts' masks; means over seeds.

    The spreads beside them, "by chance", are those of masks with as many random positions in each layer.
    """
    rows = {}
    for holdout in study.holdouts:
        arrays, _ = study.load("importance", f"holdout_{holdout}")
        sound = ~degenerate(layers_of(arrays, "importance"))  # a failed network has an empty mask
        mask = [layer[sound] for layer in layers_of(arrays, "mask")]
        rows[holdout] = {name: float(value.mean()) for name, value in densities(mask).items()}
        rows[holdout] |= {f"{name}, by chance": value for name, value in spread_by_chance(mask, holdout).items()}
    return pd.DataFrame(rows).T.rename_axis("holdout")


def spread_by_chance(mask: Layers, holdout: str) -> dict[str, float]:
    """Mean spread of row and of column densities of masks with as many random positions in each layer.

    Args:
        mask: L × bool ``[S, out, in]``.
        holdout: names the random stream.
    """
    each = [random_layer_mask(s, holdout, [layer[s] for layer in mask]) for s in range(len(mask[0]))]
    found = densities([torch.stack(layers) for layers in zip(*each, strict=True)]) if each else {}
    return {name: float(value.mean()) for name, value in found.items() if name.startswith("spread")}
