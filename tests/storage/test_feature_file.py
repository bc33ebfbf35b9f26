"""The feature file: a round trip, and one sentence for each fault of a user's own file."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from config import InputError, Settings
from engine import SplitFeatures
from storage import copy_features, load_features, save_features

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
    assert loaded.header["counts"] == {domain: {"cat": 2, "dog": 2, "fox": 2} for domain in DOMAINS}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the system does not tell what is mapped")
def test_features_stay_on_disk_also_for_training(tmp_path):
    loaded = load_features(save_features(tmp_path / "own.safetensors", **parts(), dataset="own"))
    data = SplitFeatures.from_features(loaded, replace(Settings.current(), out_fraction=0.5))
    mapped = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "own.safetensors" in line]
    spans = [[int(end, 16) for end in line[0].split("-")] for line in mapped]
    for features in (loaded.features, data.features):
        assert any(low <= features.data_ptr() < high for low, high in spans)


@pytest.mark.parametrize("rows", [1, 5, 12])
def test_the_first_row_that_is_not_finite_is_named_however_many_are_checked_at_a_time(tmp_path, rows, monkeypatch):
    monkeypatch.setattr("storage.feature_file.ROWS", rows)
    content = parts()
    content["features"][[7, 11], 2] = torch.tensor([torch.inf, torch.nan]).half()
    with pytest.raises(InputError, match="not finite, first in row 7"):
        save_features(tmp_path / "own.safetensors", **content)


def test_the_same_content_is_the_same_bytes_and_a_fault_leaves_the_old_file(tmp_path):
    extra = {"dataset": "x", "model": {"name": "m"}, "files": [f"f{i}" for i in range(12)]}
    first = save_features(tmp_path / "1.safetensors", **parts(), **extra)
    arrays = {key: np.asarray(value) if torch.is_tensor(value) else value for key, value in parts().items()}
    second = save_features(tmp_path / "2.safetensors", **arrays, **extra)
    assert first.read_bytes() == second.read_bytes()
    assert copy_features(load_features(first), tmp_path / "3.safetensors").read_bytes() == first.read_bytes()
    for change, named in (({"class_names": ["x"]}, "labels"), ({"counts": {}}, "'counts'")):  # which it writes itself
        with pytest.raises(InputError, match=named):
            save_features(first, **parts(**change))
    assert first.read_bytes() == second.read_bytes()
    assert set(os.listdir(tmp_path)) == {"1.safetensors", "2.safetensors", "3.safetensors"}


@pytest.mark.parametrize(("model", "kind"), [({}, torch.uint8), ({"model": None}, torch.uint16)])
def test_file_needs_neither_files_nor_model_and_takes_any_integers(tmp_path, model, kind):
    content = parts()
    integers = {"labels": content["labels"].to(kind), "domains": content["domains"].int()}
    loaded = load_features(write_raw(tmp_path / "u.safetensors", **integers, **model))
    assert torch.equal(loaded.labels, content["labels"])
    assert torch.equal(loaded.domains, content["domains"])
    assert loaded.model_name == "unknown model"
    assert loaded.header["counts"]["b"] == {"cat": 2, "dog": 2, "fox": 2}  # counted, if the file does not say
    assert len(set(loaded.files)) == 12


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
    paths = [save_features(tmp_path / f"{i}.st", **parts(**change)) for i, change in enumerate(changes)]
    found = [load_features(path).fingerprint for path in paths]
    assert len(set(found)) == len(changes)
    assert all(len(print_) == 16 for print_ in found)


def test_fingerprint_of_tokens_is_of_what_determines_them(tmp_path):
    path = save_features(tmp_path / "f.st", **parts(), model={"name": "m", "weights_sha256": "a"})
    plain = load_features(path)
    tokens = torch.empty(12, 7, 5, device="meta")  # which has no bytes to read

    def with_tokens(weights="a", **changes):
        described = {"blocks": 1, "tokens": 7, "type": "float16"} | changes
        model = {"name": "m", "weights_sha256": weights}
        return replace(plain, tokens=tokens, header={**plain.header, "model": model, "tokens": described})

    sets = [plain, with_tokens(), with_tokens("b"), with_tokens(blocks=2), with_tokens(type="float32")]
    assert len({one.fingerprint for one in sets}) == 5
    assert with_tokens().fingerprint == with_tokens().fingerprint
    assert "7 tokens" in with_tokens().describe()
    assert copy_features(with_tokens(), tmp_path / "g.st").read_bytes() == path.read_bytes()


def test_fingerprints_on_disk_stay_what_they_are(tmp_path):
    content = parts(features=torch.arange(60.0).view(12, 5).half(), files=[f"f{i}" for i in range(12)])
    assert load_features(save_features(tmp_path / "f.st", **content)).fingerprint == "895ff068022f6f52"


# (changed parts, what the message names, whether save_features can be asked to write them)
BAD = [
    ({"labels": None}, "'labels'", False),
    ({"features": torch.zeros(12)}, "features", True),
    ({"features": torch.tensor(1.0)}, "features", True),
    ({"features": torch.zeros(0, 5), "labels": torch.zeros(0).long(), "domains": torch.zeros(0).long()}, "N, D", True),
    ({"features": torch.zeros(12, 5).int()}, "features", True),
    ({"features": torch.full((12, 5), float("nan"))}, "features .* row 0", True),
    ({"features": torch.full((12, 5), 1e300, dtype=torch.float64)}, "features .* row 0", True),
    ({"labels": torch.zeros(12)}, "labels", True),
    ({"domains": torch.zeros(11).long()}, "domains .*11.* 12 ", True),
    ({"labels": torch.full((12,), 3)}, "labels from 3 to 3", True),
    ({"domains": torch.full((12,), -1)}, "domains from -1 to -1", True),
    ({"class_names": None}, "class_names", False),
    ({"class_names": ["a", "", "c"]}, "class_names", True),
    ({"domain_names": [1, 2]}, "domain_names", True),
    ({"class_names": ["cat", "cat", "fox"]}, "'cat'", True),
    ({"domain_names": ["a", "a"]}, "'a'", True),
    ({"domain_names": ["a", "../b"]}, r"'\.\./b'", True),
    ({"domain_names": ["a", "b\0"]}, r"'b\\x00'", True),
    ({"class_names": ["cat", "dog", "\ud800"]}, r"'\\ud800'", True),
    ({"domain_names": ["a"], "domains": torch.zeros(12).long()}, "domain", True),
    ({"files": ["x"]}, "files", True),
    ({"files": ["x"] * 12}, "'x'", True),
    ({"labels": torch.tensor([0, 0, 1, 1, 2, 2, 0, 0, 1, 1, 0, 0])}, "'fox' in domain 'b'", True),
    ({"domain_names": ["a", "b", "c"]}, "'cat' in domain 'c'", True),
    ({"model": "my-encoder"}, "model", True),
    ({"preprocessing": "224 px"}, "preprocessing", True),
    ({"model": {"type": "x"}}, "model", True),
    ({"dataset": ["x"]}, "dataset", True),
    ({"dataset": "\ud800"}, r"'\\ud800'", True),
    ({"format_version": 2}, "version 2", False),
]


@pytest.mark.parametrize(("change", "message", "writable"), BAD)
def test_each_fault_is_one_sentence_that_names_the_file_and_is_not_written(tmp_path, change, message, writable):
    path = write_raw(tmp_path / "bad.safetensors", **change)
    with pytest.raises(InputError, match=message) as caught:
        load_features(path)
    assert "bad.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)
    if writable:
        path.unlink()
        with pytest.raises(InputError, match=message):
            save_features(path, **parts(**change))
        assert not list(tmp_path.iterdir())


def test_missing_damaged_and_foreign_files(tmp_path):
    complete = save_features(tmp_path / "complete.safetensors", **parts()).read_bytes()
    path = tmp_path / "x.safetensors"
    for content in (None, b"PK not this", complete[:-10]):
        if content:
            path.write_bytes(content)
        with pytest.raises(InputError, match=r"x\.safetensors"):
            load_features(path)
    save_file({"features": torch.zeros(2, 2)}, path)
    with pytest.raises(InputError, match="'header'"):
        load_features(path)
    save_file({"features": torch.zeros(2, 2)}, path, {"header": "[" * 100_000})
    with pytest.raises(InputError, match="'header'"):
        load_features(path)


def test_features_stay_on_disk(tmp_path):
    path = save_features(tmp_path / "big.safetensors", **parts(features=torch.ones(12, 200_000)))
    loaded = load_features(path)
    if not (maps := Path("/proc/self/maps")).exists():
        pytest.skip("no /proc on this system")
    assert "big.safetensors" in maps.read_text()
    assert (loaded.features == 1).all()
