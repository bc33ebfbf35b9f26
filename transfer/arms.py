"""The arms of the transfer study: which weights keep their pretrained value, and which of those are frozen.

A cut is a mask. Fine-tuning decides two bits per weight: *kept* (it starts from the pretrained value, otherwise from a
fresh one) and *frozen* (its rate is 0, otherwise 1). A cut c moves these bits layer by layer, c = 0 … depth being the
number of hidden layers below it; importance moves them weight by weight. The head is fresh and trained in every arm but
the last of these.

Layer by layer, with the names that tusharmanekar/mp-tl-study gives to its settings:

============= ============================ =================== ========
arm           kept                         frozen              original
============= ============================ =================== ========
scratch       nothing                      nothing             FR, cut 0
frozen        layers below the cut         the same            FR
frozen+rest   all layers                   layers below        F
warm          layers below the cut         nothing             R
finetune      all layers                   nothing             "--"
truncated     layers below; no others      the same            FT
zero-shot     everything, the head too     the same
============= ============================ =================== ========

`zero-shot` is the pretrained network as it is, so that it needs the same classes on both sides.

Weight by weight, k weights are kept and frozen, as many as the layers below the cut hold: `moved`, those that moved
most in pretraining (|final − start|), and as controls `random` (k of all), `random_layer` (in each layer as many as
`moved` has there), `permuted` (the mask of `moved` with the hidden units of each layer renamed) and `least` (those that
moved least). Biases follow the layers in these arms as well: those below the cut are kept and frozen, exactly as in
`frozen`. So the arms of one cut differ in nothing but which k weights are kept.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from config import InputError
from engine import Params, generator
from importance import top_k_mask, weight_importance
from study import permuted_matrices, random_layer_mask

LAYER_WISE = ("scratch", "finetune", "frozen", "frozen+rest", "warm", "truncated")
WEIGHT_WISE = ("moved", "random", "random_layer", "permuted", "least")
ZERO_SHOT = "zero-shot"
KINDS = (*LAYER_WISE, *WEIGHT_WISE, ZERO_SHOT)
WITHOUT_CUT = ("scratch", "finetune", ZERO_SHOT)
NEED_START = ("moved", "random_layer", "permuted", "least")  # of pretraining, to know what moved


@dataclass(frozen=True)
class CutArm:
    """One way to start from a pretrained network.

    Raises:
        InputError: an unknown kind.
    """

    kind: str  # of `KINDS`
    cut: int  # hidden layers below it

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"There is no arm '{self.kind}'; there are {', '.join(KINDS)}.")

    @property
    def name(self) -> str:
        """How tables call it: "frozen@4"; those of `WITHOUT_CUT` have none."""
        return self.kind if self.kind in WITHOUT_CUT else f"{self.kind}@{self.cut}"

    @property
    def prefix(self) -> int:
        """Number of first layers that are the pretrained ones and stay so: they can be run once per image."""
        return self.cut if self.kind in ("frozen", "frozen+rest", "truncated", ZERO_SHOT) else 0


def arms_of(kinds: Iterable[str], cuts: Iterable[int], depth: int) -> tuple[CutArm, ...]:
    """All arms of these kinds at these cuts, those that are the same program once.

    `frozen`, `warm` and every weight-wise arm at cut 0 are `scratch`; `frozen+rest` at 0 and `warm` at `depth` are
    `finetune`; `frozen+rest`, `truncated` and every weight-wise arm at `depth` are `frozen`. Truncating at 0 leaves a
    linear classifier on the inputs. `zero-shot` has no cut.

    Raises:
        InputError: an unknown kind, or a cut outside 0 … `depth`.
    """
    cuts, kinds = sorted(set(cuts)), list(kinds)
    if not cuts or cuts[0] < 0 or cuts[-1] > depth:
        raise InputError(f"Cuts lie in 0 … {depth}, the number of hidden layers; not {', '.join(map(str, cuts))}.")
    found = dict.fromkeys(_same(CutArm(kind, cut), depth) for kind in kinds for cut in cuts)
    return tuple(sorted(found, key=lambda arm: (KINDS.index(arm.kind), arm.cut)))


def _same(arm: CutArm, depth: int) -> CutArm:
    """The arm by the first of its names, see `arms_of`."""
    kind, cut = arm.kind, arm.cut
    if kind == ZERO_SHOT:
        return CutArm(kind, depth)
    if kind == "scratch" or (cut == 0 and kind not in ("finetune", "frozen+rest", "truncated")):
        return CutArm("scratch", 0)
    if kind == "finetune" or (kind, cut) in (("frozen+rest", 0), ("warm", depth)):
        return CutArm("finetune", depth)
    return CutArm("frozen", depth) if cut == depth else arm


class Layer(NamedTuple):
    """Names of the parameters of a layer: of a cut, the next step."""

    weights: tuple[str, ...]  # matrices, which weight-wise arms choose from
    others: tuple[str, ...]  # biases and the like, which follow the layer in every arm

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return self.weights + self.others


def layers_of(params: Iterable[str]) -> list[tuple[str, str]]:
    """Names of weight and bias of each layer, first to last, the head last; `params` are names in this order."""
    names = list(params)
    return list(zip(names[::2], names[1::2], strict=True))


def chain(params: Iterable[str]) -> list[Layer]:
    """The same as layers of a weight and a bias each."""
    return [Layer((weight,), (bias,)) for weight, bias in layers_of(params)]


def bits(
    arm: CutArm,
    start: Params | None,
    pretrained: Params,
    seed: int,
    layers: Sequence[Layer] | None = None,
    chained: bool = True,
) -> tuple[Params, Params]:
    """What an arm keeps and what it freezes of one pretrained network.

    Args:
        start: parameters before pretraining; needed by `NEED_START` alone.
        pretrained: parameters after it, name -> tensor.
        seed: of the random arms.
        layers: of the network, the head last; default `chain`.
        chained: whether each layer's outputs are the next one's inputs, so that `permuted` can rename the units between
            them; else it permutes the rows and columns of each matrix.

    Returns:
        (keep, freeze): name -> bool, shaped as the parameters; what is frozen is also kept.
    """
    *layers, head = chain(pretrained) if layers is None else layers
    whole = len(layers)
    kept = {"scratch": 0, "finetune": whole, "frozen+rest": whole, ZERO_SHOT: whole}.get(arm.kind, arm.cut)
    frozen = {"scratch": 0, "finetune": 0, "warm": 0, ZERO_SHOT: whole}.get(arm.kind, arm.cut)
    keep, freeze = (
        {
            name: torch.full_like(pretrained[name], i < below, dtype=torch.bool)
            for i, layer in enumerate(layers)
            for name in layer.names
        }
        for below in (kept, frozen)
    )
    if arm.kind in WEIGHT_WISE:
        mask = _marked(arm, start, pretrained, layers, seed, chained)
        keep, freeze = keep | mask, freeze | mask
    of_head = {name: torch.full_like(pretrained[name], arm.kind == ZERO_SHOT, dtype=torch.bool) for name in head.names}
    return keep | of_head, freeze | of_head


def _marked(
    arm: CutArm, start: Params | None, pretrained: Params, layers: Sequence[Layer], seed: int, chained: bool
) -> dict[str, Tensor]:
    """The weights that a weight-wise arm keeps: name -> bool."""
    names = [name for layer in layers for name in layer.weights]
    final = [pretrained[name].flatten(1) for name in names]  # [out, in · kernel]
    size = sum(map(torch.numel, final))
    below = [name for layer in layers[: arm.cut] for name in layer.weights]
    percent = 100 * sum(pretrained[name].numel() for name in below) / size
    stream = f"transfer/{arm.cut}"
    if arm.kind == "random":
        order = torch.rand(size, generator=generator(seed, "random_mask", stream), dtype=torch.float64)
        scores = [
            part.view_as(weight) for part, weight in zip(order.split([w.numel() for w in final]), final, strict=True)
        ]
    else:
        scores = weight_importance([start[name].flatten(1) for name in names], final)
    if arm.kind == "least":
        scores = [-score for score in scores]
    mask = top_k_mask(scores, percent)
    if arm.kind == "random_layer":
        mask = random_layer_mask(seed, stream, mask)
    if arm.kind == "permuted" and not chained:
        mask = permuted_matrices(seed, stream, mask)
    shaped = {name: layer.view_as(pretrained[name]) for name, layer in zip(names, mask, strict=True)}
    renamed = arm.kind == "permuted" and chained
    return renamed_units(shaped, generator(seed, "permuted_mask", stream)) if renamed else shaped


def renamed_units(mask: Mapping[str, Tensor], draw: torch.Generator) -> dict[str, Tensor]:
    """A mask ``[out, in, …]`` per layer with the units of each hidden layer permuted at random.

    Outputs of one layer and inputs of the next are permuted alike, and the network's own inputs stay: row and column
    counts and paths through the layers are the same, which unit they belong to is not.
    """
    found, before = {}, None
    for name, layer in mask.items():
        order = torch.randperm(len(layer), generator=draw)
        found[name] = (layer if before is None else layer[:, before])[order]
        before = order
    return found


def start_of(fresh: Params, pretrained: Params, keep: Params) -> Params:
    """Where fine-tuning begins: the pretrained value where it is kept, elsewhere the fresh one; heads may differ."""
    return {
        name: torch.where(keep[name], pretrained[name], value) if keep[name].any() else value
        for name, value in fresh.items()
    }
