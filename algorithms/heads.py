"""What each domain has of its own."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from algorithms.base import Algorithm, Batch, Hyperparameter, Noise, Params, State, choice, linear_start
from algorithms.registry import register
from config import InputError


@register
class MTL(Algorithm):
    """Marginal transfer learning (Blanchard, Deshmukh, Dogan, Lee & Scott 2021, "Domain Generalization by Marginal
    Transfer Learning", JMLR 22).

    The classifier is told from which distribution of images its image comes: f(P_d, x). Minimized is the mean over the
    source domains d of the mean cross-entropy of
        head([z(x), μ_d]),    μ_d = `ema` * (mean of z over the batch's rows of d) + (1 - `ema`) * (last step's μ_d)
    with z the representation: the paper's kernel mean embedding of P_d with a learned feature map, as in DomainBed. The
    μ are the state "embeddings" ``[domains, h]``, 0 at first; the gradient goes through the batch's mean. The head has
    parameters of its own, "wide_head", for twice the inputs; the classifier's own last layer gets no gradient.

    As in DomainBed `ema` is the weight of what is new: at 0.99, μ_d is almost the mean of the last batch.

    Differences from DomainBed: its code overwrites the embedding with random numbers before the head reads it, which
    makes it mere noise; here the head reads the embedding, as the paper means it. At test time it embeds the batch at
    hand, so that a prediction depends on the rows beside; here an image is predicted by itself, with the mean over the
    source domains of μ_d in place of its own domain's embedding, which leaves out the paper's adaptation to the target.
    The mean over the domains is minimized, not the sum, which is the same for Adam without weight decay.
    """

    batches = "balanced"
    hyperparameters = {
        "ema": Hyperparameter(0.99, "weight of the batch's mean in a domain's embedding", choice(0.5, 0.9, 0.99, 1.0))
    }

    def extra_parameters(self, draw: torch.Generator) -> Params:
        inputs, classes = 2 * self.setup.hidden_sizes[-1], self.setup.classes
        return {
            "wide_head.weight": linear_start((classes, inputs), inputs, draw),
            "wide_head.bias": linear_start((classes,), inputs, draw),
        }

    def initial_state(self, params: Params) -> State:
        embeddings = params["wide_head.weight"].new_zeros(self.setup.domains, self.setup.hidden_sizes[-1])
        return {**super().initial_state(params), "embeddings": embeddings}

    def loss(self, params: Params, batch: Batch, state: State, noise: Noise) -> tuple[Tensor, State]:
        representation = self.by_domain(self.representation(params, batch.features))  # [domains, batch_size, h]
        embeddings = self.ema * representation.mean(1) + (1 - self.ema) * state["embeddings"]
        logits = self.wide_head(params, representation, embeddings.unsqueeze(1)).flatten(0, 1)
        return F.cross_entropy(logits, batch.labels), {"embeddings": embeddings.detach()}

    def logits(self, params: Params, state: State, features: Tensor) -> Tensor:
        return self.wide_head(params, self.representation(params, features), state["embeddings"].mean(0))

    def wide_head(self, params: Params, representation: Tensor, embedding: Tensor) -> Tensor:
        """The last layer, on ``[*, h]`` and an embedding that can be expanded to it: ``[*, classes]``."""
        both = torch.cat((representation, embedding.expand_as(representation)), -1)
        return F.linear(both, params["wide_head.weight"], params["wide_head.bias"])


@register
class MultiHead(Algorithm):
    """A last layer for each source domain: the baseline of Chattopadhyay, Balaji & Hoffman 2020 ("Learning to Balance
    Specificity and Invariance for In and Out of Domain Generalization", ECCV) beside their `DMG`.

    Minimized is the mean over all source images of cross-entropy(W_d z(x) + b_d, y), d the image's domain and z the
    representation, which all domains share. An image is classified by the mean over the domains' heads, of their logits
    (as the authors' code does at test time) or of their probabilities. The classifier's own last layer is not used.

    Differences from the authors' code: its heads for AlexNet are all made of the same layers, so that they are tied;
    here each is drawn on its own. Only the last layer is a domain's own, as in its ResNets; its AlexNet may be split
    earlier. Its accuracy on the sources, by which an epoch is chosen there, is that of each image's own head; here it
    is that of the mean, which is what is tested, and is lower: the heads read the shared units in ways of their own,
    and disagree beyond their domain. With one source domain it is ERM.
    """

    hyperparameters = {
        "average": Hyperparameter(
            "logits", "what is averaged over the heads: 'logits' or 'probabilities'", choice("logits", "probabilities")
        )
    }

    def extra_parameters(self, draw: torch.Generator) -> Params:
        domains, classes, inputs = self.setup.domains, self.setup.classes, self.setup.hidden_sizes[-1]
        if self.average not in ("logits", "probabilities"):
            raise InputError(f"`average` of MultiHead must be 'logits' or 'probabilities', not '{self.average}'.")
        return {
            "heads.weight": linear_start((domains, classes, inputs), inputs, draw),
            "heads.bias": linear_start((domains, classes), inputs, draw),
        }

    def every_head(self, params: Params, features: Tensor) -> Tensor:
        """Logits of each domain's head: ``[N, D]`` -> ``[N, domains, classes]``."""
        representation = self.representation(params, features)
        return torch.einsum("nh,dch->ndc", representation, params["heads.weight"]) + params["heads.bias"]

    def loss(self, params: Params, batch: Batch, state: State, noise: Noise) -> tuple[Tensor, State]:
        logits = self.every_head(params, batch.features)
        # The own head by a product: the gradient of an index is summed in no fixed order on a GPU.
        own = batch.domains.unsqueeze(1) == torch.arange(self.setup.domains, device=batch.domains.device)
        return F.cross_entropy(torch.einsum("nd,ndc->nc", own.to(logits), logits), batch.labels), {}

    def forward(self, params: Params, features: Tensor) -> Tensor:
        """Mean logits of the heads, or the logarithm of their mean probabilities: ``[N, D]`` -> ``[N, classes]``."""
        logits = self.every_head(params, features)
        if self.average == "logits":
            return logits.mean(1)
        return torch.logsumexp(logits.log_softmax(-1), 1) - math.log(self.setup.domains)
