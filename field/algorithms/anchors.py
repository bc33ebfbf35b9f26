"""Weights that are drawn back to an anchor: by resampling in each step, or by a penalty or projection."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.func import vmap

from engine import Params
from field.algorithms.base import Algorithm, Hyperparameter, Noise, State, choice, log_uniform, register, uniform
from field.algorithms.gradients import rounding
from field.algorithms.parts import flatten, scalar, unflatten, variance


@register
class Mixout(Algorithm):
    """Mixout (Lee, Cho & Kang, ICLR 2020), at high rates "High-Rate Mixout" (Aminbeidokhti et al., WACV 2026).

    `ERM` with the weights resampled in each step around their anchor a, the start. With q = `keep` each weight w of a
    matrix is replaced by
        a + m (w − a) / q,    m = 1 with probability q, else 0
    whose mean is w; the gradient is that at the resampled weights, times m / q. Here biases are not
    resampled. Prediction uses w itself.

    Deviations. On frozen features the start is random, where the papers' is pretrained: there this is closer to
    dropping connections than to keeping knowledge. High-Rate Mixout has q = 0.1 in wide transformers and 0.2 in
    ResNets; a unit with ten inputs needs more: with 0.9, the default, the source domains are learned as well as by
    `ERM`, with 0.5 much more slowly.
    Single weights are drawn ("point" in High-Rate Mixout, its choice for transformers), not rows of a matrix.

    State: "anchor", name of a weight matrix -> its anchor.
    """

    hyperparameters = {
        "keep": Hyperparameter(
            0.9, "q, chance that a weight is used in a step", choice(0.3, 0.5, 0.7, 0.9), tensor=True
        )
    }

    @property
    def matrices(self) -> tuple[str, ...]:
        """Names of the network's weight matrices: what is resampled."""
        return tuple(name for name, shape in self.shapes.items() if len(shape) == 2)

    def draw(self, draw, rows):
        return {name: torch.rand(self.shapes[name], generator=draw) for name in self.matrices}

    def initial_state(self, params):
        return {**super().initial_state(params), "anchor": {name: params[name] for name in self.matrices}}

    def chances(self, state: State) -> Mapping[str, float | Tensor]:
        """Chance of each weight to be used: name of a matrix -> a number, or a tensor of its shape."""
        return dict.fromkeys(self.matrices, self.keep)

    def resampled(self, params: Params, state: State, noise: Noise) -> Params:
        """The parameters that a step uses; `noise` is uniform in 0 … 1."""
        found = dict(params)
        for name, chance in self.chances(state).items():
            anchor = state["anchor"][name]
            found[name] = anchor + torch.where(noise[name] < chance, (params[name] - anchor) / chance, 0.0)
        return found

    def loss(self, params, batch, state, noise):
        return super().loss(self.resampled(params, state, noise), batch, state, noise)


@register
class GMixout(Mixout):
    """Mixout around a moving anchor (Aminbeidokhti et al. 2025, "Revisiting Mixout", arXiv 2510.06982).

    `Mixout` with two more levers: after each step the anchor moves, a <- λ a + (1 − λ) w with λ = `anchor_decay`, an
    exponential moving average of the weights; and what is used is drawn anew every `period` steps only. With λ = 1 and
    a period of 1 it is `Mixout`; with λ = 1 and a period as long as the training, a fixed random mask.

    The paper's defaults for λ and the period, and whether its anchor moves in each step or with each new mask, were not
    available: these are ours, and with a period of 1 the two are the same.

    State: "anchor", see `Mixout`; "drawn", name of a matrix -> the uniform numbers in use.
    """

    hyperparameters = {
        "anchor_decay": Hyperparameter(
            0.99, "λ, decay of the average that is the anchor; 1 = the start", choice(0.9, 0.99, 1.0), tensor=True
        ),
        "period": Hyperparameter(1, "steps until it is drawn anew which weights are used", choice(1, 10), tensor=True),
    }

    def initial_state(self, params):
        state = super().initial_state(params)
        return {**state, "drawn": {name: torch.zeros_like(value) for name, value in state["anchor"].items()}}

    def update(self, params, batch, state, noise):
        anew, decay = state["step"] % self.period == 0, self.anchor_decay
        drawn = {name: torch.where(anew, noise[name], old) for name, old in state["drawn"].items()}
        new, state, loss = super().update(params, batch, {**state, "drawn": drawn}, drawn)
        anchor = {name: decay * old + (1 - decay) * new[name] for name, old in state["anchor"].items()}
        return new, {**state, "anchor": anchor}, loss


