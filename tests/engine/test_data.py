"""Rows, splits, random streams, starts and batches of a seed: right, and independent of the seeds beside it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score

from config import InputError, Settings
from engine import BalancedOrder, BatchOrder, SplitFeatures, accuracies, generator, random_start
from models import FeedforwardClassifier
from tests.factories import blobs, split_blobs

SETTINGS = Settings.current()
SEEDS = [3, 4]
DOMAINS = [torch.arange(100, 107), torch.arange(200, 223)]  # a domain of 7 images and one of 23


def split(split_seed, **kinds):
    return replace(split_blobs(**kinds), split_seed=split_seed)


@pytest.mark.parametrize("split_seed", [0, "seed"])
def test_rows_are_those_of_the_domains_and_of_the_split(split_seed):
    data = split(split_seed, domains=("a", "b", "c"), per_cell=10)
    assert data.sources("a") == data.sources(["a"]) == ("b", "c")
    assert data.sources(("a", "c")) == ("b",)
    both = data.all_rows(["c", "a"])
    assert data.domains[both].unique().tolist() == [0, 2]
    assert len(both) == 60
    assert torch.equal(data.rows(["c", "a"], "all", SEEDS), both.expand(2, -1))
    inside, outside = data.rows(["c", "a"], "in", SEEDS), data.rows(["c", "a"], "out", SEEDS)
    assert (inside.shape, outside.shape) == ((2, 48), (2, 12))
    for seed_inside, seed_outside in zip(inside, outside, strict=True):
        assert torch.equal(torch.cat([seed_inside, seed_outside]).sort().values, both)
    assert data.totals.tolist() == [[[8] * 3, [2] * 3]] * 3


def test_a_split_seed_is_one_split_for_all_or_one_for_each():
    one, each = split(0), split("seed")
    assert torch.equal(one.inside([0])[0], one.inside([9])[0])
    assert torch.equal(each.inside([0])[0], one.inside([0])[0])
    assert not torch.equal(*each.inside([0, 9]))
    assert torch.equal(each.inside([7, 0])[1], each.inside([0])[0])
    for s, cells in enumerate(each.cells([0, 9])):
        assert torch.equal(torch.bincount(cells, minlength=18).view(3, 2, 3), each.totals), s


@pytest.mark.parametrize(
    ("kinds", "message"), [({"per_cell": 2}, "too few images"), ({"classes": ["dog"]}, "one class only, 'dog'")]
)
def test_what_cannot_be_split_or_told_apart_is_refused(kinds, message):
    with pytest.raises(InputError, match=message):
        split_blobs(**kinds)


def test_the_features_are_left_as_they_are_and_the_type_to_train_in_is_the_one_asked_for():
    features = blobs()
    before = features.features.clone()
    data = SplitFeatures.from_features(features, replace(SETTINGS, split_seed=5), dtype=torch.float64)
    assert (data.dtype, data.like.dtype, data.like.numel()) == (torch.float64, torch.float64, 0)
    assert data.features is features.features  # no copy, on a CPU
    assert torch.equal(features.features, before)
    assert not torch.equal(data.inside([0]), split(0).inside([0]))
    assert data.network((6, 5)).size == 8 * 6 + 6 + 6 * 5 + 5 + 5 * 3 + 3


def test_generators_are_repeatable_and_independent():
    def draw(*which):
        return torch.rand(4, generator=generator(*which)).tolist()

    streams = [(0, "order", "a"), (1, "order", "a"), (0, "order", "b"), (0, "noise", "a"), (0, "start")]
    draws = [draw(*which) for which in streams]
    assert draws == [draw(*which) for which in streams]
    assert len({tuple(d) for d in draws}) == len(streams)


def test_random_start_is_that_of_linear_layers_and_leaves_the_global_generator_alone():
    network, before = FeedforwardClassifier.outline(8, 3, (6, 5, 4)), torch.random.get_rng_state()
    start = random_start([4, 9], "start", network)
    assert torch.equal(before, torch.random.get_rng_state())
    with torch.random.fork_rng():
        torch.manual_seed(generator(9, "start").initial_seed())
        own = FeedforwardClassifier(8, 3, (6, 5, 4)).state_dict()
    assert list(start) == list(own)
    assert all(torch.equal(start[name][1], value) for name, value in own.items())
    fresh = random_start([9], "fresh_start", network)
    assert not torch.equal(fresh["layers.0.weight"][0], start["layers.0.weight"][1])


def test_every_epoch_meets_every_row_once_in_a_new_order_and_keeps_the_short_last_batch():
    rows = torch.stack([torch.arange(100, 130), torch.arange(200, 230)])
    order = BatchOrder([0, 1], "x", rows, 8)
    epochs = [order.next_epoch() for _ in range(3)]
    assert [[batch.shape for batch in epoch] for epoch in epochs] == [[(2, 8), (2, 8), (2, 8), (2, 6)]] * 3
    orders = [torch.cat(epoch, dim=1) for epoch in epochs]
    assert all(torch.equal(order.sort(1).values, rows) for order in orders)
    assert not torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0][0] + 100, orders[0][1])
    alone = BatchOrder([1], "x", rows[1:], 8).next_epoch()
    assert torch.equal(torch.cat(alone, dim=1)[0], orders[0][1])


def balanced_steps(seeds, steps=4, epochs=1, name="x"):
    """Rows of `BalancedOrder`: ``[epochs · steps, S, domains, 3]``."""
    order = BalancedOrder(seeds, name, [rows.expand(len(seeds), -1) for rows in DOMAINS], steps, batch_size=3)
    every = [step for _ in range(epochs) for step in order.next_epoch()]
    return torch.stack(every).unflatten(-1, (len(DOMAINS), -1))


def test_a_balanced_step_has_rows_of_each_domain_and_one_that_is_used_up_starts_again_in_a_new_order():
    steps = balanced_steps([5], steps=7, epochs=3)[:, 0]
    assert steps.shape == (21, 2, 3)
    for d, rows in enumerate(DOMAINS):
        rounds = steps[:, d].flatten().split(len(rows))  # 63 rows: nine rounds of the short domain, and no row lost
        complete = [part.tolist() for part in rounds if len(part) == len(rows)]
        assert all(sorted(part) == rows.tolist() for part in complete)
        assert len({tuple(part) for part in complete}) == len(complete)
        assert torch.isin(rounds[-1], rows).all()
        assert len(rounds[-1].unique()) == len(rounds[-1])


def test_balanced_orders_differ_by_seed_and_name_and_ignore_the_seeds_beside_them():
    both = balanced_steps([5, 6])
    assert torch.equal(both[:, :1], balanced_steps([5]))
    assert torch.equal(both[:, 1:], balanced_steps([6]))
    assert not torch.equal(both[:, 0], both[:, 1])
    assert not torch.equal(both[:, :1], balanced_steps([5], name="y"))


@pytest.mark.parametrize("balanced", [False, True])
def test_accuracies_are_those_of_scikit_learn(balanced):
    data, seeds = split("seed", per_cell=13), [0, 1]
    guess = torch.randint(3, (2, len(data.labels)), generator=generator(0, "guess"))
    cells = data.cells(seeds)
    right = [torch.bincount(c[g == data.labels], minlength=18) for c, g in zip(cells, guess, strict=True)]
    found = accuracies(torch.stack(right).view(2, 3, 2, 3), data.totals, balanced)
    score = balanced_accuracy_score if balanced else accuracy_score
    for s, d in np.ndindex(2, 3):
        domain, inside = data.domains == d, data.inside(seeds)[s]
        for part, rows in {"full": domain, "in": domain & inside, "out": domain & ~inside}.items():
            assert float(found[part][s, d]) == pytest.approx(score(data.labels[rows], guess[s, rows]))


def test_a_class_without_images_is_left_out_of_the_balanced_accuracy():
    correct, totals = torch.tensor([[[3, 0], [1, 0]]]), torch.tensor([[[4, 0], [2, 0]]])
    assert accuracies(correct, totals, balanced=True)["full"].tolist() == [4 / 6]
