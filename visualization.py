"""Figures from results: plain arrays, tensors or tables in, a `Figure` out; only `save` writes.

A returned figure shows itself as the last expression of a notebook cell. Accuracies come in as fractions and are
drawn in per cent.
"""

import io
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from logging import getLogger
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.collections import EllipseCollection
from matplotlib.colors import BoundaryNorm, ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from PIL import Image
from scipy.special import stdtrit

from storage import atomic_write

log = getLogger(__name__)

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#666666")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", "*", ">", "p")  # 11 × 7 colours: 77 series before one repeats
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "++", "oo", "---")
SEQUENTIAL, DIVERGING = "magma_r", "RdBu_r"
MAX_NUMBERED = 20  # rows or columns above which a matrix is drawn without numbers
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same figure on every machine
    "font.size": 9,
    "text.color": "black",
    "text.usetex": False,
    "figure.facecolor": "white",
    "figure.titlesize": 12,
    "figure.titleweight": "normal",
    "savefig.facecolor": "auto",
    "axes.facecolor": "white",
    "axes.edgecolor": "black",
    "axes.labelcolor": "black",
    "axes.titlecolor": "auto",
    "axes.titlesize": 10,
    "axes.grid": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": "black",
    "ytick.color": "black",
    "legend.frameon": False,
    "hatch.linewidth": 0.8,
}
styled = matplotlib.rc_context(STYLE)  # as a decorator: entered at each call, whatever style the user has set
ERROR_BARS = {"fmt": "none", "ecolor": "black", "elinewidth": 1.2, "capsize": 3}
OUTLINE = [withStroke(linewidth=3.5, foreground="white")]
DPI = 120
PANELS = {"loss": "training loss", "train_accuracy": "training accuracy", "validation_accuracy": "validation accuracy"}
BANDS = {"t95": "95 % t interval of the mean", "std": "± one standard deviation", "range": "lowest to highest"}


@styled
def save(figure: Figure, path: str | Path) -> None:
    """Write `figure` to `path` as PNG at 120 dpi: whole or not at all, and the same figure as the same bytes.

    The figure need not be closed: pyplot does not know it. It can still be shown after saving.
    """
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI, metadata={"Software": None})


def save_each(figures: Iterable[tuple[str, Callable[[], Figure]]], folder: str | Path) -> list[Path]:
    """Draw figures into a folder as PNG; the paths written.

    A figure that cannot be drawn is named in a warning, and the others are drawn all the same.

    Args:
        figures: name of the file and function that draws it, of each figure.
        folder: where; made if missing.
    """
    paths = []
    for name, make in figures:
        path = Path(folder) / f"{name}.png"
        try:
            save(make(), path)
        except Exception as error:  # never lose the remaining figures to one failure
            why = " ".join(str(error).split()) or type(error).__name__
            path.unlink(missing_ok=True)  # or one of an earlier run would be taken for this one's
            log.warning("The figure '%s' cannot be drawn (%s); the others are.", name, why)
        else:
            paths.append(path)
    return paths


@styled
def weight_grids(layers: Sequence, title: str, kind: str = "weights", limits: tuple | None = None) -> Figure:
    """Tracked matrices side by side, a numbered circle per weight.

    Args:
        layers: matrices `[out, in]`, first layer first; column = unit the weight comes from, row = unit it goes to.
            Weights that are not finite leave a gap; matrices of more than 20 units go without numbers.
        title: of the figure, like in all functions here.
        kind: "weights" (colours symmetric around 0), "importance" (0 … 1) or "mask" (1 = important).
        limits: `(low, high)` ends of the colour scale instead, e.g. for importance summed over domains.
    """
    arrays = [as_array(layer) for layer in layers]
    norm, cmap = _weight_colours(arrays, kind, limits)
    biggest = max(max(array.shape) for array in arrays)
    cell = 0.4 if biggest <= MAX_NUMBERED else 8 / biggest  # inches, like all lengths here
    text = None if biggest > MAX_NUMBERED else "{:.0f}".format if kind == "mask" else short
    left, gap, right, bottom = 0.65, 0.75, 0.85, 0.6
    widths = [max(array.shape[1] * cell, 0.95) + gap for array in arrays]  # of a grid or its title, and the gap
    tall = max(2.0, *(len(array) * cell for array in arrays))
    width = max(5.0, left + sum(widths) + right)
    figure = new_figure(width, 1.0, title, layout="none")
    height = bottom + tall + 0.65 + 0.2 * len(figure.get_suptitle().splitlines())
    figure.set_figheight(height)
    figure.suptitle(figure.get_suptitle(), y=1 - 0.1 / height)
    x = left
    for index, array in enumerate(arrays, start=1):
        rows, columns = array.shape
        position = (x / width, (bottom + tall - rows * cell) / height, columns * cell / width, rows * cell / height)
        circles = draw_circles(figure.add_axes(position), array, norm, cmap, text)
        circles.axes.set_title(f"hidden {index} → hidden {index + 1}")
        x += widths[index - 1]
    cax = figure.add_axes(((x - gap + 0.3) / width, bottom / height, 0.2 / width, tall / height))
    if kind == "mask":
        bar = figure.colorbar(circles, cax=cax, ticks=[0, 1])
        bar.ax.set_yticklabels(["0\nnot\nimportant", "1\nimportant"])
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


