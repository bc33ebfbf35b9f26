"""How much cheaper is the transfer study than training every cut network by itself?

Networks of the shape of the original (tusharmanekar/mp-tl-study) are fine-tuned with their first c convolutions frozen,
on images of MNIST's size, on one CPU thread. Two contenders take turns at each cut and batch size:
- original: the original's way, at equal updates: one network after the other; every batch and every test image runs
  through all layers of the module, and autograd stops at the cut;
- this: `transfer.training`, all repeats of the cell: images run through the frozen layers once, and the rest is trained
  in grouped convolutions or one by one, as `networks_at_a_time` decides.
Before anything is timed, right answers on test images after a few updates are compared: they are the same but for one
in a hundred at most, which rounding may turn over.

Run:  python benchmarks/transfer.py --output benchmarks/results/transfer_cpu.json

Columns: cut; batch; networks computed at a time; ms/step, processor time of an update of one network by each, in
milliseconds; ms/test, of testing one network on all test images once; cached, of running one image through the frozen
layers; step ×, the original's over this one's step, within a repeat. The last row, EXTRAPOLATED from these, is a whole
sweep by each, in seconds of processor time: all cuts × 5 amounts × 12 repeats, 400 updates, four tests; on two cores it
takes half as long. Images are cached once per run, those alone that are drawn. The original also measures accuracy on
its training images and on 2,940 validation images after every epoch; "validating" is its sweep with these passes, which
the comparison at equal updates leaves out. A cell is the median over repeats (lowest–highest).
"""

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from measuring import Measured, in_turn, new_parser, positive, ratio, run, shown, spread
from torch import Tensor, nn
from torch.nn import functional as F

from config import InputError
from engine import Params, generator
from transfer import ConvClassifier, ConvNetworks, CutArm, Examples
from transfer.arms import bits
from transfer.training import (
    CACHE_BYTES,
    ConvStack,
    SeenInputs,
    count_right,
    draw_batches,
    draw_start,
    networks_at_a_time,
)

IMAGES, TESTED, SIDE, CLASSES = 29404, 4861, 28, 5  # of MNIST's digits 5-9
AMOUNTS, REPEATS, UPDATES, TESTS, BATCH = (0.001, 0.01, 0.1, 0.5, 1.0), 12, 400, 4, 64  # of the sweep
VALIDATION = 2940  # images of the original's validation set
LEARNING_RATE, CHECKED = 1e-3, 5


class Cost(NamedTuple):
    """Milliseconds of processor time, of one network."""

    step: float
    test: float
    cached: float  # per image


def milliseconds(action: Callable[[], object], seconds: float) -> float:
    """Processor time of an action, which is repeated for `seconds`, once at least."""
    count, start = 0, time.process_time()
    while not count or time.process_time() - start < seconds:
        action()
        count += 1
    return 1e3 * (time.process_time() - start) / count


