"""The commands about the methods of the field, as typed."""

import json

import pytest

import config
from experiment import main
from tests.factories import everything, save_blobs

DOMAINS = ("art_painting", "cartoon", "photo", "sketch")
SHORT = ["--set", "PH2_NUM_EPOCHS=2", "--set", "HIDDEN_SIZES=(6,5,4)"]
CHOICE = ["--algorithms", "VREx, SD", "--seeds", "2", "--trials", "2", "--leave-one-out"]


@pytest.fixture(autouse=True)
def constants():
    """The commands set constants of `config`: restore them."""
    before = {name: getattr(config, name) for name in config.names()}
    yield
    config.apply(before)


def code_of(arguments):
    """Exit code of a command."""
    try:
        return main(arguments)
    except SystemExit as error:  # of argparse
        return error.code


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    path = tmp_path_factory.mktemp("features") / "blobs.safetensors"
    save_blobs(path, dataset="pacs", domains=DOMAINS, per_cell=12)
    return str(path)


@pytest.fixture(scope="module")
def compared(features, tmp_path_factory):
    """Results directory after a comparison of two methods and their baselines."""
    folder = str(tmp_path_factory.mktemp("compared"))
    before = {name: getattr(config, name) for name in config.names()}
    assert main(["compare", *CHOICE, "--features", features, "--results-dir", folder, *SHORT]) == 0
    config.apply(before)
    return folder


def test_compare_prints_a_table_per_rule_and_writes_it(features, compared, capsys):
    assert main(["compare", *CHOICE, "--no-figures", "--features", features, "--results-dir", compared, *SHORT]) == 0
    printed = capsys.readouterr().out
    assert printed.count("ERMBalanced") >= 2 * 4
    for rule in ("Training-domain validation", "Leave-one-domain-out validation", "Oracle", "Last epoch", "Ensemble"):
        assert rule in printed
    assert {"comparison.txt", "comparison_seeds.csv", "plots/comparison.png"} <= everything(compared).keys()


def test_runs_go_out_to_domainbed_and_come_back(features, compared, tmp_path, capsys):
    out = str(tmp_path / "runs")
    command = ["export-domainbed", out, "--results-dir", compared, "--features", features]
    assert main(command) == 0
    folders = [path for path in (tmp_path / "runs").iterdir() if path.is_dir()]
    assert len(folders) == 4 * 2 * (4 + 6) * 2  # methods with baselines, trials, holdouts and pairs, seeds
    lines = [json.loads(line) for line in (folders[0] / "results.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    assert all({f"env{i}_{part}_acc" for i in range(4) for part in ("in", "out")} <= line.keys() for line in lines)
    assert lines[0]["args"]["dataset"] == "PACS"
    torn = folders[0] / "results.jsonl"  # of an interrupted export
    before = torn.read_bytes()
    torn.write_bytes(before[:100])
    assert main(command) == 0
    assert torn.read_bytes() == before
    assert main(["import-domainbed", out]) == 0
    printed = capsys.readouterr().out
    for name in ("ERM", "ERMBalanced", "VREx", "SD", "training-domain", "leave-one-domain-out"):
        assert name in printed


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["compare", "--algorithms", "ERM,Nothing"], "'Nothing'"),
        (["compare", "--trials", "0"], "--trials"),
        (["compare", "--holdouts", "moon"], "'moon'"),
        (["compare", "--seeds", "0"], "--seeds"),
        (["compare", "--algorithms", ""], "--algorithms"),
        (["compare", "--set", "PH2_INIT=phase1"], "PH2_INIT"),
        (["compare", "--vit-model", "x"], "--vit-model"),
        (["export-domainbed", "{tmp}/out"], "no comparison"),
        (["export-domainbed", ""], "DIR"),
        (["import-domainbed", "{tmp}/nothing"], "nothing"),
        (["import-domainbed", ""], "DIR"),
    ],
)
def test_bad_input_is_one_sentence_and_code_2(arguments, name, features, tmp_path, capsys):
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    if arguments[0] != "import-domainbed":
        arguments += ["--features", features, "--results-dir", str(tmp_path / "r")]
    assert code_of(arguments) == 2
    said = capsys.readouterr().err.strip()
    assert name in said
    assert len(said.splitlines()) == 1
    assert everything(tmp_path) == {}


def test_what_cannot_be_compared_deletes_nothing(features, compared, tmp_path):
    before = everything(compared)
    command = ["compare", "--features", features, "--results-dir", compared, *SHORT, "--overwrite"]
    save_blobs(tmp_path / "three.safetensors", domains=DOMAINS[:3])
    three = ["--features", str(tmp_path / "three.safetensors"), "--leave-one-out"]  # four domains are needed
    unknown = ["--holdouts", "foto"]
    for wrong in (["--set", "PH2_INIT=phase1"], ["--algorithms", "Nothing"], ["--trials", "0"], unknown, three):
        assert code_of([*command, *wrong]) == 2
    assert everything(compared) == before


def test_only_the_features_of_the_comparison_are_exported(compared, tmp_path, capsys):
    save_blobs(tmp_path / "other.safetensors", dataset="pacs", domains=DOMAINS, seed=1)
    command = ["export-domainbed", str(tmp_path / "runs"), "--results-dir", compared]
    assert code_of([*command, "--features", str(tmp_path / "other.safetensors")]) == 2
    assert "--features" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
