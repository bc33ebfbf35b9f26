"""Penalties on the risks of the domains.

A risk is the mean cross-entropy of one source domain; "DomainBed" is the benchmark of Gulrajani & Lopez-Paz
(ICLR 2021), whose defaults and search distributions are adopted. What it counts in steps, of 5001, is a fraction of the
training here.
"""

from math import log, log10
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from field.algorithms.base import Algorithm, Hyperparameter, State, log_uniform, register, uniform
from field.algorithms.parts import one_hot, scalar, variance

STEPS = 5001  # of a training in DomainBed
BISECTIONS = 40  # halvings of the interval that holds a quantile: far below the noise of a risk


def training_fraction(default: float, meaning: str, low: float, high: float) -> Hyperparameter:
    """A length that DomainBed gives in steps, with ``10 ** U(low, high)`` steps as its random search."""
    return Hyperparameter(default / STEPS, meaning, log_uniform(low - log10(STEPS), high - log10(STEPS)), tensor=True)


class Switching(Algorithm):
    """Base class: the objective changes at fixed points of the training, and Adam is restarted at each.

    The moments belong to the old objective, whose gradients can be smaller by orders of magnitude.

    Attributes:
        switches: names of the hyperparameters that say after which fraction of the training; a switch at 1 or later
            never happens.

    State: "switches", name of a switch -> number of the first step after it.
    """

    batches = "balanced"
    switches: ClassVar[tuple[str, ...]] = ()

    def initial_state(self, params):
        steps = {switch: torch.tensor(round(getattr(self, switch) * self.setup.steps)) for switch in self.switches}
        return {**super().initial_state(params), "switches": steps}

    def switched(self, switch: str, state: State, before: float | Tensor, after: float | Tensor) -> Tensor:
        """`before` or `after` (scalar), depending on whether the training is before or after a switch."""
        passed, like = state["step"] >= state["switches"][switch], state["adam"]["mean"]
        return torch.where(passed, scalar(after, like), scalar(before, like))

    def update(self, params, batch, state, noise):
        moments = state["adam"]
        for step in state["switches"].values():
            now = state["step"] == step
            moments = {name: torch.where(now, torch.zeros_like(value), value) for name, value in moments.items()}
        return super().update(params, batch, {**state, "adam": moments}, noise)


def irm_penalty(logits: Tensor, labels: Tensor) -> Tensor:
    """Unbiased estimate of the squared derivative of a domain's risk by a factor on its logits, mean over domains.

    The derivative of the cross-entropy at factor 1 is E_p[logit] − logit of the label, p = softmax; the square of its
    mean is estimated by the product of its means on two halves of the rows. Logits are ``[domains, rows, classes]``.
    """
    of_label = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    slopes = (logits.softmax(-1) * logits).sum(-1) - of_label
    return (slopes[:, ::2].mean(1) * slopes[:, 1::2].mean(1)).mean()


def ib_penalty(representation: Tensor) -> Tensor:
    """Variance of a representation ``[domains, rows, h]`` within a domain, mean over units and domains."""
    return representation.var(1).mean()


@register
class IRM(Switching):
    """Invariant risk minimization (Arjovsky, Bottou, Gulrajani & Lopez-Paz 2019, arXiv 1907.02893), IRMv1.

    Minimizes the mean over domains e of R_e(f) + λ (∂R_e(s f)/∂s)² at s = 1: the best factor on the logits should be 1
    in each domain. The square is estimated without bias, as the paper suggests and DomainBed does, by the product of
    the derivatives on two halves of the domain's batch; the estimate, and hence the loss, can be negative. λ is 1 up to
    the switch. The derivative is written in closed form, where the originals differentiate twice; the value is the
    same.
    """

    hyperparameters = {
        "irm_weight": Hyperparameter(100.0, "λ after the switch (before: 1)", log_uniform(-1, 5), tensor=True),
        "irm_anneal": training_fraction(500, "fraction of the training before λ takes effect", 0, 4),
    }
    switches = ("irm_anneal",)

    def loss(self, params, batch, state, noise):
        logits = self.forward(params, batch.features)
        penalty = irm_penalty(self.by_domain(logits), self.by_domain(batch.labels))
        weight = self.switched("irm_anneal", state, 1.0, self.irm_weight)
        return F.cross_entropy(logits, batch.labels) + weight * penalty, {}


