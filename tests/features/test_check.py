"""Every image file is read once before an extraction; what was read is remembered, what cannot be read is listed."""

import json
import os
import time

import pytest

from config import InputError
from dataset import find_dataset
from features import check_images
from tests.conftest import OLD, write_image


def test_unchanged_files_are_not_read_again(image_root, tmp_path, monkeypatch):
    found = find_dataset(image_root)
    first = check_images(found, tmp_path)
    monkeypatch.setattr("features.check.check_whole", lambda data: pytest.fail("read again"))
    assert check_images(found, tmp_path) == first


def test_another_time_or_size_is_read_again(image_root, tmp_path):
    found = find_dataset(image_root)
    contents = check_images(found, tmp_path)
    write_image(image_root / found.files[0], seed=99, time=OLD + 1)
    again = check_images(found, tmp_path)
    assert again[0] != contents[0]
    assert again[1:] == contents[1:]


def test_verify_finds_a_change_that_keeps_size_and_time(image_root, tmp_path):
    path = image_root / "art/dog/000.bmp"  # a format without compression: the size stays
    write_image(path, seed=1)
    found = find_dataset(image_root)
    first = check_images(found, tmp_path)
    write_image(path, seed=2)
    assert check_images(found, tmp_path) == first
    assert check_images(found, tmp_path, verify=True) != first
    assert check_images(found, tmp_path) != first  # and it is remembered


def test_files_written_a_moment_ago_are_not_remembered(image_root, tmp_path):
    path = image_root / "art/dog/000.bmp"
    now = time.time()
    write_image(path, seed=1, time=now)
    found = find_dataset(image_root)
    first = check_images(found, tmp_path)
    write_image(path, seed=2, time=now)
    assert check_images(found, tmp_path) != first


def test_unreadable_images_and_broken_links_are_listed_all_at_once(image_root, tmp_path):
    content = (image_root / "art/dog/000.png").read_bytes()
    (image_root / "art/dog/001.png").write_bytes(content[: len(content) // 2])
    (image_root / "photo/horse/002.png").write_bytes(b"no image")
    (image_root / "photo/dog/001.png").write_bytes(b"")
    lost, circle, good = (image_root / "art" / "dog" / f"{name}.png" for name in ("lost", "circle", "linked"))
    lost.symlink_to(tmp_path / "nothing.png")
    circle.symlink_to(circle)
    good.symlink_to(image_root / "art/dog/000.png")
    with pytest.raises(InputError, match="5 of 15") as caught:
        check_images(find_dataset(image_root), tmp_path, progress=False)
    for name in ("art/dog/001", "photo/horse/002", "photo/dog/001", "art/dog/lost", "art/dog/circle"):
        assert f"{name}.png" in str(caught.value)
    assert "linked.png" not in str(caught.value)


@pytest.mark.parametrize("damage", ["{", "[" * 100_000, "3", "entries"])
def test_a_damaged_memory_is_replaced(image_root, tmp_path, caplog, damage):
    found = find_dataset(image_root)
    first = check_images(found, tmp_path)
    (memory,) = tmp_path.glob("images_*.json")
    content = json.loads(memory.read_text())
    memory.write_text(damage if damage != "entries" else json.dumps(content | {"files": dict.fromkeys(found.files, 1)}))
    assert check_images(found, tmp_path) == first
    assert "damaged" in caplog.text
    assert set(os.listdir(tmp_path)) == {"toy", memory.name}


def test_what_was_read_before_an_interruption_is_remembered(image_root, tmp_path, monkeypatch):
    found, calls = find_dataset(image_root), []

    def interrupted(data):
        calls.append(data)
        if len(calls) == 8:
            raise KeyboardInterrupt

    monkeypatch.setattr("features.check.check_whole", interrupted)
    with pytest.raises(KeyboardInterrupt):
        check_images(found, tmp_path, workers=1, progress=False)
    before = len(calls)
    check_images(found, tmp_path, workers=1, progress=False)
    assert len(calls) - before == 12 - 7
