"""Class probabilities of images by the networks of a weights file."""

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from logging import getLogger
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

import config
from config import InputError
from dataset import images_below, load_image
from engine import Params, failure_reason
from features import image_problem, load_extractor
from models import Ensemble, FeatureExtractor, FeedforwardClassifier, ImageClassifier
from storage import atomic_write, ranges
from study.archive import add_pretrained, load_networks

log = getLogger(__name__)


def load_parameters(path: str | PathLike, seed: int | None = None) -> tuple[dict[int, Params], dict]:
    """Parameters by seed (default all that did not fail) of a file of ``results/weights/``, and the file's header.

    Raises:
        InputError: there is no such network, or it failed in training.
    """
    seeds, params, failed, header = load_networks(path)
    if seed is not None and seed not in seeds:
        raise InputError(f"'{path}' has no seed {seed}; it has {ranges(seeds)}.")
    reasons = {number: failure_reason(code) for number, code in zip(seeds, failed.tolist(), strict=True) if code}
    for row, number in enumerate(seeds):
        if not all(bool(value[row].isfinite().all()) for value in params.values()):
            reasons.setdefault(number, "its weights are not finite")
    usable = [number for number in seeds if number not in reasons]
    if seed in reasons or not usable:
        first = seeds[0] if seed is None else seed
        advice = f"give another one with --seed: {ranges(usable)}" if usable else "and so did all others in the file"
        raise InputError(f"Network {first} of '{path}' failed in training ({reasons[first]}); {advice}.")
    rows = {number: seeds.index(number) for number in (usable if seed is None else [seed])}
    return {number: {name: value[row] for name, value in params.items()} for number, row in rows.items()}, header


def describe_networks(seeds: Sequence[int], header: Mapping) -> str:
    """One line: how the networks of a weights file were trained, which seeds they are, and on whose features."""
    about = {"holdout": "+".join(header.get("holdouts", ())), **header}  # a comparison may leave out two
    algorithm = "arm" if "phase" in header else "method"
    words = {"phase": "Phase", "domain": "domain", "holdout": "holdout", "algorithm": algorithm}
    parts = [f"{word} {about[key]}" for key, word in words.items() if about.get(key)]
    parts.append(f"seed {seeds[0]}" if len(seeds) == 1 else f"mean over {len(seeds)} seeds ({ranges(seeds)})")
    blocks, model = header.get("trained_blocks", 0), header["features"]["model"]["name"]
    trained = f"on features of {model}"
    if blocks == "all":
        trained = f"with the whole of {model}"
    elif blocks:
        trained = f"with the last {f'{blocks} blocks' if blocks > 1 else 'block'} of {model}"
    return f"Networks: {', '.join(parts)}, last epoch, {trained}."


def join(
    path: str | PathLike, networks: Sequence[Params], header: Mapping, extractor: FeatureExtractor
) -> ImageClassifier:
    """Frozen backbone and networks of a weights file as one model, whose probabilities are the mean of theirs.

    Raises:
        InputError: the backbone is not the one that the networks were trained on, or they do not fit it.
    """
    trained_on, preprocessing = header["features"]["model"], header["features"]["preprocessing"]
    if extractor.weights_hash() != trained_on["weights_sha256"] or extractor.preprocessing.describe() != preprocessing:
        raise InputError(
            f"The weights were trained on features of '{trained_on['name']}', and '{extractor.name}' is another "
            "model or prepares images otherwise: give the right one with --vit-model."
        )
    blocks, members = header.get("trained_blocks", 0), []
    tail = None
    if blocks:
        tail = extractor.whole() if blocks == "all" else extractor.tail(blocks)
    for params in networks:
        head = FeedforwardClassifier(extractor.feature_size, len(header["class_names"]), header["hidden_sizes"])
        members.append(head if tail is None else tail.with_head(head))
        final = params if tail is None else add_pretrained(path, params, tail)
        members[-1].load_state_dict(final, strict=tail is None)  # blocks may have buffers that are not trained
    stored = getattr(torch, header["tokens"]) if blocks else torch.float16
    return ImageClassifier(extractor, Ensemble(members), header["class_names"], blocks, stored).eval()