class Cell:
    """One cut with one batch size: networks of some repeats, their batches and images."""

    def __init__(self, networks: ConvNetworks, cut: int, batch: int, examples: Examples, repeats: int):
        self.network, self.cut, self.examples = networks.outline(examples), cut, examples
        start = [draw_start(self.network, generator(repeat, "start")) for repeat in range(repeats)]
        freeze = [bits(CutArm("frozen", cut), None, params, 0)[1] for params in start]
        self.start, self.freeze = (
            {name: torch.stack([own[name] for own in each])[:, None] for name in each[0]} for each in (start, freeze)
        )
        rows = [torch.arange(len(examples))] * repeats
        drawn = [draw_batches(own, batch, 40, generator(r, "order")) for r, own in enumerate(rows)]
        self.batches = torch.stack(drawn)  # [S, U, B]
        together = networks_at_a_time(self.network, cut, batch)
        self.parts = [slice(i, i + together) for i in range(0, repeats, together)]
        self.together = min(together, repeats)

    def module(self, repeat: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        """A network as the original trains it."""
        network = copy.deepcopy(self.network).to_empty(device="cpu")
        network.load_state_dict({name: value[repeat, 0] for name, value in self.start.items()})
        network.convs[: self.cut].requires_grad_(False)
        return network, torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)

    def stack(self, part: slice) -> tuple[ConvStack, list[SeenInputs]]:
        """Networks of some repeats, and what they see."""
        start, freeze = ({name: value[part] for name, value in each.items()} for each in (self.start, self.freeze))
        own: list[Params] = [
            {name: value[i, 0] for name, value in start.items()} for i in range(len(self.batches[part]))
        ]
        seen = [
            SeenInputs(self.network, params, self.cut, self.examples, batches)
            for params, batches in zip(own, self.batches[part], strict=True)
        ]
        return ConvStack(self.network, start, freeze, self.cut, LEARNING_RATE), seen

    def steps(self, part: slice, stack: ConvStack, seen: list[SeenInputs]) -> Iterator[None]:
        """A step of a stack for each batch, over and over."""
        while True:
            for update in range(self.batches.shape[1]):
                rows = self.batches[part, update]
                stack.step([s.batch(own) for s, own in zip(seen, rows, strict=True)], self.examples.labels[rows])
                yield

    def loop(self, repeat: int, network: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """A step of a module for each batch, over and over."""
        while True:
            for rows in self.batches[repeat]:
                optimizer.zero_grad()
                F.cross_entropy(network(self.examples.inputs[rows]), self.examples.labels[rows]).backward()
                optimizer.step()
                yield

    def right(self, network: nn.Module) -> Tensor:
        """Right answers of a module on the test images by class."""
        with torch.no_grad():
            pieces = self.examples.test_inputs.split(512)
            right = torch.cat([network(piece).argmax(-1) for piece in pieces]) == self.examples.test_labels
        return torch.bincount(self.examples.test_labels[right], minlength=self.examples.classes)


def check(cell: Cell) -> None:
    """Compare the contenders' right answers after a few updates.

    Raises:
        InputError: they differ by more than rounding explains.
    """
    part = cell.parts[0]
    stack, seen = cell.stack(part)
    network, optimizer = cell.module(0)
    for steps in (cell.steps(part, stack, seen), cell.loop(0, network, optimizer)):
        for _ in range(CHECKED):
            next(steps)
    apart = int((count_right(stack, seen, cell.examples)[0, 0] - cell.right(network)).abs().sum())
    if apart > 0.01 * len(cell.examples.test_labels):
        raise InputError(f"The contenders do not compute the same at cut {cell.cut}: {apart} answers differ.")


def cost_of_original(cell: Cell, seconds: float) -> Cost:
    """What one network costs now by the original's way."""
    network, optimizer = cell.module(0)
    steps = cell.loop(0, network, optimizer)
    next(steps)
    return Cost(milliseconds(lambda: next(steps), seconds), milliseconds(partial(cell.right, network), 0), 0.0)


def cost_of_this(cell: Cell, seconds: float) -> Cost:
    """What one network costs now in a stack."""
    part, networks = cell.parts[0], cell.together
    start = time.process_time()
    stack, seen = cell.stack(part)
    images = len(cell.batches[0].unique()) + len(cell.examples.test_labels)
    cached = 1e3 * (time.process_time() - start) / networks / images if cell.cut else 0.0
    steps = cell.steps(part, stack, seen)
    next(steps)
    step = milliseconds(lambda: next(steps), seconds) / networks
    test = milliseconds(lambda: count_right(stack, seen, cell.examples), 0) / networks
    return Cost(step, test, cached)


def sweep(costs: dict[tuple[int, int], Cost], network: ConvClassifier, tested: int) -> float:
    """Seconds of a whole sweep at these costs by cut and batch size; `tested` images were tested on for them."""
    total, small = 0.0, min(batch for _, batch in costs)
    for cut in {cut for cut, _ in costs}:
        for amount in AMOUNTS:
            n = int(amount * IMAGES + 0.5)
            cost = costs[cut, BATCH if n >= BATCH else small]
            images = min(n, UPDATES * min(BATCH, n))
            size = 4 * network.flat_size(cut)
            images = sum(count for count in (images, TESTED) if size * count <= CACHE_BYTES)
            total += REPEATS * (UPDATES * cost.step + TESTS * cost.test * TESTED / tested + images * cost.cached)
    return total / 1e3


def validation(costs: dict[tuple[int, int], Cost], tested: int) -> float:
    """Seconds of the original's passes over training and validation images after each epoch of a sweep."""
    total = 0.0
    for cut in {cut for cut, _ in costs}:
        for amount in AMOUNTS:
            n = int(amount * IMAGES + 0.5)
            epochs = math.ceil(UPDATES * min(BATCH, n) / n)
            total += REPEATS * epochs * (n + VALIDATION) * costs[cut, BATCH].test / tested
    return total / 1e3


def random_examples(images: int, tested: int) -> Examples:
    """Random images, of which the labels say where they are bright."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(images + tested) % CLASSES
    pixels = torch.rand(images + tested, 1, SIDE, SIDE, generator=draw) * 2 - 1
    pixels += torch.nn.functional.one_hot(labels, SIDE)[:, None, :, None]
    return Examples(pixels[:images], labels[:images], pixels[images:], labels[images:], CLASSES)


def measure(args: argparse.Namespace) -> Measured:
    """Costs of both at every cut and batch size, and the sweep."""
    torch.set_num_threads(1)
    examples, networks = random_examples(args.images, args.tested), ConvNetworks(args.channels)
    small = max(CLASSES, int(AMOUNTS[0] * IMAGES + 0.5))
    cells = {
        (cut, batch): Cell(networks, cut, batch, examples, args.networks)
        for cut in range(networks.depth + 1)
        for batch in (small, BATCH)
    }
    for cell in cells.values():
        check(cell)
    actions = {}
    for key, cell in cells.items():
        actions["original", *map(str, key)] = partial(cost_of_original, cell, args.seconds)
        actions["this", *map(str, key)] = partial(cost_of_this, cell, args.seconds)
    taken = in_turn(actions, args.repeats)
    rows, by_repeat = [], {}
    for (cut, batch), cell in cells.items():
        original, this = (Cost(*zip(*taken[name, str(cut), str(batch)], strict=True)) for name in ("original", "this"))
        row = {"cut": cut, "batch": batch, "together": cell.together}
        for name, costs in (("original", original), ("this", this)):
            row |= {f"{name}_milliseconds_per_step": spread(costs.step)}
            row |= {f"{name}_milliseconds_per_test": spread(costs.test)}
        row["milliseconds_per_cached_image"] = spread(this.cached)
        rows.append(row | {"step_speedup": ratio(original.step, this.step)})
    for name in ("original", "this"):
        found = [{key: taken[name, *map(str, key)][i] for key in cells} for i in range(args.repeats)]
        by_repeat[name] = [sweep(costs, networks.outline(examples), args.tested) for costs in found]
        if name == "original":
            passes = [validation(costs, args.tested) for costs in found]
            by_repeat["validating"] = [sum(parts) for parts in zip(by_repeat[name], passes, strict=True)]
    row = {"cut": "all"} | {f"{name}_extrapolated_seconds": spread(values) for name, values in by_repeat.items()}
    for name in ("original", "validating"):
        row[f"{name}_over_this"] = ratio(by_repeat[name], by_repeat["this"])
    rows.append(row)
    task = {"images": args.images, "pixels": "random", "channels": args.channels, "threads": 1}
    task["extrapolated"] = {"amounts": list(AMOUNTS), "repeats": REPEATS, "updates": UPDATES, "tests": TESTS}
    return task, rows


def columns(row: dict) -> dict[str, object]:
    """A row of the table."""
    if row["cut"] == "all":
        cells = {"cut": "all"}
        for name in ("original", "validating", "this"):
            cells[f"{name} s"] = shown(row[f"{name}_extrapolated_seconds"], 0)
        return cells | {f"{name} ×": shown(row[f"{name}_over_this"], 1) for name in ("original", "validating")}
    cells = {"cut": row["cut"], "batch": row["batch"], "together": row["together"]}
    for name in ("original", "this"):
        cells[f"{name} ms/step"] = shown(row[f"{name}_milliseconds_per_step"], 3)
        cells[f"{name} ms/test"] = shown(row[f"{name}_milliseconds_per_test"], 0)
    cells["cached"] = shown(row["milliseconds_per_cached_image"], 4)
    return cells | {"step ×": shown(row["step_speedup"], 1)}


if __name__ == "__main__":
    parser = new_parser(__doc__)
    parser.add_argument("--networks", type=positive, default=REPEATS, help="repeats of a cell (default 12)")
    parser.add_argument(
        "--channels", type=positive, default=16, help="of each convolution (default 16; the original has 64)"
    )
    parser.add_argument("--images", type=positive, default=4096, help="that batches are drawn from (default 4096)")
    parser.add_argument("--tested", type=positive, default=TESTED, help=f"test images (default {TESTED})")
    parser.add_argument("--seconds", type=float, default=2, help="of processor time for the steps (default 2)")
    sys.exit(run(parser, measure, columns))
