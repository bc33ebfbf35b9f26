"""Units of work on a Dask cluster: the workers of one scheduler, on this machine or others. Needs `distributed`.

What is wrong with a cluster is said in one sentence before anything is trained: no scheduler, no worker, another
version of a library or of this project. Workers may come and go later; `perform` looks at those that come.
"""

import asyncio
import logging
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import ModuleType

from config import InputError
from engine.executors import SAME, Place, difference

CONNECTING = 5.0  # seconds that a scheduler has to answer
WAITING = 60.0  # seconds without a worker after which work is given up
RETRIES = 3  # of a unit that a worker could not do
PROTOCOL = ("python", "dask", "distributed", "cloudpickle")  # what a scheduler must have in common with its clients

_open: dict[str, "Cluster"] = {}


def connect(address: str) -> "Cluster":
    """The cluster of a scheduler, checked; the connection is kept for the next phase.

    Raises:
        InputError: see `Cluster` and `Cluster.check`.
    """
    if address not in _open or _open[address].lost:
        cluster = Cluster(address)
        try:
            cluster.check()
        except BaseException:
            cluster.client.close()
            raise
        _open[address] = cluster
    return _open[address]


def check_cluster(address: str) -> None:
    """Raise the `InputError` that `connect` would, and leave no connection behind."""
    cluster = Cluster(address)
    try:
        cluster.check()
    finally:
        cluster.client.close()


