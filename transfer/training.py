"""Fine-tuning of many small CNNs at once: frozen layers run once per image, small layers of many networks together.

`train_one` trains one network with the plain loop of `trainer_phase1.train_network`; `train_stack` does the same for S
repeats and V arms that share the batches of their repeat, and is tested against it. It is faster for three reasons:

- the layers that all arms of the stack freeze are run once per image that is drawn, and never trained through;
- where maps are small, the convolutions of many networks are one grouped convolution (`networks_at_a_time`);
- where they are large, grouping would overflow the caches: networks are trained one by one, channels last.

Shapes: S repeats, V arms, U updates, B images per batch, K checkpoints, N test images.
"""

import copy
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine import FlatAdam, Params
from importance import step_with_rates
from trainer_phase1 import train_network
from transfer.arms import layers_of
from transfer.convnet import ConvClassifier
from transfer.images import Examples

REPEATS_PER_UNIT = 5  # trained together and written together
STACK_BYTES = 2**20  # of the largest maps of a stack on a CPU: what its second-level cache holds
FEWEST_TOGETHER = 3  # networks; fewer are trained one by one
CACHE_BYTES = 2**29  # of the maps that frozen layers give of one repeat's images; more are computed when they are used
PIECE_FLOATS = 2**21  # of the largest maps while many images are classified or run through frozen layers


class Course(NamedTuple):
    """What networks are trained and tested on, and how."""

    examples: Examples
    batches: Tensor  # rows of the examples, int64 [S, U, B]: each repeat has its own, which its arms share
    checkpoints: Sequence[int]  # after how many updates test images are classified, ascending; the last is U
    learning_rate: float
    tick: Callable[[], object] = lambda: None  # called for each network and checkpoint

    def of(self, repeats: slice) -> "Course":
        """That of some repeats."""
        return self._replace(batches=self.batches[repeats])


def draw_start(network: nn.Module, draw: torch.Generator) -> Params:
    """PyTorch's own initialization of convolutions and linear layers, in the order of the network's parameters.

    `network` may be an outline on the meta device; the numbers are float32, on the CPU.
    """
    params = {}
    for weight, bias in layers_of(dict(network.named_parameters())):
        shape = network.get_parameter(weight).shape
        params[weight] = nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5), generator=draw)
        bound = 1 / math.sqrt(shape[1:].numel())
        params[bias] = torch.empty(shape[0]).uniform_(-bound, bound, generator=draw)
    return params


def draw_batches(rows: Tensor, batch_size: int, updates: int, draw: torch.Generator) -> Tensor:
    """Batches of equal size: one permutation of the rows after the other, cut into pieces.

    Args:
        rows: row numbers, int64 ``[n]``.
        batch_size: at most; all rows where there are fewer.

    Returns:
        int64 ``[U, B]``.
    """
    size = min(batch_size, len(rows))
    passes = math.ceil(updates * size / len(rows))
    order = torch.cat([rows[torch.randperm(len(rows), generator=draw)] for _ in range(passes)])
    return order[: updates * size].view(updates, size)


def train_one(
    network: nn.Module,
    start: Params,
    freeze: Params,
    examples: Examples,
    batches: Tensor,
    checkpoints: Sequence[int],
    learning_rate: float,
) -> tuple[Params, Tensor]:
    """Train one network by the plain loop: the reference of `train_stack`.

    Args:
        network: an outline; it is not changed.
        start, freeze: initial values, and where they stay (bool), by parameter.
        batches: rows of `examples`, int64 ``[U, B]``.
        checkpoints: after how many updates test images are classified, ascending; the last is U.

    Returns:
        Final parameters, and right answers on the test images by class, int64 ``[K, classes]``.
    """
    network = copy.deepcopy(network).to_empty(device=examples.inputs.device).to(examples.inputs.dtype)
    network.load_state_dict(start)
    rates = {p: (~freeze[name]).to(p) for name, p in network.named_parameters() if freeze[name].any()}
    counts = []

    def stretches():
        for first, last in pairwise((0, *checkpoints)):
            yield batches[first:last]
            with torch.no_grad():
                right = network(examples.test_inputs).argmax(-1) == examples.test_labels
            counts.append(torch.bincount(examples.test_labels[right], minlength=examples.classes))

    train_network(network, examples.inputs, examples.labels, stretches(), learning_rate, lambda epoch: rates)
    return {name: value.detach() for name, value in network.named_parameters()}, torch.stack(counts)


