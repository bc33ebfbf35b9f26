"""Both phases: the schedule exactly as the method says, and what may depend on what."""

from dataclasses import replace

import pytest
import torch
from problems import plain_loop, problem

from config import Settings
from importance import aggregate, flatten, normalize, top_k_mask
from trainer_phase1 import train_domain
from trainer_phase2 import Arm, masks_for, select_epoch, train_holdout, unimportant_rate
from training import BatchOrder, TrainingFailedError, random_start

SETTINGS = Settings.current(ph1_num_epochs=2, ph2_num_epochs=10)
SEEDS = [0, 1, 2]


@pytest.fixture(scope="module")
def data():
    return problem(dtype=torch.float32, per_cell=150)


@pytest.fixture(scope="module")
def domains(data):
    return {name: train_domain(data, name, SEEDS, SETTINGS) for name in data.domain_names}


def masks_of(domains, holdout, settings=SETTINGS):
    sources = {name: networks for name, networks in domains.items() if name != holdout}
    moved = {name: networks.importance for name, networks in sources.items()}
    return masks_for(moved, {name: networks.failed for name, networks in sources.items()}, settings)


def test_phase1_shares_the_start_and_measures_the_distance_moved(domains):
    art, photo = domains["art"], domains["photo"]
    assert all(torch.equal(art.start[name], photo.start[name]) for name in art.start)
    assert not torch.equal(art.final["layers.0.weight"], photo.final["layers.0.weight"])
    for i, layer in enumerate(art.importance, start=1):
        name = f"layers.{i}.weight"
        assert torch.equal(layer, (art.final[name] - art.start[name]).abs())
    assert len(art.importance) == 4
    assert art.loss.shape == art.train_accuracy.shape == art.validation_accuracy.shape == (3, 2)


@pytest.mark.parametrize(("part", "count"), [("all", 60), ("in", 48)])
def test_phase1_data(part, count):
    data, settings = problem(), Settings.current(ph1_data=part, ph1_num_epochs=3)
    result = train_domain(data, "photo", [1], settings)
    rows = data.rows(["photo"], part)
    assert len(rows) == count
    order = BatchOrder([1], "phase1/photo", rows)
    start = {name: value[0] for name, value in result.start.items()}
    state, _, _ = plain_loop(data, start, [order.next_epoch()[0] for _ in range(3)], settings, 1e-3)
    for name, value in state.items():
        torch.testing.assert_close(result.final[name][0], value, rtol=0, atol=1e-9)


def test_masks_come_from_the_sources_alone(domains):
    masks = masks_of(domains, "sketch")
    scores = aggregate([domains["art"].importance, domains["photo"].importance])
    assert torch.equal(flatten(masks.scores), flatten(scores))
    assert torch.equal(flatten(masks.normalized), flatten(normalize(scores)))
    assert torch.equal(flatten(masks.mask), flatten(top_k_mask(scores, 60)))
    assert flatten(masks.mask).sum(-1).tolist() == [240] * 3
    assert masks.failed.tolist() == [0] * 3


def test_a_failed_source_fails_the_mask(domains):
    moved = {name: domains[name].importance for name in ("art", "photo")}
    codes = {"art": torch.tensor([0, 0, -1]), "photo": torch.tensor([0, 4, 2])}
    assert masks_for(moved, codes, SETTINGS).failed.tolist() == [0, 4, -1]


def test_the_schedule_by_hand():
    rates = [unimportant_rate(epoch, SETTINGS) * SETTINGS.ph2_lr_important for epoch in range(10)]
    halves = [1e-4, 5e-5, 2.5e-5, 1.25e-5, 6.25e-6, 3.125e-6, 1.5625e-6]
    assert rates[:7] == pytest.approx(halves)
    assert rates[7:] == [0, 0, 0]
    assert unimportant_rate(0, Settings.current(ph2_freeze_epoch=0)) == 0
    assert unimportant_rate(9, Settings.current(ph2_freeze_epoch=10)) > 0
    assert Arm([], SETTINGS).low(1) == pytest.approx(0.05, rel=1e-12)
    assert Arm([], SETTINGS, prune=True).low(1) == 0


@pytest.fixture(scope="module")
def phase2(data, domains):
    """The importance network after 0, 6, 7, 8 and 10 epochs, as (start or final parameters)."""
    masks = masks_of(domains, "sketch")
    states = {}
    for epochs in (6, 7, 8, 10):
        settings = Settings.current(ph1_num_epochs=2, ph2_num_epochs=epochs)
        both = {"erm": Arm([torch.ones_like(m) for m in masks.mask], settings), "importance": Arm(masks.mask, settings)}
        states[epochs] = train_holdout(data, "sketch", SEEDS, both)
    return masks, states


