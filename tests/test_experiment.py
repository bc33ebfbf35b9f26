"""The command line as a user meets it: exit codes, the one sentence about bad input, Ctrl-C, and what is written."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

import config
from experiment import main
from storage import load_features
from study import figures
from tests.conftest import make_images
from tests.factories import ROOT, everything, save_blobs

SMALL = ["--set", "HIDDEN_SIZES=(6, 5, 4)", "--set", "PH1_NUM_EPOCHS=2", "--set", "PH2_NUM_EPOCHS=2", "--threads", "1"]


@pytest.fixture(scope="module")
def feature_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("features") / "blobs.safetensors"
    save_blobs(path, per_cell=30)
    return path


@pytest.fixture(autouse=True)
def _restored(monkeypatch):
    """Commands set constants of `config` and the number of threads; and a commit meanwhile would show in results."""
    monkeypatch.setenv("GIT_DIR", os.devnull)
    constants, threads = {name: getattr(config, name) for name in config.names()}, torch.get_num_threads()
    yield
    config.apply(constants)
    torch.set_num_threads(threads)


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs a command in `tmp_path`: (exit code, standard output, lines of standard error without progress bars)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse leaves this way
            code = stop.code
        printed, error = capsys.readouterr()
        lines = [line for line in re.split(r"[\r\n]+", error) if line and not re.match(r"[\w ]+: +\d+%\|", line)]
        return code, printed, lines

    return call


@pytest.fixture
def run(command, feature_file):
    """The command `run` with a short training: (directory, options) -> as `command`."""
    return lambda out, *options: command("run", "--features", feature_file, "--results-dir", out, *SMALL, *options)


def test_run_writes_everything_and_says_what_it_works_on(run, tmp_path, monkeypatch):
    every, drawn = figures.all_figures, ("accuracy", "phase1_art_mask")  # the others take a second each
    monkeypatch.setattr(figures, "all_figures", lambda *given: (f for f in every(*given) if f[0] in drawn))
    options = ["--seeds", 3, "--holdouts", "photo"]
    code, printed, error = run("out", *options)
    assert (code, error) == (0, [])
    first, *_ = printed.splitlines()
    assert "270 × 8" in first
    assert "blobs.safetensors" in first
    assert "importance masking" in printed
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir() if not p.name.startswith(".")} == {
        "weights", "histories", "importance", "plots", "records.jsonl", "settings.json", "summary_report.txt",
    }  # fmt: skip
    assert "Chance is 33.3 %" in (out / "summary_report.txt").read_text("utf-8")
    assert len((out / "records.jsonl").read_text().splitlines()) == 2 * 3 * 2  # arms, seeds, selections
    assert {path.name for path in (out / "plots").iterdir()} == {f"{name}.png" for name in drawn}
    before = everything(out)
    assert run("out", *options, "--no-figures") == (0, printed, [])
    assert everything(out) == before


def test_a_command_from_the_shell_is_quiet(feature_file, tmp_path):
    options = ["--seeds", "2", "--holdouts", "art,photo", "--no-figures", "--results-dir", "out"]
    arguments = [sys.executable, str(ROOT / "experiment.py"), "run", "--features", str(feature_file), *SMALL, *options]
    environment = os.environ | {"TQDM_DISABLE": "1"}
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "art" in done.stdout
    assert {p.name for p in (tmp_path / "out" / "importance").glob("holdout_*")} == {
        "holdout_art.npz", "holdout_photo.npz",
    }  # fmt: skip


INTERRUPTED = """
import os, runpy, signal, sys
where, path, *sys.argv[1:] = sys.argv[1:]
sys.argv[0], sys.path[0] = path, os.path.dirname(path)
from storage import Results
original = getattr(Results, where)

class Again:  # in place of standard error
    def write(self, text):
        os.killpg(0, signal.SIGINT)
        return sys.__stderr__.write(text)
    def flush(self):
        sys.__stderr__.flush()

def interrupted(self, *arguments):
    original(self, *arguments)
    sys.stderr = Again()
    os.killpg(0, signal.SIGINT)  # as from the keyboard: workers get it as well

