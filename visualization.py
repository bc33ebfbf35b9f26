"""Figures from results: plain arrays, tensors or tables in, a `Figure` out; only `save` and `save_each` write.

No figure of the usual size is wider than the text of a page. A returned figure shows itself as the last expression of
a notebook cell. Accuracies come in as fractions and are drawn in per cent, differences in percentage points.
"""

import hashlib
import io
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from contextvars import ContextVar
from functools import partial, wraps
from logging import getLogger
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit
from tqdm.auto import tqdm

from config import InputError
from storage import WriteError, atomic_write

if "matplotlib" not in sys.modules:  # cannot be imported with a backend that does not exist, though none is needed
    backend = os.environ.pop("MPLBACKEND", None)
    import matplotlib

    if backend is not None:
        os.environ["MPLBACKEND"] = backend
        with suppress(ValueError):
            matplotlib.rcParams["backend"] = backend
import matplotlib
from matplotlib.cm import ScalarMappable
from matplotlib.collections import EllipseCollection
from matplotlib.colors import BoundaryNorm, ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

log = getLogger(__name__)

WIDTH = 6.75  # inches, as all lengths here: the text of a page of ICML, and about that of CVPR and NeurIPS
DPI = 192  # twice the 96 that screens count with, so that a notebook shows a figure as sharp as the screen is
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#666666")
OTHER_COLORS = ("#332288", "#999933", "#882255", "#44AA99", "#CC6677", "#117733", "#AA4499")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", "*", ">", "p")  # 11 × 7 colours: 77 series before one repeats
DOMAIN_MARKERS, CLASS_MARKERS = MARKERS[:4], (*MARKERS[4:], "d", (3, 1, 0), (6, 1, 0))  # (3, 1, 0): star of 3 points
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "++", "oo", "---")
SEQUENTIAL, DIVERGING = "magma_r", "RdBu_r"
MAX_NUMBERED = 20  # rows or columns above which a matrix is drawn without numbers
FORMATS = {  # what a file says of itself: no dates, and where the digest of what it shows stands
    "png": ({"Software": None}, "Comment"),
    "pdf": ({"CreationDate": None}, "Keywords"),
    "svg": ({"Date": None}, "Keywords"),
}
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same figure on every machine
    "font.size": 8,
    "text.color": "black",
    "text.usetex": False,
    "figure.facecolor": "white",
    "figure.titlesize": 9.5,
    "figure.titleweight": "normal",
    "savefig.facecolor": "auto",
    "axes.facecolor": "white",
    "axes.edgecolor": "black",
    "axes.labelcolor": "black",
    "axes.titlecolor": "auto",
    "axes.titlesize": 8.5,
    "axes.grid": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": "black",
    "ytick.color": "black",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "hatch.linewidth": 0.8,
    "pdf.fonttype": 42,  # text stays text; many journals refuse matplotlib's default
    "svg.hashsalt": "figure",  # or the same figure has other bytes each time
}
ERROR_BARS = {"fmt": "none", "ecolor": "black", "elinewidth": 1.2, "capsize": 3, "zorder": 5}
OUTLINE = [withStroke(linewidth=3, foreground="white")]
DASHED = {"color": "black", "linestyle": (0, (4, 3)), "linewidth": 1}
PANELS = {
    "loss": "training loss",
    "train_accuracy": "training accuracy",
    "validation_accuracy": "validation accuracy",
    "held_out_accuracy": "accuracy on the held-out domain",
}
BANDS = {"t95": "95 % t interval of the mean", "std": "± one standard deviation", "range": "lowest to highest"}


# Files: what is drawn, and only if it is not there yet


class UnchangedError(Exception):
    """Raised in place of drawing what the file shows already."""


_there: ContextVar[bytes] = ContextVar("the file that is there", default=b"")


def drawing(function: Callable[..., Figure]) -> Callable[..., Figure]:
    """Decorator of functions that draw: in the house style, whatever style the user has set."""

    @wraps(function)
    def draw(*arguments, **options) -> Figure:
        digest = hashlib.sha256(f"{function.__name__} {matplotlib.__version__}".encode())
        digest.update(Path(__file__).read_bytes())
        _add(digest, (arguments, options))
        if digest.hexdigest().encode() in _there.get():
            raise UnchangedError
        with matplotlib.rc_context(STYLE):
            figure = function(*arguments, **options)
        figure.digest = digest.hexdigest()
        return figure

    return draw


def _add(digest, value) -> None:
    """Add a value to a digest: numbers, text, arrays, tensors, tables, and collections of them."""
    if hasattr(value, "to_csv"):  # every digit of a number is in it
        digest.update(value.to_csv().encode())
    elif isinstance(value, Mapping):
        _add(digest, list(value.items()))
    elif isinstance(value, list | tuple):
        digest.update(f"{type(value).__name__} {len(value)} ".encode())
        for part in value:
            _add(digest, part)
    elif isinstance(value, np.ndarray) or hasattr(value, "detach") or hasattr(value, "convert"):  # tensor or image
        array = np.ascontiguousarray(value.detach().cpu() if hasattr(value, "detach") else value)
        digest.update(f"{array.dtype} {array.shape} ".encode())
        digest.update(array)
    else:
        digest.update(f"{value!r} ".encode())


def save(figure: Figure, path: str | Path) -> None:
    """Write `figure` as the ending of `path` says (png, pdf or svg): whole or not at all, and always the same bytes.

    The figure need not be closed: pyplot does not know it. It can still be shown after saving.
    """
    kind = Path(path).suffix[1:]
    facts, name = FORMATS[kind]
    facts = facts | {name: getattr(figure, "digest", "")}
    with atomic_write(path) as temporary, matplotlib.rc_context(STYLE):
        figure.savefig(temporary, format=kind, metadata=facts)


