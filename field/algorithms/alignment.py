"""Distributions of representations or gradients made alike across domains."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from field.algorithms.base import Algorithm, Hyperparameter, log_uniform, register, uniform
from field.algorithms.parts import one_hot
from field.algorithms.penalties import Switching

KERNEL_RATES = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)  # per squared unit of the representation


class RepresentationAlignment(Algorithm):
    """Base class: cross-entropy plus the mean distance between the representations of two source domains; 0 for one."""

    batches = "balanced"
    hyperparameters = {
        "penalty_weight": Hyperparameter(
            1.0, "weight of the mean distance of two domains", log_uniform(-1, 1), tensor=True
        )
    }

    def distances(self, representations: Tensor) -> Tensor:
        """Representations of each domain ``[n, rows, h]`` -> distance of each pair, ``[n, n]``, 0 on the diagonal."""
        raise NotImplementedError

    def loss(self, params, batch, state, noise):
        representation = self.representation(params, batch.features)
        error = F.cross_entropy(self.head(params, representation), batch.labels)
        distances, n = self.distances(self.by_domain(representation)), self.setup.domains
        return error + self.penalty_weight * distances.sum() / max(n * (n - 1), 1), {}


@register
class CORAL(RepresentationAlignment):
    """Correlation alignment (Sun & Saenko, "Deep CORAL", ECCV workshops 2016), between the source domains.

    Minimizes cross-entropy + penalty_weight · mean over pairs of domains i, j of ‖μ_i − μ_j‖² / h + ‖C_i − C_j‖² / h²,
    with μ and C the mean and covariance of the h units of the last hidden layer over the domain's rows of the batch.
    The paper aligns a source with the unlabelled target and has the covariance term alone, over 4 h²; pairs of sources,
    the term of the means and the scale are DomainBed's, because the target is not seen in training.
    """

    def distances(self, representations):
        mean = representations.mean(1, keepdim=True)
        centred = representations - mean
        covariance = centred.mT @ centred / max(representations.shape[1] - 1, 1)
        of_means = (mean - mean.movedim(1, 0)).square().mean(-1)
        return of_means + (covariance.unsqueeze(1) - covariance).square().mean((-2, -1))


@register
class MMD(RepresentationAlignment):
    """Maximum mean discrepancy between domains (Li, Pan, Wang & Kot, CVPR 2018; Gretton et al., JMLR 2012).

    Minimizes cross-entropy + penalty_weight · mean over pairs of domains (i, j) of K_ii + K_jj − 2 K_ij, with K_ij the
    mean over rows x of i and y ≠ x of j of k(x, y), k the mean of exp(−g ‖x − y‖²) over g = 10⁻³ … 10³, on the last
    hidden layer. Of the paper's adversarial autoencoder only this term is kept, as in DomainBed, whose rates g these
    are: there is no decoder and no prior on the code here.

    Two deviations from DomainBed. It takes the biased estimate (a row's kernel with itself counts), which falls as all
    rows come together: with it the narrow layers trained here from a random start collapsed to a point. Gretton et
    al.'s unbiased estimate, sometimes negative, has no such slope. And it adds the kernels up; here is their mean, k(x,
    x) = 1, so that its weight 1 is a `penalty_weight` of 7: the default and the search are 1/7 of DomainBed's.
    """

    def distances(self, representations):
        n, rows = sizes = representations.shape[:2]
        x = representations.flatten(0, 1)
        x = x - x.mean(0)  # leaves distances as they are; smaller numbers lose less to rounding below
        norm = x.square().sum(1)
        apart = (norm.unsqueeze(1) + norm - 2 * x @ x.T).clamp(min=0)
        kernel = sum((-rate * apart).exp() for rate in KERNEL_RATES) / len(KERNEL_RATES)
        others = 1 - torch.eye(n * rows, dtype=x.dtype, device=x.device)  # no row with itself
        count = rows * rows - rows * torch.eye(n, dtype=x.dtype, device=x.device)
        mean = (kernel * others).unflatten(1, sizes).unflatten(0, sizes).sum((1, 3)) / count.clamp(min=1)
        own = mean.diagonal()
        return own.unsqueeze(1) + own - 2 * mean


@register
class Mixup(Algorithm):
    """Mixup (Zhang et al., ICLR 2018) of images of different domains (Xu et al., AAAI 2020; Wang et al., ICASSP 2020).

    The domains are arranged in a random cycle. Row k of each domain i is mixed with row k of the next domain j,
    x = s x_i + (1 − s) x_j with one s ~ Beta(alpha, alpha) per pair of domains, and the mean over pairs of
    s CE(f(x), y_i) + (1 − s) CE(f(x), y_j) is minimized. Pairs of domains and one s per pair are DomainBed's; Zhang et
    al. mix the rows of one batch and know no domains. What is mixed is the input here, not pixels: frozen features, or
    the tokens before a block. Xu et al. and Wang et al. are followed in mixing across domains alone, without Xu's
    adversary.
    """

    batches = "balanced"
    hyperparameters = {
        "alpha": Hyperparameter(
            0.2, "both parameters of the share's Beta: near 0 = no mixing", log_uniform(-1, 1), tensor=True
        )
    }

    def draw(self, draw, rows):
        """Next domain in the cycle (int64) and share of a domain's own features, of each domain: ``[domains]``."""
        cycle = torch.randperm(self.setup.domains, generator=draw)
        partner = torch.empty_like(cycle)
        partner[cycle] = cycle.roll(-1)
        seed = int(torch.randint(2**62, (), generator=draw))  # PyTorch's Beta takes no generator, NumPy's does
        share = np.random.default_rng(seed).beta(self.alpha, self.alpha, self.setup.domains)
        return {"partner": partner, "share": torch.from_numpy(share).float()}

    def loss(self, params, batch, state, noise):
        features, labels, share = self.by_domain(batch.features), self.by_domain(batch.labels), noise["share"]
        own = share.view(-1, *[1] * (features.ndim - 1))
        mixed = own * features + (1 - own) * features[noise["partner"]]
        logits = self.forward(params, mixed).movedim(-1, 1)  # [domains, classes, rows]
        to_own = F.cross_entropy(logits, labels, reduction="none").mean(1)
        to_partner = F.cross_entropy(logits, labels[noise["partner"]], reduction="none").mean(1)
        return (share * to_own + (1 - share) * to_partner).mean(), {}


