"""From records to answers: leave-one-domain-out tables, intervals over seeds, paired differences, the text report.

Every interval is over seeds: it covers starts and batch orders, and is conditional on these images, this split and this
backbone. It says nothing about other domains or data sets.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from scipy.special import stdtrit

from importance import degenerate, expected_overlap, flatten, overlap, statistics
from training import Problem, predict

AVERAGE = "average"
WITHOUT_HARDEST = "average without hardest"
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
    records: Sequence[Mapping],
    selection: str = "last",
    part: str = "full",
    metric: str = "accuracy",
) -> pd.DataFrame:
    """Accuracy of every result: one row per seed, columns (algorithm, holdout); NaN where missing or failed.

    Args:
        records: as `records.Results.records` gives them.
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


def _hardest(table: pd.DataFrame) -> str:
    """Holdout with the lowest mean accuracy of `erm` (of all algorithms where there is no erm)."""
    reference = table["erm"] if "erm" in table.columns.get_level_values(0) else table.T.groupby("holdout").mean().T
    return reference.mean().fillna(np.inf).idxmin()


def _with_averages(frame: pd.DataFrame, hardest: str) -> pd.DataFrame:
    """Seeds × holdouts with the per-seed averages over holdouts; a seed with a gap has no average."""
    frame = frame.copy()
    holdouts = list(frame.columns)
    frame[AVERAGE] = frame[holdouts].mean(axis=1, skipna=False)
    if len(holdouts) > 1:
        frame[WITHOUT_HARDEST] = frame[[h for h in holdouts if h != hardest]].mean(axis=1, skipna=False)
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
        records: of one results directory.
        choice: `selection`, `part`, `metric` as in `accuracy_table`.

    Returns:
        Tidy table: algorithm, holdout (then the averages), n (seeds), mean, low, high (fractions).
    """
    table = accuracy_table(records, **choice)
    hardest = _hardest(table)
    parts = [
        _summarize(_with_averages(table[algorithm], hardest)).assign(algorithm=algorithm)
        for algorithm in table.columns.unique("algorithm")
    ]
    return pd.concat(parts, ignore_index=True)[["algorithm", "holdout", *INTERVAL]]


def paired_differences(records: Sequence[Mapping], algorithm: str, baseline: str = "erm", **choice) -> pd.DataFrame:
    """Accuracy of `algorithm` minus `baseline` on the same seeds, starts and batches, with 95 % t intervals.

    A seed enters a row only if both its networks are there and sound. Same columns as `lodo_table`, fractions.
    """
    table = accuracy_table(records, **choice)
    return _summarize(_with_averages(table[algorithm] - table[baseline], _hardest(table)))


def wide_table(table: pd.DataFrame) -> pd.DataFrame:
    """A tidy table (`lodo_table`) for reading: a row per algorithm, "mean ± half width" in per cent, "–" for none."""

    def cell(row: pd.Series) -> str:
        if np.isnan(row["mean"]):
            return "–"
        mean, half = 100 * row["mean"], 50 * (row["high"] - row["low"])
        return f"{mean:.1f} ± {half:.1f}" if np.isfinite(half) else f"{mean:.1f}"

    text = table.assign(text=table.apply(cell, axis=1))
    return text.pivot(index="algorithm", columns="holdout", values="text")[table["holdout"].unique()].rename_axis(
        columns=None
    )


def levels(counts: Mapping[str, Mapping[str, int]]) -> tuple[float, dict[str, float]]:
    """What costs nothing: chance, 1/classes; and each domain's share of its largest class.

    Args:
        counts: domain -> class -> number of images.
    """
    majority = {domain: max(classes.values()) / sum(classes.values()) for domain, classes in counts.items()}
    return 1 / len(next(iter(counts.values()))), majority


def statistics_table(moved: Sequence[torch.Tensor], mask: Sequence[torch.Tensor]) -> pd.DataFrame:
    """`importance.statistics` of a stack as a table: a row per layer and one for all, means over sound seeds.

    Args:
        moved: importance, L × ``[S, out, in]``.
        mask: L × bool ``[S, out, in]``.
    """
    sound = ~degenerate(moved)
    rows = statistics([layer[sound] for layer in moved], [layer[sound] for layer in mask])
    means = [{name: v if name == "layer" else float(v.double().mean()) for name, v in row.items()} for row in rows]
    return pd.DataFrame(means).set_index("layer")


def overlap_table(masks: Mapping[str, Sequence[torch.Tensor]]) -> tuple[pd.DataFrame, float]:
    """How far masks agree: mean IoU over seeds for every pair, and the IoU that chance gives.

    Args:
        masks: name -> L × bool ``[S, out, in]``, all of the same density.
    """
    flat = flatten(next(iter(masks.values())))

    def agreement(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> float:
        both = flatten(a).any(-1) & flatten(b).any(-1)  # a failed network has an empty mask
        return float(overlap(a, b)[both].mean())

    values = [[agreement(a, b) for b in masks.values()] for a in masks.values()]
    count = int(flat.sum(-1).max())
    return pd.DataFrame(values, list(masks), list(masks)), expected_overlap(count, count, flat.shape[-1])


def confusion(
    problem: Problem, holdout: str, arrays: Mapping, hidden_sizes: Sequence[int], sound: torch.Tensor
) -> np.ndarray:
    """Confusion counts of the final networks on the held-out domain, summed over sound seeds.

    Args:
        problem: the features.
        holdout: domain tested on, all of its images.
        arrays: a weights file (`records.Results.load`): "final.<parameter>" -> ``[S, …]``.
        hidden_sizes: of the classifier.
        sound: bool ``[S]``, networks that did not fail.

    Returns:
        int64 ``[classes, classes]``, rows are the true class.
    """
    final = {name.removeprefix("final."): value for name, value in arrays.items() if name.startswith("final.")}
    params = {name: value[sound].unsqueeze(1) for name, value in final.items()}
    from sklearn.metrics import confusion_matrix  # takes half a second to import, which only figures need

    rows = problem.rows([holdout], "all")
    classes = len(problem.class_names)
    if not sound.any():
        return np.zeros((classes, classes), dtype=np.int64)
    predicted = predict(params, problem.features[rows], hidden_sizes).flatten().cpu()
    true = problem.labels[rows].cpu().repeat(int(sound.sum()))
    return confusion_matrix(true, predicted, labels=range(classes))


def finding(records: Sequence[Mapping], algorithm: str = "importance", baseline: str = "erm") -> str:
    """The headline in one sentence, computed: last epoch, all images of the domain, mean over the holdouts."""
    differences = paired_differences(records, algorithm, baseline).set_index("holdout").loc[AVERAGE]
    if differences["n"] == 0:
        return "No seed has sound networks on all held-out domains: there is no answer."
    if not np.isfinite(differences["low"]):
        failed = {r["seed"] for r in records if r["failed"] and r["algorithm"] in (algorithm, baseline)}
        if not failed:
            return "One seed gives no interval: use more seeds for an answer."
        return f"One sound seed is left, networks of {len(failed)} others failed: that gives no interval and no answer."
    n, mean, low, high = (differences[name] * (1 if name == "n" else 100) for name in INTERVAL)
    interval = f"{mean:+.2f} points (95 % interval {low:+.2f} to {high:+.2f}, {n:.0f} seeds)"
    holdouts = {record["holdout"] for record in records}
    subject = f"averaged over the {len(holdouts)} held-out domains" if len(holdouts) > 1 else f"on {min(holdouts)}"
    if low > 0:
        return f"Importance masking helps here: {interval} against {baseline}, {subject}."
    if high < 0:
        return f"Importance masking hurts here: {interval} against {baseline}, {subject}."
    return f"No difference is shown: importance masking changes accuracy by {interval} against {baseline}, {subject}."


def report(records: Sequence[Mapping], about: Mapping, failures: Sequence[str] = ()) -> str:
    """The whole answer as text.

    Args:
        records: of one results directory.
        about: its settings.json.
        failures: one sentence per failed network.
    """
    facts = about["features"]
    chance, majority = levels(facts["counts"])
    model = facts["model"]["name"] if facts["model"] else "a model that is not named"
    lines = [
        "Domain generalization with importance-based weight masking",
        "",
        f"Features: {facts['dataset']}, {model}, {facts['feature_size']}-d (fingerprint {facts['fingerprint']})",
        "",
        finding(records),
        "Intervals are 95 % t intervals over seeds: they cover starts and batch orders, and are conditional on these",
        "images, this split and this backbone.",
    ]
    for selection, part, metric in (
        ("last", "full", "accuracy"),
        ("last", "in", "accuracy"),
        ("last", "full", "balanced_accuracy"),
        ("val", "full", "accuracy"),
    ):
        choice = {"selection": selection, "part": part, "metric": metric}
        lines += ["", *_section(records, choice)]
    lines += ["", f"Chance is {100 * chance:.1f} %. Share of the largest class (%):"]
    lines += [f"  {domain}: {100 * share:.1f}" for domain, share in majority.items()]
    notes = sorted({record["note"] for record in records if "note" in record})
    lines += ["", *(f"Note on selection by validation: {note}" for note in notes)] if notes else []
    lines += ["", f"Settings ({about['hash']}):", *(f"  {name} = {value}" for name, value in about["settings"].items())]
    if failures:
        lines += ["", f"{len(failures)} networks failed and are left out:", *(f"  {text}" for text in failures)]
    return "\n".join(lines) + "\n"


def _difference(row) -> str:
    if row.n == 0:
        return "no seed whose networks are sound"
    bounds = f" [{100 * row.low:+.2f}, {100 * row.high:+.2f}]" if np.isfinite(row.low) else ""
    return f"{100 * row.mean:+.2f}{bounds}, {row.n} {'seed' if row.n == 1 else 'seeds'}"


PARTS = {"full": "all images of the held-out domain", "in": "its `in` part (what DomainBed reports)"}
RULES = {"last": "last epoch", "val": "epoch of best source validation"}


def _section(records: Sequence[Mapping], choice: Mapping[str, str]) -> list[str]:
    """Table and paired differences of one choice of selection, part and metric."""
    metric = choice["metric"].replace("_", " ")
    title = f"{metric.capitalize()} (%), {PARTS[choice['part']]}, {RULES[choice['selection']]}"
    table = lodo_table(records, **choice)
    lines = [title, "-" * len(title), wide_table(table).to_string()]
    if WITHOUT_HARDEST in set(table["holdout"]):
        lines.append(f"The hardest domain is {_hardest(accuracy_table(records, **choice))}.")
    if {"importance", "erm"} <= set(table["algorithm"]):
        difference = paired_differences(records, "importance", "erm", **choice)
        lines += ["importance − erm, paired by seed (points):"]
        lines += [f"  {row.holdout}: {_difference(row)}" for row in difference.itertuples()]
    return lines
