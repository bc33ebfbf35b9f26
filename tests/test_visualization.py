"""Figures are checked by what they draw: numbers, places, colours, and that nothing hides or cuts anything."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import EllipseCollection
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from PIL import Image
from scipy import stats

import visualization as v
from config import InputError
from tests.figure_cases import (
    CLASSES,
    DOMAINS,
    FIGURES,
    bars_table,
    differences,
    history,
    many_differences,
    points,
    random_layers,
    sweep,
)


def drawn_texts(figure, monkeypatch) -> list[tuple[str, np.ndarray, Text]]:
    """Every text that reaches the canvas, with its extents (x0, y0, x1, y1) in pixels."""
    seen, draw = {}, Text.draw

    def record(self, renderer):
        draw(self, renderer)
        if self.get_text().strip() and self.get_visible():
            seen[id(self)] = (self.get_text(), np.array(self.get_window_extent(renderer).extents), self)

    FigureCanvasAgg(figure)
    with monkeypatch.context() as patch:
        patch.setattr(Text, "draw", record)
        figure.canvas.draw()
    return list(seen.values())


def contrast(first, second) -> float:
    """Contrast ratio of WCAG 2."""
    light = []
    for color in (first, second):
        rgb = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
        light.append(0.2126 * rgb[0] + 0.7152 * rgb[1] + 0.0722 * rgb[2] + 0.05)
    return max(light) / min(light)


def colour_bars(figure) -> list:
    """Axes of the colour bars."""
    drawn = [artist for ax in figure.axes for artist in (*ax.images, *ax.collections)]
    return [artist.colorbar.ax for artist in drawn if artist.colorbar]


def grids(figure) -> list:
    bars = colour_bars(figure)
    return [ax for ax in figure.axes if ax not in bars]


def legend(figure) -> list[str]:
    return [text.replace("\xa0", " ") for text in words(figure.legends[0].get_texts())]


def words(texts) -> list[str]:
    return [text.get_text() for text in texts]


BARS = {"panels wide": 2} | dict.fromkeys(("summed", "mask", "panels", "panels divergent"), 1)
WITHOUT_NUMBERS = ("samples", "confusion 22", "weights wide", "panels wide")


@pytest.mark.parametrize("name", FIGURES)
def test_every_text_is_inside_and_readable_and_a_colour_bar_covers_nothing(name, monkeypatch):
    figure = FIGURES[name]()
    texts = drawn_texts(figure, monkeypatch)
    boxes, (width, height) = np.array([box for _, box, _ in texts]), figure.canvas.get_width_height()
    outside = (boxes < -0.5) | (boxes > np.array([width, height] * 2) + 0.5)
    assert not outside.any(), f"'{texts[np.argmax(outside.any(axis=1))][0]}' is cut off"
    low = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    pairs = np.argwhere(np.triu(np.all(high - low > 2, axis=2), k=1))
    assert not len(pairs), f"'{texts[pairs[0][0]][0]}' lies on '{texts[pairs[0][1]][0]}'"
    assert not any("nan" in text or text.startswith("-") for text, _, _ in texts)
    assert figure.get_figwidth() < v.WIDTH + 1e-6 or name in ("bars many", "samples many")
    bars = colour_bars(figure)
    assert len(bars) == BARS.get(name, name.startswith(("weights", "confusion", "overlap")))
    for ax in grids(figure):
        assert not any(bar.get_tightbbox().overlaps(ax.get_tightbbox()) for bar in bars)
        for shown in [*ax.images, *(c for c in ax.collections if isinstance(c, EllipseCollection))]:
            numbers = [text for text in ax.texts if text.get_text()]
            assert bool(numbers) == (not name.startswith(WITHOUT_NUMBERS))
            if numbers:
                colors = shown.to_rgba(shown.get_array().compressed().astype(float)).reshape(-1, 4)
                assert len(numbers) == len(colors)
                for number, color in zip(numbers, colors, strict=True):
                    assert contrast(number.get_color(), color[:3]) >= 4.5


@pytest.mark.parametrize("shapes", [[(3, 3)] * 3, [(8, 10), (6, 8)], [(1, 3)]])
def test_grid_draws_one_numbered_circle_per_weight_in_its_place(shapes, monkeypatch):
    layers = random_layers(*shapes, scale=0.5)
    before = [layer.clone() for layer in layers]
    figure = v.weight_grids(layers, "W")
    texts = {id(text): box for _, box, text in drawn_texts(figure, monkeypatch)}
    assert all(torch.equal(a, b) for a, b in zip(layers, before, strict=True))
    for number, (ax, layer) in enumerate(zip(grids(figure), layers, strict=True), start=1):
        assert ax.get_title() == f"hidden {number} → hidden {number + 1}"
        (circles,) = ax.collections
        assert len(circles.get_offsets()) == layer.numel() == len(ax.texts)
        assert ax.get_xlabel() == "from unit"
        assert ax.get_ylabel() == ("to unit" if number % 2 else "")  # two beside each other
        assert ax.yaxis_inverted()
        for text in ax.texts:
            x, y = text.get_position()
            assert float(text.get_text().replace("−", "-")) == pytest.approx(float(layer[y - 1, x - 1]), abs=0.0501)
            box, diameter = texts[id(text)], np.diff(ax.transData.transform([[0, 0], [0.96, 0]])[:, 0])[0]
            assert box[2] - box[0] < diameter
        values = {tuple(place): value for place, value in zip(circles.get_offsets(), circles.get_array(), strict=True)}
        assert values[layer.shape[1], 1] == pytest.approx(float(layer[0, -1]))
        assert values[1, layer.shape[0]] == pytest.approx(float(layer[-1, 0]))
        bound = max(float(layer.abs().max()) for layer in layers)
        assert circles.get_clim() == pytest.approx((-bound, bound))


def test_grid_numbers_scales_and_gaps():
    layer = torch.tensor([[0.123, -0.123, -0.001], [-1.23, 12.34, float("nan")]])
    figure = v.weight_grids([layer], "W", limits=(-20, 20))
    assert words(figure.axes[0].texts) == ["0.12", "−0.12", "0.00", "−1.2", "12.3"]
    assert figure.axes[0].collections[0].get_clim() == (-20, 20)
    mask = v.weight_grids([layer > 0], "M", "mask")
    assert words(mask.axes[0].texts) == ["1", "0", "0", "0", "1", "0"]
    FigureCanvasAgg(mask).draw()
    assert len({tuple(color) for color in mask.axes[0].collections[0].get_facecolor()}) == 2
    labels = " ".join(words(mask.axes[-1].get_yticklabels())).replace("\n", " ")
    assert labels == "0 not important 1 important"
    for limits, wanted in ((None, (0, 1)), ((0, 3), (0, 3))):
        summed = v.weight_grids([torch.full((2, 2), 3.0)], "I", "importance", limits)
        assert summed.axes[0].collections[0].get_clim() == wanted
        (bar,) = [shown.colorbar for shown in summed.axes[0].collections]
        assert bar.extend == ("max" if limits is None else "neither")
    equal = v.weight_grids([torch.zeros(2, 2)], "All equal").axes[0].collections[0]
    assert equal.get_clim() == (-1, 1)
    with pytest.raises(ValueError, match="kind"):
        v.weight_grids([layer], "W", "weight")


@pytest.mark.parametrize("bands", ["t95", "std", "range"])
def test_curves_are_means_over_the_seeds_that_did_not_fail_with_bands(bands):
    values = history(seeds=6, level=0.995, keys=("loss", "validation_accuracy"))
    values["loss"][4:, 2] = np.nan
    values["loss"][9] *= np.arange(6)  # the band of t and std would go below 0
    before = {key: array.copy() for key, array in values.items()}
    names = {"validation_accuracy": "of images trained on"}
    figure = v.training_curves({"erm": values}, "T", 7, bands, names)
    assert all(np.array_equal(values[key], before[key], equal_nan=True) for key in values)
    assert [ax.get_title() for ax in figure.axes] == ["training loss", "of images trained on"]
    for ax, key in zip(figure.axes, values, strict=True):
        scale, most = (1, np.inf) if key == "loss" else (100, 100)
        kept = scale * np.delete(values[key], 2, axis=1)
        curve, freeze = ax.lines
        np.testing.assert_array_equal(curve.get_xdata(), np.arange(1, 11))
        np.testing.assert_allclose(curve.get_ydata(), kept.mean(1))
        assert set(freeze.get_xdata()) == {7.5}
        vertices = ax.collections[0].get_paths()[0].vertices
        low, high = ([f(vertices[vertices[:, 0] == e, 1]) for e in range(1, 11)] for f in (min, max))
        wanted = {
            "t95": stats.t.interval(0.95, 4, kept.mean(1), stats.sem(kept, axis=1)),
            "std": (kept.mean(1) - kept.std(1, ddof=1), kept.mean(1) + kept.std(1, ddof=1)),
            "range": (kept.min(1), kept.max(1)),
        }[bands]
        np.testing.assert_allclose([low, high], np.clip(wanted, 0, most), rtol=1e-9)
    assert legend(figure) == ["erm (5 of 6 seeds)", "unmarked weights frozen after epoch 7"]


def test_curves_of_one_seed_no_seed_and_other_lengths():
    dead = {"loss": torch.full((3, 2), float("nan"))}
    figure = v.training_curves({"dead": dead, "one": {"loss": torch.ones(5, 1)}}, "T", freeze_epoch=5)
    (ax,) = figure.axes
    assert len(ax.lines) == 1  # no line of the dead, none for a freeze that never comes
    assert not ax.collections  # no band of one seed
    assert legend(figure) == ["dead (0 of 2 seeds)", "one"]
    assert figure.legends[0].get_title().get_text() == "one seed"
    for bad in ({}, {"a": {}}):
        with pytest.raises(ValueError, match="histories"):
            v.training_curves(bad, "T")
    with pytest.raises(ValueError, match="bands"):
        v.training_curves({"one": dead}, "T", bands="sem")


def test_series_differ_by_more_than_colour():
    looks = [tuple(v.line_style(i)[key] for key in ("color", "marker")) for i in range(20)]
    assert len(set(looks)) == 20
    assert all(contrast(color, "white") >= 2.2 for color in (*v.COLORS, *v.OTHER_COLORS))
    assert not {*v.COLORS} & {*v.OTHER_COLORS}
    assert len({v.bar_style(i)["hatch"] for i in range(8)}) == 8


def test_bars_show_means_intervals_and_references():
    table = bars_table(["importance", "erm"], ["average", *DOMAINS[:2]], half=0.3)
    table.loc[table["algorithm"] == "erm", ["low", "high"]] = np.nan
    table.loc[5, "mean"] = np.nan
    before = table.copy()
    figure = v.accuracy_bars(table, "B", chance=0.25, majority={"cartoon": 0.31})
    pd.testing.assert_frame_equal(table, before)
    (ax,) = figure.axes
    ticks = words(ax.get_xticklabels())
    assert ticks == ["art painting", "cartoon", "average"]
    found = {}
    for bars, algorithm in zip([c for c in ax.containers if hasattr(c, "patches")], ["importance", "erm"], strict=True):
        for bar in bars:
            middle = bar.get_x() + bar.get_width() / 2
            holdout = ["art_painting", "cartoon", "average"][int(np.argmin(abs(ax.get_xticks() - middle)))]
            found[algorithm, holdout] = bar.get_height()
    keys = zip(table["algorithm"], table["holdout"], strict=True)
    assert found == pytest.approx(dict(zip(keys, 100 * table["mean"], strict=True)), nan_ok=True)
    intervals = [c for c in ax.containers if not hasattr(c, "patches")]
    ends = np.array([segment[:, 1] for c in intervals for segment in c.lines[2][0].get_segments()])
    wanted = np.clip(100 * table.loc[table["algorithm"] == "importance", ["low", "high"]], 0, 100)
    np.testing.assert_allclose(ends, wanted)  # an interval may end beyond what is possible
    assert wanted.to_numpy().max() == 100 == ax.get_ylim()[1]
    assert words(ax.texts) == [f"{100 * mean:.1f}" for mean in table["mean"][:5]]
    assert set(next(line for line in ax.lines if line.get_linestyle() == "--").get_ydata()) == {25}
    (marks,) = [c for c in ax.collections if c.get_zorder() == 4]
    assert all(c.lines[2][0].get_zorder() > 4 for c in intervals)  # no line hides an interval
    np.testing.assert_allclose(marks.get_segments()[0][:, 1], 31)
    assert marks.get_segments()[0][0, 0] < ax.get_xticks()[1] < marks.get_segments()[0][1, 0]
    assert legend(figure) == ["importance", "erm", "chance (25.0 %)", "share of the largest class"]
    assert "t interval" in figure.legends[0].get_title().get_text().replace("\xa0", " ")


def test_confusion_is_per_cent_of_the_true_class():
    matrix = torch.tensor([[8, 2, 0], [0, 0, 0], [1, 1, 2]])
    names = ["a", "b", "c"]
    figure = v.confusion_matrices({"photo": matrix, "sketch": matrix}, names, "C")
    assert matrix.sum() == 14
    first, second = grids(figure)
    assert first.get_title() == "held out: photo"
    assert (first.get_ylabel(), first.get_xlabel()) == ("true class", "predicted class")
    numbers = {text.get_position(): text.get_text() for text in second.texts}
    row = {(0, 0): "80", (1, 0): "20", (2, 0): "0", (0, 2): "25", (1, 2): "25", (2, 2): "50"}
    assert numbers == row  # (column, row); nothing in the empty row
    assert first.images[0].get_clim() == (0, 100)
    other = torch.tensor([[2, 8, 0], [5, 0, 0], [1, 1, 2]])
    ax, _ = v.confusion_matrices({"photo": matrix}, names, "D", {"photo": other}).axes
    assert words(ax.texts) == ["+60", "−60", "0", "0", "0", "0"]
    assert ax.images[0].get_clim() == (-60, 60)


def marks(ax) -> list:
    """Means of a forest plot: lines of one point."""
    return [line for line in ax.lines if len(line.get_xdata()) == 1]


def test_difference_plot_shows_points_intervals_and_numbers():
    table = differences(group=["a", "b", "a"])
    figure = v.difference_plot(table, "D", margin=0.005)
    (ax,) = figure.axes
    zero, *rest = ax.lines
    assert list(zero.get_xdata()) == [0, 0]
    for row, (interval, mean) in enumerate(zip(rest[::2], rest[1::2], strict=True)):
        np.testing.assert_allclose(interval.get_xdata(), 100 * table.loc[row, ["low", "high"]].to_numpy(float))
        np.testing.assert_allclose([*mean.get_xdata(), *mean.get_ydata()], [100 * table.loc[row, "mean"], row])
        assert interval.get_marker() == "|"
        assert interval.get_markersize() > mean.get_markersize()  # a short interval is seen behind its mark
    assert rest[1].get_marker() == rest[5].get_marker() != rest[3].get_marker()
    texts = words(ax.texts)
    assert texts[:4] == ["+1.20 [−0.10, +2.50]", "−20.00 [−31.00, −10.00]", "0.00 [0.00, 0.00]", "mean [low, high]"]
    assert texts[4:] == ["← worse", "better →"]
    assert ax.yaxis_inverted()
    assert "points" in ax.get_xlabel()
    assert legend(figure) == ["a", "b", "within ±0.5 points"]
    drawn = [(line.get_color(), line.get_marker(), line.get_linestyle()) for line in figure.legends[0].get_lines()]
    assert drawn == [(line.get_color(), line.get_marker(), "-") for line in (rest[1], rest[3])]
    (band,) = ax.patches
    assert (band.get_x(), band.get_width()) == pytest.approx((-0.5, 1))
    assert not v.difference_plot(table, "D").axes[0].patches
    table[["low", "high"]] = np.nan
    assert v.difference_plot(table, "D").axes[0].texts[0].get_text() == "+1.20"


def test_rows_of_a_label_are_drawn_together_and_groups_keep_their_colours():
    table = differences(label=["x", "y", "x"], group=pd.Categorical(["b", "c", "c"], ["a", "b", "c"]))
    (ax,) = v.difference_plot(table, "D").axes
    assert words(ax.get_yticklabels()) == ["x", "y"]
    assert [round(float(line.get_ydata()[0])) for line in marks(ax)] == [0, 1, 0]
    assert [line.get_color() for line in marks(ax)] == [v.COLORS[i] for i in (1, 2, 2)]


def test_differences_far_from_all_others_become_an_arrow():
    (ax,) = v.difference_plot(many_differences(), "D").axes
    low, high = ax.get_xlim()
    assert -3 < low < high < 3
    first, *others, last = marks(ax)
    assert (first.get_marker(), last.get_marker()) == (">", "<")
    assert (first.get_xdata()[0], last.get_xdata()[0]) == (high, low)
    assert all(low < line.get_xdata()[0] < high for line in others)
    assert {"31.0", "−15.4", "−15.40 [−15.70, −15.00]"} <= {*words(ax.texts)}


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_projection_is_the_same_every_time_and_takes_from_every_class(method, tmp_path):
    features, labels, domains = points(200)
    copy, state = features.clone(), np.random.get_state()[1].copy()
    for name in ("a.png", "b.png"):
        figure = v.feature_projection(features, labels, domains, CLASSES, DOMAINS, "P", method, max_points=60)
        v.save(figure, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert torch.equal(features, copy)
    assert np.array_equal(np.random.get_state()[1], state)
    for ax, names, index in zip(figure.axes, (DOMAINS, CLASSES), (domains, labels), strict=True):
        assert words(ax.get_legend().get_texts()) == [name.replace("_", " ") for name in names]
        parts = [len(part.get_offsets()) for part in ax.collections]
        assert sum(parts) == 60
        assert min(parts) > 0
        if names is DOMAINS:
            np.testing.assert_allclose(parts, np.bincount(index, minlength=4) * 60 / 200, atol=1)
    by_domain, by_class = (
        [(line.get_color(), line.get_marker()) for line in ax.get_legend().get_lines()] for ax in figure.axes
    )
    for own, other in zip(zip(*by_domain, strict=True), zip(*by_class, strict=True), strict=True):
        assert not {*own} & {*other}  # neither a colour nor a marker stands for a domain and for a class
    assert len({*by_domain}) == len(DOMAINS)
    assert len({*by_class}) == len(CLASSES)
    left, right = (np.concatenate([part.get_offsets() for part in ax.collections]) for ax in figure.axes)
    np.testing.assert_allclose(np.sort(left, axis=0), np.sort(right, axis=0))


def test_projection_pca_is_that_of_numpy_and_methods_are_checked():
    features, labels, domains = points(50)
    figure = v.feature_projection(features, labels, domains, CLASSES, DOMAINS, "P", "pca")
    x = np.concatenate([part.get_offsets() for part in figure.axes[1].collections])
    centred = features.double().numpy() - features.double().numpy().mean(0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(np.sort(abs(x), axis=0), np.sort(abs(u * s)[:, :2], axis=0), rtol=1e-3, atol=1e-3)
    assert f"({100 * s[0] ** 2 / (s**2).sum():.0f} % of variance)" in figure.axes[0].get_xlabel()
    few = v.feature_projection(features[:5], labels[:5], domains[:5], CLASSES, DOMAINS, "P")
    assert "5 of 5 images" in few.axes[0].get_title()
    with pytest.raises(ValueError, match="method"):
        v.feature_projection(features, labels, domains, CLASSES, DOMAINS, "P", "umap")


@pytest.mark.parametrize("features", [np.zeros((30, 5)), np.arange(30.0)[:, None]])
@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_what_has_no_projection_is_refused(features, method):
    """Equal points make scikit-learn's t-SNE crash the process."""
    labels = np.zeros(30, int)
    with pytest.raises(ValueError, match="projection"):
        v.feature_projection(features, labels, labels, ["a"], ["b"], "P", method)


