"""Figures of layer probes are checked by what they draw, and that nothing is hidden or cut off."""

from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.text import Text
from scipy import stats

import visualization as v
from transfer.convnet import ConvClassifier
from transfer.images import Examples
from transfer.probe_figures import (
    Projected,
    all_figures,
    cka_figure,
    class_colours,
    layers_figure,
    ranks_figure,
    sheet_row,
    tsne_sheet,
)

LAYERED = ["ari_kmeans", "ari_agglomerative", "accuracy_matched", "linear_probe", "rank_features"]
MAPPED = ["ari_original", "rank_weights"]


def probes(repeats=4, task="toy", depth=3):
    """A table as `probe_layers` returns it, with random values."""
    draw, rows = np.random.default_rng(0), []
    for repeat in range(repeats):
        rows += [(task, "pixels", repeat, 0, measure) for measure in LAYERED]
        for network in ("untrained", "pretrained", "finetuned"):
            measures = [*LAYERED, *MAPPED] + ["cka"] * (network != "pretrained")
            rows += [(task, network, repeat, layer, m) for layer in range(1, depth + 1) for m in measures]
    table = pd.DataFrame(rows, columns=["task", "network", "repeat", "layer", "measure"])
    return table.assign(value=draw.uniform(0.2, 0.9, len(table)), n=24)


def runs(repeats=4, task="toy", depth=3):
    rows = [
        (task, "frozen" if cut else "scratch", cut, amount, repeat)
        for cut in range(depth + 1) for amount in (0.01, 0.1, 1.0) for repeat in range(repeats)
    ]  # fmt: skip
    table = pd.DataFrame(rows, columns=["task", "arm", "cut", "amount", "repeat"])
    return table.assign(value=np.random.default_rng(1).uniform(0.3, 0.8, len(table)))


def projected(title, classes, layers=4, seed=0):
    draw = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(classes)), 4)
    values = [(draw.normal(size=(len(labels), 6)) + labels[:, None]).astype(np.float32) for _ in range(layers)]
    return Projected(title, values, labels, classes)


SHEETS = {
    "sheet": [projected("pretraining", list("01234")), projected("fine-tuning", list("56789"), seed=1)],
    "long sheet": [
        projected("pretraining", [f"class number {i}" for i in range(10)], layers=7),
        projected("fine-tuning", [f"other {i}" for i in range(10)], layers=7),
    ],
}
FIGURES = {
    "layers": lambda: layers_figure(probes(), "toy"),
    "layers and cuts": lambda: layers_figure(probes(), "toy", runs()),
    "one repeat": lambda: layers_figure(probes(1), "toy"),
    "ranks": lambda: ranks_figure(probes(), "toy"),
    "cka": lambda: cka_figure(probes(), "toy"),
    "sheet": lambda: tsne_sheet(SHEETS["sheet"], "t-SNE"),
    "long sheet": lambda: tsne_sheet(SHEETS["long sheet"], "t-SNE"),
}


@cache
def drawn(name):
    return FIGURES[name]()


def drawn_texts(figure, monkeypatch):
    """Every text that reaches the canvas, with its extents in pixels."""
    seen, draw = {}, Text.draw

    def record(self, renderer):
        draw(self, renderer)
        if self.get_text().strip() and self.get_visible():
            seen[id(self)] = self.get_text(), np.array(self.get_window_extent(renderer).extents)

    FigureCanvasAgg(figure)
    with monkeypatch.context() as patch:
        patch.setattr(Text, "draw", record)
        figure.canvas.draw()
    return list(seen.values())


@pytest.mark.parametrize("name", FIGURES)
def test_every_text_is_inside_and_none_lies_on_another(name, monkeypatch):
    figure = drawn(name)
    texts = drawn_texts(figure, monkeypatch)
    boxes, (width, height) = np.array([box for _, box in texts]), figure.canvas.get_width_height()
    outside = (boxes < -0.5) | (boxes > np.array([width, height] * 2) + 0.5)
    assert not outside.any(), f"'{texts[np.argmax(outside.any(axis=1))][0]}' is cut off"
    low = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    pairs = np.argwhere(np.triu(np.all(high - low > 2, axis=2), k=1))
    assert not len(pairs), f"'{texts[pairs[0][0]][0]}' lies on '{texts[pairs[0][1]][0]}'"
    assert figure.get_figwidth() < v.WIDTH + 1e-6


def panel(figure, title):
    (found,) = [ax for ax in figure.axes if ax.get_title() == title]
    return found


def test_lines_are_means_over_repeats_with_their_t_interval():
    table = probes()
    own = table[(table["measure"] == "linear_probe") & (table["network"] == "pretrained")]
    wide = 100 * own.pivot(index="layer", columns="repeat", values="value")
    ax = panel(drawn("layers"), "accuracy of the linear probe (%)")
    np.testing.assert_allclose(ax.lines[0].get_xydata(), np.column_stack([[1, 2, 3], wide.mean(axis=1)]))
    half = stats.t.ppf(0.975, 3) * wide.std(axis=1) / 2
    edges = ax.collections[0].get_paths()[0].vertices
    for layer in (1, 2, 3):
        ends = edges[edges[:, 0] == layer, 1]
        np.testing.assert_allclose([ends.min(), ends.max()], wide.mean(axis=1)[layer] + half[layer] * np.array([-1, 1]))


def test_pixels_are_a_point_at_the_input_and_a_line_through_all_layers():
    table = probes()
    mean = table[(table["network"] == "pixels") & (table["measure"] == "ari_kmeans")]["value"].mean()
    figure = drawn("layers")
    point, line = panel(figure, "ARI, k-means").lines[-2:]
    np.testing.assert_allclose(point.get_xydata(), [[0, mean]])
    assert point.get_linestyle() == "None"
    np.testing.assert_allclose(line.get_ydata(), [mean, mean])
    assert len(panel(figure, "ARI, on averaged maps").lines) == 2  # pixels have no maps


