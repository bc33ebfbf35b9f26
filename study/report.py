"""The answer of a run as text."""

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np

from config import Settings
from study.tables import (
    AVERAGE,
    FEWEST_SEEDS,
    INTERVAL,
    WITHOUT_HARDEST,
    accuracy_table,
    hardest,
    levels,
    lodo_table,
    paired_differences,
    wide_table,
)

LEARNED = 0.1  # of the way from the share of the largest class to 1: training accuracy of networks that have learned
FAR = 0.05  # accuracy by which a linear probe is far above a network


UNITS = "In tables ± is the standard error over seeds; intervals are 95 % t intervals over seeds: they cover {}."


def finding(records: Sequence[Mapping], algorithm: str = "importance", baseline: str = "erm") -> str:
    """The headline in one sentence, computed: last epoch, all images of the domain, mean over the holdouts."""
    if lacking := [name for name in (algorithm, baseline) if name not in {r["algorithm"] for r in records}]:
        return f"There is no finding without the arm {lacking[0]}."
    differences = paired_differences(records, algorithm, baseline).set_index("holdout").loc[AVERAGE]
    if differences["n"] == 0:
        return "No seed has a usable network on every held-out domain: there is no answer."
    if not np.isfinite(differences["low"]):
        failed = {r["seed"] for r in records if r["failed"] and r["algorithm"] in (algorithm, baseline)}
        if not failed:
            return "One seed gives no interval: use more seeds for an answer."
        others = f"networks of {len(failed)} others failed"
        return f"One usable seed is left, {others}: that gives no interval and no answer."
    n, mean, low, high = (differences[name] * (1 if name == "n" else 100) for name in INTERVAL)
    interval = f"{mean:+.2f} points (95 % interval {low:+.2f} to {high:+.2f}, {n:.0f} seeds)"
    holdouts = {record["holdout"] for record in records}
    subject = f"averaged over the {len(holdouts)} held-out domains" if len(holdouts) > 1 else f"on {min(holdouts)}"
    verdict = "No difference is shown: importance masking changes accuracy by"
    if n < FEWEST_SEEDS:
        verdict = f"Too few seeds for a verdict ({FEWEST_SEEDS} are needed): importance masking changes accuracy by"
    elif low > 0 or high < 0:
        verdict = f"Importance masking {'helps' if low > 0 else 'hurts'} here:"
    return f"{verdict} {interval} against {baseline}, {subject}."


def covered(split_seed: int | str) -> str:
    """What intervals over seeds cover, and what not, for the setting `SPLIT_SEED`."""
    if split_seed == "seed":
        return "starts, batch orders and splits, and are conditional on these images and this backbone"
    return "starts and batch orders, and are conditional on these images, this split and this backbone"


def unlearned(
    trained: Mapping[str, float],
    counts: Mapping[str, Mapping[str, int]],
    settings: Settings,
    *names: str,
    images: str = "their training images",
) -> list[str]:
    """A warning if networks are hardly better on their own training images than a constant answer.

    Args:
        trained: what the networks are -> accuracy on the images that they were trained on, mean over seeds.
        counts: domain -> class -> number of images.
        names: of the settings to raise; default those of Phase 2.
        images: words for them, where they are others of the same domains.
    """
    majority = float(np.mean([*levels(counts)[1].values()]))
    found = {name: share for name, share in trained.items() if share - majority < LEARNED * (1 - majority)}
    if not found:
        return []
    names = names or ("PH2_NUM_EPOCHS", "PH2_LR_IMPORTANT")
    return [
        f"Warning: networks did not learn ({', '.join(found)}): they classify {100 * max(found.values()):.1f} % of "
        f"{images} correctly at most, and {100 * majority:.1f} % are of the largest class. What is "
        f"compared with them means little: raise {_now(settings, *names)}."
    ]


def bottleneck(best: float, probe: float, settings: Settings) -> list[str]:
    """A warning if the accuracy of a linear probe is far above that of the best network."""
    if not probe - best > FAR:
        return []
    return [
        f"Warning: the classifier is the bottleneck: logistic regression on the same features is "
        f"{100 * (probe - best):.1f} points above the best network. Raise "
        f"{_now(settings, 'PH2_NUM_EPOCHS', 'HIDDEN_SIZES')}."
    ]


def _now(settings: Settings, *names: str) -> str:
    """Settings with their values, in words; with trained blocks those that take their place."""
    values = settings.as_dict()
    return " or ".join(f"{name} (now {values[name]})" for name in (settings.constant(name.lower()) for name in names))


def report(
    records: Sequence[Mapping], about: Mapping, failures: Sequence[str] = (), warnings: Sequence[str] = ()
) -> str:
    """The whole answer of a results directory as text; `about`: its settings.json; a sentence per failed network."""
    facts = about["features"]
    chance, majority = levels(facts["counts"])
    model = facts["model"]["name"] if facts["model"] else "a model that is not named"
    lines = [
        "Domain generalization with importance-based weight masking",
        "",
        f"Features: {facts['dataset']}, {model}, {facts['feature_size']}-d (fingerprint {facts['fingerprint']})",
        "",
        *(
            line
            for text in (finding(records), UNITS.format(covered(about["settings"]["SPLIT_SEED"])), *warnings)
            for line in textwrap.wrap(text, 110)
        ),
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
