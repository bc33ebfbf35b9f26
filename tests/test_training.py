"""The stack against an ordinary PyTorch loop, and against itself."""

import math
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import features, plain_loop, problem
from sklearn.metrics import balanced_accuracy_score
from torch import nn

from captured import CapturedEngine
from config import InputError, Settings
from models import FeedforwardClassifier
from stacks import MatmulEngine, VmapEngine, scaled_update, step_with_rates
from training import (
    ENGINES,
    BatchOrder,
    Problem,
    TrainingFailedError,
    accuracies,
    count_correct,
    generator,
    predict,
    raise_failure,
    random_start,
    tracked,
    train,
)

SETTINGS = Settings.current(hidden_sizes=(6, 5, 4), batch_size=16)
SIZES = (8, 3, (6, 5, 4))
COMPILED = pytest.param("compiled", marks=pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler"))
every_engine = pytest.mark.parametrize("engine", ["matmul", "vmap", COMPILED, "captured"])


@pytest.fixture(autouse=True)
def recording_without_a_gpu(monkeypatch):
    """On a CPU a record that runs the function again is what a CUDA graph is on a GPU."""
    monkeypatch.setitem(ENGINES, "captured", partial(CapturedEngine, capture=lambda step: step))


def stack_start(seeds, variants=1):
    start = random_start(seeds, "start", SIZES)
    return {name: value.unsqueeze(1).repeat_interleave(variants, 1) for name, value in start.items()}


def run(data, seeds, variants=1, epochs=5, **options):
    rows = data.rows(data.domain_names, "in")
    order = BatchOrder(seeds, "all", rows)
    return train(data, stack_start(seeds, variants), order, SETTINGS, epochs=epochs, learning_rate=1e-2, **options)


def orders(data, seed, epochs):
    order = BatchOrder([seed], "all", data.rows(data.domain_names, "in"))
    return [order.next_epoch()[0] for _ in range(epochs)]


@every_engine
def test_a_stack_follows_the_plain_loop(engine):
    data = problem()
    epochs = math.ceil(50 / math.ceil(144 / 16))  # at least 50 steps
    result = run(data, [3], variants=2 if engine == "compiled" else 1, epochs=epochs, engine=engine)
    start = {name: value[0, 0] for name, value in stack_start([3]).items()}
    state, losses, right = plain_loop(data, start, orders(data, 3, epochs), SETTINGS, 1e-2)
    for name, value in state.items():
        torch.testing.assert_close(result.params[name][0, 0], value, rtol=0, atol=1e-9)
    np.testing.assert_allclose(result.loss[0, 0], losses, rtol=0, atol=1e-9)
    np.testing.assert_allclose(result.train_accuracy[0, 0], right)


@every_engine
def test_a_network_of_a_stack_follows_the_same_network_alone(engine):
    data = problem()
    together = run(data, [0, 1, 2, 7], variants=2, epochs=6, engine=engine)
    for index, seed in enumerate([0, 1, 2, 7]):
        alone = run(data, [seed], variants=2 if engine == "compiled" else 1, epochs=6, engine=engine)
        for variant in range(2):
            for name, value in alone.params.items():
                torch.testing.assert_close(together.params[name][index, variant], value[0, 0], rtol=0, atol=1e-9)
            assert torch.equal(together.correct[index, variant], alone.correct[0, 0])


@every_engine
def test_rates_scale_the_step_as_in_the_plain_loop(engine):
    data = problem()
    torch.manual_seed(1)
    marked = torch.rand(2, 2, 5, 6) > 0.5  # two seeds, two variants

    def rates(epoch):
        low = 0.1 * 0.5**epoch if epoch < 3 else 0.0
        return {"layers.1.weight": torch.where(marked, 1.0, low).double()}

    result = run(data, [0, 1], variants=2, epochs=6, rates=rates, engine=engine)
    for s in range(2):
        for v in range(2):

            def scale(epoch, name, s=s, v=v):
                return rates(epoch)[name][s, v] if name == "layers.1.weight" else None

            start = {name: value[s, v] for name, value in stack_start([0, 1], 2).items()}
            state, _, _ = plain_loop(data, start, orders(data, s, 6), SETTINGS, 1e-2, scale)
            for name, value in state.items():
                torch.testing.assert_close(result.params[name][s, v], value, rtol=0, atol=1e-9)


@every_engine
def test_rate_one_is_plain_adam_bit_for_bit(engine):
    data = problem(dtype=torch.float32)
    ones = {f"layers.{i}.weight": torch.ones(()) for i in (1, 2)}
    with_rates = run(data, [0, 1], rates=lambda epoch: ones, engine=engine)
    without = run(data, [0, 1], engine=engine)
    for name, value in without.params.items():
        assert torch.equal(with_rates.params[name], value)


@every_engine
def test_rate_zero_keeps_every_bit_and_the_rest_learns(engine):
    data = problem(dtype=torch.float32)
    result = run(data, [0, 1], rates=lambda epoch: {"layers.1.weight": torch.zeros(())}, engine=engine)
    start = stack_start([0, 1])
    for name, value in result.params.items():
        same = value == start[name]
        assert same.all() if name == "layers.1.weight" else not same.any(-1).all()


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD, torch.optim.AdamW])
def test_a_rate_of_a_tenth_is_a_tenth_of_the_step(optimizer):
    torch.manual_seed(0)
    full, tenth = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()
    tenth.load_state_dict(full.state_dict())
    start = full.weight.detach().clone()
    x = torch.randn(5, 4, dtype=torch.float64)
    for layer, rates in ((full, {}), (tenth, {tenth.weight: torch.full((3, 4), 0.1).double()})):
        step = optimizer(layer.parameters(), lr=0.05)
        layer(x).square().sum().backward()
        step_with_rates(step, rates)
    assert (full.weight - start).abs().min() > 0
    torch.testing.assert_close(tenth.weight - start, 0.1 * (full.weight - start), rtol=1e-6, atol=1e-12)
    assert torch.equal(tenth.bias, full.bias)


