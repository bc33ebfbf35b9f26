"""Mixtures of experts against a plain loop over images and experts, and the limits of one expert and of equal gates."""

import pytest
import torch

from engine import generator
from field.algorithms.experts import expert_use, load_balance

BOTH = ("SFMoE", "GMoE")
RENORMALIZED = {"SFMoE": True, "GMoE": False}


def expert(params, row, e):
    hidden = (params["experts.in.weight"][e] @ row + params["experts.in.bias"][e]).relu()
    return params["experts.out.weight"][e] @ hidden + params["experts.out.bias"][e]


def plain_scores(name, params, row):
    if name == "SFMoE":
        return torch.stack([weights @ row for weights in params["router.weight"]])
    here, scale = params["router.weight"] @ row + params["router.bias"], params["router.sharpness"].exp()
    angles = [here @ v / (here.pow(2).sum() * v.pow(2).sum()).sqrt() for v in params["router.experts"]]
    return scale * torch.stack(angles)


def plain_loss(methods, name, params, batch, noise, k, weight):
    """One image after the other, one expert after the other."""
    k = min(k, noise.shape[1])
    count, losses, first, mean = noise.shape[1], [], [0.0] * noise.shape[1], 0.0
    for row, label, gaussian in zip(batch.features, batch.labels, noise, strict=True):
        p = (plain_scores(name, params, row) + gaussian / count).exp()
        p = p / p.sum()
        best = sorted(range(count), key=lambda e, p=p: -p[e].item())[:k]
        total = sum(p[e] for e in best) + 1e-9 if RENORMALIZED[name] or k > 1 else 1
        logits = methods.plain_logits(params, row) + sum(p[e] / total * expert(params, row, e) for e in best)
        losses.append(logits.logsumexp(0) - logits[label])
        first[best[0]] += 1 / len(noise)
        mean = mean + p / len(noise)
    balance = count * sum(f * m for f, m in zip(first, mean, strict=True))
    return torch.stack(losses).mean() + weight * balance


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize(("experts", "k"), [(5, 1), (5, 2), (5, 3), (1, 2)])
def test_gradients_are_those_of_a_plain_loop(methods, name, experts, k):
    algorithm, params = methods.network(name, experts=experts, chosen=k, gate_noise=1.0, balance_weight=0.3)
    batch, noise = methods.one_batch(), algorithm.draw(generator(0, "test"), 12)["gate"].double()
    found, loss, _ = algorithm.gradients(params, batch, {}, {"gate": noise})
    leaves = methods.leaves(params)
    expected = plain_loss(methods, name, leaves, batch, noise, k, 0.3)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-9)
    for key, leaf in leaves.items():
        assert torch.allclose(found[key], leaf.grad, rtol=0, atol=1e-8), key


@pytest.mark.parametrize("name", BOTH)
def test_all_experts_with_equal_gates_are_their_average(methods, name):
    algorithm, params = methods.network(name, experts=4, chosen=4)
    same = "router.weight" if name == "SFMoE" else "router.experts"
    params[same] = params[same][:1].expand_as(params[same])
    x = methods.one_batch().features
    expected = [methods.plain_logits(params, row) + sum(expert(params, row, e) for e in range(4)) / 4 for row in x]
    assert torch.allclose(algorithm.logits(params, {}, x), torch.stack(expected), rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", BOTH)
def test_noise_moves_training_and_not_prediction(methods, name):
    algorithm, params = methods.network(name, gate_noise=50.0)
    batch, shape = methods.one_batch(), (12, algorithm.experts)
    noises = [torch.randn(shape, generator=generator(i, "test")).double() for i in range(2)]
    losses = [algorithm.loss(params, batch, {}, {"gate": noise})[0] for noise in noises]
    assert losses[0] != losses[1]
    quiet = methods.make(name, gate_noise=0.0)
    x = batch.features
    assert torch.equal(algorithm.logits(params, {}, x), quiet.logits(params, {}, x))
    assert torch.equal(algorithm.routing(params, x), quiet.routing(params, x))


@pytest.mark.parametrize("name", BOTH)
def test_routing_sums_to_one_over_the_most_probable(methods, name):
    algorithm, params = methods.network(name)
    x = methods.one_batch().features
    found = algorithm.routing(params, x)
    assert torch.allclose(found.sum(1), torch.ones(12).double())
    for row, gates in zip(x, found, strict=True):
        order = plain_scores(name, params, row).argsort(descending=True)
        assert set(gates.nonzero().flatten().tolist()) == set(order[: algorithm.chosen].tolist())


def test_temperature_of_the_cosine_router_has_a_floor(methods):
    algorithm, params = methods.network("GMoE")
    x = methods.one_batch().features
    start = algorithm.scores(params, x)
    assert start.abs().max() <= 1 / 0.5
    params["router.sharpness"] = params["router.sharpness"] + 100
    assert torch.allclose(algorithm.scores(params, x), start * 0.5 / 0.01)


def test_load_balance_by_hand():
    assert load_balance(torch.eye(4).double()).item() == pytest.approx(1)  # each expert takes one image
    assert load_balance(torch.eye(4)[[2, 2, 2]].double()).item() == pytest.approx(4)  # one takes all
    p = torch.tensor([[0.6, 0.4], [0.8, 0.2], [0.1, 0.9]]).double()  # density 2/3, 1/3; mean 0.5, 0.5
    assert load_balance(p).item() == pytest.approx(1)
    p = torch.tensor([[0.6, 0.4], [0.8, 0.2], [0.4, 0.6]]).double()  # mean 0.6, 0.4
    assert load_balance(p).item() == pytest.approx(4 * (2 / 3 * 0.6 + 1 / 3 * 0.4) / 2)


def test_expert_use_is_a_mean_per_group():
    routing = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
    found = expert_use(routing, torch.tensor([2, 2, 0]), 3)
    assert torch.equal(found[[0, 2]], torch.tensor([[0.0, 1.0], [0.75, 0.25]]))
    assert found[1].isnan().all()
