"""Logits drawn to the probabilities of a teacher, or of the labels themselves."""

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn import functional as F

from engine import Batch
from field.algorithms.base import Algorithm, Hyperparameter, State, log_uniform, register
from field.algorithms.parts import one_hot


class LogitRegression(Algorithm):
    """Base class: cross-entropy + λ × the mean square, over images and classes, of the logits minus their targets.

    A logit, not a probability, is compared with a probability: it is drawn into 0 … 1, as `SD` draws it to 0.
    """

    hyperparameters = {  # λ and its search are ours
        "penalty_weight": Hyperparameter(1.0, "λ of the logits' squared errors", log_uniform(-2, 1), tensor=True)
    }

    def targets(self, batch: Batch, state: State) -> Tensor:
        """What the logits should be: ``[B, classes]``."""
        raise NotImplementedError

    def loss(self, params, batch, state, noise):
        logits = self.forward(params, batch.features)
        errors = logits - self.targets(batch, state)
        return F.cross_entropy(logits, batch.labels) + self.penalty_weight * errors.square().mean(), {}


@register
class FreeLunch(LogitRegression):
    """The "free lunch" of LFME's paper (Chen et al., NeurIPS 2024, arXiv 2410.17020): cross-entropy + α · MSE(logits,
    one-hot labels).

    `LFME` with the labels themselves as teacher: it needs no domains and no experts. Its α is `penalty_weight`. The
    paper's batches are balanced; as it needs no domains, they are pooled here.
    """

    def targets(self, batch, state):
        return one_hot(batch.labels, self.setup.classes, batch.features)


@register
class LFME(LogitRegression):
    """Learning from multiple experts (Chen, Zhang, Song, Shen & Liu, NeurIPS 2024, arXiv 2410.17020).

    Minimizes cross-entropy + λ · MSE(logits, softmax of the logits of the expert of the image's own domain). The paper
    trains the experts beside the network; here they are Phase 1's final networks of the source domains, each trained on
    its domain alone before. The paper's batches are balanced; here they are pooled, as in `FreeLunch`, the twin of this
    method without experts.

    State: "experts", name -> ``[domains, *shape]``, known before training.
    """

    phase1 = {"experts": "networks"}

    def targets(self, batch, state):
        every = vmap(self.forward, in_dims=(0, None))(state["experts"], batch.features).softmax(-1)
        own = one_hot(batch.domains, self.setup.domains, batch.features)
        return torch.einsum("bd,dbc->bc", own, every)
