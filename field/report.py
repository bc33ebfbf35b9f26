"""What a comparison says: the report, a table per selection rule, and two yardsticks that no method is paired with."""

import textwrap
from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from engine import Params
from evidence import kept_probe, probe_words
from field.compare import PARTNERS, Comparison
from field.selection import RULES, UNITS, as_text, select, signed
from storage import Results, ranges
from study import AVERAGE, bottleneck, covered, unlearned

ROWS = 400  # images that the ensemble classifies at a time
INTRODUCTION = """\
{units} They cover {covered}.
Accuracy is measured on all images of the held-out domain. Differences are from ERM on the same kind of batches
(pooled, or balanced by domain), paired by seed and averaged over the holdouts. With many methods some intervals
exclude 0 by chance: a survey, not a test."""


def write(comparison: Comparison, figures: bool = True) -> str:
    """Write what the command ``compare`` writes, and return the report.

    That is ``comparison.txt``, a table per selection rule as CSV, the averages by seed, and every figure in ``plots/``.

    Args:
        comparison: trained.
        figures: draw them as well.
    """
    text, results = report(comparison), comparison.run.results
    with comparison.run.writing():
        results.write_text("comparison_seeds.csv", seed_averages(comparison).to_csv(float_format="%.6g"))
        write_tables(results, "comparison", text, comparison.tables())
    if figures:
        from field.figures import save_all  # imports matplotlib

        save_all(comparison)
    return text


def write_tables(results: Results, name: str, text: str, tables: Mapping[str, pd.DataFrame]) -> None:
    """Write ``<name>_<rule>.csv`` for each table, then ``<name>.txt``; a table of earlier runs by another rule goes."""
    for rule in RULES:
        if rule in tables:
            results.write_text(f"{name}_{rule}.csv", tables[rule].to_csv())
        else:
            (results.directory / f"{name}_{rule}.csv").unlink(missing_ok=True)
    results.write_text(f"{name}.txt", text)


def report(comparison: Comparison) -> str:
    """The whole comparison as text."""
    together, fits = ensemble(comparison), kept_probe(comparison.run, comparison.single_holdouts)
    probe = fits.groupby(level=0, sort=False)["full"].mean()
    lines = [*_introduction(comparison), ""]
    for text in (
        finding(comparison.tables()[comparison.headline], together, probe),
        *cautions(comparison, probe.mean()),
    ):
        lines += textwrap.wrap(text, 110)
    for rule, table in comparison.tables().items():
        title = RULES[rule].title
        lines += ["", title, "-" * len(title), as_text(table)]
        if rule == "oracle" and comparison.trials == 1:
            lines += ["(There is one trial to choose from: the same networks as at the last epoch.)"]
    lines += _yardstick(f"Linear probe ({probe_words(fits, comparison.run.data)}; unpaired)", probe)
    seeds = len(comparison.run.seeds)
    words = f"mean probabilities of the ERM networks of {seeds} seeds, last epoch; no interval, unpaired"
    lines += _yardstick(f"Ensemble ({words})", together)
    if failures := failed(comparison):
        lines += ["", f"{len(failures)} networks failed and are left out:", *(f"  {text}" for text in failures)]
    return "\n".join(lines) + "\n"


def _introduction(comparison: Comparison) -> list[str]:
    """What was compared, and how to read the tables."""
    run, trials = comparison.run, comparison.trials
    sizes = " -> ".join(map(str, (run.features.feature_size, *run.settings.hidden_sizes, run.features.num_classes)))
    blocks = 0 if run.features.tail is None else len(run.features.tail.blocks)
    trained = f"the last {'block' if blocks == 1 else f'{blocks} blocks'} of the ViT"
    draws = f", and {trials - 1} random draw{'s' if trials > 2 else ''}" if trials > 1 else ""
    lines = [
        f"Methods of the field on {trained if blocks else 'frozen features'}",
        "",
        run.features.describe(),
        f"Classifier{f' after {trained}' if blocks else ''}: {sizes}; {run.settings.ph2_num_epochs} epochs; "
        f"{len(run.seeds)} seeds; "
        f"hyperparameters of every method: its defaults{draws}.",
        INTRODUCTION.format(units=UNITS, covered=covered(run.settings.split_seed)),
    ]
    peeking = [method for method in comparison.methods if comparison.saw_validation(method)]
    masked = [method.__name__ for method in peeking if method.control is not None]
    others = [method.__name__ for method in peeking if method.control is None]
    for what, names in (("The masks of", masked), ("What Phase 1 gives to", others)):
        if names:
            text = f"{what} {', '.join(names)} saw the validation images: Phase 1 trained on all images."
            lines += textwrap.wrap(text, 110)
    if others := left_out(comparison):
        lines += [f"Not in this report, though in the same directory: {others}."]
    return lines


