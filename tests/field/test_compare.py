"""A comparison of methods: what is trained, what is written, how it resumes, what it says."""

from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch

from config import InputError
from engine import SplitFeatures, TrainingFailedError
from field import ALGORITHMS, PARTNERS, RULES, Algorithm, Comparison, Hyperparameter, ensemble, failed, write
from field.figures import save_all
from field.report import finding, probe_accuracy, report, seed_averages
from field.train import train_method
from field.unit import Unit, masking_of
from storage import Results, load_features, save_features
from study import Archive, Arm, Execution, Study, mask_source, t_interval
from tests.factories import SMALL, blobs, make_run, save_blobs
from trainer_phase2 import train_holdout

DOMAINS = ("art", "cartoon", "photo", "sketch")
MASKED = sorted(name for name, method in ALGORITHMS.items() if method.control is not None)
EVERY_KIND = ("ERM", "CorGrad", "GMoE", "ImportanceMask")  # of what is recorded


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return save_blobs(tmp_path_factory.mktemp("features") / "blobs.safetensors", domains=DOMAINS)


@pytest.fixture
def registry():
    """Methods that a test registers are forgotten after it."""
    before = dict(ALGORITHMS)
    yield ALGORITHMS
    ALGORITHMS.clear()
    ALGORITHMS.update(before)


def make(data, directory, methods=("ERM", "VREx"), seeds=2, settings=SMALL, holdouts=None, strict=False, **options):
    run = make_run(data, directory, seeds, settings, holdouts, Execution(strict=strict, progress=False))
    return Comparison(run, methods, **options)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """Methods of every kind of record with their baselines, two trials, pairs of holdouts as well."""
    comparison = make(data, tmp_path_factory.mktemp("whole"), EVERY_KIND, 3, trials=2, leave_one_out=True)
    comparison.train()
    return comparison


def again(comparison, methods=None, **options):
    """Another object for what a comparison has trained."""
    run = comparison.run
    return make(run.features, run.results.directory, methods or comparison.names, len(run.seeds), **options)


def state(directory):
    """Path -> content and time of every file."""
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    return {str(path.relative_to(directory)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def contents(directory):
    return {path: content for path, (content, _) in state(directory).items()}


# --- what is trained ----------------------------------------------------------------------------------------


def test_the_partners_of_all_methods_are_trained_too(data, tmp_path):
    comparison = make(data, tmp_path, ["VREx", "SD"])
    assert set(comparison.names) == {"ERM", "ERMBalanced", "VREx", "SD"}
    assert comparison.partners == {"ERM": "ERM", "ERMBalanced": "ERMBalanced", "VREx": "ERMBalanced", "SD": "ERM"}


def test_records_are_of_every_run_and_all_different(whole):
    records = whole.run.records()
    runs = 5 * 2 * (4 + 6) * 3  # methods with partners, trials, holdouts and pairs, seeds
    assert len(records) == 2 * runs  # selections
    assert len({r["key"] for r in records}) == len(records)
    assert {r["trial"] for r in records} == {0, 1}


def test_interrupted_and_resumed_is_the_same(data, tmp_path, monkeypatch):
    saved, real = [], Archive.save_method

    def save(self, about, *rest):
        if len(saved) == 2:
            raise KeyboardInterrupt
        saved.append(about)
        real(self, about, *rest)

    def train(name):
        make(data, tmp_path / name, ["SD"], holdouts=["art", "photo"]).train()

    train("a")
    monkeypatch.setattr(Archive, "save_method", save)
    with pytest.raises(KeyboardInterrupt):
        train("b")
    monkeypatch.setattr(Archive, "save_method", real)
    train("b")
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert a.keys() == b.keys()
    assert [n for n in a if a[n] != b[n]] == []


def test_a_second_run_trains_nothing(whole):
    directory = whole.run.results.directory
    before, comparison = state(directory), again(whole, trials=2, leave_one_out=True)
    assert comparison.missing() == []
    comparison.train()
    assert {path: found for path, found in state(directory).items() if found != before[path]} == {}


def test_lost_weights_are_trained_again(data, tmp_path):
    comparison = make(data, tmp_path, ["ERM"])
    comparison.train()
    curves, tables = comparison.curves(), comparison.tables()
    assert comparison.curves() is curves
    assert comparison.tables() is tables
    lost = tmp_path / "weights" / "compare_ERM_0_photo.safetensors"
    before = lost.read_bytes()
    lost.unlink()
    assert [unit.holdouts for unit in comparison.missing()] == [("photo",)]
    comparison.train()
    assert lost.read_bytes() == before
    assert comparison.curves() is not curves  # nothing is kept of what was read before
    pd.testing.assert_frame_equal(comparison.curves(), curves)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hyperparameters": {"penalty_weight": Hyperparameter(3.0, "β")}}, "penalty_weight = 0.1, not 3.0"),
        ({"hyperparameters": {"extra": Hyperparameter(1.0, "more")}}, "extra = None, not 1.0"),
        ({"version": 2}, "version 1 of SD, not 2"),
    ],
    ids=["default", "more", "version"],
)
def test_results_of_another_method_are_not_mixed_with_what_is_there(change, message, data, tmp_path, monkeypatch):
    make(data, tmp_path, ["SD"], holdouts=["art"]).train()
    before = contents(tmp_path)
    for name, value in change.items():
        old = getattr(ALGORITHMS["SD"], name)
        monkeypatch.setattr(ALGORITHMS["SD"], name, {**old, **value} if name == "hyperparameters" else value)
    comparison = make(data, tmp_path, ["SD"], holdouts=["art"])
    for use in (comparison.train, comparison.curves):
        with pytest.raises(InputError, match=message):
            use()
    assert contents(tmp_path) == before


