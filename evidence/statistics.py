"""Paired comparisons over seeds: intervals, tests and verdicts on the accuracy differences of two arms.

`differences` is everywhere an array ``[n]`` of one accuracy difference per seed (arm minus baseline, on the same seed,
start and batches), as a fraction: 0.005 is half a point. NaN stands for a failed network and is left out; infinite
values, other shapes and arguments outside the ranges named are a ValueError. The same input always gives the same
output.

Seeds are the only thing repeated, so every answer is conditional on the images, the backbone and, where all seeds
share one, the split.
"""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import scipy  # loads scipy.stats, which takes half a second, when it is used
from numpy.typing import ArrayLike

from study import FEWEST_SEEDS, MARGIN

DECIMALS = 12  # of a fraction; far below one image in a million, far above the rounding of an average
LEVEL = 0.05  # of the corrected p
BATCH = 1000  # resamples held in memory at once
MOST_EXACT = 50  # non-zero differences without ties for which scipy's exact distribution is used
MOST_ENUMERATED = 13  # non-zero differences with ties whose 2**n signs are all tried


def _valid(differences: ArrayLike) -> np.ndarray:
    """The differences without NaN, rounded.

    Equal averages over holdouts can differ in their last bit: a difference of 1e-17 must count as zero, and two that
    differ by 1e-17 as tied.
    """
    values = np.asarray(differences, dtype=float)
    if values.ndim != 1:
        raise ValueError(f"Differences need one axis, the seeds; these have shape {values.shape}.")
    if np.isinf(values).any():
        raise ValueError("A difference is infinite.")
    return np.round(values[~np.isnan(values)], DECIMALS)


def bootstrap_interval(
    differences: ArrayLike, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over seeds (Efron & Tibshirani, 1993, chapter 13).

    With few seeds it is too short: for normal differences a 95 % interval covers the mean about 94 % of the time at
    50 seeds, 90 % at 10 and 83 % at 5. Student's t interval does not have this fault, but assumes normal differences.

    Args:
        differences: ``[n]``, fractions.
        confidence: in (0, 1).
        resamples: samples of n seeds drawn with replacement, at least 1.
        seed: of the resampling; intervals of two confidences from one seed are nested.

    Returns:
        (low, high), fractions: NaN for fewer than two values, the value itself twice where all are equal.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"The confidence is {confidence}; it must lie between 0 and 1.")
    if resamples < 1:
        raise ValueError(f"The number of resamples is {resamples}; it must be at least 1.")
    values = _valid(differences)
    if len(values) < 2:
        return float("nan"), float("nan")
    if np.ptp(values) == 0:  # the mean of equal values may differ from them in its last bit
        return float(values[0]), float(values[0])
    options = {"confidence_level": confidence, "n_resamples": resamples, "batch": BATCH, "method": "percentile"}
    low, high = scipy.stats.bootstrap((values,), np.mean, rng=seed, **options).confidence_interval
    return float(low), float(high)


def wilcoxon_p(differences: ArrayLike) -> float:
    """Two-sided p of the Wilcoxon signed-rank test: are the differences symmetric around zero? (Wilcoxon, 1945).

    Zeros are left out before ranking (scipy's ``zero_method="wilcox"``); tied sizes share their mean rank. The p is
    exact for up to 50 non-zero values without ties and, by enumerating all signs, for up to 13 with ties; otherwise it
    is the normal approximation, corrected for ties but not for continuity.

    Returns:
        p in [0, 1]; 1 if every difference is zero, NaN if there is none. It cannot fall below 2 / 2**n: five seeds or
        fewer never reach 0.05.
    """
    values = _valid(differences)
    if len(values) == 0:
        return float("nan")
    values = values[values != 0]
    if len(values) == 0:
        return 1.0
    tied = len(np.unique(np.abs(values))) < len(values)
    if not tied and len(values) <= MOST_EXACT:
        method = "exact"
    elif tied and len(values) <= MOST_ENUMERATED:
        # at least as many resamples as combinations of signs, so that scipy enumerates them instead of drawing
        method = scipy.stats.PermutationMethod(n_resamples=2**MOST_ENUMERATED)
    else:
        method = "asymptotic"
    return float(scipy.stats.wilcoxon(values, zero_method="wilcox", correction=False, method=method).pvalue)


