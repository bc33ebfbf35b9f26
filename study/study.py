"""Phase 1, masks and Phase 2 of several arms on the same seeds, starts and batches, everything on disk.

A study is resumable: it trains what its results directory does not hold yet, in units of (phase, domain or holdout,
chunk of seeds), and each unit is on disk before the next begins.
"""

from collections.abc import Callable, Sequence
from functools import cache

from torch import Tensor

from config import Settings
from study.controls import ERM, IMPORTANCE, Arm, MaskSource, check_arms
from study.records import SELECTIONS, Counted, make_records
from study.report import report
from study.run import Run
from trainer_phase1 import DomainNetworks, train_domain
from trainer_phase2 import HoldoutMasks, HoldoutNetworks, masks_for, train_holdout

DEFAULT_ARMS = (ERM, IMPORTANCE)


class Study:
    """Arms of Phase 2, compared on one run.

    Args:
        run: features, settings, seeds, holdouts and results directory.
        arms: what to compare; default plain training and importance masking.
        keep_weights: write the weights of Phase 2; a study of many arms can do without them.

    Raises:
        InputError: something else than arms.
    """

    def __init__(self, run: Run, arms: Sequence[Arm] = DEFAULT_ARMS, keep_weights: bool = True):
        self.run, self.arms, self.keep_weights = run, check_arms(arms), keep_weights

    @property
    def arm_names(self) -> tuple[str, ...]:
        """Names of the arms, as in records and files."""
        return tuple(arm.name for arm in self.arms)

    def train(self) -> None:
        """Train what is missing of both phases."""
        self.phase1()
        self.phase2()

    def phase1(self) -> None:
        """Train what is missing of Phase 1: one network per domain and seed."""
        run = self.run
        wanted = {*run.seeds, *(seed + 1 for seed in run.seeds if any(arm.needs_next_seed for arm in self.arms))}
        units = [(d, chunk) for d in run.domains for chunk in run.chunks(wanted - run.archive.phase1_seeds(d))]

        def train(unit: tuple[str, tuple[int, ...]], tick: Callable[[], None]) -> DomainNetworks:
            options = {"strict": run.strict, "threads": run.execution.threads, "on_epoch": tick}
            return train_domain(run.data, *unit, run.settings, **options)

        with run.writing(units):
            floats, epochs = run.network.size, run.settings.ph1_num_epochs
            for networks in run.side_by_side("Phase 1", units, train, epochs, floats):
                run.archive.save_domain(networks, run.settings.importance_threshold_percentile)

    def phase2(self) -> None:
        """Train what is missing of Phase 2: all arms per holdout and seed, with masks from Phase 1."""
        run = self.run
        units = [(holdout, chunk) for holdout in run.holdouts for chunk in run.chunks(self._missing_seeds(holdout))]

        def train(unit: tuple[str, tuple[int, ...]], tick: Callable[[], None]) -> tuple:
            holdout, seeds = unit
            source = mask_source(run, [holdout], seeds)
            maskings = [arm.masking(source, run.settings) for arm in self.arms]
            options = {"strict": run.strict, "threads": run.execution.threads, "on_epoch": tick}
            return train_holdout(run.data, holdout, seeds, maskings, **options), source.own(run.settings)

        with run.writing(units):
            floats, epochs = run.network.size * len(self.arms), run.settings.ph2_num_epochs
            for networks, masks in run.side_by_side("Phase 2", units, train, epochs, floats):
                self._save(networks, masks)

    def report(self) -> str:
        """The answer as text, written to ``summary_report.txt`` as well."""
        with self.run.writing():
            text = report(self.run.records(), self.run.results.read_settings(), self.failures())
            self.run.results.write_text("summary_report.txt", text)
        return text

    def records(self) -> list[dict]:
        """What is on disk of these arms, seeds and holdouts."""
        return [r for r in self.run.records() if r["algorithm"] in self.arm_names]

    def failures(self) -> list[str]:
        """One sentence per failed network, for the warning at the end."""
        return [
            f"{record['algorithm']}, holdout {record['holdout']}, seed {record['seed']}: {record['failed']}"
            for record in self.run.records()
            if record["failed"] and record["selection"] == "last"
        ]

    def _missing_seeds(self, holdout: str) -> set[int]:
        run = self.run
        stored = run.archive.phase2_seeds(holdout, self.arm_names, self.keep_weights)
        found = {(r["algorithm"], r["selection"], r["seed"]) for r in run.results.records() if r["holdout"] == holdout}
        wanted = [(name, selection) for name in self.arm_names for selection in SELECTIONS]
        return {s for s in run.seeds if s not in stored or any((*pair, s) not in found for pair in wanted)}

    def _save(self, networks: HoldoutNetworks, masks: HoldoutMasks) -> None:
        run = self.run
        run.archive.save_holdout(networks, self.arm_names, masks, self.keep_weights)
        records = []
        for v, arm in enumerate(self.arms):
            own = (values[:, v] for values in (networks.validation_accuracy, networks.correct, networks.failed))
            peeked = arm.saw_validation(run.settings)
            records += make_records(run, arm.name, [networks.holdout], Counted(networks.seeds, *own), peeked=peeked)
        run.results.append(records)


def mask_source(run: Run, holdouts: Sequence[str], seeds: Sequence[int]) -> MaskSource:
    """Where the masks of some held-out domains come from: Phase 1 of the other domains, read when first asked for.

    Args:
        run: with Phase 1 on disk.
        holdouts: domains left out, one or two.
        seeds: S seeds.
    """

    def masks_of(numbers: Sequence[int]) -> Callable[[Settings], HoldoutMasks]:
        @cache
        def importances() -> tuple[dict[str, list[Tensor]], dict[str, Tensor]]:
            saved = {domain: run.archive.phase1(domain, numbers) for domain in run.data.sources(holdouts)}
            moved = {domain: networks.layers("importance") for domain, networks in saved.items()}
            return moved, {domain: networks.failed for domain, networks in saved.items()}

        return cache(lambda settings: masks_for(*importances(), settings))

    return MaskSource("+".join(holdouts), tuple(seeds), masks_of(seeds), masks_of([seed + 1 for seed in seeds]))
