"""A method of one's own: its code is known, and runs of it as it was are not mixed with new ones."""

import importlib
import linecache
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_compare import contents, make
from test_study import make_features

from algorithms import ALGORITHMS, code_of, registry
from config import InputError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_features(tmp_path_factory.mktemp("features") / "blobs.safetensors")


OWN = """
from torch.nn import functional as F
from algorithms import Algorithm, Hyperparameter

class Own(Algorithm):
    \"\"\"Cross-entropy, in part of the {words}.\"\"\"
    hyperparameters = {{"part": Hyperparameter(0.5, "of the loss")}}
    offset = {offset}

    def loss(self, params, batch, state, noise):
        # a comment on {words}
        return {expression}, {{}}

    def scaled(self, value):
        return self.part * value
"""
LOSS = "self.scaled(F.cross_entropy(self.forward(params, batch.features), batch.labels)) + self.offset"


def own(folder, monkeypatch, words="batch", offset=0, expression=LOSS):
    """A class of one's own, as it comes from a file that has been edited."""
    folder.mkdir()
    (folder / "own_method.py").write_text(OWN.format(words=words, offset=offset, expression=expression))
    monkeypatch.syspath_prepend(folder)
    sys.modules.pop("own_method", None)
    linecache.clearcache()
    return importlib.import_module("own_method").Own


@pytest.mark.parametrize("change", [{"offset": 1}, {"expression": f"2 * ({LOSS})"}], ids=["attribute", "loss"])
def test_a_changed_method_is_not_mixed_with_what_it_was(change, data, tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "ALGORITHMS", dict(ALGORITHMS))
    make(data, tmp_path / "r", [own(tmp_path / "a", monkeypatch)]).run()
    before = contents(tmp_path / "r")
    again = make(data, tmp_path / "r", [own(tmp_path / "b", monkeypatch, words="other words")])
    again.run()  # comments and docstrings are no change
    assert contents(tmp_path / "r") == before
    changed = make(data, tmp_path / "r", [own(tmp_path / "c", monkeypatch, **change)])
    with pytest.raises(InputError, match="holds Own as it was before its code changed"):
        changed.run()
    assert contents(tmp_path / "r") == before


def test_code_is_known_of_classes_of_ones_own_only(monkeypatch, tmp_path):
    assert code_of(ALGORITHMS["ERM"]) is None
    assert len(code_of(own(tmp_path / "a", monkeypatch))) == 16


BEFORE = """
from functools import cached_property, partial
import torch
from torch.nn import functional as F
from algorithms import Algorithm

SCALE = 2.0
SHIFT = torch.zeros(1)

def helper(x):
    return x * SCALE + SHIFT

def made(k):
    def loss(self, params, batch, state, noise):
        return k * F.cross_entropy(self.forward(params, batch.features), batch.labels), {}
    return loss

class Own(Algorithm):
    weights = [1.0]
    table = {"a": 1}
    tensor = torch.ones(2)
    parts = (F.relu, F.gelu, {"x", "y", "z"}, helper)
    bound = partial(helper, 3)
    fold = staticmethod(lambda x: x + 1)
    f, g = (lambda x: x,
            lambda x: -x)
    loss = made(1)

    @cached_property
    def cached(self):
        return 1

    @property
    def plain(self):
        return 4

    def logits(self, params, state, features):
        return self.forward(params, helper(features))
"""


def code_after(old="", new=""):
    assert old in BEFORE
    typed = {"__name__": "typed"}
    exec(BEFORE.replace(old, new) if old else BEFORE, typed)  # as typed into an interpreter: there is no source
    return code_of(typed["Own"])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("SCALE = 2.0", "SCALE = 3.0"),
        ("return x * SCALE", "return x - SCALE"),
        ("torch.zeros(1)", "torch.ones(1)"),
        ("weights = [1.0]", "weights = [3.0]"),
        ('{"a": 1}', '{"a": 2}'),
        ("torch.ones(2)", "torch.zeros(2)"),
        ("(F.relu, F.gelu", "(F.gelu, F.gelu"),
        ("partial(helper, 3)", "partial(helper, 4)"),
        ("lambda x: x + 1", "lambda x: x + 2"),
        ("lambda x: -x", "lambda x: 2 * x"),
        ("made(1)", "made(2)"),
        ("return k *", "return -k *"),
        ("return 1", "return 2"),
        ("return 4", "return 5"),
        ("helper(features)", "features"),
    ],
)
def test_every_change_of_code_is_noticed(old, new):
    assert code_after(old, new) != code_after()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("", ""),
        ("    weights", "\n\n    weights"),
        ("        return 4", '        """Four."""\n        return 4  # four'),
    ],
    ids=["none", "layout", "docstring"],
)
def test_code_that_computes_the_same_is_the_same(old, new):
    assert code_after(old, new) == code_after()


def test_code_is_the_same_in_another_process():
    code = f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]!r}; import test_own_methods as t"
    command = [sys.executable, "-c", f"{code}; print(t.code_after())"]
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        assert done.stdout.strip() == code_after()
