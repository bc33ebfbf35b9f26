"""A comparison of methods: what is trained, what is written, how it resumes, what it says."""

import resource
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
from field.figures import difference_figure, save_all
from field.phase1 import given_to
from field.report import finding, report, seed_averages
from field.train import train_method
from storage import Results, load_features, save_features
from study import Archive, Arm, Execution, Study, mask_source, t_interval
from tests.factories import SMALL, blobs, dated, everything, make_run, save_blobs
from trainer_phase2 import train_holdout

DOMAINS = ("art", "cartoon", "photo", "sketch")
MASKED = sorted(name for name, method in ALGORITHMS.items() if method.control is not None)
EVERY_KIND = ("ERM", "CorGrad", "GMoE", "ImportanceMask")  # of what is recorded
TWO = ("art", "photo")  # holdouts; seven with the pairs
QUICK = replace(SMALL, ph2_num_epochs=2, ph2_freeze_epoch=1)
PLACES = ("left", "center", "right")  # of titles


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return save_blobs(tmp_path_factory.mktemp("features") / "blobs.safetensors", domains=DOMAINS, per_cell=10)


def make(data, directory, methods, seeds=2, settings=QUICK, holdouts=TWO, strict=False, **options):
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


def test_the_partners_of_all_methods_are_trained_too(data, tmp_path):
    comparison = make(data, tmp_path, ["VREx", "SD"])
    assert comparison.partners == {"ERM": "ERM", "ERMBalanced": "ERMBalanced", "VREx": "ERMBalanced", "SD": "ERM"}


def test_records_are_of_every_run_and_all_different(whole):
    records = whole.run.records()
    runs = 5 * 2 * (2 + 5) * 3  # methods with partners, trials, holdouts and pairs, seeds
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
        make(data, tmp_path / name, ["SD"]).train()

    train("a")
    monkeypatch.setattr(Archive, "save_method", save)
    with pytest.raises(KeyboardInterrupt):
        train("b")
    monkeypatch.setattr(Archive, "save_method", real)
    train("b")
    assert everything(tmp_path / "a") == everything(tmp_path / "b")


def test_after_a_full_disk_the_same_command_ends_with_the_same_files(data, tmp_path):
    def train(name):
        make(data, tmp_path / name, ["SD"], seeds=3, holdouts=["art"]).train()
        return everything(tmp_path / name)

    clean, unlimited = train("clean"), resource.getrlimit(resource.RLIMIT_FSIZE)
    sizes = sorted(map(len, clean.values()))
    assert sizes[-1] == len(clean["records.jsonl"])  # so that its writing is cut off anywhere, and no other
    for limit in {*range(sizes[-2], sizes[-1], 1100), *sizes[:-2]}:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit - 1, unlimited[1]))
        try:
            with pytest.raises(Exception, match="too large"):
                train(str(limit))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        assert train(str(limit)) == clean


@pytest.mark.parametrize("fault", ["seeds", "failed", "correct", "shape"])
def test_a_damaged_history_is_refused_before_anything_is_trained(fault, data, tmp_path):
    make(data, tmp_path, ["ERM"], holdouts=["art"]).train()
    path = tmp_path / "histories" / "compare_ERM_0_art.npz"
    with np.load(path) as file:
        arrays = dict(file)
    arrays["correct"] = arrays["correct"][:, :1] if fault == "shape" else arrays["correct"]
    arrays.pop(fault, None)
    np.savez(path, **arrays)
    before = dated(tmp_path)
    with pytest.raises(InputError, match="compare_ERM_0_art"):
        make(data, tmp_path, ["ImportanceMask"], holdouts=["art"]).train()
    assert dated(tmp_path) == before


def test_a_second_run_trains_nothing_and_one_that_needs_more_says_what(whole):
    directory = whole.run.results.directory
    before, comparison = dated(directory), again(whole, trials=2, leave_one_out=True)
    assert comparison.missing() == []
    comparison.train()
    assert dated(directory) == before
    with pytest.raises(InputError, match="2 runs are missing, first ERM, trial 2, holdout art"):
        again(whole, ["ERM"], trials=3).curves()


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
        ({"hyperparameters": {"balance_weight": Hyperparameter(3.0, "β")}}, "balance_weight = 0.01, not 3.0"),
        ({"hyperparameters": {"extra": Hyperparameter(1.0, "more")}}, "extra = None, not 1.0"),
        ({"version": 2}, "version 1 of GMoE, not 2"),
    ],
    ids=["default", "more", "version"],
)
def test_results_of_another_method_are_not_mixed_with_what_is_there(change, message, whole, monkeypatch):
    directory, method = whole.run.results.directory, ALGORITHMS["GMoE"]
    before = dated(directory)
    for name, value in change.items():
        old = getattr(method, name)
        monkeypatch.setattr(method, name, {**old, **value} if name == "hyperparameters" else value)
    comparison = again(whole, ["GMoE"])
    for use in (comparison.train, comparison.curves):
        with pytest.raises(InputError, match=message):
            use()
    assert dated(directory) == before


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


