"""A small study that is done, for tests that read it."""

import os

import pytest

from study import Execution, Study
from tests.factories import LEARNING, make_run, save_blobs


@pytest.fixture(autouse=True)
def _one_core(monkeypatch):
    """The machine has one core: small studies take longer to be spread over processes than to be trained."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)


@pytest.fixture(autouse=True, scope="module")
def _no_commit():
    """The project lies in no checkout: a commit while tests run would show in what they compare."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("GIT_DIR", os.devnull)
        yield


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return save_blobs(tmp_path_factory.mktemp("features") / "blobs.safetensors", per_cell=30)


@pytest.fixture(scope="session")
def finished(data, tmp_path_factory):
    """Plain training and importance masking, four seeds by two, three holdouts. Read it, don't write to it."""
    in_twos = Execution(progress=False, seeds_per_chunk=2)
    study = Study(make_run(data, tmp_path_factory.mktemp("finished"), settings=LEARNING, execution=in_twos))
    with pytest.MonkeyPatch.context() as patched:  # set up before what is of a module
        patched.setenv("GIT_DIR", os.devnull)
        study.train()
    return study
