"""The command line as a user meets it: exit codes, the one sentence about bad input, Ctrl-C, and what is written."""

import json
import logging
import os
import re
import subprocess
import sys

import pytest
import torch
import transformers

import config
import experiment
from cli.parser import COMMANDS
from config import InputError
from storage import Results, load_features
from study import figures
from tests.conftest import VIT, make_images, save_model
from tests.factories import ROOT, everything, save_blobs

pytestmark = pytest.mark.usefixtures("restored")
SMALL = ["--set", "HIDDEN_SIZES=(6, 5, 4)", "--set", "PH1_NUM_EPOCHS=2", "--set", "PH2_NUM_EPOCHS=2", "--threads", "1"]


@pytest.fixture(scope="module")
def feature_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("features") / "blobs.safetensors"
    save_blobs(path, per_cell=30)
    return path


@pytest.fixture
def run(command, feature_file):
    """The command `run` with a short training: (directory, options) -> as `command`."""
    return lambda out, *options: command("run", "--features", feature_file, "--results-dir", out, *SMALL, *options)


def test_what_can_be_typed_is_what_can_be_done():
    assert [*COMMANDS] == [*experiment.COMMANDS]


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


AS_SCRIPT = """
import os, runpy, signal, sys, time
sys.path[0] = os.path.dirname(sys.argv[1])
sys.argv = sys.argv[1:]
{}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def shell(*arguments, cwd, before=None, **options):
    """A command from the shell without progress bars, perhaps in a process that was prepared by some code."""
    prepared = [] if before is None else ["-c", AS_SCRIPT.format(before)]
    command = [sys.executable, *prepared, ROOT / "experiment.py", *arguments]
    options |= {"env": os.environ | {"TQDM_DISABLE": "1"}, "cwd": cwd, "timeout": 300}
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)


INTERRUPTED = """
from storage import Results
append = Results.append

class Again:  # in place of standard error
    def write(self, text):
        os.killpg(0, signal.SIGINT)
        return sys.__stderr__.write(text)
    def flush(self):
        sys.__stderr__.flush()

def interrupted(self, *arguments):
    append(self, *arguments)
    sys.stderr = Again()
    os.killpg(0, signal.SIGINT)  # as from the keyboard: workers get it as well

Results.append = interrupted
"""
AT_EXIT = "import atexit; atexit.register(os.kill, os.getpid(), signal.SIGINT)"


def test_ctrl_c_leaves_nothing_half_written_and_the_same_command_from_the_shell_goes_on(run, feature_file, tmp_path):
    """Ctrl-C after the first records were written, in every later write to standard error, and when all is done."""
    options = ["--seeds", "4", "--holdouts", "art,photo", "--no-figures", "--set", "SEEDS_PER_CHUNK=2"]
    assert run("whole", *options)[0] == 0
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    command = ["run", "--features", feature_file, "--results-dir", "stopped", *SMALL, *options]
    done = shell(*command, cwd=tmp_path, before=INTERRUPTED, start_new_session=True)
    assert (done.returncode, done.stderr) == (130, "\nInterrupted; the same command goes on from here.\n")
    lines = (whole / "records.jsonl").read_bytes().splitlines()
    assert (stopped / "records.jsonl").read_bytes().splitlines() == lines[: 2 * 2 * 2]  # seeds, arms, selections
    assert not [path for path in stopped.rglob(".*") if path.name != ".lock"]
    done = shell(*command, cwd=tmp_path, before=AT_EXIT)
    assert (done.returncode, done.stderr) == (0, "")
    assert "art" in done.stdout
    assert everything(stopped) == everything(whole)
    names = {path.name for path in (stopped / "importance").glob("holdout_*")}
    assert names == {"holdout_art.npz", "holdout_photo.npz"}


def test_after_ctrl_c_overwrite_is_to_be_left_out(run, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("storage.Results.save", interrupted)
    code, _, lines = run("out", "--no-figures", "--overwrite")
    assert (code, lines) == (130, ["Interrupted; without --overwrite, the same command goes on from here."])


IMPORTING = """
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "{}":
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(120)
            except BaseException:
                time.sleep(120)

