"""The small CNN whose layers are kept, frozen, drawn anew or removed."""

import copy
import pickle
import re
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from config import InputError


class ConvClassifier(nn.Module):
    """`depth` × [convolution, ReLU, perhaps average pooling], flattened, and a linear head.

    The network of tusharmanekar/mp-tl-study with PyTorch's own initialization, which draws the convolutions first to
    last and then the head. Each convolution keeps the size of its maps; after every `pool_every`-th they are halved.

    Shapes: images ``[B, channels_in, size, size]`` in, logits ``[B, classes]`` out.

    Args:
        channels_in: 1 for grey, 3 for colour.
        size: pixels of a side.
        classes: number of them.
        depth: number of convolutions; with 0 it is a linear classifier on pixels.
        channels: of every convolution; 64 in the original.
        kernel: pixels of a side, odd.
        pool_every: convolutions before a pooling.

    Raises:
        InputError: an even kernel, or more poolings than the images can be halved.
    """

    def __init__(
        self,
        channels_in: int,
        size: int,
        classes: int,
        depth: int = 6,
        channels: int = 16,
        kernel: int = 3,
        pool_every: int = 2,
    ):
        super().__init__()
        if kernel % 2 == 0:
            raise InputError(f"The kernel must be odd, so that a convolution keeps the size of its maps, not {kernel}.")
        if size >> depth // pool_every == 0:
            raise InputError(f"Images of {size}×{size} pixels cannot be halved {depth // pool_every} times.")
        self.channels_in, self.size, self.channels, self.pool_every = channels_in, size, channels, pool_every
        widths = [channels_in] + [channels] * depth
        self.convs = nn.ModuleList(
            nn.Conv2d(widths[i], channels, kernel, padding=kernel // 2) for i in range(depth)
        )  # drawn in this order
        self.head = nn.Linear(self.flat_size(depth), classes)

    @property
    def depth(self) -> int:
        """Number of convolutions."""
        return len(self.convs)

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self.head.out_features

    def flat_size(self, cut: int) -> int:
        """Numbers per image that `prefix` gives: what a head after the first `cut` convolutions has as inputs."""
        return (self.channels if cut else self.channels_in) * (self.size >> cut // self.pool_every) ** 2

    def block(self, maps: Tensor, layer: int) -> Tensor:
        """Convolution `layer` (from 0) with its activation and its pooling, if it has one."""
        maps = torch.relu(self.convs[layer](maps))
        return F.avg_pool2d(maps, 2) if (layer + 1) % self.pool_every == 0 else maps

    def prefix(self, images: Tensor, cut: int) -> Tensor:
        """Output of the first `cut` convolutions, their activations and poolings: what the next layer sees.

        Shapes: ``[B, channels_in, size, size]`` -> ``[B, C, H, W]``; with a cut of 0 the images themselves.
        """
        for layer in range(cut):
            images = self.block(images, layer)
        return images

    def rest(self, maps: Tensor, cut: int) -> Tensor:
        """Logits from the output of `prefix` at the same cut: ``[B, C, H, W]`` -> ``[B, classes]``."""
        for layer in range(cut, self.depth):
            maps = self.block(maps, layer)
        return self.head(maps.flatten(1))

    def forward(self, images: Tensor) -> Tensor:
        return self.rest(images, 0)

    def features(self, images: Tensor, layer: int) -> Tensor:
        """Output of convolution `layer` (from 0) *before* its activation and pooling, which the original clusters.

        What the next layer sees is ``prefix(images, layer + 1)``.

        Shapes: ``[B, channels_in, size, size]`` -> ``[B, channels, H, W]``.
        """
        return self.convs[layer](self.prefix(images, layer))

    def truncated(self, cut: int, classes: int | None = None) -> "ConvClassifier":
        """A copy of the first `cut` convolutions with a fresh head on them; a pooling before the cut stays.

        Only the head is drawn, from the global generator.
        """
        network = copy.deepcopy(self)
        network.convs = network.convs[:cut]
        network.head = nn.Linear(self.flat_size(cut), classes or self.classes)
        return network.to(self.head.weight)


def load_original(path: str | Path) -> dict[str, Tensor]:
    """A pretrained network that the original saved (a ``.pth`` of a state dictionary) as a state of `ConvClassifier`.

    Its ``conv0.weight`` is ``convs.0.weight`` here, its ``fc`` is `head`; everything is on the CPU.

    Raises:
        InputError: there is no such file, or it holds something else.
    """
    path = Path(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"'{path}' cannot be read: {error.strerror or error}.") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise InputError(f"'{path}' is no state dictionary of PyTorch.") from error
    names = {re.sub(r"^conv(\d+)\.", r"convs.\1.", re.sub(r"^fc\.", "head.", str(name))): name for name in state}
    depth = sum(name.startswith("convs.") for name in names) // 2
    layers = [*(f"convs.{i}" for i in range(depth)), "head"]
    if set(names) != {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}:
        raise InputError(f"'{path}' holds no network of the original: it has no conv0 …, fc with weights and biases.")
    return {name: state[old] for name, old in names.items()}
