"""Figures of a transfer study: drawn from its tables, readable, and with the numbers that the tables hold."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.text import Text

from config import InputError
from tests.transfer.made_tables import MEANS, common_table
from transfer.claims import studies
from transfer.figures import all_figures, amount_by_cut, cut_boxes, difference_curves, save_all
from transfer.report import write
from transfer.statistics import tables

REPEATS = {0.01: 14, 0.1: 12, 1.0: 5}  # too few at 100 %
KINDS = ("boxes", "heatmap", "best", "budget", "weights")


@pytest.fixture(scope="module")
def table():
    original = common_table(REPEATS, others={}, task="second/toy", protocol="original", updates=(40,))
    return pd.concat([common_table(REPEATS), original])


@pytest.fixture(scope="module")
def folder(table, tmp_path_factory):
    place = tmp_path_factory.mktemp("transfer")
    write(place, table, {})
    return place


@pytest.fixture(scope="module")
def own(table):
    return next(own for title, own in studies(tables(table[table["task"] == "toy"])) if title == "toy")


def drawn_texts(figure, monkeypatch):
    """Every text that reaches the canvas, with its extents in pixels."""
    seen, draw = {}, Text.draw

    def record(self, renderer):
        draw(self, renderer)
        if self.get_text().strip() and self.get_visible():
            seen[id(self)] = (self.get_text(), np.array(self.get_window_extent(renderer).extents))

    FigureCanvasAgg(figure)
    with monkeypatch.context() as patch:
        patch.setattr(Text, "draw", record)
        figure.canvas.draw()
    return list(seen.values())


@pytest.mark.parametrize("name", [*(f"{kind}_toy" for kind in KINDS), "boxes_second_toy_original"])
def test_every_text_is_inside_and_none_lies_on_another(name, folder, monkeypatch):
    figure = dict(all_figures(folder))[name]()
    texts = drawn_texts(figure, monkeypatch)
    boxes = np.array([extents for _, extents in texts])
    size = figure.canvas.get_width_height()
    assert (boxes[:, :2] >= -1).all()
    assert (boxes[:, 2:] <= np.add(size, 1)).all()
    for i, (text, box) in enumerate(texts):
        for other, others in texts[:i]:
            overlap = np.minimum(box[2:], others[2:]) - np.maximum(box[:2], others[:2])
            assert (overlap <= 1).any(), f"{text!r} lies on {other!r}"
    assert figure.get_size_inches()[0] <= 6.75


def test_figures_are_those_of_each_task_and_are_not_drawn_again(folder, tmp_path):
    names = [name for name, _ in all_figures(folder)]
    assert names == [*(f"{kind}_toy" for kind in KINDS), *(f"{kind}_second_toy_original" for kind in KINDS[:4])]
    paths = save_all(folder, ["budget"])
    assert {path.name for path in paths} == {"budget_second_toy_original.png", "budget_toy.png"}
    before = [(path.stat().st_mtime_ns, path.read_bytes()) for path in paths]
    assert save_all(folder, ["budget"]) == paths
    assert [(path.stat().st_mtime_ns, path.read_bytes()) for path in paths] == before
    with pytest.raises(InputError, match="boxing"):
        save_all(folder, ["boxing"])
    with pytest.raises(InputError, match="--results-dir"):
        save_all(tmp_path)


def test_boxes_show_every_repeat_the_letters_and_what_cuts_are_compared_with(own):
    figure = cut_boxes(own["runs"], own["letters"], "Boxes")
    assert len(figure.axes) == 3
    for ax, (amount, repeats) in zip(figure.axes, REPEATS.items(), strict=True):
        points = [line for line in ax.lines if line.get_marker() == "o"]
        assert [len(line.get_ydata()) for line in points] == [repeats] * 4
        runs = own["runs"][own["runs"]["amount"] == amount]
        frozen = runs[(runs["arm"] == "frozen") & (runs["cut"] == 2)]["value"]
        assert sorted(points[2].get_ydata()) == pytest.approx(sorted(100 * frozen))
        (band,) = [patch for patch in ax.patches if to_hex(patch.get_facecolor()) == "#d9d9d9"]
        scratch = runs[runs["arm"] == "scratch"]["value"].quantile([0.25, 0.75])
        low = band.get_y() if hasattr(band, "get_y") else band.get_extents().y0
        assert low == pytest.approx(100 * scratch.iloc[0])
        said = [text.get_text() for text in ax.texts]
        letters = own["letters"][own["letters"]["amount"] == amount]["letters"].tolist()
        assert said == (["†"] * 4 if repeats == 5 else letters)
        assert f"n = {repeats}" in ax.get_title()


def test_boxes_leave_out_what_was_not_run(own):
    runs = own["runs"][own["runs"]["arm"] == "frozen"]
    letters = own["letters"][own["letters"]["cut"] > 0]
    figure = cut_boxes(runs, letters, "Without scratch and finetune")
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["1", "2", "3"]
    assert not [patch for patch in figure.axes[0].patches if to_hex(patch.get_facecolor()) == "#d9d9d9"]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert not any("finetune" in text for text in legend)


def test_the_heat_map_marks_what_is_not_rejected(own):
    contrasts = own["contrasts"].copy()
    weak = (contrasts["cut"] == 1) & (contrasts["amount"] == 0.1)
    contrasts.loc[weak, "p_holm"] = 0.2
    figure = amount_by_cut(own["letters"], contrasts, "Heat map")
    means, differences = figure.axes[:2]
    assert len(means.texts) == 12
    assert means.texts[2].get_text() == f"{100 * own['letters']['mean'].iloc[2]:.1f}"
    texts = np.array([text.get_text() for text in differences.texts]).reshape(3, 3)
    expected = [[f"{100 * row.mean:+.1f}".replace("-", "−") for row in rows.itertuples()]
                for _, rows in contrasts.sort_values(["amount", "cut"]).groupby("amount")]  # fmt: skip
    assert [text.split()[0] for text in texts.flat] == np.ravel(expected).tolist()
    assert [text[-1] == "·" for text in texts.flat] == [False] * 3 + [True] + [False] * 5
    assert [text[-1] == "†" for text in texts.flat] == [False] * 6 + [True] * 3
    assert [tick.get_text() for tick in differences.get_yticklabels()] == [
        "1 % (n = 14)",
        "10 % (n = 12)",
        "100 % (n = 5)",
    ]


def test_lines_of_cuts_are_told_apart_by_more_than_colour_and_have_one_scale(own):
    table = own["differences"][own["differences"]["arm"] == "frozen"]
    panels = {str(updates): rows for updates, rows in table.groupby("updates")}
    figure = difference_curves(panels, "Lines")
    for ax, rows in zip(figure.axes, panels.values(), strict=True):
        lines = [line for line in ax.lines if line.get_marker() != "None"]
        assert len({(line.get_marker(), line.get_linestyle()) for line in lines}) == 3
        one = rows[rows["cut"] == 2].sort_values("amount")
        assert lines[1].get_ydata() == pytest.approx((100 * one["mean"]).to_numpy())
        assert [float(tick.get_text()) for tick in ax.get_xticklabels()] == [100 * amount for amount in MEANS]
        assert len(ax.collections) == 3
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()


def test_a_study_of_one_repeat_is_drawn_as_far_as_it_goes(tmp_path):
    write(tmp_path, common_table(1), {})
    makers = dict(all_figures(tmp_path))
    assert [*makers] == [f"{kind}_toy" for kind in KINDS]
    figures = {name: makers[name]() for name in ("budget_toy", "best_toy", "heatmap_toy")}
    assert [text.get_text()[-1] for text in figures["heatmap_toy"].axes[1].texts] == ["†"] * 9
    bands = figures["budget_toy"].axes[0].collections
    assert all(not len(band.get_paths()[0].vertices) for band in bands if band.get_paths())
    assert not figures["best_toy"].axes[0].texts  # shares of resamples of one repeat say nothing
