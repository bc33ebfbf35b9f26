"""Families with few repeats, non-inferiority, letters, and the trend of the best cut."""

from itertools import combinations, product

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from transfer.inference import (
    LEVEL,
    best_cuts,
    best_shares,
    compact_letters,
    falling_p,
    greater_p,
    letters_table,
    lowest_p,
    noninferiority,
    paired_family,
    rank_correlations,
    trend,
)


def around(mean, n=12, sd=0.002):
    """Differences of this very mean, without ties."""
    values = np.random.default_rng(n).normal(0, sd, n)
    return values - values.mean() + mean


@pytest.mark.parametrize(("n", "size"), [(5, 30), (10, 30), (11, 30), (5, 1), (6, 1)])
def test_equal_repeats_can_reject_if_the_first_step_of_holm_can(n, size):
    lowest = lowest_p([n] * size)
    assert (lowest == lowest[0]).all()
    assert (lowest[0] < LEVEL) == (2 / 2**n < LEVEL / size)


def test_the_lowest_corrected_p_is_reached_by_differences_that_all_have_one_sign():
    repeats = [25, 12, 12, 5, 0]
    differences = {str(i): np.linspace(0.1, 0.2, n) for i, n in enumerate(repeats)}
    table = paired_family(differences)
    np.testing.assert_allclose(table["lowest_p"], table["p_holm"])
    assert table["lowest_p"].iloc[3] == 2 / 2**5
    assert np.isnan(table["lowest_p"].iloc[4])


def test_verdicts_say_that_few_repeats_cannot_reject_whatever_the_difference():
    table = paired_family({"many": around(0.05), "few": around(0.05, 5), "equal": around(0, 5, 1e-4), "none": [np.nan]})
    assert table["verdict"].tolist() == ["helps", *["cannot reject with 5 repeats"] * 2, "no pairs"]
    alone = paired_family({"few": around(0.05, 8)})
    assert alone["verdict"].tolist() == ["too few repeats (8; a verdict needs 10)"]
    assert paired_family({"a": around(0.001, sd=0.05)})["verdict"].str.contains("repeats would decide").all()


@pytest.mark.parametrize("mean", [-0.001, 0.0, 0.001])
def test_one_sided_p_is_that_of_scipy(mean):
    values = around(mean)
    expected = stats.wilcoxon(values, alternative="greater", method="exact").pvalue
    assert greater_p(values) == pytest.approx(expected, abs=1e-12 if mean > 0 else 0.05)
    assert greater_p([*values, np.nan, 0.0]) == pytest.approx(greater_p(values))
    assert np.isnan(greater_p([]))


def test_no_worse_by_more_than_the_margin_needs_the_interval_above_it():
    found = noninferiority(
        {"same": around(0), "half": around(-0.005), "at": around(-0.01), "worse": around(-0.03), "few": around(0, 4)}
    )
    fine, beyond = "no worse by more than 1 point", "worse by more than 1 point"
    assert found["noninferior"].tolist() == [fine, fine, "undecided", beyond, "cannot reject with 4 repeats"]
    assert found["verdict"].iloc[1] == "hurts"  # it is worse, but by less than the margin
    wide = noninferiority({"worse": around(-0.03)}, margin=0.05)
    assert wide["noninferior"].tolist() == ["no worse by more than 5 points"]
    assert noninferiority({"none": [np.nan] * 12})["noninferior"].tolist() == ["no pairs"]


def test_two_share_a_letter_exactly_if_they_are_not_different():
    draw, names = np.random.default_rng(0), list("ABCDEFG")
    for share in np.linspace(0, 1, 40):
        different = [pair for pair in combinations(names, 2) if draw.random() < share]
        letters = compact_letters(names, different)
        for pair in combinations(names, 2):
            assert bool(set(letters[pair[0]]) & set(letters[pair[1]])) == (pair not in different)
        assert "a" in letters["A"]
        assert all(list(found) == sorted(found) for found in letters.values())
    assert compact_letters("xyz", [("x", "z")]) == {"x": "a", "y": "ab", "z": "b"}


def curve_of(*means, n=12, sd=0.002):
    """Accuracies of cuts 0, 1, … with these means; no two differences are tied."""
    return pd.DataFrame({cut: mean + np.random.default_rng(cut).normal(0, sd, n) for cut, mean in enumerate(means)})


def test_letters_of_cuts_begin_with_the_best_and_few_repeats_share_one():
    curve = curve_of(0.5, 0.8, 0.8)
    curve[2] = curve[1] + around(0)
    table = letters_table(curve).set_index("cut")
    assert table["letters"].to_dict() == {0: "b", 1: "a", 2: "a"}
    assert (table["lowest_p"] < LEVEL).all()
    few = letters_table(curve_of(0.5, 0.8, 0.9, n=5))
    assert few["letters"].tolist() == ["a"] * 3
    assert (few["lowest_p"] >= LEVEL).all()


