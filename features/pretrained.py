"""Loads a pretrained image model from the hub or a local directory, quietly, with one sentence for what goes wrong."""

import json
import os
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from logging import getLogger
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from config import InputError
from models import FeatureExtractor, Preprocessing, TimmPreprocessing, has_cls_token, image_size

TIMM = "timm:"  # before the name of a model of timm
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")  # older and newer name


def load_extractor(name: str | Path, layers: str = "last", pooling: str = "auto") -> FeatureExtractor:
    """Load a frozen image model by its name on the hub, or from a local directory. No code that comes with it is run.

    Args:
        name: of a model of `transformers`, or "timm:NAME" for one of `timm`, or a directory with either.
        layers: "last" or "all", see `models.FeatureExtractor`.
        pooling: "auto", "cls", "mean" or "pooler", see there.

    Raises:
        InputError: the model cannot be loaded or fails on an image, does not pool so, lacks weights of its
            architecture, or needs code or a package that is not there; with "all", its blocks or its patch tokens
            cannot be told apart.
    """
    name = os.path.expanduser(str(name))
    place = _place(name)
    try:
        _check_available(place, name)
        with _quiet():
            model = _load_backbone(place, name, pooling)
            parts = model, _preprocessing(place, hasattr(model, "timm_model")), _short(name)
            extractor = FeatureExtractor(*parts, layers, pooling)
            _try(extractor)
    except InputError:
        raise
    except Exception as error:  # the libraries raise anything on a damaged model
        if "trust_remote_code" in str(error):
            raise InputError(f"The model '{name}' needs code of its own, which is not run: use another.") from error
        clear = isinstance(error, (OSError, ValueError, RuntimeError)) and str(error)
        raise _unusable(name, str(error) if clear else f"{type(error).__name__}: {error}") from error
    return extractor


def _place(name: str) -> str:
    """Where `transformers` finds a model: "timm:NAME" is "timm/NAME" on the hub, or a directory.

    Raises:
        InputError: the model is one of timm, which is not installed.
    """
    place, timm = name.removeprefix(TIMM), name.startswith((TIMM, "timm/"))
    if (timm or _describes_timm(Path(place))) and find_spec("timm") is None:
        raise InputError(f"The model '{name}' needs the package timm: install it with 'pip install timm'.")
    return place if not name.startswith(TIMM) or Path(place).is_dir() else f"timm/{place}"


def _describes_timm(folder: Path) -> bool:
    """Whether a directory holds a model of timm, whose configuration names an architecture and no model type."""
    try:
        facts = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(facts, dict) and "pretrained_cfg" in facts


def _try(extractor: FeatureExtractor) -> None:
    """Run the model on two images of different shapes: what loads may still not run, or take images of one shape."""
    height, width = image_size(extractor.model)
    shapes = (width, height), (2 * width, height)
    pixels = [extractor.preprocessing(Image.new("RGB", shape)) for shape in shapes]
    extractor(pixels[0][None])
    resizes = getattr(extractor.preprocessing.processor, "do_resize", True)  # else images must have one shape already
    if resizes and pixels[0].shape != pixels[1].shape:
        raise InputError(f"The image processor of '{extractor.name}' must resize all images to one shape.")


def _short(name: str) -> str:
    folder = Path(name.removeprefix(TIMM))
    return folder.name if folder.is_dir() else name


def _unusable(name: str, why: str) -> InputError:
    why = textwrap.shorten(" ".join(why.split()).split(". ")[0].rstrip("."), 200, placeholder=" …")
    return InputError(
        f"The model '{name}' cannot be loaded ({why}): give VIT_MODEL (--vit-model) a hub name with network access, "
        "or a local directory that holds config.json and the weights."
    )


