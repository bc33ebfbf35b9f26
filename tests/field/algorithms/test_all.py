"""What holds for every method: a stack equals its networks, rows are independent, hyperparameters are checked."""

from collections.abc import Callable
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_leaves

from config import InputError, Settings
from field.algorithms import ALGORITHMS, Algorithm, Setup, find, register
from field.algorithms.parts import adam, adam_state
from field.train import train_method, train_trials
from models import FeedforwardClassifier
from study import CONTROLS
from tests.factories import split_blobs

NAMES = sorted(ALGORITHMS)
MILD = {"IRM": {"irm_weight": 1.0}, "IB_IRM": {"irm_weight": 1.0}}  # 24 steps are too few to recover from more

AT_ONCE = {"irm_anneal": 0.0, "ib_anneal": 0.0}
LIMITS = [  # (method, its hyperparameters, source domains): where it is ERM on the same kind of batches
    ("ANDMask", {"tau": 0.0}, 3),
    ("CORAL", {"penalty_weight": 0.0}, 2),
    ("DMG", {"initial": "scalar", "initial_logit": 1e3, "mask_learning_rate": 0.0}, 3),  # masks that stay open
    ("EQRM", {"quantile": 0.5, "burn_in": 0.0, "learning_rate_after": 1e-3}, 2),  # the median of two is their mean
    ("Fishr", {"anneal": 1.0}, 2),  # the penalty never begins
    ("DSPReg", {"pull": 0.0}, 2),
    ("FreeLunch", {"penalty_weight": 0.0}, 2),
    ("GMixout", {"keep": 1.0}, 2),
    ("GroupDRO", {"eta": 0.0}, 2),
    ("HGP", {"alpha": 0.0, "beta": 0.0}, 2),
    ("IB_ERM", {"ib_weight": 0.0, "ib_anneal": 0.0}, 2),
    ("IB_IRM", {"irm_weight": 0.0, "ib_weight": 0.0, **AT_ONCE}, 2),
    ("IGA", {"penalty_weight": 0.0}, 2),
    ("IRM", {"irm_weight": 0.0, "irm_anneal": 0.0}, 2),
    ("ImportanceMixout", {"keep": 1.0}, 2),
    ("L2SP", {"pull": 0.0}, 2),
    ("L2SPBalanced", {"pull": 0.0}, 2),
    ("LFME", {"penalty_weight": 0.0}, 2),
    ("MLDG", {"beta": 0.0}, 3),
    ("MMD", {"penalty_weight": 0.0}, 2),
    ("Mixout", {"keep": 1.0}, 2),
    ("SD", {"penalty_weight": 0.0}, 2),
    ("SPD", {"pull": 0.0}, 2),
    ("VREx", {"penalty_weight": 0.0, "anneal": 0.0}, 2),
    ("AgrRand", {}, 1),
    ("AgrSum", {}, 1),
    ("CORAL", {}, 1),
    ("CorGrad", {}, 1),
    ("DSPReg", {}, 1),
    ("EQRM", {"burn_in": 0.0, "learning_rate_after": 1e-3}, 1),
    ("Fish", {"meta_lr": 1.0}, 1),
    ("GroupDRO", {}, 1),
    ("HGP", {}, 1),
    ("IGA", {}, 1),
    ("MMD", {}, 1),
    ("Mixup", {}, 1),
    ("PCGrad", {}, 1),
    ("VREx", {"anneal": 2.0}, 1),
]
DIFFERENT = sorted(
    {name for name, *_ in LIMITS} - {"DSPReg", "EQRM", "GroupDRO", "HGP", "SD"} | {"DANN"}
)  # in ten steps, by default


def network_of(methods, kind: str):
    """What is trained: a classifier on features, the last block by its shortcut, or two blocks by their modules."""
    return methods.on_features() if kind == "features" else methods.on_tokens(1 if kind == "block" else 2)


