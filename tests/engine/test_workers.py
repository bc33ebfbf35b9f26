"""Work side by side: order, errors, interruptions, and no process that outlives its parent."""

import os
import signal
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from tqdm.auto import tqdm

from engine import groups_of, side_by_side, stacks_at_a_time, training_memory, workers
from tests.factories import wait_until

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")
SYSTEMS = [pytest.param("linux", marks=LINUX), "darwin"]


def run(work, units, at_a_time=2):
    with tqdm(total=100, disable=True) as bar:
        return list(side_by_side(work, units, at_a_time, bar))


@pytest.mark.parametrize("system", SYSTEMS)
def test_results_come_in_order_from_functions_that_cannot_be_pickled(system, monkeypatch):
    monkeypatch.setattr(sys, "platform", system)
    here = os.getpid()

    def work(unit, tick):
        time.sleep(0.3 if unit == 0 else 0)
        return unit, torch.full((2,), unit), torch.get_num_threads(), os.getpid() == here

    found = run(work, range(5))
    assert [unit for unit, *_ in found] == list(range(5))
    assert all(torch.equal(values, torch.full((2,), unit)) for unit, values, *_ in found)
    assert {mine for *_, mine in found} == {system != "linux"}
    if system == "linux":
        assert {threads for *_, threads, _ in found} == {1}


@pytest.mark.parametrize(("units", "at_a_time"), [(range(3), 1), (range(1), 2), ((), 2)])
def test_one_at_a_time_stays_in_this_process(units, at_a_time):
    assert run(lambda unit, tick: os.getpid(), units, at_a_time) == [os.getpid()] * len(units)


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_bar_counts_ticks(system, monkeypatch):
    monkeypatch.setattr(sys, "platform", system)

    class Bar:
        n = 0

        def update(self, by=1):
            self.n += by

    def work(unit, tick):
        for _ in range(4):
            tick()

    bar = Bar()
    list(side_by_side(work, range(3), 2, bar))
    assert bar.n == 12


@LINUX
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_or_ctrl_c_stops_the_others(error, tmp_path):
    interrupts = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores them

    def work(unit, tick):
        if unit == 0:
            if error is ValueError:
                raise ValueError("unit 0")
            os.kill(os.getppid(), signal.SIGINT)
        for _ in range(1200):
            time.sleep(0.05)
            tick()
        (tmp_path / "finished").touch()

    with pytest.raises(error):
        run(work, range(2))
    signal.signal(signal.SIGINT, interrupts)
    assert not (tmp_path / "finished").exists()


@LINUX
@pytest.mark.parametrize("at_a_time", [2, 5])
def test_work_goes_on_with_fewer_processes_when_the_system_ends_one(at_a_time, caplog):
    here = os.getpid()

    def work(unit, tick):
        if unit == 3 and os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        return unit

    assert run(work, range(6), at_a_time) == list(range(6))
    assert [record.args for record in caplog.records] == ([(1,)] if at_a_time == 2 else [(2,), (1,)])
    assert "memory" in caplog.text


@LINUX
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_processes_end_with_their_parent(end, tmp_path):
    def sleep(unit, tick):
        (tmp_path / str(os.getpid())).touch()
        time.sleep(600)

    parent = get_context("fork").Process(target=run, args=(sleep, range(3), 3))
    parent.start()
    wait_until(lambda: len(list(tmp_path.iterdir())) == 3)
    os.kill(parent.pid, end)
    parent.join()
    wait_until(lambda: not any(running(int(child.name)) for child in tmp_path.iterdir()))


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_half_of_the_free_memory_decides_how_many_stacks_are_trained_at_a_time_one_per_core_at_most(monkeypatch):
    monkeypatch.setattr(workers, "default_workers", lambda: 8)
    three = 3 * 2 * training_memory(100, 50)  # stacks, twice
    for free, expected in ((float("inf"), 8), (three, 3), (three - 1, 2), (1e3, 1)):
        monkeypatch.setattr(workers, "free_memory", lambda free=free: free)
        assert stacks_at_a_time(100, 50) == expected


@pytest.mark.parametrize(
    ("count", "seeds", "floats"), [(7, 3, 2**20), (7, 3, 100), (7, 4, 2**16), (100, 10, 2**14), (1, 1, 1)]
)
def test_arms_are_grouped_in_order_so_that_a_stack_is_small_or_a_single_arm(count, seeds, floats):
    groups = groups_of(range(count), seeds, floats)
    assert [arm for group in groups for arm in group] == [*range(count)]
    sizes = {len(group) for group in groups}
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) == 1 or max(sizes) * seeds * floats <= workers.STACK_FLOATS
    most = max(1, workers.STACK_FLOATS // (seeds * floats))
    assert len(groups) == -(-count // most)
