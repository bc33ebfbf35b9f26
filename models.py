"""The networks: the frozen model that turns images into features, and what is trained on top or of its last blocks."""

import copy
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from config import InputError

HEAD = "head."  # before the names of the classifier's parameters in a network with blocks


class FeedforwardClassifier(nn.Module):
    """``Linear(D, h1) → ReLU → … → Linear(hk, classes)`` with PyTorch's own initialization.

    The weight matrices *between hidden layers*, of which there are two or more, are the tracked ones: importance and
    masks are defined on them alone. Five hidden layers of ten units have four tracked matrices of 10×10.

    Shapes: input ``[..., D]`` (D = `in_features`), output (logits) ``[..., num_classes]``.
    """

    chained = True  # the tracked matrices follow one another: rows of one and columns of the next are the same units

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


class BackboneTail(nn.Module):
    """The last blocks of a vision transformer, its final norm, and a classifier on ``[CLS]``.

    It reproduces what the transformer computes from the tokens before those blocks: before training, `representation`
    is the feature that `FeatureExtractor` gives for the image. The weight matrices of the blocks are the tracked
    ones: they start from the same pretrained weights in both phases and for every seed, so that a position in a mask
    means the same weight everywhere.

    Shapes: tokens ``[B, T, D]`` in, ``[CLS]`` first; logits ``[B, num_classes]`` out.

    Args:
        blocks: of the transformer, first to last; they are copied.
        arguments: what each block takes besides the tokens, positional and by name, the same for every image.
        norm: after the last block; None where the transformer's last hidden state has none. It is copied.
        head: the classifier on ``[CLS]``, or `torch.nn.Identity` for none.
    """

    chained = False

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        arguments: Sequence[tuple[tuple, Mapping[str, object]]],
        norm: nn.Module | None,
        head: FeedforwardClassifier,
    ):
        super().__init__()
        self.blocks = nn.ModuleList(copy.deepcopy(block) for block in blocks).requires_grad_(True)
        self.norm = nn.Identity() if norm is None else copy.deepcopy(norm).requires_grad_(True)
        self.head, self.arguments = head, tuple(arguments)
        self.eval()  # no dropout in the blocks

    def _apply(self, fn, recurse: bool = True) -> "BackboneTail":
        super()._apply(fn, recurse)
        self.arguments = _mapped(fn, self.arguments)  # to another device or type, as the parameters
        return self

    def with_head(self, head: nn.Module) -> "BackboneTail":
        """A copy with another classifier."""
        return BackboneTail(self.blocks, self.arguments, self.norm, head)

    def representation(self, tokens: Tensor) -> Tensor:
        """The last ``[CLS]``: ``[B, T, D]`` -> ``[B, D]``."""
        for block, (more, named) in zip(self.blocks, self.arguments, strict=True):
            tokens = block(tokens, *more, **named)
            tokens = tokens[0] if isinstance(tokens, tuple) else tokens
        return self.norm(tokens[:, 0])

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.representation(tokens))

    @property
    def tracked_names(self) -> tuple[str, ...]:
        """Parameter names of the weight matrices of the blocks, in the module's order."""
        linear = [name for name, module in self.blocks.named_modules() if isinstance(module, nn.Linear)]
        return tuple(f"blocks.{name}.weight" for name in linear)

    def tracked(self, params: Mapping[str, Tensor]) -> list[Tensor]:
        """The tracked matrices among the parameters of such a network or a stack of them: L × ``[*stack, out, in]``."""
        return [params[name] for name in self.tracked_names]

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(parameter.numel() for parameter in self.parameters())

    def train(self, mode: bool = True) -> "BackboneTail":
        """The blocks stay in eval mode whatever `mode` is: they are trained without dropout."""
        return super().train(False)


class WholeBackbone(BackboneTail):
    """A whole vision transformer, or another model of blocks, and a classifier on its features.

    Before training, `representation` is the feature that `FeatureExtractor` gives for the image. The weight matrices of
    all blocks are the tracked ones. Like `BackboneTail` it is always in eval mode: there is no dropout.

    Shapes: uint8 pixels, or their values as floats, ``[B, 3, H, W]`` in; logits ``[B, num_classes]`` out.

    Args:
        extractor: the model with its preprocessing; it is copied.
        head: the classifier, or `torch.nn.Identity` for none.
    """

    def __init__(self, extractor: "FeatureExtractor", head: nn.Module):
        nn.Module.__init__(self)
        extractor = copy.deepcopy(extractor).requires_grad_(True)
        self.blocks = transformer_blocks(extractor.model)  # first: their parameters are called so
        self.extractor, self.sequence = extractor, extractor.sequence
        self.head, self.arguments = head, ()
        self.eval()

    def with_head(self, head: nn.Module) -> "WholeBackbone":
        return WholeBackbone(self.extractor, head)

    def representation(self, pixels: Tensor) -> Tensor:
        """Features: ``[B, 3, H, W]`` -> ``[B, D]``."""
        return self.extractor.features(pixels)


