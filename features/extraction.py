"""Runs the frozen ViT over a data set once, and caches the result so that it can be trusted.

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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from logging import getLogger
from pathlib import Path

import torch
from torch import Tensor

import config
from config import InputError
from dataset import DECODING_VERSION, ImageDataset, find_dataset, load_image
from engine import choose_device, default_workers
from features.check import check_images
from features.pretrained import load_extractor
from features.tokens import Float16OverflowError, TokenFile
from models import BackboneTail, FeatureExtractor
from storage import FORMAT_VERSION, FeatureSet, atomic_write, load_features, save_features

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
    blocks: int | None = None,
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
        device: where the ViT runs.
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
    device = choose_device(config.DEVICE) if device is None else device
    extractor = load_extractor(config.VIT_MODEL if vit_model is None else vit_model, layers, pooling).to(device)
    cache_dir = cache_dir or config.CACHE_DIR or default_cache()
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
    blocks: int = 0,
    check_tail: Callable[[BackboneTail], object] = lambda tail: None,
) -> FeatureSet:
    """Features of all images: from the cache, else by one pass of the frozen ViT, and then cached.

    An interrupted pass resumes where it stopped, to within 512 images. A second process that needs the same features
    waits for the first. If the device runs out of memory, the batch size is halved until a batch fits.

    Args:
        dataset: from `dataset.find_dataset`.
        extractor: the model, on the device to use; its `layers` say which features.
        cache_dir: created if missing.
        batch_size: images per forward pass, at most 512; default 256 on CUDA, 8 on a CPU.
        workers: decoding processes, 0 = threads of this process; default one per core (at most 16) on CUDA, 0 on a
            CPU.
        verify: read every image file again, even if its size and time have not changed.
        blocks: with 1 or more, the same pass also caches the tokens before so many last blocks, in float16 where it
            can hold them, and the result has `tokens` and `tail`; not together with all layers.
        check_tail: raises an InputError for blocks that are of no use; called before the pass.

    Raises:
        InputError: unreadable images (all are listed before the pass begins), an image that changes during the pass,
            features that are not finite, too little memory for a single image, an unusable cache folder; blocks that
            the model has not, tokens that are not finite, too little disk for them, or a damaged file of them.
    """
    config.check("EXTRACTION_BATCH_SIZE", batch_size)
    config.check("EXTRACTION_WORKERS", workers)
    config.check("TRAINED_BLOCKS", blocks)
    _check_layers(extractor.layers, blocks)
    folder = Path(cache_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"CACHE_DIR '{folder}' cannot be created ({error.strerror}): give another folder.") from error
    tail = None
    if blocks:
        tail = extractor.tail(blocks).cpu()
        check_tail(tail)
    contents, pixels = check_images(dataset, folder, workers or None, verify, progress)
    header = {"dataset": dataset.name, "model": _describe_model(extractor), "versions": _versions()}
    header["preprocessing"] = extractor.preprocessing.describe()
    if (layers := extractor.describe_layers()) is not None:
        header["layers"] = layers
    header["pixels_sha256"] = hashlib.sha256("".join(pixels).encode()).hexdigest()
    name = f"{dataset.name}_{extractor.name}_{_key(dataset, contents, extractor, header)[:16]}"
    path = folder / (re.sub(r"[^\w.-]+", "_", name) + ".safetensors")
    log.info("Features are kept in '%s'.", path)
    tokens = TokenFile(path, _token_shape(dataset, extractor, blocks), blocks, extractor.name) if blocks else None
    run = partial(_run, dataset, contents, extractor, batch_size=batch_size, workers=workers, progress=progress)
    _cache(path, tokens, run, dataset, header)
    features = load_features(path, f"images in {dataset.name}")
    return features if tokens is None else _with_tokens(features, tokens, tail)


def _check_layers(layers: str, blocks: int) -> None:
    if layers == "all" and blocks:
        raise InputError("FEATURE_LAYERS = 'all' and TRAINED_BLOCKS exclude each other: blocks are trained on tokens.")


def _token_shape(dataset: ImageDataset, extractor: FeatureExtractor, blocks: int) -> tuple[int, int, int]:
    """N, T, D. The first image tells: a model preprocesses all to the same size."""
    first = extractor.preprocessing(load_image(io.BytesIO(dataset.read(0))))
    return len(dataset), *extractor.tokens(first[None], blocks)[1].shape[1:]


def _cache(path: Path, tokens: TokenFile | None, run: Callable, dataset: ImageDataset, header: dict) -> None:
    """Make the file of features and the one of tokens, where they do not exist."""
    files = [path] if tokens is None else [path, tokens.path]
    if not all(file.exists() for file in files):
        with _exclusive(path.with_suffix(".lock")), _deaths_of_workers():
            # Asked again: another process may have written them while this one waited.
            new_tokens = tokens is not None and not tokens.path.exists()
            if new_tokens:
                features = _run_with_tokens(run, tokens)
            elif not path.exists():
                features = run(path.with_suffix(".parts"))
            if not path.exists():
                names = dataset.class_names, dataset.domain_names, dataset.files
                save_features(path, features, dataset.labels, dataset.domains, *names, **header)
            if new_tokens:
                tokens.finish()
    for file in files:
        shutil.rmtree(file.with_suffix(".parts"), ignore_errors=True)  # perhaps of a process that was killed right here


def _run_with_tokens(run: Callable, tokens: TokenFile) -> Tensor:
    """The pass that makes both; in float32 from the start again, if float16 turns out not to hold the tokens."""
    while True:
        tokens.resume()
        try:
            return run(tokens.parts, tokens)
        except Float16OverflowError as error:
            log.info("float16 cannot hold the tokens of '%s': starting again in float32.", error)
            tokens.widen()


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


def _versions() -> dict[str, str]:
    """Versions of the libraries that can change a feature."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("torch", "torchvision", "transformers", "pillow"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue  # torchvision is optional to transformers
    return found


