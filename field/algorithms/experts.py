"""Mixtures of experts on the features."""

from math import log

import torch
from torch import Tensor
from torch.nn import functional as F

from engine import Params
from field.algorithms.base import Algorithm, Hyperparameter, choice, log_uniform, register, uniform
from field.algorithms.parts import linear, linear_start, new_linear, one_hot


class MixtureOfExperts(Algorithm):
    """Base class: a sparse mixture of E small networks, `mixture`, the sum over the chosen experts e of
    gate_e(x) * expert_e(x).

    With a trained block it is as in the original: the mixture takes the place of the block's MLP, x is what that would
    see, and every expert begins as a copy of it. By the shortcut, router and load see ``[CLS]`` alone, as nothing else
    is read above the last block; in the original, all tokens. The MLP itself is no longer used.

    On frozen features the mixture stands beside the classifier, the path that all images share:
        logits(x) = classifier(x) + mixture(x)
    An expert is then a feedforward layer, D -> h -> classes, with h the width of the representation and with ReLU. A
    router scores the experts for x; the softmax of the scores gives probabilities, and the `chosen` most probable
    experts are used. The objective is
        cross-entropy + `balance_weight` * E² * mean over e of density_e * proxy_e
    with density_e the fraction of the batch whose most probable expert is e, and proxy_e its mean probability, after
    the noise (Lepikhin et al. 2021, ICLR, "GShard"): the sum is 1 if the load is uniform, E if one expert takes all.

    In training only, `gate_noise` / E times standard normal noise is added to the scores. The original limits the
    capacity of an expert, which is for experts on separate machines. All are computed; those not chosen weigh 0.
    """

    routed = True

    hyperparameters = {
        "experts": Hyperparameter(4, "E, number of experts", choice(2, 4, 6, 8)),
        "chosen": Hyperparameter(2, "experts used for an image (at most E)", choice(1, 2)),
        "balance_weight": Hyperparameter(0.01, "weight of the load-balancing loss", log_uniform(-3, -1), tensor=True),
        "gate_noise": Hyperparameter(
            1.0, "standard deviation of the scores' noise, times E", uniform(0, 2), tensor=True
        ),
    }

    @classmethod
    def refusal(cls, network):
        missing = network.has_blocks and not network.mlp
        return f"{cls.__name__} puts experts in the place of the block's MLP" if missing else None

    def extra_parameters(self, draw):
        features, classes, hidden = self.setup.features, self.setup.classes, self.setup.width
        mlp = self.setup.network.mlp
        if mlp:
            named = {f"experts.{role}.{kind}": v for role, values in mlp.items() for kind, v in values.items()}
            experts = {name: value.repeat(self.experts, *[1] * value.ndim) for name, value in named.items()}
        else:
            experts = new_linear("experts.in", (self.experts, hidden), features, draw)
            experts |= new_linear("experts.out", (self.experts, classes), hidden, draw)
        return {**experts, **self.router_parameters(draw)}

    def draw(self, draw, rows):
        return {"gate": torch.randn(rows, self.experts, generator=draw)}

    def router_parameters(self, draw: torch.Generator) -> Params:
        """Initial parameters of the router."""
        raise NotImplementedError

    def scores(self, params: Params, features: Tensor) -> Tensor:
        """Scores of the experts, before the softmax: ``[N, D]`` -> ``[N, E]``."""
        raise NotImplementedError

    def gates(self, probabilities: Tensor) -> Tensor:
        """Weights of the experts, 0 for those not chosen: ``[N, E]`` -> ``[N, E]``."""
        return keep_largest(probabilities, min(self.chosen, self.experts))

    def loss(self, params, batch, state, noise):
        logits, probabilities = self.routed_forward(params, batch.features, noise["gate"])
        return F.cross_entropy(logits, batch.labels) + self.balance_weight * load_balance(probabilities), {}

    def forward(self, params, features):
        """Logits without noise."""
        return self.routed_forward(params, features)[0]

    def routed_forward(self, params: Params, inputs: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits ``[N, classes]`` and the probabilities of the experts ``[N, E]``; `noise` as in `draw`."""
        network, probabilities = self.setup.network, []

        def mixture(rows: Tensor) -> Tensor:
            rows, shape = rows.flatten(0, -2), rows.shape[:-1]
            scores = self.scores(params, rows)
            scores = scores if noise is None else scores + self.gate_noise / self.experts * noise
            probabilities.append(scores.softmax(-1))
            mixed = torch.einsum("ne,nec->nc", self.gates(probabilities[0]), self.every_expert(params, rows))
            return mixed.reshape(*shape, -1)

        if network.has_blocks:
            features = network.features(params, inputs, mlp=mixture)
            logits = self.head(params, network.hidden(params, features))
        else:
            logits = self.head(params, self.representation(params, inputs)) + mixture(inputs)
        return logits, probabilities[0]

    def every_expert(self, params: Params, rows: Tensor) -> Tensor:
        """What each expert makes of each row: ``[N, D]`` -> ``[N, E, out]``."""
        activation = self.setup.network.shortcut.activation if self.setup.network.has_blocks else torch.relu
        if "experts.gate.weight" in params:
            hidden = activation(of_experts(params, "experts.gate", rows)) * of_experts(params, "experts.in", rows)
        else:
            hidden = activation(of_experts(params, "experts.in", rows))
        each = torch.einsum("neh,ech->nec", hidden, params["experts.out.weight"])
        return each + params["experts.out.bias"] if "experts.out.bias" in params else each

    def of_backbone(self, name):
        """The experts too, where they begin as copies of the block's MLP."""
        return super().of_backbone(name) or (self.setup.network.has_blocks and name.startswith("experts."))

    def routing(self, params, features):
        """Share of each expert in the prediction of each image: gates divided by their sum, ``[N, E]``."""
        gates = self.gates(self.routed_forward(params, features)[1])
        return gates / gates.sum(-1, keepdim=True)


def of_experts(params: Params, name: str, rows: Tensor) -> Tensor:
    """The first layer of that name of each expert: ``[N, D]`` -> ``[N, E, h]``."""
    hidden = torch.einsum("nd,ehd->neh", rows, params[f"{name}.weight"])
    return hidden + params[f"{name}.bias"] if f"{name}.bias" in params else hidden


@register
class SFMoE(MixtureOfExperts):
    """Sparse mixture of experts with a linear router (Li et al. 2023, "Sparse Mixture-of-Experts are Domain
    Generalizable Learners", ICLR; its first version of 2022, there called SF-MoE).

    See `MixtureOfExperts` for the objective and how the mixture was ported. The scores are W x; the two most probable
    of four experts are used, with the gates g_e / (sum of the chosen g + 1e-9), g being the probabilities.

    Differences from the authors' code: there the second expert is dropped at random (kept with probability gate / 0.2),
    even in prediction; here it is always used. There W starts with standard normal numbers, with which the gates would
    be 0 or 1 from the start; here like a linear layer. With `chosen` = 1 all gates would be 1 and the router would
    learn from the auxiliary loss alone, so `chosen` is not searched.
    """

    hyperparameters = {
        "chosen": Hyperparameter(2, "experts used for an image (at most E)"),
        "gate_noise": Hyperparameter(
            0.0, "standard deviation of the scores' noise, times E", choice(0.0, 1.0), tensor=True
        ),
    }

    def router_parameters(self, draw):
        return {"router.weight": linear_start((self.experts, self.setup.features), self.setup.features, draw)}

    def scores(self, params, features):
        return features @ params["router.weight"].T

    def gates(self, probabilities):
        kept = super().gates(probabilities)
        return kept / (kept.sum(-1, keepdim=True) + 1e-9)


@register
class GMoE(MixtureOfExperts):
    """Sparse mixture of experts with a cosine router (Li et al. 2023, "Sparse Mixture-of-Experts are Domain
    Generalizable Learners", ICLR).

    See `MixtureOfExperts` for the objective and how the mixture was ported. The score of expert e is
    cos(W x + b, v_e) / tau with W, b, v_e and tau >= 0.01 learned (tau starts at 0.5); the most probable of six experts
    is used, and its gate is its probability: this is how the cross-entropy reaches the router when one expert is
    chosen. If several are chosen, the gates are divided by their sum, as in the original's library.

    Differences from the authors' code: W maps to `router_width` = 32 numbers, not 256, with which the router would have
    more weights than all experts; v_e starts like a linear layer's weights; the experts have no dropout; both methods
    use the auxiliary loss of `MixtureOfExperts`.
    """

    hyperparameters = {
        "experts": Hyperparameter(6, "E, number of experts", choice(2, 4, 6, 8)),
        "chosen": Hyperparameter(1, "experts used for an image (at most E)", choice(1, 2)),
        "router_width": Hyperparameter(32, "length of the vectors that the router compares", choice(16, 32, 64)),
    }

    def router_parameters(self, draw):
        features, width = self.setup.features, self.router_width
        return {
            **new_linear("router", (width,), features, draw),
            "router.experts": linear_start((self.experts, width), width, draw),
            "router.sharpness": torch.full((), log(1 / 0.5)),  # log of 1/tau
        }

    def gates(self, probabilities):
        gates = super().gates(probabilities)
        return gates if min(self.chosen, self.experts) == 1 else gates / gates.sum(-1, keepdim=True)

    def scores(self, params, features):
        here = F.normalize(linear(params, "router", features), dim=-1)
        there = F.normalize(params["router.experts"], dim=-1)
        return here @ there.T * params["router.sharpness"].clamp(max=log(1 / 0.01)).exp()


def keep_largest(probabilities: Tensor, k: int) -> Tensor:
    """The `k` largest of each row of ``[N, E]``; the others 0."""
    chosen = probabilities.topk(k, dim=-1).indices
    return probabilities * one_hot(chosen, probabilities.shape[-1], probabilities).sum(-2)


def load_balance(probabilities: Tensor) -> Tensor:
    """E² * mean over experts of (fraction of rows in which it is the most probable) * (mean probability), a scalar.

    The gradient reaches the probabilities ``[N, E]`` through their mean alone.
    """
    count = probabilities.shape[-1]
    first = one_hot(probabilities.argmax(-1), count, probabilities)
    return count**2 * (first.mean(0) * probabilities.mean(0)).mean()


def expert_use(routing: Tensor, groups: Tensor, count: int) -> Tensor:
    """Mean routing of each group of images, for heat maps: ``[count, E]``, NaN for a group without images.

    Args:
        routing: see `Algorithm.routing`, ``[N, E]``.
        groups: number of each image's group, int64 ``[N]``: its domain, its class, or a cell of both.
        count: number of groups.
    """
    member = one_hot(groups, count, routing).T
    return member @ routing / member.sum(1, keepdim=True)
