"""The commands about the methods of the field, as typed."""

import json
import shutil
import sys

import pandas as pd
import pytest

import config
from experiment import main
from field import ALGORITHMS, Comparison, write
from tests.factories import everything, save_blobs

DOMAINS = ("art_painting", "cartoon", "photo", "sketch")
SHORT = ["--set", "PH2_NUM_EPOCHS=2", "--set", "HIDDEN_SIZES=(6,5,4)"]
CHOICE = ["--algorithms", "VREx, ERM", "--seeds", "2", "--trials", "2", "--holdouts", "photo", "--leave-one-out"]


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
    save_blobs(path, dataset="pacs", domains=DOMAINS, per_cell=10)
    return str(path)


@pytest.fixture(scope="module")
def compared(features, tmp_path_factory):
    """Results directory after a comparison of two methods and their baselines, without figures."""
    folder = str(tmp_path_factory.mktemp("compared"))
    before = {name: getattr(config, name) for name in config.names()}
    assert main(["compare", *CHOICE, "--no-figures", "--features", features, "--results-dir", folder, *SHORT]) == 0
    assert not any("plots" in path for path in everything(folder))
    config.apply(before)
    return folder


def test_compare_prints_a_table_per_rule_and_writes_it(features, compared, capsys):
    assert main(["compare", *CHOICE, "--features", features, "--results-dir", compared, *SHORT]) == 0
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
    assert len(folders) == 3 * 2 * (1 + 3) * 2  # methods with baselines, trials, holdout and pairs, seeds
    lines = [json.loads(line) for line in (folders[0] / "results.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    assert all({f"env{i}_{part}_acc" for i in range(4) for part in ("in", "out")} <= line.keys() for line in lines)
    assert lines[0]["args"]["dataset"] == "PACS"
    torn = folders[0] / "results.jsonl"  # of an interrupted export
    before = torn.read_bytes()
    torn.write_bytes(before[:100])
    assert main(command) == 0
    assert torn.read_bytes() == before
    tables = tmp_path / "tables"
    assert main(["import-domainbed", out, "--output", str(tables)]) == 0
    printed = capsys.readouterr().out
    assert (tables / "domainbed.txt").read_text("utf-8") + "\n" == printed
    assert set(pd.read_csv(tables / "domainbed_last.csv")["algorithm"]) == {"ERM", "ERMBalanced", "VREx"}
    assert main(["import-domainbed", out, "--output", str(tables / "domainbed.txt")]) == 2  # a file is in the way
    for name in ("ERM", "ERMBalanced", "VREx", "training-domain", "leave-one-domain-out"):
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
        (["export-domainbed", "{tmp}/out"], "no run or comparison"),
        (["figures", "--algorithms", "{tmp}/mine.py:Mine"], "--algorithms"),
        (["figures", "--algorithms", "ERM"], "'ERM'"),
        (["export-domainbed", ""], "DIR"),
        (["import-domainbed", "{tmp}/nothing"], "nothing"),
        (["import-domainbed", ""], "DIR"),
        (["import-domainbed", "{tmp}", "--output", ""], "--output"),
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
    options = ("--set PH2_INIT=phase1", "--algorithms Nothing", "--trials 0", "--holdouts foto", "--rule best")
    for wrong in (*map(str.split, options), three):
        assert code_of([*command, *wrong]) == 2
    assert everything(compared) == before


@pytest.fixture
def forgotten(monkeypatch):
    """Methods that a test adds are forgotten after it."""
    before = dict(ALGORITHMS)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    ALGORITHMS.clear()
    ALGORITHMS.update(before)


MINE = """
from beside import factor
from field import Algorithm

class Mine(Algorithm):
    version = 1

    def loss(self, params, batch, state, noise):
        loss, changes = super().loss(params, batch, state, noise)
        return factor * loss, changes

class Other(Mine):
    pass
"""


def test_a_method_from_a_file_is_compared_and_exported(features, tmp_path, forgotten, capsys):
    file, out = tmp_path / "mine.py", tmp_path / "out"
    file.write_text(MINE)
    (tmp_path / "beside.py").write_text("factor = 2.0")
    place = f"{file}:Mine"
    choice = ["--features", features, "--results-dir", str(out)]
    command = ["compare", "--algorithms", f"{place},SD", "--seeds", "2", "--holdouts", "photo", *choice, *SHORT]
    assert main(command) == 0
    assert "Mine" in capsys.readouterr().out
    written = everything(out)
    comparison = Comparison.from_config([place, "SD"], holdouts=["photo"], directory=out)
    assert write(comparison) in (out / "comparison.txt").read_text("utf-8")
    assert everything(out) == written  # from Python the same tables and figures as from the command
    ALGORITHMS.pop("Mine")  # as in another process
    export = ["export-domainbed", str(tmp_path / "runs"), *choice]
    assert code_of(export) == 2
    assert "FILE.py:NAME" in capsys.readouterr().err
    assert main([*export, "--algorithms", place]) == 0
    ALGORITHMS.pop("Mine")
    shutil.rmtree(out / "plots")
    assert code_of(["figures", *choice]) == 2
    assert "FILE.py:NAME" in capsys.readouterr().err
    assert code_of(["figures", *choice, "--algorithms", f"{file}:Other"]) == 2
    assert ":Other; it has ERM" in capsys.readouterr().err
    assert main(["figures", *choice, "--algorithms", place]) == 0
    assert everything(out) == written  # all methods of the comparison are drawn, not this one alone
    file.write_text(MINE.replace("version = 1", "version = 2"))  # the file is read as it is now
    assert code_of(command) == 2
    assert "version 1 of Mine, not 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (None, "mine.py"),
        ("Other = 1", "'Mine'"),
        ("Mine = 1", "Algorithm"),
        ("x = 1\nimport nothing_like_it", "line 2"),
        ("def Mine(:", "SyntaxError"),
        ("raise SystemExit('bye')", "SystemExit"),
        ("from field import ERM as E\nclass ERM(E): pass\nMine = ERM", "'ERM'"),
        ("from field import Algorithm\nclass Mine(Algorithm):\n    batches = 'all'", "Mine.batches"),
    ],
)
def test_a_file_without_a_method_is_told(content, name, features, tmp_path, forgotten, capsys):
    if content is not None:
        (tmp_path / "mine.py").write_text(content)
    place, out = f"{tmp_path}/mine.py:Mine", tmp_path / "out"
    assert code_of(["compare", "--algorithms", place, "--features", features, "--results-dir", str(out)]) == 2
    said = capsys.readouterr().err.strip()
    assert name in said
    assert len(said.splitlines()) == 1
    assert not out.exists()


def test_the_report_says_what_it_leaves_out(features, tmp_path, capsys):
    command = ["compare", "--features", features, "--results-dir", str(tmp_path), "--no-figures", *SHORT]
    assert main([*command, "--algorithms", "SD,MTL", "--seeds", "3", "--holdouts", "photo"]) == 0
    assert "Not in this report" not in capsys.readouterr().out
    assert main([*command, "--algorithms", "ERM", "--seeds", "2", "--holdouts", "sketch"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "Not in this report" in line)
    for word in ("ERMBalanced, MTL, SD", "holdout photo", "seed 2"):
        assert word in line


def test_only_the_features_of_the_comparison_are_exported(compared, tmp_path, capsys):
    save_blobs(tmp_path / "other.safetensors", dataset="pacs", domains=DOMAINS, seed=1)
    command = ["export-domainbed", str(tmp_path / "runs"), "--results-dir", compared]
    assert code_of([*command, "--features", str(tmp_path / "other.safetensors")]) == 2
    assert "--features" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
