"""Work side by side: order, errors, interruptions, and no process that outlives its parent."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch
from tqdm.auto import tqdm

import parallel
from parallel import side_by_side

ROOT = Path(__file__).resolve().parents[1]
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux alone")


def run(work, units, at_a_time=2, platform=None, monkeypatch=None):
    if platform:
        monkeypatch.setattr(parallel.sys, "platform", platform)
    with tqdm(total=100, disable=True) as bar:
        return list(side_by_side(work, units, at_a_time, bar))


@pytest.mark.parametrize("platform", ["linux", "elsewhere"])
def test_results_come_in_order_from_functions_that_cannot_be_pickled(platform, monkeypatch):
    if platform == "linux" and sys.platform != "linux":
        pytest.skip("no fork")
    here = os.getpid()

    def work(unit, tick):
        time.sleep(0.3 if unit == 0 else 0)
        return unit, torch.full((2,), unit), torch.get_num_threads(), os.getpid() == here

    found = run(work, range(5), platform=platform, monkeypatch=monkeypatch)
    assert [unit for unit, *_ in found] == list(range(5))
    assert all(torch.equal(values, torch.full((2,), unit)) for unit, values, *_ in found)
    assert {threads for *_, threads, _ in found} == {1}
    assert {mine for *_, mine in found} == {platform != "linux"}


def test_one_at_a_time_stays_here():
    assert run(lambda unit, tick: os.getpid(), range(3), at_a_time=1) == [os.getpid()] * 3


def test_the_bar_counts_ticks():
    seen = []

    class Bar:
        n = 0

        def update(self, by=1):
            self.n += by
            seen.append(self.n)

    def work(unit, tick):
        for _ in range(4):
            tick()

    list(side_by_side(work, range(3), 2, Bar()))
    assert seen[-1] == 12


@pytest.mark.parametrize("platform", ["linux", "elsewhere"])
def test_an_error_stops_the_others(platform, monkeypatch, tmp_path):
    def work(unit, tick):
        if unit == 0:
            raise ValueError("unit 0")
        for _ in range(200):
            time.sleep(0.05)
            tick()
        (tmp_path / "finished").touch()

    started = time.monotonic()
    with pytest.raises(ValueError, match="unit 0"):
        run(work, range(2), platform=platform, monkeypatch=monkeypatch)
    assert time.monotonic() - started < 8  # of the ten seconds that the other would take
    assert not (tmp_path / "finished").exists()


@LINUX
def test_a_process_that_dies_is_an_error():
    with pytest.raises(BrokenProcessPool):
        run(lambda unit, tick: os.kill(os.getpid(), signal.SIGKILL), range(2))


@LINUX
def test_processes_end_with_their_parent(tmp_path):
    code = f"""
        import os, sys, time
        sys.path.insert(0, {str(ROOT)!r})
        from pathlib import Path
        from tqdm.auto import tqdm
        from parallel import side_by_side
        def work(unit, tick):
            (Path({str(tmp_path)!r}) / str(os.getpid())).touch()
            time.sleep(60)
        list(side_by_side(work, range(2), 2, tqdm(disable=True)))
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)])
    deadline = time.monotonic() + 60
    while len(children := [int(path.name) for path in tmp_path.iterdir()]) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{child}").exists() and _running(child) for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
