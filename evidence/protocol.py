"""The comparison fixed in advance: which studies are run, and what is written about them.

Three studies on the same features. The *short* one has every control from both starts, at the settings' own number of
epochs of Phase 2. An arm that learns less is at a disadvantage while networks still improve, so the *long* one repeats
the confirmatory family (`contrasts.FAMILY`) with three times the epochs. The *sweep*, which is exploratory, changes one
setting at a time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

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
    sweep_table,
)
from evidence.linear_probe import linear_probe
from evidence.report import report
from features import get_features
from storage import Results
from study import (
    BOTH_STARTS,
    ERM,
    IMPORTANCE,
    Arm,
    Run,
    Study,
    check_before_extraction,
    check_seeds,
    clear_results,
    current_execution,
    lodo_table,
)
from visualization import accuracy_curves_by_setting, difference_plot, overlap_matrix, save

LONGER = 3  # times the epochs, for the repetition
SWEEP_SEEDS = 50  # of the exploratory sweep, at most, unless said otherwise
SWEEPS: Mapping[str, Sequence] = {
    "IMPORTANCE_THRESHOLD_PERCENTILE": tuple(range(10, 100, 10)),
    "PH2_FREEZE_EPOCH": tuple(range(11)),
    "IMPORTANCE_AGGREGATION": AGGREGATIONS,
}
SWEPT_NUMBERS = {  # those with a figure, and its words
    "IMPORTANCE_THRESHOLD_PERCENTILE": "per cent of the weights kept as important",
    "PH2_FREEZE_EPOCH": "epochs after which the other weights are frozen",
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
    """Results directory and settings of the short study, the long one and the sweep."""
    directory, longer = Path(directory), scaled(settings, LONGER)
    return (
        (directory / f"epochs_{settings.ph2_num_epochs}", settings),
        (directory / f"epochs_{longer.ph2_num_epochs}", longer),
        (directory / "sweep", settings),
    )


def check_start(settings: Settings) -> None:
    """An `InputError` unless arms without a start of their own start fresh."""
    if settings.ph2_init != "fresh":
        raise InputError(
            f"The controls are trained from both starts: PH2_INIT must be 'fresh' here, not '{settings.ph2_init}'."
        )


class Protocol:
    """Runs the studies and reads them back; resumable as each `Study` is.

    Args:
        run: features, settings, seeds and holdouts of the family, and how it is carried out.
        directory: gets ``epochs_<n>/`` for the two lengths, ``sweep/`` and the report's files.
        sweep_seeds: seeds of the exploratory sweep; default the first 50 of the run's.

    Attributes:
        short, long, sweep: the studies.

    Raises:
        InputError: fewer than two seeds, `PH2_INIT` other than "fresh", or an unfit directory.
    """

    def __init__(self, run: Run, directory: str | Path, sweep_seeds: Sequence[int] | None = None):
        sweep_seeds = run.seeds[:SWEEP_SEEDS] if sweep_seeds is None else check_seeds(sweep_seeds)
        _check(run.settings, run.seeds, sweep_seeds)
        self.results = Results(directory)
        arms = (BOTH_STARTS, run.seeds), (FAMILY_ARMS, run.seeds), (sweep_arms(), sweep_seeds)
        self.short, self.long, self.sweep = (
            Study(run.beside(place, settings, seeds), own, keep_weights=False)
            for (place, settings), (own, seeds) in zip(places(run.settings, self.results.directory), arms, strict=True)
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
        check_before_extraction(None, wanted, overwrite)
        execution = current_execution(strict)
        features = get_features(config.DATA_ROOT, config.FEATURES_FILE, device=execution.device, verify=verify)
        if overwrite:
            clear_results(wanted, features, settings)
        run = Run(features, settings, next(iter(wanted)), seeds, execution=execution)
        return cls(run, directory, sweep_seeds)

    @property
    def epochs(self) -> tuple[int, int]:
        """Epochs of Phase 2 in the short study and in the long one."""
        return self.short.run.settings.ph2_num_epochs, self.long.run.settings.ph2_num_epochs

    def train(self) -> None:
        """Train what is missing, in the order of importance."""
        for study in (self.short, self.long, self.sweep):
            study.train()

    def tables(self) -> dict[str, pd.DataFrame]:
        """Everything the report says in numbers, by file name."""
        run, short, long = self.short.run, self.short.records(), self.long.records()
        domains = [domains_table(records, count) for records, count in zip((short, long), self.epochs, strict=True)]
        return {
            "contrasts": family_table(short),
            "contrasts_longer": family_table(long),
            "accuracy": lodo_table(short),
            "accuracy_longer": lodo_table(long),
            "sweep": sweep_table(self.sweep.records(), self.sweep.arms),
            "linear_probe": linear_probe(run.data, run.holdouts),
            "seed_stability": diagnostics.seed_stability(run),
            "zero_importance": diagnostics.zero_importance(run),
            "mask_density": diagnostics.mask_density(run),
            "domain_overlap": diagnostics.domain_overlap(run),
            "seeds": seed_averages(short),
            "seeds_longer": seed_averages(long),
            "controls": others_table(short),
            "per_domain": pd.concat(domains),
            "sources": source_averages(self.short),
            "sources_longer": source_averages(self.long),
        }

    def write(self) -> str:
        """Write tables (CSV), figures and ``report.txt``; returns the report."""
        tables = self.tables()
        with self.results:
            for name, table in tables.items():
                text = table.to_csv(float_format="%.6g", index=table.index.name is not None)
                self.results.write_text(f"{name}.csv", text)
            for name, figure in self.figures(tables).items():
                save(figure, self.results.directory / f"{name}.png")
            text = report(tables, self.short, self.long, self.sweep)
            self.results.write_text("report.txt", text)
        return text

    def figures(self, tables: Mapping[str, pd.DataFrame]) -> dict[str, Figure]:
        """Forest plot of the family, overlap of the masks, accuracy against each swept number; by file name."""
        run, overlap = self.short.run, tables["domain_overlap"]
        lengths = zip(("contrasts", "contrasts_longer"), self.epochs, strict=True)
        rows = pd.concat([tables[name].assign(group=f"{count} epochs") for name, count in lengths])
        title = f"Overlap (IoU) of the masks of single domains ({run.title})"
        drawn = {
            "forest": forest_figure(rows, run),
            "overlap": overlap_matrix(overlap.to_numpy(), list(overlap), title, diagnostics.chance_overlap(run)),
        }
        probe = tables["linear_probe"]["full"].mean()
        return drawn | {
            setting.lower(): sweep_figure(tables["sweep"], setting, self.sweep.run.settings, probe)
            for setting in SWEPT_NUMBERS
        }


def _check(settings: Settings, seeds: Sequence[int], sweep_seeds: Sequence[int]) -> None:
    """Refuse what the protocol cannot answer."""
    if len(seeds) < 2 or len(sweep_seeds) < 2:
        raise InputError("A study compares over seeds: --seeds and --sweep-seeds must be at least 2.")
    check_start(settings)


def forest_figure(table: pd.DataFrame, run: Run) -> Figure:
    """Forest plot of a `contrasts.family_table`, with a column "group" of several."""
    title = f"Paired differences, mean over the holdouts, 95 % bootstrap interval ({run.title})"
    return difference_plot(table.rename(columns={"contrast": "label"}), title)


def sweep_figure(table: pd.DataFrame, setting: str, settings: Settings, probe: float) -> Figure:
    """Accuracy against a swept number; what does not depend on it as lines.

    Args:
        table: see `contrasts.sweep_table`.
        setting: one of `SWEPT_NUMBERS`.
        settings: of the sweep.
        probe: accuracy of the linear probe, mean over the holdouts.
    """
    points = table[table["setting"] == setting].assign(x=lambda t: t["value"].astype(float))
    unchanged = table[(table["setting"] == "") & (table["algorithm"] != "importance")].set_index("algorithm")
    at = f" at {settings.importance_threshold_percentile:g} %"  # the density of the other masks is not swept
    lines = {
        name + (at if name != "erm" else ""): tuple(row[["mean", "low", "high"]]) for name, row in unchanged.iterrows()
    }
    lines["linear probe"] = (probe, probe, probe)
    words, seeds = SWEPT_NUMBERS[setting], table["n"].max()
    title = f"EXPLORATORY: accuracy, mean over the holdouts, 95 % t bands ({seeds} seeds), against {words}"
    return accuracy_curves_by_setting(points, "x", title, words, lines, getattr(settings, setting.lower()))
