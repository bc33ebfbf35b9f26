"""CORAL, MMD, Mixup and Fishr against plain NumPy, a plain PyTorch loop, and the limits where they are ERM."""

from itertools import combinations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from engine import Batch, generator
from field.algorithms.alignment import kernel_distances
from field.algorithms.base import adam_state
from models import FeedforwardClassifier


def plain_forward(methods, of):
    """Last hidden layer by domain ``[n, rows, h]`` and mean cross-entropy, in NumPy, on the first batch of seed 3."""
    params, batch = methods.one_network(of), methods.one_batch(of)
    x = batch.features.numpy()
    for i in range(3):
        x = np.maximum(x @ params[f"layers.{i}.weight"].numpy().T + params[f"layers.{i}.bias"].numpy(), 0)
    logits = x @ params["layers.3.weight"].numpy().T + params["layers.3.bias"].numpy()
    error = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(x)), batch.labels.numpy()]
    return x.reshape(of.domains, of.batch_size, -1), error.mean()


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
    domains, error = plain_forward(methods, of)
    penalty = np.mean([distance(a, b) for a, b in combinations(domains, 2)])
    assert weight * abs(penalty) > 0.1
    algorithm = methods.make(name, of, penalty_weight=weight)
    loss, _ = algorithm.loss(methods.one_network(of), methods.one_batch(of), {}, {})
    assert loss.item() == pytest.approx(error + weight * penalty, rel=1e-9)


def test_mmd_gives_nothing_for_a_smaller_scale_where_distributions_are_equal():
    draw, scale = generator(0, "test"), torch.ones((), dtype=torch.float64, requires_grad=True)
    rows = torch.randn(400, 2, 8, 5, generator=draw, dtype=torch.float64)
    distances = torch.stack([kernel_distances(scale * pair)[0, 1] for pair in rows])
    (slope,) = torch.autograd.grad(distances.mean(), scale)
    assert abs(distances.mean().item()) < 4 * distances.std().item() / 20  # standard errors of 400
    assert abs(slope.item()) < 0.005  # DomainBed's estimate, with the rows themselves: 0.03


NONE = {
    "CORAL": {"penalty_weight": 0.0},
    "MMD": {"penalty_weight": 0.0},
    "Fishr": {"anneal": 1.0},  # the penalty never begins
}


@pytest.mark.parametrize("name", NONE)
def test_without_penalty_it_is_erm(methods, name):
    assert methods.same(methods.run(name, **NONE[name]), methods.run("ERMBalanced"))
    assert not methods.same(methods.run(name), methods.run("ERMBalanced"), 1e-4)


@pytest.mark.parametrize("name", ["CORAL", "MMD", "Mixup"])
def test_with_one_domain_it_is_erm(methods, name):
    of = methods.setup(domains=1)
    assert methods.same(methods.run(name, of=of), methods.run("ERMBalanced", of=of))


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
    template, expected = FeedforwardClassifier(8, 3, of.hidden_sizes).double(), []
    template.load_state_dict(params)
    for i, j, s in zip(range(3), partner.tolist(), share.tolist(), strict=True):
        for k in range(6):
            a, b = i * 6 + k, j * 6 + k
            logs = template(s * batch.features[a] + (1 - s) * batch.features[b]).log_softmax(-1)
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


def plain_fishr(methods, steps, begin, weight, ema, rate=1e-3):
    """Parameters of seed 3 after `steps`: gradients of single rows by autograd, moving average as in the paper."""
    of = methods.setup()
    network = FeedforwardClassifier(8, 3, of.hidden_sizes).double()
    network.load_state_dict(methods.one_network(of))
    optimizer, average = torch.optim.Adam(network.parameters(), lr=rate), [0.0, 0.0]
    head = list(network.parameters())[-2:]
    for step, (features, labels, _) in enumerate(methods.batches(steps, of, (3,))):
        errors = F.cross_entropy(network(features[0]), labels[0], reduction="none")
        rows = [torch.autograd.grad(error, head, create_graph=True) for error in errors]
        rows = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
        smooth = []
        for d in range(2):
            own = rows[6 * d : 6 * d + 6]
            now = ema * average[d] + (1 - ema) * ((own - own.mean(0)) ** 2).mean(0)
            average[d] = now.detach()
            smooth.append(now / (1 - ema))
        middle = (smooth[0] + smooth[1]) / 2
        penalty = (((smooth[0] - middle) ** 2).mean() + ((smooth[1] - middle) ** 2).mean()) / 2
        if step == begin:
            optimizer = torch.optim.Adam(network.parameters(), lr=rate)
        optimizer.zero_grad()
        (errors.mean() + (weight * penalty if step >= begin else 0)).backward()
        optimizer.step()
    return dict(network.named_parameters())


@pytest.mark.parametrize(("anneal", "begin"), [(0.4, 4), (0.0, 0)])
def test_fishr_is_a_plain_loop_with_gradients_of_single_rows(methods, anneal, begin):
    knobs = {"penalty_weight": 100.0, "ema": 0.8}
    ours = methods.run("Fishr", 10, (3,), anneal=anneal, **knobs).params
    plain = plain_fishr(methods, 10, begin, 100.0, 0.8)
    for name, value in plain.items():
        assert torch.allclose(ours[name][0], value, rtol=0, atol=1e-10), name


def test_fishrs_variances_by_hand(methods):
    # One hidden unit that is always 1 + x; equal logits: errors are -1/2 and 1/2, rows of a domain differ in x alone.
    of = methods.setup(features=1, classes=2, hidden_sizes=(1,), batch_size=2)
    algorithm = methods.make("Fishr", of, anneal=0.0, penalty_weight=10.0)
    one, zeros = torch.ones(1, 1), torch.zeros(2)
    params = {"layers.0.weight": one, "layers.0.bias": one[0], "layers.1.weight": torch.zeros(2, 1)}
    params["layers.1.bias"] = zeros
    batch = Batch(torch.tensor([[0.0], [2.0], [1.0], [1.0]]), torch.zeros(4).long(), torch.tensor([0, 0, 1, 1]))
    state = {"step": torch.tensor(0), "adam": adam_state(params), "variances": torch.zeros(2, 4)}
    loss, changes = algorithm.loss(params, batch, state, {})
    # Domain 0: gradients by a weight are ±1/2 · (1, 3), of variance 1/4; by a bias equal in both rows. Domain 1: none.
    assert torch.allclose(changes["variances"], torch.tensor([[0.25, 0.0, 0.25, 0.0], [0.0] * 4]))
    assert loss.item() == pytest.approx(np.log(2) + 10 * (4 * 0.125**2) / 8)
