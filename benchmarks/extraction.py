"""How close the extraction of features comes to the bare forward pass of the ViT.

Measures, one after the other and several times over, images per second of
- the bare forward pass, on random pixels that are in memory already;
- decoding alone: reading, decoding and resizing in this process;
- `features.extract` as users meet it, in an empty cache: check of all images, then decoding beside the forward pass;
- the same again, which finds the features in the cache.

Run:  python benchmarks/extraction.py --data-root DIR --vit-model DIR --output FILE.json
"""

import argparse
import dataclasses
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import InputError
from dataset import ImageDataset, find_dataset, load_image
from features import extract
from models import ViTFeatureExtractor


def main() -> int:
    """Parse, measure, print a table, write JSON; exit code 2 with one sentence on bad input."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", required=True, help="folder of domain folders of class folders")
    parser.add_argument("--vit-model", required=True, help="hub name or local directory")
    parser.add_argument("--images", type=int, default=600, help="number of images, evenly taken (default 600)")
    parser.add_argument("--repeats", type=int, default=3, help="times everything is measured (default 3)")
    parser.add_argument("--workers", type=int, help="decoding processes (default: that of the project)")
    parser.add_argument("--batch-size", type=int, help="images per forward pass (default: that of the project)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    try:
        if args.images < 1 or args.repeats < 1:
            raise InputError("--images and --repeats must be at least 1.")
        images = evenly(find_dataset(args.data_root), args.images)
        extractor = ViTFeatureExtractor.from_pretrained(args.vit_model).to(args.device)
        report = measure(images, extractor, args)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(table(report))
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def evenly(images: ImageDataset, count: int) -> ImageDataset:
    """`count` rows spread over the whole data set."""
    rows = torch.linspace(0, len(images) - 1, min(count, len(images))).long()
    files = tuple(images.files[row] for row in rows)
    return dataclasses.replace(images, files=files, labels=images.labels[rows], domains=images.domains[rows])


def measure(images: ImageDataset, extractor: ViTFeatureExtractor, args: argparse.Namespace) -> dict:
    """Seconds of each part, once per repeat, in turn: what else the machine does strikes all alike."""
    batch = args.batch_size or (256 if args.device.startswith("cuda") else 8)
    bare_forward(extractor, batch, batch * 4)  # the first passes are slower
    times = {"bare_forward": [], "decoding_alone": [], "extraction": [], "cache_hit": []}
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory() as cache:
            settings = {"batch_size": args.batch_size, "workers": args.workers, "progress": False}
            times["bare_forward"].append(bare_forward(extractor, batch, len(images)))
            times["decoding_alone"].append(timed(lambda: decode(images, extractor)))
            times["extraction"].append(timed(lambda c=cache, s=settings: extract(images, extractor, c, **s)))
            times["cache_hit"].append(timed(lambda c=cache, s=settings: extract(images, extractor, c, **s)))
    ratios = [bare / whole for bare, whole in zip(times["bare_forward"], times["extraction"], strict=True)]
    return {
        "images": len(images),
        "model": extractor.name,
        "batch_size": batch,
        "workers": args.workers,
        "seconds": times,
        "images_per_second": {name: len(images) / min(values) for name, values in times.items()},
        # Of throughputs; 1 = no overhead. Fastest against fastest: what else the machine did disturbs these least.
        "ratio_to_bare_forward": min(times["bare_forward"]) / min(times["extraction"]),
        "ratio_to_bare_forward_by_repeat": ratios,
        "ratio_to_bare_forward_median": statistics.median(ratios),
        "machine": {
            "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device,
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "system": platform.system(),
        },
        "versions": {name: version(name) for name in ("torch", "torchvision", "transformers", "pillow")},
    }


def timed(action) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def bare_forward(extractor: ViTFeatureExtractor, batch: int, count: int) -> float:
    """Seconds for `count` images of random pixels, made outside the timing."""
    size = extractor.preprocessing(load_blank()).shape
    pixels = torch.randint(0, 256, (batch, *size), dtype=torch.uint8).to(extractor.device)
    chunks = [pixels[: min(batch, count - start)] for start in range(0, count, batch)]
    return timed(lambda: [extractor(chunk).half().cpu() for chunk in chunks])


def load_blank():
    from PIL import Image

    return Image.new("RGB", (64, 64))


def decode(images: ImageDataset, extractor: ViTFeatureExtractor) -> None:
    for file in images.files:
        extractor.preprocessing(load_image(images.root / file))


def table(report: dict) -> str:
    """The report as text."""
    machine = report["machine"]
    lines = [
        f"{report['images']} images, {report['model']}, batch {report['batch_size']}, {machine['device']}, "
        f"{machine['cores']} cores, {machine['torch_threads']} threads",
        f"{'part':<16}{'img/s':>10}   seconds by repeat (img/s is of the fastest)",
    ]
    for name, values in report["seconds"].items():
        seconds = "  ".join(f"{value:.3f}" for value in values)
        lines.append(f"{name:<16}{report['images_per_second'][name]:>10.1f}   {seconds}")
    ratio, median = report["ratio_to_bare_forward"], report["ratio_to_bare_forward_median"]
    return "\n".join(
        [*lines, f"ratio to the bare forward pass: {ratio:.3f} (fastest), {median:.3f} (median of repeats)"]
    )


if __name__ == "__main__":
    sys.exit(main())