def head_gradients(representation: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Gradient of each row's cross-entropy by the weights and bias of the last layer: (softmax − one-hot) ⊗ (z, 1).

    From z ``[B, h]``, logits ``[B, classes]`` and labels ``[B]``: ``[B, classes · (h + 1)]``.
    """
    error = logits.softmax(1) - one_hot(labels, logits.shape[1], logits)
    inputs = torch.cat([representation, torch.ones_like(representation[:, :1])], dim=1)
    return (error.unsqueeze(2) * inputs.unsqueeze(1)).flatten(1)


@register
class Fishr(Switching):
    """Gradient variances made alike across domains (Rame, Dancette & Cord, ICML 2022).

    Minimizes cross-entropy + penalty_weight · mean over domains and entries of (v_d − v̄)², v̄ the mean of the v_d.
    v_d is the variance over the domain's rows of the single rows' gradients by the weights and bias of the last layer,
    remembered from step to step: v_d ← ema · v_d + variance, where the gradient flows through this step's variance
    alone. This is the moving average divided by 1 − ema, as in the authors' code, so that the strength of the gradient
    does not depend on ema; it is not corrected for its first steps. As there, variances divide by the number of rows
    and the penalty is a mean over entries; the paper's formula has rows − 1 and a sum. The penalty begins, and Adam is
    restarted, after `anneal` of the training; variances are remembered from the first step on.
    """

    hyperparameters = {
        "penalty_weight": Hyperparameter(1000.0, "weight of the variances' difference", log_uniform(1, 4), tensor=True),
        "anneal": Hyperparameter(
            1500 / 5001, "fraction before the penalty begins", uniform(0, 5000 / 5001), tensor=True
        ),
        "ema": Hyperparameter(
            0.95, "fraction of the remembered variances kept at each step", uniform(0.9, 0.99), tensor=True
        ),
    }
    switches = ("anneal",)

    def initial_state(self, params):
        weight = params[f"{self.setup.network.layers[-1]}.weight"]
        variances = weight.new_zeros(self.setup.domains, weight.shape[0] * (weight.shape[1] + 1))
        return {**super().initial_state(params), "variances": variances}

    def loss(self, params, batch, state, noise):
        representation = self.representation(params, batch.features)
        logits = self.head(params, representation)
        rows = self.by_domain(head_gradients(representation, logits, batch.labels))
        variances = self.ema * state["variances"] + rows.var(1, correction=0)
        penalty = (variances - variances.mean(0)).square().mean()
        weight = self.switched("anneal", state, 0.0, self.penalty_weight)
        return F.cross_entropy(logits, batch.labels) + weight * penalty, {"variances": variances.detach()}
