"""Results on disk: what is appended, merged, refused and recovered."""

import json
import logging
import re
import shutil
import subprocess
from importlib.metadata import version
from importlib.util import module_from_spec, spec_from_file_location
from types import SimpleNamespace

import pytest
import torch

from config import InputError, Settings
from storage import Results, environment, load_arrays, record_key
from tests.factories import FEATURES, IDENTITY, KINDS, MACHINE, ROOT, arrays_for, everything, stored_record


def test_a_key_is_made_of_identity_and_nothing_else():
    key = record_key(IDENTITY)
    assert re.fullmatch("[0-9a-f]{16}", key)
    assert record_key({**dict(reversed(IDENTITY.items())), "accuracy": 1, "device": "cuda"}) == key
    changes = {"features": "x", "algorithm": "x", "settings": "x", "holdout": "x", "seed": 1, "selection": "val"}
    keys = {key, *(record_key({**IDENTITY, name: value}) for name, value in changes.items())}
    assert len(keys) == 7


def test_records_come_back_as_they_were_appended(tmp_path):
    results = Results(tmp_path / "deep" / "results")
    assert results.records() == []
    assert not results.directory.exists()  # looking makes nothing
    first = [stored_record(seed=s, holdout="Ärt ⇒ \n") for s in range(3)]
    failed = {**stored_record(seed=3), "accuracy": None, "failed": "the loss is no longer finite in epoch 2"}
    results.append(first)
    results.append(iter([failed]))
    assert results.records() == [*first, failed]
    results.records().clear()  # the list is the caller's own
    assert results.records() == Results(results.directory).records() == [*first, failed]
    lines = (results.directory / "records.jsonl").read_text("utf-8").split("\n")
    assert lines.pop() == ""
    assert [json.loads(line)["seed"] for line in lines] == [0, 1, 2, 3]


def test_what_is_there_is_not_appended_again(tmp_path):
    results = Results(tmp_path)
    results.append([stored_record(seed=0), stored_record(seed=1)])
    before = everything(tmp_path)["records.jsonl"]
    results.append([{**stored_record(seed=1), "accuracy": None}, stored_record(seed=2), stored_record(seed=2)])
    assert [r["seed"] for r in results.records()] == [0, 1, 2]
    assert results.records()[1] == stored_record(seed=1)
    content = everything(tmp_path)["records.jsonl"]
    assert content.startswith(before)  # only ever appended to
    (tmp_path / "records.jsonl").write_bytes(content + before)  # whatever wrote them: a key is there once
    assert [r["seed"] for r in results.records()] == [r["seed"] for r in Results(tmp_path).records()] == [0, 1, 2]


def test_records_are_appended_all_or_none_on_a_disk_that_is_full(tmp_path, small_disk):
    results, records = Results(tmp_path), [stored_record(seed=seed) for seed in range(99)]
    results.append(records[:1])
    before = everything(tmp_path)
    with small_disk(3000), pytest.raises(InputError, match=r"records\.jsonl"):  # room for some of the lines
        results.append(records)
    assert everything(tmp_path) == before
    results.append(records)
    assert results.records() == Results(tmp_path).records() == records


def test_what_somebody_else_writes_is_seen(tmp_path):
    """Records are kept in memory for as long as the file is the same."""
    here, there = Results(tmp_path), Results(tmp_path)
    here.append([stored_record(seed=0)])
    assert here.records() == there.records() == [stored_record(seed=0)]
    there.append([stored_record(seed=1)])
    assert [r["seed"] for r in here.records()] == [0, 1]
    here.append([stored_record(seed=1), stored_record(seed=2)])  # that of seed 1 is there already
    assert [r["seed"] for r in there.records()] == [0, 1, 2]
    path = tmp_path / "records.jsonl"
    path.write_bytes(path.read_bytes().split(b"\n")[0] + b"\n")
    assert [r["seed"] for r in here.records()] == [0]
    path.unlink()
    assert here.records() == []


RECORDS = [stored_record(seed=seed) for seed in range(3)]
LINE = json.dumps(RECORDS[1]).encode()


