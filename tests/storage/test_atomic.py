"""Files appear whole or not at all."""

import os
import stat
import time
from multiprocessing import get_all_start_methods, get_context

import pytest

from config import InputError
from storage import atomic_write, remove_leftovers
from tests.factories import wait_until


def everything(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("kind", [str, lambda path: path], ids=["string", "path"])
def test_a_file_appears_whole_with_its_folders_and_others_can_read_it(tmp_path, kind):
    path = tmp_path / "a" / "b" / "c.npz"
    with atomic_write(kind(path)) as temporary:
        assert temporary.parent == path.parent  # elsewhere, the last step could not be atomic
        assert temporary.suffix == ".npz"  # else numpy would add it
        temporary.write_text("new")
        assert not path.exists()  # not before it is complete
    assert path.read_text() == "new"
    assert everything(tmp_path) == ["a", "a/b", "a/b/c.npz"]
    assert stat.S_IMODE(path.stat().st_mode) & 0o444 == 0o444


def test_a_file_system_without_locks_is_written_to(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with atomic_write(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
    assert everything(tmp_path) == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "new"


def test_an_old_file_is_replaced_and_readers_of_it_are_not_disturbed(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with path.open() as reader:
        with atomic_write(path) as temporary:
            temporary.write_text("new")
            assert path.read_text() == "old"
        assert reader.read() == "old"
    assert path.read_text() == "new"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("old", [True, False])
def test_an_error_leaves_the_old_file_or_none_and_nothing_else(tmp_path, error, old):
    path = tmp_path / "deep" / "a.txt"
    if old:
        path.parent.mkdir()
        path.write_text("old")

    def write():
        with atomic_write(path) as temporary:
            temporary.write_text("half of the n")
            raise error("stop")

    with pytest.raises(error):
        write()
    assert everything(tmp_path) == ["deep", *(["deep/a.txt"] if old else [])]
    assert not old or path.read_text() == "old"


def test_a_target_that_cannot_be_replaced_leaves_no_temporary_file(tmp_path):
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(InputError, match=r"a\.txt"), atomic_write(tmp_path / "a.txt") as temporary:
        temporary.write_text("x")
    assert everything(tmp_path) == ["a.txt"]


@pytest.mark.skipif("fork" not in get_all_start_methods(), reason="a killed process leaves its file on other systems")
def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path):
    def write_for_ever(name):
        with atomic_write(tmp_path / name) as temporary:
            temporary.write_text("half")
            time.sleep(600)

    hidden = [".a.txt", ".a.txt.mine", ".b.tmp"]
    for name in hidden:
        (tmp_path / name).write_text("mine")
    writers = [get_context("fork").Process(target=write_for_ever, args=(name,)) for name in ("a.txt", "a.txt", "b.txt")]
    for number, writer in enumerate(writers, start=1):
        writer.start()
        wait_until(lambda number=number: [path.read_text() for path in tmp_path.glob("*.tmp.txt")] == ["half"] * number)
    alive = everything(tmp_path)
    for writer in writers[::2]:
        writer.kill()
        writer.join()
    assert everything(tmp_path) == alive
    with atomic_write(tmp_path / "a.txt") as temporary:  # removes what was left of this file
        temporary.write_text("whole")
    assert len(everything(tmp_path)) == len(alive)  # one less, one more
    remove_leftovers(tmp_path)
    assert [path.name.split(".tmp")[0][:7] for path in tmp_path.glob(".*.tmp.txt")] == [".a.txt."]
    writers[1].kill()
    writers[1].join()
    remove_leftovers(tmp_path)
    assert everything(tmp_path) == sorted([*hidden, "a.txt"])


def test_two_writers_at_once_do_not_meet(tmp_path):
    path = tmp_path / "a.txt"
    with atomic_write(path) as first, atomic_write(path) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"  # the outer one ends last
    assert everything(tmp_path) == ["a.txt"]


def test_a_writer_may_replace_the_temporary_file(tmp_path):
    """Some libraries write another file and rename it."""
    with atomic_write(tmp_path / "a.txt") as temporary:
        other = temporary.with_name("other")
        other.write_text("x")
        os.replace(other, temporary)
    assert (tmp_path / "a.txt").read_text() == "x"


@pytest.mark.parametrize("durable", [True, False])
def test_only_a_durable_file_is_waited_for(tmp_path, monkeypatch, durable):
    waited = []
    monkeypatch.setattr(os, "fsync", waited.append)
    with atomic_write(tmp_path / "a.txt", durable) as temporary:
        temporary.write_text("new")
    assert len(waited) == durable
    assert everything(tmp_path) == ["a.txt"]
