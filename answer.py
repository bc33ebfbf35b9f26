"""The answer: does importance masking help, compared with what, and how sure is that.

Fixed in advance. *Headline:* last epoch, all images of the held-out domain, mean over the holdouts. *Confirmatory
family:* `importance` minus each of `erm`, `random` and `permuted`, from a fresh start and from Phase 1's: six
contrasts, averaged over the holdouts within each seed, then compared over seeds (`inference.family`). What learns less
is at a disadvantage while networks still improve, so the family is repeated with three times the epochs of Phase 2.
*Exploratory,* and labelled so: the other controls, single domains, one setting at a time away from the defaults.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure

import diagnostics
from answer_report import report
from config import AGGREGATIONS, Settings
from evaluation import AVERAGE, WITHOUT_HARDEST, accuracy_table, lodo_table, paired_differences, t_interval
from features import FeatureSet
from inference import family
from probe import linear_probe
from records import Results
from study import Study
from variants import AT_PHASE1, BOTH_STARTS, VARIANTS
from visualization import accuracy_curves_by_setting, difference_plot, overlap_matrix, save

LENGTHS = {"short": "contrasts", "long": "contrasts_longer"}
SWEPT_NUMBERS = {
    "IMPORTANCE_THRESHOLD_PERCENTILE": "per cent of the weights kept as important",
    "PH2_FREEZE_EPOCH": "epochs after which the other weights are frozen",
}
BASELINES = ("erm", "random", "permuted")
CONTROLS = tuple(name for name in VARIANTS if name not in ("importance", *BASELINES))  # outside the family
LONGER = 3  # times the epochs, for the repetition
SWEEPS = {
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


def sweep_arms() -> list[str]:
    """Names of the exploratory arms, with `erm` and the default controls beside them; all from the study's start."""
    arms = [f"importance[{name}={value}]" for name, values in SWEEPS.items() for value in values]
    return ["erm", "random", "permuted", "importance", *arms]


def family_arms() -> list[str]:
    """What the confirmatory family compares."""
    return [f"{name}{start}" for start in ("", AT_PHASE1) for name in ("importance", *BASELINES)]


def contrasts(records: Sequence[Mapping]) -> pd.DataFrame:
    """The confirmatory family: see `inference.family` for the columns."""
    return family(_differences(seed_averages(records), BASELINES))


def _differences(averages: pd.DataFrame, baselines: Sequence[str]) -> dict[str, pd.Series]:
    """Contrast -> `importance` minus a baseline, by seed, from each of the starts."""
    return {
        f"importance{start} − {baseline}{start}": averages[f"importance{start}"] - averages[f"{baseline}{start}"]
        for start in ("", AT_PHASE1)
        for baseline in baselines
    }


def controls(records: Sequence[Mapping]) -> pd.DataFrame:
    """Exploratory: `importance` minus each control outside the family: contrast, n, mean, low, high (fractions)."""
    rows = []
    for contrast, values in _differences(seed_averages(records), CONTROLS).items():
        rows.append((contrast, values.notna().sum(), *t_interval(values.dropna())))
    return pd.DataFrame(rows, columns=["contrast", "n", "mean", "low", "high"])


def per_domain(records: Sequence[Mapping], epochs: int) -> pd.DataFrame:
    """Exploratory: the family's contrasts on each domain: epochs, contrast, holdout, n, mean, low, high (fractions)."""
    tables = []
    for start in ("", AT_PHASE1):
        for baseline in BASELINES:
            pair = f"importance{start}", f"{baseline}{start}"
            table = paired_differences(records, *pair)
            tables.append(table.assign(epochs=epochs, contrast=" − ".join(pair)))
    table = pd.concat(tables, ignore_index=True)
    single = table[~table["holdout"].isin([AVERAGE, WITHOUT_HARDEST])]
    return single[["epochs", "contrast", "holdout", "n", "mean", "low", "high"]]


