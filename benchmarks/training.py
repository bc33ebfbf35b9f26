"""How much faster are many small networks at once than a loop over single ones?

All train the classifier on made-up features of the shape of PACS with one domain held out (9,991 images, about 6,000 of
them to train on, batches of 32) and classify all images after each epoch: on one CPU thread, and where there is a CUDA
device, there as well. They take turns:
- plain: `trainer_phase1.train_network`, one network with PyTorch's default Adam;
- fused: the same loop with fused Adam;
- scikit_learn: `MLPClassifier` (CPU only);
- engine: `engine.train` with S networks side by side, each with its own batches, and with six arms per seed that share
  the batches of their seed; with --compiled also with `torch.compile(step, mode="reduce-overhead")`;
- engine_rates: the six arms with a learning rate per weight, a tenth for two in five of the tracked ones.
The making of networks, and the first epoch (of a compiled step the first three), are not counted.

Run:  python benchmarks/training.py --output benchmarks/results/training_cpu.json

Columns: D, length of a feature vector; networks trained at once; arms that share batches; rate, epochs of one network
per second; and the engine's rate over that of each loop on the same device (scikit-learn: on the CPU), within a repeat.
A cell is the median over repeats (lowest–highest).
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import product
from types import SimpleNamespace
from typing import NamedTuple

import torch
from measuring import Measured, in_turn, new_parser, numbers, positive, ratio, run, shown, spread
from torch import Tensor, nn
from torch.nn import functional as F

from config import Settings
from engine import BatchOrder, MatmulEngine, SplitFeatures, random_start, train
from importance import weight_rates
from models import FeedforwardClassifier
from trainer_phase1 import train_network

CLASSES, DOMAINS, ARMS = 7, 4, 6
LOOPS = ("plain", "fused", "scikit_learn")


class Contender(NamedTuple):
    """What is measured: length D of a feature vector, a name of `SECONDS`, device, networks at once, arms of a seed."""

    feature_size: int
    name: str
    device: str = "cpu"
    networks: int = 1
    arms: int = 1


class Clock:
    """Seconds per epoch on a device, which is waited for at the end of each."""

    def __init__(self, device: str):
        self.device, self.ends = device, []

    def end(self) -> None:
        """An epoch has ended."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    def seconds(self, epochs: int) -> float:
        """Seconds per epoch, over the last `epochs`."""
        return (self.ends[-1] - self.ends[-1 - epochs]) / epochs


def made_up(feature_size: int, images: int, device: str) -> SplitFeatures:
    """Noisy features around a centre per class, as many images of each class in each domain."""
    draw = torch.Generator().manual_seed(0)
    labels, domains = torch.arange(images) % CLASSES, torch.arange(images) // CLASSES % DOMAINS
    centres = torch.randn(CLASSES, feature_size, generator=draw)
    data = SimpleNamespace(
        features=centres[labels] + 2 * torch.randn(images, feature_size, generator=draw),
        labels=labels,
        domains=domains,
        files=[f"{row:06d}" for row in range(images)],
        class_names=[f"class{i}" for i in range(CLASSES)],
        domain_names=[f"domain{i}" for i in range(DOMAINS)],
        tokens=None,
        tail=None,
    )
    return SplitFeatures.from_features(data, Settings.current(), device)


def rows_to_train_on(data: SplitFeatures, seeds: Iterable[int]) -> Tensor:
    """The `in` split of all domains but the first: int64 ``[S, n]``."""
    return data.rows(data.sources(data.domain_names[0]), "in", list(seeds))


def train_fused(
    network: nn.Module, inputs: Tensor, labels: Tensor, epochs: Iterable[Iterable[Tensor]], learning_rate: float
) -> None:
    """`trainer_phase1.train_network` with fused Adam and no rates."""
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate, fused=True)
    for batches in epochs:
        for rows in batches:
            optimizer.zero_grad()
            F.cross_entropy(network(inputs[rows]), labels[rows]).backward()
            optimizer.step()


def loop_seconds(training: Callable, data: SplitFeatures, contender: Contender, epochs: int) -> float:
    """Seconds of an epoch of one network that `training` trains: `train_network` or `train_fused`."""
    settings, device = Settings.current(), contender.device
    network = FeedforwardClassifier(contender.feature_size, CLASSES, settings.hidden_sizes).to(device)
    rows, clock = rows_to_train_on(data, [0])[0], Clock(device)

    def batches() -> Iterator[tuple[Tensor, ...]]:
        for _ in range(1 + epochs):
            yield rows[torch.randperm(len(rows)).to(device)].split(settings.batch_size)
            with torch.no_grad():
                (network(data.features).argmax(1) == data.labels).sum()
            clock.end()

    training(network, data.features, data.labels, batches(), settings.ph2_lr_important)
    return clock.seconds(epochs)


