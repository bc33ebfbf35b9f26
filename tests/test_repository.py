"""What the repository promises about itself: commands, layering, imports without side effects."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd

from evaluation import finding, lodo_table, wide_table
from records import Results

ROOT = Path(__file__).resolve().parent.parent
DOMAINS = ("art_painting", "cartoon", "photo", "sketch")
MODULES = sorted(p.stem for p in ROOT.glob("*.py"))
# A module imports only from floors below its own.
FLOORS = {
    "config": 0, "files": 0, "drawing": 0,
    "dataset": 1, "models": 1, "parallel": 2,
    "importance": 2, "stacks": 2, "feature_file": 2, "features": 3, "captured": 3, "compiled": 3,
    "training": 4,
    "trainer_phase1": 5, "trainer_phase2": 5, "trainer_algorithm": 5, "records": 4,
    "evaluation": 6, "visualization": 6, "variants": 6, "inference": 0,
    "probe": 6, "study": 7, "diagnostics": 8, "figures": 8, "answer_report": 9, "answer": 10,
    "selection": 7, "domainbed": 8, "compare": 8, "compare_report": 9, "field": 10, "experiment": 11,
}  # fmt: skip


def test_every_module_has_its_floor_and_imports_from_below():
    assert set(MODULES) == set(FLOORS)
    for name, floor in FLOORS.items():
        for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text("utf-8"))):
            targets = [node.module] if isinstance(node, ast.ImportFrom) else []
            targets += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            above = [target for target in targets if FLOORS.get(target, -1) >= floor]
            assert not above, f"{name} (floor {floor}) imports {above}"


def test_files_stay_readable():
    folders = ("", "algorithms", "benchmarks", "tests")
    for path in (path for folder in folders for path in (ROOT / folder).glob("*.py")):
        assert len(path.read_text("utf-8").splitlines()) <= 400, path.name


def test_importing_a_module_has_no_side_effect(tmp_path):
    code = f"""
import importlib, sys
import numpy as np, torch
before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
for module in {MODULES}:
    importlib.import_module(module)
    assert torch.equal(before[0], torch.random.get_rng_state()), module
    assert (before[1] == np.random.get_state()[1]).all(), module
    heavy = [m for m in ("matplotlib.pyplot", "transformers", "torchvision") if m in sys.modules]
    assert not heavy, (module, heavy)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_ci_runs_the_command_of_the_readme():
    commands = re.findall(r"^python3 -m venv .*$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE)
    assert len(commands) == 2
    run, test = commands
    assert "nbconvert" in run
    assert "pytest" in test
    assert test.replace("pip install", "pip install -q") in (ROOT / ".ci" / "run").read_text("utf-8").splitlines()


def test_the_readme_quotes_the_reference_results():
    readme = (ROOT / "README.md").read_text("utf-8")
    records = Results(ROOT / "results" / "reference").records()
    table = wide_table(lodo_table(records))
    for cell in table.to_numpy().ravel():
        assert f" {cell} |" in readme
    quoted = finding(records).split(": ")[1].split(" against")[0]
    assert quoted.replace("-", "−") in readme.replace("\n", " ")


def readme_examples():
    """The blocks of code in the README that run by themselves."""
    text = (ROOT / "README.md").read_text("utf-8")
    return re.findall(r"```python\n(import sys.*?)```", text, re.DOTALL)


def run_example(code, folder):
    code = code.replace("path/to/this/folder", str(ROOT))
    command = [sys.executable, "-c", code]
    environment = os.environ | {"TQDM_DISABLE": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False, env=environment)


def test_the_readme_example_runs(tmp_path):
    _, masking = sorted(readme_examples(), key=lambda code: "step_with_rates" in code)
    done = run_example(f"{masking}\nprint(int(sum(m.sum() for m in mask)))", tmp_path)
    assert (done.stdout.strip(), done.stderr) == (str(int(0.6 * 2 * 16 * 16 + 0.5)), "")


def test_the_readme_example_of_a_method_runs(tmp_path):
    own, _ = sorted(readme_examples(), key=lambda code: "step_with_rates" in code)
    for long, short in (("range(3)", "range(2)"), ("Settings.current()", "Settings.current(ph2_num_epochs=1)")):
        assert long in own
        own = own.replace(long, short)
    done = run_example(own, tmp_path)
    assert done.stderr == ""
    assert {line.split()[0] for line in done.stdout.splitlines()[1:]} == {"ERM", "LabelSmoothing"}


def test_the_readme_quotes_the_reference_comparison():
    readme = (ROOT / "README.md").read_text("utf-8")
    table = pd.read_csv(ROOT / "results" / "reference" / "compare" / "comparison_training-domain.csv", index_col=0)
    for name, row in table.iterrows():
        cells = [f"{100 * row[f'{d}_mean']:.1f} ± {100 * row[f'{d}_error']:.1f}" for d in (*DOMAINS, "average")]
        numbers = "{difference:+.2f} [{low:+.2f}, {high:+.2f}]".format(
            **{key: 100 * row[key] for key in ("difference", "low", "high")}
        )
        last = "" if pd.isna(row["difference"]) else numbers.replace("-", "−")
        assert re.search(rf"^\| {name} \| \w+ \| {re.escape(' | '.join([*cells, last]))}", readme, re.MULTILINE), name


def test_the_readme_quotes_the_reference_search():
    readme = (ROOT / "README.md").read_text("utf-8")
    table = pd.read_csv(ROOT / "results" / "reference" / "search" / "comparison_training-domain.csv", index_col=0)
    for name, row in table.iterrows():
        last = "{difference:+.2f} [{low:+.2f}, {high:+.2f}]".format(**(100 * row[["difference", "low", "high"]]))
        cells = [name, f"{100 * row['average_mean']:.1f} ± {100 * row['average_error']:.1f}"]
        cells.append("" if pd.isna(row["difference"]) else last.replace("-", "−"))
        assert f"\n| {' | '.join(cells)} |\n" in readme


def test_the_readme_quotes_the_reference_study():
    readme = (ROOT / "README.md").read_text("utf-8")
    folder = ROOT / "results" / "reference" / "study"
    for name in ("contrasts", "contrasts_longer"):
        for row in pd.read_csv(folder / f"{name}.csv").to_dict("records"):
            numbers = "{mean:+.2f} [{low:+.2f}, {high:+.2f}]".format(
                **{k: 100 * row[k] for k in ("mean", "low", "high")}
            )
            assert f"| {row['contrast']} |" in readme
            assert f"| {numbers.replace('-', '−')} | {row['verdict']} | {row['p_holm']:.2g} |" in readme
    said = (folder / "report.txt").read_text("utf-8").split("\n\n")[2]  # sentences after the title and what it is about
    said = re.split(r"\n(?=At \d|EXPLORATORY|Logistic|A domain's)", said)
    assert len(said) == 6
    for sentence in said:
        assert " ".join(sentence.split()) in " ".join(readme.split())


def test_the_rate_per_weight_imports_beside_files_of_the_same_names(tmp_path):
    for name in ("models.py", "config.py"):
        (tmp_path / name).write_text("mine = True\n")
    code = f"import sys; sys.path.append({str(ROOT)!r}); from stacks import step_with_rates; import importance"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stderr) == (0, "")
