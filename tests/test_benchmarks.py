"""The benchmarks run at tiny sizes; nothing here says how fast anything is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
QUICK_RUN = "run --seeds 1 --no-figures --set PH1_NUM_EPOCHS=1 --set PH2_NUM_EPOCHS=1"


def run(benchmark, *options, folder):
    """Run a benchmark in a process, with `folder` as its working directory."""
    return subprocess.run(
        [sys.executable, ROOT / "benchmarks" / f"{benchmark}.py", *map(str, options)],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def rows_of(benchmark, *options, folder):
    """The rows of a report, measured once, and the printed table."""
    done = run(benchmark, *options, "--repeats", 1, "--output", "out.json", folder=folder)
    assert done.returncode == 0, done.stderr
    report = json.loads((folder / "out.json").read_text("utf-8"))
    assert set(report) == {"task", "results", "machine", "versions"}
    return report["results"], done.stdout


def test_training_compares_the_engine_with_the_loops(tmp_path):
    rows, printed = rows_of("training", "--networks", "1,14", "--dims", 8, "--images", 280, folder=tmp_path)
    found = {(row["name"], row["networks"], row["arms"]): row for row in rows if row["device"] == "cpu"}
    loops = {(name, 1, 1) for name in ("plain", "fused", "scikit_learn")}
    assert set(found) == loops | {("engine", 1, 1), ("engine", 14, 1), ("engine", 12, 6)}
    for (name, networks, _), row in found.items():
        assert name in printed
        rate = row["rate"]["median"]
        assert rate == pytest.approx(networks / row["seconds_per_epoch"]["median"])
        for loop, over in row.get("rate_over", {}).items():
            assert over["median"] == pytest.approx(rate / found[loop, 1, 1]["rate"]["median"])
        assert ("rate_over" in row) == (name == "engine")


def test_methods_compares_with_plain_training(tmp_path):
    rows, printed = rows_of("methods", "--methods", "GroupDRO,ImportanceMask", "--seeds", 2, folder=tmp_path)
    seconds = {row["method"]: row["seconds"]["median"] for row in rows}
    assert set(seconds) == {"ERM", "ERMBalanced", "GroupDRO", "ImportanceMask"}
    assert list(seconds.values()) == sorted(seconds.values())
    for row in rows:
        assert row["method"] in printed
        plain = {"pooled": "ERM", "balanced": "ERMBalanced"}[row["batches"]]
        assert row["over_plain_training"]["median"] == pytest.approx(row["seconds"]["median"] / seconds[plain])


def test_extraction_compares_with_the_bare_forward_pass(tmp_path, image_root, tiny_vit):
    options = ("--data-root", image_root, "--vit-model", tiny_vit, "--device", "cpu")
    rows, printed = rows_of("extraction", *options, folder=tmp_path)
    assert [row["part"] for row in rows] == ["bare_forward", "decoding", "extraction", "cache_hit", "vit_epoch"]
    for row in rows:
        assert row["part"] in printed
        assert row["images_per_second"]["median"] == pytest.approx(12 / row["seconds"]["median"])
    assert rows[0]["speed_over_bare_forward"]["median"] == 1


def test_whole_times_a_command(tmp_path):
    rows, printed = rows_of("whole", QUICK_RUN, folder=tmp_path)
    assert [row["command"] for row in rows] == [QUICK_RUN]
    assert QUICK_RUN in printed
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]  # results went elsewhere


def test_versions_compares_two_checkouts(tmp_path):
    options = ("--against", ROOT, "--networks", 2, "--epochs", 1, "run --help")
    rows, printed = rows_of("versions", *options, folder=tmp_path)
    assert [row["what"] for row in rows] == ["training of 2", "run --help"]
    for row in rows:
        assert row["what"] in printed
        ratio = row["this"]["median"] / row["other"]["median"]
        assert row["this_over_other"]["median"] == pytest.approx(ratio)


@pytest.mark.parametrize(
    ("benchmark", "options", "named"),
    [
        ("versions", ["--against", "nowhere"], "--against"),
        ("whole", ["--output", "no/such/folder/out.json"], "--output"),
        ("whole", ["run --seeds 0"], "--seeds"),
    ],
)
def test_bad_input_is_named(tmp_path, benchmark, options, named):
    done = run(benchmark, *options, folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert named in done.stderr.splitlines()[-1]
