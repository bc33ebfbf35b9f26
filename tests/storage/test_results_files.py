"""Files of results: arrays merged by seed, the same bytes everywhere, one writer at a time."""

import inspect
import json
import os
import re
import subprocess
import sys
import zipfile
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from config import InputError
from storage import Results, load_arrays
from tests.factories import KINDS, ROOT, arrays_for, everything, stored_record


@pytest.mark.parametrize("kind", KINDS)
def test_arrays_come_back_as_they_were_saved(tmp_path, kind):
    results = Results(tmp_path / "r")
    stack = torch.arange(36.0).view(3, 3, 4)
    views = {"x": stack[:, 0], "y": stack[:, 1], "z": stack[:, 1]}  # arms are slices of one stack, and may share memory
    arrays, header = arrays_for([0, 1, 2]) | views, {"class_names": ["dog", "Käfer"], "sizes": [2, 3], "domain": None}
    results.save(kind, "phase1_art", range(3), arrays, header)
    loaded, about = results.load(kind, "phase1_art")
    assert about == header
    assert set(loaded) == {"seeds", *arrays}
    assert loaded["seeds"].tolist() == [0, 1, 2]
    for name, value in arrays.items():
        assert loaded[name].dtype == value.dtype
        assert torch.equal(loaded[name], value)
    assert results.has(kind, "phase1_art")
    assert not results.has(kind, "phase1_photo")
    assert len(everything(tmp_path)) == 1  # no temporary files


@pytest.mark.parametrize("kind", KINDS)
def test_seeds_are_merged_replaced_and_sorted(tmp_path, kind):
    results = Results(tmp_path)
    results.save(kind, "a", [7, 3], arrays_for([7, 3]), {"run": 1})
    results.save(kind, "a", [5, 0, 7], arrays_for([5, 0, 7], offset=0.25), {"run": 2})
    results.save(kind, "b", [1], {"loss": arrays_for([1])["loss"]}, {})  # another file, another matter
    loaded, header = results.load(kind, "a")
    assert loaded["seeds"].tolist() == [0, 3, 5, 7]
    assert header == {"run": 2}
    old, new = arrays_for([0, 3, 5, 7]), arrays_for([0, 3, 5, 7], offset=0.25)
    for row, from_second in enumerate([True, False, True, True]):
        expected = new if from_second else old
        assert all(torch.equal(loaded[name][row], expected[name][row]) for name in expected)
    results.save(kind, "b", [0], arrays_for([0]), {})  # what older seeds lack is left out
    assert set(results.load(kind, "b")[0]) == {"seeds", "loss"}


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

    monkeypatch.setattr("storage.results.save_file", lambda tensors, path, **_: interrupt(path))
    monkeypatch.setattr(np, "savez_compressed", interrupt)
    with pytest.raises(KeyboardInterrupt):
        results.save(kind, "a", [1], arrays_for([1]), {})
    assert everything(tmp_path) == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["old", "new"])
def test_a_full_disk_is_one_sentence_and_leaves_the_old_file(tmp_path, kind, name, small_disk):
    results = Results(tmp_path)
    results.save(kind, "old", [0], {"x": torch.rand(1, 999)}, {})
    before = everything(tmp_path)
    with small_disk(5000), pytest.raises(InputError, match=name) as caught:  # of one seed there are 4 kB
        results.save(kind, name, [1, 2], {"x": torch.rand(2, 999)}, {})
    assert "\n" not in str(caught.value)
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
    save_file({"a": torch.zeros(3)}, bare)
    for path in (*files.values(), bare, tmp_path, tmp_path / "missing.npz"):
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


