"""Phase 1's networks merged into one, as a start of Phase 2.

Phase 1 trains one network per source domain from one start, which is what model merging begins with. With Δ_d, how much
domain d changed the parameters, the merged network is the start plus one change for all. All parameters of a network
are taken together, biases as well.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from engine import Params
from importance import top_k_mask

AGREEING = 2  # domains in whose own top share a weight must lie to count for "merged_consensus"


def _mean(changes: Tensor, percent: float) -> Tensor:
    return changes.mean(0)


def _ties(changes: Tensor, percent: float) -> Tensor:
    kept = changes * _largest(changes, percent)
    agrees = kept * kept.sum(0).sign() > 0
    return (kept * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def _consensus(changes: Tensor, percent: float) -> Tensor:
    return changes.mean(0) * (_largest(changes, percent).sum(0) >= AGREEING)


def _largest(changes: Tensor, percent: float) -> Tensor:
    """The largest changes of each network, so many per cent of its parameters: bool ``[domains, S, n]``."""
    return top_k_mask([changes.abs().unsqueeze(-2)], percent)[0].squeeze(-2)


# start -> merged change [S, n] from those of the domains [domains, S, n], and per cent that a rule keeps
MERGES: Mapping[str, Callable[[Tensor, float], Tensor]] = {
    "merged_mean": _mean,  # the average network ("model soup", Wortsman et al., ICML 2022; DiWA, Rame et al., 2022)
    "merged_ties": _ties,  # mean of the largest changes that have the sign of their sum (Yadav et al., NeurIPS 2023)
    "merged_consensus": _consensus,  # mean, where it is large in two domains or more (TALL, Wang et al., ICML 2024)
}


def merge(rule: str, start: Params, finals: Sequence[Params], percent: float) -> Params:
    """One network for each seed from those of the domains.

    Args:
        rule: a name of `MERGES`.
        start: where all domains began, name -> ``[S, *shape]``.
        finals: where each ended, as `start`.
        percent: of a domain's parameters, those that moved most; of no effect on "merged_mean".

    Returns:
        Name -> ``[S, *shape]``. NaN for a seed where a domain's networks are not finite.
    """
    flat = [torch.cat([params[name].flatten(1) for name in start], dim=1) for params in (start, *finals)]
    sizes = [value[0].numel() for value in start.values()]
    merged = flat[0] + MERGES[rule](torch.stack(flat[1:]) - flat[0], percent)
    finite = torch.stack(flat).isfinite().all(-1).all(0)
    merged = merged.masked_fill(~finite[:, None], torch.nan)
    return {k: part.view_as(start[k]) for k, part in zip(start, merged.split(sizes, dim=1), strict=True)}
