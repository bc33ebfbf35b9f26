"""How many small networks per second are trained: stacks of networks against one network at a time.

Measures side by side, in one run, in turn and several times over, on synthetic features shaped like the training of
one holdout of PACS (6,000 rows to train on, 9,991 classified after each epoch, 7 classes, batches of 32):
- a plain PyTorch loop with default and fused Adam, on one thread and on two, and in two processes at once;
- scikit-learn's MLPClassifier;
- stacks of S networks, one per engine, stepped as `training.train` does, on one thread; with six variants per seed
  that share its batches; and cut into chunks of 50 seeds, two at a time in two processes, as `study.py` trains;
- plain loop and stacks on CUDA, where there is a CUDA device;
- the floor: floating-point operations and bytes of a step, over the matrix rate and copy bandwidth of this machine;
  `fraction_of_floor` is the floor over the measured time of the steps, 1 where they could not be faster.
Ratios are taken within a repeat, then their median. With --study also the seconds of whole studies: 20 is `run` with 20
seeds as a whole process, 100x6 is both phases of 100 seeds with six variants, with imports, without a report.

Run:  python benchmarks/training.py --output FILE.json
"""

import argparse
import functools
import json
import os
import platform
import statistics
import sys
import textwrap
from collections.abc import Callable, Sequence
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plain import (
    LARGE,
    PlainLoop,
    Processes,
    Task,
    Times,
    floor,
    floor_seconds,
    machine_rates,
    measure,
    measure_plain,
    measure_sklearn,
    positive,
    processor,
)
from stacked import Stack, measure_chunks
from whole import study_seconds

import config
from compiled import usable
from config import InputError
from experiment import Parser
from training import ENGINES

SHARED = 6  # variants of the rows whose variants share batches
COMPILED = 16  # networks from which on compiling is tried
BASELINES = {  # name in "speedup" -> contenders, of which the fastest counts
    "plain_loop": ("plain", "plain_2_threads"),
    "plain_loop_fused": ("plain_fused", "plain_fused_2_threads"),
    "two_processes": ("processes",),
    "two_processes_fused": ("processes_fused",),
    "scikit_learn": ("sklearn", "sklearn_2_threads"),
}


def main(arguments: list[str] | None = None) -> int:
    """Parse, measure, print a table, write JSON; exit code 2 with one sentence on bad input."""
    args = build_parser().parse_args(arguments)
    if args.quick:
        args.sizes, args.dims, args.repeats, args.rows, args.validation_rows, args.steps = [1, 12], [16], 1, 320, 500, 4
    args.limit = 0.2 if args.quick else 10.0  # seconds; reached where threads wait for each other on a busy machine
    try:
        if args.rows > args.validation_rows:
            raise InputError("--rows must not be more than --validation-rows: all rows are classified.")
        if args.output and (args.output.is_dir() or not args.output.absolute().parent.is_dir()):
            raise InputError(f"The file '{args.output}' cannot be written: no such folder, or it is one itself.")
        args.compiled = not args.quick and usable(32, (args.dims[0], 7, config.HIDDEN_SIZES))
        report = measure_all(args)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(table(report))
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--sizes", type=numbers, default=[1, 16, 160, 1600], help="networks in a stack (default 1,16,160,1600)")
    add("--dims", type=numbers, default=[192, 768], help="lengths of a feature vector (default 192,768)")
    add("--epochs", type=positive, default=1, help="epochs of a training (default 1); one is measured, the rest alike")
    add("--steps", type=positive, default=16, help=f"steps measured of stacks over {LARGE} networks (default 16)")
    add("--repeats", type=positive, default=3, help="times everything is measured (default 3)")
    add("--variants", type=positive, default=1, help="networks of a stack that share a start's batches (default 1)")
    add("--rows", type=positive, default=6000, help="rows to train on (default 6000)")
    add("--validation-rows", type=positive, default=9991, help="rows classified after each epoch (default 9991)")
    add("--study", type=studies, default=[], metavar="SEEDS", help="also time whole studies, for example 1,20,100x6")
    add("--quick", action="store_true", help="tiny sizes, once: does it run?")
    add("--output", type=Path, metavar="FILE", help="JSON file to write")
    return parser


def numbers(text: str) -> list[int]:
    """``1,16`` -> [1, 16], sorted, each once."""
    return sorted({positive(part.strip()) for part in text.split(",")})


def studies(text: str) -> list[tuple[int, int | None]]:
    """``1,100x6`` -> [(1, None), (100, 6)]: seeds and variants."""
    parts = [part.strip().partition("x") for part in text.split(",")]
    return [(positive(seeds), positive(variants) if x else None) for seeds, x, variants in parts]


# --- contenders -----------------------------------------------------------------------------------------