def _mapped(function: Callable[[Tensor], Tensor], value: object) -> object:
    """`value` with the function applied to each tensor in it."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {name: _mapped(function, inner) for name, inner in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_mapped(function, inner) for inner in value)
    return value


def transformer_blocks(model: nn.Module) -> nn.ModuleList:
    """The blocks of a vision transformer of `transformers`, first to last.

    Raises:
        InputError: the model has no one list of as many blocks as its configuration says.
    """
    depth = getattr(model.config, "num_hidden_layers", None)
    found = [part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == depth]
    if len(found) != 1:
        raise InputError(
            f"The blocks of a {type(model).__name__} cannot be told apart: use a ViT, DeiT, DINOv2 or CLIP."
        )
    return found[0]


class Preprocessing:
    """From an RGB image to the pixels a backbone was trained on, by the model's own image processor.

    The geometric part (resize, crop) runs where images are decoded and returns uint8; what follows is the same for
    every pixel of a channel, ``(pixel · scale − mean) / std``, and is left to `FeatureExtractor.forward`, on its
    device.

    Args:
        processor: an image processor of `transformers`.

    Raises:
        ValueError: the processor does something else to the values of pixels.
    """

    GEOMETRY = ("do_resize", "size", "resample", "do_center_crop", "crop_size", "default_to_square", "backend")
    GEOMETRY += ("crop_pct", "do_flip_channel_order", "do_pad", "pad_size", "size_divisor", "keep_aspect_ratio")
    GEOMETRY += ("ensure_multiple_of",)

    def __init__(self, processor):
        self.processor = processor
        self._raw = {"do_rescale": False, "do_normalize": False}
        if hasattr(processor, "include_top"):  # EfficientNet's normalizes a second time
            self._raw["include_top"] = False
        mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else (0.0, 1.0)
        self.scale = float(processor.rescale_factor if processor.do_rescale else 1.0)
        self.mean = [float(m) for m in (mean if isinstance(mean, (list, tuple)) else [mean] * 3)]
        self.std = [float(s) for s in (std if isinstance(std, (list, tuple)) else [std] * 3)]
        self._agree_with_processor()

    def _agree_with_processor(self) -> None:
        """Take mean and std from what the processor makes of black and white, where its formula is another one."""
        black, white, grey = (self._values(level) for level in (0, 255, 100))
        if self._differs(grey, 100):
            std = [255 / float(w - b) for b, w in zip(black, white, strict=True)]
            self.scale, self.mean, self.std = 1.0, [-float(b) * s for b, s in zip(black, std, strict=True)], std
        if self._differs(grey, 100) or self._differs(white, 255):
            raise ValueError("its image processor does not treat all pixels alike")

    def _values(self, level: int) -> Tensor:
        """What the processor makes of a pixel of an even image: ``[3]``."""
        image = Image.new("RGB", (64, 64), (level, level, level))
        pixels = self.processor(image, return_tensors="pt", do_resize=False, do_center_crop=False)["pixel_values"][0]
        return pixels.flatten(1)[:, pixels[0].numel() // 2]

    def _differs(self, values: Tensor, level: int) -> bool:
        expected = (level * self.scale - torch.tensor(self.mean)) / torch.tensor(self.std)
        return not torch.allclose(values.float(), expected, rtol=1e-4, atol=1e-4)

    def __call__(self, image: Image.Image) -> Tensor:
        """An image in RGB -> uint8 ``[3, H, W]``."""
        pixels = self.processor(image, return_tensors="pt", **self._raw)["pixel_values"][0]
        return pixels.to(torch.uint8)

    def describe(self) -> dict[str, object]:
        """What determines the pixels, ready for JSON: part of the cache key and of the file's header."""
        values = {key: getattr(self.processor, key, None) for key in self.GEOMETRY}
        for key in ("size", "crop_size", "pad_size"):
            if values[key] is not None:  # there are many ways to give a size: keep those that are set
                values[key] = {name: number for name, number in dict(values[key]).items() if number is not None}
        values["resample"] = None if values["resample"] is None else int(values["resample"])
        values.update(scale=self.scale, mean=self.mean, std=self.std)
        return {key: value for key, value in values.items() if value is not None}


