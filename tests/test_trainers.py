"""Both phases: the schedule exactly as the method says, and what may depend on what."""

from dataclasses import replace

import pytest
import torch

from config import Settings
from engine import BatchOrder, TrainingFailedError, make_engine, random_start
from importance import aggregate, flatten, normalize, top_k_mask
from models import FeedforwardClassifier
from tests.factories import split_blobs
from trainer_phase1 import train_domain, train_network
from trainer_phase2 import Masking, low_rate, masks_for, rates_of_epoch, select_epoch, train_holdout

SETTINGS = Settings.current(ph1_num_epochs=2, ph2_num_epochs=10)
SEEDS = [0, 1, 2]


@pytest.fixture(scope="module")
def data():
    return split_blobs(dtype=torch.float32, per_cell=150)


@pytest.fixture(scope="module")
def domains(data):
    return {name: train_domain(data, name, SEEDS, SETTINGS) for name in data.domain_names}


@pytest.fixture(scope="module")
def mask(domains):
    """Of the holdout sketch."""
    return masks_of(domains, "sketch").mask


def masks_of(domains, holdout, settings=SETTINGS):
    sources = {name: networks for name, networks in domains.items() if name != holdout}
    evidence = {name: networks.evidence for name, networks in sources.items()}
    return masks_for(evidence, {name: networks.failed for name, networks in sources.items()}, settings)


def tracked(params):
    return FeedforwardClassifier.outline(8, 3, SETTINGS.hidden_sizes).tracked(params)


def plain(data, start, order, epochs, rates=lambda network, epoch: {}):
    """One network trained by the plain loop: its parameters."""
    network = FeedforwardClassifier(8, 3, SETTINGS.hidden_sizes).to(data.features)
    network.load_state_dict(start)
    batches = [[batch[0] for batch in order.next_epoch()] for _ in range(epochs)]
    train_network(network, data.features, data.labels, batches, 1e-3, lambda epoch: rates(network, epoch))
    return network.state_dict()


# Phase 1


def test_phase1_shares_the_start_and_measures_the_distance_moved(domains):
    art, photo = domains["art"], domains["photo"]
    assert all(torch.equal(art.start[name], photo.start[name]) for name in art.start)
    assert not torch.equal(art.final["layers.0.weight"], photo.final["layers.0.weight"])
    for layer, final, start in zip(art.importance, tracked(art.final), tracked(art.start), strict=True):
        assert torch.equal(layer, (final - start).abs())
    assert len(art.importance) == 4
    assert art.loss.shape == art.train_accuracy.shape == art.validation_accuracy.shape == (3, 2)


@pytest.mark.parametrize(("part", "count"), [("all", 60), ("in", 48)])
def test_phase1_is_the_plain_loop_on_the_images_that_ph1_data_names(part, count):
    data, settings = split_blobs(), Settings.current(ph1_data=part, ph1_num_epochs=3)
    result, rows = train_domain(data, "photo", [1, 4], settings), data.rows(["photo"], part, [4])
    assert rows.shape == (1, count)
    order = BatchOrder([4], "phase1/photo", rows, settings.batch_size)
    for name, value in plain(data, {name: value[1] for name, value in result.start.items()}, order, 3).items():
        torch.testing.assert_close(result.final[name][1], value, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("seeds", "strict"), [([7], None), ([0, 1], True)])
def test_a_failed_network_raises_where_it_is_the_only_one_or_where_asked_for(data, mask, seeds, strict):
    settings = replace(SETTINGS, ph1_learning_rate=1e38, ph2_lr_important=1e38)
    with pytest.raises(TrainingFailedError, match=rf"Phase 1, domain art, seed {seeds[0]}: .* epoch \d"):
        train_domain(data, "art", seeds, settings, strict=strict)
    masking = Masking([layer[: len(seeds)] for layer in mask], settings)
    with pytest.raises(TrainingFailedError, match=rf"Phase 2, holdout sketch, seed {seeds[0]}: .* epoch \d"):
        train_holdout(data, "sketch", seeds, [masking], strict=strict)
    masking = replace(masking, settings=SETTINGS, failed=torch.tensor([3, 0][: len(seeds)]))
    with pytest.raises(TrainingFailedError, match=rf"Phase 2, holdout sketch, seed {seeds[0]}: .* epoch 3"):
        train_holdout(data, "sketch", seeds, [masking], strict=strict)