@styled
def training_curves(
    histories: Mapping[str, Mapping], title: str, freeze_epoch: int | None = None, bands: str = "t95"
) -> Figure:
    """Loss and accuracies by epoch: mean over seeds with a band, one line per entry of `histories`.

    Args:
        histories: label -> any of "loss", "train_accuracy", "validation_accuracy", each `[E, S]` (fractions). A seed
            with any value that is not finite is a failed network: it is left out, and the legend says so.
        freeze_epoch: number of epochs after which a learning rate is 0, drawn as a line after that epoch.
        bands: "t95" (95 % t interval of the mean), "std" or "range", over seeds; there is none for a single seed.
    """
    keys = [key for key in PANELS if any(key in history for history in histories.values())]
    if not keys or bands not in BANDS:
        raise ValueError(f"Nothing to draw: histories need one of {tuple(PANELS)}, and bands one of {tuple(BANDS)}.")
    figure = new_figure(4.2 * len(keys) if len(keys) > 1 else 6.0, 3.8, title)
    axes = dict(zip(keys, figure.subplots(1, len(keys), squeeze=False)[0], strict=True))
    handles, epochs, several = [], 1, False
    for index, (label, history) in enumerate(histories.items()):
        arrays, note = _finite_networks({key: history[key] for key in keys if key in history})
        for key, array in arrays.items():
            epochs, several = max(epochs, len(array)), several or array.shape[1] > 1
            if array.size:
                band = mean_band(array if key == "loss" else 100 * array, bands)
                draw_curve(axes[key], np.arange(1, len(array) + 1), *band, index)
        handles.append(Line2D([], [], **line_style(index), label=label + note))
    if freeze_epoch is not None and freeze_epoch < epochs:
        style = {"color": "black", "linestyle": (0, (4, 3)), "linewidth": 1}
        for ax in axes.values():
            ax.axvline(freeze_epoch + 0.5, **style)
        handles.append(Line2D([], [], **style, label=f"unimportant weights frozen after epoch {freeze_epoch}"))
    for key, ax in axes.items():
        ax.set(title=PANELS[key], xlabel="epoch", xlim=(0.5, epochs + 0.5))
        ax.set_ylabel("loss" if key == "loss" else "accuracy (%)")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    share_percent([ax for key, ax in axes.items() if key != "loss"])
    add_legend(figure, handles, f"mean over seeds; band: {BANDS[bands]}" if several else "one seed")
    return settled(figure)


def _finite_networks(history: Mapping) -> tuple[dict[str, np.ndarray], str]:
    """Arrays `[E, S]` without the seeds that have a value that is not finite, and a note on how many are left."""
    arrays = {key: as_array(values) for key, values in history.items()}
    finite = np.logical_and.reduce([np.isfinite(array).all(axis=0) for array in arrays.values()])
    note = "" if finite.all() else f" ({finite.sum()} of {finite.size} seeds)"
    return {key: array[:, finite] for key, array in arrays.items()}, note


