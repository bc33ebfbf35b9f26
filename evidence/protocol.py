"""The comparison fixed in advance: which studies are run, and what is written about them.

Studies on the same features. The *short* one has every control from both starts, at the settings' own number of
epochs of Phase 2. An arm that learns less is at a disadvantage while networks still improve, so the *long* one repeats
the confirmatory family (`contrasts.FAMILY`) with three times the epochs. The *sweep*, which is exploratory, changes one
setting at a time, and the *splits* are small studies that share one split among all seeds, each another one: how much
the answer depends on the split.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

import config
from config import AGGREGATIONS, InputError, Settings
from evidence import diagnostics
from evidence.contrasts import (
    FAMILY_ARMS,
    domains_table,
    family_table,
    others_table,
    seed_averages,
    source_averages,
    splits_table,
    sweep_table,
)
from evidence.linear_probe import kept_probe
from evidence.report import report, write_report
from storage import Results
from study import (
    BOTH_STARTS,
    ERM,
    IMPORTANCE,
    Arm,
    Run,
    Study,
    check_seeds,
    lodo_table,
)

LONGER = 3  # times the epochs, for the repetition
SWEEP_SEEDS = 50  # of the exploratory sweep, at most, unless said otherwise
SPLITS, SPLIT_SEEDS = range(5), 25  # splits that all seeds of a small study share, and its seeds, at most
SWEEPS: Mapping[str, Sequence] = {
    "IMPORTANCE_THRESHOLD_PERCENTILE": tuple(range(10, 100, 10)),
    "PH2_FREEZE_EPOCH": tuple(range(11)),
    "IMPORTANCE_AGGREGATION": AGGREGATIONS,
}


def scaled(settings: Settings, factor: int) -> Settings:
    """Phase 2 `factor` times as long, with decay and freeze at the same part of training."""
    return replace(
        settings,
        ph2_num_epochs=settings.ph2_num_epochs * factor,
        ph2_freeze_epoch=settings.ph2_freeze_epoch * factor,
        ph2_lr_decay_rate=settings.ph2_lr_decay_rate ** (1 / factor),
    )


def sweep_arms() -> tuple[Arm, ...]:
    """The exploratory arms, each with one setting of its own, after `erm` and three arms at the study's settings."""
    changed = [Arm("importance", None, {name: value}) for name, values in SWEEPS.items() for value in values]
    return ERM, Arm("random"), Arm("permuted"), IMPORTANCE, *changed


def places(settings: Settings, directory: str | Path) -> tuple[tuple[Path, Settings], ...]:
    """Results directory and settings of the short study, the long one, the sweep and each split."""
    directory, longer = Path(directory), scaled(settings, LONGER)
    return (
        (directory / f"epochs_{settings.ph2_num_epochs}", settings),
        (directory / f"epochs_{longer.ph2_num_epochs}", longer),
        (directory / "sweep", settings),
        *((directory / "splits" / str(split), replace(settings, split_seed=split)) for split in SPLITS),
    )