@pytest.mark.parametrize(("seeds", "strict"), [([7], False), ([0, 1], None)])
def test_failed_networks_are_recorded_otherwise(data, mask, seeds, strict):
    settings = replace(SETTINGS, ph1_learning_rate=1e38)
    assert (train_domain(data, "art", seeds, settings, strict=strict).failed > 0).all()
    masking = Masking([layer[: len(seeds)] for layer in mask], SETTINGS, failed=torch.tensor([-1, 0][: len(seeds)]))
    result = train_holdout(data, "sketch", seeds, [masking], strict=strict)
    assert result.failed.flatten().tolist() == [-1, 0][: len(seeds)]


# Masks


def test_masks_come_from_the_sources_alone(domains):
    masks = masks_of(domains, "sketch")
    scores = aggregate([domains["art"].importance, domains["photo"].importance])
    assert torch.equal(flatten(masks.scores), flatten(scores))
    assert torch.equal(flatten(masks.normalized), flatten(normalize(scores)))
    assert torch.equal(flatten(masks.mask), flatten(top_k_mask(scores, 60)))
    assert flatten(masks.mask).sum(-1).tolist() == [240] * 3
    assert masks.failed.tolist() == [0] * 3


def test_a_failed_source_fails_the_mask(domains):
    evidence = {name: domains[name].evidence for name in ("art", "photo")}
    codes = {"art": torch.tensor([0, 0, -1]), "photo": torch.tensor([0, 4, 2])}
    assert masks_for(evidence, codes, SETTINGS).failed.tolist() == [0, 4, -1]


# The schedule


def test_the_schedule_by_hand(mask):
    rates = [low_rate(epoch, SETTINGS) * SETTINGS.ph2_lr_important for epoch in range(10)]
    assert rates[:7] == pytest.approx([1e-4, 5e-5, 2.5e-5, 1.25e-5, 6.25e-6, 3.125e-6, 1.5625e-6])
    assert rates[7:] == [0, 0, 0]
    assert low_rate(0, replace(SETTINGS, ph2_freeze_epoch=0)) == 0
    assert low_rate(9, replace(SETTINGS, ph2_freeze_epoch=10)) > 0
    assert Masking(mask, SETTINGS).low_rates() == tuple(low_rate(epoch, SETTINGS) for epoch in range(10))
    assert Masking(mask, SETTINGS, prune=True).low_rates() == (0,) * 10
    weights, marked = [torch.zeros(1, 2).double()], [torch.tensor([[True, False]])]
    for epoch, low in ((0, 0.1), (2, 0.025), (7, 0.0)):
        (rate,) = rates_of_epoch(weights, marked, epoch, SETTINGS).values()
        assert rate.dtype == torch.float64
        assert rate.tolist() == [[1, pytest.approx(low, rel=1e-12)]]


def test_phase2_is_the_plain_loop_with_these_rates(domains):
    data, settings = split_blobs(), replace(SETTINGS, ph2_num_epochs=9)
    mask = masks_of(domains, "art").mask
    result = train_holdout(data, "art", SEEDS, [Masking(mask, settings)])
    order = BatchOrder([2], "phase2/art", data.rows(["photo", "sketch"], "in", [2]), settings.batch_size)
    start = random_start(SEEDS, "fresh_start", data.network(settings.hidden_sizes))
    start = {name: value[2] for name, value in start.items()}
    marked = [layer[2] for layer in mask]

    def rates(network, epoch):
        return rates_of_epoch(network.tracked(dict(network.named_parameters())), marked, epoch, settings)

    for name, value in plain(data, start, order, 9, rates).items():
        torch.testing.assert_close(result.final[name][2, 0], value, rtol=0, atol=1e-9)


