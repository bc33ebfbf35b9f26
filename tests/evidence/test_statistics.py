"""Paired comparisons, against counting by hand, definitions tried out in full, and simulated studies."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from evidence import bootstrap_interval, family, holm, seeds_needed, verdict, wilcoxon_p
from evidence.statistics import Verdict

NAN = float("nan")
STUDIES, SEEDS = 400, 50


def planted(mean, sd, n):
    """Differences with exactly this mean and (n - 1) standard deviation: half on either side. n is even."""
    return mean + sd * math.sqrt((n - 1) / n) * np.tile([-1.0, 1.0], n // 2)


def sign_flips(values):
    """Wilcoxon's p by definition: every choice of signs is as likely, ranks are shared, zeros are left out."""
    values = [v for v in values if v != 0]
    sizes = [abs(v) for v in values]
    ranks = [2 * sum(s < size for s in sizes) + sizes.count(size) + 1 for size in sizes]  # doubled: whole numbers
    observed = sum(r for r, v in zip(ranks, values, strict=True) if v > 0)
    null = np.array(list(itertools.product([0, 1], repeat=len(ranks)))) @ np.array(ranks, dtype=int)
    return min(1.0, 2 * min(np.mean(null <= observed), np.mean(null >= observed)))


def test_the_interval_of_two_values_is_between_them():
    # the mean of a resample is low, middle or high with probability 1/4, 1/2, 1/4
    assert bootstrap_interval([0.0, 1.0]) == (0, 1)
    assert bootstrap_interval([0.0, 1.0], confidence=0.4) == (0.5, 0.5)


@pytest.mark.parametrize(("confidence", "seed"), [(0.95, 0), (0.9, 0), (0.95, 7)])
def test_the_interval_is_that_of_resampling_in_a_plain_loop(confidence, seed):
    values = np.random.default_rng(1).normal(0.01, 0.02, 20).round(6)
    rng, resamples = np.random.default_rng(seed), 2001  # more than are held in memory at once
    means = sorted(np.mean([values[i] for i in rng.integers(0, 20, 20)]) for _ in range(resamples))
    # 2000 gaps between the sorted means, so that these percentiles fall on them
    cut = round(2000 * (1 - confidence) / 2)
    wanted = (means[cut], means[2000 - cut])
    assert bootstrap_interval(values, confidence, resamples, seed) == pytest.approx(wanted, abs=1e-12)


def test_too_few_or_equal_values():
    for values in ([], [0.1], [NAN, 0.1], [NAN, NAN]):
        assert np.isnan(bootstrap_interval(values)).tolist() == [True, True]
    for value in (0.1, 0.0, -0.3):
        assert bootstrap_interval([value] * 7) == (value, value)


@pytest.mark.parametrize(
    ("values", "p"),
    [
        ([0.01, 0.02, 0.03, 0.04, -0.05], 20 / 32),  # ten of the 32 subsets of the ranks 1 … 5 have a sum up to 5
        ([0.01, 0.02, 0.03, 0.04, 0.05], 2 / 32),
        ([0.02] * 5, 2 / 32),  # ties stay exact in a small sample
        ([0.02], 1),
        ([0.0, 0.0, 0.0], 1),
        ([], NAN),
        ([NAN], NAN),
    ],
)
def test_wilcoxon_counted_by_hand(values, p):
    assert wilcoxon_p(values) == pytest.approx(p, abs=0, nan_ok=True)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-6, 6), min_size=1, max_size=7))
@example([0, 0, 3])
@example([1, -1])
def test_wilcoxon_is_its_definition(steps):
    assert wilcoxon_p(np.array(steps) / 1000) == pytest.approx(sign_flips(steps), abs=1e-12)


def test_wilcoxon_of_more_values_is_exact_without_ties():
    values = np.where(np.arange(1, 21) % 4 == 0, -1, 1) * np.arange(1, 21) / 1000
    counts = [1]  # of subsets of the ranks so far, by their sum
    for rank in range(1, 21):
        counts = [a + b for a, b in zip(counts + [0] * rank, [0] * rank + counts, strict=True)]
    lost = sum(range(4, 21, 4))
    assert wilcoxon_p(values) == pytest.approx(2 * sum(counts[: lost + 1]) / 2**20, abs=1e-12)


