"""The linear probe against a loop over scikit-learn, and what may not influence it."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from problems import problem as blobs_problem
from sklearn.linear_model import LogisticRegression

import probe
from probe import STRENGTHS, linear_probe

FEW = (1e-4, 1e-2, 1.0, 100.0)


def noisy_problem(seed=0, noise=2.5):
    """Classes that overlap, and domains of different sizes."""
    p = blobs_problem(per_cell=24, size=6, seed=seed)
    x = p.features + noise * torch.randn(p.features.shape, generator=torch.Generator().manual_seed(seed)).double()
    keep = (p.domains != 1) | (torch.arange(len(p.labels)) % 2 == 0)  # half of the second domain
    tensors = (t[keep] for t in (x, p.labels, p.domains, p.inside))
    return type(p)(*tensors, p.class_names, p.domain_names)


def by_hand(p, holdout, strengths):
    """(C, validation, pooled validation, full, in, out) from boolean masks."""
    x, y, d, inside = (t.numpy() for t in (p.features, p.labels, p.domains, p.inside))
    target = p.domain_names.index(holdout)
    train = (d != target) & inside
    tried = []
    for strength in strengths:
        model = LogisticRegression(C=strength, max_iter=10_000).fit(x[train], y[train])
        right = model.predict(x) == y
        each = [right[(d == source) & ~inside].mean() for source in range(len(p.domain_names)) if source != target]
        pooled = right[(d != target) & ~inside].mean()
        there = d == target
        parts = right[there].mean(), right[there & inside].mean(), right[there & ~inside].mean()
        tried.append((strength, np.mean(each), pooled, *parts))
    return tried[int(np.argmax([row[1] for row in tried]))]  # argmax takes the first of equals


@pytest.mark.parametrize("seed", range(3))
def test_the_probe_is_a_loop_over_logistic_regressions(seed):
    p = noisy_problem(seed)
    table = linear_probe(p, p.domain_names, FEW)
    assert table.index.tolist() == ["art", "photo", "sketch"]
    assert table.columns.tolist() == ["C", "validation", "full", "in", "out"]
    for holdout in p.domain_names:
        strength, validation, _, *parts = by_hand(p, holdout, FEW)
        row = table.loc[holdout]
        assert row["C"] == strength
        assert row["validation"] == pytest.approx(validation)
        assert row[["full", "in", "out"]].tolist() == pytest.approx(parts)
        assert 0.34 < row["full"] < 1  # neither chance nor perfect: the comparison means something


def test_validation_is_the_mean_over_sources_and_not_over_images():
    p = noisy_problem(0)
    _, mean, pooled, *_ = by_hand(p, "art", FEW)
    assert mean != pytest.approx(pooled, abs=1e-3)
    assert linear_probe(p, ["art"], FEW).loc["art", "validation"] == pytest.approx(mean)


def test_c_is_the_best_on_validation():
    p = noisy_problem(2)
    alone = [linear_probe(p, ["sketch"], [c]).loc["sketch", "validation"] for c in FEW]
    assert len(set(alone)) > 1
    both = linear_probe(p, ["sketch"], FEW).loc["sketch"]
    assert both["validation"] == max(alone)
    assert both["C"] == FEW[alone.index(max(alone))]


def test_the_smallest_of_equals_is_taken():
    p = blobs_problem(per_cell=10)
    strengths = (0.1, 1.0, 10.0)
    assert [linear_probe(p, ["art"], [c]).loc["art", "validation"] for c in strengths] == [1, 1, 1]
    assert linear_probe(p, ["art"], strengths).loc["art", "C"] == 0.1
    assert linear_probe(p, ["art"], strengths[::-1]).loc["art", "C"] == 0.1
    assert list(STRENGTHS) == sorted(STRENGTHS)
    np.testing.assert_allclose(STRENGTHS, [1e-4, 1e-3, 1e-2, 0.1, 1, 10, 100])


def test_the_held_out_domain_influences_neither_c_nor_the_fit(monkeypatch):
    fitted = []

    class Watched(LogisticRegression):
        def fit(self, x, y):
            super().fit(x, y)
            fitted.append(self.coef_.copy())
            return self

    monkeypatch.setattr(probe, "LogisticRegression", Watched)
    p = noisy_problem(1)
    away = p.domains == 2
    other = torch.randn(p.features.shape, generator=torch.Generator().manual_seed(9)).double()
    strange = replace(
        p,
        features=torch.where(away[:, None], 10 * other, p.features),
        labels=torch.where(away, (p.labels + 1) % 3, p.labels),
    )
    a, b = (linear_probe(q, ["sketch"], FEW).loc["sketch"] for q in (p, strange))
    assert (a["C"], a["validation"]) == (b["C"], b["validation"])
    assert a["full"] != b["full"]
    assert len(fitted) == 2 * len(FEW)
    for before, after in zip(fitted[: len(FEW)], fitted[len(FEW) :], strict=True):
        np.testing.assert_array_equal(before, after)


def test_the_out_images_of_the_sources_are_not_trained_on():
    p = noisy_problem(1)
    outside = (p.domains != 2) & ~p.inside
    strange = replace(p, labels=torch.where(outside, (p.labels + 1) % 3, p.labels))
    a, b = (linear_probe(q, ["sketch"], [1.0]).loc["sketch"] for q in (p, strange))
    assert a[["full", "in", "out"]].tolist() == b[["full", "in", "out"]].tolist()
    assert a["validation"] > b["validation"]


def test_twice_gives_the_same_and_holdouts_do_not_depend_on_each_other():
    p = noisy_problem(0)
    every = linear_probe(p, p.domain_names, FEW)
    pd.testing.assert_frame_equal(every, linear_probe(p, p.domain_names, FEW))
    pd.testing.assert_frame_equal(every.loc[["photo"]], linear_probe(p, ["photo"], FEW))
