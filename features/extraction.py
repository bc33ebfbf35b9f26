"""Runs the frozen backbone over a data set once, and caches the result so that it can be trusted.

The name of a cache file contains a hash of everything that determines the features: the model's weights and
configuration, the preprocessing, the precision, and the path and content of every image. Nothing is looked up by name
or date alone, so a file that is found is the right one. `storage.feature_file` describes its format; where blocks of
the ViT are trained, the tokens before them lie beside it (`features.tokens`).
"""

import hashlib
import io
import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from logging import getLogger
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock, Timeout
from PIL import Image
from torch import Tensor

import config
from config import InputError
from dataset import DECODING_VERSION, ImageDataset, ParquetDataset, find_dataset, load_image
from engine import default_workers, prepare_machine, rank
from features.check import check_images, image_problem, memo_path, raise_unreadable
from features.images import ImageInputs
from features.pretrained import load_extractor
from features.shards import Shards
from features.tokens import Float16OverflowError, TokenFile
from models import BackboneTail, FeatureExtractor, WholeBackbone, image_size
from storage import FORMAT_VERSION, FeatureSet, load_features, save_features

log = getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]
BUNDLED_FILE = ROOT / "data" / "pacs_vit_tiny_patch16_224.safetensors"
SHARD_ROWS = 512  # rows written at once; batches do not cross shards, so a resumed run gives the same bytes
COMPARED, SAME = 4, 0.1  # images whose features must follow from their tokens; difference that rounding can make
# Entries of a model's configuration that do not affect what it computes, or that differ between equal runs.
_CONFIG_NOISE = {"_name_or_path", "transformers_version", "architectures", "id2label", "label2id", "num_labels"}


def bundled_features() -> FeatureSet:
    """The features that come with the project: PACS images through ViT-Tiny/16, 9,991 × 192.

    Raises:
        InputError: the file is missing.
    """
    if not BUNDLED_FILE.is_file():
        raise InputError(
            f"The bundled features '{BUNDLED_FILE}' are missing: restore the file, or make it with "
            f"'python experiment.py features --data-root DIR --vit-model DIR --output {BUNDLED_FILE}'."
        )
    return load_features(BUNDLED_FILE, "bundled file")


def default_cache() -> Path:
    """`cache/` beside the code, from whatever folder it is used; the user's own cache if that cannot be written."""
    beside = ROOT / "cache"
    if os.access(beside if beside.exists() else ROOT, os.W_OK):
        return beside
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "importance-masking"


def get_features(
    data_root: str | os.PathLike | None = None,
    features_file: str | os.PathLike | None = None,
    vit_model: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    device: str | torch.device | None = None,
    verify: bool = False,
    progress: bool = True,
    blocks: int | str | None = None,
    layers: str | None = None,
    pooling: str | None = None,
    check_tail: Callable[[BackboneTail], object] = lambda tail: None,
) -> FeatureSet:
    """The features to work with: of the images in `data_root`, else of `features_file`, else the bundled ones.

    For images, what is None is read from `config`, also `EXTRACTION_BATCH_SIZE` and `EXTRACTION_WORKERS`.

    Args:
        data_root: folder of images, or of Parquet files that hold them, see `dataset.find_dataset`.
        features_file: a feature file, see `storage.load_features`; not together with `data_root`.
        vit_model: hub name or local directory, with `data_root`.
        cache_dir: see `extract`; where `config.CACHE_DIR` is None too, `default_cache`.
        verify, progress: see `extract`.
        device: where the backbone runs.
        blocks: see `extract`; default `config.TRAINED_BLOCKS`.
        layers: "last" or "all", see `models.FeatureExtractor`; default `config.FEATURE_LAYERS`.
        pooling: "auto", "cls", "mean" or "pooler", see there; default `config.POOLING`.
        check_tail: see `extract`.

    Raises:
        InputError: both are given, or the folder, the file or the model cannot be used, or there are blocks or all
            layers but no images, or both of these. The bundled features never take the place of others.
    """
    blocks = config.TRAINED_BLOCKS if blocks is None else blocks
    layers = config.FEATURE_LAYERS if layers is None else layers
    pooling = config.POOLING if pooling is None else pooling
    for setting, value in (("TRAINED_BLOCKS", blocks), ("FEATURE_LAYERS", layers), ("POOLING", pooling)):
        config.check(setting, value)
    if data_root is not None and features_file is not None:
        raise InputError("DATA_ROOT and FEATURES_FILE exclude each other: set one of them to None.")
    if blocks and data_root is None:
        raise InputError("TRAINED_BLOCKS needs DATA_ROOT: features have no tokens.")
    _check_layers(layers, blocks)
    if layers == "all" and data_root is None:
        raise InputError("FEATURE_LAYERS = 'all' needs DATA_ROOT: a file of features has the layers that it has.")
    if features_file is not None:
        return load_features(os.path.expanduser(features_file))
    if data_root is None:
        return bundled_features()
    dataset = find_dataset(data_root)
    cache_dir = cache_dir or config.CACHE_DIR or default_cache()
    device = prepare_machine(config.DEVICE) if device is None else device
    extractor = load_extractor(config.VIT_MODEL if vit_model is None else vit_model, layers, pooling).to(device)
    sizes = config.EXTRACTION_BATCH_SIZE, config.EXTRACTION_WORKERS
    options = {"verify": verify, "progress": progress, "blocks": blocks, "check_tail": check_tail}
    return extract(dataset, extractor, cache_dir, *sizes, **options)


