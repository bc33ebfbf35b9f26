"""How much cheaper is it to train the last block of a ViT through ``[CLS]`` alone?

Everybody trains the last block, the final norm and a linear classifier by Adam, on one CPU thread and in batches of the
same random images. They take turns:
- shortcut: `engine.TailEngine` with `engine.ClsShortcut` on cached tokens, as they are stored (float16); N arms of one
  seed side by side, which share its batches;
- shortcut, mask: the same where each arm has frozen nine of ten of its block's weights, at random;
- query of [CLS]: keys and values of all tokens by the block's own modules, and the rest for ``[CLS]`` alone, by
  autograd; one network under the plain loop `trainer_phase1.train_network`, on the same tokens in float32;
- block: the block itself as a module, likewise;
- whole ViT: all its weights trained from pixels, likewise.
Before anything is timed, the logits of all are compared, at the start and after three steps (with a mask and from
pixels: at the start). Of a whole ViT a repeat is a single step.

Run:  python benchmarks/blocks.py --vit-model DIR --output benchmarks/results/blocks_cpu.json

Columns: the contender; networks trained at once; ms/step, processor time per step and network, in milliseconds; wall,
the time on the clock; ms/image, processor time for the classification of one image by one network; the ms/step of each
loop over this one's, within a repeat; and hours, EXTRAPOLATED from ms/step and ms/image: 800 networks (20 pairs of
holdout and seed, 10 arms, 4 learning rates), each with 470 steps (5 epochs of PACS's `in` split with one domain held
out, batches of 64) and all 9,991 images classified once, on two cores without loss. A cell is the median over repeats
(lowest–highest).
"""

import argparse
import copy
import sys
import time
from collections.abc import Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from measuring import Measured, in_turn, new_parser, numbers, positive, ratio, run, shown, spread
from torch import Tensor, nn
from torch.nn import functional as F

from config import InputError, Settings
from engine import ClsShortcut, TailEngine
from features import load_extractor
from models import BackboneTail, FeatureExtractor, FeedforwardClassifier, Preprocessing
from trainer_phase1 import train_network

CLASSES, LEARNING_RATE, DENSITY = 7, 1e-4, 0.1
CHECKED_STEPS = 3
TOLERANCES = {"start": 1e-4, "trained": 1e-4, "pixels": 2e-2}  # of logits, relative to the largest
LOOPS = {"query": "query of [CLS]", "block": "block", "vit": "whole ViT"}
NETWORKS, STEPS, IMAGES, CORES = 20 * 10 * 4, 470, 9991, 2  # of the extrapolation


class Cost(NamedTuple):
    """Milliseconds: processor and wall time per step and network, processor time per image and network."""

    step: float
    wall: float
    image: float


class Clock:
    """Hands out batches until `seconds` of processor time are over, one at least, and counts them."""

    def __init__(self, seconds: float, images: int, batch: int):
        self.seconds, self.images, self.batch, self.count = seconds, images, batch, 0

    def batches(self) -> Iterator[Tensor]:
        """Row numbers ``[B]``, drawn anew for each batch."""
        wall, start = time.perf_counter(), time.process_time()
        while not self.count or time.process_time() - start < self.seconds:
            yield torch.randint(self.images, (self.batch,))
            self.count += 1
        self.processor, self.wall = time.process_time() - start, time.perf_counter() - wall


class Loop:
    """One network under the plain loop."""

    networks = 1

    def __init__(self, network: nn.Module, inputs: Tensor, labels: Tensor):
        self.network, self.inputs, self.labels = network, inputs, labels

    def train(self, batches: Iterable[Tensor]) -> None:
        """A step on each batch."""
        train_network(self.network, self.inputs, self.labels, [batches], LEARNING_RATE)

    @torch.no_grad()
    def logits(self, rows: Tensor) -> Tensor:
        """Of the images in `rows` ``[B]``: ``[1, B, classes]``."""
        return self.network(self.inputs[rows])[None]


class Stack:
    """Arms of one seed in the engine, all from the same start; with a mask, each freezes weights of its own."""

    def __init__(
        self, tail: BackboneTail, shortcut: ClsShortcut, tokens: Tensor, labels: Tensor, networks: int, masked: bool
    ):
        self.networks, self.tokens, self.labels = networks, tokens, labels
        params = tail.named_parameters()
        start = {name: value.detach().expand(1, networks, *value.shape) for name, value in params}
        rates = dict.fromkeys(start, torch.full((1, networks), LEARNING_RATE))
        self.engine = TailEngine(tail, shortcut, start, rates)
        names = tail.tracked_names if masked else ()
        self.rates = {name: (torch.rand(start[name].shape) < DENSITY).float() for name in names}

    def train(self, batches: Iterable[Tensor]) -> None:
        """A step of all networks on each batch."""
        for rows in batches:
            self.engine.step(self.tokens[rows][None], self.labels[rows][None], self.rates, None)

    def logits(self, rows: Tensor) -> Tensor:
        """Of the images in `rows` ``[B]``: ``[networks, B, classes]``."""
        return self.engine.logits(self.tokens[rows])[0]