def predict_images(
    weights: str | PathLike,
    images: Sequence[str | PathLike],
    vit_model: str | None = None,
    *,
    seed: int | None = None,
    device: str = "cpu",
    batch_size: int | None = None,
    output: str | PathLike | None = None,
) -> Iterator[tuple[str | PathLike, list[tuple[str, float]]]]:
    """Class probabilities of images, batch by batch. What network gives them is logged first.

    Args:
        weights: a file of ``results/weights/``.
        images: files, and folders, whose images are taken at any depth, sorted by path.
        vit_model: directory or hub name where the model lies that the weights were trained on; default
            `config.VIT_MODEL` if that is its name, else the name in the weights' header.
        seed: one network; default the mean of the probabilities of all that did not fail.
        batch_size: images at a time; default 8.
        output: CSV file of path, predicted class and the probability of every class, which appears when all is done.

    Yields:
        Image and (class, probability) pairs, the most probable first.

    Raises:
        InputError: an unusable network, model or image, or a folder without images.
    """
    config.check("EXTRACTION_BATCH_SIZE", batch_size)
    batch_size = batch_size or 8
    networks, header = load_parameters(weights, seed)
    place = _place(header["features"]["model"] or {}, vit_model)
    files = [file for image in images for file in _files(image)]
    log.info("%s", describe_networks(tuple(networks), header))
    with _table(output, header["class_names"]) as write:
        layers = "all" if header["features"].get("layers") else "last"
        extractor = load_extractor(place, layers, header["features"]["model"].get("pooling", "cls"))
        model = join(weights, list(networks.values()), header, extractor.to(device)).to(device)
        for start in range(0, len(files), batch_size):
            paths = files[start : start + batch_size]
            for path, chances in zip(paths, _probabilities(model, paths).tolist(), strict=True):
                ranked = sorted(zip(model.class_names, chances, strict=True), key=lambda pair: -pair[1])
                write([path, ranked[0][0], *chances])
                yield path, ranked


def _place(trained_on: Mapping, given: str | None) -> str:
    """Where the model is to be looked for that networks were trained on."""
    if "weights_sha256" not in trained_on:
        raise InputError("These networks were trained on features of an unknown model: they cannot see images.")
    name = trained_on["name"]
    if given is None and Path(config.VIT_MODEL).name == name:
        given = config.VIT_MODEL
    on_hub = "/" in name or name.startswith("timm:")  # headers keep no path of a directory
    if given is None and not on_hub and not Path(name).is_dir():
        raise InputError(f"The weights need the local model '{name}': say where it lies with --vit-model DIR.")
    return name if given is None else given


def _files(image: str | PathLike) -> list[str | PathLike]:
    """The images of a folder, or the file itself."""
    if not Path(image).is_dir():
        return [image]
    if not (found := images_below(image)):
        raise InputError(f"The folder '{image}' holds no images.")
    return found


@contextmanager
def _table(path: str | PathLike | None, class_names: Sequence[str]) -> Iterator[Callable]:
    """Writes rows of a CSV file, which appears when the block is left without an error; None writes nothing."""
    if path is None:
        yield lambda row: None
        return
    if Path(path).is_dir():
        raise InputError(f"--output must be a file, and '{path}' is a folder.")
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["file", "predicted", *class_names])
        yield rows.writerow


def _probabilities(model: ImageClassifier, paths: Sequence[str | PathLike]) -> Tensor:
    loaded = []
    for path in paths:
        try:
            loaded.append(load_image(path))
        except Exception as error:  # Pillow's decoders raise anything
            raise InputError(f"'{path}' cannot be read as an image ({image_problem(error, Path(path))}).") from error
    return model.predict(loaded)
