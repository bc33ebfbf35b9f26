"""The answer of a run as text."""

from collections.abc import Mapping, Sequence

import numpy as np

from study.tables import (
    AVERAGE,
    INTERVAL,
    WITHOUT_HARDEST,
    accuracy_table,
    hardest,
    levels,
    lodo_table,
    paired_differences,
    wide_table,
)


def finding(records: Sequence[Mapping], algorithm: str = "importance", baseline: str = "erm") -> str:
    """The headline in one sentence, computed: last epoch, all images of the domain, mean over the holdouts."""
    differences = paired_differences(records, algorithm, baseline).set_index("holdout").loc[AVERAGE]
    if differences["n"] == 0:
        return "No seed has a usable network on every held-out domain: there is no answer."
    if not np.isfinite(differences["low"]):
        failed = {r["seed"] for r in records if r["failed"] and r["algorithm"] in (algorithm, baseline)}
        if not failed:
            return "One seed gives no interval: use more seeds for an answer."
        return (
            f"One usable seed is left, networks of {len(failed)} others failed: that gives no interval and no answer."
        )
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
        return "no seed with usable networks"
    bounds = f" [{100 * row.low:+.2f}, {100 * row.high:+.2f}]" if np.isfinite(row.low) else ""
    return f"{100 * row.mean:+.2f}{bounds}, {row.n} {'seed' if row.n == 1 else 'seeds'}"


PARTS = {"full": "all images of the held-out domain", "in": "its `in` part (what DomainBed reports)"}
SELECTION_WORDS = {"last": "last epoch", "val": "epoch of best source validation"}


def _section(records: Sequence[Mapping], choice: Mapping[str, str]) -> list[str]:
    """Table and paired differences of one choice of selection, part and metric."""
    metric = choice["metric"].replace("_", " ")
    title = f"{metric.capitalize()} (%), {PARTS[choice['part']]}, {SELECTION_WORDS[choice['selection']]}"
    table = lodo_table(records, **choice)
    lines = [title, "-" * len(title), wide_table(table).to_string()]
    if WITHOUT_HARDEST in set(table["holdout"]):
        lines.append(f"The hardest domain is {hardest(accuracy_table(records, **choice))}.")
    if {"importance", "erm"} <= set(table["algorithm"]):
        difference = paired_differences(records, "importance", "erm", **choice)
        lines += ["importance − erm, paired by seed (points):"]
        lines += [f"  {row.holdout}: {_difference(row)}" for row in difference.itertuples()]
    return lines