def write(directory):
    """One of everything, here and in another process."""
    import torch

    from config import Settings
    from storage import Results, record_key

    arrays = {f"a{i}": torch.arange(12.0).view(2, 3, 2) + i for i in range(8)} | {"mask": torch.tensor([True, False])}
    features = {"fingerprint": "abc", "counts": dict.fromkeys("xyz", 1)}
    with Results(directory) as results:
        results.claim(Settings.current(), features, {"versions": {}, "device": "cpu", "threads": 1, "commit": None})
        for kind in ("weights", "histories", "importance"):
            results.save(kind, "a", [1, 0], arrays, {f"key{i}": i for i in range(8)})
        identity = dict.fromkeys(("features", "algorithm", "settings", "holdout", "seed", "selection"), "x")
        results.append([{"key": record_key(identity), **identity, "accuracy": {"full": 1 / 3}}])
        results.write_text("summary_report.txt", "ä\n")


TOMORROW = """
import datetime, time
real = {name: getattr(time, name) for name in ("time", "localtime", "gmtime")}
time.time = lambda: real["time"]() + 86_400
time.time_ns = lambda: int(time.time() * 1e9)
time.localtime = lambda seconds=None: real["localtime"](time.time() if seconds is None else seconds)
time.gmtime = lambda seconds=None: real["gmtime"](time.time() if seconds is None else seconds)
class Later(datetime.datetime):
    @classmethod
    def now(cls, tz=None): return cls.fromtimestamp(time.time(), tz)
datetime.datetime = Later
"""


def test_equal_runs_give_equal_bytes(tmp_path):
    """In another folder, another process, with another hash seed and a day later."""
    write(tmp_path / "one")
    code = f"{TOMORROW}\n{inspect.getsource(write)}\nwrite({str(tmp_path / 'two')!r})"
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, cwd=ROOT, check=True)
    one, two = everything(tmp_path / "one"), everything(tmp_path / "two")
    names = {"settings.json", "records.jsonl", "summary_report.txt", "weights/a.safetensors", "histories/a.npz"}
    assert set(one) == names | {"importance/a.npz"}
    assert one == two
    assert not any(os.fsencode(tmp_path) in content for content in one.values())
    for name in ("histories/a.npz", "importance/a.npz"):  # a clock that ticks once in two seconds, in local time
        with zipfile.ZipFile(tmp_path / "one" / name) as file:
            assert {entry.date_time for entry in file.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def try_to_write(directory, pipe):
    """In another process: on each request, say what comes of entering the directory."""
    while pipe.recv():
        try:
            with Results(directory):
                pipe.send("entered")
        except InputError as error:
            pipe.send(str(error))


@pytest.mark.skipif("fork" not in get_all_start_methods(), reason="needs a process that is there at once")
def test_a_second_writer_is_refused_until_the_first_is_done(tmp_path):
    context = get_context("fork")
    here, there = context.Pipe()
    child = context.Process(target=try_to_write, args=(tmp_path, there))
    child.start()

    def attempt():
        here.send(True)
        assert here.poll(60)
        return here.recv()

    with Results(tmp_path) as results:
        with results:  # nested: leaving the inner one gives nothing free
            pass
        message = attempt()
        assert str(tmp_path) in message
        assert "RESULTS_DIR" in message
        results.append([stored_record()])  # the first goes on undisturbed
    assert attempt() == "entered"
    here.send(False)
    child.join(60)
    assert child.exitcode == 0


def test_a_writer_in_the_same_process_is_refused_and_a_reader_is_not(tmp_path):
    with pytest.raises(KeyError), Results(tmp_path):
        raise KeyError
    with Results(tmp_path) as writer:  # the error gave it free
        writer.append([stored_record()])
        writer.save("weights", "a", [0], arrays_for([0]), {})
        assert Results(tmp_path).records() == [stored_record()]
        assert Results(tmp_path).load("weights", "a")[0]["seeds"].tolist() == [0]
        with pytest.raises(InputError, match="Another run"), Results(tmp_path):
            pass


def test_a_text_is_written_whole_in_utf_8(tmp_path):
    Results(tmp_path / "new").write_text("summary_report.txt", "− 60 %\nä\n")
    assert (tmp_path / "new" / "summary_report.txt").read_bytes() == "− 60 %\nä\n".encode()
