"""Paired comparisons, against counting by hand, definitions tried out in full, and simulated studies."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, example, given, settings
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
    ranks = [Fraction(sum(s < size for s in sizes) * 2 + sizes.count(size) + 1, 2) for size in sizes]
    observed = sum(r for r, v in zip(ranks, values, strict=True) if v > 0)
    null = [sum(itertools.compress(ranks, signs)) for signs in itertools.product([0, 1], repeat=len(ranks))]
    tails = [sum(w <= observed for w in null), sum(w >= observed for w in null)]
    return min(1.0, 2 * min(tails) / len(null))


def test_the_interval_of_two_values_is_between_them():
    # the mean of a resample is low, middle or high with probability 1/4, 1/2, 1/4
    assert bootstrap_interval([0.0, 1.0]) == (0, 1)
    assert bootstrap_interval([0.0, 1.0], confidence=0.4) == (0.5, 0.5)


def test_the_interval_agrees_with_all_resamples_of_five_values():
    values = np.array([-0.031, 0.004, 0.011, 0.019, 0.043])
    means = np.array([np.mean(draw) for draw in itertools.product(values, repeat=5)])
    for confidence in (0.5, 0.9, 0.95):
        wanted = np.percentile(means, [50 - 50 * confidence, 50 + 50 * confidence])
        np.testing.assert_allclose(bootstrap_interval(values, confidence, resamples=200_000), wanted, atol=5e-4)


@pytest.mark.parametrize(("confidence", "seed"), [(0.95, 0), (0.9, 0), (0.95, 7)])
def test_the_interval_is_that_of_resampling_in_a_plain_loop(confidence, seed):
    values = np.random.default_rng(1).normal(0.01, 0.02, 20).round(6)
    rng, resamples = np.random.default_rng(seed), 2001  # more than are held in memory at once
    means = sorted(np.mean([values[i] for i in rng.integers(0, 20, 20)]) for _ in range(resamples))
    # 2000 gaps between the sorted means, so that these percentiles fall on them
    cut = round(2000 * (1 - confidence) / 2)
    wanted = (means[cut], means[2000 - cut])
    assert bootstrap_interval(values, confidence, resamples, seed) == pytest.approx(wanted, abs=1e-12)


def test_the_interval_is_the_same_every_time():
    values = np.random.default_rng(2).normal(0, 0.02, 33)
    once = bootstrap_interval(values, resamples=500)
    np.random.seed(5)  # the global generator has no say
    assert bootstrap_interval(values, resamples=500) == once
    assert bootstrap_interval(values, resamples=500, seed=1) != once


def test_intervals_of_two_confidences_are_nested():
    values = np.random.default_rng(3).normal(0, 0.02, 12)
    outer, inner = bootstrap_interval(values, 0.95), bootstrap_interval(values, 0.9)
    assert outer[0] < inner[0] < values.mean() < inner[1] < outer[1]


def test_too_few_or_equal_values():
    for values in ([], [0.1], [NAN, 0.1], [NAN, NAN]):
        assert np.isnan(bootstrap_interval(values)).tolist() == [True, True]
    for value in (0.1, 0.0, -0.3):
        assert bootstrap_interval([value] * 7) == (value, value)


def test_wilcoxon_counted_by_hand():
    # of the 32 subsets of the ranks 1 … 5, ten have a sum of at most 5
    assert wilcoxon_p([0.01, 0.02, 0.03, 0.04, -0.05]) == 20 / 32
    assert wilcoxon_p([0.01, 0.02, 0.03, 0.04, 0.05]) == 2 / 32
    assert wilcoxon_p([0.02] * 5) == 2 / 32  # ties stay exact in a small sample
    assert wilcoxon_p([0.02]) == 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-6, 6), min_size=1, max_size=9))
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


def test_wilcoxon_without_a_difference_or_without_values():
    assert wilcoxon_p([0.0, 0.0, 0.0]) == 1
    assert wilcoxon_p([0.0]) == 1
    assert math.isnan(wilcoxon_p([]))
    assert math.isnan(wilcoxon_p([NAN]))


def test_rounding_of_averages_is_no_difference():
    noise = 0.1 + 0.2 - 0.3
    assert noise != 0
    assert wilcoxon_p([noise] * 8) == 1
    assert verdict([noise, 2 * noise] * 4).text == "no difference larger than 0.5 points"
    assert wilcoxon_p([0.1 + 0.2, -0.3, 0.2]) == wilcoxon_p([0.3, -0.3, 0.2]) == 1


@given(st.lists(st.floats(-0.2, 0.2), min_size=1, max_size=20))
@settings(max_examples=40, deadline=None)
def test_the_sign_of_the_contrast_does_not_change_p(values):
    p = wilcoxon_p(values)
    assert 0 < p <= 1
    assert wilcoxon_p([-v for v in values]) == pytest.approx(p, abs=1e-12)


def test_holm_by_hand():
    # sorted .005 .01 .03 .04, times 4 3 2 1: .02 .03 .06 .04, and the last may not fall below .06
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02], rtol=1e-12)
    np.testing.assert_allclose(holm([0.6, 0.5]), [1, 1])
    np.testing.assert_allclose(holm([0.03]), [0.03])
    assert holm([]).shape == (0,)


def test_what_could_not_be_tested_does_not_count():
    np.testing.assert_allclose(holm([0.01, NAN, 0.04]), [0.02, NAN, 0.04])
    assert np.isnan(holm([NAN, NAN])).all()


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


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.sampled_from([0.01, 0.05, 0.2]))
@settings(max_examples=100, deadline=None)
def test_holm_rejects_what_stepping_down_rejects(p_values, alpha):
    adjusted = holm(p_values)
    assume((np.abs(adjusted - alpha) > 1e-9).all())
    rejected = set()
    for step, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if p_values[i] > alpha / (len(p_values) - step):
            break
        rejected.add(i)
    assert set(np.flatnonzero(adjusted <= alpha)) == rejected


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


def test_the_number_of_seeds_keeps_its_promise_in_simulation():
    n = seeds_needed(planted(0, 0.02, 40), 0.01)
    samples = np.random.default_rng(4).normal(0.01, 0.02, (20_000, n))
    assert np.mean(stats.ttest_1samp(samples, 0, axis=1).pvalue < 0.05) == pytest.approx(0.8, abs=0.02)


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
    "arguments",
    [(0,), (-1,), (NAN,), (0.1, 0.05, 1.0), (0.1, 0.0, 0.8), (0.1, 0.05, 0.01)],
)
def test_numbers_of_seeds_that_make_no_sense(arguments):
    with pytest.raises(ValueError):
        seeds_needed([0.1, 0.2], *arguments)


@pytest.mark.parametrize(
    ("values", "margin", "text"),
    [
        (planted(0.02, 0.02, 100), 0.005, "helps"),
        (planted(-0.02, 0.02, 100), 0.005, "hurts"),
        (planted(0.001, 0.002, 200), 0.005, "helps"),  # shown, though smaller than the margin
        (planted(-0.001, 0.002, 200), 0.005, "hurts"),
        (planted(0.0, 0.002, 200), 0.005, "no difference larger than 0.5 points"),
        (planted(0.0, 0.002, 200), 0.01, "no difference larger than 1 point"),
        (planted(0.0, 0.002, 200), 0.0025, "no difference larger than 0.25 points"),
        (planted(0.0, 0.02, 30), 0.004, "undecided (about 199 seeds would decide)"),
        ([0.0, 0.0, 0.0], 0.005, "no difference larger than 0.5 points"),
        ([0.001] * 3, 0.005, "helps"),
        ([0.1], 0.005, "undecided (two seeds or more are needed)"),
        ([], 0.005, "undecided (two seeds or more are needed)"),
    ],
)
def test_verdicts(values, margin, text):
    assert verdict(values, margin).text == text


def test_a_verdict_does_not_promise_what_the_seeds_there_are_did_not_keep():
    values = planted(0.0028, 0.025, 220)  # the interval has zero and the margin in it, with more seeds than needed
    answer = verdict(values)
    assert answer.seeds_needed == seeds_needed(values, 0.005) == 199
    assert answer.text == "undecided (about 199 seeds usually decide, these 220 did not)"


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
    assert Verdict(2, 0.0, interval95, interval90, 1.0, 40, 0.005).text.startswith(text)


def test_a_verdict_holds_its_numbers():
    values = np.random.default_rng(6).normal(0.003, 0.02, 40)
    answer = verdict([*values, NAN], margin=0.004, resamples=300, seed=2)
    assert answer.n == 40
    assert answer.mean == pytest.approx(values.mean(), abs=1e-12)
    assert answer.interval95 == bootstrap_interval(values, 0.95, 300, 2)
    assert answer.interval90 == bootstrap_interval(values, 0.9, 300, 2)
    assert answer.p == wilcoxon_p(values)
    assert answer.seeds_needed == seeds_needed(values, 0.004)
    one = verdict([0.1])
    assert (one.n, one.mean, one.p, one.seeds_needed) == (1, 0.1, 1, None)
    assert np.isnan([*one.interval95, *one.interval90, verdict([]).mean, verdict([]).p]).all()


@pytest.mark.parametrize(
    "call",
    [
        lambda: verdict([0.1, 0.2], margin=0),
        lambda: wilcoxon_p([[0.1], [0.2]]),
        lambda: bootstrap_interval([0.1, np.inf]),
        lambda: bootstrap_interval([0.1, 0.2], confidence=95),
        lambda: bootstrap_interval([0.1, 0.2], resamples=0),
        lambda: holm([0.5, 1.1]),
        lambda: holm([-0.1]),
        lambda: holm([[0.5]]),
        lambda: seeds_needed([0.1, NAN], 0.01),
    ],
)
def test_what_makes_no_sense_is_an_error(call):
    with pytest.raises(ValueError):
        call()


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
        assert (row.low, row.high, row.p, row.verdict) == (*alone.interval95, alone.p, alone.text)
    # three tests were made, not four
    assert table.loc[0, "p_holm"] == pytest.approx(3 * table.loc[0, "p"])
    assert math.isnan(table.loc[2, "p_holm"])
    assert table.loc[3, "p_holm"] == 1


def test_choices_reach_every_contrast_and_an_empty_family_is_a_table():
    values = np.random.default_rng(9).normal(0, 0.02, 30)
    row = family({"a": values}, margin=0.1, resamples=50, seed=3).iloc[0]
    assert row["verdict"] == "no difference larger than 10 points"
    assert (row["low"], row["high"]) == bootstrap_interval(values, resamples=50, seed=3)
    assert family({}).shape == (0, 8)


def studies(mean, sd=0.02, seeds=SEEDS, count=STUDIES):
    return np.random.default_rng(10).normal(mean, sd, (count, seeds))


@pytest.mark.parametrize("mean", [0.0, 0.004])
def test_the_interval_covers_the_truth(mean):
    """Under mean 0 this is the rate of true nulls kept. 94 % is expected at 50 seeds, ± 1.2 % for 400 studies."""
    bounds = np.array([bootstrap_interval(study, resamples=1000) for study in studies(mean)])
    assert 0.91 <= np.mean((bounds[:, 0] <= mean) & (mean <= bounds[:, 1])) <= 0.98


@pytest.mark.parametrize(("n", "wanted"), [(5, 0.83), (10, 0.9)])
def test_the_interval_of_few_seeds_is_as_short_as_it_says(n, wanted):
    bounds = np.array([bootstrap_interval(s, resamples=500) for s in studies(0, seeds=n, count=1500)])
    assert np.mean((bounds[:, 0] <= 0) & (bounds[:, 1] >= 0)) == pytest.approx(wanted, abs=0.025)


def test_a_planted_effect_is_found_and_none_is_made_up():
    texts = [verdict(study, resamples=500).text for study in studies(0.0)]
    found = np.mean([text in ("helps", "hurts") for text in texts])
    assert 0.02 <= found <= 0.09
    for effect, word in ((0.012, "helps"), (-0.012, "hurts")):
        texts = [verdict(study, resamples=500).text for study in studies(effect, count=100)]
        assert np.mean([text == word for text in texts]) >= 0.95


def test_equivalence_is_rarely_claimed_of_a_difference_as_large_as_the_margin():
    """Two one-sided tests at 5 %, at their border; and at zero, with a small spread, it is claimed."""
    texts = [verdict(study, margin=0.004, resamples=500).text for study in studies(0.004, sd=0.012)]
    assert np.mean([text.startswith("no difference") for text in texts]) <= 0.09
    texts = [verdict(study, margin=0.004, resamples=500).text for study in studies(0.0, sd=0.005, count=100)]
    assert np.mean([text.startswith("no difference") for text in texts]) >= 0.85


def test_wilcoxon_keeps_its_level_on_rounded_accuracies():
    """Steps of 1/400 images give zeros and ties."""
    rounded = np.round(studies(0.0, sd=0.004) * 400) / 400
    assert 0.02 <= np.mean([wilcoxon_p(study) <= 0.05 for study in rounded]) <= 0.09


def test_holm_keeps_the_error_of_the_family():
    """Six arms without effect against one baseline: the contrasts depend on each other."""
    rng = np.random.default_rng(11)
    accuracy = rng.normal(0, 0.015, (STUDIES, 7, SEEDS))
    p_values = np.array([[wilcoxon_p(study[i] - study[0]) for i in range(1, 7)] for study in accuracy])
    raw = np.mean((p_values <= 0.05).any(axis=1))
    adjusted = np.mean([(holm(row) <= 0.05).any() for row in p_values])
    assert adjusted <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / STUDIES)
    assert adjusted < 0.09 < raw  # uncorrected, the same tests fail the family


def test_holm_still_finds_the_one_effect_among_nulls():
    rng = np.random.default_rng(12)
    found = []
    for _ in range(60):
        table = family({str(i): rng.normal(0.015 * (i == 2), 0.02, SEEDS) for i in range(6)}, resamples=100)
        found.append(table.loc[2, "p_holm"] <= 0.05)
    assert np.mean(found) >= 0.9