def source_averages(study: Study, names: Sequence[str]) -> pd.DataFrame:
    """Accuracy on the sources' `out` part after the last epoch, averaged over the holdouts: seeds × arms."""
    found = {}
    for name in names:
        each = []
        for holdout in study.holdouts:
            arrays, _ = study.load("histories", f"phase2_{holdout}_{name}")
            last = arrays["validation_accuracy"][:, -1].double()
            each.append(last.where(arrays["failed"] == 0, torch.nan))
        found[name] = pd.Series(torch.stack(each).mean(0).numpy(), index=arrays["seeds"].tolist())
    return pd.DataFrame(found).rename_axis("seed")


def with_controls(study: Study, directory: str | Path) -> Study:
    """The same study with every control from both starts, in a directory of its own; not yet trained."""
    settings = replace(study.settings, ph2_init="fresh")
    options = {"device": study.problem.features.device.type, "strict": study.strict, "progress": study.progress}
    arms = {"algorithms": BOTH_STARTS, "keep_weights": False}
    return Study(study.data, settings, Results(directory), study.seeds, study.holdouts, **arms, **options)


def forest_figure(table: pd.DataFrame, study: Study) -> Figure:
    """Forest plot of `contrasts`."""
    on = f"{study.data.model_name}, {study.data.feature_size}-d, {len(study.seeds)} seeds"
    title = f"Paired differences, mean over the holdouts, 95 % bootstrap interval ({on})"
    return difference_plot(table.rename(columns={"contrast": "label"}), title)


def seed_averages(records: Sequence[Mapping]) -> pd.DataFrame:
    """Headline accuracy averaged over the holdouts within each seed: seeds × algorithms, NaN where one is missing."""
    table = accuracy_table(records)
    return pd.DataFrame({name: table[name].mean(axis=1, skipna=False) for name in table.columns.unique("algorithm")})


