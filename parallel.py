"""Pieces of work side by side, a core for each."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import TypeVar

import torch
from tqdm.auto import tqdm

from dataset import default_workers, free_memory

Unit, Result = TypeVar("Unit"), TypeVar("Result")
COPIES = 10  # of a network's numbers while it is trained: start, weights, gradients, two moments, rates, masks, results


def in_flight(networks: int, floats: int) -> int:
    """How many stacks may be trained at a time: a core for each, in half of the memory that is free.

    Args:
        networks: in a stack.
        floats: numbers in a network.
    """
    need = 4 * COPIES * networks * floats
    return int(max(1, min(default_workers(), free_memory() / 2 / max(need, 1))))


def side_by_side(
    work: Callable[[Unit, Callable[[], None]], Result],
    units: Sequence[Unit],
    at_a_time: int,
    bar: tqdm,
) -> Iterator[Result]:
    """Results of `work` for each unit, in the order of the units.

    Args:
        work: (unit, tick) -> result; calls `tick` now and then, where it can be stopped.
        units: what to work on.
        at_a_time: threads; each computes on one core of its own.
        bar: moves on with each tick.
    """
    if len(units) <= 1 or at_a_time == 1:
        yield from (work(unit, bar.update) for unit in units)
        return
    stop = Event()

    def tick() -> None:
        bar.update()
        if stop.is_set():
            raise InterruptedError  # Ctrl-C reached the main thread: do not finish the unit first

    pool = ThreadPoolExecutor(at_a_time, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield from pool.map(lambda unit: work(unit, tick), units)
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
