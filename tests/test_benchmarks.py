"""The benchmarks run at tiny sizes; nothing here says how fast anything is."""

import json
import runpy
import sys

import pytest
from transformers import Dinov2Config, Dinov2Model

import config
from engine import TailEngine
from tests.factories import ROOT
from transfer.training import ConvStack


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a benchmark as a script in this process, in an empty folder: exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")

    def run(benchmark, *options):
        path = ROOT / "benchmarks" / f"{benchmark}.py"
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, options)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(path), run_name="__main__")
        return end.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def rows_of(run, tmp_path):
    """Measures once; returns the rows of the report, each of which has to be in the printed table by its `name`."""

    def rows_of(benchmark, name, *options):
        code, printed, said = run(benchmark, *options, "--repeats", 1, "--output", "out.json")
        assert code == 0, said
        report = json.loads((tmp_path / "out.json").read_text("utf-8"))
        assert set(report) == {"task", "results", "machine", "versions"}
        assert all(str(row[name]) in printed for row in report["results"])
        return report["results"]

    return rows_of


def test_training_compares_the_engine_with_the_loops(rows_of):
    rows = rows_of("training", "name", "--networks", "1,14", "--dims", 8, "--images", 140, "--epochs", 1)
    found = {(row["name"], row["networks"], row["arms"]): row for row in rows if row["device"] == "cpu"}
    loops = {(name, 1, 1) for name in ("plain", "fused", "scikit_learn")}
    assert set(found) == loops | {("engine", 1, 1), ("engine", 14, 1), ("engine", 12, 6), ("engine_rates", 12, 6)}
    for (name, networks, _), row in found.items():
        rate = row["rate"]["median"]
        assert rate == pytest.approx(networks / row["seconds_per_epoch"]["median"])
        for loop, over in row.get("rate_over", {}).items():
            assert over["median"] == pytest.approx(rate / found[loop, 1, 1]["rate"]["median"])
        assert ("rate_over" in row) == name.startswith("engine")


def test_methods_compares_with_plain_training(rows_of, monkeypatch):
    monkeypatch.setattr(config, "BATCH_SIZE", 256)  # so that an epoch has few steps
    rows = rows_of("methods", "method", "--methods", "GroupDRO,ImportanceMask", "--seeds", 1)
    seconds = {row["method"]: row["seconds"]["median"] for row in rows}
    assert set(seconds) == {"ERM", "ERMBalanced", "GroupDRO", "ImportanceMask"}
    assert list(seconds.values()) == sorted(seconds.values())
    for row in rows:
        plain = {"pooled": "ERM", "balanced": "ERMBalanced"}[row["batches"]]
        assert row["over_plain_training"]["median"] == pytest.approx(row["seconds"]["median"] / seconds[plain])


def test_extraction_compares_with_the_bare_forward_pass(rows_of, image_root, tiny_vit):
    options = ("--data-root", image_root, "--vit-model", tiny_vit, "--device", "cpu", "--workers", 0)
    rows = rows_of("extraction", "part", *options)
    parts = "bare_forward", "decoding", "check", "extraction", "cache_hit", "vit_epoch"
    assert tuple(row["part"] for row in rows) == parts
    for row in rows:
        assert row["images_per_second"]["median"] == pytest.approx(12 / row["seconds"]["median"])
    assert rows[0]["speed_over_bare_forward"]["median"] == rows[0]["by_processor_time"]["median"] == 1


def test_blocks_compares_the_shortcut_with_the_loops(rows_of, tiny_vit, monkeypatch):
    monkeypatch.setattr(config, "BLOCK_BATCH_SIZE", 4)
    options = ("--vit-model", tiny_vit, "--networks", "1,3", "--images", 8, "--seconds", 0.01)
    rows = {(row["contender"], row["networks"]): row for row in rows_of("blocks", "contender", *options)}
    loops = {"query": "query of [CLS]", "block": "block", "vit": "whole ViT"}
    stacks = {(name, count) for name in ("shortcut", "shortcut, mask") for count in (1, 3)}
    assert set(rows) == stacks | {(name, 1) for name in loops.values()}
    for row in rows.values():
        step, image = row["milliseconds_per_step"]["median"], row["milliseconds_per_image"]["median"]
        for key, loop in loops.items():
            over = rows[loop, 1]["milliseconds_per_step"]["median"] / step
            assert row[f"{key}_over_this"]["median"] == pytest.approx(over)
        hours = 800 * (470 * step + 9991 * image) / 2 / 3.6e6
        assert row["extrapolated_hours"]["median"] == pytest.approx(hours)


def test_blocks_refuses_a_block_that_it_does_not_cover(run, tmp_path):
    size = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "image_size": 32, "patch_size": 8}
    Dinov2Model(Dinov2Config(**size, use_swiglu_ffn=True)).save_pretrained(tmp_path / "dino")
    code, printed, said = run("blocks", "--vit-model", tmp_path / "dino", "--images", 4)
    assert (code, printed) == (2, "")
    assert said.splitlines()[-1].startswith("The last block of 'dino' is not covered")


