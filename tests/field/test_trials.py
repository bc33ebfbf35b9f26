"""Trials of a comparison: which share a stack, that nothing depends on it, and what a method of one's own may do."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from config import InputError
from field import ALGORITHMS, Algorithm, Comparison, Hyperparameter
from field.algorithms.base import choice, uniform
from storage import Results
from study import Archive, Execution
from tests.factories import SMALL, dated, everything, make_run, save_blobs

SETTINGS = replace(SMALL, ph2_num_epochs=2, ph2_freeze_epoch=1)
SEARCHED = Hyperparameter(0.1, "a number", uniform(0, 1))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return save_blobs(tmp_path_factory.mktemp("features") / "blobs.safetensors")


@pytest.fixture
def known(monkeypatch):
    """Methods of these tests are forgotten after each."""
    for name in ("Branching", "Counting", "Computing", "Deciding"):
        monkeypatch.setitem(ALGORITHMS, name, Algorithm)
        monkeypatch.delitem(ALGORITHMS, name)


def make(data, directory, methods, trials, seeds=2, seeds_per_chunk=50, holdouts=("art",)):
    execution = Execution(seeds_per_chunk=seeds_per_chunk, progress=False)
    return Comparison(make_run(data, directory, seeds, SETTINGS, holdouts, execution), methods, trials)


def stacks(comparison, name):
    """Trials and seeds of each stack that is to be trained of a method."""
    return [(unit.trials, unit.seeds) for unit in comparison.missing() if unit.method.__name__ == name]


def histories(comparison, name, trials):
    return [comparison.run.archive.method(name, trial, ("art",)).history for trial in range(trials)]


def test_trials_share_a_stack_unless_they_differ_in_what_must_be_the_same(data, tmp_path):
    comparison = make(data, tmp_path, ["SD", "GMoE"], 8)
    assert stacks(comparison, "SD") == [(tuple(range(8)), (0, 1))]
    fixed = [
        tuple(comparison.values(ALGORITHMS["GMoE"], t)[k] for k in ("experts", "chosen", "router_width"))
        for t in range(8)
    ]
    found = [trials for trials, _ in stacks(comparison, "GMoE")]
    assert sorted(trial for trials in found for trial in trials) == list(range(8))
    assert [len({fixed[trial] for trial in trials}) for trials in found] == [1] * len({*fixed})


def test_a_stack_has_at_most_seeds_per_chunk_networks(data, tmp_path):
    found = stacks(make(data, tmp_path, ["ERM"], 3, seeds=4, seeds_per_chunk=5), "ERM")
    assert found == [((0,), (0, 1, 2, 3)), ((1,), (0, 1, 2, 3)), ((2,), (0, 1, 2, 3))]
    found = stacks(make(data, tmp_path, ["ERM"], 3, seeds=[0, 1, 5, 6], seeds_per_chunk=5), "ERM")
    assert found == [((0, 1), (0, 1)), ((2,), (0, 1)), ((0, 1), (5, 6)), ((2,), (5, 6))]


def test_a_comparison_is_extended_by_trials_and_seeds(data, tmp_path):
    make(data, tmp_path, ["ERM"], 1).train()
    before = dated(tmp_path / "histories")
    comparison = make(data, tmp_path, ["ERM"], 3)
    assert stacks(comparison, "ERM") == [((1, 2), (0, 1))]
    comparison.train()
    after = dated(tmp_path / "histories")
    assert {name: after[name] for name in before} == before
    more = make(data, tmp_path, ["ERM"], 4, seeds=3)
    assert stacks(more, "ERM") == [((0, 1, 2), (2,)), ((3,), (0, 1, 2))]
    more.train()
    assert make(data, tmp_path, ["ERM"], 4, seeds=3).missing() == []
    assert len({r["key"] for r in more.run.records()}) == len(more.run.records()) == 2 * 4 * 3


@pytest.mark.parametrize("name", ["PCGrad", "ImportanceMask", "SFMoE"])
def test_trials_are_the_same_networks_in_one_stack_and_apart(name, data, tmp_path):
    """In single precision: nearly the same losses. (The tests of all methods compare weights, in double.)"""
    together, apart = (make(data, tmp_path / str(n), [name], 5, seeds_per_chunk=n) for n in (50, 2))
    assert len(stacks(together, name)) < len(stacks(apart, name)) == 5  # SFMoE has four numbers of experts
    for comparison in (together, apart):
        comparison.train()
    for trial, (ours, theirs) in enumerate(zip(*(histories(c, name, 5) for c in (together, apart)), strict=True)):
        assert ours.keys() == theirs.keys()
        assert torch.allclose(ours["loss"], theirs["loss"], rtol=1e-3), trial
    headers = [c.run.archive.method(name, 1, ("art",)).header for c in (together, apart)]
    assert headers[0] == headers[1]


@pytest.mark.parametrize("after", range(1, 7))
def test_interrupted_while_a_stack_is_written_and_resumed_is_the_same(after, data, tmp_path, monkeypatch):
    """A trial is cut off, or the records of all: the stack is trained again as a whole."""
    calls, real = Counter(), {Archive: Archive.save_method, Results: Results.append}

    def interrupted(owner):
        def write(*args):
            calls[owner] += 1
            if calls.total() == after:
                raise KeyboardInterrupt
            return real[owner](*args)

        return write

    def train(name):
        make(data, tmp_path / name, ["SD"], 2).train()

    train("a")
    with monkeypatch.context() as patch:
        patch.setattr(Archive, "save_method", interrupted(Archive))
        patch.setattr(Results, "append", interrupted(Results))
        with pytest.raises(KeyboardInterrupt):
            train("b")
    train("b")
    assert everything(tmp_path / "a") == everything(tmp_path / "b")


class Branching(Algorithm):
    """Its own hyperparameters decide in Python, as a notebook may have it."""

    hyperparameters = {"smoothing": SEARCHED, "kind": Hyperparameter("a", "a text", choice("a", "b"))}

    def loss(self, params, batch, state, noise):
        logits = self.forward(params, batch.features)
        if self.smoothing > 0.5 and self.kind == "a":
            return F.cross_entropy(logits, batch.labels, label_smoothing=self.smoothing), {}
        return F.cross_entropy(logits, batch.labels), {}


class Computing(Algorithm):
    """Its `__init__` computes more from the hyperparameters."""

    def __init__(self, setup, **values):
        super().__init__(setup, **values)
        self.small = round(self.learning_rate, 6) / 10

    def rate(self, state):
        return self.small


class Deciding(Algorithm):
    """It decides by a hyperparameter that it inherits as a tensor."""

    def loss(self, params, batch, state, noise):
        loss, changes = super().loss(params, batch, state, noise)
        return (2 * loss if self.weight_decay > 0 else loss), changes


class Counting(Deciding):
    """The same, and says that it needs it as a number."""

    hyperparameters = {"weight_decay": Hyperparameter(0.0, "L2 penalty inside Adam", uniform(0, 1))}


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("method", [Branching, Computing, Counting])
def test_a_method_that_says_nothing_of_tensors_trains_as_each_trial_alone(method, data, tmp_path):
    together, apart = (make(data, tmp_path / str(n), [method], 4, seeds_per_chunk=n) for n in (50, 2))
    assert [trials for trials, _ in stacks(together, method.__name__)] == [(0,), (1,), (2,), (3,)]
    for comparison in (together, apart):
        comparison.train()
    for ours, theirs in zip(*(histories(c, method.__name__, 4) for c in (together, apart)), strict=True):
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    assert not torch.equal(ours["loss"], histories(together, "ERM", 4)[3]["loss"])


@pytest.mark.usefixtures("known")
def test_a_method_that_needs_a_number_where_it_has_a_tensor_is_told(data, tmp_path):
    make(data, tmp_path / "one", [Deciding], 1).train()
    with pytest.raises(InputError, match=r"Deciding .*\(learning_rate, weight_decay\).*tensor=True"):
        make(data, tmp_path / "two", [Deciding], 2).train()


def test_a_text_cannot_be_a_tensor():
    with pytest.raises(InputError, match="'logits'"):
        Hyperparameter("logits", "average of the heads", tensor=True)