@pytest.fixture(scope="module")
def masked(data, tmp_path_factory):
    """All methods with masks, after Phase 1, whose settings are not the defaults."""
    settings = replace(SMALL, ph2_freeze_epoch=1, ph2_lr_decay_rate=0.3, importance_threshold_percentile=40.0)
    comparison = make(data, tmp_path_factory.mktemp("masked"), MASKED, 3, settings)
    Study(comparison.run, [Arm(ALGORITHMS[name].control) for name in MASKED]).phase1()
    return comparison


@pytest.mark.parametrize("name", MASKED)
def test_a_masked_method_is_the_arm_of_the_study(name, masked):
    """In float64 the same networks as Phase 2 itself trains, whatever the settings are."""
    run, method, seeds = masked.run, ALGORITHMS[name], (0, 1, 2)
    settings, arm, values = run.settings, Arm(method.control), masked.values(method, 0)
    exact = SplitFeatures.from_features(run.features, settings, dtype=torch.float64)
    given = given_to(run, method, ("art",), seeds, values)
    assert given.failed is None or not given.failed.any()
    ours = train_method(exact, ("art",), seeds, partial(method, **values), settings, given=given.state)
    theirs = train_holdout(exact, "art", seeds, [arm.masking(mask_source(run, ["art"], seeds), settings)])
    for key, value in ours.params.items():
        assert torch.allclose(value, theirs.final[key][:, 0], rtol=0, atol=1e-9), key
    assert torch.equal(ours.correct, theirs.correct[:, 0])


def test_a_drawn_part_of_the_weights_is_marked(whole):
    for trial in (0, 1):
        values = whole.values(ALGORITHMS["ImportanceMask"], trial) | {"kept": 20.0 + 60 * trial}
        given = given_to(whole.run, ALGORITHMS["ImportanceMask"], ("art", "photo"), (0, 1, 2), values)
        marked = sum(layer.sum((1, 2)) for layer in given.state["mask"].values())
        assert marked.tolist() == [(10, 40)[trial]] * 3  # of 5·6 + 4·5 weights


def test_no_method_sees_a_held_out_domain(data, tmp_path):
    """Other images of the domain change nothing in training, nor in masks, ranks and experts."""
    d = blobs(domains=DOMAINS, per_cell=10)
    changed = torch.where((d.domains == DOMAINS.index("art")).unsqueeze(1), -d.features, d.features).half()
    rows = d.labels, d.domains, d.class_names, d.domain_names, d.files
    save_features(tmp_path / "other.safetensors", changed, *rows, dataset="blobs")
    other = load_features(tmp_path / "other.safetensors")
    options = {"methods": ["ImportanceMask", "OtherSeedMask", "ImportanceMixout", "LFME"], "leave_one_out": True}
    a, b = (make(features, tmp_path / name, **options) for name, features in (("a", data), ("b", other)))
    for comparison in (a, b):
        comparison.train()
    assert len(a.holdouts) == 2 + 5
    for name, holdouts in product(a.names, a.holdouts):
        losses = [comparison.run.archive.method(name, 0, holdouts).history["loss"] for comparison in (a, b)]
        assert torch.equal(*losses) == ("art" in holdouts), (name, holdouts)


def test_curves_are_the_accuracies_on_disk(whole):
    curves = whole.curves()
    assert len(curves) == 5 * 2 * 7 * 3 * 2 * 4  # methods, trials, holdouts, seeds, epochs, domains
    final = curves[curves["epoch"] == 2].set_index(["algorithm", "trial", "holdouts", "seed", "domain"])
    for r in whole.run.records():
        if r["selection"] == "last" and "+" not in r["holdout"]:
            row = final.loc[(r["algorithm"], r["trial"], (r["holdout"],), r["seed"], r["holdout"])]
            assert row[["in", "out", "full"]].to_dict() == r["accuracy"]


