"""Records: what a trained network reached on the held-out domain, one JSON object for each selection rule."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from engine import accuracies, failure_reason
from storage import record_key
from study.run import Run
from trainer_phase2 import select_epoch

SELECTIONS = ("last", "val")
MASKS_SAW_VALIDATION = "Phase 1 trained on all images, so the mask saw the validation images."


class Counted(NamedTuple):
    """What records are made from, of S networks."""

    seeds: Sequence[int]
    validation_accuracy: Tensor  # [S, E]
    correct: Tensor  # right answers, [S, E, domains, 2, classes]
    failed: Tensor  # codes [S]


def make_records(
    run: Run,
    name: str,
    holdouts: Sequence[str],
    counted: Counted,
    more: Mapping | None = None,
    peeked: bool = False,
    selections: Sequence[str] = SELECTIONS,
) -> list[dict]:
    """One record per selection rule and seed; with two holdouts the accuracies are those on the first of them.

    Args:
        name: of the arm or method.
        holdouts: domains left out of training.
        more: further entries (a comparison's trial and hyperparameters).
        peeked: the masks depend on validation images, which is noted where validation selects.
        selections: rules, see `trainer_phase2.select_epoch`.
    """
    totals = run.data.totals.cpu()
    shares = {
        "accuracy": accuracies(counted.correct, totals),
        "balanced_accuracy": accuracies(counted.correct, totals, balanced=True),
    }
    target, records = run.features.domain_names.index(holdouts[0]), []
    for selection in selections:
        epochs = select_epoch(counted.validation_accuracy, selection).tolist()
        for s, (seed, epoch) in enumerate(zip(counted.seeds, epochs, strict=True)):
            code = int(counted.failed[s])
            record = {
                "algorithm": name,
                "dataset": run.features.dataset,
                "features": run.features.fingerprint,
                "holdout": "+".join(holdouts),
                "sources": list(run.data.sources(holdouts)),
                "seed": seed,
                "selection": selection,
                "settings": run.settings.hash,
                **(more or {}),
                "validation": None if code else float(counted.validation_accuracy[s, epoch]),
                "epoch": None if code else epoch + 1,
                "failed": failure_reason(code) if code else None,
            }
            if peeked and selection == "val":
                record["note"] = MASKS_SAW_VALIDATION
            for key, parts in shares.items():
                record[key] = None if code else {part: float(v[s, epoch, target]) for part, v in parts.items()}
            records.append({"key": record_key(record), **record})
    return records
