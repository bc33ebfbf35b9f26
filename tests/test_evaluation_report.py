"""Tables to read, statistics of masks, confusion, and the report."""

import re

import numpy as np
import pandas as pd
import pytest
import torch
from made_up_records import FAILED, HAND, make_records
from sklearn.metrics import confusion_matrix

from config import Settings
from evaluation import (
    AVERAGE,
    WITHOUT_HARDEST,
    confusion,
    finding,
    levels,
    lodo_table,
    overlap_table,
    report,
    statistics_table,
    wide_table,
)
from models import FeedforwardClassifier
from training import Problem

# --- for reading --------------------------------------------------------------------------------------------


def test_wide_table_text():
    tidy = pd.DataFrame(
        [
            ("erm", "sketch", 3, 0.71234, 0.70234, 0.72234),
            ("erm", "art", 3, 0.5, 0.475, 0.525),
            ("importance", "sketch", 1, 0.666, np.nan, np.nan),
            ("importance", "art", 2, 1.0, 1.0, 1.0),
        ],
        columns=["algorithm", "holdout", "n", "mean", "low", "high"],
    )
    wide = wide_table(tidy)
    assert wide.index.tolist() == ["erm", "importance"]
    assert wide.columns.tolist() == ["sketch", "art"]  # in the order of the table
    assert wide.loc["erm"].tolist() == ["71.2 ± 1.0", "50.0 ± 2.5"]
    assert wide.loc["importance"].tolist() == ["66.6", "100.0 ± 0.0"]


def test_wide_table_ends_with_the_averages():
    columns = wide_table(lodo_table(make_records(HAND))).columns.tolist()
    assert columns == ["art", "photo", "sketch", AVERAGE, WITHOUT_HARDEST]


def test_levels():
    chance, majority = levels({"art": {"dog": 3, "cat": 1, "bee": 0}, "photo": {"dog": 2, "cat": 2, "bee": 2}})
    assert chance == pytest.approx(1 / 3)
    assert majority == {"art": 0.75, "photo": pytest.approx(1 / 3)}


# --- importance and masks -------------------------------------------------------------------------------------


def test_statistics_table_by_hand_and_without_the_networks_that_say_nothing():
    moved = [torch.tensor([[[0.0, 1.0]], [[2.0, 3.0]], [[0.0, 0.0]]]), torch.tensor([[[5.0]], [[4.0]], [[0.0]]])]
    mask = [
        torch.tensor([[[False, True]], [[False, False]], [[False] * 2]]),
        torch.tensor([[[True]], [[True]], [[False]]]),
    ]
    table = statistics_table(moved, mask)  # the third of three seeds moved nothing
    assert table.index.tolist() == ["1", "2", "overall"]
    assert table["weights"].tolist() == [2, 1, 3]
    assert table["mean"].tolist() == pytest.approx([(0.5 + 2.5) / 2, 4.5, (2 + 3) / 2])
    assert table["std"].tolist() == pytest.approx([0.5, 0, (np.std([0, 1, 5]) + np.std([2, 3, 4])) / 2])
    assert table["min"].tolist() == [1, 4.5, 1]
    assert table["max"].tolist() == [2, 4.5, 4.5]
    assert table["marked"].tolist() == [0.5, 1, 1.5]
    assert table["density"].tolist() == pytest.approx([0.25, 1, (2 / 3 + 1 / 3) / 2])
    assert table["zero"].tolist() == [0.5, 0, 0.5]
    assert table["marked_zero"].tolist() == [0, 0, 0]


def marked(*networks):
    """Masks of one layer 1×6, from the positions marked in each network."""
    mask = torch.zeros(len(networks), 1, 6, dtype=torch.bool)
    for s, positions in enumerate(networks):
        mask[s, 0, list(positions)] = True
    return [mask]


def test_overlap_table_by_hand():
    table, chance = overlap_table(
        {"a": marked((0, 1), (0, 1)), "b": marked((0, 1), (1, 2)), "c": marked((4, 5), (0, 5))}
    )
    assert table.index.tolist() == table.columns.tolist() == ["a", "b", "c"]
    expected = [[1, (1 + 1 / 3) / 2, 1 / 6], [(1 + 1 / 3) / 2, 1, 0], [1 / 6, 0, 1]]
    np.testing.assert_allclose(table.to_numpy(), expected)
    # 2 of 6 marked twice: 15 pairs of positions, 1 of them shared whole, 8 by half, 6 not at all
    assert chance == pytest.approx((1 * 1 + 8 / 3) / 15)


