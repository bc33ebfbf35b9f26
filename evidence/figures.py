"""Figures of the protocol, from the tables (CSV) that its directory holds."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from config import InputError
from evidence.confirmation import PLACES
from storage import Results
from study import MARGIN, Run
from study.figures import in_words
from visualization import Figure, accuracy_curves_by_setting, difference_plot, overlap_matrix, save_each

LENGTHS = ("contrasts", "contrasts_longer")
SWEPT_NUMBERS = {  # those with a figure, and its words
    "IMPORTANCE_THRESHOLD_PERCENTILE": "per cent of the weights kept as important",
    "PH2_FREEZE_EPOCH": "epochs after which the other weights are frozen",
}

COLUMN_LINES = {"all": "all columns", "last cls": "last [CLS]", "best layer": "best single layer"}
COLUMN_WORDS = {  # criterion and control -> what the figure calls it; without the inverted ones, which lie far below
    "min": "minimum over domains",
    "min random_layer": "at random, layers as of the minimum",
    "sum": "sum over domains",
    "sum random_layer": "at random, layers as of the sum",
}


def all_figures(directory: str | Path) -> Iterator[tuple[str, Callable[[], Figure]]]:
    """Name and maker of every figure: forest plot of the family, overlap of the masks, and the swept numbers.

    Raises:
        InputError: the directory holds no complete study.
    """
    directory = Path(directory)
    places = sorted(directory.glob("epochs_*"), key=lambda path: int(path.name.removeprefix("epochs_")))
    about = [Results(place).read_settings() for place in places]
    if len(about) != 2 or None in about or not (directory / "report.txt").is_file():
        raise InputError(f"'{directory}' holds no complete study: run study first, or give --results-dir.")
    yield "forest", lambda: _forest(directory, about)
    yield "overlap", lambda: _overlap(directory, about[0])
    for setting in SWEPT_NUMBERS:
        yield setting.lower(), partial(_sweep, directory, setting, about[0]["settings"])


def save_all(directory: str | Path, only: Sequence[str] | None = None, format: str = "png") -> list[Path]:
    """Draw every figure into the directory itself, see `visualization.save_each`."""
    return save_each(all_figures(directory), directory, only, format)


def block_figures(directory: str | Path) -> Iterator[tuple[str, Callable[[], Figure]]]:
    """Name and maker of the figures of a study of trained blocks: accuracy against density, and the forest plot.

    Raises:
        InputError: the directory holds no such study.
    """
    directory = Path(directory)
    about = Results(directory / "grid").read_settings()
    if about is None or not (directory / "densities.csv").is_file():
        raise InputError(f"'{directory}' holds no study of blocks: run study first, or give --results-dir.")
    yield "density", lambda: _density(directory, about)
    yield "forest", lambda: _block_forest(directory, about)


def save_blocks(directory: str | Path, only: Sequence[str] | None = None, format: str = "png") -> list[Path]:
    """Draw every figure into the directory itself, see `visualization.save_each`."""
    return save_each(block_figures(directory), directory, only, format)


def form_figures(directory: str | Path) -> Iterator[tuple[str, Callable[[], Figure]]]:
    """Name and maker of the figures of a study of forms: form minus random twin, one for each part.

    Raises:
        InputError: the directory holds no such study.
    """
    directory = Path(directory)
    if not (directory / "forms.csv").is_file():
        raise InputError(f"'{directory}' holds no study of forms: run forms first, or give --results-dir.")
    table = pd.read_csv(directory / "forms.csv")
    for part, own in table.groupby("part", sort=False):
        about = Results(directory / str(part)).read_settings()
        yield f"forms_{part}", partial(_forms, own, str(part), about)


def save_forms(directory: str | Path, only: Sequence[str] | None = None, format: str = "png") -> list[Path]:
    """Draw every figure into the directory itself, see `visualization.save_each`."""
    return save_each(form_figures(directory), directory, only, format)


def _forms(table: pd.DataFrame, part: str, about: Mapping) -> Figure:
    """Form minus twin, a row per criterion, a colour per density."""
    rows = table[table["criterion"] != "erm"].sort_values("density", kind="stable", ascending=False)
    rows = rows.assign(label=rows["criterion"], group=[f"{value:g} % marked" for value in rows["density"]])
    rows = rows.assign(**{name: rows[f"twin_{name}"] for name in ("mean", "low", "high")})
    what = f"Exploratory, {part}: importance mask minus random mask of the same counts"
    title = f"{what} (95 % t interval; {_title(about, rows['n'])})"
    return difference_plot(rows, title, margin=MARGIN)


def is_confirmation(directory: str | Path) -> bool:
    """Whether a results directory is one of `confirmation`."""
    return any((Path(directory) / place / "forms.csv").is_file() for place in PLACES)


def confirmation_figures(directory: str | Path) -> Iterator[tuple[str, Callable[[], Figure]]]:
    """Name and maker of the figure of the confirmation: each form minus its twin and minus plain training, by place.

    Raises:
        InputError: the directory holds no confirmation.
    """
    if not is_confirmation(directory):
        raise InputError(f"'{directory}' holds no confirmation: run confirm first, or give --results-dir.")
    yield "confirmation", lambda: _confirmation(pd.read_csv(Path(directory) / "forms.csv"))


def save_confirmation(directory: str | Path, only: Sequence[str] | None = None, format: str = "png") -> list[Path]:
    """Draw every figure into the directory itself, see `visualization.save_each`."""
    return save_each(confirmation_figures(directory), directory, only, format)


def _confirmation(table: pd.DataFrame) -> Figure:
    rows = table[table["criterion"] != "erm"]
    rows = rows.assign(label=[f"{row.place}: {row.criterion} {row.density:g} %" for row in rows.itertuples()])
    groups = {"twin": "minus random mask of the same counts", "erm": "minus plain training"}
    kinds = ("mean", "low", "high")
    parts = [
        rows.assign(group=words, **{kind: rows[f"{name}_{kind}"] for kind in kinds}) for name, words in groups.items()
    ]
    title = f"Forms of importance where nobody tuned, 95 % t interval ({_seeds(rows['n'])})"
    return difference_plot(pd.concat(parts), title, margin=MARGIN)


def column_figures(directory: str | Path) -> Iterator[tuple[str, Callable[[], Figure]]]:
    """Name and maker of the figure of the importance of features: accuracy against the share of columns.

    Raises:
        InputError: the directory holds no such study.
    """
    directory = Path(directory)
    about = Results(directory).read_settings()
    if about is None or not (directory / "layers.csv").is_file():
        raise InputError(f"'{directory}' holds no study of columns: run columns first, or give --results-dir.")
    yield "density", lambda: _column_density(directory, about)


def save_columns(directory: str | Path, only: Sequence[str] | None = None, format: str = "png") -> list[Path]:
    """Draw every figure into the directory itself, see `visualization.save_each`."""
    return save_each(column_figures(directory), directory, only, format)


def _column_density(directory: Path, about: Mapping) -> Figure:
    """Accuracy against the share of columns that are kept; all columns, the last [CLS] and the best layer as lines."""
    table = pd.read_csv(directory / "densities.csv")
    single = table["criterion"].isin(COLUMN_LINES)
    points = table.assign(algorithm=table["criterion"].map(COLUMN_WORDS)).dropna(subset="algorithm")
    points = points.sort_values("density", kind="stable")
    points = points.assign(density=[f"{value:g} %" for value in points["density"]])
    lines = {COLUMN_LINES[row["criterion"]]: tuple(row[["mean", "low", "high"]]) for _, row in table[single].iterrows()}
    title = f"Accuracy by the share of columns that are kept ({_title(about, table['n'])})"
    return accuracy_curves_by_setting(points, "density", title, "columns of all layers that are kept", lines)


def _density(directory: Path, about: Mapping) -> Figure:
    """Accuracy against the share of weights that are trained; ERM and head alone as lines."""
    table = pd.read_csv(directory / "densities.csv")
    points = table[table["density"].between(0, 100, inclusive="neither")].sort_values("density", kind="stable")
    points = points.assign(density=[f"{value:g} %" for value in points["density"]])
    points = points.assign(algorithm=points["criterion"].map(in_words))
    rest = table[~table["density"].between(0, 100, inclusive="neither")]
    lines = {in_words(row["criterion"]): tuple(row[["mean", "low", "high"]]) for _, row in rest.iterrows()}
    title = f"Accuracy by the share of the block's weights that learn ({_title(about, table['n'])})"
    words = "weights that learn; each arm at its own learning rate"
    return accuracy_curves_by_setting(points, "density", title, words, lines)


def _block_forest(directory: Path, about: Mapping) -> Figure:
    groups = {"own rate": "contrasts", "one rate": "contrasts_fixed_rate"}
    found = {group: directory / f"{name}.csv" for group, name in groups.items()}
    tables = {group: pd.read_csv(path) for group, path in found.items() if path.is_file()}
    seeds = {group: table["n"].max() for group, table in tables.items()}
    most = max(seeds.values())
    words = {group: group if seeds[group] == most else f"{group} ({seeds[group]} seeds)" for group in tables}
    rows = [table.assign(group=words[group]) for group, table in tables.items()]
    return _forest_plot(pd.concat(rows), _title(about, most))


def forest_figure(table: pd.DataFrame, run: Run) -> Figure:
    """Forest plot of a `contrasts.family_table`, with a column "group" of several."""
    return _forest_plot(table, run.title)


def _forest_plot(table: pd.DataFrame, measured: str) -> Figure:
    words = {name: _contrast(name) for name in table["contrast"]}
    title = f"Paired differences, mean over the holdouts, 95 % bootstrap interval ({measured})"
    return difference_plot(table.assign(label=table["contrast"].map(words)), title, margin=MARGIN)


def _contrast(name: str) -> str:
    """A contrast in plain words: "importance mask − ERM, from Phase 1's start"."""
    first, second = (in_words(arm) for arm in name.split(" − "))
    return f"{first.split(',')[0]} − {second}"


def _title(about: Mapping, seeds: Iterable[int] | int) -> str:
    """As `Run.title`, with the seeds of what is drawn."""
    facts = about["features"]
    model = facts["model"]["name"] if facts["model"] else "a model that is not named"
    return f"{model.split('/')[-1]}, {facts['feature_size']}-d, {_seeds(seeds)}"


def _seeds(counts: Iterable[int] | int) -> str:
    """How many seeds there are, a range where not all that is drawn has as many: "10 to 20 seeds"."""
    found = np.unique(counts)
    return f"{found[0]} seeds" if len(found) == 1 else f"{found[0]} to {found[-1]} seeds"


def _forest(directory: Path, about: Sequence[Mapping]) -> Figure:
    tables = [pd.read_csv(directory / f"{name}.csv") for name in LENGTHS]
    groups = [f"{study['settings']['PH2_NUM_EPOCHS']} epochs" for study in about]
    rows = pd.concat([table.assign(group=group) for table, group in zip(tables, groups, strict=True)])
    return _forest_plot(rows, _title(about[0], rows["n"].max()))


def _overlap(directory: Path, about: Mapping) -> Figure:
    tables = "domain_overlap", "seed_stability"
    table, stability = (pd.read_csv(directory / f"{name}.csv") for name in tables)
    seeds = pd.read_csv(directory / "contrasts.csv")["n"].max()
    title = f"Overlap (IoU) of the masks of single domains ({_title(about, seeds)})"
    return overlap_matrix(table.to_numpy(), list(table), title, stability["chance"].iloc[0])


def _sweep(directory: Path, setting: str, settings: Mapping) -> Figure:
    """Accuracy against a swept number; what does not depend on it as lines."""
    table = pd.read_csv(directory / "sweep.csv", keep_default_na=False)
    probe = pd.read_csv(directory / "linear_probe.csv")["full"].mean()
    default, base = settings[setting], table[table["setting"] == ""]
    points = table[table["setting"] == setting].assign(x=lambda t: t["value"].astype(float))
    if not (points["x"] == default).any():  # that of the arm in which nothing is changed
        points = pd.concat([points, base[base["algorithm"] == "importance"].assign(x=float(default))])
    points = points.assign(algorithm=points["algorithm"].map(in_words))
    at = f" at {settings['IMPORTANCE_THRESHOLD_PERCENTILE']:g} %"  # the density of the other masks is not swept
    lines = {
        in_words(row["algorithm"]) + (at if row["algorithm"] != "erm" else ""): tuple(row[["mean", "low", "high"]])
        for _, row in base[base["algorithm"] != "importance"].iterrows()
    }
    lines["linear probe"] = (probe, float("nan"), float("nan"))
    words, seeds = SWEPT_NUMBERS[setting], table["n"].max()
    title = f"Exploratory: accuracy by {words} (mean over the holdouts, {seeds} seeds)"
    return accuracy_curves_by_setting(points, "x", title, words, lines, default)
