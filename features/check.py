"""Reads every image file before an extraction, decodes none that looks whole, and remembers what was read."""

import hashlib
import io
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from logging import getLogger
from pathlib import Path
from typing import NamedTuple

from config import InputError
from dataset import ImageDataset, load_image, open_image
from engine import default_workers
from storage import atomic_write

log = getLogger(__name__)
MEMO_VERSION = 2
JPEG_END, TAIL = b"\xff\xd9", 1024  # marker, and bytes at the end of a file in which it is looked for
RACY_NS = 2_000_000_000  # a younger file may change again within one tick of the file system's clock (as in git)


def memo_path(dataset: ImageDataset, cache_dir: str | os.PathLike) -> Path:
    """Where `check_images` remembers what it has read of a data set."""
    return Path(cache_dir) / f"images_{content_hash(os.path.abspath(dataset.root).encode())[:16]}.json"


def check_images(
    dataset: ImageDataset,
    cache_dir: str | os.PathLike,
    workers: int | None = None,
    verify: bool = False,
    progress: bool = True,
) -> list[str]:
    """Read every image file once and look whether it is whole: SHA-256 of each, in row order.

    They are remembered in `cache_dir` by size and modification time, so that an unchanged tree need not be read again.
    Files younger than two seconds are not remembered. Pillow must know the format and the header of each; a PNG must
    have all its parts with the right checksums, and a JPEG an end. That costs a tenth of decoding, and what remains to
    be found, bytes that are wrong inside a file, shows when the image is decoded for the extraction.

    Args:
        cache_dir: an existing folder.
        workers: threads; default one per core, at most 16.
        verify: read all files again, even those that are remembered.

    Raises:
        InputError: some images cannot be read; all of them are listed.
    """
    memo_file = memo_path(dataset, cache_dir)
    memo = {} if verify else _read_memo(memo_file)
    stats = {file: _size_and_time(dataset.path(row)) for row, file in enumerate(dataset.files)}
    known = {file: memo[file] for file in dataset.files if file in memo and tuple(memo[file][:2]) == stats[file]}
    todo = {file: row for row, file in enumerate(dataset.files) if file not in known}
    unreadable, young = [], set()
    try:
        for file, read in _read_all(dataset, todo, workers or default_workers(), progress):
            if read.problem:
                unreadable.append(f"{file} ({read.problem})")
                continue
            known[file] = [*stats[file], read.content]
            if read.started - stats[file][1] <= RACY_NS:
                young.add(file)
    finally:  # also after an interruption: what was read need not be read again
        if todo:
            _write_memo(memo_file, {file: known[file] for file in sorted(known.keys() - young)})
    raise_unreadable(dataset, unreadable)
    return [known[file][2] for file in dataset.files]


def raise_unreadable(dataset: ImageDataset, images: list[str]) -> None:
    """Raise an `InputError` that lists images that cannot be read, each with the reason, if there are any."""
    if images:
        raise InputError(
            f"{len(images)} of {len(dataset)} images in '{dataset.root}' cannot be read; repair or remove "
            f"them: {', '.join(images)}."
        )


def _size_and_time(path: Path) -> tuple[int, int]:
    try:
        stat = os.stat(path)
    except OSError:
        return -1, 0  # never remembered: reading it will say what is wrong
    return stat.st_size, stat.st_mtime_ns


def content_hash(data: bytes) -> str:
    """SHA-256 of an image's bytes."""
    return hashlib.sha256(data).hexdigest()


class _Read(NamedTuple):
    started: int  # time of reading, ns since the epoch
    content: str = ""  # SHA-256
    problem: str = ""


def _read(dataset: ImageDataset, row: int) -> _Read:
    started = time.time_ns()
    try:
        data = dataset.read(row)
        check_whole(data)
    except Exception as error:  # Pillow's decoders raise anything from SyntaxError to struct.error
        return _Read(started, problem=image_problem(error, dataset.path(row)))
    return _Read(started, content_hash(data))


def check_whole(data: bytes) -> None:
    """Raise what Pillow does if the bytes are not an image from beginning to end.

    Only a JPEG that seems to be cut short is decoded for it: Pillow knows better than a search for its last marker.
    """
    with open_image(io.BytesIO(data)) as image:
        image.verify()
        cut = image.format == "JPEG" and JPEG_END not in data[-TAIL:]
    if cut:
        load_image(io.BytesIO(data))


def image_problem(error: Exception, path: Path) -> str:
    """Why an image cannot be read, for a message that names the image already."""
    if isinstance(error, OSError) and error.strerror:
        return "a link that leads nowhere" if path.is_symlink() else error.strerror
    text = re.sub(r" <_io\.BytesIO[^>]*>", "", " ".join(str(error).split()))
    return text.replace(f" {str(path)!r}", "") or type(error).__name__


def _read_all(
    dataset: ImageDataset, files: Mapping[str, int], workers: int, progress: bool
) -> Iterator[tuple[str, _Read]]:
    """Read the images of files, given with their rows."""
    from tqdm.auto import tqdm

    pool = ThreadPoolExecutor(workers)
    try:
        results = pool.map(partial(_read, dataset), files.values())
        quiet = {} if progress and files else {"disable": True}  # otherwise the environment's TQDM_DISABLE decides
        bar = tqdm(results, "checking images", len(files), unit="img", **quiet)
        yield from zip(files, bar, strict=True)
    finally:
        pool.shutdown(cancel_futures=True)  # otherwise Ctrl-C would wait for all queued images


def _read_memo(file: Path) -> dict[str, list]:
    try:
        memo = json.loads(file.read_text())
        if memo["version"] != MEMO_VERSION:
            return {}
        if not all([*map(type, known)] == [int, int, str] for known in memo["files"].values()):
            raise ValueError("an entry is not size, time and hash")
        return memo["files"]
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        log.warning("%s is damaged; reading all images again", file)
        return {}


def _write_memo(file: Path, files: dict[str, list]) -> None:
    with atomic_write(file) as temporary:
        temporary.write_text(json.dumps({"version": MEMO_VERSION, "files": files}))
