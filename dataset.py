"""Data sets of images: discovery, checks, reading of images, and the one in/out split.

They are folders in the layout of PACS, ``root/domain/class/image``, or Parquet files with the columns ``image``,
``domain`` and ``label``, as on the Hugging Face hub. Domains and classes are found, not listed anywhere: any number of
both, classes matched by name across domains.
"""

import bisect
import hashlib
import io
import json
import os
import re
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
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

    def path(self, row: int) -> Path:
        """The file on disk that holds the image of a row."""
        return self.root / self.files[row]

    def read(self, row: int) -> bytes:
        """The encoded image of a row, for `load_image`; from any thread or process.

        Raises:
            OSError: the file is gone, or cannot be read.
        """
        return self.path(row).read_bytes()


@dataclass(frozen=True, eq=False)
class ParquetDataset(ImageDataset):
    """Images in the rows of Parquet files, which are read a row group at a time. Rows are in the order of the files.

    `files` are made-up names, "domain/class/00000123" with the number of the row.
    """

    groups: tuple[tuple[Path, int], ...]  # file and number of each row group
    starts: tuple[int, ...]  # its first row

    def path(self, row: int) -> Path:
        return self.groups[self._group(row)][0]

    def read(self, row: int) -> bytes:
        group = self._group(row)
        path, number = self.groups[group]
        with _LOCK:  # threads wait for one that reads their group, instead of reading it again
            images = _images_of_group(path, number, path.stat().st_mtime_ns)
        image = images[row - self.starts[group]].as_py()
        if isinstance(image, dict):
            image = image["bytes"]
        if image is None:
            raise OSError(f"row {row} holds no bytes of an image")
        return image

    def classes(self) -> dict[str, set[str]]:
        """The classes of each domain."""
        cells = {tuple(file.split("/")[:2]) for file in self.files}
        return {domain: {label for other, label in cells if other == domain} for domain in self.domain_names}

    def _group(self, row: int) -> int:
        return bisect.bisect_right(self.starts, row) - 1


_LOCK = threading.Lock()


@lru_cache(maxsize=2)  # rows are read in order, by threads a little apart
def _images_of_group(path: Path, group: int, _changed: int):
    """The column of images of a row group; `_changed` is the time of the file's last change."""
    pyarrow = import_pyarrow()
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            return file.read_row_group(group, columns=["image"], use_threads=False).column("image")
    except pyarrow.ArrowException as error:
        raise OSError(f"row group {group} of '{path.name}' is damaged: {error}") from error


@cache
def image_extensions() -> frozenset[str]:
    """File endings taken for images, in lower case: those of `IMAGE_FORMATS` that the installed Pillow can read."""
    known = Image.registered_extensions()
    return frozenset(ending for ending, kind in known.items() if kind in IMAGE_FORMATS and kind in Image.OPEN)


def find_dataset(root: str | os.PathLike) -> ImageDataset:
    """Find domains, classes and images below `root`, or in Parquet files.

    A folder that only wraps the real root (``pacs_data/pacs_data/photo/dog/x.jpg``) is stepped through. Hidden
    files and folders, and files without the ending of an image, are skipped.

    Args:
        root: folder of domain folders of class folders of images; or a Parquet file, a folder of these, or one whose
            folder `data` holds them. Of these `image` is a column of bytes, or of structures that have `bytes`;
            `domain` and `label` are words, or numbers (whose names, where there are any, the file says as `datasets`
            writes them). They need the package pyarrow.

    Raises:
        InputError: no such folder, fewer than two domains, a domain that lacks a class others have, an empty class, a
            name with a backslash or with bytes that are no UTF-8; Parquet files without these columns, or that are
            damaged; no pyarrow.
    """
    given, top = root, Path(os.path.expanduser(root))
    if parquet_files(top):
        rows = parquet_rows(top)
        _check_domains(rows.domain_names, given)
        _check_classes(rows.classes(), rows.class_names, given)
        return rows
    if not top.is_dir():
        raise InputError(
            f"There is no folder '{os.path.abspath(top)}': DATA_ROOT must be a folder of domain folders of class "
            "folders of images, or of Parquet files."
        )
    while len(inner := folders(top)) == 1 and not _is_domain(top / inner[0]):
        top = top / inner[0]
    _check_domains(inner, given)
    images = {domain: {label: images_in(top / domain / label) for label in folders(top / domain)} for domain in inner}
    class_names = sorted({label for classes in images.values() for label in classes})
    if not class_names:
        raise InputError(f"The folders in '{given}' hold no class folders; expected is domain/class/image.")
    for name in (*inner, *class_names):
        if re.search(r"[\\\ud800-\udfff]", name):  # the last stand for bytes that are no UTF-8
            raise InputError(f"Rename the folder {name!r} in '{given}': its name has a backslash, or is no UTF-8.")
    _check_classes(images, class_names, given)
    for domain in inner:
        for label in class_names:
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


def _check_domains(found: Sequence[str], given: str | os.PathLike) -> None:
    if len(found) < 2:
        words = f"only the domain '{found[0]}'" if found else "no domain"
        raise InputError(f"There is {words} in '{given}': leave-one-domain-out needs two domains or more.")


