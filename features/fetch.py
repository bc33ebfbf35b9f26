"""Gets a known data set: from the Hugging Face hub, or from archives and folders as they are distributed.

Whatever the source, images are written to ``OUTPUT/domain/class/file``, each whole or not at all. No path of an archive
is ever used as one: a file's place is made of a known domain, the name of its class folder and its own name.
"""

import hashlib
import io
import json
import lzma
import os
import tarfile
import textwrap
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from logging import getLogger
from pathlib import Path
from typing import NamedTuple

from config import InputError
from dataset import (
    ImageDataset,
    find_dataset,
    hidden,
    image_extensions,
    images_below,
    import_pyarrow,
    open_image,
    parquet_files,
    parquet_rows,
)
from features.catalogue import KnownSet, known_set
from storage import atomic_write

log = getLogger(__name__)

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
SPLITS = ("train", "val", "crossval", "test", "full")  # folders between domain and class, kept in the files' names
BETWEEN = ("images",)  # others, which say nothing
SHOWN = 8  # differences in a message


class Member(NamedTuple):
    """An image of a source: the folders above it and its name, its size in bytes, its bytes."""

    parts: tuple[str, ...]
    size: int
    read: Callable[[], bytes]


def fetch_dataset(
    name: str,
    output: str | os.PathLike,
    sources: Sequence[str | os.PathLike] = (),
    any_counts: bool = False,
    progress: bool = True,
) -> ImageDataset:
    """Write a known data set to a folder, in the layout that `dataset.find_dataset` reads.

    What an interrupted call has written is not written again.

    Args:
        name: of a known data set, see `features.known_sets`.
        output: created if missing; what is in it is kept.
        sources: archives (zip, tar), folders, Parquet files, and lists or annotations of the images, as the set is
            distributed; a folder may also hold these. Without any, the Hugging Face hub.
        any_counts: accept other numbers of images than the known ones.

    Raises:
        InputError: an unknown data set; one that is not on the hub, without sources; no network, no pyarrow; a source
            that is missing, damaged, or holds no image of the set; two different images for one place; other numbers
            of images by domain and class than are known.
        WriteError: for example because the disk is full.
    """
    known, output = known_set(name), Path(os.path.expanduser(output))
    given = [Path(os.path.expanduser(source)) for source in sources] or [_from_hub(known)]
    for source in given:
        if not source.exists():
            raise InputError(f"There is no file or folder '{source}' to take {known.name} from.")
        if source.resolve() == output.resolve():
            raise InputError(f"'{source}' cannot be both the source and the output: give another --output.")
    if not _write_all(known, [part for source in given for part in _parts_of(known, source)], output, progress):
        raise InputError(
            f"There are no images of {known.name} in {', '.join(map(repr, map(str, given)))}: expected are, at any "
            f"depth, the folders {', '.join(known.domains)} with folders of classes."
        )
    edition, different = known.edition(_counts(output))
    if different:
        more = f", and {len(different) - SHOWN} more" if len(different) > SHOWN else ""
        sentence = f"'{output}' does not hold the known numbers of images ({'; '.join(different[:SHOWN])}{more})"
        if not any_counts:
            raise InputError(f"{sentence}: add what is missing with another --from, or accept them with --any-counts.")
        log.warning("%s.", sentence)
    else:
        log.info("The numbers of images are the known ones (%s).", edition)
    return find_dataset(output)


def _from_hub(known: KnownSet) -> Path:
    """The folder of a data set's Parquet files in the hub's cache, downloaded if need be."""
    if known.hub is None:
        raise InputError(
            f"{known.name} is not on the hub: fetch it by hand from {known.source}, and give the archive or folder "
            "with --from."
        )
    from huggingface_hub import snapshot_download

    import_pyarrow()  # before a long download
    try:
        return Path(snapshot_download(known.hub, repo_type="dataset", allow_patterns=["*.parquet"]))
    except Exception as error:  # the client's library is not ours to name
        why = textwrap.shorten(str(error).partition("\n")[0].rstrip("."), 200, placeholder=" …")
        raise InputError(
            f"{known.name} cannot be downloaded from the hub ({why}): give the same command again when the network is "
            f"there, or fetch it elsewhere ({known.source}) and give the archive or folder with --from."
        ) from error