def test_unmarked_weights_freeze_after_seven_epochs_to_the_bit_and_all_others_learn(data, mask):
    at = {}
    for epochs in (6, 7, 8, 10):
        result = train_holdout(data, "sketch", SEEDS, [Masking(mask, replace(SETTINGS, ph2_num_epochs=epochs))])
        at[epochs] = {name: value[:, 0] for name, value in result.final.items()}

    def moved(layer, before, after):
        return (at[before][layer] != at[after][layer]).float().mean()

    for marked, six, seven, eight, ten in zip(mask, *(tracked(params) for params in at.values()), strict=True):
        assert torch.equal(seven[~marked], eight[~marked])
        assert torch.equal(seven[~marked], ten[~marked])
        # (Weights of dead units have no gradient and may stand still at any rate.)
        assert (six[~marked] != seven[~marked]).float().mean() > 0.3
        assert (seven[marked] != ten[marked]).float().mean() > 0.5
    for name in ("layers.0.weight", "layers.0.bias", "layers.5.weight", "layers.5.bias", "layers.3.bias"):
        assert moved(name, 7, 10) > 0.5


# Phase 2


def test_arms_share_starts_and_batches(domains):
    mask = masks_of(domains, "art").mask
    near = [layer.clone() for layer in mask]
    near[0][:, 0, 0] ^= True
    result = train_holdout(split_blobs(), "art", SEEDS, [Masking(mask, SETTINGS), Masking(near, SETTINGS)])
    assert all(torch.equal(value[:, 0], value[:, 1]) for value in result.start.values())
    for value in result.final.values():
        torch.testing.assert_close(value[:, 0], value[:, 1], rtol=0, atol=0.05)
    assert not torch.equal(result.final["layers.1.weight"][:, 0], result.final["layers.1.weight"][:, 1])


def test_arms_that_are_the_same_are_trained_once_and_share_every_bit(data, mask, monkeypatch):
    trained = []

    def engine(data, settings, start, *rates):
        trained.append(start["layers.0.bias"].shape[:2])
        return make_engine(data, settings, start, *rates)

    monkeypatch.setattr("trainer_phase2.make_engine", engine)
    every, frozen = [torch.ones_like(layer) for layer in mask], replace(SETTINGS, ph2_freeze_epoch=0)
    arms = [Masking(every, SETTINGS), Masking(mask, SETTINGS), Masking(every, frozen)]
    arms.append(Masking(every, SETTINGS, prune=True))
    result = train_holdout(data, "art", SEEDS, arms)
    assert trained == [(3, 2)]
    assert result.loss.shape == (3, 4, 10)
    for value in (*result.final.values(), result.correct):
        assert torch.equal(value[:, 0], value[:, 2])
        assert torch.equal(value[:, 0], value[:, 3])
    assert not torch.equal(result.loss[:, 0], result.loss[:, 1])


@pytest.mark.parametrize(("arms_at_a_time", "stacks"), [(1, [1] * 5), (2, [1, 2, 2])])
def test_arms_in_groups_are_those_of_one_stack_and_the_bar_goes_on_once_an_epoch(
    data, mask, monkeypatch, arms_at_a_time, stacks
):
    arms = [Masking(mask, replace(SETTINGS, ph2_freeze_epoch=epoch)) for epoch in range(5)]
    arms[1:1] = arms[:1]  # the same networks, in the first stack
    found, ticks, trained = [], [], []

    def engine(data, settings, start, *rates):
        trained.append(start["layers.0.bias"].shape[1])
        return make_engine(data, settings, start, *rates)

    monkeypatch.setattr("trainer_phase2.make_engine", engine)
    for together in (5, arms_at_a_time):
        monkeypatch.setattr("engine.workers.STACK_FLOATS", together * len(SEEDS) * data.network((10,) * 5).size)
        found.append(train_holdout(data, "art", SEEDS, arms, on_epoch=lambda: ticks.append(1)))
    assert trained == [5, *stacks]
    assert len(ticks) == 2 * SETTINGS.ph2_num_epochs
    whole, parts = found
    assert torch.equal(parts.loss[:, 0], parts.loss[:, 1])
    for name, value in whole.final.items():
        torch.testing.assert_close(parts.final[name], value, rtol=1e-3, atol=1e-4)
        assert torch.equal(parts.start[name], whole.start[name])
    torch.testing.assert_close(parts.loss, whole.loss, rtol=1e-3, atol=1e-4)
    assert parts.correct.shape == whole.correct.shape
    assert (parts.correct - whole.correct).abs().max() <= 2  # an image whose two best classes are as good as equal


