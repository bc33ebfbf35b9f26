"""The commands about the methods of the field, as typed."""

import json

import pytest
from problems import features as blobs

import config
from experiment import main
from feature_file import save_features

DOMAINS = ("art_painting", "cartoon", "photo", "sketch")
SHORT = ["--set", "PH2_NUM_EPOCHS=2", "--set", "HIDDEN_SIZES=(6,5,4)", "--set", "BATCH_SIZE=16"]


@pytest.fixture(autouse=True)
def constants():
    """The commands set constants of `config`: put them back."""
    before = {name: getattr(config, name) for name in config.names()}
    yield
    config.apply(before)


@pytest.fixture(scope="session")
def features(tmp_path_factory):
    path = tmp_path_factory.mktemp("features") / "blobs.safetensors"
    d = blobs(domains=DOMAINS, per_cell=12)
    save_features(path, d.features.half(), d.labels, d.domains, d.class_names, d.domain_names, d.files, dataset="pacs")
    return str(path)


@pytest.fixture(scope="session")
def compared(features, tmp_path_factory):
    """Results directory after a comparison of two methods and their baselines."""
    folder = str(tmp_path_factory.mktemp("compared"))
    before = {name: getattr(config, name) for name in config.names()}
    choice = ["--algorithms", "VREx, SD", "--seeds", "2", "--trials", "2", "--leave-one-out"]
    assert main(["compare", *choice, "--features", features, "--results-dir", folder, *SHORT]) == 0
    config.apply(before)
    return folder


def test_compare_prints_a_table_per_rule_and_writes_it(features, compared, capsys):
    choice = ["--algorithms", "VREx,SD", "--seeds", "2", "--trials", "2", "--leave-one-out", "--no-figures"]
    assert main(["compare", *choice, "--features", features, "--results-dir", compared, *SHORT]) == 0
    printed = capsys.readouterr().out
    assert printed.count("ERMBalanced") >= 2 * 4
    for rule in ("Training-domain validation", "Leave-one-domain-out validation", "Oracle", "Last epoch", "Ensemble"):
        assert rule in printed


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
    assert main(["import-domainbed", out]) == 0
    printed = capsys.readouterr().out
    for name in ("ERM", "ERMBalanced", "VREx", "SD", "training-domain", "leave-one-domain-out"):
        assert name in printed


def test_a_torn_run_is_written_anew(features, compared, tmp_path):
    command = ["export-domainbed", str(tmp_path / "runs"), "--results-dir", compared, "--features", features]
    assert main(command) == 0
    torn = next((tmp_path / "runs").iterdir()) / "results.jsonl"
    whole = torn.read_bytes()
    torn.write_bytes(whole[:100])
    assert main(command) == 0
    assert torn.read_bytes() == whole


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["compare", "--algorithms", "ERM,Nothing"], "There is no algorithm 'Nothing'"),
        (["compare", "--trials", "0"], "--trials must be at least 1"),
        (["compare", "--holdouts", "moon"], "moon"),
        (["compare", "--seeds", "0"], "--seeds must be at least 1"),
        (["compare", "--algorithms", ""], "A list of names is empty"),
        (["compare", "--set", "PH2_INIT=phase1"], "PH2_INIT must be 'fresh'"),
        (["compare", "--vit-model", "x"], "--vit-model needs --data-root"),
        (["export-domainbed", "{tmp}/out"], "holds no comparison"),
        (["export-domainbed", ""], "DIR is empty"),
        (["import-domainbed", "{tmp}/nothing"], "nothing"),
    ],
)
def test_bad_input_is_one_sentence_and_code_2(arguments, sentence, features, tmp_path, capsys):
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    if arguments[0] != "import-domainbed":
        arguments += ["--features", features, "--results-dir", str(tmp_path / "r")]
    assert main(arguments) == 2
    said = capsys.readouterr().err.strip()
    assert sentence in said
    assert len(said.splitlines()) == 1
