"""How close the extraction of features comes to the bare forward pass of the ViT.

Measures, one after the other and several times over, images per second of
- the bare forward pass, on random pixels that are in memory already;
- decoding alone: reading, decoding and resizing in this process;
- `features.extract` as users meet it, in an empty cache: check of all images, then decoding beside the forward pass;
- the same again, which finds the features in the cache;
- an epoch of training that runs the ViT again: decoding, forward pass and a step of the classifier, batch by batch.

From the last, hours of one seed of the whole experiment are extrapolated, had it no cache: see `without_cache`.

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

import config
from config import InputError
from dataset import ImageDataset, find_dataset, load_image
from features import extract
from models import FeedforwardClassifier, ViTFeatureExtractor


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
        whole = find_dataset(args.data_root)
        images = evenly(whole, args.images)
        extractor = ViTFeatureExtractor.from_pretrained(args.vit_model).to(args.device)
        report = measure(images, extractor, args, len(whole))
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


def measure(images: ImageDataset, extractor: ViTFeatureExtractor, args: argparse.Namespace, total: int) -> dict:
    """Seconds of each part, once per repeat, in turn: what else the machine does strikes all alike."""
    batch = args.batch_size or (256 if args.device.startswith("cuda") else 8)
    bare_forward(extractor, batch, batch * 4)  # the first passes are slower
    times = {"bare_forward": [], "decoding_alone": [], "extraction": [], "cache_hit": [], "vit_epoch": []}
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory() as cache:
            settings = {"batch_size": args.batch_size, "workers": args.workers, "progress": False}
            times["bare_forward"].append(bare_forward(extractor, batch, len(images)))
            times["decoding_alone"].append(timed(lambda: decode(images, extractor)))
            times["extraction"].append(timed(lambda c=cache, s=settings: extract(images, extractor, c, **s)))
            times["cache_hit"].append(timed(lambda c=cache, s=settings: extract(images, extractor, c, **s)))
        times["vit_epoch"].append(timed(lambda: vit_epoch(images, extractor)))
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
        "without_cache": without_cache(times, len(images), total),
        "machine": {
            "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device,
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "system": platform.system(),
        },
        "versions": {name: version(name) for name in ("torch", "torchvision", "transformers", "pillow")},
    }


def vit_epoch(images: ImageDataset, extractor: ViTFeatureExtractor) -> None:
    """An epoch of Phase 1 or 2 as it is without a cache: one network, batches of 32."""
    network = FeedforwardClassifier(extractor.feature_size, len(images.class_names)).to(extractor.device)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for rows in torch.randperm(len(images)).split(config.BATCH_SIZE):
        pixels = torch.stack([extractor.preprocessing(load_image(images.root / images.files[row])) for row in rows])
        features, labels = extractor(pixels).clone(), images.labels[rows].to(extractor.device)
        loss = torch.nn.functional.cross_entropy(network(features), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def without_cache(times: dict[str, list[float]], measured: int, total: int) -> dict:
    """What one seed of the experiment takes if every epoch runs the ViT, extrapolated from the measured epochs."""
    epochs = config.PH1_NUM_EPOCHS + 3 * (1 - config.OUT_FRACTION) * config.PH2_NUM_EPOCHS
    ratios = [epochs * again / once for again, once in zip(times["vit_epoch"], times["extraction"], strict=True)]
    return {
        "note": "EXTRAPOLATED linearly from an epoch over the images measured: training only (no validation, no test), "
        "one algorithm, one seed, each of four domains held out in turn; Phase 1 sees every image, in Phase 2 it is in "
        "the `in` part of three of the four holdouts. Compared with one extraction; what follows it takes seconds.",
        "passes_over_all_images": epochs,
        "hours": epochs * statistics.median(times["vit_epoch"]) * total / measured / 3600,
        "extraction_hours": statistics.median(times["extraction"]) * total / measured / 3600,
        "speedup": statistics.median(ratios),
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
    lines.append(f"ratio to the bare forward pass: {ratio:.3f} (fastest), {median:.3f} (median of repeats)")
    again = report["without_cache"]
    lines.append(
        f"one seed with the ViT in every epoch: {again['hours']:.1f} h (extrapolated), one extraction: "
        f"{again['extraction_hours']:.2f} h, {again['speedup']:.0f} times less"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