def _key(dataset: ImageDataset, contents: list[str], extractor: FeatureExtractor, header: dict) -> str:
    """SHA-256 over everything that determines the features."""
    model = {key: value for key, value in header["model"].items() if key != "name"}
    if model["pooling"] == "cls":
        del model["pooling"]  # as it was when there was no other
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


def _exclusive(path: Path):
    """Take a lock that other processes respect; the end of a `with` block releases it."""
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        log.warning("Another process extracts these features; waiting for it (%s).", path)
        return lock.acquire()


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
    parts: Path,
    tokens: TokenFile | None = None,
    *,
    batch_size: int | None,
    workers: int | None,
    progress: bool,
) -> Tensor:
    """Features ``[N, D]`` of all images, float16: those in `parts` are loaded, the others computed and saved there.

    The tokens of a shard are on the disk before its features, whose file says that the shard is done.
    """
    from safetensors.torch import load_file, save_file
    from tqdm.auto import tqdm

    limit = batch_size or (256 if extractor.device.type == "cuda" else 8)  # a CPU gains nothing from larger batches
    parts.mkdir(exist_ok=True)
    starts = range(0, len(dataset), SHARD_ROWS)
    shards = {start: parts / f"{start:09d}.safetensors" for start in starts}
    rows = {start: range(start, min(start + SHARD_ROWS, len(dataset))) for start in starts}
    missing = [start for start in starts if not shards[start].exists()]
    if tokens is not None:
        tokens.reserve(sum(len(rows[start]) for start in missing))
    batches = [list(rows[s][i : i + limit]) for s in missing for i in range(0, len(rows[s]), limit)]
    done = len(dataset) - sum(map(len, batches))
    loaded = iter(_loader(dataset, contents, extractor, batches, workers))
    quiet = {} if progress else {"disable": True}  # otherwise the environment's TQDM_DISABLE decides
    with tqdm(total=len(dataset), initial=done, desc=extractor.name, unit="img", **quiet) as bar:
        for start in missing:
            buffer = []
            while (filled := sum(map(len, buffer))) < len(rows[start]):
                pixels, files, changed = next(loaded)
                if changed:
                    raise InputError(f"'{changed[0]}' has changed since it was checked; run again with verify=True.")
                (features, *before), limit = _forward(extractor, tokens, pixels, limit, files)
                if tokens is not None:
                    tokens.write(start + filled, before[0], files)
                buffer.append(features)
                bar.update(len(features))
            if tokens is not None:
                tokens.flush()
            with atomic_write(shards[start]) as temporary:
                save_file({"features": torch.cat(buffer)}, temporary)
    return torch.cat([load_file(shards[start])["features"] for start in starts])


class _Pixels(torch.utils.data.Dataset):
    """Indexed by a list of rows: preprocessed images, uint8 ``[B, 3, H, W]``, their files, and the changed ones."""

    def __init__(self, dataset: ImageDataset, contents: list[str], preprocessing, threads: int = 0):
        self.read, self.files, self.contents, self.preprocessing = dataset.read, dataset.files, contents, preprocessing
        self.map = ThreadPoolExecutor(threads).map if threads else map

    def __getitem__(self, rows: list[int]) -> tuple[Tensor, list[str], list[str]]:
        files, pixels = [self.files[row] for row in rows], list(self.map(self._read, rows))
        # Returned, not raised: an exception in a worker process reaches the main process as a page of text.
        changed = [file for file, image in zip(files, pixels, strict=True) if image is None]
        return torch.empty(0) if changed else torch.stack(pixels), files, changed

    def _read(self, row: int) -> Tensor | None:
        """A preprocessed image, or None if it is gone or not the bytes from which the cache key was computed."""
        try:
            data = self.read(row)
        except OSError:
            return None
        same = hashlib.sha256(data).hexdigest() == self.contents[row]
        return self.preprocessing(load_image(io.BytesIO(data))) if same else None


def _loader(dataset: ImageDataset, contents: list[str], extractor: FeatureExtractor, batches: list, workers):
    """Iterates over batches, decoded by processes beside a GPU, or by threads between the passes of a CPU.

    On a CPU the forward pass already uses every core: decoding processes beside it make its threads wait for one
    another, which costs more than decoding on all cores and then computing on all cores (benchmarks/extraction.py).
    """
    on_gpu = extractor.device.type == "cuda"
    if workers is None:
        workers = default_workers() if on_gpu else 0
    return torch.utils.data.DataLoader(
        _Pixels(dataset, contents, extractor.preprocessing, threads=0 if workers else default_workers()),
        batch_size=None,  # `batches` are lists of rows already
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
            if not re.search("out of memory|can't allocate memory", str(error), re.IGNORECASE):
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