def extract(
    dataset: ImageDataset,
    extractor: FeatureExtractor,
    cache_dir: str | os.PathLike,
    batch_size: int | None = None,
    workers: int | None = None,
    verify: bool = False,
    progress: bool = True,
    blocks: int | str = 0,
    check_tail: Callable[[BackboneTail], object] = lambda tail: None,
) -> FeatureSet:
    """Features of all images: from the cache, else by one pass of the frozen backbone, and then cached.

    An interrupted pass resumes where it stopped, to within 512 images. Processes that need the same features at the
    same time share the pass, 512 images each at a time, and make up for one that ends; the features are the same. Of
    those that `torchrun` starts, each begins with its own share, and the first alone shows a bar. If the device runs
    out of memory, the batch size is halved until a batch fits.

    Args:
        dataset: from `dataset.find_dataset`.
        extractor: the model, on the device to use; its `layers` say which features.
        cache_dir: created if missing.
        batch_size: images per forward pass, at most 512; default 256 on CUDA, 8 on a CPU.
        workers: decoding processes, 0 = threads of this process; default one per core (at most 16) on CUDA, 0 on a
            CPU.
        verify: read every image file again, even if its size and time have not changed.
        blocks: with 1 or more, the same pass also caches the tokens before so many last blocks, in float16 where it
            can hold them, and the result has `tokens` and `tail`; with "all", `tokens` are the images themselves and
            `tail` is the model. Not together with all layers.
        check_tail: raises an InputError for blocks that are of no use; called before the pass.

    Raises:
        InputError: unreadable images (all are listed: those that `check_images` finds before the pass, and those that
            only decoding finds after it, when what could be done is kept), an image that changes during the pass,
            features that are not finite, too little memory for a single image, an unusable cache folder; blocks that
            the model has not, tokens that are not finite, too little disk for them, or a damaged file of them.
    """
    config.check("EXTRACTION_BATCH_SIZE", batch_size)
    config.check("EXTRACTION_WORKERS", workers)
    config.check("TRAINED_BLOCKS", blocks)
    _check_layers(extractor.layers, blocks)
    if blocks == "all" and isinstance(dataset, ParquetDataset):
        raise InputError(
            f"The whole model is trained from images in any order, and '{dataset.name}' holds Parquet files: write "
            "folders of them first, with the command data."
        )
    folder = Path(os.path.expanduser(cache_dir))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"CACHE_DIR '{folder}' cannot be created ({error.strerror}): give another folder.") from error
    tail = None
    if blocks:
        tail = (extractor.whole() if blocks == "all" else extractor.tail(blocks)).cpu()
        check_tail(tail)
    progress = progress and not rank()[0]
    with _one_at_a_time(memo_path(dataset, folder).with_suffix(".lock")):  # one reads the images, the others its memo
        contents = check_images(dataset, folder, workers or None, verify, progress)
    header = {
        "dataset": dataset.name,
        "model": _describe_model(extractor),
        "versions": _versions(extractor),
    }
    header["preprocessing"] = extractor.preprocessing.describe()
    if (layers := extractor.describe_layers()) is not None:
        header["layers"] = layers
    name = f"{dataset.name}_{extractor.name}_{_key(dataset, contents, extractor, header)[:16]}"
    path = folder / (re.sub(r"[^\w.-]+", "_", name) + ".safetensors")
    log.info("Features are kept in '%s'.", path)
    cached = blocks not in (0, "all")
    tokens = TokenFile(path, _token_shape(dataset, extractor, blocks), blocks, extractor.name) if cached else None
    keys = partial(_shard_keys, dataset, contents, extractor, header)
    run = partial(_run, dataset, contents, extractor, batch_size=batch_size, workers=workers, progress=progress)
    _cache(path, tokens, keys, run, dataset, header)
    features = load_features(path, f"images in {dataset.name}")
    if blocks == "all":
        return _with_images(features, dataset, contents, extractor, tail)
    return features if tokens is None else _with_tokens(features, tokens, tail)


