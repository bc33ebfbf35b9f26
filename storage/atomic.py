"""Files that appear whole or not at all."""

import glob
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from config import InputError

try:
    import fcntl
except ImportError:  # on Windows, where what a killed process was writing is left behind
    fcntl = None


class WriteError(InputError):
    """A file cannot be written, for example because the disk is full."""


@contextmanager
def atomic_write(path: str | Path, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path to write to; on success it replaces `path` in one step, on any error it is removed.

    Folders above `path` are created. Another process sees the old file or the new one, never a part of it. What a
    process that was killed left of its attempt to write `path` is removed.

    Args:
        durable: wait until the file is on the disk. Otherwise a loss of power may leave it cut off: for many small
            files whose size is checked later, which are written several times as fast.

    Raises:
        WriteError: the file cannot be written.
    """
    path = Path(path)
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent, path.name)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=f".tmp{path.suffix}", dir=path.parent)
        temporary, lock = Path(name), os.fdopen(handle)
        try:
            if fcntl:
                with suppress(OSError):  # some file systems have no locks: then what is left behind stays there
                    fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed, if only by the end of this process
            else:
                lock.close()
            yield temporary
            if durable:
                with temporary.open("rb+") as file:  # Windows syncs what can be written alone
                    os.fsync(file.fileno())
            temporary.chmod(0o644)  # mkstemp makes it readable by its owner only
            temporary.replace(path)
        finally:
            lock.close()
            temporary.unlink(missing_ok=True)


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn what a full disk or a read-only folder raises into a `WriteError` that names the file."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise WriteError(f"'{path}' cannot be written: {getattr(error, 'strerror', None) or error}.") from error


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Delete temporary files of `atomic_write` in a folder whose process is gone, perhaps only those of one file."""
    pattern = "*" if name is None else glob.escape(name)
    for left in folder.glob(f".{pattern}.*.tmp*") if fcntl else ():
        with suppress(OSError), left.open("rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # an error while the process that writes it lives
            left.unlink()
