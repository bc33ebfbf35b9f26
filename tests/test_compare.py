"""A comparison of methods: what is trained, what is written, how it resumes, what it says."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from problems import features as blobs

import compare_report
from algorithms import ALGORITHMS, Algorithm, Hyperparameter, registry
from compare import PARTNERS, Comparison
from config import InputError, Settings
from evaluation import t_interval
from feature_file import load_features, save_features
from records import Results
from study import Study
from trainer_algorithm import train_algorithm
from trainer_phase2 import train_holdout
from training import Problem
from variants import build_arms

SETTINGS = Settings.current(
    hidden_sizes=(6, 5, 4), ph1_num_epochs=2, ph2_num_epochs=3, ph2_freeze_epoch=2, batch_size=16
)
DOMAINS = ("art", "cartoon", "photo", "sketch")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("features") / "blobs.safetensors"
    d = blobs(domains=DOMAINS, per_cell=20)
    save_features(path, d.features.half(), d.labels, d.domains, d.class_names, d.domain_names, d.files, dataset="blobs")
    return load_features(path)


def make(data, directory, algorithms=("ERM", "VREx"), seeds=2, **options):
    return Comparison(data, SETTINGS, Results(directory), range(seeds), algorithms, progress=False, **options)


@pytest.fixture(scope="session")
def whole(data, tmp_path_factory):
    """Methods of every kind of record, two trials, pairs of holdouts as well."""
    names = ("ERM", "VREx", "CorGrad", "GMoE", "ImportanceMask", "OtherSeedMask")
    comparison = make(data, tmp_path_factory.mktemp("whole"), names, 3, trials=2, leave_one_out=True)
    comparison.run()
    return comparison


def contents(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_the_partners_of_all_methods_are_trained_too(data, tmp_path):
    comparison = make(data, tmp_path, ["VREx", "SD"])
    assert {cls.__name__ for cls in comparison.algorithms} == {"ERM", "ERMBalanced", "VREx", "SD"}
    assert comparison.partners == {"ERM": "ERM", "ERMBalanced": "ERMBalanced", "VREx": "ERMBalanced", "SD": "ERM"}


def test_records_are_of_every_run_and_all_different(whole):
    records = whole.results.records()
    runs = 7 * 2 * (4 + 6) * 3  # methods with partners, trials, holdouts and pairs, seeds
    assert len(records) == 2 * runs  # selections
    assert len({r["key"] for r in records}) == len(records)
    assert {r["trial"] for r in records} == {0, 1}


def test_interrupted_and_resumed_is_the_same(whole, data, tmp_path, monkeypatch):
    saves, real = [], Comparison._save

    def save(self, unit, networks):
        if len(saves) == 3:
            raise KeyboardInterrupt
        saves.append(unit)
        real(self, unit, networks)

    names = ["ERM", "CorGrad"]
    make(data, tmp_path / "a", names).run()
    monkeypatch.setattr(Comparison, "_save", save)
    with pytest.raises(KeyboardInterrupt):
        make(data, tmp_path / "b", names).run()
    monkeypatch.setattr(Comparison, "_save", real)
    make(data, tmp_path / "b", names).run()
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert a.keys() == b.keys()
    assert [n for n in a if a[n] != b[n]] == []


def test_a_second_run_trains_nothing(whole, monkeypatch):
    monkeypatch.setattr(Comparison, "_train", lambda *_: pytest.fail("trained again"))
    before = contents(whole.results.directory)
    whole.run()
    assert contents(whole.results.directory) == before


def test_other_defaults_are_not_mixed_with_what_is_there(data, tmp_path, monkeypatch):
    make(data, tmp_path, ["VREx"]).run()
    changed = {**ALGORITHMS["VREx"].hyperparameters, "penalty_weight": Hyperparameter(3.0, "β")}
    monkeypatch.setattr(ALGORITHMS["VREx"], "hyperparameters", changed)
    with pytest.raises(InputError, match=r"VREx, trial 0, with penalty_weight = 10.0, not 3.0"):
        make(data, tmp_path, ["VREx"]).run()


def test_trial_0_has_the_defaults_and_others_are_drawn_the_same_each_time(whole):
    cls = ALGORITHMS["VREx"]
    defaults = {name: h.default for name, h in cls.known_hyperparameters().items()}
    assert whole.values(cls, 0) == defaults
    drawn = [whole.values(cls, trial) for trial in (1, 2, 1)]
    assert drawn[0] == drawn[2] != drawn[1]
    assert all(drawn[0][name] != defaults[name] for name in ("learning_rate", "penalty_weight", "anneal"))


def test_every_search_gives_values_that_the_method_trains_with(whole, data, tmp_path):
    names = sorted(ALGORITHMS)
    comparison = make(data, tmp_path, names, 1, trials=2, holdouts=["art"])
    comparison.run()
    last = [r for r in comparison.results.records() if r["selection"] == "last"]
    assert {(r["algorithm"], r["trial"]) for r in last} == {(name, trial) for name in names for trial in (0, 1)}
    assert [r["algorithm"] for r in last if r["failed"]] == []


@pytest.mark.parametrize("name", sorted(n for n, cls in ALGORITHMS.items() if getattr(cls, "masked", False)))
def test_a_masked_method_is_the_arm_of_the_study(name, data, tmp_path):
    """In float64 the same networks as Phase 2's own loop trains, whatever the settings are."""
    settings = replace(SETTINGS, ph2_freeze_epoch=1, ph2_lr_decay_rate=0.3, importance_threshold_percentile=40.0)
    cls, seeds = ALGORITHMS[name], (0, 1, 2)
    comparison = Comparison(data, settings, Results(tmp_path), range(3), [name], progress=False)
    comparison.study.phase1()
    comparison.problem = Problem.from_features(data, settings, dtype=torch.float64)
    given, useless = comparison._given(cls, comparison.values(cls, 0), ("art",), seeds)
    values = comparison.hyperparameters(cls, 0)
    ours = train_algorithm(comparison.problem, ("art",), seeds, cls, values, settings, given=given)
    assert useless is None or not useless.any()
    masks = [comparison.study.mask_maker(comparison.problem.sources("art"), [s + k for s in seeds]) for k in (0, 1)]
    arms = build_arms([cls.variant], "art", seeds, *masks, settings)
    theirs = train_holdout(comparison.problem, "art", seeds, arms)
    for key, value in ours.params.items():
        assert torch.allclose(value, theirs.final[key][:, 0], rtol=0, atol=1e-9), key
    assert torch.equal(ours.correct, theirs.correct[:, 0])


