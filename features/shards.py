"""The parts of a pass over a data set, which several processes make together in one folder of the cache.

A part holds the features of some consecutive rows. Whoever makes one holds its lock, and the system releases the lock
when the process ends, whatever ends it; so what a process that dies leaves is made by another. The name of a part has
a hash of everything that determines it, so that a later pass over other images takes over the parts that are the same.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from logging import getLogger
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from engine import rank
from storage import atomic_write, write_errors

log = getLogger(__name__)


class Shards:
    """The parts of a pass on disk, and those that this process makes; the end of a `with` block gives up the latter.

    Args:
        target: the file that the parts are for; once it exists, nothing is missing.
        folder: where they lie; created here, removed by whoever has made the target.
        keys: hash of what determines the features of a part, by its rows.
    """

    def __init__(self, target: Path, folder: Path, keys: Mapping[range, str]):
        self.target, self.folder, self.keys = target, folder, keys
        number, of = rank()
        share = {rows: (index - number) % of for index, rows in enumerate(keys)}
        self._order = sorted(keys, key=share.__getitem__)  # first the share of this process, then what others leave
        self._held: dict[range, FileLock] = {}
        self._told = False
        with write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> "Shards":
        return self

    def __exit__(self, *_) -> None:
        for rows in list(self._held):
            self._release(rows)

    def missing(self) -> list[range]:
        """What nobody has made yet, in the order in which this process tries to."""
        if self.target.exists():
            return []
        try:
            there = {*os.listdir(self.folder)}  # asking for each part by itself takes long on a network's disk
        except FileNotFoundError:  # removed by whoever has made the target just now
            there = set()
        done = {rows for rows in self.keys if {self._file(rows).name, self._list(rows).name} & there}
        return [rows for rows in self._order if rows not in done]

    def rows_done(self) -> int:
        """Rows of the parts that are not missing."""
        return sum(map(len, self.keys)) - sum(map(len, self.missing()))

    def claim(self) -> Iterator[range]:
        """Parts that are missing and that no other process makes; each is locked until it is saved."""
        for rows in self.missing():
            lock = FileLock(self._lock(rows))
            try:
                lock.acquire(timeout=0)
            except (Timeout, FileNotFoundError):  # the latter: the target is made, and the folder removed
                continue
            self._held[rows] = lock
            if self._done(rows):  # asked again: it may have been made just before it was locked
                self._release(rows)
            else:
                yield rows

    def ending(self, row: int) -> range | None:
        """The part whose last row is the one before `row`."""
        return next((rows for rows in self._held if rows.stop == row), None)

    def wait(self, rows: range) -> None:
        """Return when the process that makes a part has made it, or is gone."""
        if not self._told:
            say = log.warning if rank()[1] == 1 else log.info  # those of torchrun know of one another
            say("Another process extracts some of these features, too; waiting for it (%s).", self._lock(rows))
            self._told = True
        with suppress(FileNotFoundError), FileLock(self._lock(rows)):  # without its folder, which has been removed
            pass

    def save(self, rows: range, features: Tensor, pixels: Tensor) -> None:
        """Features ``[B, D]`` of a claimed part, and SHA-256 of its decoded images, uint8 ``[B, 32]``."""
        from safetensors.torch import save_file

        with atomic_write(self._file(rows)) as temporary:
            save_file({"features": features, "pixels": pixels}, temporary)
        self._release(rows)

    def save_unreadable(self, rows: range, images: list[str]) -> None:
        """Instead: the images of a claimed part that cannot be read, each with the reason."""
        with atomic_write(self._list(rows)) as temporary:
            temporary.write_text(json.dumps(images))
        self._release(rows)

    def take_unreadable(self) -> list[str]:
        """All that were saved, in the order of the rows; they are forgotten, so that the next pass looks again."""
        lists = [self._list(rows) for rows in self.keys if self._list(rows).exists()]
        found = [image for file in lists for image in json.loads(file.read_text())]
        for file in lists:
            file.unlink()
        return found

    def load(self) -> tuple[Tensor, Tensor]:
        """All features ``[N, D]`` and hashes ``[N, 32]``; nothing must be missing."""
        from safetensors.torch import load_file

        parts = [load_file(self._file(rows)) for rows in self.keys]
        return torch.cat([part["features"] for part in parts]), torch.cat([part["pixels"] for part in parts])

    def adopt(self, folders: Iterator[Path], take: Callable[[Path, range], bool] = lambda folder, rows: True) -> None:
        """Copy missing parts from folders of other passes, for example over the same images before one was repaired.

        Args:
            folders: where to look.
            take: copies what belongs to a part beside its file, and says whether it could.
        """
        for folder in folders:
            for rows in self.missing():
                with suppress(FileNotFoundError):  # not there, or removed by now
                    content = (folder / self._file(rows).name).read_bytes()
                    if take(folder, rows):
                        with atomic_write(self._file(rows)) as temporary:
                            temporary.write_bytes(content)

    def _done(self, rows: range) -> bool:
        return self._file(rows).exists() or self._list(rows).exists() or self.target.exists()

    def _release(self, rows: range) -> None:
        self._held.pop(rows).release()

    def _file(self, rows: range) -> Path:
        return self.folder / f"{rows.start:09d}_{self.keys[rows]}.safetensors"

    def _list(self, rows: range) -> Path:
        return self._file(rows).with_suffix(".json")

    def _lock(self, rows: range) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)  # whoever has made the target may have removed it
        return self._file(rows).with_suffix(".lock")
