"""The frozen pass and its cache: right features, never stale ones, whatever interrupts the pass."""

import hashlib
import json
import logging
import os
import shutil
import signal
import sys
import time
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from PIL import Image

import config
from config import InputError
from dataset import find_dataset, load_image
from features import bundled_features, check_images, copy_features, get_features, load_extractor, load_features
from tests.conftest import OLD, make_images, make_vit, reference_features, write_image
from tests.factories import wait_until
from tests.features.conftest import ASKED, Counting

# The features


def test_equals_a_reference_written_by_hand(tmp_path, tiny_vit, cache):
    root = make_images(tmp_path / "exact", size=(32, 32))  # the model's own size: nothing to resize
    result = get_features(root, vit_model=tiny_vit, cache_dir=cache, device="cpu", progress=False)
    pixels = np.stack([np.asarray(Image.open(root / file)) for file in result.files]).astype(np.float32) / 255
    expected = reference_features(tiny_vit, torch.from_numpy((pixels - 0.5) / 0.5).permute(0, 3, 1, 2))
    torch.testing.assert_close(result.features.float(), expected, rtol=1e-3, atol=1e-3)


def test_what_the_result_says(run, toy, tiny_vit):
    result = run()
    assert (len(result), result.feature_size, result.num_domains, result.num_classes) == (12, 24, 2, 2)
    assert result.features.dtype == torch.float16
    assert result.describe() == "toy features: 12 × 24-d, tiny-vit, 2 domains, 2 classes (images in toy)"
    assert (result.files, result.class_names, result.domain_names) == (toy.files, toy.class_names, toy.domain_names)
    assert (result.labels == toy.labels).all()
    assert (result.domains == toy.domains).all()
    header = result.header
    assert header["counts"] == {"art": {"dog": 3, "horse": 3}, "photo": {"dog": 3, "horse": 3}}
    assert header["model"]["type"] == "vit"
    assert header["model"]["precision"] == "float32"
    assert header["preprocessing"]["size"] == {"height": 32, "width": 32}
    assert set(header["versions"]) == {"torch", "torchvision", "transformers", "pillow"}
    digests = ""
    for file in toy.files:
        picture = load_image(toy.root / file)
        digests += hashlib.sha256(f"{picture.width}x{picture.height} ".encode() + picture.tobytes()).hexdigest()
    assert header["pixels_sha256"] == hashlib.sha256(digests.encode()).hexdigest()
    assert str(toy.root) not in json.dumps(header)


def test_batch_size_and_workers_change_nothing_but_rounding(run, tmp_path):
    one = run(batch_size=1)
    for number, settings in enumerate(({"batch_size": 5}, {"batch_size": 600, "workers": 2})):
        other = run(cache_dir=tmp_path / str(number), **settings)
        torch.testing.assert_close(one.features, other.features, rtol=2e-3, atol=2e-3)


def test_feature_that_is_not_finite_names_the_image(run, extractor, toy):
    extractor.spoil = True
    with pytest.raises(InputError, match=toy.files[4]):
        run(batch_size=5)


# The cache


def test_second_time_is_a_hit(run, extractor, cache):
    first, again = run(), run()
    assert extractor.seen == 12
    assert first.fingerprint == again.fingerprint
    assert {path.suffix for path in cache.iterdir()} <= {".json", ".safetensors", ".lock"}


def test_same_bytes_elsewhere(run, tmp_path, cache):
    first, again = run(), run(cache_dir=tmp_path / "other")
    (one,), (two,) = cache.glob("*.safetensors"), (tmp_path / "other").glob("*.safetensors")
    assert (one.name, one.read_bytes()) == (two.name, two.read_bytes())
    assert copy_features(first, tmp_path / "copy.safetensors").read_bytes() == one.read_bytes()
    assert again.fingerprint == load_features(tmp_path / "copy.safetensors").fingerprint


def test_a_changed_or_renamed_image_is_another_key(run, extractor, toy, image_root):
    first = run()
    write_image(toy.root / toy.files[3], seed=99, time=OLD + 5)
    again = run()
    assert extractor.seen == 24
    assert (first.features[3] != again.features[3]).any()
    assert first.header["pixels_sha256"] != again.header["pixels_sha256"]
    (image_root / "art/dog/000.png").rename(image_root / "art/dog/zzz.png")
    assert "art/dog/zzz.png" in run(dataset=find_dataset(image_root)).files
    assert extractor.seen == 36