def save_each(
    figures: Iterable[tuple[str, Callable[[], Figure]]],
    folder: str | Path,
    only: Sequence[str] | None = None,
    format: str = "png",
) -> list[Path]:
    """Draw figures into a folder; their paths. One whose data did not change stays as it is.

    A figure that cannot be drawn is named in a warning, and the others are drawn all the same.

    Args:
        figures: name of the file and function that draws it, of each figure.
        folder: where; made if missing.
        only: names of the figures to draw, or how they begin; default all.
        format: "png", "pdf" or "svg".

    Raises:
        InputError: a name in `only` that no figure has, or another format.
    """
    if format not in FORMATS:
        raise InputError(f"A figure cannot be written as '{format}'; choose of {', '.join(FORMATS)}.")
    figures = dict(figures)
    for wanted in only or ():
        if not any(name.startswith(wanted) for name in figures):
            raise InputError(f"There is no figure '{wanted}'; there are {', '.join(figures)}.")
    paths = []
    chosen = [name for name in figures if only is None or name.startswith(tuple(only))]
    for name in tqdm(chosen, "Figures", unit="figure"):
        path = Path(folder) / f"{name}.{format}"
        token = _there.set(path.read_bytes() if path.is_file() else b"")
        try:
            save(figures[name](), path)
        except UnchangedError:
            paths.append(path)
        except WriteError:
            raise  # a full disk: no figure can be written, and those of earlier runs are kept
        except Exception as error:  # never lose the remaining figures to one failure
            why = " ".join(str(error).split()) or type(error).__name__
            path.unlink(missing_ok=True)  # or one of an earlier run would be taken for this one's
            log.warning("The figure '%s' cannot be drawn (%s); the others are.", name, why)
        else:
            paths.append(path)
        finally:
            _there.reset(token)
    return paths


class NotebookFigure(Figure):
    """A figure that notebooks show as PNG, although pyplot does not know it."""

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        """PNG of twice as many pixels as it is shown with."""
        file = io.BytesIO()
        with matplotlib.rc_context(STYLE):
            self.savefig(file, format="png")
        width, height = (round(DPI / 2 * inches) for inches in self.get_size_inches())
        return file.getvalue(), {"width": width, "height": height}


# Figures of networks


@drawing
def weight_grids(layers: Sequence, title: str, kind: str = "weights", limits: tuple | None = None) -> Figure:
    """Tracked matrices, two beside each other, a numbered circle per weight.

    Args:
        layers: matrices `[out, in]`, first layer first; column = unit the weight comes from, row = unit it goes to.
            Weights that are not finite leave a gap; matrices of more than 20 units go without numbers.
        title: of the figure, like in all functions here.
        kind: "weights" (colours symmetric around 0), "importance" (0 … 1) or "mask" (1 = important).
        limits: `(low, high)` ends of the colour scale instead, e.g. to compare figures.
    """
    arrays = [as_array(layer) for layer in layers]
    norm, cmap = _weight_colours(arrays, kind, limits)
    biggest = max(max(array.shape) for array in arrays)
    across = min(len(arrays), 2 if not 10 < biggest <= MAX_NUMBERED else 1)
    left, gap, right, below, above = 0.42, 0.36, 0.95, 0.42, 0.25
    room = (WIDTH - left - right + gap) / across - gap
    cell = min(0.28, room / biggest)
    text = None if biggest > MAX_NUMBERED else partial(written, form=".0f") if kind == "mask" else short
    rows = [arrays[i : i + across] for i in range(0, len(arrays), across)]
    widths = [max(1.3, *(row[i].shape[1] * cell for row in rows if i < len(row))) for i in range(across)]
    heights = [max(0.9, *(len(array) * cell for array in row)) for row in rows]
    width = max(3.5, left + sum(widths) + gap * (across - 1) + right)
    figure = new_figure(width, 1.0, title, layout="none")
    height = sum(heights) + (below + above) * len(rows) + 0.1 + 0.18 * len(figure.get_suptitle().splitlines())
    figure.set_figheight(height)
    figure.suptitle(figure.get_suptitle(), y=1 - 0.08 / height)
    y = sum(heights) + (below + above) * len(rows)
    for number, array in enumerate(arrays):
        row, column = divmod(number, across)
        y -= (above + heights[row]) if column == 0 else 0
        size = array.shape[1] * cell, len(array) * cell
        x = left + sum(widths[:column]) + gap * column + (widths[column] - size[0]) / 2
        ax = figure.add_axes((x / width, (y + heights[row] - size[1]) / height, size[0] / width, size[1] / height))
        circles = _draw_circles(ax, array, norm, cmap, text, cell)
        ax.set_title(f"hidden {number + 1} → hidden {number + 2}")
        ax.set_ylabel("to unit" if column == 0 else "")
        y -= below if column == across - 1 else 0
    tall = min(3.0, sum(heights))
    cax = figure.add_axes(
        ((width - right + 0.15) / width, (below + sum(heights) / 2 - tall / 2) / height, 0.13 / width, tall / height)
    )
    if kind == "mask":
        bar = figure.colorbar(circles, cax=cax, ticks=[0, 1])
        bar.ax.set_yticklabels(["0\nnot\nimportant", "1\nimportant"], fontsize=7)
    else:
        ends = np.any([[np.any(array < norm.vmin), np.any(array > norm.vmax)] for array in arrays], axis=0)
        extend = ("neither", "max", "min", "both")[2 * ends[0] + ends[1]]
        figure.colorbar(circles, cax=cax, extend=extend, label=kind.removesuffix("s"))
    return figure


def _weight_colours(arrays: list[np.ndarray], kind: str, limits: tuple | None) -> tuple:
    """Norm and colour map of a kind of grid."""
    if kind == "mask":
        return BoundaryNorm([-0.5, 0.5, 1.5], 2), ListedColormap(["#E4E4E4", COLORS[0]])
    if kind == "weights":
        values = np.concatenate([array.ravel() for array in arrays]) if limits is None else np.asarray(limits, float)
        bound = np.max(np.abs(values), where=np.isfinite(values), initial=0.0) or 1.0
        return Normalize(-bound, bound), matplotlib.colormaps[DIVERGING]
    if kind == "importance":
        return Normalize(*(limits or (0.0, 1.0))), matplotlib.colormaps[SEQUENTIAL]
    raise ValueError(f"kind must be 'weights', 'importance' or 'mask', not {kind!r}.")


