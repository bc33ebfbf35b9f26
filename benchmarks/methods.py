"""What does a step of each method of the field cost?

Every method trains one epoch of the bundled features with the first domain held out, as `field.Comparison` does, with
many networks at once on one thread. The methods take turns.

Run:  python benchmarks/methods.py --output benchmarks/results/methods_cpu.json

Columns: the method; its batches, pooled or balanced (32 images of all source domains, or of each); seconds of an
epoch, in which all images are classified once; milliseconds of the epoch per step and network; and the seconds over
those of plain training on the same batches (ERM or ERMBalanced), within a repeat. A cell is the median over repeats
(lowest–highest).
"""

import argparse
import sys
from functools import partial
from math import ceil

import torch
from measuring import Measured, in_turn, new_parser, positive, ratio, run, seconds, shown, spread

from config import Settings
from engine import SplitFeatures, random_start
from features import bundled_features
from field import ALGORITHMS, PARTNERS, Algorithm, find, train_method


def train_epoch(data: SplitFeatures, holdout: str, seeds: range, settings: Settings, method: type[Algorithm]) -> None:
    """One epoch of a stack of networks; what a method is given of Phase 1 is random."""
    network, domains = data.network(settings.hidden_sizes), len(data.sources([holdout]))
    shapes = {name: network.get_parameter(name).shape for name in network.tracked_names}
    ranks = {name: torch.rand(len(seeds), *shape) for name, shape in shapes.items()}
    start = random_start(seeds, "start", network)
    every = {
        "mask": {name: rank < 0.6 for name, rank in ranks.items()},
        "ranks": ranks,
        "experts": {name: torch.stack([value] * domains, dim=1) for name, value in start.items()},
    }
    given = {entry: every[entry] for entry in method.given()}
    train_method(data, [holdout], seeds, method, settings, given=given)


def measure(args: argparse.Namespace) -> Measured:
    """Seconds of each method, and over those of plain training."""
    torch.set_num_threads(1)
    settings, features, seeds = Settings.current(ph2_num_epochs=1), bundled_features(), range(args.seeds)
    data, holdout = SplitFeatures.from_features(features, settings), features.domain_names[0]
    steps = ceil(data.rows(data.sources(holdout), "in", [0]).shape[1] / settings.batch_size)
    wanted = [find(name.strip()) for name in args.methods.split(",")] if args.methods else ALGORITHMS.values()
    names = {*PARTNERS.values(), *(method.__name__ for method in wanted)}
    train = partial(train_epoch, data, holdout, seeds, settings)
    for name in PARTNERS.values():
        train(ALGORITHMS[name])  # the first time is slower
    taken = in_turn({name: partial(seconds, partial(train, ALGORITHMS[name])) for name in sorted(names)}, args.repeats)
    rows = []
    for name, values in taken.items():
        batches = ALGORITHMS[name].batches
        row = {"method": name, "batches": batches, "seconds": spread(values)}
        row["milliseconds_per_step"] = spread(1e3 * value / (steps * args.seeds) for value in values)
        rows.append(row | {"over_plain_training": ratio(values, taken[PARTNERS[batches]])})
    rows.sort(key=lambda row: row["seconds"]["median"])
    task = {"data": features.describe(), "holdout": holdout, "networks": args.seeds, "steps": steps, "threads": 1}
    return task, rows


def columns(row: dict) -> dict[str, object]:
    """A row of the table."""
    cells = {"method": row["method"], "batches": row["batches"], "seconds": shown(row["seconds"])}
    cells["ms/step"] = shown(row["milliseconds_per_step"], 3)
    return cells | {"/ plain training": shown(row["over_plain_training"])}


if __name__ == "__main__":
    parser = new_parser(__doc__)
    parser.add_argument("--methods", metavar="A,B", help="names (default all); ERM and ERMBalanced are added")
    parser.add_argument("--seeds", type=positive, default=20, help="networks at once (default 20)")
    sys.exit(run(parser, measure, columns))