@pytest.mark.parametrize("n", [14, 60])
def test_wilcoxon_with_many_ties_is_the_normal_approximation(n):
    values = np.full(n, 0.01)
    values[: n // 3] = -0.01
    rank = (n + 1) / 2
    variance = n * (n + 1) * (2 * n + 1) / 24 - (n**3 - n) / 48
    z = (rank * (n - n // 3) - n * (n + 1) / 4) / math.sqrt(variance)
    assert wilcoxon_p(values) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=1e-9)


def test_rounding_of_averages_is_no_difference():
    noise = 0.1 + 0.2 - 0.3
    assert noise != 0
    assert wilcoxon_p([noise] * 8) == 1
    assert verdict([noise, 2 * noise] * 5).text == "no difference larger than 0.5 points"
    assert wilcoxon_p([0.1 + 0.2, -0.3, 0.2]) == wilcoxon_p([0.3, -0.3, 0.2]) == 1


@given(st.lists(st.floats(-0.2, 0.2), min_size=1, max_size=20))
@settings(max_examples=20, deadline=None)
def test_the_sign_of_the_contrast_does_not_change_p(values):
    p = wilcoxon_p(values)
    assert 0 < p <= 1
    assert wilcoxon_p([-v for v in values]) == pytest.approx(p, abs=1e-12)


@pytest.mark.parametrize(
    ("p_values", "adjusted"),
    [
        # sorted .005 .01 .03 .04, times 4 3 2 1: .02 .03 .06 .04, and the last may not fall below .06
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        ([0.6, 0.5], [1, 1]),
        ([0.03], [0.03]),
        ([], []),
        ([0.01, NAN, 0.04], [0.02, NAN, 0.04]),  # what could not be tested does not count
        ([NAN, NAN], [NAN, NAN]),
    ],
)
def test_holm_by_hand(p_values, adjusted):
    np.testing.assert_allclose(holm(p_values), adjusted, rtol=1e-12)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6))
@settings(max_examples=100, deadline=None)
def test_holm_is_the_closed_test_with_bonferroni(numbers):
    """A hypothesis falls when Bonferroni rejects every set that holds it; its p is the largest of those sets'."""
    p_values = [number / 80 for number in numbers]
    members = range(len(p_values))
    sets = [s for size in range(1, len(p_values) + 1) for s in itertools.combinations(members, size)]
    bonferroni = {s: min(1, len(s) * min(p_values[i] for i in s)) for s in sets}
    wanted = [max(p for s, p in bonferroni.items() if i in s) for i in members]
    np.testing.assert_allclose(holm(p_values), wanted, rtol=1e-12)


def t_power(n, size, alpha):
    """Power by integrating over the sample's standard deviation, without the noncentral t distribution."""
    critical = stats.t.ppf(1 - alpha / 2, n - 1)
    share = (np.arange(20_000) + 0.5) / 20_000
    cut = critical * np.sqrt(stats.chi2.ppf(share, n - 1) / (n - 1))
    shift = size * math.sqrt(n)
    return np.mean(stats.norm.sf(cut - shift) + stats.norm.cdf(-cut - shift))


@pytest.mark.parametrize(
    ("sd", "effect", "alpha", "power"),
    [(0.02, 0.005, 0.05, 0.8), (0.02, 0.02, 0.05, 0.8), (0.01, 0.03, 0.05, 0.8), (0.03, 0.01, 0.01, 0.95)],
)
def test_the_number_of_seeds_is_the_smallest_that_suffices(sd, effect, alpha, power):
    n = seeds_needed(planted(0.1, sd, 30), effect, alpha, power)
    assert t_power(n, effect / sd, alpha) >= power > t_power(n - 1, effect / sd, alpha)


def test_known_numbers_of_seeds():
    # Cohen's tables: 34 pairs for half a standard deviation, 199 for a fifth (two-sided 5 %, power 80 %)
    assert seeds_needed(planted(0, 0.02, 40), 0.01) == 34
    assert seeds_needed(planted(0.3, 0.02, 40), 0.004) == 199


def test_the_fewest_seeds_are_two():
    assert seeds_needed([0.1] * 5, 0.005) == 2
    with np.errstate(all="raise"):
        assert seeds_needed([0.5] * 4, 0.005) == 2
    assert seeds_needed([0.1, 0.1 + 1e-9], 0.5) == 2
    assert seeds_needed(planted(0, 0.02, 4), 1e-5) > 3e7


def test_only_the_spread_of_valid_pairs_counts():
    values = [0.01, -0.02, 0.03, 0.005]
    wanted = seeds_needed(values, 0.005)
    assert seeds_needed([*values, NAN], 0.005) == seeds_needed([v + 0.2 for v in values], 0.005) == wanted