class Cluster(Place):
    """A connection to a scheduler.

    Args:
        address: such as ``tcp://HOST:8786``.

    Raises:
        InputError: `distributed` is missing, nothing that understands it answers at the address, or a scheduler of
            another version does.
    """

    def __init__(self, address: str):
        self.address, self._sent, self._looked = address, {}, 0.0
        distributed = _distributed()
        try:
            with ThreadPoolExecutor(1) as thread:  # a notebook has a loop of its own in this one
                there = thread.submit(asyncio.run, _versions(address)).result()
            self._check_scheduler(there, distributed.versions.get_versions()["packages"])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", distributed.versions.VersionMismatchWarning)  # `check` says it
                self.client = distributed.Client(address, timeout=CONNECTING, set_as_default=False)
        except OSError as error:
            raise InputError(
                f"No Dask scheduler answers at '{address}': start one with `dask scheduler` and give the address that "
                "it prints."
            ) from error
        except InputError:
            raise
        except Exception as error:  # whatever a server of another kind or version makes of it
            raise InputError(
                f"What answers at '{address}' is no Dask scheduler of version {distributed.__version__} "
                f"({type(error).__name__}: {error}): start one with `dask scheduler` where this command's packages are."
            ) from error
        self.executor = self.client.get_executor(retries=RETRIES)
        self._seen = time.monotonic()

    @property
    def lost(self) -> bool:
        """Whether the connection is over."""
        return self.client.status not in ("running", "connecting")

    def check(self) -> None:
        """Refuse a cluster that would not train as this process does.

        Raises:
            InputError: no worker comes within a minute, or one has several threads, cannot import this project, or has
                another version of it or of a library.
        """
        self._wait_for_worker()
        for worker, threads in self.client.nthreads().items():
            if threads != 1:
                raise InputError(
                    f"The worker {worker} has {threads} threads, and a unit takes a whole process: start it with "
                    "--nthreads 1."
                )
        here = _by_value("facts")()
        for worker, there in self.client.run(_by_value("facts"), on_error="return").items():
            if isinstance(there, OSError):  # it has just left
                continue
            if isinstance(there, Exception):
                raise InputError(f"The worker {worker} cannot import this project ({there}): {SAME}.") from there
            if wrong := difference(there, here):
                raise InputError(f"The worker {worker} {wrong}.")

    def _check_scheduler(self, there: Mapping[str, str], here: Mapping[str, str]) -> None:
        """Refuse a scheduler that does not have what it must have in common with this process."""
        if wrong := difference(there, {name: here[name] for name in PROTOCOL}):
            raise InputError(f"The scheduler at '{self.address}' {wrong}.")

    def _wait_for_worker(self) -> None:
        """Wait for one, and raise an `InputError` if none comes."""
        try:
            self.client.wait_for_workers(1, timeout=WAITING)
        except TimeoutError:
            raise self._without_workers() from None
        self._seen = time.monotonic()

    def _without_workers(self) -> InputError:
        return InputError(
            f"The scheduler at '{self.address}' has had no worker for {WAITING:.0f} seconds: start some with "
            f"`dask worker {self.address} --nthreads 1` and give the same command again."
        )

    def submit(self, *arguments: object) -> Future:
        """`perform` on a worker."""
        return self.executor.submit(_by_value("perform"), *arguments)

    def send(self, contents: Mapping[str, object]) -> list:
        """Contents that workers have or fetch from one another; what is not among them any more is dropped.

        They are results of tasks and not scattered: what is lost with a worker is made again from the scheduler's copy.
        """
        import dask

        self._seen, same = time.monotonic(), lambda content: content  # a lambda is pickled by value
        with dask.config.set({"distributed.admin.large-graph-warning-threshold": "1 TiB"}):
            good = {name: future for name, future in self._sent.items() if future.status in ("pending", "finished")}
            self._sent = {
                name: good.get(name) or self.client.submit(same, content, pure=False)
                for name, content in contents.items()
            }
        return list(self._sent.values())

    def watch(self) -> None:
        """See `Place`: the scheduler is gone, or all workers are for a minute."""
        if self.lost:
            raise self.gone()
        now = time.monotonic()
        if now - self._looked < 1 or self.client.status != "running":
            return
        self._looked = now
        if self._has_workers():
            self._seen = now
        elif now - self._seen > WAITING:
            raise self._without_workers()

    def cancel(self, futures: Iterable[Future]) -> None:
        """All at once: one by one takes a message each."""
        if futures and self.client.status == "running":
            self.executor.shutdown(wait=False)
            self.executor = self.client.get_executor(retries=RETRIES)

    def gone(self) -> InputError:
        """That the scheduler is."""
        return InputError(
            f"The scheduler at '{self.address}' is gone: start it and its workers again; the same command goes on from "
            "here."
        )

    def _has_workers(self) -> bool:
        try:
            return bool(self.client.nthreads())
        except OSError:  # the connection is being lost: the next look tells
            return False

    def explained(self, error: Exception) -> Exception:
        """One sentence for a unit that no worker survives."""
        if type(error).__name__ == "KilledWorker":
            return InputError(
                f"One worker of '{self.address}' after the other was ended by the same unit, most likely for lack of "
                "memory: give them more of it (`dask worker --memory-limit`), or lower SEEDS_PER_CHUNK."
            )
        return error


def _distributed() -> ModuleType:
    """The package, with its own reports of lost connections off: what matters of them is said here."""
    try:
        import distributed
    except ImportError as error:
        raise InputError(f"A cluster needs Dask ({error}): `pip install distributed`.") from error
    for name in ("client", "core", "comm", "worker", "batched"):
        logging.getLogger(f"distributed.{name}").setLevel(logging.CRITICAL)
    return distributed


async def _versions(address: str) -> dict[str, str]:
    """What a scheduler has, asked without a client, which other versions confuse.

    Raises:
        OSError: nothing answers; a client itself would wait for a silent server for ever.
    """
    from distributed.core import connect, send_recv

    async def ask() -> dict:
        comm = await connect(address, CONNECTING)
        try:
            return await send_recv(comm, op="versions")
        finally:
            comm.abort()

    found = await asyncio.wait_for(ask(), CONNECTING)
    return found["packages"]


def _by_value(name: str) -> Callable:
    """A function of `engine.executors`, pickled by value: a scheduler unpickles it, and need not have this project."""

    def call(*arguments):
        from importlib import import_module

        return getattr(import_module("engine.executors"), name)(*arguments)

    return call
