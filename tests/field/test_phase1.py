"""What methods are given of Phase 1: ranks of the importance, and the networks of the source domains."""

import pytest
import torch

from config import InputError
from field import ALGORITHMS, Comparison
from field.phase1 import given_to, ranks, shuffled
from field.train import train_method
from study import Arm, Study
from tests.factories import SMALL, make_run, save_blobs, split_blobs
from trainer_phase2 import masks_for

SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run after Phase 1."""
    folder = tmp_path_factory.mktemp("phase1")
    run = make_run(save_blobs(folder / "blobs.safetensors", per_cell=10), folder / "results", SEEDS)
    Study(run, [Arm("importance")]).phase1()
    return run


def given(run, name, holdouts=("art",), seeds=SEEDS):
    return given_to(run, ALGORITHMS[name], holdouts, seeds, {})


def test_ranks_by_hand():
    layers = [torch.tensor([[[5.0, 1.0]], [[0.0, 0.0]]]), torch.tensor([[[3.0], [9.0]], [[0.0], [7.0]]])]
    found = ranks(layers)
    assert found[0].tolist() == [[[5 / 8, 1 / 8]], [[3 / 8, 3 / 8]]]  # three zeros share the ranks 1/8, 3/8, 5/8
    assert found[1].tolist() == [[[3 / 8], [7 / 8]], [[3 / 8], [7 / 8]]]


def test_the_ranks_are_those_of_the_summed_importance_of_the_sources(run):
    found = given(run, "ImportanceMixout")
    saved = {domain: run.archive.phase1(domain, SEEDS) for domain in ("photo", "sketch")}
    moved = {domain: {"distance": networks.layers("importance")} for domain, networks in saved.items()}
    scores = masks_for(moved, {domain: networks.failed for domain, networks in saved.items()}, SMALL).scores
    for s in range(len(SEEDS)):
        flat = torch.cat([layer[s].flatten() for layer in scores]).tolist()
        expected = [(sum(o < x for o in flat) + sum(o == x for o in flat) / 2) / len(flat) for x in flat]
        rank = torch.cat([layer[s].flatten() for layer in found.state["ranks"].values()])
        assert rank.tolist() == pytest.approx(expected, abs=1e-6)
        assert rank.mean().item() == pytest.approx(0.5, abs=1e-6)
    assert list(found.state["ranks"]) == list(run.network.tracked_names)
    assert found.failed.tolist() == [0, 0, 0]


def test_the_control_has_the_same_ranks_elsewhere_in_each_matrix(run):
    true, control = (given(run, name).state["ranks"] for name in ("ImportanceMixout", "PermutedMixout"))
    for name, layer in true.items():
        assert torch.equal(layer.flatten(1).sort().values, control[name].flatten(1).sort().values)
        assert not torch.equal(layer, control[name])
    part = given(run, "PermutedMixout", seeds=(1,)).state["ranks"]
    assert all(torch.equal(part[name][0], layer[1]) for name, layer in control.items())  # whatever else is trained


def test_the_order_is_drawn_for_each_seed_and_holdout():
    layers = [torch.arange(12.0).view(3, 4), torch.arange(6.0).view(2, 3)]
    orders = [shuffled(seed, holdout, layers) for seed in (0, 1) for holdout in ("art", "photo")]
    assert len({tuple(order[0].flatten().tolist()) for order in orders}) == 4
    assert all(torch.equal(a, b) for a, b in zip(orders[0], shuffled(0, "art", layers), strict=True))


@pytest.mark.parametrize("holdouts", [("art",), ("photo",), ("art", "sketch")])
def test_the_experts_are_the_final_networks_of_the_source_domains(run, holdouts):
    found = given(run, "LFME", holdouts).state["experts"]
    sources = tuple(domain for domain in ("art", "photo", "sketch") if domain not in holdouts)
    assert sources == run.data.sources(holdouts)
    for number, domain in enumerate(sources):
        final = run.archive.phase1(domain, SEEDS).params("final")
        assert final.keys() == found.keys()
        assert all(torch.equal(found[name][:, number], value) for name, value in final.items())
    assert all(value.shape[:2] == (len(SEEDS), len(sources)) for value in found.values())


def test_a_method_without_an_entry_is_given_nothing(run):
    assert given(run, "SD") == ({}, None)


def test_what_a_method_needs_must_be_given():
    data = split_blobs(settings=SMALL)
    with pytest.raises(ValueError, match=r"LFME must be given 'experts'"):
        train_method(data, ["art"], SEEDS, ALGORITHMS["LFME"], SMALL)
    with pytest.raises(ValueError, match=r"PermutedMixout must be given 'ranks'"):
        train_method(data, ["art"], SEEDS, ALGORITHMS["PermutedMixout"], SMALL, given={"experts": {}})


def test_a_method_whose_phase_1_saw_the_validation_images_says_so(run):
    names = ["LFME", "FreeLunch", "ImportanceMixout", "Mixout"]
    comparison = Comparison(run, names)
    assert SMALL.ph1_data == "all"
    assert [m.__name__ for m in comparison.methods if comparison.saw_validation(m)] == ["LFME", "ImportanceMixout"]


def test_an_unknown_kind_is_refused(run):
    method = type("Own", (ALGORITHMS["ERM"],), {"phase1": {"mine": "nothing"}})
    with pytest.raises(InputError, match="'nothing'"):
        Comparison(run, [method])
    assert "Own" not in ALGORITHMS
