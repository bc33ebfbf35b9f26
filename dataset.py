"""Image folders in the layout of PACS: discovery, checks, reading of images, and the one in/out split.

The layout is ``root/domain/class/image``. Domains and classes are found, not listed anywhere: any number of both,
classes matched by name across domains.
"""

import hashlib
import io
import json
import math
import os
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from logging import getLogger
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL import __version__ as pillow_version
from torch import Tensor

import config
from config import InputError
from files import whole

log = getLogger(__name__)

# Pillow registers many names that are no photographs (.pdf, .mpg, .hdf, .ico, …); these formats are.
IMAGE_FORMATS = frozenset(
    ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "QOI", "SGI", "TGA", "TIFF", "WEBP")
)
DECODING_VERSION = 1  # to be raised when `load_image` gives other pixels than before: caches then start anew
RACY_NS = 2_000_000_000  # a file this young may change again within one tick of its clock, as git knows


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """A folder of images, its rows sorted by domain, class and file name.

    Attributes:
        name: name of the root folder.
        root: folder of the domain folders.
        files: ``"domain/class/file.jpg"`` per row, relative to `root`.
        labels: int64 ``[N]``, index into `class_names`.
        domains: int64 ``[N]``, index into `domain_names`.
        class_names, domain_names: sorted names.
    """

    name: str
    root: Path
    files: tuple[str, ...]
    labels: Tensor
    domains: Tensor
    class_names: tuple[str, ...]
    domain_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)


@cache
def image_extensions() -> frozenset[str]:
    """Endings, in lower case, of the files taken for images: those of `IMAGE_FORMATS` this Pillow can read."""
    known = Image.registered_extensions()
    return frozenset(ending for ending, kind in known.items() if kind in IMAGE_FORMATS and kind in Image.OPEN)


def find_dataset(root: str | os.PathLike) -> ImageDataset:
    """Find domains, classes and images below `root`.

    A folder that only wraps the real root (``pacs_data/pacs_data/photo/dog/x.jpg``) is stepped through. Hidden
    files and folders, and files that are no images by their ending, are passed over.

    Raises:
        InputError: no such folder, fewer than two domains, a domain that lacks a class others have, an empty class.
    """
    given, top = root, Path(os.path.expanduser(root))
    if not top.is_dir():
        raise InputError(
            f"There is no folder '{os.path.abspath(top)}': DATA_ROOT must be a folder of domain folders of class "
            "folders of images."
        )
    while len(inner := _folders(top)) == 1 and not _is_domain(top / inner[0]):
        top = top / inner[0]
    if len(inner) < 2:
        found = f"only the domain '{inner[0]}'" if inner else "no domain folders"
        raise InputError(f"There is {found} in '{given}': leave-one-domain-out needs two domain folders or more.")
    images = {domain: {label: _images(top / domain / label) for label in _folders(top / domain)} for domain in inner}
    class_names = sorted({label for classes in images.values() for label in classes})
    if not class_names:
        raise InputError(f"The folders in '{given}' hold no class folders; expected is domain/class/image.")
    for domain in inner:
        for label in class_names:
            if label not in images[domain]:
                raise InputError(f"Domain '{domain}' in '{given}' lacks the class '{label}' that other domains have.")
            if not images[domain][label]:
                raise InputError(f"The class folder '{domain}/{label}' in '{given}' holds no images.")
    rows = [(d, c, file) for d, x in enumerate(inner) for c, y in enumerate(class_names) for file in images[x][y]]
    return ImageDataset(
        name=top.resolve().name,
        root=top,
        files=tuple(f"{inner[d]}/{class_names[c]}/{file}" for d, c, file in rows),
        labels=torch.tensor([c for _, c, _ in rows]),
        domains=torch.tensor([d for d, _, _ in rows]),
        class_names=tuple(class_names),
        domain_names=tuple(inner),
    )


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"  # the latter: resource forks in archives made on a Mac


def _folders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if not _hidden(entry.name) and entry.is_dir())


def _images(folder: Path) -> list[str]:
    known = image_extensions()
    with os.scandir(folder) as entries:
        found = (entry for entry in entries if os.path.splitext(entry.name)[1].lower() in known)
        return sorted(entry.name for entry in found if not _hidden(entry.name) and _is_file(entry))