@styled
def accuracy_bars(table, title: str, chance: float | None = None, majority: Mapping | None = None) -> Figure:
    """Held-out accuracy as bars with intervals, grouped by holdout.

    Args:
        table: columns algorithm, holdout, mean, low, high (fractions); the holdout "average" becomes the last group.
        chance: accuracy of guessing, drawn as a dashed line.
        majority: holdout -> share of its largest class, drawn as a short line across its group.
    """
    algorithms = list(dict.fromkeys(table["algorithm"]))
    holdouts = sorted(dict.fromkeys(table["holdout"]), key=lambda name: name == "average")
    step, few = len(algorithms) + 1, len(algorithms) <= 4
    bar = max(0.52 if few else 0.26, 5.0 / (step * len(holdouts)))  # inches of a bar; it is 1 wide in data units
    figure = new_figure(bar * step * len(holdouts) + 1.2, 4.4, title)
    ax = figure.subplots()
    for index, algorithm in enumerate(algorithms):
        rows = table[table["algorithm"] == algorithm]
        x = [holdouts.index(name) * step + index for name in rows["holdout"]]
        mean, low, high = (100 * rows[key].to_numpy(float) for key in ("mean", "low", "high"))
        ax.bar(x, mean, width=1, **bar_style(index))
        errors = np.clip(np.nan_to_num([mean - low, high - mean]), 0, None)
        known = np.isfinite(low + high)
        ax.errorbar(np.array(x)[known], mean[known], yerr=errors[:, known], **ERROR_BARS)
        for place, value, top in zip(x, mean, mean + errors[1], strict=True):
            if np.isfinite(value):
                write_bar_value(ax, place, top, value, rotation=0 if few else 90)
    handles = [Patch(**bar_style(index), label=name) for index, name in enumerate(algorithms)]
    handles += _bar_references(ax, holdouts, step, chance, majority or {})
    names = [wrap(name, int(bar * step * 11)) for name in holdouts]
    ax.set_xticks([group * step + (step - 2) / 2 for group in range(len(holdouts))], names)
    ax.set(xlim=(-1, step * len(holdouts) - 1), ylim=(0, ax.dataLim.y1 * 1.13 or 1), ylabel="accuracy (%)")
    ax.set_yticks(
        [tick for tick in MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(0, ax.dataLim.y1) if 0 <= tick <= 100]
    )
    ax.set_xlabel("held-out domain")
    ax.tick_params(axis="x", length=0)
    add_legend(figure, handles)
    return settled(figure)


def _bar_references(ax, holdouts: list[str], step: int, chance: float | None, majority: Mapping) -> list[Line2D]:
    """Draw the reference lines that bars are compared with; returns the entries for the legend."""
    handles = []
    if chance is not None:
        style = {"color": "black", "linestyle": "--", "linewidth": 1.2}
        ax.axhline(100 * chance, path_effects=OUTLINE, zorder=4, **style)
        handles.append(Line2D([], [], **style, label=f"chance ({100 * chance:.1f} %)"))
    known = [(index * step, 100 * majority[name]) for index, name in enumerate(holdouts) if name in majority]
    if known:
        start, height = np.array(known).T
        style = {"color": "black", "linewidth": 2.2}
        ax.hlines(height, start - 0.65, start + step - 1.35, path_effects=OUTLINE, zorder=4, **style)
        handles.append(Line2D([], [], **style, label="share of the largest class"))
    return handles


@styled
def confusion_matrices(matrices: Mapping, class_names: Sequence[str], title: str) -> Figure:
    """Per cent of each true class (row) that was classified as each class (column), a panel per holdout.

    Args:
        matrices: holdout -> counts `[C, C]`, rows are true classes. The row of a class without images is left blank.
        class_names: C names. With more than 20 classes no numbers are written.
    """
    classes, count = len(class_names), len(matrices)
    columns = count if count <= 3 else int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    cell = 0.4 if classes <= MAX_NUMBERED else 0.15
    side = max(2.0, classes * cell) + 1.3
    figure = new_figure(max(4.5, columns * side + 0.9), rows * (side + 0.3) + 0.4, title)
    grid = figure.subplots(rows, columns, squeeze=False)
    for ax, (holdout, matrix) in zip(grid.flat, matrices.items(), strict=False):
        counts = as_array(matrix)
        totals = counts.sum(axis=1, keepdims=True)
        percent = np.divide(100 * counts, totals, where=totals > 0, out=np.full_like(counts, np.nan))
        image = draw_matrix(ax, percent, class_names, Normalize(0, 100), "{:.0f}".format)
        ax.set(title=f"held out: {wrap(holdout, 28)}", xlabel="predicted class", ylabel="true class")
    for ax in grid.flat[count:]:
        ax.set_axis_off()
    figure.colorbar(image, ax=grid, label="% of the true class", fraction=0.05, pad=0.02, aspect=30)
    return settled(figure)


