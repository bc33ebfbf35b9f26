"""Directions computed from the gradients of the domains' losses."""

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn import functional as F

from engine import Params
from field.algorithms.base import Algorithm, Hyperparameter, Noise, State, choice, log_uniform, register, uniform
from field.algorithms.parts import flatten, unflatten, variance


class DomainGradients(Algorithm):
    """Base class: the direction is a function of the gradients of the domains' losses; the loss is their mean."""

    batches = "balanced"

    def combined(self, each: Params, state: State, noise: Noise) -> tuple[Params, State]:
        """Direction of the step from the domains' gradients.

        Args:
            each: gradients, name -> ``[domains, *shape]``, in the order of `shapes`.

        Returns:
            Direction by name, and the entries of the state that change.
        """
        raise NotImplementedError

    def gradients(self, params, batch, state, noise):
        each, losses = self.domain_gradients(params, batch)
        direction, changes = self.combined({name: each[name] for name in self.shapes}, state, noise)
        return direction, losses.mean(), changes


@register
class AgrSum(DomainGradients):
    """Gradient surgery "Agr-Sum" (Mansilla, Echeveste, Milone & Ferrante, ICCV 2021).

    Components with the same sign in all domains are summed over the domains; the others are zero. As in the paper, "the
    same" includes zero (an input of a dead unit): the sum is zero in either case.
    """

    def combined(self, each, state, noise):
        agreeing = {name: agreement(g) for name, g in each.items()}
        return {name: torch.where(agreeing[name], g.sum(0), torch.zeros_like(g[0])) for name, g in each.items()}, {}


@register
class AgrRand(AgrSum):
    """Gradient surgery "Agr-Rand" (Mansilla, Echeveste, Milone & Ferrante, ICCV 2021).

    `AgrSum`, but components that disagree are drawn from a normal distribution, whose standard deviation is, as in the
    authors' code, the mean absolute value of the summed components that agree, over all parameters (zero if there are
    none; in that code NaN). Components that are zero in all domains agree, as in the paper's equation; in that code
    they are drawn, which moves the weights of dead units at random.
    """

    def draw(self, draw, rows):
        return {name: torch.randn(shape, generator=draw) for name, shape in self.shapes.items()}

    def combined(self, each, state, noise):
        total, _ = super().combined(each, state, noise)
        flat = flatten(total)
        scale = flat.abs().sum() / (flat != 0).sum().clamp(min=1)
        return {n: torch.where(agreement(g), total[n], scale * noise[n]) for n, g in each.items()}, {}


@register
class ANDMask(DomainGradients):
    """AND-mask (Parascandolo, Neitz, Orvieto, Gresele & Schölkopf, ICLR 2021).

    The mean of the domains' gradients, with components set to zero where the signs do not agree, |mean of the signs| <
    τ. Each parameter tensor is then divided by (the fraction of it that was kept + 1e-10).
    """

    hyperparameters = {
        "tau": Hyperparameter(
            1.0, "smallest |mean sign| of a component that is kept, 1 = all agree", uniform(0.5, 1), tensor=True
        )
    }

    def mask(self, each: Tensor) -> Tensor:
        """Factor in 0 … 1 on each component of a parameter tensor, ``[domains, *shape]`` -> ``[*shape]``."""
        return (each.sign().mean(0).abs() >= self.tau).to(each)

    def combined(self, each, state, noise):
        masks = {name: self.mask(g) for name, g in each.items()}
        return {name: mask * each[name].mean(0) / (1e-10 + mask.mean()) for name, mask in masks.items()}, {}


@register
class SANDMask(ANDMask):
    """Smoothed AND-mask (Shahtalebi, Gagnon-Audet, Laleh, Faramarzi, Ahuja & Rish, 2021, arXiv 2106.02266).

    `ANDMask` with a continuous mask max(0, tanh(k (|mean of the signs| − τ) / σ²)), where σ² is the variance of the
    component over domains (n − 1 in the denominator): the better the magnitudes also agree, the closer it is to 1.

    The formula is the authors' own in DomainBed. Its default τ = 1 makes every mask zero: nothing is ever learned. The
    default here is 0.5, the middle of the search range; two or three domains must then agree (of three, one may be
    zero). If the variance is zero, the mask is its limit, 1 above τ and 0 elsewhere (in DomainBed NaN becomes 1e-17).
    σ² is not relative: gradients of softmax networks are small, so most masks are near 0 or 1 with the default k.
    """

    hyperparameters = {
        "tau": Hyperparameter(0.5, "|mean sign| above which a component is used", uniform(0, 1), tensor=True),
        "k": Hyperparameter(10.0, "steepness of the mask, in units of the variance", log_uniform(-3, 5), tensor=True),
    }

    def mask(self, each):
        spread = variance(each, correction=min(1, len(each) - 1))  # of a single domain: zero, not NaN
        over = (each.sign().mean(0).abs() - self.tau).clamp(min=0)
        return torch.tanh(self.k * over / spread.clamp(min=torch.finfo(each.dtype).tiny))


