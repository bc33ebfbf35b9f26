"""Figures are checked by what they draw: numbers, places, colours, and that nothing hides or cuts anything."""

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
from tests.figure_cases import (
    CLASSES,
    DOMAINS,
    FIGURES,
    TEN,
    bars_table,
    differences,
    history,
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


WITH_BAR = ("weights", "importance", "summed", "mask", "equal", "confusion", "overlap")


@pytest.mark.parametrize("name", FIGURES)
def test_every_text_is_inside_and_readable_and_a_colour_bar_covers_nothing(name, monkeypatch):
    figure = FIGURES[name]()
    texts = drawn_texts(figure, monkeypatch)
    boxes, (width, height) = np.array([box for _, box, _ in texts]), figure.canvas.get_width_height()
    outside = (boxes < -0.5) | (boxes > np.array([width, height] * 2) + 0.5)
    assert not outside.any(), f"'{texts[np.argmax(outside.any(axis=1))][0]}' is cut off"
    low = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    pairs = np.argwhere(np.triu(np.all(high - low > 1, axis=2), k=1))
    assert not len(pairs), f"'{texts[pairs[0][0]][0]}' lies on '{texts[pairs[0][1]][0]}'"
    bars = colour_bars(figure)
    assert len(bars) == name.startswith(WITH_BAR)
    for ax in grids(figure):
        assert not any(bar.get_tightbbox().overlaps(ax.get_tightbbox()) for bar in bars)
        for shown in [*ax.images, *(c for c in ax.collections if isinstance(c, EllipseCollection))]:
            numbers = [text for text in ax.texts if text.get_text()]
            assert not numbers or name not in ("confusion 25", "weights wide")  # more than 20 rows
            if numbers:
                colors = shown.to_rgba(np.ma.filled(shown.get_array().astype(float), np.nan)).reshape(-1, 4)
                assert len(numbers) == len(colors)
                for number, color in zip(numbers, colors, strict=True):
                    assert contrast(number.get_color(), color[:3]) >= 4.5


@pytest.mark.parametrize("shapes", [TEN, [(8, 10), (6, 8)], [(1, 3)]])
def test_grid_draws_one_numbered_circle_per_weight_in_its_place(shapes, monkeypatch):
    layers = random_layers(*shapes, scale=0.5)
    before = [layer.clone() for layer in layers]
    figure = v.weight_grids(layers, "W")
    texts = {id(text): box for _, box, text in drawn_texts(figure, monkeypatch)}
    assert all(torch.equal(a, b) for a, b in zip(layers, before, strict=True))
    assert [ax.get_title() for ax in grids(figure)] == [
        f"hidden {i} → hidden {i + 1}" for i in range(1, len(shapes) + 1)
    ]
    for ax, layer in zip(grids(figure), layers, strict=True):
        (circles,) = ax.collections
        assert len(circles.get_offsets()) == layer.numel() == len(ax.texts)
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("from unit", "to unit")
        assert ax.yaxis_inverted()
        for number in ax.texts:
            x, y = number.get_position()
            assert float(number.get_text()) == pytest.approx(float(layer[y - 1, x - 1]), abs=0.0501)
            box, diameter = texts[id(number)], np.diff(ax.transData.transform([[0, 0], [0.94, 0]])[:, 0])[0]
            assert box[2] - box[0] < diameter
        values = {tuple(place): value for place, value in zip(circles.get_offsets(), circles.get_array(), strict=True)}
        assert values[layer.shape[1], 1] == pytest.approx(float(layer[0, -1]))
        assert values[1, layer.shape[0]] == pytest.approx(float(layer[-1, 0]))
        bound = max(float(layer.abs().max()) for layer in layers)
        assert circles.get_clim() == pytest.approx((-bound, bound))


def test_grid_numbers_scales_and_gaps():
    layer = torch.tensor([[0.123, -0.123, -0.001], [-1.23, 12.34, float("nan")]])
    figure = v.weight_grids([layer], "W")
    assert [text.get_text() for text in figure.axes[0].texts] == ["0.12", "-.12", "0.00", "-1.2", "12.3"]
    mask = v.weight_grids([layer > 0], "M", "mask")
    assert [text.get_text() for text in mask.axes[0].texts] == ["1", "0", "0", "0", "1", "0"]
    FigureCanvasAgg(mask).draw()
    assert len({tuple(color) for color in mask.axes[0].collections[0].get_facecolor()}) == 2
    labels = " ".join(label.get_text() for label in mask.axes[-1].get_yticklabels()).replace("\n", " ")
    assert labels == "0 not important 1 important"
    for limits, wanted in ((None, (0, 1)), ((0, 3), (0, 3))):
        summed = v.weight_grids([torch.full((2, 2), 3.0)], "I", "importance", limits)
        assert summed.axes[0].collections[0].get_clim() == wanted
        (bar,) = [shown.colorbar for shown in summed.axes[0].collections]
        assert bar.extend == ("max" if limits is None else "neither")
    with pytest.raises(ValueError, match="kind"):
        v.weight_grids([layer], "W", "weight")


@pytest.mark.parametrize("bands", ["t95", "std", "range"])
def test_curves_are_means_over_the_seeds_that_did_not_fail_with_bands(bands):
    values = history(seeds=6)
    values["loss"][4:, 2] = np.nan
    before = {key: array.copy() for key, array in values.items()}
    figure = v.training_curves({"erm": values}, "T", freeze_epoch=7, bands=bands)
    assert all(np.array_equal(values[key], before[key], equal_nan=True) for key in values)
    assert [ax.get_title() for ax in figure.axes] == ["training loss", "training accuracy", "validation accuracy"]
    for ax, key, scale in zip(figure.axes, values, (1, 100, 100), strict=True):
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
        np.testing.assert_allclose([low, high], wanted, rtol=1e-9)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["erm (5 of 6 seeds)", "unimportant weights frozen after epoch 7"]
    assert figure.axes[1].get_ylim() == figure.axes[2].get_ylim()


def test_curves_of_one_seed_no_seed_and_other_lengths():
    dead = {"loss": torch.full((3, 2), float("nan"))}
    figure = v.training_curves({"dead": dead, "one": {"loss": torch.ones(5, 1)}}, "T", freeze_epoch=5)
    (ax,) = figure.axes
    assert len(ax.lines) == 1  # no line of the dead, none for a freeze that never comes
    assert not ax.collections  # no band of one seed
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["dead (0 of 2 seeds)", "one"]
    assert figure.legends[0].get_title().get_text() == "one seed"
    for bad in ({}, {"a": {}}):
        with pytest.raises(ValueError, match="histories"):
            v.training_curves(bad, "T")
    with pytest.raises(ValueError, match="bands"):
        v.training_curves({"one": dead}, "T", bands="sem")


def test_series_differ_by_more_than_colour():
    figure = v.training_curves({str(i): {"loss": np.ones((2, 1)) * i} for i in range(20)}, "T")
    looks = [(line.get_color(), line.get_marker()) for line in figure.axes[0].lines]
    assert len(set(looks)) == 20
    assert all(contrast(color, "white") >= 2.2 for color, _ in looks)
    figure = v.accuracy_bars(bars_table(list("abcdefgh"), ["x"]), "B")
    assert len({patch.get_hatch() for patch in figure.axes[0].patches}) == 8


def test_bars_show_means_intervals_and_references():
    table = bars_table(["importance", "erm"], ["average", *DOMAINS[:2]])
    table.loc[table["algorithm"] == "erm", ["low", "high"]] = np.nan
    before = table.copy()
    figure = v.accuracy_bars(table, "B", chance=0.25, majority={"cartoon": 0.31})
    pd.testing.assert_frame_equal(table, before)
    (ax,) = figure.axes
    ticks = [label.get_text() for label in ax.get_xticklabels()]
    assert ticks == ["art_painting", "cartoon", "average"]
    found = {}
    for bars, algorithm in zip([c for c in ax.containers if hasattr(c, "patches")], ["importance", "erm"], strict=True):
        for bar in bars:
            middle = bar.get_x() + bar.get_width() / 2
            found[algorithm, ticks[int(np.argmin(abs(ax.get_xticks() - middle)))]] = bar.get_height()
    keys = zip(table["algorithm"], table["holdout"], strict=True)
    assert found == pytest.approx(dict(zip(keys, 100 * table["mean"], strict=True)))
    intervals = [c for c in ax.containers if not hasattr(c, "patches")]
    ends = np.array([segment[:, 1] for c in intervals for segment in c.lines[2][0].get_segments()])
    np.testing.assert_allclose(ends, 100 * table.loc[table["algorithm"] == "importance", ["low", "high"]])
    assert [t.get_text() for t in ax.texts] == [f"{100 * mean:.1f}" for mean in table["mean"]]
    assert set(next(line for line in ax.lines if line.get_linestyle() == "--").get_ydata()) == {25}
    (marks,) = [c.get_segments() for c in ax.collections if c.get_zorder() == 4]
    np.testing.assert_allclose(marks[0][:, 1], 31)
    assert marks[0][0, 0] < ax.get_xticks()[1] < marks[0][1, 0]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["importance", "erm", "chance (25.0 %)", "share of the largest class"]
    assert ax.get_ylim()[0] == 0


def test_confusion_is_per_cent_of_the_true_class():
    matrix = torch.tensor([[8, 2, 0], [0, 0, 0], [1, 1, 2]])
    figure = v.confusion_matrices({"photo": matrix, "sketch": matrix}, ["a", "b", "c"], "C")
    assert matrix.sum() == 14
    first, second = grids(figure)
    assert first.get_title() == "held out: photo"
    assert (first.get_ylabel(), first.get_xlabel()) == ("true class", "predicted class")
    numbers = {text.get_position(): text.get_text() for text in second.texts}
    row = {(0, 0): "80", (1, 0): "20", (2, 0): "0", (0, 2): "25", (1, 2): "25", (2, 2): "50"}
    assert numbers == row  # (column, row); nothing in the empty row
    assert first.images[0].get_clim() == (0, 100)
    for count, shape in ((3, (1, 3)), (4, (2, 2)), (5, (2, 3))):
        panels = v.confusion_matrices({str(i): matrix for i in range(count)}, ["a", "b", "c"], "C")
        assert panels.axes[0].get_subplotspec().get_gridspec().get_geometry() == shape


def test_difference_plot_shows_points_intervals_and_numbers():
    table = differences(group=["a", "b", "a"])
    figure = v.difference_plot(table, "D")
    (ax,) = figure.axes
    zero, *rest = ax.lines
    assert list(zero.get_xdata()) == [0, 0]
    for row, (interval, mean) in enumerate(zip(rest[::2], rest[1::2], strict=True)):
        np.testing.assert_allclose(interval.get_xdata(), 100 * table.loc[row, ["low", "high"]].to_numpy(float))
        np.testing.assert_allclose([*mean.get_xdata(), *mean.get_ydata()], [100 * table.loc[row, "mean"], row])
    assert rest[1].get_marker() == rest[5].get_marker() != rest[3].get_marker()
    texts = [text.get_text() for text in ax.texts]
    assert texts == ["+1.20 [-0.10, +2.50]", "-20.00 [-31.00, -10.00]", "+0.00 [+0.00, +0.00]", "mean [low, high]"]
    assert ax.yaxis_inverted()
    assert "points" in ax.get_xlabel()
    table[["low", "high"]] = np.nan
    assert v.difference_plot(table, "D").axes[0].texts[0].get_text() == "+1.20"


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_projection_is_the_same_every_time_and_takes_from_every_class(method, tmp_path):
    features, labels, domains = points(400)
    copy, state = features.clone(), np.random.get_state()[1].copy()
    for name in ("a.png", "b.png"):
        figure = v.feature_projection(features, labels, domains, CLASSES, DOMAINS, "P", method, max_points=90)
        v.save(figure, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert torch.equal(features, copy)
    assert np.array_equal(np.random.get_state()[1], state)
    for ax, names, index in zip(figure.axes, (DOMAINS, CLASSES), (domains, labels), strict=True):
        assert [text.get_text() for text in ax.get_legend().get_texts()] == names
        parts = [len(part.get_offsets()) for part in ax.collections]
        assert sum(parts) == 90
        expected = np.bincount(index, minlength=len(names)) * 90 / 400
        assert min(parts) > 0
        if names is DOMAINS:
            np.testing.assert_allclose(parts, expected, atol=1)
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
    with pytest.raises(ValueError, match="method"):
        v.feature_projection(features, labels, domains, CLASSES, DOMAINS, "P", "umap")


def test_tsne_of_very_few_points():
    features, labels, domains = points(5)
    figure = v.feature_projection(features, labels, domains, CLASSES, DOMAINS, "P")
    assert "5 of 5 images" in figure.axes[0].get_title()


@pytest.mark.parametrize("features", [np.zeros((30, 5)), np.arange(30.0)[:, None]])
def test_what_has_no_projection_is_refused(features):
    """Equal points make scikit-learn's t-SNE crash the process."""
    labels = np.zeros(30, int)
    for method in ("tsne", "pca"):
        with pytest.raises(ValueError, match="projection"):
            v.feature_projection(features, labels, labels, ["a"], ["b"], "P", method)


def test_numbers_that_are_not_known_are_not_written(monkeypatch):
    table = differences()
    table[["mean", "low", "high"]] = np.nan
    bars = bars_table(["erm"], ["a", "b"])
    bars.loc[0, ["mean", "low", "high"]] = np.nan
    for figure in (v.difference_plot(table, "D"), v.accuracy_bars(bars, "A")):
        assert not any("nan" in text for text, _, _ in drawn_texts(figure, monkeypatch))


def test_sample_sheet_places_images_by_domain_and_class():
    red, green = Image.new("RGB", (30, 20), "red"), np.full((20, 30, 3), [0, 255, 0], np.uint8)
    figure = v.sample_sheet({"photo": {"dog": red, "cat": green}, "sketch": {"cat": Image.new("L", (9, 9), 7)}}, "S")
    axes = np.array(figure.axes).reshape(2, 2)
    assert [ax.get_title() for ax in axes[0]] == ["dog", "cat"]
    assert [ax.get_ylabel() for ax in axes[:, 0]] == ["photo", "sketch"]
    assert axes[0, 0].images[0].get_array()[0, 0].tolist() == [255, 0, 0]
    assert axes[0, 1].images[0].get_array()[0, 0].tolist() == [0, 255, 0]
    assert axes[1, 1].images[0].get_array()[0, 0].tolist() == [7, 7, 7]
    assert not axes[1, 0].images


def test_overlap_matrix_names_and_marks_chance():
    values = np.array([[1.0, 0.25], [0.5, 1.0]])
    figure = v.overlap_matrix(values, ["a", "b"], "Overlap of masks", chance=0.43)
    ax, bar = figure.axes
    numbers = {text.get_position(): text.get_text() for text in ax.texts}
    assert numbers == {(0, 0): "1.00", (1, 0): "0.25", (0, 1): "0.50", (1, 1): "1.00"}
    assert figure.get_suptitle() == "Overlap of masks\n(chance 0.43)"
    assert any(set(line.get_ydata()) == {0.43} for line in bar.lines)
    assert ax.images[0].get_clim() == (0, 1)


def test_curves_by_setting():
    table = sweep([60, 20, 40])
    baselines = {"erm": (0.7, 0.68, 0.73), "majority": (0.2, np.nan, np.nan)}
    figure = v.accuracy_curves_by_setting(table, "setting", "S", "kept (%)", baselines, default=60)
    (ax,) = figure.axes
    first, _, erm, majority, default = ax.lines
    assert list(first.get_xdata()) == [20, 40, 60]
    np.testing.assert_allclose(first.get_ydata(), [100 * (0.6 + 1 / 9), 100 * (0.6 + 2 / 9), 60])
    assert (erm.get_ydata()[0], majority.get_ydata()[0], default.get_xdata()[0]) == pytest.approx((70, 20, 60))
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((57, 80))
    (span,) = ax.patches
    assert (span.get_y(), span.get_height()) == pytest.approx((68, 5))
    assert [t.get_text() for t in figure.legends[0].get_texts()][2:] == ["erm", "majority", "default (60)"]
    (ax,) = v.accuracy_curves_by_setting(sweep(["sum", "mean"]), "setting", "S", "how", default="mean").axes
    assert [label.get_text() for label in ax.get_xticklabels()] == ["sum", "mean"]
    assert list(ax.lines[-1].get_xdata()) == [1, 1]


def test_a_saved_file_is_complete_the_same_each_time_and_without_dates(tmp_path, monkeypatch):
    path = tmp_path / "new" / "figure.png"
    v.save(FIGURES["overlap"](), path)
    first = path.read_bytes()
    figure = FIGURES["overlap"]()
    v.save(figure, path)
    v.save(figure, path)
    assert path.read_bytes() == first
    with Image.open(path) as image:
        assert image.info.keys() <= {"dpi"}
        assert image.info["dpi"] == pytest.approx((120, 120), abs=0.1)
    monkeypatch.setattr(figure, "savefig", lambda file, **_: (Path(file).write_bytes(b"half"), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        v.save(figure, path)
    assert path.read_bytes() == first
    assert [file.name for file in path.parent.iterdir()] == ["figure.png"]


def test_style_of_the_user_neither_matters_nor_changes(tmp_path):
    v.save(FIGURES["curves"](), tmp_path / "a.png")
    with matplotlib.rc_context({"text.color": "red", "axes.facecolor": "black", "font.size": 20, "axes.grid": True}):
        v.save(FIGURES["curves"](), tmp_path / "b.png")
        assert matplotlib.rcParams["font.size"] == 20
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_notebooks_show_a_figure_once():
    from IPython.core.formatters import DisplayFormatter

    data, _ = DisplayFormatter().format(FIGURES["overlap"]())
    assert data["image/png"].startswith(b"\x89PNG")
    assert "text/html" not in data


def test_no_pyplot_no_backend_no_output(tmp_path):
    code = f"""
import sys, matplotlib, numpy as np, visualization as v
assert "sklearn" not in sys.modules and "torch" not in sys.modules
v.save(v.weight_grids([np.eye(3)], "W"), {str(tmp_path / "w.png")!r})
v.overlap_matrix(np.eye(3), list("abc"), "O")._repr_png_()
v.training_curves({{"a": {{"loss": np.ones((3, 2))}}}}, "T")
assert "matplotlib.pyplot" not in sys.modules
assert matplotlib.get_backend(auto_select=False) is None
"""
    command, folder = [sys.executable, "-W", "error", "-c", code], Path(v.__file__).parent
    variables = {key: value for key, value in os.environ.items() if key != "MPLBACKEND"}
    run = subprocess.run(command, cwd=folder, capture_output=True, env=variables)
    assert (run.returncode, run.stdout, run.stderr) == (0, b"", b"")
