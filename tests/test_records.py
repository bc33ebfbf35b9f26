"""Results on disk: what is appended, merged, refused and recovered."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open

import records
from config import InputError, Settings
from records import Results, environment, load_arrays, record_key

ROOT = Path(__file__).resolve().parent.parent
FEATURES = {"fingerprint": "abc", "dataset": "toy", "counts": {"art": {"dog": 2}}}
MACHINE = {"versions": {"torch": "2"}, "device": "cpu", "threads": 1, "commit": None}
KINDS = ("weights", "histories", "importance")
IDENTITY = {
    "features": "abc",
    "algorithm": "erm",
    "settings": "123",
    "holdout": "art",
    "seed": 0,
    "selection": "last",
}


def make_record(**changes):
    identity = {**IDENTITY, **changes}
    return {"key": record_key(identity), **identity, "accuracy": {"full": 0.5}, "failed": None}


def everything(folder):
    """Path below `folder` -> bytes, without the lock."""
    files = [path for path in Path(folder).rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# --- records ------------------------------------------------------------------------------------------------


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
    first = [make_record(seed=s, holdout="Ärt ⇒ \n") for s in range(3)]
    failed = {**make_record(seed=3), "accuracy": None, "failed": "the loss is no longer finite in epoch 2"}
    results.append(first)
    results.append(iter([failed]))
    assert results.records() == [*first, failed]
    assert Results(results.directory).records() == [*first, failed]


def test_every_record_is_one_line_of_json(tmp_path):
    Results(tmp_path).append([make_record(seed=s) for s in range(3)])
    lines = (tmp_path / "records.jsonl").read_text("utf-8").split("\n")
    assert lines.pop() == ""
    assert [json.loads(line)["seed"] for line in lines] == [0, 1, 2]


def test_what_is_there_is_not_appended_again(tmp_path):
    results = Results(tmp_path)
    results.append([make_record(seed=0), make_record(seed=1)])
    before = everything(tmp_path)["records.jsonl"]
    results.append([{**make_record(seed=1), "accuracy": {"full": 0.9}}, make_record(seed=2)])
    assert [r["seed"] for r in results.records()] == [0, 1, 2]
    assert results.records()[1]["accuracy"] == {"full": 0.5}
    assert everything(tmp_path)["records.jsonl"].startswith(before)  # only ever appended to


def test_the_same_record_twice_in_one_call_is_appended_once(tmp_path):
    results = Results(tmp_path)
    results.append([make_record(seed=0), make_record(seed=0)])
    assert len(results.records()) == 1


@pytest.mark.parametrize("cut", [1, 2, 30])
def test_a_torn_last_line_is_passed_over_with_a_warning_and_cut_off_by_the_next(tmp_path, caplog, cut):
    results = Results(tmp_path)
    results.append([make_record(seed=0), make_record(seed=1)])
    path = tmp_path / "records.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])  # 1: the record is whole, its line end is not
    with caplog.at_level(logging.WARNING):
        assert [r["seed"] for r in results.records()] == [0]
    assert "torn" in caplog.text
    assert {r.levelname for r in caplog.records} == {"WARNING"}
    results.append([make_record(seed=1), make_record(seed=2)])
    caplog.clear()
    assert [r["seed"] for r in results.records()] == [0, 1, 2]
    assert results.records()[1] == make_record(seed=1)
    assert caplog.text == ""


def test_a_file_of_one_torn_line_is_begun_anew(tmp_path):
    (tmp_path / "records.jsonl").write_bytes(b'{"key": "ab\xc3')  # torn inside a character
    results = Results(tmp_path)
    assert results.records() == []
    results.append([make_record()])
    assert results.records() == [make_record()]


def test_a_torn_line_is_cut_off_where_nothing_is_appended(tmp_path, caplog):
    results, settings = Results(tmp_path), Settings.current()
    results.claim(settings, FEATURES)
    results.append([make_record()])
    path = tmp_path / "records.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"key": "to')
    with pytest.raises(InputError):
        results.claim(Settings.current(batch_size=7), FEATURES)
    assert path.read_bytes() != whole  # another's file is not touched
    results.claim(settings, FEATURES)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "damage", [b'{"key": \n', b"\n", b"\xff\xfe\n", b"hello\n", b"null\n", b"[]\n", b"7\n", b"{}\n"]
)
def test_a_damaged_line_in_the_middle_is_an_error(tmp_path, damage):
    results = Results(tmp_path)
    results.append([make_record(seed=0)])
    path = tmp_path / "records.jsonl"
    path.write_bytes(path.read_bytes() + damage)
    before = path.read_bytes() + json.dumps(make_record(seed=1)).encode() + b"\n"
    path.write_bytes(before)
    with pytest.raises(InputError, match="damaged"):
        results.records()
    with pytest.raises(InputError, match="damaged"):
        results.append([make_record(seed=2)])
    assert path.read_bytes() == before


# --- settings -----------------------------------------------------------------------------------------------


def test_the_first_claim_writes_settings_and_the_second_of_the_same_changes_nothing(tmp_path):
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


def test_each_environment_is_noted_once(tmp_path):
    results, other = Results(tmp_path), {**MACHINE, "device": "NVIDIA"}
    for machine in (MACHINE, other, MACHINE, other):
        results.claim(Settings.current(), FEATURES, machine)
    assert results.read_settings()["environments"] == [MACHINE, other]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"batch_size": 7}, "BATCH_SIZE = 32, not 7"),
        ({"hidden_sizes": (4, 4)}, r"HIDDEN_SIZES = \[10, 10, 10, 10, 10\], not \[4, 4\]"),
        ({"ph2_init": "phase1"}, "PH2_INIT = 'fresh', not 'phase1'"),
        ({"ph2_num_epochs": 3, "split_seed": 1}, "SPLIT_SEED = 0, not 1"),  # the first of them
    ],
)
def test_other_settings_are_refused_by_name(tmp_path, change, name):
    results = Results(tmp_path)
    results.claim(Settings.current(), FEATURES, MACHINE)
    results.append([make_record()])
    before = everything(tmp_path)
    with pytest.raises(InputError, match=name) as caught:
        results.claim(Settings.current(**change), FEATURES, MACHINE)
    assert "RESULTS_DIR" in str(caught.value)
    assert "OVERWRITE" in str(caught.value).upper()
    assert everything(tmp_path) == before


def test_other_features_are_refused(tmp_path):
    results = Results(tmp_path)
    results.claim(Settings.current(), FEATURES, MACHINE)
    with pytest.raises(InputError, match="features = 'abc', not 'xyz'"):
        results.claim(Settings.current(), {**FEATURES, "fingerprint": "xyz"}, MACHINE)


def test_records_without_settings_are_refused(tmp_path):
    results = Results(tmp_path)
    results.append([make_record()])
    with pytest.raises(InputError, match=r"no settings\.json"):
        results.claim(Settings.current(), FEATURES, MACHINE)
    with pytest.raises(InputError, match=r"no settings\.json"):
        results.clear()  # whose files these are is not known: nothing is deleted
    assert results.records() == [make_record()]


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"editor.fontSize": 12}'])
def test_a_settings_file_that_is_not_ours_is_refused(tmp_path, text):
    (tmp_path / "settings.json").write_text(text)
    with pytest.raises(InputError):
        Results(tmp_path).claim(Settings.current(), FEATURES, MACHINE)
    assert (tmp_path / "settings.json").read_text() == text


def fill(results):
    """One of each thing that a run writes."""
    results.claim(Settings.current(), FEATURES, MACHINE)
    results.append([make_record()])
    for kind in KINDS:
        results.save(kind, "phase1_art", [0], {"a": torch.zeros(1, 2)}, {})
    results.write_text("plots/lodo.svg", "<svg/>")
    results.write_text("summary_report.txt", "report")


def test_clear_deletes_what_a_run_writes_and_nothing_else(tmp_path):
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
    assert results.seeds("weights", "phase1_art") == set()
    results.claim(other, FEATURES, MACHINE)
    assert results.read_settings()["hash"] == other.hash


def test_clear_needs_nothing_to_be_there(tmp_path):
    Results(tmp_path).clear()
    Results(tmp_path / "new").clear()
    assert everything(tmp_path) == {}


def test_clear_of_a_linked_folder(tmp_path):
    """Weights are large: somebody keeps them on another disk."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "weights").symlink_to(tmp_path / "disk")
    results = Results(tmp_path / "r")
    (tmp_path / "r" / "weights").unlink()
    results.claim(Settings.current(), FEATURES, MACHINE)
    (tmp_path / "r" / "weights").symlink_to(tmp_path / "disk")
    results.save("weights", "a", [0], arrays_for([0]), {})
    results.clear()
    assert results.seeds("weights", "a") == set()


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_claim_would_refuse_is_refused_without_features(tmp_path, overwrite):
    results, settings = Results(tmp_path / "r"), Settings.current()
    results.check(settings, overwrite)
    results.append([make_record()])
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


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    Results("~/r").save("weights", "a", [0], arrays_for([0]), {})
    assert (tmp_path / "r" / "weights" / "a.safetensors").is_file()
    assert load_arrays("~/r/weights/a.safetensors")[0]["seeds"].tolist() == [0]