class TimmPreprocessing(Preprocessing):
    """The same by the evaluation transforms of a model of `timm`, in the wrapper that `transformers` has for them."""

    def __init__(self, processor):
        steps = processor.val_transforms.transforms
        kinds = [type(step).__name__ for step in steps]
        if kinds[-2:] not in (["ToTensor", "Normalize"], ["MaybeToTensor", "Normalize"]):
            raise ValueError(f"its image transforms end with {', '.join(kinds[-2:])}")
        self.processor, self.geometry = processor, steps[:-2]
        self.scale = 1 / 255
        self.mean, self.std = ([float(v) for v in getattr(steps[-1], name)] for name in ("mean", "std"))

    def __call__(self, image: Image.Image) -> Tensor:
        for step in self.geometry:
            image = step(image)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()

    def describe(self) -> dict[str, object]:
        keys = ("input_size", "interpolation", "crop_pct", "crop_mode")
        values = {key: self.processor.data_config[key] for key in keys if key in self.processor.data_config}
        return values | {"backend": "timm", "scale": self.scale, "mean": self.mean, "std": self.std}


def has_cls_token(model: nn.Module) -> bool:
    """Whether a model puts a CLS token before the patches."""
    return any(name.split(".")[-1] in ("cls_token", "class_embedding") for name, _ in model.named_parameters())


def image_size(model: nn.Module) -> tuple[int, int]:
    """Height and width of the images that a model takes; 224 each where its configuration does not say."""
    if about_timm := getattr(model.config, "pretrained_cfg", None):
        return _pair(about_timm["input_size"][-2:])
    return _pair(getattr(model.config, "image_size", None) or 224)


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width, from one number for both or from two."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


class _Output(NamedTuple):
    """What an image model makes of images."""

    hidden: Tensor  # the last hidden state, tokens [B, T, D] or a map [B, D, H, W]
    pooled: Tensor | None  # as the model itself pools
    size: tuple[int, int]  # height and width of the images


LAYER_KINDS = ("cls", "mean")  # of each block, in this order: its [CLS], and the mean of its patch tokens