def test_scaling_gradients_is_no_learning_rate_under_adam():
    """The mistake this project exists to avoid: Adam undoes a factor on the gradient."""
    weights = []
    for factor in (1.0, 0.1):
        w = nn.Parameter(torch.ones(3, dtype=torch.float64))
        optimizer = torch.optim.Adam([w], lr=0.1)
        w.grad = factor * torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
        optimizer.step()
        weights.append(w.detach())
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-7)


numbers = st.floats(-1e6, 1e6, width=32)


@given(numbers, numbers, st.floats(0, 1, width=32))
def test_scaled_update(old, new, rate):
    result = scaled_update(*(torch.tensor(v, dtype=torch.float32) for v in (old, new, rate)))
    expected = {0.0: old, 1.0: new}.get(rate)
    if expected is not None:
        assert result == expected
    else:
        bound = 1e-5 * max(abs(old), abs(new), 1e-30)
        assert min(old, new) - bound <= result <= max(old, new) + bound


def test_a_frozen_weight_survives_an_update_that_is_not_finite():
    old, new = torch.tensor([1.0, 1.0]), torch.tensor([math.nan, math.inf])
    assert torch.equal(scaled_update(old, new, torch.zeros(2)), old)


def test_a_network_that_diverges_is_named_and_harms_no_other():
    data = problem()
    start = stack_start([0, 1, 2])
    broken = {name: value.clone() for name, value in start.items()}
    broken["layers.0.weight"][1] = math.inf
    results = [
        train(
            data,
            parameters,
            BatchOrder([0, 1, 2], "all", data.rows(data.domain_names, "in")),
            SETTINGS,
            epochs=2,
            learning_rate=1e-2,
        )
        for parameters in (start, broken)
    ]
    assert results[0].failed.flatten().tolist() == [0, 0, 0]
    assert results[1].failed.flatten().tolist() == [0, 1, 0]
    for name, value in results[0].params.items():
        torch.testing.assert_close(results[1].params[name][[0, 2]], value[[0, 2]], rtol=0, atol=1e-12)


def test_failures_are_raised_with_their_names():
    with pytest.raises(
        TrainingFailedError, match="Phase 1, domain art, seed 5: the loss is no longer finite in epoch 3"
    ):
        raise_failure(torch.tensor([0, 3]), [4, 5], "Phase 1, domain art")
    with pytest.raises(TrainingFailedError, match="holdout b, seed 4: the importance is all equal"):
        raise_failure(torch.tensor([[0, -1], [0, 0]]), [4, 5], "holdout b")
    raise_failure(torch.zeros(2, 2), [4, 5], "anything")


def test_generators_are_repeatable_and_independent():
    def draw(*which):
        return torch.rand(4, generator=generator(*which)).tolist()

    streams = [(0, "order", "a"), (1, "order", "a"), (0, "order", "b"), (0, "noise", "a"), (0, "start")]
    draws = [draw(*which) for which in streams]
    assert draws == [draw(*which) for which in streams]
    assert len({tuple(d) for d in draws}) == len(streams)


def test_random_start_is_the_linear_layers_own_and_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    start = random_start([4, 9], "start", SIZES)
    assert torch.equal(before, torch.random.get_rng_state())
    with torch.random.fork_rng():
        torch.manual_seed(generator(9, "start").initial_seed())
        own = FeedforwardClassifier(8, 3, (6, 5, 4)).state_dict()
    assert all(torch.equal(start[name][1], value) for name, value in own.items())
    fresh = random_start([9], "fresh_start", SIZES)
    assert not torch.equal(fresh["layers.0.weight"][0], start["layers.0.weight"][1])