def _parts_of(known: KnownSet, source: Path) -> Iterator[Path]:
    """A source, and what lies in it if it is a folder: archives, and what says which images belong to the set."""
    yield source
    if source.is_dir() and not parquet_files(source):
        for path in sorted(source.iterdir()):
            if path.name.endswith(ARCHIVES) or _is_annotation(known, path) or _is_list(known, path):
                yield path


def _is_annotation(known: KnownSet, path: Path) -> bool:
    return known.annotations and path.name.endswith((".json", ".json.zip"))


def _is_list(known: KnownSet, path: Path) -> bool:
    domain, _, split = path.stem.rpartition("_")
    return known.lists and path.suffix == ".txt" and split in SPLITS and known.domain_of(domain) is not None


def _write_all(known: KnownSet, sources: Sequence[Path], output: Path, progress: bool) -> int:
    """Write the images of all sources that are not there yet; returns how many belong to the set."""
    from tqdm.auto import tqdm

    annotated = _annotated(known, [path for path in sources if _is_annotation(known, path)])
    listed = _listed(known, [path for path in sources if _is_list(known, path)])
    images = [path for path in sources if not _is_annotation(known, path) and not _is_list(known, path)]
    sizes: dict[tuple[str, str, str], int] = {}
    splits: dict[tuple[str, str, bytes], str] = {}
    passed_over = 0
    quiet = {} if progress else {"disable": True}  # otherwise the environment's TQDM_DISABLE decides
    with tqdm(total=known.images, desc=known.name, unit="img", **quiet) as bar:
        for member in (member for source in images for member in _members(source)):
            places = annotated.get(member.parts[-1], []) if annotated else _places(known, member.parts, listed)
            passed_over += not places
            for domain, label, split in places:
                data = None
                if split:  # one image may lie in several, such as all of `train` in `full`
                    data = member.read()
                    if splits.setdefault((domain, label, hashlib.sha256(data).digest()), split) != split:
                        continue
                place = (domain, label, f"{split}_{member.parts[-1]}" if split else member.parts[-1])
                if sizes.setdefault(place, member.size) != member.size:
                    name = "/".join(place)
                    raise InputError(f"The sources hold two different images '{name}': give one of them at a time.")
                _write(output.joinpath(*place), member, data)
                bar.update()
    if passed_over:
        log.info("Passed over, as no part of %s: %d images.", known.name, passed_over)
    return len(sizes)


def _write(target: Path, member: Member, data: bytes | None) -> None:
    """Write an image, whose bytes may have been read already, unless a file of its size is there."""
    if not target.is_file() or target.stat().st_size != member.size:
        data = member.read() if data is None else data
        with atomic_write(target, durable=False) as temporary:
            temporary.write_bytes(data)


def _places(known: KnownSet, parts: tuple[str, ...], listed: dict[str, set]) -> list[tuple[str, str, str]]:
    """Domain, class and split of an image by the folders above it; none if it does not belong to the set."""
    *folders, file = parts
    if any(map(hidden, parts[1:])) or len(folders) < 2 or (label := known.class_of(folders.pop())) is None:
        return []
    split = ""
    if folders[-1].casefold() in SPLITS:
        split = folders.pop().casefold()
    elif folders[-1].casefold() in BETWEEN:
        folders.pop()
    domain = known.domain_of(folders[-1]) if folders else None
    if domain is None or (domain in listed and (label, file) not in listed[domain]):
        return []
    return [(domain, label, split)]


def _listed(known: KnownSet, paths: Iterable[Path]) -> dict[str, set[tuple[str, str]]]:
    """Domain -> class and file of all its images, from lists with lines such as ``domain/class/file.jpg 17``."""
    listed: dict[str, set[tuple[str, str]]] = {}
    for path in paths:
        try:
            lines = path.read_text("utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise InputError(f"'{path}' is no list of images: it is not text in UTF-8.") from error
        for line in lines:
            *_, domain, label, file = ("", "", *line.rpartition(" ")[0].split("/"))
            if (name := known.domain_of(domain)) is None:
                raise InputError(f"'{path}' has the line '{line}': expected are lines like 'domain/class/file.jpg 17'.")
            listed.setdefault(name, set()).add((label, file))
    return listed


def _annotated(known: KnownSet, paths: Iterable[Path]) -> dict[str, list[tuple[str, str, str]]]:
    """File -> its places, from annotations as for COCO whose images have a `location`, which is the domain."""
    places: dict[str, dict[tuple[str, str, str], None]] = {}
    for path in paths:
        try:
            notes = json.loads(_text(path))
            classes = {entry["id"]: known.class_of(entry["name"]) for entry in notes["categories"]}
            images = {entry["id"]: entry for entry in notes["images"]}
            for note in notes["annotations"]:
                image, label = images[note["image_id"]], classes[note["category_id"]]
                if label and (domain := known.domain_of(f"location_{image['location']}")):
                    places.setdefault(Path(image["file_name"]).name, {})[domain, label, ""] = None
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"'{path}' does not hold annotations of camera traps: {error!r} is wrong.") from error
    return {file: [*found] for file, found in places.items()}


