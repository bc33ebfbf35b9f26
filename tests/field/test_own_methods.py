"""Methods that a user writes: one small class, with a version that keeps results of different code apart."""

from functools import partial

import pytest
from torch.nn import functional as F

from config import InputError, Settings
from field.algorithms import ALGORITHMS, Algorithm, Hyperparameter
from field.compare import Comparison
from field.train import train_method
from tests.factories import everything, make_run, save_blobs, split_blobs

SETTINGS = Settings.current(ph2_num_epochs=1, hidden_sizes=(6, 5))


class Smoothed(Algorithm):
    """Label smoothing (Szegedy et al. 2016)."""

    hyperparameters = {"smoothing": Hyperparameter(0.1, "weight of the uniform distribution")}

    def loss(self, params, batch, state, noise):
        logits = self.forward(params, batch.features)
        return F.cross_entropy(logits, batch.labels, label_smoothing=self.smoothing), {}


@pytest.fixture
def compare(tmp_path, monkeypatch):
    """Train a method of this file beside its baseline; it is forgotten afterwards."""
    features = save_blobs(tmp_path / "blobs.safetensors")

    def train(method):
        monkeypatch.setitem(ALGORITHMS, method.__name__, method)
        comparison = Comparison(make_run(features, tmp_path / "results", seeds=2, holdouts=["art"]), [method])
        comparison.train()
        return comparison

    return train


def edited(version, scale):
    """`Smoothed` after an edit."""

    def loss(self, params, batch, state, noise):
        value, changes = Smoothed.loss(self, params, batch, state, noise)
        return scale * value, changes

    return type("Smoothed", (Smoothed,), {"version": version, "loss": loss, "__doc__": Smoothed.__doc__})


def trained(method):
    return train_method(split_blobs(settings=SETTINGS), ["art"], (0,), method, SETTINGS)


def test_a_method_is_one_small_class():
    networks = trained(partial(Smoothed, smoothing=0.3))
    assert networks.method.values == {"learning_rate": 1e-3, "weight_decay": 0.0, "smoothing": 0.3}
    assert networks.loss.isfinite().all()


def test_a_loss_without_changes_of_the_state_is_refused():
    class Forgetful(Algorithm):
        def loss(self, params, batch, state, noise):
            return F.cross_entropy(self.forward(params, batch.features), batch.labels)

    with pytest.raises(InputError, match=r"Forgetful\.loss"):
        trained(Forgetful)


def test_results_of_a_version_go_on_and_are_not_mixed_with_anothers(compare, tmp_path):
    assert Smoothed.version == 1
    comparison = compare(edited(version=3, scale=1.0))
    headers = [comparison.run.archive.method(name, 0, ("art",)).header for name in ("ERM", "Smoothed")]
    assert [header["version"] for header in headers] == [1, 3]
    before = everything(tmp_path / "results")
    compare(edited(version=3, scale=1.0))  # the class defined again, as by running its notebook cell again
    assert everything(tmp_path / "results") == before
    with pytest.raises(InputError, match="Smoothed"):
        compare(edited(version=2, scale=2.0))
    assert everything(tmp_path / "results") == before