@register
class IB_ERM(Switching):
    """Information-bottleneck ERM (Ahuja et al., NeurIPS 2021).

    Minimizes mean_e [R_e + λ Var_e(Φ)], where Var_e is the variance of the representation Φ in the batch of domain e,
    averaged over its units: a bound on the entropy, which the paper keeps low. As in DomainBed the variance is taken
    within each domain, and λ is 0 up to the switch. Φ is the last hidden layer; the frozen features below it cannot
    change. DomainBed's λ = 100 shrinks so narrow a Φ to a point, and the risk stays at ln(classes): the default and the
    search are 1/100 of DomainBed's.
    """

    hyperparameters = {
        "ib_weight": Hyperparameter(
            1.0, "λ of the variance after the switch (before: 0)", log_uniform(-3, 3), tensor=True
        ),
        "ib_anneal": training_fraction(500, "fraction of the training before the variance counts", 0, 4),
    }
    switches = ("ib_anneal",)

    def loss(self, params, batch, state, noise):
        representation = self.representation(params, batch.features)
        risk = F.cross_entropy(self.head(params, representation), batch.labels)
        weight = self.switched("ib_anneal", state, 0.0, self.ib_weight)
        return risk + weight * ib_penalty(self.by_domain(representation)), {}


@register
class IB_IRM(IRM, IB_ERM):
    """Information-bottleneck IRM (Ahuja et al., NeurIPS 2021): the sum of both penalties, of `IRM` and `IB_ERM`.

    Each has its own λ and its own switch. With `IB_ERM`'s λ = 1 for the variance the two penalties together shrink Φ
    almost to a point, and accuracy on the sources falls from epoch to epoch: the default is 0.1.
    """

    hyperparameters = {
        "ib_weight": Hyperparameter(
            0.1, "λ of the variance after the switch (before: 0)", log_uniform(-3, 3), tensor=True
        )
    }
    switches = ("irm_anneal", "ib_anneal")

    def loss(self, params, batch, state, noise):
        risk, changes = super().loss(params, batch, state, noise)  # IRM's
        weight = self.switched("ib_anneal", state, 0.0, self.ib_weight)
        return risk + weight * ib_penalty(self.by_domain(self.representation(params, batch.features))), changes


@register
class VREx(Switching):
    """Variance risk extrapolation (Krueger et al., ICML 2021).

    Minimizes mean_e R_e + β Var_e(R_e), the variance over domains with divisor n. As in DomainBed the risks are
    averaged where the paper sums them (its β is n times this one), and β is 1 up to the switch.
    """

    hyperparameters = {
        "penalty_weight": Hyperparameter(10.0, "β after the switch (before: 1)", log_uniform(-1, 5), tensor=True),
        "anneal": training_fraction(500, "fraction of the training before β takes effect", 0, 4),
    }
    switches = ("anneal",)

    def loss(self, params, batch, state, noise):
        risks = self.domain_losses(params, batch)
        weight = self.switched("anneal", state, 1.0, self.penalty_weight)
        return risks.mean() + weight * risks.var(correction=0), {}


@register
class GroupDRO(Algorithm):
    """Group distributionally robust optimization (Sagawa, Koh, Hashimoto & Liang, ICLR 2020), its Algorithm 1.

    Minimizes the largest risk: the loss is Σ_e q_e R_e, and before each step q_e is multiplied by exp(η R_e) and
    normalized. As in DomainBed each step sees all domains, where the paper draws one. The state holds ln q, because q
    itself would reach 0 in a long training and stay there. The paper's strong L2 penalty is `weight_decay`.
    """

    batches = "balanced"
    hyperparameters = {
        "eta": Hyperparameter(1e-2, "η, step size of the weights of the domains", log_uniform(-3, -1), tensor=True)
    }

    def initial_state(self, params):
        state = super().initial_state(params)
        return {**state, "log_q": state["adam"]["mean"].new_zeros(self.setup.domains) - log(self.setup.domains)}

    def loss(self, params, batch, state, noise):
        risks = self.domain_losses(params, batch)
        log_q = (state["log_q"] + self.eta * risks.detach()).log_softmax(0)
        return log_q.exp() @ risks, {"log_q": log_q}


