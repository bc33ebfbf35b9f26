"""What every figure is made of: the house style, its colours, and the few things that several figures draw.

Colours are those of Okabe and Ito ("Color Universal Design", 2008); no series differs from another by colour alone.
Nothing here touches pyplot or the backend.
"""

import io
import textwrap
from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.collections import EllipseCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.image import AxesImage
from matplotlib.patheffects import withStroke
from PIL import Image
from scipy.special import stdtrit

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


class NotebookFigure(Figure):
    """A figure that notebooks show as PNG although pyplot does not know it."""

    @styled
    def _repr_png_(self) -> bytes:
        """PNG of 80 dpi and 256 colours: a sixth of the bytes, so that a notebook of all figures opens on the web."""
        full, small = io.BytesIO(), io.BytesIO()
        self.savefig(full, format="png", dpi=80)
        with Image.open(full) as image:
            image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(small, format="png", optimize=True)
        return small.getvalue()


def new_figure(width: float, height: float, title: str, layout: str = "constrained") -> NotebookFigure:
    """An empty figure, sizes in inches, its title broken into lines that fit."""
    figure = NotebookFigure(figsize=(width, height), layout=layout)
    figure.suptitle("\n".join(wrap(line, int(9.5 * width)) for line in title.splitlines()))
    if layout == "constrained":
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    return figure


def settled(figure: Figure) -> Figure:
    """`figure` with its layout worked out and fixed: left alone, it would still move from one drawing to the next."""
    for _ in range(4):
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
    """`text` in lines of at most `width` characters, broken at spaces, else after underscores, else anywhere."""
    there, back = str.maketrans("_-", "-\u2010"), str.maketrans("-\u2010", "_-")  # textwrap breaks after hyphens
    return "\n".join(textwrap.wrap(str(text).translate(there), max(4, width))).translate(back)


def as_array(values) -> np.ndarray:
    """Tensor (any device, any type) or array-like -> a float64 array of its own."""
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
    """Give panels of accuracies one scale, no wider than 0 … 100 % plus a margin."""
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
    """Write each finite value where it belongs, black or white, whichever stands out from its colour."""
    style = {"fontproperties": FontProperties(size=size), "ha": "center", "va": "center_baseline"}
    colors = mappable.to_rgba(values.ravel())
    for place, height, value, color in zip(x.flat, y.flat, values.flat, colors, strict=True):
        if np.isfinite(value):
            number = ax.text(place, height, text(value), color=ink(color), **style)
            number.set_in_layout(False)  # they lie inside the axes, and measuring hundreds is slow


def ink(color: Sequence[float]) -> str:
    """Black or white, by the relative luminance of WCAG 2; its contrast with `color` is never below 4.5."""
    channels = np.asarray(color[:3])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return "black" if linear @ (0.2126, 0.7152, 0.0722) > 0.179 else "white"


def short(value: float) -> str:
    """A number in four characters where that is possible: 0.12, -.12, -1.2, 12.3."""
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
