"""The two networks: the frozen ViT that turns an image into features, and the small classifier on top."""

import hashlib
from collections.abc import Sequence
from itertools import pairwise
from logging import getLogger
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

import config
from config import InputError

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")  # older and newer name


class FeedforwardClassifier(nn.Module):
    """``Linear(D, h1) → ReLU → … → Linear(hk, classes)`` with PyTorch's own initialization.

    The weight matrices *between hidden layers* are the tracked ones, the only weights that importance and
    masks speak of. Five hidden layers of ten have four tracked matrices of 10×10.

    Args:
        in_features: D, the length of a feature vector.
        num_classes: length of the output (logits).
        hidden_sizes: widths of the hidden layers, two or more; default `config.HIDDEN_SIZES`.

    Shapes: input ``[..., D]``, output ``[..., num_classes]``.
    """

    def __init__(self, in_features: int, num_classes: int, hidden_sizes: Sequence[int] | None = None):
        super().__init__()
        sizes = [in_features, *(config.HIDDEN_SIZES if hidden_sizes is None else hidden_sizes), num_classes]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))

    def forward(self, features: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            features = torch.relu(layer(features))
        return self.layers[-1](features)

    @classmethod
    def outline(cls, *sizes) -> "FeedforwardClassifier":
        """The same module without weights (on the meta device): draws nothing from the global random generator."""
        with torch.device("meta"):
            return cls(*sizes)

    @property
    def tracked_names(self) -> tuple[str, ...]:
        """Parameter names of the tracked matrices, first to last."""
        return tuple(f"layers.{i}.weight" for i in range(1, len(self.layers) - 1))


class Preprocessing:
    """From an RGB image to the pixels a ViT was trained on, by the model's own image processor.

    The geometric part (resize, crop) runs where images are decoded and returns uint8; rescaling and
    normalization are left to `ViTFeatureExtractor.forward`, on its device.
    """

    def __init__(self, processor):
        self.processor = processor
        scale = processor.rescale_factor if processor.do_rescale else 1.0
        mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else (0.0, 1.0)
        self.scale = float(scale)
        self.mean = [float(m) for m in (mean if isinstance(mean, (list, tuple)) else [mean] * 3)]
        self.std = [float(s) for s in (std if isinstance(std, (list, tuple)) else [std] * 3)]

    def __call__(self, image) -> Tensor:
        """``PIL.Image`` in RGB -> uint8 ``[3, H, W]``."""
        pixels = self.processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"][0]
        return pixels.to(torch.uint8)

    def describe(self) -> dict[str, object]:
        """What determines the pixels, ready for JSON: part of the cache key and of the file's header."""
        keys = ("do_resize", "size", "resample", "do_center_crop", "crop_size", "default_to_square", "backend")
        values = {key: getattr(self.processor, key, None) for key in keys}
        for key in ("size", "crop_size"):
            if values[key] is not None:  # keep those of the many ways to give a size that are set
                values[key] = {name: number for name, number in dict(values[key]).items() if number is not None}
        values["resample"] = None if values["resample"] is None else int(values["resample"])
        values.update(scale=self.scale, mean=self.mean, std=self.std)
        return {key: value for key, value in values.items() if value is not None}


class ViTFeatureExtractor(nn.Module):
    """A frozen vision transformer in eval mode: pixels in, ``[CLS]`` of the last hidden state out.

    Args:
        model: a model of `transformers` whose output has `last_hidden_state` with the CLS token first.
        preprocessing: what makes its input.
        name: how the model is called in headers and messages.

    Shapes: uint8 ``[B, 3, H, W]`` in, float32 ``[B, D]`` out.
    """

    def __init__(self, model: nn.Module, preprocessing: Preprocessing, name: str):
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.preprocessing, self.name = preprocessing, name
        shape = (1, 3, 1, 1)
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(shape), persistent=False)
        self.register_buffer("std", torch.tensor(preprocessing.std).view(shape), persistent=False)

    @classmethod
    def from_pretrained(cls, name: str | None = None) -> "ViTFeatureExtractor":
        """Load a model from the hub or a local directory; default `config.VIT_MODEL`.

        Raises:
            InputError: the model cannot be had, has no CLS token, or lacks weights of its architecture.
        """
        name = config.VIT_MODEL if name is None else str(name)
        model = _load_backbone(name)
        return cls(model, Preprocessing(_load_processor(name)), Path(name).name if Path(name).is_dir() else name)

    @property
    def feature_size(self) -> int:
        """D, read from the model."""
        return self.model.config.hidden_size

    @property
    def device(self) -> torch.device:
        return self.mean.device

    @property
    def precision(self) -> str:
        """Arithmetic of the forward pass: float32 on CPU, bfloat16 autocast on CUDA."""
        return "bfloat16" if self.device.type == "cuda" else "float32"

    def weights_hash(self) -> str:
        """SHA-256 over names, types, shapes and bytes of all weights."""
        digest = hashlib.sha256()
        for key, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    @torch.inference_mode()
    def forward(self, pixels: Tensor) -> Tensor:
        pixels = (pixels.to(self.device, non_blocking=True).float() * self.preprocessing.scale - self.mean) / self.std
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"):
            hidden = self.model(pixel_values=pixels).last_hidden_state
        return hidden[:, 0].float()

    def train(self, mode: bool = True) -> "ViTFeatureExtractor":
        """Stays in eval mode whatever is asked: the backbone is frozen."""
        return super().train(False)


class ImageClassifier(nn.Module):
    """Frozen ViT and trained classifier joined: pixels in, class probabilities out.

    Shapes: uint8 ``[B, 3, H, W]`` in, ``[B, classes]`` out.
    """

    def __init__(self, extractor: ViTFeatureExtractor, classifier: FeedforwardClassifier, class_names: Sequence[str]):
        super().__init__()
        self.extractor, self.classifier, self.class_names = extractor, classifier, tuple(class_names)

    @torch.inference_mode()
    def forward(self, pixels: Tensor) -> Tensor:
        # Through float16 and back: the classifier was trained on features stored that way.
        return self.classifier(self.extractor(pixels).half().float()).softmax(-1)

    def predict(self, images: Sequence) -> Tensor:
        """RGB ``PIL.Image`` objects -> probabilities ``[len(images), classes]``."""
        return self(torch.stack([self.extractor.preprocessing(image) for image in images]))


def _load_backbone(name: str) -> nn.Module:
    from transformers import AutoModel
    from transformers.utils import logging

    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    hub = getLogger("huggingface_hub")
    hub_level = hub.level
    hub.setLevel("ERROR")  # every retry without network is a warning; the error below says it once
    logging.set_verbosity_error()  # the load report lists the unused classification head: nothing to act on
    logging.disable_progress_bar()
    try:
        model, info = AutoModel.from_pretrained(name, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        looks_like_path = name.startswith(("/", ".", "~")) or name.count("/") > 1
        missing = looks_like_path and not Path(name).exists()
        why = "there is no such folder" if missing else str(error).strip().splitlines()[0].split(". ")[0].rstrip(".")
        raise InputError(
            f"The model '{name}' cannot be had ({why}): give VIT_MODEL a hub name with network access, "
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
    from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        hf_hub_download(name, file)
    except LocalEntryNotFoundError as error:
        if try_to_load_from_cache(name, file) is _CACHED_NO_EXIST:
            return False  # the hub said so once
        raise InputError(f"'{file}' of '{name}' cannot be had: no network, and it is not in the cache.") from error
    except EntryNotFoundError:
        return False
    return True
