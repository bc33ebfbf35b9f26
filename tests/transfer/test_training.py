"""The stack of networks equals the plain loop, whatever is frozen, cached or grouped."""

import pytest
import torch

from engine import generator
from transfer import ConvClassifier, Examples, training
from transfer.arms import KINDS, CutArm, bits, start_of
from transfer.training import Course, draw_batches, draw_start, train_one, train_stack

SEEDS, CHECKPOINTS = (3, 8), (10, 50)


def outline(depth=4, size=8):
    with torch.device("meta"):
        return ConvClassifier(1, size, 3, depth=depth, channels=4)


@pytest.fixture(scope="module")
def examples():
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(60, 1, 8, 8, generator=draw, dtype=torch.float64)
    labels = torch.arange(60) % 3
    images += torch.randn(3, 1, 8, 8, generator=draw, dtype=torch.float64)[labels]
    return Examples(images[:40], labels[:40], images[40:], labels[40:], 3)


def made(arms, network, examples, updates=CHECKPOINTS[-1]):
    """Starts and what is frozen ``[S, V, …]`` of arms, and batches ``[S, U, B]``."""
    starts, freezes, batches = [], [], []
    for seed in SEEDS:
        before, after, fresh = (draw_start(network, generator(seed, name)) for name in ("a", "b", "c"))
        for arm in arms:
            keep, freeze = bits(arm, before, after, seed)
            starts.append(start_of(fresh, after, keep))
            freezes.append(freeze)
        batches.append(draw_batches(torch.arange(len(examples)), 8, updates, generator(seed, "order")))

    def stacked(values):
        return {n: torch.stack([v[n] for v in values]).unflatten(0, (len(SEEDS), len(arms))) for n in values[0]}

    start = {name: value.double() for name, value in stacked(starts).items()}
    return start, stacked(freezes), torch.stack(batches)


def assert_equal_to_the_plain_loop(arms, prefix, examples, network=None, checkpoints=CHECKPOINTS):
    network = network or outline()
    start, freeze, batches = made(arms, network, examples, checkpoints[-1])
    params, counts = train_stack(network, start, freeze, prefix, Course(examples, batches, checkpoints, 1e-2))
    for s in range(len(SEEDS)):
        for v in range(len(arms)):
            own = [{name: value[s, v] for name, value in values.items()} for values in (start, freeze)]
            wanted, right = train_one(network, *own, examples, batches[s], checkpoints, 1e-2)
            assert torch.equal(counts[s, v], right)
            for name, value in wanted.items():
                assert (params[name][s, v] - value).abs().max() <= 1e-9, (arms[v], name)
                stays = freeze[name][s, v]
                assert torch.equal(params[name][s, v][stays], start[name][s, v][stays])
    return counts


def test_every_arm_equals_the_plain_loop(examples):
    arms = [CutArm(kind, 2) for kind in KINDS if kind != "truncated"]
    counts = assert_equal_to_the_plain_loop(arms, 0, examples)
    assert counts.amax() > counts.amin()


@pytest.mark.parametrize("together", [1, 2, 4, 6])
def test_the_number_of_networks_at_a_time_changes_nothing(examples, monkeypatch, together):
    """One by one; some arms of a repeat; all of them; of several repeats."""
    monkeypatch.setattr(training, "networks_at_a_time", lambda *given: together)
    arms = [CutArm(kind, 2) for kind in ("scratch", "moved", "warm")]
    assert_equal_to_the_plain_loop(arms, 0, examples, checkpoints=(2, 10))


@pytest.mark.parametrize("cut", [1, 2, 3, 4])
@pytest.mark.parametrize("memory", [0, 2**29])
def test_frozen_layers_that_run_once_change_nothing(examples, monkeypatch, cut, memory):
    monkeypatch.setattr(training, "CACHE_BYTES", memory)
    monkeypatch.setattr(training, "PIECE_FLOATS", 1500)  # so that images are run in several pieces
    assert_equal_to_the_plain_loop(
        [CutArm("frozen", cut), CutArm("frozen+rest", cut)], cut, examples, checkpoints=(2, 10)
    )


def test_only_images_that_are_drawn_are_run_through_frozen_layers(examples, monkeypatch):
    seen, convolve = [], training.convolve
    monkeypatch.setattr(
        training,
        "convolve",
        lambda net, maps, layer, *given: seen.append((layer, len(maps))) or convolve(net, maps, layer, *given),
    )
    network = outline()
    start, freeze, _ = made([CutArm("frozen", 2)], network, examples)
    batches = torch.tensor([[[5, 1], [1, 7]], [[2, 3], [2, 3]]])
    train_stack(network, start, freeze, 2, Course(examples, batches, (2,), 1e-3))
    assert sorted(count for layer, count in seen if layer == 0) == [2, 3, 20, 20]  # drawn, and tested on


def test_truncated_networks_are_linear_classifiers_on_what_is_left(examples):
    for depth, size in ((2, 8), (0, 8)):
        network = outline(depth, size)
        assert_equal_to_the_plain_loop([CutArm("frozen", depth)], depth, examples, network)


def test_a_network_that_overflows_is_marked(examples):
    network = outline()
    start, freeze, batches = made([CutArm("scratch", 0)], network, examples)
    start["head.weight"][1] = torch.inf
    _, counts = train_stack(network, start, freeze, 0, Course(examples, batches, CHECKPOINTS, 1e-3))
    assert (counts[1] == -1).all()
    assert (counts[0] >= 0).all()


def test_batches_use_every_row_as_often_as_any_other():
    rows = torch.tensor([4, 9, 2, 7, 1])
    batches = draw_batches(rows, 2, 10, generator(0, "order"))
    assert batches.shape == (10, 2)
    assert torch.equal(batches.flatten().bincount(minlength=10)[rows], torch.full((5,), 4))
    assert torch.equal(batches, draw_batches(rows, 2, 10, generator(0, "order")))
    assert draw_batches(rows, 64, 3, generator(0, "order")).shape == (3, 5)  # all there are
    assert torch.equal(draw_batches(rows, 2, 20, generator(0, "order"))[:10], batches)


def test_starts_are_pytorchs_own():
    network = ConvClassifier(1, 8, 3, depth=2, channels=4)
    torch.manual_seed(5)
    wanted = ConvClassifier(1, 8, 3, depth=2, channels=4).state_dict()
    found = draw_start(network, torch.Generator().manual_seed(5))
    assert {name: value.shape for name, value in found.items()} == {n: v.shape for n, v in wanted.items()}
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
