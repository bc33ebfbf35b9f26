"""Logits drawn to a teacher's probabilities, against loops over images."""

import pytest
import torch
from torch.nn import functional as F

from field.algorithms import ALGORITHMS


def experts(methods, seed=3):
    """The two experts of a network: name -> ``[domains, *shape]``, and one dictionary for each."""
    stacked = {name: value[0] for name, value in methods.given("LFME", methods.setup(), (seed,))["experts"].items()}
    return stacked, [{name: value[d] for name, value in stacked.items()} for d in range(2)]


def plain_loss(methods, name, params, batch, weight):
    """One image after the other, one class after the other."""
    _, each = experts(methods)
    errors, entropies = [], []
    for x, label, domain in zip(batch.features, batch.labels, batch.domains, strict=True):
        logits = methods.plain_logits(params, x)
        entropies.append(logits.logsumexp(0) - logits[label])
        p = methods.plain_logits(each[domain], x).exp()
        wanted = p / p.sum() if name == "LFME" else [float(c == label) for c in range(3)]
        errors += [(logits[c] - wanted[c]) ** 2 for c in range(3)]
    return torch.stack(entropies).mean() + weight * torch.stack(errors).mean()


@pytest.mark.parametrize("name", ["LFME", "FreeLunch"])
@pytest.mark.parametrize("balanced", [False, True])
def test_gradients_are_those_of_a_plain_loop(methods, name, balanced):
    method, params = methods.network(name, penalty_weight=0.7)
    batch = methods.one_batch(balanced=balanced)
    found, loss, _ = method.gradients(params, batch, {"experts": experts(methods)[0]}, {})
    leaves = methods.leaves(params)
    expected = plain_loss(methods, name, leaves, batch, 0.7)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    for key, leaf in leaves.items():
        assert torch.allclose(found[key], leaf.grad, rtol=0, atol=1e-10), key


def test_an_expert_teaches_its_own_domain_alone(methods):
    method, batch = methods.make("LFME"), methods.one_batch(balanced=False)
    given, _ = experts(methods)
    other = {name: value * torch.tensor([1.0, 2.0]).view(2, *[1] * (value.dim() - 1)) for name, value in given.items()}
    change = (method.targets(batch, {"experts": other}) - method.targets(batch, {"experts": given})).abs().amax(1)
    assert set(batch.domains.tolist()) == {0, 1}
    assert torch.equal(change > 0, batch.domains == 1)


def test_a_perfect_expert_is_the_free_lunch(methods):
    """An expert that is sure of every label teaches what the label itself does."""
    batch, params = methods.one_batch(), methods.one_network()
    sure = methods.make("LFME", penalty_weight=2.0)
    sure.targets = lambda batch, state: F.one_hot(batch.labels, 3).double()
    ours, _ = sure.loss(params, batch, {}, {})
    theirs, _ = methods.make("FreeLunch", penalty_weight=2.0).loss(params, batch, {}, {})
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-12)


def test_the_experts_do_not_learn(methods):
    stack = methods.run("LFME")
    before = methods.given("LFME", methods.setup())["experts"]
    assert all(torch.equal(stack.state["experts"][name], value) for name, value in before.items())
    assert set(stack.params) == set(methods.one_network())


def test_both_see_the_same_batches():
    assert ALGORITHMS["LFME"].batches == ALGORITHMS["FreeLunch"].batches == "pooled"
