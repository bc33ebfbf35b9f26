"""What each method of `algorithms` costs: seconds of an epoch of a stack, and how many times ERM's on its batches.

Every method trains one epoch of the bundled features with one domain held out, as `compare.py` does; in turn, and
several times over. A ratio is taken within a repeat, then the median over repeats.

Run:  python benchmarks/methods.py --output FILE.json
"""

import argparse
import functools
import json
import os
import platform
import statistics
import sys
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plain import positive, processor, timed

from algorithms import ALGORITHMS, Algorithm
from compare import PARTNERS
from config import InputError, Settings
from experiment import Parser
from features import get_features
from trainer_algorithm import train_algorithm
from training import Problem, tracked_names


def main(arguments: list[str] | None = None) -> int:
    """Parse, measure, print a table, write JSON; exit code 2 with one sentence on bad input."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=positive, default=20, help="networks in a stack (default 20)")
    parser.add_argument("--repeats", type=positive, default=3, help="times everything is measured (default 3)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON file to write")
    args = parser.parse_args(arguments)
    try:
        report = measure(args)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(table(report))
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def measure(args: argparse.Namespace) -> dict:
    """Seconds per method and repeat, and ratios."""
    torch.set_num_threads(1)
    settings = Settings.current(ph2_num_epochs=1)
    data, before = get_features(), os.getloadavg()
    problem, holdout = Problem.from_features(data, settings), data.domain_names[0]
    seconds = {name: [] for name in sorted(ALGORITHMS)}
    train = functools.partial(epoch, problem, holdout, args.seeds, settings)
    for name in PARTNERS.values():
        train(ALGORITHMS[name])  # the first time is slower
    for repeat in range(args.repeats):
        for name in sorted(ALGORITHMS, reverse=bool(repeat % 2)):
            print(f"repeat {repeat + 1} of {args.repeats}: {name}", file=sys.stderr, flush=True)
            seconds[name].append(timed(functools.partial(train, ALGORITHMS[name])))
    rows = []
    for name, cls in sorted(ALGORITHMS.items()):
        ratios = [mine / erm for mine, erm in zip(seconds[name], seconds[PARTNERS[cls.batches]], strict=True)]
        row = {"method": name, "batches": cls.batches, "cost_relative_to_erm": statistics.median(ratios)}
        rows.append(row | {"seconds": statistics.median(seconds[name]), "seconds_by_repeat": seconds[name]})
    return {
        "task": {"data": data.describe(), "holdout": holdout, "seeds": args.seeds, "epochs": 1, "threads": 1},
        "results": rows,
        "machine": {"processor": processor(), "cores": os.cpu_count(), "load_average_before": before},
        "versions": {"python": platform.python_version(), "torch": version("torch")},
    }


def epoch(problem: Problem, holdout: str, seeds: int, settings: Settings, cls: type[Algorithm]) -> None:
    """One epoch of a stack; methods with masks get random ones."""
    given = None
    if getattr(cls, "masked", False):
        pairs = zip(tracked_names(settings.hidden_sizes), pairwise(settings.hidden_sizes), strict=True)
        given = {"mask": {name: torch.rand(seeds, fan_out, fan_in) < 0.6 for name, (fan_in, fan_out) in pairs}}
    train_algorithm(problem, [holdout], range(seeds), cls, {}, settings, given=given)


def table(report: dict) -> str:
    """The report as text."""
    task, machine = report["task"], report["machine"]
    lines = [
        f"{machine['processor']}, {machine['cores']} cores, load {machine['load_average_before'][0]:.1f}; one thread",
        f"{task['data']}; one epoch without {task['holdout']}, {task['seeds']} networks at once",
        f"{'method':<20}{'batches':<12}{'seconds':>10}{'/ ERM':>10}",
    ]
    for row in sorted(report["results"], key=lambda r: r["seconds"]):
        lines.append(
            f"{row['method']:<20}{row['batches']:<12}{row['seconds']:>10.2f}{row['cost_relative_to_erm']:>10.2f}"
        )
    total = sum(row["seconds"] for row in report["results"])
    lines.append(f"{'all':<32}{total:>10.1f}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
