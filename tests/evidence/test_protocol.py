"""The protocol: what is fixed in advance, and one complete small run of it."""

import json
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import config
from config import InputError, Settings
from evidence import FAMILY, OTHERS, Protocol, family_table
from evidence.contrasts import FAMILY_ARMS, seed_averages
from evidence.figures import all_figures, forest_figure, save_all
from evidence.protocol import LONGER, places, scaled, sweep_arms
from evidence.report import summary
from importance import unimportant_rate
from storage import Results
from study import BOTH_STARTS, ERM, IMPORTANCE, Arm, t_interval
from tests.factories import FEATURES, LEARNING, everything, make_run

SETTINGS = replace(LEARNING, ph1_learning_rate=1e-2, ph2_lr_important=1e-2, ph2_num_epochs=2, ph2_freeze_epoch=1)
SEEDS, SWEEP_SEEDS = 3, 2
HOLDOUTS = ("art", "photo", "sketch")
SIX = [contrast.name for contrast in FAMILY]
SPLITS = [f"splits/{number}" for number in range(5)]
DYING = (2, 2, 3)  # hidden sizes of which the ReLUs of seed 1 are dead from Phase 1's start on


def test_three_times_as_long_is_the_same_schedule_stretched():
    short = Settings.current()
    long = scaled(short, LONGER)
    assert (short.ph2_num_epochs, short.ph2_freeze_epoch, short.ph2_lr_decay_rate) == (10, 7, 0.5)
    assert (long.ph2_num_epochs, long.ph2_freeze_epoch) == (30, 21)
    assert long.ph2_lr_decay_rate == pytest.approx(0.5 ** (1 / 3))

    def rate(epoch):
        return unimportant_rate(epoch, long.ph2_lr_unimportant_start, long.ph2_lr_decay_rate, long.ph2_freeze_epoch)

    for epoch in range(10):  # the rates of the defaults: 1e-4 halved each epoch, zero from epoch 7 on
        assert rate(3 * epoch) == pytest.approx(1e-4 * 0.5**epoch if epoch < 7 else 0.0)
    assert rate(20) > 0 == rate(21)
    changed = {k for k, v in long.as_dict().items() if v != short.as_dict()[k]}
    assert changed == {"PH2_NUM_EPOCHS", "PH2_FREEZE_EPOCH", "PH2_LR_DECAY_RATE"}
    assert scaled(short, 1) == short


def test_the_arms_of_the_sweep_differ_from_the_defaults_in_one_setting_each():
    arms, base = sweep_arms(), Settings.current()
    assert arms[:4] == (ERM, Arm("random"), Arm("permuted"), IMPORTANCE)
    assert len(set(arms)) == len(arms) == 4 + 9 + 11 + 7
    values = {}
    for arm in arms[4:]:
        assert arm.control == "importance"
        own = arm.settings(base)
        assert own.ph2_init == "fresh"
        different = {k: v for k, v in own.as_dict().items() if v != base.as_dict()[k]}
        assert len(different) <= 1
        for key, value in different.items():
            values.setdefault(key, set()).add(value)
    assert values == {  # the defaults themselves are the points that differ in nothing
        "IMPORTANCE_THRESHOLD_PERCENTILE": {10, 20, 30, 40, 50, 70, 80, 90},
        "PH2_FREEZE_EPOCH": {0, 1, 2, 3, 4, 5, 6, 8, 9, 10},
        "IMPORTANCE_AGGREGATION": {"mean", "max", "min", "union", "intersection", "normalized_sum"},
    }


def make_protocol(data, directory, settings=SETTINGS):
    run = make_run(data, directory / f"epochs_{settings.ph2_num_epochs}", SEEDS, settings)
    return Protocol(run, directory, range(SWEEP_SEEDS))


@pytest.fixture(scope="module")
def done(data, tmp_path_factory):
    """(directory, report, contents) of a complete run. Read it, don't write to it."""
    directory = tmp_path_factory.mktemp("protocol") / "study"
    complete = make_protocol(data, directory)
    complete.train()
    text = complete.write()
    complete.save_figures()
    return directory, text, everything(directory)


def records_of(directory, kind):
    return [json.loads(line) for line in (directory / kind / "records.jsonl").read_text("utf-8").splitlines()]


