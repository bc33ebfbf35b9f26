"""Units of work in any `concurrent.futures` executor, wherever its processes run.

What a unit needs is pickled. This project travels by name, and the other side must have the same one; functions of a
notebook, and modules that are installed nowhere, such as the file of a user's own method, travel by value. Large
tensors travel by themselves, under a hash of their content: what several phases need is sent once. The other side
reads and writes no file: results come back, and the calling process writes.
"""

import hashlib
import io
import pickle
import platform
import sys
import sysconfig
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Executor, Future, wait
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import cloudpickle
import numpy as np
import torch
from torch import Tensor

from config import InputError
from engine.machine import training_threads

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 0.1  # between two looks at what is done
LARGE = 2**20  # bytes from which on a tensor travels by itself
PACKAGES = ("torch", "transformers", "numpy", "scipy", "scikit-learn")
MODULES = ("config", "dataset", "importance", "models", "trainer_phase1", "trainer_phase2")  # of this project, to train
FOLDERS = ("engine", "evidence", "features", "field", "storage", "study", "transfer")
THIS = "this project"
SAME = f"start workers again, in this project's folder or with PYTHONPATH={ROOT}"
EQUAL = "start it in an environment with the same packages"
INSTALLED = ("site-packages", "dist-packages")

_one_at_a_time = threading.Lock()
_last: tuple[str, Callable, dict[str, Tensor]] = ("", lambda unit, tick: None, {})  # name, work and tensors of a job


class Place:
    """An executor, and what there is to know of the processes behind it; this one knows nothing."""

    def __init__(self, executor: Executor):
        self.executor = executor

    def submit(self, *arguments: object) -> Future:
        """`perform` with these arguments, there."""
        return self.executor.submit(perform, *arguments)

    def send(self, contents: Mapping[str, object]) -> list:
        """What to submit instead of each content, by its name; equal names are of equal contents."""
        return list(contents.values())

    def watch(self) -> None:
        """Called several times a second while there is work; raises an `InputError` if none of it will be done."""

    def cancel(self, futures: Iterable[Future]) -> None:
        """Cancel what has not begun of the work that is left."""
        for future in futures:
            future.cancel()

    def gone(self) -> InputError:
        """What to say when the other side has cancelled what was submitted."""
        return InputError("The executor was shut down before its work was done: the same command goes on from here.")

    def explained(self, error: Exception) -> Exception:
        """What to raise for an error of the other side itself."""
        return error


def in_executor(place: Place, work: Callable, units: Sequence, bar) -> Iterator:
    """Results of `work` for each unit, in the order of the units, see `engine.side_by_side`.

    The bar moves when a unit is done. After an error or Ctrl-C, what has not begun is cancelled.

    Raises:
        InputError: something cannot be pickled, or the other side is not fit, in a sentence.
    """
    job, packed = _pack(work, units)
    futures, counted = {}, set()
    try:
        sent = place.send({job.name: job.pickled} | job.tensors)
        for number, unit in enumerate(packed):
            futures[number] = place.submit(facts(), unit, job.name, tuple(job.tensors), *sent)
        for number in range(len(units)):
            while not futures[number].done():
                place.watch()
                _count(futures, counted, bar)
                wait([futures[number]], SECONDS)
            _count(futures, counted, bar)
            yield _result(place, futures.pop(number))
    finally:
        place.cancel(futures.values())


def _count(futures: Mapping[int, Future], counted: set[int], bar) -> None:
    """Move the bar by the ticks of the units that are done by now."""
    for number, future in futures.items():
        if number not in counted and future.done() and not future.cancelled() and future.exception() is None:
            counted.add(number)
            bar.update(future.result()[0])


def _result(place: Place, future: Future) -> object:
    try:
        _, packed = future.result()
    except CancelledError:
        raise place.gone() from None
    except ImportError as error:
        raise InputError(f"A worker cannot import this project ({error}): {SAME}.") from error
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise InputError("A worker has too little memory for a unit: lower SEEDS_PER_CHUNK.") from error
    except OSError as error:
        raise InputError(f"A worker cannot use what is on its machine ({error}).") from error
    except Exception as error:
        if (words := place.explained(error)) is error:
            raise
        raise words from error
    result, error = cloudpickle.loads(packed)
    if error is not None:
        raise error
    return result


def perform(
    here: Mapping[str, str], unit: bytes, name: str, digests: Sequence[str], pickled: bytes, *tensors: np.ndarray
) -> tuple[int, bytes]:
    """Train a unit: what `in_executor` submits.

    Args:
        here: `facts` of the calling process.
        unit, pickled: the unit and the work.
        name: of the work: what has the same name is unpickled once.
        digests, tensors: what was taken out of both.

    Returns:
        How often the work ticked; and pickled, its result and None, or None and what it raised. (Raised again, an error
        that comes every time would be waited for as often as an executor tries.)
    """
    ticks = 0

    def tick() -> None:
        nonlocal ticks
        ticks += 1

    with _one_at_a_time, training_threads(1):
        try:
            if wrong := difference(facts(), here):
                raise InputError(f"The worker on {platform.node()} {wrong}.")
            work, known = _unpacked(name, pickled, dict(zip(digests, tensors, strict=True)))
            outcome = work(_Unpickler(io.BytesIO(unit), known).load(), tick), None
        except ImportError as error:
            outcome = None, InputError(f"A worker on {platform.node()} lacks what a unit needs: {error}.")
        except (OSError, MemoryError, torch.OutOfMemoryError):  # of this machine: another one may do it
            raise
        except Exception as error:
            outcome = None, _portable(error)
    return ticks, cloudpickle.dumps(outcome)


