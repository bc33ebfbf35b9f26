"""Tables, intervals and paired differences, against scipy and cases worked out by hand."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from study import (
    AVERAGE,
    WITHOUT_HARDEST,
    accuracy_table,
    levels,
    lodo_table,
    paired_differences,
    t_interval,
    wide_table,
)
from tests.factories import FAILED, HAND, assert_interval, make_records, row


@pytest.mark.parametrize("n", [2, 3, 10, 50])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_t_interval_is_that_of_scipy(n, confidence):
    values = np.random.default_rng(n).normal(0.7, 0.05, n)
    low, high = stats.t.interval(confidence, n - 1, loc=values.mean(), scale=stats.sem(values))
    assert t_interval(values, confidence) == pytest.approx((values.mean(), low, high), abs=1e-14)


def test_t_interval_from_a_table_of_students_distribution():
    # 1, 2, 3: s = 1, and t at 97.5 % with 2 degrees of freedom is 4.303
    assert t_interval([1, 2, 3]) == pytest.approx((2, 2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5), abs=1e-3)


def test_t_interval_covers_as_often_as_it_says():
    values = np.random.default_rng(0).normal(1.0, 2.0, (1000, 5))
    hits = [low <= 1.0 <= high for _, low, high in map(t_interval, values)]
    assert np.mean(hits) == pytest.approx(0.95, abs=0.028)  # 4 standard errors


def test_t_interval_of_too_few():
    mean, low, high = t_interval([0.7])
    assert mean == 0.7
    assert math.isnan(low)
    assert math.isnan(high)
    assert all(map(math.isnan, t_interval([])))


def test_t_interval_of_equal_values_is_a_point():
    assert t_interval([0.5, 0.5, 0.5]) == (0.5, 0.5, 0.5)


def test_accuracy_table_puts_each_result_in_its_place():
    table = accuracy_table(make_records(HAND, ("last", "val")))
    assert table.index.tolist() == [0, 1, 2]
    for algorithm, holdouts in HAND.items():
        for holdout, values in holdouts.items():
            assert table[algorithm, holdout].tolist() == values
    assert table.shape == (3, 6)


def test_accuracy_table_does_not_depend_on_the_order_of_records():
    records = make_records(HAND)
    pd.testing.assert_frame_equal(
        lodo_table(records).sort_values(["algorithm", "holdout"], ignore_index=True),
        lodo_table(records[::-1]).sort_values(["algorithm", "holdout"], ignore_index=True),
    )


@pytest.mark.parametrize(
    ("choice", "shift"),
    [
        ({}, 0),
        ({"part": "in"}, 0.01),
        ({"part": "out"}, -0.02),
        ({"metric": "balanced_accuracy"}, -0.05),
        ({"selection": "val"}, -0.03),
        ({"selection": "val", "part": "in", "metric": "balanced_accuracy"}, -0.07),
    ],
)
def test_choice_of_selection_part_and_metric(choice, shift):
    records = make_records(HAND, ("last", "val"))
    assert accuracy_table(records, **choice)["erm", "art"].tolist() == pytest.approx(
        [0.9 + shift, 0.8 + shift, 0.7 + shift]
    )
    assert row(lodo_table(records, **choice), "erm", "photo")["mean"] == pytest.approx(0.6 + shift)
    difference = paired_differences(records, "importance", **choice).set_index("holdout")
    assert difference.loc["sketch", "mean"] == pytest.approx(0.4)


@pytest.mark.parametrize("function", [accuracy_table, lodo_table])
def test_an_unknown_selection_is_an_error(function):
    with pytest.raises(ValueError, match="'best'"):
        function(make_records(HAND), selection="best")
    with pytest.raises(ValueError, match="'last'"):
        function([])


def test_lodo_table_by_hand():
    table = lodo_table(make_records(HAND))
    assert table.columns.tolist() == ["algorithm", "holdout", "n", "mean", "low", "high"]
    assert len(table) == 2 * 5
    for algorithm, holdouts in HAND.items():
        for holdout, values in holdouts.items():
            assert_interval(row(table, algorithm, holdout), values)
    assert_interval(row(table, "erm", AVERAGE), [2.0 / 3, 1.9 / 3, 1.8 / 3])
    assert_interval(row(table, "importance", AVERAGE), [2.15 / 3, 2.15 / 3, 2.0 / 3])
    # sketch goes, where erm is worst, although importance is worst on photo
    assert_interval(row(table, "erm", WITHOUT_HARDEST), [0.7, 0.75, 0.65])
    assert_interval(row(table, "importance", WITHOUT_HARDEST), [1.25 / 2, 1.25 / 2, 1.1 / 2])


def test_averages_are_taken_within_seeds_first():
    """Holdouts that go up and down together with the seed, and against each other: same means, other intervals."""
    together = lodo_table(make_records({"erm": {"a": [0.4, 0.6], "b": [0.4, 0.6]}}))
    against = lodo_table(make_records({"erm": {"a": [0.4, 0.6], "b": [0.6, 0.4]}}))
    assert_interval(row(together, "erm", AVERAGE), [0.4, 0.6])
    found = row(against, "erm", AVERAGE)
    assert [found["mean"], found["low"], found["high"]] == pytest.approx([0.5, 0.5, 0.5])
    assert found["n"] == 2  # seeds, never seeds × domains


def test_two_domains():
    table = lodo_table(
        make_records({"erm": {"a": [0.8, 0.9], "b": [0.3, 0.5]}, "importance": {"a": [0.1, 0.2], "b": [0.6, 0.8]}})
    )
    assert_interval(row(table, "erm", WITHOUT_HARDEST), [0.8, 0.9])
    assert_interval(row(table, "importance", WITHOUT_HARDEST), [0.1, 0.2])
    assert_interval(row(table, "importance", AVERAGE), [0.35, 0.5])


def test_one_holdout_alone_has_an_average_and_none_without_it():
    table = lodo_table(make_records({"erm": {"a": [0.8, 0.9]}}))
    assert table["holdout"].tolist() == ["a", AVERAGE]
    assert_interval(row(table, "erm", AVERAGE), [0.8, 0.9])


def test_hardest_without_erm_is_worst_for_all_together():
    table = lodo_table(make_records({"x": {"a": [0.5, 0.5], "b": [0.4, 0.4]}, "y": {"a": [0.1, 0.1], "b": [0.9, 0.9]}}))
    assert row(table, "x", WITHOUT_HARDEST)["mean"] == pytest.approx(0.4)
    assert row(table, "y", WITHOUT_HARDEST)["mean"] == pytest.approx(0.9)


def test_a_single_seed_has_no_interval():
    table = lodo_table(make_records({"erm": {"a": [0.8], "b": [0.6]}}))
    assert table["n"].tolist() == [1] * 4
    assert row(table, "erm", AVERAGE)["mean"] == pytest.approx(0.7)
    assert table[["low", "high"]].isna().all(axis=None)


def test_a_failed_network_leaves_out_its_seed_s_averages():
    table = lodo_table(make_records(FAILED))
    assert_interval(row(table, "importance", "photo"), [0.3, 0.2])
    assert_interval(row(table, "importance", "art"), [0.95, 0.85, 0.9])
    assert_interval(row(table, "importance", AVERAGE), [2.15 / 3, 2.0 / 3])
    assert_interval(row(table, "erm", AVERAGE), [2.0 / 3, 1.9 / 3, 1.8 / 3])  # erm's own networks are sound


def test_a_failed_network_leaves_out_its_pair():
    table = paired_differences(make_records(FAILED), "importance").assign(algorithm="difference")
    assert_interval(row(table, "difference", "photo"), [-0.2, -0.4])
    assert_interval(row(table, "difference", "art"), [0.05, 0.05, 0.2])
    assert_interval(row(table, "difference", AVERAGE), [0.15 / 3, 0.2 / 3])
    assert_interval(row(table, "difference", WITHOUT_HARDEST), [-0.15 / 2, -0.2 / 2])


def test_seeds_that_one_algorithm_lacks_are_left_out_of_the_pairs():
    records = [r for r in make_records(HAND) if (r["algorithm"], r["seed"]) != ("erm", 2)]
    table = paired_differences(records, "importance").assign(algorithm="difference")
    assert_interval(row(table, "difference", "art"), [0.05, 0.05])
    assert_interval(row(table, "difference", AVERAGE), [0.15 / 3, 0.25 / 3])


def test_an_algorithm_that_lacks_a_holdout_has_no_average():
    """Else an average over fewer, maybe easier, domains would stand in the same column."""
    records = [r for r in make_records(HAND) if (r["algorithm"], r["holdout"]) != ("importance", "sketch")]
    table = lodo_table(records)
    averages = table[(table["algorithm"] == "importance") & (table["holdout"] == AVERAGE)]
    assert averages["mean"].isna().all()
    assert_interval(row(table, "erm", AVERAGE), [2.0 / 3, 1.9 / 3, 1.8 / 3])


def test_tables_of_networks_that_all_failed():
    """As after a learning rate that is far too large: the report says so, instead of falling over."""
    records = make_records({name: {"a": [None, None], "b": [None, None]} for name in ("erm", "importance")})
    table = lodo_table(records)
    assert (table["n"] == 0).all()
    assert table["mean"].isna().all()
    assert (paired_differences(records, "importance")["n"] == 0).all()


def test_a_domain_on_which_all_networks_of_erm_failed():
    records = make_records(
        {"erm": {"a": [0.8, 0.9], "b": [None, None]}, "importance": {"a": [0.7, 0.7], "b": [0.5, 0.6]}}
    )
    table = lodo_table(records)
    assert row(table, "erm", "b")["n"] == 0
    assert row(table, "erm", AVERAGE)["n"] == 0
    assert_interval(row(table, "importance", AVERAGE), [0.6, 0.65])


def test_paired_differences_by_hand():
    table = paired_differences(make_records(HAND), "importance")
    assert table.columns.tolist() == ["holdout", "n", "mean", "low", "high"]
    table = table.assign(algorithm="difference")
    assert_interval(row(table, "difference", "art"), [0.05, 0.05, 0.2])
    assert_interval(row(table, "difference", "photo"), [-0.2, -0.3, -0.4])
    assert_interval(row(table, "difference", "sketch"), [0.3, 0.5, 0.4])
    assert_interval(row(table, "difference", AVERAGE), [0.15 / 3, 0.25 / 3, 0.2 / 3])
    assert_interval(row(table, "difference", WITHOUT_HARDEST), [-0.15 / 2, -0.25 / 2, -0.2 / 2])


def test_differences_are_paired_by_seed_number_not_by_position():
    records = make_records(HAND)
    shuffled = [records[i] for i in np.random.default_rng(0).permutation(len(records))]
    found = paired_differences(shuffled, "importance").set_index("holdout").sort_index()
    pd.testing.assert_frame_equal(found, paired_differences(records, "importance").set_index("holdout").sort_index())


def test_the_sign_is_algorithm_minus_baseline():
    records = make_records(HAND)
    forward = paired_differences(records, "importance", "erm").set_index("holdout")["mean"]
    backward = paired_differences(records, "erm", "importance").set_index("holdout")["mean"]
    pd.testing.assert_series_equal(forward, -backward)
    assert (paired_differences(records, "erm")["mean"] == 0).all()


def test_wide_table_text():
    tidy = pd.DataFrame(
        [
            ("erm", "sketch", 3, 0.71234, 0.70234, 0.72234),
            ("erm", "art", 3, 0.5, 0.475, 0.525),
            ("importance", "sketch", 1, 0.666, np.nan, np.nan),
            ("importance", "art", 2, 1.0, 1.0, 1.0),
        ],
        columns=["algorithm", "holdout", "n", "mean", "low", "high"],
    )
    wide = wide_table(tidy)
    assert wide.index.tolist() == ["erm", "importance"]
    assert wide.columns.tolist() == ["sketch", "art"]  # in the order of the table
    assert wide.loc["erm"].tolist() == ["71.2 ± 1.0", "50.0 ± 2.5"]
    assert wide.loc["importance"].tolist() == ["66.6", "100.0 ± 0.0"]


def test_wide_table_ends_with_the_averages():
    columns = wide_table(lodo_table(make_records(HAND))).columns.tolist()
    assert columns == ["art", "photo", "sketch", AVERAGE, WITHOUT_HARDEST]


def test_levels():
    chance, majority = levels({"art": {"dog": 3, "cat": 1, "bee": 0}, "photo": {"dog": 2, "cat": 2, "bee": 2}})
    assert chance == pytest.approx(1 / 3)
    assert majority == {"art": 0.75, "photo": pytest.approx(1 / 3)}
