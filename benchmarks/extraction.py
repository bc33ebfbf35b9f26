"""How close does the extraction of features come to the bare forward pass of the ViT?

Measures on some images of a data set, in turn, on all cores:
- bare_forward: the forward pass alone, on random pixels that are in memory already;
- decoding: reading, decoding and resizing alone, in one process;
- check: what precedes an extraction, `features.check_images`;
- extraction: `features.extract` as users meet it, in an empty cache: all images checked, then decoded beside the
  forward pass;
- cache_hit: the same again, which finds the features in the cache;
- vit_epoch: an epoch of training that runs the ViT again: decoding, forward pass, a step of the classifier, by batches.

Run:  python benchmarks/extraction.py --data-root DIR --vit-model DIR --output benchmarks/results/extraction_cpu.json

Columns: the part; seconds; images per second, and that over the bare forward pass's (1 = no overhead), within a repeat;
the same ratio of the processor times of this process, which other programs on the machine change less; and one seed of
both phases that runs the ViT in every epoch over one extraction, EXTRAPOLATED linearly from the epoch that was measured
(training alone, one arm, each domain held out in turn). A cell is the median (lowest–highest).
"""

import argparse
import dataclasses
import io
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from measuring import Measured, in_turn, new_parser, positive, ratio, run, seconds, shown, spread
from PIL import Image
from torch.nn import functional as F

from config import Settings
from dataset import ImageDataset, find_dataset, load_image
from engine import choose_device
from features import check_images, extract, load_extractor
from models import FeatureExtractor, FeedforwardClassifier


def evenly(images: ImageDataset, count: int) -> ImageDataset:
    """`count` rows spread over the whole data set."""
    rows = torch.linspace(0, len(images) - 1, min(count, len(images))).long()
    files = tuple(images.files[row] for row in rows)
    return dataclasses.replace(images, files=files, labels=images.labels[rows], domains=images.domains[rows])


def both_times(action: Callable[[], object]) -> tuple[float, float]:
    """Seconds that `action` takes, and processor seconds."""
    start = time.process_time()
    taken = seconds(action)
    return taken, time.process_time() - start


def bare_forward(extractor: FeatureExtractor, batch: int, count: int) -> tuple[float, float]:
    """`both_times` of `count` images of random pixels, made outside the timing."""
    size = extractor.preprocessing(Image.new("RGB", (64, 64))).shape
    pixels = torch.randint(0, 256, (batch, *size), dtype=torch.uint8).to(extractor.device)
    parts = [pixels[: min(batch, count - start)] for start in range(0, count, batch)]
    return both_times(lambda: [extractor(part).half().cpu() for part in parts])


def pixels_of(images: ImageDataset, extractor: FeatureExtractor, rows: Iterable[int]) -> list[torch.Tensor]:
    """Decoded and resized images."""
    return [extractor.preprocessing(load_image(io.BytesIO(images.read(row)))) for row in rows]


def vit_epoch(images: ImageDataset, extractor: FeatureExtractor, settings: Settings) -> None:
    """An epoch of training one network as it is without a cache."""
    network = FeedforwardClassifier(extractor.feature_size, len(images.class_names), settings.hidden_sizes)
    optimizer = torch.optim.Adam(network.to(extractor.device).parameters(), lr=settings.ph1_learning_rate)
    for rows in torch.randperm(len(images)).split(settings.batch_size):
        features = extractor(torch.stack(pixels_of(images, extractor, rows.tolist()))).clone()
        optimizer.zero_grad()
        F.cross_entropy(network(features), images.labels[rows].to(extractor.device)).backward()
        optimizer.step()


def measure(args: argparse.Namespace) -> Measured:
    """Seconds of each part by repeat, and ratios."""
    settings, whole = Settings.current(), find_dataset(args.data_root)
    images, count = evenly(whole, args.images), min(args.images, len(whole))
    extractor = load_extractor(args.vit_model).to(choose_device(args.device))
    batch = args.batch_size or (256 if extractor.device.type == "cuda" else 8)
    bare_forward(extractor, batch, 4 * batch)  # the first passes are slower
    options = {"batch_size": args.batch_size, "workers": args.workers, "progress": False}
    with tempfile.TemporaryDirectory() as folder:
        caches = [Path(folder) / str(repeat) for repeat in range(args.repeats)]
        empty, filled = iter(caches), iter(caches)
        check = partial(check_images, images, folder, args.workers or None, verify=True, progress=False)
        parts = {
            "bare_forward": lambda: bare_forward(extractor, batch, count),
            "decoding": lambda: both_times(lambda: pixels_of(images, extractor, range(count))),
            "check": lambda: both_times(check),
            "extraction": lambda: both_times(partial(extract, images, extractor, next(empty), **options)),
            "cache_hit": lambda: both_times(partial(extract, images, extractor, next(filled), **options)),
            "vit_epoch": lambda: both_times(lambda: vit_epoch(images, extractor, settings)),
        }
        found = in_turn(parts, args.repeats)
    taken = {name: [wall for wall, _ in pairs] for name, pairs in found.items()}
    busy = {name: [processor for _, processor in pairs] for name, pairs in found.items()}
    rows = []
    for name, values in taken.items():
        rate = spread(count / value for value in values)
        rows.append({"part": name, "seconds": spread(values), "images_per_second": rate})
        rows[-1]["speed_over_bare_forward"] = ratio(taken["bare_forward"], values)
        rows[-1]["processor_seconds"] = spread(busy[name])
        rows[-1]["by_processor_time"] = ratio(busy["bare_forward"], busy[name])
    others = len(images.domain_names) - 1  # an image is trained on while each other domain is held out
    passes = settings.ph1_num_epochs + others * (1 - settings.out_fraction) * settings.ph2_num_epochs
    rows[-1]["seed_over_extraction"] = ratio([passes * value for value in taken["vit_epoch"]], taken["extraction"])
    task = {"images": count, "model": extractor.name, "device": extractor.device.type, "batch": batch}
    return task | {"workers": args.workers, "epochs of one seed": passes}, rows


def columns(row: dict) -> dict[str, object]:
    """A row of the table."""
    cells = {"part": row["part"], "seconds": shown(row["seconds"], 3), "img/s": shown(row["images_per_second"], 1)}
    cells["/ bare forward"] = shown(row["speed_over_bare_forward"])
    cells["by processor time"] = shown(row["by_processor_time"])
    seed = row.get("seed_over_extraction")
    return cells | {"seed / extraction": shown(seed, 1) if seed else ""}


if __name__ == "__main__":
    parser = new_parser(__doc__)
    parser.add_argument("--data-root", required=True, metavar="DIR", help="folder of domain folders of class folders")
    parser.add_argument("--vit-model", required=True, metavar="ID_OR_DIR", help="hub name or local directory")
    parser.add_argument(
        "--images",
        type=positive,
        default=400,
        help="taken evenly (default 400); some of every class in every domain",
    )
    parser.add_argument("--workers", type=int, help="decoding processes (default: that of the project)")
    parser.add_argument("--batch-size", type=positive, help="images per forward pass (default: that of the project)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    sys.exit(run(parser, measure, columns))
