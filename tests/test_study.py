"""Whole studies on small problems: what is written, what is trained again, what failures do."""

import json

import numpy as np
import pytest
import torch
from conftest import make_images
from problems import features as blobs
from problems import problem

import config
import parallel
import study as study_module
from config import InputError, Settings
from evaluation import paired_differences
from feature_file import load_features, save_features
from importance import aggregate, flatten, top_k_mask, weight_importance
from records import Results
from study import Study, layers_of

SETTINGS = Settings.current(hidden_sizes=(6, 5, 4), ph1_num_epochs=2, ph2_num_epochs=3, ph2_freeze_epoch=2)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return make_features(tmp_path_factory.mktemp("features") / "blobs.safetensors")


def make_features(path, **kinds):
    d = blobs(per_cell=30, **kinds)
    names = d.class_names, d.domain_names, d.files
    save_features(path, d.features.half(), d.labels, d.domains, *names, dataset="blobs")
    return load_features(path)


def run(data, directory, seeds=4, settings=SETTINGS, **options):
    study = Study(data, settings, Results(directory), range(seeds), progress=False, **options)
    study.phase1()
    study.phase2()
    return study


def contents(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_the_same_study_twice_gives_the_same_bytes(data, tmp_path):
    for name in ("a", "b"):
        run(data, tmp_path / name)
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert a == b
    assert {"records.jsonl", "settings.json", "weights/phase1_art.safetensors"} <= a.keys()


def test_records_say_what_the_networks_do(data, tmp_path):
    study = run(data, tmp_path)
    records = study.records()
    assert len(records) == 2 * 3 * 4 * 2  # algorithms, holdouts, seeds, selections
    assert len({r["key"] for r in records}) == len(records)
    record = next(
        r
        for r in records
        if (r["algorithm"], r["holdout"], r["seed"], r["selection"]) == ("importance", "photo", 2, "last")
    )
    assert record["sources"] == ["art", "sketch"]
    assert (record["features"], record["settings"]) == (data.fingerprint, SETTINGS.hash)
    assert record["epoch"] == 3
    # From the weights on disk, with an ordinary module.
    arrays, _ = study.load("weights", "phase2_photo_importance")
    network = study_module.Problem.from_features(data, SETTINGS)
    x = network.features
    for i in range(4):
        x = x @ arrays[f"final.layers.{i}.weight"][2].T + arrays[f"final.layers.{i}.bias"][2]
        x = x.relu() if i < 3 else x
    right = (x.argmax(1) == network.labels).double()
    target = network.domains == 1
    assert record["accuracy"]["full"] == pytest.approx(float(right[target].mean()))
    assert record["accuracy"]["out"] == pytest.approx(float(right[target & ~network.inside].mean()))
    assert record["accuracy"]["in"] == pytest.approx(float(right[target & network.inside].mean()))


def test_files_on_disk_agree_with_each_other(data, tmp_path):
    study = run(data, tmp_path)
    moved = {}
    for domain in ("art", "sketch"):
        weights, header = study.load("weights", f"phase1_{domain}")
        names = ("layers.1.weight", "layers.2.weight")
        moved[domain] = weight_importance(*([weights[f"{w}.{n}"] for n in names] for w in ("start", "final")))
        arrays, _ = study.load("importance", f"phase1_{domain}")
        assert torch.equal(flatten(layers_of(arrays, "importance")), flatten(moved[domain]))
        assert header["domain"] == domain
    arrays, header = study.load("importance", "holdout_photo")
    scores = aggregate(moved)
    assert torch.equal(flatten(layers_of(arrays, "mask")), flatten(top_k_mask(scores, 60)))
    assert torch.equal(flatten(layers_of(arrays, "importance")), flatten(scores))
    assert header["holdout"] == "photo"
    with np.load(tmp_path / "importance" / "holdout_photo.npz", allow_pickle=False) as file:
        assert set(file.files) >= {
            f"{k}_{i}" for k in ("initial", "final", "importance", "normalized", "mask") for i in (1, 2)
        }


def test_histories_hold_the_accuracies_of_all_domains_on_in_and_out(data, tmp_path):
    study = run(data, tmp_path)
    arrays, _ = study.load("histories", "phase2_art_erm")
    assert arrays["correct"].shape == (4, 3, 3, 2, 3)  # seeds, epochs, domains, in/out, classes
    assert (arrays["correct"] <= study.problem.totals).all()


def test_more_seeds_and_holdouts_add_to_what_is_there(data, tmp_path, monkeypatch):
    monkeypatch.setattr(config, "SEEDS_PER_CHUNK", 2)
    run(data, tmp_path / "steps", seeds=2, holdouts=["photo"])
    before = (tmp_path / "steps" / "records.jsonl").read_text()
    run(data, tmp_path / "steps", seeds=4)
    run(data, tmp_path / "once", seeds=4)
    after = (tmp_path / "steps" / "records.jsonl").read_text()
    assert after.startswith(before)
    assert sorted(after.splitlines()) == sorted((tmp_path / "once" / "records.jsonl").read_text().splitlines())


@pytest.mark.parametrize("stop_at", [1, 3, 4, 6])
def test_an_interrupted_study_goes_on_and_gives_the_same_bytes(data, tmp_path, monkeypatch, stop_at):
    monkeypatch.setattr(config, "SEEDS_PER_CHUNK", 2)
    run(data, tmp_path / "whole")
    calls = {"n": 0}
    save = Results.save

    def interrupted(self, *arguments):
        calls["n"] += 1
        if calls["n"] == 5 * stop_at:
            raise KeyboardInterrupt
        save(self, *arguments)

    monkeypatch.setattr(Results, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path / "stopped")
    monkeypatch.setattr(Results, "save", save)
    run(data, tmp_path / "stopped")
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def test_what_is_there_is_not_trained_again(data, tmp_path, monkeypatch):
    run(data, tmp_path)

    def refuse(*_, **__):
        raise AssertionError("trained again")

    for name in ("train_domain", "train_holdout"):
        monkeypatch.setattr(study_module, name, refuse)
    run(data, tmp_path)
    (tmp_path / "importance" / "holdout_art.npz").unlink()
    with pytest.raises(AssertionError, match="trained again"):
        run(data, tmp_path)


def test_other_settings_are_refused_by_name(data, tmp_path):
    run(data, tmp_path)
    other = Settings.current(hidden_sizes=(6, 5, 4), ph1_num_epochs=2, ph2_num_epochs=4, ph2_freeze_epoch=2)
    with pytest.raises(InputError, match="PH2_NUM_EPOCHS = 3, not 4"):
        run(data, tmp_path, settings=other)


def test_an_unknown_holdout_is_refused(data, tmp_path):
    with pytest.raises(InputError, match="no domain 'foto' to hold out; there are art, photo, sketch"):
        run(data, tmp_path, holdouts=["foto"])


@pytest.mark.parametrize("seeds", [[], [-1, 2], [0.5], ["0"], "01", 3, None], ids=str)
def test_seeds_that_are_none_are_refused(data, tmp_path, seeds):
    with pytest.raises(InputError, match="whole numbers from 0"):
        Study(data, SETTINGS, Results(tmp_path), seeds)
    assert Study(data, SETTINGS, Results(tmp_path), np.array([3, 1, 3])).seeds == (1, 3)


def test_what_can_be_known_is_told_before_an_extraction(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("extracted")

    monkeypatch.setattr(study_module, "get_features", refuse)
    monkeypatch.setattr(config, "DATA_ROOT", str(make_images(tmp_path / "images")))
    monkeypatch.setattr(config, "RESULTS_DIR", str(tmp_path / "r"))
    with pytest.raises(InputError, match="no domain 'foto' to hold out; there are art, photo"):
        Study.from_config([0, 1], ["foto"])
    with pytest.raises(InputError, match="whole numbers"):
        Study.from_config([])
    with Results(tmp_path / "r") as results:
        results.claim(Settings.current(batch_size=7), {"fingerprint": "x"})
    with pytest.raises(InputError, match="BATCH_SIZE = 7, not 32"):
        Study.from_config([0, 1])
    for options in ({"overwrite": True}, {"holdouts": "art", "overwrite": True}):
        with pytest.raises(AssertionError, match="extracted"):
            Study.from_config([0, 1], **options)


def test_a_failed_network_is_recorded_and_left_out(data, tmp_path, monkeypatch):
    start = study_module.train_domain.__globals__["random_start"]

    def poisoned(seeds, purpose, sizes):
        params = start(seeds, purpose, sizes)
        for i, seed in enumerate(seeds):
            if seed == 1 and purpose == "start":
                params["layers.0.weight"][i] = torch.inf
        return params

    monkeypatch.setitem(study_module.train_domain.__globals__, "random_start", poisoned)
    study = run(data, tmp_path)
    for name in ("phase1_art", "phase2_art_importance"):
        assert study.load("weights", name)[0]["failed"].tolist() == [0, 1, 0, 0]
    failures = study.failures()
    assert len(failures) == 3  # importance of seed 1 on each holdout; erm has a start of its own
    assert all("importance" in f and "seed 1: the loss is no longer finite in epoch 1" in f for f in failures)
    failed = [r for r in study.records() if r["failed"]]
    assert all(r["accuracy"] is None and r["seed"] == 1 for r in failed)
    assert paired_differences(study.records(), "importance")["n"].tolist() == [3] * 5
    with pytest.raises(study_module.train_domain.__globals__["raise_failure"].__globals__["TrainingFailedError"]):
        run(data, tmp_path / "strict", strict=True)


@pytest.mark.parametrize("domains", [("a", "b"), ("a", "b", "c"), tuple("abcde")])
def test_any_number_of_domains_and_classes(tmp_path, domains):
    data = make_features(tmp_path / "f.safetensors", domains=domains, classes=("x", "y", "z", "w"), size=5)
    study = run(data, tmp_path / "results", seeds=2)
    assert {r["holdout"] for r in study.records()} == set(domains)
    assert all(len(r["sources"]) == len(domains) - 1 for r in study.records())


def test_a_note_on_masks_that_saw_the_validation_images(data, tmp_path):
    noted = [r for r in run(data, tmp_path / "a").records() if "note" in r]
    assert {(r["algorithm"], r["selection"]) for r in noted} == {("importance", "val")}
    inside = Settings.current(**{**{k.lower(): v for k, v in SETTINGS.as_dict().items()}, "ph1_data": "in"})
    assert not any("note" in r for r in run(data, tmp_path / "b", settings=inside).records())


def test_settings_json_says_what_made_the_results(data, tmp_path):
    run(data, tmp_path)
    said = json.loads((tmp_path / "settings.json").read_text("utf-8"))
    assert said["settings"]["HIDDEN_SIZES"] == [6, 5, 4]
    assert said["hash"] == SETTINGS.hash
    assert said["features"]["counts"]["art"] == {"cat": 30, "dog": 30, "owl": 30}
    assert said["environments"][0]["versions"]["torch"] == torch.__version__.partition("+")[0]


def test_seeds_of_a_stack_do_not_depend_on_each_other(data, tmp_path):
    alone = run(data, tmp_path / "alone", seeds=1)
    four = run(data, tmp_path / "four", seeds=4)
    for name in ("phase1_art", "phase2_art_importance"):
        a, b = alone.load("weights", name)[0], four.load("weights", name)[0]
        for key in a:
            torch.testing.assert_close(a[key][0], b[key][0], rtol=1e-3, atol=1e-4)


def test_problem_is_split_the_same_whatever_the_row_order(data):
    d = blobs(per_cell=30)
    order = torch.randperm(len(d.labels), generator=torch.Generator().manual_seed(5))
    shuffled = blobs(per_cell=30)
    shuffled.features, shuffled.labels, shuffled.domains = (t[order] for t in (d.features, d.labels, d.domains))
    shuffled.files = tuple(d.files[i] for i in order)
    inside = study_module.Problem.from_features(shuffled, SETTINGS).inside
    assert torch.equal(inside, problem(per_cell=30).inside[order])


def test_memory_decides_how_many_stacks_are_trained_at_a_time(monkeypatch):
    monkeypatch.setattr(parallel, "default_workers", lambda: 8)
    for free, expected in ((float("inf"), 8), (3 * 2 * 4 * parallel.COPIES * 100 * 50, 3), (1e3, 1)):
        monkeypatch.setattr(parallel, "free_memory", lambda free=free: free)
        assert parallel.in_flight(100, 50) == expected


def test_the_engine_is_that_of_the_whole_study_and_is_noted(data, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(study_module, "choose_engine", lambda *facts: asked.append(facts) or "vmap")
    first = run(data, tmp_path, 2)
    assert run(data, tmp_path, 2).engine == first.engine == "vmap"  # nothing was left to train
    assert asked[0] == asked[-1]
    environments = first.results.read_settings()["environments"]
    assert [e["engine"] for e in environments] == ["vmap"]