def test_unmarked_weights_freeze_after_seven_epochs_to_the_bit(phase2):
    masks, states = phase2
    for i, mask in enumerate(masks.mask, start=1):
        name = f"layers.{i}.weight"
        at = {epochs: state.final[name][:, 1] for epochs, state in states.items()}
        assert torch.equal(at[7][~mask], at[8][~mask])
        assert torch.equal(at[7][~mask], at[10][~mask])
        # (Weights of units that are dead have no gradient and may stand still at any rate.)
        assert (at[6][~mask] != at[7][~mask]).float().mean() > 0.3
        assert (at[7][mask] != at[10][mask]).float().mean() > 0.5


def test_every_other_parameter_learns_to_the_end(phase2):
    _, states = phase2
    for name in ("layers.0.weight", "layers.0.bias", "layers.5.weight", "layers.5.bias", "layers.3.bias"):
        seven, ten = (states[epochs].final[name][:, 1] for epochs in (7, 10))
        assert (seven != ten).float().mean() > 0.5
        assert (states[10].start[name][:, 1] != ten).float().mean() > 0.5


def test_phase2_follows_the_plain_loop_in_double_precision(domains):
    data = problem()
    masks = masks_of(domains, "art")
    settings = Settings.current(ph2_num_epochs=9)
    result = train_holdout(data, "art", SEEDS, {"importance": Arm(masks.mask, settings)})
    order = BatchOrder([2], "phase2/art", data.rows(["photo", "sketch"], "in"))
    rows = [order.next_epoch()[0] for _ in range(9)]

    def scale(epoch, name):
        layer = int(name.split(".")[1])
        if not name.endswith("weight") or not 1 <= layer <= 4:
            return None
        low = 1e-4 * 0.5**epoch if epoch < 7 else 0.0
        return torch.where(masks.mask[layer - 1][2], 1.0, torch.tensor(low / 1e-3, dtype=torch.float64))

    start = {name: value[2] for name, value in random_start(SEEDS, "fresh_start", (8, 3, (10,) * 5)).items()}
    state, losses, _ = plain_loop(data, start, rows, settings, 1e-3, scale)
    for name, value in state.items():
        torch.testing.assert_close(result.final[name][2, 0], value, rtol=0, atol=1e-9)
    torch.testing.assert_close(result.loss[2, 0], torch.tensor(losses, dtype=torch.float64), rtol=0, atol=1e-9)


def test_arms_share_starts_and_batches(domains):
    masks = masks_of(domains, "art")
    near = [m.clone() for m in masks.mask]
    near[0][:, 0, 0] ^= True
    result = train_holdout(problem(), "art", SEEDS, {"a": Arm(masks.mask, SETTINGS), "b": Arm(near, SETTINGS)})
    assert all(torch.equal(value[:, 0], value[:, 1]) for value in result.start.values())
    for value in result.final.values():
        torch.testing.assert_close(value[:, 0], value[:, 1], rtol=0, atol=0.05)
    assert not torch.equal(result.final["layers.1.weight"][:, 0], result.final["layers.1.weight"][:, 1])


def test_arms_that_are_the_same_are_trained_once_and_equal_to_the_bit(data, domains, monkeypatch):
    ones = [torch.ones_like(m) for m in masks_of(domains, "art").mask]
    frozen = replace(SETTINGS, ph2_freeze_epoch=0)
    arms = {"erm": Arm(ones, SETTINGS), "full": Arm(ones, frozen), "pruned": Arm(ones, SETTINGS, prune=True)}
    widths = []
    inner = train_holdout.__globals__["train"]
    monkeypatch.setitem(
        train_holdout.__globals__,
        "train",
        lambda p, start, *a, **k: widths.append(start["layers.0.bias"].shape[1]) or inner(p, start, *a, **k),
    )
    result = train_holdout(data, "art", SEEDS, arms)
    assert widths == [1]
    for v in (1, 2):
        assert all(torch.equal(value[:, 0], value[:, v]) for value in result.final.values())
        assert torch.equal(result.correct[:, 0], result.correct[:, v])


