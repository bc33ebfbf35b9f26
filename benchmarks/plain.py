"""What a stack of networks is compared with: one network at a time, as anybody would train it, and the machine's floor.

A plain PyTorch loop (default or fused Adam), several such loops in processes of their own, and scikit-learn's
`MLPClassifier`. Data lie ready in memory, batches are slices of a copy shuffled once per epoch, and nothing is kept
of a step (no running loss or accuracy, which the stack does keep): the loop is as lean as such a loop gets.

Everything that is measured has the same three parts of an epoch: `shuffle()`, `steps(first, last)`, `validate()`.
"""

import argparse
import functools
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor, nn

import config
from models import FeedforwardClassifier
from training import Problem

DOMAINS = 4
LARGE = 100  # networks; epochs of larger stacks are measured in part
CHUNK = 8  # steps between looks at the clock


@dataclass(frozen=True)
class Task:
    """Synthetic features, shaped like the training of one holdout.

    Attributes:
        size: length D of a feature vector.
        rows: rows that are trained on.
        total: all rows, classified after each epoch.
        classes: number of classes.
        batch: images per step.
    """

    size: int
    rows: int = 6000
    total: int = 9991
    classes: int = 7
    batch: int = 32

    @property
    def steps(self) -> int:
        """Steps of an epoch; the last batch may be short."""
        return -(-self.rows // self.batch)


@functools.lru_cache(maxsize=4)
def problem_of(task: Task, device: str = "cpu") -> tuple[Problem, Tensor]:
    """The task's data on a device, and the numbers of the rows to train on."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(task.classes, (task.total,), generator=draw)
    domains = torch.randint(DOMAINS, (task.total,), generator=draw)
    centres = torch.randn(task.classes, task.size, generator=draw)
    features = centres[labels] + 2 * torch.randn(task.total, task.size, generator=draw)
    rows = torch.randperm(task.total, generator=draw)[: task.rows].sort().values
    inside = torch.zeros(task.total, dtype=torch.bool).index_fill_(0, rows, True)
    names = (tuple(f"class{i}" for i in range(task.classes)), tuple(f"domain{i}" for i in range(DOMAINS)))
    return Problem(*(t.to(device) for t in (features, labels, domains, inside)), *names), rows.to(device)


@dataclass(frozen=True)
class Times:
    """Seconds of the parts of one whole epoch, and the number of its steps that were really taken."""

    shuffle: float
    steps: float
    validation: float
    steps_measured: int

    @property
    def epoch(self) -> float:
        return self.shuffle + self.steps + self.validation

    def as_dict(self) -> dict[str, float]:
        return {**asdict(self), "epoch": self.epoch}


def timed(action, device: str = "cpu") -> float:
    """Seconds that `action` takes, until the device has done it."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    action()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(loop, task: Task, count: int, limit: float, device: str = "cpu", together=lambda: None) -> Times:
    """One epoch, of which `count` steps are taken, fewer after `limit` seconds; the others take as long (linear).

    `together` is called before each part, so that processes begin it at the same moment.
    """
    loop.shuffle()
    loop.steps(0, min(2, task.steps))  # the first times are slower: allocation, the optimizer's state, kernels
    if loop.networks <= LARGE or device == "cuda":
        loop.validate()
    together()
    shuffle = timed(loop.shuffle, device)
    together()
    taken, steps = 0, 0.0
    while taken < count and steps < limit:
        first, taken = taken, min(taken + CHUNK, count)
        steps += timed(lambda a=first, b=taken: loop.steps(a, b), device)
    together()
    return Times(shuffle, steps * task.steps / taken, timed(loop.validate, device), taken)


class PlainLoop:
    """An ordinary training loop of one network."""

    networks = 1

    def __init__(self, task: Task, fused: bool, device: str = "cpu"):
        self.problem, self.rows = problem_of(task, device)
        self.cells, self.size = self.problem.cells, self.problem.totals.numel()
        self.batch = task.batch
        self.network = FeedforwardClassifier(task.size, task.classes).to(device)
        options = {"fused": True} if fused else {}
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=1e-3, **options)

    def shuffle(self) -> None:
        order = self.rows[torch.randperm(len(self.rows)).to(self.rows.device)]
        self.features, self.labels = self.problem.features[order], self.problem.labels[order]

    def steps(self, first: int, last: int) -> None:
        for start in range(first * self.batch, last * self.batch, self.batch):
            logits = self.network(self.features[start : start + self.batch])
            loss = nn.functional.cross_entropy(logits, self.labels[start : start + self.batch])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()

    @torch.no_grad()
    def validate(self) -> Tensor:
        """Right answers per cell (domain, split, class), which is what the stack counts too."""
        right = self.network(self.problem.features).argmax(1) == self.problem.labels
        return torch.bincount(self.cells[right], minlength=self.size)


