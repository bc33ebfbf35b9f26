"""The study of forms: every criterion beside its twin, at its own rate, and when a form is given up."""

from dataclasses import replace

import pandas as pd
import pytest

import config
from config import InputError
from evidence import FormsProtocol
from evidence.form_tables import best_forms, closer_arms, differences, form, forms_at, forms_wide, label, ranks_sentence
from evidence.forms import DENSITIES, RATE_SEEDS, RATES
from evidence.own_rates import CLASSIFIER, at_rate
from importance import CRITERIA
from study import Arm
from tests.factories import LEARNING, everything, make_run

FORMS = forms_at(DENSITIES)
SETTINGS = replace(LEARNING, ph1_data="in", ph2_num_epochs=2, ph2_freeze_epoch=1, ph1_num_epochs=2)


def make_protocol(data, directory, seeds):
    run = make_run(data, directory / "width_10", settings=SETTINGS, seeds=range(seeds))
    return FormsProtocol({"width_10": run}, directory)


@pytest.fixture
def small_rates(monkeypatch):
    monkeypatch.setitem(RATES, CLASSIFIER, (1e-3, 1e-2))
    monkeypatch.setitem(RATE_SEEDS, CLASSIFIER, 2)
    monkeypatch.setattr("evidence.forms.FIRST_SEEDS", 3)


def test_a_form_and_its_twin_differ_in_the_control_alone():
    for criterion, density in FORMS:
        own, twin = form("importance", criterion, density), form("random_layer", criterion, density)
        assert own.changes == twin.changes
        assert label(own) == f"importance {criterion} {density} %"
        assert Arm.of(at_rate(own, 3e-3, CLASSIFIER).name) == at_rate(own, 3e-3, CLASSIFIER)
    assert len(FORMS) == len(CRITERIA) * len(DENSITIES)


def test_the_unmarked_rate_keeps_its_ratio_to_an_arm_s_own():
    own = at_rate(form("importance", "agree", 30.0), 5e-3, CLASSIFIER).settings(SETTINGS)
    before = SETTINGS.ph2_lr_unimportant_start / SETTINGS.ph2_lr_important
    assert own.ph2_lr_important == 5e-3
    assert own.ph2_lr_unimportant_start / own.ph2_lr_important == pytest.approx(before)


def test_a_small_study_goes_on_with_what_may_be_worth_it_and_trains_nothing_twice(data, tmp_path, small_rates):
    protocol = make_protocol(data, tmp_path, seeds=5)
    protocol.train()
    text = protocol.write()
    forms = pd.read_csv(tmp_path / "forms.csv")
    assert list(forms["criterion"]) == ["erm", *(criterion for criterion, _ in FORMS)]
    first = differences(protocol.first["width_10"].records(), FORMS)
    for (_, row), own in zip(forms[1:].iterrows(), FORMS, strict=True):
        assert row["n"] == (3 if first.loc[[own], "high"].iloc[0] < 0.005 else 5), own
        assert row["trained"] < forms["trained"][0]
    assert set(forms["n"]) == {3, 5}  # some were given up, some not
    assert "of 33 forms" in text
    assert "EXPLORATORY" in text
    before = everything(tmp_path)
    again = make_protocol(data, tmp_path, seeds=5)
    again.train()
    assert again.write() == text
    assert everything(tmp_path) == before


@pytest.mark.parametrize(
    ("changed", "options", "words"),
    [
        ({"IMPORTANCE_CRITERION": "agree"}, {}, "IMPORTANCE_CRITERION of their own"),
        ({"PH1_DATA": "in"}, {}, "PH1_DATA of their own"),
        ({}, {"seeds": range(2)}, "--seeds must be at least"),
        ({"TRAINED_BLOCKS": 1}, {"widths": [10]}, "--widths is for classifiers"),
        ({"TRAINED_BLOCKS": 1}, {"starts": True}, "--starts is for classifiers"),
        ({"PH2_INIT": "phase1"}, {}, "PH2_INIT of their own"),
    ],
)
def test_what_cannot_be_done_is_refused_in_a_sentence(changed, options, words, tmp_path, monkeypatch):
    for name, value in changed.items():
        monkeypatch.setattr(config, name, value)
    with pytest.raises(InputError, match=words):
        FormsProtocol.from_config(directory=tmp_path, **options)