def test_sample_sheet_places_images_by_domain_and_class():
    red, green = Image.new("RGB", (30, 20), "red"), np.full((20, 30, 3), [0, 255, 0], np.uint8)
    figure = v.sample_sheet({"photo": {"dog": red, "cat": green}, "sketch": {"cat": Image.new("L", (9, 9), 7)}}, "S")
    axes = np.array(figure.axes).reshape(2, 2)
    assert [ax.get_title() for ax in axes[0]] == ["dog", "cat"]
    assert [ax.get_ylabel() for ax in axes[:, 0]] == ["photo", "sketch"]
    pixels = [ax.images[0].get_array()[0, 0].tolist() for ax in (*axes[0], axes[1, 1])]
    assert pixels == [[255, 0, 0], [0, 255, 0], [7, 7, 7]]
    assert not axes[1, 0].images


def test_overlap_is_coloured_from_chance_without_the_diagonal():
    ax, bar = v.overlap_matrix(np.array([[1.0, 0.25], [0.5, 1.0]]), ["a", "b"], "Overlap", chance=0.43).axes
    assert {text.get_position(): text.get_text() for text in ax.texts} == {(1, 0): "0.25", (0, 1): "0.50"}
    assert "chance: 0.43" in bar.get_ylabel()
    assert ax.images[0].get_clim() == (0.43, 1)
    assert ax.images[0].colorbar.extend == "min"


