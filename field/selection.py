"""Which epoch and which trial of a method to report, by DomainBed's rules; and methods beside their baselines.

A method is trained with several hyperparameters (trials) and measured after every epoch; a selection rule says which of
these networks counts (Gulrajani & Lopez-Paz, *In Search of Lost Domain Generalization*, ICLR 2021). All rules choose
per seed, as DomainBed does per ``trial_seed``. Everything here reads *curves*, see `field.curves`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from config import InputError
from field.curves import PARTS
from study import AVERAGE, t_interval

KEY = ["algorithm", "seed", "trial", "epoch"]  # of the networks of one holdout
CHOSEN = ["algorithm", "holdout", "seed", "trial", "epoch", "validation", *PARTS]
HEADLINE = "training-domain"  # the rule that figures and the report's summary follow
UNITS = """\
Accuracies are in per cent, as mean ± standard error over seeds; differences are in points, with 95 % t intervals
over seeds."""  # of every table as text; as numbers all are fractions

Runs = Mapping[frozenset, pd.DataFrame]  # curves by held-out domains


class Rule(NamedTuple):
    """A selection rule."""

    title: str  # what it does, as a heading
    score: Callable[[Runs, str, list[str]], pd.Series]  # by `KEY`, of the networks it may choose; the highest wins
    needs_pairs: bool = False  # runs that hold out every pair of domains


def _accuracy(run: pd.DataFrame, domain: str, part: str) -> pd.Series:
    """Accuracy on one domain by `KEY`, of the runs with one choice of holdouts."""
    return run[run["domain"] == domain].set_index(KEY)[part]


def _mean(accuracies: list[pd.Series]) -> pd.Series:
    """Unweighted mean over domains, of the networks that all have; NaN where one failed."""
    both = pd.concat(accuracies, axis=1, join="inner")
    return pd.Series(np.ascontiguousarray(both).mean(axis=1), index=both.index)


def _last_epoch(validation: pd.Series) -> pd.Series:
    """The last epoch of each run only."""
    epoch = validation.index.get_level_values("epoch").to_series(index=validation.index)
    return validation[epoch == epoch.groupby(KEY[:-1]).transform("max")]


def _training_domain(runs: Runs, holdout: str, domains: list[str]) -> pd.Series:
    return _mean([_accuracy(runs[frozenset([holdout])], d, "out") for d in domains if d != holdout])


def _leave_one_domain_out(runs: Runs, holdout: str, domains: list[str]) -> pd.Series:
    others = {d: frozenset([holdout, d]) for d in domains if d != holdout}
    if not all(pair in runs for pair in others.values()):
        return _training_domain(runs, holdout, domains).iloc[:0]
    return _mean([_accuracy(runs[pair], d, "in") for d, pair in others.items()])


def _oracle(runs: Runs, holdout: str, domains: list[str]) -> pd.Series:
    return _last_epoch(_accuracy(runs[frozenset([holdout])], holdout, "out"))


def _last(runs: Runs, holdout: str, domains: list[str]) -> pd.Series:
    return _last_epoch(_training_domain(runs, holdout, domains))


RULES: dict[str, Rule] = {
    "training-domain": Rule(
        "Training-domain validation (epoch and trial of best mean source `out` accuracy)", _training_domain
    ),
    "last": Rule("Last epoch (trial of best mean source `out` accuracy at that epoch)", _last),
    "leave-one-domain-out": Rule("Leave-one-domain-out validation", _leave_one_domain_out, needs_pairs=True),
    "oracle": Rule(
        "Oracle: last epoch, trial ranked by the target's own `out` part. NOT a fair rule: it saw the target", _oracle
    ),
}


def find_rule(name: str) -> Rule:
    """The rule of that name; an `InputError` if there is none."""
    if name not in RULES:
        raise InputError(f"There is no selection rule '{name}'; there are {', '.join(RULES)}.")
    return RULES[name]


def select(curves: pd.DataFrame, rule: str) -> pd.DataFrame:
    """The network that a rule chooses, for every algorithm, holdout and seed.

    - "training-domain": over all trials and epochs, the best mean `out` accuracy of the source domains.
    - "last": the last epoch; over trials, the best mean `out` accuracy of the source domains.
    - "leave-one-domain-out": for holdout t, over all trials and epochs, the best mean over the other domains v of the
      `in` accuracy on v of the run that holds out t and v; reported is the run that holds out t alone. Trials and
      epochs that lack one of these runs cannot be chosen, and a seed that lacks them all has no row.
    - "oracle": the last epoch; over trials, the best `out` accuracy of the target itself. It has seen the target.

    Ties go to the smallest trial, then to the earliest epoch. (DomainBed takes the *largest* of equal trials, which
    makes no difference without ties.) A failed network is chosen only where all failed, and the row is then NaN.

    Returns:
        Rows in the order of algorithms and domains, then by seed: algorithm, holdout (str), seed, trial, epoch,
        validation (the score it was chosen by), and `in`, `out`, `full` of the held-out domain.

    Raises:
        InputError: an unknown rule, or no runs that it can choose from.
    """
    score = find_rule(rule).score
    domains, algorithms = list(curves["domain"].unique()), curves["algorithm"].unique()
    runs = {frozenset(holdouts): run for holdouts, run in curves.groupby("holdouts", sort=False)}
    targets = [domain for domain in domains if frozenset([domain]) in runs]
    if not targets:
        raise InputError("There are no runs that hold out a single domain: there is nothing to report.")
    chosen = []
    for holdout in targets:
        alone = runs[frozenset([holdout])]
        best = _best(score(runs, holdout, domains), alone[alone["domain"] == holdout])
        chosen.append(best.assign(holdout=holdout))
    table = pd.concat(chosen, ignore_index=True)[CHOSEN]
    if table.empty:
        raise InputError(f"'{rule}' needs runs that hold out every pair of domains: train them with --leave-one-out.")
    place = {"algorithm": list(algorithms).index, "holdout": targets.index}
    order = table.assign(**{key: table[key].map(index) for key, index in place.items()})
    return table.loc[order.sort_values(["algorithm", "holdout", "seed"]).index].reset_index(drop=True)


def _best(validation: pd.Series, target: pd.DataFrame) -> pd.DataFrame:
    """The best network of each algorithm and seed: by its score, of the runs that hold out the target alone."""
    found = target.merge(validation.rename("validation").reset_index(), on=KEY)
    found["validation"] = found["validation"].where(found["in"].notna())
    order = found.sort_values(["validation", "trial", "epoch"], ascending=[False, True, True], na_position="last")
    best = order.drop_duplicates(["algorithm", "seed"]).copy()
    best.loc[best["validation"].isna(), [*PARTS]] = np.nan  # also where only a run that validates it failed
    return best


def tables_by_rule(
    curves: pd.DataFrame, baselines: Mapping[str, str], part: str = "full", rules: Sequence[str] | None = None
) -> dict[str, pd.DataFrame]:
    """`comparison_table` by the name of the rule: see there for the arguments.

    Args:
        rules: which; default every rule that these runs allow.
    """
    pairs = any(len(holdouts) == 2 for holdouts in curves["holdouts"].unique())
    allowed = [name for name, rule in RULES.items() if pairs or not rule.needs_pairs]
    return {name: comparison_table(select(curves, name), baselines, part) for name in rules or allowed}


def comparison_table(chosen: pd.DataFrame, baselines: Mapping[str, str], part: str = "full") -> pd.DataFrame:
    """Methods beside each other and beside their baselines.

    Means over seeds leave out failed networks; the average over holdouts is taken within each seed first, and a seed
    that lacks a holdout has no average. The standard error is the standard deviation (n − 1) over the square root of n
    (DomainBed divides by n instead of n − 1, which gives 29 % less with two seeds). It and the t interval are over
    seeds: they cover starts, batch orders and, where each seed has its own, splits, conditional on images and backbone.

    Args:
        chosen: as `select` returns it.
        baselines: algorithm -> its baseline; an algorithm without one, or that is its own, has no difference.
        part: of the held-out domain: "in" (what DomainBed reports), "out" or "full".

    Returns:
        A row per algorithm (the index), in the order of `chosen`; all accuracies are fractions:

        - ``<holdout>_mean``, ``<holdout>_error`` for each holdout: mean and standard error;
        - ``average_mean``, ``average_error``: of the average over holdouts;
        - ``n``: seeds that have an average;
        - ``rank``: 1 = the best average; missing without an average;
        - ``baseline``: its name, or missing;
        - ``difference``, ``low``, ``high``: average minus the baseline's, paired by seed, with its 95 % t interval;
        - ``n_paired``: seeds with an average of both.

    Raises:
        InputError: an unknown part, a part without accuracies, or a baseline that is not among the runs.
    """
    if part not in PARTS:
        raise InputError(f"There is no part '{part}' of a domain; there are {', '.join(PARTS)}.")
    if chosen[part].isna().all() and chosen["in"].notna().any():
        raise InputError(f"These runs have no accuracies on the part '{part}': use 'in', which DomainBed reports.")
    holdouts, algorithms = list(chosen["holdout"].unique()), list(chosen["algorithm"].unique())
    seeds = chosen.pivot(index=["algorithm", "seed"], columns="holdout", values=part)[holdouts]
    seeds[AVERAGE] = seeds[holdouts].mean(axis=1, skipna=False)
    averages = seeds[AVERAGE].dropna()
    rows = {}
    for algorithm in algorithms:
        row = {}
        for name in [*holdouts, AVERAGE]:
            row |= _mean_and_error(name, seeds.loc[algorithm][name].dropna())
        row |= {"n": int((averages.index.get_level_values("algorithm") == algorithm).sum())}
        rows[algorithm] = row | _difference(averages, algorithm, baselines.get(algorithm), algorithms)
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("algorithm")
    rank = table[f"{AVERAGE}_mean"].rank(ascending=False, method="min").astype("Int64")
    table.insert(table.columns.get_loc("n") + 1, "rank", rank)
    return table


def _mean_and_error(name: str, values: pd.Series) -> dict[str, float]:
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return {f"{name}_mean": values.mean(), f"{name}_error": error}


def _difference(averages: pd.Series, algorithm: str, baseline: str | None, known: list[str]) -> dict[str, object]:
    """Paired difference from the baseline; empty without one."""
    if baseline is None or baseline == algorithm:
        nothing = dict.fromkeys(("difference", "low", "high"), np.nan)
        return {"baseline": None, **nothing, "n_paired": 0}
    if baseline not in known:
        raise InputError(f"The baseline of {algorithm}, {baseline}, is not among the runs: {', '.join(known)}.")
    mine, other = (averages[averages.index.get_level_values("algorithm") == a] for a in (algorithm, baseline))
    paired = (mine.droplevel("algorithm") - other.droplevel("algorithm")).dropna()
    mean, low, high = t_interval(paired)
    return {"baseline": baseline, "difference": mean, "low": low, "high": high, "n_paired": len(paired)}


def as_text(table: pd.DataFrame) -> str:
    """A table of `comparison_table` for reading, best first: accuracies in per cent, differences in points."""
    text = as_cells(table)
    rows = table.loc[text.index]
    text.insert(0, "rank", rows["rank"].map(lambda rank: "" if pd.isna(rank) else str(rank)))
    text.insert(text.columns.get_loc("difference"), "seeds", rows["n"].astype(str))
    text["from"] = rows["baseline"].where(rows["difference"].notna(), "")
    return text.rename_axis(None).to_string()


def as_cells(table: pd.DataFrame) -> pd.DataFrame:
    """Text of a table's accuracies, a column per holdout and their average, and "difference"; best method first."""
    rows = table.sort_values("rank", kind="stable", na_position="last")
    names = [column.removesuffix("_mean") for column in table.columns if column.endswith("_mean")]
    pairs = {name: zip(rows[f"{name}_mean"], rows[f"{name}_error"], strict=True) for name in names}
    cells = {name: [_plus_minus(100 * mean, 100 * error) for mean, error in found] for name, found in pairs.items()}
    return pd.DataFrame(cells | {"difference": [signed(row) for _, row in rows.iterrows()]}, index=rows.index)


def _plus_minus(mean: float, error: float) -> str:
    if not np.isfinite(mean):
        return "–"
    return f"{mean:.1f} ± {error:.1f}" if np.isfinite(error) else f"{mean:.1f}"


def signed(row: pd.Series) -> str:
    """Difference and interval of a row in points, as "+0.31 [−0.10, +0.72]"; as far as they are known."""
    if not np.isfinite(row["difference"]):
        return ""
    text = f"{100 * row['difference']:+.2f}"
    if np.isfinite(row["low"]):
        text += f" [{100 * row['low']:+.2f}, {100 * row['high']:+.2f}]"
    return text.replace("-", "−")