def _draw_circles(ax, array: np.ndarray, norm: Normalize, cmap, text: Callable | None, cell: float):
    """One collection of circles, diameter 0.96 cells, unit 1 → unit 1 at the top left; `text` writes the numbers."""
    rows, columns = array.shape
    x, y = np.meshgrid(np.arange(1, columns + 1), np.arange(1, rows + 1))
    size = np.full(array.size, 0.96)
    offsets = np.column_stack([x.ravel(), y.ravel()])
    circles = EllipseCollection(size, size, np.zeros(array.size), units="xy", offsets=offsets)
    circles.set(offset_transform=ax.transData, array=array.ravel(), norm=norm, cmap=cmap)
    circles.set(edgecolor="#555555", linewidth=0.4)
    ax.add_collection(circles, autolim=False)
    ax.set(xlim=(0.5, columns + 0.5), ylim=(rows + 0.5, 0.5), xlabel="from unit")
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0, labelsize=7, pad=1)
    if text:
        ax.set(xticks=x[0], yticks=y[:, 0])
        write_numbers(ax, x, y, array, circles, text, size=20.5 * cell)
    return circles


@drawing
def training_curves(
    histories: Mapping[str, Mapping],
    title: str,
    freeze_epoch: int | None = None,
    bands: str = "t95",
    names: Mapping[str, str] | None = None,
) -> Figure:
    """Loss and accuracies by epoch: mean over seeds with a band, one line per entry of `histories`.

    Args:
        histories: label -> any of the keys of `PANELS`, each `[E, S]` (fractions). A seed with any value that is not
            finite is a failed network: it is left out, and the legend says so.
        freeze_epoch: number of epochs after which a learning rate is 0, drawn as a line after that epoch.
        bands: "t95" (95 % t interval of the mean), "std" or "range", over seeds; there is none for a single seed.
            No band leaves what is possible, 0 … 100 % or a loss above 0.
        names: key of `PANELS` -> title of its panel, where another is to be used.
    """
    keys = [key for key in PANELS if any(key in history for history in histories.values())]
    if not keys or bands not in BANDS:
        raise ValueError(f"Nothing to draw: histories need one of {tuple(PANELS)}, and bands one of {tuple(BANDS)}.")
    across = len(keys) if len(keys) < 4 else 2
    figure = new_figure(WIDTH if across > 1 else 4.5, 0.5 + 2.4 * -(-len(keys) // across), title)
    axes = dict(zip(keys, figure.subplots(-(-len(keys) // across), across, squeeze=False).flat, strict=True))
    handles, epochs, several = [], 1, False
    for index, (label, history) in enumerate(histories.items()):
        arrays, note = _finite_networks({key: history[key] for key in keys if key in history})
        for key, array in arrays.items():
            epochs, several = max(epochs, len(array)), several or array.shape[1] > 1
            if array.size:
                mean, low, high = mean_band(array if key == "loss" else 100 * array, bands)
                x, top = np.arange(1, len(array) + 1), None if key == "loss" else 100
                if np.isfinite(low).any():
                    band = np.clip(low, 0, top), np.clip(high, 0, top)
                    axes[key].fill_between(x, *band, color=COLORS[index % 7], alpha=0.2, linewidth=0)
                axes[key].plot(x, mean, **line_style(index), markevery=max(1, len(mean) // 10))
        handles.append(Line2D([], [], **line_style(index), label=label + note))
    if freeze_epoch is not None and freeze_epoch < epochs:
        for ax in axes.values():
            ax.axvline(freeze_epoch + 0.5, **DASHED)
        handles.append(Line2D([], [], **DASHED, label=f"unmarked weights frozen after epoch {freeze_epoch}"))
    for key, ax in axes.items():
        ax.set(title=wrap((PANELS | dict(names or {}))[key], 84 // across), xlabel="epoch", xlim=(0.5, epochs + 0.5))
        ax.set_ylabel("loss" if key == "loss" else "accuracy (%)")
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    share_percent([ax for key, ax in axes.items() if key != "loss"])
    add_legend(figure, handles, f"mean over seeds; band: {BANDS[bands]}" if several else "one seed")
    return settled(figure)


def _finite_networks(history: Mapping) -> tuple[dict[str, np.ndarray], str]:
    """Arrays `[E, S]` without the seeds that have a value that is not finite, and a note on how many are left."""
    arrays = {key: as_array(values) for key, values in history.items()}
    finite = np.logical_and.reduce([np.isfinite(array).all(axis=0) for array in arrays.values()])
    note = "" if finite.all() else f" ({finite.sum()} of {finite.size} seeds)"
    return {key: array[:, finite] for key, array in arrays.items()}, note


def mean_band(values: np.ndarray, bands: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`[E, S]` -> mean, low, high over seeds, each `[E]`, for a kind of `BANDS`; low and high are NaN for S = 1."""
    mean, seeds = values.mean(axis=1), values.shape[1]
    if seeds == 1:
        return mean, np.full_like(mean, np.nan), np.full_like(mean, np.nan)
    if bands == "range":
        return mean, values.min(axis=1), values.max(axis=1)
    half = values.std(axis=1, ddof=1)
    if bands == "t95":
        half = half * stdtrit(seeds - 1, 0.975) / np.sqrt(seeds)
    return mean, mean - half, mean + half


@drawing
def row_densities(
    rows: Mapping[str, Sequence], title: str, share: float, chance: Mapping[str, tuple] | None = None
) -> Figure:
    """Share of each row of a matrix that a mask marks: a line per matrix from its lowest to its highest row.

    Args:
        rows: name of the matrix -> share marked of each of its rows, fractions `[R]`.
        share: of all weights together, drawn as a dashed line.
        chance: name -> `(low, high)` of a row marked at random, a grey band.
    """
    names = [plain(name, 24) for name in rows]
    lines = max(name.count("\n") + 1 for name in names)
    figure = new_figure(WIDTH, 0.9 + max(0.34, 0.16 * lines) * len(rows), title)
    ax, high = figure.subplots(), 100 * share
    for place, (name, values) in enumerate(rows.items()):
        shares = 100 * as_array(values)
        shares = shares[np.isfinite(shares)]
        if name in (chance or {}):
            left, right = (100 * end for end in chance[name])
            ax.barh(place, right - left, left=left, height=0.72, color="#DDDDDD", zorder=0)
            high = max(high, right)
        if len(shares):
            low, first, middle, third, top = np.quantile(shares, [0.05, 0.25, 0.5, 0.75, 0.95])
            ax.plot([shares.min(), shares.max()], [place] * 2, linestyle="", marker=".", markersize=4, color=COLORS[0])
            ax.plot([low, top], [place] * 2, color=COLORS[0], linewidth=1.2)
            ax.plot([first, third], [place] * 2, color=COLORS[0], linewidth=6, solid_capstyle="butt")
            ax.plot([middle] * 2, [place - 0.2, place + 0.2], color="white", linewidth=1.6, zorder=4)
            style = {"marker": "D", "color": COLORS[1], "markersize": 5, "markeredgecolor": "white", "zorder": 5}
            ax.plot([shares.mean()], [place], **style)
            transform = ax.get_yaxis_transform()
            ax.text(1.02, place, written(shares.mean(), ".3g"), transform=transform, va="center", fontsize=7.5)
            high = max(high, shares.max())
    ax.axvline(100 * share, **DASHED, zorder=1)
    ax.text(1.02, 1.0, "whole matrix", transform=ax.transAxes, va="bottom", fontsize=7.5)
    ax.set_yticks(range(len(rows)), names)
    ax.set(xlim=(-0.02 * high, 1.03 * high or 1), ylim=(len(rows) - 0.4, -0.6), xlabel="weights of a row marked (%)")
    ax.tick_params(axis="y", length=0)
    handles = [
        Line2D([], [], color=COLORS[0], linewidth=6, label="middle half of the rows, median"),
        Line2D([], [], color=COLORS[0], linewidth=1.2, label="90 % of the rows"),
        Line2D([], [], color=COLORS[0], linestyle="", marker=".", label="lowest and highest row"),
        Line2D([], [], color=COLORS[1], linestyle="", marker="D", label="whole matrix"),
        Line2D([], [], **DASHED, label=f"all matrices ({100 * share:.3g} %)"),
    ]
    if chance:
        handles.append(Patch(color="#DDDDDD", label="95 % of the rows of a random mask"))
    add_legend(figure, handles)
    return settled(figure)


# Figures of accuracies


@drawing
def accuracy_bars(table, title: str, chance: float | None = None, majority: Mapping | None = None) -> Figure:
    """Held-out accuracy, means over seeds as bars with their intervals, grouped by holdout.

    Args:
        table: columns algorithm, holdout, mean, low, high (fractions); the holdout "average" becomes the last group.
            Intervals are those of `study.lodo_table`; they are drawn as far as they lie in 0 … 100 %.
        chance: accuracy of guessing, drawn as a dashed line.
        majority: holdout -> share of its largest class, drawn as a short line across its group.
    """
    algorithms = list(dict.fromkeys(table["algorithm"]))
    holdouts = sorted(dict.fromkeys(table["holdout"]), key=lambda name: name == "average")
    step, few = len(algorithms) + 1, len(algorithms) <= 3
    bar = max(0.4 if few else 0.2, (WIDTH - 0.7) / (step * len(holdouts)))  # inches; a bar is 1 wide in data units
    figure = new_figure(bar * step * len(holdouts) + 0.7, 3.2, title)
    ax = figure.subplots()
    for index, algorithm in enumerate(algorithms):
        rows = table[table["algorithm"] == algorithm]
        x = np.array([holdouts.index(name) * step + index for name in rows["holdout"]])
        mean, low, high = (100 * np.clip(rows[key].to_numpy(float), 0, 1) for key in ("mean", "low", "high"))
        ax.bar(x, mean, width=1, **bar_style(index))
        known = np.isfinite(low + high)
        ax.errorbar(x[known], mean[known], yerr=np.clip([mean - low, high - mean], 0, None)[:, known], **ERROR_BARS)
        for place, value, top in zip(x, mean, np.fmax(mean, high), strict=True):
            if np.isfinite(value):
                box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # or a line runs through it
                style = {"ha": "center", "va": "bottom", "fontsize": 7, "rotation": 0 if few else 90, "bbox": box}
                ax.annotate(f"{value:.1f}", (place, top), (0, 3), textcoords="offset points", zorder=6, **style)
    handles = [Patch(**bar_style(index), label=name) for index, name in enumerate(algorithms)]
    handles += _bar_references(ax, holdouts, step, chance, majority or {})
    ax.set_xticks(
        [group * step + (step - 2) / 2 for group in range(len(holdouts))],
        [plain(name, int(bar * step * 12)) for name in holdouts],
    )
    ax.set(xlim=(-1, step * len(holdouts) - 1), ylim=(0, min(100, ax.dataLim.y1 * 1.15) or 1))
    ax.set(xlabel="held-out domain", ylabel="accuracy (%)")
    ax.tick_params(axis="x", length=0)
    add_legend(figure, handles, "bars: mean over seeds; error bars: 95 % t interval of the mean")
    return settled(figure)


def _bar_references(ax, holdouts: list[str], step: int, chance: float | None, majority: Mapping) -> list[Line2D]:
    """Draw the lines that bars are compared with, below their error bars; returns the entries for the legend."""
    handles = []
    if chance is not None:
        ax.axhline(100 * chance, path_effects=OUTLINE, zorder=3, **DASHED)
        handles.append(Line2D([], [], **DASHED, label=f"chance ({100 * chance:.1f} %)"))
    known = [(index * step, 100 * majority[name]) for index, name in enumerate(holdouts) if name in majority]
    if known:
        start, height = np.array(known).T
        style = {"color": "#777777", "linewidth": 2.2}  # error bars, in black, can be seen on it
        ax.hlines(height, start - 0.7, start + step - 1.3, path_effects=OUTLINE, zorder=4, **style)
        handles.append(Line2D([], [], **style, label="share of the largest class"))
    return handles


@drawing
def difference_plot(
    table, title: str, xlabel: str = "difference in accuracy, paired by seed (points)", margin: float = 0
) -> Figure:
    """Forest plot: a row per label, its intervals as lines and as numbers on the right, a line at 0.

    Args:
        table: columns label, mean, low, high (fractions) and optionally group (colour and marker; where it is a
            pandas categorical, its categories have their colours whether they are in the table or not). Rows with the
            same label are drawn together. Of many rows, those with a mean far from all others become an arrow.
        margin: smallest difference of practical interest, a fraction: those below are a grey band; 0 for none.
    """
    groups = list(table["group"]) if "group" in table else [None] * len(table)
    kinds = list(getattr(getattr(table.get("group"), "cat", None), "categories", dict.fromkeys(groups)))
    labels, height = list(dict.fromkeys(table["label"])), 0.3 if len(table) < 20 else 0.22
    places = _forest_rows(list(table["label"]), labels)
    values = np.array([100 * table[key].to_numpy(float) for key in ("mean", "low", "high")]).T
    figure = new_figure(WIDTH, 1.3 + height * max(len(labels), 0.75 * len(table)), title)
    ax = figure.subplots()
    if margin:
        ax.axvspan(-100 * margin, 100 * margin, color="#E8E8E8", linewidth=0, zorder=0)
    ax.axvline(0, color="black", linewidth=1, zorder=1)
    low, high = _forest_limits(values, 100 * margin)
    for row, (mean, *ends), group in zip(places, values, groups, strict=True):
        style = line_style(kinds.index(group)) | {"linestyle": "-"}
        beyond = "<" if mean < low else ">" if mean > high else ""
        if beyond:  # the value is on the right, and the arrow says where it would be
            at, where = (low, (6, 0)) if beyond == "<" else (high, (-6, 0))
            ax.plot([at], [row], **(style | {"marker": beyond, "linestyle": "", "markersize": 6}), clip_on=False)
            text = {"ha": "left" if beyond == "<" else "right", "va": "center", "fontsize": 7}
            ax.annotate(written(mean, ".1f"), (at, row), where, textcoords="offset points", **text)
        else:  # caps are higher than the marker, so that it does not hide a short interval
            ax.plot(
                ends, [row, row], color=style["color"], linewidth=1.6, marker="|", markersize=9, markeredgewidth=1.6
            )
            ax.plot([mean], [row], **style)
        low_, high_ = (written(end, "+.2f") for end in ends)
        interval = ("–" if np.isnan(mean) else written(mean, "+.2f")) + f" [{low_}, {high_}]" * bool(
            np.isfinite(sum(ends))
        )
        ax.text(1.03, row, interval, transform=ax.get_yaxis_transform(), va="center", fontsize=7.5)
    ax.text(1.03, 1.0, "mean [low, high]", transform=ax.transAxes, va="bottom", fontsize=7.5)
    for x, side, text in ((0, "left", "← worse"), (1, "right", "better →")):
        style = {"textcoords": "offset points", "ha": side, "va": "top"}
        ax.annotate(text, (x, 0), (0, -18), xycoords="axes fraction", **style)
    ax.set_yticks(range(len(labels)), [plain(name, 38) for name in labels])
    ax.set(xlim=(low, high), ylim=(len(labels) - 0.4, -0.6))
    ax.set_xlabel(xlabel, labelpad=14)
    ax.xaxis.set_major_locator(MaxNLocator(7))
    ax.tick_params(axis="y", length=0, pad=7)
    ax.spines["left"].set_visible(False)
    handles = [
        Line2D([], [], **(line_style(i) | {"linestyle": "-"}), label=str(kind))
        for i, kind in enumerate(kinds)
        if "group" in table and kind in groups
    ]
    if margin:
        handles.append(Patch(facecolor="#E8E8E8", label=f"within ±{100 * margin:g} points"))
    if handles:
        add_legend(figure, handles)
    return settled(figure)


def _forest_rows(names: list[str], labels: list[str]) -> list[float]:
    """Height of each row: that of its label, rows that share one side by side around it."""
    places = []
    for i, name in enumerate(names):
        same, before = names.count(name), names[:i].count(name)
        places.append(labels.index(name) + 0.38 * (before - (same - 1) / 2) * (2 / max(2, same)))
    return places


def _forest_limits(values: np.ndarray, margin: float) -> tuple[float, float]:
    """Ends of the axis: all intervals and the margin, but of many rows only those not far from the others."""
    middle = values[np.isfinite(values[:, 0]), 0]
    kept = values
    if len(middle) >= 10:
        first, third = np.quantile(middle, [0.25, 0.75])
        inside = np.abs(values[:, 0] - (first + third) / 2) <= 3.5 * max(third - first, margin)
        kept = values[inside]
    known = np.append(kept[np.isfinite(kept)], [-1.2 * margin, 1.2 * margin, 0])
    room = 0.05 * (np.ptp(known) or 1)
    return known.min() - room, known.max() + room


@drawing
def accuracy_curves_by_setting(
    table, x: str, title: str, xlabel: str, baselines: Mapping | None = None, default=None
) -> Figure:
    """Accuracy against a setting, a line per algorithm with the interval of each point.

    Args:
        table: columns algorithm, mean, low, high (fractions) and `x`, numbers or names.
        x: the column of the setting.
        baselines: label -> `(mean, low, high)` of what does not depend on the setting: a horizontal line, and on its
            right a marker with the interval, side by side, so that none hides another.
        default: default value of the setting, drawn as a dotted vertical line.
    """
    figure = new_figure(WIDTH, 3.2, title)
    ax, handles = figure.subplots(), []
    numeric = table[x].dtype.kind in "iuf"
    places = {value: value if numeric else i for i, value in enumerate(dict.fromkeys(table[x]))}
    gaps = np.diff(sorted(places.values()))
    step, end = (gaps.min() if len(gaps) else 1), max(places.values())
    algorithms = list(dict.fromkeys(table["algorithm"]))
    for index, algorithm in enumerate(algorithms):
        rows = table[table["algorithm"] == algorithm]
        rows = rows.sort_values(x) if numeric else rows
        aside = 0.15 * step * (index - (len(algorithms) - 1) / 2)  # lines that coincide lie beside each other
        _draw_points(ax, [places[value] + aside for value in rows[x]], rows[["mean", "low", "high"]], index)
        handles.append(Line2D([], [], **line_style(index), label=algorithm))
    for number, (name, values) in enumerate((baselines or {}).items()):
        style = line_style(len(algorithms) + number)
        ax.axhline(100 * values[0], **(style | {"marker": "", "linewidth": 1.1}), zorder=1)
        aside = end + step * (1 + 0.6 * number)
        _draw_points(ax, [aside], np.array([values], float), len(algorithms) + number)
        handles.append(Line2D([], [], **style, label=name))
    if default is not None:
        style = {"color": "black", "linestyle": ":", "linewidth": 1.2}
        ax.axvline(places.get(default, default), **style, zorder=0)
        written_default = f"{default:g}" if numeric else default
        handles.append(Line2D([], [], **style, label=f"default ({written_default})"))
    if not numeric:
        ax.set_xticks(range(len(places)), [plain(name, 14) for name in places])
    elif len(places) <= 12:
        ax.set_xticks(sorted(places.values()))
    ax.set(xlabel=xlabel, ylabel="accuracy (%)")
    share_percent([ax])
    add_legend(figure, handles, "mean over seeds; error bars: 95 % t interval of the mean")
    return settled(figure)


def _draw_points(ax, x: Sequence[float], values, index: int) -> None:
    """Means as a line with markers, each with its interval where there is one; `values` `[N, 3]`."""
    mean, low, high = 100 * np.asarray(values, float).T
    errors = np.nan_to_num([mean - low, high - mean])
    style = line_style(index)
    ax.errorbar(x, mean, yerr=np.clip(errors, 0, None), **style, capsize=2.5, elinewidth=1.1)


# Figures of matrices


class Panel(NamedTuple):
    """A matrix `[R, C]` with a title, and names of its rows and columns; what is not finite is left blank."""

    title: str
    values: np.ndarray
    rows: Sequence[str]
    columns: Sequence[str]
    xlabel: str = ""
    ylabel: str = ""


@drawing
def matrices(
    panels: Sequence[Panel],
    title: str,
    legend: str | Sequence[str],
    limits: tuple[float, float] | None = (0, 1),
    number: str = ".2f",
    square: bool = True,
) -> Figure:
    """Matrices as colours with their numbers, two beside each other.

    Args:
        panels: the matrices. With more than 20 rows or columns no numbers are written.
        legend: of the one colour bar; or one for each panel, which then has a bar of its own.
        limits: ends of the colour scale; symmetric around 0 the colours diverge. Default 0 to the panel's largest.
        number: how a number is written.
        square: cells are squares; otherwise panels fill the width.
    """
    biggest, several = max(max(panel.values.shape) for panel in panels), len(panels) > 1
    across = 2 if several and not (square and 10 < biggest <= MAX_NUMBERED) else 1
    room = WIDTH / across - 1.4 - (0.6 if across == 1 else 0)
    cell = min(0.4, room / biggest)
    down = -(-len(panels) // across)
    tall = max(1.5, max(len(panel.rows) for panel in panels) * (cell if square else 0.22))
    width = WIDTH if several or not square else min(WIDTH, max(3.5, cell * biggest + 2.2))
    figure = new_figure(width, 0.4 + down * (tall + (1.3 if square else 0.9)), title)
    grid = figure.subplots(down, across, squeeze=False)
    colours = DIVERGING if limits and limits[0] == -limits[1] else SEQUENTIAL
    for ax, panel in zip(grid.flat, panels, strict=False):
        image = ax.imshow(
            np.ma.masked_invalid(panel.values),
            cmap=colours,
            norm=Normalize(*(limits or (0, np.nanmax(panel.values, initial=1e-9)))),
            aspect="equal" if square else "auto",
            interpolation="nearest",  # or neighbouring rows run into each other where columns are narrow
        )
        _name_cells(ax, panel, cell, square)
        size = min(8, 29 * (cell if square else (WIDTH / across - 1.9) / panel.values.shape[1]))
        if biggest <= MAX_NUMBERED and size > 5:
            x, y = np.meshgrid(*map(np.arange, panel.values.shape[::-1]))
            write_numbers(ax, x, y, panel.values, image, partial(written, form=number), size)
        if not isinstance(legend, str):
            figure.colorbar(image, ax=ax, label=legend[panels.index(panel)], fraction=0.06, pad=0.02)
    for ax in grid.flat[len(panels) :]:
        ax.set_axis_off()
    if isinstance(legend, str):
        below = limits is not None and any(np.nanmin(panel.values, initial=np.inf) < limits[0] for panel in panels)
        options = {"fraction": 0.05, "pad": 0.02, "aspect": 30, "extend": "min" if below else "neither"}
        figure.colorbar(image, ax=grid, label=legend, **options)
    return settled(figure)


def _name_cells(ax, panel: Panel, cell: float, square: bool) -> None:
    """Title, names along both sides, and what they are names of."""
    size = {"fontsize": min(8, 55 * cell) if square else 7.5}
    columns = [plain(name, 18) for name in panel.columns]
    longest = max(map(len, columns))
    places = range(0, len(columns), 1 if square else -(-len(columns) // (6 if longest == 3 else 12)))
    upright = {} if not square and longest < 4 else {"rotation": 90}
    ax.set_xticks(places, [columns[i] for i in places], **upright, **size)
    ax.set_yticks(range(len(panel.rows)), [plain(name, 24) for name in panel.rows], **size)
    ax.set(title=plain(panel.title, 38), xlabel=panel.xlabel, ylabel=panel.ylabel)
    ax.set_facecolor("#E8E8E8")
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)


def confusion_matrices(
    matrices_: Mapping, class_names: Sequence[str], title: str, baseline: Mapping | None = None
) -> Figure:
    """Per cent of each true class (row) that was classified as each class (column), a panel per holdout.

    Args:
        matrices_: holdout -> counts `[C, C]`, rows are true classes. The row of a class without images is left blank.
        class_names: C names. With more than 20 classes no numbers are written.
        baseline: the same of another method: the difference is drawn instead, in percentage points.
    """

    def percent(matrix) -> np.ndarray:
        counts = as_array(matrix)
        totals = counts.sum(axis=1, keepdims=True)
        return np.divide(100 * counts, totals, where=totals > 0, out=np.full_like(counts, np.nan))

    values = {
        name: percent(matrix) - (percent(baseline[name]) if baseline else 0) for name, matrix in matrices_.items()
    }
    words = class_names, class_names, "predicted class", "true class"
    panels = [Panel(f"held out: {name}", matrix, *words) for name, matrix in values.items()]
    if baseline is None:
        return matrices(panels, title, "% of the true class", (0, 100), ".0f")
    bound = max(1.0, *(np.max(np.abs(m), where=np.isfinite(m), initial=0) for m in values.values()))
    legend = "points of the true class (red: more, blue: fewer)"
    return matrices(panels, title, legend, (-bound, bound), "+.0f")


def overlap_matrix(values, names: Sequence[str], title: str, chance: float | None = None) -> Figure:
    """Intersection over union of every two masks, coloured from chance to 1.

    Args:
        values: `[M, M]` in 0 … 1; its diagonal is 1 and not drawn.
        names: M names, of the masks or of their domains.
        chance: expected value for unrelated masks, named at the colour bar; default 0.
    """
    words = "intersection over union" + ("" if chance is None else f" (chance: {chance:.2f})")
    values = as_array(values)
    if values.shape != (len(names), len(names)):
        raise ValueError(f"{len(names)} masks have as many rows and columns, not {values.shape}.")
    np.fill_diagonal(values, np.nan)
    return matrices([Panel("", values, names, names)], title, words, (chance or 0, 1))


# Figures of images


@drawing
def feature_projection(
    features,
    labels,
    domains,
    class_names: Sequence[str],
    domain_names: Sequence[str],
    title: str,
    method: str = "tsne",
    max_points: int = 1500,
    seed: int = 0,
) -> Figure:
    """One 2-D projection of the features, drawn twice: by domain and by class, in colours and markers of their own.

    Args:
        features: `[N, D]`; of more than `max_points` rows every k-th is taken, in order of domain and class.
        labels, domains: `[N]` indices into `class_names` and `domain_names`.
        method: "tsne" (van der Maaten & Hinton 2008; starts from PCA) or "pca".
        seed: of t-SNE. The same input gives the same figure.

    Raises:
        ValueError: an unknown method, fewer than two dimensions, or no two points that differ.
    """
    labels, domains = as_array(labels).astype(int), as_array(domains).astype(int)
    order = np.lexsort((labels, domains))
    chosen = order[np.linspace(0, len(order) - 1, min(max_points, len(order))).round().astype(int)]
    points, axis_names = _project(as_array(features[chosen]).astype(np.float32), method, seed)
    figure = new_figure(WIDTH, 3.6, title)
    kinds = (
        ("domain", domains, domain_names, COLORS, DOMAIN_MARKERS),
        ("class", labels, class_names, OTHER_COLORS, CLASS_MARKERS),
    )
    for ax, (kind, index, names, colours, markers) in zip(figure.subplots(1, 2), kinds, strict=True):
        handles = []
        for value, name in enumerate(names):
            style = line_style(value) | {"linestyle": ""}
            style |= {"color": colours[value % 7], "marker": markers[value % len(markers)]}
            part = points[index[chosen] == value]
            ax.scatter(*part.T, s=9, alpha=0.75, linewidths=0, color=style["color"], marker=style["marker"])
            handles.append(Line2D([], [], **style, label=name))
        ax.set(title=f"by {kind} ({len(chosen)} of {len(order)} images)", xticks=[], yticks=[])
        ax.set(xlabel=axis_names[0], ylabel=axis_names[1])
        add_legend(figure, handles, kind, ax=ax)
    return settled(figure)


def _project(features: np.ndarray, method: str, seed: int) -> tuple[np.ndarray, tuple[str, str]]:
    """`[N, D]` -> `[N, 2]` and the names of its two axes."""
    if min(features.shape) < 2 or not np.ptp(features, axis=0).any():  # equal points crash scikit-learn's t-SNE
        raise ValueError("A projection needs two dimensions, and two points that differ.")
    if method == "pca":
        from sklearn.decomposition import PCA

        pca = PCA(2, svd_solver="full")
        points = pca.fit_transform(features)
        first, second = 100 * pca.explained_variance_ratio_
        return points, (f"first component ({first:.0f} % of variance)", f"second component ({second:.0f} %)")
    if method != "tsne":
        raise ValueError(f"method must be 'tsne' or 'pca', not {method!r}.")
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    perplexity = max(1.0, min(30.0, (len(features) - 1) / 3))
    with threadpool_limits(1):  # hardly slower, and many times faster where other processes share the cores
        points = TSNE(init="pca", random_state=seed, perplexity=perplexity).fit_transform(features)
    return points, ("t-SNE 1", "t-SNE 2")


@drawing
def sample_sheet(images: Mapping[str, Mapping], title: str) -> Figure:
    """One image per domain (row) and class (column).

    Args:
        images: domain -> class -> `PIL.Image` or array `[H, W, 3]`. A class that a domain lacks leaves a cell empty.
    """
    classes = list(dict.fromkeys(name for row in images.values() for name in row))
    cell = min(1.0, max(0.5, (WIDTH - 1.0) / len(classes)))
    figure = new_figure(max(3.5, cell * len(classes) + 1.0), (cell + 0.06) * len(images) + 0.8, title)
    grid = figure.subplots(len(images), len(classes), squeeze=False)
    for axes, (domain, row) in zip(grid, images.items(), strict=True):
        axes[0].set_ylabel(plain(domain, 14), rotation=0, ha="right", va="center", labelpad=4)
        for ax, name in zip(axes, classes, strict=True):
            ax.set(xticks=[], yticks=[], box_aspect=1)
            ax.spines[:].set_visible(False)
            if name in row:
                image = row[name].convert("RGB") if hasattr(row[name], "convert") else row[name]
                ax.imshow(np.asarray(image), cmap="gray", interpolation="antialiased")
                ax.set_aspect("equal", adjustable="datalim")
    for ax, name in zip(grid[0], classes, strict=True):
        ax.set_title(plain(name, int(cell * 12)), fontsize=8)
    return settled(figure)


@drawing
def sentence_figure(sentence: str, title: str) -> Figure:
    """In place of a figure that cannot be: its title, and why."""
    figure = new_figure(WIDTH, 1.4, title)
    figure.text(0.5, 0.35, sentence, ha="center", va="center", wrap=True)
    return figure


# The house style: what every figure is made of


def new_figure(width: float, height: float, title: str, layout: str = "constrained") -> NotebookFigure:
    """An empty figure, sizes in inches, with its title broken into lines that fit."""
    figure = NotebookFigure(figsize=(width, height), dpi=DPI, layout=layout)
    letters = int(13.5 * width)
    if len(title) > letters:  # the first place to break it is before what stands in parentheses at its end
        title = re.sub(r" (?=\([^()]*\)$)", "\n", title)
    figure.suptitle(wrap(title, letters))
    if layout == "constrained":
        figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06)
    return figure


def settled(figure: Figure) -> Figure:
    """`figure` with its layout computed and fixed; otherwise it would change a little with every drawing."""
    places = None
    for _ in range(4):  # at most: figures of several square panels settle slowly
        before, places = places, [ax.get_position().bounds for ax in figure.axes]
        if before is not None and np.allclose(before, places, rtol=0, atol=1e-4):
            break
        figure.get_layout_engine().execute(figure)
    figure.set_layout_engine("none")
    return figure


def add_legend(figure: Figure, handles: list, title: str | None = None, ax=None) -> None:
    """A legend below the figure (or below `ax`), in as many columns as fit; the figure grows by its height."""
    width = figure.get_figwidth() / (2 if ax else 1)
    for handle in handles:
        handle.set_label(plain(handle.get_label(), int(min(48, 10 * width))))
    longest = max(len(line) for handle in handles for line in handle.get_label().splitlines())
    total = sum(len(handle.get_label()) + 9 for handle in handles)
    columns = len(handles) if total < 13 * width else int(np.clip(13 * width // (longest + 9), 1, len(handles)))
    lines = sum(handle.get_label().count("\n") + 1 for handle in handles) / columns + (2 if title else 1)
    style = {"handles": handles, "ncols": columns, "title": glued(title) if title else None, "handlelength": 3}
    if ax:
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.07), **style)
    else:
        figure.legend(loc="outside lower center", **style)
    figure.set_figheight(figure.get_figheight() + 0.16 * max(0, lines - 1))


def line_style(index: int) -> dict:
    """Colour, marker and line style of series `index`."""
    style = {"color": COLORS[index % 7], "marker": MARKERS[index % 11], "linestyle": LINES[index % 5]}
    return style | {"markersize": 4.5, "linewidth": 1.4}


def bar_style(index: int) -> dict:
    """Colour and hatch of bar `index`."""
    return {"facecolor": COLORS[index % 7], "hatch": HATCHES[index % 8], "edgecolor": "white"}


def share_percent(axes: list) -> None:
    """Give panels of accuracies the same scale, no wider than 0 … 100 % plus a margin."""
    limits = [ax.get_ylim() for ax in axes]
    for ax in axes:
        ax.set_ylim(max(-1, min(low for low, _ in limits)), min(101, max(high for _, high in limits)))


def write_numbers(ax, x, y, values: np.ndarray, mappable: ScalarMappable, text: Callable, size: float) -> None:
    """Write each finite value at its place, in black or white, whichever stands out from its colour."""
    style = {"fontproperties": FontProperties(size=size), "ha": "center", "va": "center_baseline"}
    colors = mappable.to_rgba(values.ravel())
    for place, height, value, color in zip(x.flat, y.flat, values.flat, colors, strict=True):
        if np.isfinite(value):
            number = ax.text(place, height, text(value), color=ink(color), **style)
            number.set_in_layout(False)  # it lies inside the axes, and measuring hundreds of them is slow


def ink(color: Sequence[float]) -> str:
    """Black or white, by the relative luminance of WCAG 2; its contrast with `color` is never below 4.5."""
    channels = np.asarray(color[:3])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return "black" if linear @ (0.2126, 0.7152, 0.0722) > 0.179 else "white"


def as_array(values) -> np.ndarray:
    """Tensor (any device, any type) or array-like -> a new float64 array."""
    if hasattr(values, "detach"):
        values = values.detach().double().cpu().numpy()
    return np.array(values, dtype=np.float64)


def wrap(text: str, width: int) -> str:
    """`text` in lines of at most `width` characters, broken at spaces or else anywhere; "95 % t interval" stays one."""
    lines = glued(text).splitlines()
    return "\n".join("\n".join(textwrap.wrap(line, max(4, width), break_on_hyphens=False)) for line in lines)


def glued(text: str) -> str:
    """`text` with spaces that no line is broken at in "95 % t interval" and the like."""
    return re.sub(r"\d %( \w+ interval)?", lambda found: found[0].replace(" ", "\N{NO-BREAK SPACE}"), str(text))


def plain(name: str, width: int = 1000) -> str:
    """A name from the data in plain words, wrapped."""
    return wrap(str(name).replace("_", " "), width)


def written(value: float, form: str) -> str:
    """A number with a true minus sign, and with no sign where nothing but zeros is left of it."""
    text = f"{value:{form}}"
    return text.replace("-", "−") if float(text) else text.lstrip("+-")


def short(value: float) -> str:
    """A number in four characters, or five with its sign, if possible: 0.12, −0.12, −1.2, 12.3."""
    for form in (".2f", ".1f", ".0f"):
        text = written(value, form)
        if len(text.removeprefix("−")) <= 4 - (value <= -1):
            break
    return text
