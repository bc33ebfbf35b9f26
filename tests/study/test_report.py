"""The finding and the report, on records that were made up."""

import re

import numpy as np
import pytest
from scipy import stats

from config import Settings
from study import finding, lodo_table
from study.report import report
from tests.factories import FAILED, HAND, make_records


def pairs(differences, domains=("a", "b", "c")):
    """Records whose differences, averaged over domains, are as given."""
    base = [0.5 + 0.1 * seed for seed in range(len(differences))]
    better = [b + d for b, d in zip(base, differences, strict=True)]
    return make_records({"erm": dict.fromkeys(domains, base), "importance": dict.fromkeys(domains, better)})


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([0.02, 0.03, 0.04], "Importance masking helps here"),
        ([-0.02, -0.03, -0.04], "Importance masking hurts here"),
        ([-0.02, 0.03, 0.01], "No difference is shown"),
        ([0.0, 0.0, 0.0], "No difference is shown"),
        ([-0.01, -0.05], "No difference is shown"),
        ([0.01, 0.05], "No difference is shown"),  # t with one degree of freedom is 12.7
    ],
)
def test_three_verdicts(differences, verdict):
    text = finding(pairs(differences))
    assert text.startswith(verdict)
    mean = np.mean(differences)
    low, high = (
        stats.t.interval(0.95, len(differences) - 1, loc=mean, scale=stats.sem(differences))
        if any(differences)
        else (0, 0)
    )
    numbers = [float(number) for number in re.findall(r"[-+]\d+\.\d\d", text)]
    assert numbers == pytest.approx([100 * mean, 100 * low, 100 * high], abs=0.0051)
    assert f"{len(differences)} seeds" in text
    assert "against erm" in text
    assert "3 held-out domains" in text


def test_the_finding_is_on_the_last_epoch_and_all_images():
    """Helps at the last epoch on all images; the other choices say the opposite."""
    records = pairs([0.02, 0.03, 0.04])
    for record in records:
        if record["algorithm"] == "importance":
            record["accuracy"] |= {"in": 0.0, "out": 0.0}
            record["balanced_accuracy"] = {"full": 0.0, "in": 0.0, "out": 0.0}
    opposite = [{**r, "selection": "val"} for r in pairs([-0.02, -0.03, -0.04])]
    assert finding(records + opposite).startswith("Importance masking helps here: +3.00 points")


@pytest.mark.parametrize(
    ("records", "words"),
    [
        (pairs([0.05]), ["One seed", "use more seeds"]),
        (make_records({"erm": {"a": [0.5, 0.6, 0.7]}, "importance": {"a": [None, 0.6, None]}}), ["2 others failed"]),
        (make_records({name: {"a": [None, 0.6], "b": [0.5, None]} for name in HAND}), ["No seed"]),
        (make_records({"erm": {"a": [0.5, 0.6]}, "importance": {"a": [None, None]}}), ["No seed"]),
    ],
    ids=["one", "one left", "none on all domains", "none"],
)
def test_too_few_seeds_give_no_verdict_and_the_reason(records, words):
    text = finding(records)
    assert all(word in text for word in words)
    assert not any(word in text for word in ("helps", "hurts", "shown", "nan"))
    assert ("use more seeds" in text) == ("use more seeds" in words)


@pytest.fixture
def about():
    """As `Results.read_settings` gives it."""
    settings = Settings.current()
    features = {
        "dataset": "toy",
        "fingerprint": "f1n6e2",
        "feature_size": 24,
        "model": {"name": "tiny-vit"},
        "preprocessing": {},
        "counts": {
            "art": {"dog": 3, "cat": 1},
            "photo": {"dog": 2, "cat": 2},
            "sketch": {"dog": 1, "cat": 7},
        },
    }
    return {"hash": settings.hash, "settings": settings.as_dict(), "features": features, "environments": []}


def section(text, title):
    """Lines from a title to the next empty line."""
    lines = text.split("\n")
    start = next(i for i, line in enumerate(lines) if line.startswith(title))
    return lines[start : lines.index("", start)]


