"""Small features, and one core to train on."""

import os

import pytest

from tests.factories import save_blobs


@pytest.fixture(scope="module", autouse=True)
def _one_core():
    """The machine has one core: small studies take longer to be spread over processes than to be trained."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
        yield


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return save_blobs(tmp_path_factory.mktemp("features") / "blobs.safetensors", per_cell=30)