def _with_images(
    features: FeatureSet, dataset: ImageDataset, contents: list[str], extractor: FeatureExtractor, tail: WholeBackbone
) -> FeatureSet:
    """The features with the images that they are of, in the order of the features' rows, and the model."""
    size = extractor.preprocessing(load_image(io.BytesIO(dataset.read(0)))).shape[-2:]
    images = ImageInputs(dataset, extractor.preprocessing, size, contents)
    described = {"blocks": "all", "tokens": 0, "type": "uint8"}
    return replace(features, tokens=images, tail=tail, header={**features.header, "tokens": described})


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Hold a lock that other processes respect, and say so if it has to be waited for."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("Another process checks these images; waiting for it (%s).", path)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _check_layers(layers: str, blocks: int) -> None:
    if layers == "all" and blocks:
        raise InputError("FEATURE_LAYERS = 'all' and TRAINED_BLOCKS exclude each other: blocks are trained on tokens.")


def _token_shape(dataset: ImageDataset, extractor: FeatureExtractor, blocks: int) -> tuple[int, int, int]:
    """N, T, D. An image of the model's own size tells: all come out in one, also where none is resized."""
    height, width = image_size(extractor.model)
    grey = extractor.preprocessing(Image.new("RGB", (width, height), "grey"))
    return len(dataset), *extractor.tokens(grey[None], blocks)[1].shape[1:]


def _shard_keys(
    dataset: ImageDataset, contents: list[str], extractor: FeatureExtractor, header: dict
) -> dict[range, str]:
    """The rows of each shard, and a hash over what determines their features."""
    found = {}
    for start in range(0, len(dataset), SHARD_ROWS):
        rows = range(len(dataset))[start : start + SHARD_ROWS]
        part = replace(dataset, files=dataset.files[start : rows.stop])
        found[rows] = _key(part, contents[start : rows.stop], extractor, header)[:16]
    return found


def _cache(
    path: Path, tokens: TokenFile | None, keys: Callable, run: Callable, dataset: ImageDataset, header: dict
) -> None:
    """Make the file of features and the one of tokens, where they do not exist, together with other processes."""
    files = [path] if tokens is None else [path, tokens.path]
    new_tokens = tokens is not None and not tokens.path.exists()
    target, tokens = (tokens.path, tokens) if new_tokens else (path, None)
    lock = FileLock(path.with_suffix(".lock"))  # for what one process does for all
    while not target.exists():
        with lock:
            shards = _begin(path, tokens, keys())
        try:
            with _deaths_of_workers():
                run(shards, tokens)
        except Float16OverflowError as error:
            log.info("float16 cannot hold the tokens of %s: starting again in float32.", error)
            with lock:
                tokens.widen()
            continue
        with lock:
            _finish(path, tokens, shards, dataset, header)
    for file in files:
        shutil.rmtree(file.with_suffix(".parts"), ignore_errors=True)  # perhaps of a process that was killed right here


