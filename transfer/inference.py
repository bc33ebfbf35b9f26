"""Statistics of cuts and amounts of data, over repeats: families of contrasts, letters, the trend of the best cut.

Arrays and tables of single repeats in, numbers and verdicts out. `curve` is everywhere the accuracy by cut at one
amount of data: repeats × cuts, fractions. `differences` are one paired difference per repeat. NaN stands for a run
that failed or was not made: a repeat is left out only where one of the two runs that are compared is missing, and every
answer says how many repeats it rests on.

A corrected p cannot be arbitrarily small. Where n repeats cannot reach it, the verdict is "cannot reject with n
repeats" and never "no difference".
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from string import ascii_lowercase

import numpy as np
import pandas as pd
import scipy  # loads scipy.stats, which takes half a second, when it is used
from numpy.typing import ArrayLike

from evidence import bootstrap_interval, family, holm, wilcoxon_p
from study import FEWEST_SEEDS, MARGIN

LEVEL = 0.05  # of the corrected p
NONINFERIORITY_MARGIN = 0.01  # one point, fixed in advance: truncating may cost less than that
DECIMALS = 12  # of a fraction: means that differ by less are equal


def lowest_p(repeats: ArrayLike, sides: int = 2) -> np.ndarray:
    """The smallest p that each test of a family can reach after Holm's correction, given its number of repeats.

    A signed-rank or sign-flip test of n differences has 2**n outcomes, so its p is never below sides / 2**n. Holm's
    corrected p never falls when a p of the family rises: it is smallest where every p is. For equal numbers of repeats
    a family of m tests can reject if m * sides / 2**n is below the level, and otherwise cannot reject anything.

    Args:
        repeats: ``[m]``, of each test; 0 marks one that cannot be made.
        sides: of the test, 1 or 2.

    Returns:
        ``[m]``; NaN for a test without repeats.
    """
    repeats = np.asarray(repeats, dtype=float)
    return holm(np.where(repeats > 0, np.minimum(1.0, sides * 2.0**-repeats), np.nan))


def unable(repeats: int, lowest: float) -> str | None:
    """Why a test of a family cannot lead to a verdict, in words; None if it can.

    Args:
        repeats: that the test rests on.
        lowest: p that it can reach, see `lowest_p`.
    """
    if repeats == 0:
        return "no pairs"
    if lowest >= LEVEL:
        return f"cannot reject with {repeats} {'repeat' if repeats == 1 else 'repeats'}"
    if repeats < FEWEST_SEEDS:
        return f"too few repeats ({repeats}; a verdict needs {FEWEST_SEEDS})"
    return None


def paired_family(differences: Mapping[str, ArrayLike], margin: float = MARGIN) -> pd.DataFrame:
    """Contrasts that are read together: intervals, Wilcoxon tests corrected by Holm, and verdicts.

    Args:
        differences: contrast -> one paired difference per repeat, fractions; numbers of repeats may differ.
        margin: smallest difference of practical interest, a fraction.

    Returns:
        As `evidence.family`, a row per contrast in the order given: contrast, repeats (pairs without a failure), mean,
        low, high (95 % bootstrap), p, p_holm, lowest_p (the smallest p_holm that so many repeats can reach), verdict.
    """
    table = family(differences, margin).rename(columns={"n": "repeats"})
    table.insert(table.columns.get_loc("verdict"), "lowest_p", lowest_p(table["repeats"]))
    words = table["verdict"].str.replace("seed", "repeat")  # what is repeated here is more than a seed
    reasons = [unable(*of) for of in zip(table["repeats"], table["lowest_p"], strict=True)]
    return table.assign(verdict=[reason or said for reason, said in zip(reasons, words, strict=True)])


def greater_p(differences: ArrayLike) -> float:
    """One-sided p of the Wilcoxon signed-rank test: are the differences above zero? See `evidence.wilcoxon_p`.

    Returns:
        p in (0, 1), NaN without differences. Where the ranks are below zero it is 1 minus half of the two-sided p,
        which lacks the chance of the very ranks observed; such a p is about 0.5 or above either way.
    """
    values = np.round(np.asarray(differences, dtype=float), DECIMALS)
    p, values = wilcoxon_p(values), values[np.isfinite(values) & (values != 0)]
    above = (scipy.stats.rankdata(np.abs(values)) * np.sign(values)).sum() > 0
    return p / 2 if above else 1 - p / 2


def noninferiority(differences: Mapping[str, ArrayLike], margin: float = NONINFERIORITY_MARGIN) -> pd.DataFrame:
    """Is it no worse by more than a margin? One-sided Wilcoxon tests of differences + margin, corrected by Holm.

    The claim "no worse by more than the margin" needs a corrected p below 0.05 and the whole 95 % interval above
    −margin (Piaggio et al., 2012, JAMA 308); "worse by more than the margin" needs the same on the other side, in a
    family of its own. An interval that contains −margin is undecided, whatever the test of no difference says.

    Args:
        differences: contrast -> one paired difference per repeat, fractions.
        margin: above 0, a fraction.

    Returns:
        As `paired_family` (with the two-sided test of no difference), and p_noninferior and p_inferior (corrected),
        noninferior (the verdict in words).
    """
    table = paired_family(differences)
    shifted = [np.asarray(values, dtype=float) + margin for values in differences.values()]
    table["p_noninferior"] = holm([greater_p(values) for values in shifted])
    table["p_inferior"] = holm([greater_p(-values) for values in shifted])
    lowest = lowest_p(table["repeats"], sides=1)
    words = f"by more than {100 * margin:g} {'point' if margin == 0.01 else 'points'}"
    verdicts = []
    for row, least in zip(table.itertuples(), lowest, strict=True):
        verdict = "undecided"
        if row.p_noninferior < LEVEL and row.low > -margin:
            verdict = f"no worse {words}"
        elif row.p_inferior < LEVEL and row.high < -margin:
            verdict = f"worse {words}"
        verdicts.append(unable(row.repeats, least) or verdict)
    return table.assign(noninferior=verdicts)


def compact_letters(names: Sequence, different: Iterable[tuple]) -> dict:
    """Letters such that two names share one exactly if they are not different.

    By insertion and absorption (Piepho, 2004, Journal of Computational and Graphical Statistics 13).

    Args:
        names: best first, which gets the letter "a".
        different: pairs of names whose contrast is rejected.

    Returns:
        name -> its letters, in alphabetical order: ``{"x": "a", "y": "ab", "z": "b"}``.
    """
    groups = {frozenset(names)}
    for pair in different:
        split = {group for group in groups if group.issuperset(pair)}
        groups = (groups - split) | {group - {name} for group in split for name in pair}
        groups = {group for group in groups if not any(group < other for other in groups)}
    order = sorted(groups, key=lambda group: sorted(names.index(name) for name in group))
    return {
        name: "".join(a for a, group in zip(ascii_lowercase, order, strict=False) if name in group) for name in names
    }


def letters_table(curve: pd.DataFrame) -> pd.DataFrame:
    """Which cuts differ at one amount of data: two that share a letter are not told apart.

    All pairs of cuts by the Wilcoxon test on the repeats that both have, corrected by Holm over the pairs.

    Returns:
        A row per cut: cut, repeats, mean, letters, and lowest_p, the smallest corrected p that any pair of this amount
        can reach: above 0.05 all cuts share a letter because nothing could be rejected.
    """
    pairs = list(combinations(curve.columns, 2))
    differences = [(curve[first] - curve[second]).dropna() for first, second in pairs]
    corrected = holm([wilcoxon_p(values) for values in differences])
    means = curve.mean().sort_values(ascending=False, kind="stable")
    order = list(means.dropna().index)
    found = compact_letters(order, [pair for pair, p in zip(pairs, corrected, strict=True) if p < LEVEL])
    lowest = np.nanmin(lowest_p([len(values) for values in differences]), initial=1.0)
    rows = [(cut, curve[cut].count(), means[cut], found.get(cut, ""), lowest) for cut in curve]
    return pd.DataFrame(rows, columns=["cut", "repeats", "mean", "letters", "lowest_p"])


def best_shares(curve: pd.DataFrame, resamples: int = 10_000, seed: int = 0) -> pd.DataFrame:
    """In what share of bootstrap resamples of the repeats each cut has the highest mean; equals share it.

    Returns:
        A row per cut: cut, repeats (those with all cuts), mean (over these), share (fraction; NaN below two repeats).
    """
    values = curve.dropna()
    repeats, shares = len(values), np.full(curve.shape[1], np.nan)
    if repeats > 1:
        counts = np.random.default_rng(seed).multinomial(repeats, np.full(repeats, 1 / repeats), resamples)
        means = np.round(counts @ values.to_numpy() / repeats, DECIMALS)
        wins = means == means.max(axis=1, keepdims=True)
        shares = (wins / wins.sum(axis=1, keepdims=True)).mean(axis=0)
    return pd.DataFrame({"cut": curve.columns, "repeats": repeats, "mean": values.mean().to_numpy(), "share": shares})


def best_cuts(curves: Mapping[float, pd.DataFrame]) -> pd.DataFrame:
    """The best cut of every repeat at every amount: repeats × amounts, ascending; equally good cuts are averaged.

    Only cuts that every amount has, and only repeats that have all of them at every amount: an arg max over other cuts
    would be another question.
    """
    cuts = sorted(set.intersection(*(set(curve.columns) for curve in curves.values())))
    best = {}
    for amount in sorted(curves):
        values = curves[amount][cuts].dropna().round(DECIMALS)
        equal = values.eq(values.max(axis=1), axis=0)
        best[amount] = equal.mul(cuts).sum(axis=1) / equal.sum(axis=1)
    return pd.DataFrame(best, dtype=float).dropna()


def falling_p(scores: Sequence[int]) -> float:
    """One-sided p of the sign-flip test of whole numbers: is their sum negative? Exact, for any number of them.

    Under the hypothesis each score has either sign with equal chance. The distribution of the sum is computed by
    convolution, ties and zeros included.
    """
    chances = np.ones(1)  # of the sums −total … total
    for size in np.abs(scores).astype(int):
        either = np.zeros(2 * size + 1)
        either[0] += 0.5
        either[-1] += 0.5
        chances = np.convolve(chances, either)
    below = int(np.sum(scores)) + len(chances) // 2
    return float(min(1.0, chances[: below + 1].sum()))


def trend(best: pd.DataFrame) -> dict[str, object]:
    """Does the best cut fall as data grow? One test for all amounts, not one for each pair of them.

    Per repeat, Kendall's τ between amount and best cut: pairs of amounts at which it rises minus pairs at which it
    falls, by all pairs (the kind a, in which equal cuts count as no trend). Then its mean, a bootstrap interval over
    repeats, and an exact one-sided sign-flip test. Page's test has no interval, and no exact distribution where ranks
    are tied, as the best cuts of a repeat often are. Accuracies that no longer differ at some amount make the best cut
    there a random one, which pulls its mean to the middle: read it beside `best_shares`.

    Args:
        best: see `best_cuts`; at least two amounts.

    Returns:
        repeats, first_amount, last_amount, first_cut and last_cut (mean best cut there), tau (negative: it falls),
        low, high, p (of "it falls"), p_rising, verdict: "supported", "contradicted", "undecided", or why there is none.
    """
    values, places = best.to_numpy(), range(best.shape[1])
    signs = [np.sign(values[:, later] - values[:, earlier]) for earlier, later in combinations(places, 2)]
    scores = np.sum(signs, axis=0).astype(int)
    taus, repeats = scores / len(signs), len(best)
    low, high = bootstrap_interval(taus)
    p, p_rising = (falling_p(scores), falling_p(-scores)) if repeats else (np.nan, np.nan)
    verdict = "supported" if p < LEVEL else "contradicted" if p_rising < LEVEL else "undecided"
    verdict = unable(repeats, 0.5**repeats) or verdict
    if verdict == "no pairs":
        verdict = "no repeat has every amount"
    first, last = best.columns[[0, -1]]
    ends = {"first_amount": first, "last_amount": last, "first_cut": best[first].mean(), "last_cut": best[last].mean()}
    tau = float(taus.mean()) if repeats else np.nan
    numbers = {"tau": tau, "low": low, "high": high, "p": p, "p_rising": p_rising, "verdict": verdict}
    return {"repeats": repeats, **ends, **numbers}


def rank_correlations(first: pd.DataFrame, second: pd.DataFrame) -> pd.Series:
    """Spearman's ρ of each repeat across the columns that both tables have; repeats × columns in, repeats out.

    NaN for a repeat that lacks a value, or has the same value in all columns.
    """
    columns, repeats = first.columns.intersection(second.columns), first.index.intersection(second.index)
    first, second = (
        table.loc[repeats, columns].rank(axis=1).where(table.loc[repeats, columns].notna().all(axis=1))
        for table in (first, second)
    )
    return first.corrwith(second, axis=1)
