"""Tables, intervals and paired differences, against scipy and cases worked out by hand."""

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


def test_t_interval_covers_as_often_as_it_says():
    values = np.random.default_rng(0).normal(1.0, 2.0, (1000, 5))
    hits = [low <= 1.0 <= high for _, low, high in map(t_interval, values)]
    assert np.mean(hits) == pytest.approx(0.95, abs=0.028)  # 4 standard errors


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 2, 3], (2, 2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5)),  # s = 1; from a table: t(97.5 %, 2) = 4.303
        ([0.5, 0.5, 0.5], (0.5, 0.5, 0.5)),
        ([0.7], (0.7, np.nan, np.nan)),
        ([], (np.nan, np.nan, np.nan)),
    ],
)
def test_t_interval_by_hand(values, expected):
    assert t_interval(values) == pytest.approx(expected, abs=1e-3, nan_ok=True)


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
def test_accuracy_table_puts_each_result_in_its_place(choice, shift):
    records = make_records(HAND, ("last", "val"))
    table = accuracy_table(records, **choice)
    assert table.index.tolist() == [0, 1, 2]
    assert table.shape == (3, 6)
    for algorithm, holdouts in HAND.items():
        for holdout, values in holdouts.items():
            assert table[algorithm, holdout].tolist() == pytest.approx([value + shift for value in values])
    assert row(lodo_table(records, **choice), "erm", "photo")["mean"] == pytest.approx(0.6 + shift)
    difference = paired_differences(records, "importance", **choice).set_index("holdout")
    assert difference.loc["sketch", "mean"] == pytest.approx(0.4)


@pytest.mark.parametrize("function", [accuracy_table, lodo_table])
def test_an_unknown_selection_is_an_error(function):
    with pytest.raises(ValueError, match="'best'"):
        function(make_records(HAND), selection="best")
    with pytest.raises(ValueError, match="'last'"):
        function([])


def without(algorithm, **what):
    """`HAND`'s records without some of an algorithm's."""
    what = {"algorithm": algorithm, **what}
    return [record for record in make_records(HAND) if not what.items() <= record.items()]


ERM_AVERAGE = {("erm", AVERAGE): [2.0 / 3, 1.9 / 3, 1.8 / 3]}
NONE = {name: {"a": [None, None], "b": [None, None]} for name in ("erm", "importance")}
CASES = {  # records, and what a row of `lodo_table` or `paired_differences` is an interval of
    "by hand": (
        make_records(HAND),
        {(name, holdout): values for name, holdouts in HAND.items() for holdout, values in holdouts.items()}
        | ERM_AVERAGE
        | {
            ("importance", AVERAGE): [2.15 / 3, 2.15 / 3, 2.0 / 3],
            ("erm", WITHOUT_HARDEST): [0.7, 0.75, 0.65],  # sketch goes, where erm is worst,
            ("importance", WITHOUT_HARDEST): [1.25 / 2, 1.25 / 2, 1.1 / 2],  # although importance is worst on photo
            ("difference", "art"): [0.05, 0.05, 0.2],
            ("difference", "photo"): [-0.2, -0.3, -0.4],
            ("difference", "sketch"): [0.3, 0.5, 0.4],
            ("difference", AVERAGE): [0.15 / 3, 0.25 / 3, 0.2 / 3],
            ("difference", WITHOUT_HARDEST): [-0.15 / 2, -0.25 / 2, -0.2 / 2],
        },
    ),
    "averages are taken within seeds": (
        make_records({"erm": {"a": [0.4, 0.6], "b": [0.4, 0.6]}}),
        {("erm", AVERAGE): [0.4, 0.6]},
    ),
    "same means, other intervals; n counts seeds, never seeds × domains": (
        make_records({"erm": {"a": [0.4, 0.6], "b": [0.6, 0.4]}}),
        {("erm", AVERAGE): [0.5, 0.5]},
    ),
    "two domains": (
        make_records({"erm": {"a": [0.8, 0.9], "b": [0.3, 0.5]}, "importance": {"a": [0.1, 0.2], "b": [0.6, 0.8]}}),
        {
            ("erm", WITHOUT_HARDEST): [0.8, 0.9],
            ("importance", WITHOUT_HARDEST): [0.1, 0.2],
            ("importance", AVERAGE): [0.35, 0.5],
        },
    ),
    "without erm the hardest is worst for all together": (
        make_records({"x": {"a": [0.5, 0.5], "b": [0.4, 0.4]}, "y": {"a": [0.1, 0.1], "b": [0.9, 0.9]}}),
        {("x", WITHOUT_HARDEST): [0.4, 0.4], ("y", WITHOUT_HARDEST): [0.9, 0.9]},
    ),
    "a failed network leaves out its seed's averages and its pair": (
        make_records(FAILED),
        ERM_AVERAGE  # erm's own networks are sound
        | {
            ("importance", "photo"): [0.3, 0.2],
            ("importance", "art"): [0.95, 0.85, 0.9],
            ("importance", AVERAGE): [2.15 / 3, 2.0 / 3],
            ("difference", "photo"): [-0.2, -0.4],
            ("difference", "art"): [0.05, 0.05, 0.2],
            ("difference", AVERAGE): [0.15 / 3, 0.2 / 3],
            ("difference", WITHOUT_HARDEST): [-0.15 / 2, -0.2 / 2],
        },
    ),
    "seeds that one algorithm lacks are left out of the pairs": (
        without("erm", seed=2),
        {("difference", "art"): [0.05, 0.05], ("difference", AVERAGE): [0.15 / 3, 0.25 / 3]},
    ),
    "no average over fewer, maybe easier, domains": (
        without("importance", holdout="sketch"),
        ERM_AVERAGE | {("importance", AVERAGE): []},
    ),
    "all networks of erm failed on a domain": (
        make_records({"erm": {"a": [0.8, 0.9], "b": [None] * 2}, "importance": {"a": [0.7, 0.7], "b": [0.5, 0.6]}}),
        {("erm", "b"): [], ("erm", AVERAGE): [], ("importance", AVERAGE): [0.6, 0.65]},
    ),
    "all networks failed": (
        make_records(NONE),
        {(name, holdout): [] for name in (*NONE, "difference") for holdout in ("a", "b", AVERAGE, WITHOUT_HARDEST)},
    ),
}


