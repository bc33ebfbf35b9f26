"""From records to answers: leave-one-domain-out tables, intervals over seeds, paired differences.

Every interval is over seeds: it covers starts, batch orders and (with `SPLIT_SEED = "seed"`) splits, and is conditional
on these images and this backbone. It says nothing about other domains or data sets.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy.special import stdtrit

AVERAGE = "average"
WITHOUT_HARDEST = "average without hardest"
FEWEST_SEEDS = 10  # for words such as "helps": below, intervals say little
MARGIN = 0.005  # smallest difference of practical interest: half a point
INTERVAL = ["n", "mean", "low", "high"]


def t_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean and Student's t interval for it: (mean, low, high); the bounds are NaN for fewer than two values."""
    values = np.asarray(values, dtype=float)
    if len(values) == 0:
        return (float("nan"),) * 3
    mean = float(values.mean())
    if len(values) == 1:
        return mean, float("nan"), float("nan")
    half = float(stdtrit(len(values) - 1, 0.5 + confidence / 2) * values.std(ddof=1) / np.sqrt(len(values)))
    return mean, mean - half, mean + half


def accuracy_table(
    records: Sequence[Mapping], selection: str = "last", part: str = "full", metric: str = "accuracy"
) -> pd.DataFrame:
    """Accuracy of every result: one row per seed, columns (algorithm, holdout); NaN where missing or failed.

    Args:
        selection: "last" epoch or "val" (best mean `out` accuracy of the sources).
        part: of the held-out domain: "full", "in" or "out".
        metric: "accuracy" or "balanced_accuracy"; fractions.
    """
    rows = {
        (record["algorithm"], record["holdout"], record["seed"]): record[metric][part] if record[metric] else np.nan
        for record in records
        if record["selection"] == selection
    }
    if not rows:
        raise ValueError(f"There are no records with selection '{selection}'.")
    table = pd.Series(rows, dtype=float).rename_axis(["algorithm", "holdout", "seed"])
    table = table.unstack(["algorithm", "holdout"]).sort_index()
    every = [table.columns.unique(name) for name in ("algorithm", "holdout")]
    return table.reindex(columns=pd.MultiIndex.from_product(every))


def hardest(table: pd.DataFrame) -> str:
    """Holdout with the lowest mean accuracy of `erm` (of all algorithms where there is no erm)."""
    reference = table["erm"] if "erm" in table.columns.get_level_values(0) else table.T.groupby("holdout").mean().T
    return reference.mean().fillna(np.inf).idxmin()


def _with_averages(frame: pd.DataFrame, worst: str) -> pd.DataFrame:
    """Seeds × holdouts with the per-seed averages over holdouts; a seed with a gap has no average."""
    frame = frame.copy()
    holdouts = list(frame.columns)
    frame[AVERAGE] = frame[holdouts].mean(axis=1, skipna=False)
    if len(holdouts) > 1:
        frame[WITHOUT_HARDEST] = frame[[h for h in holdouts if h != worst]].mean(axis=1, skipna=False)
    return frame


def _summarize(frame: pd.DataFrame) -> pd.DataFrame:
    """Columns of values over seeds -> rows of n, mean, low, high."""
    rows = [(len(v := frame[name].dropna()), *t_interval(v)) for name in frame.columns]
    return pd.DataFrame(rows, index=pd.Index(frame.columns, name="holdout"), columns=INTERVAL).reset_index()


def lodo_table(records: Sequence[Mapping], **choice) -> pd.DataFrame:
    """Leave-one-domain-out accuracies with 95 % t intervals over seeds.

    Averages are taken over holdouts within each seed first. "average without hardest" leaves out the one holdout
    on which `erm` is worst, for all algorithms alike. A failed network leaves out its seed's averages.

    Args:
        choice: `selection`, `part`, `metric` as in `accuracy_table`.

    Returns:
        Tidy table: algorithm, holdout (then the averages), n (seeds), mean, low, high (fractions).
    """
    table = accuracy_table(records, **choice)
    worst = hardest(table)
    algorithms = table.columns.unique("algorithm")
    parts = [_summarize(_with_averages(table[name], worst)).assign(algorithm=name) for name in algorithms]
    return pd.concat(parts, ignore_index=True)[["algorithm", "holdout", *INTERVAL]]


def paired_differences(records: Sequence[Mapping], algorithm: str, baseline: str = "erm", **choice) -> pd.DataFrame:
    """Accuracy of `algorithm` minus `baseline` on the same seeds, starts and batches, with 95 % t intervals.

    A seed enters a row only if both its networks are there and did not fail. Same columns as `lodo_table`, fractions.
    """
    table = accuracy_table(records, **choice)
    return _summarize(_with_averages(table[algorithm] - table[baseline], hardest(table)))


def wide_table(table: pd.DataFrame) -> pd.DataFrame:
    """A tidy table (`lodo_table`) for reading: a row per algorithm, mean ± standard error in per cent, "–" for none.

    Where algorithms have different numbers of seeds there is a column of these.
    """

    def cell(row: pd.Series) -> str:
        if np.isnan(row["mean"]):
            return "–"
        error = (row["high"] - row["low"]) / 2 / stdtrit(max(row["n"] - 1, 1), 0.975)
        return f"{100 * row['mean']:.1f}" + (f" ± {100 * error:.1f}" if np.isfinite(error) else "")

    text = table.assign(text=table.apply(cell, axis=1)).pivot(index="algorithm", columns="holdout", values="text")
    text = text[table["holdout"].unique()].rename_axis(columns=None)
    seeds = table.groupby("algorithm")["n"].max()
    if seeds.nunique() > 1:
        text.insert(0, "seeds", seeds)
    return text


def levels(counts: Mapping[str, Mapping[str, int]]) -> tuple[float, dict[str, float]]:
    """What costs nothing: chance, 1/classes; and each domain's share of its largest class.

    Args:
        counts: domain -> class -> number of images.
    """
    majority = {domain: max(classes.values()) / sum(classes.values()) for domain, classes in counts.items()}
    return 1 / len(next(iter(counts.values()))), majority
