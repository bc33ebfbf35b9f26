"""What describes masks, against numbers worked out by hand, all placements, and simulation."""

from itertools import combinations

import numpy as np
import pytest
import torch

from importance import top_k_mask, unflatten
from study import densities, expected_overlap, layer_statistics, overlap, overlap_table, statistics_table
from study.masks import chance_densities, group_means


def layers(values):
    """The last axis of an array of 26 values as layers of unequal shapes."""
    like = [torch.empty(shape) for shape in ((3, 2), (4, 3), (2, 4))]
    return unflatten(torch.from_numpy(values), like)


def test_statistics_of_a_stack_are_those_of_its_networks():
    values = np.random.default_rng(0).random((3, 26))
    mask = top_k_mask(layers(values))
    together = layer_statistics(layers(values), mask)
    for s in range(3):
        for row, alone in zip(together, layer_statistics(layers(values[s]), [m[s] for m in mask]), strict=True):
            for key in row.keys() - {"layer"}:
                assert row[key].dtype == alone[key].dtype
                np.testing.assert_allclose(row[key][s], alone[key], rtol=1e-12, equal_nan=False, err_msg=key)
    with pytest.raises(ValueError, match="shapes"):
        layer_statistics(layers(values), mask[:-1])


def test_statistics_table_by_hand_and_without_the_networks_that_say_nothing():
    moved = [torch.tensor([[[0.0, 1.0]], [[2.0, 3.0]], [[0.0, 0.0]]]), torch.tensor([[[5.0]], [[4.0]], [[0.0]]])]
    mask = [
        torch.tensor([[[True, True]], [[False, False]], [[False] * 2]]),
        torch.tensor([[[True]], [[True]], [[False]]]),
    ]
    table = statistics_table(moved, mask)  # the third of three seeds moved nothing
    assert table.index.tolist() == ["1", "2", "overall"]
    assert table["weights"].tolist() == [2, 1, 3]
    assert table["mean"].tolist() == pytest.approx([(0.5 + 2.5) / 2, 4.5, (2 + 3) / 2])
    assert table["std"].tolist() == pytest.approx([0.5, 0, (np.std([0, 1, 5]) + np.std([2, 3, 4])) / 2])
    assert table["min"].tolist() == [1, 4.5, 1]
    assert table["max"].tolist() == [2, 4.5, 4.5]
    assert table["marked"].tolist() == [1, 1, 2]
    assert table["density"].tolist() == pytest.approx([0.5, 1, (3 / 3 + 1 / 3) / 2])
    assert table["zero"].tolist() == [0.5, 0, 0.5]
    assert table["marked_zero"].tolist() == [0.5, 0, 0.5]


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
    a, b = np.arange(400) < 240, rng.permuted(np.tile(np.arange(400) < 240, (8000, 1)), axis=1)
    simulated = ((a & b).sum(1) / (a | b).sum(1)).mean()
    assert expected_overlap(240, 240, 400) == pytest.approx(simulated, abs=0.002)
    with pytest.raises(ValueError, match="400"):
        expected_overlap(401, 1, 400)


def marked(*networks):
    """Masks of one layer 1×6, from the positions marked in each network."""
    mask = torch.zeros(len(networks), 1, 6, dtype=torch.bool)
    for s, positions in enumerate(networks):
        mask[s, 0, list(positions)] = True
    return [mask]


@pytest.mark.parametrize(
    ("masks", "expected"),
    [
        (
            {"a": marked((0, 1), (0, 1)), "b": marked((0, 1), (1, 2)), "c": marked((4, 5), (0, 5))},
            [[1, (1 + 1 / 3) / 2, 1 / 6], [(1 + 1 / 3) / 2, 1, 0], [1 / 6, 0, 1]],
        ),
        # The mask of a failed network is empty; two such are no agreement, and one is no disagreement.
        (
            {"a": marked((0, 1), ()), "b": marked((1, 2), ()), "c": marked((0, 1), (3, 4))},
            [[1, 1 / 3, 1], [1 / 3, 1, 1 / 3], [1, 1 / 3, 1]],
        ),
    ],
    ids=["by hand", "without a mask"],
)
def test_overlap_table(masks, expected):
    table, chance = overlap_table(masks)
    assert table.index.tolist() == table.columns.tolist() == ["a", "b", "c"]
    np.testing.assert_allclose(table.to_numpy(), expected)
    # 2 of 6 marked twice: 15 pairs of positions, 1 of them shared whole, 8 by half, 6 not at all
    assert chance == pytest.approx((1 * 1 + 8 / 3) / 15)


def test_densities_by_hand():
    mask = [torch.tensor([[True, True], [False, False]]), torch.tensor([[True, False], [False, True]])]
    values = {name: float(value) for name, value in densities(mask).items()}
    assert values == {
        "overall": 0.5, "layer 1": 0.5, "layer 2": 0.5, "spread of rows": 0.25, "spread of columns": 0.0,
    }  # fmt: skip


def test_means_of_groups_of_rows_and_of_columns():
    layer = torch.arange(12.0).view(4, 3)
    assert group_means(layer, 2).tolist() == [2.5, 8.5]
    assert group_means(layer, 3, columns=True).tolist() == [4.5, 5.5, 6.5]
    assert group_means(layer, 2, columns=True).tolist() == [5.0, 6.5]  # the first group is the larger


def test_rows_of_a_random_mask_lie_between_the_bounds_of_chance():
    generator = torch.Generator().manual_seed(0)
    (mask,) = top_k_mask([torch.rand(2000, 50, generator=generator)], 10.0)
    low, high = chance_densities(0.1, 50)
    inside = ((mask.float().mean(1) >= low) & (mask.float().mean(1) <= high)).float().mean()
    assert 0.95 <= inside <= 0.99  # the bounds are whole numbers of weights
    assert (low, high) == (0.02, 0.18)
