"""Several processes share a pass: every image once, the same bytes, whoever dies; and what a later pass takes over."""

import os
import signal
import struct
import sys
import time
import zlib
from multiprocessing import get_context

import pytest
import torch
from PIL import Image

from config import InputError
from dataset import find_dataset, load_image
from tests.conftest import OLD, make_images, write_image
from tests.factories import everything, wait_until
from tests.features.conftest import ASKED, Counting

pytestmark = pytest.mark.usefixtures("shards_of_two")


@pytest.fixture
def shards_of_two(monkeypatch):
    monkeypatch.setattr("features.extraction.SHARD_ROWS", 2)


class Slow(Counting):
    def count(self, pixels):
        time.sleep(0.3)
        super().count(pixels)


@pytest.fixture
def ranks(run, extractor, tmp_path):
    """Start the two processes of a `torchrun`, without it: it would end the second with the first."""
    if sys.platform != "linux":
        pytest.skip("a process that has loaded libraries is forked on Linux only")
    slow, context, started = Slow(extractor.model, extractor.preprocessing, extractor.name), get_context("fork"), []
    slow.white = extractor.white

    def work(pipe, rank, settings):
        os.environ.update(RANK=str(rank), WORLD_SIZE="2")
        pipe.send("ready")
        wait_until((tmp_path / "go").exists)
        result = run(extractor=slow, batch_size=2, **settings)
        pipe.send((slow.seen, result.fingerprint))

    def start(**settings):
        pipes = []
        for rank in range(2):
            mine, its = context.Pipe()
            started.append(context.Process(target=work, args=(its, rank, settings)))
            started[-1].start()
            assert mine.recv() == "ready"
            pipes.append(mine)
        (tmp_path / "go").touch()
        return started, pipes

    yield start
    for one in started:
        one.kill()
        one.join()


def whole(folder):
    """The files that are to be found in a cache, without those that remember."""
    return {name: one for name, one in everything(folder).items() if name.endswith((".npy", ".safetensors"))}


@pytest.mark.parametrize("blocks", [0, 1])
def test_two_ranks_compute_every_image_once_and_the_bytes_of_one(ranks, run, cache, tmp_path, blocks, monkeypatch):
    log = tmp_path / "read"
    monkeypatch.setattr("features.check.check_whole", lambda data: log.open("ab").write(b"1"))
    _, pipes = ranks(blocks=blocks)
    (seen1, print1), (seen2, print2) = [pipe.recv() for pipe in pipes]
    asked = 2 * ASKED if blocks else 0
    assert seen1 + seen2 == 12 + asked
    assert min(seen1, seen2) > asked
    assert len(log.read_bytes()) == 12  # one process reads the images, the other what it remembers
    assert print1 == print2 == run(blocks=blocks, batch_size=2, cache_dir=tmp_path / "one").fingerprint
    assert whole(cache) == whole(tmp_path / "one")
    assert not list(cache.glob("*.parts"))


@pytest.mark.parametrize("blocks", [0, 1])
def test_the_shards_of_a_rank_that_is_killed_are_taken_over(ranks, run, cache, tmp_path, blocks):
    (_, second), (pipe, _) = ranks(blocks=blocks)
    wait_until(lambda: list(cache.glob("*.parts/000000002_*.safetensors")))  # the first of the second rank's three
    os.kill(second.pid, signal.SIGKILL)
    seen, fingerprint = pipe.recv()
    assert 6 < seen - (ASKED if blocks else 0) <= 10
    assert fingerprint == run(blocks=blocks, batch_size=2, cache_dir=tmp_path / "one").fingerprint
    assert whole(cache) == whole(tmp_path / "one")


