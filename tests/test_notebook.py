"""The notebook from a clean kernel on a small setting, its parameters set by papermill."""

import json
from pathlib import Path

import nbformat
import papermill
import pytest

from evidence import block_findings
from tests.conftest import make_images
from tests.factories import ROOT, save_blobs

NOTEBOOK = ROOT / "train.ipynb"
FEWER = """
from study import figures
every, drawn = figures.all_figures, ("accuracy", "phase1_art_mask")
figures.all_figures = lambda *given: (figure for figure in every(*given) if figure[0] in drawn)
"""  # of the figures that are written at the end: a second each, and most of them were shown before


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("notebook")
    save_blobs(folder / "blobs.safetensors", per_cell=30)
    parameters = {
        "SEEDS": 2,
        "HOLDOUTS": ["photo"],
        "FEATURES_FILE": str(folder / "blobs.safetensors"),
        "RESULTS_DIR": str(folder / "results"),
        "SETTINGS": {"PH1_NUM_EPOCHS": 1, "PH2_NUM_EPOCHS": 2, "HIDDEN_SIZES": [6, 5, 4], "THREADS": 1},
    }
    notebook, out = nbformat.read(NOTEBOOK, as_version=4), folder / "out.ipynb"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(FEWER))
    nbformat.write(notebook, out)
    papermill.execute_notebook(out, out, parameters, cwd=ROOT, progress_bar=False, kernel_name="python3")
    return folder, nbformat.read(out, as_version=4)


def texts(notebook):
    return "\n".join(o.text for c in notebook.cells if c.cell_type == "code" for o in c.outputs if "text" in o)


def test_parameters_take_effect(executed):
    folder, notebook = executed
    assert "blobs features: 270 × 8-d" in texts(notebook)
    settings = json.loads((folder / "results" / "settings.json").read_text("utf-8"))["settings"]
    assert (settings["PH1_NUM_EPOCHS"], settings["PH2_NUM_EPOCHS"], settings["HIDDEN_SIZES"]) == (1, 2, [6, 5, 4])
    records = [json.loads(line) for line in (folder / "results" / "records.jsonl").read_text().splitlines()]
    assert {(r["holdout"], r["seed"]) for r in records} == {("photo", 0), ("photo", 1)}


def test_it_runs_without_an_error_and_shows_every_figure(executed):
    folder, notebook = executed
    outputs = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    assert not [o for o in outputs if o.output_type == "error"]
    pictures = [o for o in outputs if "image/png" in o.get("data", {})]
    # projection, curves of both phases, grids of a domain and a holdout, overlap, accuracies, three forest plots; of
    # blocks the reference's two, of layers one
    assert len(pictures) == 1 + 2 + 4 + 2 + 1 + 1 + 3 + 2 + 1
    assert {path.name for path in (folder / "results" / "plots").iterdir()} == {"accuracy.png", "phase1_art_mask.png"}


def test_the_method_in_plain_code_is_what_a_study_does(executed):
    assert "same mask: True" in texts(executed[1])
    assert "same right answers: True" in texts(executed[1])


def test_without_images_the_section_on_blocks_says_what_the_reference_does(executed):
    folder, notebook = executed
    assert "\n".join(block_findings(ROOT / "results" / "reference" / "blocks")) in texts(notebook)
    assert not (folder / "results" / "blocks").exists()


def test_on_images_the_section_on_blocks_trains_some_of_its_own(tmp_path, tiny_vit):
    """Its cell alone, after the first two: three seeds at most, into a folder of the results."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    notebook.cells = code[:2] + [cell for cell in code[2:] if "TRAINED_BLOCKS" in cell.source]
    assert len(notebook.cells) == 3
    fast = {"THREADS": 1, "BLOCK_EPOCHS": 1, "CACHE_DIR": str(tmp_path / "cache")}
    parameters = {
        "SEEDS": 5,
        "HOLDOUTS": ["photo"],
        "DATA_ROOT": str(make_images(tmp_path / "toy", ("art", "photo", "sketch"), per_class=10)),
        "VIT_MODEL": str(tiny_vit),
        "RESULTS_DIR": str(tmp_path / "results"),
        "SETTINGS": fast,
    }
    nbformat.write(notebook, tmp_path / "out.ipynb")
    papermill.execute_notebook(
        *[tmp_path / "out.ipynb"] * 2, parameters, cwd=ROOT, progress_bar=False, kernel_name="python3"
    )
    done = nbformat.read(tmp_path / "out.ipynb", as_version=4)
    records = [
        json.loads(line) for line in (tmp_path / "results" / "blocks" / "records.jsonl").read_text().splitlines()
    ]
    assert {r["algorithm"] for r in records} == {"erm", "importance", "random_layer", "head"}
    assert {(r["holdout"], r["seed"]) for r in records} == {("photo", seed) for seed in range(3)}
    assert "Too few seeds" in texts(done)
    assert sum("image/png" in o.get("data", {}) for o in done.cells[-1].outputs) == 1


def test_the_committed_notebook_was_run_from_top_to_bottom():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1))
    assert not [o for c in code for o in c.outputs if o.output_type == "error"]
    assert "parameters" in code[0].metadata["tags"]
    assert "9991 × 192-d, vit-tiny-patch16-224" in texts(notebook)
    assert not any(str(path) in NOTEBOOK.read_text("utf-8") for path in (ROOT, Path.home()))  # no path of a machine
