"""The linear probe against a loop over scikit-learn, and what may not influence it."""

import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from config import InputError, Settings
from engine import SplitFeatures
from evidence.linear_probe import STRENGTHS, kept_probe, linear_probe, probe_words
from tests.factories import SMALL, blobs, make_run, save_blobs, split_blobs

PROBING = sys.modules["evidence.linear_probe"]  # the package has a function of this name
FEW = (1e-4, 1e-2, 1.0)  # so few that none is left out because two before it were no better


def noisy(seed=0, noise=2.5):
    """Classes that overlap, and domains of different sizes."""
    b = blobs(per_cell=24, size=6, seed=seed)
    b.features = b.features.double()
    b.features += noise * torch.randn(b.features.shape, generator=torch.Generator().manual_seed(seed)).double()
    keep = (b.domains != 1) | (torch.arange(len(b.labels)) % 2 == 0)  # half of the second domain
    b.features, b.labels, b.domains = (t[keep] for t in (b.features, b.labels, b.domains))
    b.files = tuple(file for file, kept in zip(b.files, keep.tolist(), strict=True) if kept)
    return SplitFeatures.from_features(b, Settings.current(), dtype=torch.float64)


def by_hand(data, holdout, strengths, seed=0):
    """(C, validation, pooled validation, full, in, out) from boolean masks."""
    x, y, d, inside = (t.numpy() for t in (data.features, data.labels, data.domains, data.inside([seed])[0]))
    target = data.domain_names.index(holdout)
    train = (d != target) & inside
    tried = []
    for strength in strengths:
        model = LogisticRegression(C=strength, max_iter=10_000, tol=1e-8).fit(x[train], y[train])
        right = model.predict(x) == y
        each = [right[(d == source) & ~inside].mean() for source in range(len(data.domain_names)) if source != target]
        pooled = right[(d != target) & ~inside].mean()
        there = d == target
        parts = right[there].mean(), right[there & inside].mean(), right[there & ~inside].mean()
        tried.append((strength, np.mean(each), pooled, *parts))
    return tried[int(np.argmax([row[1] for row in tried]))]  # argmax takes the first of equals


@pytest.mark.parametrize("seed", range(3))
def test_the_probe_is_a_loop_over_logistic_regressions(seed):
    data = noisy(seed)
    table = linear_probe(data, data.domain_names, strengths=FEW)
    assert table.index.tolist() == ["art", "photo", "sketch"]
    assert table.columns.tolist() == ["C", "validation", "full", "in", "out"]
    for holdout in data.domain_names:
        strength, validation, _, *parts = by_hand(data, holdout, FEW)
        row = table.loc[holdout]
        assert row["C"] == strength
        assert row["validation"] == pytest.approx(validation)
        assert row[["full", "in", "out"]].tolist() == pytest.approx(parts)
        assert 0.34 < row["full"] < 1  # neither chance nor perfect: the comparison means something


@pytest.mark.parametrize(("split", "same"), [(0, True), ("seed", False)])
def test_the_split_is_that_of_the_seed(split, same):
    data = replace(noisy(1), split_seed=split)
    first, second = (linear_probe(data, ["photo"], seed, FEW).loc["photo"] for seed in (0, 5))
    assert second[["full", "in", "out"]].tolist() == pytest.approx(by_hand(data, "photo", FEW, seed=5)[3:])
    assert first.equals(second) == same
    assert linear_probe(data, ["photo"], strengths=FEW).loc["photo"].equals(first)


def test_validation_is_the_mean_over_sources_and_not_over_images():
    data = noisy(0)
    _, mean, pooled, *_ = by_hand(data, "art", FEW)
    assert mean != pytest.approx(pooled, abs=1e-3)
    assert linear_probe(data, ["art"], strengths=FEW).loc["art", "validation"] == pytest.approx(mean)


def test_c_is_the_best_on_validation():
    data = noisy(2)
    alone = [linear_probe(data, ["sketch"], strengths=[c]).loc["sketch", "validation"] for c in FEW]
    assert len(set(alone)) > 1
    both = linear_probe(data, ["sketch"], strengths=FEW).loc["sketch"]
    assert both["validation"] == max(alone)
    assert both["C"] == FEW[alone.index(max(alone))]


def test_the_smallest_of_equals_is_taken():
    data, strengths = split_blobs(per_cell=10), (0.1, 1.0, 10.0)
    assert [linear_probe(data, ["art"], strengths=[c]).loc["art", "validation"] for c in strengths] == [1, 1, 1]
    assert linear_probe(data, ["art"], strengths=strengths).loc["art", "C"] == 0.1
    assert linear_probe(data, ["art"], strengths=strengths[::-1]).loc["art", "C"] == 0.1
    assert list(STRENGTHS) == sorted(STRENGTHS)
    np.testing.assert_allclose(STRENGTHS, [1e-4, 1e-3, 1e-2, 0.1, 1, 10, 100])


@pytest.fixture
def fitted(monkeypatch):
    """Coefficients of every logistic regression that is fitted."""
    found, fit = [], LogisticRegression.fit

    def watched(self, x, y):
        fit(self, x, y)
        found.append(self.coef_.copy())
        return self

    monkeypatch.setattr(LogisticRegression, "fit", watched)
    return found


