"""The confirmation: its family is read at the places it names, and nothing is decided before all are there."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

import config
from config import InputError
from evidence import Confirmation, confirmation
from evidence.confirmation import FAMILY, PLACES, Claim, Place, write_all
from evidence.forms import RATE_SEEDS, RATES
from evidence.own_rates import CLASSIFIER
from evidence.statistics import family
from importance import CRITERIA
from tests.factories import LEARNING, everything, make_run

SETTINGS = replace(LEARNING, ph1_data="in", ph2_num_epochs=2, ph2_freeze_epoch=1, ph1_num_epochs=2)
FORMS = (("movement", 30.0), ("agree", 60.0))
CLAIMS = (
    Claim("here", ("movement", 30.0), "random_layer"),
    Claim("here", ("movement", 30.0), "erm"),
    Claim("there", ("agree", 60.0), "random_layer"),
)


@pytest.fixture
def places(data, monkeypatch):
    own = {name: Place(data.dataset, data.model_name, FORMS, range(100, 106), 10) for name in ("here", "there")}
    monkeypatch.setattr(confirmation, "PLACES", own)
    monkeypatch.setattr("evidence.figures.PLACES", own)
    monkeypatch.setattr(confirmation, "FAMILY", CLAIMS)
    monkeypatch.setitem(RATES, CLASSIFIER, (1e-3, 1e-2))
    monkeypatch.setitem(RATE_SEEDS, CLASSIFIER, 2)
    return own


def confirmed(data, directory, place):
    protocol = Confirmation(place, make_run(data, directory / place, settings=SETTINGS, seeds=range(100, 106)))
    protocol.train()
    return protocol.write()


def test_what_was_fixed_in_advance_is_what_can_be_trained():
    assert 0 < len(FAMILY) <= 4
    for claim in FAMILY:
        assert claim.form in PLACES[claim.place].forms
        assert claim.baseline in ("random_layer", "erm")
    for place in PLACES.values():
        assert min(place.seeds) == 100
        assert len(place.seeds) >= (20 if place.width is None else 50)
        assert all(criterion in CRITERIA and 0 < density < 100 for criterion, density in place.forms)


def test_nothing_is_decided_before_all_places_are_there(data, tmp_path, places):
    first = confirmed(data, tmp_path, "here")
    assert "Not decided: nothing was trained yet at there." in first
    assert not (tmp_path / "contrasts.csv").exists()
    text = confirmed(data, tmp_path, "there")
    assert "Not decided" not in text
    table = pd.read_csv(tmp_path / "contrasts.csv")
    seeds = {name: pd.read_csv(tmp_path / name / "seeds.csv", index_col="seed") for name in places}
    arms = {
        "here: movement 30 % − random_layer": ("here", "importance movement 30.0 %", "random_layer movement 30.0 %"),
        "here: movement 30 % − erm": ("here", "importance movement 30.0 %", "erm"),
        "there: agree 60 % − random_layer": ("there", "importance agree 60.0 %", "random_layer agree 60.0 %"),
    }
    expected = family({name: seeds[place][one] - seeds[place][two] for name, (place, one, two) in arms.items()})
    assert list(table["contrast"]) == list(arms)
    for column in ("n", "mean", "low", "high", "p_holm"):
        assert np.allclose(table[column], expected[column], rtol=1e-4), column
    assert all(f"{name}: " in text for name in arms)
    assert (table["n"] == 6).all()


def test_what_is_there_is_not_trained_again(data, tmp_path, places):
    text, before = confirmed(data, tmp_path, "here"), everything(tmp_path)
    assert confirmed(data, tmp_path, "here") == text
    assert everything(tmp_path) == before
    assert write_all(tmp_path) == text


def test_features_of_another_place_are_refused(data, tmp_path, places, monkeypatch):
    monkeypatch.setitem(places, "here", places["here"]._replace(model="another"))
    with pytest.raises(InputError, match=r"needs the features of .* by another"):
        Confirmation("here", make_run(data, tmp_path / "here", settings=SETTINGS, seeds=range(100, 106)))


@pytest.mark.parametrize(
    ("place", "changed", "words"),
    [
        ("nowhere", {}, "no place 'nowhere' to confirm at; there are here, there"),
        ("here", {"TRAINED_BLOCKS": 1}, "needs TRAINED_BLOCKS to be 0"),
        ("here", {"PH1_NUM_EPOCHS": 3}, "leave out PH1_NUM_EPOCHS"),
    ],
)
def test_what_is_fixed_cannot_be_changed(place, changed, words, tmp_path, places, monkeypatch):
    for name, value in changed.items():
        monkeypatch.setattr(config, name, value)
    with pytest.raises(InputError, match=words):
        Confirmation.from_config(place, tmp_path)
