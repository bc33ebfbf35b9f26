"""The penalty methods against plain autograd loops of one network, hand-computed cases and limits."""

from statistics import NormalDist

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from engine import Batch
from field.algorithms import ALGORITHMS
from field.algorithms.penalties import irm_penalty, quantile_weights

NORMAL = NormalDist()
STEPS = 10  # in `methods.setup`


class PlainRun:
    """One network, `torch.optim.Adam`, and an objective written out domain by domain.

    Args:
        methods: the fixture.
        objective: (this, step) -> loss; it sees the lists `logits`, `labels`, `hidden` and `risks`, one per domain.
        of: setup.
        restarts: step -> learning rate of the optimizer that begins there.
    """

    def __init__(self, methods, objective, of, restarts, seed=4):
        self.of, self.memory = of, {}
        self.weights = {name: value.clone().requires_grad_() for name, value in methods.one_network(of, seed).items()}
        for step, (x, y, _) in enumerate(methods.batches(STEPS, of, (seed,))):
            if step in restarts:
                optimizer = torch.optim.Adam(list(self.weights.values()), lr=restarts[step])
            self.labels = y[0].chunk(of.domains)
            self.hidden = [self.layers(rows) for rows in x[0].chunk(of.domains)]
            self.logits = [self.last(rows) for rows in self.hidden]
            self.risks = [F.cross_entropy(*pair) for pair in zip(self.logits, self.labels, strict=True)]
            optimizer.zero_grad()
            objective(self, step).backward()
            optimizer.step()

    def layers(self, x):
        for i in range(len(self.of.hidden_sizes)):
            x = (x @ self.weights[f"layers.{i}.weight"].T + self.weights[f"layers.{i}.bias"]).clamp(min=0)
        return x

    def last(self, x):
        i = len(self.of.hidden_sizes)
        return x @ self.weights[f"layers.{i}.weight"].T + self.weights[f"layers.{i}.bias"]


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def invariance(run):
    """IRMv1 as it is defined: a dummy factor, differentiated twice; halves interleaved."""

    def slope(logits, labels):
        factor = torch.ones((), dtype=logits.dtype, requires_grad=True)
        return torch.autograd.grad(F.cross_entropy(factor * logits, labels), factor, create_graph=True)[0]

    pairs = zip(run.logits, run.labels, strict=True)
    return mean(slope(logits[::2], y[::2]) * slope(logits[1::2], y[1::2]) for logits, y in pairs)


def bottleneck(run):
    each = []
    for hidden in run.hidden:
        deviation = hidden - sum(hidden) / len(hidden)
        each.append((deviation**2).sum(0).div(len(hidden) - 1).mean())
    return mean(each)


def irm(run, step):
    return mean(run.risks) + (7.0 if step >= 4 else 1.0) * invariance(run)


def ib_erm(run, step):
    return mean(run.risks) + (3.0 if step >= 6 else 0.0) * bottleneck(run)


def ib_irm(run, step):
    return irm(run, step) + (3.0 if step >= 6 else 0.0) * bottleneck(run)


def vrex(run, step):
    average = mean(run.risks)
    return average + (7.0 if step >= 4 else 1.0) * mean((risk - average) ** 2 for risk in run.risks)


def group_dro(run, step):
    q = run.memory.get("q", np.ones(run.of.domains) / run.of.domains)
    q = q * np.exp([0.5 * risk.item() for risk in run.risks])
    run.memory["q"] = q / q.sum()
    return sum(q * risk for q, risk in zip(run.memory["q"], run.risks, strict=True))


def iga(run, step):
    weights = list(run.weights.values())
    each = [torch.cat([g.flatten() for g in torch.autograd.grad(r, weights, create_graph=True)]) for r in run.risks]
    return mean(run.risks) + 5.0 * mean((g - mean(each)).pow(2).sum() for g in each)


def spectral(run, step):
    logits = torch.cat(run.logits)
    return F.cross_entropy(logits, torch.cat(run.labels)) + 0.3 * (logits**2).sum() / logits.numel()