class FeatureExtractor(nn.Module):
    """A frozen image model in eval mode, a ViT or any other: pixels in, features out.

    Shapes: uint8 ``[B, 3, H, W]`` in, float32 ``[B, D]`` out.

    Args:
        model: one of `transformers` that takes `pixel_values`, or a backbone of its `AutoBackbone`.
        name: used in headers and messages.
        layers: which features. "last" (the default): of the model's last hidden state, after the final norm if there
            is one, pooled; D is the width of the model. "all", for vision transformers with a CLS token: of every
            block, first to last, the ``[CLS]`` and the mean of the patch tokens (`LAYER_KINDS`) as they leave the
            block, which is before the final norm; D is blocks · 2 · width.
        pooling: how the last hidden state becomes a vector. "cls": the CLS token. "mean": the mean of all patch tokens
            or positions of the map. "pooler": as the model itself pools for its classifier. "auto" (the default): the
            first of "cls", "pooler", "mean" that the model has.
    """

    def __init__(
        self, model: nn.Module, preprocessing: Preprocessing, name: str, layers: str = "last", pooling: str = "auto"
    ):
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.preprocessing, self.name, self.layers, self._wanted_pooling = preprocessing, name, layers, pooling
        for statistic in ("mean", "std"):
            values = torch.tensor(getattr(preprocessing, statistic)).view(1, 3, 1, 1)
            self.register_buffer(statistic, values, persistent=False)

    @cached_property
    def pooling(self) -> str:
        """How features are pooled, what "auto" took: "cls", "pooler" or "mean".

        Raises:
            InputError: the model does not pool as was asked for.
        """
        can = {"cls": has_cls_token(self.model) and self._example.hidden.ndim == 3}
        can |= {"pooler": self._example.pooled is not None, "mean": True}
        wanted = self._wanted_pooling
        if wanted == "auto":
            return next(name for name, possible in can.items() if possible)
        if not can[wanted]:
            lacking = "CLS token" if wanted == "cls" else "pooled output"
            raise InputError(f"The model '{self.name}' has no {lacking}: POOLING must be 'auto' or 'mean' for it.")
        return wanted

    @cached_property
    def _example(self) -> _Output:
        """What the model makes of a random image: tells shapes, and what there is."""
        return self._output(self._random_pixels(1))

    def _random_pixels(self, count: int) -> Tensor:
        """Random images of the size that the model is given, uint8 ``[count, 3, H, W]``."""
        height, width = image_size(self.model)
        size = self.preprocessing(Image.new("RGB", (width, height))).shape[-2:]
        draw = torch.Generator().manual_seed(0)
        return torch.randint(0, 256, (count, 3, *size), generator=draw, dtype=torch.uint8)

    @cached_property
    def feature_size(self) -> int:
        """D, measured on an image."""
        if self.layers == "all":
            return len(transformer_blocks(self.model)) * len(LAYER_KINDS) * self.model.config.hidden_size
        return self._pool(self._example).shape[1]

    def describe_layers(self) -> dict[str, object] | None:
        """Which column is what, ready for JSON: rows are ``[blocks, kinds, width]``; None for the last layer alone."""
        if self.layers == "last":
            return None
        blocks, width = len(transformer_blocks(self.model)), self.model.config.hidden_size
        return {"blocks": blocks, "kinds": list(LAYER_KINDS), "width": width}

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
        return self.features(pixels)

    def features(self, pixels: Tensor) -> Tensor:
        """What `forward` gives, with gradients where they are on."""
        return self._pool(self._output(pixels)) if self.layers == "last" else self._all_layers(pixels)

    def _pool(self, output: _Output) -> Tensor:
        """Features ``[B, D]``, float32."""
        hidden, pooled = output.hidden, output.pooled
        hidden = hidden if hidden.dtype == torch.float64 else hidden.float()
        if self.pooling == "cls":
            return hidden[:, 0]
        if self.pooling == "pooler":
            return pooled.flatten(1).float()
        if hidden.ndim == 3:
            return hidden[:, self._prefix(hidden.shape[1], output.size) :].mean(1)
        last = pooled is not None and pooled.flatten(1).shape[1] == hidden.shape[-1] != hidden.shape[1]
        return hidden.mean((1, 2) if last else (2, 3))  # some models have channels last

    def _all_layers(self, pixels: Tensor) -> Tensor:
        """``[CLS]`` and mean patch of every block, in one pass: ``[B, blocks · 2 · width]``."""
        if self.pooling != "cls":
            raise InputError(
                f"FEATURE_LAYERS = 'all' needs a CLS token, and '{self.name}' has none, or POOLING is set."
            )
        found, prefix = [], None

        def note(_block, _inputs, tokens: Tensor | tuple) -> None:
            nonlocal prefix
            tokens = (tokens[0] if isinstance(tokens, tuple) else tokens).float()
            prefix = self._prefix(tokens.shape[1], tuple(pixels.shape[-2:])) if prefix is None else prefix
            found.extend((tokens[:, 0], tokens[:, prefix:].mean(1)))

        hooks = [block.register_forward_hook(note) for block in transformer_blocks(self.model)]
        try:
            self._output(pixels)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.cat(found, dim=1)

    def _prefix(self, tokens: int, size: tuple[int, int]) -> int:
        """How many tokens of an image of that size stand before those of its patches: CLS, distillation, registers."""
        if (timm_model := getattr(self.model, "timm_model", None)) is not None:
            return getattr(timm_model, "num_prefix_tokens", 0)
        if not has_cls_token(self.model):
            return 0
        height, width = _pair(getattr(self.model.config, "patch_size", None) or 0)
        patches = (size[0] // height) * (size[1] // width) if height and width else 0
        after = getattr(self.model.config, "num_detection_tokens", 0)
        if after or not 0 < patches < tokens:
            raise InputError(
                f"The patch tokens of '{self.name}' cannot be told from its other tokens: leave out FEATURE_LAYERS and "
                "POOLING, or use a ViT, DeiT, DINOv2 or CLIP."
            )
        return tokens - patches

    @torch.no_grad()
    def tokens(self, pixels: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
        """Features, and the tokens before the last `blocks` blocks: float32 ``[B, D]`` and ``[B, T, D]``."""
        features, (seen, *_), _ = self._observe(pixels, transformer_blocks(self.model)[-blocks])
        return features[:, 0].float(), seen.float()

    @torch.no_grad()  # not inference mode: what is observed here is used in training
    def tail(self, blocks: int) -> BackboneTail:
        """The last blocks and the norm after them, with no classifier: tokens ``[B, T, D]`` to features ``[B, D]``.

        Raises:
            InputError: there are fewer blocks, or the features cannot be computed from the tokens before them.
        """
        every = transformer_blocks(self.model)
        if self.pooling != "cls":
            raise InputError(f"TRAINED_BLOCKS needs features that are a CLS token, and '{self.name}' gives others.")
        if not 1 <= blocks <= len(every):
            raise InputError(f"TRAINED_BLOCKS must lie in 1 … {len(every)}, the blocks of '{self.name}', not {blocks}.")
        pixels = self._random_pixels(2)
        calls = [self._observe(pixels, block, exact=True) for block in every[-blocks:]]
        wanted, arguments = calls[0][0][:, 0], [(tuple(more), named) for _, (_, *more), named in calls]
        tokens = calls[0][1][0]
        for norm in (None, *(part for name, part in self.model.named_children() if "norm" in name)):
            tail = BackboneTail(every[-blocks:], arguments, norm, nn.Identity())
            found = tail(tokens)
            if torch.allclose(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max())):
                return tail
        raise InputError(f"The blocks of '{self.name}' cannot be split: use a ViT, DeiT, DINOv2 or CLIP.")

    @cached_property
    def sequence(self) -> int:
        """T, tokens of an image in each block, measured on one."""
        _, (seen, *_), _ = self._observe(self._random_pixels(1), transformer_blocks(self.model)[0])
        return seen.shape[1]

    def whole(self) -> WholeBackbone:
        """The whole model to be trained, with no classifier: pixels to features ``[B, D]``.

        Raises:
            InputError: its blocks cannot be told apart, or it gives features of all layers.
        """
        if self.layers != "last":
            raise InputError("FEATURE_LAYERS = 'all' and TRAINED_BLOCKS exclude each other.")
        return WholeBackbone(self, nn.Identity())

    def _observe(self, pixels: Tensor, block: nn.Module, exact: bool = False) -> tuple[Tensor, tuple, dict]:
        """The last hidden state, and what a block was called with on the way there."""
        seen = []
        hook = block.register_forward_pre_hook(lambda _, *given: seen.append(given), with_kwargs=True)
        with hook:
            hidden = self._output(pixels, exact).hidden
        return hidden, *seen[0]

    def _output(self, pixels: Tensor, exact: bool = False) -> _Output:
        """What the model makes of pixels; `exact`: in float32 whatever the device."""
        size = pixels.shape[-2], pixels.shape[-1]
        pixels = pixels.to(self.device, non_blocking=True)
        pixels = pixels if pixels.dtype == torch.float64 else pixels.float()  # float64: tests alone
        pixels = (pixels * self.preprocessing.scale - self.mean) / self.std
        bfloat16 = self.device.type == "cuda" and not exact
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bfloat16):
            output = self.model(pixel_values=pixels)
        if (maps := getattr(output, "feature_maps", None)) is not None:  # of a backbone
            return _Output(maps[-1], None, size)
        return _Output(output.last_hidden_state, getattr(output, "pooler_output", None), size)

    def train(self, mode: bool = True) -> "FeatureExtractor":
        """Stays in eval mode whatever `mode` is: the backbone is frozen."""
        return super().train(False)


