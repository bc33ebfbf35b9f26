"""The engines for large studies and for CUDA do what the reference does."""

import logging
import shutil

import pytest
import torch

import captured
import compiled
import training
from captured import CapturedEngine
from compiled import CompiledEngine
from models import FeedforwardClassifier
from stacks import MatmulEngine, VmapEngine
from training import random_start

SIZES = (8, 3, (6, 5, 4))
COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def networks(seeds=3, variants=2, dtype=torch.float64, device="cpu"):
    drawn = random_start(range(seeds), "fresh_start", SIZES)
    params = {n: v.unsqueeze(1).repeat_interleave(variants, 1).to(device, dtype) for n, v in drawn.items()}
    return FeedforwardClassifier.outline(*SIZES).to(dtype), params


def batches(seeds=3, lengths=(4, 4, 4, 3, 4, 4), dtype=torch.float64, device="cpu"):
    draw = torch.Generator().manual_seed(1)
    for length in lengths:
        x = torch.randn(seeds, length, SIZES[0], generator=draw).to(device, dtype)
        yield x, torch.randint(SIZES[1], (seeds, length), generator=draw).to(device)


def rates(params, epoch):
    """A half, nothing and all of the update for the two tracked matrices."""
    draw = torch.Generator().manual_seed(epoch)
    names = ("layers.1.weight", "layers.2.weight")
    values = torch.tensor([0.0, 0.5, 1.0]).to(params[names[0]])
    return {name: values[torch.randint(3, params[name].shape, generator=draw).to(values.device)] for name in names}


def compare(engine, reference, seeds=3, tolerance=1e-9, **kinds):
    """Two epochs on both: losses, right answers, weights, and classes of other rows."""
    for epoch in range(2):
        factors = rates(reference.params, epoch)
        for x, y in batches(seeds, **kinds):
            found, expected = engine.step(x, y, factors), reference.step(x, y, factors)
            assert torch.allclose(found[0], expected[0], rtol=0, atol=tolerance)
            assert torch.equal(found[1], expected[1])
        for name, value in reference.params.items():
            assert torch.allclose(engine.params[name], value, rtol=0, atol=tolerance), name
    assert torch.equal(engine.right(x[0], y[0]), reference.right(x[0], y[0]))


def test_matmul_engine_steps_as_the_reference():
    compare(MatmulEngine(*networks(), 0.01), VmapEngine(*networks(), 0.01))


@COMPILER
@pytest.mark.parametrize("seeds", [3, 2])  # another number of networks is not compiled anew, and no less right
def test_compiled_engine_steps_as_the_reference(seeds, monkeypatch):
    monkeypatch.setattr(compiled, "BLOCK", 3)  # two blocks
    compare(CompiledEngine(*networks(seeds), 0.01, 4), VmapEngine(*networks(seeds), 0.01), seeds)


@pytest.mark.parametrize(
    ("work", "device", "it_works", "engine"),
    [
        (1, "cpu", True, "matmul"),
        (1e9, "cpu", True, "compiled"),
        (1e9, "cpu", False, "matmul"),
        (1, "cuda", True, "captured"),
        (1, "cuda", False, "matmul"),
    ],
)
def test_the_engine_is_chosen_by_work_and_by_what_works(work, device, it_works, engine, monkeypatch):
    for module in (compiled, captured):
        monkeypatch.setattr(module, "usable", lambda *_: it_works)
    assert training.choose_engine(work, device, 32, SIZES) == engine


@COMPILER
def test_compiling_can_be_tried_beforehand():
    assert compiled.usable(4, SIZES)


def test_without_a_compiler_one_line_says_so(monkeypatch, caplog):
    def broken(*_):
        raise RuntimeError("No compiler.\nLong story.")

    monkeypatch.setattr(compiled, "compiled", lambda function: broken)
    with caplog.at_level(logging.INFO):
        assert not compiled.usable(4, SIZES)
    assert [r.getMessage() for r in caplog.records] == [
        "Compiled training is not available here (No compiler.): the usual path is taken."
    ]


def test_a_recorded_step_reads_its_inputs_and_rates_anew():
    # On a CPU a record that runs the function again is what a CUDA graph is on a GPU.
    engine = CapturedEngine(*networks(), 0.01, 4, capture=lambda step: step)
    compare(engine, MatmulEngine(*networks(), 0.01), tolerance=0)
    assert engine.available


@pytest.mark.parametrize("kind", ["fails", "differs"])
def test_a_recording_that_fails_or_differs_is_not_used(kind, caplog):
    def capture(step):
        if kind == "fails":
            raise RuntimeError("no graphs here")
        return lambda: (torch.zeros(3, 2, dtype=torch.float64), torch.zeros(3, 2, dtype=torch.long))

    engine = CapturedEngine(*networks(), 0.01, 4, capture=capture)
    compare(engine, MatmulEngine(*networks(), 0.01), tolerance=0)
    assert len(caplog.records) == 1
    assert "CUDA graphs are not used" in caplog.text


def test_a_step_is_recorded_once_for_all_epochs():
    recorded = []

    def capture(step):
        recorded.append(step)
        return step

    engine = CapturedEngine(*networks(), 0.01, 4, capture=capture)
    for epoch in range(4):
        factors = rates(engine.params, epoch)
        for x, y in batches():
            engine.step(x, y, factors)
    assert len(recorded) == 1
    for x, y in batches():
        engine.step(x, y, {})  # other kernels run without rates
    assert len(recorded) == 2


@pytest.mark.parametrize("works", [True, False])
def test_recording_can_be_tried_beforehand(works):
    def capture(step):
        return step if works else torch.zeros(3).view(2)  # raises a RuntimeError

    assert captured.usable(4, SIZES, "cpu", capture) is works


@CUDA
def test_cuda_steps_as_the_reference():
    engine = CapturedEngine(*networks(device="cuda"), 0.01, 4, capture=captured.cuda_graph)
    compare(engine, VmapEngine(*networks(device="cuda"), 0.01), device="cuda")
    assert engine.available
    assert engine.replay is not None