def kernel_quantile(risks, quantile):
    """Quantile of a Gaussian kernel density of the risks, by bisection down to the last digit."""
    risks = np.asarray(risks)
    width = 1.06 * np.std(risks, ddof=1) * len(risks) ** -0.2
    low, high = risks.min() - 20 * width, risks.max() + 20 * width
    for _ in range(200):
        middle = (low + high) / 2
        below = np.mean([NORMAL.cdf((middle - risk) / width) for risk in risks]) < quantile
        low, high = (middle, high) if below else (low, middle)
    return middle


def differences(risks, quantile, h=1e-5):
    """Derivatives of `kernel_quantile` by central differences."""
    eye = h * np.eye(len(risks))
    return [(kernel_quantile(risks + e, quantile) - kernel_quantile(risks - e, quantile)) / (2 * h) for e in eye]


def eqrm(run, step):
    if step < 5:
        return mean(run.risks)
    slopes = differences(np.array([risk.item() for risk in run.risks]), 0.8)
    return sum(slope * risk for slope, risk in zip(slopes, run.risks, strict=True))


AT = {4: 1e-3}  # step at which Adam is restarted, and its rate
CASES = {
    "IRM": (irm, {"irm_weight": 7.0, "irm_anneal": 0.4}, AT),
    "IB_ERM": (ib_erm, {"ib_weight": 3.0, "ib_anneal": 0.6}, {6: 1e-3}),
    "IB_IRM": (
        ib_irm,
        {"irm_weight": 7.0, "irm_anneal": 0.4, "ib_weight": 3.0, "ib_anneal": 0.6},
        {4: 1e-3, 6: 1e-3},
    ),
    "VREx": (vrex, {"penalty_weight": 7.0, "anneal": 0.4}, AT),
    "GroupDRO": (group_dro, {"eta": 0.5}, {}),
    "IGA": (iga, {"penalty_weight": 5.0}, {}),
    "SD": (spectral, {"penalty_weight": 0.3}, {}),
    "EQRM": (eqrm, {"quantile": 0.8, "burn_in": 0.5, "learning_rate_after": 4e-4}, {5: 4e-4}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_training_is_that_of_a_plain_loop(methods, name):
    objective, values, restarts = CASES[name]
    of = methods.setup(domains=3)
    plain = PlainRun(methods, objective, of, {0: 1e-3, **restarts})
    ours = methods.run(name, STEPS, (4,), of, balanced=True, **values)
    for key, value in plain.weights.items():
        assert torch.allclose(ours.params[key][0], value, rtol=0, atol=1e-8), key
    if name == "GroupDRO":
        assert np.allclose(ours.state["log_q"][0].exp(), plain.memory["q"], rtol=1e-12)


# What makes each of them empirical risk minimization.
WITHOUT = {
    "IRM": {"irm_weight": 0.0, "irm_anneal": 0.0},
    "IB_ERM": {"ib_weight": 0.0, "ib_anneal": 0.0},
    "IB_IRM": {"irm_weight": 0.0, "irm_anneal": 0.0, "ib_weight": 0.0, "ib_anneal": 0.0},
    "VREx": {"penalty_weight": 0.0, "anneal": 0.0},
    "GroupDRO": {"eta": 0.0},
    "IGA": {"penalty_weight": 0.0},
    "SD": {"penalty_weight": 0.0},
    "EQRM": {"quantile": 0.5, "burn_in": 0.0, "learning_rate_after": 1e-3},  # median of two domains = their mean
}


@pytest.mark.parametrize("name", WITHOUT)
def test_without_its_penalty_a_method_is_erm(methods, name):
    baseline = "ERM" if name == "SD" else "ERMBalanced"
    assert methods.same(methods.run(name, **WITHOUT[name]), methods.run(baseline))


@pytest.mark.parametrize("name", ["VREx", "GroupDRO", "IGA", "EQRM"])
def test_with_one_domain_a_method_is_erm(methods, name):
    of = methods.setup(domains=1)
    values = {"VREx": {"anneal": 2.0}, "EQRM": {"burn_in": 0.0, "learning_rate_after": 1e-3}}.get(name, {})
    assert methods.same(methods.run(name, of=of, **values), methods.run("ERMBalanced", of=of))


def test_the_irm_penalty_by_hand():
    p = torch.tensor([0.9, 0.6, 0.2], dtype=torch.float64)  # probability of class 0, logits (ln p/(1−p), 0)
    logits = torch.stack([(p / (1 - p)).log(), torch.zeros(3)], -1)
    labels = torch.tensor([0, 1, 0])
    # slope of −ln p(label) in a factor on the logits: (p − 1) logit where the label is 0, p logit where it is 1
    slopes = -0.1 * np.log(9), 0.6 * np.log(1.5), -0.8 * np.log(0.25)
    expected = (slopes[0] + slopes[2]) / 2 * slopes[1]  # rows 0 and 2 are one half, row 1 the other
    assert irm_penalty(logits[None], labels[None]).item() == pytest.approx(expected, rel=1e-12)
    assert irm_penalty(logits[None, :2], labels[None, :2]) < 0  # no square of one number: it may be negative
    two = irm_penalty(torch.stack([logits, 0 * logits]), torch.stack([labels, labels]))
    assert two.item() == pytest.approx(expected / 2, rel=1e-12)  # mean over domains; equal logits have no slope


@pytest.mark.parametrize("quantile", [0.5, 0.75, 0.99])
@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_the_quantile_of_the_risks(quantile, scale):
    risks = 1 + scale * torch.tensor([0.31, -0.77, 0.4, 0.12], dtype=torch.float64)
    weights = quantile_weights(risks, quantile)
    found, expected = (weights * (risks - 1)).sum() / scale, (kernel_quantile(risks, quantile) - 1) / scale
    assert found.item() == pytest.approx(expected, abs=1e-8)
    assert weights.tolist() == pytest.approx(differences(risks.numpy(), quantile, 1e-5 * scale), abs=1e-4)
    assert weights.sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_risks_have_equal_weights(dtype):
    weights = quantile_weights(torch.full((3,), 0.7, dtype=dtype), 0.9)
    assert weights.dtype == dtype
    assert weights.tolist() == pytest.approx([1 / 3] * 3, abs=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_single_precision_stays_single(methods, name):
    values = CASES[name][1]
    algorithm = methods.make(name, **values)
    params = {key: value.float() for key, value in methods.one_network().items()}
    state = algorithm.initial_state(params)
    kinds = tree_map(lambda value: (value.dtype, value.shape), state)
    for x, y, d in methods.batches(STEPS, dtype=torch.float32):
        params, state, loss = algorithm.update(params, Batch(x[0], y[0], d[0]), state, {})
        assert tree_map(lambda value: (value.dtype, value.shape), state) == kinds
        assert loss.dtype == torch.float32
        assert all(value.dtype == torch.float32 and value.isfinite().all() for value in params.values())


def test_a_long_training_does_not_lose_a_domain(methods):
    of = methods.setup(domains=2)
    algorithm = methods.make("GroupDRO", of, eta=1e4)
    params, batch = methods.one_network(of), methods.one_batch(of)
    state = algorithm.initial_state(params)
    loss, changes = algorithm.loss(params, batch, state, {})
    assert loss.item() == pytest.approx(algorithm.domain_losses(params, batch).max().item(), rel=1e-6)
    for _ in range(3):
        changes = algorithm.loss(params, batch, {**state, **changes}, {})[1]
    assert changes["log_q"].isfinite().all()


@pytest.mark.parametrize(
    ("name", "hyperparameter", "steps"),
    [
        ("IRM", "irm_anneal", 500),
        ("VREx", "anneal", 500),
        ("IB_ERM", "ib_anneal", 500),
        ("IB_IRM", "ib_anneal", 500),
        ("IB_IRM", "irm_anneal", 500),
        ("Fishr", "anneal", 1500),
        ("EQRM", "burn_in", 2500),
        ("WeightAverage", "start", 100),
    ],
)
def test_annealing_is_the_fraction_that_domainbeds_steps_are_of_5001(name, hyperparameter, steps):
    assert ALGORITHMS[name].known_hyperparameters()[hyperparameter].default == pytest.approx(steps / 5001)


def test_iga_anneals_nothing():
    assert not [name for name in ALGORITHMS["IGA"].known_hyperparameters() if "anneal" in name]