class ClsQuery(nn.Module):
    """What a `BackboneTail` of one block computes, without what other tokens than ``[CLS]`` would ask.

    The modules are those of a copy of `tail`; the shortcut knows which is which.
    """

    def __init__(self, tail: BackboneTail, shortcut: ClsShortcut):
        super().__init__()
        self.tail, self.shortcut = tail.with_head(copy.deepcopy(tail.head)), shortcut

    def part(self, role: str, rows: Tensor) -> Tensor:
        """The module of a role; nothing where the block has none (LayerScale, final norm)."""
        name = self.shortcut.names.get(role)
        return rows if name is None else self.tail.get_submodule(name)(rows)

    def forward(self, tokens: Tensor) -> Tensor:
        seen = self.part("norm1", tokens)
        rows = {"query": seen[:, :1], "key": seen, "value": seen}
        split = [
            self.part(role, x).unflatten(-1, (self.shortcut.heads, -1)).transpose(1, 2) for role, x in rows.items()
        ]
        attended = F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)[:, 0]  # [B, D]
        cls = tokens[:, 0] + self.part("scale1", self.part("output", attended))
        hidden = self.shortcut.activation(self.part("in", self.part("norm2", cls)))
        return self.tail.head(self.part("norm", cls + self.part("scale2", self.part("out", hidden))))


class WholeViT(nn.Module):
    """A ViT, all of whose weights are trained, and a classifier: uint8 ``[B, 3, H, W]`` -> logits ``[B, classes]``."""

    def __init__(self, extractor: FeatureExtractor, head: FeedforwardClassifier):
        super().__init__()
        self.model, self.head = copy.deepcopy(extractor.model).requires_grad_(True), copy.deepcopy(head)
        self.scale, self.mean, self.std = extractor.preprocessing.scale, extractor.mean, extractor.std

    def forward(self, pixels: Tensor) -> Tensor:
        pixels = (pixels.float() * self.scale - self.mean) / self.std
        return self.head(self.model(pixel_values=pixels).last_hidden_state[:, 0])


def random_vit() -> FeatureExtractor:
    """A ViT-Tiny/16 that nobody has trained."""
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    size = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768}
    model = ViTModel(ViTConfig(**size), add_pooling_layer=False)
    return FeatureExtractor(model, Preprocessing(ViTImageProcessor()), "random ViT-Tiny/16")


def random_images(extractor: FeatureExtractor, count: int) -> tuple[Tensor, Tensor]:
    """Random pixels and their tokens before the last block: uint8 ``[N, 3, H, W]`` and float16 ``[N, T, D]``."""
    side = getattr(extractor.model.config, "image_size", 224)  # or height and width
    pixels = torch.randint(256, (count, 3, *((side, side) if isinstance(side, int) else side)), dtype=torch.uint8)
    return pixels, torch.cat([extractor.tokens(part, 1)[1].half() for part in pixels.split(8)])


def contenders(
    extractor: FeatureExtractor, pixels: Tensor, tokens: Tensor, networks: Iterable[int]
) -> dict[tuple[str, int], Loop | Stack]:
    """Everybody by name and number of networks, with equal weights.

    Raises:
        InputError: a block that one of them does not cover.
    """
    head = FeedforwardClassifier(extractor.feature_size, CLASSES, ())
    tail, wide = extractor.tail(1).with_head(head), tokens.float()
    shortcut, labels = ClsShortcut.of(tail, wide[:4]), torch.randint(CLASSES, (len(tokens),))
    if shortcut is None or "gate" in shortcut.names:
        raise InputError(f"The last block of '{extractor.name}' is not covered here: use a ViT, DeiT or CLIP.")
    found = {}
    for count in networks:
        for name, masked in (("shortcut", False), ("shortcut, mask", True)):
            found[name, count] = Stack(tail, shortcut, tokens, labels, count, masked)
    loops = (ClsQuery(tail, shortcut), wide), (copy.deepcopy(tail), wide), (WholeViT(extractor, head), pixels)
    return found | {(name, 1): Loop(*given, labels) for name, given in zip(LOOPS.values(), loops, strict=True)}