# --- environment --------------------------------------------------------------------------------------------


def test_environment_names_versions_device_and_commit(monkeypatch):
    said = {"rev-parse": f"{ROOT}\n", "describe": "abc123-dirty\n"}
    monkeypatch.setattr(records.subprocess, "run", lambda c, **_: SimpleNamespace(stdout=said[c[3]]))
    found = environment("cpu", 3, "matmul")
    assert (found["device"], found["threads"], found["commit"]) == ("cpu", 3, "abc123-dirty")
    assert found["engine"] == "matmul"
    assert found["versions"]["torch"] == version("torch")
    assert {"torch", "transformers", "numpy", "scikit-learn"} <= set(found["versions"])
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("error", [FileNotFoundError("git"), subprocess.CalledProcessError(128, "git")])
def test_environment_without_a_git_checkout(monkeypatch, error):
    def run(*_, **__):
        raise error

    monkeypatch.setattr(records.subprocess, "run", run)
    assert environment("cpu", 1, "vmap")["commit"] is None


def test_the_commit_is_that_of_the_project_s_own_checkout(monkeypatch, tmp_path):
    """Unpacked inside the checkout of something else, the project has no commit: that one says nothing of it."""
    git = shutil.which("git") or pytest.skip("no git here")
    monkeypatch.setattr(records, "__file__", str(tmp_path / "outer" / "project" / "records.py"))
    (tmp_path / "outer" / "project").mkdir(parents=True)
    for folder in (tmp_path / "outer", tmp_path / "outer" / "project"):
        assert environment("cpu", 1, "matmul")["commit"] is None
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        for arguments in (["init", "-q"], [*identity, "commit", "-q", "--allow-empty", "-m", "first"]):
            subprocess.run([git, "-C", str(folder), *arguments], check=True)
    assert re.fullmatch("[0-9a-f]{7,}(-dirty)?", environment("cpu", 1, "matmul")["commit"])


