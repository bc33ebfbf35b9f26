"""What is killed while it writes goes on as if nothing had happened: the same bytes, and nothing left over."""

import os
import signal
from functools import partial
from multiprocessing import get_all_start_methods, get_context

import pytest

from config import Settings
from dataset import find_dataset
from evidence import BlockProtocol
from features import extract, load_extractor
from study import Execution, Study
from tests.conftest import make_images
from tests.factories import LEARNING, everything, make_run, token_blobs

pytestmark = pytest.mark.skipif("fork" not in get_all_start_methods(), reason="the study is killed in a forked process")
BY_SEED = Execution(progress=False, seeds_per_chunk=1)
OF_BLOCKS = Settings.current(trained_blocks=1, batch_size=32, ph1_num_epochs=1, ph2_num_epochs=1)


@pytest.fixture(autouse=True)
def _two_cores(monkeypatch):
    """Studies have processes of their own."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)


def study(data, settings, directory):
    trained = Study(make_run(data, directory, 2, settings, "photo", BY_SEED))
    trained.train()
    trained.report()


def protocol(data, directory):
    """The study of blocks on one holdout, with weights."""
    whole = BlockProtocol(
        make_run(data, directory / "grid", 2, OF_BLOCKS, "photo", BY_SEED), directory, False, weights=True
    )
    whole.train()
    whole.write()


def tokens(images, model, directory):
    extract(find_dataset(images), load_extractor(model), directory, blocks=1, batch_size=2, progress=False)


def killed(work, directory, event):
    """Some work in another process, which is killed in the middle of its `event`-th write."""
    fsync, events = os.fsync, []

    def counted(file):
        events.append(file)
        if len(events) == event:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(file)

    os.fsync = counted
    work(directory)


def after_kills(work, directory, events):
    """Do some work that is killed in each of these writes and begun again; returns what it has left half written."""
    left = set()
    for event in events:
        one = get_context("fork").Process(target=killed, args=(work, directory, event))
        one.start()
        one.join()
        assert one.exitcode == -signal.SIGKILL
        left |= {path.name.split(".")[1] for path in directory.rglob(".*.tmp*")}
    work(directory)
    return left


def test_a_killed_study_goes_on(data, tmp_path):
    work = partial(study, data, LEARNING)
    work(tmp_path / "whole")
    left = after_kills(work, tmp_path / "killed", (1, 6, 10, 6))  # settings, Phase 1, Phase 2, records
    assert everything(tmp_path / "killed") == everything(tmp_path / "whole")
    assert len(left) == 3  # records are not written elsewhere first


def test_a_killed_study_on_blocks_goes_on(tmp_path):
    work = partial(study, token_blobs(), OF_BLOCKS)
    work(tmp_path / "whole")
    left = after_kills(work, tmp_path / "killed", (1, 5, 6, 9))
    assert everything(tmp_path / "killed") == everything(tmp_path / "whole")
    assert {"phase1_art", "phase2_photo_erm"} & left


def test_a_killed_study_of_rates_goes_on(tmp_path):
    work = partial(protocol, token_blobs())
    work(tmp_path / "whole")
    after_kills(work, tmp_path / "killed", (4, 8, 14, 20))
    assert everything(tmp_path / "killed") == everything(tmp_path / "whole")


def test_a_killed_extraction_of_tokens_goes_on(tmp_path, tiny_vit, monkeypatch):
    monkeypatch.setattr("features.extraction.SHARD_ROWS", 4)
    work = partial(tokens, make_images(tmp_path / "toy"), tiny_vit)
    work(tmp_path / "whole")
    after_kills(work, tmp_path / "killed", (1, 3, 3, 5))
    kept = [
        {path: content for path, content in everything(tmp_path / folder).items() if not path.endswith(".lock")}
        for folder in ("whole", "killed")
    ]
    assert kept[0] == kept[1]
    assert len(kept[0]) == 3  # features, tokens and the contents of the images
