"""The command line as a user meets it: a subprocess, its exit code, its one sentence."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import make_images
from problems import features as blobs

import config
from config import InputError
from experiment import main, refuse_failed
from feature_file import load_features, save_features
from records import Results, load_arrays

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


def experiment(*arguments, cwd, **environment):
    environment = os.environ | {"HF_HUB_OFFLINE": "1"} | environment
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
    process = interruptible(*arguments, cwd=tmp_path)
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


def interruptible(*arguments, cwd, **options):
    return subprocess.Popen(
        command(*arguments),
        cwd=cwd,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job ignores it otherwise
        **options,
    )


@pytest.mark.parametrize("module", ["logging", "field", "torch", "pandas"])
def test_ctrl_c_while_libraries_are_imported_is_one_line(module, tmp_path):
    """A module in the place of a library that sends the signal, swallows what comes of it and waits."""
    code = "import os, signal, time\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(60)\n"
    code += "except BaseException:\n    time.sleep(60)\n"
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}:\n"
        f"            exec({code!r})\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    process = interruptible("run", "--results-dir", "out", cwd=tmp_path, env=environment)
    try:
        _, error = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert re.fullmatch(r"\nInterrupted(; the same command goes on from here)?\.\n", error)


def test_two_ctrl_c_while_training_are_one_line_that_says_to_leave_overwrite_out(feature_file, tmp_path):
    options = ["--seeds", "40", "--no-figures", "--set", "SEEDS_PER_CHUNK=2", "--overwrite"]
    environment = os.environ | {"TQDM_DISABLE": "1"}
    arguments = ["run", "--features", feature_file, "--results-dir", "stopped", *SMALL, *options]
    process = interruptible(*arguments, cwd=tmp_path, env=environment)
    weights = tmp_path / "stopped" / "weights" / "phase1_art.safetensors"
    deadline = time.monotonic() + 120
    while not weights.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    for _ in range(20):
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            time.sleep(0.01)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert error == "\nInterrupted; without --overwrite, the same command goes on from here.\n"


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
    options = ["--output=~/mine.safetensors", "--threads", 1]
    done = experiment("features", *images, *options, cwd=tmp_path, HOME=str(tmp_path))
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
    done = experiment("predict", weights, *options, cwd=tmp_path)
    assert done.returncode == 2
    assert "cannot be read as an image (cannot identify image file)" in done.stderr
    done = experiment("predict", picture, "--weights", weights, "--vit-model", tiny_vit, "--seed", 9, cwd=tmp_path)
    assert done.returncode == 2
    assert "has no seed 9; it has 0, 1" in done.stderr
    broken = tmp_path / "broken.png"
    broken.write_bytes(picture.read_bytes()[:-200])
    options += ["--set", "EXTRACTION_BATCH_SIZE=2"]
    done = experiment("predict", picture, picture, picture, broken, *options, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout.splitlines() == lines  # the first batch is printed before the second is read
    assert len(done.stderr.splitlines()) == 1


def test_networks_that_failed_do_not_predict(tmp_path):
    results = Results(tmp_path / "r")
    arrays = {"final.a": torch.zeros(4, 2)}
    arrays["final.a"][3, 1] = torch.nan
    results.save("weights", "new", range(4), arrays | {"failed": torch.tensor([0, -1, 2, 0])}, {})
    results.save("weights", "old", range(4), arrays, {})
    results.save("histories", "old", range(1, 6), {"failed": torch.tensor([0, 3, 0, 0, 0])}, {})
    results.save("weights", "bad", range(2), {"final.a": arrays["final.a"][2:], "failed": torch.tensor([1, 0])}, {})

    def refused(name, seed):
        path = tmp_path / "r" / "weights" / f"{name}.safetensors"
        try:
            refuse_failed(path, load_arrays(path)[0], seed)
        except InputError as error:
            return str(error).partition(f"'{path}' ")[2]

    advice = "give another one with --seed: "
    assert refused("new", 0) is None
    why = "failed in training (the importance is all equal or not finite)"
    assert refused("new", 1) == f"{why}; {advice}0."
    assert refused("new", 2) == f"failed in training (the loss is no longer finite in epoch 2); {advice}0."
    assert refused("new", 3) == f"failed in training (its weights are not finite); {advice}0."
    assert refused("old", 0) is refused("old", 1) is None
    assert refused("old", 2) == f"failed in training (the loss is no longer finite in epoch 3); {advice}0, 1."
    assert refused("bad", 0).endswith("in epoch 1); and so did all others in the file.")


def test_networks_of_an_unknown_model_do_not_see_images(feature_file, tmp_path, tiny_vit):
    run_small(feature_file, "out", "--seeds", 2, "--no-figures", cwd=tmp_path)
    picture = next(make_images(tmp_path / "tree").rglob("*.png"))
    weights = tmp_path / "out" / "weights" / "phase2_art_erm.safetensors"
    done = experiment("predict", picture, "--weights", weights, "--vit-model", tiny_vit, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("These networks were trained on features of a model that is not known")