# --- arrays -------------------------------------------------------------------------------------------------


def arrays_for(seeds, offset=0.0):
    """Arrays of several types, whose rows tell which seed they are of."""
    number = torch.tensor(seeds)
    return {
        "layers.1.weight": torch.stack([torch.arange(6.0).view(2, 3) + 10 * s + offset for s in seeds]),
        "mask": torch.stack([torch.arange(4) % 2 == s % 2 for s in seeds]),
        "failed": number * 100,
        "loss": number.double() / 7 + offset,
    }


@pytest.mark.parametrize("kind", KINDS)
def test_arrays_come_back_as_they_were_saved(tmp_path, kind):
    results = Results(tmp_path / "r")
    arrays, header = arrays_for([0, 1, 2]), {"class_names": ["dog", "Käfer"], "hidden_sizes": [2, 3], "domain": None}
    results.save(kind, "phase1_art", range(3), arrays, header)
    loaded, about = results.load(kind, "phase1_art")
    assert about == header
    assert set(loaded) == {"seeds", *arrays}
    assert loaded["seeds"].tolist() == [0, 1, 2]
    for name, value in arrays.items():
        assert loaded[name].dtype == value.dtype
        assert torch.equal(loaded[name], value)
    assert results.seeds(kind, "phase1_art") == {0, 1, 2}
    assert results.seeds(kind, "phase1_photo") == set()
    assert len(everything(tmp_path)) == 1  # no temporary files


def test_an_array_that_older_seeds_lack_is_left_out(tmp_path):
    results, arrays = Results(tmp_path), arrays_for([1])
    results.save("weights", "a", [0], {"loss": arrays["loss"]}, {})
    results.save("weights", "a", [1], arrays, {})
    assert set(results.load("weights", "a")[0]) == {"seeds", "loss"}


@pytest.mark.parametrize("kind", KINDS)
def test_seeds_are_merged_replaced_and_sorted(tmp_path, kind):
    results = Results(tmp_path)
    results.save(kind, "a", [7, 3], arrays_for([7, 3]), {"run": 1})
    results.save(kind, "a", [5, 0, 7], arrays_for([5, 0, 7], offset=0.25), {"run": 2})
    results.save(kind, "b", [1], arrays_for([1]), {})  # another file, another matter
    loaded, header = results.load(kind, "a")
    assert loaded["seeds"].tolist() == [0, 3, 5, 7]
    assert header == {"run": 2}
    old, new = arrays_for([0, 3, 5, 7]), arrays_for([0, 3, 5, 7], offset=0.25)
    for row, from_second in enumerate([True, False, True, True]):
        expected = new if from_second else old
        assert all(torch.equal(loaded[name][row], expected[name][row]) for name in expected)