@pytest.fixture(scope="module", params=list(product(NAMES, ("features", "block", "blocks"))), ids="-".join)
def stack(request, methods):
    """Some steps of three networks: a method on a kind of network."""
    name, kind = request.param
    network = network_of(methods, kind)
    if words := ALGORITHMS[name].refusal(network):
        pytest.skip(words)
    steps = 50 if kind == "features" else 10
    return methods.run(name, steps, of=methods.setup(network, steps_per_epoch=steps // 2, backbone_rate=0.3))


def test_a_stack_equals_single_runs(methods, stack):
    """The others of the stack change nothing: its last network is that of a plain loop."""
    own = stack.methods[-1]
    if type(own).__name__ == "AgrRand" and own.setup.network.has_blocks and not own.setup.network.shortcut:
        pytest.skip("the gradient of the key's bias is 0: whether domains agree on it is a matter of rounding")
    method, params, state = methods.alone(type(own).__name__, stack.steps_taken, methods.seeds[-1], own.setup)
    for key, value in stack.params.items():
        if not key.endswith("k_proj.bias"):  # the same: Adam makes steps out of its rounding errors
            assert torch.allclose(value[-1], params[key], rtol=0, atol=1e-9), key
    x = methods.batches(1, own.setup)[0][0][0]
    assert torch.allclose(stack.logits(x)[-1], method.logits(params, state, x), rtol=0, atol=1e-9)


def test_a_row_is_predicted_independently_of_the_others(methods, stack):
    x = methods.batches(2, stack.methods[0].setup)[0][0][0]
    together, alone = stack.logits(x), torch.cat([stack.logits(row) for row in x.split(1)], dim=1)
    assert torch.allclose(together, alone, rtol=0, atol=1e-9)
    assert all(key in stack.state for key in stack.methods[0].record_names)


def drawn(method: type[Algorithm], number: int) -> Callable[[Setup], Algorithm]:
    """The method with random values of all hyperparameters in which the networks of a stack may differ."""
    rng, known = np.random.default_rng(number), method.known_hyperparameters()
    return partial(method, **{name: known[name].search(rng) for name in method.tensors() if known[name].search})


@pytest.mark.parametrize("name", NAMES)
def test_trials_in_one_stack_equal_trials_trained_apart(methods, name):
    settings = Settings.current(ph2_num_epochs=9, hidden_sizes=(6, 5, 4), batch_size=16)
    data, seeds, made = split_blobs(torch.float64, settings), (0, 1), [drawn(ALGORITHMS[name], n) for n in range(3)]
    given = [methods.given(name, methods.setup(), seeds, part) for part in (0.3, 0.6, 0.9)]
    together = train_trials(data, ["art"], seeds, made, settings, given=given)
    assert (together[0].state["step"] >= 50).all()
    assert len({*(trial.method.learning_rate for trial in together)}) == 3
    for trial, method, own in zip(together, made, given, strict=True):
        alone = train_method(data, ["art"], seeds, method, settings, given=own)
        assert trial.method.values == alone.method.values
        for kind, rtol in (("params", 0), ("state", 1e-9), ("loss", 1e-9)):
            ours, theirs = tree_leaves(getattr(trial, kind)), tree_leaves(getattr(alone, kind))
            for a, b in zip(ours, theirs, strict=True):
                assert torch.allclose(a, b, rtol=rtol, atol=1e-9, equal_nan=True), kind
        assert torch.equal(trial.correct, alone.correct)
        assert torch.equal(trial.failed, alone.failed)


@pytest.mark.parametrize("name", [name for name in NAMES if not ALGORITHMS[name].control])  # those: test_masks.py
def test_a_method_trains_through_the_one_loop_in_single_precision(methods, name):
    networks = methods.trained(name, epochs=4, dtype=torch.float32, learning_rate=0.01, **MILD.get(name, {}))
    assert networks.failed.tolist() == [0, 0]
    assert networks.loss.isfinite().all()
    start = methods.trained(name, epochs=1, dtype=torch.float32, learning_rate=1e-9)
    assert networks.validation_accuracy[:, -1].mean() > start.validation_accuracy[:, -1].mean() + 0.1
    assert {value.dtype for value in (networks.loss, *networks.params.values())} == {torch.float32}
    before, structure = tree_flatten(networks.method.initial_state({n: v[0] for n, v in networks.params.items()}))
    own = {entry: value for entry, value in networks.state.items() if entry not in ALGORITHMS[name].given()}
    after, now = tree_flatten(own)
    assert now == structure
    assert [(v.dtype, v.shape) for v in before] == [(v.dtype, v.shape[1:]) for v in after]


@pytest.mark.parametrize(("name", "values", "domains"), LIMITS)
def test_where_a_method_is_erm(methods, name, values, domains):
    of = methods.setup(domains=domains)
    erm = methods.baseline("ERM" if ALGORITHMS[name].batches == "pooled" else "ERMBalanced", of)
    ours, tolerance = methods.run(name, of=of, **values), 1e-7 if name == "ANDMask" else 1e-9
    assert methods.same(ours, erm, tolerance)
    x = methods.one_batch(of).features
    assert torch.allclose(ours.logits(x), erm.logits(x), rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", DIFFERENT)
def test_by_default_a_method_is_not_erm(methods, name):
    of = methods.setup(domains=3)
    erm = methods.baseline("ERM" if ALGORITHMS[name].batches == "pooled" else "ERMBalanced", of)
    assert not methods.same(methods.run(name, of=of), erm, 1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_method_declares_what_it_is(methods, name):
    cls = ALGORITHMS[name]
    assert cls.__doc__
    assert cls.version >= 1
    assert cls.batches in ("pooled", "balanced")
    assert cls.control is None or cls.control in CONTROLS
    assert all(knob.meaning for knob in cls.known_hyperparameters().values())
    with pytest.raises(InputError, match="'no_such'"):
        cls(methods.setup(), no_such=1)


def test_methods_with_experts_say_so(methods):
    assert [name for name in NAMES if ALGORITHMS[name].routed] == ["GMoE", "SFMoE"]


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


def test_the_classifier_is_the_projects(methods):
    of, params, x = methods.setup(), methods.one_network(), methods.one_batch().features
    template = FeedforwardClassifier(of.features, of.classes, (6, 5, 4)).double()
    assert tuple(methods.make("ERM").shapes) == tuple(name for name, _ in template.named_parameters())
    assert torch.allclose(methods.make("ERM").forward(params, x), functional_call(template, params, (x,)))
