"""The transfer study on tokens: the last blocks of a vision transformer, pretrained on some domains.

Each block is two layers, attention and MLP, which add to what they are given. What is fresh are the weights that the
backbone came with, so an arm keeps or drops what the other domains have taught them; the head is random. A truncated
network goes without the layers above its cut, with the backbone's own norm.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from config import InputError
from engine import ClsShortcut, Half, Params, TailEngine, tail_halves
from models import HEAD, BackboneTail, FeedforwardClassifier
from storage import FeatureSet
from transfer.arms import CutArm, Layer
from transfer.features import train_engine
from transfer.images import Examples
from transfer.training import draw_start

CHECKED_IMAGES = 4  # on which the shortcut must agree with the blocks


@dataclass(frozen=True, eq=False)
class TailNetworks:
    """Networks of `models.BackboneTail` with a linear head, see `networks.Networks`.

    Attributes:
        tail: the pretrained blocks, without a classifier.
        shortcut: computes them for a whole stack, where it covers them, see `engine.ClsShortcut`.
        learning_rate: of the blocks, Adam; the head has that of the study.
    """

    tail: BackboneTail
    shortcut: ClsShortcut | None
    learning_rate: float
    convolutional: ClassVar[bool] = False
    chained: ClassVar[bool] = False

    @classmethod
    def of(cls, features: FeatureSet, learning_rate: float) -> "TailNetworks":
        """Those of the blocks that features come with."""
        few = features.tokens[:CHECKED_IMAGES]
        return cls(features.tail, ClsShortcut.of(features.tail, few), learning_rate)

    @cached_property
    def halves(self) -> list[Half]:
        """Layers below the head."""
        return tail_halves(self.tail)

    @property
    def depth(self) -> int:
        """Two layers for each block."""
        return len(self.halves)

    def facts(self) -> dict[str, object]:
        """See `networks.Networks`."""
        return {"TRAINED_BLOCKS": len(self.tail.blocks), "BACKBONE_LEARNING_RATE": self.learning_rate}

    def outline(self, examples: Examples, depth: int | None = None) -> BackboneTail:
        """See `networks.Networks`; its blocks have their pretrained weights, and all of them at any depth.

        Raises:
            InputError: it is to be cut short, and a block does not say what its modules do.
        """
        if depth is not None and not all(half.last for half in self.halves):
            raise InputError("A block of this kind cannot be cut short: leave out the arm 'truncated'.")
        head = FeedforwardClassifier.outline(examples.inputs.shape[-1], examples.classes, ())
        return self.tail.to(examples.inputs.device).with_head(head)

    def layers(self, params: Params) -> list[Layer]:
        """See `networks.Networks`; the last norm belongs to the last layer below the head."""
        norm, head = (tuple(name for name in params if name.startswith(part)) for part in ("norm.", HEAD))
        names = [half.names for half in self.halves]
        names[-1] += norm
        found = [
            Layer(half.matrices, tuple(name for name in own if name not in half.matrices))
            for half, own in zip(self.halves, names, strict=True)
        ]
        return [*found, Layer(head[:1], head[1:])]

    def draw(self, network: BackboneTail, draw: torch.Generator) -> Params:
        """The backbone's own weights, and a random head."""
        blocks = {name: value for name, value in network.named_parameters() if not name.startswith(HEAD)}
        head = draw_start(network.head, draw)
        params = {name: value.detach().float().cpu() for name, value in blocks.items()}
        return params | {f"{HEAD}{name}": value for name, value in head.items()}

    def cut_short(self, start: Params, freeze: Params, cut: int) -> tuple[Params, Params]:
        """See `networks.Networks`: what ends a layer above the cut is 0, and the head alone is trained."""
        *_, head = self.layers(start)
        removed = {name for half in self.halves[cut:] for name in half.last}
        start = {name: torch.zeros_like(value) if name in removed else value for name, value in start.items()}
        return start, {name: mask if name in head.names else torch.ones_like(mask) for name, mask in freeze.items()}

    def prefix(self, arm: CutArm) -> int:
        """None: all arms of a repeat share what the shortcut reads of an image."""
        return 0

    def train(
        self,
        network: BackboneTail,
        start: Params,
        freeze: Params,
        prefix: int,
        examples: Examples,
        batches: Tensor,
        checkpoints: Sequence[int],
        learning_rate: float,
        tick: Callable[[], object] = lambda: None,
    ) -> tuple[Params, Tensor]:
        """As `training.train_stack`, by the engine of trained blocks."""
        shape = next(iter(start.values())).shape[:2]
        rates = {name: learning_rate if name.startswith(HEAD) else self.learning_rate for name in start}
        rates = {name: torch.full(shape, rate, dtype=torch.float64) for name, rate in rates.items()}
        engine = TailEngine(network, self.shortcut, start, rates)
        return train_engine(engine, freeze, examples, batches, checkpoints, tick)