def test_curves_by_setting():
    table = sweep([60, 20, 40])
    baselines = {"erm": (0.7, 0.68, 0.73), "same": (0.7, 0.68, 0.73), "majority": (0.2, np.nan, np.nan)}
    figure = v.accuracy_curves_by_setting(table, "setting", "S", "kept (%)", baselines, default=60)
    (ax,) = figure.axes
    first, second, *beside = [container.lines for container in ax.containers]
    for (curve, _, (intervals,)), aside in ((first, -1), (second, 1)):  # the two coincide, and lie beside each other
        assert (np.sign((curve.get_xdata() - np.array([20, 40, 60])).astype(float)) == aside).all()
        np.testing.assert_allclose(np.asarray(curve.get_ydata(), float), [100 * (0.6 + 1 / 9), 100 * (0.6 + 2 / 9), 60])
        assert intervals.get_segments()[2][:, 1] == pytest.approx((57, 80))
    places = [curve.get_xdata()[0] for curve, _, _ in beside]
    assert len({*places}) == 3
    assert min(places) > 60
    assert [curve.get_ydata()[0] for curve, _, _ in beside] == pytest.approx([70, 70, 20])
    lines = [line.get_ydata()[0] for line in ax.lines if list(line.get_xdata()) == [0, 1]]
    assert lines == pytest.approx([70, 70, 20])
    assert any(list(line.get_xdata()) == [60, 60] for line in ax.lines)
    assert legend(figure)[2:] == ["erm", "same", "majority", "default (60)"]
    (ax,) = v.accuracy_curves_by_setting(sweep(["sum", "mean"]), "setting", "S", "how", default="mean").axes
    assert words(ax.get_xticklabels()) == ["sum", "mean"]
    assert any(list(line.get_xdata()) == [1, 1] for line in ax.lines)


