"""Values as they are typed on the command line: text -> what it says, or an `ArgumentTypeError`."""

import argparse
import re
from itertools import chain, islice

import config


def names(text: str) -> list[str]:
    """A list of names, separated by commas."""
    found = [name.strip() for name in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError("a name in the list is empty")
    return found


def seeds(text: str) -> list[int]:
    """Seeds as they are typed: "N" is 0 … N-1, "100-199" a range, "0,3,7-9" a list of numbers and ranges."""
    parts = [re.fullmatch(r" *(\d{1,18}) *(?:- *(\d{1,18}) *)?", part) for part in text.split(",")]
    if not all(parts):
        raise argparse.ArgumentTypeError(f"'{text}' is neither N (seeds 0 to N-1) nor A-B nor a list such as 0,3,7-9")
    ranges = [range(int(part[1]), int(part[2] or part[1]) + 1) for part in parts]
    if text.strip().isdigit():
        ranges = [range(int(text))]
    if not all(ranges):
        raise argparse.ArgumentTypeError(f"there are no seeds in '{text}'")
    return [*islice(chain(*ranges), config.LIMITS["NUM_SEEDS"][1] + 1)]  # one too many is refused


def cuts(text: str) -> list[int]:
    """Cuts as they are typed: "0-6" or "0,2,4"; unlike seeds, "6" is the cut 6."""
    return seeds(f"{text}-{text}" if text.strip().isdigit() else text)


def classes(text: str) -> tuple[list[str], list[str]]:
    """Classes as they are typed: "A,B:C,D", two lists of names."""
    before, colon, after = text.partition(":")
    if not colon:
        raise argparse.ArgumentTypeError(f"'{text}' is not two lists of classes such as cat,dog:car,truck")
    return names(before), names(after)


def widths(text: str) -> list[int]:
    """Widths as they are typed: "10,32"; each as `HIDDEN_SIZES` allows."""
    found = cuts(text)
    for width in found:
        config.check("HIDDEN_SIZES", (width, width))
    return found


def densities(text: str) -> list[float]:
    """Densities of masks as they are typed, "60,10" or "60%,10%", in per cent."""
    try:
        found = [float(part.strip().removesuffix("%")) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of densities such as 60,10") from None
    for density in found:
        config.check("IMPORTANCE_THRESHOLD_PERCENTILE", density)
    return found


def amounts(text: str) -> list[float]:
    """Amounts of data as they are typed, "0.1%,50%" or "0.001,0.5", as shares."""
    try:
        return [
            float(part.strip().removesuffix("%")) / (100 if part.strip().endswith("%") else 1)
            for part in text.split(",")
        ]
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no list of shares such as 0.1%,50%") from None
