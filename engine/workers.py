"""Units of work side by side, a core for each.

They run in forked processes: the steps of small stacks are so short that threads would spend as long waiting for each
other in the interpreter as computing. Processes are forked on Linux only; elsewhere the units run one after the other,
with the same results.
"""

import logging
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait as wait_for_any
from typing import NamedTuple, Protocol, TypeVar

import torch

from engine.cluster import connect
from engine.executors import Place, in_executor
from engine.machine import default_workers, free_memory, training_memory

log = logging.getLogger(__name__)

Unit, Result, Item = TypeVar("Unit"), TypeVar("Result"), TypeVar("Item")
SECONDS = 0.1  # between two updates of the progress bar
STACK_FLOATS = 2**20  # in the parameters of a stack on a CPU: Adam goes through those of a larger one in main memory


class Bar(Protocol):
    """A progress bar such as `tqdm`'s."""

    n: int

    def update(self, by: int = 1) -> object: ...


class _Job(NamedTuple):
    work: Callable
    units: Sequence
    stop: object  # an event: nobody waits for the results any more
    ticks: object  # a shared counter


_job: _Job | None = None  # forked processes inherit it, so that functions of a notebook need not be pickled


def stacks_at_a_time(networks: int, floats: int, of_batch: int = 0) -> int:
    """How many stacks of `networks` of `floats` numbers may be trained at a time, see `training_memory`.

    One per core, within half of the available memory.
    """
    need = training_memory(networks, floats, of_batch)
    return int(max(1, min(default_workers(), free_memory() / 2 / max(need, 1))))


def groups_of(arms: Sequence[Item], seeds: int, floats: int) -> list[Sequence[Item]]:
    """Arms in groups of about the same size, so that a stack of one group stays in the processor's cache.

    Args:
        seeds: each arm has a network of each.
        floats: numbers in a network.
    """
    most = max(1, STACK_FLOATS // (seeds * floats))
    groups = -(-len(arms) // most)
    return [arms[len(arms) * i // groups : len(arms) * (i + 1) // groups] for i in range(groups)]


def side_by_side(
    work: Callable[[Unit, Callable[[], object]], Result],
    units: Sequence[Unit],
    at_a_time: int,
    bar: Bar,
    executor: Executor | str | None = None,
) -> Iterator[Result]:
    """Results of `work` for each unit, in the order of the units.

    Args:
        work: (unit, tick) -> a result that can be pickled. It calls `tick` regularly, which advances the bar, and
            where the work can be stopped.
        at_a_time: number of processes, each on one core. With 1, and on other systems than Linux, this process does
            all the work. When the system ends one, the work goes on with half as many.
        bar: advanced by one for each tick.
        executor: where else to work, see `engine.executors`: any executor, or a Dask cluster by the address of its
            scheduler. `at_a_time` is then up to it.
    """
    if executor is not None and units:
        place = connect(executor) if isinstance(executor, str) else Place(executor)
        yield from in_executor(place, work, units, bar)
        return
    if len(units) <= 1 or at_a_time == 1 or sys.platform != "linux":
        yield from (work(unit, bar.update) for unit in units)
        return
    done = 0
    try:
        for result in _in_processes(work, units, at_a_time, bar):
            yield result
            done += 1
    except BrokenProcessPool:
        fewer = at_a_time // 2
        log.warning("A worker was ended, most likely for lack of memory; going on with %d at a time.", fewer)
        yield from side_by_side(work, units[done:], fewer, bar)


def _in_processes(work: Callable, units: Sequence[Unit], at_a_time: int, bar: Bar) -> Iterator:
    global _job
    context = get_context("fork")
    job = _job = _Job(work, units, context.Event(), context.Value("q", bar.n))
    pool = ProcessPoolExecutor(at_a_time, context, _begin)
    try:
        futures = [pool.submit(_run, number) for number in range(len(units))]
        for future in futures:
            while not wait([future], SECONDS).done:
                bar.update(job.ticks.value - bar.n)
            bar.update(job.ticks.value - bar.n)
            yield pickle.loads(future.result())
    finally:
        job.stop.set()
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    """Set up a new process: one core, Ctrl-C left to the parent, and no life after the parent's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    wait_for_any([parent_process().sentinel])
    os._exit(1)


def _run(number: int) -> bytes:
    job = _job

    def tick() -> None:
        with job.ticks.get_lock():
            job.ticks.value += 1
        if job.stop.is_set():
            raise InterruptedError  # after an error or Ctrl-C in the main process: do not finish the unit

    return pickle.dumps(job.work(job.units[number], tick))  # as bytes: tensors would travel through shared memory