@pytest.mark.parametrize(("records", "expected"), CASES.values(), ids=CASES)
def test_intervals_of_tables(records, expected):
    columns = ["algorithm", "holdout", "n", "mean", "low", "high"]
    shuffled = [records[i] for i in np.random.default_rng(0).permutation(len(records))]
    for each in (records, shuffled):  # paired by seed, not by position
        table = lodo_table(each)
        assert table.columns.tolist() == columns
        assert len(table) == len({r["algorithm"] for r in records}) * (2 + len({r["holdout"] for r in records}))
        if any(name == "difference" for name, _ in expected):
            differences = paired_differences(each, "importance")
            assert differences.columns.tolist() == columns[1:]
            table = pd.concat([table, differences.assign(algorithm="difference")])
        for place, values in expected.items():
            found = row(table, *place)
            if values:
                assert_interval(found, values)
            else:
                assert found["n"] == 0
                assert found[["mean", "low", "high"]].isna().all()


def test_one_holdout_alone_has_an_average_and_none_without_it():
    table = lodo_table(make_records({"erm": {"a": [0.8, 0.9]}}))
    assert table["holdout"].tolist() == ["a", AVERAGE]
    assert_interval(row(table, "erm", AVERAGE), [0.8, 0.9])


def test_a_single_seed_has_no_interval():
    table = lodo_table(make_records({"erm": {"a": [0.8], "b": [0.6]}}))
    assert table["n"].tolist() == [1] * 4
    assert row(table, "erm", AVERAGE)["mean"] == pytest.approx(0.7)
    assert table[["low", "high"]].isna().all(axis=None)


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
    assert wide.columns.tolist() == ["seeds", "sketch", "art"]  # in the order of the table
    assert wide.loc["erm"].tolist() == [3, "71.2 ± 0.2", "50.0 ± 0.6"]  # t of two degrees of freedom: 4.303
    assert wide.loc["importance"].tolist() == [2, "66.6", "100.0 ± 0.0"]
    assert wide_table(tidy.assign(n=3)).columns.tolist() == ["sketch", "art"]


def test_wide_table_ends_with_the_averages():
    columns = wide_table(lodo_table(make_records(HAND))).columns.tolist()
    assert columns == ["art", "photo", "sketch", AVERAGE, WITHOUT_HARDEST]


def test_levels():
    chance, majority = levels({"art": {"dog": 3, "cat": 1, "bee": 0}, "photo": {"dog": 2, "cat": 2, "bee": 2}})
    assert chance == pytest.approx(1 / 3)
    assert majority == {"art": 0.75, "photo": pytest.approx(1 / 3)}
