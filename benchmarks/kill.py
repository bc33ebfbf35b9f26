"""Does a command that is killed go on as if nothing had happened?

Runs each command once undisturbed, on a small data set of random images and a small random ViT, both made here. Then,
again and again, kills it (SIGKILL) at a random moment of its work, gives the same command again, and compares every
file that it has written, byte for byte, with those of the undisturbed run; what was left behind counts as a difference.
The moments are random, but drawn from a fixed seed, as shares of the time from the first file to the end.

Run:  python benchmarks/kill.py --output benchmarks/results/kill_cpu.json

Columns: the command; kills; how many times its files were identical afterwards; when it was killed, as shares of its
work, the first and the last; seconds of the undisturbed command.
"""

import argparse
import os
import random
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from measuring import ROOT, Measured, new_parser, run
from PIL import Image

from config import InputError

DOMAINS, CLASSES, IMAGES = ("art", "photo", "sketch"), ("cat", "dog"), 180  # per class: three parts of an extraction
SHORT = (
    "--features ../features.safetensors --results-dir out --threads 1 --set BATCH_SIZE=256 "
    "--set PH1_NUM_EPOCHS=2 --set PH2_NUM_EPOCHS=2"
)
PICTURES = "--data-root ../images --vit-model ../vit"
BLOCKS = (
    f"{PICTURES} --set TRAINED_BLOCKS=1 --set CACHE_DIR=../cache --results-dir out --threads 1 "
    "--set BLOCK_BATCH_SIZE=256 --set BLOCK_EPOCHS=2"
)
COMMANDS = {
    "features": f"features {PICTURES} --set CACHE_DIR=out",
    "run": f"run --no-figures --seeds 4 --set SEEDS_PER_CHUNK=1 {SHORT}",
    "study": f"study --seeds 2 --sweep-seeds 2 {SHORT}",
    "features_blocks": f"features {PICTURES} --set TRAINED_BLOCKS=1 --set CACHE_DIR=out",
    "run_blocks": f"run --no-figures --seeds 4 {BLOCKS}",
    "study_blocks": f"study --seeds 2 --no-controls --keep-weights {BLOCKS}",
    "compare": f"compare --no-figures --seeds 2 --set SEEDS_PER_CHUNK=1 --algorithms IRM,Mixup,ImportanceMask {SHORT}",
}


def make_data(folder: Path) -> None:
    """Write random images, a random ViT, and the features that it makes of them."""
    import torch
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    random_pixels = np.random.default_rng(0)
    for domain in DOMAINS:
        for label in CLASSES:
            place = folder / "images" / domain / label
            place.mkdir(parents=True)
            for number in range(IMAGES):
                pixels = random_pixels.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{number:03d}.png")
    torch.manual_seed(0)
    size = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    ViTModel(ViTConfig(**size, image_size=32, patch_size=8)).save_pretrained(folder / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "vit")
    (folder / "first").mkdir()
    finish(start(f"{COMMANDS['features']} --output ../features.safetensors", folder / "first"))


def start(command: str, folder: Path) -> subprocess.Popen:
    """Start a command of `experiment.py` in a folder."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GIT_DIR": os.devnull}  # a commit meanwhile is no difference
    program = [sys.executable, str(ROOT / "experiment.py"), *shlex.split(command)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(program, cwd=folder, env=environment, **quiet)


def finish(process: subprocess.Popen) -> None:
    """Wait for a command to end; an `InputError` if it fails."""
    said = process.communicate()[1].strip().splitlines() or ["no reason given"]
    if process.returncode:
        raise InputError(f"'{shlex.join(process.args[1:])}' failed: {said[-1]}")


def first_file(process: subprocess.Popen, folder: Path) -> float:
    """Wait until a command has begun to write, or has ended; returns the moment."""
    while process.poll() is None and not files(folder):
        time.sleep(0.01)
    return time.perf_counter()


def files(folder: Path) -> dict[str, bytes]:
    """Path below ``out`` -> content, without locks."""
    place = folder / "out"
    found = [path for path in place.rglob("*") if path.is_file() and path.suffix != ".lock" and path.name != ".lock"]
    return {str(path.relative_to(place)): path.read_bytes() for path in found}


def killed(command: str, folder: Path, seconds: float) -> None:
    """Kill a command so many seconds after its first file, and give it again."""
    folder.mkdir()
    process = start(command, folder)
    first_file(process, folder)
    time.sleep(seconds)
    process.kill()
    process.communicate()  # ends when its workers have ended as well
    finish(start(command, folder))


def measure(args: argparse.Namespace) -> Measured:
    """Kills of each command, and whether its files were identical afterwards."""
    moments, rows = random.Random(args.seed), []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_data(folder)
        for name, command in ((name, COMMANDS[name]) for name in dict.fromkeys(args.only)):
            undisturbed = folder / name
            undisturbed.mkdir()
            begin, process = time.perf_counter(), start(command, undisturbed)
            first = first_file(process, undisturbed)
            finish(process)
            end, whole = time.perf_counter(), files(undisturbed)
            shares, differ = [moments.random() for _ in range(args.repeats)], []
            for number, share in enumerate(shares):
                print(f"{name}, kill {number + 1} of {args.repeats}", file=sys.stderr, flush=True)
                again = folder / f"{name}_{number}"
                killed(command, again, share * (end - first))
                found = files(again)
                differ.append(
                    sorted(path for path in whole.keys() | found.keys() if whole.get(path) != found.get(path))
                )
            row = {"command": name, "kills": len(shares), "identical": differ.count([]), "moments": shares}
            rows.append(row | {"files": len(whole), "differ": differ, "seconds": end - begin})
    return {"kills": sum(row["kills"] for row in rows), "identical": sum(row["identical"] for row in rows)}, rows


def columns(row: dict) -> dict[str, object]:
    """A row of the table."""
    when = f"{min(row['moments']):.2f}–{max(row['moments']):.2f}"
    return {key: row[key] for key in ("command", "kills", "identical", "files")} | {
        "moments": when,
        "seconds": round(row["seconds"], 1),
    }


if __name__ == "__main__":
    parser = new_parser(__doc__)
    parser.set_defaults(repeats=5)
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=[*COMMANDS], help="some of the commands")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments (default 0)")
    sys.exit(run(parser, measure, columns))