def holm(p_values: ArrayLike) -> np.ndarray:
    """Holm–Bonferroni adjusted p-values of one family of tests (Holm, 1979, Scandinavian Journal of Statistics 6).

    Rejecting those that are at most α keeps the probability of any false rejection at or below α, however the tests
    depend on each other (contrasts that share an arm do).

    Args:
        p_values: ``[m]``; NaN marks a test that could not be made: it stays NaN and does not count.

    Returns:
        ``[m]`` in the order given, never below the p-value and never above 1.
    """
    p_values = np.asarray(p_values, dtype=float)
    if p_values.ndim != 1:
        raise ValueError(f"P-values need one axis, the tests; these have shape {p_values.shape}.")
    made = ~np.isnan(p_values)
    family_p = p_values[made]
    if ((family_p < 0) | (family_p > 1)).any():
        raise ValueError("A p-value is not between 0 and 1.")
    order = np.argsort(family_p, kind="stable")
    stepped = family_p[order] * np.arange(len(order), 0, -1)
    result = np.full_like(p_values, np.nan)
    result[np.flatnonzero(made)[order]] = np.minimum(np.maximum.accumulate(stepped), 1)
    return result


def _t_power(n: int, effect: float, alpha: float) -> float:
    """Power of the two-sided paired t-test at n pairs; `effect` in standard deviations of the differences."""
    critical, shift = scipy.stats.t.isf(alpha / 2, n - 1), effect * np.sqrt(n)
    return float(scipy.stats.nct.sf(critical, n - 1, shift) + scipy.stats.nct.cdf(-critical, n - 1, shift))


def seeds_needed(differences: ArrayLike, effect: float, alpha: float = 0.05, power: float = 0.8) -> int:
    """Fewest seeds at which a two-sided paired t-test detects a mean difference of `effect` with the given power.

    The smallest n whose exact power, from the noncentral t distribution, suffices (Cohen, 1988, chapter 2); the search
    starts from the normal approximation ((z_{1-α/2} + z_power)·sd/effect)².

    Args:
        differences: ``[n]``, fractions, at least two; only their standard deviation (n - 1) is used, which is itself
            uncertain: from 10 seeds the answer is good to a factor of about two.
        effect: mean difference to detect, a fraction above 0.
        alpha: level of the test.
        power: between alpha and 1.

    Returns:
        Total number of seeds; at least 2, and 2 if all differences are equal.
    """
    values = _valid(differences)
    if len(values) < 2:
        raise ValueError("The spread over seeds needs at least two of them.")
    if not effect > 0:
        raise ValueError(f"The effect is {effect}; it must be above 0.")
    if not 0 < alpha < power < 1:
        raise ValueError(f"Needed is 0 < alpha < power < 1, but alpha is {alpha} and power is {power}.")
    if np.ptp(values) == 0:
        return 2
    size = effect / values.std(ddof=1)
    normal = ((scipy.stats.norm.isf(alpha / 2) + scipy.stats.norm.ppf(power)) / size) ** 2
    candidates = range(2, 2 * int(normal) + 100)  # power grows with n, and is ample at the far end
    return candidates[bisect_left(candidates, power, key=lambda n: _t_power(n, size, alpha))]


