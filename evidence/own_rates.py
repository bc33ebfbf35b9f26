"""Arms that each choose their own learning rate: a mask that trains fewer weights wants a larger step.

A comparison of masks at one learning rate would measure the learning rate ("Random Masking Finds Winning Tickets",
ICML 2024). Each arm takes the rate of a fixed grid that is best for it by the accuracy on the sources' `out` part after
the last epoch, per held-out domain, mean over source domains and over the first seeds; the other seeds are trained at
that rate alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import pandas as pd

from study import Arm, Run, Study

BLOCKS, CLASSIFIER = "BACKBONE_LEARNING_RATE", "PH2_LR_IMPORTANT"  # the rates that an arm may choose


def at_rate(arm: Arm, rate: float, setting: str) -> Arm:
    """The arm with a learning rate of its own."""
    return replace(arm, changes=(*arm.changes, (setting, rate)))


def chosen_rates(
    records: Sequence[Mapping],
    arms: Sequence[Arm],
    holdouts: Sequence[str],
    setting: str,
    rates: Sequence[float],
    label: Callable[[Arm], str],
) -> pd.DataFrame:
    """The rate of each arm and holdout with the best mean validation accuracy; the smaller of equals.

    Args:
        setting: that the rates are of.
        rates: the grid, ascending.
        label: how tables call an arm.

    Returns:
        arm, holdout, rate, validation (mean over seeds and source domains, a fraction; networks that failed count as
        0), and edge: whether the rate is the smallest or the largest of the grid.
    """
    table = pd.DataFrame([(r["algorithm"], r["holdout"], r["validation"]) for r in records]).fillna(0.0)
    means, rows = table.groupby([0, 1])[2].mean(), []
    for arm in arms:
        for holdout in holdouts:
            found = {rate: means[at_rate(arm, rate, setting).name, holdout] for rate in rates}
            best = max(rates, key=lambda rate: (found[rate], -rate))
            rows.append((label(arm), holdout, best, found[best], best in (rates[0], rates[-1])))
    return pd.DataFrame(rows, columns=["arm", "holdout", "rate", "validation", "edge"])


def at_chosen_rates(
    records: Sequence[Mapping], arms: Sequence[Arm], chosen: pd.DataFrame, setting: str, label: Callable[[Arm], str]
) -> list[dict]:
    """The records of each arm at its rate on each holdout (a table of `chosen_rates`), under the arm's label."""
    wanted, named = {}, {label(arm): arm for arm in arms}
    for row in chosen.itertuples():
        wanted[at_rate(named[row.arm], row.rate, setting).name, row.holdout] = row.arm
    keys = ((record, wanted.get((record["algorithm"], record["holdout"]))) for record in records)
    return [record | {"algorithm": arm} for record, arm in keys if arm is not None]


@dataclass(frozen=True)
class OwnRates:
    """Arms in one results directory, each at the rate that it chooses; resumable as a `Study` is.

    Args:
        run: of all seeds.
        setting: that the rates are of, `BLOCKS` or `CLASSIFIER`.
        rates: the grid, ascending.
        rate_seeds: how many of the first seeds the choice is made on.
        label: how tables call an arm.
    """

    run: Run
    arms: Sequence[Arm]
    setting: str
    rates: Sequence[float]
    rate_seeds: int
    label: Callable[[Arm], str]

    @cached_property
    def tried(self) -> Study:
        """All arms at all rates, on the first seeds."""
        arms = [at_rate(arm, rate, self.setting) for arm in self.arms for rate in self.rates]
        first = self.run.beside(self.run.results, seeds=self.run.seeds[: self.rate_seeds])
        return Study(first, arms, records_only=True)

    def chosen(self) -> pd.DataFrame:
        """See `chosen_rates`; all rates must have been trained."""
        records = self.tried.records()
        return chosen_rates(records, self.arms, self.run.holdouts, self.setting, self.rates, self.label)

    def at_rates(self) -> dict[str, list[Arm]]:
        """Holdout -> the arms at the rates that they chose there; all rates must have been trained."""
        named = {self.label(arm): arm for arm in self.arms}
        return {
            holdout: [at_rate(named[row.arm], row.rate, self.setting) for row in chosen.itertuples()]
            for holdout, chosen in self.chosen().groupby("holdout", sort=False)
        }

    @property
    def whole(self) -> Study:
        """The arms at their rates, on all seeds."""
        return Study(self.run, self.at_rates(), records_only=True)

    def train(self) -> None:
        """Train what is missing."""
        self.tried.train()
        self.whole.train()

    def records(self) -> list[dict]:
        """The records of each arm at its rates, under its label."""
        return at_chosen_rates(self.whole.records(), self.arms, self.chosen(), self.setting, self.label)