def test_the_settings_are_those_of_every_method(data, tmp_path):
    settings = replace(SETTINGS, ph2_lr_important=2e-3, ph2_lr_unimportant_start=1e-3, ph2_num_epochs=4)

    class Quick(Algorithm):
        hyperparameters = {"learning_rate": Hyperparameter(0.1, "its own")}

    comparison = Comparison(data, settings, Results(tmp_path), range(2), ["SD", "ImportanceMask"], progress=False)
    assert comparison.values(ALGORITHMS["SD"], 0)["learning_rate"] == 2e-3
    assert comparison.values(Quick, 0)["learning_rate"] == 0.1
    mine = comparison.values(ALGORITHMS["ImportanceMask"], 0)
    assert (mine["kept"], mine["low_rate"], mine["decay"], mine["freeze_after"]) == (60, 0.5, 0.5, 0.5)
    assert comparison.values(ALGORITHMS["SD"], 1)["learning_rate"] != 2e-3  # searched


def test_averages_by_seed_are_those_of_the_table(whole):
    averages, table = compare_report.seed_averages(whole), compare_report.tables_by_rule(whole)["training-domain"]
    assert list(averages.index) == [0, 1, 2]
    assert averages.mean().to_dict() == pytest.approx(table["average_mean"].to_dict())


def test_the_ensemble_is_no_method_to_train(data, tmp_path):
    with pytest.raises(InputError, match="Ensemble is not trained"):
        make(data, tmp_path, ["Ensemble"])


def test_masks_never_see_a_held_out_domain(whole, monkeypatch):
    asked, real = [], Study.mask_maker

    def spy(self, sources, seeds):
        asked.append(sources)
        return real(self, sources, seeds)

    monkeypatch.setattr(Study, "mask_maker", spy)
    whole._given(ALGORITHMS["ImportanceMask"], {"kept": 60.0}, ("art", "sketch"), (0, 1))
    assert set(asked) == {("cartoon", "photo")}


def test_curves_are_the_accuracies_on_disk(whole):
    curves = whole.curves()
    assert len(curves) == 7 * 2 * 10 * 3 * 3 * 4  # methods, trials, holdouts, seeds, epochs, domains
    record = next(
        r
        for r in whole.results.records()
        if (r["algorithm"], r["trial"], r["holdout"], r["seed"], r["selection"]) == ("VREx", 1, "photo", 2, "last")
    )
    row = curves[
        (curves.algorithm == "VREx") & (curves.trial == 1) & (curves.holdouts == ("photo",)) & (curves.seed == 2)
        & (curves.epoch == 3) & (curves.domain == "photo")
    ]  # fmt: skip
    assert row[["in", "out", "full"]].to_dict("records") == [record["accuracy"]]