def _is_file(entry: os.DirEntry) -> bool:
    """Also a link that leads nowhere: somebody meant an image, and `check_images` lists it with the unreadable."""
    try:
        return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))
    except OSError:  # links in a circle
        return True


def _is_domain(folder: Path) -> bool:
    """Whether folders of images lie in it."""
    return any(_images(folder / name) for name in _folders(folder))


def load_image(file: str | os.PathLike | io.BytesIO) -> Image.Image:
    """Read an image as RGB, upright by its EXIF orientation; of several frames the first.

    Colours are those of ``convert("RGB")``, as in DomainBed and torchvision's ``ImageFolder``: grey is repeated,
    transparency is dropped (the stored colour shows; nothing is blended). Where ``convert`` would clip, values
    are scaled instead: 16-bit grey by 1/257; floating point by 255 if it lies in [0, 1], else [0, 255] is expected.

    Raises:
        ValueError: 32-bit or floating-point values in another range. Pillow's own errors: not a whole image.
    """
    with Image.open(file) as image:
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode == "I" or image.mode.startswith("I;16"):
            return _from_values(np.asarray(image), 65535)
        if image.mode == "F":
            values = np.asarray(image)
            return _from_values(values, 1 if values.max() <= 1 else 255)
        if image.mode in ("P", "PA", "RGBa", "La"):  # by way of RGBA: the same colours, without a warning
            image = image.convert("RGBA")
        return image.convert("RGB")


def _from_values(values: np.ndarray, top: int) -> Image.Image:
    """Grey values in [0, top] -> RGB image."""
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= top):
        raise ValueError(f"grey values from {low} to {high} where 0 to {top} is expected")
    return Image.fromarray(np.rint(values * (255.0 / top)).astype(np.uint8)).convert("RGB")


def split(
    files: Sequence[str],
    labels: Tensor,
    domains: Tensor,
    domain_names: Sequence[str],
    class_names: Sequence[str],
    seed: int | None = None,
    out_fraction: float | None = None,
) -> Tensor:
    """The one split of each domain, stratified by class: bool ``[N]``, True = `in`, False = `out`.

    Every domain and class is drawn on its own, from its names and the seed alone. So neither the order of the
    rows nor the presence of other domains matters. `out` gets ``floor(n · out_fraction + 0.5)`` of a class's n
    images, but never its last one.

    Args:
        files: unique name of each row.
        labels, domains: int64 ``[N]``.
        domain_names, class_names: names they point to.
        seed, out_fraction: defaults `config.SPLIT_SEED` and `config.OUT_FRACTION`.

    Raises:
        InputError: a domain is too small to have any `out` images.
    """
    seed = config.SPLIT_SEED if seed is None else seed
    fraction = config.OUT_FRACTION if out_fraction is None else out_fraction
    inside = torch.ones(len(files), dtype=torch.bool)
    for d, domain in enumerate(domain_names):
        for c, label in enumerate(class_names):
            rows = ((domains == d) & (labels == c)).nonzero().flatten().tolist()
            rows.sort(key=files.__getitem__)
            digest = hashlib.sha256(f"{seed}/{domain}/{label}".encode()).digest()
            order = np.random.default_rng(int.from_bytes(digest, "big")).permutation(len(rows))
            count = max(0, min(int(len(rows) * fraction + 0.5), len(rows) - 1))
            inside[[rows[i] for i in order[:count]]] = False
        if not (~inside[domains == d]).any():
            raise InputError(
                f"Domain '{domain}' has too few images for a validation part of {fraction:g} of each class."
            )
    return inside


