"""The study of forms: every criterion beside its twin, at its own rate, and when a form is given up."""

from dataclasses import replace

import pandas as pd
import pytest

import config
from config import InputError
from evidence import FormsProtocol
from evidence.forms import DENSITIES, RATE_SEEDS, RATES, differences, form, forms_at, label
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
    ],
)
def test_what_cannot_be_done_is_refused_in_a_sentence(changed, options, words, tmp_path, monkeypatch):
    for name, value in changed.items():
        monkeypatch.setattr(config, name, value)
    with pytest.raises(InputError, match=words):
        FormsProtocol.from_config(directory=tmp_path, **options)