def test_a_rank_whose_tokens_need_float32_takes_the_other_with_it(extractor, toy, cache, tmp_path, request):
    Image.new("RGB", (32, 32), "white").save(toy.root / toy.files[3])  # the second of the second rank's first shard
    extractor.white = 1e5
    _, pipes = request.getfixturevalue("ranks")(blocks=1)
    (_, print1), (_, print2) = [pipe.recv() for pipe in pipes]
    one = request.getfixturevalue("run")(blocks=1, batch_size=2, cache_dir=tmp_path / "one")
    assert one.tokens.dtype == torch.float32
    assert one.fingerprint == print1 == print2
    assert whole(cache) == whole(tmp_path / "one")


def test_an_image_is_decoded_once(run, toy, monkeypatch):
    decoded = []

    def counted(file):
        decoded.append(file)
        return load_image(file)

    for module in ("check", "extraction"):
        monkeypatch.setattr(f"features.{module}.load_image", counted)
    run()
    run(verify=True)
    assert len(decoded) == len(toy)


def spoil(path):
    """Make a PNG that has all its parts, with the right checksums, and that no decoder can read."""
    data = path.read_bytes()
    start = data.index(b"IDAT")
    size = struct.unpack(">I", data[start - 4 : start])[0]
    wrong = b"IDAT" + bytes(size)
    rest = data[start + 8 + size :]
    path.write_bytes(data[:start] + wrong + struct.pack(">I", zlib.crc32(wrong)) + rest)
    os.utime(path, (OLD, OLD))


@pytest.mark.parametrize(("blocks", "asked"), [(0, 0), (1, ASKED)])
def test_what_only_decoding_finds_is_listed_after_the_pass_which_the_next_one_goes_on_from(
    run, extractor, toy, cache, tmp_path, blocks, asked
):
    for row in (2, 9):
        spoil(toy.root / toy.files[row])
    for seen in (
        9,
        1,
    ):  # all but the two shards with such an image, and what comes before it; the second time only these
        extractor.seen = 0
        with pytest.raises(InputError, match=rf"2 of 12.*{toy.files[2]} \(.*{toy.files[9]} \(") as caught:
            run(blocks=blocks, batch_size=1)
        assert "Traceback" not in str(caught.value)
        assert extractor.seen == asked + seen
    assert not [*cache.glob("*.safetensors"), *cache.glob("*.npy")]
    for row in (2, 9):  # repaired
        write_image(toy.root / toy.files[row], seed=row, time=OLD + 1)
    extractor.seen = 0
    repaired = run(blocks=blocks, batch_size=1)
    assert extractor.seen == asked + 4
    afresh = run(blocks=blocks, batch_size=1, cache_dir=tmp_path / "afresh")
    assert repaired.fingerprint == afresh.fingerprint
    if blocks:
        assert torch.equal(repaired.tokens, afresh.tokens)


def test_an_image_that_is_removed_keeps_the_shards_before_it(run, extractor, toy, tmp_path):
    spoil(toy.root / toy.files[9])
    with pytest.raises(InputError, match="1 of 12"):
        run(batch_size=1)
    (toy.root / toy.files[9]).unlink()
    shorter = find_dataset(toy.root)
    extractor.seen = 0
    result = run(dataset=shorter, batch_size=1)
    assert (len(result), extractor.seen) == (11, 3)
    assert result.fingerprint == run(dataset=shorter, batch_size=1, cache_dir=tmp_path / "afresh").fingerprint


def test_a_jpeg_that_is_cut_short_is_found_before_the_pass(run, extractor, tmp_path):
    dataset = find_dataset(make_images(tmp_path / "photos", ending="jpg"))
    for row in (1, 5):
        path = dataset.root / dataset.files[row]
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=rf"2 of 12.*{dataset.files[1]}.*{dataset.files[5]}"):
        run(dataset=dataset)
    assert extractor.seen == 0


def test_a_jpeg_without_its_end_that_can_be_decoded_is_none(run, tmp_path):
    dataset = find_dataset(make_images(tmp_path / "photos", ending="jpg"))
    path = dataset.root / dataset.files[1]
    path.write_bytes(path.read_bytes() + bytes(5000))  # what some cameras write
    assert len(run(dataset=dataset)) == 12