def test_trial_0_has_the_defaults_and_others_are_drawn_the_same_each_time(whole):
    method = ALGORITHMS["VREx"]
    defaults = {name: h.default for name, h in method.known_hyperparameters().items()}
    assert whole.values(method, 0) == defaults
    drawn = [whole.values(method, trial) for trial in (1, 2, 1)]
    assert drawn[0] == drawn[2] != drawn[1]
    assert all(drawn[0][name] != defaults[name] for name in ("learning_rate", "penalty_weight", "anneal"))


def test_every_search_gives_values_that_the_method_trains_with(data, tmp_path):
    names = sorted(ALGORITHMS)
    comparison = make(data, tmp_path, names, 1, trials=2, holdouts=["art"])
    comparison.train()
    last = [r for r in comparison.run.records() if r["selection"] == "last"]
    assert {(r["algorithm"], r["trial"]) for r in last} == {(name, trial) for name in names for trial in (0, 1)}
    assert [r["algorithm"] for r in last if r["failed"]] == []


def test_the_settings_are_those_of_every_method(data, tmp_path):
    settings = replace(SMALL, ph2_lr_important=2e-3, ph2_lr_unimportant_start=1e-3, ph2_num_epochs=4)

    class Quick(Algorithm):
        hyperparameters = {"learning_rate": Hyperparameter(0.1, "its own")}

    comparison = make(data, tmp_path, ["SD", "ImportanceMask"], settings=settings)
    assert comparison.values(ALGORITHMS["SD"], 0)["learning_rate"] == 2e-3
    assert comparison.values(Quick, 0)["learning_rate"] == 0.1
    mine = comparison.values(ALGORITHMS["ImportanceMask"], 0)
    assert (mine["kept"], mine["low_rate"], mine["decay"], mine["freeze_after"]) == (60, 0.5, 0.5, 0.5)
    assert comparison.values(ALGORITHMS["SD"], 1)["learning_rate"] != 2e-3  # searched