def test_pass_does_not_take_changed_content_for_the_old(run, toy, image_root, cache):
    path = image_root / "art/dog/000.bmp"
    write_image(path, seed=1)
    toy = find_dataset(image_root)
    check_images(toy, cache.parent)  # remembered …
    cache.mkdir()
    (memory,) = cache.parent.glob("images_*.json")
    shutil.copy(memory, cache)
    write_image(path, seed=2)  # … and changed behind its back
    with pytest.raises(InputError, match=r"'art/dog/000\.bmp'.*verify"):
        run(dataset=toy)
    assert not list(cache.glob("*.safetensors"))
    assert len(run(dataset=toy, verify=True)) == 13


def test_other_weights_or_preprocessing_are_another_key(run, tmp_path, tiny_vit):
    found = [run()]
    for number, change in enumerate(({"seed": 1}, {"image_mean": [0.1] * 3}, {"resample": 0})):
        other = make_vit(tmp_path / str(number) / tiny_vit.name, **change)
        found.append(run(extractor=load_extractor(other)))
    assert len({result.fingerprint for result in found}) == 4
    assert len({result.model_name for result in found}) == 1


# Interruptions


def test_resumes_after_an_interruption(run, extractor, cache, tmp_path, monkeypatch):
    monkeypatch.setattr("features.extraction.SHARD_ROWS", 4)
    extractor.fail_after = 6
    with pytest.raises(KeyboardInterrupt):
        run(batch_size=2)
    (parts,) = cache.glob("*.parts")
    assert [part.name[:10] for part in parts.iterdir() if part.suffix != ".lock"] == [
        "000000000_"
    ]  # complete ones only
    extractor.seen, extractor.fail_after = 0, None
    resumed = run(batch_size=2)
    assert extractor.seen == 8
    assert not list(cache.glob("*.parts"))
    parts.mkdir()  # as left by a process that was killed between its last two steps
    run(batch_size=2)
    assert not parts.exists()
    assert resumed.fingerprint == run(batch_size=2, cache_dir=tmp_path / "at-once").fingerprint


