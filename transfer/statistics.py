"""From the runs of a transfer study to its tables, and to the sentences that these allow.

The *common table* has a row per run and checkpoint: task, protocol, arm, cut (layers kept; 0 for scratch), amount
(share of the images, a fraction), n (images), repeat, updates, accuracy and balanced_accuracy (fractions, on the true
test split; NaN where the run failed or this was not measured), failed (why, or nothing), and optionally seen_accuracy:
the "test" of the original, which is the training split. Everything is done for each task and protocol by itself.

*Headline*: the last checkpoint, and for the protocol "original" the end of each run.
*Confirmatory family*: `frozen` at each cut above 0 minus `scratch`, at each amount.
*Second family*, corrected by itself: `moved` minus `random_layer` and minus `frozen` at the same cut, at each amount.
*Truncating*: `truncated` minus `frozen` at each cut below the depth, no worse by more than one point.
*Trend*: one test of "the best cut falls as data grow", with `scratch` as cut 0.
Everything else is exploratory, with intervals of each difference alone.
"""

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import pandas as pd

from config import InputError
from study import t_interval
from transfer.arms import WITHOUT_CUT, ZERO_SHOT
from transfer.inference import (
    best_cuts,
    best_shares,
    letters_table,
    noninferiority,
    paired_family,
    rank_correlations,
    trend,
)
from transfer.probes import PRETRAINED

SCRATCH, FINETUNE, FROZEN, TRUNCATED, MOVED = "scratch", "finetune", "frozen", "truncated", "moved"
WEIGHT_BASELINES = ("random_layer", FROZEN)  # of `moved`, in the second family
ORIGINAL = "original"  # the protocol whose runs stop each by itself
GROUP = ["task", "protocol"]
CELL = ["arm", "cut", "amount"]
MEASURES = {"accuracy": "the test split", "seen_accuracy": "the training split, part of which was trained on"}
COLUMNS = [*GROUP, *CELL, "n", "repeat", "updates", "accuracy", "failed"]
CLAIMED = "ari"  # how measures begin whose correlation with transfer is tested
DIRECTION_WORDS = {"helps": "supported", "hurts": "contradicted"}  # verdicts on ρ

Cell = tuple[str, int]  # arm, cut


def check(table: pd.DataFrame) -> None:
    """Refuse what is not a common table.

    Raises:
        InputError: it has no rows or lacks a column, a run is there twice, or an accuracy is no fraction.
    """
    if table.empty:
        raise InputError("There are no runs to report.")
    if missing := [name for name in COLUMNS if name not in table]:
        raise InputError(f"The table of runs lacks the columns {', '.join(missing)}.")
    twice = table.duplicated([*GROUP, *CELL, "repeat", "updates"])
    if twice.any():
        row = table[twice].iloc[0]
        raise InputError(f"The table holds {label(row.arm, row.cut)}, repeat {row['repeat']}, of {row.task} twice.")
    for name in table.columns.intersection([*MEASURES, "balanced_accuracy"]):
        if ((table[name] < 0) | (table[name] > 1)).any():
            raise InputError(f"The column {name} must hold fractions between 0 and 1.")


def label(arm: str, cut: int) -> str:
    """How an arm at a cut is called: "frozen@4"; those of `arms.WITHOUT_CUT` have none."""
    return arm if arm in WITHOUT_CUT else f"{arm}@{cut}"


def share(amount: float) -> str:
    """An amount of data in words: "0.1 %"."""
    return f"{100 * amount:g} %"


def runs_of(table: pd.DataFrame, measure: str | None = None) -> pd.DataFrame:
    """The runs of one task and protocol, with what is compared in the column `value` and `n` called `images`.

    Args:
        table: a common table of one task and protocol.
        measure: "accuracy" or "seen_accuracy"; default the first that any run has.

    Returns:
        The rows of every checkpoint; of the protocol "original" the end of each run, with `updates` 0 instead of where
        it stopped, which differs from run to run. A run that failed has no value, whatever it was at a checkpoint.
    """
    if measure is None:
        measure = "accuracy" if table["accuracy"].notna().any() or "seen_accuracy" not in table else "seen_accuracy"
    if (table["protocol"] == ORIGINAL).all():
        table = table.sort_values("updates", kind="stable").groupby([*CELL, "repeat"], as_index=False).tail(1)
        table = table.assign(updates=0)
    order = [*CELL, "repeat", "updates"]
    runs = table.assign(value=table[measure].where(table["failed"].isna()), measure=measure)
    return runs.rename(columns={"n": "images"}).sort_values(order, kind="stable").reset_index(drop=True)


