"""The controls: same density, and exactly one thing broken by each."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from config import InputError, Settings
from importance import flatten, top_k_mask
from models import BackboneTail, FeedforwardClassifier
from study import BOTH_STARTS, CONTROLS, ERM, IMPORTANCE, Arm, MaskSource, permuted_mask, random_layer_mask
from study.controls import check_arms, random_mask
from trainer_phase2 import masks_for

SETTINGS = Settings.current(hidden_sizes=(7, 5, 6, 4))
SEEDS = (3, 4)
PRETRAINED = ("magnitude", "head")
SHAPES = [(5, 7), (6, 5), (4, 6)]
NETWORK = FeedforwardClassifier.outline(3, 2, SETTINGS.hidden_sizes)
N = sum(a * b for a, b in SHAPES)
K = int(0.6 * N + 0.5)


def masks(seed, settings=SETTINGS, failed=(0, 0)):
    draw = torch.Generator().manual_seed(seed)
    moved = {d: {"distance": [torch.rand(2, *shape, generator=draw) for shape in SHAPES]} for d in "ab"}
    return masks_for(moved, {"a": torch.tensor(failed), "b": torch.zeros(2, dtype=torch.long)}, settings)


def source(own=lambda settings: masks(0, settings), after=lambda settings: masks(1, settings)):
    return MaskSource("sketch", SEEDS, own, after, NETWORK)


def masking(control, start=None, changes=(), settings=SETTINGS, masks_from=None):
    return Arm(control, start, changes).masking(masks_from or source(), settings)


def test_arms_are_named_by_what_they_are():
    changes = {"IMPORTANCE_THRESHOLD_PERCENTILE": 30}
    assert ERM.name == "erm"
    assert (Arm().name, IMPORTANCE.name) == ("importance", "importance")
    assert Arm("permuted", "phase1").name == "permuted@phase1"
    assert Arm("importance", "fresh").name == "importance@fresh"
    arm = Arm("importance", "phase1", changes)
    assert arm.name == "importance[IMPORTANCE_THRESHOLD_PERCENTILE=30]@phase1"
    assert arm == Arm("importance", "phase1", (("importance_threshold_percentile", 30),))
    assert len({arm, Arm("importance", "phase1", changes), ERM}) == 2
    two = {"PH2_FREEZE_EPOCH": 2, "IMPORTANCE_AGGREGATION": "min"}
    assert Arm(changes=two).name == "importance[PH2_FREEZE_EPOCH=2,IMPORTANCE_AGGREGATION=min]"
    names = [f"{control}{start}" for start in ("", "@phase1") for control in CONTROLS if control not in PRETRAINED]
    assert [arm.name for arm in BOTH_STARTS] == names


def test_an_arm_is_found_by_its_name():
    assert [Arm.of(arm.name) for arm in BOTH_STARTS] == [*BOTH_STARTS]
    changes = {"IMPORTANCE_THRESHOLD_PERCENTILE": 30, "IMPORTANCE_AGGREGATION": "min"}
    rate = {"BACKBONE_LEARNING_RATE": 3e-05}
    for arm, settings in (
        (Arm("permuted", "phase1", changes), SETTINGS),
        (Arm("erm", changes=rate), Settings.current(trained_blocks=1)),
    ):
        found = Arm.of(arm.name)
        assert (found.control, found.start) == (arm.control, arm.start)
        assert found.settings(settings) == arm.settings(settings) != settings
    with pytest.raises(InputError, match="'chance'"):
        Arm.of("chance[IMPORTANCE_THRESHOLD_PERCENTILE=30]")


@pytest.mark.parametrize(
    ("arm", "named"),
    [
        (("randum",), "'randum'"),
        (("erm", "phase2"), "'phase2'"),
        (("importance", None, {"BATCH_SIZE": 16}), "BATCH_SIZE"),
        (("importance", "fresh", {"PH2_INIT": "phase1"}), "PH2_INIT"),
        (("importance", None, {"NOTHING": 1}), "NOTHING"),
        (("importance", None, {"IMPORTANCE_THRESHOLD_PERCENTILE": 130}), "IMPORTANCE_THRESHOLD_PERCENTILE"),
    ],
)
def test_what_is_no_arm_is_refused_by_name(arm, named):
    with pytest.raises(InputError, match=named):
        Arm(*arm).settings(SETTINGS)


@pytest.mark.parametrize("arm", BOTH_STARTS, ids=lambda arm: arm.name)
def test_density_start_and_schedule(arm):
    own, made = arm.settings(SETTINGS), arm.masking(source(), SETTINGS)
    assert flatten(made.mask).sum(-1).tolist() == ([N, N] if arm.control == "erm" else [K, K])
    assert own.ph2_init == made.settings.ph2_init == (arm.start or "fresh")
    still = arm.control in ("prune", "frozen")
    expected = [0.0] * 10 if still else [0.1 * 0.5**e for e in range(7)] + [0.0] * 3
    assert made.low_rates() == pytest.approx(expected)
    assert made.low_rates()[7:] == (0.0,) * 3
    assert made.prune == (arm.control == "prune")
    assert arm.needs_next_seed == (arm.control == "other_seed")
    others = {k: v for k, v in own.as_dict().items() if k not in ("PH2_INIT", "PH2_FREEZE_EPOCH")}
    assert others.items() <= SETTINGS.as_dict().items()


def test_the_importance_mask_is_that_of_its_seeds_and_other_seed_that_of_the_next():
    own, other = masking("importance"), masking("other_seed")
    assert torch.equal(flatten(own.mask), flatten(masks(0).mask))
    assert torch.equal(flatten(other.mask), flatten(masks(1).mask))
    assert not torch.equal(flatten(other.mask), flatten(own.mask))
    for same in ("frozen", "prune"):
        assert torch.equal(flatten(masking(same).mask), flatten(own.mask))


def test_inverted_marks_the_least_important():
    inverted = masking("inverted").mask
    for s in range(2):
        scores = flatten([layer[s] for layer in masks(0).scores]).numpy()
        marked = flatten([layer[s] for layer in inverted]).numpy()
        assert set(np.flatnonzero(marked)) == set(np.argsort(scores, kind="stable")[:K])


def test_random_masks_are_new_for_each_seed_and_holdout_and_repeatable():
    like = [torch.empty(shape) for shape in SHAPES]
    draws = {(s, h): tuple(flatten(random_mask(s, h, like, 60)).tolist()) for s in range(3) for h in ("x", "y")}
    assert len(set(draws.values())) == 6
    assert tuple(flatten(random_mask(1, "y", like, 60)).tolist()) == draws[1, "y"]
    arms = masking("random").mask
    for s, seed in enumerate(SEEDS):
        assert torch.equal(flatten(arms)[s], flatten(random_mask(seed, "sketch", like, 60)))


def test_random_masks_mark_as_many_as_a_mask_of_their_scope():
    like = [torch.arange(70.0).view(7, 10)]
    for scope, marked in (("global", 45), ("row", 42)):  # 64 % of 70; of each of seven rows of ten
        assert int(top_k_mask(like, 64, scope)[0].sum()) == marked
        assert int(random_mask(0, "x", like, 64, scope)[0].sum()) == marked


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
    arms = masking("random_layer").mask
    assert [layer.sum((1, 2)).tolist() for layer in arms] == [layer.sum((1, 2)).tolist() for layer in masks(0).mask]


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
    draw = torch.Generator().manual_seed(0)
    alone = [layer.flatten()[torch.randperm(layer.numel(), generator=draw)].view_as(layer) for layer in own]
    assert paths(own) != paths(alone)


def block(seed=0):
    """A block of pretrained weights of the usual shapes."""
    torch.manual_seed(seed)
    layers = nn.Sequential(*(nn.Linear(a, b) for b, a in SHAPES))
    return BackboneTail([layers], [((), {})], None, nn.Identity())


def test_of_pretrained_blocks_permuted_keeps_the_counts_of_rows_and_columns_of_each_matrix():
    made = masking("permuted", masks_from=source()._replace(network=block())).mask
    for own, layer in zip(masks(0).mask, made, strict=True):
        for s in range(len(SEEDS)):
            assert sorted(own[s].sum(0).tolist()) == sorted(layer[s].sum(0).tolist())
            assert sorted(own[s].sum(1).tolist()) == sorted(layer[s].sum(1).tolist())
    assert not torch.equal(flatten(made), flatten(masks(0).mask))
    units = masking("permuted").mask  # of a chain of layers, units are renamed
    assert not torch.equal(flatten(made), flatten(units))


def test_magnitude_marks_the_largest_pretrained_weights_and_head_none():
    from_blocks = source()._replace(network=block())
    largest, none = (flatten(masking(name, masks_from=from_blocks).mask) for name in PRETRAINED)
    weights = torch.cat([layer.weight.abs().flatten() for layer in block().blocks[0]])
    assert largest.sum(-1).tolist() == [K, K]
    assert weights[largest[0]].min() > weights[~largest[0]].max()
    assert not none.any()
    with pytest.raises(InputError, match="TRAINED_BLOCKS"):
        check_arms([ERM, Arm("head")])


def test_arms_of_blocks_differ_in_their_rate_and_others_cannot():
    settings = Settings.current(trained_blocks=1)
    slow, fast = (Arm("erm", changes={"BACKBONE_LEARNING_RATE": rate}) for rate in (1e-5, 1e-3))
    made = [arm.masking(source(), settings) for arm in (slow, fast)]
    assert [arm.backbone_rate for arm in made] == [1e-5, 1e-3]
    assert not made[0].same_training(made[1])
    with pytest.raises(InputError, match="BACKBONE_LEARNING_RATE"):
        slow.masking(source(), SETTINGS)


def test_a_full_mask_makes_every_control_of_the_importance_erm():
    full = replace(SETTINGS, importance_threshold_percentile=100.0)
    erm, *others = (masking(control, settings=full) for control in ("erm", "importance", "frozen", "prune"))
    assert all(erm.same_training(other) for other in others)


def test_failures_reach_the_arms_that_use_the_mask():
    failing = source(lambda s: masks(0, s, failed=(0, 3)), lambda s: masks(1, s, failed=(-1, 0)))
    made = {control: masking(control, masks_from=failing).failed for control in CONTROLS.keys() - PRETRAINED}
    assert made.pop("erm") is made.pop("random") is None
    assert made.pop("other_seed").tolist() == [-1, 0]
    assert {tuple(codes.tolist()) for codes in made.values()} == {(0, 3)}


def test_settings_of_an_arm_may_be_others():
    thin = masking("importance", changes={"IMPORTANCE_THRESHOLD_PERCENTILE": 30})
    assert flatten(thin.mask).sum(-1).tolist() == [int(0.3 * N + 0.5)] * 2
    early = masking("random", "phase1", {"PH2_FREEZE_EPOCH": 2})
    assert [rate > 0 for rate in early.low_rates()[:4]] == [True, True, False, False]
    assert early.settings.ph2_init == "phase1"
    assert masking("importance").settings == SETTINGS
    warm = replace(SETTINGS, ph2_init="phase1")
    assert (ERM.settings(warm).ph2_init, Arm("erm", "fresh").settings(warm).ph2_init) == ("phase1", "fresh")
    other = masking("importance", changes={"IMPORTANCE_AGGREGATION": "min"})
    assert torch.equal(flatten(other.mask), flatten(masks(0, replace(SETTINGS, importance_aggregation="min")).mask))


@pytest.mark.parametrize("part", ["all", "in"])
def test_a_mask_from_phase_1_on_all_images_saw_those_of_validation(part):
    seen = {arm.control for arm in BOTH_STARTS if arm.saw_validation(replace(SETTINGS, ph1_data=part))}
    assert seen == (CONTROLS.keys() - {"erm", "random", *PRETRAINED} if part == "all" else set())


def test_every_control_says_what_it_is():
    assert all(control.meaning for control in CONTROLS.values())
    assert len({control.meaning for control in CONTROLS.values()}) == len(CONTROLS)
