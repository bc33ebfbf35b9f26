"""Logistic regression for several penalties at once: scikit-learn's minimum, at any scale of the penalty."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from engine import fit_linear

STRENGTHS = (0.01, 1.0, 100.0)


def noisy(rows=240, columns=30, classes=4, seed=0):
    """Columns with means far from 0, of which a few say which class it is, with much noise."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=draw) + 3
    y = (x[:, :classes] + torch.randn(rows, classes, generator=draw)).argmax(1)
    return x, y


def by_sklearn(x, y, strength):
    return LogisticRegression(C=strength, tol=1e-10, max_iter=10_000).fit(x.double().numpy(), y.numpy())


@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_minimum_that_scikit_learn_finds(seed):
    x, y = noisy(seed=seed)
    fitted, fresh = fit_linear(x, y, 4, STRENGTHS), noisy(seed=seed + 10)[0]
    assert (fitted.weights.shape, fitted.biases.shape) == ((3, 4, 30), (3, 4))
    for number, strength in enumerate(STRENGTHS):
        expected = by_sklearn(x, y, strength)
        np.testing.assert_allclose(fitted.weights[number], expected.coef_, rtol=1e-3, atol=1e-4)
        biases = fitted.biases[number] - fitted.biases[number].mean()
        np.testing.assert_allclose(biases, expected.intercept_ - expected.intercept_.mean(), rtol=1e-3, atol=1e-3)
        for images in (x, fresh):
            assert (fitted.predict(images)[number].numpy() == expected.predict(images.double().numpy())).all()


def test_the_inverse_of_the_second_derivatives_changes_the_way_alone(monkeypatch):
    x, y = noisy()
    scales = torch.logspace(0, -2, x.shape[1])
    x = x * scales
    short = fit_linear(x, y, 4, STRENGTHS, steps=40)
    monkeypatch.setattr("engine.logistic.LARGEST_INVERSE", 0)
    with pytest.raises(RuntimeError, match="in 40 steps"):
        fit_linear(x, y, 4, STRENGTHS, steps=40)
    long = fit_linear(x, y, 4, STRENGTHS)
    torch.testing.assert_close(long.weights * scales, short.weights * scales, rtol=1e-3, atol=1e-3)
    assert torch.equal(long.predict(x), short.predict(x))


def test_a_penalty_does_not_depend_on_those_beside_it():
    x, y = noisy()
    together = fit_linear(x, y, 4, STRENGTHS)
    for number, strength in enumerate(STRENGTHS):
        alone = fit_linear(x, y, 4, [strength])
        torch.testing.assert_close(alone.weights[0], together.weights[number], rtol=1e-3, atol=1e-4)
    again = fit_linear(x, y, 4, STRENGTHS)
    assert torch.equal(again.weights, together.weights)


def test_more_columns_than_rows_and_classes_without_images():
    x, y = noisy(rows=25, columns=60, classes=3)
    fitted = fit_linear(x, y, 5, [1.0])
    assert (fitted.predict(x)[0] == y).all()
    np.testing.assert_allclose(fitted.weights[0].sum(0), np.zeros(60), atol=1e-4)


def test_a_column_of_zeros_has_no_weight():
    x, y = noisy()
    x[:, 7] = 0
    assert (fit_linear(x, y, 4, STRENGTHS).weights[..., 7] == 0).all()


def test_a_fit_that_does_not_converge_is_an_error():
    with pytest.raises(RuntimeError, match="in 2 steps"):
        fit_linear(*noisy(), 4, [1.0], steps=2)
