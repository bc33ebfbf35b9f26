"""The tokens before the last blocks of a ViT, on disk: one `.npy` file ``[N, T, D]`` beside the features.

Its name is the name of the feature file and the number of blocks, so that it has the same key. While it is made it
lies in a folder of its own, with the features of the shards whose tokens it holds; once it is whole it is moved to its
place. It is therefore whole where it is found, and takes its size on the disk once.
"""

import math
import os
import shutil
from logging import getLogger
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from config import InputError
from storage import write_errors

log = getLogger(__name__)
TYPES = ("float16", "float32")  # the second where the first cannot hold the tokens


class Float16OverflowError(ArithmeticError):
    """A token of the named image lies beyond the range of float16."""


class TokenFile:
    """Tokens of a data set in the cache, or on their way there.

    Args:
        features: path of the feature file that they belong to.
        shape: N, T, D.
        blocks: the number of last blocks that they are the input of.
        model: its name, for messages.
    """

    def __init__(self, features: Path, shape: tuple[int, int, int], blocks: int, model: str):
        self.path = features.with_name(f"{features.stem}_blocks{blocks}.npy")
        self.parts = self.path.with_suffix(".parts")
        self.shape, self.blocks, self.model, self.type = shape, blocks, model, TYPES[0]
        self._unfinished = self.parts / "tokens.npy"

    def load(self) -> Tensor:
        """The tokens ``[N, T, D]``, mapped into memory; what is written to them does not reach the disk.

        Raises:
            InputError: the file is damaged, or of other images or another model.
        """
        if (array := _open(self.path, self.shape, "c")) is None:
            shape = " × ".join(map(str, self.shape))
            raise InputError(f"'{self.path}' does not hold {shape} tokens, or not whole: delete it to make it again.")
        return torch.from_numpy(array)

    def resume(self) -> None:
        """Take over the tokens of an interrupted pass and their type, or discard what it left."""
        if (array := _open(self._unfinished, self.shape, "r")) is None:
            shutil.rmtree(self.parts, ignore_errors=True)
        else:
            self.type = array.dtype.name

    def widen(self) -> None:
        """Discard what there is, and go on in float32."""
        shutil.rmtree(self.parts, ignore_errors=True)
        self.type = TYPES[1]

    def reserve(self, rows: int) -> None:
        """Say how large the file will be, check that the disk has room for so many more rows, and create the file.

        Raises:
            InputError: too little room.
            WriteError: the file cannot be created.
        """
        row = math.prod(self.shape[1:]) * np.dtype(self.type).itemsize
        log.info("The tokens take %.2f GB of disk, in '%s'.", self.shape[0] * row / 1e9, self.path)
        if (free := shutil.disk_usage(self.path.parent).free) < rows * row:
            raise InputError(
                f"The disk of '{self.path.parent}' has {free / 1e9:.2f} GB free and the tokens take "
                f"{rows * row / 1e9:.2f} GB more: make room, or set CACHE_DIR to a folder on another disk."
            )
        with write_errors(self.path):
            self.parts.mkdir(exist_ok=True)
            if not self._unfinished.exists():
                np.lib.format.open_memmap(self._unfinished, "w+", self.type, self.shape)

    def write(self, row: int, tokens: Tensor, files: list[str]) -> None:
        """Write the tokens ``[B, T, D]`` of the images from `row` on.

        Not through the memory map, where a full disk would end the process without a word.

        Raises:
            Float16OverflowError: float16 cannot hold them.
            InputError: float32 cannot hold them either.
            WriteError: for example because the disk is full.
        """
        if not (finite := tokens.isfinite().flatten(1).all(1)).all():
            file = files[int((~finite).nonzero()[0])]
            if self.type != TYPES[-1]:
                raise Float16OverflowError(file)
            raise InputError(f"The tokens of '{file}' are not finite; {self.model} cannot be used on it.")
        array = np.lib.format.open_memmap(self._unfinished, "r")
        with write_errors(self.path), self._unfinished.open("r+b") as file:
            file.seek(array.offset + row * array[0].nbytes)
            file.write(tokens.contiguous().numpy())

    def flush(self) -> None:
        """Return when what was written is on the disk."""
        with write_errors(self.path), self._unfinished.open("r+b") as file:
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Move the file, which is whole, to its place."""
        with write_errors(self.path):
            self._unfinished.replace(self.path)


def _open(path: Path, shape: tuple[int, int, int], mode: str) -> np.memmap | None:
    """A file of tokens, mapped into memory, or None if it is not one of that shape from its first byte to its last."""
    try:
        array = np.lib.format.open_memmap(path, mode)
    except Exception:  # numpy raises anything on a damaged file
        return None
    whole = array.shape == shape and array.dtype.name in TYPES and array.flags.c_contiguous
    return array if whole and path.stat().st_size == array.offset + array.nbytes else None
