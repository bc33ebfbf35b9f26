"""CORAL, MMD and Mixup against plain NumPy, and what Fishr counts by hand (its training: test_penalties.py)."""

from itertools import combinations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from engine import Batch, generator


def coral(a, b):
    covariances = np.cov(a, rowvar=False) - np.cov(b, rowvar=False)
    return ((a.mean(0) - b.mean(0)) ** 2).mean() + (covariances**2).mean()


def mmd(a, b):
    def mean_kernel(first, second):
        squares = [((x - y) ** 2).sum() for x in first for y in second if x is not y]
        return np.mean([np.mean(np.exp(-(10.0 ** np.arange(-3, 4)) * s)) for s in squares])

    a, b = list(a), list(b)  # so that a row is one object: it is not compared with itself
    return mean_kernel(a, a) + mean_kernel(b, b) - 2 * mean_kernel(a, b)


@pytest.mark.parametrize(("name", "distance"), [("CORAL", coral), ("MMD", mmd)])
def test_the_penalty_is_the_mean_distance_of_pairs_of_domains(methods, name, distance):
    of, weight = methods.setup(domains=3), 1e4
    params, batch = methods.one_network(of), methods.one_batch(of)
    domains = methods.plain_hidden(params, batch.features).numpy().reshape(3, 6, -1)
    penalty = np.mean([distance(a, b) for a, b in combinations(domains, 2)])
    assert weight * abs(penalty) > 0.1
    loss, _ = methods.make(name, of, penalty_weight=weight).loss(params, batch, {}, {})
    error = F.cross_entropy(methods.plain_logits(params, batch.features), batch.labels).item()
    assert loss.item() == pytest.approx(error + weight * penalty, rel=1e-9)


def test_mmd_gives_nothing_for_a_smaller_scale_where_distributions_are_equal(methods):
    draw, scale = generator(0, "test"), torch.ones((), dtype=torch.float64, requires_grad=True)
    rows = torch.randn(400, 2, 8, 5, generator=draw, dtype=torch.float64)
    distances = torch.func.vmap(methods.make("MMD").distances)(scale * rows)[:, 0, 1]
    (slope,) = torch.autograd.grad(distances.mean(), scale)
    assert abs(distances.mean().item()) < 4 * distances.std().item() / 20  # standard errors of 400
    assert abs(slope.item()) < 0.005  # DomainBed's estimate, with the rows themselves: 0.03


@pytest.mark.parametrize("name", ["CORAL", "MMD", "Mixup", "Fishr"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_finite_where_nothing_varies(methods, name, dtype):
    algorithm = methods.make(name, penalty_weight=1.0, anneal=0.0) if name == "Fishr" else methods.make(name)
    params = {key: value.to(dtype) for key, value in methods.one_network().items()}
    params["layers.2.bias"] = torch.full_like(params["layers.2.bias"], -100.0)  # every unit is off
    batch = methods.one_batch()
    batch = batch._replace(features=batch.features.to(dtype), labels=torch.zeros_like(batch.labels))
    noise = algorithm.draw(generator(3, "test"), 12)
    noise = {key: value.to(dtype) if value.is_floating_point() else value for key, value in noise.items()}
    gradient, loss, _ = algorithm.gradients(params, batch, algorithm.initial_state(params), noise)
    assert loss.dtype == dtype
    assert all(value.isfinite().all() and value.dtype == dtype for value in [loss, *gradient.values()])


def test_mixup_mixes_each_domain_with_its_partner(methods):
    of = methods.setup(domains=3)
    params, batch, algorithm = methods.one_network(of), methods.one_batch(of), methods.make("Mixup", of)
    share, partner = torch.tensor([0.9, 0.2, 0.6], dtype=torch.float64), torch.tensor([2, 0, 1])
    loss, _ = algorithm.loss(params, batch, {}, {"partner": partner, "share": share})
    expected = []
    for i, j, s in zip(range(3), partner.tolist(), share.tolist(), strict=True):
        for k in range(6):
            a, b = i * 6 + k, j * 6 + k
            logs = methods.plain_logits(params, s * batch.features[a] + (1 - s) * batch.features[b]).log_softmax(-1)
            expected.append(-s * logs[batch.labels[a]] - (1 - s) * logs[batch.labels[b]])
    assert loss.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-9)


@pytest.mark.parametrize("alpha", [0.2, 5.0])
def test_mixup_draws_a_cycle_of_domains_and_beta_shares(methods, alpha):
    algorithm, draw = methods.make("Mixup", methods.setup(domains=4), alpha=alpha), generator(0, "test")
    torch.manual_seed(0)
    np.random.seed(0)
    drawn = [algorithm.draw(draw, 24) for _ in range(3000)]
    assert torch.initial_seed() == 0
    assert np.random.rand() == np.random.RandomState(0).rand()  # the global streams are left alone
    cycles = set()
    for noise in drawn:
        path = [0]
        for _ in range(3):
            path.append(noise["partner"][path[-1]].item())
        assert sorted(path) == [0, 1, 2, 3]
        cycles.add(tuple(path))
    assert len(cycles) == 6  # every one of 3!
    share = torch.stack([noise["share"] for noise in drawn]).double()
    assert share.mean().item() == pytest.approx(0.5, abs=0.02)
    assert share.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.05)
    assert torch.corrcoef(share.T).triu(1).abs().max() < 0.08  # independent for each pair
    again = algorithm.draw(generator(0, "test"), 24)
    assert all(torch.equal(again[name], drawn[0][name]) for name in again)


def test_fishrs_variances_by_hand(methods):
    # One hidden unit that is always 1 + x; equal logits: errors are -1/2 and 1/2, rows of a domain differ in x alone.
    of = methods.setup(methods.on_features(1, 2, (1,)), batch_size=2)
    algorithm = methods.make("Fishr", of, anneal=0.0, penalty_weight=10.0)
    one, zeros = torch.ones(1, 1), torch.zeros(2)
    params = {"layers.0.weight": one, "layers.0.bias": one[0], "layers.1.weight": torch.zeros(2, 1)}
    params["layers.1.bias"] = zeros
    batch = Batch(torch.tensor([[0.0], [2.0], [1.0], [1.0]]), torch.zeros(4).long(), torch.tensor([0, 0, 1, 1]))
    loss, changes = algorithm.loss(params, batch, algorithm.initial_state(params), {})
    # Domain 0: gradients by a weight are ±1/2 · (1, 3), of variance 1/4; by a bias equal in both rows. Domain 1: none.
    assert torch.allclose(changes["variances"], torch.tensor([[0.25, 0.0, 0.25, 0.0], [0.0] * 4]))
    assert loss.item() == pytest.approx(np.log(2) + 10 * (4 * 0.125**2) / 8)
