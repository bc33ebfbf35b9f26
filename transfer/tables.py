"""Records of the transfer study as one table."""

from collections.abc import Iterable, Mapping

import pandas as pd

COLUMNS = (
    "task", "protocol", "arm", "cut", "amount", "n", "repeat", "updates", "accuracy", "balanced_accuracy",
    "seen_accuracy", "failed",
)  # fmt: skip


def long_table(records: Iterable[Mapping]) -> pd.DataFrame:
    """A row per run and number of updates after which it was tested, in the order of the records.

    Args:
        records: of the transfer study, as `storage.Results.records` gives them; others are passed over.

    Returns:
        Columns task, protocol, arm (kind), cut, amount (share), n (training images), repeat, updates, accuracy and
        balanced_accuracy (on the test split, fractions), seen_accuracy (the same on the whole training split; NaN
        where it was not measured), failed (why, or None). A run that failed has one row, at its last checkpoint, with
        NaN for accuracies.
    """
    rows = []
    for record in records:
        if "arm" not in record:
            continue
        own = {name: record[name] for name in ("task", "protocol", "arm", "cut", "amount", "n", "repeat", "failed")}
        shares = {name: record.get(name) or {} for name in ("accuracy", "balanced_accuracy", "seen_accuracy")}
        steps = list(shares["accuracy"]) or [record["updates"]]
        rows += [
            own | {"updates": int(step)} | {name: by_step.get(step) for name, by_step in shares.items()}
            for step in map(str, steps)
        ]
    numbers = dict.fromkeys(("amount", "accuracy", "balanced_accuracy", "seen_accuracy"), float)
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(numbers)