def test_panels_of_one_measure_have_one_scale_and_all_the_same_layers():
    figure = drawn("layers and cuts")
    assert len({ax.get_xlim() for ax in figure.axes}) == 1
    own = [ax for ax in figure.axes if ax.get_title().startswith("ARI, ")]
    assert len(own) == 3
    assert len({ax.get_ylim() for ax in own}) == 1


def test_the_accuracy_of_the_frozen_cut_is_drawn_where_it_is_given():
    table, title = runs(), "accuracy with frozen layers (%)"
    ax = panel(drawn("layers and cuts"), title)
    assert len(ax.lines) == 3
    tenth = 100 * table[table["amount"] == 0.1].groupby("cut")["value"].mean()
    np.testing.assert_allclose(ax.lines[1].get_xydata(), np.column_stack([tenth.index, tenth]))
    networks = {to_hex(line.get_color()) for ax in drawn("layers").axes for line in ax.lines}
    assert not networks & {to_hex(line.get_color()) for line in ax.lines}
    assert title not in [ax.get_title() for ax in drawn("layers").axes]


def test_other_arms_are_not_drawn():
    table = runs()
    more = pd.concat([table, table.assign(arm="warm", value=0.0)])
    figure = layers_figure(probes(), "toy", more)
    for line, same in zip(figure.axes[-1].lines, drawn("layers and cuts").axes[-1].lines, strict=True):
        np.testing.assert_array_equal(line.get_xydata(), same.get_xydata())


def test_one_repeat_has_no_band_and_a_value_that_is_missing_leaves_its_repeat_out():
    assert not any(len(ax.collections) for ax in drawn("one repeat").axes)
    table = probes()
    lost = (table["repeat"] == 1) & (table["layer"] == 2) & (table["measure"] == "cka")
    ax = cka_figure(table.assign(value=table["value"].mask(lost)), "toy").axes[0]
    rest = table[(table["repeat"] != 1) & (table["measure"] == "cka") & (table["network"] == "finetuned")]
    np.testing.assert_allclose(ax.lines[1].get_ydata(), rest.groupby("layer")["value"].mean())


def test_which_figures_there_are():
    table = pd.concat([probes(), probes(task="a/b")])
    whole = dict(all_figures(table, runs()))
    assert list(whole) == ["layers_toy", "ranks_toy", "cka_toy", "layers_a_b", "ranks_a_b", "cka_a_b"]
    assert "a/b" in whole["layers_a_b"]().get_suptitle()
    assert list(dict(all_figures(table[table["network"] == "pretrained"]))) == [
        "layers_toy", "ranks_toy", "layers_a_b", "ranks_a_b",
    ]  # fmt: skip


def test_ranks_before_and_after_training():
    assert len(panel(drawn("ranks"), "of the layer's matrix").lines) == 3
    before = probes()
    before = before[before["network"] != "finetuned"]
    assert len(panel(ranks_figure(before, "toy"), "of the layer's matrix").lines) == 2


@pytest.mark.parametrize("name", SHEETS)
def test_a_sheet_shows_every_image_in_the_colour_and_marker_of_its_class(name):
    rows = SHEETS[name]
    figure = drawn(name)
    own = [(row, features) for row in rows for features in row.layers]
    assert len(figure.axes) == len(own)
    for ax, (row, _) in zip(figure.axes, own, strict=True):
        assert [len(points.get_offsets()) for points in ax.collections] == np.bincount(row.labels).tolist()
    colours = [[tuple(points.get_facecolor()[0][:3]) for points in ax.collections] for ax in figure.axes]
    layers = len(rows[0].layers)
    assert colours[:layers] == [colours[0]] * layers
    assert colours[layers:] == [colours[-1]] * layers
    assert len({*colours[0], *colours[-1]}) == sum(len(row.class_names) for row in rows)
    for part, row in zip(figure.subfigs, rows, strict=True):
        assert [text.get_text() for text in part.legends[0].get_texts()] == list(row.class_names)


def test_the_same_sheet_twice_is_the_same_and_a_dead_layer_is_said_to_be():
    row = projected("some", ["a", "b", "c"])
    row.layers[2][:] = 7
    first, second = (tsne_sheet([row], "t-SNE") for _ in range(2))
    for one, other in zip(first.axes, second.axes, strict=True):
        for points, again in zip(one.collections, other.collections, strict=True):
            np.testing.assert_array_equal(points.get_offsets(), again.get_offsets())
    assert [len(ax.collections) for ax in first.axes] == [3, 3, 0, 3]
    assert "same" in first.axes[2].texts[0].get_text()


@pytest.mark.parametrize("counts", [[5, 5], [7, 3], [10, 10], [6, 11], [12]])
def test_no_colour_is_shared(counts):
    groups = class_colours(counts)
    assert [len(group) for group in groups] == counts
    assert len({to_hex(colour) for group in groups for colour in group}) == sum(counts)


def test_a_row_of_a_sheet_is_of_test_images():
    network = ConvClassifier(1, 8, 2, depth=2, channels=4)
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(2).repeat(30)
    inputs = torch.randn(60, 1, 8, 8, generator=draw)
    row = sheet_row("some", network, Examples(inputs + 9, labels, inputs, labels, classes=2), ["a", "b"])
    assert [layer.shape for layer in row.layers] == [(60, 64), (60, 256), (60, 64)]
    assert np.bincount(row.labels).tolist() == [30, 30]
    shown, there = (
        {tuple(image) for image in images} for images in (row.layers[0].tolist(), inputs.flatten(1).tolist())
    )
    assert shown == there