def train_stack(
    network: ConvClassifier,
    start: Params,
    freeze: Params,
    prefix: int,
    course: Course,
) -> tuple[Params, Tensor]:
    """Train V arms of S repeats.

    Args:
        network: an outline, the same for all.
        start, freeze: name -> ``[S, V, *shape]``, see `train_one`.
        prefix: number of first layers that all these arms freeze, and that are the same in all arms of a repeat.

    Returns:
        Final parameters ``[S, V, *shape]``, and right answers by class, int64 ``[S, V, K, classes]``; -1 where a
        network's outputs were not finite.
    """
    examples, batches = course.examples, course.batches
    seeds, arms = next(iter(start.values())).shape[:2]
    together = networks_at_a_time(network, prefix, batches.shape[-1], examples.inputs.is_cuda)
    per_stack = max(1, together // arms), min(arms, together)  # repeats and arms
    final = {name: torch.empty_like(value) for name, value in start.items()}
    counts = batches.new_empty(seeds, arms, len(course.checkpoints), examples.classes)
    for s in range(0, seeds, per_stack[0]):
        some = slice(s, s + per_stack[0])
        own = [{name: value[i, 0] for name, value in start.items()} for i in range(s, min(seeds, s + per_stack[0]))]
        seen = [
            SeenInputs(network, params, prefix, examples, rows) for params, rows in zip(own, batches[some], strict=True)
        ]
        for v in range(0, arms, per_stack[1]):
            part = some, slice(v, v + per_stack[1])
            given = ({name: value[part] for name, value in values.items()} for values in (start, freeze))
            stack = ConvStack(network, *given, prefix, course.learning_rate)
            counts[part] = _train(stack, seen, course.of(some))
            for name, value in stack.params.items():
                final[name][part] = value
    return final, counts


def networks_at_a_time(network: ConvClassifier, prefix: int, batch_size: int, cuda: bool = False) -> int:
    """How many networks' convolutions to compute as one; 1 = one by one.

    On a CPU as many as keep the largest maps of a batch within `STACK_BYTES`: measured, grouping 28×28 maps is slower
    than one network after the other, and grouping 7×7 maps is 1.5 to 12 times faster.
    """
    if prefix == network.depth:  # linear layers, which are batched products
        return 1024
    side = network.size >> prefix // network.pool_every
    fit = STACK_BYTES // (4 * batch_size * network.channels * side**2)
    return 1024 if cuda else fit if fit >= FEWEST_TOGETHER else 1


class SeenInputs:
    """What the first trained layer sees of one repeat's images: of the batches' rows, and of the test images.

    Frozen layers are run once for each image that is drawn at all, unless that takes more memory than `CACHE_BYTES`;
    then they are run whenever an image is used.
    """

    def __init__(self, network: ConvClassifier, params: Params, prefix: int, examples: Examples, batches: Tensor):
        self.network, self.params, self.prefix = network, params, prefix
        self.number = None  # of a row among those that are kept
        self.train, self.test = examples.inputs, examples.test_inputs
        self.cached_train, self.cached_test = prefix == 0, prefix == 0
        size = 4 * network.flat_size(prefix)
        if prefix and size * len(self.test) <= CACHE_BYTES:
            self.test, self.cached_test = self._run(self.test), True
        if prefix and size * min(len(self.train), batches.numel()) <= CACHE_BYTES:
            rows = batches.unique()
            self.number = rows.new_empty(len(self.train))
            self.number[rows] = torch.arange(len(rows), device=rows.device)
            self.train, self.cached_train = self._run(self.train[rows]), True

    def batch(self, rows: Tensor) -> Tensor:
        """Of rows ``[B]``: ``[B, C, H, W]``."""
        inputs = self.train[rows if self.number is None else self.number[rows]]
        return inputs if self.cached_train else self._run(inputs)

    def of_test(self, rows: slice) -> Tensor:
        """Of some of the test images."""
        return self.test[rows] if self.cached_test else self._run(self.test[rows])

    @torch.no_grad()
    def _run(self, images: Tensor) -> Tensor:
        layers = layers_of(self.params)[: self.prefix]
        parts = images.split(piece(self.network, 0, 1))
        maps = [channels_last(part) for part in parts]
        for i, (weight, bias) in enumerate(layers):
            given = i, channels_last(self.params[weight]), self.params[bias]
            maps = [convolve(self.network, part, *given) for part in maps]
        return torch.cat(maps).contiguous()


def piece(network: ConvClassifier, prefix: int, networks: int) -> int:
    """How many images to compute at a time, so that no map is larger than `PIECE_FLOATS`."""
    side = network.size >> prefix // network.pool_every
    return max(1, PIECE_FLOATS // (networks * network.channels * side**2))


def channels_last(values: Tensor) -> Tensor:
    """In the order that one network's convolutions are fastest in.

    PyTorch takes the order from maps or weights, and maps of one channel do not tell: so weights have it, too.
    """
    return values.contiguous(memory_format=torch.channels_last)


def convolve(
    network: ConvClassifier, maps: Tensor, layer: int, weight: Tensor, bias: Tensor, groups: int = 1
) -> Tensor:
    """Layer `layer` of one network or, side by side in the channels, of a group: convolution, ReLU, perhaps pooling."""
    maps = F.conv2d(maps, weight, bias, padding=weight.shape[-1] // 2, groups=groups).relu_()
    return F.avg_pool2d(maps, 2) if (layer + 1) % network.pool_every == 0 else maps


class ConvStack:
    """The trained layers of ``[S, V]`` networks of the shape of `ConvClassifier`.

    Maps are ``[B, S·V·C, H, W]``, a network's channels side by side: a layer of all networks is one grouped
    convolution. All parameters are views of one flat tensor, so that a step of Adam is one kernel.

    Args:
        start, freeze: name -> ``[S, V, *shape]``; those of the first `prefix` layers are not used.

    Attributes:
        params: as they are now.
    """

    def __init__(self, network: ConvClassifier, start: Params, freeze: Params, prefix: int, learning_rate: float):
        self.network, self.prefix = network, prefix
        self.layers = layers_of(start)[prefix:]
        names = [name for pair in self.layers for name in pair]
        self.shape = start[names[0]].shape[:2]
        self.flat = torch.cat([start[name].reshape(-1) for name in names])
        self.flat.grad = torch.zeros_like(self.flat)
        self.optimizer = FlatAdam(self.flat, learning_rate)
        sizes = [start[name].numel() for name in names]
        parts = zip(names, self.flat.split(sizes), self.flat.grad.split(sizes), strict=True)
        self.trained = {name: (view.view(start[name].shape), grad) for name, view, grad in parts}
        for name, (view, grad) in self.trained.items():
            view.requires_grad_().grad = grad.view(start[name].shape)
        self.params = {**start, **{name: view.detach() for name, (view, _) in self.trained.items()}}
        frozen = torch.cat([freeze[name].reshape(-1) for name in names])
        self.rates = {self.flat: (~frozen).to(self.flat)} if bool(frozen.any()) else {}

    def logits(self, inputs: Sequence[Tensor]) -> Tensor:
        """Of what each repeat's first trained layer sees, S × ``[B, C, H, W]``: ``[S, V, B, classes]``."""
        (seeds, arms), networks = self.shape, self.shape.numel()
        *convolutions, head = self.layers
        single = networks == 1 and convolutions
        maps = channels_last(inputs[0]) if single else torch.cat(list(inputs), 1)
        for i, names in enumerate(convolutions):  # the arms of a repeat share their first input
            weight, bias = (self.trained[name][0].flatten(0, 2) for name in names)
            weight = channels_last(weight) if single else weight
            maps = convolve(self.network, maps, self.prefix + i, weight, bias, networks if i else seeds)
        weight, bias = (self.trained[name][0] for name in head)
        flat = maps.reshape(len(maps), seeds, arms if convolutions else 1, -1).permute(1, 2, 0, 3)
        return flat @ weight.transpose(-1, -2) + bias.unsqueeze(-2)

    def step(self, inputs: Sequence[Tensor], labels: Tensor) -> None:
        """One step of Adam of every network on the mean cross-entropy of its repeat's batch; labels ``[S, B]``."""
        logits = self.logits(inputs)
        targets = labels[:, None].expand(logits.shape[:-1])
        loss = F.cross_entropy(logits.flatten(0, 2), targets.flatten(), reduction="sum") / labels.shape[-1]
        self.flat.grad.zero_()
        loss.backward()
        step_with_rates(self.optimizer, self.rates)


def _train(stack: ConvStack, seen: Sequence[SeenInputs], course: Course) -> Tensor:
    """Train one stack: right answers ``[S, V, K, classes]``."""
    labels, counts = course.examples.labels, []
    for first, last in pairwise((0, *course.checkpoints)):
        for update in range(first, last):
            rows = course.batches[:, update]
            stack.step([inputs.batch(own) for inputs, own in zip(seen, rows, strict=True)], labels[rows])
        counts.append(count_right(stack, seen, course.examples))
        for _ in range(stack.shape.numel()):
            course.tick()
    return torch.stack(counts, 2)


@torch.no_grad()
def count_right(stack: ConvStack, seen: Sequence[SeenInputs], examples: Examples) -> Tensor:
    """Right answers on the test images by class ``[S, V, classes]``; -1 where an output is not finite."""
    size, labels = piece(stack.network, stack.prefix, stack.shape.numel()), examples.test_labels
    right, finite = [], []
    for i in range(0, len(labels), size):
        logits = stack.logits([inputs.of_test(slice(i, i + size)) for inputs in seen])
        right.append(logits.argmax(-1) == labels[i : i + size])
        finite.append(logits.isfinite().flatten(2).all(-1))
    classes = F.one_hot(labels, examples.classes)
    counts = (torch.cat(right, -1).double() @ classes.double()).long()
    return torch.where(torch.stack(finite).all(0)[..., None], counts, -1)
