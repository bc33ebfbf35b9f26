"""The variants of a study: what each arm of a holdout is masked by, all at the same density.

`erm` (every weight at the full rate) and `importance` are the question; the others are controls that each break one
thing: `random` and `random_layer` forget the importance, `inverted` turns it round, `permuted` keeps the structure of
the mask but not its place, `other_seed` takes the place of another network's units. `frozen` and `prune` change what
happens to the unmarked weights. Each can begin from a fresh start, where the units mean nothing that a mask could
know, or from Phase 1's start; the latter arms are named ``<variant>@phase1``.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

import config
from config import InputError, Settings
from importance import Layers, flatten, mask_size, top_k_mask, unflatten
from trainer_phase2 import Arm, HoldoutMasks
from training import generator

VARIANTS = ("erm", "importance", "random", "random_layer", "inverted", "permuted", "other_seed", "prune", "frozen")
AT_PHASE1 = "@phase1"
SWEPT = ("IMPORTANCE_THRESHOLD_PERCENTILE", "IMPORTANCE_AGGREGATION", "PH2_FREEZE_EPOCH")
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
    masks_of: Callable[[Settings], HoldoutMasks],
    next_masks_of: Callable[[Settings], HoldoutMasks],
    settings: Settings,
) -> dict[str, Arm]:
    """Arms by name for S seeds of a holdout.

    Args:
        names: a variant of `VARIANTS`; with ``@phase1`` it begins from Phase 1's start, without as the settings
            say; with ``[NAME=VALUE]`` one setting of masks or schedule is another, for sweeps.
        holdout: names the random streams.
        seeds: S seeds.
        masks_of: the masks of these seeds under given settings.
        next_masks_of: the same of each next seed (s + 1), for `other_seed`.
        settings: of the study.

    Raises:
        InputError: an unknown name or setting.
    """
    arms = {}
    for name in names:
        variant, own = parse_name(name, settings)
        mask, failed = _mask(variant, holdout, seeds, masks_of, next_masks_of, own)
        if variant == "frozen":
            own = replace(own, ph2_freeze_epoch=0)
        arms[name] = Arm(mask, own, prune=variant == "prune", failed=failed)
    return arms


def parse_name(name: str, settings: Settings) -> tuple[str, Settings]:
    """Variant and settings of an arm's name, ``variant[NAME=VALUE]@phase1``, both additions optional.

    Raises:
        InputError: an unknown variant, start or setting, or one that arms of the same batches cannot differ in.
    """
    found = re.fullmatch(r"(\w+)(?:\[(.+)\])?(@phase1)?", name)
    if not found or found[1] not in VARIANTS:
        raise InputError(f"There is no variant '{name}'; there are {', '.join(BOTH_STARTS)}.")
    variant, assignment, start = found.groups()
    if assignment:
        setting, value = config.parse(assignment)
        if setting not in SWEPT:
            raise InputError(f"The arms of a study cannot differ in {setting}; they can in {', '.join(SWEPT)}.")
        settings = replace(settings, **{setting.lower(): value})
    return variant, replace(settings, ph2_init="phase1") if start else settings


def _mask(
    variant: str,
    holdout: str,
    seeds: Sequence[int],
    masks_of: Callable[[Settings], HoldoutMasks],
    next_masks_of: Callable[[Settings], HoldoutMasks],
    settings: Settings,
) -> tuple[list[Tensor], Tensor | None]:
    """Mask ``L × [S, out, in]`` of a variant, and the codes of seeds for which it is of no use."""
    masks, percent = masks_of(settings), settings.importance_threshold_percentile
    if variant == "erm":
        return [torch.ones_like(layer) for layer in masks.mask], None
    if variant in ("importance", "prune", "frozen"):
        return masks.mask, masks.failed
    if variant == "inverted":
        return top_k_mask([-layer for layer in masks.scores], percent), masks.failed
    if variant == "other_seed":
        after = next_masks_of(settings)
        return after.mask, after.failed
    per_seed = []
    for s, seed in enumerate(seeds):
        own = [layer[s] for layer in masks.mask]
        if variant == "random":
            per_seed.append(random_mask(seed, holdout, own, percent))
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
