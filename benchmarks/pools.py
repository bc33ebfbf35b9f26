"""Is the project's own pool of forked processes worth keeping beside loky's, which joblib brings?

Runs a whole command of `experiment.py` with each, from the start of the process to its end, into an empty results
directory; without figures, which one process draws, whatever the pool. Loky's processes get their work as those of any
executor do (`engine.executors`), and the next phase uses them again. The pools take turns.

Run:  python benchmarks/pools.py --output benchmarks/results/pools_cpu.json

Columns: the command, the pool; seconds and how many times those of the forked processes, then processor seconds of
all processes together, on which other programs have less influence, likewise; medians over repeats (lowest–highest).
"""

import argparse
import os
import runpy
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from measuring import ROOT, Measured, in_turn, new_parser, ratio, run, seconds, shown, spread, start_python

COMMANDS = ("run --seeds 20 --no-figures",)
POOLS = ("fork", "loky")


def measure(args: argparse.Namespace) -> Measured:
    """Seconds of each command with each pool."""
    actions = {(command, pool): partial(pool_seconds, pool, command) for command in args.commands for pool in POOLS}
    taken, rows = in_turn(actions, args.repeats), []
    for command, pool in actions:
        row = {"command": command, "pool": pool}
        for i, kind in enumerate(("seconds", "processor_seconds")):
            own, forked = ([costs[i] for costs in taken[command, name]] for name in (pool, POOLS[0]))
            row |= {kind: spread(own), f"{kind}_over_fork": ratio(own, forked)}
        rows.append(row)
    return {"threads per process": 1}, rows


def pool_seconds(pool: str, command: str) -> tuple[float, float]:
    """Seconds and processor seconds of a command with one of the `POOLS`, as a process."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = [str(Path(__file__).resolve()), "--inside", pool, *shlex.split(command), "--results-dir", folder]
        before = os.times()
        taken = seconds(lambda: start_python(arguments, ROOT))
        after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return taken, used


def inside(pool: str, arguments: Sequence[str]) -> None:
    """Be `experiment.py` with these arguments and one of the `POOLS`."""
    if pool == "loky":
        from joblib.externals.loky import get_reusable_executor

        from engine import default_workers
        from study import Run

        usual = Run.side_by_side

        def in_loky(run: Run, *given) -> Iterator:  # the first phase comes here before anything else is done
            run.execution = replace(run.execution, executor=get_reusable_executor(default_workers()))
            yield from usual(run, *given)

        Run.side_by_side = in_loky
    sys.argv = ["experiment.py", *arguments]
    runpy.run_path(str(ROOT / "experiment.py"), run_name="__main__")


def columns(row: dict) -> dict[str, object]:
    """A row of the table."""
    cells = {"command": row["command"], "pool": row["pool"]}
    for kind in ("seconds", "processor_seconds"):
        words = kind.replace("_", " ")
        cells |= {words: shown(row[kind]), f"{words} / fork": shown(row[f"{kind}_over_fork"])}
    return cells


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        inside(sys.argv[2], sys.argv[3:])
    else:
        sys.exit(run(new_parser(__doc__, COMMANDS), measure, columns))
