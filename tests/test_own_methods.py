"""A method of one's own: its code is known, and runs of it as it was are not mixed with new ones."""

import importlib
import linecache
import sys

import pytest
from test_compare import contents, make
from test_study import make_features

from algorithms import ALGORITHMS, code_of, registry
from config import InputError


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
    typed = {"__name__": "typed"}
    exec(OWN.format(words="batch", offset=0, expression=LOSS), typed)
    assert code_of(typed["Own"]) is None  # Python has no source of it
