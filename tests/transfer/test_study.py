"""The study as a whole on tiny images: what is on disk, that it is paired, resumed, and the same every time."""

import json

import numpy as np
import pytest
import torch

from config import InputError
from storage import Results
from study import Execution
from tests.factories import dated, everything
from transfer import ConvNetworks, Task, TransferSettings, TransferStudy, arms_of, long_table
from transfer.arms import bits
from transfer.images import image_set
from transfer.study import beginning

KINDS = ("scratch", "finetune", "frozen", "truncated", "moved")
NETWORKS = ConvNetworks(channels=4, depth=2)
SETTINGS = TransferSettings(60, 20, 16, 1e-2, NETWORKS.facts())


def make_task(per_class=40, classes=4, name="toy"):
    """Images whose classes differ in where they are bright."""
    rng = np.random.default_rng(0)
    labels = np.arange(per_class * classes) % classes
    images = rng.integers(0, 120, (len(labels), 1, 8, 8))
    for label in range(classes):
        images[labels == label, :, 2 * label : 2 * label + 2] += 100
    test = np.arange(len(labels)) >= len(labels) * 3 // 4
    return Task.of(name, image_set(name, images.astype(np.uint8), labels, test), (0, 1), target_classes=(2, 3))


@pytest.fixture(scope="module")
def task():
    return make_task()


@pytest.fixture
def study(task, tmp_path):
    """Makes one: (directory, repeats, …)."""

    def study(out="out", repeats=range(3), kinds=KINDS, amounts=(0.1, 1.0), settings=SETTINGS, **more):
        arms, execution = arms_of(kinds, range(3), NETWORKS.depth), Execution(progress=False)
        given = NETWORKS, settings, Results(tmp_path / out), arms, amounts, repeats
        return TransferStudy([more.pop("task", task)], *given, **more, execution=execution)

    return study


def test_records_hold_every_run_with_its_accuracies(study):
    made = study()
    made.train()
    records = made.records()
    assert len(records) == len(made.arms) * 2 * 3
    assert {(r["amount"], r["n"]) for r in records} == {(0.1, 6), (1.0, 60)}
    assert all(list(r["accuracy"]) == ["50", "60"] for r in records)
    table = long_table(records)
    assert len(table) == 2 * len(records)
    last = table[table["updates"] == 60].groupby(["arm", "amount"])["accuracy"].mean()
    assert last["finetune", 1.0] > 0.9  # the classes are easy
    assert (table["accuracy"] == table["balanced_accuracy"]).all()  # as many test images of each class


def test_what_is_kept_and_frozen_is_exactly_what_the_arm_says(study):
    """Each arm of a repeat starts from one fresh network and one pretrained network, whatever the cut."""
    made = study()
    made.train()
    (task,), examples = made.tasks, made.finetuning(made.tasks[0])
    fresh = {}
    for repeat, (before, after) in made.networks_of(task).items():
        for arm in made.arms:
            network = NETWORKS.outline(examples, arm.cut if arm.kind == "truncated" else None)
            start, freeze = beginning(NETWORKS, network, arm, before, after, repeat)
            keep = bits(arm, before, {name: after.get(name, value) for name, value in start.items()}, repeat)[0]
            for name, value in start.items():
                if name.startswith("convs."):
                    assert torch.equal(value[keep[name]], after[name][keep[name]])
                    kept = fresh.setdefault((repeat, name), value.clone())
                    both = ~keep[name] & (kept != after[name])
                    assert torch.equal(torch.where(both, value, kept), kept)
                    assert not (freeze[name] & ~keep[name]).any()
    assert len({tuple(after["convs.0.bias"].tolist()) for _, after in made.networks_of(task).values()}) == 3


def test_the_same_study_again_writes_nothing_and_elsewhere_the_same_bytes(study, tmp_path):
    study().train()
    before = dated(tmp_path / "out")
    study().train()
    assert dated(tmp_path / "out") == before
    study("again").train()
    assert everything(tmp_path / "out") == everything(tmp_path / "again")