def test_forms_of_several_parts_stand_side_by_side():
    nan = float("nan")
    columns = [f"{prefix}{name}" for prefix in ("", "twin_", "erm_") for name in ("mean", "low", "high")]
    rows = {
        ("erm", 100.0): [0.6, 0.5, 0.7, *[nan] * 6],
        ("agree", 60.0): [0.61, 0.5, 0.7, 0.011, 0.001, 0.02, -0.02, -0.03, -0.01],
        ("movement", 10.0): [0.59, 0.5, 0.7, -0.004, -0.01, 0.01, 0.003, -0.01, 0.01],
    }
    tables = [
        pd.DataFrame([(*own, *values) for own, values in part], columns=["criterion", "density", *columns])
        for part in (rows.items(), list(rows.items())[:2])
    ]
    found = forms_wide([tables[0].assign(part="width_10"), tables[1].assign(place="elsewhere")])
    assert [*found] == ["criterion", "marked (%)", "width_10", "elsewhere"]
    assert found.to_numpy().tolist() == [
        ["erm", "100", "60.0", "60.0"],
        ["movement", "10", "59.0 (−0.4, +0.3)", ""],
        ["agree", "60", "61.0 (+1.1*, −2.0*)", "61.0 (+1.1*, −2.0*)"],
    ]


def test_ranks_of_forms_are_compared_between_parts_over_what_both_have():
    forms = [("erm", 100.0), ("movement", 60.0), ("agree", 60.0), ("joint", 60.0), ("snip", 60.0)]
    table = pd.DataFrame(forms, columns=["criterion", "density"])
    up, down = (table.assign(twin_mean=[float("nan"), *values]) for values in ((1, 2, 3, 9), (8, 3, 2, 1)))
    text = ranks_sentence({"width_10": up, "width_32": down.iloc[:-1], "width_64": up})
    assert "−1.00 between width_10 and width_32 (3 forms), +1.00 between width_10 and width_64 (4 forms)" in text


def test_the_best_two_are_looked_at_closer(data, tmp_path, small_rates):
    run = make_run(data, tmp_path / "width_10", settings=SETTINGS, seeds=range(3))
    protocol = FormsProtocol({"width_10": run}, tmp_path, [50], closer=True)
    protocol.train()
    text = protocol.write()
    table = pd.read_csv(tmp_path / "forms.csv")
    best = best_forms(table)
    order = table[1:].sort_values("twin_mean", ascending=False)
    assert best == list(zip(order["criterion"][:2], order["density"][:2], strict=True))
    closer = pd.read_csv(tmp_path / "closer.csv")
    assert list(closer["difference"][:6]) == [
        "global − permuted",
        "global − inverted",
        "layer − its twin",
        "layer − global",
        "row − its twin",
        "row − global",
    ]
    assert [*zip(closer["criterion"][::6], closer["density"][::6], strict=True)] == best
    seeds = {}  # the same differences from the records themselves
    for record in protocol.near("width_10").records():
        seeds.setdefault(record["algorithm"], []).append(record["accuracy"]["full"])
    criterion, density = protocol.best("width_10")[0]
    for difference, one, other in [
        ("global − inverted", f"importance {criterion} {density} %", f"inverted {criterion} {density} %"),
        ("row − its twin", f"importance {criterion} {density} % row", f"random_layer {criterion} {density} % row"),
        ("layer − global", f"importance {criterion} {density} % layer", f"importance {criterion} {density} %"),
    ]:
        found = closer[(closer["criterion"] == criterion) & (closer["difference"] == difference)]["mean"].iloc[0]
        expected = sum(seeds[one]) / len(seeds[one]) - sum(seeds[other]) / len(seeds[other])
        assert found == pytest.approx(expected, abs=1e-6)
    assert "the best 2, closer" in text
    assert len(closer_arms(best)) == 16


def test_every_start_is_compared_with_a_fresh_one(data, tmp_path, small_rates):
    run = make_run(data, tmp_path / "width_10", settings=SETTINGS, seeds=range(3))
    protocol = FormsProtocol({"width_10": run}, tmp_path, [50], starts=True)
    protocol.train()
    assert "from other starts" in protocol.write()
    table = pd.read_csv(tmp_path / "starts.csv")
    assert [*table["start"]] == [start for start in config.STARTS for _ in range(2)]
    assert [*table["arm"]] == ["erm", "importance"] * len(config.STARTS)
    values = {}
    for record in protocol.from_starts("width_10").records():
        values.setdefault(record["algorithm"], []).append(record["accuracy"]["full"])
    for row in table.itertuples():
        own, fresh = (sum(found := values[f"{row.arm} @{start}"]) / len(found) for start in (row.start, "fresh"))
        assert row.mean == pytest.approx(own, abs=1e-6)
        assert row.fresh_mean == pytest.approx(own - fresh, abs=1e-6)