@pytest.mark.parametrize(
    ("values", "margin", "text"),
    [
        (planted(0.02, 0.02, 100), 0.005, "helps"),
        (planted(-0.02, 0.02, 100), 0.005, "hurts"),
        (planted(0.001, 0.002, 200), 0.005, "helps"),  # shown, though smaller than the margin
        (planted(0.0, 0.002, 200), 0.005, "no difference larger than 0.5 points"),
        (planted(0.0, 0.002, 200), 0.01, "no difference larger than 1 point"),
        (planted(0.0, 0.002, 200), 0.0025, "no difference larger than 0.25 points"),
        (planted(0.0, 0.02, 30), 0.004, "undecided (about 199 seeds would decide)"),
        ([0.0] * 10, 0.005, "no difference larger than 0.5 points"),
        ([0.001] * 10, 0.005, "helps"),
        ([0.0] * 9, 0.005, "too few seeds (9; a verdict needs 10)"),
        ([0.1] * 9 + [NAN], 0.005, "too few seeds (9; a verdict needs 10)"),
        ([], 0.005, "too few seeds (0; a verdict needs 10)"),
    ],
)
def test_verdicts(values, margin, text):
    assert verdict(values, margin).text == text


def test_a_verdict_does_not_promise_what_the_seeds_there_are_did_not_keep():
    values = planted(0.0028, 0.025, 220)  # the interval has zero and the margin in it, with more seeds than needed
    answer = verdict(values)
    assert answer.seeds_needed == seeds_needed(values, 0.005) == 199
    assert answer.text == "undecided (about 199 seeds usually decide)"


@pytest.mark.parametrize(
    ("interval95", "interval90", "text"),
    [
        ((0.0, 0.02), (0.001, 0.019), "undecided"),  # touching zero is not excluding it
        ((-0.02, 0.0), (-0.019, -0.001), "undecided"),
        ((1e-9, 0.02), (0.001, 0.019), "helps"),
        ((-0.02, -1e-9), (-0.019, -0.001), "hurts"),
        ((-0.006, 0.006), (-0.005, 0.005), "no difference"),  # the 90 % interval decides, bounds included
        ((-0.006, 0.006), (-0.0051, 0.005), "undecided"),
        ((-0.006, 0.006), (-0.005, 0.0051), "undecided"),
    ],
)
def test_the_borders_of_the_verdicts(interval95, interval90, text):
    assert Verdict(20, 0.0, interval95, interval90, 0.01, 0.04, 40, 0.005).text.startswith(text)


@pytest.mark.parametrize(("p_holm", "helps"), [(0.049, True), (0.05, False), (NAN, False)])
def test_a_difference_is_shown_by_the_interval_and_the_corrected_p_together(p_holm, helps):
    for sign, word in ((1, "helps"), (-1, "hurts")):
        bounds = tuple(sorted((sign * 0.01, sign * 0.03)))
        text = Verdict(20, sign * 0.02, bounds, bounds, 0.01, p_holm, 40).text
        assert text.startswith(word if helps else "undecided")


def test_a_verdict_holds_its_numbers():
    values = np.random.default_rng(6).normal(0.003, 0.02, 40)
    answer = verdict([*values, NAN], margin=0.004, resamples=300, seed=2)
    assert answer.n == 40
    assert answer.mean == pytest.approx(values.mean(), abs=1e-12)
    assert answer.interval95 == bootstrap_interval(values, 0.95, 300, 2)
    assert answer.interval90 == bootstrap_interval(values, 0.9, 300, 2)
    assert answer.p == answer.p_holm == wilcoxon_p(values)
    assert answer.seeds_needed == seeds_needed(values, 0.004)
    one = verdict([0.1])
    assert (one.n, one.mean, one.p, one.seeds_needed) == (1, 0.1, 1, None)
    assert np.isnan([*one.interval95, *one.interval90, verdict([]).mean, verdict([]).p]).all()


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (verdict, ([0.1, 0.2], 0)),
        (wilcoxon_p, ([[0.1], [0.2]],)),
        (bootstrap_interval, ([0.1, np.inf],)),
        (bootstrap_interval, ([0.1, 0.2], 95)),
        (bootstrap_interval, ([0.1, 0.2], 0.95, 0)),
        (holm, ([0.5, 1.1],)),
        (holm, ([-0.1],)),
        (holm, ([[0.5]],)),
        (seeds_needed, ([0.1, NAN], 0.01)),
        *((seeds_needed, ([0.1, 0.2], effect)) for effect in (0, -1, NAN)),
        *((seeds_needed, ([0.1, 0.2], 0.1, *levels)) for levels in ((0.05, 1.0), (0.0, 0.8), (0.05, 0.01))),
    ],
)
def test_what_makes_no_sense_is_an_error(function, arguments):
    with pytest.raises(ValueError):
        function(*arguments)


