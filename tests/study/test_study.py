"""Whole studies on small data: what is written, what is trained again, what failures do."""

import errno
import os
import re
import shutil
from dataclasses import replace
from itertools import count

import numpy as np
import pytest
import torch
from torch.nn.functional import relu

from config import InputError, Settings
from engine import TrainingFailedError
from importance import aggregate, flatten, normalize, top_k_mask, weight_importance
from storage import Results
from study import ERM, IMPORTANCE, Arm, Execution, Study, paired_differences
from tests.factories import LEARNING, QUIET, everything, make_run, save_blobs, token_blobs

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


@pytest.fixture(scope="module")
def whole(finished):
    """What the finished study, of one core, wrote."""
    return everything(finished.run.results.directory)


def test_the_same_study_gives_the_same_bytes_on_more_cores(data, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    trained(data, tmp_path, execution=IN_TWOS)
    assert everything(tmp_path) == whole


def test_files_are_named_by_phase_domain_holdout_and_arm(data, tmp_path):
    thin = Arm("importance", "phase1", {"IMPORTANCE_THRESHOLD_PERCENTILE": 30})
    study = trained(data, tmp_path, [ERM, Arm("erm"), IMPORTANCE, thin], seeds=1, holdouts=["photo"])  # erm once
    arms = ("erm", "importance", "importance[IMPORTANCE_THRESHOLD_PERCENTILE=30]@phase1")
    assert study.arm_names == arms
    trained_files = {"phase1_art", "phase1_sketch", *(f"phase2_photo_{arm}" for arm in arms)}
    expected = {f"weights/{name}.safetensors" for name in trained_files}
    expected |= {f"histories/{name}.npz" for name in trained_files}
    expected |= {f"importance/{name}.npz" for name in ("phase1_art", "phase1_sketch", "holdout_photo")}
    assert everything(tmp_path).keys() == expected | {"records.jsonl", "settings.json"}
    layers = {f"{kind}_{i}" for kind in ("initial", "final", "importance", "normalized", "mask") for i in (1, 2)}
    for name in ("phase1_art", "holdout_photo"):
        with np.load(tmp_path / "importance" / f"{name}.npz", allow_pickle=False) as file:
            assert set(file.files) == layers | {"seeds", "header"}
    assert study.run.results.read_settings()["environments"] == [study.run.environment]


def test_a_study_without_weights_leaves_out_those_of_phase_2(data, tmp_path, saved):
    options = {"seeds": 1, "holdouts": "art"}
    trained(data, tmp_path, keep_weights=False, **options)
    assert {path.stem for path in (tmp_path / "weights").iterdir()} == {"phase1_photo", "phase1_sketch"}
    saved.clear()
    trained(data, tmp_path, keep_weights=False, **options)
    assert not saved
    trained(data, tmp_path, **options)  # now they are wanted
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


def test_more_seeds_and_holdouts_add_to_what_is_there(data, finished, whole, tmp_path):
    trained(data, tmp_path, seeds=2, holdouts=["photo"], execution=IN_TWOS)
    before = everything(tmp_path)["records.jsonl"]
    trained(data, tmp_path, execution=IN_TWOS)
    steps = everything(tmp_path)
    after = steps.pop("records.jsonl")
    assert after.startswith(before)
    assert sorted(after.splitlines()) == sorted(whole["records.jsonl"].splitlines())
    assert steps == {name: content for name, content in whole.items() if name != "records.jsonl"}
    few = Study(make_run(data, finished.run.results.directory, seeds=[1], settings=SETTINGS, holdouts="art"))
    assert {(r["seed"], r["holdout"]) for r in few.records()} == {(1, "art")}


@pytest.mark.parametrize(("where", "call"), [("save", 5), ("save", 15), ("save", 20), ("append", 2)])
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


def test_a_disk_that_is_full_at_any_write_is_one_sentence_and_the_study_goes_on(data, tmp_path, monkeypatch):
    options = {"seeds": 2, "holdouts": "photo"}
    trained(data, tmp_path / "whole", **options)
    whole, failed, fsync = everything(tmp_path / "whole"), [], os.fsync
    for last in count(1):
        events = []

        def full(file, events=events, last=last):
            events.append(file)
            if len(events) == last:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(file)

        directory = tmp_path / str(last)
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", full)
            try:
                trained(data, directory, **options)
                break
            except InputError as error:
                failed.append(str(error))
        assert everything(directory).keys() <= whole.keys()  # no temporary files
        trained(data, directory, **options)
        assert everything(directory) == whole
    assert everything(directory) == whole
    assert all(os.strerror(errno.ENOSPC) in sentence and str(tmp_path) in sentence for sentence in failed)
    assert any("records.jsonl" in sentence for sentence in failed)
    assert len(failed) >= len(whole)  # settings are written more than once


@pytest.mark.parametrize(
    "damaged",
    ["records.jsonl", "histories/phase2_photo_erm.npz", "importance/holdout_art.npz", "weights/phase1_art.safetensors"],
)
def test_a_damaged_file_is_found_before_anything_is_trained(data, finished, tmp_path, saved, damaged):
    shutil.copytree(finished.run.results.directory, tmp_path, dirs_exist_ok=True)
    (tmp_path / "histories" / "phase1_photo.npz").unlink()
    content = (tmp_path / damaged).read_bytes()
    (tmp_path / damaged).write_bytes(content[: len(content) // 2] + b"\n" + content[len(content) // 2 :])
    with pytest.raises(InputError, match=re.escape(damaged)):
        trained(data, tmp_path, execution=IN_TWOS)
    assert not saved


def test_the_report_is_on_all_that_the_directory_holds(data, finished, tmp_path):
    shutil.copytree(finished.run.results.directory, tmp_path, dirs_exist_ok=True)
    whole, part = finished.report(), trained(data, tmp_path, seeds=[1], holdouts="art", execution=IN_TWOS)
    assert part.report() == (tmp_path / "summary_report.txt").read_text("utf-8") == whole
    assert (part.whole().run.seeds, part.whole().run.holdouts) == (finished.run.seeds, finished.run.holdouts)
    assert finished.whole() is finished
    results = Results(tmp_path / "half")
    results.directory.mkdir()
    shutil.copy(tmp_path / "settings.json", results.directory)
    results.append(
        r for r in finished.records() if r["holdout"] == "photo" or (r["seed"] == 0 and r["algorithm"] == "erm")
    )
    half = Study(make_run(data, results, [0], SETTINGS, "photo")).whole()
    assert (half.run.seeds, half.run.holdouts) == ((0, 1, 2, 3), ("photo",))  # the others are not complete


def test_what_is_there_is_not_trained_again(data, tmp_path, saved):
    options = {"seeds": 2, "holdouts": ["art", "photo"]}
    trained(data, tmp_path, **options)
    before = everything(tmp_path)
    saved.clear()
    trained(data, tmp_path, **options)
    assert not saved
    (tmp_path / "importance" / "holdout_art.npz").unlink()
    trained(data, tmp_path, **options)
    names = {f"{kind}/phase2_art_{arm}" for kind in ("histories", "weights") for arm in ("erm", "importance")}
    assert set(saved) == names | {"importance/holdout_art"}
    assert everything(tmp_path) == before
    saved.clear()
    trained(data, tmp_path, [ERM, IMPORTANCE, Arm("random")], **options)  # Phase 1 is there
    assert not any("phase1" in name for name in saved)


def test_a_study_warns_of_networks_that_did_not_learn(data, finished, tmp_path):
    assert finished.warnings() == []
    slow = trained(data, tmp_path, seeds=2, settings=replace(SETTINGS, ph1_learning_rate=1e-9, ph2_lr_important=1e-9))
    first, second = slow.warnings()
    assert "PH1_LEARNING_RATE" in first
    assert "PH2_LR_IMPORTANT (now 1e-09)" in second
    report = " ".join(slow.report().split())
    assert first in report
    assert second in report


def test_the_mask_of_the_next_seed_needs_its_phase_1(data, tmp_path):
    study = trained(data, tmp_path, [ERM, Arm("other_seed")], seeds=2, holdouts="photo")
    assert study.run.archive.phase1_seeds("art") == {0, 1, 2}
    assert study.run.archive.phase1("art").seeds == (0, 1)
    assert {r["seed"] for r in study.records()} == {0, 1}


@pytest.mark.parametrize("arms", [["erm"], [ERM, "importance@phase1"], [None]], ids=str)
def test_arms_are_values(data, tmp_path, arms):
    with pytest.raises(InputError, match="Arm"):
        Study(make_run(data, tmp_path), arms)


def test_networks_larger_than_the_memory_are_refused_before_anything_is_trained(data, tmp_path):
    study = Study(make_run(data, tmp_path, settings=replace(SETTINGS, hidden_sizes=(100_000, 100_000))))
    for phase in (study.phase1, study.phase2):
        with pytest.raises(InputError, match=r"GiB.*SEEDS_PER_CHUNK"):
            phase()
    assert everything(tmp_path).keys() == {"settings.json"}


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
    text = study.report()
    assert (tmp_path / "summary_report.txt").read_text("utf-8") == text
    assert all(failure in text for failure in failures)
    assert "importance − erm" in text


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


@pytest.mark.parametrize("domains", ["ab", "abcde"])
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
    inside = trained(data, tmp_path, seeds=1, settings=replace(SETTINGS, ph1_data="in"), holdouts="photo")
    assert not any("note" in r for r in inside.records())


def test_seeds_of_a_stack_do_not_depend_on_each_other(data, finished, tmp_path):
    alone = trained(data, tmp_path, seeds=[2], holdouts=["art", "photo"]).run.archive
    for networks in (lambda archive: archive.phase1("art"), lambda archive: archive.phase2("art", "importance")):
        found, expected = (saved.params() | saved.history for saved in map(networks, (alone, finished.run.archive)))
        for key in found.keys() - {"correct", "train_accuracy", "validation_accuracy"}:
            tolerance = {"rtol": 1e-3, "atol": 1e-4, "equal_nan": False}
            np.testing.assert_allclose(found[key][0], expected[key][2], **tolerance, err_msg=key)


def test_a_mask_that_would_mark_no_weight_of_the_blocks_is_refused(tmp_path):
    """Of 960 weights; of the small tracked matrices on features, a mask may be empty."""
    settings = Settings.current(trained_blocks=1, importance_threshold_percentile=0.05)
    run = make_run(token_blobs(), tmp_path, settings=settings)
    assert Study(run, [ERM, Arm("head"), Arm("random", changes={"IMPORTANCE_THRESHOLD_PERCENTILE": 0.06})]).arms
    with pytest.raises(InputError, match=r"0\.05 % of the 960 weights"):
        Study(run)
    with pytest.raises(InputError, match=r"0\.01 % of the 960 weights"):
        Study(run, [Arm("random_layer", changes={"IMPORTANCE_THRESHOLD_PERCENTILE": 0.01})])
