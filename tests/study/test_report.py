"""The finding and the report, on records that were made up."""

import re

import numpy as np
import pytest
from scipy import stats

from config import Settings
from study import bottleneck, finding, lodo_table, unlearned
from study.report import report
from tests.factories import HAND, make_records


def pairs(differences, domains=("a", "b", "c")):
    """Records whose differences, averaged over domains, are as given."""
    base = [0.5 + 0.01 * seed for seed in range(len(differences))]
    better = [b + d for b, d in zip(base, differences, strict=True)]
    return make_records({"erm": dict.fromkeys(domains, base), "importance": dict.fromkeys(domains, better)})


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([0.02, 0.03, 0.04, 0.03, 0.02] * 2, "Importance masking helps here"),
        ([-0.02, -0.03, -0.04, -0.03, -0.02] * 2, "Importance masking hurts here"),
        ([-0.02, 0.03, 0.01, 0.02, 0.0] * 2, "No difference is shown"),
        ([0.0] * 10, "No difference is shown"),
        ([0.02, 0.03, 0.04] * 3, "Too few seeds for a verdict (10 are needed)"),
        ([-0.01, -0.05], "Too few seeds for a verdict (10 are needed)"),
    ],
)
def test_three_verdicts(differences, verdict):
    text = finding(pairs(differences))
    assert text.startswith(verdict)
    mean, error = np.mean(differences), stats.sem(differences)
    low, high = stats.t.interval(0.95, len(differences) - 1, loc=mean, scale=error) if error else (0, 0)
    numbers = [float(number) for number in re.findall(r"[-+]\d+\.\d\d", text)]
    assert numbers == pytest.approx([100 * mean, 100 * low, 100 * high], abs=0.0051)
    assert f"{len(differences)} seeds" in text
    assert "against erm" in text
    assert "3 held-out domains" in text


def test_there_is_no_finding_without_the_arm_that_it_is_of():
    records = make_records({"erm": {"art": [0.5, 0.6, 0.7]}})
    assert "importance" in finding(records)
    assert "masked" in finding(records, "masked")


def test_the_finding_is_on_the_last_epoch_and_all_images():
    """Helps at the last epoch on all images; the other choices say the opposite."""
    records = pairs([0.02, 0.03, 0.04, 0.03] * 3)
    for record in records:
        if record["algorithm"] == "importance":
            record["accuracy"] |= {"in": 0.0, "out": 0.0}
            record["balanced_accuracy"] = {"full": 0.0, "in": 0.0, "out": 0.0}
    opposite = [{**r, "selection": "val"} for r in pairs([-0.02, -0.03, -0.04, -0.03] * 3)]
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
    counts = {"art": {"dog": 3, "cat": 1}, "photo": {"dog": 2, "cat": 2}, "sketch": {"dog": 1, "cat": 7}}
    features = {"dataset": "toy", "fingerprint": "f1n6e2", "feature_size": 24, "model": {"name": "tiny-vit"}}
    features |= {"preprocessing": {}, "counts": counts}
    return {"hash": settings.hash, "settings": settings.as_dict(), "features": features, "environments": []}


def section(text, title):
    """Lines from a title to the next empty line."""
    lines = text.split("\n")
    start = next(i for i, line in enumerate(lines) if line.startswith(title))
    return lines[start : lines.index("", start)]


def test_report(about):
    records = make_records(HAND, ("last", "val"))
    text = report(records, about)
    assert text.endswith("\n")
    assert "toy, tiny-vit, 24-d (fingerprint f1n6e2)" in text
    assert about["hash"] in text
    assert all(f"{name} = {value}" in text for name, value in about["settings"].items())
    assert finding(records) in " ".join(text.split())
    assert "Chance is 50.0 %" in text
    assert re.search(r"art: 75\.0\n.*photo: 50\.0\n.*sketch: 87\.5\n", text)
    assert "Note" not in text
    assert "failed" not in text
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


COUNTS = {"art": {"dog": 3, "cat": 1}, "photo": {"dog": 1, "cat": 3}}  # three in four are of the largest class


def test_networks_that_did_not_learn_are_named_with_the_settings_to_raise():
    trained = {"erm": 0.76, "importance": 0.5, "random": 0.9, "failed": float("nan")}
    (text,) = unlearned(trained, COUNTS, Settings.current(ph2_num_epochs=4))
    for words in ("(erm, importance)", "76.0 %", "75.0 %", "PH2_NUM_EPOCHS (now 4)", "PH2_LR_IMPORTANT (now 0.001)"):
        assert words in text
    assert unlearned({"erm": 0.8}, COUNTS, Settings.current()) == []
    assert "PH1_NUM_EPOCHS (now 10)" in unlearned({"Phase 1": 0.1}, COUNTS, Settings.current(), "PH1_NUM_EPOCHS")[0]


def test_a_linear_probe_far_above_every_network_says_that_the_classifier_is_the_bottleneck():
    (text,) = bottleneck(0.5, 0.6, Settings.current())
    for words in ("10.0 points", "PH2_NUM_EPOCHS (now 10)", "HIDDEN_SIZES (now [10, 10, 10, 10, 10])"):
        assert words in text
    for probe in (0.54, 0.4, float("nan")):
        assert bottleneck(0.5, probe, Settings.current()) == []


def test_the_report_names_notes_failures_and_the_hardest_domain(about):
    records, note = make_records(HAND, ("last", "val")), "Phase 1 trained on all images."
    for record in records:
        if record["selection"] == "val" and record["algorithm"] == "importance":
            record["note"] = note
        if record["algorithm"] == "erm" and record["holdout"] == "photo":
            record["accuracy"]["in"] = 0.0
    text = report(records, about, ["importance, holdout art, seed 4: the importance is all equal or not finite"])
    assert text.count(note) == 1
    assert "1 network" in text
    assert "importance, holdout art, seed 4: the importance is all equal or not finite" in text
    assert "The hardest domain is sketch." in section(text, "Accuracy (%), all images of the held-out domain, last")
    assert "The hardest domain is photo." in section(text, "Accuracy (%), its `in` part")


def test_the_report_of_one_seed_and_one_holdout_of_a_model_without_a_name(about):
    about["features"]["model"] = None
    records = make_records({name: {"art": holdouts["art"][:1]} for name, holdouts in HAND.items()}, ("last", "val"))
    text = report(records, about)
    assert "toy, a model that is not named, 24-d" in text
    assert "One seed gives no interval" in text
    assert not re.search(r"\d ± \d|nan|hardest", text)


def test_the_report_of_networks_that_all_failed(about):
    records = make_records({name: {"art": [None] * 2, "photo": [None] * 2} for name in HAND}, ("last", "val"))
    text = report(records, about, ["erm, holdout art, seed 0: the loss is no longer finite in epoch 1"])
    assert "the loss is no longer finite in epoch 1" in text
    assert "nan" not in text
    assert text.count("  art: no seed") == 4