def agreement(each: Tensor) -> Tensor:
    """Whether the sign of a component is the same in all domains: ``[domains, *]`` -> bool ``[*]``."""
    signs = each.sign()
    return (signs == signs[:1]).all(0)


class Projection(DomainGradients):
    """Base class: projects conflicting gradients, and records the conflicts per epoch and parameter tensor.

    State, both ``[epochs, tensors]``, tensors in the order of `shapes`:
    - "conflict_rate": fraction of an epoch's tests with a negative inner product;
    - "conflict_strength": mean |cosine| over an epoch's conflicts, 0 if there were none.
    In an unfinished epoch they cover its steps so far. All tests of an epoch have the same weight.
    """

    record_names = ("conflict_rate", "conflict_strength")

    def initial_state(self, params):
        zeros = next(iter(params.values())).new_zeros(self.setup.epochs, len(self.shapes))
        return {**super().initial_state(params), "conflict_rate": zeros, "conflict_strength": zeros.clone()}

    def recorded(self, state: State, rate: Tensor, cosine: Tensor) -> State:
        """The two entries of the state after one more step.

        Args:
            state: before it.
            rate: fraction of the step's tests that were conflicts, ``[tensors]``.
            cosine: sum of the conflicts' |cosines| / number of the step's tests, ``[tensors]``.
        """
        epoch, done = state["step"] // self.setup.steps_per_epoch, state["step"] % self.setup.steps_per_epoch
        now = (torch.arange(self.setup.epochs, device=rate.device) == epoch).unsqueeze(1)  # its row of the table
        rates, strengths = state["conflict_rate"], state["conflict_strength"]
        conflicts = done * rates + rate  # in units of a step's tests
        some = conflicts > 0
        strength = (done * rates * strengths + cosine) / torch.where(some, conflicts, torch.ones_like(conflicts))
        return {
            "conflict_rate": torch.where(now, conflicts / (done + 1), rates),
            "conflict_strength": torch.where(now & some, strength, strengths),
        }


@register
class PCGrad(Projection):
    """Projecting conflicting gradients (Yu, Kumar, Gupta, Levine, Hausman & Finn, NeurIPS 2020); domains as the tasks.

    For each domain, and each other domain in random order: if the inner product of the domain's gradient, as projected
    so far, and the *original* gradient of the other is negative, the component along the latter is removed. A gradient
    is the whole parameter vector. The step follows the sum over domains (Algorithm 1 of the paper), not the mean.

    The tests are also recorded per parameter tensor (see `Projection`), with the parts of both gradients in it. An
    inner product that is zero up to rounding is not a conflict (see `projection`).
    """

    def draw(self, draw, rows):
        domains = torch.arange(self.setup.domains)
        orders = [torch.randperm(len(domains) - 1, generator=draw) for _ in domains]
        return {"order": torch.stack([domains[domains != i][order] for i, order in enumerate(orders)])}

    def combined(self, each, state, noise):
        original = vmap(flatten)(each)  # [domains, P]
        sizes = [shape.numel() for shape in self.shapes.values()]
        norms, part_norms = original.norm(dim=1), norms_of(original, sizes)
        own, rate = original, original.new_zeros(len(sizes))
        cosine = rate
        tests = max(1, self.setup.domains * (self.setup.domains - 1))
        for place in noise["order"].unbind(1):  # all domains at once: they are independent
            other = original[place]
            parts = torch.stack([part.sum(1) for part in (own * other).split(sizes, 1)], 1)  # [domains, tensors]
            limits = part_norms * part_norms[place]
            _, found, cos = projection(parts, norms_of(own, sizes), part_norms[place], limits)
            rate, cosine = rate + found.to(rate).sum(0) / tests, cosine + cos.sum(0) / tests
            factor, _, _ = projection(parts.sum(1), own.norm(dim=1), norms[place], norms * norms[place])
            own = own - factor.unsqueeze(1) * other
        direction = unflatten(own.sum(0), {name: g[0] for name, g in each.items()})
        return direction, self.recorded(state, rate, cosine)