class Ranked(Mixout):
    """Base class: weights that are more important in Phase 1 are used more often, equally many of them on average.

    A tracked weight of rank r in 0 … 1 (1/2 on average, see `field.phase1.ranks`) is used with probability
        q(r) = q + c · 2 min(q, 1 − q) · (r − 1/2),    q = `keep`, c = `contrast`
    whose mean is q. With c = 1 it is proportional to r up to q = 1/2, and above that 1 − q(r) to 1 − r; with c = 0 it
    is the uniform q, and with c < 0 the least important weights are used most. Weights that are not tracked keep q.

    State: "ranks", tracked matrix -> ``[out, in]``, known before training.
    """

    hyperparameters = {
        # not 1: the weight of the lowest of n ranks would be used once in n / q steps, and n / q times as far
        "contrast": Hyperparameter(
            0.8, "c, how much the chance depends on the rank, −1 … 1", choice(0.4, 0.8), tensor=True
        )
    }

    def chances(self, state):
        chances = {}
        for name, ranks in state["ranks"].items():
            keep = scalar(self.keep, ranks)
            chances[name] = keep + self.contrast * 2 * torch.minimum(keep, 1 - keep) * (ranks - 0.5)
        return {**super().chances(state), **chances}


@register
class ImportanceMixout(Ranked):
    """`Mixout` in which a weight is used the more often, the more important it is in Phase 1.

    See `Ranked`. The matched control is `PermutedMixout`; `Mixout` uses all weights equally often.
    """

    phase1 = {"ranks": "ranks"}


@register
class PermutedMixout(Ranked):
    """`ImportanceMixout` with the importance permuted at random within each matrix: a control.

    The same chances in each matrix, for other weights of it; the order is drawn for each seed and holdout.
    """

    phase1 = {"ranks": "shuffled_ranks"}


@register
class ImportanceGMixout(Ranked, GMixout):
    """`GMixout` in which a weight is used the more often, the more important it is in Phase 1.

    See `Ranked`. The matched control is `PermutedGMixout`; `GMixout` uses all weights equally often.
    """

    phase1 = {"ranks": "ranks"}


@register
class PermutedGMixout(Ranked, GMixout):
    """`ImportanceGMixout` with the importance permuted at random within each matrix: a control."""

    phase1 = {"ranks": "shuffled_ranks"}


class Anchored(Algorithm):
    """Base class: what the start was is remembered.

    State: "start", vector of all initial parameters, in the order of `flatten`.
    """

    def initial_state(self, params):
        return {**super().initial_state(params), "start": flatten(params)}


@register
class L2SP(Anchored):
    """L2-SP (Li, Grandvalet & Davoine, "Explicit inductive bias for transfer learning", ICML 2018).

    Minimizes cross-entropy + λ/2 ‖w − w₀‖², the squared distance from the start, summed over all parameters. The paper
    pulls the new last layer to 0 instead, because it has no pretrained start; here every parameter is pulled to its
    start, on frozen features a random one. The penalty is part of the loss, as in the paper, and passes through Adam.
    The default and the search are ours: ten times the default already keeps a network on features from learning the
    source domains as well as `ERM`.
    """

    hyperparameters = {
        "pull": Hyperparameter(1e-2, "λ of the squared distance from the start", log_uniform(-4, -1), tensor=True)
    }

    def loss(self, params, batch, state, noise):
        risk, changes = super().loss(params, batch, state, noise)
        return risk + self.pull / 2 * (flatten(params) - state["start"]).square().sum(), changes


@register
class L2SPBalanced(L2SP):
    """`L2SP` on balanced batches: the control of `DSPReg`, with the same strength for every weight."""

    batches = "balanced"


