"""Reads every image once before an extraction, and remembers the result."""

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

from PIL import __version__ as pillow_version

from config import InputError
from dataset import DECODING_VERSION, ImageDataset, load_image
from engine import default_workers
from storage import atomic_write

log = getLogger(__name__)
MEMO_VERSION = [DECODING_VERSION, pillow_version]  # another decoder may give other pixels
RACY_NS = 2_000_000_000  # a younger file may change again within one tick of the file system's clock (as in git)


def check_images(
    dataset: ImageDataset,
    cache_dir: str | os.PathLike,
    workers: int | None = None,
    verify: bool = False,
    progress: bool = True,
) -> tuple[list[str], list[str]]:
    """Read every image once: SHA-256 of each file and of each decoded image (size and RGB bytes), in row order.

    Both are remembered in `cache_dir` by size and modification time, so that an unchanged tree need not be read again.
    Files younger than two seconds are not remembered.

    Args:
        cache_dir: an existing folder.
        workers: threads (Pillow decodes without holding Python's lock); default one per core, at most 16.
        verify: read all files again, even those that are remembered.

    Returns:
        Hashes of the files, and hashes of the decoded images.

    Raises:
        InputError: some images cannot be read; all of them are listed.
    """
    memo_file = Path(cache_dir) / f"images_{_sha256(os.path.abspath(dataset.root).encode())[:16]}.json"
    memo = {} if verify else _read_memo(memo_file)
    stats = {file: _size_and_time(dataset.path(row)) for row, file in enumerate(dataset.files)}
    known = {file: memo[file] for file in dataset.files if file in memo and tuple(memo[file][:2]) == stats[file]}
    todo = {file: row for row, file in enumerate(dataset.files) if file not in known}
    unreadable, young = [], set()
    try:
        for file, digests in _read_all(dataset, todo, workers or default_workers(), progress):
            if digests.problem:
                unreadable.append(f"{file} ({digests.problem})")
                continue
            known[file] = [*stats[file], digests.content, digests.pixels]
            if digests.started - stats[file][1] <= RACY_NS:
                young.add(file)
    finally:  # also after an interruption: what was read need not be read again
        if todo:
            _write_memo(memo_file, {file: known[file] for file in sorted(known.keys() - young)})
    if unreadable:
        raise InputError(
            f"{len(unreadable)} of {len(dataset)} images in '{dataset.root}' cannot be read; repair or remove "
            f"them: {', '.join(unreadable)}."
        )
    return [known[file][2] for file in dataset.files], [known[file][3] for file in dataset.files]


def _size_and_time(path: Path) -> tuple[int, int]:
    try:
        stat = os.stat(path)
    except OSError:
        return -1, 0  # never remembered: reading it will say what is wrong
    return stat.st_size, stat.st_mtime_ns


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class _Digests(NamedTuple):
    started: int  # time of reading, ns since the epoch
    content: str = ""
    pixels: str = ""
    problem: str = ""


def _digests(dataset: ImageDataset, row: int) -> _Digests:
    started = time.time_ns()
    try:
        data = dataset.read(row)
        image = load_image(io.BytesIO(data))
    except Exception as error:  # Pillow's decoders raise anything from SyntaxError to struct.error
        return _Digests(started, problem=image_problem(error, dataset.path(row)))
    pixels = f"{image.width}x{image.height} ".encode() + image.tobytes()
    return _Digests(started, _sha256(data), _sha256(pixels))


def image_problem(error: Exception, path: Path) -> str:
    """Why an image cannot be read, for a message that names the image already."""
    if isinstance(error, OSError) and error.strerror:
        return "a link that leads nowhere" if path.is_symlink() else error.strerror
    text = re.sub(r" <_io\.BytesIO[^>]*>", "", " ".join(str(error).split()))
    return text.replace(f" {str(path)!r}", "") or type(error).__name__


def _read_all(
    dataset: ImageDataset, files: Mapping[str, int], workers: int, progress: bool
) -> Iterator[tuple[str, _Digests]]:
    """Read the images of files, given with their rows."""
    from tqdm.auto import tqdm

    pool = ThreadPoolExecutor(workers)
    try:
        results = pool.map(partial(_digests, dataset), files.values())
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
        if not all([*map(type, known)] == [int, int, str, str] for known in memo["files"].values()):
            raise ValueError("an entry is not size, time and two hashes")
        return memo["files"]
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        log.warning("%s is damaged; reading all images again", file)
        return {}


def _write_memo(file: Path, files: dict[str, list]) -> None:
    with atomic_write(file) as temporary:
        temporary.write_text(json.dumps({"version": MEMO_VERSION, "files": files}))