@pytest.mark.parametrize("kind", ["logits", "step"])
def test_blocks_times_nothing_that_does_not_compute_the_same(run, tiny_vit, monkeypatch, kind):
    monkeypatch.setattr(config, "BLOCK_BATCH_SIZE", 4)
    right = getattr(TailEngine, kind)
    wrong = {
        "logits": lambda *given: 1.001 * right(*given),
        "step": lambda *given: right(*given) and right(*given),  # two steps for one
    }
    monkeypatch.setattr(TailEngine, kind, wrong[kind])
    code, printed, said = run("blocks", "--vit-model", tiny_vit, "--networks", 1, "--images", 8)
    assert (code, printed) == (2, "")
    assert said.splitlines()[-1].startswith("'shortcut' and the block itself do not compute the same")


def test_transfer_compares_with_the_way_of_the_original(rows_of):
    options = ("--networks", 2, "--channels", 2, "--images", 80, "--tested", 20, "--seconds", 0.01)
    *cells, whole = rows_of("transfer", "cut", *options)
    assert [(row["cut"], row["batch"]) for row in cells] == [(cut, batch) for cut in range(7) for batch in (29, 64)]
    for row in cells:
        over = row["original_milliseconds_per_step"]["median"] / row["this_milliseconds_per_step"]["median"]
        assert row["step_speedup"]["median"] == pytest.approx(over)
        assert (row["milliseconds_per_cached_image"]["median"] == 0) == (row["cut"] == 0)
    original, validating, this = (
        whole[f"{name}_extrapolated_seconds"]["median"] for name in ("original", "validating", "this")
    )
    assert whole["original_over_this"]["median"] == pytest.approx(original / this)
    assert validating > original
    steps = sum(
        12 * 400 * (row["original_milliseconds_per_step"]["median"] * (1 if row["batch"] == 29 else 4)) for row in cells
    )
    tests = sum(
        12 * 4 * row["original_milliseconds_per_test"]["median"] * 4861 / 20 * n
        for row, n in zip(cells, [1, 4] * 7, strict=True)
    )
    assert original == pytest.approx((steps + tests) / 1e3)


def test_transfer_times_nothing_that_does_not_compute_the_same(run, monkeypatch):
    step = ConvStack.step
    monkeypatch.setattr(ConvStack, "step", lambda *given: [step(*given) for _ in range(50)])
    code, printed, said = run("transfer", "--networks", 1, "--channels", 8, "--images", 80, "--tested", 200)
    assert (code, printed) == (2, "")
    assert said.splitlines()[-1].startswith("The contenders do not compute the same")


def test_whole_times_a_command_and_the_same_again(rows_of, tmp_path):
    (row,) = rows_of("whole", "command", "run --help")
    assert row["command"] == "run --help"
    assert min(row["first"]["median"], row["again"]["median"]) > 0
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]  # results went elsewhere


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the system does not tell what memory is for")
def test_size_measures_seconds_and_memory(rows_of, tmp_path):
    command = "run --seeds 2 --set PH1_NUM_EPOCHS=1 --set PH2_NUM_EPOCHS=1 --no-figures"
    options = ("--parts", "3000,2000", "--classes", 5, "--dims", 16)
    rows = rows_of("size", "images", *options, command)
    assert [row["images"] for row in rows] == [194, 291]
    for row in rows:
        assert row["command"] == command
        assert 0 < row["file_gib"] < 0.001
        assert min(row["seconds"]["median"], row["processor_seconds"]["median"]) > 0.5  # Python alone takes longer
        peaks = row["peak_gib"]
        assert 0.01 < peaks["anonymous"] < peaks["pss"] <= peaks["rss"]
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_pools_compares_forked_processes_with_loky(rows_of):
    short = "run --seeds 2 --holdouts photo --no-figures --set PH1_NUM_EPOCHS=1 --set PH2_NUM_EPOCHS=1"
    rows = rows_of("pools", "pool", f"{short} --set BATCH_SIZE=512")
    assert [row["pool"] for row in rows] == ["fork", "loky"]
    for row in rows:
        for kind in ("seconds", "processor_seconds"):
            assert row[f"{kind}_over_fork"]["median"] == pytest.approx(row[kind]["median"] / rows[0][kind]["median"])


def test_versions_compares_two_checkouts(rows_of):
    rows = rows_of("versions", "what", "--against", ROOT, "--networks", 2, "--epochs", 1, "run --help")
    assert [row["what"] for row in rows] == ["training of 2", "run --help"]
    for row in rows:
        ratio = row["this"]["median"] / row["other"]["median"]
        assert row["this_over_other"]["median"] == pytest.approx(ratio)


@pytest.mark.parametrize(
    ("benchmark", "options", "named"),
    [
        ("versions", ["--against", "nowhere"], "--against"),
        ("whole", ["--output", "no/such/folder/out.json"], "--output"),
        ("whole", ["run --unheard-of"], "--unheard-of"),
        ("size", ["--parts", "5000", "--dims", "2", "--classes", "3", "run --unheard-of"], "--unheard-of"),
    ],
)
def test_bad_input_is_named(run, benchmark, options, named):
    code, printed, said = run(benchmark, *options)
    assert (code, printed) == (2, "")
    assert named in said.splitlines()[-1]