def check_equal(found: dict[tuple[str, int], Loop | Stack], images: int, batch: int) -> dict[str, float]:
    """Compare everybody's logits with the block's, at the start and after a few steps; this also warms up.

    Returns:
        The largest differences, relative to the largest logit: at the start, trained, and of the whole ViT, which
        starts from pixels and not from tokens rounded to float16.

    Raises:
        InputError: they exceed `TOLERANCES`.
    """
    rows, batches = torch.randint(images, (batch,)), torch.randint(images, (CHECKED_STEPS, batch)).unbind()
    largest = dict.fromkeys(TOLERANCES, 0.0)

    def compare(kind: str, name: tuple[str, int], wanted: Tensor) -> None:
        apart = float((found[name].logits(rows) - wanted).abs().max() / wanted.abs().max())
        largest[kind] = max(largest[kind], apart)
        if not apart <= TOLERANCES[kind]:
            raise InputError(f"'{name[0]}' and the block itself do not compute the same: logits differ by {apart:.1g}.")

    before = found["block", 1].logits(rows)
    found["block", 1].train(batches)
    after = found["block", 1].logits(rows)
    for name in found:
        if name == ("block", 1):
            continue
        pixels, masked = name[0] == "whole ViT", name[0] == "shortcut, mask"
        compare("pixels" if pixels else "start", name, before)
        found[name].train(batches[:1] if pixels else batches)
        if not (pixels or masked):
            compare("trained", name, after)
    return largest


def cost(contender: Loop | Stack, images: int, batch: int, seconds: float) -> Cost:
    """What training costs now, measured for `seconds`, and classification, for a quarter of that."""
    training, classification = (Clock(limit, images, batch) for limit in (seconds, seconds / 4))
    contender.train(training.batches())
    for rows in classification.batches():
        contender.logits(rows)
    per_step = 1e3 / (training.count * contender.networks)
    per_image = 1e3 / (classification.count * batch * contender.networks)
    return Cost(training.processor * per_step, training.wall * per_step, classification.processor * per_image)


def measure(args: argparse.Namespace) -> Measured:
    """Everybody's costs, and the loops' over those of the shortcut."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    batch = Settings.current(trained_blocks=1).batch_size
    extractor = load_extractor(args.vit_model) if args.vit_model else random_vit()
    pixels, tokens = random_images(extractor, args.images)
    found = contenders(extractor, pixels, tokens, args.networks)
    apart = check_equal(found, args.images, batch)
    task = {"model": extractor.name, "images": args.images, "pixels": "random", "tokens": tokens.shape[1]}
    task |= {"D": tokens.shape[2], "batch": batch, "threads": 1, "density": DENSITY, "logits_apart": apart}
    actions = {name: partial(cost, one, args.images, batch, args.seconds) for name, one in found.items()}
    taken = {name: Cost(*zip(*costs, strict=True)) for name, costs in in_turn(actions, args.repeats).items()}
    rows = []
    for (name, networks), costs in taken.items():
        row = {"contender": name, "networks": networks, "milliseconds_per_step": spread(costs.step)}
        row |= {"wall_milliseconds_per_step": spread(costs.wall), "milliseconds_per_image": spread(costs.image)}
        row |= {f"{key}_over_this": ratio(taken[loop, 1].step, costs.step) for key, loop in LOOPS.items()}
        pairs = zip(costs.step, costs.image, strict=True)
        row["extrapolated_hours"] = spread(NETWORKS * (STEPS * s + IMAGES * i) / CORES / 3.6e6 for s, i in pairs)
        rows.append(row)
    return task | {"extrapolated": {"networks": NETWORKS, "steps": STEPS, "images": IMAGES, "cores": CORES}}, rows


def columns(row: dict) -> dict[str, object]:
    """A row of the table."""
    cells = {"contender": row["contender"], "networks": row["networks"]}
    cells |= {"ms/step": shown(row["milliseconds_per_step"]), "wall": shown(row["wall_milliseconds_per_step"])}
    cells["ms/image"] = shown(row["milliseconds_per_image"], 4)
    cells |= {f"{key} /": shown(row[f"{key}_over_this"], 1) for key in LOOPS}
    return cells | {"hours": shown(row["extrapolated_hours"])}


if __name__ == "__main__":
    parser = new_parser(__doc__)
    parser.add_argument("--vit-model", metavar="ID_OR_DIR", help="hub name or local directory (default: a random one)")
    parser.add_argument("--networks", type=numbers, default=[1, 8, 32], help="of a stack (default 1,8,32)")
    parser.add_argument("--images", type=positive, default=512, help="that batches are drawn from (default 512)")
    parser.add_argument("--seconds", type=float, default=3, help="of processor time for a measurement (default 3)")
    sys.exit(run(parser, measure, columns))
