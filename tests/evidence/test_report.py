"""The family_shown of the report, on made-up tables."""

from types import SimpleNamespace

import pandas as pd
import pytest
from scipy import stats

from config import Settings
from evidence.report import (
    cautions,
    controls_sentence,
    family_sentence,
    family_shown,
    length_sentence,
    overlap_sentence,
    probe_sentence,
)
from study import AVERAGE


def test_the_family_is_shown_in_points_with_the_corrected_p():
    numbers = {"mean": 0.0123, "low": -0.0045, "high": 0.02, "p": 0.01, "p_holm": 0.0601, "n": 17}
    shown = family_shown(pd.DataFrame([{"contrast": "a − b", **numbers, "verdict": "undecided"}]))
    assert shown.loc["a − b"].tolist() == ["+1.23 [−0.45, +2.00]", "0.06", 17, "undecided"]


def test_the_family_in_a_sentence_counts_verdicts_and_names_what_stands():
    verdicts = ["hurts", "helps", "no difference larger than 0.5 points", "undecided (about 9 seeds would decide)"]
    table = pd.DataFrame({"contrast": list("abcd"), "mean": [-0.1, 0.1, 0.0, 0.0], "verdict": verdicts})
    table["p_holm"] = [0.001, 0.06, 1.0, 1.0]
    assert family_sentence(table, 10) == (
        "At 10 epochs importance masking helps in 1, hurts in 1, makes no difference larger than 0.5 points in 1 and "
        "is undecided in 1 of 4 contrasts; after Holm's correction (p < 0.05) stand: a (below 0)."
    )
    assert family_sentence(table.assign(p_holm=1.0), 10).endswith("stand: none.")
    few = table.assign(p_holm=0.01, verdict="too few seeds (8; a verdict needs 10)")
    assert family_sentence(few, 10).endswith("stand: none.")


def test_the_other_controls_in_a_sentence():
    names = [f"importance{at} − {name}{at}" for name, at in (("frozen", ""), ("prune", "@phase1"), ("inverted", ""))]
    table = pd.DataFrame({"contrast": names, "mean": [0.01, -0.02, 0.0], "low": [0.005, -0.03, -0.01]})
    text = controls_sentence(table.assign(high=[0.015, -0.01, 0.01]), 10)
    assert "above frozen (+1.00 [+0.50, +1.50]) and below prune@phase1 (−2.00 [−3.00, −1.00]);" in text
    assert "inverted" not in text


def test_what_more_training_changes_in_a_sentence():
    held_out = pd.DataFrame({"erm": [-0.01, -0.03], "importance": [0.0, float("nan")]})
    sources = pd.DataFrame({"erm": [0.02, 0.02], "importance": [0.01, 0.03]})
    text = length_sentence(held_out, sources, (10, 30))
    low, high = (f"{x:+.2f}".replace("-", "−") for x in stats.t.interval(0.95, 1, -2, 1))
    assert f"(points): erm −2.00 [{low}, {high}] on the held-out domains, +2.00 [+2.00, +2.00] on the sources'" in text
    assert "importance +0.00 on the held-out domains" in text  # of one seed there is no interval


def test_overlap_between_starts_in_a_sentence():
    columns = {"by_position": [0.44, 0.46], "matched": [0.5, 0.504], "renamed": [0.4, 0.4], "chance": [0.43, 0.43]}
    assert overlap_sentence(pd.DataFrame(columns)) == (
        "A domain's masks from two starts overlap (IoU) by 0.44 to 0.46 by position and by 0.50 after matching units; "
        "0.40 where the matched units are renamed at random, 0.43 by chance."
    )


@pytest.mark.parametrize(
    ("full", "place"),
    [(0.72, "above the mean of every arm"), (0.68, "not above the mean of the best arm")],
    ids=["above", "not"],
)
def test_where_the_probe_stands(full, place):
    probe = pd.DataFrame({"full": [full - 0.1, full + 0.1], "in": [1.0, 1.0], "out": [0.0, 0.0]})
    rows = [("erm", "art", 0.99), ("erm", "average", 0.61), ("erm", "average without hardest", 0.9)]
    short = pd.DataFrame(rows, columns=["algorithm", "holdout", "mean"])
    rows = [("importance", "art", 0.1), ("importance", "average", 0.7), ("random", "average", float("nan"))]
    long = pd.DataFrame(rows, columns=["algorithm", "holdout", "mean"])
    assert probe_sentence(probe, {10: short, 30: long}) == (
        f"Logistic regression on the same features reaches {100 * full:.1f} %, {place}; "
        "the best arm (importance, 30 epochs) has 70.0 %."
    )


def test_a_classifier_far_below_a_linear_one_at_both_lengths_is_told_beside_what_did_not_learn():
    short = SimpleNamespace(warnings=lambda: ["of the networks"], run=SimpleNamespace(settings=Settings.current()))
    lengths = {"accuracy": 0.5, "accuracy_longer": 0.6}
    tables = {name: pd.DataFrame({"holdout": ["art", AVERAGE], "mean": [0.9, mean]}) for name, mean in lengths.items()}
    first, second = cautions(tables | {"linear_probe": pd.DataFrame({"full": [0.7]})}, short)
    assert first == "of the networks"
    assert "10.0 points" in second
    assert cautions(tables | {"linear_probe": pd.DataFrame({"full": [0.62]})}, short) == [first]