def test_the_directory_holds_tables_figures_and_report(done):
    directory, text, files = done
    tables = {
        "contrasts", "contrasts_longer", "accuracy", "accuracy_longer", "sweep", "linear_probe", "seed_stability",
        "zero_importance", "mask_density", "domain_overlap", "seeds", "seeds_longer", "sources", "sources_longer",
        "controls", "per_domain", "splits",
    }  # fmt: skip
    figures = {"forest", "overlap", "importance_threshold_percentile", "ph2_freeze_epoch"}
    here = {p.name for p in directory.iterdir() if p.is_file() and not p.name.startswith(".")}
    assert here == {f"{t}.csv" for t in tables} | {f"{f}.png" for f in figures} | {"report.txt"}
    assert {p.name for p in directory.iterdir() if p.is_dir()} == {"epochs_2", "epochs_6", "sweep", "splits"}
    assert files["report.txt"].decode() == text
    assert all(files[f"{f}.png"].startswith(b"\x89PNG") for f in figures)
    assert not [name for name in files if name.split("/")[-1].startswith(".")]


STUDIES = [
    ("epochs_2", BOTH_STARTS, SEEDS, 2),
    ("epochs_6", FAMILY_ARMS, SEEDS, 6),
    ("sweep", sweep_arms(), SWEEP_SEEDS, 2),
    ("splits/3", (ERM, IMPORTANCE), SEEDS, 2),
]