def _begin(path: Path, tokens: TokenFile | None, keys: dict[range, str]) -> Shards:
    """The shards of a pass: those that exist, also in folders of other passes, and the missing ones."""
    if tokens is None:
        shards = Shards(path, path.with_suffix(".parts"), keys)
        shards.adopt(path.parent.glob("*.parts"))
    elif tokens.path.exists():  # by now
        return Shards(tokens.path, tokens.folder, keys)
    else:
        tokens.resume()
        shards = Shards(tokens.path, tokens.folder, keys)
        tokens.reserve(sum(map(len, shards.missing())))
        shards.adopt(path.parent.glob(tokens.folders), tokens.take)
    return shards


def _finish(path: Path, tokens: TokenFile | None, shards: Shards, dataset: ImageDataset, header: dict) -> None:
    """Put the files together, unless another process has done it, or there are images that cannot be read."""
    if shards.target.exists():
        return
    raise_unreadable(dataset, shards.take_unreadable())
    if shards.missing():  # another process has just listed images that cannot be read
        return
    if not path.exists():
        features, pixels = shards.load()
        names = dataset.class_names, dataset.domain_names, dataset.files
        header = {**header, "pixels_sha256": hashlib.sha256(pixels.numpy().tobytes().hex().encode()).hexdigest()}
        save_features(path, features, dataset.labels, dataset.domains, *names, **header)
    if tokens is not None:
        tokens.finish()


def _with_tokens(features: FeatureSet, tokens: TokenFile, tail: BackboneTail) -> FeatureSet:
    values, few = tokens.load(), slice(COMPARED)
    with torch.no_grad():
        found, wanted = tail(values[few].float()), features.features[few].float()
    if not bool((found - wanted).norm() <= SAME * wanted.norm()):
        raise InputError(f"'{tokens.path}' holds tokens of another model: delete it to make it again.")
    described = {"blocks": tokens.blocks, "tokens": values.shape[1], "type": str(values.dtype).removeprefix("torch.")}
    return replace(features, tokens=values, tail=tail, header={**features.header, "tokens": described})


def _describe_model(extractor: FeatureExtractor) -> dict[str, object]:
    return {
        "name": extractor.name,
        "type": extractor.model.config.model_type,
        "feature_size": extractor.feature_size,
        "pooling": extractor.pooling,
        "weights_sha256": extractor.weights_hash(),
        "precision": extractor.precision,
    }


def _versions(extractor: FeatureExtractor) -> dict[str, str]:
    """Versions of the libraries that can change a feature."""
    from importlib.metadata import PackageNotFoundError, version

    found, names = {}, ["torch", "torchvision", "transformers", "pillow"]
    for name in (*names, "timm") if hasattr(extractor.model, "timm_model") else names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue  # torchvision is optional to transformers
    return found


def _key(dataset: ImageDataset, contents: list[str], extractor: FeatureExtractor, header: dict) -> str:
    """SHA-256 over everything that determines the features."""
    model = {key: value for key, value in header["model"].items() if key != "name"}
    if model["pooling"] == "cls":
        del model["pooling"]  # the key of a CLS token has no entry for it
    parts = {
        "versions": [FORMAT_VERSION, DECODING_VERSION],
        "model": model,
        "config": {k: v for k, v in extractor.model.config.to_dict().items() if k not in _CONFIG_NOISE},
        "preprocessing": header["preprocessing"],
        "files": list(zip(dataset.files, contents, strict=True)),
    }
    if "layers" in header:
        parts["layers"] = header["layers"]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