@register
class SD(Algorithm):
    """Spectral decoupling (Pezeshki et al., "Gradient starvation", NeurIPS 2021).

    Minimizes cross-entropy + λ mean(logit²), so that a feature learned first does not silence the gradient of the
    others. As in DomainBed the mean is over images and classes, where the paper (one logit) has λ/2 times the sum. It
    needs no domains, hence pooled batches.
    """

    hyperparameters = {
        "penalty_weight": Hyperparameter(0.1, "λ of the squared logits", log_uniform(-5, -1), tensor=True)
    }

    def loss(self, params, batch, state, noise):
        logits = self.forward(params, batch.features)
        return F.cross_entropy(logits, batch.labels) + self.penalty_weight * logits.square().mean(), {}


@register
class IGA(Algorithm):
    """Inter-environmental gradient alignment (Koyama & Yamaguchi 2020, arXiv 2008.01883).

    Minimizes mean_e R_e + λ tr Var_e(∇R_e): the variance of the domains' gradients over domains, summed over weights
    and itself differentiated. The divisor of the variance is n as in the paper; DomainBed has none, so its λ is this
    one divided by n. Its λ = 1000 is for a pretrained network and a small rate: a network from a random start, as here,
    would keep its gradients near zero instead of learning. The default and the search are 10⁻⁴ of DomainBed's.
    """

    batches = "balanced"
    hyperparameters = {
        "penalty_weight": Hyperparameter(0.1, "λ of the gradients' variance", log_uniform(-3, 1), tensor=True)
    }

    def loss(self, params, batch, state, noise):
        gradients, risks = self.domain_gradients(params, batch)
        spread = sum(variance(gradient).sum() for gradient in gradients.values())
        return risks.mean() + self.penalty_weight * spread, {}


@register
class HGP(Algorithm):
    """Hessian-gradient product alignment (Hemati, Zhang, Estiri & Chen, "Understanding Hessian alignment for domain
    generalization", ICCV 2023).

    Minimizes mean_e [R_e + α ‖H_e g_e − H g‖² + β ‖g_e − g‖²]. g_e and H_e are gradient and Hessian of the risk of
    domain e by weights and biases of the last layer alone, which is the classifier in the authors' code; g and H are
    those of the mean risk, and g and the product H g are not differentiated. `IGA` has the β term, for all layers. The
    gradient of the penalty reaches all layers. The products are written in closed form, where the authors differentiate
    twice; the value is the same. Defaults and search are theirs.
    """

    batches = "balanced"
    hyperparameters = {
        "alpha": Hyperparameter(1e-4, "α of the Hessian-gradient products", log_uniform(-5, -3), tensor=True),
        "beta": Hyperparameter(5e-3, "β of the gradients", log_uniform(-3, -1), tensor=True),
    }

    def loss(self, params, batch, state, noise):
        representation = self.representation(params, batch.features)
        logits = self.head(params, representation)
        inputs = self.by_domain(F.pad(representation, (0, 1), value=1.0))  # 1 for the bias
        each, products, product_of_mean = head_curvature(inputs, self.by_domain(logits), self.by_domain(batch.labels))
        apart = (products - product_of_mean.detach()).square().sum((1, 2)).mean()
        penalty = self.alpha * apart + self.beta * (each - each.mean(0).detach()).square().sum((1, 2)).mean()
        return F.cross_entropy(logits, batch.labels) + penalty, {}