# --- masks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MASKED)
def test_a_masked_method_is_the_arm_of_the_study(name, data, tmp_path):
    """In float64 the same networks as Phase 2 itself trains, whatever the settings are."""
    settings = replace(SMALL, ph2_freeze_epoch=1, ph2_lr_decay_rate=0.3, importance_threshold_percentile=40.0)
    method, seeds = ALGORITHMS[name], (0, 1, 2)
    comparison = make(data, tmp_path, [name], 3, settings)
    run, arm, values = comparison.run, Arm(method.control), comparison.values(method, 0)
    Study(run, [arm]).phase1()
    exact = SplitFeatures.from_features(data, settings, dtype=torch.float64)
    masking = masking_of(run, Unit(method, 0, ("art",), seeds), values)
    assert masking.failed is None or not masking.failed.any()
    mask = dict(zip(run.network.tracked_names, masking.mask, strict=True))
    ours = train_method(exact, ("art",), seeds, partial(method, **values), settings, mask=mask)
    theirs = train_holdout(exact, "art", seeds, [arm.masking(mask_source(run, ["art"], seeds), settings)])
    for key, value in ours.params.items():
        assert torch.allclose(value, theirs.final[key][:, 0], rtol=0, atol=1e-9), key
    assert torch.equal(ours.correct, theirs.correct[:, 0])


def test_a_drawn_part_of_the_weights_is_marked(whole):
    for trial in (0, 1):
        values = whole.values(ALGORITHMS["ImportanceMask"], trial) | {"kept": 20.0 + 60 * trial}
        masking = masking_of(whole.run, Unit(ALGORITHMS["ImportanceMask"], trial, ("art", "photo"), (0, 1, 2)), values)
        marked = sum(layer.sum((1, 2)) for layer in masking.mask)
        assert marked.tolist() == [(10, 40)[trial]] * 3  # of 5·6 + 4·5 weights


def test_no_method_sees_a_held_out_domain(data, tmp_path):
    """Other images of the domain change nothing in training, nor in the masks."""
    d = blobs(domains=DOMAINS)
    changed = torch.where((d.domains == DOMAINS.index("art")).unsqueeze(1), -d.features, d.features).half()
    rows = d.labels, d.domains, d.class_names, d.domain_names, d.files
    save_features(tmp_path / "other.safetensors", changed, *rows, dataset="blobs")
    other = load_features(tmp_path / "other.safetensors")
    options = {"methods": ["ImportanceMask", "OtherSeedMask"], "holdouts": ["art", "photo"], "leave_one_out": True}
    a, b = (make(features, tmp_path / name, **options) for name, features in (("a", data), ("b", other)))
    for comparison in (a, b):
        comparison.train()
    assert len(a.holdouts) == 2 + 5
    for name, holdouts in product(a.names, a.holdouts):
        losses = [comparison.run.archive.method(name, 0, holdouts).history["loss"] for comparison in (a, b)]
        assert torch.equal(*losses) == ("art" in holdouts), (name, holdouts)


# --- reading ------------------------------------------------------------------------------------------------


def test_curves_are_the_accuracies_on_disk(whole):
    curves = whole.curves()
    assert len(curves) == 5 * 2 * 10 * 3 * 3 * 4  # methods, trials, holdouts, seeds, epochs, domains
    record = next(
        r
        for r in whole.run.records()
        if (r["algorithm"], r["trial"], r["holdout"], r["seed"], r["selection"]) == ("CorGrad", 1, "photo", 2, "last")
    )
    row = curves[
        (curves.algorithm == "CorGrad") & (curves.trial == 1) & (curves.holdouts == ("photo",)) & (curves.seed == 2)
        & (curves.epoch == 3) & (curves.domain == "photo")
    ]  # fmt: skip
    assert row[["in", "out", "full"]].to_dict("records") == [record["accuracy"]]


def test_a_comparison_is_known_by_its_records(whole):
    run = whole.run
    found = Comparison.of(run.results.directory, lambda: run.features)
    assert (set(found.methods), found.trials, found.holdouts) == (set(whole.methods), 2, whole.holdouts)
    assert (found.run.seeds, found.run.settings) == (run.seeds, run.settings)
    key = ["algorithm", "trial", "holdouts", "seed", "epoch", "domain"]
    a, b = (comparison.curves().set_index(key).sort_index() for comparison in (found, whole))
    pd.testing.assert_frame_equal(a, b)


