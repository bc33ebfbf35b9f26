"""A method on one choice of held-out domains: starts and batches are those of Phase 2, sources alone are learned."""

from functools import partial
from math import ceil

import pytest
import torch

from config import InputError, Settings
from engine import SplitFeatures
from field.algorithms import ALGORITHMS
from field.train import train_method, train_trials
from study import ERM, MaskSource
from tests.factories import blobs, split_blobs
from trainer_phase2 import HoldoutMasks, train_holdout

SETTINGS = Settings.current(ph2_num_epochs=2, hidden_sizes=(6, 5, 4), batch_size=16)
SEEDS = (0, 1)


@pytest.fixture(scope="module")
def data():
    return split_blobs(settings=SETTINGS)


def test_erm_is_the_arm_erm(data):
    mask = [torch.zeros(2, 5, 6, dtype=torch.bool), torch.zeros(2, 4, 5, dtype=torch.bool)]  # any: ERM marks all
    masks, network = HoldoutMasks([], [], mask, None), data.network(SETTINGS.hidden_sizes)
    source = MaskSource("sketch", SEEDS, lambda settings: masks, lambda settings: None, network)
    arm = train_holdout(data, "sketch", SEEDS, [ERM.masking(source, SETTINGS)])
    method = train_method(data, ["sketch"], SEEDS, ALGORITHMS["ERM"], SETTINGS)
    for name, value in method.params.items():
        assert torch.allclose(value, arm.final[name][:, 0], rtol=0, atol=1e-9)
    assert torch.equal(method.correct, arm.correct[:, 0])
    assert torch.allclose(method.validation_accuracy, arm.validation_accuracy[:, 0])
    assert torch.allclose(method.loss, arm.loss[:, 0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("holdouts", [("art",), ("photo",), ("art", "sketch")])
def test_balanced_training_takes_as_many_steps_as_pooled_training(data, holdouts):
    sources = data.sources(holdouts)
    steps = ceil(data.rows(sources, "in", SEEDS).shape[1] / SETTINGS.batch_size)
    for name in ("ERM", "ERMBalanced"):
        networks = train_method(data, holdouts, SEEDS, ALGORITHMS[name], SETTINGS)
        assert networks.method.setup.steps_per_epoch == steps
        assert networks.method.setup.domains == len(sources)
        assert (networks.state["step"] == steps * SETTINGS.ph2_num_epochs).all()


@pytest.mark.parametrize("name", ["ERM", "ERMBalanced", "SWAD"])
def test_held_out_domains_are_not_learned(data, name):
    """With other images in the held-out domain the same networks come out."""
    other = blobs()
    held_out = other.domains == other.domain_names.index("photo")
    other.features[held_out] = 100.0
    other = SplitFeatures.from_features(other, SETTINGS, dtype=torch.float64)
    ours = train_method(data, ["photo"], SEEDS, ALGORITHMS[name], SETTINGS)
    theirs = train_method(other, ["photo"], SEEDS, ALGORITHMS[name], SETTINGS)
    assert all(torch.equal(value, theirs.params[key]) for key, value in ours.params.items())
    assert torch.equal(ours.validation_accuracy, theirs.validation_accuracy)
    assert not torch.equal(ours.correct, theirs.correct)


def test_trials_that_need_stacks_of_their_own_are_refused_in_one(data):
    methods = [partial(ALGORITHMS["GMoE"], experts=experts, gate_noise=experts / 10) for experts in (2, 4)]
    with pytest.raises(ValueError, match="GMoE that differ in experts cannot"):
        train_trials(data, ["art"], SEEDS, methods, SETTINGS)


def test_hyperparameters_reach_the_method_and_unknown_ones_are_refused(data):
    method, epochs = partial(ALGORITHMS["VREx"], penalty_weight=3.0), []
    networks = train_method(data, ["art"], (0,), method, SETTINGS, on_epoch=lambda: epochs.append(1))
    assert networks.method.values["penalty_weight"] == 3.0
    assert len(epochs) == SETTINGS.ph2_num_epochs  # progress is reported after each
    with pytest.raises(InputError, match="'no_such'"):
        train_method(data, ["art"], (0,), partial(ALGORITHMS["VREx"], no_such=3.0), SETTINGS)
