"""The stack of classifiers against the plain loop `trainer_phase1.train_network`, and against itself."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from engine import BatchOrder, MatmulEngine, classify, generator, random_start, train
from models import FeedforwardClassifier
from tests.factories import split_blobs
from trainer_phase1 import train_network

SIZES, SEEDS, BATCH, LEARNING_RATE = (6, 5, 4), [3, 7], 20, 1e-2
EPOCHS = 7  # of eight steps, the last on four rows only: 56 steps


@pytest.fixture(scope="module")
def data():
    return split_blobs()


@pytest.fixture(scope="module")
def single():
    """The same in float32, to compare bits."""
    return split_blobs(dtype=torch.float32)


def start_of(data, seeds, arms=None, sizes=SIZES):
    """A start for each seed, the same for all of its arms: ``[S, …]``, or ``[S, V, …]``."""
    start = random_start(seeds, "start", data.network(sizes))
    start = {name: value.to(data.features) for name, value in start.items()}
    return start if arms is None else {n: v.unsqueeze(1).repeat_interleave(arms, 1) for n, v in start.items()}


def order_of(data, seeds):
    return BatchOrder(seeds, "test", data.rows(data.domain_names, "in", seeds), BATCH)


def run(data, start, seeds=SEEDS, epochs=EPOCHS, **options):
    return train(data, MatmulEngine(start, LEARNING_RATE), seeds, order_of(data, seeds), epochs, **options)


def plain(data, start, seed, sizes=SIZES, rates=lambda epoch: {}):
    """One network by the plain loop: its parameters, and loss and training accuracy of each epoch."""
    network = FeedforwardClassifier(8, 3, sizes).to(data.features)
    network.load_state_dict(start)
    order, logits = order_of(data, [seed]), []
    epochs = [[batch[0] for batch in order.next_epoch()] for _ in range(EPOCHS)]
    network.register_forward_hook(lambda module, inputs, output: logits.append(output.detach()))

    def by_parameter(epoch):
        return {network.get_parameter(name): rate for name, rate in rates(epoch).items()}

    train_network(network, data.features, data.labels, epochs, LEARNING_RATE, by_parameter)
    losses, shares = [], []
    for e, rows in enumerate(torch.cat(epoch) for epoch in epochs):
        answers = torch.cat(logits[e * len(logits) // EPOCHS : (e + 1) * len(logits) // EPOCHS])
        losses.append(float(F.cross_entropy(answers, data.labels[rows])))
        shares.append(float((answers.argmax(1) == data.labels[rows]).double().mean()))
    return network.state_dict(), losses, shares


@pytest.mark.parametrize(
    ("sizes", "arms"), [((10,) * 5, None), ((10,) * 5, 3), ((10,) * 4, 1), ((7, 5, 9), 3), ((3, 4), None)]
)
def test_a_stack_with_rates_follows_the_plain_loop(data, sizes, arms):
    start, network = start_of(data, SEEDS, arms, sizes), data.network(sizes)
    draw = generator(0, "rates")
    drawn = {name: torch.rand(start[name].shape, generator=draw).double() for name in network.tracked_names}
    drawn["layers.0.bias"] = torch.rand(start["layers.0.bias"].shape, generator=draw).double()

    def rates(epoch):  # a third is 0, a third 1, and the rest decays
        return {name: (3 * rate - 1).clamp(0, 1) ** (1 + epoch) for name, rate in drawn.items()}

    stack = run(data, start, rates=rates)
    for index in np.ndindex(*stack.loss.shape[:-1]):
        one = {name: value[index] for name, value in start.items()}
        state, losses, shares = plain(
            data, one, SEEDS[index[0]], sizes, lambda epoch, at=index: {n: r[at] for n, r in rates(epoch).items()}
        )
        for name, value in state.items():
            torch.testing.assert_close(stack.params[name][index], value, rtol=0, atol=1e-9)
        np.testing.assert_allclose(stack.loss[index], losses, rtol=0, atol=1e-9)
        np.testing.assert_allclose(stack.train_accuracy[index], shares)


def test_a_network_of_a_stack_follows_the_same_network_alone(data):
    seeds = [0, 1, 2, 7]
    together = run(data, start_of(data, seeds, arms=2), seeds)
    for s, seed in enumerate(seeds):
        alone = run(data, start_of(data, [seed]), [seed])
        for arm in range(2):
            for name, value in alone.params.items():
                torch.testing.assert_close(together.params[name][s, arm], value[0], rtol=0, atol=1e-9)
            assert torch.equal(together.correct[s, arm], alone.correct[0])


def test_rate_one_is_adam_without_rates_bit_for_bit(single):
    start = start_of(single, SEEDS)
    ones = {f"layers.{i}.weight": torch.ones(()) for i in (1, 2)}
    with_rates, without = run(single, start, rates=lambda epoch: ones), run(single, start)
    for name, value in without.params.items():
        assert torch.equal(with_rates.params[name], value)


def test_rate_zero_keeps_every_bit_and_the_rest_learns(single):
    start = start_of(single, SEEDS)
    frozen = run(single, start, rates=lambda epoch: {"layers.1.weight": torch.zeros(())} if epoch > 2 else {})
    before = run(single, start, epochs=3)
    for name, value in frozen.params.items():
        moved = (value != before.params[name]).double().mean()
        assert moved == 0 if name == "layers.1.weight" else moved > 0.5  # units that are dead by now stand still


def test_arms_of_equal_rates_are_equal_bit_for_bit(single):
    rate = torch.rand(2, 1, 5, 6, generator=generator(0, "rates")).expand(2, 3, 5, 6)
    stack = run(single, start_of(single, SEEDS, arms=3), rates=lambda epoch: {"layers.1.weight": rate})
    for value in stack.params.values():
        assert torch.equal(value[:, 0], value[:, 2])


def test_the_start_is_left_alone_and_parameters_keep_its_order_and_shapes(single):
    start = start_of(single, SEEDS, arms=2)
    before = {name: value.clone() for name, value in start.items()}
    stack = run(single, start, epochs=1)
    assert all(torch.equal(start[name], value) for name, value in before.items())
    assert [(name, value.shape) for name, value in stack.params.items()] == [(n, v.shape) for n, v in start.items()]


@pytest.mark.parametrize("piece", [2**20, 100])
def test_classes_are_those_of_the_module_however_many_rows_are_classified_at_a_time(data, piece, monkeypatch):
    monkeypatch.setattr("engine.loop.PIECE_FLOATS", piece)
    start, module = start_of(data, SEEDS, arms=2), FeedforwardClassifier(8, 3, SIZES).double()
    classes = classify(MatmulEngine(start), data, torch.arange(len(data.labels)))
    assert classes.shape == (2, 2, len(data.labels))
    for index in np.ndindex(2, 2):
        module.load_state_dict({name: value[index] for name, value in start.items()})
        assert torch.equal(classes[index], module(data.features).argmax(1))
