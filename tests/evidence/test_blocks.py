"""The study of trained blocks: each arm at its own rate, the tables, and that records are enough to go on."""

import json
import re
import shutil
from types import SimpleNamespace

import pandas as pd
import pytest

import config
from config import InputError, Settings
from evidence import BlockProtocol, block_findings, blocks
from evidence.blocks import (
    CRITERIA,
    ERM,
    HEAD,
    RATES,
    arms_of,
    at_chosen_rates,
    cautions,
    chosen_rates,
    freeze_epoch,
    label,
    masked,
    report,
)
from evidence.figures import save_blocks
from evidence.own_rates import BLOCKS, at_rate
from study import Execution, Run
from tests.factories import dated, make_record, save_blobs, token_blobs

SETTINGS = Settings.current(trained_blocks=1, batch_size=16, ph1_num_epochs=1, ph2_num_epochs=1)


def rated(arm, rate):
    return at_rate(arm, rate, BLOCKS)


def protocol(directory, features=None, seeds=(0, 1), settings=SETTINGS, controls=False, sweep_seeds=None, **options):
    features = token_blobs() if features is None else features
    run = Run(features, settings, directory / "grid", seeds, execution=Execution(seeds_per_chunk=1, progress=False))
    return BlockProtocol(run, directory, controls, sweep_seeds, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    made = protocol(tmp_path_factory.mktemp("blocks"), controls=True)
    made.train()
    made.write()
    return made


def validated(arm, rate, holdout, seed, validation):
    accuracy = None if validation is None else rate  # so that the accuracy tells which rate was taken
    return make_record(rated(arm, rate).name, holdout, seed, accuracy) | {"validation": validation}


def test_each_arm_takes_the_rate_of_best_mean_validation_the_smaller_of_equals():
    shares = {
        "art": [(0.5, 0.6), (0.7, 0.8), (0.8, 0.7), (0.9, 0.1), (0.6, 0.6)],
        "photo": [(0.1, 0.1), (0.2, None), (0.1, 0.2), (0.2, 0.3), (0.3, 0.3)],
    }
    arm = masked("importance", 10.0)
    records = [
        validated(arm, rate, holdout, seed, value)
        for holdout, of_rates in shares.items()
        for rate, values in zip(RATES, of_rates, strict=True)
        for seed, value in enumerate(values)
    ]
    chosen = chosen_rates(records, [arm], ["art", "photo"])
    assert chosen["rate"].tolist() == [RATES[1], RATES[4]]  # of equals the smaller; a failed network counts as 0
    assert chosen["validation"].tolist() == pytest.approx([0.75, 0.3])
    assert chosen["edge"].tolist() == [False, True]
    own = at_chosen_rates(records, [arm], chosen)
    assert [(r["algorithm"], r["holdout"], r["accuracy"]["full"]) for r in own] == [
        *[("importance 10 %", "art", RATES[1])] * 2,
        *[("importance 10 %", "photo", RATES[4])] * 2,
    ]


def test_arms_are_labelled_and_each_is_trained_at_all_rates(whole):
    assert [label(arm) for arm in (ERM, HEAD, masked("random_layer", 0.1))] == ["erm", "head", "random_layer 0.1 %"]
    assert {folder: len(arms_of(folder, SETTINGS)) for folder in whole.own} == {
        "grid": 10, "controls": 12, "schedule": 6,
    }  # fmt: skip
    for folder, study in ((folder, own.tried) for folder, own in whole.own.items()):
        assert len(study.records()) == len(arms_of(folder, SETTINGS)) * len(RATES) * 3 * 2  # holdouts, seeds
        assert {record["selection"] for record in study.records()} == {"last"}
        kept = {path.name for path in study.run.results.directory.iterdir()} - {".lock"}
        assert kept == {"records.jsonl", "settings.json", "importance", "histories"}
        assert all(path.name.startswith("phase1_") for path in (study.run.results.directory / "histories").iterdir())


def test_tables_and_report_say_what_was_measured(whole):
    tables, text = whole.tables(), (whole.results.directory / "report.txt").read_text()
    assert len(tables["contrasts"]) == 4
    assert tables["contrasts"]["verdict"].str.startswith("too few seeds").all()
    densities = tables["densities"].set_index(["criterion", "density"])
    assert densities.loc[("head", 0.0), "above"] == 0
    averages = tables["seeds"]
    assert densities.loc[("magnitude", 1.0), "mean"] == pytest.approx(averages["magnitude 1 %"].mean())
    assert densities.loc[("erm", 100.0), "above"] == pytest.approx((averages["erm"] - averages["head"]).mean())
    controls = tables["controls"].set_index(["control", "density"])
    expected = (averages["importance 1 %"] - averages["inverted 1 %"]).mean()
    assert controls.loc[("inverted", 1.0), ["n", "mean"]].tolist() == pytest.approx([2, expected])
    assert len(controls) == 3 * 4
    fixed = tables["seeds_fixed_rate"]["erm"]
    at_default = [
        r for r in whole.own["grid"].tried.records() if r["algorithm"] == "erm[BACKBONE_LEARNING_RATE=0.0001]"
    ]
    expected = pd.DataFrame([(r["seed"], r["accuracy"]["full"]) for r in at_default]).groupby(0)[1].mean()
    assert fixed.tolist() == pytest.approx(expected.tolist())
    for word in (
        "importance 10 % − random_layer 10 %",
        "too few seeds",
        "minus other controls",
        f"{RATES[0]:g} (edge)",
        "Appendix",
    ):
        assert word in text


def test_the_schedule_stands_beside_the_frozen_arms_under_the_same_names(whole):
    tables = whole.tables()
    assert freeze_epoch(5) == 4  # on features 7 of 10
    assert list(tables["accuracy_schedule"]["algorithm"].unique()) == [
        "erm", "head", "importance 10 %", "random_layer 10 %", "importance 1 %", "random_layer 1 %", "importance 60 %",
        "erm decaying",
    ]  # fmt: skip
    assert tables["seeds_schedule"]["erm"].equals(tables["seeds"]["erm"])
    rates = tables["rates_schedule"].set_index(["arm", "holdout"])["rate"]
    seed, arm = 1, "importance[IMPORTANCE_THRESHOLD_PERCENTILE=10.0,BLOCK_FREEZE_EPOCH={},BACKBONE_LEARNING_RATE={}]"
    found = [
        r["accuracy"]["full"]
        for r in whole.own["schedule"].tried.records()
        if r["seed"] == seed and r["algorithm"] == arm.format(1, rates["importance 10 %", r["holdout"]])
    ]
    averages, decaying = tables["seeds_schedule"], tables["decaying"].set_index(["arm", "baseline"])
    assert averages.loc[seed, "importance 10 %"] == pytest.approx(sum(found) / 3)
    expected = (averages["importance 1 %"] - averages["erm decaying"]).mean()
    assert decaying.loc[("importance 1 %", "erm decaying"), ["n", "mean"]].tolist() == pytest.approx([2, expected])
    assert len(decaying) == 6 + 5


def test_what_is_exploratory_takes_seeds_of_its_own(tmp_path):
    made = protocol(tmp_path, seeds=range(12), controls=True)
    assert {name: len(own.run.seeds) for name, own in made.own.items()} == {"grid": 12, "controls": 10, "schedule": 10}
    made = protocol(tmp_path, seeds=(0, 1, 2), controls=True, sweep_seeds=(1, 2))
    assert made.own["controls"].run.seeds == (1, 2)


def test_what_failed_and_what_did_not_learn_is_said(whole):
    tables, run, studies = whole.tables(), whole.run, [own.tried for own in whole.own.values()]
    assert not any(words in report(tables, run, studies) for words in ("did not learn", "failed and are left out"))
    tables["rates"]["validation"] = 0.34  # of three classes
    (sentence,) = cautions(tables["rates"], run)
    assert "BLOCK_EPOCHS (now 1)" in sentence
    failed = SimpleNamespace(failures=lambda: ["erm, holdout art, seed 0: the loss is no longer finite in epoch 1"])
    text = report(tables, run, [failed])
    assert "1 networks failed and are left out, first: erm, holdout art, seed 0" in text
    assert "did not learn" in text


def test_figures_and_findings_are_made_from_the_tables(whole, tmp_path):
    folder = shutil.copytree(whole.results.directory, tmp_path / "copy")
    report = " ".join((folder / "report.txt").read_text().split())
    found = block_findings(folder)
    assert len(found) >= 4 + 1  # contrasts, accuracies
    assert all(text in report for text in found)
    with pytest.raises(InputError, match="no study of blocks"):
        block_findings(tmp_path)
    assert {path.name for path in save_blocks(folder)} == {"density.png", "forest.png"}


def test_records_alone_are_enough_to_go_on(whole, tmp_path):
    grid = whole.own["grid"].run.results.directory
    (tmp_path / "grid").mkdir()
    for name in ("records.jsonl", "settings.json"):
        shutil.copy(grid / name, tmp_path / "grid" / name)
    before = dated(tmp_path)
    again = protocol(tmp_path)
    again.train()
    assert dated(tmp_path) == before
    pd.testing.assert_frame_equal(again.tables()["accuracy"], protocol(whole.results.directory).tables()["accuracy"])
    more = protocol(tmp_path, seeds=(0, 1, 2))
    more.train()
    assert {record["seed"] for record in more.own["grid"].tried.records()} == {0, 1, 2}
    assert more.own["grid"].run.archive.phase1_seeds("art") == {2}


def test_seeds_beyond_the_first_are_trained_at_the_chosen_rates_and_at_one(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "RATE_SEEDS", {"grid": 1, "controls": 1, "schedule": 1})
    made = protocol(tmp_path, seeds=(0, 1, 2), controls=True, sweep_seeds=(1, 2))
    made.train()
    tables, found = made.tables(), {}
    for folder, own in made.own.items():
        records = pd.DataFrame(own.run.results.records())
        found[folder] = {seed: {*of.groupby(["algorithm", "holdout"]).groups} for seed, of in records.groupby("seed")}
    holdouts = made.run.holdouts
    wanted = {
        folder: {(rated(arm, rate).name, h) for arm in arms_of(folder, SETTINGS) for rate in RATES for h in holdouts}
        for folder in found
    }
    named = {label(arm): arm for folder in ("grid", "controls") for arm in arms_of(folder, SETTINGS)}
    own = {(rated(named[row.arm], row.rate).name, row.holdout) for row in tables["rates"].itertuples()}
    fixed = {(rated(arm, 1e-4).name, holdout) for arm in arms_of("grid", SETTINGS) for holdout in holdouts}
    assert found["grid"] == {0: wanted["grid"], 1: own & wanted["grid"] | fixed, 2: own & wanted["grid"] | fixed}
    assert found["controls"] == {1: wanted["controls"], 2: own & wanted["controls"]}
    assert tables["seeds"].notna().sum().to_dict() == {
        name: 3 if name.split()[0] in ("erm", "head", *CRITERIA) else 2 for name in tables["seeds"]
    }
    assert list(tables["seeds_fixed_rate"].index) == [1, 2]
    first = [r for r in made.own["grid"].run.results.records() if r["seed"] == 0]
    chosen = chosen_rates(first, arms_of("grid", SETTINGS), holdouts)
    pd.testing.assert_frame_equal(tables["rates"].iloc[: len(chosen)], chosen)
    assert "3 seeds" in made.write()


def test_of_arms_that_are_added_those_alone_are_trained(whole, tmp_path):
    """The rates of the grid may be extended: what is there stays as it is, in its place."""
    old = whole.own["grid"].run.results.directory
    lines = (old / "records.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if '"erm[BACKBONE_LEARNING_RATE=0.0003]"' not in line]
    assert len(lines) - len(kept) == 3 * 2
    (tmp_path / "grid").mkdir()
    shutil.copy(old / "settings.json", tmp_path / "grid" / "settings.json")
    (tmp_path / "grid" / "records.jsonl").write_text("".join(kept))
    again = protocol(tmp_path)
    again.train()
    found = (tmp_path / "grid" / "records.jsonl").read_text().splitlines(keepends=True)
    assert found[: len(kept)] == kept
    assert {json.loads(line)["algorithm"] for line in found[len(kept) :]} == {"erm[BACKBONE_LEARNING_RATE=0.0003]"}
    assert len(found) == len(lines)


def test_weights_are_kept_of_each_arm_at_its_chosen_rate(whole, tmp_path, caplog):
    caplog.set_level("INFO")
    for name in ("records.jsonl", "settings.json"):
        (tmp_path / "grid").mkdir(exist_ok=True)
        shutil.copy(whole.own["grid"].run.results.directory / name, tmp_path / "grid" / name)
    kept = protocol(tmp_path, weights=True)
    kept.train()
    rates = kept.tables()["rates"]
    named = {label(arm): arm for arm in arms_of("grid", SETTINGS)}
    wanted = {(rated(named[row.arm], row.rate).name, row.holdout): row for row in rates.itertuples()}
    records, grid = (
        {r["key"]: r["accuracy"]["full"] for r in results.records() if (r["algorithm"], r["holdout"]) in wanted}
        for results in (kept.chosen, kept.own["grid"].run.results)
    )
    assert len(grid) == len(wanted) * 2  # seeds
    assert {key: records[key] for key in grid} == pytest.approx(grid)
    assert len(kept.chosen.records()) == len(records) == 2 * len(grid)  # by both rules of selection, and no other arms
    files = {path.stem for path in (kept.chosen.directory / "weights").iterdir()}
    assert files == {f"phase2_{holdout}_{arm}" for arm, holdout in wanted}
    size = sum(path.stat().st_size for path in (kept.chosen.directory / "weights").iterdir())
    assert float(re.search(r"([\d.]+) MB", caplog.text)[1]) == pytest.approx(size / 1e6, rel=0.3)  # without headers
    before = dated(tmp_path)
    protocol(tmp_path, weights=True).train()
    assert dated(tmp_path) == before


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seeds": (0,)}, "--seeds"),
        ({"sweep_seeds": (0,)}, "--sweep-seeds"),
        ({"sweep_seeds": (1, 2)}, "--sweep-seeds"),  # 2 is none of --seeds
        ({"settings": Settings.current(trained_blocks=1, ph2_freeze_epoch=2)}, "BLOCK_FREEZE_EPOCH"),
    ],
)
def test_what_is_no_study_of_blocks_is_refused(changes, named, tmp_path):
    with pytest.raises(InputError, match=named):
        protocol(tmp_path, **changes)


def test_features_without_tokens_are_refused(tmp_path, monkeypatch):
    features = save_blobs(tmp_path / "features.safetensors")
    with pytest.raises(InputError, match="TRAINED_BLOCKS"):
        protocol(tmp_path, features, settings=Settings.current())
    monkeypatch.setattr(config, "TRAINED_BLOCKS", 1)
    with pytest.raises(InputError, match="DATA_ROOT"):
        BlockProtocol.from_config([0, 1], tmp_path / "other")
