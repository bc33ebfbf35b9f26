"""The tokens before the last blocks of a ViT, on disk: one `.npy` file ``[N, T, D]`` beside the features.

Its name is the name of the feature file and the number of blocks, so that it has the same key. While it is made it
lies in a folder of its own, with the features of the shards whose tokens it holds; once it is whole it is moved to its
place. It is therefore whole where it is found, and takes its size on the disk once.
"""

import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from logging import getLogger
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from config import InputError
from storage import write_errors

log = getLogger(__name__)
TYPES = ("float16", "float32")  # the second where the first cannot hold the tokens


class Float16OverflowError(ArithmeticError):
    """A token of the named image lies beyond the range of float16, as this process finds or another has found."""


class TokenFile:
    """Tokens of a data set in the cache, or on their way there.

    Several processes may `write` at once, each rows of its own. All other methods that change files are for one at a
    time.

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

    @property
    def folder(self) -> Path:
        """Where the tokens of this type are made: `parts`, or a folder in it that says that float16 is too narrow."""
        return self.parts if self.type == TYPES[0] else self._wide

    @property
    def folders(self) -> str:
        """Pattern of such folders of any pass, below that of the features."""
        return f"*_blocks{self.blocks}.parts" + (f"/{TYPES[1]}" if self.type == TYPES[1] else "")

    @property
    def _wide(self) -> Path:
        return self.parts / TYPES[1]

    @property
    def _unfinished(self) -> Path:
        return self.folder / "tokens.npy"

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
        """Take over tokens and type of an interrupted pass, or of other processes; discard what is damaged."""
        self.type = TYPES[self._wide.is_dir()]
        array = _open(self._unfinished, self.shape, "r")
        if array is None or array.dtype != self.type:
            for path in self.folder.glob("*"):
                if path.is_file():  # the folder stays: it is the mark by which other processes know the type
                    path.unlink(missing_ok=True)

    def widen(self) -> None:
        """Discard what there is in float16, which other processes then notice, and go on in float32."""
        self._wide.mkdir(parents=True, exist_ok=True)
        (self.parts / self._unfinished.name).unlink(missing_ok=True)
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
            self.folder.mkdir(parents=True, exist_ok=True)
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
                raise Float16OverflowError(f"'{file}'")
            raise InputError(f"The tokens of '{file}' are not finite; {self.model} cannot be used on it.")
        with self._opened() as file:
            data = tokens.contiguous().numpy()
            file.seek((row - self.shape[0]) * data[0].nbytes, os.SEEK_END)  # the rows are the end of the file
            file.write(data)

    def flush(self) -> None:
        """Return when what was written is on the disk."""
        with self._opened() as file:
            os.fsync(file.fileno())

    def take(self, folder: Path, rows: range) -> bool:
        """Copy rows from the folder of another pass, if it has them in this type."""
        array = _open(folder / self._unfinished.name, None, "r")
        if array is None or array.dtype != self.type or array.shape[1:] != self.shape[1:] or len(array) < rows.stop:
            return False
        self.write(rows.start, torch.from_numpy(array[rows.start : rows.stop].copy()), [])
        self.flush()
        return True

    def finish(self) -> None:
        """Move the file, which is whole, to its place."""
        with write_errors(self.path):
            self._unfinished.replace(self.path)

    @contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        """The file that is being made, to be written to."""
        with write_errors(self.path):
            try:
                opened = self._unfinished.open("r+b")
            except FileNotFoundError:
                if self.type == TYPES[0] and (self._wide.is_dir() or self.path.exists()):
                    raise Float16OverflowError("an image of another process") from None
                raise
            with opened:
                yield opened


def _open(path: Path, shape: tuple[int, int, int] | None, mode: str) -> np.memmap | None:
    """A file of tokens, mapped into memory, or None if it is not whole or not of that shape; None stands for any."""
    try:
        array = np.lib.format.open_memmap(path, mode)
    except Exception:  # numpy raises anything on a damaged file
        return None
    alike = array.ndim == 3 if shape is None else array.shape == shape
    whole = alike and array.dtype.name in TYPES and array.flags.c_contiguous
    return array if whole and path.stat().st_size == array.offset + array.nbytes else None