def test_arms_amounts_and_repeats_can_be_added(study, tmp_path):
    whole = {"repeats": range(6), "kinds": ("scratch", "frozen", "truncated")}
    study("whole", **whole).train()
    study(repeats=range(4), kinds=("scratch",), amounts=(0.1,)).train()
    study(repeats=range(4), kinds=("scratch", "frozen")).train()
    study(**whole).train()
    found = [{r["key"]: r for r in Results(tmp_path / out).records()} for out in ("whole", "out")]
    assert found[0].keys() == found[1].keys()
    for key, record in found[0].items():  # trained beside others, which rounding may show
        other = found[1][key]
        assert {k: v for k, v in record.items() if "accuracy" not in k} == {
            k: v for k, v in other.items() if "accuracy" not in k
        }
        assert record["accuracy"] == pytest.approx(other["accuracy"], abs=0.051)


def test_a_study_that_was_stopped_goes_on_with_the_same_bytes(study, tmp_path, monkeypatch):
    options = {"repeats": range(7), "kinds": ("scratch", "frozen")}
    study("whole", **options).train()
    append, written = Results.append, []

    def stopped(self, records):
        append(self, records)
        written.append(len(records))
        if len(written) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Results, "append", stopped)
    with pytest.raises(KeyboardInterrupt):
        study(**options).train()
    monkeypatch.undo()
    study(**options).train()
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")


def test_other_settings_or_images_are_refused_by_name(study):
    study().train()
    with pytest.raises(InputError, match="TRANSFER_UPDATES = 60, not 70"):
        study(settings=TransferSettings(70, 20, 16, 1e-2, NETWORKS.facts()))
    with pytest.raises(InputError, match="features"):
        study(task=make_task(per_class=44))


def test_amounts_below_one_image_per_class_are_left_out_in_a_sentence(study):
    made = study(amounts=(0.01, 0.1))
    (sentence,) = made.left_out()
    assert "1 %" in sentence
    made.train()
    assert {r["amount"] for r in made.records()} == {0.1}


@pytest.mark.parametrize("amount", [0, 1.5, -1])
def test_amounts_are_shares(study, amount):
    with pytest.raises(InputError, match="amount"):
        study(amounts=(amount,))


def test_a_given_network_serves_all_repeats_where_nothing_asks_how_it_was_made(study):
    made = study("first")
    made.train()
    _, network = made.networks_of(made.tasks[0])[0]
    with pytest.raises(InputError, match="moved"):
        study("given", pretrained=network)
    given = study("given", pretrained=network, kinds=("scratch", "frozen", "random"))
    given.train()
    wanted = {
        r["repeat"]: r["accuracy"] for r in made.records() if (r["arm"], r["cut"], r["amount"]) == ("frozen", 2, 0.1)
    }
    found = {
        r["repeat"]: r["accuracy"] for r in given.records() if (r["arm"], r["cut"], r["amount"]) == ("frozen", 2, 0.1)
    }
    assert found[0] == wanted[0]  # the repeat that the network is of
    assert given.pretrained_accuracy(given.tasks[0]) is None


def test_a_network_for_other_images_is_refused(study):
    made = study("first", kinds=("scratch",), repeats=[0])
    made.train()
    _, network = made.networks_of(made.tasks[0])[0]
    network["convs.0.weight"] = network["convs.0.weight"].repeat(1, 3, 1, 1)  # of colour images
    with pytest.raises(InputError, match=r"convs\.0\.weight"):
        study("given", pretrained=network, kinds=("frozen",))


def test_a_run_that_is_no_longer_finite_is_recorded_as_failed(study):
    made = study(settings=TransferSettings(60, 1, 16, 1e30, NETWORKS.facts()), kinds=("scratch",))
    made.train()
    records = made.records()
    assert {r["failed"] for r in records} == {"the outputs are no longer finite after 50 updates"}
    assert {r["accuracy"] for r in records} == {None}
    table = long_table(records)
    assert table["accuracy"].isna().all()
    assert set(table["updates"]) == {60}


def test_the_report_is_written_of_all_that_is_there(study, tmp_path):
    study(repeats=range(2), kinds=("scratch", "frozen")).train()
    made = study(repeats=range(2), kinds=("finetune",))
    made.train()
    text = made.write()
    assert text == (tmp_path / "out" / "report.txt").read_text("utf-8")
    assert "frozen@1" in text
    assert "finetune" in text
    assert "Pretrained accuracy" in text
    counts = json.loads((tmp_path / "out" / "settings.json").read_text("utf-8"))["features"]["counts"]
    assert counts["toy, fine-tuning"] == {"2": 30, "3": 30}
    assert counts["toy, fine-tuning, test"] == {"2": 10, "3": 10}
