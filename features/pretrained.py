"""Loads a pretrained ViT from the hub or a local directory, quietly, with one clear sentence for what goes wrong."""

import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from logging import getLogger
from pathlib import Path

from PIL import Image
from torch import nn

from config import InputError
from models import Preprocessing, ViTFeatureExtractor

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")  # older and newer name


def load_extractor(name: str | Path, layers: str = "last") -> ViTFeatureExtractor:
    """Load a frozen ViT by its name on the hub, or from a local directory. No code that comes with a model is run.

    Args:
        layers: "last" or "all", see `models.ViTFeatureExtractor`.

    Raises:
        InputError: the model cannot be loaded or fails on an image, has no CLS token, lacks weights of its
            architecture, or needs code of its own; with "all", its blocks or its patch tokens cannot be told apart.
    """
    name = str(name)
    try:
        _check_available(name)
        with _quiet():
            parts = _load_backbone(name), Preprocessing(_load_processor(name)), _short(name)
            extractor = ViTFeatureExtractor(*parts, layers)
            size = getattr(extractor.model.config, "image_size", 224)  # of one side, or height and width
            image = Image.new("RGB", (size, size) if isinstance(size, int) else (size[1], size[0]))
            extractor(extractor.preprocessing(image)[None])  # what loads may still not run
    except InputError:
        raise
    except Exception as error:  # the libraries raise anything on a damaged model
        if "trust_remote_code" in str(error):
            raise InputError(f"The model '{name}' needs code of its own, which is not run: use another ViT.") from error
        clear = isinstance(error, (OSError, ValueError, RuntimeError)) and str(error)
        raise _unusable(name, str(error) if clear else f"{type(error).__name__}: {error}") from error
    return extractor


def _short(name: str) -> str:
    return Path(name).name if Path(name).is_dir() else name


def _unusable(name: str, why: str) -> InputError:
    why = textwrap.shorten(" ".join(why.split()).split(". ")[0].rstrip("."), 200, placeholder=" …")
    return InputError(
        f"The model '{name}' cannot be loaded ({why}): give VIT_MODEL (--vit-model) a hub name with network access, "
        "or a local directory that holds config.json and the weights."
    )


def _check_available(name: str) -> None:
    """Refuse at once what would otherwise be tried again and again for half a minute."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    if Path(name).is_dir():
        return
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise _unusable(name, "there is no such folder")
    if constants.HF_HUB_OFFLINE or isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=5)
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


def _load_backbone(name: str) -> nn.Module:
    from transformers import AutoModel

    model, info = AutoModel.from_pretrained(name, output_loading_info=True, trust_remote_code=False)
    if getattr(model.config, "mask_ratio", None):
        raise InputError(f"The model '{name}' drops patches at random (a masked autoencoder); use another ViT.")
    model = getattr(model, "vision_model", model)  # the image half of a two-tower model such as CLIP
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # unused, and random where the checkpoint has none
    missing = sorted(key for key in info["missing_keys"] if "pooler" not in key)
    if missing:
        raise InputError(f"The weights of '{name}' lack {len(missing)} of its parameters, {missing[0]} first.")
    if not any(key.split(".")[-1] in ("cls_token", "class_embedding") for key, _ in model.named_parameters()):
        raise InputError(f"The model '{name}' has no CLS token; use a ViT, DeiT, BEiT, DINOv2 or CLIP model.")
    return model


def _load_processor(name: str):
    """The model's image processor; without one: 224×224 squashed, bilinear, mean = std = 0.5."""
    from transformers import AutoImageProcessor, ViTImageProcessor

    if not any(_has(name, file) for file in PROCESSOR_FILES):
        return ViTImageProcessor(size={"height": 224, "width": 224}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return AutoImageProcessor.from_pretrained(name, trust_remote_code=False)


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