def test_arms_that_differ_are_not_taken_for_the_same(mask):
    other = [layer.clone() for layer in mask]
    other[3][2, 9, 9] ^= True
    frozen = Masking(mask, replace(SETTINGS, ph2_freeze_epoch=0))
    arms = [Masking(mask, SETTINGS), Masking(other, SETTINGS), Masking(mask, SETTINGS, prune=True), frozen]
    arms += [Masking(mask, replace(SETTINGS, ph2_freeze_epoch=3)), Masking(mask, replace(SETTINGS, ph2_init="phase1"))]
    for i, arm in enumerate(arms):
        assert [arm.same_training(another) for another in arms] == [i == j for j in range(len(arms))]
    assert arms[0].same_training(Masking([layer.clone() for layer in mask], SETTINGS))


def test_prune_keeps_unmarked_weights_at_zero_and_frozen_at_their_start(data, mask):
    frozen = Masking(mask, replace(SETTINGS, ph2_freeze_epoch=0))
    result = train_holdout(data, "art", SEEDS, [Masking(mask, SETTINGS, prune=True), frozen])
    for marked, final, start in zip(mask, tracked(result.final), tracked(result.start), strict=True):
        assert (final[:, 0][~marked] == 0).all()
        assert torch.equal(final[:, 1][~marked], start[:, 1][~marked])
        assert (final[:, 0][marked] != start[:, 0][marked]).float().mean() > 0.3


def test_the_held_out_images_change_nothing_but_the_test(data, mask):
    other = replace(data, features=data.features.clone())
    other.features[other.domains == 2] += 3
    a, b = (train_holdout(d, "sketch", SEEDS, [Masking(mask, SETTINGS)]) for d in (data, other))
    assert all(torch.equal(a.final[name], b.final[name]) for name in a.final)
    assert torch.equal(a.validation_accuracy, b.validation_accuracy)
    assert not torch.equal(a.correct, b.correct)
    right = (
        a.correct[..., :2, 1, :].sum(-1).double()
    )  # validation is the mean over the sources, art and photo, part out
    torch.testing.assert_close(a.validation_accuracy, (right / data.totals[:2, 1].sum(-1)).mean(-1))


def test_the_start_is_fresh_or_that_of_phase1(data, domains, mask):
    arms = [Masking(mask, replace(SETTINGS, ph2_init=kind, ph2_num_epochs=1)) for kind in ("fresh", "phase1")]
    start = train_holdout(data, "sketch", SEEDS, arms).start["layers.1.weight"]
    assert not torch.equal(start[:, 0], domains["art"].start["layers.1.weight"])
    assert torch.equal(start[:, 1], domains["art"].start["layers.1.weight"])


@pytest.mark.parametrize(("sizes", "shapes"), [((10,) * 4, [(10, 10)] * 3), ((7, 5, 9), [(5, 7), (9, 5)])])
def test_four_hidden_layers_and_unequal_widths(data, sizes, shapes):
    settings = replace(SETTINGS, hidden_sizes=sizes, ph1_num_epochs=1, ph2_num_epochs=1)
    domains = {name: train_domain(data, name, [0, 1], settings) for name in ("art", "photo")}
    masks = masks_of(domains, "sketch", settings)
    assert [tuple(layer.shape[1:]) for layer in masks.mask] == shapes
    n = sum(a * b for a, b in shapes)
    assert flatten(masks.mask).sum(-1).tolist() == [int(0.6 * n + 0.5)] * 2
    train_holdout(data, "sketch", [0, 1], [Masking(masks.mask, settings)])


# Selection


def test_selection_takes_the_first_of_the_best():
    validation = torch.tensor([[0.1, 0.5, 0.5, 0.2], [0.4, 0.3, 0.2, 0.1]])
    assert select_epoch(validation, "last").tolist() == [3, 3]
    assert select_epoch(validation, "val").tolist() == [1, 0]
    with pytest.raises(ValueError, match="'best'"):
        select_epoch(validation, "best")
