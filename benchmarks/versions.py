"""Is this checkout as fast as another one?

Runs both side by side, in processes that take turns (this, other, this, other, …):
- training: `trainer_phase1.train_domain`, which every version has, with many networks at once on one domain of the
  bundled features (D = 192), on one thread. The seconds are those of the call alone, after a first, shorter one.
- commands of `experiment.py`, from start to exit, each in an empty results directory.

Run:  python benchmarks/versions.py --against DIR --output benchmarks/results/versions_cpu.json

Columns: what was run; seconds of this checkout and of the other, median over repeats (lowest–highest); and the ratio
this / other, within a repeat: above 1, this checkout is slower.
"""

import argparse
import json
import subprocess
import sys
from functools import partial
from itertools import product
from pathlib import Path

from measuring import (
    ROOT,
    Measured,
    command_seconds,
    in_turn,
    new_parser,
    positive,
    ratio,
    run,
    shown,
    spread,
    start_python,
)

from config import InputError

COMMANDS = ("run --seeds 20 --no-figures",)
DOMAIN = "sketch"  # the largest of the bundled features
TRAINING = f"""
import json, sys, time, typing
import torch
from config import Settings
from features import bundled_features
from trainer_phase1 import train_domain

networks, epochs = map(int, sys.argv[1:])
torch.set_num_threads(1)
Data = next(iter(typing.get_type_hints(train_domain).values()))  # features on a device: its name differs by version
settings = [Settings.current(split_seed=0, ph1_num_epochs=count) for count in (1, epochs)]
data = Data.from_features(bundled_features(), settings[0])
train_domain(data, {DOMAIN!r}, range(networks), settings[0])
start = time.perf_counter()
train_domain(data, {DOMAIN!r}, range(networks), settings[1])
print(json.dumps(time.perf_counter() - start))
"""


def training_seconds(networks: int, epochs: int, checkout: Path) -> float:
    """Seconds that a checkout takes to train so many networks."""
    return json.loads(start_python(["-c", TRAINING, str(networks), str(epochs)], checkout).splitlines()[-1])


def commit(checkout: Path) -> str | None:
    """The commit that is checked out, marked where files differ from it; None where git does not tell."""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--exclude", "*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def measure(args: argparse.Namespace) -> Measured:
    """Seconds of both checkouts, and their ratios."""
    if not (args.against / "trainer_phase1.py").is_file():
        raise InputError(f"--against {args.against}: there is no checkout of this project.")
    actions = {f"training of {args.networks}": partial(training_seconds, args.networks, args.epochs)}
    actions |= {command: partial(command_seconds, command) for command in args.commands}
    sides = {"this": ROOT, "other": args.against.resolve()}
    both = {pair: partial(actions[pair[0]], checkout=sides[pair[1]]) for pair in product(actions, sides)}
    taken = in_turn(both, args.repeats)
    rows = []
    for what in actions:
        this, other = taken[what, "this"], taken[what, "other"]
        rows.append({"what": what, "this": spread(this), "other": spread(other), "this_over_other": ratio(this, other)})
    commits = {side: commit(folder) for side, folder in sides.items()}
    return commits | {"epochs of training": args.epochs, "threads per process": 1}, rows


def columns(row: dict) -> dict[str, object]:
    """A row of the table."""
    return {"what": row["what"]} | {key: shown(row[key]) for key in ("this", "other", "this_over_other")}


if __name__ == "__main__":
    parser = new_parser(__doc__, COMMANDS)
    parser.add_argument("--against", type=Path, required=True, metavar="DIR", help="the other checkout")
    parser.add_argument("--networks", type=positive, default=160, help="trained at once (default 160)")
    parser.add_argument("--epochs", type=positive, default=5, help="of a training (default 5)")
    sys.exit(run(parser, measure, columns))
