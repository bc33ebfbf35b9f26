"""The same question on the ViT's own last blocks: which arms, at which densities and rates, fixed in advance.

Masks over pretrained weights mean the same weight in every domain, phase and seed. A mask that trains fewer weights
wants a larger step, so that a comparison at one learning rate would measure the learning rate: each arm chooses its own
from `RATES`, per held-out domain, by the accuracy on the sources' `out` part after the last epoch, mean over source
domains and over the first seeds (`RATE_SEEDS`); the other seeds are trained at that rate alone. *Headline* as in
`contrasts`: last epoch, all images of the held-out domain, mean over the holdouts.
*Confirmatory family:* `importance` − `random_layer` at 10 % and at 1 %, `importance` − `erm` at 60 % and at 10 %.
Everything else is exploratory, on fewer seeds: the other controls, all arms at one rate, and the schedule of features.
The unmarked weights are frozen from the start (`BLOCK_FREEZE_EPOCH` = 0); by the schedule they learn at a small,
decaying rate, and are frozen after the same part of the training as on features.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from logging import getLogger
from pathlib import Path

import pandas as pd

import config
from config import BlockSettings, InputError, Settings
from evidence import own_rates
from evidence.contrasts import Contrast, seed_averages
from evidence.own_rates import BLOCKS, OwnRates, at_rate
from evidence.report import (
    PLUS_MINUS,
    by_density,
    contrast_sentences,
    edge_sentences,
    failures_shown,
    family_shown,
    in_points,
    section,
    write_report,
)
from evidence.statistics import LEVEL, family
from storage import Results
from study import (
    AVERAGE,
    ERM,
    FEWEST_SEEDS,
    Arm,
    Run,
    Study,
    check_seeds,
    lodo_table,
    t_interval,
    unlearned,
    wide_table,
)

log = getLogger(__name__)

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)  # of BACKBONE_LEARNING_RATE
DENSITIES = (60.0, 10.0, 1.0, 0.1)  # per cent of the tracked weights that are marked
CRITERIA = ("importance", "random_layer")
CONTROLS = ("permuted", "inverted", "magnitude")
FOLDERS = ("grid", "controls", "schedule")  # results directories: the family's arms, and what is exploratory
CHOSEN = "chosen"  # results directory: the arms at their own rates, with weights
RATE_SEEDS = {"grid": 3, "controls": 2, "schedule": 2}  # the first seeds, by which rates are chosen
SWEEP_SEEDS = 10  # of what is exploratory, at most, unless said otherwise
TABLES = ("seeds", "accuracy", "contrasts", "densities")  # of one choice of rates or one schedule
HEAD = Arm("head")
DECAYING = "erm decaying"  # `head` by the schedule: no weight is marked, so that the rate of all matrices decays
EXPLANATION = f"""\
The words "helps" and "hurts" need an interval on one side of 0, p < {LEVEL} after Holm's correction over the
family of four, and {FEWEST_SEEDS} seeds; "no difference" is not corrected. {PLUS_MINUS}
Intervals (95 %; of the family percentile bootstrap over seeds, else Student's t) cover splits, batch orders and
classifiers, and are conditional on images, backbone, and the learning rates that the first seeds chose."""


def masked(control: str, density: float) -> Arm:
    """The arm of a criterion at a density, per cent."""
    return Arm(control, changes={"IMPORTANCE_THRESHOLD_PERCENTILE": density})


def label(arm: Arm) -> str:
    """How tables call an arm: "importance 10 %", whatever its schedule; a schedule without a mask is `DECAYING`."""
    density = dict(arm.changes).get("IMPORTANCE_THRESHOLD_PERCENTILE")
    if arm.control == HEAD.control and "BLOCK_FREEZE_EPOCH" in dict(arm.changes):
        return DECAYING
    return arm.control if density is None else f"{arm.control} {density:g} %"


FAMILY = (
    Contrast(masked("importance", 10.0), masked("random_layer", 10.0)),
    Contrast(masked("importance", 1.0), masked("random_layer", 1.0)),
    Contrast(masked("importance", 60.0), ERM),
    Contrast(masked("importance", 10.0), ERM),
)  # of arms, each at its own rate


def arms_of(folder: str, settings: Settings) -> tuple[Arm, ...]:
    """The arms of a results directory, before each is trained at several rates.

    By the schedule those are the family's, and `DECAYING`.
    """
    if folder == "schedule":
        freeze = ("BLOCK_FREEZE_EPOCH", freeze_epoch(settings.ph2_num_epochs))
        frozen = dict.fromkeys(arm for pair in FAMILY for arm in (pair.arm, pair.baseline) if arm.changes)
        return tuple(replace(arm, changes=(*arm.changes, freeze)) for arm in (*frozen, HEAD))
    criteria, plain = (CRITERIA, (ERM, HEAD)) if folder == "grid" else (CONTROLS, ())
    return plain + tuple(masked(control, density) for control in criteria for density in DENSITIES)


def freeze_epoch(epochs: int) -> int:
    """Epochs after which the schedule freezes, the same part of the training as on features; at least one."""
    return max(1, math.floor(epochs * config.PH2_FREEZE_EPOCH / config.PH2_NUM_EPOCHS + 0.5))


class BlockProtocol:
    """Trains the arms at all rates, then at those that were chosen, and says what they show; resumable as a `Study` is.

    Args:
        run: features with tokens, settings, seeds and holdouts, and how it is carried out.
        directory: gets ``grid/`` (ERM, head and the family's criteria), ``controls/``, ``schedule/``, perhaps
            ``chosen/``, and the report's files.
        controls: train and report what is exploratory as well.
        sweep_seeds: seeds of what is exploratory; default the first 10 of the run's.
        weights: train each arm once more at the rate that was chosen for it on a holdout, and keep the weights and the
            accuracies of every epoch.
        places: results directories of the studies (by `FOLDERS`) and of the weights (`CHOSEN`), which were read
            already; default new.

    Raises:
        InputError: features without tokens, fewer than two seeds, or an unfit directory.
    """

    def __init__(
        self,
        run: Run,
        directory: str | Path,
        controls: bool = True,
        sweep_seeds: Sequence[int] | None = None,
        weights: bool = False,
        places: Mapping[str, Results] | None = None,
    ):
        sweep_seeds = run.seeds[:SWEEP_SEEDS] if sweep_seeds is None else check_seeds(sweep_seeds)
        _check(run.settings, run.seeds, sweep_seeds)
        self.run, self.results, self.own = run, Results(directory), {}
        places = _places(self.results.directory, controls, weights) if places is None else places
        self.chosen, self.fixed = places.get(CHOSEN), None
        for folder in (name for name in FOLDERS if name in places):
            own = run.beside(places[folder], seeds=run.seeds if folder == "grid" else sweep_seeds)
            self.own[folder] = OwnRates(own, arms_of(folder, run.settings), BLOCKS, RATES, RATE_SEEDS[folder], label)
        if controls:
            arms = [at_rate(arm, run.settings.backbone_learning_rate, BLOCKS) for arm in arms_of("grid", run.settings)]
            self.fixed = Study(run.beside(places["grid"], seeds=sweep_seeds), arms, records_only=True)

    @classmethod
    def from_config(
        cls,
        seeds: Sequence[int] | None = None,
        directory: str | Path | None = None,
        controls: bool = True,
        sweep_seeds: Sequence[int] | None = None,
        weights: bool = False,
        *,
        overwrite: bool = False,
        verify: bool = False,
        strict: bool = False,
    ) -> "BlockProtocol":
        """The protocol at the constants of `config`.

        Args:
            seeds: default 0 … `NUM_SEEDS` − 1.
            directory, controls, sweep_seeds, weights: see the class; default directory: ``study`` below `RESULTS_DIR`.
            overwrite, verify, strict: see `study.Run.from_config`.
        """
        settings = Settings.current()
        if config.changed("IMPORTANCE_THRESHOLD_PERCENTILE"):
            raise InputError(
                "The study of blocks has masks of its own densities: leave out IMPORTANCE_THRESHOLD_PERCENTILE."
            )
        seeds = check_seeds(range(config.NUM_SEEDS) if seeds is None else seeds)
        _check(settings, seeds, seeds if sweep_seeds is None else check_seeds(sweep_seeds))
        directory = Path(config.RESULTS_DIR) / "study" if directory is None else Path(directory)
        places = _places(directory, controls, weights)
        options = {"overwrite": overwrite, "verify": verify, "strict": strict}
        run = Run.in_places(dict.fromkeys(places.values(), settings), seeds, **options)
        return cls(run, directory, controls, sweep_seeds, weights, places)

    def train(self) -> None:
        """Train what is missing."""
        for own in self.own.values():
            own.tried.train()
        for study in self.beyond_choosing():
            study.train()
        if self.chosen is not None:
            networks = sum(len(own.arms) * len(own.run.seeds) for own in self.own.values())
            size = 4 * self.run.network.size * networks * len(self.run.holdouts)  # float32
            log.info("The weights will take %.1f MB of disk, in '%s'.", size / 1e6, self.chosen.directory)
            for study in (study for own in self.own.values() for study in self._with_weights(own)):
                study.train()

    def beyond_choosing(self) -> list[Study]:
        """What is trained once the rates are known: all arms at their own, and those of the grid at one."""
        whole = [own.whole for own in self.own.values()]
        return whole if self.fixed is None else [*whole, self.fixed]

    def _with_weights(self, own: OwnRates) -> list[Study]:
        """Arms at the rates that were chosen for them, whose networks are kept: a study for each holdout."""
        return [
            Study(Run(own.run.features, own.run.settings, self.chosen, own.run.seeds, holdout, own.run.execution), arms)
            for holdout, arms in own.at_rates().items()
        ]

    def tables(self) -> dict[str, pd.DataFrame]:
        """Everything the report says in numbers, by file name."""
        arms = {folder: own.arms for folder, own in self.own.items()}
        tried = {folder: own.tried.records() for folder, own in self.own.items()}
        trained = [*(own.tried for own in self.own.values()), *self.beyond_choosing()]
        every = [*{record["key"]: record for study in trained for record in study.records()}.values()]
        frozen = [arm for folder in arms if folder != "schedule" for arm in arms[folder]]
        rates = chosen_rates([r for records in tried.values() for r in records], frozen, self.run.holdouts)
        fixed = rates.assign(rate=self.run.settings.backbone_learning_rate)
        fixed = fixed[fixed["arm"].isin([label(arm) for arm in arms["grid"]])]
        tables = {"rates": rates} | answers(every, frozen, rates, "")
        seeds = (self.fixed or self.own["grid"].tried).run.seeds
        tables |= answers([r for r in every if r["seed"] in seeds], arms["grid"], fixed, "_fixed_rate")
        if "controls" in arms:
            tables["controls"] = controls_table(tables["seeds"])
        if "schedule" in arms:
            scheduled = [ERM, HEAD, *arms["schedule"]]
            rates = chosen_rates(tried["grid"] + tried["schedule"], scheduled, self.run.holdouts)
            own = [record for record in every if record["seed"] in self.own["schedule"].run.seeds]
            tables |= {"rates_schedule": rates} | answers(own, scheduled, rates, "_schedule")
            tables["decaying"] = decaying_table(tables["seeds_schedule"])
        return tables

    def write(self) -> str:
        """Write tables (CSV) and ``report.txt``; returns the report."""
        tables = self.tables()
        whole = [  # a study of each directory, of all seeds: for what failed
            Study(own.run, own.tried.arms, records_only=True) for own in self.own.values()
        ]
        text = report(tables, self.run, whole)
        optional = [f"{name}{ending}" for name in TABLES for ending in ("_fixed_rate", "_schedule")]
        write_report(self.results, tables, text, (*optional, "controls", "decaying", "rates_schedule"))
        return text

    def save_figures(self) -> None:
        """Draw accuracy against density from the tables that `write` has written, into the same directory."""
        from evidence.figures import save_blocks  # imports matplotlib

        with self.results:
            save_blocks(self.results.directory)


def _places(directory: Path, controls: bool, weights: bool) -> dict[str, Results]:
    """Results directories by their names, in the order of `FOLDERS`: of the studies, and of the weights."""
    names = [*(FOLDERS if controls else FOLDERS[:1]), *([CHOSEN] if weights else [])]
    return {name: Results(directory / name) for name in names}


def _check(settings: Settings, seeds: Sequence[int], sweep_seeds: Sequence[int]) -> None:
    """Refuse what is no study of blocks over seeds, and a schedule that is not the protocol's."""
    if not isinstance(settings, BlockSettings):
        raise InputError("Masks on blocks need tokens: set TRAINED_BLOCKS, and DATA_ROOT (--data-root).")
    config.refuse_whole_model("A study", settings.trained_blocks)
    if len(seeds) < 2 or len(sweep_seeds) < 2:
        raise InputError("A study compares over seeds: --seeds and --sweep-seeds must be at least 2.")
    if not {*sweep_seeds} <= {*seeds}:
        raise InputError("What is exploratory is compared with the other arms: --sweep-seeds must be some of --seeds.")
    if settings.ph2_freeze_epoch != 0:
        raise InputError("The study of blocks freezes the unmarked weights: BLOCK_FREEZE_EPOCH must be 0.")


def chosen_rates(records: Sequence[Mapping], arms: Sequence[Arm], holdouts: Sequence[str]) -> pd.DataFrame:
    """The rate of each arm and holdout, see `own_rates.chosen_rates`."""
    return own_rates.chosen_rates(records, arms, holdouts, BLOCKS, RATES, label)


def at_chosen_rates(records: Sequence[Mapping], arms: Sequence[Arm], rates: pd.DataFrame) -> list[dict]:
    """The records of each arm at its rate on each holdout, under the arm's label."""
    return own_rates.at_chosen_rates(records, arms, rates, BLOCKS, label)


def answers(
    records: Sequence[Mapping], arms: Sequence[Arm], rates: pd.DataFrame, ending: str
) -> dict[str, pd.DataFrame]:
    """Tables of arms at their rates, by file name; none where no arm was trained at its rate.

    A table of one choice of rates or one schedule; `ending` tells its names from those of the others.
    """
    own = at_chosen_rates(records, arms, rates)
    if not own:
        return {}
    averages = seed_averages(own)
    tables = {"seeds": averages, "accuracy": lodo_table(own), "contrasts": family_of_four(averages)}
    tables["densities"] = densities_table(averages, arms)
    return {f"{name}{ending}": table for name, table in tables.items()}


def family_of_four(averages: pd.DataFrame) -> pd.DataFrame:
    """The confirmatory family, from `contrasts.seed_averages` of the labelled arms: see `statistics.family`."""
    pairs = [(label(contrast.arm), label(contrast.baseline)) for contrast in FAMILY]
    return family({f"{arm} − {baseline}": averages[arm] - averages[baseline] for arm, baseline in pairs})


def densities_table(averages: pd.DataFrame, arms: Sequence[Arm]) -> pd.DataFrame:
    """Accuracy against density, and what the marked weights add to head, biases and norms.

    Args:
        averages: seeds × arms, see `contrasts.seed_averages`.

    Returns:
        criterion, density (per cent; 100 for ERM, 0 for head), n, mean, low, high, and above, above_low, above_high:
        minus head, paired by seed. Fractions, with 95 % t intervals.
    """
    rows = []
    for arm in arms:
        density = {"erm": 100.0, "head": 0.0}.get(arm.control, dict(arm.changes).get("IMPORTANCE_THRESHOLD_PERCENTILE"))
        values, above = averages[label(arm)].dropna(), (averages[label(arm)] - averages[HEAD.name]).dropna()
        criterion = label(arm) if arm.control in ("erm", "head") else arm.control
        rows.append((criterion, density, len(values), *t_interval(values), *t_interval(above)))
    columns = ["criterion", "density", "n", "mean", "low", "high", "above", "above_low", "above_high"]
    return pd.DataFrame(rows, columns=columns)


def decaying_table(averages: pd.DataFrame) -> pd.DataFrame:
    """The arms of the schedule minus plain training at a constant rate, and minus `DECAYING`, paired by seed.

    Args:
        averages: seeds × arms by the schedule, see `contrasts.seed_averages`, with `erm` at its constant rate.

    Returns:
        arm, baseline ("erm" or `DECAYING`), n, mean, low, high: fractions, with 95 % t intervals.
    """
    rows = []
    for baseline in (ERM.name, DECAYING):
        for arm in averages.columns.drop([ERM.name, HEAD.name, baseline], errors="ignore"):
            values = (averages[arm] - averages[baseline]).dropna()
            rows.append((arm, baseline, len(values), *t_interval(values)))
    return pd.DataFrame(rows, columns=["arm", "baseline", "n", "mean", "low", "high"])


def controls_table(averages: pd.DataFrame) -> pd.DataFrame:
    """Importance minus each of the other controls, at every density, paired by seed.

    Args:
        averages: seeds × arms, see `contrasts.seed_averages`.

    Returns:
        control, density (per cent), n, mean, low, high: fractions, with 95 % t intervals over the seeds of both.
    """
    rows = []
    for control in CONTROLS:
        for density in DENSITIES:
            pair = label(masked("importance", density)), label(masked(control, density))
            values = (averages[pair[0]] - averages[pair[1]]).dropna()
            rows.append((control, density, len(values), *t_interval(values)))
    return pd.DataFrame(rows, columns=["control", "density", "n", "mean", "low", "high"])


def report(tables: Mapping[str, pd.DataFrame], run: Run, studies: Sequence[Study]) -> str:
    """The finding in plain sentences, then the tables of `BlockProtocol.tables`, and what failed in the studies."""
    seeds = len(tables["seeds"])
    weights = sum(layer.numel() for layer in run.network.tracked(dict(run.network.named_parameters())))
    last = "last block" if run.settings.trained_blocks == 1 else f"last {run.settings.trained_blocks} blocks"
    lines = [
        f"Does importance masking help on the {last} of the ViT?",
        "",
        f"{run.features.describe()}; {seeds} seeds, {len(run.holdouts)} held-out domains; {weights:,} tracked weights.",
        "Headline: last epoch, all images of the held-out domain, mean over the holdouts, paired by seed. Each arm has",
        "the learning rate of the blocks that is best for it on the sources' `out` part, per held-out domain.",
        "",
        *(line for text in sentences(tables) + cautions(tables["rates"], run) for line in textwrap.wrap(text, 118)),
        "",
        *EXPLANATION.splitlines(),
        *section("Confirmatory family", family_shown(tables["contrasts"])),
        *section("Accuracy (%)", wide_table(tables["accuracy"])),
        *section(
            "EXPLORATORY: accuracy (%) by density, and minus `head` (points)", densities_shown(tables["densities"])
        ),
        *section("Learning rates of the blocks that were chosen", rates_shown(tables["rates"])),
    ]
    if "controls" in tables:
        lines += section("EXPLORATORY: importance minus other controls (points)", controls_shown(tables["controls"]))
    appendices = {
        "_fixed_rate": f"Appendix: all arms at the rate {run.settings.backbone_learning_rate:g}",
        "_schedule": "Appendix: unmarked weights at a tenth of the rate, halved each epoch, frozen after "
        f"{freeze_epoch(run.settings.ph2_num_epochs)} of {run.settings.ph2_num_epochs} epochs",
    }
    for ending, title in appendices.items():
        if f"contrasts{ending}" in tables:
            lines += section(f"{title}; the family's contrasts", family_shown(tables[f"contrasts{ending}"]))
            lines += section(f"{title}; accuracy (%)", wide_table(tables[f"accuracy{ending}"]))
    if "decaying" in tables:
        shown = decaying_shown(tables["decaying"])
        title = f"EXPLORATORY: by the schedule, minus plain training ({DECAYING}: all matrices by it; points)"
        lines += section(title, shown)
    return "\n".join(lines + failures_shown(studies)) + "\n"


def sentences(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """What the tables say, in plain sentences."""
    found = contrast_sentences(tables["contrasts"])
    averages = tables["accuracy"][tables["accuracy"]["holdout"] == AVERAGE].set_index("algorithm")
    means = averages["mean"][averages["n"] == averages["n"].max()]  # on fewer seeds, a mean is of other splits
    best = means.idxmax()
    where = f"{100 * means[best]:.1f} %{', exploratory' * best.startswith(CONTROLS)}"
    found.append(
        f"Head, biases and norms alone have {100 * means['head']:.1f} %, ERM {100 * means['erm']:.1f} %; "
        f"of the arms on all seeds {best} has the best mean ({where})."
    )
    return found + edge_sentences(tables["rates"], "learning rates")


def block_findings(directory: str | Path) -> list[str]:
    """The `sentences` of the tables (CSV) in the directory of a `BlockProtocol`."""
    tables = {path.stem: pd.read_csv(path) for path in Path(directory).glob("*.csv")}
    if not {"contrasts", "accuracy", "rates"} <= tables.keys():
        raise InputError(f"'{directory}' holds no study of blocks: run study first, or give --results-dir.")
    return sentences(tables)


def cautions(rates: pd.DataFrame, run: Run) -> list[str]:
    """A sentence on arms that did not learn even their sources, judged by the validation of `chosen_rates`."""
    validation = rates.groupby("arm")["validation"].mean().to_dict()
    about = validation, run.facts["counts"], run.settings, "PH2_NUM_EPOCHS"
    return unlearned(*about, images="the sources' validation images")


def densities_shown(table: pd.DataFrame) -> pd.DataFrame:
    """A `densities_table` for reading."""
    return by_density(table, HEAD.control, "weights that learn")


def controls_shown(table: pd.DataFrame) -> pd.DataFrame:
    """A `controls_table` for reading: controls × densities, in points."""
    cells = [in_points(row.mean, row.low, row.high) for row in table.itertuples()]
    shown = table.assign(cell=cells, density=[f"{density:g} %" for density in table["density"]])
    wide = shown.pivot(index="control", columns="density", values="cell").loc[list(dict.fromkeys(table["control"]))]
    wide = wide[list(dict.fromkeys(shown["density"]))].rename_axis(columns=None)
    seeds = table.groupby("control")["n"].agg(lambda n: f"{n.min()}" if n.nunique() == 1 else f"{n.min()}-{n.max()}")
    wide.insert(0, "seeds", seeds)
    return wide


def decaying_shown(table: pd.DataFrame) -> pd.DataFrame:
    """A `decaying_table` for reading: arms × baselines, in points."""
    cells = [in_points(row.mean, row.low, row.high) for row in table.itertuples()]
    shown = table.assign(cell=cells, baseline=[f"minus {name}" for name in table["baseline"]])
    wide = shown.pivot(index="arm", columns="baseline", values="cell").loc[list(dict.fromkeys(table["arm"]))]
    wide = wide[list(dict.fromkeys(shown["baseline"]))].rename_axis(columns=None).fillna("")
    wide.insert(0, "seeds", table[table["baseline"] == ERM.name].set_index("arm")["n"])
    return wide


def rates_shown(table: pd.DataFrame) -> pd.DataFrame:
    """`chosen_rates` for reading: arms × holdouts."""
    shown = table.assign(
        rate=[f"{rate:g}{' (edge)' * edge}" for rate, edge in zip(table["rate"], table["edge"], strict=True)]
    )
    return shown.pivot(index="arm", columns="holdout", values="rate").loc[list(dict.fromkeys(table["arm"]))]