@pytest.mark.parametrize("whole", [0, 1])
@pytest.mark.parametrize("torn", [LINE, LINE[:-1], LINE[:-29], b'{"key": "ab\xc3'])  # lacks its end; inside a character
def test_a_torn_last_line_is_passed_over_with_a_warning_and_cut_off_by_the_next(tmp_path, caplog, whole, torn):
    results = Results(tmp_path)
    results.append(RECORDS[:whole])
    with (tmp_path / "records.jsonl").open("ab") as file:
        file.write(torn)
    with caplog.at_level(logging.WARNING):
        assert results.records() == RECORDS[:whole]
    assert "torn" in caplog.text
    assert {r.levelname for r in caplog.records} == {"WARNING"}
    results.append(RECORDS[whole:])
    caplog.clear()
    assert results.records() == RECORDS
    assert caplog.text == ""


def test_a_torn_line_is_cut_off_where_nothing_is_appended(tmp_path):
    results, path = Results(tmp_path), tmp_path / "records.jsonl"
    results.claim(Settings.current(), FEATURES)
    results.append([stored_record()])
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"key": "to')
    with pytest.raises(InputError):
        results.claim(Settings.current(batch_size=7), FEATURES)
    assert path.read_bytes() != whole  # another's file is not touched
    results.claim(Settings.current(), FEATURES)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "damage",
    [b'{"key": \n', b"\n", b"\xff\xfe\n", b"hello\n", b"null\n", b"[]\n", b"7\n", b"{}\n", b"[" * 10**5],
)
def test_a_damaged_line_in_the_middle_is_an_error(tmp_path, damage):
    results = Results(tmp_path)
    results.append([stored_record(seed=0)])
    path = tmp_path / "records.jsonl"
    before = path.read_bytes() + damage + LINE + b"\n"
    path.write_bytes(before)
    with pytest.raises(InputError, match="damaged"):
        results.records()
    with pytest.raises(InputError, match="damaged"):
        results.append([stored_record(seed=2)])
    assert path.read_bytes() == before


def test_the_first_claim_writes_settings_and_others_add_their_environment_once(tmp_path):
    results, settings = Results(tmp_path / "r"), Settings.current()
    assert results.read_settings() is None
    results.claim(settings, FEATURES, MACHINE)
    there = results.read_settings()
    assert there["hash"] == settings.hash
    assert there["settings"] == settings.as_dict()
    assert there["features"] == FEATURES
    assert there["environments"] == [MACHINE]
    before = everything(tmp_path)
    results.claim(settings, FEATURES, MACHINE)
    assert everything(tmp_path) == before
    other = {**MACHINE, "device": "NVIDIA"}
    for machine in (other, MACHINE, other):
        results.claim(settings, FEATURES, machine)
    assert results.read_settings() == {**there, "environments": [MACHINE, other]}


def test_settings_say_which_seeds_and_holdouts_there_are(tmp_path):
    results = Results(tmp_path)
    results.claim(Settings.current(), FEATURES, MACHINE)
    older = results.read_settings()
    results.note_contents()
    assert results.read_settings() == older
    results.append(stored_record(seed=seed, holdout="photo") for seed in (0, 1, 2, 5, 7, 8))
    results.append([stored_record(seed=3, holdout="art")])
    results.note_contents()
    noted = {**older, "holdouts": {"art": "3", "photo": "0-2,5,7-8"}}
    assert results.read_settings() == noted
    results.claim(Settings.current(), FEATURES, {**MACHINE, "device": "NVIDIA"})
    assert results.read_settings()["holdouts"] == noted["holdouts"]