def check_images(
    dataset: ImageDataset,
    cache_dir: str | os.PathLike,
    workers: int | None = None,
    verify: bool = False,
    progress: bool = True,
) -> tuple[list[str], list[str]]:
    """Read every image once: SHA-256 of each file and of each decoded image (size and RGB bytes), in row order.

    Both are remembered in `cache_dir` by size and modification time, so that an unchanged tree is known again
    without reading it. Files younger than two seconds are not remembered.

    Args:
        workers: threads (Pillow decodes outside Python's lock); default one per core, at most 16.
        verify: read all again, whatever is remembered.
        progress: show a progress bar while reading.

    Raises:
        InputError: images that cannot be read; all of them are listed.
    """
    memo_file = Path(cache_dir) / f"images_{_sha256(os.path.abspath(dataset.root).encode())[:16]}.json"
    memo = {} if verify else _read_memo(memo_file)
    stats = {file: _size_and_time(dataset.root / file) for file in dataset.files}
    known = {file: memo[file] for file in dataset.files if file in memo and tuple(memo[file][:2]) == stats[file]}
    todo = [file for file in dataset.files if file not in known]
    unreadable, young = [], set()
    try:
        for file, digests in _read_all(dataset.root, todo, workers or default_workers(), progress):
            if digests.problem:
                unreadable.append(f"{file} ({digests.problem})")
                continue
            known[file] = [*stats[file], digests.content, digests.pixels]
            if digests.started - stats[file][1] <= RACY_NS:
                young.add(file)
    finally:  # what was read before an interruption need not be read again
        if todo:
            _write_memo(memo_file, {file: known[file] for file in sorted(known.keys() - young)})
    if unreadable:
        raise InputError(
            f"{len(unreadable)} of {len(dataset)} images in '{dataset.root}' cannot be read; repair or remove "
            f"them: {', '.join(unreadable)}."
        )
    return [known[file][2] for file in dataset.files], [known[file][3] for file in dataset.files]


def default_workers() -> int:
    """One per core this process may use, at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 16)


def free_memory() -> float:
    """Bytes that programs may still use without swapping; infinite where the system does not say (not Linux)."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return math.inf


def _size_and_time(path: Path) -> tuple[int, int]:
    try:
        stat = os.stat(path)
    except OSError:
        return -1, 0  # never remembered: reading it says what is wrong
    return stat.st_size, stat.st_mtime_ns


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class _Digests(NamedTuple):
    started: int  # time of reading, ns since the epoch
    content: str = ""
    pixels: str = ""
    problem: str = ""


def _digests(path: Path) -> _Digests:
    started = time.time_ns()
    try:
        data = path.read_bytes()
        image = load_image(io.BytesIO(data))
    except Exception as error:  # Pillow's decoders raise anything from SyntaxError to struct.error
        return _Digests(started, problem=problem_of(error, path))
    pixels = f"{image.width}x{image.height} ".encode() + image.tobytes()
    return _Digests(started, _sha256(data), _sha256(pixels))


def problem_of(error: Exception, path: Path) -> str:
    """Why an image cannot be read, in words that do not name it again."""
    if isinstance(error, OSError) and error.strerror:
        return "a link that leads nowhere" if path.is_symlink() else error.strerror
    text = re.sub(r" <_io\.BytesIO[^>]*>", "", " ".join(str(error).split()))
    return text.replace(f" {str(path)!r}", "") or type(error).__name__


def _read_all(root: Path, files: list[str], workers: int, progress: bool) -> Iterator[tuple[str, _Digests]]:
    from tqdm.auto import tqdm

    pool = ThreadPoolExecutor(workers)
    try:
        results = pool.map(_digests, [root / file for file in files])
        quiet = {} if progress and files else {"disable": True}  # else as TQDM_DISABLE in the environment says
        bar = tqdm(results, "checking images", len(files), unit="img", **quiet)
        yield from zip(files, bar, strict=True)
    finally:
        pool.shutdown(cancel_futures=True)  # or Ctrl-C would wait for all that is queued


def _memo_version() -> list:
    return [DECODING_VERSION, pillow_version]  # another decoder may give other pixels


def _read_memo(file: Path) -> dict[str, list]:
    try:
        memo = json.loads(file.read_text())
        return memo["files"] if memo["version"] == _memo_version() else {}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError):
        log.warning("%s is damaged; reading all images again", file)
        return {}


def _write_memo(file: Path, files: dict[str, list]) -> None:
    with whole(file) as temporary:
        temporary.write_text(json.dumps({"version": _memo_version(), "files": files}))
