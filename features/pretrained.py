"""Loads a pretrained ViT from the hub or a local directory, quietly, with one clear sentence for what goes wrong."""

from logging import getLogger
from pathlib import Path

from safetensors import SafetensorError
from torch import nn

from config import InputError
from models import Preprocessing, ViTFeatureExtractor

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")  # older and newer name


def load_extractor(name: str | Path) -> ViTFeatureExtractor:
    """Load a frozen ViT from the hub or a local directory.

    Args:
        name: hub name or directory.

    Raises:
        InputError: the model cannot be loaded, has no CLS token, or lacks weights of its architecture.
    """
    name = str(name)
    model = _load_backbone(name)
    short_name = Path(name).name if Path(name).is_dir() else name
    return ViTFeatureExtractor(model, Preprocessing(_load_processor(name)), short_name)


def _load_backbone(name: str) -> nn.Module:
    from transformers import AutoModel
    from transformers.utils import logging

    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    hub = getLogger("huggingface_hub")
    hub_level = hub.level
    hub.setLevel("ERROR")  # it warns at every retry without network; the error below says it once
    logging.set_verbosity_error()  # the load report lists the unused classification head, which needs no action
    logging.disable_progress_bar()
    try:
        model, info = AutoModel.from_pretrained(name, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        looks_like_path = name.startswith(("/", ".", "~")) or name.count("/") > 1
        missing = looks_like_path and not Path(name).exists()
        why = "there is no such folder" if missing else str(error).strip().splitlines()[0].split(". ")[0].rstrip(".")
        raise InputError(
            f"The model '{name}' cannot be loaded ({why}): give VIT_MODEL a hub name with network access, "
            "or a local directory that holds config.json and the weights."
        ) from error
    finally:
        hub.setLevel(hub_level)
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
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

    if not _has_processor(name):
        return ViTImageProcessor(size={"height": 224, "width": 224}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    try:
        return AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(f"The image processor of '{name}' cannot be read: {str(error).splitlines()[0]}") from error


def _has_processor(name: str) -> bool:
    if Path(name).is_dir():
        return any((Path(name) / file).is_file() for file in PROCESSOR_FILES)
    return any(_hub_has(name, file) for file in PROCESSOR_FILES)


def _hub_has(name: str, file: str) -> bool:
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