class Ensemble(nn.Module):
    """Several networks as one: the logarithm of the mean of their probabilities.

    Shapes: input as theirs, ``[..., D]`` or tokens ``[B, T, D]``; output ``[..., classes]``.
    """

    def __init__(self, members: Iterable[FeedforwardClassifier | BackboneTail]):
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, features: Tensor) -> Tensor:
        return torch.stack([member(features).softmax(-1) for member in self.members]).mean(0).log()


class ImageClassifier(nn.Module):
    """Frozen backbone and what was trained on it together: pixels in, class probabilities out.

    Shapes: uint8 ``[B, 3, H, W]`` in, ``[B, classes]`` out.

    Args:
        classifier: of features ``[B, D]``; with `blocks`, of the tokens ``[B, T, D]`` before so many last blocks of the
            ViT, whose place it takes; with "all", of pixels.
        stored: type in which the classifier's training data were stored.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        classifier: nn.Module,
        class_names: Sequence[str],
        blocks: int | str = 0,
        stored: torch.dtype = torch.float16,
    ):
        super().__init__()
        self.extractor, self.classifier, self.class_names = extractor, classifier, tuple(class_names)
        self.blocks, self.stored = blocks, stored

    @torch.inference_mode()
    def forward(self, pixels: Tensor) -> Tensor:
        if self.blocks == "all":
            return self.classifier(pixels).softmax(-1)
        inputs = self.extractor.tokens(pixels, self.blocks)[1] if self.blocks else self.extractor(pixels)
        # Through the type that they were stored in and back: the classifier was trained on such.
        return self.classifier(inputs.to(self.stored).float()).softmax(-1)

    def predict(self, images: Sequence) -> Tensor:
        """RGB ``PIL.Image`` objects -> probabilities ``[len(images), classes]``."""
        pixels = [self.extractor.preprocessing(image) for image in images]
        if len({part.shape for part in pixels}) > 1:
            raise InputError(f"'{self.extractor.name}' does not resize images, and these differ in size: resize them.")
        return self(torch.stack(pixels))