setattr(Results, where, interrupted)
runpy.run_path(path, run_name="__main__")
"""


def interrupted(where, *arguments, cwd):
    """A command that gets Ctrl-C after the first call of a method of `Results`, and in every later write."""
    arguments = [sys.executable, "-c", INTERRUPTED, where, str(ROOT / "experiment.py"), *map(str, arguments)]
    options = {"env": os.environ | {"TQDM_DISABLE": "1"}, "start_new_session": True, "timeout": 300}
    return subprocess.run(arguments, capture_output=True, text=True, cwd=cwd, **options)


def test_ctrl_c_leaves_nothing_half_written_and_the_same_command_goes_on(run, feature_file, tmp_path):
    options = ["--seeds", "6", "--no-figures", "--set", "SEEDS_PER_CHUNK=2"]
    assert run("whole", *options)[0] == 0
    arguments = ["run", "--features", feature_file, "--results-dir", "stopped", *SMALL, *options]
    done = interrupted("append", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (130, "\nInterrupted; the same command goes on from here.\n")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    lines = (whole / "records.jsonl").read_bytes().splitlines()
    assert (stopped / "records.jsonl").read_bytes().splitlines() == lines[: 2 * 2 * 2]  # seeds, arms, selections
    assert not [path for path in stopped.rglob(".*") if path.name != ".lock"]
    assert run("stopped", *options)[0] == 0
    assert everything(stopped) == everything(whole)


def test_after_ctrl_c_overwrite_is_to_be_left_out(feature_file, tmp_path):
    arguments = ["run", "--features", feature_file, "--results-dir", "out", *SMALL, "--no-figures", "--overwrite"]
    done = interrupted("save", *arguments, cwd=tmp_path)
    assert done.returncode == 130
    assert done.stderr == "\nInterrupted; without --overwrite, the same command goes on from here.\n"


AT_EXIT = """
import atexit, os, runpy, signal, sys
path, *sys.argv[1:] = sys.argv[1:]
sys.argv[0], sys.path[0] = path, os.path.dirname(path)
atexit.register(os.kill, os.getpid(), signal.SIGINT)
runpy.run_path(path, run_name="__main__")
"""


def test_bad_input_from_the_shell_is_one_line_even_with_ctrl_c_after_it(tmp_path):
    arguments = [sys.executable, "-c", AT_EXIT, str(ROOT / "experiment.py"), "run", "--data-root", "nowhere"]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "nowhere" in done.stderr
    assert len(done.stderr.splitlines()) == 1


IMPORTING = """
import os, runpy, signal, sys, time
module, path, *sys.argv[1:] = sys.argv[1:]
sys.argv[0], sys.path[0] = path, os.path.dirname(path)

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(120)
            except BaseException:
                time.sleep(120)