def contenders(task: Task, size: int, args: argparse.Namespace, processes: Processes) -> list[tuple[dict, Callable]]:
    """What is measured for `size` networks: description, and a function -> list of (networks, `Times`)."""
    found, cuda = [], torch.cuda.is_available()

    def add(name: str, action: Callable, **facts) -> None:
        found.append(({"contender": name, "threads": 1, "device": "cpu", **facts}, action))

    def plain(fused: bool, threads: int, device: str = "cpu") -> Callable:
        def action() -> list[tuple[int, Times]]:
            torch.set_num_threads(threads)
            return [(1, measure(PlainLoop(task, fused, device), task, task.steps, args.limit, device))]

        return action

    def stack(make: Callable, device: str = "cpu") -> Callable:
        def action() -> list[tuple[int, Times]]:
            torch.set_num_threads(1)
            loop = make()
            return [(loop.networks, measure(loop, task, measured, args.limit, device))]

        return action

    for fused in (False, True):
        name = "plain_fused" if fused else "plain"
        add(name, plain(fused, 1))
        add(f"{name}_2_threads", plain(fused, 2), threads=2)
        both = functools.partial(processes.run, measure_plain, task, fused, args.limit)
        add("processes_fused" if fused else "processes", both, processes=2)
        if cuda:
            add(f"{name}_cuda", plain(fused, 1, "cuda"), device="cuda")
    add("sklearn", lambda: [(1, measure_sklearn(task, args.epochs, 1))])
    add("sklearn_2_threads", lambda: [(1, measure_sklearn(task, args.epochs, 2))], threads=2)

    measured = min(args.steps, task.steps) if size > LARGE else task.steps
    seeds = max(1, size // args.variants)
    engines = ["vmap", "matmul", *(["compiled"] if size >= COMPILED and args.compiled else [])]
    for engine in engines:
        make = functools.partial(Stack, task, engine, seeds, args.variants)
        add(engine, stack(make), variants=args.variants)
    for engine in ("vmap", "matmul", "captured") if cuda else ():
        make = functools.partial(Stack, task, engine, seeds, args.variants, "cuda")
        add(f"{engine}_cuda", stack(make, "cuda"), device="cuda", variants=args.variants)
    for variants, mark in ((args.variants, ""), (SHARED, "_shared_batches")):
        if size >= 2 * variants and not (mark and args.variants == SHARED):
            for engine in engines[1:]:
                seeds = max(2, round(size / variants))
                both = functools.partial(processes.run, measure_chunks, task, engine, seeds, variants, args.steps)
                add(
                    f"{engine}_chunks{mark}",
                    functools.partial(both, args.limit),
                    processes=2,
                    threads=2,
                    variants=variants,
                )
    return found


def measure_all(args: argparse.Namespace) -> dict:
    """Everything, once per repeat, in turn: what else the machine does strikes all alike."""
    tasks = [Task(size, args.rows, args.validation_rows) for size in args.dims]
    threads, before = torch.get_num_threads(), os.getloadavg()
    rows, rates, studies = {}, [], {seeds: [] for seeds in args.study}
    processes = Processes(2)
    try:
        for repeat in range(args.repeats):
            rates.append(machine_rates(threads, args.quick))
            for task in tasks:
                for size in args.sizes:
                    tell(f"repeat {repeat + 1} of {args.repeats}: D = {task.size}, {size} networks")
                    listed = contenders(task, size, args, processes)
                    for facts, action in listed[:: -1 if repeat % 2 else 1]:
                        key = (task.size, size, facts["contender"])
                        head = {"feature_size": task.size, "size": size, **facts}
                        row = rows.setdefault(key, {**head, "seconds_by_repeat": [], "by_repeat": []})
                        times = action()
                        row["networks"] = sum(count for count, _ in times)
                        row["seconds_by_repeat"].append([time.as_dict() for _, time in times])
                        row["by_repeat"].append(sum(count / (time.epoch * args.epochs) for count, time in times))
            for seeds in args.study:
                tell(f"repeat {repeat + 1} of {args.repeats}: a study of {seeds[0]} seeds")
                studies[seeds].append(study_seconds(*seeds))
    finally:
        processes.close()
        torch.set_num_threads(threads)
    floors = [floor(task, rates, threads) for task in tasks]
    return {
        "task": {
            **{key: getattr(tasks[0], key) for key in ("rows", "classes", "batch", "steps")},
            "validation_rows": args.validation_rows,
            "hidden_sizes": list(config.HIDDEN_SIZES),
            "epochs": args.epochs,
            "repeats": args.repeats,
            "note": note(args, tasks[0]),
        },
        "results": [finished(row, rows, tasks[0], floors) for row in rows.values()],
        "floor": floors,
        "study": [
            {"seeds": seeds, "variants": variants, "seconds": statistics.median(values), "by_repeat": values}
            for (seeds, variants), values in studies.items()
        ],
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "torch_threads": threads,
            "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "system": platform.system(),
            "load_average_before": before,
        },
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "numpy", "scikit-learn")},
    }


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def note(args: argparse.Namespace, task: Task) -> str:
    """What was measured, and what was concluded from it."""
    part = f"{min(args.steps, task.steps)} of the {task.steps} steps of an epoch"
    return (
        f"A training is {args.epochs} x (shuffling + {task.steps} steps + classifying {task.total} rows); one epoch is "
        f"measured. Stacks over {LARGE} networks: {part} are measured and extrapolated linearly, as is what takes over "
        f"{args.limit:g} s (marked ~); shuffling and validation are measured in full. The making of networks is not "
        "measured. Medians of repeats."
    )


