"""The training loop: what it counts after each epoch, what it calls, and how failures are named."""

import math
from dataclasses import replace

import pytest
import torch

from engine import BatchOrder, MatmulEngine, TrainingFailedError, classify, raise_failure, random_start, train
from tests.factories import split_blobs

SEEDS = [0, 1, 2]


def start_of(data, arms):
    start = random_start(SEEDS, "start", data.network((6, 5, 4)))
    return {name: value.unsqueeze(1).repeat_interleave(arms, 1).double() for name, value in start.items()}


def run(data, start, epochs=2, **options):
    order = BatchOrder(SEEDS, "test", data.rows(data.domain_names, "in", SEEDS), 16)
    return train(data, MatmulEngine(start, 1e-2), SEEDS, order, epochs, **options)


@pytest.mark.parametrize("split_seed", [0, "seed"])
@pytest.mark.parametrize("piece", [2**20, 100])
def test_right_answers_are_counted_by_domain_split_and_class(split_seed, piece, monkeypatch):
    monkeypatch.setattr("engine.loop.PIECE_FLOATS", piece)
    data = replace(split_blobs(), split_seed=split_seed)
    trained = run(data, start_of(data, arms=2))
    rows = torch.arange(len(data.labels))
    right = classify(MatmulEngine(trained.params), data, rows) == data.labels
    for s, cells in enumerate(data.cells(SEEDS)):
        for arm in range(2):
            expected = torch.bincount(cells[right[s, arm]], minlength=18).view(3, 2, 3)
            assert torch.equal(trained.correct[s, arm, -1], expected)
    assert trained.correct.shape == (3, 2, 2, 3, 2, 3)
    assert (trained.correct <= data.totals).all()


@pytest.mark.parametrize("piece", [2**24, 100])
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_features_as_they_are_stored_train_the_same_bits_as_features_converted_before(stored, piece, monkeypatch):
    monkeypatch.setattr("engine.loop.INPUT_FLOATS", piece)
    data = split_blobs(torch.float32)
    data = replace(data, features=data.features.to(stored))
    start = {name: value.float() for name, value in start_of(data, arms=2).items()}
    trained, whole = (run(own, start) for own in (data, replace(data, features=data.features.float())))
    for name, value in whole.params.items():
        assert value.dtype == torch.float32
        assert torch.equal(trained.params[name], value)
    for name in ("loss", "train_accuracy", "correct", "failed"):
        assert torch.equal(getattr(trained, name), getattr(whole, name))
    assert 0.5 < trained.train_accuracy[..., -1].mean() < 1
    rows, engine = torch.arange(0, 180, 7), MatmulEngine(whole.params)
    found, expected = (classify(engine, own, rows) for own in (data, replace(data, features=data.features.float())))
    assert torch.equal(found, expected)


def test_the_first_epoch_is_the_same_however_many_follow():
    data = split_blobs()
    one, three = (run(data, start_of(data, arms=1), epochs) for epochs in (1, 3))
    for name in ("loss", "train_accuracy", "correct"):
        assert torch.equal(getattr(one, name)[:, :, 0], getattr(three, name)[:, :, 0])


def test_a_network_that_diverges_is_recorded_and_harms_no_other():
    data = split_blobs()
    start = start_of(data, arms=1)
    broken = {name: value.clone() for name, value in start.items()}
    broken["layers.0.weight"][1] = math.inf
    healthy, other = run(data, start), run(data, broken)
    assert healthy.failed.flatten().tolist() == [0, 0, 0]
    assert other.failed.flatten().tolist() == [0, 1, 0]
    for name, value in healthy.params.items():
        torch.testing.assert_close(other.params[name][[0, 2]], value[[0, 2]], rtol=0, atol=1e-12)


def test_each_epoch_is_reported_and_runs_on_the_threads_asked_for():
    data, before, seen = split_blobs(), torch.get_num_threads(), []
    run(data, start_of(data, arms=1), epochs=3, threads=2, on_epoch=lambda: seen.append(torch.get_num_threads()))
    assert seen == [2, 2, 2]
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("failed", "message"),
    [
        ([0, 3], "Phase 1, domain art, seed 5: .* epoch 3"),
        ([[0, -1], [0, 0]], "Phase 1, domain art, seed 4: .*importance"),
        ([[0, 0], [0, 1]], "Phase 1, domain art, seed 5: .* epoch 1"),
    ],
)
def test_the_first_failure_is_raised_by_name(failed, message):
    raise_failure(torch.zeros(2, 2, dtype=torch.long), [4, 5], "Phase 1")
    with pytest.raises(TrainingFailedError, match=message):
        raise_failure(torch.tensor(failed), [4, 5], "Phase 1, domain art")
