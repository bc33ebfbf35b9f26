"""The machine: device, threads, cores and free memory."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from config import InputError


def default_workers() -> int:
    """One per core this process may use, at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 16)


def free_memory() -> float:
    """Bytes of memory available without swapping; infinite where the system does not tell (other than Linux)."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return math.inf


def choose_device(device: str | None = None) -> str:
    """The device to use.

    Args:
        device: "cpu", "cuda", or None for CUDA where there is one.

    Raises:
        InputError: an unknown device, or "cuda" where there is none.
    """
    if device not in (None, "cpu", "cuda"):
        raise InputError(f"DEVICE must be 'cpu', 'cuda' or None, not '{device}'.")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("DEVICE is 'cuda', but there is no CUDA device here: use 'cpu' (--device cpu).")
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def prepare_machine(device: str | None = None, threads: int | None = None) -> str:
    """Set the number of CPU threads, and choose the device.

    Args:
        device: see `choose_device`.
        threads: CPU threads of this process; None leaves PyTorch's choice.

    Returns:
        "cpu" or "cuda".

    Raises:
        InputError: fewer than one thread, or a device that is not available.
    """
    if threads is not None:
        if threads < 1:
            raise InputError(f"THREADS must be at least 1, not {threads}.")
        torch.set_num_threads(threads)
    return choose_device(device)


@contextmanager
def training_threads(threads: int = 1) -> Iterator[None]:
    """Use this number of CPU threads inside the block, and the previous number afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
