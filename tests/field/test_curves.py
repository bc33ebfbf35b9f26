"""The table of curves: what it keeps, and what it refuses."""

import itertools
import random

import numpy as np
import pandas as pd
import pytest

from config import InputError
from field import curves_of

DOMAINS = ("art", "cartoon", "photo")
NAN = float("nan")


def make_rows(seed=0, holdouts=(("art",), ("art", "photo"))):
    """Two algorithms, two trials, two epochs."""
    draw = random.Random(seed)
    keys = ("algorithm", "trial", "holdouts", "seed", "epoch", "domain")
    runs = itertools.product(("B", "A"), (0, 1), holdouts, (3, 1), (1, 2), DOMAINS)
    return [
        dict(zip(keys, run, strict=True)) | {"step": 5} | {part: draw.random() for part in ("in", "out", "full")}
        for run in runs
    ]


def test_curves_keep_the_rows_and_drop_other_columns():
    rows = [{**row, "more": 1, "holdouts": list(row["holdouts"])} for row in make_rows()]
    for given in (iter(rows), pd.DataFrame(rows)):
        curves = curves_of(given)
        assert list(curves)[:7] == ["algorithm", "trial", "holdouts", "seed", "epoch", "step", "domain"]
        assert list(curves)[7:] == ["in", "out", "full"]
        assert curves["holdouts"].tolist() == [tuple(row["holdouts"]) for row in rows]
        np.testing.assert_array_equal(curves["full"], [row["full"] for row in rows])


BREAK = {
    "no runs": lambda rows: rows.clear(),
    "column 'out'": lambda rows: [row.pop("out") for row in rows],
    "two accuracies": lambda rows: rows.append(rows[0]),
    "domain is missing": lambda rows: rows.pop(),
    r"\[0, 1\]": lambda rows: rows[0].update(full=66.9),
    "NaN": lambda rows: rows[0].update({"out": NAN}),
    "NaN throughout": lambda rows: [row.update({"in": NAN, "out": NAN}) for row in rows if row["epoch"] == 2],
    "one or two of art, cartoon, photo": lambda rows: [row.update(holdouts=DOMAINS) for row in rows],
    r"\('sketch',\)": lambda rows: [row.update(holdouts=("sketch",)) for row in rows if row["holdouts"] == ("art",)],
    "both orders": lambda rows: [row.update(holdouts=("photo", "art")) for row in rows if len(row["holdouts"]) == 1],
}


@pytest.mark.parametrize("message", BREAK)
def test_invalid_curves_are_refused(message):
    rows = make_rows()
    curves_of(rows)
    BREAK[message](rows)
    with pytest.raises(InputError, match=message):
        curves_of(rows)