class Answer:
    """Runs what the answer needs and reads it back; resumable as each `Study` is.

    Args:
        data: the features.
        settings: defaults that the study starts from; `PH2_INIT` must be "fresh", the other start is an arm.
        directory: gets ``epochs_<n>/`` for the two lengths, ``sweep/`` and the report's files.
        seeds: number of seeds of the confirmatory family.
        sweep_seeds: number of seeds of the exploratory sweep.
        options: of `Study`: device, strict, progress, overwrite.
    """

    def __init__(
        self, data: FeatureSet, settings: Settings, directory: str | Path, seeds: int, sweep_seeds: int, **options
    ):
        self.directory, self.seeds = Path(directory), seeds
        arms = {"short": BOTH_STARTS, "long": family_arms(), "sweep": sweep_arms()}
        self.studies = {
            kind: Study(
                data,
                own,
                results,
                range(sweep_seeds if kind == "sweep" else seeds),
                algorithms=arms[kind],
                keep_weights=False,
                **options,
            )
            for kind, (own, results) in self.places(settings, directory).items()
        }

    @staticmethod
    def places(settings: Settings, directory: str | Path) -> dict[str, tuple[Settings, Results]]:
        """Settings and results directory of each of the studies: "short", "long" and "sweep"."""
        settings = replace(settings, ph2_init="fresh")
        longer = scaled(settings, LONGER)

        def at(name: str) -> Results:
            return Results(Path(directory) / name)

        return {
            "short": (settings, at(f"epochs_{settings.ph2_num_epochs}")),
            "long": (longer, at(f"epochs_{longer.ph2_num_epochs}")),
            "sweep": (settings, at("sweep")),
        }

    @classmethod
    def check(cls, settings: Settings, directory: str | Path, overwrite: bool = False) -> None:
        """Refuse unfit results directories before there are features: see `records.Results.check`."""
        for own, results in cls.places(settings, directory).values():
            results.check(own, overwrite)

    def run(self) -> None:
        """Train what is missing, in the order of importance."""
        for study in self.studies.values():
            study.phase1()
            study.phase2()

    def tables(self) -> dict[str, pd.DataFrame]:
        """Everything the report says in numbers, by file name."""
        short, long = (self.studies[kind].records() for kind in ("short", "long"))
        main, epochs = self.studies["short"], [self.studies[k].settings.ph2_num_epochs for k in ("short", "long")]
        return {
            "contrasts": contrasts(short),
            "contrasts_longer": contrasts(long),
            "accuracy": lodo_table(short),
            "accuracy_longer": lodo_table(long),
            "sweep": sweep_table(self.studies["sweep"].records()),
            "linear_probe": linear_probe(main.problem, main.holdouts),
            "seed_stability": diagnostics.seed_stability(main),
            "zero_importance": diagnostics.zero_importance(main),
            "mask_density": diagnostics.mask_density(main),
            "domain_overlap": diagnostics.domain_overlap(main)[0],
            "seeds": seed_averages(short).rename_axis("seed"),
            "seeds_longer": seed_averages(long).rename_axis("seed"),
            "controls": controls(short),
            "per_domain": pd.concat([per_domain(short, epochs[0]), per_domain(long, epochs[1])]),
            "sources": source_averages(main, family_arms()),
            "sources_longer": source_averages(self.studies["long"], family_arms()),
        }

    def write(self) -> str:
        """Write tables (CSV), figures and ``report.txt``; returns the report."""
        tables, results = self.tables(), Results(self.directory)
        with results:
            for name, table in tables.items():
                results.write_text(f"{name}.csv", table.to_csv(float_format="%.6g", index=table.index.name is not None))
            for name, figure in self.figures(tables).items():
                save(figure, self.directory / f"{name}.png")
            text = report(self.studies, tables)
            results.write_text("report.txt", text)
        return text

    def figures(self, tables: Mapping[str, pd.DataFrame]) -> dict[str, Figure]:
        """Forest plot of the family, accuracy against each swept number with the controls as lines, mask overlap."""
        short = self.studies["short"]
        epochs = {name: self.studies[kind].settings.ph2_num_epochs for kind, name in LENGTHS.items()}
        on = f"{short.data.model_name}, {short.data.feature_size}-d, {len(short.seeds)} seeds"
        rows = [tables[name].assign(group=f"{count} epochs") for name, count in epochs.items()]
        overlap = tables["domain_overlap"]
        drawn = {
            "forest": forest_figure(pd.concat(rows), short),
            "overlap": overlap_matrix(
                overlap.to_numpy(),
                list(overlap),
                f"Overlap (IoU) of the masks of single domains ({on})",
                diagnostics.domain_overlap(short)[1],
            ),
        }
        for setting, words in SWEPT_NUMBERS.items():
            drawn[setting.lower()] = self._curve(tables, setting, words)
        return drawn

    def _curve(self, tables: Mapping[str, pd.DataFrame], setting: str, words: str) -> Figure:
        sweep = tables["sweep"]
        points = sweep[sweep["setting"] == setting].assign(x=lambda t: t["value"].astype(float))
        controls = sweep[(sweep["setting"] == "") & (sweep["algorithm"] != "importance")].set_index("algorithm")
        at = f" at {self.studies['sweep'].settings.importance_threshold_percentile:g} %"  # their masks are not swept
        lines = {
            name + (at if name != "erm" else ""): tuple(row[["mean", "low", "high"]])
            for name, row in controls.iterrows()
        }
        probe = tables["linear_probe"]["full"].mean()
        lines["linear probe"] = (probe, probe, probe)
        seeds = sweep["n"].max()
        title = f"EXPLORATORY: accuracy, mean over the holdouts, 95 % t bands ({seeds} seeds), against {words}"
        default = getattr(self.studies["sweep"].settings, setting.lower())
        return accuracy_curves_by_setting(points, "x", title, words, lines, default)


def sweep_table(records: Sequence[Mapping]) -> pd.DataFrame:
    """Accuracy averaged over the holdouts for every arm of the sweep: algorithm, setting, value, n, mean, low, high."""
    averages, rows = seed_averages(records), []
    for name in averages.columns:
        setting, _, value = name.partition("[")[2].rstrip("]").partition("=")
        values = averages[name].dropna()
        rows.append((name.partition("[")[0], setting, value, len(values), *t_interval(values)))
    return pd.DataFrame(rows, columns=["algorithm", "setting", "value", "n", "mean", "low", "high"])