def test_a_comparison_is_known_by_its_records(whole):
    run = whole.run
    found = Comparison.of(run.results.directory, lambda: run.features)
    assert (set(found.methods), found.trials, found.holdouts) == (set(whole.methods), 2, whole.holdouts)
    assert (found.run.seeds, found.run.settings) == (run.seeds, run.settings)
    key = ["algorithm", "trial", "holdouts", "seed", "epoch", "domain"]
    a, b = (comparison.curves().set_index(key).sort_index() for comparison in (found, whole))
    pd.testing.assert_frame_equal(a, b)


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
    assert set(found.index) == set(TWO)
    assert found.between(0, 1).all()
    weights = whole.run.archive.method(PARTNERS["pooled"], 0, ("art",)).params()
    rows = data.all_rows(["art"])
    total = 0
    for s in range(3):
        x = data.features[rows].float()
        for i in range(4):
            x = x @ weights[f"layers.{i}.weight"][s].T + weights[f"layers.{i}.bias"][s]
            x = x.relu() if i < 3 else x.softmax(-1)
        total = total + x
    assert found["art"] == pytest.approx(float((total.argmax(-1) == data.labels[rows]).double().mean()))


def test_expert_use_is_of_whole_images(whole):
    use = whole.run.archive.method("GMoE", 0, ("art",)).history["expert_use"]
    assert use.shape[:3] == (3, 4, 3)
    assert torch.allclose(use.sum(-1), torch.ones(3, 4, 3), atol=1e-5)


def test_the_report_and_its_files(whole, monkeypatch):
    opened, real, directory = Counter(), Results.load, whole.run.results.directory

    def load(self, kind, name):
        opened[kind, name] += 1
        return real(self, kind, name)

    monkeypatch.setattr(Results, "load", load)
    comparison = again(whole, trials=2, leave_one_out=True)
    text, figures = write(comparison), save_all(comparison)
    assert {count for (kind, _), count in opened.items() if kind == "histories"} == {1}  # each is opened once
    assert Counter(kind for kind, _ in opened) == {"histories": 5 * 2 * 7, "weights": 2}  # of ERM, for the ensemble
    assert (directory / "comparison.txt").read_text("utf-8") == text
    assert "NOT a fair rule" in text
    assert "Linear probe (logistic regression on the features, mean of 3 splits; unpaired):\n  art " in text
    assert "The masks of ImportanceMask saw the validation images" in " ".join(text.split())
    for word in ("CorGrad", "ImportanceMask", "Ensemble", "3 seeds", "its defaults, and 1 random draw."):
        assert word in text
    for rule in whole.tables():
        assert (directory / f"comparison_{rule}.csv").is_file()
    assert {path.stem for path in figures} >= {"comparison", "conflicts_CorGrad", "experts_GMoE_art"}
    assert all(path.stat().st_size > 5_000 for path in (directory / "plots").iterdir())


def test_the_report_warns_of_methods_that_did_not_learn_and_of_a_classifier_below_a_linear_one(data, tmp_path):
    comparison = make(data, tmp_path, ["SD"], settings=replace(SMALL, ph2_lr_important=1e-9))
    comparison.train()
    text = " ".join(report(comparison).split())
    assert "did not learn (ERM, SD)" in text
    assert "PH2_LR_IMPORTANT (now 1e-09)" in text
    assert "bottleneck" in text


def test_a_figure_that_fails_does_not_stop_the_others(whole, monkeypatch, caplog):
    def broken(*_):
        raise ValueError("no picture")

    monkeypatch.setattr("field.figures.difference_figure", broken)
    assert {path.stem for path in save_all(again(whole, ["CorGrad"]))} == {"conflicts_CorGrad"}
    assert "comparison" in caplog.text
    assert "no picture" in caplog.text


def test_the_finding_is_computed():
    rows = {"ERM": (1, 0.5, np.nan, np.nan, np.nan), "A": (2, 0.4, -0.1, -0.2, -0.05)}
    rows |= {"B": (3, 0.3, 0.1, 0.05, 0.2), "ImportanceMask": (4, 0.2, 0.0, -0.1, 0.1)}
    table = pd.DataFrame.from_dict(rows, "index", columns=["rank", "average_mean", "difference", "low", "high"])
    probe = pd.Series({"art": 0.5, "photo": 0.3})
    text = finding(table.astype({"rank": int}), pd.Series({"art": 0.7, "photo": 0.4}), probe)
    assert "excludes 0: B. Below it: A." in text
    assert "Logistic regression on the same features has 40.0 %, not above the mean of the best method." in text
    assert "The ensemble of the ERM networks has 55.0 %, above the mean of every" in text
    assert "number 4 of 4, +0.00 [−10.00, +10.00] points" in text
    below = finding(table, pd.Series({"art": 0.3, "photo": 0.2}), probe + 0.3)
    assert "networks has 25.0 %, not above" in below
    assert "features has 70.0 %, above" in below