def test_arms_that_differ_are_not_taken_for_one(domains):
    mask = masks_of(domains, "art").mask
    other = [m.clone() for m in mask]
    other[3][2, 9, 9] ^= True
    arm = Arm(mask, SETTINGS)
    assert arm.same_training(Arm([m.clone() for m in mask], SETTINGS))
    assert not arm.same_training(Arm(other, SETTINGS))
    assert not arm.same_training(Arm(mask, SETTINGS, prune=True))
    assert not arm.same_training(Arm(mask, replace(SETTINGS, ph2_freeze_epoch=3)))
    assert not arm.same_training(Arm(mask, replace(SETTINGS, ph2_init="phase1")))
    assert not Arm(mask, replace(SETTINGS, ph2_freeze_epoch=0)).same_training(Arm(mask, SETTINGS, prune=True))


def test_prune_keeps_unmarked_weights_at_zero_and_frozen_at_their_start(data, domains):
    mask = masks_of(domains, "art").mask
    arms = {"prune": Arm(mask, SETTINGS, prune=True), "frozen": Arm(mask, replace(SETTINGS, ph2_freeze_epoch=0))}
    result = train_holdout(data, "art", SEEDS, arms)
    for i, marked in enumerate(mask, start=1):
        name = f"layers.{i}.weight"
        assert (result.final[name][:, 0][~marked] == 0).all()
        assert torch.equal(result.final[name][:, 1][~marked], result.start[name][:, 1][~marked])
        assert (result.final[name][:, 0][marked] != result.start[name][:, 0][marked]).float().mean() > 0.3


def test_the_held_out_images_change_nothing_but_the_test(domains):
    mask = {"importance": Arm(masks_of(domains, "sketch").mask, SETTINGS)}
    data, other = (problem(dtype=torch.float32, per_cell=150) for _ in range(2))
    other.features[other.domains == 2] += 3
    a, b = (train_holdout(p, "sketch", SEEDS, mask) for p in (data, other))
    assert all(torch.equal(a.final[name], b.final[name]) for name in a.final)
    assert torch.equal(a.validation_accuracy, b.validation_accuracy)
    assert not torch.equal(a.correct, b.correct)


def test_the_start_is_fresh_or_that_of_phase1(data, domains):
    mask = masks_of(domains, "sketch").mask
    for kind in ("fresh", "phase1"):
        settings = Settings.current(ph2_init=kind, ph2_num_epochs=1)
        start = train_holdout(data, "sketch", SEEDS, {"a": Arm(mask, settings)}).start["layers.1.weight"][:, 0]
        assert torch.equal(start, domains["art"].start["layers.1.weight"]) == (kind == "phase1")


def test_four_hidden_layers_and_unequal_widths(data):
    for sizes, shapes in {(10,) * 4: [(10, 10)] * 3, (7, 5, 9): [(5, 7), (9, 5)]}.items():
        settings = Settings.current(hidden_sizes=sizes, ph1_num_epochs=1, ph2_num_epochs=1)
        domains = {name: train_domain(data, name, [0, 1], settings) for name in ("art", "photo")}
        masks = masks_of(domains, "sketch", settings)
        assert [tuple(m.shape[1:]) for m in masks.mask] == shapes
        n = sum(a * b for a, b in shapes)
        assert flatten(masks.mask).sum(-1).tolist() == [int(0.6 * n + 0.5)] * 2
        train_holdout(data, "sketch", [0, 1], {"importance": Arm(masks.mask, settings)})


def test_a_single_network_raises_and_a_stack_records(data):
    settings = Settings.current(ph1_num_epochs=2, ph1_learning_rate=1e38)
    with pytest.raises(
        TrainingFailedError, match=r"Phase 1, domain art, seed 7: the loss is no longer finite in epoch \d"
    ):
        train_domain(data, "art", [7], settings)
    with pytest.raises(TrainingFailedError, match="seed 0"):
        train_domain(data, "art", [0, 1], settings, strict=True)
    assert (train_domain(data, "art", [0, 1], settings).failed > 0).all()


def test_selection_takes_the_first_of_the_best():
    validation = torch.tensor([[0.1, 0.5, 0.5, 0.2], [0.4, 0.3, 0.2, 0.1]])
    assert select_epoch(validation, "last").tolist() == [3, 3]
    assert select_epoch(validation, "val").tolist() == [1, 0]
    with pytest.raises(ValueError, match="no selection rule 'best'"):
        select_epoch(validation, "best")


def test_validation_is_the_mean_over_source_domains(data, domains):
    result = train_holdout(data, "sketch", SEEDS, {"importance": Arm(masks_of(domains, "sketch").mask, SETTINGS)})
    right = result.correct[..., :2, 1, :].sum(-1).double()  # sources art and photo, part out
    expected = (right / data.totals[:2, 1].sum(-1)).mean(-1)
    torch.testing.assert_close(result.validation_accuracy, expected)
