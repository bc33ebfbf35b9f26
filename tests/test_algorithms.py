"""What holds for every method: a stack is its networks, nothing leaks, hyperparameters are checked."""

import methods
import pytest
import torch
from problems import problem
from torch.func import functional_call

from algorithms import ALGORITHMS, Algorithm, Hyperparameter, find, register
from algorithms.base import adam, adam_state
from config import InputError, Settings
from models import FeedforwardClassifier
from trainer_algorithm import train_algorithm
from trainer_phase2 import Arm, train_holdout

NAMES = sorted(ALGORITHMS)
MILD = {"IRM": {"irm_weight": 1.0}, "IB_IRM": {"irm_weight": 1.0}}  # 36 steps are too few to recover from more


@pytest.mark.parametrize("name", NAMES)
def test_a_stack_equals_single_runs(name):
    steps = 50
    of = methods.setup(steps_per_epoch=25)
    stack = methods.run(name, steps, of=of)
    x = methods.batches(1)[0][0][0]
    for s, seed in enumerate(methods.SEEDS):
        single = methods.run(name, steps, (seed,), of=of)
        for key, value in stack.networks.items():
            assert torch.allclose(value[s], single.networks[key][0], rtol=0, atol=1e-9), key
        assert torch.allclose(stack.logits(x)[s], single.logits(x)[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_a_method_trains_through_the_one_loop(name):
    if getattr(ALGORITHMS[name], "masked", False):
        pytest.skip("needs masks of Phase 1: see test_compare.py")
    networks = methods.trained(name, epochs=6, learning_rate=5e-3, **MILD.get(name, {}))
    assert networks.failed.tolist() == [0, 0]
    assert networks.loss.isfinite().all()
    start = methods.trained(name, epochs=1, learning_rate=1e-9)
    assert networks.validation_accuracy[:, -1].mean() > start.validation_accuracy[:, -1].mean() + 0.1


@pytest.mark.parametrize("name", NAMES)
def test_a_row_is_predicted_on_its_own(name):
    engine = methods.run(name, 3)
    x = methods.batches(2)[0][0][0]
    together, alone = engine.logits(x), torch.cat([engine.logits(row) for row in x.split(1)], dim=1)
    assert torch.allclose(together, alone, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_a_method_says_what_it_is(name):
    cls = ALGORITHMS[name]
    assert cls.__doc__
    assert cls.batches in ("pooled", "balanced")
    for knob in cls.known_hyperparameters().values():
        assert knob.meaning
    with pytest.raises(InputError, match=r"no hyperparameter 'no_such'; it has .*learning_rate"):
        cls(methods.setup(), no_such=1)


def test_an_unknown_method_is_told_with_the_known_ones():
    with pytest.raises(InputError, match=r"no algorithm 'NoSuch'.*ERM"):
        find("NoSuch")


def test_a_name_is_given_once():
    with pytest.raises(ValueError, match="another algorithm 'ERM'"):
        register(type("ERM", (Algorithm,), {}))


def test_adam_is_torchs():
    params = {"a": torch.randn(3, 2, dtype=torch.float64), "b": torch.randn(4, dtype=torch.float64)}
    leaves = [value.clone().requires_grad_() for value in params.values()]
    optimizer = torch.optim.Adam(leaves, lr=0.01, weight_decay=0.1, betas=(0.5, 0.9))
    state = adam_state(params)
    for _ in range(20):
        gradient = {name: torch.randn_like(value) for name, value in params.items()}
        params, state = adam(params, gradient, state, 0.01, 0.1, betas=(0.5, 0.9))
        for leaf, g in zip(leaves, gradient.values(), strict=True):
            leaf.grad = g
        optimizer.step()
    for leaf, value in zip(leaves, params.values(), strict=True):
        assert torch.allclose(leaf, value, rtol=0, atol=1e-12)


def test_the_classifier_is_the_projects():
    of, params, x = methods.setup(), methods.one_network(), methods.one_batch().features
    template = FeedforwardClassifier(of.features, of.classes, of.hidden_sizes).double()
    assert methods.method("ERM").classifier_names == tuple(name for name, _ in template.named_parameters())
    assert torch.allclose(methods.method("ERM").forward(params, x), functional_call(template, params, (x,)))


def test_erm_is_phase_2_with_every_weight_at_the_full_rate():
    settings = Settings.current(ph2_num_epochs=2, hidden_sizes=(6, 5, 4), batch_size=16)
    data, seeds = problem(settings=settings), (0, 1)
    mask = [torch.ones(2, 5, 6, dtype=torch.bool), torch.ones(2, 4, 5, dtype=torch.bool)]
    ours = train_holdout(data, "sketch", seeds, {"erm": Arm(mask, settings)})
    theirs = train_algorithm(data, ["sketch"], seeds, ALGORITHMS["ERM"], {}, settings)
    for name, value in theirs.params.items():
        assert torch.allclose(value, ours.final[name][:, 0], rtol=0, atol=1e-9)
    assert torch.equal(theirs.correct, ours.correct[:, 0])


def test_a_method_of_ones_own_is_one_small_class():
    class LabelSmoothing(Algorithm):
        """Szegedy et al. 2016."""

        hyperparameters = {"smoothing": Hyperparameter(0.1, "weight of the uniform distribution")}

        def loss(self, params, batch, state, noise):
            logits = self.forward(params, batch.features)
            return torch.nn.functional.cross_entropy(logits, batch.labels, label_smoothing=self.smoothing), {}

    settings = Settings.current(ph2_num_epochs=1, hidden_sizes=(6, 5))
    networks = train_algorithm(problem(settings=settings), ["art"], (0,), LabelSmoothing, {"smoothing": 0.3}, settings)
    assert networks.algorithm.values["smoothing"] == 0.3
    assert networks.loss.isfinite().all()