def test_tables_hold_paired_differences_from_the_right_erm(whole):
    table = compare_report.tables_by_rule(whole)["last"]
    averages = {}
    for r in whole.results.records():
        if r["selection"] == "last" and r["trial"] == 0 and "+" not in r["holdout"]:
            averages.setdefault((r["algorithm"], r["seed"]), []).append(r["accuracy"]["full"])
    assert set(compare_report.tables_by_rule(whole)) == {"training-domain", "last", "leave-one-domain-out", "oracle"}
    assert set(table.index) == {a for a, _ in averages}
    only_defaults = make(whole.study.data, whole.results.directory, ["ERM", "VREx"], 3)
    table = compare_report.tables_by_rule(only_defaults)["last"]
    own = [np.mean(averages["VREx", s]) - np.mean(averages["ERMBalanced", s]) for s in range(3)]
    assert table.loc["VREx", ["difference", "low", "high"]].tolist() == pytest.approx(list(t_interval(own)))


def test_the_ensemble_averages_probabilities(whole):
    found = compare_report.ensemble(whole)
    assert set(found.index) == set(DOMAINS)
    assert found.between(0, 1).all()
    problem = whole.problem
    weights, _ = whole.results.load("weights", f"compare_{PARTNERS['pooled']}_0_art")
    rows = problem.rows(["art"], "all")
    total = 0
    for s in range(3):
        x = problem.features[rows]
        for i in range(4):
            x = x @ weights[f"final.layers.{i}.weight"][s].T + weights[f"final.layers.{i}.bias"][s]
            x = x.relu() if i < 3 else x.softmax(-1)
        total = total + x
    assert found["art"] == pytest.approx(float((total.argmax(-1) == problem.labels[rows]).double().mean()))


def test_the_report_and_its_files(whole):
    text = compare_report.write(whole)
    directory = whole.results.directory
    assert (directory / "comparison.txt").read_text("utf-8") == text
    assert "NOT a fair rule" in text
    assert "Logistic regression on the features (deterministic; unpaired):\n  art " in text
    assert "The masks of ImportanceMask, OtherSeedMask saw the validation images" in " ".join(text.split())
    for word in ("VREx", "ImportanceMask", "Ensemble", "3 seeds", "its defaults, and 1 random draw."):
        assert word in text
    for name in ("comparison", "conflicts_CorGrad", "experts_GMoE_art"):
        assert (directory / "plots" / f"{name}.png").stat().st_size > 5_000
    assert (directory / "comparison_training-domain.csv").is_file()


def test_logistic_regression_is_fitted_once(whole, monkeypatch):
    first = compare_report.probe_of(whole)
    monkeypatch.setattr(compare_report, "linear_probe", lambda *_: pytest.fail("fitted again"))
    assert compare_report.probe_of(whole).equals(first)
    assert list(first.index) == list(DOMAINS)


def test_the_finding_is_computed():
    rows = {"ERM": (1, 0.5, np.nan, np.nan, np.nan), "A": (2, 0.4, -0.1, -0.2, -0.05)}
    rows |= {"B": (3, 0.3, 0.1, 0.05, 0.2), "ImportanceMask": (4, 0.2, 0.0, -0.1, 0.1)}
    table = pd.DataFrame.from_dict(rows, "index", columns=["rank", "average_mean", "difference", "low", "high"])
    probe = pd.Series({"art": 0.5, "photo": 0.3})
    text = compare_report.finding(table.astype({"rank": int}), pd.Series({"art": 0.7, "photo": 0.4}), probe)
    assert "excludes 0: B. Below it: A." in text
    assert "Logistic regression on the same features has 40.0 %, not above the mean of every method." in text
    assert "The ensemble of the ERM networks has 55.0 %, above the mean of every" in text
    assert "number 4 of 4, +0.00 [−10.00, +10.00] points" in text
    below = compare_report.finding(table, pd.Series({"art": 0.3, "photo": 0.2}), probe + 0.3)
    assert "networks has 25.0 %, not above" in below
    assert "features has 70.0 %, above" in below


def test_expert_use_is_of_whole_images(whole):
    use = whole.load("GMoE", 0, ("art",))[0]["expert_use"]
    assert use.shape[:3] == (3, 4, 3)
    assert torch.allclose(use.sum(-1), torch.ones(3, 4, 3), atol=1e-5)