@pytest.mark.parametrize(("kind", "arms", "seeds", "epochs"), STUDIES, ids=["short", "long", "sweep", "split"])
def test_each_study_has_its_arms_seeds_and_settings(done, kind, arms, seeds, epochs):
    records = records_of(done[0], kind)
    found = {(r["algorithm"], r["holdout"], r["seed"], r["selection"]) for r in records}
    assert found == set(product([arm.name for arm in arms], HOLDOUTS, range(seeds), ("last", "val")))
    assert {r["epoch"] for r in records if r["selection"] == "last"} == {epochs}
    said = json.loads((done[0] / kind / "settings.json").read_text("utf-8"))["settings"]
    expected = {"PH2_NUM_EPOCHS": epochs, "PH2_FREEZE_EPOCH": epochs // 2, "PH2_INIT": "fresh"}
    assert expected.items() <= said.items()
    assert not list((done[0] / kind).glob("weights/phase2_*"))


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
    assert table.index.tolist() == [contrast.name for contrast in OTHERS]
    for contrast in OTHERS:
        expected = t_interval(contrast.differences(averages))
        assert table.loc[contrast.name, ["mean", "low", "high"]].tolist() == pytest.approx(expected, abs=1e-5)
    domains = pd.read_csv(directory / "per_domain.csv")
    assert len(domains) == 2 * 6 * len(HOLDOUTS)
    for epochs, ending in ((2, ""), (6, "_longer")):
        means = domains[domains["epochs"] == epochs].groupby("contrast")["mean"].mean()
        family = pd.read_csv(directory / f"contrasts{ending}.csv").set_index("contrast")["mean"]
        np.testing.assert_allclose(means[family.index], family, atol=1e-5)  # every seed has every domain


def test_every_seed_of_a_small_study_has_its_split(done):
    directory, *_ = done
    table = pd.read_csv(directory / "splits.csv", index_col="split")
    for number, place in enumerate(SPLITS):
        records, settings = records_of(directory, place), json.loads((directory / place / "settings.json").read_text())
        assert settings["settings"]["SPLIT_SEED"] == number
        averages = seed_averages(records)
        assert table.loc[number, ["n", "erm"]].tolist() == pytest.approx([SEEDS, averages["erm"].mean()], rel=1e-5)
        expected = t_interval(averages["importance"] - averages["erm"])
        assert table.loc[number, ["mean", "low", "high"]].tolist() == pytest.approx(expected, abs=1e-6)
    assert table["erm"].nunique() > 1


def test_accuracy_on_the_sources_is_that_of_the_histories(done):
    directory, *_ = done
    written = pd.read_csv(directory / "sources_longer.csv", index_col="seed")
    assert written.columns.tolist() == [arm.name for arm in FAMILY_ARMS]
    for name in ("erm", "importance@phase1"):
        each = []
        for holdout in HOLDOUTS:
            with np.load(directory / "epochs_6" / "histories" / f"phase2_{holdout}_{name}.npz") as arrays:
                each.append(arrays["validation_accuracy"][:, -1])
        np.testing.assert_allclose(written[name], np.mean(each, axis=0), rtol=1e-5)


def test_the_default_points_of_the_sweep_are_the_default_arm(done):
    table = pd.read_csv(done[0] / "sweep.csv", keep_default_na=False).set_index(["algorithm", "setting", "value"])
    assert len(table) == 31
    table = table[["n", "mean", "low", "high"]]
    defaults = {"IMPORTANCE_THRESHOLD_PERCENTILE": "60", "PH2_FREEZE_EPOCH": "1", "IMPORTANCE_AGGREGATION": "sum"}
    for point in defaults.items():
        assert table.loc[("importance", *point)].tolist() == table.loc[("importance", "", "")].tolist()
    assert set(table["n"]) == {SWEEP_SEEDS}


def test_the_report_says_what_it_must(done):
    directory, text, _ = done
    probe = pd.read_csv(directory / "linear_probe.csv")["full"].mean()
    assert text.startswith("Does importance masking help?\n")
    assert all(text.count(f"\n{name} ") >= 2 for name in SIX)  # at both lengths
    for words in (
        *(f"Confirmatory family, {epochs} epochs" for epochs in (2, 6)),
        *(f"Accuracy (%), {epochs} epochs" for epochs in (2, 6)),
        *(f"\nAt {epochs} epochs importance masking helps in " for epochs in (2, 6)),
        "EXPLORATORY: one setting at a time, 2 seeds",
        "EXPLORATORY: the other controls, 2 epochs",
        "EXPLORATORY: one split for all seeds",
        "EXPLORATORY: the family's contrasts per domain",
        "\nEXPLORATORY, from 2 to 6 epochs accuracy changes (points): erm ",
        "\nA domain's masks from two starts overlap (IoU) by ",
        "the best point is not a result",
        "Chance is 33.3 %.",
        f"\nLogistic regression on the same features reaches {100 * probe:.1f} %, ",
        "270 × 8-d",
        f"{SEEDS} seeds, 3 held-out domains",
    ):
        assert words in text
    assert "failed" not in text
    assert str(directory) not in text


def test_the_probe_is_not_above_networks_that_the_longer_training_made_better(done):
    by_seed = ("seeds", "seeds_longer", "sources", "sources_longer")
    tables = {path.stem: pd.read_csv(path) for path in done[0].glob("*.csv")}
    tables |= {name: tables[name].set_index("seed") for name in by_seed}
    tables["accuracy_longer"] = tables["accuracy_longer"].assign(mean=tables["linear_probe"]["full"].mean() + 0.01)
    assert not any("above the mean of every arm" in text for text in summary(tables, (2, 6)))


def test_again_gives_the_same_bytes_and_trains_nothing(done, data, monkeypatch):
    directory, text, before = done

    def refuse(*_, **__):
        raise AssertionError("trained again")

    for name in ("train_domain", "train_holdout"):
        monkeypatch.setattr(f"study.study.{name}", refuse)
    again = make_protocol(data, directory)
    again.train()
    assert again.write() == text
    assert everything(directory) == before


def test_failed_networks_are_counted_in_the_report(data, tmp_path):
    failing = make_protocol(data, tmp_path, replace(SETTINGS, hidden_sizes=DYING, ph2_num_epochs=1))
    failing.train()
    text = failing.write()
    records = [r for kind in ("epochs_1", "epochs_3", "sweep", *SPLITS) for r in records_of(tmp_path, kind)]
    count = sum(r["failed"] is not None and r["selection"] == "last" for r in records)
    assert count > 0
    assert f"{count} networks failed and are left out, first: " in text
    for name in ("contrasts", "contrasts_longer"):
        assert set(pd.read_csv(tmp_path / f"{name}.csv")["n"]) == {SEEDS - 1}  # the importance of seed 1 is of no use
    assert pd.read_csv(tmp_path / "sources.csv", index_col="seed")["importance"].isna().tolist() == [False, True, False]


def test_the_figure_of_a_single_holdout_shows_its_family(data, done, tmp_path):
    table = family_table([r for r in records_of(done[0], "epochs_2") if r["holdout"] == "photo"])
    assert table["n"].tolist() == [SEEDS] * 6
    figure = forest_figure(table, make_run(data, tmp_path, SEEDS, SETTINGS, "photo"))
    labels = [" ".join(text.get_text().split()) for text in figure.axes[0].get_yticklabels()]
    pairs = [f"importance mask − {other}" for other in ("ERM", "random mask", "permuted mask")]
    assert labels == [*pairs, *(f"{pair}, from Phase 1's start" for pair in pairs)]


def test_figures_are_drawn_again_from_the_tables(done, tmp_path):
    directory = shutil.copytree(done[0], tmp_path / "copy")
    (path,) = save_all(directory, only=["forest"])
    assert path.stat().st_mtime_ns == (done[0] / path.name).stat().st_mtime_ns  # it shows the same numbers
    (path,) = save_all(directory, only=["forest"], format="pdf")
    assert path.read_bytes().startswith(b"%PDF")
    with pytest.raises(InputError, match="no complete study"):
        save_all(tmp_path)


def test_the_overlap_of_every_two_domains_is_drawn(done):
    table = pd.read_csv(done[0] / "domain_overlap.csv")
    axes = dict(all_figures(done[0]))["overlap"]().axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == list(table) == list(HOLDOUTS)
    shown = sorted(float(text.get_text()) for text in axes.texts)
    table = table.to_numpy()
    assert shown == pytest.approx(sorted(table[~np.eye(3, dtype=bool)]), abs=0.0051)


def leave_results(place, settings):
    """What an earlier run left."""
    with Results(place) as results:
        results.claim(settings, FEATURES)
        results.write_text("summary_report.txt", "of another run")


@pytest.fixture
def from_config(tmp_path, monkeypatch):
    """`Protocol.from_config` with results below `tmp_path`, which must not come as far as looking for features."""
    monkeypatch.setattr(config, "RESULTS_DIR", str(tmp_path / "results"))
    monkeypatch.setattr("study.run.get_features", lambda *_, **__: pytest.fail("it looked for features"))
    return Protocol.from_config


@pytest.mark.parametrize(
    ("start", "seeds", "sweep_seeds", "named"),
    [("fresh", 1, None, "--seeds"), ("fresh", 5, range(1), "--seeds"), ("phase1", 5, None, "PH2_INIT")],
)
def test_what_cannot_be_compared_is_refused(from_config, data, tmp_path, monkeypatch, start, seeds, sweep_seeds, named):
    run = make_run(data, tmp_path / "own", seeds, replace(SETTINGS, ph2_init=start))
    monkeypatch.setattr(config, "PH2_INIT", start)
    for refused in (lambda: from_config(range(seeds), sweep_seeds), lambda: Protocol(run, tmp_path, sweep_seeds)):
        with pytest.raises(InputError, match=named):
            refused()
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


@pytest.mark.parametrize("number", [0, 1, 2, 7])
def test_an_unfit_directory_is_refused_before_features_are_made(from_config, tmp_path, number):
    place, settings = places(Settings.current(batch_size=7), tmp_path / "results" / "study")[number]
    leave_results(place, settings)
    with pytest.raises(InputError, match="BATCH_SIZE = 7, not 32"):
        from_config(range(5))


def test_overwrite_deletes_what_earlier_runs_left(data, tmp_path, monkeypatch):
    monkeypatch.setattr("study.run.get_features", lambda *_, **__: data)
    monkeypatch.setattr(config, "RESULTS_DIR", str(tmp_path))
    left = [place for place, _ in places(Settings.current(), tmp_path / "study")]
    for place, settings in places(Settings.current(batch_size=7), tmp_path / "study"):
        leave_results(place, settings)
    protocol = Protocol.from_config(range(2), overwrite=True)
    studies = protocol.short, protocol.long, protocol.sweep, *protocol.splits
    assert [study.run.results.directory for study in studies] == left
    for place in left:
        assert not (place / "summary_report.txt").exists()
        assert Results(place).read_settings()["settings"]["BATCH_SIZE"] == 32


def test_where_nothing_is_left_to_do_each_file_of_records_is_read_once(done, data, tmp_path, monkeypatch):
    directory = shutil.copytree(done[0], tmp_path / "study")
    monkeypatch.setattr("study.run.get_features", lambda *_, **__: data)
    for name, value in SETTINGS.as_dict().items():
        monkeypatch.setattr(config, name, value)
    read, read_bytes = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path) or read_bytes(path))
    protocol = Protocol.from_config(range(SEEDS), range(SWEEP_SEEDS), directory)
    protocol.train()
    protocol.write()
    found = [path.relative_to(directory) for path in read if path.name == "records.jsonl"]
    assert everything(directory) == done[2]
    assert sorted(found) == sorted(Path(kind, "records.jsonl") for kind in ("epochs_2", "epochs_6", "sweep", *SPLITS))


@pytest.mark.parametrize(("seeds", "sweep_seeds"), [(4, range(4)), (60, range(50))])
def test_the_sweep_takes_the_first_seeds(data, tmp_path, seeds, sweep_seeds):
    protocol = Protocol(make_run(data, tmp_path / "own", seeds), tmp_path)
    assert protocol.sweep.run.seeds == tuple(sweep_seeds)
    assert len(protocol.short.run.seeds) == len(protocol.long.run.seeds) == seeds