def test_the_files_are_plain_npz_and_safetensors(tmp_path):
    """Others read them without this project, and without running what is in them."""
    results = Results(tmp_path)
    for kind in KINDS:
        results.save(kind, "a", [1, 0], arrays_for([1, 0]), {"x": 1})
    for kind in ("histories", "importance"):
        with np.load(tmp_path / kind / "a.npz", allow_pickle=False) as file:
            assert file["seeds"].tolist() == [0, 1]
            assert file["mask"].dtype == np.bool_
            assert file["loss"].tolist() == [0, 1 / 7]
            assert json.loads(str(file["header"])) == {"x": 1}
    with safe_open(tmp_path / "weights" / "a.safetensors", "np") as file:
        assert file.get_tensor("layers.1.weight")[1, 0].tolist() == [10, 11, 12]


@pytest.mark.parametrize("kind", KINDS)
def test_views_of_one_tensor_can_be_saved(tmp_path, kind):
    """As a study does: variants are slices of one stack, and start and final may share memory."""
    stack = torch.arange(24.0).view(2, 3, 4)
    Results(tmp_path).save(kind, "a", [0, 1], {"x": stack[:, 0], "y": stack[:, 1], "z": stack[:, 1]}, {})
    loaded, _ = Results(tmp_path).load(kind, "a")
    assert torch.equal(loaded["x"], stack[:, 0])
    assert torch.equal(loaded["y"], stack[:, 1])
    assert torch.equal(loaded["z"], stack[:, 1])


@pytest.mark.parametrize("kind", KINDS)
def test_how_seeds_came_together_does_not_show_in_the_bytes(tmp_path, kind):
    at_once, in_parts = Results(tmp_path / "1"), Results(tmp_path / "2")
    at_once.save(kind, "a", [0, 1, 2], arrays_for([0, 1, 2]), {"x": 1, "y": 2})
    in_parts.save(kind, "a", [2], dict(reversed(arrays_for([2]).items())), {"y": 2, "x": 1})
    in_parts.save(kind, "a", [1, 0], arrays_for([1, 0]), {"y": 2, "x": 1})
    assert everything(tmp_path / "1") == everything(tmp_path / "2")


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_save_leaves_the_old_file(tmp_path, kind, monkeypatch):
    results = Results(tmp_path)
    results.save(kind, "a", [0], arrays_for([0]), {})
    before = everything(tmp_path)

    def interrupt(path, *_, **__):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(records, "save_file", lambda tensors, path, **_: interrupt(path))
    monkeypatch.setattr(records.np, "savez_compressed", interrupt)
    with pytest.raises(KeyboardInterrupt):
        results.save(kind, "a", [1], arrays_for([1]), {})
    assert everything(tmp_path) == before


def test_foreign_files_are_refused(tmp_path):
    files = {name: tmp_path / name for name in ("text.npz", "text.safetensors", "objects.npz", "bare.npz", "torn.npz")}
    files["text.npz"].write_text("hello")
    files["text.safetensors"].write_text("hello")
    np.savez(files["objects.npz"], header=np.array({"a": 1}, dtype=object))
    np.savez(files["bare.npz"], a=np.zeros(3))
    whole = tmp_path / "importance" / "a.npz"
    Results(tmp_path).save("importance", "a", [0], arrays_for([0]), {})
    files["torn.npz"].write_bytes(whole.read_bytes()[:100])
    bare = tmp_path / "bare.safetensors"
    records.save_file({"a": torch.zeros(3)}, bare)
    for path in (*files.values(), bare):
        with pytest.raises(InputError, match=re.escape(str(path))) as caught:
            load_arrays(path)
        assert "\n" not in str(caught.value), path


def test_pickled_objects_are_never_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    np.savez(tmp_path / "trap.npz", header=np.array("{}"), a=np.array([Trap()], dtype=object))
    with pytest.raises(InputError):
        load_arrays(tmp_path / "trap.npz")
    assert not (tmp_path / "sprung").exists()


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="There is no file"):
        Results(tmp_path).load("weights", "phase1_art")
    with pytest.raises(InputError, match="There is no file"):
        load_arrays(tmp_path)