class Protocol:
    """Runs the studies and reads them back; resumable as each `Study` is.

    Args:
        run: features, settings, seeds and holdouts of the family, and how it is carried out.
        directory: gets ``epochs_<n>/`` for the two lengths, ``sweep/``, ``splits/<n>/`` and the report's files.
        sweep_seeds: seeds of the exploratory sweep; default the first 50 of the run's.
        studies: results directories of the studies, in the order of `places`, which were read already; default new.

    Attributes:
        short, long, sweep: the studies.
        splits: the small studies, one for each of `SPLITS`.

    Raises:
        InputError: fewer than two seeds, `PH2_INIT` other than "fresh", or an unfit directory.
    """

    def __init__(
        self,
        run: Run,
        directory: str | Path,
        sweep_seeds: Sequence[int] | None = None,
        studies: Sequence[Results] | None = None,
    ):
        sweep_seeds = run.seeds[:SWEEP_SEEDS] if sweep_seeds is None else check_seeds(sweep_seeds)
        _check(run.settings, run.seeds, sweep_seeds)
        self.results = Results(directory)
        own_places = places(run.settings, self.results.directory)
        studies = [Results(place) for place, _ in own_places] if studies is None else studies
        arms = [(BOTH_STARTS, run.seeds), (FAMILY_ARMS, run.seeds), (sweep_arms(), sweep_seeds)]
        arms += [((ERM, IMPORTANCE), run.seeds[:SPLIT_SEEDS])] * len(SPLITS)
        self.short, self.long, self.sweep, *self.splits = (
            Study(run.beside(results, settings, seeds), own, keep_weights=False)
            for results, (_, settings), (own, seeds) in zip(studies, own_places, arms, strict=True)
        )

    @classmethod
    def from_config(
        cls,
        seeds: Sequence[int] | None = None,
        sweep_seeds: Sequence[int] | None = None,
        directory: str | Path | None = None,
        *,
        overwrite: bool = False,
        verify: bool = False,
        strict: bool = False,
    ) -> "Protocol":
        """The protocol at the constants of `config`.

        Args:
            seeds: of the family; default 0 … `NUM_SEEDS` − 1.
            sweep_seeds, directory: see the class; default directory: ``study`` below `RESULTS_DIR`.
            overwrite, verify, strict: see `study.Run.from_config`.
        """
        settings = Settings.current()
        seeds = check_seeds(range(config.NUM_SEEDS) if seeds is None else seeds)
        _check(settings, seeds, seeds if sweep_seeds is None else check_seeds(sweep_seeds))
        directory = Path(config.RESULTS_DIR) / "study" if directory is None else directory
        wanted = {Results(place): of for place, of in places(settings, directory)}
        run = Run.in_places(wanted, seeds, overwrite=overwrite, verify=verify, strict=strict)
        return cls(run, directory, sweep_seeds, list(wanted))

    @property
    def epochs(self) -> tuple[int, int]:
        """Epochs of Phase 2 in the short study and in the long one."""
        return self.short.run.settings.ph2_num_epochs, self.long.run.settings.ph2_num_epochs

    def train(self) -> None:
        """Train what is missing, in the order of importance."""
        for study in (self.short, self.long, self.sweep, *self.splits):
            study.train()

    def tables(self) -> dict[str, pd.DataFrame]:
        """Everything the report says in numbers, by file name."""
        run, tables, domains = self.short.run, {}, []
        for ending, study, epochs in zip(("", "_longer"), (self.short, self.long), self.epochs, strict=True):
            records = study.records()
            tables[f"contrasts{ending}"] = family_table(records)
            tables[f"accuracy{ending}"] = lodo_table(records)
            tables[f"seeds{ending}"] = seed_averages(records)
            tables[f"sources{ending}"] = source_averages(study)
            domains.append(domains_table(records, epochs))
        return tables | {
            "controls": others_table(self.short.records()),
            "per_domain": pd.concat(domains),
            "sweep": sweep_table(self.sweep.records(), self.sweep.arms),
            "splits": splits_table({split: study.records() for split, study in zip(SPLITS, self.splits, strict=True)}),
            "linear_probe": kept_probe(run),
            "seed_stability": diagnostics.seed_stability(run),
            "zero_importance": diagnostics.zero_importance(run),
            "mask_density": diagnostics.mask_density(run),
            "domain_overlap": diagnostics.domain_overlap(run),
        }

    def write(self) -> str:
        """Write tables (CSV) and ``report.txt``; returns the report."""
        tables = self.tables()
        text = report(tables, self.short, self.long, [self.sweep, *self.splits])
        write_report(self.results, tables, text)
        return text

    def save_figures(self) -> None:
        """Draw the tables that `write` has written, into the same directory."""
        from evidence.figures import save_all  # imports matplotlib

        with self.results:
            save_all(self.results.directory)


def _check(settings: Settings, seeds: Sequence[int], sweep_seeds: Sequence[int]) -> None:
    """Refuse a single seed, and arms without a start of their own that do not start fresh."""
    if len(seeds) < 2 or len(sweep_seeds) < 2:
        raise InputError("A study compares over seeds: --seeds and --sweep-seeds must be at least 2.")
    if settings.ph2_init != "fresh":
        raise InputError(
            f"The controls are trained from both starts: PH2_INIT must be 'fresh' here, not '{settings.ph2_init}'."
        )