sys.meta_path.insert(0, Interrupt())
runpy.run_path(path, run_name="__main__")
"""


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("run", "logging"),
        ("run", "torch"),
        ("run", "pandas"),
        ("run", "study"),
        ("study", "evidence"),
        ("compare", "field"),
    ],
)
def test_ctrl_c_while_libraries_are_imported_is_one_line(name, module, tmp_path):
    """Ctrl-C where a module is looked for, which swallows what comes of it and waits."""
    arguments = [sys.executable, "-c", IMPORTING, module, str(ROOT / "experiment.py"), name, "--results-dir", "out"]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path, timeout=100)
    assert (done.returncode, done.stderr) == (130, "\nInterrupted.\n")
    assert not list(tmp_path.iterdir())


BAD = {
    ("run", "--seeds", "0"): "--seeds",
    ("run", "--seeds", "x"): "--seeds",
    ("run", "--set", "PH2_FREEZE_EPOC=3"): "PH2_FREEZE_EPOCH",
    ("run", "--set", "PH2_FREEZE_EPOCH=three"): "PH2_FREEZE_EPOCH",
    ("run", "--set", "PH2_FREEZE_EPOCH"): "--set",
    ("run", "--set", "IMPORTANCE_THRESHOLD_PERCENTILE=160"): "IMPORTANCE_THRESHOLD_PERCENTILE",
    ("run", "--holdouts", "sketches"): "'sketches'",
    ("run", "--holdouts", "art,"): "--holdouts",
    ("run", "--data-root", "nowhere"): "nowhere",
    ("run", "--features", "nothing.safetensors"): "nothing.safetensors",
    ("run", "--features", "a", "--data-root", "b"): "--data-root",
    ("run", "--vit-model", "x"): "--vit-model",
    ("study", "--vit-model", "x"): "--vit-model",
    ("run", "--results-dir", ""): "RESULTS_DIR",
    ("run", "--set", "SEEDS_PER_CHUNK=0"): "SEEDS_PER_CHUNK",
    ("run", "--threads", "0"): "THREADS",
    ("run", "--device", "tpu"): "--device",
    ("run", "--set", "DEVICE=tpu"): "DEVICE",
    ("run", "--unknown"): "--unknown",
    ("features",): "--data-root",
    ("predict", "x.png", "--weights", "no.safetensors"): "no.safetensors",
    ("predict", "x.png"): "--weights",
    ("predict", "x.png", "--weights", "no.safetensors", "--set", "EXTRACTION_BATCH_SIZE=0"): "EXTRACTION_BATCH_SIZE",
    ("nothing",): "'nothing'",
    (): "command",
}


@pytest.mark.parametrize("arguments", BAD, ids=" ".join)
def test_bad_input_is_one_sentence_and_exit_code_2(arguments, command, tmp_path):
    code, printed, (sentence,) = command(*arguments)
    assert (code, printed) == (2, "")
    assert BAD[arguments] in sentence
    assert everything(tmp_path).keys() <= {"results/settings.json"}


def test_every_name_of_a_wrong_setting_is_met_before_any_is_set(command):
    assert command("run", "--set", "BATCH_SIZE=7", "--set", "NOTHING=1")[0] == 2
    assert config.BATCH_SIZE == 32


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["predict", "--help"]], ids=" ".join)
def test_help_says_what_there_is(arguments, command):
    code, printed, error = command(*arguments)
    assert (code, error) == (0, [])
    assert "usage: experiment.py" in printed


def test_other_settings_leave_what_is_there_until_overwrite(run, tmp_path):
    assert run("out", "--seeds", 2, "--no-figures")[0] == 0
    before = everything(tmp_path / "out")
    options = ["--seeds", 2, "--no-figures", "--set", "BATCH_SIZE=16"]
    code, _, (sentence,) = run("out", *options)
    assert code == 2
    assert "BATCH_SIZE" in sentence
    assert "--overwrite" in sentence
    assert everything(tmp_path / "out") == before
    assert run("out", *options, "--overwrite")[0] == 0
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["settings"]["BATCH_SIZE"] == 16


def test_a_single_failed_seed_is_an_error_and_strict_stops(run):
    explode = ["--no-figures", "--set", "PH1_LEARNING_RATE=1e38"]
    for options in (["--seeds", 1], ["--seeds", 2, "--strict"]):
        code, _, (sentence,) = run(f"failed{len(options)}", *options, *explode)
        assert code == 1
        assert "Phase 1, domain art, seed 0" in sentence
        assert "--strict" in sentence
    code, _, (sentence,) = run("all", "--seeds", 2, *explode)
    assert code == 0
    assert "6 networks failed" in sentence


def test_images_to_prediction_with_a_tiny_vit(command, tiny_vit, tmp_path, monkeypatch):
    """The full setting, from a folder of images to the class of one: D is the model's, not 192."""
    monkeypatch.setenv("HOME", str(tmp_path))
    tree = make_images(tmp_path / "tree", domains=("art", "photo", "sketch"), per_class=12)
    images = ["--data-root", tree, "--vit-model", tiny_vit]
    assert command("features", *images, "--output=~/mine.safetensors", "--threads", 1)[0] == 0
    data = load_features(tmp_path / "mine.safetensors")
    assert data.feature_size == 24
    one = ["--seeds", 2, "--holdouts", "photo", "--results-dir", "out"]
    monkeypatch.setattr(figures, "all_figures", lambda _, root: [("samples", lambda: figures.sample_figure(root))])
    assert command("run", *images, *one, *SMALL)[0] == 0
    assert (tmp_path / "out" / "plots" / "samples.png").is_file()
    weights, picture = tmp_path / "out/weights/phase2_photo_importance.safetensors", tree / "art" / "dog" / "000.png"
    network = ["--weights", weights, "--vit-model", tiny_vit]
    code, printed, error = command("predict", picture, picture, *network, "--seed", 1)
    assert (code, error) == (0, [])
    first, second = printed.splitlines()
    name, _, ranked = first.rpartition(": ")
    assert (name, second) == (str(picture), first)
    chances = {part.rsplit(" ", 1)[0]: float(part.rsplit(" ", 1)[1]) for part in ranked.split(", ")}
    assert set(chances) == set(data.class_names)
    assert sum(chances.values()) == pytest.approx(1, abs=0.01)
    for wrong, named in (([picture, "--seed", 9], "seed 9"), ([weights], weights.name)):
        code, _, (sentence,) = command("predict", *wrong, *network)
        assert code == 2
        assert named in sentence