@register
class DSPReg(L2SPBalanced):
    """Domain-sensitive parameter regularization (Han et al. 2026, DSP-Reg, arXiv 2601.19394).

    `L2SPBalanced` with a strength for each weight that follows from how much the domains disagree on it: minimizes
        mean_e R_e + λ/2 Σ_i s_i (w_i − w₀_i)²,    s_i = v_i / mean(v)
    where v_i is the variance over domains e of ∂R_e/∂w_i (divisor n), as an exponential moving average over steps, and
    s is not differentiated. The mean of s over all weights is 1, so that λ means the same in both. Variances that are
    rounding errors count as 0: where all domains agree, nothing is pulled. The penalty passes through Adam, as that of
    `L2SP`; as Adam divides by the size of a weight's gradients, and these are large where the domains disagree, an
    equal λ pulls less here: compare the two with a search.

    Only the paper's abstract was available. It says that the sensitivity is the covariance of the gradients over
    domains and the regularization soft; the pull to the start, the average and the normalization are ours.

    State: "start", see `Anchored`; "variance", the vector v.
    """

    hyperparameters = {
        "memory": Hyperparameter(
            0.9, "decay of the average of the variances, below 1", choice(0.0, 0.9, 0.99), tensor=True
        )
    }

    def initial_state(self, params):
        state = super().initial_state(params)
        return {**state, "variance": torch.zeros_like(state["start"])}

    def gradients(self, params, batch, state, noise):
        by_name, risks = self.domain_gradients(params, batch)
        each = vmap(flatten)({name: by_name[name] for name in params})  # [domains, P]
        held = self.memory * state["variance"] + (1 - self.memory) * disagreement(each)
        mean = held.mean()
        strength = torch.where(mean > 0, held / torch.where(mean > 0, mean, torch.ones_like(mean)), 0.0)
        moved = flatten(params) - state["start"]
        loss = risks.mean() + self.pull / 2 * (strength * moved.square()).sum()
        direction = each.mean(0) + self.pull * strength * moved
        return unflatten(direction, params), loss, {"variance": held}


def disagreement(each: Tensor) -> Tensor:
    """Variance over domains of each component, ``[domains, P]`` -> ``[P]``; 0 where it is a rounding error."""
    spread = variance(each)
    return torch.where(spread > rounding(each) ** 2 * each.square().mean(0), spread, 0.0)


@register
class SPD(Anchored):
    """Selective projection decay (Tian, Huang & Kira, NeurIPS 2024, arXiv 2411.01713), AdamSPD.

    After a step of Adam from w to w⁺, a parameter tensor whose gradient g asks to go back, ⟨g, w − w₀⟩ > 0, is pulled
    to the start w₀:
        w⁺ <- w⁺ − λ r (w⁺ − w₀),    r = max(0, ‖w⁺ − w₀‖ − ‖w − w₀‖) / ‖w⁺ − w₀‖
    With λ = 1 it returns to the distance that it had before the step; tensors that do not ask are left free. g is the
    gradient of the loss alone, without `weight_decay`. The search is ours, and stays below 1, beyond which a step that
    leads away would end nearer than it began.
    """

    hyperparameters = {"pull": Hyperparameter(1.0, "λ of the projection", uniform(0.1, 1), tensor=True)}

    def update(self, params, batch, state, noise):
        gradient, loss, changes = self.gradients(params, batch, state, noise)
        new, moments = self.adam_step(params, gradient, state["adam"], self.rate(state))
        start = unflatten(state["start"], params)
        new = {name: self.projected(start[name], params[name], new[name], gradient[name]) for name in params}
        return new, {**state, **changes, "adam": moments, "step": state["step"] + 1}, loss

    def projected(self, start: Tensor, old: Tensor, new: Tensor, gradient: Tensor) -> Tensor:
        """One parameter tensor after its step; all arguments have its shape."""
        before, moved = old - start, new - start
        distance = moved.norm()
        grown = (distance - before.norm()).clamp(min=0) / torch.where(distance > 0, distance, 1.0)
        return torch.where((gradient * before).sum() > 0, new - self.pull * grown * moved, new)
