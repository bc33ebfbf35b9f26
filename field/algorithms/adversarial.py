"""Representations from which an adversary cannot tell the domains apart."""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from engine import Batch, Params
from field.algorithms.base import Algorithm, Hyperparameter, choice, log_uniform, power_of_two, register
from field.algorithms.parts import adam, adam_state, is_zero, linear, new_linear, one_hot


@register
class DANN(Algorithm):
    """Domain-adversarial training (Ganin et al. 2016, "Domain-Adversarial Training of Neural Networks", JMLR 17).

    A discriminator, a small network with parameters θd, predicts the source domain of an image from its
    representation; the classifier, with parameters θ, must classify well and make that impossible. The saddle point of
        min over θ of L(θ) - `adversary_weight` * Ld(θ, θd),    min over θd of Ld(θ, θd)
    is sought, with L the mean cross-entropy of the classes and Ld that of the domains. A gradient penalty can be added
    to Ld: `grad_penalty` times the mean over images of the squared gradient of the image's cross-entropy with respect
    to the discriminator's input. The reported loss is L + Ld.

    As in DomainBed the two take turns, each with its own Adam (decays `beta1` and 0.9): `d_steps_per_g_step` steps of
    the discriminator, then one of the classifier. The one that waits keeps its weights and its moments. With the
    default of 1 the classifier gets only half as many updates as ERM's from the same number of batches; with n, one in
    n + 1.

    Differences from DomainBed: the discriminator's hidden layers have 64 units, not 256, because the representation
    that it reads has about ten numbers, not 2048 (a search draws 2^U(4, 8) of them, there 2^U(6, 10)); it has no
    dropout (DomainBed's default, but there it is searched); steps are counted from 0, so that the discriminator is
    always first (there, by default, the classifier). Differences from the paper: turns, not one step of both; source
    domains only, no images of the target; a constant weight of the adversary.
    """

    batches = "balanced"
    hyperparameters = {
        "adversary_weight": Hyperparameter(
            1.0, "λ, weight of the discriminator's loss", log_uniform(-2, 2), tensor=True
        ),
        "learning_rate_d": Hyperparameter(
            1e-3, "learning rate of the discriminator's Adam", log_uniform(-4, -2), tensor=True
        ),
        "weight_decay_d": Hyperparameter(0.0, "L2 penalty inside that Adam", log_uniform(-6, -2), tensor=True),
        "d_steps_per_g_step": Hyperparameter(
            1, "discriminator's steps for one of the classifier", power_of_two(0, 3), tensor=True
        ),
        "grad_penalty": Hyperparameter(
            0.0, "weight of the discriminator's gradient penalty", log_uniform(-2, 1), tensor=True
        ),
        "beta1": Hyperparameter(0.5, "decay of the first moment in both Adams", choice(0.0, 0.5), tensor=True),
        "mlp_width": Hyperparameter(64, "units in each hidden layer of the discriminator", power_of_two(4, 8)),
        "mlp_depth": Hyperparameter(3, "linear layers of the discriminator", choice(3, 4, 5)),
    }

    def extra_parameters(self, draw):
        widths = (self.setup.width, *[self.mlp_width] * (self.mlp_depth - 1), self.setup.domains)
        params = {}
        for i, (inputs, outputs) in enumerate(pairwise(widths)):
            params |= new_linear(f"discriminator.{i}", (outputs,), inputs, draw)
        return params

    def initial_state(self, params):
        classifier, adversary = self.parts(params)
        return {**super().initial_state(classifier), "adversary_adam": adam_state(adversary)}

    def adversary_input(self, params: Params, representation: Tensor, labels: Tensor) -> Tensor:
        """What the discriminator reads: ``[B, h]``."""
        return representation

    def row_weights(self, batch: Batch, like: Tensor) -> Tensor:
        """Weight of each row in the discriminator's loss, of the type of `like`: ``[B]``."""
        return like.new_full((len(batch.labels),), 1 / len(batch.labels))

    def discriminate(self, params: Params, read: Tensor) -> Tensor:
        """Logits of the domains: ``[B, h]`` -> ``[B, domains]``."""
        for i in range(self.mlp_depth):
            read = linear(params, f"discriminator.{i}", torch.relu(read) if i else read)
        return read

    def adversary_loss(self, params: Params, representation: Tensor, batch: Batch) -> Tensor:
        """Ld, with its gradient penalty (scalar)."""
        read = self.adversary_input(params, representation, batch.labels)

        def each(read: Tensor) -> Tensor:
            return F.cross_entropy(self.discriminate(params, read), batch.domains, reduction="none")

        loss = (self.row_weights(batch, read) * each(read)).sum()
        if not is_zero(self.grad_penalty):
            by_input = torch.func.grad(lambda read: each(read).sum())(read)
            loss = loss + self.grad_penalty * (by_input**2).sum(1).mean()
        return loss

    def loss(self, params, batch, state, noise):
        """L + Ld; its gradient is ∇(L - λ Ld) for the classifier's parameters and ∇Ld for the adversary's."""
        representation = self.representation(params, batch.features)
        classification = F.cross_entropy(self.head(params, representation), batch.labels)
        reversed_ = reversed_gradient(representation, self.adversary_weight)
        return classification + self.adversary_loss(params, reversed_, batch), {}

    def update(self, params, batch, state, noise):
        gradient, loss, _ = self.gradients(params, batch, state, noise)
        classifier, adversary = self.parts(params)
        betas, old, old_d = (self.beta1, 0.9), state["adam"], state["adversary_adam"]
        new, moments = self.adam_step(classifier, gradient, old, betas=betas)
        new_d, moments_d = adam(adversary, gradient, old_d, self.learning_rate_d, self.weight_decay_d, betas)
        turn = state["step"] % (1 + self.d_steps_per_g_step) < self.d_steps_per_g_step  # the adversary's
        params = {**params, **where_each(turn, classifier, new), **where_each(turn, new_d, adversary)}
        changes = {"adam": where_each(turn, old, moments), "adversary_adam": where_each(turn, moments_d, old_d)}
        return params, {**state, **changes, "step": state["step"] + 1}, loss