def last(runs: pd.DataFrame) -> pd.DataFrame:
    """The rows of the headline: the largest checkpoint."""
    return runs[runs["updates"] == runs["updates"].max()]


def by_repeat(runs: pd.DataFrame) -> pd.DataFrame:
    """Values of one checkpoint: repeats × (amount, arm, cut)."""
    return runs.pivot(index="repeat", columns=["amount", "arm", "cut"], values="value").sort_index(axis=1)


def curves_of(runs: pd.DataFrame) -> dict[float, pd.DataFrame]:
    """Amount -> accuracy by number of frozen layers at one checkpoint, repeats × cuts; scratch is cut 0.

    Amounts at which fewer than two cuts were run are left out: there is nothing to choose from.
    """
    own = runs[(runs["arm"] == SCRATCH) | ((runs["arm"] == FROZEN) & (runs["cut"] > 0))]
    curves = {
        amount: rows.pivot(index="repeat", columns="cut", values="value") for amount, rows in own.groupby("amount")
    }
    return {amount: curve for amount, curve in curves.items() if curve.shape[1] > 1}


def pairs_of(runs: pd.DataFrame, pairs: Iterable[tuple[Cell, Cell]]) -> pd.DataFrame:
    """The contrasts that a study has runs of, at every amount: which they are, in the order of cut and amount.

    Returns:
        contrast (its name), arm, cut, baseline, baseline_cut, amount, images.
    """
    images = runs.groupby([*CELL])["images"].max()
    rows = []
    for (arm, cut), (baseline, baseline_cut) in pairs:
        for amount in sorted(runs["amount"].unique()):
            if (arm, cut, amount) in images and (baseline, baseline_cut, amount) in images:
                name = f"{label(arm, cut)} − {label(baseline, baseline_cut)}, {share(amount)}"
                rows.append((name, arm, cut, baseline, baseline_cut, amount, images[arm, cut, amount]))
    columns = ["contrast", "arm", "cut", "baseline", "baseline_cut", "amount", "images"]
    return pd.DataFrame(rows, columns=columns)


def differences_of(runs: pd.DataFrame, contrasts: pd.DataFrame) -> dict[str, pd.Series]:
    """The paired differences of `pairs_of` at one checkpoint: contrast -> a difference per repeat."""
    wide = by_repeat(runs)
    return {
        row.contrast: wide[row.amount, row.arm, row.cut] - wide[row.amount, row.baseline, row.baseline_cut]
        for row in contrasts.itertuples()
    }


def cuts_of(runs: pd.DataFrame, arm: str) -> list[int]:
    """Cuts above 0 at which an arm was run."""
    return sorted(cut for cut in runs.loc[runs["arm"] == arm, "cut"].unique() if cut > 0)


def confirmatory(runs: pd.DataFrame) -> pd.DataFrame:
    """The family fixed in advance: `pairs_of` with the columns of `inference.paired_family`."""
    contrasts = pairs_of(runs, [((FROZEN, cut), (SCRATCH, 0)) for cut in cuts_of(runs, FROZEN)])
    return contrasts.merge(paired_family(differences_of(runs, contrasts)), on="contrast")


def weights(runs: pd.DataFrame) -> pd.DataFrame:
    """The second family: do the weights that moved carry what transfers, or does the layer? As `confirmatory`."""
    pairs = [((MOVED, cut), (name, cut)) for name in WEIGHT_BASELINES for cut in cuts_of(runs, MOVED)]
    contrasts = pairs_of(runs, pairs)
    return contrasts.merge(paired_family(differences_of(runs, contrasts)), on="contrast")


def truncation(runs: pd.DataFrame, depth: int | None = None) -> pd.DataFrame:
    """Truncating instead of reinitializing: `pairs_of` with the columns of `inference.noninferiority`.

    Args:
        runs: at the headline.
        depth: number of layers; there nothing is left to remove. Default: the cut of finetune. A cut at which no two
            runs of any amount differ is left out as well, since it is one program under two names.
    """
    if depth is None:
        depth = max(runs.loc[runs["arm"] == FINETUNE, "cut"], default=float("inf"))
    cuts = [cut for cut in cuts_of(runs, TRUNCATED) if cut < depth]
    contrasts = pairs_of(runs, [((TRUNCATED, cut), (FROZEN, cut)) for cut in cuts])
    found = differences_of(runs, contrasts)
    differ = contrasts.assign(differs=[found[name].isna().all() or (found[name] != 0).any() for name in found])
    contrasts = contrasts[differ.groupby("cut")["differs"].transform("any").astype(bool)]
    return contrasts.merge(noninferiority({name: found[name] for name in contrasts["contrast"]}), on="contrast")


