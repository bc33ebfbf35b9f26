"""The controls: same density, and exactly one thing broken by each."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from config import InputError, Settings
from importance import flatten, top_k_mask
from trainer_phase2 import masks_for
from variants import (
    BOTH_STARTS,
    VARIANTS,
    build_arms,
    densities,
    permuted_mask,
    random_layer_mask,
    random_mask,
)

SETTINGS = Settings.current(hidden_sizes=(7, 5, 6, 4))
SEEDS = (3, 4)
SHAPES = [(5, 7), (6, 5), (4, 6)]
N = sum(a * b for a, b in SHAPES)
K = int(0.6 * N + 0.5)


def masks(seed, settings=SETTINGS):
    draw = torch.Generator().manual_seed(seed)
    moved = {d: [torch.rand(2, *shape, generator=draw) for shape in SHAPES] for d in "ab"}
    return masks_for(moved, {d: torch.zeros(2, dtype=torch.long) for d in "ab"}, settings)


@pytest.fixture
def arms():
    return build(BOTH_STARTS)


def build(names, own=0, after=1, settings=SETTINGS):
    return build_arms(names, "sketch", SEEDS, lambda s: masks(own, s), lambda s: masks(after, s), settings)


def test_all_masks_but_erm_have_the_same_density(arms):
    for name, arm in arms.items():
        counts = flatten(arm.mask).sum(-1).tolist()
        assert counts == ([N, N] if name.startswith("erm") else [K, K]), name


def test_starts_and_schedules(arms):
    assert set(arms) == {f"{v}{s}" for v in VARIANTS for s in ("", "@phase1")}
    for name, arm in arms.items():
        assert arm.settings.ph2_init == ("phase1" if name.endswith("@phase1") else "fresh")
        lows = [arm.low(epoch) for epoch in range(10)]
        still = name.startswith(("prune", "frozen"))
        assert lows == ([0.0] * 10 if still else pytest.approx([0.1 * 0.5**e for e in range(7)] + [0] * 3))
        assert arm.prune == name.startswith("prune")
        others = {k: v for k, v in arm.settings.as_dict().items() if k not in ("PH2_INIT", "PH2_FREEZE_EPOCH")}
        assert others.items() <= SETTINGS.as_dict().items()


def test_inverted_marks_the_least_important(arms):
    for s in range(2):
        scores = flatten([layer[s] for layer in masks(0).scores]).numpy()
        marked = flatten([layer[s] for layer in arms["inverted"].mask]).numpy()
        assert set(np.flatnonzero(marked)) == set(np.argsort(scores, kind="stable")[:K])


def test_other_seed_is_the_next_seeds_mask_and_needs_one(arms):
    assert torch.equal(flatten(arms["other_seed"].mask), flatten(masks(1).mask))
    assert not torch.equal(flatten(arms["other_seed"].mask), flatten(arms["importance"].mask))


def test_random_masks_are_new_for_each_seed_and_holdout_and_repeatable():
    like = [torch.empty(shape) for shape in SHAPES]
    draws = {(s, h): tuple(flatten(random_mask(s, h, like, 60)).tolist()) for s in range(3) for h in ("x", "y")}
    assert len(set(draws.values())) == 6
    assert tuple(flatten(random_mask(1, "y", like, 60)).tolist()) == draws[1, "y"]


def test_random_masks_are_uniform():
    like = [torch.empty(shape) for shape in SHAPES]
    counts = sum(flatten(random_mask(s, "x", like, 60)).double() for s in range(2000))
    share = K / N
    assert (counts / 2000 - share).abs().max() < 5 * (share * (1 - share) / 2000) ** 0.5


def test_random_layer_keeps_the_count_of_each_layer_and_nothing_else():
    own = [layer[0] for layer in masks(0).mask]
    drawn = random_layer_mask(5, "x", own)
    assert [int(m.sum()) for m in drawn] == [int(m.sum()) for m in own]
    assert not torch.equal(flatten(drawn), flatten(own))


def test_permuted_renames_units_consistently_through_the_layers():
    own = [layer[0] for layer in masks(0).mask]
    renamed = permuted_mask(5, "x", own)
    assert not torch.equal(flatten(renamed), flatten(own))
    for a, b in zip(own, renamed, strict=True):
        assert sorted(a.sum(0).tolist()) == sorted(b.sum(0).tolist())
        assert sorted(a.sum(1).tolist()) == sorted(b.sum(1).tolist())

    # The number of marked paths through all layers stays, which a permutation of each layer alone would break.
    def paths(mask):
        return sorted((mask[2].double() @ mask[1].double() @ mask[0].double()).flatten().tolist())

    assert paths(own) == paths(renamed)
    alone = [layer.flatten()[torch.randperm(layer.numel())].view_as(layer) for layer in own]
    assert paths(own) != paths(alone)


def test_a_full_mask_makes_importance_erm():
    full = replace(SETTINGS, importance_threshold_percentile=100.0)
    moved = {"a": [torch.rand(2, *shape) for shape in SHAPES]}
    everything = masks_for(moved, {"a": torch.zeros(2, dtype=torch.long)}, full)
    arms = build_arms(("erm", "importance", "frozen", "prune"), "x", SEEDS, lambda s: everything, None, full)
    assert all(arms["erm"].same_training(arm) for arm in arms.values())


def test_failures_reach_the_arms_that_use_the_mask():
    own, after = masks(0), masks(1)
    own.failed[1], after.failed[0] = 3, -1
    arms = build_arms(VARIANTS, "x", SEEDS, lambda s: own, lambda s: after, SETTINGS)
    codes = {name: None if arm.failed is None else arm.failed.tolist() for name, arm in arms.items()}
    assert codes["erm"] is codes["random"] is None
    assert codes["other_seed"] == [-1, 0]
    assert all(codes[name] == [0, 3] for name in set(VARIANTS) - {"erm", "random", "other_seed"})


def test_an_unknown_variant_is_refused():
    with pytest.raises(InputError, match="no variant 'randum'; there are erm, importance, random"):
        build(("randum",))


def test_one_setting_of_an_arm_may_be_another():
    names = ("importance[IMPORTANCE_THRESHOLD_PERCENTILE=30]", "random[PH2_FREEZE_EPOCH=2]@phase1", "importance")
    thin, early, plain = build(names).values()
    assert flatten(thin.mask).sum(-1).tolist() == [int(0.3 * N + 0.5)] * 2
    assert [early.low(epoch) > 0 for epoch in range(4)] == [True, True, False, False]
    assert early.settings.ph2_init == "phase1"
    assert plain.settings == SETTINGS
    other = build(("importance[IMPORTANCE_AGGREGATION=min]",))["importance[IMPORTANCE_AGGREGATION=min]"]
    assert torch.equal(flatten(other.mask), flatten(masks(0, replace(SETTINGS, importance_aggregation="min")).mask))
    with pytest.raises(InputError, match="cannot differ in BATCH_SIZE; they can in IMPORTANCE_THRESHOLD_PERCENTILE"):
        build(("importance[BATCH_SIZE=16]",))


def test_densities_by_hand():
    mask = [torch.tensor([[True, True], [False, False]]), torch.tensor([[True, False], [False, True]])]
    values = {name: float(value) for name, value in densities(mask).items()}
    assert values == {
        "overall": 0.5, "layer 1": 0.5, "layer 2": 0.5, "spread of rows": 0.25, "spread of columns": 0.0,
    }  # fmt: skip


def test_masks_of_variants_are_of_the_top_k_kind():
    scores = masks(0).scores
    assert torch.equal(flatten(masks(0).mask), flatten(top_k_mask(scores, 60)))
