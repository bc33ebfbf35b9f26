"""This project's own method and the controls of its study, as methods among the others."""

from typing import ClassVar

import torch
from torch import Tensor

from algorithms.base import Algorithm, Batch, Hyperparameter, Noise, Params, State, adam, choice, flatten, uniform
from algorithms.registry import register
from config import Settings


class Masked(Algorithm):
    """What is common to methods with a mask: the rate of a weight that it does not mark is `rate`, that of others 1.

    The mask is in the state ("mask", name of the tracked matrix -> bool, True = marked); it was made from the source
    domains alone.
    """

    masked = True
    variant: ClassVar[str]  # of `variants`: how the mask is made
    hyperparameters = {
        "kept": Hyperparameter(60.0, "per cent of the tracked weights that are marked", choice(20.0, 40.0, 60.0, 80.0))
    }

    @classmethod
    def from_settings(cls, settings: Settings) -> dict[str, float]:
        return super().from_settings(settings) | {"kept": float(settings.importance_threshold_percentile)}

    def rate(self, state: State) -> Tensor:
        """Part of the full rate that unmarked weights learn at in this step (scalar)."""
        return torch.zeros_like(state["adam"]["mean"][0])

    def update(self, params: Params, batch: Batch, state: State, noise: Noise) -> tuple[Params, State, Tensor]:
        gradient, loss, _ = self.gradients(params, batch, state, noise)
        low = self.rate(state)
        ones = {name: torch.ones_like(value) for name, value in params.items()}
        rates = ones | {name: torch.where(mask, torch.ones_like(low), low) for name, mask in state["mask"].items()}
        rate = self.learning_rate * flatten(rates)  # Adam ignores the scale of a gradient: the update is scaled
        new, moments = adam(params, gradient, state["adam"], rate, self.weight_decay)
        return new, {**state, "adam": moments, "step": state["step"] + 1}, loss


@register
class ImportanceMask(Masked):
    """Importance-based weight masking: Phase 2 of this project.

    Weights that moved most in Phase 1 learn at the full rate, the other tracked weights at a small one that decays each
    epoch and is exactly zero from the freeze epoch on.
    """

    variant = "importance"
    hyperparameters = {
        "low_rate": Hyperparameter(
            0.1, "first rate of the other weights, as a part of the learning rate", uniform(0, 1)
        ),
        "decay": Hyperparameter(0.5, "factor on that rate after each epoch", uniform(0.1, 1)),
        "freeze_after": Hyperparameter(0.7, "part of the epochs after which that rate is exactly zero", uniform(0, 1)),
    }

    @classmethod
    def from_settings(cls, settings: Settings) -> dict[str, float]:
        return super().from_settings(settings) | {
            "low_rate": settings.ph2_lr_unimportant_start / settings.ph2_lr_important,
            "decay": settings.ph2_lr_decay_rate,
            "freeze_after": settings.ph2_freeze_epoch / settings.ph2_num_epochs,
        }

    def rate(self, state: State) -> Tensor:
        epoch = state["step"] // self.setup.steps_per_epoch
        rate = self.low_rate * self.decay ** epoch.to(state["adam"]["mean"].dtype)
        return torch.where(epoch >= round(self.freeze_after * self.setup.epochs), torch.zeros_like(rate), rate)


@register
class RandomMask(ImportanceMask):
    """`ImportanceMask` with positions drawn at random, anew for each seed: a control."""

    variant = "random"


@register
class RandomLayerMask(ImportanceMask):
    """`RandomMask` with the count of the importance mask in each layer: a control."""

    variant = "random_layer"


@register
class PermutedMask(ImportanceMask):
    """The importance mask with the hidden units permuted: its structure kept, its location broken: a control."""

    variant = "permuted"


@register
class InvertedMask(ImportanceMask):
    """As many of the *least* important weights marked: a control."""

    variant = "inverted"


@register
class OtherSeedMask(ImportanceMask):
    """The importance mask of the next seed, whose units mean something else: a control."""

    variant = "other_seed"


@register
class FrozenMask(Masked):
    """The unmarked weights keep their start: a control."""

    variant = "frozen"


@register
class PruneMask(Masked):
    """The unmarked weights are zero from the start and stay so: a control."""

    variant = "prune"

    def begin(self, params: Params, state: State) -> Params:
        return params | {name: torch.where(mask, params[name], 0.0) for name, mask in state["mask"].items()}