@contextmanager
def _deaths_of_workers() -> Iterator[None]:
    """One sentence instead of torch's page when the system ends a decoding process."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise InputError(
            "A process that decodes images was ended, most likely for lack of memory; the same command goes on, with "
            "fewer of them if EXTRACTION_WORKERS says so."
        ) from error


def _run(
    dataset: ImageDataset,
    contents: list[str],
    extractor: FeatureExtractor,
    shards: Shards,
    tokens: TokenFile | None,
    *,
    batch_size: int | None,
    workers: int | None,
    progress: bool,
) -> None:
    """Make the missing shards, until this process and others have made all."""
    from tqdm.auto import tqdm

    limit = batch_size or (256 if extractor.device.type == "cuda" else 8)  # a CPU gains nothing from larger batches
    quiet = {} if progress else {"disable": True}  # otherwise the environment's TQDM_DISABLE decides
    with shards, tqdm(total=len(dataset), initial=shards.rows_done(), desc=extractor.name, unit="img", **quiet) as bar:
        while missing := shards.missing():
            claimed = shards.claim()
            if (first := next(claimed, None)) is None:
                shards.wait(missing[0])
                bar.update(shards.rows_done() - bar.n)
                continue
            # Claimed while the images are loaded: by and by, so that others find something to do as well.
            batches = (rows[i : i + limit] for rows in chain([first], claimed) for i in range(0, len(rows), limit))
            loader = _loader(dataset, contents, extractor, batches, workers)
            limit = _fill(shards, loader, extractor, tokens, limit, bar)


def _fill(
    shards: Shards, batches: Iterable, extractor: FeatureExtractor, tokens: TokenFile | None, limit: int, bar
) -> int:
    """Save the shards whose batches come in; returns the number of images at a time that fit in memory.

    The tokens of a shard are on the disk before its features, whose file says that the shard is done. Of a shard with
    images that cannot be read, all these are found and nothing is computed any more.
    """
    computed, unreadable = [], []
    for batch in batches:
        if batch.changed:
            raise InputError(f"'{batch.changed[0]}' has changed since it was checked; run again with verify=True.")
        unreadable += batch.unreadable
        if not unreadable:
            (features, *before), limit = _forward(extractor, tokens, batch.pixels, limit, batch.files)
            if tokens is not None:
                tokens.write(batch.start, before[0], batch.files)
            computed.append((features, batch.digests))
        bar.update(len(batch.files))
        if not (rows := shards.ending(batch.start + len(batch.files))):
            continue
        if unreadable:
            shards.save_unreadable(rows, unreadable)
        else:
            if tokens is not None:
                tokens.flush()
            shards.save(rows, *map(torch.cat, zip(*computed, strict=True)))
        bar.update(shards.rows_done() - bar.n)  # what others have made
        computed, unreadable = [], []
    return limit


class _Batch(NamedTuple):
    start: int  # first row
    files: list[str]
    changed: list[str]  # images that are gone, or not the bytes from which the cache key was computed
    unreadable: list[str]  # images, each with the reason
    pixels: Tensor  # uint8 [B, 3, H, W], preprocessed; of no use if there are such images
    digests: Tensor  # uint8 [B, 32], SHA-256 of size and RGB bytes of the decoded images


class _Pixels(torch.utils.data.Dataset):
    """Indexed by a range of rows: a `_Batch`."""

    def __init__(self, dataset: ImageDataset, contents: list[str], preprocessing, threads: int = 0):
        self.dataset, self.contents, self.preprocessing = dataset, contents, preprocessing
        self.map = ThreadPoolExecutor(threads).map if threads else map

    def __getitem__(self, rows: range) -> _Batch:
        # Problems are returned, not raised: an exception in a worker process reaches this one as a page of text.
        files, read = [self.dataset.files[row] for row in rows], _of_one_shape(self.map(self._read, rows))
        changed = [file for file, found in zip(files, read, strict=True) if found is None]
        unreadable = [f"{file} ({found})" for file, found in zip(files, read, strict=True) if isinstance(found, str)]
        good = [(torch.empty(0), torch.empty(0))] if changed or unreadable else read
        return _Batch(rows.start, files, changed, unreadable, *map(torch.stack, zip(*good, strict=True)))

    def _read(self, row: int) -> tuple[Tensor, Tensor] | str | None:
        """A preprocessed image and the hash of what was decoded, or why it cannot be, or None if it has changed."""
        try:
            data = self.dataset.read(row)
        except OSError:
            return None
        if hashlib.sha256(data).hexdigest() != self.contents[row]:
            return None
        try:
            image = load_image(io.BytesIO(data))
            pixels = self.preprocessing(image)
        except Exception as error:  # Pillow's decoders raise anything from SyntaxError to struct.error
            return image_problem(error, self.dataset.path(row))
        digest = hashlib.sha256(f"{image.width}x{image.height} ".encode() + image.tobytes()).digest()
        return pixels, torch.frombuffer(bytearray(digest), dtype=torch.uint8)


def _of_one_shape(read: Iterable[tuple[Tensor, Tensor] | str | None]) -> list[tuple[Tensor, Tensor] | str | None]:
    """What `_Pixels` has read; of an image that comes out in another shape than the first, the reason."""
    found = list(read)
    shapes = [tuple(one[0].shape[1:]) if isinstance(one, tuple) else None for one in found]
    first = next((shape for shape in shapes if shape), None)
    return [
        f"{shape[1]}×{shape[0]} beside {first[1]}×{first[0]}, and the model resizes none"
        if shape not in (None, first)
        else one
        for one, shape in zip(found, shapes, strict=True)
    ]


def _loader(dataset: ImageDataset, contents: list[str], extractor: FeatureExtractor, batches: Iterator, workers):
    """Iterates over batches, decoded by processes beside a GPU, or by threads between the passes of a CPU.

    On a CPU the forward pass already uses every core: decoding processes beside it make its threads wait for one
    another, which costs more than decoding on all cores and then computing on all cores (benchmarks/extraction.py).
    """
    on_gpu = extractor.device.type == "cuda"
    if workers is None:
        workers = default_workers() if on_gpu else 0
    return torch.utils.data.DataLoader(
        _Pixels(dataset, contents, extractor.preprocessing, threads=0 if workers else default_workers()),
        batch_size=None,  # `batches` are ranges of rows already
        sampler=batches,
        num_workers=workers,
        pin_memory=on_gpu,
        worker_init_fn=_ignore_interrupts,
    )


def _ignore_interrupts(_worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles Ctrl-C and ends the workers


def _compute(extractor: FeatureExtractor, tokens: TokenFile | None, pixels: Tensor) -> tuple[Tensor, ...]:
    """Features of a batch, float16 ``[B, D]``, and its tokens in the type of their file; on the CPU."""
    if tokens is None:
        return (extractor(pixels).half().cpu(),)
    features, before = extractor.tokens(pixels, tokens.blocks)
    return features.half().cpu(), before.to(getattr(torch, tokens.type)).cpu()


def _forward(
    extractor: FeatureExtractor, tokens: TokenFile | None, pixels: Tensor, limit: int, files: list[str]
) -> tuple[list[Tensor], int]:
    """What `_compute` gives, and the number of images at a time that fit in memory."""
    while True:
        try:
            parts = [_compute(extractor, tokens, part) for part in pixels.split(limit)]
            break
        except RuntimeError as error:  # torch.cuda.OutOfMemoryError is one
            if not re.search("out of memory|not enough memory|can't allocate memory", str(error), re.IGNORECASE):
                raise
        # Outside the handler, whose traceback would keep the memory of the failed batch.
        limit = min(limit, len(pixels)) // 2
        if not limit:
            raise InputError(f"{extractor.device} has too little memory for {extractor.name} on even one image.")
        log.warning("Out of memory on %s; continuing with %d images at a time.", extractor.device, limit)
        if extractor.device.type == "cuda":
            torch.cuda.empty_cache()
    result = [torch.cat(same) for same in zip(*parts, strict=True)]
    if not (finite := result[0].isfinite().all(1)).all():
        file = files[int((~finite).nonzero()[0])]
        raise InputError(f"The features of '{file}' are not finite in float16; {extractor.name} cannot be used on it.")
    return result, limit