@pytest.mark.parametrize(
    ("change", "fingerprint", "names"),
    [
        ({"batch_size": 7}, "abc", ["BATCH_SIZE = 32, not 7"]),
        ({"hidden_sizes": (4, 4)}, "abc", ["HIDDEN_SIZES = [10, 10, 10, 10, 10], not [4, 4]"]),
        ({"ph2_init": "phase1"}, "abc", ["PH2_INIT = 'fresh', not 'phase1'"]),
        ({}, "xyz", ["features = 'abc', not 'xyz'"]),
        ({"ph2_num_epochs": 3, "batch_size": 7}, "xyz", ["BATCH_SIZE = 32", "PH2_NUM_EPOCHS = 10", "features = 'abc'"]),
    ],
    ids=str,
)
def test_other_settings_and_features_are_refused_by_the_names_of_all_that_differ(tmp_path, change, fingerprint, names):
    results = Results(tmp_path)
    results.claim(Settings.current(), FEATURES, MACHINE)
    results.append([stored_record()])
    before = everything(tmp_path)
    with pytest.raises(InputError) as caught:
        results.claim(Settings.current(**change), {**FEATURES, "fingerprint": fingerprint}, MACHINE)
    message = str(caught.value)
    assert all(name in message for name in names)
    assert message.count(", not ") == len(names)
    assert "RESULTS_DIR" in message
    assert "OVERWRITE" in message
    assert everything(tmp_path) == before


def test_records_without_settings_are_refused(tmp_path):
    results = Results(tmp_path)
    results.append([stored_record()])
    with pytest.raises(InputError, match=r"no settings\.json"):
        results.claim(Settings.current(), FEATURES, MACHINE)
    with pytest.raises(InputError, match=r"no settings\.json"):
        results.clear()  # whose files these are is not known: nothing is deleted
    assert results.records() == [stored_record()]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"key": None}, "key"),
        ({"seed": "0"}, "seed"),
        ({"seed": True}, "seed"),
        ({"selection": ...}, "selection"),
        ({"accuracy": {"full": 0.5}}, "accuracy"),
        ({"accuracy": {"full": "0.5", "in": 0.5, "out": 0.5}}, "accuracy.full"),
        ({"failed": 2}, "failed"),
        ({"trial": "0"}, "trial"),
    ],
    ids=str,
)
def test_a_record_of_another_form_is_named(tmp_path, change, named):
    record = {key: value for key, value in (stored_record() | change).items() if value is not ...}
    (tmp_path / "records.jsonl").write_text(f"{LINE.decode()}\n{json.dumps(record)}\n")
    with pytest.raises(InputError, match=rf"Line 2 .*records\.jsonl.*\b{re.escape(named)}\b"):
        Results(tmp_path).records()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hash": ...}, "hash"),
        ({"settings": []}, "settings"),
        ({"features": FEATURES | {"counts": {"art": {"dog": "2"}}}}, "features.counts.art.dog"),
        ({"features": {"fingerprint": "abc"}}, "feature_size"),
        ({"environments": {}}, "environments"),
        ({"environments": ["cpu"]}, "environments[0]"),
        ({"holdouts": ["art"]}, "holdouts"),
    ],
    ids=str,
)
def test_settings_of_another_form_are_named(tmp_path, change, named):
    Results(tmp_path).claim(Settings.current(), FEATURES, MACHINE)
    content = {k: v for k, v in (Results(tmp_path).read_settings() | change).items() if v is not ...}
    (tmp_path / "settings.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=rf"settings\.json.*\b{re.escape(named)}"):
        Results(tmp_path).claim(Settings.current(), FEATURES, MACHINE)


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"editor.fontSize": 12}'])
def test_a_settings_file_that_is_not_ours_is_refused(tmp_path, text):
    (tmp_path / "settings.json").write_text(text)
    with pytest.raises(InputError):
        Results(tmp_path).claim(Settings.current(), FEATURES, MACHINE)
    assert (tmp_path / "settings.json").read_text() == text


def fill(results):
    """One of each thing that a run writes."""
    results.claim(Settings.current(), FEATURES, MACHINE)
    results.append([stored_record()])
    for kind in KINDS:
        results.save(kind, "phase1_art", [0], {"a": torch.zeros(1, 2)}, {})
    results.write_text("plots/lodo.svg", "<svg/>")
    results.write_text("summary_report.txt", "report")


def test_clear_deletes_what_a_run_writes_and_nothing_else(tmp_path):
    for there in ("", "new"):
        Results(tmp_path / there).clear()  # needs nothing to be there
    assert everything(tmp_path) == {}
    fill(Results(tmp_path))
    (tmp_path / "reference").mkdir()
    own = [tmp_path / "reference" / "records.jsonl", tmp_path / "notes.md", tmp_path / "weights.txt"]
    for path in own:
        path.write_text("mine")
    results, other = Results(tmp_path), Settings.current(batch_size=7)
    results.clear()
    assert set(everything(tmp_path)) == {"reference/records.jsonl", "notes.md", "weights.txt"}
    assert all(path.read_text() == "mine" for path in own)
    assert results.records() == []
    assert not results.has("weights", "phase1_art")
    results.claim(other, FEATURES, MACHINE)
    assert results.read_settings()["hash"] == other.hash


