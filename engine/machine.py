"""The machine: device, threads, cores and free memory."""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

import config
from config import InputError

COPIES = 10  # of a network's numbers during training: start, weights, gradients, two moments, rates, masks, results


def rank() -> tuple[int, int]:
    """Number of this process among those that `torchrun` starts together, and how many they are; else 0 and 1.

    Raises:
        InputError: the environment's RANK and WORLD_SIZE, if they are set, are not such numbers.
    """
    number, of = (os.environ.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if not (number.isdecimal() and of.isdecimal() and int(number) < int(of)):
        said = " and ".join(f"{name}={os.environ[name]}" for name in ("RANK", "WORLD_SIZE") if name in os.environ)
        raise InputError(f"The environment has {said}: RANK must be a number from 0 below WORLD_SIZE, or both unset.")
    return int(number), int(of)


def default_workers() -> int:
    """One per core this process may use, at most 16; processes that `torchrun` starts on a machine share its cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores // max(1, _local("LOCAL_WORLD_SIZE", 1)), 16))


def _local(name: str, default: int) -> int:
    """A number that `torchrun` gives each process in its environment; the default where there is none."""
    found = os.environ.get(name, "")
    return int(found) if found.isdecimal() else default


def free_memory(device: str = "cpu") -> float:
    """Bytes of memory available without swapping; infinite where the system does not tell (other than Linux)."""
    if device == "cuda":
        return float(torch.cuda.mem_get_info()[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return math.inf


def training_memory(seeds: int, floats: int, of_batch: int = 0) -> int:
    """Bytes that the networks of some seeds take while they are trained together.

    Args:
        floats: numbers in the networks of one seed.
        of_batch: numbers in its batch, and in what the networks compute of it.
    """
    return 4 * seeds * (COPIES * floats + of_batch)


def check_memory(
    need: float, device: str = "cpu", lower: Sequence[str] = ("SEEDS_PER_CHUNK", "HIDDEN_SIZES", "BATCH_SIZE")
) -> None:
    """Raise an `InputError` if networks that are trained together `need` more bytes than there are.

    `lower` are settings that would help.
    """
    if need > (free := free_memory(device)):
        raise InputError(
            f"Networks that are trained together need about {need / 2**30:.3g} GiB of memory, and {free / 2**30:.3g} "
            f"GiB are free: lower {', '.join(lower[:-1])} or {lower[-1]}."
        )


def choose_device(device: str | None = None) -> str:
    """The device to use: "cpu", "cuda", or for None CUDA where there is one.

    Raises:
        InputError: an unknown device, or "cuda" where there is none.
    """
    if device not in (None, "cpu", "cuda"):
        raise InputError(f"DEVICE must be 'cpu', 'cuda' or None, not '{device}'.")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("DEVICE is 'cuda', but there is no CUDA device here: use 'cpu' (--device cpu).")
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def prepare_machine(device: str | None = None, threads: int | None = None) -> str:
    """Set the number of CPU threads of this process (None leaves PyTorch's choice), and choose the device.

    Of processes that `torchrun` starts, each takes the GPU of its LOCAL_RANK as its CUDA device.

    Raises:
        InputError: a number of threads beyond its limits, or a device that is not available.
    """
    if threads is not None:
        config.check("THREADS", threads)
        torch.set_num_threads(threads)
    device = choose_device(device)
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(_local("LOCAL_RANK", 0) % torch.cuda.device_count())
    return device


@contextmanager
def training_threads(threads: int = 1) -> Iterator[None]:
    """Use this number of CPU threads inside the block, and the previous number afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
