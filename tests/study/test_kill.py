"""A study that is killed while it writes goes on as if nothing had happened: the same bytes, and nothing left over."""

import os
import signal
from multiprocessing import get_all_start_methods, get_context

import pytest

from study import Execution, Study
from tests.factories import LEARNING, everything, make_run

pytestmark = pytest.mark.skipif("fork" not in get_all_start_methods(), reason="the study is killed in a forked process")
BY_SEED = Execution(progress=False, seeds_per_chunk=1)


def study(data, directory):
    trained = Study(make_run(data, directory, 2, LEARNING, "photo", BY_SEED))
    trained.train()
    trained.report()


def killed(data, directory, event):
    """A study in another process, which is killed in the middle of its `event`-th write."""
    fsync, events = os.fsync, []

    def counted(file):
        events.append(file)
        if len(events) == event:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(file)

    os.fsync = counted
    study(data, directory)


def test_a_killed_study_goes_on(data, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)  # it has processes of its own
    study(data, tmp_path / "whole")
    whole, directory, left = everything(tmp_path / "whole"), tmp_path / "killed", set()
    for event in (1, 6, 10, 6):  # settings, Phase 1, Phase 2, records
        one = get_context("fork").Process(target=killed, args=(data, directory, event))
        one.start()
        one.join()
        assert one.exitcode == -signal.SIGKILL
        left |= {path.name.split(".")[1] for path in directory.rglob(".*.tmp*")}
    study(data, directory)
    assert everything(directory) == whole
    assert len(left) == 3  # records are not written elsewhere first
