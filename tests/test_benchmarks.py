"""The benchmarks run: tiny sizes, no statement on speed."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from models import FeedforwardClassifier

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def training_benchmark(monkeypatch):
    """benchmarks/training.py, which shares its name with the module it measures."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(FOLDER)])
    spec = importlib.util.spec_from_file_location("training_benchmark", FOLDER / "training.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def no_processes(training_benchmark, monkeypatch):
    """Starting two processes takes longer than all the rest: measure here instead."""

    class Here:
        def __init__(self, count):
            self.count = count

        def run(self, function, *args):
            return [function(i, self.count, *args) for i in range(self.count)]

        def close(self):
            pass

    monkeypatch.setattr(training_benchmark, "Processes", Here)


def test_quick_run_prints_a_table_and_writes_json(training_benchmark, no_processes, tmp_path, capsys):
    threads = torch.get_num_threads()
    assert training_benchmark.main(["--quick", "--output", str(tmp_path / "out.json")]) == 0
    assert torch.get_num_threads() == threads
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "out.json").read_text())
    assert set(report) == {"task", "results", "floor", "study", "machine", "versions"}
    rows = {(row["contender"], row["size"]): row for row in report["results"] if row["device"] == "cpu"}
    assert {name for name, _ in rows} == {
        "plain", "plain_2_threads", "plain_fused", "plain_fused_2_threads", "processes", "processes_fused",
        "sklearn", "sklearn_2_threads", "vmap", "matmul", "matmul_chunks", "matmul_chunks_shared_batches",
    }  # fmt: skip
    for (name, size), row in rows.items():
        assert name in printed
        assert row["networks_per_second"] > 0
        if row["contender"] in ("matmul", "vmap", "matmul_chunks"):
            assert row["networks"] == size
            best = max(rows["plain", size]["networks_per_second"], rows["plain_2_threads", size]["networks_per_second"])
            assert row["speedup"]["plain_loop"] == pytest.approx(row["networks_per_second"] / best)
        assert ("fraction_of_floor" in row) == name.startswith("matmul")
    shared = rows["matmul_chunks_shared_batches", 12]
    assert (shared["networks"], shared["variants"], shared["threads"]) == (12, 6, 2)


def test_unfinished_epochs_are_extrapolated(training_benchmark, monkeypatch):
    plain = sys.modules["plain"]
    clock = [0.0]
    monkeypatch.setattr(plain.time, "perf_counter", lambda: clock[0])

    class Loop:
        networks = 1

        def shuffle(self):
            clock[0] += 3

        def steps(self, first, last):
            clock[0] += 0.5 * (last - first)

        def validate(self):
            clock[0] += 7

    task = plain.Task(4, rows=640)
    assert plain.measure(Loop(), task, 20, 1e9) == plain.Times(3, 10, 7, 20)
    assert plain.measure(Loop(), task, 4, 1e9) == plain.Times(3, 10, 7, 4)
    assert plain.measure(Loop(), task, 20, 1e-9) == plain.Times(3, 10, 7, plain.CHUNK)


def test_floor_counts_what_a_step_needs(training_benchmark):
    plain = sys.modules["plain"]
    rate = {"operations_per_second": 1e9, "bytes_per_second": 1e9}
    rates = [{"1_thread": rate, "all_threads": {key: 2 * value for key, value in rate.items()}}]
    of = plain.floor(plain.Task(192, batch=32, classes=7), rates, 2)
    network = FeedforwardClassifier(192, 7, (10,) * 5)
    assert of["parameters"] == sum(p.numel() for p in network.parameters())
    weights = [layer.weight.numel() for layer in network.layers]
    assert of["operations"] == 2 * 32 * (3 * sum(weights) - weights[0])
    moved = 8 * 4 * of["parameters"] + 2 * 4 * 32 * 192
    assert sum(of["bytes"].values()) == moved
    assert of["seconds"] == {
        "1_thread": max(of["operations"], moved) / 1e9,
        "all_threads": max(of["operations"], moved) / 2e9,
    }
    assert plain.floor_seconds({**of, "operations": 0}, rates[0], 1, 6) == pytest.approx(
        (moved - of["bytes"]["batch"] * 5 / 6) / 1e9
    )


def test_processes_measure_at_the_same_time(training_benchmark):
    plain = sys.modules["plain"]
    processes = plain.Processes(2)
    try:
        task = plain.Task(4, rows=64, total=100)
        single = processes.run(plain.measure_plain, task, True, 1.0)
        stacks = processes.run(sys.modules["stacked"].measure_chunks, task, "matmul", 5, 3, 2, 1.0)
    finally:
        processes.close()
    assert [count for count, _ in single] == [1, 1]
    assert sorted(count for count, _ in stacks) == [2 * 3, 3 * 3]
    for _, times in single + stacks:
        assert times.steps_measured == 2
        assert times.epoch > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--sizes", "1,zero"], "Argument --sizes: 'zero' is not a whole number of at least 1"),
        (["--repeats", "0"], "'0' is not a whole number"),
        (["--rows", "20000"], "--rows must not be more than --validation-rows"),
        (["--output", "no/such/folder/out.json"], "cannot be written"),
        (["--nonsense"], "Unrecognized arguments: --nonsense"),
    ],
)
def test_bad_input_is_one_sentence(training_benchmark, capsys, arguments, said):
    try:
        code = training_benchmark.main(arguments)
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr()
    assert (code, printed.out, printed.err.count("\n")) == (2, "", 1)
    assert said in printed.err
