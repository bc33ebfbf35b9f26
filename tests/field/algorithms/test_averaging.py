"""Averages of weights: training is ERM's, and the average is that of plain lists of the weights of every step."""

import pytest
import torch

from engine import Batch
from field.algorithms.parts import flatten, unflatten

EARLY = [1.0, 0.6, 0.4, 0.5, 0.45, 0.5, 0.7, 0.8, 0.7, 0.9, 0.8, 0.7, 0.3, 0.3]  # ends while it trains, then falls
NEVER = [1.0 / (i + 1) for i in range(14)]  # each loss below the one before
LATE = [1.0, 0.8, 0.5, 0.52, 0.51, 0.5, 0.5, 0.6, 0.55, 0.6, 0.9, 0.9, 0.9, 0.9]  # too few above the threshold
AGAIN = [0.5, 0.6, 0.7, 0.9, 0.9, 0.9, 0.9, 0.9, 0.5, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9]  # five above, then six
TIE = [0.5, 0.5, 0.5, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.1]  # the first of equal losses is the least
SCRIPTS = {"early": EARLY, "never": NEVER, "late": LATE, "again": AGAIN, "tie": TIE}


def paper(losses, n_converge, n_tolerance, ratio):
    """Algorithm 1: first and last validation of the average, counted from 0; None if there is no average."""
    start, end, limit = None, len(losses) - 1, None
    for i in range(len(losses)):
        if limit is None:
            recent = losses[i - n_converge + 1 : i + 1] if i >= n_converge - 1 else []
            if recent and recent[0] == min(recent):
                start, limit = i - n_converge + 1, (1 + ratio) * sum(recent) / n_converge
        elif min(losses[max(0, i - n_tolerance + 1) : i + 1]) > limit:
            end = i - n_tolerance
            break
    return None if start is None else (start, end)


def driven(methods, losses, sizes, **values):
    """SWAD on one network, with a scripted loss after segments of `sizes` steps.

    Yields:
        After each loss: the method, its parameters and state, and a list of the weights of the steps for each segment.
    """
    swad, params = methods.make("SWAD", **values), methods.one_network()
    state, segments = swad.initial_state(params), []
    steps = iter(methods.batches(sum(sizes), seeds=(3,), balanced=False))
    for loss, size in zip(losses, sizes, strict=True):
        segments.append([])
        for _ in range(size):
            params, state, _ = swad.update(params, Batch(*(value[0] for value in next(steps))), state, {})
            segments[-1].append(flatten(params))
        state = {**state, **swad.validated(params, state, torch.tensor(loss, dtype=torch.float64))}
        yield swad, params, state, segments


@pytest.mark.parametrize("lengths", [(3, 6), (3, 2), (1, 1), (3, 3)])
@pytest.mark.parametrize("script", SCRIPTS)
def test_swad_averages_what_the_paper_does(methods, script, lengths):
    losses, values = SCRIPTS[script], dict(zip(("n_converge", "n_tolerance"), lengths, strict=True))
    sizes = [1 + i % 3 for i in range(len(losses))]
    runs = driven(methods, losses, sizes, learning_rate=0.05, **values)
    for end, (swad, params, state, segments) in enumerate(runs, start=1):  # training may end after any validation
        found, x = paper(losses[:end], *lengths, 0.3), methods.one_batch().features
        expected = flatten(params)
        if found:
            weights = [weight for segment in segments[found[0] : found[1] + 1] for weight in segment]
            expected = torch.stack(weights).mean(0)
            assert state["average_count"] == len(weights) >= state["settled"]["count"]
            assert torch.allclose(state["average"], expected, rtol=0, atol=1e-12)
        logits = swad.forward(unflatten(expected, params), x)
        assert torch.allclose(swad.logits(params, state, x), logits, rtol=0, atol=1e-11)


def test_the_scripts_are_what_they_are_called():
    """By hand, so that the reference itself is checked: the threshold of `EARLY` is 1.3 × 0.45 = 0.585."""
    assert {name: paper(losses, 3, 6, 0.3) for name, losses in SCRIPTS.items()} == {
        "early": (2, 5),
        "never": None,
        "late": (2, 13),
        "again": (0, 8),
        "tie": (0, 2),
    }


def test_the_tolerance_widens_the_valley(methods):
    for values, count in (({}, 4), ({"tolerance_ratio": 0.2}, 4), ({"tolerance_ratio": 0.6}, len(EARLY) - 2)):
        *_, (_, _, state, _) = driven(methods, EARLY, [1] * len(EARLY), **values)
        assert state["average_count"] == count


def test_training_is_erms_and_prediction_is_not(methods):
    of, x = methods.setup(steps_per_epoch=10, epochs=4), methods.batches(1)[0][0][0]
    values = {"learning_rate": 0.01, "weight_decay": 0.01}
    erm = methods.run("ERM", 40, of=of, **values)
    for name in ("SWAD", "WeightAverage"):
        ours = methods.run(name, 40, of=of, **values)
        assert all(torch.equal(ours.params[key], value) for key, value in erm.params.items())
        different = (ours.logits(x) - erm.logits(x)).abs().amax((1, 2)) > 1e-3
        averaged = ours.state["average_count"] > 0 if name == "SWAD" else torch.ones(3, dtype=torch.bool)
        assert averaged.any()
        assert torch.equal(different, averaged)
        assert name != "SWAD" or (ours.state["validations"] == 4 * 5).all()  # five an epoch


def test_each_network_of_a_stack_has_its_own_valley(methods):
    engine = methods.run("SWAD", 1, of=methods.setup(steps_per_epoch=10))  # one step: not validated yet
    for loss in zip(EARLY, NEVER, LATE, strict=True):
        losses = torch.tensor(loss, dtype=torch.float64)
        engine.state |= torch.func.vmap(engine.methods[0].validated)(engine.params, engine.state, losses)
    assert engine.state["start"].tolist() == [2, -1, 2]
    assert engine.state["dead"].tolist() == [True, False, False]
    assert engine.state["threshold"].tolist() == pytest.approx([1.3 * 0.45, float("inf"), 1.3 * 0.51])


@pytest.mark.parametrize(("start", "begin"), [(0.0, 1), (0.3, 3), (0.9, 9), (100 / 5001, 1)])
def test_the_average_is_of_every_step_from_its_start_on(methods, start, begin):
    average = methods.make("WeightAverage", start=start, learning_rate=0.05)
    params, x = methods.one_network(), methods.batches(1)[0][0][0]
    state, weights = average.initial_state(params), []
    for values in methods.batches(10, seeds=(3,), balanced=False):
        params, state, _ = average.update(params, Batch(*(value[0] for value in values)), state, {})
        weights.append(flatten(params))
        done = len(weights)
        expected = torch.stack(weights[begin - 1 :]).mean(0) if done >= begin else weights[-1]
        assert torch.allclose(state["average"], expected, rtol=0, atol=1e-12)
        logits = average.forward(unflatten(expected, params), x)
        assert torch.allclose(average.logits(params, state, x), logits, rtol=0, atol=1e-11)
