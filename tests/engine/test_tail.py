"""The last blocks of a ViT for whole stacks: the shortcut and the engine equal the module under the plain loop."""

from copy import deepcopy

import pytest
import torch
import transformers
from torch import nn

from engine import BlockMatrix, ClsShortcut, TailEngine, block_matrices
from engine.shortcut import TimesConstant, normalization
from importance import weight_rates
from models import BackboneTail, FeatureExtractor, FeedforwardClassifier
from trainer_phase1 import train_network

SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
IMAGE = {"image_size": 32, "patch_size": 8}
COVERED = {
    "ViT": (transformers.ViTConfig, transformers.ViTModel, {}),
    "ViT without biases": (transformers.ViTConfig, transformers.ViTModel, {"qkv_bias": False}),
    "DeiT": (transformers.DeiTConfig, transformers.DeiTModel, {}),
    "DINOv2": (transformers.Dinov2Config, transformers.Dinov2Model, {"layerscale_value": 0.3}),
    "DINOv2 with SwiGLU": (transformers.Dinov2Config, transformers.Dinov2Model, {"use_swiglu_ffn": True}),
    "DINOv2 with registers": (transformers.Dinov2WithRegistersConfig, transformers.Dinov2WithRegistersModel, {}),
    "CLIP": (transformers.CLIPVisionConfig, transformers.CLIPVisionModel, {}),
}
GENERAL = {
    "BEiT with relative positions": (
        transformers.BeitConfig,
        transformers.BeitModel,
        {"use_relative_position_bias": True, "use_mean_pooling": False},
    ),
    "DINOv3 with rotary positions": (transformers.DINOv3ViTConfig, transformers.DINOv3ViTModel, {}),
}
RATE, STEPS, BATCH, CLASSES = 1e-3, 50, 8, 4


class Pixels:
    """Preprocessing that leaves pixels as they are."""

    scale, mean, std = 1 / 255, [0.5] * 3, [0.5] * 3

    def __call__(self, image):
        return torch.zeros(3, image.height, image.width, dtype=torch.uint8)


def extractor(kind, seed=0):
    configuration, model, more = (COVERED | GENERAL)[kind]
    torch.manual_seed(seed)
    made = model(configuration(**SIZES, **IMAGE, **more))
    with torch.no_grad():
        for parameter in made.parameters():  # norms and biases start at one and zero, which would hide mistakes
            parameter.add_(0.1 * torch.randn_like(parameter))
    return FeatureExtractor(made, Pixels(), kind)