@pytest.mark.skipif(sys.platform != "linux", reason="processes that decode are forked on Linux only")
def test_a_decoding_process_that_the_system_ends_is_one_sentence(run, monkeypatch):
    monkeypatch.setattr("features.extraction.load_image", lambda _: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(InputError, match="EXTRACTION_WORKERS"):
        run(workers=1)


def test_unreadable_images_are_told_before_the_pass(run, toy, extractor):
    (toy.root / toy.files[2]).write_bytes(b"?")
    (toy.root / toy.files[9]).write_bytes(b"??")
    with pytest.raises(InputError, match=f"2 of 12.*{toy.files[2]}.*{toy.files[9]}"):
        run()
    assert extractor.seen == 0


def test_out_of_memory_halves_the_batch(run, extractor, caplog, tmp_path):
    extractor.fits = 3
    small = run(batch_size=12)
    assert extractor.seen == 12
    assert [record.args[1] for record in caplog.records if "Out of memory" in record.msg] == [6, 3]
    extractor.fits = None
    torch.testing.assert_close(small.features, run(cache_dir=tmp_path / "big").features, rtol=2e-3, atol=2e-3)


def test_not_even_one_image_fits_and_other_errors_are_not_taken_for_memory(run, extractor, monkeypatch):
    extractor.fits = 0
    with pytest.raises(InputError, match=extractor.name):
        run()

    def broken(pixels):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(extractor, "forward", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        run()


class Slow(Counting):
    def count(self, pixels):
        time.sleep(0.3)
        super().count(pixels)


@pytest.fixture
def process(run, extractor, tmp_path):
    """Start an extraction in another process, the leader of a group; it waits for the file `go`."""
    if sys.platform != "linux":
        pytest.skip("a process that has loaded libraries is forked on Linux only")
    slow, context, started = Slow(extractor.model, extractor.preprocessing, extractor.name), get_context("fork"), []

    def work(pipe, settings):
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
        logging.basicConfig(level="WARNING", force=True)
        pipe.send("ready")
        wait_until((tmp_path / "go").exists)
        fingerprint = run(extractor=slow, batch_size=2, **settings).fingerprint
        pipe.send((slow.seen, fingerprint))

    def start(**settings):
        mine, its = context.Pipe()
        started.append(context.Process(target=work, args=(its, settings)))
        started[-1].start()
        assert mine.recv() == "ready"
        return started[-1], mine

    yield start
    for one in started:
        one.kill()
        one.join()


@pytest.mark.parametrize(("blocks", "asked"), [(0, 0), (1, ASKED)])
def test_two_processes_extract_once(process, tmp_path, capfd, blocks, asked):
    both = [process(blocks=blocks), process(blocks=blocks)]
    (tmp_path / "go").touch()
    (seen1, print1), (seen2, print2) = [pipe.recv() for _, pipe in both]
    assert {seen1, seen2} == {asked, asked + 12}
    assert print1 == print2
    for one, _ in both:
        one.join()
    assert capfd.readouterr().err.count(".lock") == 1  # the one that waits says so


def test_control_c_leaves_complete_shards_and_one_traceback(process, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("features.extraction.SHARD_ROWS", 4)
    one, _ = process(workers=2)
    (tmp_path / "go").touch()
    wait_until(lambda: list(tmp_path.glob("cache/*.parts/0*.safetensors")))
    os.killpg(one.pid, signal.SIGINT)  # as a terminal does: to all processes of the group
    one.join()
    err = capfd.readouterr().err
    assert err.count("Traceback") == 1
    assert "KeyboardInterrupt" in err
    (parts,) = tmp_path.glob("cache/*.parts")
    assert {part.name[:10] for part in parts.iterdir() if part.suffix != ".lock"} <= {"000000000_", "000000004_"}


# Get_features


def test_what_cannot_be_had_is_refused_and_there_is_no_return_to_the_bundle(tmp_path, image_root, cache, monkeypatch):
    with pytest.raises(InputError, match="DATA_ROOT and FEATURES_FILE"):
        get_features(image_root, features_file="x.safetensors")
    with pytest.raises(InputError, match="nowhere"):
        get_features(tmp_path / "nowhere", cache_dir=cache)
    with pytest.raises(InputError, match="nothing"):
        get_features(image_root, vit_model=str(tmp_path / "nothing"), cache_dir=cache)
    monkeypatch.setattr("features.extraction.BUNDLED_FILE", tmp_path / "gone.safetensors")
    with pytest.raises(InputError, match=r"gone.safetensors.*experiment.py features"):
        get_features()


def test_defaults_come_from_config(image_root, tiny_vit, cache, monkeypatch):
    monkeypatch.setattr(config, "VIT_MODEL", str(tiny_vit))
    monkeypatch.setattr(config, "CACHE_DIR", str(cache))
    monkeypatch.setattr(config, "EXTRACTION_WORKERS", 0)
    monkeypatch.setattr(config, "DEVICE", "cpu")
    result = get_features(image_root, progress=False)
    assert result.source == "images in toy"
    assert list(cache.glob("toy_tiny-vit_*.safetensors"))


@pytest.mark.parametrize(("writable", "below"), [(True, "project"), (False, "own")])
def test_the_cache_is_in_one_place_from_wherever_it_is_used(
    image_root, tiny_vit, tmp_path, monkeypatch, caplog, writable, below
):
    caplog.set_level("INFO")
    (tmp_path / "project").mkdir()
    monkeypatch.setattr("features.extraction.ROOT", tmp_path / "project")
    monkeypatch.setattr(os, "access", lambda *_: writable)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    monkeypatch.setattr(config, "EXTRACTION_WORKERS", 0)
    for folder in (image_root, tmp_path):
        monkeypatch.chdir(folder)
        get_features(image_root, vit_model=tiny_vit, device="cpu", progress=False)
    (file,) = tmp_path.rglob("*.safetensors")
    assert file.is_relative_to(tmp_path / below)
    assert str(file) in caplog.text


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"batch_size": 0}, "EXTRACTION_BATCH_SIZE"),
        ({"workers": -1}, "EXTRACTION_WORKERS"),
        ({"cache_dir": f"{__file__}/cache"}, "CACHE_DIR"),  # below a file
    ],
)
def test_settings_that_cannot_be_used_are_refused(run, settings, named):
    with pytest.raises(InputError, match=named):
        run(**settings)


# The bundled file


def test_bundled_file_is_pacs():
    bundle = bundled_features()
    assert bundle.describe() == (
        "pacs features: 9991 × 192-d, vit-tiny-patch16-224, 4 domains, 7 classes (bundled file)"
    )
    assert torch.bincount(bundle.domains).tolist() == [2048, 2344, 1670, 3929]
    assert bundle.domain_names == ("art_painting", "cartoon", "photo", "sketch")


def test_bundled_rows_are_those_of_the_images(shared_pacs, shared_vit):
    bundle, extractor = bundled_features(), load_extractor(str(shared_vit))
    assert bundle.header["model"]["weights_sha256"] == extractor.weights_hash()
    rows = range(0, len(bundle), 640)
    pixels = [extractor.preprocessing(load_image(shared_pacs / bundle.files[row])) for row in rows]
    got, expected = extractor(torch.stack(pixels)), bundle.features[list(rows)].float()
    assert ((got - expected).norm(dim=1) / expected.norm(dim=1)).max() < 2e-3
