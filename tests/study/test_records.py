"""Records, from right answers that were counted by hand."""

import pytest
import torch

from storage import record_key
from study import SELECTIONS, Counted, make_records
from tests.factories import SMALL, make_run

SHAPE = (2, 3, 3, 2, 3)  # seeds, epochs, domains, in/out, classes


@pytest.fixture
def run(data, tmp_path):
    return make_run(data, tmp_path, [4, 7])  # 24 images `in` and 6 `out` of each class and domain


def counted(failed=(0, 0)):
    correct = torch.zeros(SHAPE, dtype=torch.long)
    correct[:, 1, 1, 0] = torch.tensor([24, 12, 0])  # epoch 2, photo: in
    correct[:, 1, 1, 1] = torch.tensor([6, 3, 3])  # out
    correct[1, 2, 1] = 6  # epoch 3, photo, seed 7: all of `out`, a quarter of `in`
    validation = torch.tensor([[0.1, 0.5, 0.5], [0.2, 0.7, 0.3]])
    return Counted((4, 7), validation, correct, torch.tensor(failed))


def test_records_by_hand(run):
    records = make_records(run, "mine", ["photo"], counted(), {"trial": 2, "hyperparameters": {"a": 1}})
    assert [(r["seed"], r["selection"]) for r in records] == [(s, name) for name in SELECTIONS for s in (4, 7)]
    four, seven, validated, _ = records
    assert [r["epoch"] for r in records] == [3, 3, 2, 2]  # of equal epochs the earliest
    assert [r["validation"] for r in records] == pytest.approx([0.5, 0.3, 0.5, 0.7])
    assert four["accuracy"] == {"full": 0, "in": 0, "out": 0}
    assert seven["accuracy"] == pytest.approx({"full": 36 / 90, "in": 18 / 72, "out": 1})
    assert validated["accuracy"] == pytest.approx({"full": 48 / 90, "in": 36 / 72, "out": 12 / 18})
    assert validated["balanced_accuracy"] == pytest.approx({"full": 48 / 90, "in": 36 / 72, "out": 12 / 18})
    for record in records:
        assert record["key"] == record_key(record)
        assert (record["algorithm"], record["holdout"], record["sources"]) == ("mine", "photo", ["art", "sketch"])
        assert (record["settings"], record["features"]) == (SMALL.hash, run.features.fingerprint)
        assert (record["trial"], record["failed"]) == (2, None)
        assert "note" not in record
    assert len({record["key"] for record in records}) == 4


def test_with_two_holdouts_the_accuracies_are_those_on_the_first(run):
    first, second = (make_records(run, "mine", pair, counted()) for pair in (["photo", "art"], ["art", "photo"]))
    assert (first[2]["holdout"], second[2]["holdout"]) == ("photo+art", "art+photo")
    assert first[2]["sources"] == second[2]["sources"] == ["sketch"]
    assert first[2]["accuracy"]["full"] == pytest.approx(48 / 90)
    assert second[2]["accuracy"]["full"] == 0


@pytest.mark.parametrize(("code", "why"), [(2, "epoch 2"), (-1, "importance")])
def test_a_failed_network_has_no_numbers(run, code, why):
    four, seven, *_ = make_records(run, "mine", ["photo"], counted(failed=(0, code)))
    assert four["failed"] is None
    assert why in seven["failed"]
    assert [seven[name] for name in ("accuracy", "balanced_accuracy", "validation", "epoch")] == [None] * 4


def test_masks_that_saw_validation_images_are_noted_where_validation_selects(run):
    noted = [("note" in r, r["selection"]) for r in make_records(run, "mine", ["photo"], counted(), peeked=True)]
    assert noted == [(False, "last")] * 2 + [(True, "val")] * 2
