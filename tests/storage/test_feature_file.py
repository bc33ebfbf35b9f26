"""The feature file: a round trip, and one sentence for each thing that can be wrong with a user's own."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from config import InputError
from storage.feature_file import copy_features, load_features, save_features

CLASSES, DOMAINS = ["cat", "dog", "fox"], ["a", "b"]


def parts(**changes):
    """Two domains, three classes, two images of each, D = 5; any part can be replaced."""
    labels = torch.arange(3).repeat_interleave(2).repeat(2)
    domains = torch.arange(2).repeat_interleave(6)
    values = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    return {
        "features": values.half(),
        "labels": labels,
        "domains": domains,
        "class_names": CLASSES,
        "domain_names": DOMAINS,
    } | changes


def write_raw(path, **changes):
    """A file that save_features would refuse to write."""
    content = parts(**changes)
    tensors = {key: value for key, value in content.items() if isinstance(value, torch.Tensor)}
    header = {key: value for key, value in content.items() if not isinstance(value, torch.Tensor)}
    save_file(tensors, path, {"header": json.dumps({"format_version": 1, **header})})
    return path


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_round_trip_keeps_the_float_type(tmp_path, kind):
    content = parts(features=torch.randn(12, 5, dtype=kind))
    path = save_features(tmp_path / "own.safetensors", **content, model={"name": "my-model"})
    loaded = load_features(path)
    assert loaded.features.dtype == kind
    assert (loaded.features == content["features"]).all()
    assert (loaded.labels == content["labels"]).all()
    assert (loaded.domains == content["domains"]).all()
    assert (loaded.class_names, loaded.domain_names) == (tuple(CLASSES), tuple(DOMAINS))
    assert (loaded.files[0], loaded.files[-1]) == ("row000000", "row000011")
    assert loaded.describe() == "own features: 12 × 5-d, my-model, 2 domains, 3 classes (own.safetensors)"
    assert loaded.header["counts"]["b"] == {"cat": 2, "dog": 2, "fox": 2}


def test_same_content_same_bytes_and_whole_or_not_at_all(tmp_path):
    extra = {"dataset": "x", "model": {"name": "m"}, "files": [f"f{i}" for i in range(12)]}
    first = save_features(tmp_path / "1.safetensors", **parts(), **extra)
    second = save_features(tmp_path / "2.safetensors", **parts(), **extra)
    assert first.read_bytes() == second.read_bytes()
    assert copy_features(load_features(first), tmp_path / "3.safetensors").read_bytes() == first.read_bytes()
    with pytest.raises(InputError):
        save_features(first, **parts(class_names=["x"]))
    assert first.read_bytes() == second.read_bytes()
    assert set(os.listdir(tmp_path)) == {"1.safetensors", "2.safetensors", "3.safetensors"}


def test_file_needs_neither_files_nor_model_and_takes_any_integers(tmp_path):
    content = parts()
    path = write_raw(
        tmp_path / "u.safetensors", labels=content["labels"].to(torch.uint8), domains=content["domains"].int()
    )
    loaded = load_features(path)
    assert loaded.labels.dtype == loaded.domains.dtype == torch.int64
    assert loaded.model_name == "unknown model"
    assert len(set(loaded.files)) == 12


def test_numpy_arrays_are_taken(tmp_path):
    content = {key: np.asarray(value) if torch.is_tensor(value) else value for key, value in parts().items()}
    assert len(load_features(save_features(tmp_path / "n.safetensors", **content))) == 12


def test_fingerprint_depends_on_every_part(tmp_path):
    content = parts()
    other = content["features"].clone()
    other[3, 2] += 1
    changes = [
        {},
        {"features": other},
        {"features": content["features"].float()},
        {"labels": content["labels"].flip(0)},
        {"domains": content["domains"].flip(0)},
        {"class_names": ["cat", "dog", "hen"]},
        {"files": [f"f{i}" for i in range(12)]},
    ]
    found = [
        load_features(save_features(tmp_path / f"{i}.st", **parts(**c))).fingerprint for i, c in enumerate(changes)
    ]
    assert len(set(found)) == len(changes)
    assert all(len(print_) == 16 for print_ in found)


BAD = [
    ({"labels": None}, "no tensor 'labels'"),
    ({"features": torch.zeros(12)}, r"shape \[N, D\]"),
    ({"features": torch.zeros(0, 5), "labels": torch.zeros(0).long(), "domains": torch.zeros(0).long()}, r"\[N, D\]"),
    ({"features": torch.zeros(12, 5).int()}, "floating-point features"),
    ({"features": torch.full((12, 5), float("nan"))}, "not finite, first in row 0"),
    ({"labels": torch.zeros(12)}, "integer labels"),
    ({"domains": torch.zeros(11).long()}, r"domains of shape \[11\] for 12 rows"),
    ({"labels": torch.full((12,), 3)}, "labels from 3 to 3"),
    ({"domains": torch.full((12,), -1)}, "domains from -1 to -1"),
    ({"class_names": None}, "class_names"),
    ({"class_names": ["a", "", "c"]}, "class_names"),
    ({"domain_names": [1, 2]}, "domain_names"),
    ({"class_names": ["cat", "cat", "fox"]}, "'cat' twice"),
    ({"domain_names": ["a", "a"]}, "'a' twice"),
    ({"domain_names": ["a"], "domains": torch.zeros(12).long()}, "one domain only"),
    ({"files": ["x"]}, "12 rows of features but 1 names"),
    ({"files": ["x"] * 12}, "'x' twice"),
    ({"labels": torch.tensor([0, 0, 1, 1, 2, 2, 0, 0, 1, 1, 0, 0])}, "no images of class 'fox' in domain 'b'"),
    ({"domain_names": ["a", "b", "c"]}, "no images of class 'cat' in domain 'c'"),
    ({"format_version": 2}, "format version 2"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_each_fault_is_one_sentence_that_names_the_file(tmp_path, change, message):
    path = write_raw(tmp_path / "bad.safetensors", **change)
    with pytest.raises(InputError, match=message) as caught:
        load_features(path)
    assert "bad.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


WRITABLE = [bad for bad in BAD[:-1] if None not in bad[0].values()]  # what save_features can be asked to write


@pytest.mark.parametrize(("change", "message"), WRITABLE)
def test_what_would_not_load_is_not_written(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        save_features(tmp_path / "bad.safetensors", **parts(**change))
    assert not list(tmp_path.iterdir())


def test_missing_damaged_and_foreign_files(tmp_path):
    with pytest.raises(InputError, match="no feature file"):
        load_features(tmp_path / "none.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"PK not this")
    with pytest.raises(InputError, match="not a whole safetensors file"):
        load_features(tmp_path / "x.safetensors")
    whole = save_features(tmp_path / "w.safetensors", **parts()).read_bytes()
    (tmp_path / "x.safetensors").write_bytes(whole[:-10])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        load_features(tmp_path / "x.safetensors")
    save_file({"features": torch.zeros(2, 2)}, tmp_path / "y.safetensors")
    with pytest.raises(InputError, match="'header' in its metadata"):
        load_features(tmp_path / "y.safetensors")


def test_own_header_entries_cannot_be_given(tmp_path):
    with pytest.raises(InputError, match="'counts' is written by save_features"):
        save_features(tmp_path / "x.safetensors", **parts(), counts={})


def test_features_stay_on_disk(tmp_path):
    path = save_features(tmp_path / "big.safetensors", **parts(features=torch.ones(12, 200_000)))
    loaded = load_features(path)
    if not (maps := Path("/proc/self/maps")).exists():
        pytest.skip("no /proc on this system")
    assert "big.safetensors" in maps.read_text()
    assert (loaded.features == 1).all()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "my-encoder"}, "a model like"),
        ({"model": {"type": "x"}}, "a model like"),
        ({"dataset": ["x"]}, "a dataset name"),
        ({"features": torch.tensor(1.0)}, r"shape \[N, D\]"),
        ({"domain_names": ["a", "../b"]}, "without slashes"),
        ({"features": torch.full((12, 5), 1e300, dtype=torch.float64)}, "not finite"),
    ],
)
def test_a_header_slightly_off_is_refused_in_a_sentence(tmp_path, changes, said):
    with pytest.raises(InputError, match=said):
        load_features(write_raw(tmp_path / "f.safetensors", **changes))


def test_no_model_and_unsigned_labels_are_fine(tmp_path):
    path = write_raw(tmp_path / "f.safetensors", model=None, labels=parts()["labels"].to(torch.uint16))
    data = load_features(path)
    assert data.model_name == "unknown model"
    assert torch.equal(data.labels, parts()["labels"])
