"""What the tests of single methods share: small trainings, step by step or through the one loop."""

from functools import cache, partial
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from torch.utils._pytree import tree_map
from transformers import ViTConfig, ViTModel

from config import Settings
from engine import Batch, ClsShortcut, FunctionalEngine, Params, PureNetwork, Validation, generator, random_start
from field.algorithms import ALGORITHMS, Algorithm, Setup, State
from field.train import MethodNetworks, train_method
from models import BackboneTail, FeedforwardClassifier
from tests.factories import split_blobs

SEEDS = (3, 4, 5)
TOKENS = 5


@cache
def on_features(features=8, classes=3, hidden_sizes=(6, 5, 4)) -> PureNetwork:
    """A classifier on features: the same object for the same sizes, so that equal setups are equal."""
    return PureNetwork(FeedforwardClassifier.outline(features, classes, hidden_sizes))


@cache
def on_tokens(blocks=1, hidden_sizes=()) -> PureNetwork:
    """The last blocks of a small ViT and a classifier; one block by the shortcut, more by the modules themselves."""
    sizes = {"hidden_size": 12, "num_hidden_layers": blocks, "num_attention_heads": 3, "intermediate_size": 16}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ViTModel(ViTConfig(**sizes), add_pooling_layer=False).double().eval()
        with torch.no_grad():
            for parameter in model.parameters():  # norms and biases start at one and zero, which would hide mistakes
                parameter.add_(0.1 * torch.randn_like(parameter))
    tail = BackboneTail(model.layers, [((None,), {})] * blocks, model.layernorm, torch.nn.Identity())
    shortcut = ClsShortcut.of(tail, torch.randn(2, TOKENS, 12, dtype=torch.float64))
    return PureNetwork(tail.with_head(FeedforwardClassifier.outline(12, 3, hidden_sizes)), shortcut)


def setup(network: PureNetwork | None = None, **changes) -> Setup:
    """A small classifier, two sources, 6 rows per step (and domain), 2 epochs of 5 steps."""
    sizes = {"domains": 2, "batch_size": 6, "steps_per_epoch": 5, "epochs": 2}
    return Setup(network or on_features(), **{**sizes, **changes})


def make(name: str, of: Setup | None = None, **values) -> Algorithm:
    """A method by name, with its defaults except for `values`."""
    return ALGORITHMS[name](of or setup(), **values)


def start(seeds=SEEDS, of: Setup | None = None):
    """Initial parameters: name -> float64 ``[S, *shape]``."""
    of = of or setup()
    head = random_start(seeds, "fresh_start", of.network.classifier)
    named = dict(
        zip(head, (f"{layer}.{kind}" for layer in of.network.layers for kind in ("weight", "bias")), strict=True)
    )
    params = {named[name]: value.double() for name, value in head.items()}
    own = dict(of.network.network.named_parameters())
    blocks = {
        name: own[name].detach().expand(len(seeds), *shape)
        for name, shape in of.network.shapes.items()
        if name not in params
    }
    return blocks | params


def input_shape(of: Setup) -> tuple[int, ...]:
    """Of an image: its features, or its tokens."""
    return (TOKENS, of.features) if of.network.has_blocks else (of.features,)


@cache
def batches(steps: int, of: Setup | None = None, seeds=SEEDS, balanced=True, dtype=torch.float64):
    """`steps` batches as `FunctionalEngine.step` takes them: features ``[S, B, D]``, labels and domains ``[S, B]``."""
    of = of or setup()
    rows = of.batch_size * (of.domains if balanced else 1)
    found = []
    for step in range(steps):
        per_seed = []
        for seed in seeds:
            draw = generator(seed, "test", str(step))
            x = torch.randn(rows, *input_shape(of), generator=draw).to(dtype)
            labels = torch.randint(of.classes, (rows,), generator=draw)
            spread = torch.arange(of.domains).repeat_interleave(of.batch_size)
            domains = spread if balanced else torch.randint(of.domains, (rows,), generator=draw)
            moved = (domains + labels).view(-1, *[1] * (x.ndim - 1))
            per_seed.append((x + moved, labels, domains))
        found.append(tuple(torch.stack(values) for values in zip(*per_seed, strict=True)))
    return found


def random_masks(seeds=SEEDS, of: Setup | None = None, part=0.6):
    """Masks of random positions, `part` of each tracked matrix: name -> bool ``[S, out, in]``."""
    masks, network = {}, (of or setup()).network
    for i, name in enumerate(network.network.tracked_names, start=1):
        shape = network.shapes[name]
        each = [torch.rand(shape, generator=generator(seed, "test_mask", str(i))) < part for seed in seeds]
        masks[name] = torch.stack(each)
    return masks


def given(name: str, of: Setup, seeds=SEEDS, part=0.6) -> State:
    """Entries of the state that a method is given: a random mask, ranks, and a network for each domain."""
    masks = random_masks(seeds, of, part)
    experts = [start([100 * seed + domain for domain in range(of.domains)], of) for seed in seeds]

    def ranks(key: str, shape: torch.Size) -> torch.Tensor:
        return torch.stack([torch.rand(shape, generator=generator(seed, "test", key)) for seed in seeds])

    every = {
        "mask": masks,
        "ranks": {key: ranks(key, mask.shape[1:]) for key, mask in masks.items()},
        "experts": {key: torch.stack([networks[key] for networks in experts]) for key in experts[0]},
    }
    return {entry: every[entry] for entry in ALGORITHMS[name].given()}