def test_every_epoch_meets_every_row_once_in_a_new_order():
    rows = torch.arange(100, 130)
    order = BatchOrder([0, 1], "x", rows)
    epochs = [order.next_epoch() for _ in range(3)]
    for epoch in epochs:
        assert torch.equal(epoch.sort(1).values, rows.expand(2, -1))
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[0][0], epochs[0][1])
    assert torch.equal(BatchOrder([1], "x", rows).next_epoch()[0], epochs[0][1])


def test_tracked_matrices_lie_between_hidden_layers():
    params = random_start([0, 1], "start", SIZES)
    assert [tuple(layer.shape) for layer in tracked(params, SIZES[2])] == [(2, 5, 6), (2, 4, 5)]


def test_counts_and_accuracies_against_sklearn():
    data = problem(per_cell=13)
    params = {name: value.double() for name, value in stack_start([0, 1], 2).items()}
    predicted = predict(params, data.features, (6, 5, 4))
    counted = count_correct(MatmulEngine(FeedforwardClassifier(8, 3, (6, 5, 4)), params), data)
    for balanced in (False, True):
        values = accuracies(counted, data.totals, balanced)
        for d in range(3):
            for part, rows in {
                "full": data.domains == d,
                "in": (data.domains == d) & data.inside,
                "out": (data.domains == d) & ~data.inside,
            }.items():
                for s, v in np.ndindex(2, 2):
                    true, guess = data.labels[rows].numpy(), predicted[s, v, rows].numpy()
                    expected = balanced_accuracy_score(true, guess) if balanced else (true == guess).mean()
                    assert float(values[part][s, v, d]) == pytest.approx(expected)


@pytest.mark.parametrize("engine", [VmapEngine, MatmulEngine])
def test_answers_are_the_modules_and_do_not_depend_on_the_pieces(engine, monkeypatch):
    data = problem()
    params = {name: value.double() for name, value in stack_start([0, 1], 2).items()}
    template = FeedforwardClassifier(8, 3, (6, 5, 4)).double()
    stack = engine(template, params)
    classes, right, counts = (
        stack.classify(data.features),
        stack.right(data.features, data.labels),
        count_correct(stack, data),
    )
    for s, v in np.ndindex(2, 2):
        template.load_state_dict({name: value[s, v] for name, value in params.items()})
        assert torch.equal(classes[s, v], template(data.features).argmax(1))
    assert torch.equal(right, classes == data.labels)
    assert torch.equal(counts.sum((2, 3, 4)), right.sum(-1))
    monkeypatch.setattr("stacks.PIECE_FLOATS", 100)
    assert torch.equal(count_correct(stack, data), counts)
    assert torch.equal(predict(params, data.features, (6, 5, 4)), classes)


@pytest.mark.parametrize("sizes", [(10,) * 5, (10,) * 4, (7, 5, 9), (3, 4)])
def test_the_engines_agree_for_every_shape_and_a_short_last_batch(sizes):
    settings = Settings.current(hidden_sizes=sizes, batch_size=20)
    data = problem(classes=("a", "b", "c", "d"), per_cell=9)
    start = {
        n: v.unsqueeze(1).repeat(1, 3, *[1] * (v.ndim - 1)) for n, v in random_start([0, 5], "x", (8, 4, sizes)).items()
    }
    rate = {"layers.1.weight": torch.rand(2, 3, sizes[1], sizes[0], dtype=torch.float64)}
    results = []
    for engine in ("matmul", "vmap"):
        order = BatchOrder([0, 5], "all", data.rows(data.domain_names, "in"))
        options = {"epochs": 10, "learning_rate": 1e-2, "rates": lambda epoch: rate, "engine": engine}
        results.append(train(data, start, order, settings, **options))
    a, b = results
    for name in start:
        torch.testing.assert_close(a.params[name], b.params[name], rtol=0, atol=1e-9)
    torch.testing.assert_close(a.loss, b.loss, rtol=0, atol=1e-9)
    assert torch.equal(a.train_accuracy, b.train_accuracy)
    assert torch.equal(a.correct, b.correct)


def test_rows_and_totals_of_a_problem():
    data = problem(domains=("a", "b"), per_cell=10)
    assert data.sources("a") == ("b",)
    assert len(data.rows(["a"], "all")) == 30
    assert len(data.rows(["a"], "in")) == 24
    assert not set(data.rows(["a", "b"], "in").tolist()) & set(data.rows(["a", "b"], "out").tolist())
    assert data.totals.tolist() == [[[8] * 3, [2] * 3]] * 2


def test_a_domain_too_small_to_split_is_refused():
    with pytest.raises(InputError, match="too few images"):
        Problem.from_features(features(per_cell=2), SETTINGS)
