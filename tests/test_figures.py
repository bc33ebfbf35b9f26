"""The figures of whole runs that give little to draw."""

import logging

import numpy as np
import pytest
from problems import features as blobs

import config
import figures
from config import Settings
from feature_file import load_features, save_features
from records import Results
from study import Study

SETTINGS = {"hidden_sizes": (6, 5, 4), "ph1_num_epochs": 2, "ph2_num_epochs": 2}


def run(folder, size=8, scale=1.0, per_cell=10, **settings):
    d = blobs(per_cell=per_cell, size=size)
    path = folder / "blobs.safetensors"
    save_features(path, scale * d.features, d.labels, d.domains, d.class_names, d.domain_names, d.files)
    study = Study(load_features(path), Settings.current(**SETTINGS, **settings), Results(folder / "r"), range(2))
    study.phase1()
    study.phase2()
    return study


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setattr(config, "THREADS", 1)


def words(figure):
    return [text.get_text() for text in figure.texts]


@pytest.mark.parametrize(
    ("kind", "why"), [({"size": 1}, "two dimensions or more"), ({"scale": 0.0}, "features that are not all equal")]
)
def test_features_without_a_projection_are_told_and_all_other_figures_drawn(tmp_path, caplog, kind, why):
    study = run(tmp_path, **kind)
    assert any(why in text for text in words(figures.projection_figure(study)))
    with caplog.at_level(logging.WARNING):
        paths = figures.save_all(study)
    assert caplog.text == ""
    assert len(paths) == len(list(figures.all_figures(study))) == len(list((tmp_path / "r" / "plots").glob("*.png")))


def test_masks_that_mark_nothing_have_a_sentence_in_place_of_their_overlap(tmp_path):
    figure = figures.overlap_figure(run(tmp_path, importance_threshold_percentile=0.0))
    assert any("No mask marks a weight (0 % are kept)" in text for text in words(figure))
    assert not figure.axes


def test_a_figure_that_fails_is_named_and_the_others_are_drawn(tmp_path, monkeypatch, caplog):
    study = run(tmp_path)
    every = figures.save_all(study)
    for path in every:
        path.unlink()

    def fail(*_):
        raise np.linalg.LinAlgError("two\nlines")

    monkeypatch.setattr(figures, "overlap_figure", fail)
    (tmp_path / "r" / "plots" / "mask_overlap.png").write_text("of an earlier run")
    with caplog.at_level(logging.WARNING):
        paths = figures.save_all(study)
    assert set(every) - set(paths) == {tmp_path / "r" / "plots" / "mask_overlap.png"}
    assert all(path.is_file() for path in paths)
    assert not (set(every) - set(paths)).pop().exists()
    assert [r.getMessage() for r in caplog.records] == [
        "The figure 'mask_overlap' cannot be drawn (two lines); the others are."
    ]
