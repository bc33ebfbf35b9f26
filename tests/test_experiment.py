"""The command line as a user meets it: a subprocess, its exit code, its one sentence."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import make_images
from problems import features as blobs

import config
from experiment import main
from feature_file import load_features, save_features

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--set", "HIDDEN_SIZES=(6, 5, 4)", "--set", "PH1_NUM_EPOCHS=2", "--set", "PH2_NUM_EPOCHS=2", "--threads", "1"]


@pytest.fixture(scope="module")
def feature_file(tmp_path_factory):
    d = blobs(per_cell=30)
    path = tmp_path_factory.mktemp("features") / "blobs.safetensors"
    names = d.class_names, d.domain_names, d.files
    save_features(path, d.features.half(), d.labels, d.domains, *names, dataset="blobs")
    return path


def command(*arguments):
    return [sys.executable, str(ROOT / "experiment.py"), *map(str, arguments)]


def experiment(*arguments, cwd):
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    return subprocess.run(command(*arguments), capture_output=True, text=True, cwd=cwd, env=environment, check=False)


def run_small(feature_file, directory, *options, cwd):
    return experiment("run", "--features", feature_file, "--results-dir", directory, *SMALL, *options, cwd=cwd)


def test_run_writes_everything_and_says_what_it_works_on(feature_file, tmp_path):
    done = run_small(feature_file, "out", "--seeds", 3, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, *_ = done.stdout.splitlines()
    assert "270 × 8" in first
    assert "blobs.safetensors" in first
    assert "importance masking" in done.stdout
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir() if not p.name.startswith(".")} == {
        "weights", "histories", "importance", "plots", "records.jsonl", "settings.json", "summary_report.txt",
    }  # fmt: skip
    assert "Chance is 33.3 %" in (out / "summary_report.txt").read_text("utf-8")
    plots = {p.stem for p in (out / "plots").glob("*.png")}
    assert {"accuracy", "difference", "features", "phase1_curves", "phase2_curves_art", "confusion_erm"} <= plots
    assert {f"phase1_sketch_{k}" for k in ("initial", "final", "normalized", "mask")} <= plots
    assert {f"holdout_photo_{k}" for k in ("importance", "normalized", "mask")} <= plots
    assert len((out / "records.jsonl").read_text().splitlines()) == 2 * 3 * 3 * 2
    again = run_small(feature_file, "out", "--seeds", 3, "--no-figures", cwd=tmp_path)
    assert again.stdout == done.stdout


def test_ctrl_c_leaves_nothing_half_written_and_the_same_command_goes_on(feature_file, tmp_path):
    options = ["--seeds", "20", "--no-figures", "--set", "SEEDS_PER_CHUNK=2"]
    whole = run_small(feature_file, "whole", *options, cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    arguments = ["run", "--features", feature_file, "--results-dir", "stopped", *SMALL, *options]
    process = subprocess.Popen(
        command(*arguments),
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job ignores it otherwise
    )
    records = tmp_path / "stopped" / "records.jsonl"
    deadline = time.monotonic() + 120
    while not records.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode == 130, error
    assert "Interrupted; the same command goes on from here." in error
    assert "Traceback" not in error
    assert (
        0 < len(records.read_bytes().splitlines()) < len((tmp_path / "whole/records.jsonl").read_bytes().splitlines())
    )
    assert not [p for p in (tmp_path / "stopped").rglob(".*") if p.name != ".lock"]
    assert run_small(feature_file, "stopped", *options, cwd=tmp_path).returncode == 0
    assert records.read_bytes() == (tmp_path / "whole" / "records.jsonl").read_bytes()


BAD = {
    ("run", "--seeds", "0"): "--seeds must be at least 1",
    ("run", "--seeds", "x"): "invalid int value",
    ("run", "--set", "PH2_FREEZE_EPOC=3"): "no setting 'PH2_FREEZE_EPOC'; the nearest is PH2_FREEZE_EPOCH",
    ("run", "--set", "PH2_FREEZE_EPOCH=three"): "PH2_FREEZE_EPOCH must be of type int",
    ("run", "--set", "PH2_FREEZE_EPOCH"): "--set wants NAME=VALUE",
    ("run", "--set", "IMPORTANCE_THRESHOLD_PERCENTILE=160"): "0 … 100",
    ("run", "--holdouts", "sketches"): "no domain 'sketches' to hold out; there are art_painting, cartoon",
    ("run", "--data-root", "nowhere"): "nowhere",
    ("run", "--features", "nothing.safetensors"): "nothing.safetensors",
    ("run", "--features", "a", "--data-root", "b"): "exclude each other",
    ("run", "--vit-model", "x"): "--vit-model needs --data-root",
    ("run", "--results-dir", ""): "RESULTS_DIR is empty",
    ("run", "--set", "SEEDS_PER_CHUNK=0"): "SEEDS_PER_CHUNK must be at least 1",
    ("run", "--threads", "0"): "THREADS must be at least 1",
    ("run", "--unknown",): "Unrecognized arguments: --unknown",
    ("features",): "--data-root is missing",
    ("predict", "x.png", "--weights", "no.safetensors"): "There is no file 'no.safetensors'",
    ("predict", "x.png"): "required: --weights",
    (): "required: command",
}  # fmt: skip


@pytest.fixture
def restored_config():
    """Constants of `config` as they were, after a command has set them in this process."""
    before = {name: getattr(config, name) for name in config.names()}
    yield
    config.apply(before)


@pytest.mark.parametrize("arguments", BAD, ids=" ".join)
def test_bad_input_is_one_sentence_and_exit_code_2(arguments, tmp_path, monkeypatch, capsys, restored_config):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(arguments)
    except SystemExit as stop:  # argparse leaves this way
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2
    assert BAD[arguments] in error
    assert len(error.strip().splitlines()) == 1


def test_bad_input_from_the_shell_shows_no_traceback(tmp_path):
    done = experiment("run", "--data-root", "nowhere", cwd=tmp_path)
    assert done.returncode == 2
    assert "nowhere" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_other_settings_leave_what_is_there_until_overwrite(feature_file, tmp_path):
    assert run_small(feature_file, "out", "--seeds", 2, "--no-figures", cwd=tmp_path).returncode == 0
    before = (tmp_path / "out" / "records.jsonl").read_bytes()
    options = ["--seeds", 2, "--no-figures", "--set", "BATCH_SIZE=16"]
    done = run_small(feature_file, "out", *options, cwd=tmp_path)
    assert done.returncode == 2
    assert "BATCH_SIZE = 32, not 16" in done.stderr
    assert (tmp_path / "out" / "records.jsonl").read_bytes() == before
    assert run_small(feature_file, "out", *options, "--overwrite", cwd=tmp_path).returncode == 0
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["settings"]["BATCH_SIZE"] == 16


def test_a_single_failed_seed_is_an_error_and_strict_stops(feature_file, tmp_path):
    explode = ["--no-figures", "--set", "PH1_LEARNING_RATE=1e38"]
    done = run_small(feature_file, "one", "--seeds", 1, *explode, cwd=tmp_path)
    assert done.returncode == 1
    assert "Phase 1, domain art, seed 0: the loss is no longer finite in epoch" in done.stderr
    done = run_small(feature_file, "strict", "--seeds", 2, "--strict", *explode, cwd=tmp_path)
    assert done.returncode == 1
    done = run_small(feature_file, "all", "--seeds", 2, *explode, cwd=tmp_path)
    assert done.returncode == 0
    assert "Warning: 6 networks failed and are left out" in done.stderr


def test_images_to_prediction_with_a_tiny_vit(tiny_vit, tmp_path):
    """The full setting, from a folder of images to the class of one: D is the model's, not 192."""
    image_tree = make_images(tmp_path / "tree", domains=("art", "photo", "sketch"), per_class=12)
    images = ["--data-root", image_tree, "--vit-model", tiny_vit]
    done = experiment("features", *images, "--output", "mine.safetensors", "--threads", 1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    data = load_features(tmp_path / "mine.safetensors")
    assert data.feature_size not in (192, 768)
    done = experiment("run", *images, "--seeds", 2, "--results-dir", "out", *SMALL, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "plots" / "samples.png").is_file()
    weights = next((tmp_path / "out" / "weights").glob("phase2_*_importance.safetensors"))
    picture = next(p for p in image_tree.rglob("*") if p.suffix in (".png", ".jpg"))
    options = ["--weights", weights, "--vit-model", tiny_vit, "--seed", 1]
    done = experiment("predict", picture, picture, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    name, _, ranked = lines[0].rpartition(": ")
    assert name == str(picture)
    chances = {part.rsplit(" ", 1)[0]: float(part.rsplit(" ", 1)[1]) for part in ranked.split(", ")}
    assert set(chances) == set(data.class_names)
    assert sum(chances.values()) == pytest.approx(1, abs=0.01)
    done = experiment("predict", weights, "--weights", weights, "--vit-model", tiny_vit, cwd=tmp_path)
    assert done.returncode == 2
    assert "cannot be read as an image" in done.stderr
    done = experiment("predict", picture, "--weights", weights, "--vit-model", tiny_vit, "--seed", 9, cwd=tmp_path)
    assert done.returncode == 2
    assert "has no seed 9; it has 0, 1" in done.stderr


def test_networks_of_an_unknown_model_do_not_see_images(feature_file, tmp_path, tiny_vit):
    run_small(feature_file, "out", "--seeds", 2, "--no-figures", cwd=tmp_path)
    picture = next(make_images(tmp_path / "tree").rglob("*.png"))
    weights = tmp_path / "out" / "weights" / "phase2_art_erm.safetensors"
    done = experiment("predict", picture, "--weights", weights, "--vit-model", tiny_vit, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("These networks were trained on features of a model that is not known")
