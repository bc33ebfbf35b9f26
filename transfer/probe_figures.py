"""Figures of layer probes: measures by layer, beside the accuracy of the frozen cut, and a t-SNE sheet."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.colors import hsv_to_rgb
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from engine import generator
from transfer.convnet import ConvClassifier
from transfer.images import Examples
from transfer.probes import FINETUNED, PIXELS, PRETRAINED, UNTRAINED, balanced_rows, layers_of
from transfer.statistics import FROZEN, SCRATCH, share
from visualization import (
    BANDS,
    COLORS,
    MARKERS,
    OTHER_COLORS,
    WIDTH,
    Figure,
    add_legend,
    drawing,
    line_style,
    mean_band,
    new_figure,
    plain,
    settled,
    wrap,
)

STYLES = {PRETRAINED: 0, UNTRAINED: 1, FINETUNED: 2, PIXELS: 3}  # network -> index of its colour and marker
WORDS = {PIXELS: "pixels", UNTRAINED: "untrained", PRETRAINED: "pretrained", FINETUNED: "after fine-tuning"}
CLUSTERED = {  # measures of the first figure -> title of their panel
    "ari_kmeans": "ARI, k-means",
    "ari_agglomerative": "ARI, agglomerative",
    "ari_original": "ARI, on averaged maps",
    "accuracy_matched": "matched accuracy of k-means (%)",
    "linear_probe": "accuracy of the linear probe (%)",
}
RANKS = {"rank_weights": "of the layer's matrix", "rank_features": "of its features' covariance"}
SHOWN = 40  # images of each class in a t-SNE sheet


class Curves(NamedTuple):
    """A panel: one line per network or amount of data. Panels whose titles begin alike ("ARI, …") have one scale."""

    title: str
    lines: Mapping[str, pd.DataFrame]  # label -> layers × repeats, in the units of the axis
    xlabel: str = "layer (0 = input)"


def all_figures(probes: pd.DataFrame, runs: pd.DataFrame | None = None) -> Iterator[tuple[str, Callable[[], Figure]]]:
    """Name and maker of the figures of every task: layers, ranks and cka; names end in the task's.

    Args:
        probes: see `probes.probe_layers`.
        runs: for the accuracy of the frozen cut: task, arm, cut, amount, repeat, value (fraction); of other arms than
            frozen and scratch nothing is drawn.
    """
    for task, own in probes.groupby("task", sort=False):
        name = re.sub(r"\W+", "_", str(task))
        cuts = None if runs is None else runs[runs["task"] == task]
        yield f"layers_{name}", partial(layers_figure, own, str(task), cuts)
        yield f"ranks_{name}", partial(ranks_figure, own, str(task))
        if (own["measure"] == "cka").any():
            yield f"cka_{name}", partial(cka_figure, own, str(task))


def layers_figure(probes: pd.DataFrame, on: str, runs: pd.DataFrame | None = None) -> Figure:
    """How well the layers tell the classes apart, and how accurate networks are that keep them frozen.

    Args:
        probes: rows of one task.
        on: what the title says that they are of.
        runs: see `all_figures`, of this task; without frozen ones that panel is left out.
    """
    panels = [_curves(probes, measure, title, (PRETRAINED, UNTRAINED)) for measure, title in CLUSTERED.items()]
    cuts = pd.DataFrame() if runs is None else runs[(runs["arm"] == FROZEN) | (runs["arm"] == SCRATCH)]
    if len(cuts) and (cuts["arm"] == FROZEN).any():
        lines = {
            share(amount): 100 * rows.pivot(index="cut", columns="repeat", values="value")
            for amount, rows in cuts.groupby("amount")
        }
        panels.append(Curves("accuracy with frozen layers (%)", lines, "frozen layers (0 = scratch)"))
    return curves_by_layer(panels, f"Layers that tell the fine-tuning classes apart ({_on(probes, on)})")


def ranks_figure(probes: pd.DataFrame, on: str) -> Figure:
    """Effective rank of each layer's matrix and of its features' covariance, before and after training."""
    networks = [network for network in (UNTRAINED, PRETRAINED, FINETUNED) if (probes["network"] == network).any()]
    panels = [_curves(probes, measure, title, networks) for measure, title in RANKS.items()]
    return curves_by_layer(panels, f"Effective rank by layer ({_on(probes, on)})")


def cka_figure(probes: pd.DataFrame, on: str) -> Figure:
    """Linear CKA of each layer with the same layer of the pretrained network."""
    panel = _curves(probes, "cka", "", [UNTRAINED, FINETUNED])
    title = f"Linear CKA with the same layer of the pretrained network ({_on(probes, on)})"
    return curves_by_layer([panel], title)


def _on(probes: pd.DataFrame, on: str) -> str:
    """What a figure shows, for the end of its title."""
    repeats, images = probes["repeat"].nunique(), probes["n"].max()
    return f"{on}, {repeats} repeat{'s' * (repeats > 1)}, {images} test images each"


def _curves(probes: pd.DataFrame, measure: str, title: str, networks: Sequence[str]) -> Curves:
    """A panel of a measure: a line per network, and the pixels if they have it."""
    own = probes[probes["measure"] == measure]
    scale = 100 if title.endswith("(%)") else 1
    tables = {
        network: scale * rows.pivot(index="layer", columns="repeat", values="value")
        for network in (*networks, PIXELS)
        if len(rows := own[own["network"] == network])
    }
    return Curves(title, tables)


@drawing
def curves_by_layer(panels: Sequence[Curves], title: str) -> Figure:
    """Panels of values by layer: means over repeats with a 95 % t interval as a band.

    The lines are networks (`WORDS`), of which the pixels, a point at layer 0, go on as a thin dotted line; or amounts
    of data. A repeat in which a value is missing is left out of its line.
    """
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    figure = new_figure(WIDTH if across > 1 else 5.0, 0.8 + 2.0 * down, title)
    grid, handles, band = figure.subplots(down, across, squeeze=False), {}, False
    for ax, panel in zip(grid.flat, panels, strict=False):
        for number, (label, table) in enumerate(panel.lines.items()):
            style = line_style(STYLES[label]) if label in STYLES else _amount_style(number)
            whole = table.dropna(axis=1)
            if whole.shape[1]:
                band = _draw_line(ax, whole, style, label == PIXELS) or band
            handles[label] = Line2D([], [], **style, label=WORDS.get(label, f"{label} of the images, frozen"))
        ax.set(title=wrap(panel.title, 33), xlabel=panel.xlabel)
        ax.xaxis.set_major_locator(MaxNLocator(7, integer=True))
        ax.yaxis.set_major_locator(MaxNLocator(5))
    for ax in grid.flat[len(panels) :]:
        ax.set_axis_off()
    _share_scales(panels, grid.flat[: len(panels)])
    add_legend(figure, list(handles.values()), f"mean over repeats; band: {BANDS['t95']}" if band else None)
    return settled(figure)


def _share_scales(panels: Sequence[Curves], axes: Sequence) -> None:
    """Give all panels the same layers, and those of one measure the same values."""
    for ax, panel in zip(axes, panels, strict=True):
        measure, comma, _ = panel.title.partition(", ")
        alike = [other for other, one in zip(axes, panels, strict=True) if one.title.startswith(measure + comma)]
        low, high = zip(*(other.get_ylim() for other in (alike if comma else [ax])), strict=True)
        ax.set_ylim(min(low), max(high))
        left, right = zip(*(other.get_xlim() for other in axes), strict=True)
        ax.set_xlim(min(left), max(right))


def _draw_line(ax, table: pd.DataFrame, style: Mapping, flat: bool) -> bool:
    """One line of a panel; whether it has a band."""
    mean, low, high = mean_band(table.to_numpy(float), "t95")
    known = bool(np.isfinite(low).all())
    ax.plot(table.index, mean, **(style | {"linestyle": ""} if flat else style), zorder=3)
    if flat:
        ax.axhline(mean[0], color=style["color"], linestyle=":", linewidth=1, zorder=1)
        if known:
            ax.axhspan(low[0], high[0], color=style["color"], alpha=0.15, linewidth=0, zorder=0)
    elif known:
        ax.fill_between(table.index, low, high, color=style["color"], alpha=0.2, linewidth=0)
    return known


def _amount_style(number: int) -> dict:
    """Style of an amount of data, in colours that no network has."""
    return line_style(number) | {"color": OTHER_COLORS[number % len(OTHER_COLORS)]}


class Projected(NamedTuple):
    """A row of a t-SNE sheet."""

    title: str
    layers: Sequence[np.ndarray]  # features [n, D] of the input and of each layer
    labels: np.ndarray  # int [n], index into `class_names`
    class_names: Sequence[str]


def sheet_row(
    title: str, network: ConvClassifier, examples: Examples, class_names: Sequence[str], repeat: int = 0
) -> Projected:
    """Test images of the classes of `examples`, as every layer of a network gives them; `SHOWN` of each class."""
    rows = balanced_rows(examples.test_labels.cpu(), SHOWN, generator(repeat, "probe", "sheet"))
    inputs, labels = examples.test_inputs.cpu()[rows], examples.test_labels.cpu()[rows]
    layers = [layer.features for layer in layers_of(network, inputs)]
    return Projected(title, layers, labels.numpy(), class_names)


@drawing
def tsne_sheet(rows: Sequence[Projected], title: str, seed: int = 0) -> Figure:
    """t-SNE (van der Maaten & Hinton, 2008) of the input and of each layer, a row per group of classes.

    Every class has a marker, and a colour that no other class has in any row.

    Args:
        rows: at most two, such as pretraining and fine-tuning classes; see `sheet_row`.
        seed: of t-SNE, which starts from PCA. The same input gives the same figure.
    """
    columns = [min(len(row.class_names), int(13 * WIDTH // (6 + max(map(len, row.class_names))))) for row in rows]
    heights = [1.6 + 0.17 * ((len(row.class_names) - 1) // across) for row, across in zip(rows, columns, strict=True)]
    figure = new_figure(WIDTH, 0.3 + sum(heights), title)
    parts = figure.subfigures(len(rows), 1, height_ratios=heights, squeeze=False).flat
    colours = class_colours([len(row.class_names) for row in rows])
    for part, row, own, across in zip(parts, rows, colours, columns, strict=True):
        part.suptitle(row.title, fontsize=8.5)
        for number, (ax, features) in enumerate(zip(part.subplots(1, len(row.layers)), row.layers, strict=True)):
            _draw_projection(ax, features, row.labels, own, seed)
            ax.set_title(f"layer {number}" if number else "input", fontsize=8)
        styles = [{"marker": MARKERS[i % len(MARKERS)], "color": colour} for i, colour in enumerate(own)]
        handles = [
            Line2D([], [], linestyle="", markersize=4.5, label=plain(name), **style)
            for name, style in zip(row.class_names, styles, strict=True)
        ]
        part.legend(handles=handles, loc="outside lower center", ncols=across, handletextpad=0.1, columnspacing=1.2)
    return settled(figure)


def _draw_projection(ax, features: np.ndarray, labels: np.ndarray, colours: Sequence, seed: int) -> None:
    """One panel of a sheet; what is the same for all images has no projection."""
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    ax.set(xticks=[], yticks=[], box_aspect=1)
    ax.spines[:].set(visible=True, linewidth=0.5, color="#999999")
    if not np.ptp(features, axis=0).any():  # equal points crash scikit-learn's t-SNE
        ax.text(0.5, 0.5, "all the\nsame", ha="center", va="center", transform=ax.transAxes)
        return
    perplexity = max(1.0, min(30.0, (len(features) - 1) / 3))
    with threadpool_limits(1):
        points = TSNE(init="pca", random_state=seed, perplexity=perplexity).fit_transform(features)
    for label, colour in enumerate(colours):
        own = points[labels == label]
        ax.scatter(*own.T, s=7, alpha=0.8, linewidths=0, color=[colour], marker=MARKERS[label % len(MARKERS)])


def class_colours(counts: Sequence[int]) -> list[list]:
    """A colour for each class of each group, no two the same; `counts` are the classes of at most two groups."""
    palettes = (COLORS, OTHER_COLORS)[: len(counts)]
    if all(count <= len(palette) for count, palette in zip(counts, palettes, strict=True)):
        return [list(palette[:count]) for count, palette in zip(counts, palettes, strict=True)]
    return [
        [tuple(hsv_to_rgb(((i + group / 2) / count, 0.9, 0.9 - 0.35 * group))) for i in range(count)]
        for group, count in enumerate(counts)
    ]