@styled
def difference_plot(table, title: str, xlabel: str = "difference in accuracy (percentage points)") -> Figure:
    """Forest plot: a row per difference, its interval as a line and as numbers on the right, and a line at 0.

    Args:
        table: columns label, mean, low, high (fractions, drawn times 100) and optionally group (colour and marker).
    """
    groups = list(table["group"]) if "group" in table else [None] * len(table)
    kinds = list(dict.fromkeys(groups))
    figure = new_figure(7.5, 1.5 + 0.34 * len(table), title)
    ax = figure.subplots()
    ax.axvline(0, color="black", linewidth=1)
    columns = (100 * table[key].to_numpy(float) for key in ("mean", "low", "high"))
    for row, (mean, low, high, group) in enumerate(zip(*columns, groups, strict=True)):
        style = line_style(kinds.index(group))
        ax.plot([low, high], [row, row], color=style["color"], linewidth=2)
        ax.plot([mean], [row], **(style | {"markersize": 7}))
        known = "–" if np.isnan(mean) else f"{mean:+.2f}"
        interval = f"{known} [{low:+.2f}, {high:+.2f}]" if np.isfinite(low + high) else known
        ax.text(1.02, row, interval, transform=ax.get_yaxis_transform(), va="center")
    ax.text(1.02, 1.0, "mean [low, high]", transform=ax.transAxes, va="bottom")
    ax.set_yticks(range(len(table)), [wrap(label, 40) for label in table["label"]])
    ax.set(ylim=(len(table) - 0.5, -0.5), xlabel=xlabel)
    ax.margins(x=0.08)
    ax.grid(axis="x", color="#DDDDDD", linewidth=0.6)
    ax.set_axisbelow(True)
    if "group" in table:
        add_legend(figure, [Line2D([], [], **line_style(i), label=str(kind)) for i, kind in enumerate(kinds)])
    return settled(figure)


