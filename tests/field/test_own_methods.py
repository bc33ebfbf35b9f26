"""Methods that a user writes: one small class, with a version that keeps results of different code apart."""

import pytest
from torch.nn import functional as F

from config import InputError, Settings
from field.algorithms import ALGORITHMS, Algorithm, Hyperparameter
from field.compare import Comparison
from field.train import train_method
from tests.factories import everything, make_run, save_blobs, split_blobs


class Smoothed(Algorithm):
    """Label smoothing (Szegedy et al. 2016)."""

    hyperparameters = {"smoothing": Hyperparameter(0.1, "weight of the uniform distribution")}

    def loss(self, params, batch, state, noise):
        logits = self.forward(params, batch.features)
        return F.cross_entropy(logits, batch.labels, label_smoothing=self.smoothing), {}


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    return save_blobs(tmp_path_factory.mktemp("features") / "blobs.safetensors")


@pytest.fixture
def compare(features, tmp_path, monkeypatch):
    """Train a method of this file beside its baseline; it is forgotten afterwards."""

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


def test_a_method_is_one_small_class():
    settings = Settings.current(ph2_num_epochs=1, hidden_sizes=(6, 5))
    method = lambda setup: Smoothed(setup, smoothing=0.3)  # noqa: E731
    networks = train_method(split_blobs(settings=settings), ["art"], (0,), method, settings)
    assert networks.method.values == {"learning_rate": 1e-3, "weight_decay": 0.0, "smoothing": 0.3}
    assert networks.loss.isfinite().all()


def test_a_loss_without_changes_of_the_state_is_refused():
    class Forgetful(Algorithm):
        def loss(self, params, batch, state, noise):
            return F.cross_entropy(self.forward(params, batch.features), batch.labels)

    settings = Settings.current(ph2_num_epochs=1, hidden_sizes=(6, 5))
    with pytest.raises(InputError, match=r"Forgetful\.loss"):
        train_method(split_blobs(settings=settings), ["art"], (0,), Forgetful, settings)


def test_the_version_is_written_with_the_results(compare):
    assert Smoothed.version == 1
    comparison = compare(edited(version=3, scale=1.0))
    headers = [comparison.run.archive.method(name, 0, ("art",)).header for name in ("ERM", "Smoothed")]
    assert [header["version"] for header in headers] == [1, 3]


def test_a_new_version_is_not_mixed_with_old_results(compare, tmp_path):
    compare(Smoothed)
    before = everything(tmp_path / "results")
    with pytest.raises(InputError, match="Smoothed"):
        compare(edited(version=2, scale=2.0))
    assert everything(tmp_path / "results") == before


def test_the_same_version_goes_on_where_it_stopped(compare, tmp_path):
    compare(Smoothed)
    before = everything(tmp_path / "results")
    compare(edited(version=1, scale=1.0))  # the class defined again, as by running its notebook cell again
    assert everything(tmp_path / "results") == before
