"""Mixtures of experts on the features."""

from math import log

import torch
from torch import Tensor
from torch.nn import functional as F

from algorithms.base import (
    Algorithm,
    Batch,
    Hyperparameter,
    Noise,
    Params,
    State,
    choice,
    linear_start,
    log_uniform,
    uniform,
)
from algorithms.registry import register


class MixtureOfExperts(Algorithm):
    """What both mixtures share: the classifier plus a sparse mixture of E small networks on the same features.

        logits(x) = classifier(x) + sum over the chosen experts e of gate_e(x) * expert_e(x)

    In the original a mixture takes the place of a transformer block's feedforward layer, beside which the block's input
    is passed on. Here the backbone is frozen: the mixture is beside the classifier, which is the path that all images
    share. An expert is a feedforward layer as there, D -> h -> classes, with h the width of the classifier's last
    hidden layer and ReLU, as in the classifier. A router scores the experts by x; softmax of the scores are
    probabilities, the `chosen` most probable experts are used. Minimized is
        cross-entropy + `balance_weight` * E² * mean over e of density_e * proxy_e
    with density_e the part of the batch whose most probable expert is e, and proxy_e its mean probability, after the
    noise (Lepikhin et al. 2021, ICLR, "GShard"): 1 when the load is uniform, E when one expert takes all.

    In training alone, `gate_noise` / E times standard normal noise is added to the scores. An expert takes as many
    images as want it: the original's limit is for experts on separate machines, and its batches are of image patches,
    not of a few images. All experts are computed and those not chosen get the weight 0, hence no gradient.
    """

    hyperparameters = {
        "experts": Hyperparameter(4, "E, number of experts", choice(2, 4, 6, 8)),
        "chosen": Hyperparameter(2, "experts used for an image (at most all)", choice(1, 2)),
        "balance_weight": Hyperparameter(0.01, "weight of the auxiliary loss that evens the load", log_uniform(-3, -1)),
        "gate_noise": Hyperparameter(1.0, "standard deviation, times E, of the scores' noise", uniform(0, 2)),
    }

    def extra_parameters(self, draw: torch.Generator) -> Params:
        features, classes, hidden = self.setup.features, self.setup.classes, self.setup.hidden_sizes[-1]
        return {
            "experts.0.weight": linear_start((self.experts, hidden, features), features, draw),
            "experts.0.bias": linear_start((self.experts, hidden), features, draw),
            "experts.1.weight": linear_start((self.experts, classes, hidden), hidden, draw),
            "experts.1.bias": linear_start((self.experts, classes), hidden, draw),
            **self.router_parameters(draw),
        }

    def draw(self, draw: torch.Generator, rows: int) -> Noise:
        return {"gate": torch.randn(rows, self.experts, generator=draw)}

    def router_parameters(self, draw: torch.Generator) -> Params:
        """Parameters of the router, at the start."""
        raise NotImplementedError

    def scores(self, params: Params, features: Tensor) -> Tensor:
        """Of the experts, before softmax: ``[N, D]`` -> ``[N, E]``."""
        raise NotImplementedError

    def gates(self, probabilities: Tensor) -> Tensor:
        """Weights of the experts, 0 for those not chosen: ``[N, E]`` -> ``[N, E]``."""
        return keep_largest(probabilities, min(self.chosen, self.experts))

    def loss(self, params: Params, batch: Batch, state: State, noise: Noise) -> tuple[Tensor, State]:
        scores = self.scores(params, batch.features) + self.gate_noise / self.experts * noise["gate"]
        probabilities = scores.softmax(-1)
        logits = self.mixed(params, batch.features, self.gates(probabilities))
        return F.cross_entropy(logits, batch.labels) + self.balance_weight * load_balance(probabilities), {}

    def forward(self, params: Params, features: Tensor) -> Tensor:
        """Classifier and mixture, without noise."""
        return self.mixed(params, features, self.gates(self.scores(params, features).softmax(-1)))

    def mixed(self, params: Params, features: Tensor, gates: Tensor) -> Tensor:
        """Logits of the classifier plus those of the experts weighted by `gates` ``[N, E]``."""
        return super().forward(params, features) + torch.einsum("ne,nec->nc", gates, self.opinions(params, features))

    def opinions(self, params: Params, features: Tensor) -> Tensor:
        """Logits of each expert: ``[N, D]`` -> ``[N, E, classes]``."""
        hidden = torch.einsum("nd,ehd->neh", features, params["experts.0.weight"]) + params["experts.0.bias"]
        return torch.einsum("neh,ech->nec", hidden.relu(), params["experts.1.weight"]) + params["experts.1.bias"]

    def routing(self, params: Params, features: Tensor) -> Tensor:
        """Part of each image that goes to each expert at prediction: ``[N, D]`` -> ``[N, E]``, rows sum to one.

        0 for the experts not chosen; the gates, divided by their sum where the method itself does not do that.
        """
        gates = self.gates(self.scores(params, features).softmax(-1))
        return gates / gates.sum(-1, keepdim=True)