@styled
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
    """One 2-D projection of the features, drawn twice: coloured by domain and by class.

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
    points, axis_names = _project(as_array(features)[chosen].astype(np.float32), method, seed)
    figure = new_figure(10.0, 5.0, title)
    left, right = figure.subplots(1, 2)
    for ax, kind, index, names in ((left, "domain", domains, domain_names), (right, "class", labels, class_names)):
        handles = []
        for value, name in enumerate(names):
            style = line_style(value) | {"linestyle": ""}
            part = points[index[chosen] == value]
            ax.scatter(*part.T, s=14, alpha=0.75, linewidths=0, color=style["color"], marker=style["marker"])
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


@styled
def sample_sheet(images: Mapping[str, Mapping], title: str) -> Figure:
    """One image per domain (row) and class (column).

    Args:
        images: domain -> class -> `PIL.Image` or array `[H, W, 3]`. A class that a domain lacks leaves a cell empty.
    """
    classes = list(dict.fromkeys(name for row in images.values() for name in row))
    cell = min(1.3, 24 / len(classes))
    figure = new_figure(max(4.0, cell * len(classes) + 1.6), (cell + 0.08) * len(images) + 1.0, title)
    grid = figure.subplots(len(images), len(classes), squeeze=False)
    for axes, (domain, row) in zip(grid, images.items(), strict=True):
        axes[0].set_ylabel(wrap(domain, 18), rotation=0, ha="right", va="center", labelpad=6)
        for ax, name in zip(axes, classes, strict=True):
            ax.set(xticks=[], yticks=[], box_aspect=1)
            ax.spines[:].set_visible(False)
            if name in row:
                image = row[name].convert("RGB") if hasattr(row[name], "convert") else row[name]
                ax.imshow(np.asarray(image), cmap="gray", interpolation="antialiased")
                ax.set_aspect("equal", adjustable="datalim")
    for ax, name in zip(grid[0], classes, strict=True):
        ax.set_title(wrap(name, int(cell * 11)), fontsize=9)
    return settled(figure)


@styled
def overlap_matrix(values, names: Sequence[str], title: str, chance: float | None = None) -> Figure:
    """Intersection over union of every pair of masks.

    Args:
        values: `[M, M]` in 0 … 1.
        names: M names, of the masks or of their domains.
        chance: expected value for unrelated masks, marked on the colour bar and named in the title.
    """
    named = "" if chance is None else f"\n(chance {chance:.2f})"
    side = max(2.4, len(names) * (0.5 if len(names) <= MAX_NUMBERED else 0.15)) + 1.4
    figure = new_figure(side + 1.2, side + 0.6, title + named)
    ax = figure.subplots()
    image = draw_matrix(ax, as_array(values), names, Normalize(0, 1), "{:.2f}".format)
    bar = figure.colorbar(image, ax=ax, label="intersection over union", fraction=0.05, pad=0.03)
    if chance is not None:
        bar.ax.axhline(chance, color="black", linewidth=2, path_effects=OUTLINE)
        bar.set_ticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    return settled(figure)


@styled
def accuracy_curves_by_setting(
    table, x: str, title: str, xlabel: str, baselines: Mapping | None = None, default=None
) -> Figure:
    """Accuracy against a setting, a line with a band per algorithm.

    Args:
        table: columns algorithm, mean, low, high (fractions) and `x`, numbers or names.
        x: the column of the setting.
        baselines: label -> `(mean, low, high)` of what does not depend on the setting: a horizontal line with a band.
        default: default value of the setting, drawn as a dotted vertical line.
    """
    figure = new_figure(6.4, 4.2, title)
    ax, handles = figure.subplots(), []
    numeric = table[x].dtype.kind in "iuf"
    places = {value: value if numeric else i for i, value in enumerate(dict.fromkeys(table[x]))}
    for index, algorithm in enumerate(dict.fromkeys(table["algorithm"])):
        rows = table[table["algorithm"] == algorithm]
        rows = rows.sort_values(x) if numeric else rows
        columns = (100 * rows[key].to_numpy(float) for key in ("mean", "low", "high"))
        draw_curve(ax, [places[value] for value in rows[x]], *columns, index)
        handles.append(Line2D([], [], **line_style(index), label=algorithm))
    for index, (label, (mean, low, high)) in enumerate((baselines or {}).items(), start=len(handles)):
        style = line_style(index) | {"marker": ""}
        if np.isfinite(low + high):
            ax.axhspan(100 * low, 100 * high, color=style["color"], alpha=0.15, linewidth=0)
        ax.axhline(100 * mean, **style)
        handles.append(Line2D([], [], **style, label=label))
    if default is not None:
        style = {"color": "black", "linestyle": ":", "linewidth": 1.2}
        ax.axvline(places.get(default, default), **style)
        handles.append(Line2D([], [], **style, label=f"default ({default})"))
    if not numeric:
        ax.set_xticks(range(len(places)), [wrap(name, 14) for name in places])
    ax.set(xlabel=xlabel, ylabel="accuracy (%)")
    share_percent([ax])
    add_legend(figure, handles)
    return settled(figure)


# The house style: what every figure is made of


class NotebookFigure(Figure):
    """A figure that notebooks show as PNG, although pyplot does not know it."""

    @styled
    def _repr_png_(self) -> bytes:
        """PNG of 80 dpi and 256 colours: a sixth of the bytes, so that a notebook with all figures opens on the web."""
        full, small = io.BytesIO(), io.BytesIO()
        self.savefig(full, format="png", dpi=80)
        with Image.open(full) as image:
            image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(small, format="png", optimize=True)
        return small.getvalue()


def new_figure(width: float, height: float, title: str, layout: str = "constrained") -> NotebookFigure:
    """An empty figure, sizes in inches, with its title broken into lines that fit."""
    figure = NotebookFigure(figsize=(width, height), layout=layout)
    figure.suptitle("\n".join(wrap(line, int(9.5 * width)) for line in title.splitlines()))
    if layout == "constrained":
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
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
    for handle in handles:
        handle.set_label(wrap(handle.get_label(), 40))
    longest = max(len(line) for handle in handles for line in handle.get_label().splitlines())
    width = figure.get_figwidth() / (2 if ax else 1)
    columns = int(np.clip(width * 12 // (longest + 9), 1, len(handles)))
    lines = sum(handle.get_label().count("\n") + 1 for handle in handles) / columns + (2 if title else 1)
    style = {"handles": handles, "ncols": columns, "title": title, "handlelength": 3}
    if ax:
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.07), **style)
    else:
        figure.legend(loc="outside lower center", **style)
    figure.set_figheight(figure.get_figheight() + 0.17 * max(0, lines - 2))


def line_style(index: int) -> dict:
    """Colour, marker and line style of series `index`."""
    style = {"color": COLORS[index % 7], "marker": MARKERS[index % 11], "linestyle": LINES[index % 5]}
    return style | {"markersize": 5, "linewidth": 1.6}


def bar_style(index: int) -> dict:
    """Colour and hatch of bar `index`."""
    return {"facecolor": COLORS[index % 7], "hatch": HATCHES[index % 8], "edgecolor": "white"}


def wrap(text: str, width: int) -> str:
    """`text` in lines of at most `width` characters, broken at spaces or else after underscores or else anywhere."""
    there, back = str.maketrans("_-", "-\u2010"), str.maketrans("-\u2010", "_-")  # textwrap breaks after hyphens
    return "\n".join(textwrap.wrap(str(text).translate(there), max(4, width))).translate(back)


def as_array(values) -> np.ndarray:
    """Tensor (any device, any type) or array-like -> a new float64 array."""
    if hasattr(values, "detach"):
        values = values.detach().double().cpu().numpy()
    return np.array(values, dtype=np.float64)


def mean_band(values: np.ndarray, bands: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`[E, S]` -> mean, low, high over seeds, each `[E]`; low and high are NaN for S = 1.

    `bands`: "t95" (95 % t interval of the mean), "std" (one standard deviation) or "range".
    """
    mean, seeds = values.mean(axis=1), values.shape[1]
    if seeds == 1:
        return mean, np.full_like(mean, np.nan), np.full_like(mean, np.nan)
    if bands == "range":
        return mean, values.min(axis=1), values.max(axis=1)
    half = values.std(axis=1, ddof=1)
    if bands == "t95":
        half = half * stdtrit(seeds - 1, 0.975) / np.sqrt(seeds)
    return mean, mean - half, mean + half


