"""The files of a run, read back: rows of the seeds asked for, each file opened once, what is not there."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from config import InputError, Settings
from importance import flatten
from storage import Results
from study import ERM, Arm, Study, load_networks
from study.figures import confusion
from tests.factories import LEARNING, make_run, token_blobs


@pytest.fixture
def opened(monkeypatch):
    """Names of the files that are opened, in order."""
    names, load = [], Results.load

    def noted(self, kind, name):
        names.append(f"{kind}/{name}")
        return load(self, kind, name)

    monkeypatch.setattr(Results, "load", noted)
    return names


def reopened(finished, data, seeds=4):
    return make_run(data, finished.run.results.directory, seeds, LEARNING)


def read(archive):
    saved = archive.phase2("photo", "importance")
    return [
        saved.seeds, saved.header, saved.failed, saved.ok, saved.curves, saved.history, saved.params("start"),
        saved.params(), archive.phase1("art").layers("mask"), archive.phase1("art").layers("importance"),
        archive.masks("photo").layers("mask"), archive.phase1_seeds("art"),
        archive.phase2_seeds("photo", ["erm", "importance"], weights=True),
    ]  # fmt: skip


def test_a_file_is_opened_once(finished, data, opened):
    archive = reopened(finished, data).archive
    for _ in range(3):
        read(archive)
    assert len(opened) == len(set(opened)) > 5


def test_a_file_that_was_written_is_opened_again(finished, data, tmp_path):
    shutil.copytree(finished.run.results.directory, tmp_path, dirs_exist_ok=True)
    run = make_run(data, tmp_path, 5, LEARNING)
    assert run.archive.phase1("art").seeds == (0, 1, 2, 3)
    Study(run).train()
    assert run.archive.phase1("art").seeds == run.archive.phase2("art", "erm").seeds == (0, 1, 2, 3, 4)


def test_rows_are_of_the_seeds_asked_for(finished, data):
    archive, every = reopened(finished, data, seeds=[1, 3, 9]).archive, finished.run.archive
    few, all_four = archive.phase2("photo", "importance"), every.phase2("photo", "importance")
    assert (few.seeds, all_four.seeds) == ((1, 3), (0, 1, 2, 3))  # there is no seed 9 yet
    for name, value in few.params().items():
        assert torch.equal(value, all_four.params()[name][[1, 3]])
    for name, value in few.curves.items():
        assert torch.equal(value, all_four.curves[name][:, [1, 3]])
    marked, expected = (flatten(a.masks("photo").layers("mask")) for a in (archive, every))
    assert torch.equal(marked, expected[[1, 3]])
    assert archive.phase1("art", seeds=[2]).seeds == (2,)
    assert archive.phase1_seeds("art") == {0, 1, 2, 3}  # whoever's they are


def test_shapes(finished):
    archive = finished.run.archive
    saved = archive.phase2("photo", "erm")
    assert [tuple(layer.shape) for layer in archive.masks("photo").layers("mask")] == [(4, 5, 6), (4, 4, 5)]
    assert {curve.shape for curve in saved.curves.values()} == {(3, 4)}
    assert saved.history["correct"].shape == (4, 3, 3, 2, 3)  # seeds, epochs, domains, in/out, classes
    assert (saved.history["correct"] <= finished.run.data.totals).all()
    assert {saved.history[name].shape for name in ("loss", "train_accuracy", "validation_accuracy")} == {(4, 3)}
    assert archive.phase1("art").history["loss"].shape == (4, 2)
    assert saved.params("start")["layers.0.weight"].shape == (4, 6, 8)
    assert saved.failed.tolist() == [0] * 4
    assert saved.ok.all()


def test_what_is_not_there(finished, data, tmp_path):
    archive = make_run(data, tmp_path).archive
    assert archive.phase1_seeds("art") == set()
    assert archive.phase2_seeds("art", ["erm"], weights=False) == set()
    assert archive.method_seeds("ERM", 0, ["art"], weights=False) == set()
    with pytest.raises(InputError, match="phase1_art"):
        archive.phase1("art").layers("mask")
    with pytest.raises(InputError, match="phase2_art_erm"):
        archive.phase2("art", "erm").params()
    assert finished.run.archive.phase1("art").layers("nothing") == []


def test_weights_of_blocks_are_kept_as_changes_of_the_pretrained_ones(tmp_path):
    features = token_blobs()
    pretrained = dict(features.tail.named_parameters())
    options = {"seeds": 2, "settings": Settings.current(trained_blocks=1, batch_size=16), "holdouts": "photo"}
    study = Study(make_run(features, tmp_path, **options), [ERM, Arm("head")])
    study.train()
    archive = make_run(features, tmp_path, **options).archive
    tracked = study.run.network.tracked_names
    for name in ("erm", "head"):
        arrays, _ = archive.read("weights", f"phase2_photo_{name}")
        head = {f"final.head.layers.0.{kind}" for kind in ("weight", "bias")}
        assert arrays.keys() == {"seeds", "failed", *head, *(f"change.{name}" for name in pretrained)}
        params = archive.phase2("photo", name).params()
        assert params.keys() == dict(study.run.network.named_parameters()).keys()
        for weights in tracked:
            assert (arrays[f"change.{weights}"] == 0).all() == (name == "head")
            moved = params[weights] - pretrained[weights].detach()
            torch.testing.assert_close(moved, arrays[f"change.{weights}"], rtol=0, atol=1e-7)
        right = archive.phase2("photo", name).history["correct"][:, -1, 1].sum((-1, -2))  # of photo
        assert confusion(study.run, "photo", name).trace() == right.sum()
    old = {name: value for name, value in arrays.items() if not name.startswith("change.")}  # an earlier version's
    path = tmp_path / "weights" / "phase2_photo_head.safetensors"
    with safe_open(path, "pt") as file:
        header = file.metadata()
    save_file(old, path, metadata=header)
    with pytest.raises(InputError, match=r"lacks change\."):
        Study(make_run(features, tmp_path, **options), [ERM, Arm("head")]).train()


@pytest.mark.parametrize("weights", [True, False])
def test_what_a_method_of_the_field_trained(data, tmp_path, weights):
    run = make_run(data, tmp_path, [2, 5])
    about = {"algorithm": "Mixup", "trial": 3, "holdouts": ["art", "photo"], "hyperparameters": {"alpha": 0.2}}
    history = {"loss": torch.rand(2, 3), "validation_accuracy": torch.rand(2, 3), "failed": torch.tensor([0, 2])}
    history |= {"correct": torch.zeros(2, 3, *run.data.cell_shape, dtype=torch.long)}
    params = {"layers.0.bias": torch.rand(2, 6)}
    run.archive.save_method(about, run.seeds, history, params if weights else None)
    assert {path.name for path in tmp_path.glob("*/*")} == {"compare_Mixup_3_art+photo.npz"} | (
        {"compare_Mixup_3_art+photo.safetensors"} if weights else set()
    )
    archive = make_run(data, tmp_path, [2, 5]).archive
    saved = archive.method("Mixup", 3, ("art", "photo"))
    assert saved.seeds == (2, 5)
    assert about.items() <= saved.header.items()
    assert saved.header["class_names"] == ["cat", "dog", "owl"]
    assert saved.ok.tolist() == [True, False]
    assert torch.equal(saved.history["loss"], history["loss"])
    assert archive.method_seeds("Mixup", 3, ["art", "photo"], weights=False) == {2, 5}
    assert archive.method_seeds("Mixup", 3, ["art", "photo"], weights=True) == ({2, 5} if weights else set())
    if weights:
        assert torch.equal(saved.params()["layers.0.bias"], params["layers.0.bias"])


@pytest.mark.parametrize(
    ("file", "change", "named"),
    [
        ("histories/phase2_photo_erm", {"seeds": None}, "seeds"),
        ("histories/phase2_photo_erm", {"seeds": torch.zeros(4, dtype=torch.long)}, "seeds"),
        ("histories/phase2_photo_erm", {"correct": None}, "correct"),
        ("histories/phase2_photo_erm", {"correct": torch.zeros(4, 3, 3, 2, 9, dtype=torch.long)}, "correct"),
        ("histories/phase2_photo_erm", {"loss": torch.zeros(4, 9)}, "accuracy"),
        ("histories/phase1_art", {"failed": None}, "failed"),
        ("histories/phase1_art", {"failed": torch.zeros(4)}, "failed"),
        ("importance/holdout_photo", {"mask_1": torch.zeros(4, 5, 6)}, "mask_1"),
        ("importance/phase1_art", {"importance_2": torch.zeros(4, 5)}, "importance_2"),
        ("weights/phase1_art", {"start.layers.0.bias": torch.zeros(3, 6)}, "layers.0.bias"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_arrays_of_another_form_are_named(finished, data, tmp_path, file, change, named):
    kind, name = file.split("/")
    arrays, header = finished.run.results.load(kind, name)
    archive = make_run(data, tmp_path, settings=LEARNING).archive
    write(tmp_path, kind, name, arrays | change, header)
    with pytest.raises(InputError, match=rf"{name}.*{re.escape(named)}"):
        archive.read(kind, name)


def write(directory, kind, name, arrays, header):
    """Any arrays (those that are None are left out) and header, as a file of this kind."""
    path = Results(directory).path(kind, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {key: value for key, value in arrays.items() if value is not None}
    if kind == "weights":
        save_file(arrays, path, {"header": json.dumps(header)})
    else:
        np.savez(path, header=json.dumps(header), **{key: value.numpy() for key, value in arrays.items()})
    return path


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"features": None}, "features"),
        ({"features": {"feature_size": "8"}}, "feature_size"),
        ({"features": {"feature_size": 9, "model": None, "preprocessing": None}}, "layers.0.weight"),
        ({"features": {"feature_size": 8, "model": "vit", "preprocessing": None}}, "model"),
        ({"class_names": 3}, "class_names"),
        ({"class_names": ["cat", 1, "owl"]}, "class_names[1]"),
        ({"hidden_sizes": [6, 5]}, "layers.2"),
        ({"hidden_sizes": [6, 5, 10**20]}, "layers.2"),
        ({"hidden_sizes": "6"}, "hidden_sizes"),
        ({"final.layers.1.bias": None}, "layers.1.bias"),
        ({"final.layers.1.bias": torch.zeros(4, 9)}, "layers.1.bias"),
        ({"final.layers.9.bias": torch.zeros(4, 9)}, "layers.9.bias"),
        ({"final.layers.1.bias": torch.zeros(4, 5, dtype=torch.long)}, "layers.1.bias"),
        ({"failed": torch.zeros(4, 2)}, "failed"),
        ({"seeds": torch.zeros(0, dtype=torch.long)}, "seeds"),
    ],
    ids=str,
)
def test_a_weights_file_that_is_not_what_it_says_is_refused(finished, tmp_path, change, named):
    arrays, header = finished.run.results.load("weights", "phase1_art")
    for key, value in change.items():
        (header if key in header else arrays)[key] = value
    path = write(tmp_path, "weights", "phase1_art", arrays, header)
    with pytest.raises(InputError, match=rf"phase1_art.*{re.escape(named)}") as caught:
        load_networks(path)
    assert "\n" not in str(caught.value)


def test_networks_of_a_weights_file(finished):
    folder = finished.run.results.directory
    seeds, params, failed, header = load_networks(folder / "weights" / "phase1_art.safetensors")
    assert (seeds, failed.tolist(), header["domain"]) == ((0, 1, 2, 3), [0] * 4, "art")
    expected = finished.run.archive.phase1("art").params()
    assert params.keys() == expected.keys()
    assert all(torch.equal(params[name], value) for name, value in expected.items())
    for name in ("histories/phase1_art.npz", "weights/nothing.safetensors"):
        with pytest.raises(InputError, match=name):
            load_networks(folder / name)
