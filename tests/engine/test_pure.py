"""The parts of a network as pure functions: they are the module's, with factors on inputs and another MLP as well."""

import pytest
import torch
import transformers
from torch import nn
from torch.func import functional_call

from engine import ClsShortcut, PureNetwork
from models import BackboneTail, FeedforwardClassifier

SIZES = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 16}
MODELS = {
    "ViT": (transformers.ViTConfig, transformers.ViTModel, {}),
    "DINOv2 with SwiGLU": (transformers.Dinov2Config, transformers.Dinov2Model, {"use_swiglu_ffn": True}),
}


def made(kind="ViT", blocks=1, hidden_sizes=()) -> tuple[PureNetwork, BackboneTail, dict, torch.Tensor]:
    """A network, the same as a module, its parameters, and tokens of seven images; in float64."""
    configuration, model, more = MODELS[kind]
    torch.manual_seed(0)
    vit = model(configuration(**SIZES, **more))
    with torch.no_grad():
        for parameter in vit.parameters():  # norms and biases start at one and zero, which would hide mistakes
            parameter.add_(0.1 * torch.randn_like(parameter))
    arguments = ((None,), {}) if kind == "ViT" else ((), {})
    layers = next(part for part in vit.modules() if isinstance(part, nn.ModuleList))
    head = FeedforwardClassifier(12, 4, hidden_sizes)
    tail = BackboneTail(layers[-blocks:], [arguments] * blocks, vit.layernorm, head).double()
    tokens = torch.randn(7, 5, 12, dtype=torch.float64)
    shortcut = ClsShortcut.of(tail, tokens)
    assert (shortcut is not None) == (blocks == 1)
    return PureNetwork(tail, shortcut), tail, dict(tail.named_parameters()), tokens


def logits(network, params, inputs, **options):
    return network.head(params, network.hidden(params, network.features(params, inputs, **options)))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("blocks", "hidden_sizes"), [(1, ()), (1, (6, 5)), (2, ())])
def test_a_network_with_blocks_is_its_module(kind, blocks, hidden_sizes):
    network, tail, params, tokens = made(kind, blocks, hidden_sizes)
    wanted = functional_call(tail, params, (tokens,))
    torch.testing.assert_close(logits(network, params, tokens), wanted, rtol=0, atol=1e-9)
    grouped = logits(network, params, tokens[:6].view(2, 3, 5, 12))
    torch.testing.assert_close(grouped, wanted[:6].view(2, 3, 4), rtol=0, atol=1e-9)
    assert network.width == (hidden_sizes[-1] if hidden_sizes else 12)
    assert {name: value.shape for name, value in params.items()} == network.shapes


def test_a_classifier_on_features_is_its_module():
    module = FeedforwardClassifier(12, 4, (6, 5)).double()
    network, params, x = PureNetwork(module), dict(module.named_parameters()), torch.randn(7, 12, dtype=torch.float64)
    torch.testing.assert_close(logits(network, params, x), module(x), rtol=0, atol=1e-12)
    assert (network.has_blocks, network.mlp, network.input_sizes) == (False, {}, {})


@pytest.mark.parametrize("kind", MODELS)
def test_factors_multiply_what_the_modules_layers_see(kind):
    network, tail, params, tokens = made(kind)
    factors = {role: torch.rand(7, width, dtype=torch.float64) for role, width in network.input_sizes.items()}
    assert set(factors) == {"query", "key", "value", "output", "in", "out"}
    names = network.shortcut.names
    seen = {
        name: factors["in" if role == "gate" else role] for role, name in names.items() if role in (*factors, "gate")
    }
    for name, factor in seen.items():
        times = factor.unsqueeze(1)  # all tokens of an image
        tail.get_submodule(name).register_forward_pre_hook(lambda _, inputs, times=times: inputs[0] * times)
    wanted = functional_call(tail, params, (tokens,))
    torch.testing.assert_close(logits(network, params, tokens, factors=factors), wanted, rtol=0, atol=1e-9)


def test_another_mlp_sees_what_the_blocks_would_have_seen():
    network, tail, params, tokens = made()
    plain = logits(network, params, tokens)
    mlp = tail.blocks[0].mlp
    torch.testing.assert_close(logits(network, params, tokens, mlp=mlp), plain, rtol=0, atol=1e-9)
    assert (logits(network, params, tokens, mlp=torch.zeros_like) - plain).abs().max() > 0.01
    for role, name in (("in", "fc1"), ("out", "fc2")):
        assert torch.equal(network.mlp[role]["weight"], mlp.get_submodule(name).weight.float())
        assert torch.equal(network.mlp[role]["bias"], mlp.get_submodule(name).bias.float())
