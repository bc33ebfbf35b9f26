"""Image folders in the layout of PACS: discovery, checks, reading of images, and the one in/out split.

The layout is ``root/domain/class/image``. Domains and classes are found, not listed anywhere: any number of both,
classes matched by name across domains.
"""

import hashlib
import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from config import InputError

# Pillow also registers formats that are not photographs (.pdf, .mpg, .hdf, .ico, …).
IMAGE_FORMATS = frozenset(
    ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "QOI", "SGI", "TGA", "TIFF", "WEBP")
)
DECODING_VERSION = 1  # raise it when `load_image` gives other pixels than before: caches are then made again


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """A folder of images, its rows sorted by domain, class and file name."""

    name: str  # of `root`
    root: Path  # folder of the domain folders
    files: tuple[str, ...]  # "domain/class/file.jpg" per row, relative to `root`
    labels: Tensor  # int64 [N], index into `class_names`
    domains: Tensor  # int64 [N], index into `domain_names`
    class_names: tuple[str, ...]  # sorted, as the others
    domain_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)


@cache
def image_extensions() -> frozenset[str]:
    """File endings taken for images, in lower case: those of `IMAGE_FORMATS` that the installed Pillow can read."""
    known = Image.registered_extensions()
    return frozenset(ending for ending, kind in known.items() if kind in IMAGE_FORMATS and kind in Image.OPEN)


def find_dataset(root: str | os.PathLike) -> ImageDataset:
    """Find domains, classes and images below `root`.

    A folder that only wraps the real root (``pacs_data/pacs_data/photo/dog/x.jpg``) is stepped through. Hidden
    files and folders, and files without the ending of an image, are skipped.

    Raises:
        InputError: no such folder, fewer than two domains, a domain that lacks a class others have, an empty class, a
            name with a backslash or with bytes that are no UTF-8.
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
    for name in (*inner, *class_names):
        if re.search(r"[\\\ud800-\udfff]", name):  # the last stand for bytes that are no UTF-8
            raise InputError(f"Rename the folder {name!r} in '{given}': its name has a backslash, or is no UTF-8.")
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
    """Also true of a broken link: an image was meant, and `features` lists it among the unreadable ones."""
    try:
        return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))
    except OSError:  # links in a circle
        return True


def images_below(folder: str | os.PathLike) -> list[Path]:
    """Images at any depth below a folder, sorted by path. Hidden files and folders are skipped."""
    found, seen, todo = [], set(), [Path(folder)]
    while todo:
        top = todo.pop()
        if (real := top.resolve()) not in seen:  # links may lead in a circle
            seen.add(real)
            found += [top / name for name in _images(top)]
            todo += [top / name for name in _folders(top)]
    return sorted(found)


def _is_domain(folder: Path) -> bool:
    """Whether it contains folders of images."""
    return any(_images(folder / name) for name in _folders(folder))


def load_image(file: str | os.PathLike | io.BytesIO) -> Image.Image:
    """Read an image as RGB, upright by its EXIF orientation; the first of several frames.

    Colours are those of ``convert("RGB")``, as in DomainBed and torchvision's ``ImageFolder``: grey is repeated,
    transparency is dropped (the stored colour shows; nothing is blended). Where ``convert`` would clip, values
    are scaled instead: 16-bit grey by 1/257; floating point by 255 if it lies in [0, 1], else [0, 255] is expected.

    Raises:
        ValueError: 32-bit or floating-point values in another range.
        Exception: Pillow's own errors, for a damaged or incomplete image.
    """
    with Image.open(file) as image:
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode == "I" or image.mode.startswith("I;16"):
            return _from_values(np.asarray(image), 65535)
        if image.mode == "F":
            return _from_values(np.asarray(image), 1 if np.max(image) <= 1 else 255)
        if image.mode in ("P", "PA", "RGBa", "La"):  # via RGBA: the same colours, without a warning
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
    seed: int,
    out_fraction: float,
) -> Tensor:
    """The in/out split of each domain, stratified by class: bool ``[N]``, True = `in`, False = `out`.

    Every class of every domain is split separately, depending only on its names and the seed. So neither the order of
    the rows nor the presence of other domains matters. `out` gets ``floor(n · out_fraction + 0.5)`` of a class's n
    images, but never all of them.

    Args:
        files: unique name of each row.
        labels, domains: int64 ``[N]``, indices into `class_names` and `domain_names`.
        seed: of the random split.
        out_fraction: part of each class that is `out`, between 0 and 1.

    Raises:
        InputError: a domain is too small to have any `out` images.
    """
    inside = torch.ones(len(files), dtype=torch.bool)
    cells = domains * len(class_names) + labels
    counts = torch.bincount(cells, minlength=len(domain_names) * len(class_names)).tolist()
    cell = iter(cells.argsort(stable=True).split(counts))
    for domain in domain_names:
        for label in class_names:
            rows = sorted(next(cell).tolist(), key=files.__getitem__)
            digest = hashlib.sha256(f"{seed}/{domain}/{label}".encode()).digest()
            order = np.random.default_rng(int.from_bytes(digest, "big")).permutation(len(rows))
            count = max(0, min(int(len(rows) * out_fraction + 0.5), len(rows) - 1))
            inside[[rows[i] for i in order[:count]]] = False
        if not (~inside[domains == domain_names.index(domain)]).any():
            raise InputError(
                f"Domain '{domain}' has too few images for a validation part of {out_fraction:g} of each class."
            )
    return inside