def _check_classes(found: Mapping[str, Collection[str]], class_names: Sequence[str], given: str | os.PathLike) -> None:
    """Raise an `InputError` if a domain lacks a class that another has."""
    for domain, own in found.items():
        for label in class_names:
            if label not in own:
                raise InputError(f"Domain '{domain}' in '{given}' lacks the class '{label}' that other domains have.")


def parquet_files(top: Path) -> list[Path]:
    """The Parquet files that a path stands for: itself, or those in the folder or in its folder `data`, by name."""
    if top.suffix == ".parquet" and top.is_file():
        return [top]
    for folder in (top, top / "data"):
        if found := sorted(path for path in folder.glob("*.parquet") if not hidden(path.name)):
            return found
    return []


def parquet_rows(top: Path) -> ParquetDataset:
    """The images in the rows of Parquet files, also where a domain lacks a class; errors as of `find_dataset`."""
    columns, groups, starts, count = {"domain": [], "label": []}, [], [], 0
    pyarrow = import_pyarrow()
    for path in parquet_files(top):
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                _check_columns(file.schema_arrow, path)
                for name, words in columns.items():
                    words += _words(file, name, path)
                for group in range(file.num_row_groups):
                    groups.append((path, group))
                    starts.append(count)
                    count += file.metadata.row_group(group).num_rows
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError(f"'{path}' cannot be read: {error}.") from error
    rows = list(zip(*columns.values(), strict=True))
    domains, labels = ({name: number for number, name in enumerate(sorted({*words}))} for words in columns.values())
    return ParquetDataset(
        name=top.resolve().name.removesuffix(".parquet"),
        root=top,
        files=tuple(f"{domain}/{label}/{row:08d}" for row, (domain, label) in enumerate(rows)),
        labels=torch.tensor([labels[label] for _, label in rows]),
        domains=torch.tensor([domains[domain] for domain, _ in rows]),
        class_names=tuple(labels),
        domain_names=tuple(domains),
        groups=tuple(groups),
        starts=tuple(starts),
    )


def _check_columns(schema, path: Path) -> None:
    """Raise an `InputError` if a Parquet file has not the columns of a data set."""
    for name in ("image", "domain", "label"):
        if name not in schema.names:
            raise InputError(f"'{path}' has no column '{name}' among {', '.join(schema.names)}: rename the one meant.")
    kind = str(schema.field("image").type)
    if not re.match(r"(large_)?binary|struct<.*\bbytes: (large_)?binary", kind):
        raise InputError(f"The column 'image' of '{path}' is {kind}: expected are bytes, or structures with 'bytes'.")


def _words(file, name: str, path: Path) -> list[str]:
    """A column of a Parquet file as words: numbers by the names that `datasets` notes in the file."""
    noted = (file.schema_arrow.metadata or {}).get(b"huggingface", b"{}")
    try:
        names = dict(enumerate(json.loads(noted)["info"]["features"][name]["names"]))
    except (ValueError, KeyError, TypeError):  # none are noted
        names = {}
    values = file.read([name]).column(name).to_pylist()
    words = [names.get(value) if names and isinstance(value, int) else value for value in values]
    for row, word in enumerate(words):
        if not isinstance(word, str | int) or re.search(r"^\W*$|[/\\\0\r\n]", str(word)):
            raise InputError(f"The {name} of row {row} of '{path}' is {values[row]!r}, which is no name of a folder.")
    return [*map(str, words)]


def import_pyarrow():
    """The package pyarrow, with what reads Parquet files; an `InputError` says what to install where it is missing."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise InputError("Parquet files need the package pyarrow: pip install pyarrow.") from error
    return pyarrow


def hidden(name: str) -> bool:
    """Whether files and folders of that name are passed over."""
    return name.startswith(".") or name == "__MACOSX"  # the latter: resource forks in archives made on a Mac


def folders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted, without hidden ones."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if not hidden(entry.name) and entry.is_dir())


def images_in(folder: Path) -> list[str]:
    """Names of the images in a folder, sorted, without hidden ones."""
    known = image_extensions()
    with os.scandir(folder) as entries:
        found = (entry for entry in entries if os.path.splitext(entry.name)[1].lower() in known)
        return sorted(entry.name for entry in found if not hidden(entry.name) and _is_file(entry))


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
            found += [top / name for name in images_in(top)]
            todo += [top / name for name in folders(top)]
    return sorted(found)


def _is_domain(folder: Path) -> bool:
    """Whether it contains folders of images."""
    return any(images_in(folder / name) for name in folders(folder))


def open_image(file: str | os.PathLike | io.BytesIO) -> Image.Image:
    """`PIL.Image.open` for `IMAGE_FORMATS` alone: of others, some run programs on what they find in a file."""
    Image.init()
    return Image.open(file, formats=sorted(IMAGE_FORMATS & Image.OPEN.keys()))


def load_image(file: str | os.PathLike | io.BytesIO) -> Image.Image:
    """Read an image as RGB, upright by its EXIF orientation; the first of several frames.

    Colours are those of ``convert("RGB")``, as in DomainBed and torchvision's ``ImageFolder``: grey is repeated,
    transparency is dropped (the stored colour shows; nothing is blended). Where ``convert`` would clip, values
    are scaled instead: 16-bit grey by 1/257; floating point by 255 if it lies in [0, 1], else [0, 255] is expected.

    Raises:
        ValueError: 32-bit or floating-point values in another range.
        Exception: Pillow's own errors, for a damaged or incomplete image.
    """
    with open_image(file) as image:
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
