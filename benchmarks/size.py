"""How long does a run on a large data set take, and how much memory?

Writes made-up features of the shape of DomainNet as DomainBed takes it (586,575 images in six domains of 345 classes,
768 numbers each, float16) to a temporary file, and parts of them to others; then runs `experiment.py` with each command
on each file, in an empty results directory. One epoch of both phases is trained. Linux only, where the system tells
what memory is for.

Run:  python benchmarks/size.py --output benchmarks/results/size_cpu.json

Columns: the command; images; GiB of the file; seconds from the start of the process to its end; seconds of processors,
of all processes together, which depend less on what else the machine does; and the peaks of three sums over the process
and all that it starts, in GiB: `rss`, where what two processes share counts twice; `pss`, where it counts once; and
`anonymous`, the part of `pss` that no file holds. The rest of `pss` is files in the system's cache (libraries,
features), which it drops where memory is short. A cell of seconds is the median over repeats (lowest–highest), one of
memory the highest.
"""

import argparse
import os
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from measuring import ROOT, Measured, in_turn, new_parser, numbers, positive, run, shown, spread

from config import InputError
from storage import save_features

DOMAINS = {  # images of each
    "clipart": 48129,
    "infograph": 51605,
    "painting": 72266,
    "quickdraw": 172500,
    "real": 172947,
    "sketch": 69128,
}
COMMANDS = (
    "run --seeds 2 --set PH1_NUM_EPOCHS=1 --set PH2_NUM_EPOCHS=1 --no-figures",
    "run --seeds 2 --set PH1_NUM_EPOCHS=1 --set PH2_NUM_EPOCHS=1",
)
PIECE = 2**14  # rows made at a time
INTERVAL = 0.2  # seconds between two looks at the memory
GIB = 2**30


class Cost(NamedTuple):
    """What a command took: seconds, seconds of processors, and the peaks of three sums of memory, in bytes."""

    seconds: float
    processor_seconds: float
    rss: int
    pss: int
    anonymous: int


def write_made_up(path: Path, part: int, classes: int, size: int) -> int:
    """Write features of one image in `part`; returns their number.

    Noise around a centre for each class, moved by domain; classes take turns within a domain.
    """
    draw = torch.Generator().manual_seed(0)
    centres, moved = (torch.randn(count, size, generator=draw) for count in (classes, len(DOMAINS)))
    counts = torch.tensor([max(count // part, 2 * classes) for count in DOMAINS.values()])
    domains = torch.arange(len(counts)).repeat_interleave(counts)
    labels = torch.cat([torch.arange(count) for count in counts.tolist()]) % classes
    features = torch.empty(len(labels), size, dtype=torch.float16)
    for rows in torch.arange(len(labels)).split(PIECE):
        centre = centres[labels[rows]] + moved[domains[rows]] / 2
        features[rows] = (centre + 2 * torch.randn(len(rows), size, generator=draw)).half()
    class_names, domain_names = [f"class{i:03d}" for i in range(classes)], [*DOMAINS]
    pairs = zip(domains.tolist(), labels.tolist(), strict=True)
    files = [f"{domain_names[d]}/{class_names[c]}/{row:06d}.jpg" for row, (d, c) in enumerate(pairs)]
    save_features(path, features, labels, domains, class_names, domain_names, files, dataset="made-up")
    return len(labels)


def cost(command: str, features: Path) -> Cost:
    """Of ``python experiment.py COMMAND`` on features, with one thread per process, into a new results directory.

    Raises:
        InputError: the command fails.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as said:
        options = ["--features", str(features), "--results-dir", folder]
        arguments = [sys.executable, "experiment.py", *shlex.split(command), *options]
        streams = {"stdout": subprocess.DEVNULL, "stderr": said}
        start, before, peaks = time.perf_counter(), of_children(), (0, 0, 0)
        with subprocess.Popen(arguments, cwd=ROOT, env=environment, **streams) as process:
            while process.poll() is None:
                peaks = tuple(map(max, peaks, memory(process.pid)))
                time.sleep(INTERVAL)
        seconds = time.perf_counter() - start
        if process.returncode:
            said.seek(0)
            raise InputError(f"'{command}' failed: {(said.read().strip().splitlines() or ['no reason given'])[-1]}")
    return Cost(seconds, of_children() - before, *peaks)


def of_children() -> float:
    """Seconds of processors that all processes took which this one has started, and which have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def memory(process: int) -> tuple[int, int, int]:
    """Bytes of a process and its descendants now: `Cost.rss`, `Cost.pss` and `Cost.anonymous`; 0 once it has ended."""
    folder = Path("/proc") / str(process)
    try:
        lines = (folder / "smaps_rollup").read_text().splitlines()[1:]
        children = [int(child) for task in folder.glob("task/*/children") for child in task.read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return 0, 0, 0
    of = {name: 1024 * int(value.split()[0]) for name, value in (line.split(":") for line in lines)}
    own = of["Rss"], of["Pss"], of["Pss_Anon"] + of["Pss_Shmem"]
    return tuple(map(sum, zip(own, *map(memory, children), strict=True)))


def measure(args: argparse.Namespace) -> Measured:
    """Seconds and memory of each command on each part."""
    if not Path("/proc/self/smaps_rollup").is_file():
        raise InputError("Memory is measured on Linux only, from version 4.14 on.")
    with tempfile.TemporaryDirectory() as temporary:
        files = {part: Path(temporary) / f"{part}.safetensors" for part in sorted(args.parts, reverse=True)}
        images = {part: write_made_up(path, part, args.classes, args.dims) for part, path in files.items()}
        sizes = {part: path.stat().st_size for part, path in files.items()}
        cases = [*product(args.commands, files)]
        actions = {(command, f"1/{part}"): partial(cost, command, files[part]) for command, part in cases}
        taken = dict(zip(cases, in_turn(actions, args.repeats).values(), strict=True))
    rows = []
    for (command, part), costs in taken.items():
        row = {"command": command, "images": images[part], "file_gib": sizes[part] / GIB}
        row |= {name: spread(getattr(cost, name) for cost in costs) for name in Cost._fields[:2]}
        row["peak_gib"] = {name: max(getattr(cost, name) for cost in costs) / GIB for name in Cost._fields[2:]}
        rows.append(row)
    return {"classes": args.classes, "domains": len(DOMAINS), "D": args.dims, "threads per process": 1}, rows


def columns(row: dict) -> dict[str, object]:
    """A row of the table."""
    cells = {"command": row["command"], "images": row["images"], "file": f"{row['file_gib']:.2f}"}
    cells |= {"seconds": shown(row["seconds"], 0), "of processors": shown(row["processor_seconds"], 0)}
    return cells | {name: f"{value:.2f}" for name, value in row["peak_gib"].items()}


if __name__ == "__main__":
    parser = new_parser(__doc__, COMMANDS)
    parser.add_argument("--parts", type=numbers, default=[16, 4, 1], help="one image in so many (default 16,4,1)")
    parser.add_argument("--classes", type=positive, default=345, help="in the data set (default 345)")
    parser.add_argument("--dims", type=positive, default=768, help="length of a feature (default 768)")
    sys.exit(run(parser, measure, columns))
