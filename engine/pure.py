"""A network as pure functions of its parameters: the parts that the methods of the field are built of."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine.data import Network
from engine.shortcut import NOTHING, ClsShortcut
from engine.stack import Params
from models import HEAD, BackboneTail, FeedforwardClassifier, WholeBackbone


@dataclass(frozen=True, eq=False)
class PureNetwork:
    """One network, without weights of its own: every function takes those of one network, name -> ``[*shape]``.

    Below, inputs are features ``[*, D]``, or tokens ``[*, T, D]`` of a network with blocks.

    Attributes:
        network: outline of what is trained; its blocks, if it has some, have the pretrained weights.
        shortcut: computes features from tokens for a single block; None = the blocks themselves, and without blocks.
    """

    network: Network
    shortcut: ClsShortcut | None = None

    def __post_init__(self) -> None:
        if isinstance(self.network, WholeBackbone):
            raise ValueError("A whole model is trained by the phases alone, not as pure functions.")
        if self.has_blocks and self.shortcut is None:
            self._blocks  # noqa: B018 (made now: under `vmap` no module can be copied)

    @property
    def has_blocks(self) -> bool:
        """Whether the inputs are tokens before pretrained blocks, which are trained too."""
        return isinstance(self.network, BackboneTail)

    @property
    def classifier(self) -> FeedforwardClassifier:
        """Outline of the classifier on features."""
        return self.network.head if self.has_blocks else self.network

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """Names of the classifier's linear layers, first to last."""
        prefix = HEAD if self.has_blocks else ""
        return tuple(f"{prefix}layers.{i}" for i in range(len(self.classifier.layers)))

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """Shape of each parameter, by name, in the module's order."""
        return {name: parameter.shape for name, parameter in self.network.named_parameters()}

    @cached_property
    def block_names(self) -> frozenset[str]:
        """Names of the parameters of the blocks and their norm: all but the classifier's."""
        return frozenset(name for name in self.shapes if self.has_blocks and not name.startswith(HEAD))

    @property
    def feature_size(self) -> int:
        """D."""
        return self.classifier.layers[0].in_features

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.classifier.layers[-1].out_features

    @property
    def width(self) -> int:
        """h, length of the representation: the inputs of the last layer."""
        return self.classifier.layers[-1].in_features

    @cached_property
    def roles(self) -> dict[str, str]:
        """Name of a layer of the block -> what it does; empty without the shortcut."""
        return {} if self.shortcut is None else {name: role for role, name in self.shortcut.names.items()}

    @cached_property
    def input_sizes(self) -> dict[str, int]:
        """Role of each linear layer of the block but a gate -> number of its inputs; empty without the shortcut."""
        if self.shortcut is None:
            return {}
        roles = ("query", "key", "value", "output", "in", "out")
        return {role: self.shapes[f"{self.shortcut.names[role]}.weight"][1] for role in roles}

    @cached_property
    def mlp(self) -> dict[str, Params]:
        """Pretrained layers of the block's MLP: "in", "out", perhaps "gate" -> "weight" and perhaps "bias".

        Empty where the shortcut does not apply. Copies, float32 on the CPU.
        """
        if self.shortcut is None:
            return {}
        known = dict(self.network.named_parameters())
        names = {role: self.shortcut.names[role] for role in ("in", "gate", "out") if role in self.shortcut.names}
        kinds = {role: [k for k in ("weight", "bias") if f"{name}.{k}" in known] for role, name in names.items()}
        return {
            role: {kind: known[f"{name}.{kind}"].detach().float().cpu().clone() for kind in kinds[role]}
            for role, name in names.items()
        }

    @cached_property
    def _blocks(self) -> BackboneTail:
        return self.network.with_head(nn.Identity())

    def features(
        self,
        params: Params,
        inputs: Tensor,
        factors: Mapping[str, Tensor] = NOTHING,
        mlp: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Inputs -> features ``[*, D]``; without blocks they are the same.

        Args:
            factors, mlp: see `ClsShortcut.representation`, for one network: factors ``[*, width]``. They need it.
        """
        if self.shortcut is None and (factors or mlp is not None):
            raise ValueError("Factors on a block's inputs, and another MLP, need a block by its shortcut.")
        if not self.has_blocks:
            return inputs
        tokens, before = inputs.reshape(-1, *inputs.shape[-2:]), inputs.shape[:-2]
        own = {name: params[name] for name in self.block_names}
        if self.shortcut is None:
            with sdpa_kernel(SDPBackend.MATH):  # the fast kernels know neither `vmap` nor second derivatives
                return functional_call(self._blocks, own, (tokens,)).reshape(*before, -1)
        stacked = {name: value[None, None] for name, value in own.items()}
        of_rows = {role: value.reshape(1, 1, -1, value.shape[-1]) for role, value in factors.items()}
        found = self.shortcut.representation(stacked, tokens[None], of_rows, mlp)
        return found.reshape(*before, -1)

    def hidden(self, params: Params, features: Tensor) -> Tensor:
        """Features -> activations of the classifier's last hidden layer, ``[*, h]``; the features if it has none."""
        for name in self.layers[:-1]:
            features = torch.relu(F.linear(features, params[f"{name}.weight"], params[f"{name}.bias"]))
        return features

    def head(self, params: Params, representation: Tensor) -> Tensor:
        """The last layer: ``[*, h]`` -> logits ``[*, classes]``."""
        name = self.layers[-1]
        return F.linear(representation, params[f"{name}.weight"], params[f"{name}.bias"])
