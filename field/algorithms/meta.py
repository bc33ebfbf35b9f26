"""Training in two loops, an inner and an outer one."""

import torch
from torch import Tensor
from torch.func import vmap

from engine import Batch, Params
from field.algorithms.base import Algorithm, Hyperparameter, Noise, choice, log_uniform, register
from field.algorithms.parts import adam_state


class TwoLoops(Algorithm):
    """Base class: the domains of a balanced batch come in a new random order in each step."""

    batches = "balanced"

    def draw(self, draw, rows):
        return {"order": torch.randperm(self.setup.domains, generator=draw)}

    def in_order(self, batch: Batch, noise: Noise) -> tuple[Tensor, Tensor]:
        """Features ``[domains, batch_size, D]`` and labels ``[domains, batch_size]``, domains in the drawn order."""
        return self.by_domain(batch.features)[noise["order"]], self.by_domain(batch.labels)[noise["order"]]


@register
class MLDG(TwoLoops):
    """Meta-learning domain generalization (Li, Yang, Song & Hospedales, AAAI 2018).

    A step that lowers the loss of some domains (meta-train) should also lower that of others (meta-test). The objective
    is ``F(θ) + β G(θ')`` (equation 3 of the paper), with F and G the losses of meta-train and meta-test, and θ' the
    parameters after one inner step on F.

    First-order: θ' is differentiated as if it were θ plus a constant, so the direction is ``∇F(θ) + β ∇G(θ')``; the
    derivative through the inner step (products with the Hessian of F) is left out. DomainBed does the same.

    As in DomainBed, not as in the paper: the inner step is the first step of a new Adam with the outer learning rate
    (roughly the sign of the gradient times the rate); and instead of one split of the domains, each domain is
    meta-train once, with the next one in a random cycle as its meta-test, and the mean over these pairs is taken.
    (DomainBed's later split by `n_meta_test`, one pair of three sources, is not followed.) With β = 0 this is
    `ERMBalanced`.
    """

    hyperparameters = {"beta": Hyperparameter(1.0, "weight of the meta-test loss", log_uniform(-1, 1), tensor=True)}

    def gradients(self, params, batch, state, noise):
        train = self.in_order(batch, noise)
        test = tuple(values.roll(-1, 0) for values in train)

        def pair(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> tuple[Params, Tensor]:
            outer, outer_loss = self.gradient_on(params, train_x, train_y)
            inner, _ = self.adam_step(params, outer, adam_state(params))
            after, after_loss = self.gradient_on(inner, test_x, test_y)
            return {n: outer[n] + self.beta * after[n] for n in params}, outer_loss + self.beta * after_loss

        each, losses = vmap(pair)(*train, *test)
        return {name: value.mean(0) for name, value in each.items()}, losses.mean(), {}


@register
class Fish(TwoLoops):
    """Gradient matching by an inner loop over the domains (Shi et al., ICLR 2022), Algorithm 1 of the paper.

    A copy of the parameters θ takes one step on each domain in turn, in random order, to θ̃; then θ moves a fraction of
    the way: ``θ + ε (θ̃ − θ)``. In expectation, to first order in the inner rate, this ascends the inner products of
    the domains' gradients while descending their losses: it minimizes the mean loss minus a multiple of the mean of
    ``g_i · g_j`` over pairs of domains.

    As in DomainBed the inner steps are Adam's, whose moments persist from one outer step to the next; DomainBed visits
    the domains in a fixed order. A step of Fish takes as many Adam steps as there are domains. With ε = 1 and one
    domain it is ERM.
    """

    hyperparameters = {
        "meta_lr": Hyperparameter(
            0.5, "ε, fraction of the way to the end of the inner loop", choice(0.05, 0.1, 0.5), tensor=True
        )
    }

    def update(self, params, batch, state, noise):
        before = self.domain_losses(params, batch).mean()
        inner, moments = params, state["adam"]
        for features, labels in zip(*self.in_order(batch, noise), strict=True):
            gradient, _ = self.gradient_on(inner, features, labels)
            inner, moments = self.adam_step(inner, gradient, moments)
        new = {name: value + self.meta_lr * (inner[name] - value) for name, value in params.items()}
        return new, {**state, "adam": moments, "step": state["step"] + 1}, before
