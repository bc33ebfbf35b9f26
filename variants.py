"""The variants of a study: what each arm of a holdout is masked by, all at the same density.

`erm` (every weight at the full rate) and `importance` are the question; the others are controls that each break one
thing: `random` and `random_layer` forget the importance, `inverted` turns it round, `permuted` keeps the structure of
the mask but not its place, `other_seed` takes the place of another network's units. `frozen` and `prune` change what
happens to the unmarked weights. Each can begin from a fresh start, where the units mean nothing that a mask could
know, or from Phase 1's start; the latter arms are named ``<variant>@phase1``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from config import InputError, Settings
from importance import Layers, flatten, mask_size, top_k_mask, unflatten
from trainer_phase2 import Arm, HoldoutMasks
from training import generator

VARIANTS = ("erm", "importance", "random", "random_layer", "inverted", "permuted", "other_seed", "prune", "frozen")
AT_PHASE1 = "@phase1"
BOTH_STARTS = tuple(f"{name}{start}" for start in ("", AT_PHASE1) for name in VARIANTS)


def random_mask(seed: int, holdout: str, like: Layers, percent: float) -> list[Tensor]:
    """`percent` per cent of all weights, uniformly without replacement: L × bool ``[out, in]``."""
    n = sum(layer.numel() for layer in like)
    flat = torch.zeros(n, dtype=torch.bool)
    flat[torch.randperm(n, generator=generator(seed, "random_mask", holdout))[: mask_size(n, percent)]] = True
    return unflatten(flat, like)


def random_layer_mask(seed: int, holdout: str, mask: Layers) -> list[Tensor]:
    """Random positions, but in each layer as many as `mask` marks there."""
    draw = generator(seed, "random_layer_mask", holdout)
    shuffled = [layer.flatten()[torch.randperm(layer.numel(), generator=draw)] for layer in mask]
    return [values.view_as(layer) for values, layer in zip(shuffled, mask, strict=True)]


def permuted_mask(seed: int, holdout: str, mask: Layers) -> list[Tensor]:
    """The mask with the hidden units renamed at random, consistently from layer to layer.

    Row and column counts, densities and paths through the layers stay; which unit they belong to does not.
    """
    draw = generator(seed, "permuted_mask", holdout)
    widths = [mask[0].shape[1], *(layer.shape[0] for layer in mask)]
    names = [torch.randperm(width, generator=draw) for width in widths]
    return [layer[names[i + 1]][:, names[i]] for i, layer in enumerate(mask)]


def build_arms(
    names: Sequence[str],
    holdout: str,
    seeds: Sequence[int],
    masks: HoldoutMasks,
    next_masks: HoldoutMasks | None,
    settings: Settings,
) -> dict[str, Arm]:
    """Arms by name for S seeds of a holdout.

    Args:
        names: of `BOTH_STARTS`; a name without ``@phase1`` starts as `settings.ph2_init` says.
        holdout: names the random streams.
        seeds: S seeds.
        masks: of these seeds.
        next_masks: of each next seed (s + 1), for `other_seed`.
        settings: of the study.

    Raises:
        InputError: an unknown name.
    """
    arms = {}
    for name in names:
        variant, _, start = name.partition("@")
        if variant not in VARIANTS or start not in ("", "phase1"):
            raise InputError(f"There is no variant '{name}'; there are {', '.join(BOTH_STARTS)}.")
        own = replace(settings, ph2_init="phase1") if start else settings
        if variant == "frozen":
            own = replace(own, ph2_freeze_epoch=0)
        mask, failed = _mask(variant, holdout, seeds, masks, next_masks, settings)
        arms[name] = Arm(mask, own, prune=variant == "prune", failed=failed)
    return arms


def _mask(
    variant: str,
    holdout: str,
    seeds: Sequence[int],
    masks: HoldoutMasks,
    next_masks: HoldoutMasks | None,
    settings: Settings,
) -> tuple[list[Tensor], Tensor | None]:
    """Mask ``L × [S, out, in]`` of a variant, and the codes of seeds for which it is of no use."""
    if variant == "erm":
        return [torch.ones_like(layer) for layer in masks.mask], None
    if variant in ("importance", "prune", "frozen"):
        return masks.mask, masks.failed
    if variant == "inverted":
        percent = settings.importance_threshold_percentile
        return top_k_mask([-layer for layer in masks.scores], percent), masks.failed
    if variant == "other_seed":
        return next_masks.mask, next_masks.failed
    per_seed = []
    for s, seed in enumerate(seeds):
        own = [layer[s] for layer in masks.mask]
        if variant == "random":
            per_seed.append(random_mask(seed, holdout, own, settings.importance_threshold_percentile))
        elif variant == "random_layer":
            per_seed.append(random_layer_mask(seed, holdout, own))
        else:
            per_seed.append(permuted_mask(seed, holdout, own))
    stacked = [torch.stack(layers) for layers in zip(*per_seed, strict=True)]
    return stacked, None if variant == "random" else masks.failed


def densities(mask: Layers) -> Mapping[str, Tensor]:
    """Share marked: overall and per layer, and how unevenly rows and columns are marked (standard deviation)."""
    flat = flatten(mask).double()
    values = {"overall": flat.mean(-1)}
    for i, layer in enumerate(mask, start=1):
        values[f"layer {i}"] = layer.double().mean((-2, -1))
    values["spread of rows"] = torch.stack([m.double().mean(-1).std(-1, correction=0) for m in mask]).mean(0)
    values["spread of columns"] = torch.stack([m.double().mean(-2).std(-1, correction=0) for m in mask]).mean(0)
    return values