def test_a_family_is_its_contrasts_with_holm_across_them():
    rng = np.random.default_rng(8)
    better, same = rng.normal(0.02, 0.02, 30), rng.normal(0, 0.02, 30)
    gaps = same.copy()
    gaps[[3, 17]] = NAN
    table = family({"better": pd.Series(better), "gaps": gaps, "failed": [NAN] * 30, "none": np.zeros(30)})
    assert table.columns.tolist() == ["contrast", "n", "mean", "low", "high", "p", "p_holm", "verdict"]
    assert table["contrast"].tolist() == ["better", "gaps", "failed", "none"]
    assert table["n"].tolist() == [30, 28, 0, 30]
    assert table.loc[1, "mean"] == pytest.approx(np.delete(same, [3, 17]).mean())
    for row, values in zip(table.itertuples(), (better, np.delete(same, [3, 17])), strict=False):
        alone = verdict(values)
        assert (row.low, row.high, row.p) == (*alone.interval95, alone.p)
        assert row.verdict == replace(alone, p_holm=row.p_holm).text
    # three tests were made, not four
    assert table.loc[0, "p_holm"] == pytest.approx(3 * table.loc[0, "p"])
    assert math.isnan(table.loc[2, "p_holm"])
    assert table.loc[3, "p_holm"] == 1


def test_the_verdicts_of_a_family_follow_its_corrected_p():
    values = 0.01 * np.arange(1, 13) * np.where(np.isin(np.arange(12), [3, 5]), -1, 1)
    assert 0.01 < wilcoxon_p(values) < 0.05
    texts = [family({str(i): values for i in range(count)})["verdict"][0] for count in (1, 6)]
    assert texts[0] == "helps"
    assert texts[1].startswith("undecided")


def test_choices_reach_every_contrast_and_an_empty_family_is_a_table():
    values = np.random.default_rng(9).normal(0, 0.02, 30)
    row = family({"a": values}, margin=0.1, resamples=50, seed=3).iloc[0]
    assert row["verdict"] == "no difference larger than 10 points"
    assert (row["low"], row["high"]) == bootstrap_interval(values, resamples=50, seed=3)
    assert family({}).shape == (0, 8)


def studies(mean, sd=0.02, seeds=SEEDS, count=STUDIES):
    return np.random.default_rng(10).normal(mean, sd, (count, seeds))


def coverage(mean, **kinds):
    """Share of the studies whose interval holds the mean."""
    bounds = [bootstrap_interval(study, resamples=500) for study in studies(mean, **kinds)]
    return np.mean([low <= mean <= high for low, high in bounds])


def p_values(differences):
    """`wilcoxon_p` of many studies of 50 seeds at once."""
    found = stats.wilcoxon(differences, axis=-1, method="exact").pvalue
    assert found[0, 0] == pytest.approx(wilcoxon_p(differences[0, 0]), abs=1e-12)
    return found


def test_the_interval_covers_the_truth():
    """Of true nulls, so many are kept: 94 % is expected at 50 seeds, ± 1.2 % for 400 studies."""
    assert 0.91 <= coverage(0.0) <= 0.98


@pytest.mark.parametrize(("n", "wanted"), [(5, 0.83), (10, 0.9)])
def test_the_interval_of_few_seeds_is_as_short_as_it_says(n, wanted):
    assert coverage(0.0, seeds=n, count=1000) == pytest.approx(wanted, abs=0.025)


@pytest.mark.parametrize(
    ("mean", "sd", "count", "words", "least", "most"),
    [
        (0.012, 0.02, 100, "helps", 0.95, 1),
        (-0.012, 0.02, 100, "hurts", 0.95, 1),
        (0.004, 0.012, 200, "no difference", 0, 0.09),  # two one-sided tests at 5 %, at their border
        (0.0, 0.005, 100, "no difference", 0.85, 1),
    ],
)
def test_a_verdict_is_as_often_right_as_it_says(mean, sd, count, words, least, most):
    texts = [verdict(study, margin=0.004, resamples=500).text for study in studies(mean, sd, count=count)]
    assert least <= np.mean([text.startswith(words) for text in texts]) <= most


def test_wilcoxon_keeps_its_level_on_rounded_accuracies():
    """Steps of 1/400 images give zeros and ties."""
    rounded = np.round(studies(0.0, sd=0.004) * 400) / 400
    assert 0.02 <= np.mean([wilcoxon_p(study) <= 0.05 for study in rounded]) <= 0.09


def test_holm_keeps_the_error_of_the_family():
    """Six arms without effect against one baseline: the contrasts depend on each other."""
    accuracy = np.random.default_rng(11).normal(0, 0.015, (STUDIES, 7, SEEDS))
    p = p_values(accuracy[:, 1:] - accuracy[:, :1])
    adjusted = np.mean([(holm(row) <= 0.05).any() for row in p])
    assert adjusted <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / STUDIES)
    assert adjusted < 0.09 < np.mean((p <= 0.05).any(axis=1))  # uncorrected, the same tests fail the family


def test_holm_still_finds_the_one_effect_among_nulls():
    effects = 0.015 * (np.arange(6) == 2)[:, None]
    p = p_values(np.random.default_rng(12).normal(effects, 0.02, (60, 6, SEEDS)))
    assert np.mean([holm(row)[2] <= 0.05 for row in p]) >= 0.9
