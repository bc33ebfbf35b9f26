"""An embedding or a last layer for each domain."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from config import InputError
from engine import Params
from field.algorithms.base import Algorithm, Hyperparameter, choice, register
from field.algorithms.parts import linear, new_linear, one_hot


@register
class MTL(Algorithm):
    """Marginal transfer learning (Blanchard, Deshmukh, Dogan, Lee & Scott 2021, "Domain Generalization by Marginal
    Transfer Learning", JMLR 22).

    The classifier knows the distribution of images that its image comes from: f(P_d, x). The objective is the mean over
    the source domains d of the mean cross-entropy of
        head([z(x), μ_d]),    μ_d = `ema` * (mean of z over the batch's rows of d) + (1 - `ema`) * (last step's μ_d)
    with z the representation: the paper's kernel mean embedding of P_d with a learned feature map, as in DomainBed. The
    μ are the state "embeddings" ``[domains, h]``, initially 0; the gradient flows through the batch's mean. The head
    has its own parameters, "wide_head", for twice the inputs; the classifier's last layer gets no gradient.

    As in DomainBed, `ema` is the weight of the new mean: at 0.99, μ_d is almost the mean of the last batch.
    Differences: its code overwrites the embedding with random numbers before the head reads it; here the head reads the
    embedding, as the paper intends. At test time it embeds the current batch, so that a prediction depends on the other
    rows; here an image is predicted on its own, with the mean of μ_d over the source domains, which leaves out the
    paper's adaptation to the target. The mean over the domains is minimized, not the sum.
    """

    batches = "balanced"
    hyperparameters = {
        "ema": Hyperparameter(
            0.99, "weight of the batch's mean in a domain's embedding", choice(0.5, 0.9, 0.99, 1.0), tensor=True
        )
    }

    def extra_parameters(self, draw):
        return new_linear("wide_head", (self.setup.classes,), 2 * self.setup.width, draw)

    def initial_state(self, params):
        embeddings = params["wide_head.weight"].new_zeros(self.setup.domains, self.setup.width)
        return {**super().initial_state(params), "embeddings": embeddings}

    def loss(self, params, batch, state, noise):
        representation = self.by_domain(self.representation(params, batch.features))  # [domains, batch_size, h]
        embeddings = self.ema * representation.mean(1) + (1 - self.ema) * state["embeddings"]
        logits = self.wide_head(params, representation, embeddings.unsqueeze(1)).flatten(0, 1)
        return F.cross_entropy(logits, batch.labels), {"embeddings": embeddings.detach()}

    def logits(self, params, state, features):
        return self.wide_head(params, self.representation(params, features), state["embeddings"].mean(0))

    def wide_head(self, params: Params, representation: Tensor, embedding: Tensor) -> Tensor:
        """The last layer, on ``[*, h]`` and an embedding that expands to it: ``[*, classes]``."""
        return linear(params, "wide_head", torch.cat((representation, embedding.expand_as(representation)), -1))


@register
class MultiHead(Algorithm):
    """A last layer for each source domain: the baseline of Chattopadhyay, Balaji & Hoffman 2020 ("Learning to Balance
    Specificity and Invariance for In and Out of Domain Generalization", ECCV) beside their `DMG`.

    The objective is the mean over all source images of cross-entropy(W_d z(x) + b_d, y), with d the image's domain and
    z the representation, which all domains share. An image is classified by the mean over the domains' heads, either of
    their logits (as the authors' code does at test time) or of their probabilities. The classifier's last layer is not
    used.

    Differences from the authors' code: its heads for AlexNet are all made of the same layers, so that they are tied;
    here each is drawn independently. Only the last layer is separate, as in its ResNets. Its accuracy on the sources,
    by which an epoch is chosen, uses each image's own head; here it uses the mean, which is what is tested, and is
    lower: the heads disagree outside their domains. With one source domain it is ERM.
    """

    hyperparameters = {
        "average": Hyperparameter(
            "logits", "of the heads: 'logits' or 'probabilities'", choice("logits", "probabilities")
        )
    }

    def extra_parameters(self, draw):
        if self.average not in ("logits", "probabilities"):
            raise InputError(f"`average` of MultiHead must be 'logits' or 'probabilities', not '{self.average}'.")
        return new_linear("heads", (self.setup.domains, self.setup.classes), self.setup.width, draw)

    def every_head(self, params: Params, features: Tensor) -> Tensor:
        """Logits of each domain's head: ``[N, D]`` -> ``[N, domains, classes]``."""
        representation = self.representation(params, features)
        return torch.einsum("nh,dch->ndc", representation, params["heads.weight"]) + params["heads.bias"]

    def loss(self, params, batch, state, noise):
        logits = self.every_head(params, batch.features)
        own = one_hot(batch.domains, self.setup.domains, logits)
        return F.cross_entropy(torch.einsum("nd,ndc->nc", own, logits), batch.labels), {}

    def forward(self, params, features):
        """Mean logits of the heads, or the logarithm of their mean probabilities: ``[N, D]`` -> ``[N, classes]``."""
        logits = self.every_head(params, features)
        if self.average == "logits":
            return logits.mean(1)
        return torch.logsumexp(logits.log_softmax(-1), 1) - math.log(self.setup.domains)
