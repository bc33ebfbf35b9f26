"""Averages of weights along training."""

import torch
from torch import Tensor

from algorithms.base import Algorithm, Batch, Hyperparameter, Noise, Params, State, choice, flatten, unflatten, uniform
from algorithms.registry import register


@register
class WeightAverage(Algorithm):
    """`ERM` whose prediction is by the average of its weights along training (Arpit et al., NeurIPS 2022).

    The simple moving average of "Ensemble of averages" (also known as MA or SMA; Polyak & Juditsky 1992): with θ_t the
    weights after t steps, prediction is by θ_t until step t₀, and by the mean of θ_t₀ … θ_t from then on. Training
    itself is ERM's, to the last bit.

    Arpit et al. begin at step 100 of 5001; here that is the same part of the training, but never before the first step:
    they begin with a pre-trained network, here the classifier's start is random. Their ensemble of several such
    averages is not formed: each seed predicts alone. The state "average" is the vector of weights that predicts, in the
    order of `flatten`.
    """

    hyperparameters = {
        "start": Hyperparameter(100 / 5001, "part of the training after which averaging begins", uniform(0, 0.5))
    }

    def initial_state(self, params: Params) -> State:
        return {**super().initial_state(params), "average": flatten(params)}

    def update(self, params: Params, batch: Batch, state: State, noise: Noise) -> tuple[Params, State, Tensor]:
        new, state, loss = super().update(params, batch, state, noise)
        now, old = flatten(new), state["average"]
        begin = max(1, round(self.start * self.setup.steps))
        behind = state["step"] - begin  # weights in the average so far, if positive
        average = torch.where(behind > 0, old + (now - old) / (behind.clamp(min=0) + 1), now)
        return new, {**state, "average": average}, loss

    def logits(self, params: Params, state: State, features: Tensor) -> Tensor:
        return self.forward(unflatten(state["average"], params), features)


@register
class SWAD(Algorithm):
    """Stochastic weight averaging densely (Cha et al., NeurIPS 2021), Algorithm 1 of the paper.

    `ERM` whose prediction is by the mean of the weights of all steps between two validations, t_s and t_e, found from
    the loss on the sources' `out` split:
    - t_s: the first whose loss is the least of the `n_converge` validations that begin with it;
    - the threshold: (1 + `tolerance_ratio`) × the mean loss of those validations;
    - t_e: the last before `n_tolerance` validations that are all above the threshold; if there are none, the last one.
    The steps between two validations are a segment; those that end at t_s … t_e are averaged, each step with the same
    weight. Training itself is ERM's, to the last bit.

    Deviations. Validation is five times an epoch: over ten epochs as often as in the original's 5001 steps (every 100).
    The loss is the mean over all `out` images of the sources; in the original it is the mean of the domains'. The
    original's code differs from the paper, which is followed here: it also averages up to `n_tolerance` − `n_converge`
    − 1 segments before t_s that are below the threshold, counts t_s twice, and at the end of training leaves out the
    last segments if all of them are above it. Before t_s is found, prediction is by the current weights (the original:
    by its last segment). Steps after the last validation are in no segment. Training goes on after t_e, without effect
    on the average; the original stops.

    State, where Q is the larger of the two lengths:
    - "segment": mean and number of the weights since the last validation;
    - "queue": the same of the last Q segments, and the loss at the end of each, oldest first;
    - "settled": mean and number of the weights of the valley that have left the queue;
    - "validations": their number; "start": t_s counted from 0, −1 = not yet; "threshold"; "dead": whether t_e is found;
    - "average" and "average_count": the weights that predict and how many steps are in them, 0 = none.
    """

    validate_every = 0.2
    hyperparameters = {
        "n_converge": Hyperparameter(3, "validations whose first must be their least for averaging to start"),
        "n_tolerance": Hyperparameter(6, "validations that must all be above the threshold for averaging to end"),
        "tolerance_ratio": Hyperparameter(
            0.3, "threshold above the loss at the start of averaging, as a part of it", choice(0.2, 0.3)
        ),
    }

    def initial_state(self, params: Params) -> State:
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

    def update(self, params: Params, batch: Batch, state: State, noise: Noise) -> tuple[Params, State, Tensor]:
        new, state, loss = super().update(params, batch, state, noise)
        flat = flatten(new)
        return new, {**state, "segment": merged(state["segment"], flat, torch.ones_like(flat[0]))}, loss

    def validated(self, params: Params, state: State, loss: Tensor) -> State:
        queue, now, alive = state["queue"], state["validations"], ~state["dead"]
        length = len(queue["loss"])
        # the oldest segment leaves the queue, for good if it is of the valley
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
        """Start of the valley and its threshold, as they are or found by the newest validation.

        Args:
            losses: of the last validations, ``[Q]``, oldest first.
            now: number of the newest, from 0.
            state: before it.
        """
        window = losses[-self.n_converge :]
        found = (state["start"] < 0) & (now + 1 >= self.n_converge) & (window[0] <= window.min())
        threshold = (1 + self.tolerance_ratio) * window.mean()
        return (
            torch.where(found, now - self.n_converge + 1, state["start"]),
            torch.where(found, threshold, state["threshold"]),
        )

    def logits(self, params: Params, state: State, features: Tensor) -> Tensor:
        flat = torch.where(state["average_count"] > 0, state["average"], flatten(params))
        return self.forward(unflatten(flat, params), features)


def merged(average: State, other: Tensor, count: Tensor) -> State:
    """The average of `average` ("mean" of "count" weights) and of `count` weights with the mean `other`."""
    total = average["count"] + count
    part = count / total.clamp(min=1)
    return {"mean": average["mean"] + part * (other - average["mean"]), "count": total}
