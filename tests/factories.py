"""What several test files make: small features, runs, records and files of results."""

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import ViTConfig, ViTModel

from config import Settings
from engine import SplitFeatures
from models import BackboneTail
from storage import FeatureSet, load_features, record_key, save_features
from study import Execution, Run

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("weights", "histories", "importance")
FEATURES = {
    "fingerprint": "abc",
    "dataset": "toy",
    "feature_size": 8,
    "model": None,
    "counts": {"art": {"dog": 2}},
}
MACHINE = {"versions": {"torch": "2"}, "device": "cpu", "threads": 1, "commit": None}
IDENTITY = {
    "features": "abc",
    "algorithm": "erm",
    "settings": "123",
    "holdout": "art",
    "seed": 0,
    "selection": "last",
}
SMALL = Settings.current(hidden_sizes=(6, 5, 4), ph1_num_epochs=2, ph2_num_epochs=3, ph2_freeze_epoch=2)
LEARNING = replace(SMALL, ph1_learning_rate=0.02, ph2_lr_important=0.02)  # in so few epochs networks still differ
QUIET = Execution(progress=False)


def blobs(domains=("art", "photo", "sketch"), classes=("cat", "dog", "owl"), per_cell=20, size=8, seed=0):
    """Classes are Gaussian blobs, shifted a little from domain to domain; attributes as a `FeatureSet` has them."""
    generator = torch.Generator().manual_seed(seed)
    d, c = (t.flatten() for t in torch.meshgrid(torch.arange(len(domains)), torch.arange(len(classes)), indexing="ij"))
    domain, label = d.repeat_interleave(per_cell), c.repeat_interleave(per_cell)
    centres = 2 * torch.randn(len(classes), size, generator=generator)
    shifts = 0.5 * torch.randn(len(domains), size, generator=generator)
    x = centres[label] + shifts[domain] + torch.randn(len(label), size, generator=generator)
    files = tuple(f"{domains[i]}/{classes[j]}/{k:04d}.png" for k, (i, j) in enumerate(zip(domain, label, strict=True)))
    names = {"files": files, "class_names": tuple(classes), "domain_names": tuple(domains)}
    return SimpleNamespace(features=x, labels=label, domains=domain, **names, tokens=None, tail=None)


def split_blobs(dtype=torch.float64, settings=None, **kinds) -> SplitFeatures:
    """`blobs` with their in/out split, ready to be trained on."""
    made = blobs(**kinds)
    made.features = made.features.to(dtype)
    return SplitFeatures.from_features(made, settings or Settings.current(), dtype=dtype)


def save_blobs(path, dataset="blobs", **kinds) -> FeatureSet:
    """`blobs` as a feature file at `path`, loaded again."""
    d = blobs(**kinds)
    save_features(path, d.features.half(), d.labels, d.domains, d.class_names, d.domain_names, d.files, dataset=dataset)
    return load_features(path)