def _unpacked(name: str, pickled: bytes, tensors: Mapping[str, np.ndarray]) -> tuple[Callable, dict[str, Tensor]]:
    """Work and its tensors; those of the last one are kept."""
    global _last
    if _last[0] != name:
        copied = {d: _last[2][d] if d in _last[2] else torch.tensor(array) for d, array in tensors.items()}
        _last = name, _Unpickler(io.BytesIO(pickled), copied).load(), copied
    return _last[1:]


def _portable(error: Exception) -> Exception:
    """An error that can be pickled, with a note of where it was raised."""
    error.add_note(f"On {platform.node()}:\n{traceback.format_exc()}")
    try:
        pickle.loads(cloudpickle.dumps(error))
    except Exception:
        return RuntimeError(traceback.format_exc())
    return error


@cache
def _project_files() -> frozenset[Path]:
    """The files of this project that training needs."""
    inner = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    return frozenset([*(ROOT / f"{name}.py" for name in MODULES), *inner])


@cache
def facts() -> dict[str, str]:
    """What must be the same wherever units train: versions, and a hash of this project's code when asked first."""
    digest = hashlib.sha256()
    for path in sorted(_project_files()):
        digest.update(f"{path.relative_to(ROOT).as_posix()}\n".encode() + path.read_bytes().replace(b"\r\n", b"\n"))
    versions = {name: version(name) for name in PACKAGES}
    return {"Python": platform.python_version(), **versions, THIS: digest.hexdigest()[:12]}


def difference(there: Mapping[str, str], here: Mapping[str, str]) -> str | None:
    """The first fact that differs and what to do about it, in words; None if none does."""
    for name, value in here.items():
        if there.get(name) != value:
            return f"has {name} {there.get(name)}, and the calling process {value}: {SAME if name == THIS else EQUAL}"
    return None


class _Job:
    """Work as it travels: pickled, and the tensors that were taken out of it and of the units, by their hashes."""

    def __init__(self) -> None:
        self.name, self.pickled, self.tensors = "", b"", {}
        self._known: dict[int, tuple[Tensor, str]] = {}  # by `id`; the tensors are held, so that none is used again

    def take(self, tensor: Tensor) -> str:
        """Take a tensor out; returns its hash."""
        if id(tensor) not in self._known:
            array = tensor.numpy()
            digest = hashlib.sha256(f"{array.dtype} {array.shape}".encode())
            digest.update(array.reshape(-1).view(np.uint8))
            self._known[id(tensor)] = tensor, digest.hexdigest()
            self.tensors[digest.hexdigest()] = array
        return self._known[id(tensor)][1]


def _pack(work: Callable, units: Sequence) -> tuple[_Job, list[bytes]]:
    """Work and units as they travel."""
    job = _Job()
    with _own_modules_by_value():
        try:
            job.pickled, *packed = (_pickled(job, part) for part in (work, *units))
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise InputError(f"What is to be trained cannot be sent to another process: {error}.") from error
    job.name = hashlib.sha256(job.pickled).hexdigest()
    return job, packed


def _pickled(job: _Job, part: object) -> bytes:
    file = io.BytesIO()
    _Pickler(file, job).dump(part)
    return file.getvalue()


class _Pickler(cloudpickle.Pickler):
    """Takes large tensors out. Others keep their strides, on which the last bit of a product may depend."""

    def __init__(self, file: io.BytesIO, job: _Job):
        super().__init__(file)
        self._job = job

    def persistent_id(self, obj: object) -> str | None:
        if type(obj) is not Tensor or obj.is_cuda or obj.requires_grad or obj.dtype == torch.bfloat16:
            return None
        travels = max(obj.nbytes, obj.untyped_storage().nbytes())  # pickled, a part takes the whole along
        return self._job.take(obj) if obj.is_contiguous() and travels >= LARGE else None


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: Mapping[str, Tensor]):
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, pid: str) -> Tensor:
        return self._tensors[pid]


@contextmanager
def _own_modules_by_value() -> Iterator[None]:
    """Pickle what modules define that are neither this project's nor installed, for the other side lacks them."""
    known = cloudpickle.list_registry_pickle_by_value()
    found = [module for module in list(sys.modules.values()) if isinstance(module, ModuleType) and _is_own(module)]
    modules = [module for module in found if module.__name__ not in known]
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in modules:
            cloudpickle.unregister_pickle_by_value(module)


def _is_own(module: ModuleType) -> bool:
    """Whether a module is a Python file of the user: one that `field.load` ran, or one from a folder of theirs."""
    name, file = module.__name__, vars(module).get("__file__") or ""
    if sys.modules.get(name) is not module or name == "__main__" or not file.endswith(".py"):
        return False
    path = Path(file)
    if name == file:  # as `field.load` calls them
        return True
    library = Path(sysconfig.get_path("stdlib"))
    return path.is_absolute() and not (
        path in _project_files() or path.is_relative_to(library) or {*path.parts} & {*INSTALLED}
    )
