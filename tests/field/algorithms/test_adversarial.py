"""Domain-adversarial training against the same game in plain autograd, and its limits."""

import pytest
import torch
from torch.nn import functional as F

from engine import Batch, generator

KNOBS = {
    "adversary_weight": 0.7,
    "learning_rate": 0.01,
    "learning_rate_d": 0.02,
    "weight_decay": 0.03,
    "weight_decay_d": 0.05,
    "grad_penalty": 0.4,
    "mlp_width": 7,
}


def reference_loss(methods, network, batch, conditional):
    """(cross-entropy of the classes, loss of the discriminator) of one network, written out row by row."""
    x, labels, domains = batch
    hidden = methods.plain_hidden(network, x)
    y = read = hidden + network["class_embeddings"][labels] if conditional else hidden
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
    return F.cross_entropy(methods.plain_logits(network, x), labels), loss + KNOBS["grad_penalty"] * (slope**2).sum(
        1
    ).mean()


@pytest.mark.parametrize(("name", "turns"), [("DANN", 1), ("CDANN", 2)])  # turns of the adversary for one
def test_it_is_the_game_in_plain_autograd(methods, name, turns):
    _, start = methods.network(name, **KNOBS)
    network = methods.leaves(start)
    players = [[v for n, v in network.items() if n.startswith("layers.") == own] for own in (True, False)]
    optimizers = [
        torch.optim.Adam(weights, lr=lr, weight_decay=decay, betas=(0.5, 0.9))
        for weights, lr, decay in zip(players, (0.01, 0.02), (0.03, 0.05), strict=True)
    ]
    for step, batch in enumerate(methods.batches(9, seeds=(3,))):
        classes, adversary = reference_loss(methods, network, [value[0] for value in batch], name == "CDANN")
        own = step % (turns + 1) == turns
        weights, optimizer = (players[0], optimizers[0]) if own else (players[1], optimizers[1])
        gradient = torch.autograd.grad(classes - 0.7 * adversary if own else adversary, weights)
        for weight, value in zip(weights, gradient, strict=True):
            weight.grad = value
        optimizer.step()
    engine = methods.run(name, 9, (3,), d_steps_per_g_step=turns, **KNOBS)
    for key, value in network.items():
        assert torch.allclose(engine.params[key][0], value, rtol=0, atol=1e-9), key
        assert not torch.allclose(start[key], value, rtol=0, atol=1e-3), key


def test_the_one_that_waits_keeps_weights_and_moments(methods):
    method, params = methods.network("CDANN", d_steps_per_g_step=2)
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
