"""How batches are made: pooled without replacement, or balanced by domain with shorter domains beginning anew."""

from collections import Counter
from math import ceil

import pytest
import torch
from problems import problem

from algorithms import ALGORITHMS
from config import Settings
from trainer_algorithm import _order
from training import BalancedOrder, BatchOrder

ROWS = [torch.arange(100, 107), torch.arange(200, 223)]  # a domain of 7 images and one of 23


def steps_of(order, epochs=3):
    """[epochs · steps, domains, batch_size] of the one seed."""
    return torch.cat([order.next_epoch()[0].view(order.steps, len(ROWS), order.batch_size) for _ in range(epochs)])


def test_each_step_has_as_many_rows_of_each_domain_in_order():
    steps = steps_of(BalancedOrder([5], "x", ROWS, steps=4, batch_size=3))
    assert steps.shape == (12, 2, 3)
    for d, rows in enumerate(ROWS):
        assert torch.isin(steps[:, d], rows).all()


def test_a_domain_that_is_used_up_begins_again_in_a_new_order_across_epochs():
    steps = steps_of(BalancedOrder([5], "x", ROWS, steps=7, batch_size=3))
    for d, rows in enumerate(ROWS):
        rounds = steps[:, d].flatten().split(len(rows))  # 63 rows: nine rounds of the short domain, not one row lost
        whole = [r.tolist() for r in rounds if len(r) == len(rows)]
        assert all(sorted(r) == rows.tolist() for r in whole)
        assert len({tuple(r) for r in whole}) == len(whole)
        assert len(set(rounds[-1].tolist())) == len(rounds[-1])


def test_seeds_and_domains_have_orders_of_their_own_whatever_is_beside_them():
    both = BalancedOrder([5, 6], "x", ROWS, steps=4, batch_size=3).next_epoch()
    assert torch.equal(both[0], BalancedOrder([5], "x", ROWS, 4, 3).next_epoch()[0])
    assert torch.equal(both[1], BalancedOrder([6], "x", ROWS, 4, 3).next_epoch()[0])
    assert not torch.equal(both[0], both[1])
    assert not torch.equal(both[0], BalancedOrder([5], "y", ROWS, 4, 3).next_epoch()[0])


def test_balanced_training_takes_as_many_steps_as_pooled_training_of_that_holdout():
    settings = Settings.current(hidden_sizes=(6, 5, 4), batch_size=16)
    data = problem(settings=settings)
    for holdout in data.domain_names:
        sources = data.sources(holdout)
        pooled, steps = _order(data, sources, [holdout], [0], "pooled", settings)
        balanced, same = _order(data, sources, [holdout], [0], "balanced", settings)
        assert isinstance(pooled, BatchOrder)
        assert steps == same == ceil(len(data.rows(sources, "in")) / 16)
        assert balanced.next_epoch().shape == (1, steps * len(sources) * 16)
        assert balanced.rows_per_step == len(sources) * 16
        inside = set(data.rows(sources, "in").tolist())
        assert Counter(pooled.next_epoch()[0].tolist()) == Counter(inside)  # each once
        assert set(balanced.next_epoch()[0].tolist()) <= inside


@pytest.mark.parametrize(
    ("name", "knob", "steps"),
    [
        ("IRM", "irm_anneal", 500),
        ("VREx", "anneal", 500),
        ("IB_ERM", "ib_anneal", 500),
        ("IB_IRM", "ib_anneal", 500),
        ("IB_IRM", "irm_anneal", 500),
        ("IGA", None, None),
        ("Fishr", "anneal", 1500),
        ("EQRM", "burn_in", 2500),
        ("WeightAverage", "start", 100),
    ],
)
def test_annealing_is_the_part_of_training_that_domainbeds_steps_are_of_5001(name, knob, steps):
    known = ALGORITHMS[name].known_hyperparameters()
    if knob is None:
        assert not any("anneal" in key for key in known)
    else:
        assert known[knob].default == pytest.approx(steps / 5001)
