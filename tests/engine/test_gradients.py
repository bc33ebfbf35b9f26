"""Gradients of tracked weights against autograd on one network and one image at a time."""

import pytest
import torch
from torch.nn import functional as F

from engine import MatmulEngine, PathRecorder, SplitFeatures, loss_gradients, random_start
from models import FeedforwardClassifier

SIZES = (5, 4, 3)
SEEDS = (0, 3)


@pytest.fixture
def data():
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(24, 6, generator=draw, dtype=torch.float64)
    labels, domains = torch.arange(24) % 3, torch.arange(24) // 12
    files = tuple(f"{i}.png" for i in range(24))
    names = files, ("a", "b", "c"), ("art", "photo")
    return SplitFeatures(features, labels, domains, *names, "seed", 0.25, dtype=torch.float64)


@pytest.fixture
def params(data):
    return {name: value.double() for name, value in random_start(SEEDS, "start", data.network(SIZES)).items()}


def image_gradients(data, params, s, rows):
    """Gradients of each image's own loss for the tracked weights of network s: L × ``[n, out, in]``, by autograd."""
    network = FeedforwardClassifier(6, 3, SIZES).double()
    network.load_state_dict({name: value[s] for name, value in params.items()})
    found = []
    for row in rows.tolist():
        loss = F.cross_entropy(network(data.features[row : row + 1]), data.labels[row : row + 1])
        found.append(torch.autograd.grad(loss, network.tracked(dict(network.named_parameters()))))
    return [torch.stack(layers) for layers in zip(*found, strict=True)]


@pytest.mark.parametrize("images_at_a_time", [2, 256])
def test_mean_gradients_and_squared_ones_are_those_of_single_images(data, params, monkeypatch, images_at_a_time):
    monkeypatch.setattr("engine.gradients.ROWS", images_at_a_time)
    rows = data.rows(["photo"], "in", SEEDS)
    assert not torch.equal(rows[0], rows[1])  # each seed has its own split
    mean, squared = (loss_gradients(data, SIZES, params, rows, squared=squared) for squared in (False, True))
    for s in range(len(SEEDS)):
        single = image_gradients(data, params, s, rows[s])
        for own, of_mean, of_squares in zip(single, mean, squared, strict=True):
            torch.testing.assert_close(of_mean[s], own.mean(0), rtol=1e-10, atol=1e-14)
            torch.testing.assert_close(of_squares[s], own.square().mean(0), rtol=1e-10, atol=1e-14)
            assert (of_squares[s] >= of_mean[s].square() - 1e-15).all()  # Jensen: the mean's square is smaller
            assert of_squares[s].sum() > 1.1 * of_mean[s].square().sum()


def test_the_path_is_the_sum_of_minus_gradient_times_step(data, params):
    engine = PathRecorder(MatmulEngine(params, 0.05), ["layers.1.weight", "layers.2.weight"])
    network = FeedforwardClassifier(6, 3, SIZES).double()
    network.load_state_dict({name: value[1] for name, value in params.items()})
    optimizer, path = torch.optim.Adam(network.parameters(), lr=0.05), dict.fromkeys(engine.path, 0.0)
    for step in range(5):
        rows = torch.arange(step, step + 8).expand(2, -1)
        engine.step(data.features[rows], data.labels[rows], {}, data.domains[rows])
        optimizer.zero_grad()
        F.cross_entropy(network(data.features[rows[1]]), data.labels[rows[1]]).backward()
        before = {name: network.get_parameter(name).detach().clone() for name in path}
        gradients = {name: network.get_parameter(name).grad.clone() for name in path}
        optimizer.step()
        for name in path:
            path[name] = path[name] - gradients[name] * (network.get_parameter(name).detach() - before[name])
    for name in path:
        torch.testing.assert_close(engine.path[name][1], path[name], rtol=1e-8, atol=1e-12)
    assert engine.shape == torch.Size([2])