@dataclass(frozen=True)
class Verdict:
    """What one contrast says.

    Attributes:
        n: seeds whose two networks are both valid.
        mean: of the differences, a fraction.
        interval95, interval90: bootstrap intervals of the mean, (low, high), fractions.
        p: of the Wilcoxon test, of this contrast alone.
        p_holm: the same, corrected for the family that the contrast belongs to; of a contrast alone equal to `p`.
        seeds_needed: to detect a difference as large as the margin with power 0.8; None for fewer than two seeds.
        margin: smallest difference of practical interest, a fraction.

    What cannot be computed from `n` values is NaN.
    """

    n: int
    mean: float
    interval95: tuple[float, float]
    interval90: tuple[float, float]
    p: float
    p_holm: float
    seeds_needed: int | None
    margin: float = MARGIN

    @property
    def text(self) -> str:
        """The verdict in words, differences in points; see `verdict` for the rule."""
        if self.n < FEWEST_SEEDS:
            return f"too few seeds ({self.n}; a verdict needs {FEWEST_SEEDS})"
        if self.p_holm < LEVEL and self.interval95[0] > 0:
            return "helps"
        if self.p_holm < LEVEL and self.interval95[1] < 0:
            return "hurts"
        if -self.margin <= self.interval90[0] and self.interval90[1] <= self.margin:
            size = f"{100 * self.margin:.6g}"
            return f"no difference larger than {size} {'point' if size == '1' else 'points'}"
        if self.seeds_needed > self.n:
            return f"undecided (about {self.seeds_needed} seeds would decide)"
        # of a true difference as large as the margin; a smaller one takes more
        return f"undecided (about {self.seeds_needed} seeds usually decide)"


def verdict(differences: ArrayLike, margin: float = MARGIN, resamples: int = 10_000, seed: int = 0) -> Verdict:
    """Summarize one contrast in numbers and words.

    In this order: "too few seeds" for fewer than `study.FEWEST_SEEDS`, where the bootstrap interval is too short;
    "helps" or "hurts" if the 95 % interval lies strictly on one side of zero and p, corrected for the contrast's
    family, is below 0.05; "no difference larger than …" if the 90 % interval lies within ±margin, bounds included,
    which is two one-sided tests at 5 % (Schuirmann, 1987, J. Pharmacokinetics and Biopharmaceutics 15); otherwise
    "undecided". A difference that is shown but smaller than the margin is "helps" or "hurts", and the interval says how
    small it is.

    Args:
        differences: ``[n]``, fractions.
        margin: smallest difference of practical interest, a fraction above 0.
        resamples, seed: of the bootstrap.
    """
    if not margin > 0:
        raise ValueError(f"The margin is {margin}; it must be above 0.")
    values = _valid(differences)
    intervals = (bootstrap_interval(values, confidence, resamples, seed) for confidence in (0.95, 0.9))
    needed = seeds_needed(values, margin) if len(values) > 1 else None
    mean, p = float(values.mean()) if len(values) else float("nan"), wilcoxon_p(values)
    return Verdict(len(values), mean, *intervals, p, p, needed, margin)


def family(
    differences: Mapping[str, ArrayLike], margin: float = MARGIN, resamples: int = 10_000, seed: int = 0
) -> pd.DataFrame:
    """Several contrasts that are read together.

    Args:
        differences: contrast -> ``[n]``, fractions; lengths may differ. A seed whose pair failed (NaN) is left out of
            that contrast only.
        margin: as in `verdict`.
        resamples, seed: of the bootstrap, the same for all contrasts.

    Returns:
        A row per contrast in the order given: contrast, n (seeds without a failure), mean, low, high (95 % bootstrap;
        fractions), p (Wilcoxon), p_holm (over these contrasts), verdict (text). Intervals are of each contrast
        alone.
    """
    verdicts = [verdict(values, margin, resamples, seed) for values in differences.values()]
    corrected = holm([v.p for v in verdicts])
    verdicts = [replace(v, p_holm=float(p)) for v, p in zip(verdicts, corrected, strict=True)]
    rows = [
        (name, v.n, v.mean, *v.interval95, v.p, v.p_holm, v.text) for name, v in zip(differences, verdicts, strict=True)
    ]
    return pd.DataFrame(rows, columns=["contrast", "n", "mean", "low", "high", "p", "p_holm", "verdict"])
