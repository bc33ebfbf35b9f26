"""A cut is a mask: what each arm keeps and freezes, and which arms are one and the same."""

import pytest
import torch

from config import InputError
from engine import generator
from transfer import KINDS, ConvClassifier, CutArm, arms_of
from transfer.arms import LAYER_WISE, WEIGHT_WISE, bits, layers_of, renamed_units, start_of
from transfer.training import draw_start

DEPTH, CUT = 4, 2


@pytest.fixture(scope="module")
def networks():
    """Parameters before and after pretraining."""
    with torch.device("meta"):
        network = ConvClassifier(3, 8, 5, depth=DEPTH, channels=4)
    return draw_start(network, generator(0, "start")), draw_start(network, generator(0, "final"))


def marked(mask, name):
    """Whether all, some or none of a parameter is marked."""
    return "all" if mask[name].all() else "some" if mask[name].any() else "none"


@pytest.mark.parametrize(
    ("kind", "kept", "frozen"),
    [
        ("scratch", 0, 0),
        ("finetune", 4, 0),
        ("frozen", 2, 2),
        ("frozen+rest", 4, 2),
        ("warm", 2, 0),
        ("truncated", 2, 2),
        ("zero-shot", 5, 5),  # the head is the fifth
    ],
)
def test_layers_below_the_cut_are_kept_and_frozen_as_the_table_says(networks, kind, kept, frozen):
    keep, freeze = bits(CutArm(kind, CUT), *networks, seed=0)
    for mask, below in ((keep, kept), (freeze, frozen)):
        for i, names in enumerate(layers_of(networks[1])):
            assert {marked(mask, name) for name in names} == {"all" if i < below else "none"}


def weights(mask):
    """The masks of the convolutions' weights, flattened."""
    return torch.cat([mask[f"convs.{i}.weight"].flatten() for i in range(DEPTH)])


@pytest.mark.parametrize("kind", WEIGHT_WISE)
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_weight_wise_arms_keep_as_many_weights_and_the_same_biases_as_the_cut(networks, kind, cut):
    keep, freeze = bits(CutArm(kind, cut), *networks, seed=0)
    layer_wise, _ = bits(CutArm("frozen", cut), *networks, seed=0)
    assert weights(keep).sum() == weights(layer_wise).sum()
    for name, mask in keep.items():
        assert torch.equal(mask, freeze[name])
        if not (name.startswith("convs.") and name.endswith("weight")):
            assert torch.equal(mask, layer_wise[name])


def test_moved_and_least_are_the_two_ends_of_the_distance(networks):
    start, final = networks
    distance = torch.cat([(final[f"convs.{i}.weight"] - start[f"convs.{i}.weight"]).abs().flatten() for i in range(4)])
    moved, least = (weights(bits(CutArm(kind, CUT), *networks, seed=0)[0]) for kind in ("moved", "least"))
    assert distance[moved].min() >= distance[~moved].max()
    assert distance[least].max() <= distance[~least].min()


def test_controls_keep_what_they_should_of_the_mask(networks):
    moved = bits(CutArm("moved", CUT), *networks, seed=0)[0]
    found = {kind: bits(CutArm(kind, CUT), *networks, seed=0)[0] for kind in ("random_layer", "permuted", "random")}
    for i in range(DEPTH):
        name = f"convs.{i}.weight"
        assert found["random_layer"][name].sum() == moved[name].sum() == found["permuted"][name].sum()
        rows = [sorted(mask[name].flatten(1).sum(1).tolist()) for mask in (moved, found["permuted"])]
        assert rows[0] == rows[1]
    assert found["random"]["convs.0.weight"].sum() != moved["convs.0.weight"].sum()
    flat = [weights(mask).tolist() for mask in (moved, *found.values())]
    assert all(a != b for i, a in enumerate(flat) for b in flat[:i])


def test_random_arms_depend_on_the_seed_alone(networks):
    for kind in ("random", "random_layer", "permuted"):
        first, again, other = (weights(bits(CutArm(kind, CUT), *networks, seed=s)[0]) for s in (0, 0, 1))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


def test_renaming_units_changes_names_alone():
    """As if the units of a network were numbered otherwise: products of the masks along paths have the same values."""
    draw = torch.Generator().manual_seed(0)
    mask = {
        name: torch.rand(shape, generator=draw) < 0.4 for name, shape in {"a": (6, 3), "b": (5, 6), "c": (4, 5)}.items()
    }
    renamed = renamed_units(mask, draw)
    paths = [m["c"].double() @ m["b"].double() @ m["a"].double() for m in (mask, renamed)]
    assert sorted(paths[0].tolist()) == sorted(paths[1].tolist())  # the rows are the last layer's units
    assert any(not torch.equal(mask[name], renamed[name]) for name in mask)


def test_a_start_is_pretrained_where_it_is_kept(networks):
    before, after = networks
    fresh = {name: value + 1 for name, value in before.items()}
    keep, _ = bits(CutArm("moved", CUT), *networks, seed=0)
    start = start_of(fresh, after, keep)
    for name, value in start.items():
        assert torch.equal(value[keep[name]], after[name][keep[name]])
        assert torch.equal(value[~keep[name]], fresh[name][~keep[name]])


def test_arms_that_are_the_same_program_are_there_once(networks):
    arms = arms_of(KINDS, range(DEPTH + 1), DEPTH)
    names = [arm.name for arm in arms]
    assert names[:2] == ["scratch", "finetune"]
    assert names[-1] == "zero-shot"
    assert len(names) == len(set(names)) == 2 + 4 + 3 + 3 + 4 + 5 * 3 + 1
    found = {}
    for arm in arms:
        keep, freeze = bits(arm, *networks, seed=0)
        shape = arm.cut if arm.kind == "truncated" else DEPTH
        key = shape, *(tuple(torch.cat([v.flatten() for v in mask.values()]).tolist()) for mask in (keep, freeze))
        assert key not in found, (arm, found.get(key))
        found[key] = arm


@pytest.mark.parametrize(
    ("kinds", "cuts", "wanted"),
    [
        (["frozen", "moved", "warm"], [0], ["scratch"]),
        (["warm", "finetune"], [4], ["finetune"]),
        (["frozen+rest"], [0], ["finetune"]),
        (["truncated", "frozen+rest", "least"], [4], ["frozen@4"]),
        (["truncated"], [0], ["truncated@0"]),
        (["zero-shot"], [0, 2], ["zero-shot"]),
    ],
)
def test_arms_at_the_ends_have_their_common_name(kinds, cuts, wanted):
    assert [arm.name for arm in arms_of(kinds, cuts, DEPTH)] == wanted


@pytest.mark.parametrize(
    ("kinds", "cuts", "named"), [(["thawed"], [1], "thawed"), (["frozen"], [5], "5"), (["frozen"], [], "0 … 4")]
)
def test_unknown_arms_and_cuts_are_refused(kinds, cuts, named):
    with pytest.raises(InputError, match=named):
        arms_of(kinds, cuts, DEPTH)


def test_frozen_first_layers_are_those_that_can_be_run_once(networks):
    for arm in arms_of(LAYER_WISE, [CUT], DEPTH):
        _, freeze = bits(arm, *networks, seed=0)
        frozen = [all(freeze[name].all() for name in names) for names in layers_of(networks[1])]
        assert frozen == [i < arm.prefix for i in range(DEPTH + 1)]
