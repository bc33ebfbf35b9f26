"""What the benchmarks share: contenders measured in turn, their ratios, facts of the machine, and the report."""

import argparse
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import pandas as pd
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for the benchmarks as well, which import this module before those of the project

from config import InputError

PACKAGES = ("torch", "numpy", "scikit-learn", "transformers")

Name = str | tuple
Taken = TypeVar("Taken")
Measured = tuple[dict[str, object], list[dict]]  # what was measured, and the rows of the report


def new_parser(description: str, commands: Sequence[str] = ()) -> argparse.ArgumentParser:
    """A command line with the options that every benchmark has.

    Args:
        description: docstring of the benchmark; its first line is shown.
        commands: of `experiment.py`, measured by default, where the benchmark measures some.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--repeats", type=positive, default=3, help="times everything is measured (default 3)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON file to write")
    if commands:
        help_ = f"what follows 'experiment.py', in quotes, without --results-dir (default: {'; '.join(commands)})"
        parser.add_argument("commands", nargs="*", default=commands, metavar="COMMAND", help=help_)
    return parser


def positive(text: str) -> int:
    """A whole number from 1 on; a `ValueError` otherwise, which argparse reports."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def numbers(text: str) -> list[int]:
    """``1,16`` -> [1, 16]."""
    return [positive(part) for part in text.split(",")]


def run(
    parser: argparse.ArgumentParser,
    measure: Callable[[argparse.Namespace], Measured],
    columns: Callable[[dict], dict[str, object]],
) -> int:
    """Parse the command line, measure, print a table, write JSON.

    Args:
        parser: from `new_parser`.
        measure: options -> what was measured, and rows for the JSON file.
        columns: row -> heading -> cell of the table.

    Returns:
        The exit code: 0, 2 for bad input (one sentence on stderr), 130 for Ctrl-C.
    """
    args = parser.parse_args()
    facts = machine()
    try:
        if args.output and not args.output.absolute().parent.is_dir():
            raise InputError(f"--output {args.output}: there is no such folder.")
        task, rows = measure(args)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    load = f"load {facts['load_before']:.1f} before"
    print(f"{facts['processor']}, {facts['cores']} cores, {load}; CUDA: {facts['cuda']}")
    print(", ".join(f"{key} {value}" for key, value in task.items()))
    print(pd.DataFrame([columns(row) for row in rows]).to_string(index=False))
    if args.output:
        versions = {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
        report = {"task": task, "results": rows, "machine": facts, "versions": versions}
        args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def machine() -> dict[str, object]:
    """Processor, cores, threads, CUDA device, system, and load (processes that ran, mean of the last minute)."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.system(),
        "load_before": os.getloadavg()[0],
    }


def processor() -> str:
    """The processor by name, where the system tells."""
    facts = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:(.*)$", facts.read_text() if facts.is_file() else "", re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def in_turn(contenders: Mapping[Name, Callable[[], Taken]], repeats: int) -> dict[Name, list[Taken]]:
    """The cost of each contender by repeat, A B C A B C …: what else the machine does affects all alike.

    A contender's name, or its parts, leads to a function that measures once and returns what it found, mostly seconds.
    """
    found = {name: [] for name in contenders}
    for repeat in range(repeats):
        for name, measure in contenders.items():
            parts = [name] if isinstance(name, str) else name
            print(f"repeat {repeat + 1} of {repeats}:", *parts, file=sys.stderr, flush=True)
            found[name].append(measure())
    return found


def spread(values: Iterable[float]) -> dict[str, object]:
    """Median, lowest and highest of the repeats, and each of them."""
    values = list(values)
    found = {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}
    return found | {"by_repeat": values}


def ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, object]:
    """`spread` of the ratios within each repeat."""
    return spread(a / b for a, b in zip(above, below, strict=True))


def shown(values: Mapping[str, float], digits: int = 2) -> str:
    """A `spread` as a cell of the table: ``median (lowest–highest)``."""
    median, lowest, highest = (f"{values[key]:.{digits}f}" for key in ("median", "lowest", "highest"))
    return f"{median} ({lowest}–{highest})"


def seconds(action: Callable[[], object]) -> float:
    """Seconds that `action` takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def command_seconds(command: str, checkout: Path = ROOT, folder: Path | None = None) -> float:
    """Seconds of ``python experiment.py COMMAND`` as a process, from start to exit.

    Args:
        command: what follows, without ``--results-dir``.
        checkout: of the project.
        folder: the results directory; default a new one.

    Raises:
        InputError: the command fails.
    """
    with tempfile.TemporaryDirectory() as new:
        arguments = ["experiment.py", *shlex.split(command), "--results-dir", str(folder or new)]
        return seconds(lambda: start_python(arguments, checkout))


def start_python(arguments: Sequence[str], checkout: Path) -> str:
    """Run Python in a checkout of the project, with one thread per process; returns what it prints.

    Raises:
        InputError: it fails.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=checkout, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["no reason given"]
        raise InputError(f"A process in '{checkout}' failed: {said[-1]}")
    return done.stdout
