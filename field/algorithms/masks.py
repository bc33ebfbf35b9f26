"""This project's own method and the controls of its study, as methods among the others."""

import torch

from field.algorithms.base import Algorithm, Hyperparameter, choice, register, uniform
from importance import scaled_update, unimportant_rate, weight_rates
from study import CONTROLS


class Masked(Algorithm):
    """Base class: weights that the mask does not mark learn at a fraction of the full rate, one for each epoch.

    `study.CONTROLS` says how the mask of a `control` is made, from the source domains alone, and whether the unmarked
    weights are frozen or pruned.

    State: "mask", known before training, and "low_rates" ``[epochs]``, the rate of the unmarked weights as a fraction
    of the full rate.
    """

    hyperparameters = {
        "kept": Hyperparameter(
            60.0, "per cent of the tracked weights that are marked", choice(20.0, 40.0, 60.0, 80.0), tensor=True
        )
    }

    @classmethod
    def from_settings(cls, settings):
        return super().from_settings(settings) | {"kept": float(settings.importance_threshold_percentile)}

    def unmarked_rate(self, epoch: int) -> float:
        """Rate of the unmarked weights in an epoch (from 0): none where they are frozen or pruned."""
        return 0.0

    def initial_state(self, params):
        state = super().initial_state(params)
        rates = [self.unmarked_rate(epoch) for epoch in range(self.setup.epochs)]
        return {**state, "low_rates": state["adam"]["mean"].new_tensor(rates)}

    def begin(self, params, state):
        if not CONTROLS[self.control].prune:
            return params
        return params | {name: torch.where(mask, params[name], 0.0) for name, mask in state["mask"].items()}

    def update(self, params, batch, state, noise):
        new, after, loss = super().update(params, batch, state, noise)
        low = state["low_rates"][state["step"] // self.setup.steps_per_epoch]
        rates = {name: weight_rates(mask, low) for name, mask in state["mask"].items()}
        scaled = {name: scaled_update(params[name], new[name], rate) for name, rate in rates.items()}
        return new | scaled, after, loss


@register
class ImportanceMask(Masked):
    """Importance-based weight masking: Phase 2 of this project.

    The weights that moved most in Phase 1 learn at the full rate, the other tracked weights at a small one that decays
    each epoch and is exactly zero from the freeze epoch on.
    """

    control = "importance"
    hyperparameters = {
        "low_rate": Hyperparameter(
            0.1, "first rate of the other weights, in learning rates", uniform(0, 1), tensor=True
        ),
        "decay": Hyperparameter(0.5, "factor on that rate after each epoch", uniform(0.1, 1), tensor=True),
        "freeze_after": Hyperparameter(
            0.7, "fraction of the epochs after which it is exactly zero", uniform(0, 1), tensor=True
        ),
    }

    @classmethod
    def from_settings(cls, settings):
        return super().from_settings(settings) | {
            "low_rate": settings.ph2_lr_unimportant_start / settings.ph2_lr_important,
            "decay": settings.ph2_lr_decay_rate,
            "freeze_after": settings.ph2_freeze_epoch / settings.ph2_num_epochs,
        }

    def unmarked_rate(self, epoch):
        return unimportant_rate(epoch, self.low_rate, self.decay, round(self.freeze_after * self.setup.epochs))


@register
class RandomMask(ImportanceMask):
    """`ImportanceMask` with random positions, drawn for each seed: a control."""

    control = "random"


@register
class RandomLayerMask(ImportanceMask):
    """`RandomMask` with the count of the importance mask in each layer: a control."""

    control = "random_layer"


@register
class PermutedMask(ImportanceMask):
    """The importance mask with the hidden units permuted, of blocks the rows and columns of each matrix: a control."""

    control = "permuted"


@register
class InvertedMask(ImportanceMask):
    """As many of the *least* important weights marked: a control."""

    control = "inverted"


@register
class OtherSeedMask(ImportanceMask):
    """The importance mask of the next seed, whose units mean something else: a control."""

    control = "other_seed"


@register
class FrozenMask(Masked):
    """The unmarked weights keep their start: a control."""

    control = "frozen"


@register
class PruneMask(Masked):
    """The unmarked weights are zero from the start and stay so: a control."""

    control = "prune"