def test_failed_networks_are_left_out_and_told(data, tmp_path, monkeypatch):
    class Explodes(Algorithm):
        """Its loss is never finite."""

        def loss(self, params, batch, state, noise):
            loss, changes = super().loss(params, batch, state, noise)
            return loss * torch.inf, changes

    monkeypatch.setitem(ALGORITHMS, "Explodes", Explodes)  # forgotten after the test
    comparison = make(data, tmp_path, [Explodes])
    comparison.train()
    assert len(failed(comparison)) == 2 * 2
    text = report(comparison)
    assert "4 networks failed and are left out" in text
    assert "Explodes, trial 0, holdout art, seed 0: the loss is no longer finite in epoch 1" in text
    with pytest.raises(TrainingFailedError, match="Explodes, trial 0, holdout art"):
        make(data, tmp_path / "strict", [Explodes], strict=True).train()


def test_only_balanced_methods_have_no_ensemble_and_a_report_all_the_same(whole):
    text = report(again(whole, ["CorGrad"]))
    assert "CorGrad" in text
    assert "nsemble" not in text


@pytest.mark.filterwarnings("error::UserWarning")
def test_of_a_baseline_alone_the_figure_says_why_it_is_empty(data, tmp_path):
    comparison = make(data, tmp_path, ["ERM"], holdouts=["art"])
    comparison.train()
    figure = difference_figure(comparison)
    assert not figure.axes
    assert any("No method" in text.get_text() for text in figure.texts)


def test_one_rule_trains_what_it_needs_and_is_reported_alone(whole):
    comparison = again(whole, rule="leave-one-domain-out")
    assert comparison.holdouts == again(whole, leave_one_out=True).holdouts
    assert again(whole, rule="last").holdouts == again(whole).holdouts != comparison.holdouts
    assert [*comparison.tables()] == ["leave-one-domain-out"]
    text = report(comparison)
    assert "Leave-one-domain-out validation" in text
    assert "Oracle" not in text
    figure = difference_figure(comparison)
    titles = [text.get_text() for text in figure.texts] + [ax.get_title(loc) for ax in figure.axes for loc in PLACES]
    assert any("chosen by leaving a source out" in title for title in titles)


def test_tables_of_other_runs_do_not_stay(data, tmp_path):
    comparison = make(data, tmp_path, ["ERM"], holdouts=["art"])
    comparison.train()
    (tmp_path / "comparison_leave-one-domain-out.csv").write_text("old")
    write(comparison)
    assert not (tmp_path / "comparison_leave-one-domain-out.csv").exists()
    assert all((tmp_path / f"comparison_{rule}.csv").exists() for rule in comparison.tables())
    for rule in RULES:
        (tmp_path / f"comparison_{rule}.csv").touch()
    comparison.run.results.clear()
    assert [path.name for path in tmp_path.iterdir() if path.name != ".lock"] == []


@pytest.mark.parametrize(
    ("methods", "options", "message"),
    [
        (["Nothing"], {}, "'Nothing'"),
        (["Ensemble"], {}, "Ensemble is not trained"),
        (["ERM"], {"trials": 0}, "--trials"),
        (["ERM"], {"settings": replace(SMALL, ph2_init="phase1")}, "PH2_INIT"),
        ({"batches": "ballanced"}, {}, "Own.batches"),
        ({"hyperparameters": {"a": 0.1}}, {}, r"Own.hyperparameters\['a'\]"),
        ({"control": "random"}, {}, "'kept'"),
        ([int], {}, "Algorithm"),
    ],
)
def test_bad_input_is_refused(methods, options, message, data, tmp_path):
    if isinstance(methods, dict):  # the body of a class
        methods = [type("Own", (Algorithm,), methods)]
    with pytest.raises(InputError, match=message):
        make(data, tmp_path, methods, **options)
    assert "Own" not in ALGORITHMS