def test_titles_are_not_broken_inside_an_interval():
    for width in range(10, 60):
        lines = v.wrap("Average accuracy minus ERM's, paired by seed, 95 % t interval (20 seeds)", width).splitlines()
        assert any("95 % t interval" in line.replace("\xa0", " ") for line in lines) or width < 15
    long = (
        FIGURES["weights small"]().get_suptitle()
        + v.new_figure(5, 1, "word " * 13 + "(a model, 5 seeds)").get_suptitle()
    )
    assert long.endswith("\n(a model, 5 seeds)")


@pytest.mark.parametrize("ending", v.FORMATS)
def test_a_saved_file_is_complete_the_same_each_time_and_without_dates(tmp_path, monkeypatch, ending):
    path = tmp_path / "new" / f"figure.{ending}"
    v.save(FIGURES["overlap"](), path)
    first = path.read_bytes()
    figure = FIGURES["overlap"]()
    v.save(figure, path)
    v.save(figure, path)
    assert path.read_bytes() == first
    if ending == "png":
        with Image.open(path) as image:
            assert image.info.keys() <= {"dpi", "Comment"}
            assert image.info["dpi"] == pytest.approx((192, 192), abs=0.1)
    monkeypatch.setattr(figure, "savefig", lambda file, **_: (Path(file).write_bytes(b"half"), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        v.save(figure, path)
    assert path.read_bytes() == first
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_only_what_is_asked_for_and_has_changed_is_drawn(tmp_path, monkeypatch, caplog):
    saved, save = [], v.save
    monkeypatch.setattr(v, "save", lambda figure, path: (saved.append(path.name), save(figure, path)))
    image = Image.new("L", (2, 2))

    def draw(value=0.5, only=None, format="png"):
        figures = {
            "overlap": lambda: v.overlap_matrix(torch.tensor([[1, value], [value, 1]]), ["a", "b"], "O"),
            "samples": lambda: v.sample_sheet({"a": {"b": image}}, "S"),
            "bars": lambda: v.accuracy_bars(bars_table(["a"], ["b"]), "B", majority={"b": 0.2}),
        }
        saved.clear()
        paths = v.save_each(figures.items(), tmp_path, only, format)
        return [path.name for path in paths], list(saved)

    every = ["overlap.png", "samples.png", "bars.png"]
    assert draw() == (every, every)
    assert draw() == (every, [])
    assert draw(0.25) == (every, ["overlap.png"])
    assert draw(0.25, ["bars"], "pdf") == (["bars.pdf"], ["bars.pdf"])
    assert draw(0.75, ["ov", "bars"]) == (["overlap.png", "bars.png"], ["overlap.png"])
    for only, format in ((["forest"], "png"), (None, "gif")):
        with pytest.raises(InputError, match=r"forest|gif"):
            draw(only=only, format=format)
    with caplog.at_level(logging.WARNING):
        assert draw(None) == (["samples.png", "bars.png"], [])
    assert "'overlap'" in caplog.text
    assert not (tmp_path / "overlap.png").exists()  # one of earlier data would be taken for this one's


def test_a_full_disk_ends_the_drawing_and_keeps_what_is_there(tmp_path, monkeypatch):
    figures = dict.fromkeys(("a", "b"), FIGURES["overlap"])
    (tmp_path / "a.png").write_text("earlier")
    monkeypatch.setattr(os, "fsync", lambda _: os.write(-1, b"x"))  # an OSError
    with pytest.raises(InputError, match=r"a\.png"):
        v.save_each(figures.items(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_style_of_the_user_neither_matters_nor_changes(tmp_path):
    v.save(FIGURES["curves one"](), tmp_path / "a.png")
    with matplotlib.rc_context({"text.color": "red", "axes.facecolor": "black", "font.size": 20, "axes.grid": True}):
        v.save(FIGURES["curves one"](), tmp_path / "b.png")
        assert matplotlib.rcParams["font.size"] == 20
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_notebooks_show_a_figure_once_with_twice_as_many_pixels():
    from IPython.core.formatters import DisplayFormatter

    figure = FIGURES["overlap"]()
    data, about = DisplayFormatter().format(figure)
    assert data["image/png"].startswith(b"\x89PNG")
    assert int.from_bytes(data["image/png"][16:20]) == pytest.approx(2 * about["image/png"]["width"], abs=2)
    assert data["image/png"][25] == 6  # true colours
    assert "text/html" not in data


def test_no_pyplot_no_backend_no_output(tmp_path):
    """Not even where the environment names a backend that does not exist."""
    code = f"""
import os, sys, visualization as v, matplotlib, numpy as np
assert "sklearn" not in sys.modules and "torch" not in sys.modules
v.save(v.weight_grids([np.eye(3)], "W"), {str(tmp_path / "w.png")!r})
v.overlap_matrix(np.eye(3), list("abc"), "O")._repr_png_()
v.training_curves({{"a": {{"loss": np.ones((3, 2))}}}}, "T")
assert "matplotlib.pyplot" not in sys.modules
assert matplotlib.get_backend(auto_select=False) is None
assert os.environ["MPLBACKEND"] == "nonsense"
"""
    command, folder = [sys.executable, "-W", "error", "-c", code], Path(v.__file__).parent
    environment = os.environ | {"MPLBACKEND": "nonsense"}
    run = subprocess.run(command, cwd=folder, capture_output=True, env=environment)
    assert (run.returncode, run.stdout, run.stderr) == (0, b"", b"")


def test_densities_of_rows_are_shown_from_the_lowest_to_the_highest():
    rows = {"query": np.linspace(0, 1, 21), "MLP in": np.full(5, 0.25)}
    figure = v.row_densities(rows, "Rows", 0.6, {"query": (0.5, 0.7)})
    ax = figure.axes[0]
    lines = [line.get_xdata() for line in ax.lines]
    found = [list(np.round(x, 6)) for x in lines if len(x) == 2]
    assert found[:4] == [[0, 100], [5, 95], [25, 75], [50, 50]]
    assert [list(x) for x in lines if len(x) == 1] == [[50], [25]]
    (band,) = ax.patches
    assert (band.get_x(), band.get_width()) == pytest.approx((50, 20))
    assert [label.get_text() for label in ax.get_yticklabels()] == [*rows]
    assert [t.get_text() for t in ax.texts] == ["50", "25", "whole matrix"]
