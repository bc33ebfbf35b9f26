"""What the tests of single methods share: a small problem, and methods run on it step by step or by the one loop."""

from itertools import pairwise

import torch
from problems import problem

from algorithms import ALGORITHMS, AlgorithmEngine, Batch, Setup
from config import Settings
from trainer_algorithm import train_algorithm
from training import generator, random_start

SIZES = {"features": 8, "classes": 3, "domains": 2, "hidden_sizes": (6, 5, 4)}
SEEDS = (3, 4, 5)


def setup(**changes) -> Setup:
    """Two sources, 8 features, 3 classes, 6 rows per step (and domain), 2 epochs of 5 steps."""
    return Setup(**{**SIZES, "batch_size": 6, "steps_per_epoch": 5, "epochs": 2, **changes})


def method(name: str, of: Setup | None = None, **values):
    """A method by name, with its defaults but for `values`."""
    return ALGORITHMS[name](of or setup(), **values)


def start(seeds=SEEDS, of: Setup | None = None, dtype=torch.float64):
    """Initial parameters: name -> ``[S, 1, *shape]``."""
    of = of or setup()
    drawn = random_start(seeds, "fresh_start", (of.features, of.classes, of.hidden_sizes))
    return {name: value.unsqueeze(1).to(dtype) for name, value in drawn.items()}


def batches(steps: int, of: Setup | None = None, seeds=SEEDS, balanced=True, dtype=torch.float64):
    """`steps` batches as `AlgorithmEngine.step` takes them: features ``[S, B, D]``, labels and domains ``[S, B]``."""
    of = of or setup()
    rows = of.batch_size * (of.domains if balanced else 1)
    found = []
    for step in range(steps):
        per_seed = []
        for seed in seeds:
            draw = generator(seed, "test", str(step))
            x = torch.randn(rows, of.features, generator=draw).to(dtype)
            labels = torch.randint(of.classes, (rows,), generator=draw)
            spread = torch.arange(of.domains).repeat_interleave(of.batch_size)
            domains = spread if balanced else torch.randint(of.domains, (rows,), generator=draw)
            per_seed.append((x + domains.unsqueeze(1) + labels.unsqueeze(1), labels, domains))
        found.append(tuple(torch.stack(values) for values in zip(*per_seed, strict=True)))
    return found


def given(name: str, seeds=SEEDS, of: Setup | None = None):
    """What a method's state must be given: masks, of random positions, 60 per cent of each tracked matrix."""
    of, widths = of or setup(), (of or setup()).hidden_sizes
    if not getattr(ALGORITHMS[name], "masked", False):
        return None
    masks = {}
    for i, (fan_in, fan_out) in enumerate(pairwise(widths), start=1):
        each = [torch.rand(fan_out, fan_in, generator=generator(seed, "test_mask", str(i))) < 0.6 for seed in seeds]
        masks[f"layers.{i}.weight"] = torch.stack(each)
    return {"mask": masks}


def run(name: str, steps=10, seeds=SEEDS, of: Setup | None = None, balanced=None, **values) -> AlgorithmEngine:
    """An engine after `steps` steps on `batches`; float64.

    Args:
        balanced: whether the batches are; default as the method wants them.
    """
    algorithm = method(name, of, **values)
    draws = [generator(seed, "noise", "test") for seed in seeds]
    validation = torch.randn(9, (of or setup()).features, generator=generator(0, "test")).double(), torch.arange(9) % 3
    sources = range((of or setup()).domains)
    engine = AlgorithmEngine(algorithm, start(seeds, of), draws, sources, validation, given(name, seeds, of))
    balanced = algorithm.batches == "balanced" if balanced is None else balanced
    for features, labels, domains in batches(steps, of, seeds, balanced):
        engine.step(features, labels, {}, domains)
    return engine


def same(a: AlgorithmEngine, b: AlgorithmEngine, tolerance=1e-9) -> bool:
    """Whether the classifiers of two engines are equal: the same names, up to rounding."""
    names = [name for name in a.networks if name.startswith("layers.")]
    return all(torch.allclose(a.networks[n], b.networks[n], rtol=0, atol=tolerance) for n in names)


def one_batch(of: Setup | None = None, seed=3, balanced=True) -> Batch:
    """A batch of a single network."""
    features, labels, domains = batches(1, of, (seed,), balanced)[0]
    return Batch(features[0], labels[0], domains[0])


def one_network(of: Setup | None = None, seed=3):
    """Parameters of a single network: name -> tensor, float64."""
    return {name: value[0, 0] for name, value in start((seed,), of).items()}


def trained(name: str, seeds=(0, 1), epochs=2, dtype=torch.float64, holdouts=("sketch",), **values):
    """A method through the one training loop on the Gaussian blobs of `problems`."""
    settings = Settings.current(ph2_num_epochs=epochs, hidden_sizes=(6, 5, 4), batch_size=16)
    return train_algorithm(problem(dtype, settings), holdouts, seeds, ALGORITHMS[name], values, settings)
