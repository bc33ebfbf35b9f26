"""The tokens before a ViT's last blocks: the same pass, a file of their own, right, whole and resumable."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import config
from config import InputError
from features import bundled_features, copy_features, get_features, load_extractor, load_features
from tests.conftest import make_images, make_vit
from tests.factories import dated, everything
from tests.features.conftest import ASKED


@pytest.mark.parametrize("blocks", [1, 2])
def test_tail_makes_the_features_of_the_tokens(run, cache, blocks, recwarn):
    result = run(blocks=blocks)
    assert (result.tokens.shape, result.tokens.dtype) == ((12, 17, 24), torch.float16)
    assert result.header["tokens"] == {"blocks": blocks, "tokens": 17, "type": "float16"}
    assert "17 tokens" in result.describe()
    with torch.no_grad():
        features = result.tail(result.tokens.float())
    torch.testing.assert_close(features, result.features.float(), rtol=2e-3, atol=2e-3)
    (file,) = cache.glob("*.npy")
    stored = file.read_bytes()
    result.tokens.zero_()  # in memory only
    assert file.read_bytes() == stored
    assert not list(cache.glob("*.parts"))
    assert not recwarn.list


def test_features_are_the_same_with_and_without_tokens(run, extractor, tmp_path):
    tokens, plain = [run(cache_dir=tmp_path / str(blocks), blocks=blocks) for blocks in (1, 0)]
    (one,), (two,) = [(tmp_path / str(blocks)).glob("*.safetensors") for blocks in (1, 0)]
    assert (one.name, one.read_bytes()) == (two.name, two.read_bytes())
    assert copy_features(tokens, tmp_path / "copy.safetensors").read_bytes() == one.read_bytes()
    assert load_features(one).fingerprint == plain.fingerprint
    extractor.seen = 0
    again = run(cache_dir=tmp_path / "1")
    assert (extractor.seen, again.tokens, again.tail) == (0, None, None)


def test_each_number_of_blocks_has_its_own_tokens_beside_the_same_features(run, extractor, cache):
    found, before = [run()], dated(cache)
    found += [run(blocks=blocks) for blocks in (1, 2)]
    assert extractor.seen == 3 * 12 + 2 * ASKED
    assert before.items() <= dated(cache).items()  # the features are not written again
    assert len({result.fingerprint for result in found}) == 3
    assert (found[1].tokens != found[2].tokens).any()
    files = dated(cache)
    assert [run(blocks=blocks).fingerprint for blocks in (0, 1, 2)] == [result.fingerprint for result in found]
    assert extractor.seen == 3 * 12 + 4 * ASKED
    (features,) = cache.glob("*.safetensors")
    features.unlink()  # the features alone are made again
    assert run(blocks=2).fingerprint == found[2].fingerprint
    assert {name: one for name, one in dated(cache).items() if name.endswith(".npy")}.items() < files.items()


def interrupt(run, extractor, after, **settings):
    """A pass over images two by two that is interrupted before an image is taken when `after` were."""
    extractor.fail_after = ASKED + after
    with pytest.raises(KeyboardInterrupt):
        run(batch_size=2, blocks=1, **settings)
    extractor.seen, extractor.fail_after = 0, None


@pytest.fixture
def shards_of_four(monkeypatch):
    monkeypatch.setattr("features.extraction.SHARD_ROWS", 4)


@pytest.mark.usefixtures("shards_of_four")
def test_tokens_resume_after_an_interruption(run, extractor, cache, tmp_path):
    interrupt(run, extractor, after=6)
    assert not list(cache.glob("*.npy"))
    resumed = run(batch_size=2, blocks=1)
    assert extractor.seen == ASKED + 8
    at_once = run(batch_size=2, blocks=1, cache_dir=tmp_path / "at-once")
    assert torch.equal(resumed.tokens, at_once.tokens)
    kept = {name: content for name, content in everything(cache).items() if name.endswith((".npy", ".safetensors"))}
    assert len(kept) == 2
    assert kept.items() <= everything(tmp_path / "at-once").items()


@pytest.mark.usefixtures("shards_of_four")
def test_what_cannot_be_resumed_is_made_again(run, extractor, cache):
    interrupt(run, extractor, after=6)
    (part,) = cache.glob("*.parts/*.npy")
    part.write_bytes(part.read_bytes()[:-1])
    result = run(batch_size=2, blocks=1)
    assert extractor.seen == ASKED + 12
    with torch.no_grad():
        torch.testing.assert_close(result.tail(result.tokens.float()), result.features.float(), rtol=2e-3, atol=2e-3)


@pytest.mark.usefixtures("shards_of_four")
def test_tokens_that_float16_cannot_hold_are_float32(run, extractor, toy, cache, caplog):
    caplog.set_level("INFO")
    last = toy.root / toy.files[-1]
    Image.new("RGB", (32, 32), "white").save(last)
    extractor.white = 1e5
    interrupt(run, extractor, after=12 + 6)  # twelve in float16, and six of the twelve in float32
    assert sum("float32" in record.getMessage() for record in caplog.records) == 1
    wide = run(batch_size=2, blocks=1)
    assert extractor.seen == ASKED + 8
    assert (wide.tokens.dtype, wide.header["tokens"]["type"]) == (torch.float32, "float32")
    assert wide.tokens[-1, 3, 2] == 1e5
    with torch.no_grad():
        torch.testing.assert_close(wide.tail(wide.tokens)[:-1], wide.features[:-1].float(), rtol=2e-3, atol=2e-3)
    extractor.white = float("inf")
    (file,) = cache.glob("*.npy")
    file.unlink()
    with pytest.raises(InputError, match=toy.files[-1]):
        run(blocks=1)


@pytest.mark.usefixtures("shards_of_four")
def test_room_on_the_disk_is_asked_for_before_the_pass(run, extractor, cache, monkeypatch, caplog):
    caplog.set_level("INFO")
    image = 17 * 24 * 2  # bytes

    def only(free):
        monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))

    only(12 * image - 1)
    with pytest.raises(InputError, match="CACHE_DIR"):
        run(blocks=1)
    assert extractor.seen == ASKED
    only(12 * image)
    extractor.seen = 0
    interrupt(run, extractor, after=6)
    only(8 * image - 1)
    with pytest.raises(InputError, match="CACHE_DIR"):
        run(blocks=1)
    only(8 * image)  # what the first shard took is there
    assert len(run(blocks=1).tokens) == 12
    assert str(next(cache.glob("*.npy"))) in caplog.text


@pytest.mark.usefixtures("shards_of_four")
def test_a_disk_that_fills_during_the_pass_is_one_sentence(run, extractor, cache, small_disk):
    with small_disk(5000), pytest.raises(InputError, match=r"_blocks1\.npy' cannot be written"):
        run(batch_size=2, blocks=1)
    interrupt(run, extractor, after=6)
    with small_disk(5000), pytest.raises(InputError, match=r"_blocks1\.npy' cannot be written"):
        run(batch_size=2, blocks=1)
    extractor.seen = 0
    run(batch_size=2, blocks=1)
    assert extractor.seen == ASKED + 8


def test_a_damaged_file_of_tokens_is_to_be_deleted(run, cache):
    run(blocks=1)
    (file,) = cache.glob("*.npy")
    whole = file.read_bytes()
    contents = [b"", whole[:-1], whole + b"?", b"PK" + whole[2:]]
    for other in (np.zeros((12, 16, 24), "float16"), np.zeros((12, 17, 24), "int16"), np.zeros((24, 17, 12), "f2").T):
        np.save(file, other)
        contents.append(file.read_bytes())
    for content in contents:
        file.write_bytes(content)
        with pytest.raises(InputError, match=rf"{file.name}'.*delete"):
            run(blocks=1)
    file.unlink()
    run(blocks=1)
    assert file.read_bytes() == whole


def test_tokens_of_another_model_are_refused(run, cache, tmp_path):
    run(blocks=1)
    (file,) = cache.glob("*.npy")
    other = load_extractor(make_vit(tmp_path / "another", seed=3))
    pixels = torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8)
    np.save(file, other.tokens(pixels, 1)[1].half().numpy())
    with pytest.raises(InputError, match=rf"{file.name}' holds tokens of another model: delete"):
        run(blocks=1)


def test_blocks_that_are_of_no_use_are_refused_before_the_pass(run, extractor, cache):
    def refuse(tail):
        raise InputError(f"{len(tail.blocks)} blocks")

    with pytest.raises(InputError, match="2 blocks"):
        run(blocks=2, check_tail=refuse)
    assert (extractor.seen, list(cache.glob("*"))) == (0, [])


def test_tokens_that_cannot_be_had_are_refused(run, extractor, image_root, tiny_vit, cache, monkeypatch, tmp_path):
    for blocks in (3, -1):
        with pytest.raises(InputError, match="TRAINED_BLOCKS"):
            run(blocks=blocks)
    assert (extractor.seen, list(cache.glob("*"))) == (0, [])
    monkeypatch.setattr(config, "TRAINED_BLOCKS", 1)
    for source in ({}, {"features_file": tmp_path / "own.safetensors"}):
        with pytest.raises(InputError, match="TRAINED_BLOCKS needs DATA_ROOT"):
            get_features(**source)
    assert bundled_features().tokens is get_features(blocks=0).tokens is None
    usual = {"vit_model": tiny_vit, "cache_dir": cache, "device": "cpu", "progress": False}
    assert get_features(image_root, **usual).header["tokens"]["blocks"] == 1
    assert get_features(image_root, **usual, blocks=2).header["tokens"]["blocks"] == 2


def test_tokens_of_images_that_are_not_resized(tmp_path):
    """A processor that resizes nothing: the images have the model's own size."""
    root = make_images(tmp_path / "images", size=(32, 32))
    model = make_vit(tmp_path / "vit", do_resize=False)
    found = get_features(root, vit_model=model, blocks=1, cache_dir=tmp_path / "cache", device="cpu", progress=False)
    assert found.tokens.shape == (12, 17, 24)