def test_a_report_opens_each_file_once(whole, monkeypatch):
    opened, real = Counter(), Results.load

    def load(self, kind, name):
        opened[kind, name] += 1
        return real(self, kind, name)

    monkeypatch.setattr(Results, "load", load)
    comparison = again(whole, trials=2, leave_one_out=True)
    write(comparison)
    save_all(comparison)
    assert set(opened.values()) == {1}
    kinds = Counter(kind for kind, _ in opened)
    assert kinds == {"histories": 5 * 2 * 10, "weights": 4}  # of ERM, for the ensemble


def test_an_incomplete_comparison_says_what_is_missing(data, tmp_path):
    make(data, tmp_path, ["ERM"]).train()
    with pytest.raises(InputError, match="4 runs are missing, first ERM, trial 1, holdout art"):
        make(data, tmp_path, ["ERM"], trials=2).curves()


def test_tables_hold_paired_differences_from_the_right_erm(whole):
    averages = {}
    for r in whole.run.records():
        if r["selection"] == "last" and r["trial"] == 0 and "+" not in r["holdout"]:
            averages.setdefault((r["algorithm"], r["seed"]), []).append(r["accuracy"]["full"])
    assert list(whole.tables()) == ["training-domain", "last", "leave-one-domain-out", "oracle"]
    assert all(set(table.index) == {a for a, _ in averages} for table in whole.tables().values())
    table = again(whole, ["ERM", "CorGrad"]).tables()["last"]  # trial 0 alone
    own = [np.mean(averages["CorGrad", s]) - np.mean(averages["ERMBalanced", s]) for s in range(3)]
    assert table.loc["CorGrad", ["difference", "low", "high"]].tolist() == pytest.approx(list(t_interval(own)))


def test_averages_by_seed_are_those_of_the_table(whole):
    averages, table = seed_averages(whole), whole.tables()["training-domain"]
    assert list(averages.index) == [0, 1, 2]
    assert averages.mean().to_dict() == pytest.approx(table["average_mean"].to_dict())


def test_the_ensemble_averages_probabilities(whole):
    found, data = ensemble(whole), whole.run.data
    assert set(found.index) == set(DOMAINS)
    assert found.between(0, 1).all()
    weights = whole.run.archive.method(PARTNERS["pooled"], 0, ("art",)).params()
    rows = data.all_rows(["art"])
    total = 0
    for s in range(3):
        x = data.features[rows]
        for i in range(4):
            x = x @ weights[f"layers.{i}.weight"][s].T + weights[f"layers.{i}.bias"][s]
            x = x.relu() if i < 3 else x.softmax(-1)
        total = total + x
    assert found["art"] == pytest.approx(float((total.argmax(-1) == data.labels[rows]).double().mean()))


def test_expert_use_is_of_whole_images(whole):
    use = whole.run.archive.method("GMoE", 0, ("art",)).history["expert_use"]
    assert use.shape[:3] == (3, 4, 3)
    assert torch.allclose(use.sum(-1), torch.ones(3, 4, 3), atol=1e-5)


# --- the report ---------------------------------------------------------------------------------------------


def test_the_report_and_its_files(whole):
    text = write(whole)
    directory = whole.run.results.directory
    assert (directory / "comparison.txt").read_text("utf-8") == text
    assert "NOT a fair rule" in text
    assert "Logistic regression on the features (deterministic; unpaired):\n  art " in text
    assert "The masks of ImportanceMask saw the validation images" in " ".join(text.split())
    for word in ("CorGrad", "ImportanceMask", "Ensemble", "3 seeds", "its defaults, and 1 random draw."):
        assert word in text
    for rule in whole.tables():
        assert (directory / f"comparison_{rule}.csv").is_file()
    assert {path.stem for path in save_all(whole)} >= {"comparison", "conflicts_CorGrad", "experts_GMoE_art"}
    assert all(path.stat().st_size > 5_000 for path in (directory / "plots").iterdir())


def test_a_figure_that_fails_does_not_stop_the_others(whole, monkeypatch, caplog):
    def broken(*_):
        raise ValueError("no picture")

    monkeypatch.setattr("field.figures.expert_figure", broken)
    assert {path.stem for path in save_all(whole)} == {"comparison", "conflicts_CorGrad"}
    assert "experts_GMoE_art" in caplog.text
    assert "no picture" in caplog.text


