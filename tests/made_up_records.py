"""Records as `Study` makes them, with accuracies that were made up."""

import numpy as np
import pytest
from scipy import stats


def make_record(algorithm, holdout, seed, accuracy, selection="last"):
    """As `Study` makes them; the other parts and the balanced accuracy are shifted, so that a mix-up shows."""

    def shifted(by):
        return {"full": accuracy + by, "in": accuracy + by + 0.01, "out": accuracy + by - 0.02}

    return {
        "key": f"{algorithm}/{holdout}/{seed}/{selection}",
        "algorithm": algorithm,
        "dataset": "toy",
        "features": "abc",
        "holdout": holdout,
        "seed": seed,
        "selection": selection,
        "settings": "123",
        "accuracy": None if accuracy is None else shifted(0),
        "balanced_accuracy": None if accuracy is None else shifted(-0.05),
        "epoch": None if accuracy is None else 10,
        "failed": "the loss is no longer finite in epoch 2" if accuracy is None else None,
    }


def make_records(table, selections=("last",)):
    """From {algorithm: {holdout: accuracies by seed}}; under "val" everything is 0.03 lower."""
    drop = {"last": 0, "val": 0.03}
    return [
        make_record(algorithm, holdout, seed, None if value is None else value - drop[selection], selection)
        for selection in selections
        for algorithm, holdouts in table.items()
        for holdout, values in holdouts.items()
        for seed, value in enumerate(values)
    ]


# erm is worst on sketch (0.5), importance on photo (0.3).
HAND = {
    "erm": {"art": [0.9, 0.8, 0.7], "photo": [0.5, 0.7, 0.6], "sketch": [0.6, 0.4, 0.5]},
    "importance": {"art": [0.95, 0.85, 0.9], "photo": [0.3, 0.4, 0.2], "sketch": [0.9, 0.9, 0.9]},
}
FAILED = {**HAND, "importance": {**HAND["importance"], "photo": [0.3, None, 0.2]}}


def row(table, algorithm, holdout):
    found = table[(table["algorithm"] == algorithm) & (table["holdout"] == holdout)]
    assert len(found) == 1
    return found.iloc[0]


def assert_interval(found, values):
    """Row of n, mean, low, high against scipy's own interval for the values."""
    mean, error = sum(values) / len(values), np.std(values, ddof=1) / len(values) ** 0.5
    low, high = stats.t.interval(0.95, len(values) - 1, loc=mean, scale=error) if error > 0 else (mean, mean)
    assert found["n"] == len(values)
    assert [found["mean"], found["low"], found["high"]] == pytest.approx([mean, low, high], abs=1e-12)