def test_report(about):
    records = make_records(HAND, ("last", "val"))
    note = "Phase 1 trained on all images."
    records = [
        {**r, "note": note} if r["selection"] == "val" and r["algorithm"] == "importance" else r for r in records
    ]
    text = report(records, about, ["importance, holdout art, seed 4: the importance is all equal or not finite"])
    assert text.endswith("\n")
    assert "toy, tiny-vit, 24-d (fingerprint f1n6e2)" in text
    assert about["hash"] in text
    assert all(f"{name} = {value}" in text for name, value in about["settings"].items())
    assert finding(records) in text
    assert "Chance is 50.0 %" in text
    assert re.search(r"art: 75\.0\n.*photo: 50\.0\n.*sketch: 87\.5\n", text)
    assert text.count(note) == 1
    assert "1 network" in text
    assert "importance, holdout art, seed 4: the importance is all equal or not finite" in text


def test_the_tables_of_the_report(about):
    records = make_records(HAND, ("last", "val"))
    text = report(records, about)
    for title, choice in (
        ("Accuracy (%), all images of the held-out domain, last epoch", {}),
        ("Accuracy (%), its `in` part", {"part": "in"}),
        ("Balanced accuracy (%), all images", {"metric": "balanced_accuracy"}),
        ("Accuracy (%), all images of the held-out domain, epoch of best source validation", {"selection": "val"}),
    ):
        lines = section(text, title)
        table = lodo_table(records, **choice)
        for algorithm in ("erm", "importance"):
            (line,) = (line for line in lines if re.match(rf"{algorithm} +\d", line))
            cells = re.findall(r"\d+\.\d ± \d+\.\d", line)
            expected = table[table["algorithm"] == algorithm]
            means = [float(cell.split(" ± ")[0]) for cell in cells]
            assert means == pytest.approx((100 * expected["mean"]).tolist(), abs=0.051)
        assert any(re.match(r"\s+photo: -30\.00 \[-54\.84, -5\.16\], 3 seeds", line) for line in lines), lines


def test_the_report_says_nothing_of_notes_and_failures_where_there_are_none(about):
    text = report(make_records(HAND, ("last", "val")), about)
    assert "Note" not in text
    assert "failed" not in text


def test_the_report_without_a_named_model(about):
    about["features"]["model"] = None
    assert "toy, a model that is not named, 24-d" in report(make_records(HAND, ("last", "val")), about)


def test_the_report_of_one_seed(about):
    table = {name: {holdout: values[:1] for holdout, values in holdouts.items()} for name, holdouts in HAND.items()}
    text = report(make_records(table, ("last", "val")), about)
    assert "One seed gives no interval" in text
    assert " ± " not in text
    assert "nan" not in text


def test_the_report_of_networks_that_all_failed(about):
    records = make_records({name: {"art": [None] * 2, "photo": [None] * 2} for name in HAND}, ("last", "val"))
    text = report(records, about, ["erm, holdout art, seed 0: the loss is no longer finite in epoch 1"])
    assert "the loss is no longer finite in epoch 1" in text
    assert "nan" not in text
    assert text.count("  art: no seed") == 4


def test_the_report_names_the_hardest_domain(about):
    records = make_records(HAND, ("last", "val"))
    for record in records:
        if record["accuracy"] and record["algorithm"] == "erm" and record["holdout"] == "photo":
            record["accuracy"]["in"] = 0.0
    text = report(records, about)
    assert "The hardest domain is sketch." in section(text, "Accuracy (%), all images of the held-out domain, last")
    assert "The hardest domain is photo." in section(text, "Accuracy (%), its `in` part")
    alone = [record for record in records if record["holdout"] == "art"]
    assert "hardest" not in report(alone, about)


def test_the_report_is_the_same_for_the_same_records(about):
    records = make_records(FAILED, ("last", "val"))
    assert report(records, about) == report(records, about)
