"""Whole studies on small data: what is written, what is trained again, what failures do."""

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import relu

from config import InputError
from engine import TrainingFailedError
from importance import aggregate, flatten, normalize, top_k_mask, weight_importance
from storage import Results
from study import ERM, IMPORTANCE, Arm, Execution, Study, paired_differences
from tests.factories import LEARNING, QUIET, everything, make_run, save_blobs

SETTINGS = LEARNING
IN_TWOS = Execution(progress=False, seeds_per_chunk=2)
DYING = replace(SETTINGS, hidden_sizes=(2, 2))  # the ReLUs of seed 1 are dead from the start of Phase 1
EXPLODING = replace(SETTINGS, ph1_learning_rate=1e38)


def trained(data, directory, arms=(ERM, IMPORTANCE), settings=SETTINGS, keep_weights=True, **options):
    study = Study(make_run(data, directory, settings=settings, **options), arms, keep_weights)
    study.train()
    return study


@pytest.fixture
def saved(monkeypatch):
    """Names of the files that are saved, in order."""
    names, save = [], Results.save

    def noted(self, kind, name, *arguments):
        names.append(f"{kind}/{name}")
        return save(self, kind, name, *arguments)

    monkeypatch.setattr(Results, "save", noted)
    return names


@pytest.mark.parametrize("cores", [1, 3])
def test_the_same_study_twice_gives_the_same_bytes_on_any_number_of_cores(data, finished, tmp_path, monkeypatch, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    trained(data, tmp_path)
    assert everything(tmp_path) == everything(finished.run.results.directory)


def test_files_are_named_by_phase_domain_holdout_and_arm(data, tmp_path):
    thin = Arm("importance", "phase1", {"IMPORTANCE_THRESHOLD_PERCENTILE": 30})
    trained(data, tmp_path, [ERM, IMPORTANCE, thin], seeds=1, holdouts=["photo"])
    arms = ("erm", "importance", "importance[IMPORTANCE_THRESHOLD_PERCENTILE=30]@phase1")
    trained_files = {"phase1_art", "phase1_sketch", *(f"phase2_photo_{arm}" for arm in arms)}
    expected = {f"weights/{name}.safetensors" for name in trained_files}
    expected |= {f"histories/{name}.npz" for name in trained_files}
    expected |= {f"importance/{name}.npz" for name in ("phase1_art", "phase1_sketch", "holdout_photo")}
    assert everything(tmp_path).keys() == expected | {"records.jsonl", "settings.json"}
    layers = {f"{kind}_{i}" for kind in ("initial", "final", "importance", "normalized", "mask") for i in (1, 2)}
    for name in ("phase1_art", "holdout_photo"):
        with np.load(tmp_path / "importance" / f"{name}.npz", allow_pickle=False) as file:
            assert set(file.files) == layers | {"seeds", "header"}


def test_a_study_without_weights_leaves_out_those_of_phase_2(data, tmp_path, saved):
    trained(data, tmp_path, seeds=1, keep_weights=False)
    assert {path.stem for path in (tmp_path / "weights").iterdir()} == {"phase1_art", "phase1_photo", "phase1_sketch"}
    saved.clear()
    trained(data, tmp_path, seeds=1, keep_weights=False)
    assert not saved
    trained(data, tmp_path, seeds=1)  # now they are wanted
    assert (tmp_path / "weights" / "phase2_art_erm.safetensors").is_file()


def test_records_say_what_the_networks_do(finished, data):
    records = finished.records()
    assert len(records) == 2 * 3 * 4 * 2  # arms, holdouts, seeds, selections
    assert len({r["key"] for r in records}) == len(records)
    wanted = {"algorithm": "importance", "holdout": "photo", "seed": 2, "selection": "last"}
    (record,) = (r for r in records if wanted.items() <= r.items())
    assert record["sources"] == ["art", "sketch"]
    assert (record["dataset"], record["features"], record["settings"]) == ("blobs", data.fingerprint, SETTINGS.hash)
    assert (record["epoch"], record["failed"]) == (3, None)
    # From the weights on disk, layer by layer.
    run = finished.run
    params = {name: value[2] for name, value in run.archive.phase2("photo", "importance").params().items()}
    x, target, inside = data.features.float(), data.domains == 1, run.data.inside([2])[0]
    for i in range(4):
        x = x @ params[f"layers.{i}.weight"].T + params[f"layers.{i}.bias"]
        x = relu(x) if i < 3 else x
    right = x.argmax(1) == data.labels
    recalls = [right[target & (data.labels == label)].double().mean() for label in range(3)]
    parts = {"full": target, "in": target & inside, "out": target & ~inside}
    assert record["accuracy"] == pytest.approx({p: float(right[rows].double().mean()) for p, rows in parts.items()})
    assert record["balanced_accuracy"]["full"] == pytest.approx(float(sum(recalls) / 3))
    out = [right[(data.domains == d) & ~inside].double().mean() for d in (0, 2)]
    assert record["validation"] == pytest.approx(float(sum(out) / 2))
    assert len({r["accuracy"]["full"] for r in records}) > 4  # networks differ, so that a mix-up shows


def test_validation_selects_the_earliest_of_the_best_epochs(finished):
    found = {(r["algorithm"], r["holdout"], r["seed"]): r for r in finished.records() if r["selection"] == "val"}
    for arm in finished.arm_names:
        curves = finished.run.archive.phase2("art", arm).history["validation_accuracy"].tolist()
        for seed, curve in enumerate(curves):
            record = found[arm, "art", seed]
            assert record["epoch"] == curve.index(max(curve)) + 1
            assert record["validation"] == pytest.approx(max(curve))


def test_files_on_disk_agree_with_each_other(finished):
    archive, network, moved = finished.run.archive, finished.run.network, {}
    for domain in ("art", "sketch"):
        saved = archive.phase1(domain)
        tracked = {when: network.tracked(saved.params(when)) for when in ("start", "final")}
        moved[domain] = weight_importance(tracked["start"], tracked["final"])
        layers = {"initial": tracked["start"], "final": tracked["final"], "importance": moved[domain]}
        layers |= {"normalized": normalize(moved[domain]), "mask": top_k_mask(moved[domain], 60)}
        for kind, expected in layers.items():
            assert torch.equal(flatten(saved.layers(kind)), flatten(expected)), kind
        assert (saved.header["phase"], saved.header["domain"]) == (1, domain)
    masks, scores = archive.masks("photo"), aggregate(moved)
    tracked = {when: network.tracked(archive.phase2("photo", "importance").params(when)) for when in ("start", "final")}
    layers = {"importance": scores, "normalized": normalize(scores), "mask": top_k_mask(scores, 60)}
    layers |= {"initial": tracked["start"], "final": tracked["final"]}
    for kind, expected in layers.items():
        assert torch.equal(flatten(masks.layers(kind)), flatten(expected)), kind
    assert (masks.header["phase"], masks.header["holdout"]) == (2, "photo")
    header = archive.phase2("photo", "erm").header
    assert (header["algorithm"], header["hidden_sizes"], header["settings"]) == ("erm", [6, 5, 4], SETTINGS.hash)
    assert (header["class_names"], header["features"]) == (["cat", "dog", "owl"], finished.run.facts)


def test_histories_hold_the_right_answers_on_all_domains_on_in_and_out(finished):
    history = finished.run.archive.phase2("art", "erm").history
    assert history["correct"].shape == (4, 3, 3, 2, 3)  # seeds, epochs, domains, in/out, classes
    assert (history["correct"] <= finished.run.data.totals).all()
    assert {history[name].shape for name in ("loss", "train_accuracy", "validation_accuracy")} == {(4, 3)}
    assert finished.run.archive.phase1("art").history["loss"].shape == (4, 2)


def test_more_seeds_and_holdouts_add_to_what_is_there(data, tmp_path):
    trained(data, tmp_path / "steps", seeds=2, holdouts=["photo"], execution=IN_TWOS)
    before = (tmp_path / "steps" / "records.jsonl").read_text()
    trained(data, tmp_path / "steps", execution=IN_TWOS)
    trained(data, tmp_path / "once", execution=IN_TWOS)
    after = (tmp_path / "steps" / "records.jsonl").read_text()
    assert after.startswith(before)
    assert sorted(after.splitlines()) == sorted((tmp_path / "once" / "records.jsonl").read_text().splitlines())
    steps, once = everything(tmp_path / "steps"), everything(tmp_path / "once")
    assert {name for name in steps if steps[name] != once[name]} <= {"records.jsonl"}
    few = Study(make_run(data, tmp_path / "once", seeds=[1], settings=SETTINGS, holdouts="art"))
    assert {(r["seed"], r["holdout"]) for r in few.records()} == {(1, "art")}


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """What a study in chunks of two seeds writes."""
    directory = tmp_path_factory.mktemp("whole")
    trained(data, directory, execution=IN_TWOS)
    return everything(directory)


@pytest.mark.parametrize(("where", "call"), [("save", 5), ("save", 15), ("save", 20), ("save", 30), ("append", 2)])
def test_an_interrupted_study_goes_on_and_gives_the_same_bytes(data, whole, tmp_path, monkeypatch, where, call):
    calls, original = [], getattr(Results, where)

    def interrupted(self, *arguments):
        calls.append(arguments)
        if len(calls) == call:
            raise KeyboardInterrupt
        original(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Results, where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            trained(data, tmp_path, execution=IN_TWOS)
    assert everything(tmp_path).keys() < whole.keys() or where == "append"
    trained(data, tmp_path, execution=IN_TWOS)
    assert everything(tmp_path) == whole


def test_what_is_there_is_not_trained_again(data, tmp_path, saved):
    trained(data, tmp_path, seeds=2)
    before = everything(tmp_path)
    saved.clear()
    trained(data, tmp_path, seeds=2)
    assert not saved
    (tmp_path / "importance" / "holdout_art.npz").unlink()
    trained(data, tmp_path, seeds=2)
    names = {f"{kind}/phase2_art_{arm}" for kind in ("histories", "weights") for arm in ("erm", "importance")}
    assert set(saved) == names | {"importance/holdout_art"}
    assert everything(tmp_path) == before
    saved.clear()
    trained(data, tmp_path, [ERM, IMPORTANCE, Arm("random")], seeds=2)  # Phase 1 is there
    assert not any("phase1" in name for name in saved)


def test_the_mask_of_the_next_seed_needs_its_phase_1(data, tmp_path):
    study = trained(data, tmp_path, [ERM, Arm("other_seed")], seeds=2)
    assert study.run.archive.phase1_seeds("art") == {0, 1, 2}
    assert study.run.archive.phase1("art").seeds == (0, 1)
    assert {r["seed"] for r in study.records()} == {0, 1}


def test_other_settings_are_refused_by_the_names_of_all_that_differ(data, finished):
    other = replace(SETTINGS, ph2_num_epochs=4, batch_size=16)
    with pytest.raises(InputError, match=r"BATCH_SIZE = 32, not 16.*PH2_NUM_EPOCHS = 3, not 4"):
        make_run(data, finished.run.results.directory, settings=other)


def test_other_features_are_refused(finished, tmp_path):
    other = save_blobs(tmp_path / "other.safetensors", per_cell=30, seed=1)
    with pytest.raises(InputError, match="features"):
        make_run(other, finished.run.results.directory, settings=SETTINGS)


@pytest.mark.parametrize("arms", [["erm"], [ERM, "importance@phase1"], [None]], ids=str)
def test_arms_are_values(data, tmp_path, arms):
    with pytest.raises(InputError, match="Arm"):
        Study(make_run(data, tmp_path), arms)


def test_an_arm_given_twice_is_trained_once(data, tmp_path):
    assert Study(make_run(data, tmp_path), [ERM, Arm("erm"), IMPORTANCE]).arm_names == ("erm", "importance")


def test_a_failed_network_is_recorded_and_left_out(data, tmp_path):
    study = trained(data, tmp_path, settings=DYING)
    archive = study.run.archive
    for saved in (archive.phase1("art"), archive.phase2("art", "importance")):
        assert saved.failed.tolist() == [0, -1, 0, 0]
        assert saved.curves["loss"].isnan().any(0).tolist() == [False, True, False, False]
    assert archive.phase2("art", "erm").ok.all()  # from a fresh start, without a mask
    assert not flatten(archive.masks("art").layers("mask"))[1].any()
    failures = study.failures()
    assert len(failures) == 3
    for failure, holdout in zip(failures, data.domain_names, strict=True):
        assert failure == f"importance, holdout {holdout}, seed 1: the importance is all equal or not finite"
    failed = [r for r in study.records() if r["failed"]]
    assert len(failed) == 2 * 3
    nothing = dict.fromkeys(("accuracy", "balanced_accuracy", "validation", "epoch"))
    assert all(nothing.items() <= r.items() and r["seed"] == 1 for r in failed)
    assert paired_differences(study.records(), "importance")["n"].tolist() == [3] * 5
    assert all(failure in study.report() for failure in failures)


def test_networks_whose_loss_explodes_fail_in_that_epoch(data, tmp_path):
    study = trained(data, tmp_path, seeds=2, settings=EXPLODING)
    assert study.run.archive.phase1("art").failed.tolist() == [1, 1]
    assert study.run.archive.phase2("art", "importance").failed.tolist() == [1, 1]
    assert len(study.failures()) == 2 * 3
    assert "epoch 1" in study.failures()[0]


@pytest.mark.parametrize(("seeds", "execution"), [(2, replace(QUIET, strict=True)), (1, QUIET)], ids=["strict", "one"])
def test_strict_runs_and_those_of_one_seed_stop_at_a_failed_network(data, tmp_path, seeds, execution):
    with pytest.raises(TrainingFailedError, match=r"Phase 1, domain art, seed 0: .* epoch 1"):
        trained(data, tmp_path, seeds=seeds, settings=EXPLODING, execution=execution)


@pytest.mark.parametrize("domains", [("a", "b"), tuple("abcde")])
def test_any_number_of_domains_and_classes(tmp_path, domains):
    kinds = {"domains": domains, "classes": ("x", "y", "z", "w"), "size": 5, "per_cell": 10}
    study = trained(save_blobs(tmp_path / "f.safetensors", **kinds), tmp_path / "results", seeds=2)
    assert {r["holdout"] for r in study.records()} == set(domains)
    assert all(len(r["sources"]) == len(domains) - 1 for r in study.records())
    assert study.run.archive.phase2("a", "erm").params()["layers.3.bias"].shape == (2, 4)
    assert "Chance is 25.0 %" in study.report()


def test_a_note_on_masks_that_saw_the_validation_images(data, finished, tmp_path):
    noted = [r for r in finished.records() if "note" in r]
    assert {(r["algorithm"], r["selection"]) for r in noted} == {("importance", "val")}
    assert len(noted) == 3 * 4
    inside = trained(data, tmp_path, seeds=1, settings=replace(SETTINGS, ph1_data="in"))
    assert not any("note" in r for r in inside.records())


def test_settings_json_says_what_made_the_results(finished):
    said = json.loads((finished.run.results.directory / "settings.json").read_text("utf-8"))
    assert said["settings"]["HIDDEN_SIZES"] == [6, 5, 4]
    assert said["hash"] == SETTINGS.hash
    assert said["features"]["counts"]["art"] == {"cat": 30, "dog": 30, "owl": 30}
    (machine,) = said["environments"]
    assert machine.keys() == {"versions", "device", "threads", "commit"}
    assert machine["versions"]["torch"] == torch.__version__.partition("+")[0]


def test_seeds_of_a_stack_do_not_depend_on_each_other(data, finished, tmp_path):
    alone = trained(data, tmp_path, seeds=[2]).run.archive
    for name in ("params", "history"):
        for one, four in (
            (alone.phase1("art"), finished.run.archive.phase1("art")),
            (alone.phase2("art", "importance"), finished.run.archive.phase2("art", "importance")),
        ):
            a, b = (saved.params() if name == "params" else saved.history for saved in (one, four))
            for key in a.keys() - {"correct", "train_accuracy", "validation_accuracy"}:
                torch.testing.assert_close(a[key][0], b[key][2], rtol=1e-3, atol=1e-4)


def test_the_report_is_written_as_it_is_returned(data, finished, tmp_path):
    shutil.copytree(finished.run.results.directory, tmp_path, dirs_exist_ok=True)
    text = Study(make_run(data, tmp_path, settings=SETTINGS)).report()
    assert (tmp_path / "summary_report.txt").read_text("utf-8") == text
    assert "importance − erm" in text