class Processes:
    """Processes of one thread each, which wait for each other before each part of an epoch."""

    def __init__(self, count: int):
        context = get_context("spawn")
        self.count = count
        barrier = context.Barrier(count, timeout=300)
        self.pool = ProcessPoolExecutor(count, mp_context=context, initializer=_begin, initargs=(barrier,))

    def run(self, function: Callable, *args) -> list:
        """``function(i, count, *args)`` in each process i, side by side."""
        futures = [self.pool.submit(function, i, self.count, *args) for i in range(self.count)]
        return [future.result() for future in futures]

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)


_barrier = None


def _begin(barrier) -> None:
    global _barrier
    _barrier = barrier
    torch.set_num_threads(1)


def together() -> None:
    """Wait for the other processes, where there are any."""
    if _barrier is not None:
        _barrier.wait()


def measure_plain(mine: int, of: int, task: Task, fused: bool, limit: float) -> tuple[int, Times]:
    """A plain loop, one in each of the processes: networks, and times of an epoch."""
    return 1, measure(PlainLoop(task, fused), task, task.steps, limit, together=together)


def measure_sklearn(task: Task, epochs: int, threads: int) -> Times:
    """scikit-learn's own training of the same network; per epoch, like everything here."""
    from sklearn.base import clone
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier
    from threadpoolctl import threadpool_limits

    problem, rows = problem_of(task)
    features, labels = problem.features.numpy(), problem.labels.numpy()
    training, wanted = features[rows.numpy()], labels[rows.numpy()]
    network = MLPClassifier(
        hidden_layer_sizes=tuple(config.HIDDEN_SIZES),
        batch_size=min(task.batch, task.rows),
        learning_rate_init=1e-3,
        alpha=0,
        tol=0,
        n_iter_no_change=epochs,
        max_iter=epochs,
        random_state=0,
    )
    with warnings.catch_warnings(), threadpool_limits(threads):
        warnings.simplefilter("ignore", ConvergenceWarning)  # of the number of epochs, which is what was asked for
        clone(network).set_params(batch_size=1).fit(training[:8], wanted[:8])  # the first time is slower
        fit = timed(lambda: network.fit(training, wanted)) / epochs
        return Times(0.0, fit, timed(lambda: (network.predict(features) == labels).sum()), task.steps)


# --- the floor ------------------------------------------------------------------------------------------


def floor(task: Task, rates: list[dict], threads: int) -> dict:
    """Least work of one step of one network, and what it takes at the rates of this machine.

    Operations are those of the matrix products alone: forward, gradients of the weights, gradients of the inputs of
    all layers but the first. Bytes are float32: parameters and both moments of Adam read and written, gradients
    written and read, the batch read from the table of features and written to a copy, by seed and not by variant.
    Activations, bias, loss and the reading of the copy are taken to cost nothing. The bandwidth is that of the main
    memory; a small stack lies in the caches, and nothing but overhead keeps it from beating this.
    """
    products = [a * b for a, b in pairwise([task.size, *config.HIDDEN_SIZES, task.classes])]
    outputs = sum(config.HIDDEN_SIZES) + task.classes
    parameters = sum(products) + outputs
    operations = 2 * task.batch * (sum(products) + sum(products) + sum(products[1:]))
    parts = {"parameters": 2, "gradients": 2, "adam_moments": 4}
    result = {
        "feature_size": task.size,
        "parameters": parameters,
        "operations": operations,
        "bytes": {name: times * 4 * parameters for name, times in parts.items()}
        | {"batch": 2 * 4 * task.batch * task.size},
        "rates_by_repeat": rates,
    }
    result["seconds"] = {
        key: statistics.median(floor_seconds(result, rate, count) for rate in rates)
        for key, count in (("1_thread", 1), ("all_threads", threads))
    }
    return result


def floor_seconds(of: dict, rates: dict, threads: int, variants: int = 1) -> float:
    """Seconds per step and network: the longer of computing and moving, as if they hid each other perfectly."""
    usable = [rates["1_thread"]] if threads == 1 else list(rates.values())  # more threads are not always faster
    moved = sum(of["bytes"].values()) - of["bytes"]["batch"] * (1 - 1 / variants)
    operations, bytes_ = (max(rate[key] for rate in usable) for key in ("operations_per_second", "bytes_per_second"))
    return max(of["operations"] / operations, moved / bytes_)


def machine_rates(threads: int, quick: bool = False) -> dict:
    """Rate of a large float32 matrix product and of a large copy (bytes read + written), the best of five."""
    side, length = (256, 2**20) if quick else (1024, 2**26)
    a, b, source = torch.rand(side, side), torch.rand(side, side), torch.rand(length)
    target = torch.zeros_like(source)
    result = {}
    for name, count in (("1_thread", 1), ("all_threads", threads)):
        torch.set_num_threads(count)
        product = min(timed(lambda: a @ b) for _ in range(6))
        copy = min(timed(lambda: target.copy_(source)) for _ in range(6))
        result[name] = {"operations_per_second": 2 * side**3 / product, "bytes_per_second": 8 * length / copy}
    return result


# --- shared by the benchmarks ---------------------------------------------------------------------------------


def positive(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")
    return int(text)


def processor() -> str:
    """The processor by name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