def left_out(comparison: Comparison) -> str:
    """What the results directory holds of comparisons beyond this one, in words; empty if nothing."""
    run = comparison.run
    records = [record for record in run.results.records() if "trial" in record]
    reported = {
        "algorithm": {*comparison.names},
        "trial": {*range(comparison.trials)},
        "holdout": {"+".join(holdouts) for holdouts in comparison.holdouts},
        "seed": {*run.seeds},
    }
    more = {key: sorted({record[key] for record in records} - known) for key, known in reported.items()}
    words = {key: ranges(found) if key == "seed" else ", ".join(map(str, found)) for key, found in more.items()}
    return "; ".join(f"{key} {text}" for key, text in words.items() if text)


def finding(table: pd.DataFrame, together: pd.Series, probe: pd.Series) -> str:
    """What a `comparison_table` says, in plain sentences; with the accuracy of ensemble and probe by holdout."""
    rows = table.sort_values("rank")

    def names(chosen: pd.Series) -> str:
        return ", ".join(rows.index[chosen]) or "none"

    best = rows[f"{AVERAGE}_mean"].max()
    text = f"Above ERM on the same batches, with an interval that excludes 0: {names(rows['low'] > 0)}. "
    text += f"Below it: {names(rows['high'] < 0)}. "
    yardsticks = {"Logistic regression on the same features": probe, "The ensemble of the ERM networks": together}
    for name, values in yardsticks.items():
        if len(values) > 1:
            place = (
                "above the mean of every method" if values.mean() > best else "not above the mean of the best method"
            )
            text += f"{name} has {100 * values.mean():.1f} %, {place}. "
    if "ImportanceMask" in rows.index and np.isfinite(rows.loc["ImportanceMask", "difference"]):
        row = rows.loc["ImportanceMask"]
        text += f"Importance masking is number {int(row['rank'])} of {len(rows)}, {signed(row)} points from ERM."
    return text.rstrip()


def cautions(comparison: Comparison, probe: float) -> list[str]:
    """Sentences on methods that did not learn, with any hyperparameters, and on a classifier far below a linear one."""
    run, curves = comparison.run, comparison.curves()
    last = curves[curves["epoch"] == run.settings.ph2_num_epochs]
    last = last[[domain not in held for domain, held in zip(last["domain"], last["holdouts"], strict=True)]]
    trained = last.groupby(["algorithm", "trial"])["in"].mean().groupby("algorithm").max()
    best = comparison.tables()[comparison.headline][f"{AVERAGE}_mean"].max()
    return unlearned(trained, run.facts["counts"], run.settings) + bottleneck(best, probe, run.settings)


def _yardstick(title: str, values: pd.Series) -> list[str]:
    """Accuracies by holdout and their average, in a line below a title; nothing without accuracies."""
    cells = [f"{name} {100 * value:.1f}" for name, value in values.items()]
    cells += [f"average {100 * values.mean():.1f}"] if len(values) > 1 else []
    return ["", f"{title}:", f"  {', '.join(cells)}"] if cells else []


def ensemble(comparison: Comparison) -> pd.Series:
    """Accuracy of the mean probabilities of the ERM networks of all seeds: last epoch, all images; by holdout.

    Empty where ERM on pooled batches is not among the methods. An ensemble has no seed of its own, hence no interval,
    and is paired with nothing.
    """
    run, found = comparison.run, {}
    if PARTNERS["pooled"] not in comparison.names:
        return pd.Series(found, dtype=float)
    for holdout in comparison.single_holdouts:
        saved = run.archive.method(PARTNERS["pooled"], 0, (holdout,))
        params = {name: value[saved.ok] for name, value in saved.params().items()}
        rows = run.data.all_rows([holdout])
        right = [_ensemble_right(comparison, params, part) for part in rows.split(ROWS)]
        found[holdout] = float(torch.cat(right).double().mean())
    return pd.Series(found, dtype=float)


def _ensemble_right(comparison: Comparison, params: Params, rows: Tensor) -> Tensor:
    """Whether the mean probabilities of networks ``[S, …]`` are right on these rows: bool ``[n]``, CPU."""
    data, network = comparison.run.data, comparison.network
    inputs, chances = data.inputs[rows].to(data.like), 0
    with torch.no_grad():
        for s in range(len(next(iter(params.values())))):
            own = {name: value[s].to(data.like) for name, value in params.items()}
            features = network.hidden(own, network.features(own, inputs))
            chances = chances + network.head(own, features).softmax(-1)
    return (chances.argmax(-1) == data.labels[rows]).cpu()


def seed_averages(comparison: Comparison) -> pd.DataFrame:
    """Accuracy on all images, mean over the holdouts, under the headline's rule: seeds × methods."""
    chosen = select(comparison.curves(), comparison.headline)
    by_holdout = chosen.pivot(index=["algorithm", "seed"], columns="holdout", values="full")
    return by_holdout.mean(axis=1, skipna=False).unstack("algorithm")


def failed(comparison: Comparison) -> list[str]:
    """One sentence per failed network."""
    return [
        f"{r['algorithm']}, trial {r['trial']}, holdout {r['holdout']}, seed {r['seed']}: {r['failed']}"
        for r in comparison.run.records()
        if r["failed"] and r["selection"] == "last" and r["algorithm"] in comparison.names
    ]
