"""The transfer study on tokens: the last blocks of a vision transformer, pretrained on some domains.

Each block is two layers, attention and MLP, which add to what they are given. What is fresh are the weights that the
backbone came with, so an arm keeps or drops what the other domains have taught them; the head is random. A truncated
network goes without the layers above its cut, with the backbone's own norm.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor
from torch.func import functional_call

from config import InputError
from engine import ClsShortcut, Half, MatmulEngine, Params, TailEngine, tail_halves, training_memory
from models import HEAD, BackboneTail, FeedforwardClassifier
from storage import FeatureSet
from transfer.arms import CutArm, Layer
from transfer.features import TokenRows, train_engine
from transfer.images import Examples
from transfer.training import REPEATS_PER_UNIT, Course, draw_start

IMAGES_AT_A_TIME = 256  # that are run through frozen layers
BYTES_KEPT = 10  # of a number of a network that waits: where it starts and if it is frozen, twice while it is stacked


def check_halves(halves: Sequence[Half]) -> None:
    """Raise an `InputError` if a network of these layers cannot be truncated."""
    if not all(half.output for half in halves):
        raise InputError("A block of this kind cannot be cut short: leave out the arm 'truncated'.")


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
        return cls(features.tail, ClsShortcut.where_it_fits(features.tail, features.tokens), learning_rate)

    @cached_property
    def halves(self) -> list[Half]:
        """Layers below the head."""
        return tail_halves(self.tail)

    @property
    def depth(self) -> int:
        """Two layers for each block."""
        return len(self.halves)

    def memory(self, arms: int) -> int:
        """See `networks.Networks`: one repeat is trained at a time, and all of a unit are kept."""
        size = arms * self.tail.size
        return training_memory(1, size) + REPEATS_PER_UNIT * size * BYTES_KEPT

    def about(self) -> dict[str, str]:
        """See `networks.Networks`."""
        fresh = "those that the backbone came with, where other tasks draw them; the head is drawn at random"
        return {"Weights that are drawn anew": fresh}

    def facts(self) -> dict[str, object]:
        """See `networks.Networks`."""
        return {"TRAINED_BLOCKS": len(self.tail.blocks), "BACKBONE_LEARNING_RATE": self.learning_rate}

    def outline(self, examples: Examples, depth: int | None = None) -> BackboneTail:
        """See `networks.Networks`; its blocks have their pretrained weights, and all of them at any depth.

        Raises:
            InputError: it is to be cut short, and a block does not say what its modules do.
        """
        if depth is not None:
            check_halves(self.halves)
        head = FeedforwardClassifier.outline(examples.inputs.shape[-1], examples.classes, ())
        copied = self.tail.with_head(torch.nn.Identity()).to(examples.inputs.device)
        return copied.with_head(head)

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
        """See `networks.Networks`: layers above the cut end in zeros, and the head alone is trained."""
        *_, head = self.layers(start)
        removed = {name for half in self.halves[cut:] for name in half.output}
        start = {name: torch.zeros_like(value) if name in removed else value for name, value in start.items()}
        return start, {name: mask if name in head.names else torch.ones_like(mask) for name, mask in freeze.items()}

    def prefix(self, arm: CutArm) -> int:
        """All layers where an arm trains none of them; else none, for the rest of a single block costs as much."""
        return self.depth if arm.kind == "truncated" or arm.prefix == self.depth else 0

    def train(
        self, network: BackboneTail, start: Params, freeze: Params, prefix: int, course: Course
    ) -> tuple[Params, Tensor]:
        """As `training.train_stack`, by the engines of the package's own study."""
        if prefix:
            return self._train_heads(network, start, freeze, course)
        shape, final, counts = next(iter(start.values())).shape[:2], [], []
        rates = {name: course.learning_rate if name.startswith(HEAD) else self.learning_rate for name in start}
        rates = {name: torch.full((1, shape[1]), rate, dtype=torch.float64) for name, rate in rates.items()}
        for s in range(shape[0]):  # repeats share nothing, and a stack of all would take their number times the memory
            own, frozen = ({name: value[s : s + 1] for name, value in values.items()} for values in (start, freeze))
            engine = TailEngine(network, self.shortcut, own, rates)
            params, right = train_engine(engine, frozen, course.of(slice(s, s + 1)))
            final.append(params)
            counts.append(right)
        return {name: torch.cat([params[name] for params in final]) for name in start}, torch.cat(counts)

    def _train_heads(
        self, network: BackboneTail, start: Params, freeze: Params, course: Course
    ) -> tuple[Params, Tensor]:
        """The same where the layers of a repeat's arms are frozen and alike: the images are run through them once."""
        heads = {name.removeprefix(HEAD): value for name, value in start.items() if name.startswith(HEAD)}
        masks = {name: freeze[f"{HEAD}{name}"] for name in heads}
        final, counts = {name: torch.empty_like(value) for name, value in heads.items()}, []
        examples = course.examples
        for s, order in enumerate(course.batches):
            rows, numbers = order.unique(return_inverse=True)
            own = {name: value[s, 0] for name, value in start.items()}
            every = torch.arange(len(examples.test_labels), device=rows.device)
            train, test = examples.labels[rows], examples.test_labels
            of_train = self._features(network, own, examples.inputs, rows)
            of_test = self._features(network, own, examples.test_inputs, every)
            seen = Examples(of_train, train, of_test, test, examples.classes)
            engine = MatmulEngine({name: value[s : s + 1] for name, value in heads.items()}, course.learning_rate)
            frozen = {name: mask[s : s + 1] for name, mask in masks.items()}
            params, right = train_engine(engine, frozen, course._replace(examples=seen, batches=numbers[None]))
            counts.append(right)
            for name, value in params.items():
                final[name][s] = value[0]
        return start | {f"{HEAD}{name}": value for name, value in final.items()}, torch.cat(counts)

    @torch.no_grad()
    def _features(self, network: BackboneTail, params: Params, tokens: Tensor | TokenRows, rows: Tensor) -> Tensor:
        """The last ``[CLS]`` of some of the images ``[n, T, D]``: rows ``[m]`` -> ``[m, D]``."""
        network, found = network.with_head(torch.nn.Identity()), []
        params = {name: value for name, value in params.items() if not name.startswith(HEAD)}
        for part in rows.split(IMAGES_AT_A_TIME):
            if self.shortcut is None:
                found.append(functional_call(network, params, (tokens[part],)))
            else:
                stack = {name: value[None, None] for name, value in params.items()}
                found.append(self.shortcut.representation(stack, tokens[part][None])[0, 0])
        return torch.cat(found)
