"""The small CNN: shapes, cuts, and the original's files."""

import pytest
import torch
from torch import nn

from config import InputError
from transfer import ConvClassifier, load_original


def images(count=3, channels=1, size=8):
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def plain(network: ConvClassifier, pool_every: int) -> nn.Sequential:
    """The same layers as a chain of modules."""
    layers = []
    for i, conv in enumerate(network.convs):
        layers += [conv, nn.ReLU()] + [nn.AvgPool2d(2)] * ((i + 1) % pool_every == 0)
    return nn.Sequential(*layers, nn.Flatten(), network.head)


@pytest.mark.parametrize(("depth", "pool_every"), [(6, 2), (3, 1), (4, 3), (0, 2)])
def test_the_network_is_convolutions_activations_poolings_and_a_head(depth, pool_every):
    network = ConvClassifier(1, 8, 4, depth=depth, channels=5, pool_every=pool_every)
    assert torch.equal(network(images()), plain(network, pool_every)(images()))


def test_the_original_has_188165_parameters():
    network = ConvClassifier(1, 28, 5, channels=64)
    assert sum(parameter.numel() for parameter in network.parameters()) == 188_165
    assert network.flat_size(6) == 576
    assert ConvClassifier(3, 32, 6, channels=64).flat_size(6) == 1024


@pytest.mark.parametrize("cut", range(7))
def test_prefix_and_rest_are_the_network(cut):
    network = ConvClassifier(1, 8, 4, channels=3)
    below = network.prefix(images(), cut)
    assert below.flatten(1).shape == (3, network.flat_size(cut))
    assert torch.equal(network.rest(below, cut), network(images()))


def test_features_are_taken_before_activation_and_pooling():
    torch.manual_seed(0)
    network = ConvClassifier(1, 8, 4, channels=16)  # of three, all may be above 0 by chance
    for layer in range(6):
        found = network.features(images(), layer)
        assert found.min() < 0
        seen = torch.relu(found)
        seen = nn.functional.avg_pool2d(seen, 2) if layer % 2 else seen
        assert torch.equal(seen, network.prefix(images(), layer + 1))


@pytest.mark.parametrize("cut", range(7))
def test_truncating_keeps_the_first_layers_and_draws_a_head_alone(cut):
    network = ConvClassifier(1, 8, 4, channels=3)
    torch.manual_seed(1)
    short = network.truncated(cut, 2)
    torch.manual_seed(1)
    head = nn.Linear(network.flat_size(cut), 2)
    assert short.depth == cut
    assert short.classes == 2
    assert torch.equal(short.head.weight, head.weight)
    assert torch.equal(short(images()), head(network.prefix(images(), cut).flatten(1)))
    with torch.no_grad():
        for parameter in short.parameters():
            parameter.zero_()
    assert all(conv.weight.abs().sum() > 0 for conv in network.convs)


def test_layers_are_drawn_from_first_to_last():
    torch.manual_seed(3)
    network = ConvClassifier(1, 8, 4, depth=2, channels=3)
    torch.manual_seed(3)
    drawn = [nn.Conv2d(1, 3, 3), nn.Conv2d(3, 3, 3), nn.Linear(48, 4)]
    for ours, layer in zip([*network.convs, network.head], drawn, strict=True):
        assert torch.equal(ours.weight, layer.weight)
        assert torch.equal(ours.bias, layer.bias)


@pytest.mark.parametrize("wrong", [{"kernel": 4}, {"depth": 8}, {"pool_every": 1}])
def test_networks_that_cannot_be(wrong):
    with pytest.raises(InputError, match=r"odd|halved"):
        ConvClassifier(1, 8, 4, **wrong)


def saved(path, depth=2, **others):
    """A network as the original saves it, with its names."""
    network = ConvClassifier(1, 8, 4, depth=depth, channels=3)
    names = {f"conv{i}": conv for i, conv in enumerate(network.convs)} | {"fc": network.head}
    kinds = ("weight", "bias")
    torch.save(
        {f"{name}.{kind}": getattr(layer, kind) for name, layer in names.items() for kind in kinds} | others, path
    )
    return network


@pytest.mark.parametrize("depth", [0, 2, 6])
def test_networks_of_the_original_are_read(tmp_path, depth):
    network = saved(tmp_path / "a.pth", depth)
    again = ConvClassifier(1, 8, 4, depth=depth, channels=3)
    again.load_state_dict(load_original(tmp_path / "a.pth"))
    assert torch.equal(again(images()), network(images()))


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "a.pth"
    with pytest.raises(InputError, match=r"a\.pth"):
        load_original(path)
    path.write_text("nothing of that kind")
    with pytest.raises(InputError, match=r"a\.pth"):
        load_original(path)
    saved(path, **{"fc_2.weight": torch.zeros(2, 2)})
    with pytest.raises(InputError, match="conv0"):
        load_original(path)
    torch.save([torch.zeros(2)], path)
    with pytest.raises(InputError, match="conv0"):
        load_original(path)
