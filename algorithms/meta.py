"""Training in two loops."""

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn import functional as F

from algorithms.base import (
    Algorithm,
    Batch,
    Hyperparameter,
    Noise,
    Params,
    State,
    adam,
    adam_state,
    choice,
    log_uniform,
)
from algorithms.registry import register


class TwoLoops(Algorithm):
    """What both methods share: the domains of a balanced batch come in an order drawn anew for each step."""

    batches = "balanced"

    def draw(self, draw: torch.Generator, rows: int) -> Noise:
        return {"order": torch.randperm(self.setup.domains, generator=draw)}

    def in_order(self, batch: Batch, noise: Noise) -> tuple[Tensor, Tensor]:
        """Features ``[domains, batch_size, D]`` and labels ``[domains, batch_size]``, the domains in drawn order."""
        return self.by_domain(batch.features)[noise["order"]], self.by_domain(batch.labels)[noise["order"]]

    def gradient_on(self, params: Params, features: Tensor, labels: Tensor) -> tuple[Params, Tensor]:
        """Gradient of the mean cross-entropy on one domain's rows, and that loss."""
        gradient, (loss, _) = self.gradient_of(
            lambda p: (F.cross_entropy(self.forward(p, features), labels), {}), params
        )
        return gradient, loss


@register
class MLDG(TwoLoops):
    """Meta-learning domain generalization (Li, Yang, Song & Hospedales, AAAI 2018).

    A step that lowers the loss of some domains (meta-train) should lower that of others (meta-test) too: minimized is
    ``F(θ) + β G(θ')`` (equation 3 of the paper), F and G the losses of meta-train and meta-test, θ' the parameters
    after one inner step on F.

    First-order: θ' is differentiated as if it were θ plus a constant, so the direction is ``∇F(θ) + β ∇G(θ')``; the
    derivative through the inner step (products of the Hessian of F) is left out. DomainBed does the same.

    As in DomainBed, not as in the paper: the inner step is the first step of a fresh Adam at the learning rate of the
    outer one (about its sign, times the rate), so there is no rate of its own to tune; and in place of one split of the
    domains each domain is meta-train once, with the next one in a random cycle as its meta-test, the mean over these
    pairs being taken. (DomainBed's later split by `n_meta_test` uses one pair only of three sources, and is not taken.)
    With β = 0 this is `ERMBalanced`.
    """

    hyperparameters = {"beta": Hyperparameter(1.0, "weight of the meta-test loss", log_uniform(-1, 1))}

    def gradients(self, params: Params, batch: Batch, state: State, noise: Noise) -> tuple[Params, Tensor, State]:
        train = self.in_order(batch, noise)
        test = tuple(values.roll(-1, 0) for values in train)

        def pair(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> tuple[Params, Tensor]:
            outer, outer_loss = self.gradient_on(params, train_x, train_y)
            inner, _ = adam(params, outer, adam_state(params), self.learning_rate, self.weight_decay)
            after, after_loss = self.gradient_on(inner, test_x, test_y)
            return {n: outer[n] + self.beta * after[n] for n in params}, outer_loss + self.beta * after_loss

        each, losses = vmap(pair)(*train, *test)
        return {name: value.mean(0) for name, value in each.items()}, losses.mean(), {}


@register
class Fish(TwoLoops):
    """Gradient matching by an inner loop over the domains (Shi et al., ICLR 2022), Algorithm 1 of the paper.

    A copy of the parameters θ takes one step on each domain in turn, in random order, to θ̃; then θ moves a part of the
    way: ``θ + ε (θ̃ − θ)``. In expectation, to first order in the inner rate, this ascends the inner products of the
    domains' gradients while descending their losses: what is minimized is the mean loss minus a multiple of the mean
    of ``g_i · g_j`` over pairs of domains.

    As in DomainBed the inner steps are Adam's, whose moments go on from one outer step to the next (they are the state
    "adam", whose count is steps × domains); DomainBed visits the domains in a fixed order, the paper and this class in
    a random one. A step of Fish takes as many Adam steps as there are domains. With ε = 1 and one domain it is ERM.
    """

    hyperparameters = {
        "meta_lr": Hyperparameter(0.5, "ε, part of the way to the inner loop's end", choice(0.05, 0.1, 0.5))
    }

    def update(self, params: Params, batch: Batch, state: State, noise: Noise) -> tuple[Params, State, Tensor]:
        before = self.domain_losses(params, batch).mean()
        inner, moments = params, state["adam"]
        for features, labels in zip(*self.in_order(batch, noise), strict=True):
            gradient, _ = self.gradient_on(inner, features, labels)
            inner, moments = adam(inner, gradient, moments, self.learning_rate, self.weight_decay)
        new = {name: value + self.meta_lr * (inner[name] - value) for name, value in params.items()}
        return new, {**state, "adam": moments, "step": state["step"] + 1}, before
