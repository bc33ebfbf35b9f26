"""Methods of two loops against plain loops of one network with `torch.optim.Adam`."""

import pytest
import torch
from torch.nn import functional as F

from engine import generator


@pytest.fixture
def three(methods):
    return methods.setup(domains=3)


def optimized(methods, params, **options):
    """Leaves of their own and an Adam over them."""
    leaves = methods.leaves(params)
    return leaves, torch.optim.Adam(leaves.values(), **options)


def mldg_reference(methods, params, steps, orders, beta, options):
    leaves, outer = optimized(methods, params, **options)
    for (x, y), order in zip(steps, orders, strict=True):
        total = [torch.zeros_like(leaf) for leaf in leaves.values()]
        for k, train in enumerate(order):
            test = order[(k + 1) % len(order)]
            inner, fresh = optimized(methods, leaves, **options)
            F.cross_entropy(methods.plain_logits(inner, x[train]), y[train]).backward()
            first = [leaf.grad.clone() for leaf in inner.values()]
            fresh.step()
            fresh.zero_grad()
            F.cross_entropy(methods.plain_logits(inner, x[test]), y[test]).backward()
            for sum_, a, leaf in zip(total, first, inner.values(), strict=True):
                sum_ += (a + beta * leaf.grad) / len(order)
        for leaf, gradient in zip(leaves.values(), total, strict=True):
            leaf.grad = gradient
        outer.step()
    return leaves


def fish_reference(methods, params, steps, orders, meta_lr, options):
    outer = {name: value.clone() for name, value in params.items()}
    moments = None
    for (x, y), order in zip(steps, orders, strict=True):
        inner, optimizer = optimized(methods, outer, **options)
        if moments:
            optimizer.load_state_dict(moments)
        for domain in order:
            optimizer.zero_grad()
            F.cross_entropy(methods.plain_logits(inner, x[domain]), y[domain]).backward()
            optimizer.step()
        moments = optimizer.state_dict()
        outer = {name: (1 - meta_lr) * value + meta_lr * inner[name].detach() for name, value in outer.items()}
    return outer


@pytest.mark.parametrize(
    ("name", "reference", "knob"), [("MLDG", mldg_reference, {"beta": 0.7}), ("Fish", fish_reference, {"meta_lr": 0.3})]
)
@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_a_network_is_that_of_a_plain_loop(methods, name, reference, knob, weight_decay, three):
    options = {"lr": 0.02, "weight_decay": weight_decay}
    engine = methods.run(name, 6, of=three, learning_rate=0.02, weight_decay=weight_decay, **knob)
    for s, seed in enumerate(methods.seeds):
        pairs = ((x[0], y[0]) for x, y, _ in methods.batches(6, three, (seed,)))
        steps = [(x.unflatten(0, (3, -1)), y.unflatten(0, (3, -1))) for x, y in pairs]
        draw = generator(seed, "noise", "test")
        orders = [torch.randperm(3, generator=draw).tolist() for _ in steps]
        assert len({tuple(order) for order in orders}) > 1
        expected = reference(methods, methods.one_network(three, seed), steps, orders, *knob.values(), options)
        for key, value in expected.items():
            assert torch.allclose(engine.params[key][s], value, rtol=0, atol=1e-10), key


def test_fish_that_goes_nowhere_stays(methods):
    engine = methods.run("Fish", meta_lr=0.0)
    for name, value in methods.start().items():
        assert torch.equal(engine.params[name], value)


def test_the_losses_are_those_before_the_step(methods, three):
    batch, params = methods.one_batch(three), methods.one_network(three)
    noise, domain_losses = {"order": torch.tensor([2, 0, 1])}, methods.make("ERM", three).domain_losses(params, batch)
    fish, tiny = methods.make("Fish", three), methods.make("MLDG", three, learning_rate=1e-12, beta=0.5)
    assert torch.allclose(fish.update(params, batch, fish.initial_state(params), noise)[2], domain_losses.mean())
    loss = tiny.update(params, batch, tiny.initial_state(params), noise)[2]  # θ' is θ: every domain counts 1 + β times
    assert torch.allclose(loss, 1.5 * domain_losses.mean(), atol=1e-9)
