"""The networks: the frozen ViT that turns an image into features, and what is trained on top or of its last blocks."""

import copy
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from config import InputError


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
    is the feature that `ViTFeatureExtractor` gives for the image. The weight matrices of the blocks are the tracked
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


LAYER_KINDS = ("cls", "mean")  # of each block, in this order: its [CLS], and the mean of its patch tokens


class ViTFeatureExtractor(nn.Module):
    """A frozen vision transformer in eval mode: pixels in, features out.

    Shapes: uint8 ``[B, 3, H, W]`` in, float32 ``[B, D]`` out.

    Args:
        model: one of `transformers` whose output has `last_hidden_state` with the CLS token first.
        name: used in headers and messages.
        layers: which features. "last" (the default): ``[CLS]`` of the last hidden state, after the final norm; D is the
            width of the model. "all": of every block, first to last, the ``[CLS]`` and the mean of the patch tokens
            (`LAYER_KINDS`) as they leave the block, which is before the final norm; D is blocks · 2 · width.
    """

    def __init__(self, model: nn.Module, preprocessing: Preprocessing, name: str, layers: str = "last"):
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.preprocessing, self.name, self.layers = preprocessing, name, layers
        for statistic in ("mean", "std"):
            values = torch.tensor(getattr(preprocessing, statistic)).view(1, 3, 1, 1)
            self.register_buffer(statistic, values, persistent=False)

    @property
    def feature_size(self) -> int:
        """D, read from the model."""
        width = self.model.config.hidden_size
        return width if self.layers == "last" else len(transformer_blocks(self.model)) * len(LAYER_KINDS) * width

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
        return self._hidden(pixels)[:, 0].float() if self.layers == "last" else self._all_layers(pixels)

    def _all_layers(self, pixels: Tensor) -> Tensor:
        """``[CLS]`` and mean patch of every block, in one pass: ``[B, blocks · 2 · width]``."""
        found, prefix = [], None

        def note(_block, _inputs, tokens: Tensor | tuple) -> None:
            nonlocal prefix
            tokens = (tokens[0] if isinstance(tokens, tuple) else tokens).float()
            prefix = self._prefix(pixels, tokens) if prefix is None else prefix
            found.extend((tokens[:, 0], tokens[:, prefix:].mean(1)))

        hooks = [block.register_forward_hook(note) for block in transformer_blocks(self.model)]
        try:
            self._hidden(pixels)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.cat(found, dim=1)

    def _prefix(self, pixels: Tensor, tokens: Tensor) -> int:
        """How many tokens stand before those of the patches: CLS, distillation token, registers."""
        size = getattr(self.model.config, "patch_size", None)
        height, width = (size, size) if isinstance(size, int) else size or (0, 0)
        patches = (pixels.shape[-2] // height) * (pixels.shape[-1] // width) if height and width else 0
        after = getattr(self.model.config, "num_detection_tokens", 0)
        if after or not 0 < patches < tokens.shape[1]:
            raise InputError(
                f"The patch tokens of '{self.name}' cannot be told from its other tokens: leave out FEATURE_LAYERS, or "
                "use a ViT, DeiT, DINOv2 or CLIP."
            )
        return tokens.shape[1] - patches

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
        if not 1 <= blocks <= len(every):
            raise InputError(f"TRAINED_BLOCKS must lie in 1 … {len(every)}, the blocks of '{self.name}', not {blocks}.")
        size = getattr(self.model.config, "image_size", 224)  # of one side, or height and width
        height, width = (size, size) if isinstance(size, int) else size
        draw = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (2, 3, height, width), generator=draw, dtype=torch.uint8)
        calls = [self._observe(pixels, block, exact=True) for block in every[-blocks:]]
        wanted, arguments = calls[0][0][:, 0], [(tuple(more), named) for _, (_, *more), named in calls]
        tokens = calls[0][1][0]
        for norm in (None, *(part for name, part in self.model.named_children() if "norm" in name)):
            tail = BackboneTail(every[-blocks:], arguments, norm, nn.Identity())
            found = tail(tokens)
            if torch.allclose(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max())):
                return tail
        raise InputError(f"The blocks of '{self.name}' cannot be split: use a ViT, DeiT, DINOv2 or CLIP.")

    def _observe(self, pixels: Tensor, block: nn.Module, exact: bool = False) -> tuple[Tensor, tuple, dict]:
        """The last hidden state, and what a block was called with on the way there."""
        seen = []
        hook = block.register_forward_pre_hook(lambda _, *given: seen.append(given), with_kwargs=True)
        with hook:
            hidden = self._hidden(pixels, exact)
        return hidden, *seen[0]

    def _hidden(self, pixels: Tensor, exact: bool = False) -> Tensor:
        """The last hidden state ``[B, T, D]``; `exact`: in float32 whatever the device."""
        pixels = (pixels.to(self.device, non_blocking=True).float() * self.preprocessing.scale - self.mean) / self.std
        bfloat16 = self.device.type == "cuda" and not exact
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bfloat16):
            return self.model(pixel_values=pixels).last_hidden_state

    def train(self, mode: bool = True) -> "ViTFeatureExtractor":
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
    """Frozen ViT and what was trained on it together: pixels in, class probabilities out.

    Shapes: uint8 ``[B, 3, H, W]`` in, ``[B, classes]`` out.

    Args:
        classifier: of features ``[B, D]``; with `blocks`, of the tokens ``[B, T, D]`` before so many last blocks of the
            ViT, whose place it takes.
        stored: type in which the classifier's training data were stored.
    """

    def __init__(
        self,
        extractor: ViTFeatureExtractor,
        classifier: nn.Module,
        class_names: Sequence[str],
        blocks: int = 0,
        stored: torch.dtype = torch.float16,
    ):
        super().__init__()
        self.extractor, self.classifier, self.class_names = extractor, classifier, tuple(class_names)
        self.blocks, self.stored = blocks, stored

    @torch.inference_mode()
    def forward(self, pixels: Tensor) -> Tensor:
        inputs = self.extractor.tokens(pixels, self.blocks)[1] if self.blocks else self.extractor(pixels)
        # Through the type that they were stored in and back: the classifier was trained on such.
        return self.classifier(inputs.to(self.stored).float()).softmax(-1)

    def predict(self, images: Sequence) -> Tensor:
        """RGB ``PIL.Image`` objects -> probabilities ``[len(images), classes]``."""
        return self(torch.stack([self.extractor.preprocessing(image) for image in images]))