def test_logistic_regression_is_fitted_once(whole):
    first = probe_accuracy(whole)
    before = state(whole.run.results.directory)
    assert probe_accuracy(again(whole)).equals(first)
    assert state(whole.run.results.directory) == before
    assert list(first.index) == list(DOMAINS)


def test_the_finding_is_computed():
    rows = {"ERM": (1, 0.5, np.nan, np.nan, np.nan), "A": (2, 0.4, -0.1, -0.2, -0.05)}
    rows |= {"B": (3, 0.3, 0.1, 0.05, 0.2), "ImportanceMask": (4, 0.2, 0.0, -0.1, 0.1)}
    table = pd.DataFrame.from_dict(rows, "index", columns=["rank", "average_mean", "difference", "low", "high"])
    probe = pd.Series({"art": 0.5, "photo": 0.3})
    text = finding(table.astype({"rank": int}), pd.Series({"art": 0.7, "photo": 0.4}), probe)
    assert "excludes 0: B. Below it: A." in text
    assert "Logistic regression on the same features has 40.0 %, not above the mean of every method." in text
    assert "The ensemble of the ERM networks has 55.0 %, above the mean of every" in text
    assert "number 4 of 4, +0.00 [−10.00, +10.00] points" in text
    below = finding(table, pd.Series({"art": 0.3, "photo": 0.2}), probe + 0.3)
    assert "networks has 25.0 %, not above" in below
    assert "features has 70.0 %, above" in below


def test_failed_networks_are_left_out_and_told(data, tmp_path, registry):
    class Explodes(Algorithm):
        """Its loss is never finite."""

        def loss(self, params, batch, state, noise):
            loss, changes = super().loss(params, batch, state, noise)
            return loss * torch.inf, changes

    comparison = make(data, tmp_path, [Explodes])
    comparison.train()
    assert len(failed(comparison)) == 4 * 2
    text = report(comparison)
    assert "8 networks failed and are left out" in text
    assert "Explodes, trial 0, holdout art, seed 0: the loss is no longer finite in epoch 1" in text
    with pytest.raises(TrainingFailedError, match="Explodes, trial 0, holdout art"):
        make(data, tmp_path / "strict", [Explodes], strict=True).train()


def test_only_balanced_methods_have_no_ensemble_and_a_report_all_the_same(data, tmp_path):
    comparison = make(data, tmp_path, ["VREx"])
    comparison.train()
    text = write(comparison)
    assert "VREx" in text
    assert "nsemble" not in text


def test_tables_of_other_runs_do_not_stay(data, tmp_path):
    comparison = make(data, tmp_path, ["ERM"])
    comparison.train()
    (tmp_path / "comparison_leave-one-domain-out.csv").write_text("old")
    write(comparison)
    assert not (tmp_path / "comparison_leave-one-domain-out.csv").exists()
    assert all((tmp_path / f"comparison_{rule}.csv").exists() for rule in comparison.tables())
    for rule in RULES:
        (tmp_path / f"comparison_{rule}.csv").touch()
    comparison.run.results.clear()
    assert [path.name for path in tmp_path.iterdir() if path.name != ".lock"] == []


# --- bad input ----------------------------------------------------------------------------------------------


def own(**body):
    return type("Own", (Algorithm,), body)


@pytest.mark.parametrize(
    ("methods", "options", "message"),
    [
        (["Nothing"], {}, "'Nothing'"),
        (["Ensemble"], {}, "Ensemble is not trained"),
        (["ERM"], {"trials": 0}, "--trials"),
        (["ERM"], {"settings": replace(SMALL, ph2_init="phase1")}, "PH2_INIT"),
        ([own(batches="ballanced")], {}, "Own.batches"),
        ([own(hyperparameters={"a": 0.1})], {}, r"Own.hyperparameters\['a'\]"),
        ([own(control="random")], {}, "'kept'"),
        ([int], {}, "Algorithm"),
    ],
)
def test_bad_input_is_refused(methods, options, message, data, tmp_path):
    with pytest.raises(InputError, match=message):
        make(data, tmp_path, methods, **options)
    assert "Own" not in ALGORITHMS