def draw_curve(ax, x, mean, low, high, index: int) -> None:
    """A line with markers and, where it is finite, its band."""
    if np.isfinite(low).any():
        ax.fill_between(x, low, high, color=COLORS[index % 7], alpha=0.2, linewidth=0)
    ax.plot(x, mean, **line_style(index), markevery=max(1, len(mean) // 10))


def share_percent(axes: list) -> None:
    """Give panels of accuracies the same scale, no wider than 0 … 100 % plus a margin."""
    limits = [ax.get_ylim() for ax in axes]
    for ax in axes:
        ax.set_ylim(max(-2, min(low for low, _ in limits)), min(102, max(high for _, high in limits)))


def draw_matrix(ax, values: np.ndarray, names: Sequence[str], norm: Normalize, text: Callable) -> AxesImage:
    """A square matrix as colours, with names along both sides and (up to `MAX_NUMBERED`) its numbers."""
    names = [wrap(name, 18) if len(names) <= MAX_NUMBERED else textwrap.shorten(str(name), 24) for name in names]
    image = ax.imshow(values, cmap=SEQUENTIAL, norm=norm)
    ticks, small = np.arange(len(names)), len(names) > MAX_NUMBERED
    ax.set_xticks(ticks, names, rotation=90, fontsize=6 if small else 8)
    ax.set_yticks(ticks, names, fontsize=6 if small else 8)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    if not small:
        write_numbers(ax, *np.meshgrid(ticks, ticks), values, image, text, size=8.5)
    return image


def draw_circles(ax, array: np.ndarray, norm: Normalize, cmap, text: Callable | None) -> EllipseCollection:
    """One collection of circles, diameter 0.94 cells, unit 1 → unit 1 at the top left; `text` writes the numbers."""
    rows, columns = array.shape
    x, y = np.meshgrid(np.arange(1, columns + 1), np.arange(1, rows + 1))
    size = np.full(array.size, 0.94)
    offsets = np.column_stack([x.ravel(), y.ravel()])
    circles = EllipseCollection(size, size, np.zeros(array.size), units="xy", offsets=offsets)
    circles.set(offset_transform=ax.transData, array=array.ravel(), norm=norm, cmap=cmap)
    circles.set(edgecolor="#555555", linewidth=0.4)
    ax.add_collection(circles, autolim=False)
    ax.set(xlim=(0.5, columns + 0.5), ylim=(rows + 0.5, 0.5), xlabel="from unit", ylabel="to unit")
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    if text:
        ax.set(xticks=x[0], yticks=y[:, 0])
        write_numbers(ax, x, y, array, circles, text, size=10)
    return circles


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


def short(value: float) -> str:
    """A number in four characters if possible: 0.12, -.12, -1.2, 12.3."""
    for digits in (2, 1, 0):
        text = f"{value:.{digits}f}".replace("-0.", "-.")
        text = text if float(text) else f"{0:.{digits}f}"  # never "-.00"
        if len(text) <= 4:
            break
    return text


def write_bar_value(ax, x: float, top: float, value: float, rotation: int) -> None:
    """The accuracy above its bar and error bar, on white so that no line runs through it."""
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
    style = {"ha": "center", "va": "bottom", "fontsize": 8, "rotation": rotation, "bbox": box, "zorder": 6}
    ax.annotate(f"{value:.1f}", (x, top), xytext=(0, 3), textcoords="offset points", **style)
