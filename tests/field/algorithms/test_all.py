"""What holds for every method: a stack equals its networks, rows are independent, hyperparameters are checked."""

import pytest
import torch
from torch.func import functional_call

from config import InputError
from field.algorithms import ALGORITHMS, Algorithm, find, register
from field.algorithms.base import adam, adam_state, flatten, unflatten
from models import FeedforwardClassifier
from study import CONTROLS

NAMES = sorted(ALGORITHMS)
MILD = {"IRM": {"irm_weight": 1.0}, "IB_IRM": {"irm_weight": 1.0}}  # 36 steps are too few to recover from more


@pytest.mark.parametrize("name", NAMES)
def test_a_stack_equals_single_runs(methods, name):
    steps = 50
    of = methods.setup(steps_per_epoch=25)
    stack = methods.run(name, steps, of=of)
    x = methods.batches(1)[0][0][0]
    for s, seed in enumerate(methods.seeds):
        single = methods.run(name, steps, (seed,), of=of)
        for key, value in stack.params.items():
            assert torch.allclose(value[s], single.params[key][0], rtol=0, atol=1e-9), key
        assert torch.allclose(stack.logits(x)[s], single.logits(x)[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in NAMES if not ALGORITHMS[name].control])  # those: test_masks.py
def test_a_method_trains_through_the_one_loop(methods, name):
    networks = methods.trained(name, epochs=6, learning_rate=5e-3, **MILD.get(name, {}))
    assert networks.failed.tolist() == [0, 0]
    assert networks.loss.isfinite().all()
    start = methods.trained(name, epochs=1, learning_rate=1e-9)
    assert networks.validation_accuracy[:, -1].mean() > start.validation_accuracy[:, -1].mean() + 0.1


@pytest.mark.parametrize("name", NAMES)
def test_a_row_is_predicted_independently_of_the_others(methods, name):
    engine = methods.run(name, 3)
    x = methods.batches(2)[0][0][0]
    together, alone = engine.logits(x), torch.cat([engine.logits(row) for row in x.split(1)], dim=1)
    assert torch.allclose(together, alone, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_a_method_declares_what_it_is(methods, name):
    cls = ALGORITHMS[name]
    assert cls.__doc__
    assert cls.version >= 1
    assert cls.batches in ("pooled", "balanced")
    assert cls.control is None or cls.control in CONTROLS
    for knob in cls.known_hyperparameters().values():
        assert knob.meaning
    with pytest.raises(InputError, match="'no_such'"):
        cls(methods.setup(), no_such=1)


@pytest.mark.parametrize("name", [name for name in NAMES if ALGORITHMS[name].record_names])
def test_the_state_holds_what_a_method_records(methods, name):
    engine = methods.run(name, 1)
    assert all(key in engine.state for key in engine.method.record_names)


def test_methods_with_experts_say_so(methods):
    routed = [name for name in NAMES if ALGORITHMS[name].routed]
    assert routed == ["GMoE", "SFMoE"]
    for name in routed:
        engine = methods.run(name, 1)
        params = {key: value[0] for key, value in engine.params.items()}
        shares = engine.method.routing(params, methods.one_batch().features)
        assert shares.shape == (12, engine.method.experts)


def test_an_unknown_method_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match=r"'NoSuch'.*ERM"):
        find("NoSuch")


def test_a_name_is_taken_once():
    with pytest.raises(ValueError, match="'ERM'"):
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


def test_parameters_come_back_from_a_vector(methods):
    params = methods.one_network() | {"scalar": torch.tensor(2.0, dtype=torch.float64)}
    back = unflatten(flatten(params), params)
    assert list(back) == list(params)
    assert all(torch.equal(back[name], value) for name, value in params.items())


def test_the_classifier_is_the_projects(methods):
    of, params, x = methods.setup(), methods.one_network(), methods.one_batch().features
    template = FeedforwardClassifier(of.features, of.classes, of.hidden_sizes).double()
    assert methods.make("ERM").classifier_names == tuple(name for name, _ in template.named_parameters())
    assert torch.allclose(methods.make("ERM").forward(params, x), functional_call(template, params, (x,)))


def test_parameters_are_the_classifiers_and_others(methods):
    params = {"masks.0": torch.zeros(1), **methods.one_network(), "masks.1": torch.zeros(2)}
    classifier, others = methods.make("DMG").parts(params)
    assert list(classifier) == list(methods.one_network())
    assert list(others) == ["masks.0", "masks.1"]
