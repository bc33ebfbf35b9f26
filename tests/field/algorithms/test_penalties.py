"""Methods with penalties or memories of domains against plain autograd loops of one network, and cases by hand."""

from statistics import NormalDist

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from field.algorithms import ALGORITHMS
from field.algorithms.penalties import irm_penalty, quantile_weights

NORMAL = NormalDist()
STEPS = 10  # in `methods.setup`


class PlainRun:
    """One network, `torch.optim.Adam`, and an objective written out domain by domain.

    Args:
        methods: the fixture.
        objective: (this, step) -> loss; it sees the lists `logits`, `labels`, `hidden` and `risks`, one per domain.
        params: at the start.
        of: setup.
        restarts: step -> learning rate of the optimizer that begins there.
    """

    def __init__(self, methods, objective, params, of, restarts):
        self.of, self.memory, self.weights = of, {}, methods.leaves(params)
        for step, (x, y, _) in enumerate(methods.batches(STEPS, of, (3,))):
            if step in restarts:
                optimizer = torch.optim.Adam(list(self.weights.values()), lr=restarts[step])
            self.labels = y[0].chunk(of.domains)
            self.hidden = [methods.plain_hidden(self.weights, rows) for rows in x[0].chunk(of.domains)]
            self.logits = [methods.plain_logits(self.weights, rows) for rows in x[0].chunk(of.domains)]
            self.risks = [F.cross_entropy(*pair) for pair in zip(self.logits, self.labels, strict=True)]
            optimizer.zero_grad()
            objective(self, step).backward()
            optimizer.step()


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


def hgp(run, step):
    """Hessian-gradient products of the last layer as gradients of half the squared gradient."""
    head = [run.weights["layers.3.weight"], run.weights["layers.3.bias"]]

    def flat(value):
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, head, create_graph=True)])

    each = [flat(risk) for risk in run.risks]
    average = flat(mean(run.risks))
    products = [flat(g @ g / 2) for g in each]
    of_average = flat(average @ average / 2).detach()
    penalty = mean(4.0 * (p - of_average).pow(2).sum() for p in products)
    return mean(run.risks) + penalty + mean(2.0 * (g - average.detach()).pow(2).sum() for g in each)


def spectral(run, step):
    logits = torch.cat(run.logits)
    return F.cross_entropy(logits, torch.cat(run.labels)) + 0.3 * (logits**2).sum() / logits.numel()


def fishr(run, step):
    """Gradients of single rows by autograd, moving average as in the paper."""
    head = [run.weights["layers.3.weight"], run.weights["layers.3.bias"]]
    smooth, average = [], run.memory.get("average", [0.0] * run.of.domains)
    for before, logits, labels in zip(average, run.logits, run.labels, strict=True):
        errors = F.cross_entropy(logits, labels, reduction="none")
        rows = [torch.autograd.grad(error, head, create_graph=True) for error in errors]
        rows = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
        smooth.append(0.8 * before + 0.2 * ((rows - rows.mean(0)) ** 2).mean(0))
    run.memory["average"] = [now.detach() for now in smooth]
    variances = [now / 0.2 for now in smooth]
    penalty = mean(((v - mean(variances)) ** 2).mean() for v in variances)
    return mean(run.risks) + (100.0 * penalty if step >= 4 else 0)


def mtl(run, step):
    """The head reads the representation and the embedding of its domain."""
    risks, memory = [], run.memory.get("embeddings", [0.0] * run.of.domains)
    embeddings = [0.6 * hidden.mean(0) + 0.4 * before for hidden, before in zip(run.hidden, memory, strict=True)]
    run.memory["embeddings"] = [embedding.detach() for embedding in embeddings]
    for hidden, embedding, labels in zip(run.hidden, embeddings, run.labels, strict=True):
        both = torch.cat([hidden, embedding.expand_as(hidden)], 1)
        logits = both @ run.weights["wide_head.weight"].T + run.weights["wide_head.bias"]
        risks.append(F.cross_entropy(logits, labels))
    return mean(risks)


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
OF_IRM, OF_IB = {"irm_weight": 7.0, "irm_anneal": 0.4}, {"ib_weight": 3.0, "ib_anneal": 0.6}
CASES = {
    "IRM": (irm, OF_IRM, AT),
    "IB_ERM": (ib_erm, OF_IB, {6: 1e-3}),
    "IB_IRM": (ib_irm, OF_IRM | OF_IB, {4: 1e-3, 6: 1e-3}),
    "VREx": (vrex, {"penalty_weight": 7.0, "anneal": 0.4}, AT),
    "GroupDRO": (group_dro, {"eta": 0.5}, {}),
    "IGA": (iga, {"penalty_weight": 5.0}, {}),
    "HGP": (hgp, {"alpha": 4.0, "beta": 2.0}, {}),
    "SD": (spectral, {"penalty_weight": 0.3}, {}),
    "MTL": (mtl, {"ema": 0.6}, {}),
    "Fishr": (fishr, {"penalty_weight": 100.0, "ema": 0.8, "anneal": 0.4}, AT),
    "EQRM": (eqrm, {"quantile": 0.8, "burn_in": 0.5, "learning_rate_after": 4e-4}, {5: 4e-4}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_training_is_that_of_a_plain_loop(methods, name):
    objective, values, restarts = CASES[name]
    of = methods.setup(domains=3)
    plain = PlainRun(methods, objective, methods.network(name, of)[1], of, {0: 1e-3, **restarts})
    ours = methods.run(name, STEPS, (3,), of, balanced=True, **values)
    for key, value in plain.weights.items():
        assert torch.allclose(ours.params[key][0], value, rtol=0, atol=1e-8 if name == "EQRM" else 1e-10), key
    if name == "GroupDRO":
        assert np.allclose(ours.state["log_q"][0].exp(), plain.memory["q"], rtol=1e-12)
    if name == "MTL":
        assert torch.allclose(ours.state["embeddings"][0], torch.stack(plain.memory["embeddings"]), rtol=0, atol=1e-9)


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


# steps in DomainBed
ANNEALED = {
    "IRM": {"irm_anneal": 500},
    "VREx": {"anneal": 500},
    "IB_ERM": {"ib_anneal": 500},
    "Fishr": {"anneal": 1500},
}
ANNEALED |= {
    "IB_IRM": {"ib_anneal": 500, "irm_anneal": 500},
    "EQRM": {"burn_in": 2500},
    "WeightAverage": {"start": 100},
}


@pytest.mark.parametrize("name", ANNEALED)
def test_annealing_is_the_fraction_that_domainbeds_steps_are_of_5001(name):
    known = ALGORITHMS[name].known_hyperparameters()
    for hyperparameter, steps in ANNEALED[name].items():
        assert known[hyperparameter].default == pytest.approx(steps / 5001)
