"""The two networks: the frozen ViT that turns an image into features, and the small classifier on top."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


class FeedforwardClassifier(nn.Module):
    """``Linear(D, h1) → ReLU → … → Linear(hk, classes)`` with PyTorch's own initialization.

    The weight matrices *between hidden layers*, of which there are two or more, are the tracked ones: importance and
    masks are defined on them alone. Five hidden layers of ten units have four tracked matrices of 10×10.

    Shapes: input ``[..., D]`` (D = `in_features`), output (logits) ``[..., num_classes]``.
    """

    def __init__(self, in_features: int, num_classes: int, hidden_sizes: Sequence[int]):
        super().__init__()
        sizes = [in_features, *hidden_sizes, num_classes]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))

    def forward(self, features: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            features = torch.relu(layer(features))
        return self.layers[-1](features)

    @classmethod
    def outline(cls, in_features: int, num_classes: int, hidden_sizes: Sequence[int]) -> "FeedforwardClassifier":
        """The same module without weights (on the meta device): draws nothing from the global random generator."""
        with torch.device("meta"):
            return cls(in_features, num_classes, hidden_sizes)

    @property
    def tracked_names(self) -> tuple[str, ...]:
        """Parameter names of the tracked matrices, first to last."""
        return tuple(f"layers.{i}.weight" for i in range(1, len(self.layers) - 1))

    def tracked(self, params: Mapping[str, Tensor]) -> list[Tensor]:
        """The tracked matrices among the parameters of such a network or a stack of them: L × ``[*stack, out, in]``."""
        return [params[name] for name in self.tracked_names]

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(parameter.numel() for parameter in self.parameters())


class Preprocessing:
    """From an RGB image to the pixels a ViT was trained on, by the model's own image processor.

    The geometric part (resize, crop) runs where images are decoded and returns uint8; rescaling and
    normalization are left to `ViTFeatureExtractor.forward`, on its device.
    """

    def __init__(self, processor):
        self.processor = processor
        mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else (0.0, 1.0)
        self.scale = float(processor.rescale_factor if processor.do_rescale else 1.0)
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
            if values[key] is not None:  # there are many ways to give a size: keep those that are set
                values[key] = {name: number for name, number in dict(values[key]).items() if number is not None}
        values["resample"] = None if values["resample"] is None else int(values["resample"])
        values.update(scale=self.scale, mean=self.mean, std=self.std)
        return {key: value for key, value in values.items() if value is not None}


class ViTFeatureExtractor(nn.Module):
    """A frozen vision transformer in eval mode: pixels in, ``[CLS]`` of the last hidden state out.

    `model` is one of `transformers` whose output has `last_hidden_state` with the CLS token first; its `name` is used
    in headers and messages.

    Shapes: uint8 ``[B, 3, H, W]`` in, float32 ``[B, D]`` out.
    """

    def __init__(self, model: nn.Module, preprocessing: Preprocessing, name: str):
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.preprocessing, self.name = preprocessing, name
        for statistic in ("mean", "std"):
            values = torch.tensor(getattr(preprocessing, statistic)).view(1, 3, 1, 1)
            self.register_buffer(statistic, values, persistent=False)

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
        """Stays in eval mode whatever `mode` is: the backbone is frozen."""
        return super().train(False)


class Ensemble(nn.Module):
    """Several classifiers as one: the logarithm of the mean of their probabilities.

    Shapes: input ``[..., D]``, output ``[..., classes]``.
    """

    def __init__(self, members: Iterable[FeedforwardClassifier]):
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, features: Tensor) -> Tensor:
        return torch.stack([member(features).softmax(-1) for member in self.members]).mean(0).log()


class ImageClassifier(nn.Module):
    """Frozen ViT and trained classifier together: pixels in, class probabilities out.

    Shapes: uint8 ``[B, 3, H, W]`` in, ``[B, classes]`` out.
    """

    def __init__(self, extractor: ViTFeatureExtractor, classifier: nn.Module, class_names: Sequence[str]):
        super().__init__()
        self.extractor, self.classifier, self.class_names = extractor, classifier, tuple(class_names)

    @torch.inference_mode()
    def forward(self, pixels: Tensor) -> Tensor:
        # Through float16 and back: the classifier was trained on features stored that way.
        return self.classifier(self.extractor(pixels).half().float()).softmax(-1)

    def predict(self, images: Sequence) -> Tensor:
        """RGB ``PIL.Image`` objects -> probabilities ``[len(images), classes]``."""
        return self(torch.stack([self.extractor.preprocessing(image) for image in images]))