def test_overlap_table_leaves_out_networks_without_a_mask():
    """The mask of a failed network is empty; two such are no agreement, and one is no disagreement."""
    table, chance = overlap_table({"a": marked((0, 1), ()), "b": marked((1, 2), ()), "c": marked((0, 1), (3, 4))})
    np.testing.assert_allclose(table.to_numpy(), [[1, 1 / 3, 1], [1 / 3, 1, 1 / 3], [1, 1 / 3, 1]])
    assert chance == pytest.approx((1 * 1 + 8 / 3) / 15)


# --- confusion ----------------------------------------------------------------------------------------------

HIDDEN = (5, 6)


@pytest.fixture
def problem():
    """Two domains, three classes, of which "photo" has no image of the second."""
    g = torch.Generator().manual_seed(0)
    domains = torch.tensor([0, 1] * 30)
    labels = torch.randint(0, 3, (60,), generator=g)
    labels[(domains == 1) & (labels == 1)] = 2
    features = torch.randn(60, 4, generator=g) + labels.unsqueeze(1)
    inside = torch.rand(60, generator=g) < 0.8
    return Problem(features, labels, domains, inside, ("dog", "cat", "bee"), ("art", "photo"))


def networks(seeds):
    """Networks as modules, and as the arrays of a weights file, with starts that must not be used."""
    modules = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        modules.append(FeedforwardClassifier(4, 3, HIDDEN))
        for p in modules[-1].parameters():
            p.data *= 3
    names = [name for name, _ in modules[0].named_parameters()]
    arrays = {f"final.{n}": torch.stack([m.get_parameter(n).detach() for m in modules]) for n in names}
    arrays |= {f"start.{n}": torch.zeros_like(arrays[f"final.{n}"]) for n in names}
    return modules, {"seeds": torch.arange(seeds), **arrays}


def answers(module, features):
    weights = [p.detach().double().numpy() for p in module.parameters()]
    hidden = np.maximum(features.double().numpy() @ weights[0].T + weights[1], 0)
    hidden = np.maximum(hidden @ weights[2].T + weights[3], 0)
    return (hidden @ weights[4].T + weights[5]).argmax(1)


@pytest.mark.parametrize("holdout", ["art", "photo"])
def test_confusion_is_summed_over_seeds_and_all_images_of_the_domain(problem, holdout):
    modules, arrays = networks(3)
    rows = problem.domains == problem.domain_names.index(holdout)
    expected = np.zeros((3, 3), int)
    for module in modules:
        for true, predicted in zip(problem.labels[rows], answers(module, problem.features[rows]), strict=True):
            expected[true, predicted] += 1
    found = confusion(problem, holdout, arrays, HIDDEN, torch.tensor([True] * 3))
    assert found.shape == (3, 3)
    assert (found == expected).all()
    assert found.sum() == 3 * int(rows.sum())
    assert (found != found.T).any()  # else rows and columns could be swapped unseen
    if holdout == "photo":
        assert (found[1] == 0).all()


def test_confusion_leaves_out_networks_that_failed(problem):
    modules, arrays = networks(3)
    rows = problem.domains == 0
    sound = [answers(modules[i], problem.features[rows]) for i in (0, 2)]
    expected = confusion_matrix(np.tile(problem.labels[rows].numpy(), 2), np.concatenate(sound), labels=[0, 1, 2])
    assert (confusion(problem, "art", arrays, HIDDEN, torch.tensor([True, False, True])) == expected).all()


def test_confusion_of_networks_that_all_failed_is_empty(problem):
    _, arrays = networks(2)
    none = torch.tensor([False, False])
    assert (confusion(problem, "art", arrays, HIDDEN, none) == np.zeros((3, 3))).all()


# --- report -------------------------------------------------------------------------------------------------


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
    assert text.count("art: no seed whose networks are sound") == 4


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