def test_clear_of_a_linked_folder(tmp_path):
    """Weights are large: somebody keeps them on another disk."""
    (tmp_path / "disk").mkdir()
    results = Results(tmp_path / "r")
    results.claim(Settings.current(), FEATURES, MACHINE)
    (tmp_path / "r" / "weights").symlink_to(tmp_path / "disk")
    results.save("weights", "a", [0], arrays_for([0]), {})
    results.clear()
    assert not results.has("weights", "a")


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_claim_would_refuse_is_refused_without_features(tmp_path, overwrite):
    results, settings = Results(tmp_path / "r"), Settings.current()
    results.check(settings, overwrite)
    results.append([stored_record()])
    with pytest.raises(InputError, match=r"no settings\.json"):
        results.check(settings, overwrite)
    (results.directory / "records.jsonl").unlink()
    fill(results)
    before = everything(tmp_path)
    results.check(settings, overwrite)
    if overwrite:
        results.check(Settings.current(batch_size=7), overwrite)
    else:
        with pytest.raises(InputError, match="BATCH_SIZE = 32, not 7"):
            results.check(Settings.current(batch_size=7))
    with Results(results.directory), pytest.raises(InputError, match="Another run"):
        results.check(settings, overwrite)
    assert everything(tmp_path) == before
    (results.directory / "records.jsonl").write_text("?\n")
    if overwrite:
        results.check(settings, overwrite)
    else:
        with pytest.raises(InputError, match="damaged"):
            results.check(settings)


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    Results("~/r").save("weights", "a", [0], arrays_for([0]), {})
    assert (tmp_path / "r" / "weights" / "a.safetensors").is_file()
    assert load_arrays("~/r/weights/a.safetensors")[0]["seeds"].tolist() == [0]


def test_environment_names_versions_device_and_commit(monkeypatch):
    said = {"rev-parse": f"{ROOT}\n", "describe": "abc123\n", "status": " M config.py\n"}
    monkeypatch.setattr(subprocess, "run", lambda command, **_: SimpleNamespace(stdout=said[command[3]]))
    found = environment("cpu", 3)
    assert (found["device"], found["threads"], found["commit"]) == ("cpu", 3, "abc123-dirty")
    assert found["versions"]["torch"] == version("torch")
    assert {"torch", "transformers", "numpy", "scikit-learn"} <= set(found["versions"])
    assert json.loads(json.dumps(found)) == found


def test_environment_without_git(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment("cpu", 1)["commit"] is None


def test_the_commit_is_that_of_the_project_s_own_checkout(tmp_path):
    """Unpacked inside the checkout of something else, the project has no commit: that one says nothing of it."""
    git = shutil.which("git") or pytest.skip("no git here")
    project = tmp_path / "outer" / "project"
    (project / "storage").mkdir(parents=True)
    spec = spec_from_file_location("unpacked", shutil.copy(ROOT / "storage" / "results.py", project / "storage"))
    unpacked = module_from_spec(spec)
    spec.loader.exec_module(unpacked)
    found = [unpacked.environment("cpu", 1)["commit"]]
    for folder in (project.parent, project):
        author = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        for arguments in (["init", "-q"], [*author, "commit", "-q", "--allow-empty", "-m", "first"]):
            subprocess.run([git, "-C", folder, *arguments], check=True)
        found.append(unpacked.environment("cpu", 1)["commit"])
    none, outer, own = found
    assert none is outer is None
    assert re.fullmatch("[0-9a-f]{7,}", own)
    for name in ("train.ipynb", "storage/results.py"):
        (project / name).touch()
        subprocess.run([git, "-C", project, "add", name], check=True)
        found.append(unpacked.environment("cpu", 1)["commit"])
    assert found[3:] == [own, f"{own}-dirty"]  # a notebook that was executed changes no result
