"""Averages of weights along training."""

import torch
from torch import Tensor

from field.algorithms.base import Algorithm, Hyperparameter, State, choice, register, uniform
from field.algorithms.parts import flatten, unflatten


@register
class WeightAverage(Algorithm):
    """`ERM` that predicts with the average of its weights along training (Arpit et al., NeurIPS 2022).

    The simple moving average of "Ensemble of averages" (also known as MA or SMA; Polyak & Juditsky 1992): with θ_t the
    weights after t steps, prediction uses θ_t until step t₀, and the mean of θ_t₀ … θ_t from then on. Training itself
    is bit-identical to ERM's.

    Arpit et al. begin at step 100 of 5001; here it is the same fraction of the training, but never before the first
    step: they begin with a pretrained network, here a classifier on features starts at random. Their ensemble of
    several such averages is not formed: each seed predicts alone. Averaging begins as in the paper; the authors' code
    begins one step earlier, with θ_t₀₋₁.

    State: "average", the vector of weights that predicts, in the order of `flatten`; "begin", t₀.
    """

    hyperparameters = {
        "start": Hyperparameter(
            100 / 5001, "fraction of the training after which averaging begins", uniform(0, 0.5), tensor=True
        )
    }

    def initial_state(self, params):
        begin = torch.tensor(max(1, round(self.start * self.setup.steps)))
        return {**super().initial_state(params), "average": flatten(params), "begin": begin}

    def update(self, params, batch, state, noise):
        new, state, loss = super().update(params, batch, state, noise)
        now, old = flatten(new), state["average"]
        behind = state["step"] - state["begin"]  # weights in the average so far, if positive
        average = torch.where(behind > 0, old + (now - old) / (behind.clamp(min=0) + 1), now)
        return new, {**state, "average": average}, loss

    def logits(self, params, state, features):
        return self.forward(unflatten(state["average"], params), features)


@register
class SWAD(Algorithm):
    """Stochastic weight averaging densely (Cha et al., NeurIPS 2021), Algorithm 1 of the paper.

    `ERM` that predicts with the mean of the weights of all steps between two validations, t_s and t_e, found from the
    loss on the sources' `out` split:
    - t_s: the first whose loss is the smallest of the `n_converge` validations that begin with it;
    - the threshold: (1 + `tolerance_ratio`) × the mean loss of those validations;
    - t_e: the last before `n_tolerance` validations that are all above the threshold; if there are none, the last one.
    The steps between two validations are a segment; those that end at t_s … t_e are averaged, each step with the same
    weight. Training itself is bit-identical to ERM's.

    Deviations. Validation is five times an epoch: over ten epochs as often as in the original's 5001 steps (every 100).
    The loss is the mean over all `out` images of the sources; in the original it is the mean of the domains' losses.
    The original's code differs from the paper, which is followed here: it also averages up to
    `n_tolerance` − `n_converge` − 1 segments before t_s that are below the threshold, counts t_s twice, and at the end
    of training leaves out the last segments if all of them are above it. Before t_s is found, the current weights
    predict (in the original, the last segment). Steps after the last validation are in no segment. Training continues
    after t_e, without effect on the average; the original stops.

    State, where Q is the larger of the two lengths:
    - "segment": mean and number of the weights since the last validation;
    - "queue": the same for the last Q segments, and the loss at the end of each, oldest first;
    - "settled": mean and number of the weights of the valley that have left the queue;
    - "validations": their number; "start": t_s counted from 0, −1 = not yet; "threshold"; "dead": whether t_e is found;
    - "average" and "average_count": the weights that predict and how many steps are in them, 0 = none.
    """

    validate_every = 0.2
    hyperparameters = {
        "n_converge": Hyperparameter(3, "averaging starts at a validation whose loss is the smallest of this many"),
        "n_tolerance": Hyperparameter(6, "averaging ends when this many validations are all above the threshold"),
        "tolerance_ratio": Hyperparameter(
            0.3, "threshold above the loss at the start, as its fraction", choice(0.2, 0.3), tensor=True
        ),
    }

    def initial_state(self, params):
        zeros, length = torch.zeros_like(flatten(params)), max(self.n_converge, self.n_tolerance)
        none = {"mean": zeros, "count": zeros.new_zeros(())}
        queue = {"mean": zeros.repeat(length, 1), "count": zeros.new_zeros(length)}
        valley = {
            "segment": none,
            "queue": queue | {"loss": torch.full_like(queue["count"], torch.inf)},
            "settled": {name: value.clone() for name, value in none.items()},
            "validations": torch.zeros((), dtype=torch.long),
            "start": torch.full((), -1, dtype=torch.long),
            "threshold": zeros.new_full((), torch.inf),
            "dead": torch.zeros((), dtype=torch.bool),
            "average": zeros.clone(),
            "average_count": zeros.new_zeros(()),
        }
        return super().initial_state(params) | valley

    def update(self, params, batch, state, noise):
        new, state, loss = super().update(params, batch, state, noise)
        flat = flatten(new)
        return new, {**state, "segment": merged(state["segment"], flat, torch.ones_like(flat[0]))}, loss

    def validated(self, params, state, loss):
        queue, now, alive = state["queue"], state["validations"], ~state["dead"]
        length = len(queue["loss"])
        # The oldest segment leaves the queue; if it belongs to the valley, it is settled.
        kept = alive & (state["start"] >= 0) & (now - length >= state["start"])
        count = torch.where(kept, queue["count"][0], torch.zeros_like(loss))
        settled = merged(state["settled"], queue["mean"][0], count)
        newest = {**state["segment"], "loss": loss}
        queue = {name: torch.cat([queue[name][1:], value.unsqueeze(0)]) for name, value in newest.items()}

        start, threshold = self.valley(queue["loss"], now, state)
        ends = (state["start"] >= 0) & (queue["loss"][-self.n_tolerance :].min() > threshold)
        last = torch.where(ends, now - self.n_tolerance, now)
        number = now - length + 1 + torch.arange(length, device=loss.device)  # of the validation that ends a segment
        inside = (start >= 0) & (number >= start) & (number <= last)
        counts = torch.where(inside, queue["count"], torch.zeros_like(queue["count"]))
        total = settled["count"] + counts.sum()
        average = (settled["count"] * settled["mean"] + counts @ queue["mean"]) / total.clamp(min=1)
        return {
            "segment": {name: torch.zeros_like(value) for name, value in state["segment"].items()},
            "queue": queue,
            "settled": settled,
            "validations": now + 1,
            "start": start,
            "threshold": threshold,
            "dead": state["dead"] | ends,
            "average": torch.where(alive, average, state["average"]),
            "average_count": torch.where(alive, total, state["average_count"]),
        }

    def valley(self, losses: Tensor, now: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """Start of the valley and its threshold, after validation `now`; losses of the last ones, ``[Q]``."""
        window = losses[-self.n_converge :]
        found = (state["start"] < 0) & (now + 1 >= self.n_converge) & (window[0] <= window.min())
        threshold = (1 + self.tolerance_ratio) * window.mean()
        return (
            torch.where(found, now - self.n_converge + 1, state["start"]),
            torch.where(found, threshold, state["threshold"]),
        )

    def logits(self, params, state, features):
        flat = torch.where(state["average_count"] > 0, state["average"], flatten(params))
        return self.forward(unflatten(flat, params), features)


def merged(average: State, other: Tensor, count: Tensor) -> State:
    """`average` ("mean" of "count" weights) with `count` more weights, whose mean is `other`."""
    total = average["count"] + count
    part = count / total.clamp(min=1)
    return {"mean": average["mean"] + part * (other - average["mean"]), "count": total}