def accuracies(runs: pd.DataFrame) -> pd.DataFrame:
    """Mean, median and standard error by arm, cut, amount and checkpoint.

    Returns:
        arm, cut, amount, images, updates, measure, repeats (valid runs), failed (runs), mean, median, se (NaN below two
        repeats), and the means of the other measures that there are: mean_balanced_accuracy, mean_seen_accuracy.
    """
    groups = runs.groupby([*CELL, "updates"])
    values = groups["value"]
    table = pd.DataFrame({"images": groups["images"].max(), "measure": groups["measure"].first()})
    table["repeats"], table["failed"] = values.count(), groups["failed"].count()
    table["mean"], table["median"], table["se"] = values.mean(), values.median(), values.sem()
    for name in ("balanced_accuracy", "seen_accuracy"):
        if name in runs and runs[name].notna().any() and name != runs["measure"].iloc[0]:
            table[f"mean_{name}"] = groups[name].mean()
    return table.reset_index()


def differences(runs: pd.DataFrame) -> pd.DataFrame:
    """EXPLORATORY: every arm minus scratch at every checkpoint: arm, cut, amount, images, updates, repeats, mean, low,
    high (95 % t interval of this difference alone).
    """
    rows = []
    for updates, at in runs.groupby("updates"):
        cells = [cell for cell in dict.fromkeys(zip(at["arm"], at["cut"], strict=True)) if cell[0] != SCRATCH]
        contrasts = pairs_of(at, [(cell, (SCRATCH, 0)) for cell in cells])
        for row, values in zip(contrasts.itertuples(), differences_of(at, contrasts).values(), strict=True):
            known = values.dropna()
            if len(known):
                rows.append((row.arm, row.cut, row.amount, row.images, updates, len(known), *t_interval(known)))
    columns = ["arm", "cut", "amount", "images", "updates", "repeats", "mean", "low", "high"]
    return pd.DataFrame(rows, columns=columns)


def above_zero_shot(runs: pd.DataFrame) -> pd.DataFrame:
    """EXPLORATORY: training anew and fine-tuning everything, minus the pretrained network as it is.

    Args:
        runs: at the headline.

    Returns:
        `pairs_of` with repeats, baseline_mean (of these), mean, low, high (95 % t interval of this difference alone).
    """
    depth = runs.loc[runs["arm"] == ZERO_SHOT, "cut"].max()
    contrasts = pairs_of(runs, [((arm, cut), (ZERO_SHOT, depth)) for arm, cut in ((SCRATCH, 0), (FINETUNE, depth))])
    wide, rows = by_repeat(runs), []
    for row, values in zip(contrasts.itertuples(), differences_of(runs, contrasts).values(), strict=True):
        known = values.dropna()
        level = wide.loc[known.index, (row.amount, ZERO_SHOT, depth)].mean()
        rows.append((row.contrast, len(known), level, *(t_interval(known) if len(known) else (np.nan,) * 3)))
    columns = ["contrast", "repeats", "baseline_mean", "mean", "low", "high"]
    return contrasts.merge(pd.DataFrame(rows, columns=columns), on="contrast")


def letters(runs: pd.DataFrame) -> pd.DataFrame:
    """`inference.letters_table` at each amount: amount, cut, repeats, mean, letters, lowest_p."""
    found = {amount: letters_table(curve) for amount, curve in curves_of(runs).items()}
    return _stacked(found, ["amount"])


def best(runs: pd.DataFrame) -> pd.DataFrame:
    """`inference.best_shares` at each checkpoint and amount: updates, amount, cut, repeats, mean, share."""
    found = {
        (updates, amount): best_shares(curve)
        for updates, at in runs.groupby("updates")
        for amount, curve in curves_of(at).items()
    }
    return _stacked(found, ["updates", "amount"])


