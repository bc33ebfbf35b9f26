"""How long do whole commands take, from the start of the process to its end?

Runs `experiment.py` with each command in an empty results directory, on the bundled features unless the command says
otherwise. The commands take turns.

Run:  python benchmarks/whole.py --output benchmarks/results/whole_cpu.json

Columns: the command; seconds, median over repeats (lowest–highest).
"""

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measuring import Measured, command_seconds, in_turn, new_parser, run, shown, spread

COMMANDS = ("run --seeds 1 --no-figures", "run --seeds 20 --no-figures", "study --seeds 20")


def measure(args: argparse.Namespace) -> Measured:
    """Seconds of each command."""
    commands = {command: partial(command_seconds, command) for command in args.commands or COMMANDS}
    taken = in_turn(commands, args.repeats)
    rows = [{"command": command, "seconds": spread(values)} for command, values in taken.items()]
    return {"threads per process": 1}, rows


def columns(row: dict) -> dict[str, object]:
    """A row of the table."""
    return {"command": row["command"], "seconds": shown(row["seconds"])}


def main() -> int:
    """Measure what the command line says."""
    parser = new_parser(__doc__)
    help_ = f"what follows 'experiment.py', in quotes, without --results-dir (default: {'; '.join(COMMANDS)})"
    parser.add_argument("commands", nargs="*", metavar="COMMAND", help=help_)
    return run(parser, measure, columns)


if __name__ == "__main__":
    sys.exit(main())