def _check_available(place: str, name: str) -> None:
    """Refuse at once what would otherwise be tried again and again for half a minute; `name` is for messages."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    if Path(place).is_dir():
        return
    if place.startswith(("/", ".", "~")) or place.count("/") > 1:
        raise _unusable(name, "there is no such folder")
    if constants.HF_HUB_OFFLINE or isinstance(try_to_load_from_cache(place, "config.json"), str):
        return
    try:
        get_hf_file_metadata(hf_hub_url(place, "config.json"), timeout=5)
    except HfHubHTTPError:
        return  # the hub answers: loading says what is wrong
    except Exception as error:  # the client's library is not ours to name
        raise _unusable(name, f"the hub cannot be reached: {error}; and the model is not in its cache") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without bars, reports and warnings of the libraries, whose settings are restored afterwards."""
    from transformers.utils import logging

    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    hub = getLogger("huggingface_hub")
    hub_level = hub.level
    hub.setLevel("ERROR")  # it warns at every retry without network; the error says it once
    logging.set_verbosity_error()  # the load report lists the unused classification head, which needs no action
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        hub.setLevel(hub_level)
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _load_backbone(place: str, name: str, pooling: str) -> nn.Module:
    from transformers import AutoBackbone, AutoConfig, AutoModel
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    about = AutoConfig.from_pretrained(place, trust_remote_code=False)
    kind = AutoModel if type(about) in MODEL_MAPPING else AutoBackbone
    if getattr(about, "model_args", None):  # of timm; without a classifier, the number of classes has no place
        about.model_args.pop("num_classes", None)
    options = {"config": about, "dtype": torch.float32, "output_loading_info": True, "trust_remote_code": False}
    model, info = kind.from_pretrained(place, **options)
    if getattr(model.config, "mask_ratio", None):
        raise InputError(f"The model '{name}' drops patches at random (a masked autoencoder); use another one.")
    model = getattr(model, "vision_model", model)  # the image half of a two-tower model such as CLIP
    if model.main_input_name != "pixel_values":
        raise InputError(f"The model '{name}' takes no images ({type(model).__name__}); use an image model.")
    lost = {key for key in info["missing_keys"] if "pooler" in key}
    if missing := sorted(info["missing_keys"] - lost):
        raise InputError(f"The weights of '{name}' lack {len(missing)} of its parameters, {missing[0]} first.")
    if lost and pooling == "pooler":
        raise InputError(f"The weights of '{name}' have no pooler: POOLING must be 'auto', 'cls' or 'mean' for it.")
    unused = pooling in ("cls", "mean") or (pooling == "auto" and has_cls_token(model))
    if (lost or unused) and isinstance(pooler := getattr(model, "pooler", None), nn.Module) and [*pooler.parameters()]:
        model.pooler = None  # its weights are random where the checkpoint has none
    return model


def _preprocessing(place: str, of_timm: bool) -> Preprocessing:
    """By the model's image processor; without one: 224×224 squashed, bilinear, mean = std = 0.5.

    That of a model of timm is made from the model's configuration.
    """
    from transformers import AutoImageProcessor, ViTImageProcessor

    if of_timm:
        return TimmPreprocessing(AutoImageProcessor.from_pretrained(place, trust_remote_code=False))
    if not any(_has(place, file) for file in PROCESSOR_FILES):
        plain = ViTImageProcessor(size={"height": 224, "width": 224}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
        return Preprocessing(plain)
    return Preprocessing(AutoImageProcessor.from_pretrained(place, trust_remote_code=False))


def _has(name: str, file: str) -> bool:
    """Whether the model, in a local directory or on the hub, comes with a file."""
    if Path(name).is_dir():
        return (Path(name) / file).is_file()
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        hf_hub_download(name, file)
    except LocalEntryNotFoundError as error:
        if try_to_load_from_cache(name, file) is not None:
            return False  # the cache remembers that the hub has no such file
        raise InputError(f"'{file}' of '{name}' cannot be loaded: no network, and it is not in the cache.") from error
    except EntryNotFoundError:
        return False
    return True