def head_curvature(inputs: Tensor, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients g_e and products H_e g_e by the last layer of each domain's risk, and H g of the mean risk.

    With V a direction of the last layer, H_e V is the mean over rows of dp xᵀ, where x is a row's input, p its softmax,
    and dp = p ⊙ (V x − p · V x) the change of p along V.

    Args:
        inputs: of the last layer, with a 1 for the bias, ``[domains, rows, h + 1]``.
        logits: ``[domains, rows, classes]``.
        labels: ``[domains, rows]``.

    Returns:
        g_e and H_e g_e ``[domains, classes, h + 1]``; H g ``[classes, h + 1]``.
    """
    p, rows = logits.softmax(-1), logits.shape[1]
    gradients = (p - one_hot(labels, logits.shape[-1], logits)).mT @ inputs / rows

    def along(direction: Tensor) -> Tensor:
        change = inputs @ direction.mT
        return (p * (change - (p * change).sum(-1, keepdim=True))).mT @ inputs / rows

    return gradients, along(gradients), along(gradients.mean(0)).mean(0)


def quantile_weights(risks: Tensor, quantile: float | Tensor) -> Tensor:
    """Derivatives of a quantile of the domains' risks by each risk; they sum to 1, and Σ weight · risk is the quantile.

    The risks ``[n]`` are smoothed with a Gaussian kernel of width b = 1.06 std n^(−1/5). The quantile t solves
    mean Φ((t − R_e) / b) = quantile. By the implicit function theorem dt = Σ w_e (dR_e + z_e db), where
    z_e = (t − R_e) / b and w_e is the kernel's density at z_e, normalized. Risks are measured in standard deviations
    from their mean, so that nothing is divided by zero, and nothing is lost to rounding, if they are almost equal.
    """
    n = len(risks)
    if n == 1:
        return torch.ones_like(risks)
    width = 1.06 * n**-0.2
    least = torch.finfo(risks.dtype).eps  # a smaller deviation is rounding
    units = risks - risks.mean()
    units = units - units.mean()  # the first mean was rounded
    units = units / units.std().clamp_min(least)
    reach = width * torch.special.ndtri(scalar(quantile, risks))
    low, high = units.amin() + reach, units.amax() + reach
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        below = torch.special.ndtr((middle - units) / width).mean() < quantile
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    z = ((low + high) / 2 - units) / width
    density = (-z.square() / 2).softmax(0)
    return density + (density @ z) * width * units / (n - 1)  # d std / dR_e = units_e / (n − 1)


@register
class EQRM(Switching):
    """Empirical quantile risk minimization (Eastwood et al., "Probable domain generalization", NeurIPS 2022).

    Minimizes the α-quantile of the distribution of risks over domains, estimated by a Gaussian kernel density on the
    risks of the batch with the width of Silverman's normal rule; the mean risk up to the end of the burn-in. The
    gradient is that of the quantile, through the kernel's centres and its width; the original differentiates the ends
    of its bisection. DomainBed's rate after the burn-in is 1/50 of its rate before; the default keeps that ratio to the
    default rate here. The search draws this rate independently, a decade to either side, as there.
    """

    hyperparameters = {
        "quantile": Hyperparameter(
            0.75, "α, above 0 and below 1; 0.5 is near the mean risk", uniform(0.5, 0.99), tensor=True
        ),
        "burn_in": training_fraction(2500, "fraction of the training on the mean risk", 2.5, 3.5),
        "learning_rate_after": Hyperparameter(
            2e-5, "learning rate of Adam after the burn-in", log_uniform(log10(2e-6), log10(2e-4)), tensor=True
        ),
    }
    switches = ("burn_in",)

    def rate(self, state):
        return self.switched("burn_in", state, self.learning_rate, self.learning_rate_after)

    def loss(self, params, batch, state, noise):
        risks = self.domain_losses(params, batch)
        part = self.switched("burn_in", state, 0.0, 1.0)
        weights = part * quantile_weights(risks.detach(), self.quantile) + (1 - part) / self.setup.domains
        return weights @ risks, {}
