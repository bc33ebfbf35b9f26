"""How long do whole commands take, from the start of the process to its end?

Runs `experiment.py` with each command in an empty results directory, on the bundled features unless the command says
otherwise, and then again in the same directory, where nothing is left to do. The commands take turns.

Run:  python benchmarks/whole.py --output benchmarks/results/whole_cpu.json

Columns: the command; seconds of the first time and of the second, medians over repeats (lowest–highest).
"""

import argparse
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path

from measuring import Measured, command_seconds, in_turn, new_parser, run, shown, spread

COMMANDS = (
    "run --seeds 1 --no-figures",
    "run --seeds 20",
    "study --seeds 2",
    "compare --seeds 2 --algorithms ERM,ImportanceMask,SWAD",
)


def measure(args: argparse.Namespace) -> Measured:
    """Seconds of each command, first and again."""
    with tempfile.TemporaryDirectory() as temporary:
        actions = {}
        for number, command in enumerate(args.commands):
            folder = Path(temporary) / str(number)
            actions[command, "first"] = partial(first_seconds, command, folder)
            actions[command, "again"] = partial(command_seconds, command, folder=folder)
        taken = in_turn(actions, args.repeats)
    rows = [
        {"command": command} | {time: spread(taken[command, time]) for time in ("first", "again")}
        for command in args.commands
    ]
    return {"threads per process": 1}, rows


def first_seconds(command: str, folder: Path) -> float:
    """`command_seconds` into a results directory that is emptied before."""
    shutil.rmtree(folder, ignore_errors=True)
    return command_seconds(command, folder=folder)


def columns(row: dict) -> dict[str, object]:
    """A row of the table."""
    return {"command": row["command"]} | {time: shown(row[time]) for time in ("first", "again")}


if __name__ == "__main__":
    parser = new_parser(__doc__, COMMANDS)
    sys.exit(run(parser, measure, columns))
