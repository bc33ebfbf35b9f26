"""The mask arithmetic against hand-computed cases, plain numpy and properties."""

import math
import subprocess
import sys
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import importance
from importance import (
    DegenerateImportanceError,
    aggregate,
    degenerate,
    expected_overlap,
    flatten,
    mask_size,
    normalize,
    overlap,
    statistics,
    top_k_mask,
    unflatten,
    weight_importance,
)

ROOT = Path(__file__).resolve().parent.parent
SHAPES = [(3, 2), (4, 3), (2, 4)]  # 26 weights, no two layers alike


def layers(values: np.ndarray) -> list[torch.Tensor]:
    """The last axis of an array of n = 26 values as layers of unequal shapes."""
    like = [torch.empty(shape) for shape in SHAPES]
    return unflatten(torch.from_numpy(np.asarray(values, dtype=np.float64)), like)


def stacks(seeds: int = 3):
    # Few distinct values, so that ties are common.
    numbers = st.integers(0, 12).map(lambda i: i / 8)
    return arrays(np.float64, (seeds, 26), elements=numbers)


def test_importance_is_the_distance_moved():
    start = [torch.tensor([[1.0, -2.0], [0.5, 0.0]])]
    final = [torch.tensor([[0.5, -2.0], [1.0, -3.0]])]
    assert weight_importance(start, final)[0].tolist() == [[0.5, 0.0], [0.5, 3.0]]


def test_importance_of_different_networks_is_refused():
    with pytest.raises(ValueError, match="same layers and shapes"):
        weight_importance([torch.zeros(2, 2)], [torch.zeros(2, 3)])
    with pytest.raises(ValueError, match="same layers and shapes"):
        weight_importance([torch.zeros(2, 2)], [torch.zeros(2, 2)] * 2)


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
    with pytest.raises(ValueError, match="no domain"):
        aggregate({})
    with pytest.raises(ValueError, match=r"no aggregation 'sums'; known are sum, mean"):
        aggregate([[torch.rand(2, 2)]], "sums")
    with pytest.raises(ValueError, match="same shapes"):
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


@pytest.mark.parametrize("percent", [-1, 100.5, math.nan])
def test_mask_size_refuses(percent):
    with pytest.raises(ValueError, match="0 … 100"):
        mask_size(10, percent)


@settings(max_examples=200, deadline=None)
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
        with pytest.raises(DegenerateImportanceError, match="all equal or not finite"):
            function(single)
    stack = layers(np.stack([values, np.arange(26)]))
    assert degenerate(stack).tolist() == [True, False]
    assert flatten(normalize(stack))[0].isnan().all()
    assert flatten(top_k_mask(stack))[0].sum() == 0
    assert flatten(top_k_mask(stack))[1].sum() == 16


def test_statistics_by_hand():
    moved = [torch.tensor([[0.0, 2.0]]), torch.tensor([[0.0, 0.0], [4.0, 6.0]])]
    mask = [torch.tensor([[False, True]]), torch.tensor([[True, False], [True, True]])]
    first, second, overall = statistics(moved, mask)
    assert (first["layer"], second["layer"], overall["layer"]) == ("1", "2", "overall")
    assert [int(row["weights"]) for row in (first, second, overall)] == [2, 4, 6]
    assert [int(row["marked"]) for row in (first, second, overall)] == [1, 3, 4]
    assert [int(row["zero"]) for row in (first, second, overall)] == [1, 2, 3]
    assert [int(row["marked_zero"]) for row in (first, second, overall)] == [0, 1, 1]
    assert float(second["density"]) == 0.75
    assert (float(overall["min"]), float(overall["max"]), float(overall["mean"])) == (0, 6, 2)
    assert float(second["std"]) == pytest.approx(np.std([0, 0, 4, 6]))


def test_statistics_of_a_stack_are_those_of_its_networks():
    values = np.random.default_rng(0).random((3, 26))
    mask = top_k_mask(layers(values))
    together = statistics(layers(values), mask)
    for s in range(3):
        for row, alone in zip(together, statistics(layers(values[s]), [m[s] for m in mask]), strict=True):
            for key in row.keys() - {"layer"}:
                torch.testing.assert_close(row[key][s], alone[key], rtol=1e-12, atol=0)


def test_overlap_by_hand():
    a = [torch.tensor([[True, True], [False, False]])]
    b = [torch.tensor([[True, False], [True, False]])]
    empty = [torch.zeros(2, 2, dtype=torch.bool)]
    assert float(overlap(a, b)) == pytest.approx(1 / 3)
    assert float(overlap(a, a)) == 1
    assert float(overlap(a, empty)) == 0
    assert float(overlap(empty, empty)) == 1


@pytest.mark.parametrize(("a", "b", "n"), [(2, 3, 5), (1, 1, 4), (4, 4, 6), (0, 3, 5), (5, 5, 5), (0, 0, 3), (6, 2, 7)])
def test_expected_overlap_is_the_mean_over_all_placements(a, b, n):
    fixed = set(range(a))
    values = []
    for chosen in combinations(range(n), b):
        union = len(fixed | set(chosen))
        values.append(len(fixed & set(chosen)) / union if union else 1.0)
    assert expected_overlap(a, b, n) == pytest.approx(np.mean(values), rel=1e-10)


def test_expected_overlap_at_the_size_of_the_experiment():
    rng = np.random.default_rng(0)
    masks = np.zeros((2, 4000, 400), bool)
    for stack in masks:
        for row in stack:
            row[rng.permutation(400)[:240]] = True
    a, b = masks
    simulated = ((a & b).sum(1) / (a | b).sum(1)).mean()
    assert expected_overlap(240, 240, 400) == pytest.approx(simulated, abs=0.002)
    with pytest.raises(ValueError, match="0 … 400"):
        expected_overlap(401, 1, 400)


def test_importing_needs_torch_alone_and_changes_nothing(tmp_path):
    code = (
        "import sys, torch; before = torch.random.get_rng_state(); "
        "from importance import weight_importance, aggregate, top_k_mask; "
        "assert torch.equal(before, torch.random.get_rng_state()); "
        "print([m for m in ('transformers', 'torchvision', 'matplotlib', 'pandas', 'sklearn', 'scipy')"
        " if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[]", "")
    assert not list(tmp_path.iterdir())