def finished(row: dict, rows: dict, task: Task, floors: list[dict]) -> dict:
    """A row of the report: rate, speed-ups over the baselines of the same size, fraction of the floor."""
    row = {**row, "networks_per_second": statistics.median(row["by_repeat"])}
    row["networks_per_second_by_repeat"] = row.pop("by_repeat")
    taken = [time["steps_measured"] for epoch in row["seconds_by_repeat"] for time in epoch]
    row["extrapolated"] = min(taken) < task.steps
    if not row["contender"].startswith(tuple(ENGINES)):
        return row
    row["speedup"], row["speedup_by_repeat"] = {}, {}
    for name, among in BASELINES.items():
        rates = [rows[row["feature_size"], row["size"], other]["by_repeat"] for other in among]
        best = [max(values) for values in zip(*rates, strict=True)]
        ratios = [mine / other for mine, other in zip(row["networks_per_second_by_repeat"], best, strict=True)]
        row["speedup"][name], row["speedup_by_repeat"][name] = statistics.median(ratios), ratios
    if row["device"] == "cpu" and not row["contender"].startswith("vmap"):
        slowest = [max(part["steps"] for part in epoch) for epoch in row["seconds_by_repeat"]]
        steps = [seconds / (task.steps * row["networks"]) for seconds in slowest]
        of = next(f for f in floors if f["feature_size"] == row["feature_size"])
        bounds = [floor_seconds(of, rate, row["threads"], row["variants"]) for rate in of["rates_by_repeat"]]
        row["fraction_of_floor"] = statistics.median(b / s for b, s in zip(bounds, steps, strict=True))
    return row


# --- whole studies, machine, table ----------------------------------------------------------------------


def table(report: dict) -> str:
    """The report as text."""
    machine, versions = report["machine"], report["versions"]
    lines = [
        f"{machine['processor']}, {machine['cores']} cores, load {machine['load_average_before'][0]:.1f} before; "
        f"CUDA: {machine['cuda'] or 'none'}; torch {versions['torch']}, scikit-learn {versions['scikit-learn']}",
        textwrap.fill(report["task"]["note"], 110),
    ]
    sizes = sorted({row["size"] for row in report["results"]})
    for of in report["floor"]:
        found = [row for row in report["results"] if row["feature_size"] == of["feature_size"]]
        cells = {(row["contender"], row["size"]): row for row in found}
        names = list(dict.fromkeys(row["contender"] for row in found))
        heading = f"D = {of['feature_size']}, trained networks per second; networks"
        lines += ["", f"{heading:<52}" + "".join(f"{size:>10}" for size in sizes)]
        for name in names:
            rows = [cells.get((name, size), {}) for size in sizes]
            rates = [row.get("networks_per_second") for row in rows]
            lines.append(line(name, rates, ["~" if row.get("extrapolated") else "" for row in rows]))
        for name in [name for name in names if name.startswith(("matmul", "compiled", "captured"))]:
            rows = [cells.get((name, size), {}) for size in sizes]
            for baseline in BASELINES:
                values = [row.get("speedup", {}).get(baseline) for row in rows]
                lines.append(line(f"speedup, {name} / {baseline}", values))
            if any("fraction_of_floor" in row for row in rows):
                lines.append(line(f"fraction of the floor (steps), {name}", [r.get("fraction_of_floor") for r in rows]))
        rates, moved = of["rates_by_repeat"][0], sum(of["bytes"].values())
        lines.append(f"Floor of a step of a network: {of['operations'] / 1e6:.2f} Mflop, {moved / 1e3:.0f} kB")
        lines += [
            f"  at {key.replace('_', ' ')}: {rate['operations_per_second'] / 1e9:.0f} Gflop/s, "
            f"{rate['bytes_per_second'] / 1e9:.1f} GB/s (first repeat); {of['seconds'][key] * 1e6:.1f} µs"
            for key, rate in rates.items()
        ]
    for of in report["study"]:
        what = f"{of['variants']} variants" if of["variants"] else "experiment.py run"
        lines.append(f"Study of {of['seeds']} seeds, {what}: {of['seconds']:.1f} s, whole process")
    return "\n".join(lines)


def line(name: str, values: list[float | None], marks: Sequence[str] = ()) -> str:
    """A line of the table; a value of None is a dash."""
    pairs = zip_longest(values, marks, fillvalue="")
    return f"{name:<52}" + "".join(f"{'-' if v is None else f'{mark}{v:.4g}':>10}" for v, mark in pairs)


if __name__ == "__main__":
    sys.exit(main())