def token_blobs(domains=("art", "photo", "sketch"), per_cell=10, tokens=5) -> FeatureSet:
    """Features with tokens before the last block of a tiny ViT: a class shows in all tokens, a domain shifts them."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 16}
    model = ViTModel(ViTConfig(**sizes), add_pooling_layer=False).eval()
    tail = BackboneTail(model.layers, [((None,), {})], model.layernorm, torch.nn.Identity())
    d = blobs(domains, per_cell=per_cell, size=12)
    spread = 0.3 * torch.randn(len(d.labels), tokens, 12, generator=torch.Generator().manual_seed(1))
    seen = (d.features[:, None] + spread).half()
    with torch.no_grad():
        features = tail(seen.float()).half()
    counts = {domain: dict.fromkeys(d.class_names, per_cell) for domain in domains}
    about = {"blocks": 1, "tokens": tokens, "type": "float16"}
    header = {"dataset": "blobs", "counts": counts, "model": {"name": "tiny", "weights_sha256": "1"}, "tokens": about}
    names = tuple(d.class_names), tuple(d.domain_names), d.files
    return FeatureSet(features, d.labels, d.domains, *names, header, "made up", seen, tail)


def make_run(features, directory, seeds=4, settings=SMALL, holdouts=None, execution=QUIET) -> Run:
    """A small run without progress bars; `seeds` may be a number."""
    return Run(features, settings, directory, range(seeds) if isinstance(seeds, int) else seeds, holdouts, execution)


def stored_record(**changes):
    """A record as `Results` keeps it, with its key."""
    identity = {**IDENTITY, **changes}
    shares = dict.fromkeys(("full", "in", "out"), 0.5)
    accuracies = dict.fromkeys(("accuracy", "balanced_accuracy"), shares)
    return {"key": record_key(identity), **identity, **accuracies, "failed": None}


def everything(folder):
    """Path below `folder` -> bytes, without the lock."""
    files = [path for path in Path(folder).rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def dated(folder):
    """Path below `folder` -> content and time of change, without the lock: equal if nothing was written."""
    return {path: (content, (Path(folder) / path).stat().st_mtime_ns) for path, content in everything(folder).items()}


def wait_until(condition):
    """Wait a minute at most."""
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.02)
    pytest.fail("waited in vain")


def arrays_for(seeds, offset=0.0):
    """Arrays of several types, whose rows tell which seed they are of."""
    number = torch.tensor(seeds)
    return {
        "layers.1.weight": torch.stack([torch.arange(6.0).view(2, 3) + 10 * s + offset for s in seeds]),
        "mask": torch.stack([torch.arange(4) % 2 == s % 2 for s in seeds]),
        "failed": number * 100,
        "loss": number.double() / 7 + offset,
    }


def make_record(algorithm, holdout, seed, accuracy, selection="last"):
    """A record with made-up accuracies; those of other parts and the balanced one are shifted, so a mix-up shows."""

    def shifted(by):
        return {"full": accuracy + by, "in": accuracy + by + 0.01, "out": accuracy + by - 0.02}

    return {
        "key": f"{algorithm}/{holdout}/{seed}/{selection}",
        "algorithm": algorithm,
        "dataset": "toy",
        "features": "abc",
        "holdout": holdout,
        "seed": seed,
        "selection": selection,
        "settings": "123",
        "accuracy": None if accuracy is None else shifted(0),
        "balanced_accuracy": None if accuracy is None else shifted(-0.05),
        "epoch": None if accuracy is None else 10,
        "failed": "the loss is no longer finite in epoch 2" if accuracy is None else None,
    }


def make_records(table, selections=("last",)):
    """From {algorithm: {holdout: accuracies by seed}}; under "val" everything is 0.03 lower."""
    drop = {"last": 0, "val": 0.03}
    return [
        make_record(algorithm, holdout, seed, None if value is None else value - drop[selection], selection)
        for selection in selections
        for algorithm, holdouts in table.items()
        for holdout, values in holdouts.items()
        for seed, value in enumerate(values)
    ]


# erm is worst on sketch (0.5), importance on photo (0.3).
HAND = {
    "erm": {"art": [0.9, 0.8, 0.7], "photo": [0.5, 0.7, 0.6], "sketch": [0.6, 0.4, 0.5]},
    "importance": {"art": [0.95, 0.85, 0.9], "photo": [0.3, 0.4, 0.2], "sketch": [0.9, 0.9, 0.9]},
}
FAILED = {**HAND, "importance": {**HAND["importance"], "photo": [0.3, None, 0.2]}}


def row(table, algorithm, holdout):
    """The one row of a tidy table."""
    found = table[(table["algorithm"] == algorithm) & (table["holdout"] == holdout)]
    assert len(found) == 1
    return found.iloc[0]


def assert_interval(found, values):
    """Row of n, mean, low, high against scipy's own interval for the values."""
    mean, error = sum(values) / len(values), np.std(values, ddof=1) / len(values) ** 0.5
    low, high = stats.t.interval(0.95, len(values) - 1, loc=mean, scale=error) if error > 0 else (mean, mean)
    assert found["n"] == len(values)
    assert [found["mean"], found["low"], found["high"]] == pytest.approx([mean, low, high], abs=1e-12)