def validation(seeds=SEEDS, of: Setup | None = None) -> Validation:
    """Nine rows; each seed is validated on a different six of them."""
    rows = [torch.randperm(9, generator=generator(seed, "test_split"))[:6] for seed in seeds]
    x = torch.randn(9, *input_shape(of or setup()), generator=generator(0, "test")).double()
    return Validation(x, torch.arange(9) % 3, torch.stack(rows))


def engine(method: Algorithm, seeds=SEEDS, first=None) -> FunctionalEngine:
    """A stack before its first step, from `start` or other parameters."""
    of, draws = method.setup, [generator(seed, "noise", "test") for seed in seeds]
    entries = given(type(method).__name__, of, seeds)
    known = first or start(seeds, of), draws, range(of.domains), validation(seeds, of), entries
    return FunctionalEngine([method] * len(seeds), *known)


def alone(name: str, steps: int, seed: int, of: Setup) -> tuple[Algorithm, Params, State]:
    """A method, parameters and state of one network: its functions called one after the other, without a stack."""
    method = make(name, of)
    first = engine(method, (seed,))
    params, state = tree_map(lambda value: value[0], (first.params, first.state))
    features, labels, rows = first.validation
    every = round((method.validate_every or 0) * of.steps_per_epoch)
    for step, values in enumerate(batches(steps, of, (seed,), method.batches == "balanced"), start=1):
        batch = Batch(*(value[0] for value in values))
        drawn = method.draw(first.draws[0], len(batch.labels)).items()
        noise = {key: value.double() if value.is_floating_point() else value for key, value in drawn}
        params, state, _ = method.update(params, batch, state, noise)
        if every and step % every == 0:
            loss = F.cross_entropy(method.forward(params, features[rows[0]]), labels[rows[0]])
            state = {**state, **method.validated(params, state, loss)}
    return method, params, state


def run(name: str, steps=10, seeds=SEEDS, of: Setup | None = None, balanced=None, **values) -> FunctionalEngine:
    """A stack after `steps` steps on `batches`; float64.

    Args:
        balanced: whether the batches are; default as the method asks.
    """
    method = make(name, of, **values)
    stack = engine(method, seeds)
    balanced = method.batches == "balanced" if balanced is None else balanced
    for features, labels, domains in batches(steps, of, seeds, balanced):
        stack.step(features, labels, {}, domains)
    return stack


def same(a: FunctionalEngine, b: FunctionalEngine, tolerance=1e-9) -> bool:
    """Whether the classifiers of two stacks are equal: the same names, up to rounding."""
    names = a.methods[0].shapes
    return all(torch.allclose(a.params[n], b.params[n], rtol=0, atol=tolerance) for n in names)


def one_batch(of: Setup | None = None, seed=3, balanced=True) -> Batch:
    """A batch of a single network."""
    return Batch(*(values[0] for values in batches(1, of, (seed,), balanced)[0]))


def one_network(of: Setup | None = None, seed=3):
    """Parameters of a single network: name -> tensor, float64."""
    return {name: value[0] for name, value in start((seed,), of).items()}


def network(name: str, of: Setup | None = None, **values) -> tuple[Algorithm, Params]:
    """A method, and the parameters of a single network with those that the method trains beside the classifier's."""
    method = make(name, of, **values)
    extra = method.extra_parameters(generator(3, "noise", "test"))
    return method, one_network(of) | {key: value.double() for key, value in extra.items()}


def leaves(params: Params) -> Params:
    """Copies to be trained by plain autograd."""
    return {name: value.detach().clone().requires_grad_() for name, value in params.items()}


def plain_hidden(params: Params, x: torch.Tensor) -> torch.Tensor:
    """Last hidden layer of a classifier with three of them, written out."""
    for i in range(3):
        x = (x @ params[f"layers.{i}.weight"].T + params[f"layers.{i}.bias"]).clamp(min=0)
    return x


def plain_logits(params: Params, x: torch.Tensor) -> torch.Tensor:
    """The same classifier's logits."""
    return plain_hidden(params, x) @ params["layers.3.weight"].T + params["layers.3.bias"]


def trained(name: str, seeds=(0, 1), epochs=2, dtype=torch.float64, **values) -> MethodNetworks:
    """A method through the one training loop, on `split_blobs` without "sketch"."""
    settings = Settings.current(ph2_num_epochs=epochs, hidden_sizes=(6, 5, 4), batch_size=16)
    method, entries = partial(ALGORITHMS[name], **values), given(name, setup(), seeds)
    return train_method(split_blobs(dtype, settings), ("sketch",), seeds, method, settings, given=entries)


@cache
def baseline(name: str, of: Setup) -> FunctionalEngine:
    """`run` of a baseline for the ten steps that other methods are compared with; not to be trained on."""
    return run(name, of=of)


@pytest.fixture(scope="session")
def methods() -> SimpleNamespace:
    """The makers above."""
    makers = (
        on_features,
        on_tokens,
        setup,
        make,
        start,
        batches,
        given,
        engine,
        alone,
        run,
        baseline,
        same,
        random_masks,
        one_batch,
        one_network,
        network,
        trained,
    )
    plain = (leaves, plain_hidden, plain_logits)
    return SimpleNamespace(seeds=SEEDS, **{maker.__name__: maker for maker in makers + plain})
