"""Images as the inputs of a network: decoded when they are asked for, augmented in training as DomainBed does."""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import BytesIO

import torch
from PIL import Image
from torch import Tensor

from config import InputError
from dataset import ImageDataset, load_image
from engine import default_workers
from features.check import content_hash, image_problem

AREA, RATIO = (0.7, 1.0), (3 / 4, 4 / 3)  # of a crop: part of the image, width over height
TRIES = 10  # for a crop that lies in the image
JITTER, HUE, GREY = 0.3, 0.3, 0.1  # largest change of brightness, contrast, saturation; of hue; chance of no colour
NUMBERS = 2 * TRIES + 2 + 1 + 4 + 4 + 1  # uniform numbers that one augmentation takes


class ImageInputs:
    """The images of a data set, uint8 ``[N, 3, H, W]``, see `engine.data.Images`.

    Args:
        dataset: from `dataset.find_dataset`.
        prepare: an RGB image -> uint8 ``[3, H, W]``, as the model was trained on, see `models.Preprocessing`.
        size: H and W.
        contents: SHA-256 of each image's bytes, which must still be the same when it is read.
        device: that tensors are returned on.
    """

    dtype = torch.uint8

    def __init__(
        self,
        dataset: ImageDataset,
        prepare: Callable[[Image.Image], Tensor],
        size: tuple[int, int],
        contents: Sequence[str],
        device: torch.device | str = "cpu",
    ):
        self.dataset, self.prepare, self.size, self.contents = dataset, prepare, tuple(size), contents
        self.device = device
        self.shape = torch.Size((len(dataset), 3, *self.size))

    def __len__(self) -> int:
        return len(self.dataset)

    def to(self, device: torch.device | str) -> "ImageInputs":
        """The same, returned on another device."""
        return ImageInputs(self.dataset, self.prepare, self.size, self.contents, device)

    def __getitem__(self, rows: int | slice | Tensor) -> Tensor:
        """Images as they are tested: of a row ``[3, H, W]``, of several ``[n, 3, H, W]``."""
        if isinstance(rows, int):
            return self._read([rows], self._tested)[0]
        rows = range(len(self))[rows] if isinstance(rows, slice) else rows.tolist()
        return self._read(rows, self._tested)

    def split(self, size: int) -> Iterator[Tensor]:
        """All images as they are tested, `size` at a time."""
        for row in range(0, len(self), size):
            yield self[row : row + size]

    def augmented(self, rows: Tensor, draws: Sequence[torch.Generator]) -> Tensor:
        """Training images ``[S, B, 3, H, W]`` for row numbers ``[S, B]``, each seed's changed by its own stream."""
        numbers = torch.stack([torch.rand(rows.shape[1], NUMBERS, generator=draw) for draw in draws])
        each = zip(rows.flatten().tolist(), numbers.flatten(0, 1).tolist(), strict=True)
        changed = self._map([partial(self._augmented, row, own) for row, own in each])
        return torch.stack(changed).view(*rows.shape, 3, *self.size).to(self.device)

    def _read(self, rows: Sequence[int], make: Callable[[int], Tensor]) -> Tensor:
        return torch.stack(self._map([partial(make, row) for row in rows])).to(self.device)

    @staticmethod
    def _map(calls: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
        """The results of all calls, made by several threads: Pillow decodes without Python's lock."""
        with ThreadPoolExecutor(min(len(calls), default_workers())) as threads:
            return list(threads.map(lambda call: call(), calls))

    def _tested(self, row: int) -> Tensor:
        return self.prepare(self._image(row))

    def _augmented(self, row: int, numbers: Sequence[float]) -> Tensor:
        from torchvision.transforms.functional import pil_to_tensor

        return pil_to_tensor(augment(self._image(row), self.size, numbers))

    def _image(self, row: int) -> Image.Image:
        try:
            data = self.dataset.read(row)
            if content_hash(data) != self.contents[row]:
                raise OSError("it has changed since its features were extracted")
            return load_image(BytesIO(data))
        except Exception as error:  # Pillow raises anything
            problem = image_problem(error, self.dataset.path(row))
            raise InputError(f"The image '{self.dataset.files[row]}' cannot be read: {problem}.") from error


def augment(image: Image.Image, size: tuple[int, int], numbers: Sequence[float]) -> Image.Image:
    """An image as it is seen once in training, by DomainBed's augmentations (Gulrajani & Lopez-Paz, ICLR 2021).

    A crop of 70 to 100 % of its area with sides of 3:4 to 4:3, resized to `size` (H, W); mirrored with probability 1/2;
    brightness, contrast and saturation times 0.7 to 1.3 and hue turned by up to 0.3 of a circle, in random order; grey
    with probability 0.1.

    Args:
        numbers: uniform in 0 … 1, `NUMBERS` of them; the result is a function of them.
    """
    from torchvision.transforms import functional as change

    crop, mirror, rest = numbers[: 2 * TRIES + 2], numbers[2 * TRIES + 2], numbers[2 * TRIES + 3 :]
    order, amounts, grey = rest[:4], rest[4:8], rest[8]
    image = change.resized_crop(image, *crop_box(image.size, crop), list(size))
    image = change.hflip(image) if mirror < 0.5 else image
    factors = [1 + JITTER * (2 * amount - 1) for amount in amounts[:3]] + [HUE * (2 * amounts[3] - 1)]
    kinds = (change.adjust_brightness, change.adjust_contrast, change.adjust_saturation, change.adjust_hue)
    for kind in sorted(range(4), key=lambda kind: order[kind]):
        image = kinds[kind](image, factors[kind])
    return change.rgb_to_grayscale(image, 3) if grey < GREY else image


def crop_box(size: tuple[int, int], numbers: Sequence[float]) -> tuple[int, int, int, int]:
    """Top, left, height and width of a crop of an image of `size` (width, height), as `RandomResizedCrop` draws it.

    Args:
        numbers: `TRIES` pairs, of which the first whose crop lies in the image is taken, and two for its place. Without
            one it is the largest in the centre whose sides have an allowed ratio.
    """
    (width, height), (down, across) = size, numbers[-2:]
    low, high = (math.log(ratio) for ratio in RATIO)
    for part, shape in zip(numbers[:-2:2], numbers[1:-2:2], strict=True):
        area = width * height * (AREA[0] + (AREA[1] - AREA[0]) * part)
        ratio = math.exp(low + (high - low) * shape)
        wide, tall = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < tall <= height:
            return int(down * (height - tall + 1)), int(across * (width - wide + 1)), tall, wide
    ratio = min(max(width / height, RATIO[0]), RATIO[1])
    wide, tall = min(width, round(height * ratio)), min(height, round(width / ratio))
    return (height - tall) // 2, (width - wide) // 2, tall, wide
