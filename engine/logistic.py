"""Logistic regression on thousands of columns, for several penalties at once.

`engine.logistic_regression` multiplies by matrices of second derivatives, which on 4,608 columns takes half a minute a
fit. Here L-BFGS (Nocedal & Wright, 2006, chapter 7) runs in float32 on all penalties together, so that they share the
two products with the data that a step costs. Logits are linear in the weights: the line search works on the logits and
on those of the direction, needs no further product, and takes the exact minimum by Newton's method. With up to
`LARGEST_INVERSE` columns L-BFGS begins with the inverse of the second derivatives at the start instead of the identity,
which saves most steps; with more, that costs more than it saves.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from engine.loop import TrainingFailedError

TOLERANCE = 1e-6  # largest component of the gradient of the mean loss plus penalty, at the end
STEPS = 5000  # of L-BFGS, at most
MEMORY = 10  # steps that L-BFGS remembers
SEARCHES = 8  # of Newton's method along a direction, at most
EXACT = 1e-3  # relative change of the length of a step, below which a line search ends
LARGEST_INVERSE = 2000  # columns up to which the matrix of second derivatives is inverted
REFRESH = 25  # steps after which the logits are computed anew, so that rounding does not add up

Pair = tuple[Tensor, Tensor]  # how parameters and gradient changed in a step


class Linear(NamedTuple):
    """P linear classifiers: ``weights`` float32 ``[P, classes, D]`` and ``biases`` ``[P, classes]``."""

    weights: Tensor
    biases: Tensor

    def predict(self, x: Tensor) -> Tensor:
        """Features ``[n, D]`` -> classes ``[P, n]``."""
        return (_products(self.weights, x) + self.biases[..., None]).argmax(1)


def fit_linear(
    x: Tensor, y: Tensor, classes: int, strengths: Sequence[float], tolerance: float = TOLERANCE, steps: int = STEPS
) -> Linear:
    """Multinomial logistic regression with the L2 penalty 1/(2C) on the weights, one classifier for each C.

    The minimum of C · Σ loss + ‖W‖²/2, as of scikit-learn's `LogisticRegression`; the biases are free of the penalty.
    Meant for columns of about one scale: others take many more steps.

    Args:
        x, y: float32 ``[n, D]`` and int64 ``[n]``, on one device.
        classes: number of them; y lies below.
        strengths: values of C, inverses of the penalty.
        tolerance: a fit ends when no component of the gradient of mean loss + ‖W‖²/(2Cn) exceeds it.
        steps: after which a fit is given up.

    Raises:
        TrainingFailedError: a fit did not converge.
    """
    middle = x.mean(0)
    design = torch.cat([x - middle, x.new_ones(len(x), 1)], dim=1)  # centred: then biases and weights do not interact
    penalties = x.new_tensor([1 / (c * len(x)) for c in strengths])[:, None, None].repeat(1, 1, design.shape[1])
    penalties[..., -1] = 0
    solved = _minimize(design.contiguous(), one_hot(y, classes).T.to(x), penalties, tolerance, steps)
    weights, biases = solved[..., :-1], solved[..., -1]
    return Linear(weights, biases - weights @ middle)


def _minimize(design: Tensor, wanted: Tensor, penalties: Tensor, tolerance: float, steps: int) -> Tensor:
    """Parameters ``[P, K, D]`` of least loss; a problem that has converged is left as it is."""
    params = design.new_zeros(len(penalties), len(wanted), design.shape[1])
    active, now, past = torch.arange(len(penalties), device=design.device), params.clone(), []
    logits, inverses = _products(now, design), _inverses(design, len(wanted), penalties)
    for step in range(1, steps + 1):
        gradient = _gradient(design, wanted, logits, now, penalties[active])
        past = [*past[:-1], (past[-1][0], gradient - past[-1][1])] if past else past  # it held the gradient before
        unfinished = ~(gradient.abs().amax((1, 2)) <= tolerance)  # also what is no number
        if not unfinished.all():
            params[active] = now
            active, now, logits, gradient = (t[unfinished] for t in (active, now, logits, gradient))
            inverses = None if inverses is None else inverses[unfinished]
            past = [(moved[unfinished], changed[unfinished]) for moved, changed in past]
            if not len(active):
                return params
        direction = -_two_loops(gradient, past, inverses)
        along = _products(direction, design)
        size = _line_search(wanted, logits, along, now, direction, penalties[active])
        now = now + size * direction
        logits = logits + size * along if step % REFRESH else _products(now, design)
        if not size.all():  # rounding has spoilt the direction: begin again with that of the gradient
            past = [(moved * (size > 0), changed) for moved, changed in past]
        past = [*past[-MEMORY + 1 :], (size * direction, gradient)]
    raise TrainingFailedError(f"Logistic regression did not converge in {steps} steps.")


def _inverses(design: Tensor, classes: int, penalties: Tensor) -> Tensor | None:
    """Inverse of the second derivatives of each problem where all classes are as likely, ``[P, D, D]``.

    There they are the same for every class, but for what moves all classes alike. None for too many columns.
    """
    if design.shape[1] > LARGEST_INVERSE:
        return None
    likely = (1 - 1 / classes) / classes
    bends = likely * (design.T @ design).double() / len(design) + torch.diag_embed(penalties[:, 0].double())
    return torch.cholesky_inverse(torch.linalg.cholesky(bends)).to(design)


def _products(params: Tensor, x: Tensor) -> Tensor:
    """``[P, K, D]`` and ``[n, D]`` -> ``[P, K, n]``, as one product; parameters first, which is much the faster way."""
    return (params.reshape(-1, params.shape[2]) @ x.T).view(*params.shape[:2], -1)


def _gradient(design: Tensor, wanted: Tensor, logits: Tensor, params: Tensor, penalties: Tensor) -> Tensor:
    """Of mean loss + penalty, ``[P, K, D]``."""
    errors = (logits.softmax(1) - wanted) / logits.shape[2]
    return _products(errors, design.T) + penalties * params


def _two_loops(gradient: Tensor, past: Sequence[Pair], inverses: Tensor | None) -> Tensor:
    """The gradient times L-BFGS's estimate of the inverse of the second derivatives, for each of P problems.

    The first estimate is a multiple of `inverses`, or of the identity. A step of length 0 says nothing.
    """
    bends = [_dot(moved, changed) for moved, changed in past]
    scales = [torch.where(bend > 0, 1 / bend, 0) for bend in bends]
    result, shares = gradient, []
    for (moved, changed), scale in zip(reversed(past), reversed(scales), strict=True):
        shares.append(_dot(moved, result) * scale)
        result = result - shares[-1] * changed
    result = result if inverses is None else result @ inverses
    if past:
        changed = past[-1][1]
        first = changed if inverses is None else changed @ inverses
        result = result * torch.where(bends[-1] > 0, bends[-1] / _dot(changed, first), 1)
    for (moved, changed), scale, share in zip(past, scales, reversed(shares), strict=True):
        result = result + moved * (share - _dot(changed, result) * scale)
    return result


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((1, 2), keepdim=True)


def _line_search(
    wanted: Tensor, logits: Tensor, along: Tensor, params: Tensor, direction: Tensor, penalties: Tensor
) -> Tensor:
    """How far to go for the least loss, ``[P, 1, 1]``: Newton's method, kept between the bounds of the zero."""
    n = logits.shape[2]
    curved = _dot(penalties * direction, direction)
    straight = _dot(penalties * params, direction)
    size, low, high = (torch.full_like(curved, start) for start in (0, 0, torch.inf))
    for _ in range(SEARCHES):
        chances = (logits + size * along).softmax(1)
        mean = (chances * along).sum(1, keepdim=True)
        slope = _dot(chances - wanted, along) / n + straight + size * curved
        bend = ((chances * along.square()).sum(1, keepdim=True) - mean.square()).sum((1, 2), keepdim=True) / n + curved
        low, high = torch.where(slope < 0, size, low), torch.where(slope > 0, size, high)
        newton, middle = size - slope / bend, torch.where(high.isinf(), 2 * size + 1, (low + high) / 2)
        before, size = size, torch.where((newton > low) & (newton < high), newton, middle)
        if ((size - before).abs() <= EXACT * size).all():
            break
    return size