def tail_and_tokens(kind, blocks=1, images=30):
    """A tail with a linear classifier, and tokens before its blocks, in float64."""
    vit = extractor(kind)
    pixels = torch.randint(0, 256, (images, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    _, tokens = vit.tokens(pixels, blocks)
    head = FeedforwardClassifier(SIZES["hidden_size"], CLASSES, ())
    return vit.tail(blocks).with_head(head).double(), tokens.clone().double()


def stack(tail, networks):
    """Starts of a few networks: the pretrained blocks, and classifiers that differ."""
    draw = torch.Generator().manual_seed(2)
    start = {name: p.detach().expand(1, networks, *p.shape).clone() for name, p in tail.named_parameters()}
    for name in start:
        if name.startswith("head."):
            start[name] += 0.1 * torch.randn(start[name].shape, generator=draw, dtype=torch.float64)
    return start


@pytest.mark.parametrize("kind", COVERED)
def test_features_are_computed_from_tokens_and_the_shortcut_covers_the_family(kind):
    vit = extractor(kind)
    pixels = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    features, tokens = vit.tokens(pixels, 1)
    torch.testing.assert_close(vit.tail(1)(tokens), features, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(features, vit(pixels))
    assert ClsShortcut.of(vit.tail(1), tokens) is not None


@pytest.mark.parametrize("kind", GENERAL)
def test_other_families_take_the_module_itself(kind):
    vit = extractor(kind)
    pixels = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    features, tokens = vit.tokens(pixels, 2)
    torch.testing.assert_close(vit.tail(2)(tokens), features, rtol=1e-5, atol=1e-5)
    assert ClsShortcut.of(vit.tail(1), vit.tokens(pixels, 1)[1]) is None


def test_a_norm_is_two_numbers_of_each_token():
    tokens = 3 + torch.randn(4, 5, 7, dtype=torch.float64) * torch.tensor([0.0, 1e-6, 1, 1e3, 1e6])[:, None]
    scale, offset = normalization(tokens, 1e-5)
    wanted = torch.nn.functional.layer_norm(tokens, (7,), eps=1e-5)
    torch.testing.assert_close(tokens * scale[..., None] + offset[..., None], wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("shared", [False, True])
def test_products_with_constants_and_their_two_derivatives_are_plain_ones_under_vmap(shared):
    rows, constants = torch.randn(3, 2, 4, 5).double(), torch.randn(3, 2, 5, 6).double()
    constants = constants[0] if shared else constants

    def slopes(product):
        def loss(own, fixed):
            return product(own, fixed).pow(3).sum()

        def slope(own, fixed):
            return torch.func.grad(loss)(own, fixed).pow(2).sum()

        each = (product, torch.func.grad(loss), torch.func.grad(slope))
        return [torch.func.vmap(one, in_dims=(0, None if shared else 0))(rows, constants) for one in each]

    for given, wanted in zip(slopes(TimesConstant.apply), slopes(torch.matmul), strict=True):
        torch.testing.assert_close(given, wanted, rtol=1e-12, atol=0)
    with pytest.raises(NotImplementedError, match="no gradient of the tokens"):
        TimesConstant.apply(rows[0], constants[..., :5, :].reshape(-1, 5, 6)[:2].requires_grad_()).sum().backward()


def test_several_blocks_and_a_block_that_computes_something_else_have_no_shortcut():
    tail, tokens = tail_and_tokens("ViT", blocks=2)
    assert ClsShortcut.of(tail, tokens[:2]) is None
    tail, tokens = tail_and_tokens("ViT")
    changed = deepcopy(tail)
    changed.blocks[0].attention.register_forward_hook(lambda module, given, out: (1.001 * out[0], out[1]))
    assert ClsShortcut.of(tail, tokens[:2]) is not None
    assert ClsShortcut.of(changed, tokens[:2]) is None
    assert ClsShortcut.of(tail, 3000 + tokens[:2]) is None  # where float32 loses what differs in a token


@pytest.mark.parametrize(("kind", "blocks"), [*((kind, 1) for kind in COVERED), ("ViT", 2)])
@pytest.mark.parametrize("rated", [False, True])
def test_a_stack_equals_the_module_under_the_plain_loop(kind, blocks, rated):
    tail, tokens = tail_and_tokens(kind, blocks)
    draw = torch.Generator().manual_seed(3)
    labels = torch.randint(0, CLASSES, (len(tokens),), generator=draw)
    batches = [torch.randperm(len(tokens), generator=draw)[:BATCH] for _ in range(STEPS)]
    networks = 2 if blocks > 1 else 3
    start, names = stack(tail, networks), tail.tracked_names
    masks = {name: torch.rand(start[name].shape, generator=draw) < 0.5 for name in names}
    lows = (0.0, 0.3) if rated else (1.0, 1.0)  # of each half of the training

    def rates(epoch):
        return {name: weight_rates(mask, torch.tensor(lows[epoch]).double()) for name, mask in masks.items()}

    learning_rates = {name: torch.full((1, networks), RATE, dtype=torch.float64) for name in start}
    engine = TailEngine(tail, ClsShortcut.of(tail, tokens[:2]), start, learning_rates)
    assert (engine.shortcut is not None) == (blocks == 1)
    for half in range(2):
        factors = rates(half)
        for rows in batches[half * STEPS // 2 :][: STEPS // 2]:
            engine.step(tokens[rows][None], labels[rows][None], factors, None)
    for v in range(networks):
        alone = deepcopy(tail).requires_grad_(True)
        alone.load_state_dict({name: value[0, v] for name, value in start.items()}, strict=False)
        own = dict(alone.named_parameters())

        def single(epoch, v=v, own=own):
            return {own[name]: rate[0, v] for name, rate in rates(epoch).items()}

        halves = [batches[: STEPS // 2], batches[STEPS // 2 :]]
        train_network(alone, tokens, labels, halves, RATE, single if rated else lambda epoch: {})
        for name, value in own.items():
            if ".k_proj.bias" not in name:  # its gradient is 0; the module's rounding noise is amplified by Adam
                torch.testing.assert_close(engine.params[name][0, v], value.detach(), rtol=0, atol=1e-9)
        right = engine.right(tokens, labels)[0, v]
        assert torch.equal(right, alone(tokens).argmax(1) == labels)


def test_frozen_weights_keep_every_bit_and_marked_ones_are_those_of_training_without_a_mask_bit_for_bit():
    tail, tokens = tail_and_tokens("ViT")
    start, draw = stack(tail, 2), torch.Generator().manual_seed(4)
    labels = torch.randint(0, CLASSES, (len(tokens),), generator=draw)
    rates = {name: torch.zeros(start[name].shape).double() for name in tail.tracked_names}
    for rate in rates.values():
        rate[:, 1] = 1  # the second network is trained as without rates
    engines = []
    for given in (rates, {}):
        learning_rates = {name: torch.full((1, 2), RATE, dtype=torch.float64) for name in start}
        engines.append(TailEngine(tail, ClsShortcut.of(tail, tokens[:2]), start, learning_rates))
        for _ in range(5):
            engines[-1].step(tokens[None], labels[None], given, None)
    masked, plain = engines
    for name in tail.tracked_names:
        assert torch.equal(masked.params[name][:, 0], start[name][:, 0])
        assert torch.equal(masked.params[name][:, 1], plain.params[name][:, 1])
        assert not torch.equal(masked.params[name][:, 1], start[name][:, 1])
    assert not torch.equal(masked.params["head.layers.0.weight"][:, 0], start["head.layers.0.weight"][:, 0])


def test_each_network_has_its_own_learning_rates():
    tail, tokens = tail_and_tokens("ViT")
    start = stack(tail, 2)
    start = {name: value[:, :1].expand(1, 2, *value.shape[2:]) for name, value in start.items()}
    labels = torch.randint(0, CLASSES, (len(tokens),), generator=torch.Generator().manual_seed(5))
    rates = {name: torch.tensor([[1e-3, 1e-4]]) if "head" in name else torch.tensor([[1e-5, 1e-3]]) for name in start}
    engine = TailEngine(tail, ClsShortcut.of(tail, tokens[:2]), start, rates)
    engine.step(tokens[None], labels[None], {}, None)
    for name, value in engine.params.items():
        if ".k_proj.bias" not in name:
            moved = (value - start[name]).abs().amax(dim=tuple(range(2, value.ndim)))
            torch.testing.assert_close(moved, rates[name].double(), rtol=1e-2, atol=0)  # Adam's first step is its rate


def test_the_tail_stays_in_eval_mode_and_its_tracked_matrices_are_those_of_the_blocks():
    tail = BackboneTail([extractor("ViT").model.layers[-1]], [((None,), {})], None, nn.Identity())
    assert not tail.train().training
    assert not any(module.training for module in tail.train().modules())
    parameters = dict(tail.named_parameters())
    assert [parameters[name].ndim for name in tail.tracked_names] == [2] * 6
    assert tail.tracked(parameters)[0] is parameters[tail.tracked_names[0]]


@pytest.mark.parametrize("kind", COVERED | GENERAL)
def test_matrices_are_known_by_what_they_do_in_every_family(kind):
    tail = extractor(kind).tail(2)
    found = block_matrices(tail)
    roles = {"query", "key", "value", "output", "in", "out"} | ({"gate"} if "SwiGLU" in kind else set())
    for block in range(2):
        assert sorted(matrix.role for matrix in found if matrix.block == block) == sorted(roles)
    assert {matrix.heads for matrix in found} == {3}
    shapes = dict(zip([(m.block, m.role) for m in found], tail.tracked(dict(tail.named_parameters())), strict=True))
    assert shapes[1, "in"].shape == shapes[1, "out"].T.shape != shapes[1, "query"].shape


def test_a_matrix_that_is_not_known_has_its_own_name():
    tail = extractor("ViT").tail(1)
    tail.blocks[0].adapter = nn.Linear(24, 24)
    assert block_matrices(tail)[-1] == BlockMatrix(0, "adapter", None)


def test_what_blocks_are_called_with_changes_type_with_them():
    tail = extractor("DINOv3 with rotary positions").tail(2)
    before = tail.arguments
    for arguments, kind in ((tail.double().arguments, torch.float64), (before, torch.float32)):
        assert {part.dtype for _, named in arguments for part in named["position_embeddings"]} == {kind}