@register
class SFMoE(MixtureOfExperts):
    """Sparse mixture of experts with a linear router (Li et al. 2023, "Sparse Mixture-of-Experts are Domain
    Generalizable Learners", ICLR; its first version of 2022, there called SF-MoE).

    `MixtureOfExperts` says what is minimized and how the mixture is ported. The scores are W x; the two most probable
    of four experts are used, with the gates g_e / (sum of the chosen g + 1e-9), g the probabilities.

    Differences from the authors' code: there the second expert is left out at random (kept with the chance gate / 0.2),
    in prediction as well, which would make a prediction depend on chance: here it is always used. There W starts as
    standard normal numbers, which on D features of size one makes the gates 0 or 1 from the start: here as a linear
    layer. With `chosen` = 1 all gates would be 1 and the router would learn from the auxiliary loss alone, so that
    `chosen` is not searched.
    """

    hyperparameters = {
        "chosen": Hyperparameter(2, "experts used for an image (at most all)"),
        "gate_noise": Hyperparameter(0.0, "standard deviation, times E, of the scores' noise", choice(0.0, 1.0)),
    }

    def router_parameters(self, draw: torch.Generator) -> Params:
        return {"router.weight": linear_start((self.experts, self.setup.features), self.setup.features, draw)}

    def scores(self, params: Params, features: Tensor) -> Tensor:
        return features @ params["router.weight"].T

    def gates(self, probabilities: Tensor) -> Tensor:
        kept = super().gates(probabilities)
        return kept / (kept.sum(-1, keepdim=True) + 1e-9)


@register
class GMoE(MixtureOfExperts):
    """Sparse mixture of experts with a cosine router (Li et al. 2023, "Sparse Mixture-of-Experts are Domain
    Generalizable Learners", ICLR).

    `MixtureOfExperts` says what is minimized and how the mixture is ported. The score of expert e is
    cos(W x + b, v_e) / tau with W, b, v_e and tau >= 0.01 learned (tau starts at 0.5); the most probable of six experts
    is used, and its gate is its probability itself: that is how the cross-entropy reaches the router when one expert is
    chosen. Of several, the gates are divided by their sum, as the library of the original does.

    Differences from the authors' code: W maps to `router_width` = 32 numbers, not 256, with which the router would have
    more weights than all experts; v_e starts as a linear layer's weights; no dropout in the experts; the auxiliary loss
    is that of `MixtureOfExperts` for both methods, whatever the library of the original takes.
    """

    hyperparameters = {
        "experts": Hyperparameter(6, "E, number of experts", choice(2, 4, 6, 8)),
        "chosen": Hyperparameter(1, "experts used for an image (at most all)", choice(1, 2)),
        "router_width": Hyperparameter(32, "numbers in which the router compares image and expert", choice(16, 32, 64)),
    }

    def router_parameters(self, draw: torch.Generator) -> Params:
        features, width = self.setup.features, self.router_width
        return {
            "router.weight": linear_start((width, features), features, draw),
            "router.bias": linear_start((width,), features, draw),
            "router.experts": linear_start((self.experts, width), width, draw),
            "router.sharpness": torch.full((), log(1 / 0.5)),  # log of 1/tau
        }

    def gates(self, probabilities: Tensor) -> Tensor:
        gates = super().gates(probabilities)
        return gates if min(self.chosen, self.experts) == 1 else gates / gates.sum(-1, keepdim=True)

    def scores(self, params: Params, features: Tensor) -> Tensor:
        here = F.normalize(F.linear(features, params["router.weight"], params["router.bias"]), dim=-1)
        there = F.normalize(params["router.experts"], dim=-1)
        return here @ there.T * params["router.sharpness"].clamp(max=log(1 / 0.01)).exp()


def keep_largest(probabilities: Tensor, k: int) -> Tensor:
    """The `k` largest of each row ``[N, E]``, the others 0."""
    places = torch.arange(probabilities.shape[-1], device=probabilities.device)
    chosen = probabilities.topk(k, dim=-1).indices
    return probabilities * (chosen.unsqueeze(-1) == places).any(-2).to(probabilities)


def load_balance(probabilities: Tensor) -> Tensor:
    """E² * mean over experts of (part of the rows whose largest probability it is) * (mean probability), a scalar.

    Args:
        probabilities: ``[N, E]``; the gradient reaches them through the mean probability alone.
    """
    count = probabilities.shape[-1]
    first = probabilities.argmax(-1, keepdim=True) == torch.arange(count, device=probabilities.device)
    return count**2 * (first.to(probabilities).mean(0) * probabilities.mean(0)).mean()


def expert_use(routing: Tensor, groups: Tensor, count: int) -> Tensor:
    """Mean routing of each group of images, as a heat map shows it: ``[count, E]``, NaN for a group without images.

    Args:
        routing: of `MixtureOfExperts.routing`, ``[N, E]``.
        groups: number of each image's group, int64 ``[N]`` (its domain, its class, or domain * classes + class).
        count: number of groups.
    """
    member = (groups.unsqueeze(0) == torch.arange(count, device=groups.device).unsqueeze(1)).to(routing)
    return member @ routing / member.sum(1, keepdim=True)
