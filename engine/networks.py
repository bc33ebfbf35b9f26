"""What a network is to the engine: where it begins, and which engine trains it."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from config import Settings
from engine.data import SplitFeatures, generator
from engine.loop import Engine, TrainingFailedError
from engine.stack import MatmulEngine, Params
from engine.tail import TailEngine
from models import HEAD, FeedforwardClassifier

TOLERANCE, STEPS = 1e-6, 1000  # of logistic regression: largest component of the gradient at the end; Newton steps
LARGEST_HESSIAN = 2000  # rows of the matrix of second derivatives that is still factorized


def random_start(seeds: Sequence[int], purpose: str, network: FeedforwardClassifier) -> Params:
    """`nn.Linear`'s own initialization, once per seed: name -> ``[S, *shape]`` (float32, CPU).

    Args:
        seeds: one network for each; a seed's start does not depend on the seeds beside it.
        purpose: "start" (Phase 1) or "fresh_start" (Phase 2).
        network: outline of the classifier, see `SplitFeatures.network`.
    """
    draws = [generator(seed, purpose) for seed in seeds]
    params = {}
    for i, layer in enumerate(network.layers):
        params[f"layers.{i}.weight"] = torch.empty(len(seeds), *layer.weight.shape)
        params[f"layers.{i}.bias"] = torch.empty(len(seeds), *layer.bias.shape)
        bound = 1 / math.sqrt(layer.in_features)
        for s, draw in enumerate(draws):
            nn.init.kaiming_uniform_(params[f"layers.{i}.weight"][s], a=math.sqrt(5), generator=draw)
            nn.init.uniform_(params[f"layers.{i}.bias"][s], -bound, bound, generator=draw)
    return params


def make_engine(
    data: SplitFeatures,
    settings: Settings,
    start: Params,
    learning_rate: float,
    backbone_rates: Sequence[float],
    head_rates: Sequence[float] | None = None,
) -> Engine:
    """The engine that trains networks of these inputs and settings.

    Args:
        start: initial parameters, name -> ``[S, V, *shape]``.
        learning_rate: of the classifier.
        backbone_rates: learning rate of the blocks of each arm, V; not used where there are none.
        head_rates: with blocks, that of the classifier of each arm; default `learning_rate`.
    """
    start = {name: value.to(data.like) for name, value in start.items()}
    if data.tail is None:
        return MatmulEngine(start, learning_rate)
    seeds = len(next(iter(start.values())))
    blocks = torch.tensor(backbone_rates, dtype=torch.float64)
    heads = torch.tensor(head_rates or [learning_rate] * len(blocks), dtype=torch.float64)
    rates = {name: (heads if name.startswith(HEAD) else blocks).expand(seeds, -1) for name in start}
    return TailEngine(data.network(settings.hidden_sizes), data.shortcut, start, rates)


def network_start(
    data: SplitFeatures, seeds: Sequence[int], purpose: str, settings: Settings, domains: Sequence[str], part: str
) -> Params:
    """Parameters before training, once per seed: name -> ``[S, *shape]`` (float32, CPU).

    A classifier on features is random. The blocks of a `BackboneTail` are the pretrained ones, the same for every seed;
    its classifier is random, or with `HEAD_START = "probe"` logistic regression on the features that it is trained on
    (LP-FT, Kumar et al., ICLR 2022).

    Args:
        purpose: "start" (Phase 1) or "fresh_start" (Phase 2): names the random stream.
        domains, part: that the network is trained on, see `SplitFeatures.rows`.
    """
    network = data.network(settings.hidden_sizes)
    if data.tail is None:
        return random_start(seeds, purpose, network)
    blocks = {name: p.detach() for name, p in network.named_parameters() if not name.startswith(HEAD)}
    start = {name: p.float().cpu().expand(len(seeds), *p.shape) for name, p in blocks.items()}
    if settings.head_start == "random":
        head = random_start(seeds, purpose, network.head)
    else:
        fit_probes(data, seeds, settings, domains, part)
        fitted = [data.probes[settings.probe_c, tuple(row)] for row in data.rows(domains, part, seeds).tolist()]
        weights, biases = zip(*fitted, strict=True)
        head = {"layers.0.weight": torch.stack(weights), "layers.0.bias": torch.stack(biases)}
    return start | {f"{HEAD}{name}": value for name, value in head.items()}


def fit_probes(
    data: SplitFeatures, seeds: Sequence[int], settings: Settings, domains: Sequence[str], part: str
) -> dict[tuple, tuple[Tensor, Tensor]]:
    """Fit the linear classifiers that `network_start` begins with, unless `data.probes` has them, and keep them there.

    Returns:
        Of these seeds: (C, row numbers) -> weights ``[classes, D]`` and biases ``[classes]``, float32 on the CPU.
    """
    keys = [(settings.probe_c, tuple(row)) for row in data.rows(domains, part, seeds).tolist()]
    labels = data.labels.cpu().numpy()
    for strength, row in dict.fromkeys(keys):
        if (strength, row) in data.probes:
            continue
        fitted = logistic_regression(data.features[[*row]].cpu().double().numpy(), labels[[*row]], strength)
        weight, bias = (torch.from_numpy(values).float() for values in (fitted.coef_, fitted.intercept_))
        if len(weight) == 1:  # of two classes: log odds of the second
            weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
        data.probes[strength, row] = weight, bias
    return {key: data.probes[key] for key in keys}


def logistic_regression(x: np.ndarray, y: np.ndarray, strength: float, fitted=None, steps: int = STEPS):
    """Logistic regression with the L2 penalty 1/(2C) on the weights, by Newton's method.

    It goes on until no component of the gradient exceeds `TOLERANCE`: the usual tolerance of 1e-4 leaves accuracies
    that differ by half a point from one machine to another.

    Args:
        x, y: float ``[n, D]`` and int ``[n]``.
        strength: C, the inverse of the penalty.
        fitted: an earlier result on the same data; the fit begins there, and changes it.
        steps: after which it is given up.

    Returns:
        A fitted `sklearn.linear_model.LogisticRegression`.

    Raises:
        TrainingFailedError: it did not converge.
    """
    from sklearn.linear_model import LogisticRegression  # takes a second to import
    from threadpoolctl import threadpool_limits

    size = (x.shape[1] + 1) * len(np.unique(y))
    solver = "newton-cholesky" if size <= LARGEST_HESSIAN else "newton-cg"
    model = fitted or LogisticRegression(solver=solver, tol=TOLERANCE, max_iter=steps, warm_start=True)
    with threadpool_limits(1):  # on a busy machine two threads that wait for each other took ten times as long
        model.set_params(C=strength).fit(x, y)
    if model.n_iter_.max() >= steps:
        raise TrainingFailedError(f"Logistic regression with C = {strength:g} did not converge in {steps} steps.")
    return model