def test_failed_networks_are_left_out_and_told(data, tmp_path, monkeypatch):
    class Explodes(Algorithm):
        """Its loss is never finite."""

        def loss(self, params, batch, state, noise):
            loss, changes = super().loss(params, batch, state, noise)
            return loss * torch.inf, changes

    monkeypatch.setattr(registry, "ALGORITHMS", dict(ALGORITHMS))
    comparison = make(data, tmp_path, [Explodes])
    comparison.run()
    assert len(compare_report.failed(comparison)) == 4 * 2
    text = compare_report.report(comparison)
    assert "8 networks failed and are left out" in text
    assert "Explodes, trial 0, holdout art, seed 0: the loss is no longer finite in epoch 1" in text
    strict = make(data, tmp_path / "strict", [Explodes], strict=True)
    with pytest.raises(RuntimeError, match="Explodes, trial 0, holdout art"):
        strict.run()


def test_bad_input_is_told(data, tmp_path):
    with pytest.raises(InputError, match="no algorithm 'Nothing'"):
        make(data, tmp_path, ["Nothing"])
    with pytest.raises(InputError, match="--trials must be at least 1"):
        make(data, tmp_path, trials=0)


def test_only_balanced_methods_have_no_ensemble_and_a_report_all_the_same(data, tmp_path):
    comparison = make(data, tmp_path, ["VREx"])
    comparison.run()
    text = compare_report.write(comparison, figures=False)
    assert "VREx" in text
    assert "nsemble" not in text


def test_lost_weights_are_trained_again(data, tmp_path):
    make(data, tmp_path, ["ERM"]).run()
    lost = tmp_path / "weights" / "compare_ERM_0_photo.safetensors"
    before = lost.read_bytes()
    lost.unlink()
    comparison = make(data, tmp_path, ["ERM"])
    assert [unit[2] for unit in comparison._missing()] == [("photo",)]
    comparison.run()
    assert lost.read_bytes() == before


def test_tables_of_other_runs_do_not_stay(whole, data, tmp_path):
    comparison = make(data, tmp_path, ["ERM"])
    comparison.run()
    (tmp_path / "comparison_leave-one-domain-out.csv").write_text("old")
    compare_report.write(comparison, figures=False)
    assert not (tmp_path / "comparison_leave-one-domain-out.csv").exists()
    comparison.results.clear()
    assert not list(tmp_path.glob("comparison*"))


def test_an_incomplete_comparison_says_what_is_missing(data, tmp_path):
    make(data, tmp_path, ["ERM"]).run()
    with pytest.raises(InputError, match=r"4 runs are missing, first ERM, trial 1, without art\. .* run compare"):
        make(data, tmp_path, ["ERM"], trials=2).curves()


def test_an_added_hyperparameter_is_noticed(data, tmp_path, monkeypatch):
    make(data, tmp_path, ["SD"]).run()
    more = {**ALGORITHMS["SD"].hyperparameters, "extra": Hyperparameter(1.0, "more")}
    monkeypatch.setattr(ALGORITHMS["SD"], "hyperparameters", more)
    with pytest.raises(InputError, match=r"with extra = None, not 1\.0"):
        make(data, tmp_path, ["SD"]).run()


def test_a_figure_that_fails_does_not_stop_the_report(whole, monkeypatch, caplog):
    def broken(*_):
        raise ValueError("no picture")

    monkeypatch.setattr(compare_report, "expert_figure", broken)
    assert "GMoE" in compare_report.write(whole)
    assert "The figure 'experts_GMoE_art' cannot be drawn (no picture)" in caplog.text


def test_a_method_that_declares_nonsense_is_told(data, tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "ALGORITHMS", dict(ALGORITHMS))
    kinds = {
        "batches must be one of pooled, balanced": {"batches": "ballanced"},
        r"hyperparameters\['a'\] must be Hyperparameter": {"hyperparameters": {"a": 0.1}},
    }
    for sentence, body in kinds.items():
        with pytest.raises(InputError, match=sentence):
            make(data, tmp_path, [type("Mine", (Algorithm,), body)])
    with pytest.raises(InputError, match="extends Algorithm"):
        make(data, tmp_path, [int])
    assert "Mine" not in registry.ALGORITHMS
    forgets = type("Forgets", (Algorithm,), {"loss": lambda self, p, b, s, n: self.forward(p, b.features).sum()})
    with pytest.raises(InputError, match=r"Forgets\.loss must return the loss and changes"):
        make(data, tmp_path, [forgets]).run()