# --- the same bytes everywhere, no clock, no path ---------------------------------------------------------------

WRITE = """
import sys, time, datetime
sys.path.insert(0, sys.argv[1])
import torch
import records
from config import Settings
shift = float(sys.argv[3])
real = {name: getattr(time, name) for name in ("time", "localtime", "gmtime")}
time.time = lambda: real["time"]() + shift
time.time_ns = lambda: int(time.time() * 1e9)
time.localtime = lambda seconds=None: real["localtime"](time.time() if seconds is None else seconds)
time.gmtime = lambda seconds=None: real["gmtime"](time.time() if seconds is None else seconds)
class Later(datetime.datetime):
    @classmethod
    def now(cls, tz=None): return cls.fromtimestamp(time.time(), tz)
datetime.datetime = Later
arrays = {f"a{i}": torch.arange(12.0).view(2, 3, 2) + i for i in range(8)} | {"mask": torch.tensor([True, False])}
header = {f"key{i}": i for i in range(8)}
features = {"fingerprint": "abc", "counts": {name: 1 for name in "xyz"}}
with records.Results(sys.argv[2]) as results:
    results.claim(Settings.current(), features, {"versions": {}, "device": "cpu", "threads": 1, "commit": None})
    for kind in ("weights", "histories", "importance"):
        results.save(kind, "a", [1, 0], arrays, header)
    identity = dict(features="abc", algorithm="erm", settings="1", holdout="art", seed=0, selection="last")
    results.append([{"key": records.record_key(identity), **identity, "accuracy": {"full": 1 / 3}}])
    results.write_text("summary_report.txt", "ä\\n")
"""


def test_equal_runs_give_equal_bytes(tmp_path):
    """In another folder, another process, with another hash seed and a day later."""
    children = []
    for name, seed, shift in (("one", "1", 0), ("two", "2", 86_400)):
        env = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", WRITE, str(ROOT), str(tmp_path / name), str(shift)]
        children.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
    assert [child.communicate()[1] for child in children] == ["", ""]
    one, two = everything(tmp_path / "one"), everything(tmp_path / "two")
    names = {"settings.json", "records.jsonl", "summary_report.txt", "weights/a.safetensors", "histories/a.npz"}
    assert set(one) == names | {"importance/a.npz"}
    assert one == two
    assert not any(os.fsencode(tmp_path) in content for content in one.values())
    for name in ("histories/a.npz", "importance/a.npz"):  # a clock that ticks once in two seconds, in local time
        with zipfile.ZipFile(tmp_path / "one" / name) as file:
            assert {entry.date_time for entry in file.infolist()} == {(1980, 1, 1, 0, 0, 0)}


# --- lock ---------------------------------------------------------------------------------------------------

ENTER = """
import sys
sys.path.insert(0, sys.argv[1])
from records import InputError, Results
for _ in sys.stdin:
    try:
        with Results(sys.argv[2]):
            print("entered", flush=True)
    except InputError as error:
        print(error, flush=True)
"""


def test_a_second_writer_is_refused_until_the_first_is_done(tmp_path):
    command = [sys.executable, "-c", ENTER, str(ROOT), str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as child:

        def attempt():
            child.stdin.write("\n")
            child.stdin.flush()
            return child.stdout.readline()

        with Results(tmp_path) as results:
            with results:  # nested: the inner one gives nothing free
                pass
            message = attempt()
            assert str(tmp_path) in message
            assert "RESULTS_DIR" in message
            results.append([make_record()])  # the first goes on undisturbed
        assert attempt() == "entered\n"


def test_a_second_writer_in_the_same_process_is_refused_too(tmp_path):
    with Results(tmp_path), pytest.raises(InputError, match="Another run"), Results(tmp_path):
        pass


def test_an_error_gives_the_directory_free(tmp_path):
    def fail():
        with Results(tmp_path):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    with Results(tmp_path) as results:
        assert isinstance(results, Results)


def test_reading_needs_no_lock(tmp_path):
    with Results(tmp_path) as writer:
        writer.append([make_record()])
        writer.save("weights", "a", [0], arrays_for([0]), {})
        assert Results(tmp_path).records() == [make_record()]
        assert Results(tmp_path).seeds("weights", "a") == {0}


def test_a_text_is_written_whole_in_utf_8(tmp_path):
    Results(tmp_path / "new").write_text("summary_report.txt", "− 60 %\nä\n")
    assert (tmp_path / "new" / "summary_report.txt").read_bytes() == "− 60 %\nä\n".encode()