@register
class CorGrad(Projection):
    """Correction of gradients in parts ("Rethinking domain generalization from perspective of gradient granularity",
    ECAI 2024).

    Each parameter tensor (weights and biases separately) is cut along its output units into `n_parts` chunks, as by
    `torch.chunk`. Then, for each domain and each other domain in order, chunk by chunk: if the inner product is
    negative, the component along the other's chunk is removed, *in place*: later domains see gradients that were
    already projected, and the order of domains matters, unlike in `PCGrad`. Next, per tensor, a domain whose L2 norm is
    more than one (population) standard deviation from the mean of the domains' norms is an outlier; its gradient g
    becomes alpha g + (1 − alpha) × the mean of the gradients that are not outliers. The step follows the sum over
    domains.

    Deviations. An inner product that is zero up to rounding is not a conflict (see `projection`): after g₁ was made
    orthogonal to g₂, the test of g₂ against g₁ is such a zero, whose sign the authors' code leaves to chance. A norm
    that is one standard deviation away up to rounding is not an outlier: so with two domains there are none. The
    authors keep both hyperparameters fixed; the random search is ours (their commands for PACS have alpha = 0.6).
    """

    hyperparameters = {
        "n_parts": Hyperparameter(10, "most chunks of a tensor's output units, 1 = whole", choice(1, 2, 5, 10, 20)),
        "alpha": Hyperparameter(
            1.0, "weight of an outlier's own gradient, 1 = no correction", uniform(0.5, 1), tensor=True
        ),
    }

    def combined(self, each, state, noise):
        direction, rates, cosines = {}, [], []
        for name, g in each.items():
            projected, rate, cosine = self.projected(g)
            direction[name] = self.corrected(projected).sum(0)
            rates.append(rate)
            cosines.append(cosine)
        return direction, self.recorded(state, torch.stack(rates), torch.stack(cosines))

    def projected(self, each: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of one tensor after projection, ``[domains, *shape]``; rate and cosine of `recorded` (scalars)."""
        domains, units = each.shape[:2]
        rows = -(-units // self.n_parts)  # in a chunk; the last may be shorter and is padded with zeros
        chunks = -(-units // rows)
        filled = F.pad(each.flatten(2) if each.dim() > 2 else each.unsqueeze(2), (0, 0, 0, chunks * rows - units))
        parts = list(filled.reshape(domains, chunks, -1).unbind(0))  # of each domain: [chunks, numbers]
        before = [part.norm(dim=1) for part in parts]
        norms = list(before)
        rate = cosine = each.new_zeros(chunks)
        pairs = [(i, p) for i in range(domains) for p in range(domains) if p != i]
        for i, p in pairs:
            inner = (parts[i] * parts[p]).sum(1)
            factor, found, cos = projection(inner, norms[i], norms[p], before[i] * before[p])
            parts[i] = parts[i] - factor.unsqueeze(1) * parts[p]
            norms[i] = parts[i].norm(dim=1)
            rate, cosine = rate + found, cosine + cos
        tests = max(1, len(pairs))
        whole = torch.stack(parts).reshape(domains, chunks * rows, -1)[:, :units].reshape(each.shape)
        return whole, rate.mean() / tests, cosine.mean() / tests

    def corrected(self, each: Tensor) -> Tensor:
        """Gradients of one tensor ``[domains, *shape]`` after the correction of outliers."""
        norms = each.flatten(1).norm(dim=1)
        far, spread = (norms - norms.mean()).abs(), norms.std(correction=0)
        outlier = (far > spread + rounding(each) * norms.mean()).view(-1, *[1] * (each.dim() - 1))
        inside = torch.where(outlier, torch.zeros_like(each), each).sum(0) / (~outlier).sum().clamp(min=1)
        return torch.where(outlier, self.alpha * each + (1 - self.alpha) * inside, each)


def projection(inner: Tensor, own: Tensor, other: Tensor, limit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What to subtract from a gradient so that it does not conflict with another. All tensors have one shape.

    Args:
        inner: inner product of the two.
        own, other: norms of the gradient and of the other.
        limit: product of the norms that both had before any projection: the scale of the rounding error. What is left
            after projection can be mere rounding error, and then an angle to it is meaningless.

    Returns:
        Factor on the other gradient to subtract, whether there is a conflict, and |cosine|; without one both are 0.
    """
    found = (inner < -rounding(inner) * limit) & (own > 0) & (other > 0)
    one, zero = torch.ones_like(inner), torch.zeros_like(inner)
    along = torch.where(found, inner, zero) / torch.where(found, other, one)
    return along / torch.where(found, other, one), found, -along / torch.where(found, own, one)


def rounding(like: Tensor) -> float:
    """Relative error below which two numbers of this type count as equal."""
    return 100 * torch.finfo(like.dtype).eps


def norms_of(flat: Tensor, sizes: list[int]) -> Tensor:
    """L2 norms of the parts of each row: ``[rows, sum of sizes]`` -> ``[rows, sizes]``."""
    return torch.stack([part.norm(dim=1) for part in flat.split(sizes, 1)], 1)