sys.meta_path.insert(0, Interrupt())
"""


@pytest.mark.parametrize(
    "place", ["run logging", "run study", "run torch", "run pandas", "study evidence", "compare field"]
)
def test_ctrl_c_while_libraries_are_imported_is_one_line(place, tmp_path):
    """Ctrl-C where a command looks for a module, which swallows what comes of it and waits."""
    name, module = place.split()
    done = shell(name, "--results-dir", "out", cwd=tmp_path, before=IMPORTING.format(module))
    assert (done.returncode, done.stderr) == (130, "\nInterrupted.\n")
    assert not list(tmp_path.iterdir())


HOMELESS = """
os.environ["HOME"] = os.devnull
for name in ("MPLCONFIGDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
    os.environ.pop(name, None)
"""


def test_figures_are_drawn_where_nothing_can_be_kept_in_the_home_folder(run, feature_file, tmp_path):
    assert run("out", "--seeds", 2, "--holdouts", "photo", "--no-figures")[0] == 0
    command = ["figures", "--results-dir", "out", "--features", feature_file, "--only", "accuracy"]
    done = shell(*command, cwd=tmp_path, before=HOMELESS)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "out" / "plots" / "accuracy.png").is_file()


@pytest.mark.parametrize("options", [["-I"], ["-m"]])
def test_the_script_is_found_from_other_folders_and_beside_other_modules(options, tmp_path):
    (tmp_path / "config.py").touch()
    script = ["experiment"] if options == ["-m"] else [ROOT / "experiment.py"]
    command = [sys.executable, *options, *script, "--help"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")


BAD = {
    ("run", "--seeds", "0"): "--seeds",
    ("run", "--seeds", "x"): "--seeds",
    ("run", "--seeds", "7-3"): "--seeds",
    ("run", "--seeds", "1,,2"): "--seeds",
    ("run", "--seeds", "1000000000"): "NUM_SEEDS",
    ("run", "--seeds", "9999999999999999"): "NUM_SEEDS",
    ("study", "--sweep-seeds", "0-99999999999"): "100000",
    ("run", "--set", "NUM_SEEDS=-1"): "NUM_SEEDS",
    ("run", "--threads", "1000000"): "THREADS",
    ("run", "--set", f"BATCH_SIZE={10**30}"): "BATCH_SIZE",
    ("run", "--set", f"PH1_LEARNING_RATE={10**500}"): "PH1_LEARNING_RATE",
    ("run", "--set", "HIDDEN_SIZES=(10,)*999"): "HIDDEN_SIZES",
    ("compare", "--trials", "10000000"): "--trials",
    ("run", "--set", "BATCH_SIZE=7", "--set", "BATCH_SIZE=8"): "BATCH_SIZE=8",
    ("run", "--seeds", "3", "--set", "NUM_SEEDS=4"): "--seeds",
    ("run", "--device", "cpu", "--set", "DEVICE=cuda"): "--device",
    ("run", "--set", "VIT_MODEL=x"): "VIT_MODEL=x",
    ("run", "--set", "FEATURE_LAYERS=all"): "--data-root",
    ("run", "--features", "a", "--set", "FEATURE_LAYERS=all"): "FEATURE_LAYERS=all needs --data-root",
    ("features", "--data-root", "x", "--set", "FEATURE_LAYERS=all", "--set", "TRAINED_BLOCKS=1"): "TRAINED_BLOCKS",
    ("run", "--data-root", "x", "--set", "FEATURE_LAYERS=first"): "FEATURE_LAYERS",
    ("columns",): "FEATURE_LAYERS=all",
    ("columns", "--seeds", "1"): "--seeds",
    ("columns", "--strict"): "--strict",
    ("columns", "--set", "PH1_NUM_EPOCHS=3"): "PH1_NUM_EPOCHS",
    ("columns", "--set", "SPLIT_SEED=3"): "SPLIT_SEED",
    ("run", "--verify"): "--verify",
    ("run", "--set", "BATCH_SIZE=7", "--set", "PH2_FREEZE_EPOC=3"): "PH2_FREEZE_EPOCH",  # then none is set
    ("run", "--set", "PH2_FREEZE_EPOCH=three"): "PH2_FREEZE_EPOCH",
    ("run", "--set", "TRAINED_BLOCKS=1"): "DATA_ROOT",
    ("study", "--set", "TRAINED_BLOCKS=1"): "DATA_ROOT",
    ("study", "--set", "TRAINED_BLOCKS=1", "--set", "IMPORTANCE_THRESHOLD_PERCENTILE=30"): "IMPORTANCE_THRESHOLD",
    ("study", "--keep-weights"): "--keep-weights",
    ("study", "--no-controls"): "--no-controls",
    ("compare", "--set", "TRAINED_BLOCKS=1"): "TRAINED_BLOCKS",
    ("run", "--set", "HIDDEN_SIZES=()"): "HIDDEN_SIZES",
    ("run", "--set", "BLOCK_HIDDEN_SIZES=()"): "TRAINED_BLOCKS",
    ("run", "--set", "PROBE_C=1"): "TRAINED_BLOCKS",
    ("run", "--set", "TRAINED_BLOCKS=1", "--set", "BATCH_SIZE=7"): "BLOCK_BATCH_SIZE",
    ("run", "--set", "TRAINED_BLOCKS=1", "--set", "BLOCK_HIDDEN_SIZES=(5, 4)"): "HEAD_START",
    ("run", "--set", "PH2_FREEZE_EPOCH"): "--set",
    ("run", "--set", "IMPORTANCE_THRESHOLD_PERCENTILE=160"): "IMPORTANCE_THRESHOLD_PERCENTILE",
    ("run", "--holdouts", "sketches"): "'sketches'",
    ("run", "--holdouts", "art,"): "--holdouts",
    ("run", "--data-root", "nowhere"): "nowhere",
    ("run", "--features", "nothing.safetensors"): "nothing.safetensors",
    ("run", "--features", "a", "--data-root", "b"): "--data-root",
    ("run", "--vit-model", "x"): "--vit-model",
    ("study", "--vit-model", "x"): "--vit-model",
    ("study", "--set", "PH2_INIT=phase1"): "PH2_INIT",
    ("study", "--seeds", "5,"): "--seeds",
    ("study", "--seeds", "5-5"): "--seeds",
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


@pytest.mark.parametrize("arguments", BAD, ids=lambda arguments: " ".join(arguments)[:60])
def test_bad_input_is_one_sentence_and_exit_code_2(arguments, command, tmp_path):
    code, printed, (sentence,) = command(*arguments)
    assert (code, printed) == (2, "")
    assert BAD[arguments] in sentence
    assert config.BATCH_SIZE == 32
    assert everything(tmp_path).keys() <= {"results/settings.json"}


def test_bad_input_in_a_process_of_the_shell_is_one_line_and_exit_code_2(tmp_path):
    done = shell("features", "--set", "BATCH_SIZE=7", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(".*BATCH_SIZE.*\n", done.stderr)


IMAGES = {"DATA_ROOT", "VIT_MODEL", "FEATURE_LAYERS", "CACHE_DIR", "EXTRACTION_BATCH_SIZE", "EXTRACTION_WORKERS"}
USED = {  # by commands that do not train
    ("features",): {*IMAGES, "TRAINED_BLOCKS", "DEVICE", "THREADS"},
    ("columns",): {
        *IMAGES,
        "FEATURES_FILE",
        "OUT_FRACTION",
        "NUM_SEEDS",
        "RESULTS_DIR",
        "DEVICE",
        "THREADS",
        "SCHEDULER",
    },
    ("figures",): {*IMAGES, "FEATURES_FILE", "RESULTS_DIR", "DEVICE", "THREADS"},
    ("predict", "x.png", "--weights", "no.safetensors"): {"VIT_MODEL", "EXTRACTION_BATCH_SIZE", "DEVICE", "THREADS"},
    ("export-domainbed", "out"): {*IMAGES, "FEATURES_FILE", "RESULTS_DIR", "DEVICE", "THREADS"},
    ("import-domainbed", "runs"): set(),
    ("report", "out"): set(),
    ("docs",): set(),
}


@pytest.mark.parametrize("arguments", USED, ids=" ".join)
def test_a_setting_that_a_command_does_not_use_is_refused_by_name(arguments, command):
    for name in config.names().keys() - USED[arguments]:
        code, _, (sentence,) = command(*arguments, "--set", f"{name}={getattr(config, name)}")
        assert code == 2
        assert name in sentence
    for name in USED[arguments] - {"DATA_ROOT", "FEATURES_FILE"}:
        _, _, lines = command(*arguments, "--set", f"{name}={getattr(config, name)}")
        assert not any("does not use" in line for line in lines)


@pytest.mark.parametrize(
    ("typed", "expected"),
    [("3", [0, 1, 2]), ("100-102", [100, 101, 102]), ("0, 3,7-9", [0, 3, 7, 8, 9]), ("5,5", [5]), ("4-4", [4])],
)
def test_seeds_are_a_number_of_them_a_range_or_a_list(typed, expected, command, feature_file, monkeypatch):
    trained = {}

    def stop(run, *_):
        trained["seeds"] = list(run.seeds)
        raise InputError("enough")

    monkeypatch.setattr("study.run.Run.check_memory", stop)
    for name in ("run", "compare"):
        trained.clear()
        code, _, lines = command(name, "--features", feature_file, "--seeds", typed, *SMALL)
        assert (code, lines) == (2, ["enough"])
        assert trained["seeds"] == expected


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["predict", "--help"]], ids=" ".join)
def test_help_says_what_there_is(arguments, command):
    code, printed, error = command(*arguments)
    assert (code, error) == (0, [])
    assert "usage: experiment.py" in printed


def test_other_settings_leave_what_is_there_until_overwrite(run, tmp_path):
    options = ["--seeds", 2, "--no-figures", "--holdouts", "art"]
    assert run("out", *options)[0] == 0
    before = everything(tmp_path / "out")
    options += ["--set", "BATCH_SIZE=16"]
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
    code, printed, error = command("predict", picture, picture, *network, "--seed", 1, "--output", "table.csv")
    assert (code, error) == (0, [])
    assert len((tmp_path / "table.csv").read_text("utf-8").splitlines()) == 1 + 2
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


def test_features_of_all_layers_from_images_to_prediction(command, tiny_vit, tmp_path):
    tree = make_images(tmp_path / "tree", domains=("art", "photo", "sketch"), per_class=12)
    images = ["--data-root", tree, "--vit-model", tiny_vit, "--set", "FEATURE_LAYERS=all", "--threads", 1]
    code, printed, error = command("features", *images, "--output", "all.safetensors")
    assert (code, error) == (0, [])
    assert "72 × 96-d of all layers" in printed
    assert command("columns", *images, "--seeds", 2)[0] == 0
    assert "Importance of features" in (tmp_path / "results" / "columns" / "report.txt").read_text("utf-8")
    code, printed, _ = command("figures", "--results-dir", tmp_path / "results" / "columns", "--format", "svg")
    assert (code, printed.split("/")[-1]) == (0, "density.svg\n")
    config.reset()
    one = ["--seeds", 2, "--holdouts", "photo", "--results-dir", "out", "--no-figures", *SMALL]
    assert command("run", *images, *one[:-2])[0] == 0
    before = everything(tmp_path / "out")
    config.reset()
    assert command("run", "--features", "all.safetensors", *one)[0] == 0  # the same features: nothing is trained
    assert everything(tmp_path / "out") == before
    weights, picture = tmp_path / "out/weights/phase2_photo_importance.safetensors", tree / "art" / "dog" / "000.png"
    code, printed, error = command("predict", picture, "--weights", weights, "--vit-model", tiny_vit)
    assert (code, error) == (0, [])
    assert printed.startswith(f"{picture}: ")


LIVELY = ["PROBE_C=10000", "BLOCK_EPOCHS=3", "BLOCK_BATCH_SIZE=16", "BACKBONE_LEARNING_RATE=0.01", "SPLIT_SEED=0"]
OF_BLOCKS = ("phase1_art_importance", "holdout_photo", "mask_overlap", "confusion_erm")


@pytest.fixture(scope="module")
def lively_vit(tmp_path_factory):
    """A tiny ViT of two blocks, with weights so large that images make a difference."""
    sizes = transformers.ViTConfig(**VIT, initializer_range=0.3)
    return save_model(sizes, tmp_path_factory.mktemp("models") / "lively-vit")


@pytest.fixture
def of_images(command, lively_vit, tmp_path):
    """Commands on a tree of images and a tiny ViT of two blocks: (command, options) -> as `command`."""
    tree = make_images(tmp_path / "tree", domains=("art", "photo", "sketch"), per_class=12)
    images = ["--data-root", tree, "--vit-model", lively_vit, "--threads", 1]
    return lambda name, *options: command(name, *images, *options)


@pytest.mark.parametrize("blocks", [1, 2])
def test_blocks_from_images_to_prediction(of_images, command, lively_vit, tmp_path, monkeypatch, caplog, blocks):
    caplog.set_level("INFO")
    every = figures.all_figures
    monkeypatch.setattr(figures, "all_figures", lambda *given: (f for f in every(*given) if f[0].startswith(OF_BLOCKS)))
    options = ["--set", f"TRAINED_BLOCKS={blocks}", *(part for name in LIVELY for part in ("--set", name))]
    options += ["--seeds", 2, "--holdouts", "photo", "--results-dir", "out"]
    code, printed, _ = of_images("run", *options)
    assert code == 0
    assert f"17 tokens of each image before the last {'block' if blocks == 1 else '2 blocks'}" in printed
    assert caplog.text.count("The shortcut does not cover") == (blocks == 2)
    assert "cannot be drawn" not in caplog.text
    out = tmp_path / "out"
    drawn = {path.stem for path in (out / "plots").iterdir()}
    kinds = {f"holdout_photo_{kind}" for kind in ("importance", "density", "rows")}
    assert drawn == {"phase1_art_importance", "mask_overlap", "confusion_erm", *kinds}
    before = everything(out)
    assert of_images("run", *options)[0] == 0
    assert everything(out) == before
    drawing = ["--data-root", tmp_path / "tree", "--vit-model", lively_vit, "--results-dir", "out", "--threads", 1]
    config.apply({"TRAINED_BLOCKS": 0})  # the directory knows that blocks were trained
    code, printed, _ = command("figures", *drawing)
    assert (code, {line.split("/")[-1].removesuffix(".png") for line in printed.splitlines()}) == (0, drawn)

    weights = out / "weights" / "phase2_photo_erm.safetensors"
    network = ["--weights", weights, "--vit-model", lively_vit, "--threads", 1]
    code, printed, _ = command("predict", tmp_path / "tree" / "photo", *network, "--seed", 1)
    assert code == 0
    assert f"with the last {'block' if blocks == 1 else '2 blocks'} of lively-vit" in caplog.text
    said = [(line.split("/")[-2], line.split(": ")[1].split()[0]) for line in printed.splitlines()]
    assert len({answer for _, answer in said}) == 2  # or any network would do
    (accuracy,) = (
        record["accuracy"]["full"]
        for record in Results(out).records()
        if (record["algorithm"], record["seed"], record["selection"]) == ("erm", 1, "last")
    )
    assert sum(true == answer for true, answer in said) / len(said) == pytest.approx(accuracy)


def test_results_of_other_blocks_are_refused_by_the_number_of_blocks_alone(of_images):
    one = ["--seeds", 2, "--holdouts", "photo", "--results-dir", "out", "--no-figures"]
    assert of_images("run", *one, "--set", "TRAINED_BLOCKS=1")[0] == 0
    for blocks in (2, 0):
        code, _, (sentence,) = of_images("run", *one, "--set", f"TRAINED_BLOCKS={blocks}")
        assert code == 2
        assert f"'out' holds results with TRAINED_BLOCKS = 1, not {blocks}: give" in sentence


def test_blocks_that_cannot_be_trained_are_refused_before_the_pass(of_images, command, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
    image = {"image_size": [32, 32], "patch_size": 8, "num_detection_tokens": 2}
    model = transformers.YolosModel(transformers.YolosConfig(**sizes, **image, use_mid_position_embeddings=True))
    with torch.no_grad():  # added to the tokens between the blocks, at first zeros
        next(p for name, p in model.named_parameters() if name.endswith("mid_position_embeddings")).normal_()
    model.save_pretrained(tmp_path / "yolos")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "yolos")
    given = ["--data-root", tmp_path / "tree", "--vit-model", tmp_path / "yolos", "--set", "TRAINED_BLOCKS=2"]
    for (code, _, (sentence,)), named in (
        (of_images("run", "--set", "TRAINED_BLOCKS=3"), "1 … 2"),
        (of_images("run", "--set", "TRAINED_BLOCKS=1", "--set", "IMPORTANCE_THRESHOLD_PERCENTILE=0.01"), "4,608"),
        (command("run", *given), "'yolos' cannot be split"),
    ):
        assert code == 2
        assert named in sentence
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".json"]


def test_features_with_trained_blocks_caches_tokens_and_says_so(of_images, tmp_path, caplog):
    caplog.set_level("INFO")
    code, printed, _ = of_images("features", "--set", "TRAINED_BLOCKS=2")
    assert code == 0
    assert "17 tokens of each image before the last 2 blocks" in printed
    assert "GB of disk" in caplog.text
    assert [*(tmp_path / "cache").glob("*_blocks2.npy")]


def test_of_the_processes_of_torchrun_the_first_speaks_and_only_features_runs_in_them(of_images, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    level = logging.getLogger().level
    try:
        monkeypatch.setenv("RANK", "1")
        assert of_images("features", "--output", "copy.safetensors") == (0, "", [])
        assert not (tmp_path / "copy.safetensors").exists()
        code, _, error = of_images("run", "--seeds", 1)
        assert (code, len(error)) == (2, 1)
        assert "torchrun" in error[0]
    finally:
        logging.getLogger().setLevel(level)
    monkeypatch.setenv("RANK", "0")
    code, printed, _ = of_images("features", "--output", "copy.safetensors")
    assert (code, printed.count("\n")) == (0, 2)
    assert (tmp_path / "copy.safetensors").exists()


def test_figures_of_a_study_of_blocks_are_drawn_from_its_tables(command, tmp_path, monkeypatch):
    (tmp_path / "out" / "grid").mkdir(parents=True)
    for name in ("densities.csv", "contrasts.csv"):
        (tmp_path / "out" / name).touch()
    drawn = []
    monkeypatch.setattr("evidence.figures.save_blocks", lambda *given, **options: drawn.append((given, options)) or [])
    assert command("figures", "--results-dir", "out", "--only", "density")[0] == 0
    (((directory,), options),) = drawn
    assert (directory.name, options["only"]) == ("out", ["density"])
