"""Files appear whole or not at all."""

import os
import stat

import pytest

from storage import atomic_write


def everything(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_file_appears_with_what_was_written(tmp_path):
    path = tmp_path / "a.txt"
    with atomic_write(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()  # not before it is complete
    assert path.read_text() == "new"
    assert everything(tmp_path) == ["a.txt"]


def test_folders_above_are_created_and_a_string_will_do(tmp_path):
    with atomic_write(str(tmp_path / "a" / "b" / "c.txt")) as temporary:
        temporary.write_text("x")
    assert (tmp_path / "a" / "b" / "c.txt").read_text() == "x"


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

    def write():
        with atomic_write(tmp_path / "a.txt") as temporary:
            temporary.write_text("x")

    with pytest.raises(OSError):
        write()
    assert everything(tmp_path) == ["a.txt"]


def test_the_temporary_file_lies_beside_and_keeps_the_ending(tmp_path):
    """Elsewhere, the last step could not be atomic; without the ending, numpy would add .npz."""
    with atomic_write(tmp_path / "a.npz") as temporary:
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".npz"
        assert temporary.name != "a.npz"


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


def test_others_can_read_the_file(tmp_path):
    with atomic_write(tmp_path / "a.txt") as temporary:
        temporary.write_text("x")
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) & 0o444 == 0o444