def scikit_learn_seconds(data: SplitFeatures, contender: Contender, epochs: int) -> float:
    """Seconds of an epoch of scikit-learn's own training of the same network."""
    from sklearn.neural_network import MLPClassifier
    from threadpoolctl import threadpool_limits

    settings, clock = Settings.current(), Clock(contender.device)
    rows, features, labels = rows_to_train_on(data, [0])[0].numpy(), data.features.numpy(), data.labels.numpy()
    inputs, targets, rate = features[rows], labels[rows], settings.ph2_lr_important
    network = MLPClassifier(settings.hidden_sizes, batch_size=settings.batch_size, learning_rate_init=rate, alpha=0)
    with threadpool_limits(1):
        for _ in range(1 + epochs):
            network.partial_fit(inputs, targets, classes=range(CLASSES))  # one epoch, in a new order
            (network.predict(features) == labels).sum()
            clock.end()
    return clock.seconds(epochs)


def engine_seconds(data: SplitFeatures, contender: Contender, epochs: int) -> float:
    """Seconds of an epoch of all networks of a stack."""
    settings, compiled = Settings.current(), contender.name == "engine_compiled"
    seeds = range(contender.networks // contender.arms)
    start = random_start(seeds, "fresh_start", data.network(settings.hidden_sizes))
    if contender.arms > 1:
        start = {name: value.unsqueeze(1).repeat_interleave(contender.arms, 1) for name, value in start.items()}
    stack = MatmulEngine({name: value.to(data.features) for name, value in start.items()}, settings.ph2_lr_important)
    if compiled:
        torch.compiler.reset()  # what was compiled for other stacks counts towards a limit
        stack.step = torch.compile(stack.step, mode="reduce-overhead", dynamic=False)
    order = BatchOrder(seeds, "benchmark", rows_to_train_on(data, seeds), settings.batch_size)
    clock, rates = Clock(contender.device), {}
    if contender.name == "engine_rates":
        names = data.network(settings.hidden_sizes).tracked_names
        rates = {name: weight_rates(torch.rand_like(stack.params[name]) < 0.6, 0.1) for name in names}
    options = {"rates": lambda epoch: rates, "on_epoch": clock.end}
    train(data, stack, seeds, order, epochs + (3 if compiled else 1), **options)
    return clock.seconds(epochs)


SECONDS = {
    "plain": partial(loop_seconds, train_network),
    "fused": partial(loop_seconds, train_fused),
    "scikit_learn": scikit_learn_seconds,
    "engine": engine_seconds,
    "engine_compiled": engine_seconds,
    "engine_rates": engine_seconds,
}


def contenders(args: argparse.Namespace, device: str, feature_size: int) -> list[Contender]:
    """What is measured on a device."""
    found = [Contender(feature_size, loop, device) for loop in LOOPS if (loop, device) != ("scikit_learn", "cuda")]
    stacks = [(count, 1) for count in args.networks]
    stacks += [(ARMS * round(count / ARMS), ARMS) for count in args.networks if count >= 2 * ARMS]
    engines = ("engine", "engine_compiled") if args.compiled else ("engine",)
    found += [Contender(feature_size, name, device, *stack) for stack in stacks for name in engines]
    return found + [Contender(feature_size, "engine_rates", device, *stack) for stack in stacks if stack[1] > 1]


def measure(args: argparse.Namespace) -> Measured:
    """All contenders in turn; the engine's rate over that of each loop."""
    torch.set_num_threads(1)
    actions = {}
    for device, size in product(("cpu", "cuda") if torch.cuda.is_available() else ("cpu",), args.dims):
        data = made_up(size, args.images, device)
        found = contenders(args, device, size)
        actions |= {one: partial(SECONDS[one.name], data, one, args.epochs) for one in found}
    taken = in_turn(actions, args.repeats)
    rates = {one: [one.networks / value for value in values] for one, values in taken.items()}
    rows = []
    for one, values in taken.items():
        rows.append(one._asdict() | {"seconds_per_epoch": spread(values), "rate": spread(rates[one])})
        if one.name not in LOOPS:
            devices = {"plain": one.device, "fused": one.device, "scikit_learn": "cpu"}
            loops = {name: rates[Contender(one.feature_size, name, device)] for name, device in devices.items()}
            rows[-1]["rate_over"] = {name: ratio(rates[one], rate) for name, rate in loops.items()}
    task = {"images": args.images, "classes": CLASSES, "domains": DOMAINS, "epochs": args.epochs, "threads": 1}
    return task, rows


def columns(row: dict) -> dict[str, object]:
    """A row of the table."""
    cells = {"D": row["feature_size"], "contender": row["name"], "device": row["device"]}
    cells |= {key: row[key] for key in ("networks", "arms")} | {"rate": shown(row["rate"], 1)}
    over = row.get("rate_over", {})
    return cells | {f"/ {name}": shown(over[name], 1) if over else "" for name in LOOPS}


if __name__ == "__main__":
    parser = new_parser(__doc__)
    parser.add_argument("--networks", type=numbers, default=[1, 16, 160], help="at once (default 1,16,160)")
    parser.add_argument("--dims", type=numbers, default=[192, 768], help="lengths of a feature (default 192,768)")
    parser.add_argument("--images", type=positive, default=9991, help="in the data set, 140 or more (default 9991)")
    parser.add_argument("--epochs", type=positive, default=3, help="epochs that are counted (default 3)")
    parser.add_argument("--compiled", action="store_true", help="also the engine with a compiled step")
    sys.exit(run(parser, measure, columns))