def test_letters_pair_the_repeats_that_both_cuts_have():
    curve = curve_of(0.5, 0.8, 0.9)
    curve.loc[:4, 0] = np.nan
    table = letters_table(curve).set_index("cut")
    assert table["repeats"].to_dict() == {0: 7, 1: 12, 2: 12}
    assert table["letters"].to_dict() == {0: "c", 1: "b", 2: "a"}


def test_shares_of_the_best_are_those_of_all_resamples():
    curve = pd.DataFrame({0: [0.5, 0.9, 0.4], 1: [0.6, 0.6, 0.6], 4: [0.7, 0.3, 0.6]})
    values, wins = curve.to_numpy(), np.zeros(3)
    for rows in product(range(3), repeat=3):
        means = values[list(rows)].mean(axis=0).round(12)
        wins += (means == means.max()) / (means == means.max()).sum()
    found = best_shares(curve)
    np.testing.assert_allclose(found["share"], wins / 27, atol=0.015)
    assert found["cut"].tolist() == [0, 1, 4]
    assert found["share"].sum() == pytest.approx(1)


def test_equals_share_and_one_repeat_says_nothing():
    same = pd.DataFrame({0: [0.5, 0.6], 1: [0.5, 0.6], 2: [0.1, 0.2]})
    assert best_shares(same)["share"].tolist() == [0.5, 0.5, 0]
    assert best_shares(same.iloc[:1])["share"].isna().all()
    holes = same.assign(**{"3": [0.9, np.nan]})
    assert best_shares(holes)["repeats"].tolist() == [1] * 4


def test_the_best_cut_of_a_repeat_averages_ties_and_needs_every_cut_and_amount():
    small = pd.DataFrame({0: [0.1, 0.1, 0.9], 1: [0.2, 0.3, 0.1], 3: [0.2, 0.2, 0.1]})
    large = pd.DataFrame({0: [0.9, 0.9], 1: [0.2, np.nan], 2: [1.0, 1.0], 3: [0.1, 0.1]})
    found = best_cuts({1.0: large, 0.1: small})
    assert found.columns.tolist() == [0.1, 1.0]
    assert found.to_dict("index") == {
        0: {0.1: 2.0, 1.0: 0.0}
    }  # repeat 1 lacks a cut, 2 an amount; cut 2 is not in both


@pytest.mark.parametrize("scores", [[-3, -1, 2, 0, -2], [4, 4, -1], [0, 0], [-10] * 6, [1]])
def test_the_sign_flip_test_is_exact(scores):
    sums = [np.dot(signs, scores) for signs in product((-1, 1), repeat=len(scores))]
    assert falling_p(scores) == pytest.approx(np.mean(np.array(sums) <= sum(scores)))


def test_the_trend_is_a_test_of_one_claim():
    falling = pd.DataFrame([[4.0, 4.0, 1.0], [5.0, 3.0, 0.0]] * 6, columns=[0.001, 0.1, 1.0])
    found = trend(falling)
    assert found["verdict"] == "supported"
    assert found["tau"] == pytest.approx(np.mean([-2 / 3, -1]))
    assert found["p"] == pytest.approx(0.5**12)
    assert (found["first_cut"], found["last_cut"], found["repeats"]) == (4.5, 0.5, 12)
    assert found["low"] <= found["tau"] <= found["high"] < 0
    rising = trend(falling[[1.0, 0.1, 0.001]])
    assert rising["verdict"] == "contradicted"
    assert rising["p_rising"] == pytest.approx(0.5**12)
    still = trend(falling.assign(**{"a": 0, "b": 0})[["a", "b"]])
    assert (still["tau"], still["p"], still["verdict"]) == (0, 1, "undecided")


@pytest.mark.parametrize(("n", "verdict"), [(4, "cannot reject"), (5, "too few repeats"), (0, "no repeat")])
def test_a_trend_of_few_repeats_is_no_verdict(n, verdict):
    found = trend(pd.DataFrame({0.1: [3.0] * n, 1.0: [0.0] * n}, dtype=float))
    assert found["verdict"].startswith(verdict)
    assert np.isnan(found["tau"]) == (n == 0)


def test_rank_correlations_are_spearmans_of_each_repeat():
    draw = np.random.default_rng(0)
    first = pd.DataFrame(draw.random((4, 6)), columns=range(6))
    second = pd.DataFrame(draw.random((5, 5)).round(1), columns=range(1, 6))
    first.loc[1] = 0.5
    second.loc[2, 3] = np.nan
    found = rank_correlations(first, second)
    assert found.isna().tolist() == [False, True, True, False]
    for repeat in (0, 3):
        expected = stats.spearmanr(first.loc[repeat, 1:], second.loc[repeat]).statistic
        assert found[repeat] == pytest.approx(expected)