@register
class CDANN(DANN):
    """Class-conditional `DANN` (Li et al. 2018, "Deep Domain Generalization via Conditional Invariant Adversarial
    Networks", ECCV).

    The distribution of the representation within each class, P(z | y), should be the same in all domains, not only that
    over all images, which differs anyway if the classes have different shares in the domains. The saddle point is that
    of `DANN` with
        Ld = sum over rows of w_i * cross-entropy(discriminator(z_i + e[y_i]), d_i),
        w_i = 1 / (domains * classes * rows of the domain of i with the class of i)
    where e is an embedding of the classes, learned with the discriminator. The weights are the paper's class prior
    normalization, computed within the batch: every class counts the same in each domain that has it.

    Differences: the paper has a discriminator for each class, and one more for the normalized mixture of them; here, as
    in DomainBed, one discriminator with the embedding serves for all. DomainBed's weights divide by the rows of a class
    in the whole batch, so a class keeps different shares in different domains; here as in the paper. (A class without
    rows in a domain's batch has nothing to weight, so the weights can sum to less than 1.)
    """

    def extra_parameters(self, draw):
        shape = self.setup.classes, self.setup.width
        return {**super().extra_parameters(draw), "class_embeddings": torch.randn(shape, generator=draw)}

    def adversary_input(self, params, representation, labels):
        return representation + one_hot(labels, self.setup.classes, representation) @ params["class_embeddings"]

    def row_weights(self, batch, like):
        cell = batch.domains * self.setup.classes + batch.labels
        rows = (cell.unsqueeze(0) == cell.unsqueeze(1)).sum(1).to(like)
        return 1 / (self.setup.domains * self.setup.classes * rows)


def reversed_gradient(value: Tensor, weight: float | Tensor) -> Tensor:
    """`value` itself, with a gradient multiplied by -`weight`."""
    still = value.detach()
    return still - weight * (value - still)


def where_each(condition: Tensor, yes: Params, no: Params) -> Params:
    """The tensors of `yes` where `condition` (bool, scalar) holds, else those of `no`."""
    return {name: torch.where(condition, value, no[name]) for name, value in yes.items()}
