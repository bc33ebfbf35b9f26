"""Small records and arrays, as a run writes them."""

from pathlib import Path

import torch

from records import record_key

ROOT = Path(__file__).resolve().parent.parent
FEATURES = {"fingerprint": "abc", "dataset": "toy", "counts": {"art": {"dog": 2}}}
MACHINE = {"versions": {"torch": "2"}, "device": "cpu", "threads": 1, "commit": None}
KINDS = ("weights", "histories", "importance")
IDENTITY = {
    "features": "abc",
    "algorithm": "erm",
    "settings": "123",
    "holdout": "art",
    "seed": 0,
    "selection": "last",
}


def make_record(**changes):
    identity = {**IDENTITY, **changes}
    return {"key": record_key(identity), **identity, "accuracy": {"full": 0.5}, "failed": None}


def everything(folder):
    """Path below `folder` -> bytes, without the lock."""
    files = [path for path in Path(folder).rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def arrays_for(seeds, offset=0.0):
    """Arrays of several types, whose rows tell which seed they are of."""
    number = torch.tensor(seeds)
    return {
        "layers.1.weight": torch.stack([torch.arange(6.0).view(2, 3) + 10 * s + offset for s in seeds]),
        "mask": torch.stack([torch.arange(4) % 2 == s % 2 for s in seeds]),
        "failed": number * 100,
        "loss": number.double() / 7 + offset,
    }
