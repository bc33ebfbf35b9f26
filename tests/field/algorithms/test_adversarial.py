"""Domain-adversarial training against the same game in plain autograd, and its limits."""

import pytest
import torch
from torch.nn import functional as F

from engine import Batch, generator
from field.algorithms import ALGORITHMS
from field.algorithms.base import adam

KNOBS = {
    "adversary_weight": 0.7,
    "learning_rate": 0.01,
    "learning_rate_d": 0.02,
    "weight_decay": 0.03,
    "weight_decay_d": 0.05,
    "d_steps_per_g_step": 2,
    "grad_penalty": 0.4,
    "mlp_width": 7,
}


def reference_loss(network, batch, conditional):
    """(cross-entropy of the classes, loss of the discriminator) of one network, written out row by row."""
    x, labels, domains = batch
    for i in range(3):
        x = (x @ network[f"layers.{i}.weight"].T + network[f"layers.{i}.bias"]).clamp(min=0)
    logits = x @ network["layers.3.weight"].T + network["layers.3.bias"]
    read = x + network["class_embeddings"][labels] if conditional else x
    y = read
    for i in range(3):
        y = y @ network[f"discriminator.{i}.weight"].T + network[f"discriminator.{i}.bias"]
        y = y.clamp(min=0) if i < 2 else y
    each = -y.log_softmax(1)[torch.arange(len(y)), domains]
    if conditional:
        cells = list(zip(domains.tolist(), labels.tolist(), strict=True))
        loss = sum(value / (2 * 3 * cells.count(cell)) for value, cell in zip(each, cells, strict=True))
    else:
        loss = each.mean()
    (slope,) = torch.autograd.grad(each.sum(), read, create_graph=True)
    return F.cross_entropy(logits, labels), loss + KNOBS["grad_penalty"] * (slope**2).sum(1).mean()


@pytest.mark.parametrize("name", ["DANN", "CDANN"])
def test_it_is_the_game_in_plain_autograd(methods, name):
    start = methods.run(name, 0, (3,), **KNOBS)
    network = {key: value[0].clone().requires_grad_() for key, value in start.params.items()}
    players = [[v for n, v in network.items() if n.startswith("layers.") == own] for own in (True, False)]
    optimizers = [
        torch.optim.Adam(weights, lr=lr, weight_decay=decay, betas=(0.5, 0.9))
        for weights, lr, decay in zip(players, (0.01, 0.02), (0.03, 0.05), strict=True)
    ]
    for step, batch in enumerate(methods.batches(9, seeds=(3,))):
        classes, adversary = reference_loss(network, [value[0] for value in batch], name == "CDANN")
        own = step % 3 == 2
        weights, optimizer = (players[0], optimizers[0]) if own else (players[1], optimizers[1])
        gradient = torch.autograd.grad(classes - 0.7 * adversary if own else adversary, weights)
        for weight, value in zip(weights, gradient, strict=True):
            weight.grad = value
        optimizer.step()
    engine = methods.run(name, 9, (3,), **KNOBS)
    for key, value in network.items():
        assert torch.allclose(engine.params[key][0], value, rtol=0, atol=1e-9), key
        assert not torch.allclose(start.params[key][0], value, rtol=0, atol=1e-3), key


def test_without_adversary_the_classifier_is_erms_on_every_second_batch(methods):
    class SlowERM(ALGORITHMS["ERMBalanced"]):
        def update(self, params, batch, state, noise):
            gradient, loss, _ = self.gradients(params, batch, state, noise)
            new, moments = adam(params, gradient, state["adam"], self.learning_rate, betas=(0.5, 0.9))
            return new, {**state, "adam": moments}, loss

    erm = methods.engine(SlowERM(methods.setup()))
    for features, labels, domains in methods.batches(10)[1::2]:
        erm.step(features, labels, {}, domains)
    assert methods.same(methods.run("DANN", 10, adversary_weight=0.0), erm)
    assert not methods.same(methods.run("DANN", 10), erm, 1e-5)


def test_the_one_that_waits_keeps_weights_and_moments(methods):
    method = methods.make("CDANN", d_steps_per_g_step=2)
    params = methods.one_network() | {
        name: value.double() for name, value in method.extra_parameters(generator(3, "test")).items()
    }
    state, batch = method.initial_state(params), methods.one_batch()
    for step in range(6):
        before, (params, state, _) = (params, state), method.update(params, batch, state, {})
        own = step % 3 == 2
        for name, value in params.items():
            assert torch.equal(value, before[0][name]) == (name.startswith("layers.") != own), name
        for name, moves in (("adam", own), ("adversary_adam", not own)):
            assert all(torch.equal(state[name][key], before[1][name][key]) != moves for key in state[name])


def test_each_class_counts_the_same_in_both_domains(methods):
    labels, domains = torch.tensor([0, 0, 0, 1, 0, 1, 1, 2]), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    weights = methods.make("CDANN").row_weights(Batch(None, labels, domains), torch.zeros(1, dtype=torch.float64))
    wanted = torch.tensor([1 / 18, 1 / 18, 1 / 18, 1 / 6, 1 / 6, 1 / 12, 1 / 12, 1 / 6], dtype=torch.float64)
    assert torch.allclose(weights, wanted, rtol=0, atol=1e-12)


def test_the_discriminator_starts_as_linear_layers_do(methods):
    drawn = methods.make("CDANN", mlp_depth=4).extra_parameters(generator(3, "test"))
    widths = [4, 64, 64, 64, 2]
    for i in range(4):
        weight, bias = drawn[f"discriminator.{i}.weight"], drawn[f"discriminator.{i}.bias"]
        assert weight.shape == (widths[i + 1], widths[i])
        assert bias.shape == (widths[i + 1],)
        assert 0.9 * widths[i] ** -0.5 < weight.abs().max() <= widths[i] ** -0.5
        assert bias.abs().max() <= widths[i] ** -0.5
    assert drawn["class_embeddings"].shape == (3, 4)
    other = methods.make("CDANN", mlp_depth=4).extra_parameters(generator(4, "test"))
    assert not any(torch.equal(value, other[name]) for name, value in drawn.items())
