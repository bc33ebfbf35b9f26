"""Class probabilities of images by the networks of a weights file."""

from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path

from torch import Tensor

from config import InputError
from dataset import load_image
from engine import failure_reason
from features import image_problem, load_extractor
from models import FeedforwardClassifier, ImageClassifier, ViTFeatureExtractor
from study.archive import load_networks


def load_classifier(path: str | PathLike, seed: int | None = None) -> tuple[FeedforwardClassifier, dict]:
    """One network of a weights file, and the file's header.

    Args:
        path: a file of ``results/weights/``.
        seed: which network; default the first.

    Raises:
        InputError: there is no such network, or it failed in training.
    """
    seeds, params, failed, header = load_networks(path)
    seed = seeds[0] if seed is None else seed
    if seed not in seeds:
        raise InputError(f"'{path}' has no seed {seed}; it has {', '.join(map(str, seeds))}.")
    reasons = {number: failure_reason(code) for number, code in zip(seeds, failed.tolist(), strict=True) if code}
    for row, number in enumerate(seeds):
        if not all(bool(value[row].isfinite().all()) for value in params.values()):
            reasons.setdefault(number, "its weights are not finite")
    if seed in reasons:
        usable = ", ".join([str(number) for number in seeds if number not in reasons][:10])
        advice = f"give another one with --seed: {usable}" if usable else "and so did all others in the file"
        raise InputError(f"Network {seed} of '{path}' failed in training ({reasons[seed]}); {advice}.")
    size, classes = header["features"]["feature_size"], len(header["class_names"])
    classifier = FeedforwardClassifier(size, classes, header["hidden_sizes"])
    classifier.load_state_dict({name: value[seeds.index(seed)] for name, value in params.items()})
    return classifier, header


def join(classifier: FeedforwardClassifier, header: dict, extractor: ViTFeatureExtractor) -> ImageClassifier:
    """Frozen ViT and classifier as one model.

    Raises:
        InputError: the ViT is not the one whose features the classifier was trained on.
    """
    trained_on, preprocessing = header["features"]["model"] or {}, header["features"]["preprocessing"]
    if "weights_sha256" not in trained_on:
        raise InputError("These networks were trained on features of an unknown model: they cannot see images.")
    if extractor.weights_hash() != trained_on["weights_sha256"] or extractor.preprocessing.describe() != preprocessing:
        raise InputError(
            f"The weights were trained on features of '{trained_on['name']}', and '{extractor.name}' is another "
            "model or prepares images otherwise: give the right one with --vit-model."
        )
    return ImageClassifier(extractor, classifier, header["class_names"]).eval()


def predict_images(
    weights: str | PathLike,
    images: Sequence[str | PathLike],
    vit_model: str,
    *,
    seed: int | None = None,
    device: str = "cpu",
    batch_size: int | None = None,
) -> Iterator[tuple[str | PathLike, list[tuple[str, float]]]]:
    """Class probabilities of images, batch by batch.

    Args:
        weights: a file of ``results/weights/``.
        images: image files.
        vit_model: hub name or directory of the model that the weights were trained on.
        seed: which network; default the first.
        device: where the models run.
        batch_size: images at a time; default 8.

    Yields:
        Image and (class, probability) pairs, the most probable first.

    Raises:
        InputError: an unusable network, model or image.
    """
    batch_size = 8 if batch_size is None else batch_size
    if batch_size < 1:
        raise InputError(f"EXTRACTION_BATCH_SIZE must be at least 1, not {batch_size}.")
    classifier, header = load_classifier(weights, seed)
    model = join(classifier, header, load_extractor(vit_model)).to(device)
    for start in range(0, len(images), batch_size):
        paths = images[start : start + batch_size]
        for path, chances in zip(paths, _probabilities(model, paths), strict=True):
            yield path, sorted(zip(model.class_names, chances.tolist(), strict=True), key=lambda pair: -pair[1])


def _probabilities(model: ImageClassifier, paths: Sequence[str | PathLike]) -> Tensor:
    loaded = []
    for path in paths:
        try:
            loaded.append(load_image(path))
        except Exception as error:  # Pillow's decoders raise anything
            raise InputError(f"'{path}' cannot be read as an image ({image_problem(error, Path(path))}).") from error
    return model.predict(loaded)
