"""The files of a run, read back: rows of the seeds asked for, each file opened once, what is not there."""

import shutil

import pytest
import torch

from config import InputError
from importance import flatten
from storage import Results
from study import Study, load_networks
from tests.factories import LEARNING, make_run


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
    saved, masks = finished.run.archive.phase2("photo", "erm"), finished.run.archive.masks("photo")
    assert [tuple(layer.shape) for layer in masks.layers("mask")] == [(4, 5, 6), (4, 4, 5)]
    assert {curve.shape for curve in saved.curves.values()} == {(3, 4)}
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


@pytest.mark.parametrize("weights", [True, False])
def test_what_a_method_of_the_field_trained(data, tmp_path, weights):
    run = make_run(data, tmp_path, [2, 5])
    about = {"algorithm": "Mixup", "trial": 3, "holdouts": ["art", "photo"], "hyperparameters": {"alpha": 0.2}}
    history = {"loss": torch.rand(2, 3), "failed": torch.tensor([0, 2])}
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
