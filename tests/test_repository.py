"""What the repository promises about itself: where things are, who imports whom, what its pages and commands say."""

import ast
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.factories import ROOT

TOP = ("config", "dataset", "models", "importance", "trainer_phase1", "trainer_phase2", "visualization", "experiment")
PACKAGES = ("cli", "storage", "features", "engine", "study", "evidence", "field", "transfer", "report")
HOUSE = {*TOP, *PACKAGES}
BELOW_STUDY = HOUSE - {"study", "evidence", "field", "transfer", "report", "cli", "experiment"}
IMPORTS = {  # who -> whom; `experiment` imports anything, and nothing imports it
    "importance": set(),
    "config": set(),
    "models": {"config"},
    "dataset": {"config"},
    "storage": {"config"},
    "engine": {"importance", "models", "dataset", "config"},
    "visualization": {"config", "storage"},
    "features": {"models", "dataset", "storage", "engine", "config"},
    "trainer_phase1": {"importance", "models", "engine", "config"},
    "trainer_phase2": {"importance", "models", "engine", "config"},
    "study": BELOW_STUDY,
    "evidence": BELOW_STUDY | {"study"},
    "field": BELOW_STUDY | {"study", "evidence"},
    "transfer": BELOW_STUDY | {"study", "evidence"},
    "report": {"config", "storage"},
    "cli": {"config"},
    "experiment": HOUSE - {"experiment"},
}
FILES = sorted(p for p in ROOT.rglob("*.py") if not any(part.startswith(".") for part in p.relative_to(ROOT).parts))
TESTS = [path for path in FILES if path.is_relative_to(ROOT / "tests")]
BENCHMARKS = [path for path in FILES if path.is_relative_to(ROOT / "benchmarks")]
MODULES = [path for path in FILES if path not in TESTS and path not in BENCHMARKS]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "data" / "README.md"]


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def tree(path: Path) -> ast.Module:
    """The code of a file; of a notebook, of its cells."""
    text = path.read_text("utf-8")
    if path.suffix == ".ipynb":
        cells = ("".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code")
        lines = (line for cell in cells for line in cell.splitlines())
        text = "\n".join(line for line in lines if not line.startswith(("%", "!")))
    return ast.parse(text)


def imported(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Every import of a file, wherever it stands: module, and the names that are taken from it."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{short(path)} has a relative import"
            yield node.module, [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)


def part_of(name: str) -> str:
    """The module or package of the house that a dotted name or a file belongs to."""
    return name.partition(".")[0].partition("/")[0]


def face(package: str) -> ast.Module:
    return tree(ROOT / package / "__init__.py")


def test_the_house_has_these_rooms():
    assert {path.stem for path in ROOT.glob("*.py")} == set(TOP)
    assert {path.relative_to(ROOT).parts[0] for path in FILES} - {f"{name}.py" for name in TOP} == {
        *PACKAGES, "benchmarks", "tests",
    }  # fmt: skip
    assert [path.name for path in ROOT.glob("*.ipynb")] == ["train.ipynb"]


@pytest.mark.parametrize("path", MODULES, ids=short)
def test_who_imports_whom(path):
    own = part_of(short(path).removesuffix(".py"))
    found = {part_of(module) for module, _ in imported(path)} & HOUSE
    assert found - {own} <= IMPORTS[own]


@pytest.mark.parametrize("path", [*MODULES, *BENCHMARKS, ROOT / "train.ipynb"], ids=short)
def test_imported_names_exist_and_packages_are_entered_by_the_front_door(path):
    """`from study import Run`, or a module that the face's docstring names, such as `study.figures`."""
    for module, names in imported(path):
        package = part_of(module)
        if package in HOUSE - {"experiment"}:  # of imports in functions this would show only when those are called
            found = importlib.import_module(module)
            for name in names:
                assert hasattr(found, name) or importlib.util.find_spec(f"{module}.{name}"), f"{module} has no {name}"
        if package not in PACKAGES or package == part_of(short(path)):
            continue
        named = set(re.findall(rf"`({package}\.[\w.]+)`", ast.get_docstring(face(package))))
        folder, own = ROOT / module.replace(".", "/"), importlib.import_module(package).__all__
        inner = {f"{module}.{name}" for name in names if name not in own and (folder / f"{name}.py").is_file()}
        assert {module, *inner} <= {package, *named}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_has_a_face(package):
    module = importlib.import_module(package)
    assert module.__doc__
    names = module.__all__
    assert len(names) == len(set(names)) > 0
    assert all(hasattr(module, name) for name in names)
    own = (taken for origin, taken in imported(ROOT / package / "__init__.py") if part_of(origin) == package)
    assert {name for taken in own for name in taken} <= set(names)


@pytest.mark.parametrize(("hidden", "package"), [("config", "study"), ("models", "features"), ("dataset", "field")])
def test_a_module_of_another_project_in_the_way_is_named(hidden, package, tmp_path):
    (tmp_path / f"{hidden}.py").touch()
    command, environment = [sys.executable, "-c", f"import {package}"], {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    (sentence,) = re.findall("^ImportError: (.*)$", done.stderr, re.MULTILINE)
    assert str(tmp_path / f"{hidden}.py") in sentence
    assert "sys.path" in sentence


def test_what_is_installed_is_the_house():
    found = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    assert set(found["py-modules"]) == set(TOP)
    faces = [path.parent for path in MODULES if path.name == "__init__.py"]
    assert set(found["packages"]) == {short(folder).replace("/", ".") for folder in faces}


def test_the_method_needs_torch_alone():
    """So that it imports beside somebody's own `config` and `models`."""
    needed = {part_of(module) for module, _ in imported(ROOT / "importance.py")}
    assert needed - sys.stdlib_module_names == {"torch"}


def test_importing_has_no_side_effect(tmp_path):
    names = [short(path).removesuffix(".py").replace("/", ".").removesuffix(".__init__") for path in MODULES]
    light = PACKAGES  # quicker to import without what figures and fits need
    names.sort(key=lambda name: (name not in light, name.count(".")))
    code = f"""
import importlib, logging, os, signal, sys
import numpy as np, torch
def state():
    own = {{name: value for name, value in os.environ.items() if not name.startswith("KMP_")}}  # scikit-learn's
    machine = os.getcwd(), torch.get_num_threads(), torch.get_default_dtype(), signal.getsignal(signal.SIGINT)
    return own, *machine, list(logging.root.handlers), np.random.get_state()[1].tolist()
before, random = state(), torch.random.get_rng_state()
for module in {names}:
    importlib.import_module(module)
    assert state() == before, module
    assert torch.equal(random, torch.random.get_rng_state()), module
    heavy = [m for m in ("matplotlib.pyplot", "transformers", "torchvision") if m in sys.modules]
    assert not heavy, (module, heavy)
    if module in {light}:
        assert not {{"matplotlib", "sklearn", "scipy.stats"}} & sys.modules.keys(), module
"""
    environment = {"PYTHONPATH": str(ROOT)}  # nothing that was set by imports of this process
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def defined(path: Path) -> set[str]:
    """Names that a file gives to something: functions, classes, arguments, variables and attributes of objects."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.id if isinstance(node, ast.Name) else node.attr)
    return found


@cache
def private_names() -> set[str]:
    """Names with one underscore before them in the project's own code; not those of a protocol, as `_repr_png_`."""
    return {name for module in MODULES for name in defined(module) if re.fullmatch(r"_[^_].*[^_]", name)}


@pytest.mark.parametrize("path", TESTS, ids=short)
def test_tests_go_through_the_door(path):
    """No test imports another, or uses a private name of the project, or the inside of a function."""
    for module, names in imported(path):
        assert not any(part.startswith("test_") for part in (*module.split("."), *names)), module
    used = set(re.findall(r"\b_\w+", path.read_text("utf-8")))
    inside = {f"__{name}__" for name in ("globals", "code", "closure", "defaults", "wrapped")}
    assert not used & (private_names() - defined(path) | inside)


def test_tests_mirror_the_tree():
    for path in TESTS:
        folder = path.relative_to(ROOT / "tests").parent
        assert folder == Path() or (ROOT / folder).is_dir(), short(path)


@pytest.mark.parametrize("page", PAGES, ids=short)
def test_pages_have_lines_of_at_most_120_characters_and_the_readme_is_short(page):
    assert page != ROOT / "README.md" or page.stat().st_size < 8192
    lines = enumerate(page.read_text("utf-8").splitlines(), 1)
    long = [f"{i}: {len(text)}" for i, text in lines if len(text) > 120 and not text.startswith("python3 -m venv")]
    assert not long  # but for the commands of README, which are copied whole


@pytest.mark.parametrize("page", PAGES, ids=short)
def test_links_between_pages_lead_somewhere(page):
    text = page.read_text("utf-8")
    for target, anchor in re.findall(r"\]\((?!https?:|mailto:)([^)#\s]*)(?:#([^)\s]+))?\)", text):
        path = page if not target else (page.parent / target).resolve()
        assert path.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", path.read_text("utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in slugs, f"{target}#{anchor}"


def test_ci_runs_the_command_of_the_readme():
    readme = (ROOT / "README.md").read_text("utf-8").replace("\\\n", " ")
    run, test = (" ".join(line.split()) for line in re.findall(r"^python3 -m venv .*$", readme, re.MULTILINE))
    assert "nbconvert" in run
    assert "pytest" in test
    assert test.replace("pip install", "pip install -q") in (ROOT / ".ci" / "run").read_text("utf-8").splitlines()