def trends(runs: pd.DataFrame) -> pd.DataFrame:
    """`inference.trend` at each checkpoint; left_out counts repeats that lack a cut or an amount.

    The test is that of the last checkpoint; the others show how it depends on the number of updates.
    """
    rows = []
    for updates, at in runs.groupby("updates"):
        curves = curves_of(at)
        if len(curves) > 1:
            cuts = best_cuts(curves)
            repeats = len(set().union(*(curve.index for curve in curves.values())))
            rows.append({"updates": updates, **trend(cuts), "left_out": repeats - len(cuts)})
    return pd.DataFrame(rows)


def probe_correlations(runs: pd.DataFrame, probes: pd.DataFrame) -> pd.DataFrame:
    """Do the layers that a probe prefers transfer best? Spearman's ρ across layers, per repeat, over repeats.

    What a probe says of layer c of the pretrained network is compared with the accuracy of `frozen@c`, which trains on
    what layer c gives. Tested, with Holm over these, are the measures that begin with "ari"; the rest is exploratory.

    Args:
        runs: at the headline.
        probes: task, network, repeat, layer, measure, value, see `probes.probe_layers`.

    Returns:
        measure, amount (NaN: ρ averaged over the amounts within a repeat, which is what is tested), repeats, mean, low,
        high, and for what is tested p, p_holm, lowest_p and verdict ("supported", "contradicted", "undecided", or why
        there is none).
    """
    curves, rows, tested = curves_of(runs), [], {}
    for measure, values in probes[probes["network"] == PRETRAINED].groupby("measure", sort=False):
        table = values.pivot(index="repeat", columns="layer", values="value")
        found = {amount: rank_correlations(table, curve.loc[:, curve.columns > 0]) for amount, curve in curves.items()}
        mean = pd.DataFrame(found).mean(axis=1)
        if measure.startswith(CLAIMED):
            tested[measure] = mean
        else:
            found[np.nan] = mean
        for amount, rho in found.items():
            known = rho.dropna()
            rows.append((measure, amount, len(known), *t_interval(known)))
    rest = pd.DataFrame(rows, columns=["measure", "amount", "repeats", "mean", "low", "high"])
    claimed = paired_family(tested).rename(columns={"contrast": "measure"}).assign(amount=np.nan)
    claimed["verdict"] = [DIRECTION_WORDS.get(verdict, verdict.split(" (about")[0]) for verdict in claimed["verdict"]]
    return pd.concat([claimed, rest], ignore_index=True) if tested else rest


def tables(
    table: pd.DataFrame,
    probes: pd.DataFrame | None = None,
    depths: Mapping[str, int] | None = None,
    measure: str | None = None,
) -> dict[str, pd.DataFrame]:
    """Everything the report says in numbers, by file name; each table begins with the columns task and protocol.

    Args:
        table: the common table, of any tasks and protocols.
        probes: see `probe_correlations`.
        depths: task -> number of layers, where finetune was not run.
        measure: see `runs_of`.

    Returns:
        runs (of the headline), accuracy, contrasts, differences, letters, best, and what there are runs for of trend,
        truncation, weights, zero_shot and correlations.

    Raises:
        InputError: see `check`.
    """
    check(table)
    found = {}
    for (task, protocol), rows in table.groupby(GROUP, sort=False):
        runs = runs_of(rows, measure)
        own = None if probes is None else probes[probes["task"] == task]
        for name, made in _tables_of(runs, own, (depths or {}).get(task)):
            if len(made):
                found.setdefault(name, {})[task, protocol] = made
    return {name: _stacked(made, GROUP) for name, made in found.items()}


def _tables_of(
    runs: pd.DataFrame, probes: pd.DataFrame | None, depth: int | None
) -> Iterator[tuple[str, pd.DataFrame]]:
    """Name and table of one task and protocol; empty where there are no runs for it."""
    headline = last(runs)
    yield "runs", headline[[*CELL, "images", "repeat", "updates", "measure", "value"]]
    yield "accuracy", accuracies(runs)
    yield "contrasts", confirmatory(headline)
    yield "differences", differences(runs)
    yield "letters", letters(headline)
    yield "best", best(runs)
    yield "trend", trends(runs)
    yield "truncation", truncation(headline, depth)
    yield "weights", weights(headline)
    yield "zero_shot", above_zero_shot(headline)
    if probes is not None and len(probes):
        yield "correlations", probe_correlations(headline, probes)


def _stacked(tables: Mapping, names: list[str]) -> pd.DataFrame:
    """Tables below each other, what tells them apart in columns before their own."""
    if not tables:
        return pd.DataFrame()
    return pd.concat(tables, names=names).reset_index(level=names).reset_index(drop=True)
