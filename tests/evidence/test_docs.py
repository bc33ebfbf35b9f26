"""The documentation: its tables are those of the committed results, and its code runs as printed."""

import ast
import json
import re
import sys
from pathlib import Path

import pytest
import torch

import config
from config import InputError
from evidence import benchmark_tables, data_tables, results_tables, write_pages
from field import ALGORITHMS
from field.docs import comparison_tables
from storage import Results, load_arrays
from tests.conftest import make_images
from tests.factories import ROOT, save_blobs
from transfer import transfer_tables

PAGES = [ROOT / "README.md", ROOT / "data" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHORT = "import config\nconfig.PH1_NUM_EPOCHS = config.PH2_NUM_EPOCHS = 1\nconfig.BATCH_SIZE = 256\n"


@pytest.fixture(scope="module")
def tables():
    results = results_tables(ROOT) | comparison_tables(ROOT) | transfer_tables(ROOT)
    return results | benchmark_tables(ROOT) | data_tables()


def examples(page):
    """Blocks of Python code of a page."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)


@pytest.fixture
def run_code(tmp_path, monkeypatch, capsys):
    """Runs code in an empty folder, with settings, paths and methods put back, and returns what it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in config.names():
        monkeypatch.setattr(config, name, getattr(config, name))

    def run(code):
        with torch.random.fork_rng():
            exec(code.replace("path/to/this/folder", str(ROOT)), {"__name__": "example"})
        return capsys.readouterr().out

    methods = dict(ALGORITHMS)
    yield run
    ALGORITHMS.clear()
    ALGORITHMS.update(methods)


def shortened(code, **changes):
    for long, short in changes.values():
        assert long in code
        code = code.replace(long, short)
    return code


def test_writing_the_tables_again_changes_nothing(tables, tmp_path):
    for path in PAGES:
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(path.read_text("utf-8"), "utf-8")
    assert write_pages(tmp_path, tables) == []


def test_every_table_has_a_place(tables):
    places = re.findall(r"^<!-- (?:table|text): ([\w-]+) -->$", "\n".join(p.read_text("utf-8") for p in PAGES), re.M)
    assert set(places) == set(tables)


def test_marked_places_are_filled_and_the_rest_is_kept(tmp_path):
    page = "# A page\n\n<!-- table: one -->\n| old |\n<!-- end -->\n\nProse.\n\n<!-- text: two -->\n<!-- end -->\n"
    (tmp_path / "README.md").write_text("Nothing is marked here.\n")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text(page)
    assert write_pages(tmp_path, {"one": "| new |", "two": "A finding: \\1.", "three": "unused"}) == [
        tmp_path / "docs" / "a.md"
    ]
    filled = page.replace("| old |", "| new |").replace("two -->\n", "two -->\nA finding: \\1.\n")
    assert (tmp_path / "docs" / "a.md").read_text() == filled
    with pytest.raises(InputError, match="two"):
        write_pages(tmp_path, {"one": "| new |"})


def test_sentences_are_those_of_the_reports(tables):
    for name, report in {
        "study-findings": "study/report.txt",
        "compare-finding": "compare/comparison.txt",
        "search-finding": "search/comparison.txt",
    }.items():
        printed = " ".join((ROOT / "results" / "reference" / report).read_text("utf-8").split())
        for sentence in re.split(r"^- ", tables[name], flags=re.MULTILINE):
            assert " ".join(sentence.split()) in printed


def test_every_setting_is_listed_with_its_default():
    text = (ROOT / "docs" / "use.md").read_text("utf-8")
    rows = re.findall(r"^\| `([A-Z0-9_]+)` \| `(.*?)` \|", text, re.MULTILINE)
    defaults = {name: eval(default, {"__builtins__": {}}) for name, default in rows}
    assert {name for name, _ in rows} == set(config.names())
    code = ast.parse(Path(config.__file__).read_text("utf-8"))  # as written: tests may have changed the values
    written = {node.target.id: ast.unparse(node.value) for node in code.body if isinstance(node, ast.AnnAssign)}
    assert defaults == {name: eval(written[name], {"__builtins__": {}}) for name in defaults}


def test_the_method_runs_as_the_readme_shows_it(run_code):
    (code,) = examples("README.md")
    code = shortened(code, epochs=("epochs=10", "epochs=1"), batch=(".split(32)", ".split(256)"))
    printed = run_code(f"{code}\nprint(int(sum(layer.sum() for layer in mask)))").splitlines()
    assert re.fullmatch(r"Accuracy on art_painting, never seen in training: \d+\.\d %", printed[0])
    assert printed[1] == "240"


def test_the_method_runs_on_another_model(run_code):
    (code,) = (code for code in examples("docs/use.md") if "step_with_rates" in code)
    printed = run_code(f"{code}\nprint(int(sum(layer.sum() for layer in mask)))")
    assert printed.strip() == str(int(0.6 * 2 * 16 * 16 + 0.5))


def test_a_study_runs_as_shown_and_writes_what_is_documented(run_code, tmp_path):
    train, arms, read = (c for c in examples("docs/use.md") if "from study" in c and "TRAINED_BLOCKS" not in c)
    train = shortened(train, seeds=("range(20)", "range(2)"))
    arms = shortened(arms, seeds=("range(5)", "range(2)"))
    printed = run_code(f"{SHORT}{train}{arms}{read}\nprint(saved.seeds, saved.ok.tolist(), share)")
    assert "(0, 1) [True, True] tensor([0.6000, 0.6000])" in printed
    documented = set(re.findall(r"`([^`\n]+)`", (ROOT / "docs" / "use.md").read_text("utf-8")))
    assert written_names(tmp_path / "results" / "phase1_start") <= documented


def test_a_study_of_the_whole_model_runs_as_shown(run_code, tiny_vit, tmp_path):
    (code,) = (code for code in examples("docs/use.md") if "TRAINED_BLOCKS" in code)
    root, small = make_images(tmp_path / "toy", per_class=5), "'IMAGE_STEPS': 2, 'IMAGE_CHECKPOINTS': 1"
    places = f"'DATA_ROOT': {str(root)!r}, 'VIT_MODEL': {str(tiny_vit)!r}, 'CACHE_DIR': 'cache', {small}"
    code = shortened(code, places=('"DATA_ROOT": "DIR", "VIT_MODEL": "DIR"', places), seeds=("range(3)", "range(2)"))
    printed = run_code(code)
    assert "importance[IMPORTANCE_THRESHOLD_PERCENTILE=10.0]" in printed
    assert "erm" in printed


def written_names(directory):
    """Names of entries and arrays that a results directory holds."""
    results, names = Results(directory), set(Results(directory).read_settings())
    names |= {name for record in results.records() for name in record}
    for path in [*directory.glob("*/*.npz"), *directory.glob("*/*.safetensors")]:
        arrays, header = load_arrays(path)
        names |= {re.sub(r"_\d+$", "_<l>", re.sub(r"^(start|final)\..*", r"\1.<parameter>", name)) for name in arrays}
        names |= set(header) | {f"{path.parent.name}/"}
    return names


@pytest.mark.parametrize("library", ["pandas", "polars", "duckdb"])
def test_records_are_read_as_shown(library, run_code, tmp_path):
    """With the committed records and one of a network that failed."""
    pytest.importorskip(library)
    (code,) = (code for code in examples("docs/use.md") if f"import {library}" in code and "records.jsonl" in code)
    (tmp_path / "results").mkdir()
    text = (ROOT / "results" / "reference" / "records.jsonl").read_text("utf-8")
    failed = json.loads(text.splitlines()[0]) | {"failed": "no", "accuracy": None, "balanced_accuracy": None}
    (tmp_path / "results" / "records.jsonl").write_text(f"{text}{json.dumps(failed)}\n", "utf-8")
    printed = run_code(code)
    records = [json.loads(line) for line in text.splitlines()]
    for algorithm, holdout in (("erm", "sketch"), ("importance", "photo")):
        mine = (r for r in records if (r["algorithm"], r["holdout"], r["selection"]) == (algorithm, holdout, "last"))
        full = [record["accuracy"]["full"] for record in mine]
        assert f"{sum(full) / len(full):.5f}"[:-1] in printed
        assert len(full) == 50


def test_a_method_of_your_own_runs_as_shown(run_code, tmp_path):
    (code,) = examples("docs/field.md")
    save_blobs(tmp_path / "blobs.safetensors")  # logistic regression on the bundled features takes a while
    few = f"config.FEATURES_FILE = {str(tmp_path / 'blobs.safetensors')!r}\n"
    printed = run_code(SHORT + few + shortened(code, seeds=("range(3)", "range(2), holdouts='photo'")))
    assert {"ERM", "LabelSmoothing"} <= {line.split()[0] for line in printed.splitlines() if line.strip()}
