"""Which arms are compared, fixed in advance, and the tables that compare them.

*Headline:* last epoch, all images of the held-out domain, mean over the holdouts. *Confirmatory family:* `importance`
minus each of `erm`, `random` and `permuted`, from a fresh start and from Phase 1's: six contrasts, averaged over the
holdouts within each seed, then compared over seeds (`statistics.family`). Everything else is exploratory.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import pandas as pd

from evidence.statistics import family
from study import AVERAGE, CONTROLS, WITHOUT_HARDEST, Arm, Study, accuracy_table, paired_differences, t_interval

BASELINES = ("erm", "random", "permuted")
STARTS = (None, "phase1")  # as the settings say, and from Phase 1's start


class Contrast(NamedTuple):
    """An arm and what it is compared with, on the same seeds, starts and batches."""

    arm: Arm
    baseline: Arm

    @property
    def name(self) -> str:
        """How tables and reports call it."""
        return f"{self.arm.name} − {self.baseline.name}"

    def differences(self, averages: pd.DataFrame) -> pd.Series:
        """Accuracy of the arm minus that of the baseline, by seed, from `seed_averages`."""
        return averages[self.arm.name] - averages[self.baseline.name]


def against(controls: Sequence[str]) -> tuple[Contrast, ...]:
    """Contrasts of `importance` with each control, from each of the starts."""
    return tuple(Contrast(Arm("importance", start), Arm(control, start)) for start in STARTS for control in controls)


FAMILY = against(BASELINES)
FROZEN_FEATURES = [name for name, control in CONTROLS.items() if not control.pretrained]
OTHERS = against([name for name in FROZEN_FEATURES if name not in ("importance", *BASELINES)])
FAMILY_ARMS = tuple(dict.fromkeys(arm for contrast in FAMILY for arm in contrast))


def seed_averages(records: Sequence[Mapping]) -> pd.DataFrame:
    """Headline accuracy averaged over the holdouts within each seed: seeds × arms, NaN where one is missing."""
    table = accuracy_table(records)
    averages = {name: table[name].mean(axis=1, skipna=False) for name in table.columns.unique("algorithm")}
    return pd.DataFrame(averages).rename_axis("seed")


def family_table(records: Sequence[Mapping]) -> pd.DataFrame:
    """The confirmatory family, a row per contrast: see `statistics.family` for the columns."""
    averages = seed_averages(records)
    return family({contrast.name: contrast.differences(averages) for contrast in FAMILY})


def others_table(records: Sequence[Mapping]) -> pd.DataFrame:
    """Exploratory: `importance` minus each control outside the family: contrast, n, mean, low, high (fractions)."""
    averages, rows = seed_averages(records), []
    for contrast in OTHERS:
        values = contrast.differences(averages).dropna()
        rows.append((contrast.name, len(values), *t_interval(values)))
    return pd.DataFrame(rows, columns=["contrast", "n", "mean", "low", "high"])


def domains_table(records: Sequence[Mapping], epochs: int) -> pd.DataFrame:
    """Exploratory: the family's contrasts on each domain: epochs, contrast, holdout, n, mean, low, high (fractions)."""
    tables = {c.name: paired_differences(records, c.arm.name, c.baseline.name) for c in FAMILY}
    table = pd.concat(tables, names=["contrast", None]).reset_index("contrast").assign(epochs=epochs)
    single = table[~table["holdout"].isin([AVERAGE, WITHOUT_HARDEST])]
    return single[["epochs", "contrast", "holdout", "n", "mean", "low", "high"]]


def sweep_table(records: Sequence[Mapping], arms: Sequence[Arm]) -> pd.DataFrame:
    """Exploratory: accuracy averaged over the holdouts for each arm, of which at most one setting differs.

    Returns:
        algorithm (the control), setting and value (as text; empty if nothing differs), n, mean, low, high (fractions).
    """
    averages, rows = seed_averages(records), []
    for arm in arms:
        values = averages[arm.name].dropna()
        setting, value = arm.changes[0] if arm.changes else ("", "")
        rows.append((arm.control, setting, str(value), len(values), *t_interval(values)))
    return pd.DataFrame(rows, columns=["algorithm", "setting", "value", "n", "mean", "low", "high"])


def splits_table(records: Mapping[int, Sequence[Mapping]]) -> pd.DataFrame:
    """Exploratory: how the answer depends on the split, from the records of studies of one split each.

    Returns:
        split (its seed), n (seeds), erm (accuracy averaged over the holdouts), and mean, low, high of `importance` −
        `erm` (95 % t interval over seeds); fractions.
    """
    rows = []
    for split, own in records.items():
        averages = seed_averages(own)
        values = FAMILY[0].differences(averages).dropna()
        rows.append((split, len(values), averages["erm"].mean(), *t_interval(values)))
    return pd.DataFrame(rows, columns=["split", "n", "erm", "mean", "low", "high"])


def source_averages(study: Study) -> pd.DataFrame:
    """Accuracy on the sources' `out` part, last epoch, averaged over the holdouts: seeds × arms of the family."""
    found = {}
    for arm in FAMILY_ARMS:
        networks = [study.run.archive.phase2(holdout, arm.name) for holdout in study.run.holdouts]
        last = [pd.Series(n.curves["validation_accuracy"][-1].numpy(), index=n.seeds) for n in networks]
        found[arm.name] = pd.concat(last, axis=1).mean(axis=1, skipna=False)  # NaN for failed networks
    return pd.DataFrame(found).rename_axis("seed")
