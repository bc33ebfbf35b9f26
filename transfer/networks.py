"""What the transfer study trains: small CNNs on images, or the package's own classifier on features.

A kind of network says what it looks like for some data and down to some layer, which arms can be trained together, and
how a stack of them is trained. `features` has the other kind.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from engine import Params
from transfer.arms import CutArm
from transfer.convnet import ConvClassifier
from transfer.images import Examples
from transfer.training import train_stack


class Networks(Protocol):
    """What `TransferStudy` needs of a kind of network."""

    depth: int  # hidden layers, and so the largest cut
    convolutional: bool  # whether its layers can be probed, see `probes`

    def facts(self) -> dict[str, object]:
        """Settings that describe it, by the names of the constants."""

    def outline(self, examples: Examples, depth: int | None = None) -> nn.Module:
        """A network for these inputs and classes, without weights (on the meta device); cut short at `depth`."""

    def prefix(self, arm: CutArm) -> int:
        """How many first layers to run once per image; arms that are trained together have the same number."""

    def train(
        self,
        network: nn.Module,
        start: Params,
        freeze: Params,
        prefix: int,
        examples: Examples,
        batches: Tensor,
        checkpoints: Sequence[int],
        learning_rate: float,
        tick: Callable[[], object],
    ) -> tuple[Params, Tensor]:
        """See `training.train_stack`."""


@dataclass(frozen=True)
class ConvNetworks:
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
