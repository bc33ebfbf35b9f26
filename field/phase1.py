"""What Phase 1 of the source domains gives a method before its training begins: entries of the method's state."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine import Params, generator
from field.algorithms import Algorithm, State
from importance import flatten, unflatten
from study import Arm, MaskSource, Run, mask_source


class Given(NamedTuple):
    """What the networks of S seeds are given.

    Attributes:
        state: entries of the state by name, tensors ``[S, …]``, nested as there.
        failed: codes of seeds that cannot be trained with it, ``[S]``, see `trainer_phase1.DomainNetworks`; None = all
            can.
    """

    state: State
    failed: Tensor | None


def given_to(
    run: Run, method: type[Algorithm], holdouts: Sequence[str], seeds: Sequence[int], values: Mapping
) -> Given:
    """The entries `Algorithm.given` of a method for one choice of held-out domains, none of which they depend on.

    Args:
        values: hyperparameters of the method.
    """
    source = mask_source(run, holdouts, seeds)
    state = {entry: PHASE1[kind](run, holdouts, source) for entry, kind in method.phase1.items()}
    failed = source.own(run.settings).failed if state else None
    if method.control is not None:
        arm = Arm(method.control, changes={"IMPORTANCE_THRESHOLD_PERCENTILE": values["kept"]})
        masking = arm.masking(source, run.settings)
        state["mask"] = dict(zip(run.network.tracked_names, masking.mask, strict=True))
        failed = masking.failed if failed is None else failed
    return Given(state, failed)


def ranks(importance: Sequence[Tensor]) -> list[Tensor]:
    """The rank of each weight among all n of its network, over n: L × ``[S, out, in]``, in 0 … 1, and 1/2 on average.

    The least important has 1/(2n), the most important 1 − 1/(2n); equal weights share their mean rank.
    """
    flat = flatten(importance).contiguous()
    ordered = flat.sort(dim=-1).values
    below, up_to = (torch.searchsorted(ordered, flat, right=right) for right in (False, True))
    return unflatten((below + up_to).to(flat) / (2 * flat.shape[-1]), importance)


def shuffled(seed: int, holdout: str, layers: Sequence[Tensor]) -> list[Tensor]:
    """The numbers of each layer of one network in random order, L × ``[out, in]``: their place in it means nothing."""
    draw = generator(seed, "shuffled_ranks", holdout)
    orders = [torch.randperm(layer.numel(), generator=draw) for layer in layers]
    return [layer.flatten()[order].view_as(layer) for layer, order in zip(layers, orders, strict=True)]


def _ranks(run: Run, holdouts: Sequence[str], source: MaskSource) -> Params:
    return dict(zip(run.network.tracked_names, ranks(source.own(run.settings).scores), strict=True))


def _shuffled_ranks(run: Run, holdouts: Sequence[str], source: MaskSource) -> Params:
    every = _ranks(run, holdouts, source)
    per_seed = [
        shuffled(seed, source.holdout, [layer[s] for layer in every.values()]) for s, seed in enumerate(source.seeds)
    ]
    return {name: torch.stack(layers) for name, layers in zip(every, zip(*per_seed, strict=True), strict=True)}


def _networks(run: Run, holdouts: Sequence[str], source: MaskSource) -> Params:
    saved = [run.archive.phase1(domain, source.seeds).params("final") for domain in run.data.sources(holdouts)]
    return {name: torch.stack([params[name] for params in saved], dim=1) for name in saved[0]}


# kind of entry -> what makes it: (run, held-out domains, source of the masks) -> tensors [S, …] by name
PHASE1: Mapping[str, Callable[[Run, Sequence[str], MaskSource], Params]] = {
    "ranks": _ranks,  # of the importance, tracked matrix -> [S, out, in], see `ranks`
    "shuffled_ranks": _shuffled_ranks,  # the same in random order within each matrix
    "networks": _networks,  # final parameters of the source domains' networks, name -> [S, domains, *shape]
}
