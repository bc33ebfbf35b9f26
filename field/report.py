"""What a comparison says: the report, a table per selection rule, and two yardsticks that no method is paired with."""

import textwrap

import numpy as np
import pandas as pd
from torch import Tensor, nn
from torch.func import functional_call, vmap

from engine import Params
from field.compare import PARTNERS, Comparison
from field.selection import HEADLINE, RULES, as_text, select, signed
from study import AVERAGE

PROBE = "linear_probe.csv"
INTRODUCTION = """\
Accuracy (%) on all images of the held-out domain, mean ± standard error over seeds. Differences are from
ERM on the same kind of batches (pooled, or balanced by domain), paired by seed and averaged over the
holdouts, in points, with 95 % t intervals over seeds: they cover starts and batch orders, conditional on
images, split and backbone. With many methods some intervals exclude 0 by chance: a survey, not a test."""


def write(comparison: Comparison) -> str:
    """Write ``comparison.txt``, a table per selection rule as CSV, and the averages by seed; returns the text."""
    text, results = report(comparison), comparison.run.results
    with comparison.run.writing():
        results.write_text("comparison.txt", text)
        results.write_text("comparison_seeds.csv", seed_averages(comparison).to_csv(float_format="%.6g"))
        for rule in RULES:
            name = f"comparison_{rule}.csv"
            if rule in comparison.tables():
                results.write_text(name, comparison.tables()[rule].to_csv())
            else:
                (results.directory / name).unlink(missing_ok=True)  # of an earlier comparison, with pairs of holdouts
    return text


def report(comparison: Comparison) -> str:
    """The whole comparison as text."""
    together, probe = ensemble(comparison), probe_accuracy(comparison)
    lines = [*_introduction(comparison), ""]
    lines += textwrap.wrap(finding(comparison.tables()[HEADLINE], together, probe), 110)
    for rule, table in comparison.tables().items():
        title = RULES[rule].title
        lines += ["", title, "-" * len(title), as_text(table)]
        if rule == "oracle" and comparison.trials == 1:
            lines += ["(There is one trial to choose from: the same networks as at the last epoch.)"]
    lines += _yardstick("Logistic regression on the features (deterministic; unpaired)", probe)
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
    draws = f", and {trials - 1} random draw{'s' if trials > 2 else ''}" if trials > 1 else ""
    lines = [
        "Methods of the field on frozen features",
        "",
        run.features.describe(),
        f"Classifier: {sizes}; {run.settings.ph2_num_epochs} epochs; {len(run.seeds)} seeds; "
        f"hyperparameters of every method: its defaults{draws}.",
        INTRODUCTION,
    ]
    if peeking := [method.__name__ for method in comparison.methods if comparison.saw_validation(method)]:
        text = f"The masks of {', '.join(peeking)} saw the validation images: Phase 1 trained on all images."
        lines += textwrap.wrap(text, 110)
    return lines


def finding(table: pd.DataFrame, together: pd.Series, probe: pd.Series) -> str:
    """What a table says, in plain sentences, computed.

    Args:
        table: as `selection.comparison_table` returns it.
        together: accuracy of the ensemble by holdout, as `ensemble` returns it.
        probe: accuracy of logistic regression on the features by holdout, on the same images as the table.
    """
    rows = table.sort_values("rank")

    def names(chosen: pd.Series) -> str:
        return ", ".join(rows.index[chosen]) or "none"

    best = rows[f"{AVERAGE}_mean"].max()
    text = f"Above ERM on the same batches, with an interval that excludes 0: {names(rows['low'] > 0)}. "
    text += f"Below it: {names(rows['high'] < 0)}. "
    yardsticks = {"Logistic regression on the same features": probe, "The ensemble of the ERM networks": together}
    for name, values in yardsticks.items():
        if len(values) > 1:
            relation = "above" if values.mean() > best else "not above"
            text += f"{name} has {100 * values.mean():.1f} %, {relation} the mean of every method. "
    if "ImportanceMask" in rows.index and np.isfinite(rows.loc["ImportanceMask", "difference"]):
        row = rows.loc["ImportanceMask"]
        text += f"Importance masking is number {int(row['rank'])} of {len(rows)}, {signed(row)} points from ERM."
    return text.rstrip()


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
        chances = logits(run.network, params, run.data.features[rows].cpu()).softmax(-1).mean(0)
        found[holdout] = float((chances.argmax(-1) == run.data.labels[rows].cpu()).double().mean())
    return pd.Series(found, dtype=float)


def logits(network: nn.Module, params: Params, features: Tensor) -> Tensor:
    """Logits of S networks on the same rows ``[N, D]``: ``[S, N, classes]``."""
    return vmap(lambda own: functional_call(network, own, (features,)))(params)


def probe_accuracy(comparison: Comparison) -> pd.Series:
    """Accuracy of logistic regression on the features by holdout; kept on disk, because it takes a while."""
    from evidence import linear_probe  # imports scikit-learn, which takes a second

    results, holdouts = comparison.run.results, [*comparison.single_holdouts]
    path = results.directory / PROBE
    kept = pd.read_csv(path, index_col="holdout") if path.is_file() else pd.DataFrame()
    if not set(holdouts) <= set(kept.index):
        kept = linear_probe(comparison.run.data, holdouts)
        results.write_text(PROBE, kept.to_csv())
    return kept.loc[holdouts, "full"]


def seed_averages(comparison: Comparison) -> pd.DataFrame:
    """Accuracy on all images, mean over the holdouts, under the headline's rule: seeds × methods."""
    chosen = select(comparison.curves(), HEADLINE)
    by_holdout = chosen.pivot(index=["algorithm", "seed"], columns="holdout", values="full")
    return by_holdout.mean(axis=1, skipna=False).unstack("algorithm")


def failed(comparison: Comparison) -> list[str]:
    """One sentence per failed network."""
    return [
        f"{r['algorithm']}, trial {r['trial']}, holdout {r['holdout']}, seed {r['seed']}: {r['failed']}"
        for r in comparison.run.records()
        if r["failed"] and r["selection"] == "last" and r["algorithm"] in comparison.names
    ]