def test_the_held_out_domain_influences_neither_c_nor_the_fit(fitted):
    data = noisy(1)
    away = data.domains == 2
    other = torch.randn(data.features.shape, generator=torch.Generator().manual_seed(9)).double()
    strange = replace(data, features=torch.where(away[:, None], 10 * other, data.features), labels=moved(data, away))
    a, b = (linear_probe(d, ["sketch"], strengths=FEW).loc["sketch"] for d in (data, strange))
    assert (a["C"], a["validation"]) == (b["C"], b["validation"])
    assert a["full"] != b["full"]
    half = len(fitted) // 2
    assert half >= 3
    for before, after in zip(fitted[:half], fitted[half:], strict=True):
        np.testing.assert_array_equal(before, after)


def moved(data, rows):
    """Labels, those of some rows by one class off."""
    return torch.where(rows, (data.labels + 1) % 3, data.labels)


def test_the_out_images_of_the_sources_are_not_trained_on():
    data = noisy(1)
    outside = (data.domains != 2) & ~data.inside([0])[0]
    strange = replace(data, labels=moved(data, outside))
    a, b = (linear_probe(d, ["sketch"], strengths=[1.0]).loc["sketch"] for d in (data, strange))
    assert a[["full", "in", "out"]].tolist() == b[["full", "in", "out"]].tolist()
    assert a["validation"] > b["validation"]


def test_twice_gives_the_same_and_holdouts_do_not_depend_on_each_other():
    data = noisy(0)
    every = linear_probe(data, data.domain_names, strengths=FEW)
    pd.testing.assert_frame_equal(every, linear_probe(data, data.domain_names, strengths=FEW))
    pd.testing.assert_frame_equal(every.loc[["photo"]], linear_probe(data, ["photo"], strengths=FEW))


def test_the_gradient_is_zero_at_the_solution(fitted):
    data = noisy(0)
    linear_probe(data, ["art"], strengths=[1.0])
    rows = data.rows(["photo", "sketch"], "in", [0])[0].numpy()
    x, y = data.features.numpy()[rows], data.labels.numpy()[rows]
    LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000).fit(x, y)
    np.testing.assert_allclose(fitted[0], fitted[1], atol=1e-5)


def test_larger_c_are_not_tried_after_two_that_are_no_better(fitted):
    data = split_blobs(per_cell=10)  # the smallest C is right on every image
    linear_probe(data, ["art"], strengths=[0.1, 1.0, 10.0, 100.0, 1000.0])
    assert len(fitted) == 3


def test_a_fit_that_does_not_converge_is_an_error():
    with pytest.raises(RuntimeError, match="C = 1 "), pytest.warns(ConvergenceWarning):
        linear_probe(noisy(0), ["art"], strengths=[1.0], steps=1)


@pytest.mark.parametrize(("split", "splits"), [("seed", [*range(3, 13)]), (7, [7])])
def test_a_run_keeps_the_probe_of_its_first_splits(tmp_path, fitted, split, splits):
    features = save_blobs(tmp_path / "features.npz", per_cell=10)
    run = make_run(features, tmp_path / "run", seeds=range(3, 15), settings=replace(SMALL, split_seed=split))
    table = kept_probe(run)
    assert table.index.tolist() == [name for name in run.holdouts for _ in splits]
    assert table["split"].tolist() == splits * len(run.holdouts)
    for holdout in run.holdouts:
        chosen = linear_probe(run.data, [holdout], splits[0]).loc[holdout, "C"]
        assert set(table.loc[[holdout], "C"]) == {chosen}
        own = [linear_probe(run.data, [holdout], number, [chosen]).loc[holdout, "full"] for number in splits]
        assert table.loc[[holdout], "full"].tolist() == pytest.approx(own)
    assert fitted
    fitted.clear()
    again = kept_probe(make_run(features, tmp_path / "run", seeds=range(3, 15), settings=run.settings), ["sketch"])
    pd.testing.assert_frame_equal(again, table.loc[["sketch"]], check_dtype=False)
    assert not fitted


def test_a_damaged_file_is_refused_by_its_name(tmp_path):
    features = save_blobs(tmp_path / "features.npz", per_cell=10)
    run = make_run(features, tmp_path / "run")
    for text in ("", "holdout,split\nart,0\n", "\0"):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "linear_probe.csv").write_text(text)
        with pytest.raises(InputError, match=r"linear_probe\.csv"):
            kept_probe(run)


def test_many_images_are_sampled_evenly_and_the_words_say_so(monkeypatch):
    data = noisy(1)
    rows, seen = data.rows(["photo", "sketch"], "in", [0])[0], []
    fit = LogisticRegression.fit
    monkeypatch.setattr(LogisticRegression, "fit", lambda self, x, y: seen.append(x) or fit(self, x, y))
    table = pd.DataFrame({"split": [0]})
    assert "images" not in probe_words(table, data)
    monkeypatch.setattr(PROBING, "MOST_IMAGES", 24)
    assert len(rows) > 2 * 24
    linear_probe(data, ["art"], strengths=[1.0])
    assert "fitted to 24 images at most" in probe_words(table, data)
    taken = (data.features[:, None] == torch.from_numpy(seen[0])).all(-1).nonzero()[:, 0]
    assert set(taken.tolist()) <= set(rows.tolist())
    assert len(taken) == len(set(taken.tolist())) == 24
    for kind in (data.labels, data.domains):  # as common in the sample as among all images
        shares = [torch.bincount(kind[own], minlength=3) / len(own) for own in (taken, rows)]
        torch.testing.assert_close(*shares, rtol=0, atol=0.05)


def test_images_are_classified_in_pieces(monkeypatch):
    data = noisy(2)
    whole = linear_probe(data, ["art"], strengths=FEW)
    monkeypatch.setattr(PROBING, "PIECE", 7)
    pd.testing.assert_frame_equal(linear_probe(data, ["art"], strengths=FEW), whole)
