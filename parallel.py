"""Pieces of work side by side, a core for each.

On Linux in forked processes: steps of small stacks are so short that threads spend as long on waiting for each other
in the interpreter as on computing. Elsewhere in threads. The results are the same bits either way.
"""

import ctypes
import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, wait
from multiprocessing import get_context
from threading import Event
from typing import NamedTuple, TypeVar

import torch
from tqdm.auto import tqdm

from dataset import default_workers, free_memory

Unit, Result = TypeVar("Unit"), TypeVar("Result")
COPIES = 10  # of a network's numbers while it is trained: start, weights, gradients, two moments, rates, masks, results
SECONDS = 0.1  # between two looks at how far the work is
PR_SET_PDEATHSIG = 1  # of prctl(2)


class _Job(NamedTuple):
    work: Callable
    units: Sequence
    stop: object  # an event: nobody waits for the results any more
    ticks: object  # a shared counter


_job: _Job | None = None  # what a forked process finds; functions of a notebook need not be pickled


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
        work: (unit, tick) -> result that can be pickled; calls `tick` now and then, where it can be stopped.
        units: what to work on.
        at_a_time: processes (or threads); each computes on one core of its own.
        bar: moves on with each tick.
    """
    if len(units) <= 1 or at_a_time == 1:
        yield from (work(unit, bar.update) for unit in units)
        return
    pool, job = _forked(work, units, at_a_time) if sys.platform == "linux" else _threaded(work, units, at_a_time)
    try:
        futures = [
            pool.submit(_run, job if isinstance(pool, ThreadPoolExecutor) else None, i) for i in range(len(units))
        ]
        for future in futures:
            while not wait([future], SECONDS).done:
                bar.update(job.ticks.value - bar.n)
            bar.update(job.ticks.value - bar.n)
            yield pickle.loads(future.result())
    finally:
        job.stop.set()
        pool.shutdown(cancel_futures=True)


def _forked(work: Callable, units: Sequence, at_a_time: int) -> tuple[Executor, _Job]:
    global _job
    context = get_context("fork")
    _job = _Job(work, units, context.Event(), context.Value("q", 0))
    return ProcessPoolExecutor(at_a_time, context, _begin, (os.getpid(),)), _job


def _threaded(work: Callable, units: Sequence, at_a_time: int) -> tuple[Executor, _Job]:
    counter = get_context("spawn").Value("q", 0)
    return ThreadPoolExecutor(at_a_time, "work", torch.set_num_threads, (1,)), _Job(work, units, Event(), counter)


def _begin(parent: int) -> None:
    """In a new process: one core, no Ctrl-C of its own, and an end when its parent ends, however that happens."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def _run(job: _Job | None, number: int) -> bytes:
    job = job or _job

    def tick() -> None:
        with job.ticks.get_lock():
            job.ticks.value += 1
        if job.stop.is_set():
            raise InterruptedError  # an error or Ctrl-C reached the main process: do not finish the unit first

    return pickle.dumps(job.work(job.units[number], tick))  # as bytes: tensors would travel through shared memory