def _text(path: Path) -> bytes:
    """A file; of an archive, the one JSON file in it."""
    if path.suffix != ".zip":
        return path.read_bytes()
    with _archive_errors(path), zipfile.ZipFile(path) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".json") and not name.startswith("__MACOSX"))
        return archive.read(name)


def _members(source: Path) -> Iterator[Member]:
    """The images of a source, whose own name stands above them as a folder."""
    if parquet_files(source):
        return _rows(source)
    if source.is_dir():
        return _files(source)
    if zipfile.is_zipfile(source):
        return _zipped(source)
    if source.is_file() and tarfile.is_tarfile(source):
        return _tarred(source)
    raise InputError(f"'{source}' is no folder, and no archive or Parquet file that can be read.")


def _files(folder: Path) -> Iterator[Member]:
    for path in images_below(folder):
        parts = (folder.resolve().name, *path.relative_to(folder).parts)
        yield Member(parts, path.stat().st_size, path.read_bytes)


def _rows(source: Path) -> Iterator[Member]:
    rows = parquet_rows(source)
    mark = f"{source.stem}_" if source.is_file() else ""  # one of several files, each of which numbers its own rows
    for row, file in enumerate(rows.files):
        try:
            data = rows.read(row)
            with open_image(io.BytesIO(data)) as image:
                ending = {"JPEG": "jpg"}.get(image.format, image.format.lower())
        except OSError as error:
            raise InputError(f"Row {row} of '{source}' is no image that can be read.") from error
        parts = (source.name, *file.split("/")[:-1], f"{mark}{row:08d}.{ending}")
        yield Member(parts, len(data), lambda data=data: data)


def _zipped(path: Path) -> Iterator[Member]:
    with _archive_errors(path), zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            parts = _names(path, info.filename)
            if _is_image(parts) and not info.is_dir():
                yield Member(parts, info.file_size, _reader(path, lambda info=info: archive.read(info)))


def _tarred(path: Path) -> Iterator[Member]:
    with _archive_errors(path), tarfile.open(path) as archive:
        for info in archive:
            parts = _names(path, info.name)
            if _is_image(parts) and info.isreg():
                yield Member(parts, info.size, _reader(path, lambda info=info: archive.extractfile(info).read()))


def _names(archive: Path, name: str) -> tuple[str, ...]:
    """The folders above a file in an archive and its own name; first of all the archive's."""
    inner = (part for part in name.replace("\\", "/").split("/") if part not in ("", "."))
    return (archive.name.partition(".")[0], *inner)


def _is_image(parts: tuple[str, ...]) -> bool:
    return os.path.splitext(parts[-1])[1].lower() in image_extensions()


def _reader(path: Path, read: Callable[[], bytes]) -> Callable[[], bytes]:
    def reader() -> bytes:
        with _archive_errors(path):
            return read()

    return reader


@contextmanager
def _archive_errors(path: Path) -> Iterator[None]:
    """One sentence for what the libraries raise on an archive that is damaged, cut off or encrypted."""
    try:
        yield
    except (
        zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError, RuntimeError
    ) as error:  # fmt: skip
        raise InputError(f"The archive '{path}' cannot be read to its end ({error}): fetch it again.") from error


def _counts(output: Path) -> dict[str, dict[str, int]]:
    """Images by domain and class."""
    found: dict[str, dict[str, int]] = {}
    for path in images_below(output):
        if len(parts := path.relative_to(output).parts) == 3:
            found.setdefault(parts[0], {}).setdefault(parts[1], 0)
            found[parts[0]][parts[1]] += 1
    return found
