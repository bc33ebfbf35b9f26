"""One complete small answer: what is trained, what is written, what it says."""

import json
from itertools import product

import numpy as np
import pandas as pd
import pytest
from test_answer import ARMS, HOLDOUTS, SIX
from test_study import make_features

import answer as answer_module
import config
import study as study_module
from answer import LONGER, Answer, scaled, sweep_arms
from answer_report import report
from config import Settings
from evaluation import t_interval
from experiment import main
from records import Results

SMALL = Settings.current(
    hidden_sizes=(6, 5, 4),
    ph1_num_epochs=2,
    ph1_learning_rate=1e-2,
    ph2_num_epochs=2,
    ph2_lr_important=1e-2,
    ph2_freeze_epoch=1,
)
SEEDS, SWEEP_SEEDS = 3, 2


# --- a complete small answer ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_features(tmp_path_factory.mktemp("features") / "blobs.safetensors")


def answer(data, directory):
    return Answer(data, SMALL, directory, SEEDS, SWEEP_SEEDS, progress=False)


def contents(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def done(data, tmp_path_factory):
    """(directory, report, contents) of a complete run."""
    directory = tmp_path_factory.mktemp("answer") / "study"
    complete = answer(data, directory)
    complete.run()
    return directory, complete.write(), contents(directory)


def records_of(directory, kind):
    return [json.loads(line) for line in (directory / kind / "records.jsonl").read_text("utf-8").splitlines()]


def test_the_directory_holds_tables_figures_and_report(done):
    directory, text, files = done
    tables = {
        "contrasts", "contrasts_longer", "accuracy", "accuracy_longer", "sweep", "linear_probe", "seed_stability",
        "zero_importance", "mask_density", "domain_overlap", "seeds", "seeds_longer", "sources", "sources_longer",
        "controls", "per_domain",
    }  # fmt: skip
    figures = {"forest", "overlap", "importance_threshold_percentile", "ph2_freeze_epoch"}
    here = {p.name for p in directory.iterdir() if p.is_file() and not p.name.startswith(".")}
    assert here == {f"{t}.csv" for t in tables} | {f"{f}.png" for f in figures} | {"report.txt"}
    assert {p.name for p in directory.iterdir() if p.is_dir()} == {"epochs_2", "epochs_6", "sweep"}
    assert files["report.txt"].decode() == text
    assert all(files[f"{f}.png"].startswith(b"\x89PNG") for f in figures)
    assert not [name for name in files if name.split("/")[-1].startswith(".") and not name.endswith(".lock")]


def test_each_study_has_its_arms_seeds_and_settings(done):
    directory, *_ = done
    both = {f"{v}{s}" for v in study_module.build_arms.__globals__["VARIANTS"] for s in ("", "@phase1")}
    for kind, arms, seeds, epochs in (
        ("epochs_2", both, SEEDS, 2),
        ("epochs_6", ARMS, SEEDS, 6),
        ("sweep", set(sweep_arms()), SWEEP_SEEDS, 2),
    ):
        records = records_of(directory, kind)
        found = {(r["algorithm"], r["holdout"], r["seed"], r["selection"]) for r in records}
        assert found == set(product(arms, HOLDOUTS, range(seeds), ("last", "val")))
        assert {r["epoch"] for r in records if r["selection"] == "last"} == {epochs}
        said = json.loads((directory / kind / "settings.json").read_text("utf-8"))["settings"]
        assert said["PH2_NUM_EPOCHS"] == epochs
        assert said["PH2_FREEZE_EPOCH"] == epochs // 2
        assert said["PH2_INIT"] == "fresh"


@pytest.mark.parametrize(("kind", "ending"), [("epochs_2", ""), ("epochs_6", "_longer")])
def test_tables_are_those_of_the_records(done, kind, ending):
    directory, *_ = done
    frame = pd.DataFrame(records_of(directory, kind)).query("selection == 'last'")
    frame = frame.assign(full=[a["full"] for a in frame["accuracy"]])
    averages = frame.pivot_table("full", "seed", "algorithm", aggfunc="mean")
    written = pd.read_csv(directory / f"seeds{ending}.csv", index_col="seed")
    assert sorted(written.columns) == sorted(averages.columns)
    np.testing.assert_allclose(written[averages.columns], averages, rtol=1e-5)
    assert averages.std().max() > 0  # the networks learned something, and not all the same
    table = pd.read_csv(directory / f"contrasts{ending}.csv").set_index("contrast")
    assert table.index.tolist() == SIX
    for name in SIX:
        better, worse = name.split(" − ")
        assert table.loc[name, "mean"] == pytest.approx((averages[better] - averages[worse]).mean(), abs=1e-6)
    accuracy = pd.read_csv(directory / f"accuracy{ending}.csv").query("holdout == 'average'").set_index("algorithm")
    np.testing.assert_allclose(accuracy["mean"][averages.columns], averages.mean(), rtol=1e-5)


def test_exploratory_differences_are_those_of_the_records(done):
    directory, *_ = done
    averages = pd.read_csv(directory / "seeds.csv", index_col="seed")
    table = pd.read_csv(directory / "controls.csv").set_index("contrast")
    names = ["random_layer", "inverted", "other_seed", "prune", "frozen"]
    assert table.index.tolist() == [f"importance{at} − {name}{at}" for at in ("", "@phase1") for name in names]
    for contrast in table.index:
        better, worse = contrast.split(" − ")
        difference = averages[better] - averages[worse]
        assert table.loc[contrast, "mean"] == pytest.approx(difference.mean(), abs=1e-6)
        assert table.loc[contrast, ["low", "high"]].tolist() == pytest.approx(t_interval(difference)[1:], abs=1e-5)
    domains = pd.read_csv(directory / "per_domain.csv")
    assert len(domains) == 2 * 6 * len(HOLDOUTS)
    for epochs, ending in ((2, ""), (6, "_longer")):
        means = domains[domains["epochs"] == epochs].groupby("contrast")["mean"].mean()
        family = pd.read_csv(directory / f"contrasts{ending}.csv").set_index("contrast")["mean"]
        np.testing.assert_allclose(means[family.index], family, atol=1e-5)  # every seed has every domain


def test_accuracy_on_the_sources_is_that_of_the_histories(done):
    directory, *_ = done
    written = pd.read_csv(directory / "sources_longer.csv", index_col="seed")
    each = []
    for holdout in HOLDOUTS:
        with np.load(directory / "epochs_6" / "histories" / f"phase2_{holdout}_erm.npz") as arrays:
            each.append(arrays["validation_accuracy"][:, -1])
    np.testing.assert_allclose(written["erm"], np.mean(each, axis=0), rtol=1e-5)


def test_the_default_points_of_the_sweep_are_the_default_arm(done):
    table = pd.read_csv(done[0] / "sweep.csv", keep_default_na=False).set_index(["algorithm", "setting", "value"])
    assert len(table) == 31
    table = table[["n", "mean", "low", "high"]]
    default = table.loc[("importance", "", "")]
    for setting, value in (
        ("IMPORTANCE_THRESHOLD_PERCENTILE", "60"),
        ("PH2_FREEZE_EPOCH", "1"),
        ("IMPORTANCE_AGGREGATION", "sum"),
    ):
        assert table.loc[("importance", setting, value)].tolist() == default.tolist()
    assert set(table["n"]) == {SWEEP_SEEDS}


def test_the_report_says_what_it_must(done):
    directory, text, _ = done
    assert text.startswith("Does importance masking help?\n")
    for epochs in (2, 6):
        for name in SIX:
            assert text.count(f"\n{epochs} epochs, {name}: ") == 1
        assert f"Confirmatory family, {epochs} epochs" in text
        assert f"Accuracy (%), {epochs} epochs" in text
        assert f"\nAt {epochs} epochs importance masking helps in " in text
    for words in (
        "one setting at a time, 2 seeds",
        "the other controls, 2 epochs",
        "the family's contrasts per domain",
    ):
        assert f"EXPLORATORY: {words}" in text
    assert "\nEXPLORATORY, from 2 to 6 epochs accuracy changes (points): erm " in text
    assert "\nA domain's masks from two starts overlap (IoU) by " in text
    assert "the best point is not a result" in text
    assert "Chance is 33.3 %." in text
    probe = pd.read_csv(directory / "linear_probe.csv")["full"].mean()
    assert f"\nLogistic regression on the same features reaches {100 * probe:.1f} %, " in text
    assert "270 × 8-d" in text
    assert f"{SEEDS} seeds, 3 held-out domains" in text
    assert "failed" not in text
    assert str(directory) not in text


def test_the_probe_is_not_above_networks_that_the_longer_training_made_better(done, data):
    complete = answer(data, done[0])
    tables = complete.tables()
    tables["accuracy_longer"] = tables["accuracy_longer"].assign(mean=tables["linear_probe"]["full"].mean() + 0.01)
    assert "above every network" not in report(complete.studies, tables)


def test_again_gives_the_same_bytes_and_trains_nothing(done, data, monkeypatch):
    directory, text, before = done

    def refuse(*_, **__):
        raise AssertionError("trained again")

    for name in ("train_domain", "train_holdout"):
        monkeypatch.setattr(study_module, name, refuse)
    again = answer(data, directory)
    again.run()
    assert again.write() == text
    assert contents(directory) == before


def test_the_answer_starts_fresh_whatever_the_settings_say(data, tmp_path):
    settings = Settings.current(**{**vars(SMALL), "ph2_init": "phase1"})
    studies = Answer(data, settings, tmp_path, SEEDS, SWEEP_SEEDS, progress=False).studies
    assert {study.settings.ph2_init for study in studies.values()} == {"fresh"}
    assert [len(study.seeds) for study in studies.values()] == [SEEDS, SEEDS, SWEEP_SEEDS]


def test_failed_networks_are_counted_in_the_report(data, tmp_path, monkeypatch):
    variables = study_module.train_domain.__globals__
    start = variables["random_start"]

    def poisoned(seeds, purpose, sizes):
        params = start(seeds, purpose, sizes)
        for i, seed in enumerate(seeds):
            if seed == 1 and purpose == "start":
                params["layers.0.weight"][i] = float("inf")
        return params

    monkeypatch.setitem(variables, "random_start", poisoned)
    monkeypatch.setattr(answer_module, "SWEEPS", {"PH2_FREEZE_EPOCH": (0, 1), "IMPORTANCE_THRESHOLD_PERCENTILE": (60,)})
    failing = answer(data, tmp_path)
    failing.run()
    text = failing.write()
    records = [r for kind in ("epochs_2", "epochs_6", "sweep") for r in records_of(tmp_path, kind)]
    count = sum(r["failed"] is not None and r["selection"] == "last" for r in records)
    assert count > 0
    assert f"{count} networks failed and are left out, first: " in text
    for name in ("contrasts", "contrasts_longer"):
        assert set(pd.read_csv(tmp_path / f"{name}.csv")["n"]) == {SEEDS - 1}  # the importance of seed 1 is of no use


# --- from the command line -------------------------------------------------------------------------------------


@pytest.fixture
def restored_config():
    """Constants of `config` as they were, after a command has set them in this process."""
    before = {name: getattr(config, name) for name in config.names()}
    yield
    config.apply(before)


@pytest.mark.parametrize("options", [("--seeds", "1"), ("--seeds", "5", "--sweep-seeds", "1")], ids=" ".join)
def test_one_seed_is_refused_in_one_sentence(options, tmp_path, monkeypatch, capsys, restored_config):
    monkeypatch.chdir(tmp_path)
    assert main(["study", *options]) == 2
    written = capsys.readouterr()
    assert written.err == "A study compares over seeds: --seeds and --sweep-seeds must be at least 2.\n"
    assert written.out == ""
    assert not list(tmp_path.iterdir())


def test_an_unfit_directory_is_refused_before_the_images_are_read(tmp_path, monkeypatch, capsys, restored_config):
    longer = scaled(Settings.current(batch_size=7), LONGER)
    Results(tmp_path / f"epochs_{longer.ph2_num_epochs}").claim(longer, {"fingerprint": "abc"})
    monkeypatch.setattr("features.get_features", lambda *_, **__: pytest.fail("it looked for features"))
    assert main(["study", "--seeds", "5", "--results-dir", str(tmp_path)]) == 2
    assert "holds results with BATCH_SIZE = 7, not 32" in capsys.readouterr().err
