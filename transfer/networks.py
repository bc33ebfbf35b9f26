"""What the transfer study trains: small CNNs on images, the package's own classifier on features, or blocks of a ViT.

A kind of network says what it looks like for some data and down to some layer, what its layers are and how they begin,
which arms can be trained together, and how a stack of them is trained. `features` and `blocks` have the other kinds.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from engine import Params
from transfer.arms import CutArm, Layer, chain
from transfer.convnet import ConvClassifier
from transfer.images import Examples
from transfer.training import CACHE_BYTES, Course, draw_start, train_stack


class Networks(Protocol):
    """What `TransferStudy` needs of a kind of network."""

    depth: int  # hidden layers, and so the largest cut
    convolutional: bool  # whether its layers can be probed, see `probes`
    chained: bool  # see `arms.bits`

    def facts(self) -> dict[str, object]:
        """Settings that describe it, by the names of the constants."""

    def about(self) -> dict[str, str]:
        """What else a report must say of it: words -> value."""

    def memory(self, arms: int) -> int:
        """Bytes that a unit with so many arms takes, at most."""

    def outline(self, examples: Examples, depth: int | None = None) -> nn.Module:
        """A network for these inputs and classes, without weights (on the meta device); cut short at `depth`."""

    def layers(self, params: Params) -> list[Layer]:
        """Those of a network with these parameters, first to last, the head last."""

    def draw(self, network: nn.Module, draw: torch.Generator) -> Params:
        """Fresh parameters of an outline, float32 on the CPU."""

    def cut_short(self, start: Params, freeze: Params, cut: int) -> tuple[Params, Params]:
        """Start and what is frozen of a truncated network, from those of an outline that was made for that cut."""

    def prefix(self, arm: CutArm) -> int:
        """How many first layers to run once per image; arms that are trained together have the same number."""

    def train(
        self, network: nn.Module, start: Params, freeze: Params, prefix: int, course: Course
    ) -> tuple[Params, Tensor]:
        """See `training.train_stack`."""


class Chain:
    """The part of `Networks` that networks share whose layers are a weight and a bias, each fed by the one before."""

    chained: ClassVar[bool] = True

    def about(self) -> dict[str, str]:
        """Nothing."""
        return {}

    def memory(self, arms: int) -> int:
        """What is kept of the images; the networks are small."""
        return 4 * CACHE_BYTES

    def layers(self, params: Params) -> list[Layer]:
        """See `Networks`."""
        return chain(params)

    def draw(self, network: nn.Module, draw: torch.Generator) -> Params:
        """PyTorch's own initialization."""
        return draw_start(network, draw)

    def cut_short(self, start: Params, freeze: Params, cut: int) -> tuple[Params, Params]:
        """As they are: the outline has no other layers."""
        return start, freeze


@dataclass(frozen=True)
class ConvNetworks(Chain):
    """Networks of `ConvClassifier`."""

    channels: int = 16
    depth: int = 6
    convolutional: ClassVar[bool] = True

    def facts(self) -> dict[str, object]:
        """See `Networks`."""
        return {"TRANSFER_CHANNELS": self.channels}

    def outline(self, examples: Examples, depth: int | None = None) -> ConvClassifier:
        """See `Networks`."""
        _, colours, size, _ = examples.inputs.shape
        with torch.device("meta"):
            layers = self.depth if depth is None else depth
            return ConvClassifier(colours, size, examples.classes, layers, self.channels)

    def prefix(self, arm: CutArm) -> int:
        """All layers that an arm freezes from the first on."""
        return arm.prefix

    train = staticmethod(train_stack)
