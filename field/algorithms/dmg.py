"""Domain-specific masks for balance of specificity and invariance."""

from itertools import combinations

import torch
from torch import Tensor
from torch.nn import functional as F

from config import InputError
from engine import Batch, Params
from field.algorithms.base import Algorithm, Hyperparameter, log_uniform, register, uniform
from field.algorithms.parts import adam, adam_state, linear, one_hot


@register
class DMG(Algorithm):
    """Domain-specific masks (Chattopadhyay, Balaji & Hoffman 2020, "Learning to Balance Specificity and Invariance
    for In and Out of Domain Generalization", ECCV).

    Every source domain d has a logit for each input of each linear layer: for the D features and for the units of every
    hidden layer; with a trained block also for those of query, key, value, output and both layers of the MLP, the same
    for all tokens. p = sigmoid(logit) is the probability that this input is kept for an image of d. In training each
    image draws its own mask z ~ Bernoulli(p of its domain); the gradient passes to p as if z were p (straight-through).
    The objective is
        cross-entropy(z) + `overlap_weight` * sum over layers of the mean over pairs of domains of sIoU(p_a, p_b)
                         + `sparsity_weight` * sum over layers, domains and units of p
    with sIoU as in `soft_iou`: domains are pushed to use different units. An image is classified by the mean, over the
    source domains, of the logits of the network whose inputs are multiplied by p instead of z.

    Network and mask logits are trained by separate Adams, each with its own learning rate and weight decay. Weight
    decay pulls a mask logit to 0, that is, p to 1/2, not to a closed mask.

    Differences from the authors' code: it masks a few wide layers of a network that is trained as a whole, here every
    layer that is trained is masked. Their initial p of about 0.62 (`initial` =
    "random_uniform") or 0.73 (a scalar logit of 1) would leave little of the signal after six layers of ten units: on
    separable data such a classifier learned late or not at all. So the initial logit is 3 (p = 0.95). The learning
    rate of their network, not that of their masks, shrinks by 1 per cent per epoch; here both are constant, as in all
    methods. Their accuracy on the sources, by
    which an epoch is chosen, uses the hard mask (p > 1/2) of the image's own domain; here the predictor that is tested,
    the mean over the domains, is the one that is validated. Their weight decay of 1e-5 is 0 by default, as in the
    baseline. The weights of the two penalties are theirs for PACS. The sparsity term is a sum, like theirs: its scale
    grows with the number of units and domains.
    """

    hyperparameters = {
        "initial": Hyperparameter(
            "scalar", "initial mask logits: 'scalar' (`initial_logit`) or 'random_uniform' (in [0, 1), p about 0.62)"
        ),
        "initial_logit": Hyperparameter(3.0, "initial mask logit if `initial` is 'scalar'", uniform(1, 5), tensor=True),
        "mask_learning_rate": Hyperparameter(
            1e-3, "learning rate of the mask logits' Adam", log_uniform(-4, -2), tensor=True
        ),
        "mask_weight_decay": Hyperparameter(
            0.0, "L2 penalty inside that Adam: p to 1/2", log_uniform(-6, -2), tensor=True
        ),
        "overlap_weight": Hyperparameter(
            0.1, "weight of the overlap between domains' masks", log_uniform(-2, 1), tensor=True
        ),
        "sparsity_weight": Hyperparameter(0.0, "weight of the sum of all p", tensor=True),
    }

    @classmethod
    def refusal(cls, network):
        return "DMG masks the inputs of the block's layers" if network.has_blocks and not network.shortcut else None

    @property
    def masked_widths(self) -> dict[str, int]:
        """Name of the mask logits of each linear layer -> number of its inputs: of the block, then the classifier."""
        widths = {f"masks.{role}": width for role, width in self.setup.network.input_sizes.items()}
        layers = self.setup.network.classifier.layers
        return widths | {f"masks.{i}": layer.in_features for i, layer in enumerate(layers)}

    def extra_parameters(self, draw):
        shapes = {name: (self.setup.domains, width) for name, width in self.masked_widths.items()}
        if self.initial == "scalar":
            return {name: torch.full(shape, float(self.initial_logit)) for name, shape in shapes.items()}
        if self.initial == "random_uniform":
            return {name: torch.rand(shape, generator=draw) for name, shape in shapes.items()}
        raise InputError(f"`initial` of DMG must be 'random_uniform' or 'scalar', not '{self.initial}'.")

    def draw(self, draw, rows):
        return {"uniform": torch.rand(rows, sum(self.masked_widths.values()), generator=draw)}

    def initial_state(self, params):
        network, masks = self.parts(params)
        return {**super().initial_state(network), "mask_adam": adam_state(masks)}

    def loss(self, params, batch, state, noise):
        keep = {name: torch.sigmoid(params[name]) for name in self.masked_widths}
        logits = self.sampled_forward(params, keep, batch, noise["uniform"])
        loss = F.cross_entropy(logits, batch.labels)
        overlap = sum(mean_overlap(p) for p in keep.values())
        sparsity = sum(p.sum() for p in keep.values())
        return loss + self.overlap_weight * overlap + self.sparsity_weight * sparsity, {}

    def sampled_forward(self, params: Params, keep: Params, batch: Batch, numbers: Tensor) -> Tensor:
        """Logits ``[B, classes]``, each image with a mask drawn for its domain.

        `keep` is p of each layer's inputs, ``[domains, width]``; `numbers` are uniform, ``[B, sum of the widths]``.
        """
        own, widths = one_hot(batch.domains, self.setup.domains, numbers), self.masked_widths
        draws = zip(widths, numbers.split(list(widths.values()), dim=1), strict=True)
        return self.masked(params, batch.features, {name: straight_through(own @ keep[name], u) for name, u in draws})

    def masked(self, params: Params, inputs: Tensor, masks: Params) -> Tensor:
        """Logits ``[B, classes]`` of the network whose layers' inputs are multiplied by `masks`, ``[*, width]``."""
        network = self.setup.network
        factors = {role: masks[f"masks.{role}"] for role in network.input_sizes}
        x, last = network.features(params, inputs, factors), len(network.layers) - 1
        for i, name in enumerate(network.layers):
            x = linear(params, name, x * masks[f"masks.{i}"])
            x = torch.relu(x) if i < last else x
        return x

    def update(self, params, batch, state, noise):
        gradient, loss, _ = self.gradients(params, batch, state, noise)
        network, masks = self.parts(params)
        network, moments = self.adam_step(network, gradient, state["adam"])
        masks, mask_moments = adam(masks, gradient, state["mask_adam"], self.mask_learning_rate, self.mask_weight_decay)
        new = {"adam": moments, "mask_adam": mask_moments, "step": state["step"] + 1}
        return {**params, **network, **masks}, {**state, **new}, loss

    def forward(self, params, features):
        """Mean over the source domains of the logits under their soft masks."""
        keep = {name: torch.sigmoid(params[name]) for name in self.masked_widths}
        each = [
            self.masked(params, features, {name: p[d : d + 1] for name, p in keep.items()})
            for d in range(self.setup.domains)
        ]
        return torch.stack(each).mean(0)


def straight_through(p: Tensor, numbers: Tensor) -> Tensor:
    """1 where `numbers`, uniform in [0, 1), are below p, else 0; with the gradient of p."""
    hard = (numbers < p).to(p)
    return (hard - p).detach() + p


def soft_iou(a: Tensor, b: Tensor, eps: float = 1e-6) -> Tensor:
    """(sum ab + eps) / (sum (a + b - ab) + eps), a scalar: intersection over union if the masks are 0 or 1."""
    both = (a * b).sum()
    return (both + eps) / (a.sum() + b.sum() - both + eps)


def mean_overlap(p: Tensor) -> Tensor:
    """Mean `soft_iou` over pairs of rows of ``[domains, width]``; 0 for a single domain.

    For ``(p > 0.5)``, as numbers, it is the overlap of hard masks that the authors report.
    """
    pairs = list(combinations(range(len(p)), 2))
    return sum((soft_iou(p[a], p[b]) for a, b in pairs), p.new_zeros(())) / max(1, len(pairs))
