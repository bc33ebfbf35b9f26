"""The method against cases computed by hand, plain numpy and properties."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

import importance
from importance import (
    DegenerateImportanceError,
    aggregate,
    degenerate,
    flatten,
    marked_weights,
    mask_size,
    normalize,
    scale_update_,
    scaled_update,
    step_with_rates,
    top_k_mask,
    unflatten,
    unimportant_rate,
    weight_importance,
    weight_rates,
)

SHAPES = [(3, 2), (4, 3), (2, 4)]  # 26 weights, no two layers alike


def layers(values: np.ndarray) -> list[torch.Tensor]:
    """The last axis of an array of n = 26 values as layers of unequal shapes."""
    like = [torch.empty(shape) for shape in SHAPES]
    return unflatten(torch.from_numpy(np.asarray(values, dtype=np.float64)), like)


def stacks(seeds: int = 3):
    # Few distinct values, so that ties are common.
    numbers = st.integers(0, 12).map(lambda i: i / 8)
    return arrays(np.float64, (seeds, 26), elements=numbers)


def test_importance_is_the_distance_moved_by_the_weights_of_one_network():
    start = [torch.tensor([[1.0, -2.0], [0.5, 0.0]])]
    final = [torch.tensor([[0.5, -2.0], [1.0, -3.0]])]
    assert weight_importance(start, final)[0].tolist() == [[0.5, 0.0], [0.5, 3.0]]
    for other in ([torch.zeros(2, 3)], [torch.zeros(2, 2)] * 2):
        with pytest.raises(ValueError, match="shapes"):
            weight_importance(start, other)


def test_flatten_is_layer_by_layer_row_by_row_and_back():
    stack = layers(np.arange(52).reshape(2, 26))
    assert torch.equal(flatten(stack), torch.arange(52, dtype=torch.float64).view(2, 26))
    assert [tuple(layer.shape) for layer in stack] == [(2, *shape) for shape in SHAPES]
    assert stack[1][0].tolist() == [[6, 7, 8], [9, 10, 11], [12, 13, 14], [15, 16, 17]]


A = np.array([0.0, 1.0, 3.0, 2.0])
B = np.array([4.0, 0.0, 6.0, 0.0])
BY_HAND = {
    "sum": A + B,
    "mean": (A + B) / 2,
    "max": [4, 1, 6, 2],
    "min": [0, 0, 3, 0],
    # ranks: A = 0, 1/3, 1, 2/3; B = 2/3, 0, 1, 0 (equal values share the lower rank)
    "union": [2 / 3, 1 / 3, 1, 2 / 3],
    "intersection": [0, 0, 1, 0],
    "normalized_sum": A / 6 + B / 10,
}


@pytest.mark.parametrize("method", importance.AGGREGATIONS)
def test_aggregation_by_hand(method):
    domains = {"a": [torch.from_numpy(A).view(2, 2)], "b": [torch.from_numpy(B).view(2, 2)]}
    np.testing.assert_allclose(flatten(aggregate(domains, method)), BY_HAND[method], rtol=1e-12)


def test_normalized_sum_is_blind_to_the_scale_of_a_domain():
    generator = torch.Generator().manual_seed(0)
    a, b = ([torch.rand(5, 4, generator=generator, dtype=torch.float64)] for _ in range(2))
    loud = [100 * layer for layer in a]
    torch.testing.assert_close(aggregate([loud, b], "normalized_sum"), aggregate([a, b], "normalized_sum"))
    assert not torch.allclose(aggregate([loud, b])[0], aggregate([a, b])[0])


@pytest.mark.parametrize("method", ["normalized_sum", "union", "intersection"])
def test_totals_and_ranks_do_not_overflow_in_half_precision(method):
    generator = torch.Generator().manual_seed(0)
    domains = [[200 * torch.rand(300, 300, generator=generator).half()] for _ in range(2)]
    wide = [[layer.double() for layer in layers] for layers in domains]
    found, expected = (flatten(aggregate(x, method)) for x in (domains, wide))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)


def test_aggregation_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="domain"):
        aggregate({})
    with pytest.raises(ValueError, match="'sums'"):
        aggregate([[torch.rand(2, 2)]], "sums")
    with pytest.raises(ValueError, match="shapes"):
        aggregate([[torch.rand(2, 2)], [torch.rand(2, 3)]])


@settings(max_examples=60, deadline=None)
@given(stacks(2), stacks(2), st.sampled_from(sorted(importance.AGGREGATIONS)))
def test_a_stack_aggregates_as_its_networks_do(a, b, method):
    together = flatten(aggregate([layers(a), layers(b)], method))
    for s in range(2):
        alone = flatten(aggregate([layers(a[s]), layers(b[s])], method))
        np.testing.assert_array_equal(together[s], alone)


@pytest.mark.parametrize(
    ("n", "percent", "k"), [(400, 60, 240), (26, 60, 16), (5, 50, 3), (7, 0, 0), (7, 100, 7), (8, 12.5, 1)]
)
def test_mask_size(n, percent, k):
    assert mask_size(n, percent) == k
    for wrong in (-1, 100.5, math.nan):
        with pytest.raises(ValueError, match="100"):
            mask_size(n, wrong)


@settings(max_examples=100, deadline=None)
@given(stacks(), st.floats(0, 100))
def test_a_mask_marks_exactly_the_k_highest_ties_by_position(scores, percent):
    mask = flatten(top_k_mask(layers(scores), percent)).numpy()
    k = mask_size(26, percent)
    for row, marked in zip(scores, mask, strict=True):
        if row.min() == row.max():
            assert not marked.any()
            continue
        # An independent order: highest value first, then lowest position.
        best = sorted(range(26), key=lambda i, row=row: (-row[i], i))[:k]
        assert set(np.flatnonzero(marked)) == set(best)


@settings(max_examples=100, deadline=None)
@given(stacks())
def test_masks_are_nested_and_do_not_depend_on_scale(scores):
    masks = [flatten(top_k_mask(layers(scores), p)) for p in (10, 40, 60, 90)]
    for small, large in pairwise(masks):
        assert not (small & ~large).any()
    assert torch.equal(masks[2], flatten(top_k_mask(layers(scores * 4 + 1), 60)))


@settings(max_examples=100, deadline=None)
@given(stacks())
def test_normalize_is_min_max_over_all_layers_together(scores):
    normalized = flatten(normalize(layers(scores))).numpy()
    for row, result in zip(scores, normalized, strict=True):
        if row.min() == row.max():
            assert np.isnan(result).all()
        else:
            np.testing.assert_allclose(result, (row - row.min()) / np.ptp(row), atol=1e-15)
            assert result.min() == 0
            assert result.max() == 1


@pytest.mark.parametrize(
    "values", [np.zeros(26), np.full(26, 0.3), np.r_[np.arange(25), np.nan], np.r_[np.arange(25), np.inf]]
)
def test_an_importance_that_says_nothing(values):
    single = layers(values)
    assert degenerate(single)
    for function in (normalize, top_k_mask):
        with pytest.raises(DegenerateImportanceError):
            function(single)
    stack = layers(np.stack([values, np.arange(26)]))
    assert degenerate(stack).tolist() == [True, False]
    assert flatten(normalize(stack))[0].isnan().all()
    assert flatten(top_k_mask(stack))[0].sum() == 0
    assert flatten(top_k_mask(stack))[1].sum() == 16


# A learning rate per weight


def test_the_rate_of_unmarked_weights_decays_each_epoch_and_is_zero_once_frozen():
    rates = [unimportant_rate(epoch, 0.1, 0.5, 3) for epoch in range(5)]
    assert rates == [0.1, 0.05, 0.025, 0, 0]
    assert unimportant_rate(0, 0.1, 0.5, 0) == 0
    assert unimportant_rate(10**6, 0.1, 1.0, 10**7) == 0.1


@pytest.mark.parametrize(
    ("rate", "kind"),
    [
        (0.25, torch.float32),
        (torch.tensor(0.25, dtype=torch.float64), torch.float64),
        (torch.tensor([[0.25], [0.25]]).half(), torch.float16),
    ],
)
def test_weights_have_rate_one_where_marked(rate, kind):
    found = weight_rates(torch.tensor([[True, False], [False, True]]), rate)
    assert found.dtype == kind
    assert found.tolist() == [[1, 0.25], [0.25, 1]]


numbers = st.floats(-1e6, 1e6, width=32)


@settings(deadline=None)
@given(numbers, numbers, st.floats(0, 1, width=32))
def test_a_scaled_update_lies_between_old_and_new_and_is_exact_at_the_ends(old, new, rate):
    result = scaled_update(*(torch.tensor(value, dtype=torch.float32) for value in (old, new, rate)))
    if rate in (0, 1):
        assert result == {0: old, 1: new}[rate]
    else:
        bound = 1e-5 * max(abs(old), abs(new), 1e-30)
        assert min(old, new) - bound <= result <= max(old, new) + bound


def test_a_frozen_weight_survives_an_update_that_is_not_finite():
    old, new = torch.tensor([1.0, 1.0]), torch.tensor([math.nan, math.inf])
    assert torch.equal(scaled_update(old, new, torch.zeros(2)), old)


@pytest.mark.parametrize("kind", [torch.bool, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("weights", [torch.float16, torch.float32, torch.float64])
def test_rates_may_be_of_another_type_than_the_weights(kind, weights):
    weight = nn.Parameter(torch.ones(3, dtype=weights))
    weight.grad = torch.ones(3, dtype=weights)
    rate = torch.tensor([0.0, 0.25, 1.0]).to(kind)
    step_with_rates(torch.optim.SGD([weight], lr=0.5), {weight: rate})
    assert weight.dtype == weights
    assert weight.tolist() == (1 - 0.5 * rate.double()).tolist()


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_updates_in_place_are_the_same_where_one_of_them_is_not_finite(broken):
    old, new, rate = torch.randn(3, 6), torch.randn(3, 6), torch.tensor([0.0, 0.0, 0.3, 0.7, 1.0, 1.0])
    finite = new.clone()
    scale_update_(finite, old, rate)
    assert torch.equal(finite, scaled_update(old, new, rate))
    new[0] = broken
    scale_update_(new, old, rate)
    assert torch.equal(new[0, :2], old[0, :2])
    assert not new[0, 2:].isfinite().any()
    assert torch.equal(new[1:], finite[1:])


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD, torch.optim.AdamW])
def test_a_rate_of_a_tenth_is_a_tenth_of_the_step(optimizer):
    torch.manual_seed(0)
    full, tenth = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()
    tenth.load_state_dict(full.state_dict())
    start = full.weight.detach().clone()
    x = torch.randn(5, 4, dtype=torch.float64)
    for layer, rates in ((full, {}), (tenth, {tenth.weight: torch.full((3, 4), 0.1).double()})):
        layer(x).square().sum().backward()
        step_with_rates(optimizer(layer.parameters(), lr=0.05), rates)
    assert (full.weight - start).abs().min() > 0
    torch.testing.assert_close(tenth.weight - start, 0.1 * (full.weight - start), rtol=1e-6, atol=1e-12)
    assert torch.equal(tenth.bias, full.bias)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW])
def test_a_weight_of_rate_zero_keeps_its_bits_although_it_has_momentum(optimizer):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(50))
    step = optimizer([weight], lr=0.1, weight_decay=0.1)
    frozen = torch.arange(50) % 2 == 0
    for rate in (1.0, 0.0, 0.0):
        before = weight.detach().clone()
        weight.grad = torch.randn(50)
        step_with_rates(step, {weight: weight_rates(~frozen, rate)})
        assert torch.equal(weight[frozen], before[frozen]) == (rate == 0)
        assert (weight[~frozen] != before[~frozen]).all()


def test_scaling_gradients_is_no_learning_rate_under_adam():
    """The mistake this project exists to avoid: Adam undoes a factor on the gradient."""
    weights = []
    for factor in (1.0, 0.1):
        weight = nn.Parameter(torch.ones(3, dtype=torch.float64))
        weight.grad = factor * torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
        torch.optim.Adam([weight], lr=0.1).step()
        weights.append(weight.detach())
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-7)


# Criteria


def evidence_of(**values):
    """Two domains with evidence of one 1 × n layer each: name -> [values of the first, values of the second]."""
    return {
        d: {name: [torch.tensor([own[i]], dtype=torch.float64)] for name, own in values.items()}
        for i, d in enumerate("ab")
    }


MOVES = [[0.5, -0.2, 0.3, -0.4], [0.1, 0.6, 0.2, -0.3]]  # of two domains
AWAY = [[0.5, 0.2, 0.3, 0.4], [0.1, 0.6, 0.2, 0.3]]
START = [[1.0, -2.0, 0.5, 0.0]] * 2
SCORES = {
    "movement": [0.6, 0.8, 0.5, 0.7],
    "signed": [0.6, 0.4, 0.5, 0.7],
    "agree": [0.1, -0.2, 0.2, 0.3],  # the second: the smaller of the two that go apart, below 0
    "consensus": [1 + 1 / 6, 1 + 3 / 6, 0 + 0 / 6, 2 + 2 / 6],  # top half of each: {0, 3} and {1, 3}
    "magnitude": [1.0, 2.0, 0.5, 0.0],
    "gradient": [0.3, 0.2, 0.25, 0.35],
    "joint": [0.1, -0.2, 0.2, 0.3],
    "snip": [0.3, 0.4, 0.125, 0.0],
    "taylor": [0.5 * 1.5 + 0.1 * 1.1, 0.2 * 2.2 + 0.6 * 1.4, 0.3 * 0.8 + 0.2 * 0.7, 0.4 * 0.4 + 0.3 * 0.3],
    "fisher": [0.6, 0.8, 0.5, 0.7],
    "path": [0.5 / 0.35 + 0.1 / 0.11, 0 + 0.6 / 0.46, 0.3 / 0.19 + 0.2 / 0.14, 0.0],
}


@pytest.mark.parametrize("criterion", importance.CRITERIA)
def test_criteria_by_hand(criterion):
    """The moves stand for gradients too; a weight whose path raised the loss has no importance by it."""
    evidence = evidence_of(
        distance=AWAY,
        change=MOVES,
        start=START,
        gradient=MOVES,
        end_gradient=MOVES,
        squared_gradient=AWAY,
        path=MOVES,
    )
    (scores,) = importance.score_weights(criterion, evidence, percent=50)
    np.testing.assert_allclose(scores[0], SCORES[criterion], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("criterion", importance.CRITERIA)
def test_a_stack_is_scored_as_its_networks_one_by_one(criterion):
    draw = torch.Generator().manual_seed(1)
    names = ("distance", "change", "start", "gradient", "end_gradient", "squared_gradient", "path")

    def stack():
        return [torch.randn(3, *shape, generator=draw, dtype=torch.float64) for shape in SHAPES]

    stacked = {d: {name: stack() for name in names} for d in "abc"}
    together = importance.score_weights(criterion, stacked, percent=20)
    for s in range(3):
        single = {d: {name: [layer[s] for layer in own[name]] for name in names} for d, own in stacked.items()}
        alone = importance.score_weights(criterion, single, percent=20)
        assert all(torch.equal(a[s], b) for a, b in zip(together, alone, strict=True))


def test_weights_agree_only_where_every_sign_is_strictly_the_same():
    evidence = evidence_of(change=[[0.2, 0.0, -0.3], [0.1, 0.4, -0.1]])
    (scores,) = importance.score_weights("agree", evidence)
    assert (scores[0] > 0).tolist() == [True, False, True]  # 0 is no direction
    assert flatten(top_k_mask([scores], 67))[:2].tolist() == [True, False]


def test_unusable_evidence_is_refused():
    evidence = evidence_of(distance=AWAY)
    with pytest.raises(ValueError, match="no criterion 'moved'"):
        importance.score_weights("moved", evidence)
    with pytest.raises(ValueError, match="needs 'change' of the domain 'a'"):
        importance.score_weights("agree", evidence)
    with pytest.raises(ValueError, match="no aggregation 'median'"):
        importance.score_weights("movement", evidence, "median")
    with pytest.raises(ValueError, match="no domain"):
        importance.score_weights("movement", {})


# Scopes


@given(scores=stacks(), percent=st.sampled_from([10, 25, 60, 90]))
@settings(deadline=None, max_examples=30)
def test_scopes_mark_the_same_share_of_all_of_each_layer_or_of_each_row(scores, percent):
    scores = np.asarray(scores) + np.arange(26) * 1e-6  # never all equal
    for scope, counted in (("layer", (-2, -1)), ("row", -1)):
        for layer, score in zip(top_k_mask(layers(scores), percent, scope), layers(scores), strict=True):
            weights = math.prod(layer.shape[-2:]) if scope == "layer" else layer.shape[-1]
            assert (layer.sum(counted) == mask_size(weights, percent)).all()
            worst = torch.where(layer, score, math.inf).amin(counted)
            best = torch.where(layer, -math.inf, score).amax(counted)
            assert (worst >= best).all()  # what is marked is at least as important as what competes with it
    with pytest.raises(ValueError, match="no scope 'column'"):
        top_k_mask(layers(scores), percent, "column")


@pytest.mark.parametrize("percent", [0, 3, 10, 40, 64, 100])
@pytest.mark.parametrize("scope", ["global", "layer", "row"])
def test_as_many_weights_are_marked_as_is_said(scope, percent):
    scores = layers(np.arange(26.0))
    marked = sum(int(layer.sum()) for layer in top_k_mask(scores, percent, scope))
    assert marked == marked_weights(scores, percent, scope)
    assert (percent == 3 and scope == "row") <= (marked == 0)  # rows are too short for so few
