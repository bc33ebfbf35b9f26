"""Gradient methods against short references in plain NumPy: loops over domains, tensors, components.

The references of the projections count in fractions, so they are exact: no inner product is off by rounding.
"""

from fractions import Fraction

import numpy as np
import pytest
import torch

from engine import Batch
from field.algorithms.parts import variance


def whole_numbers(methods, domains=3, seed=0):
    """Made-up gradients of the domains, with many conflicts, ties and zeros: name -> ``[domains, *shape]``."""
    draw = torch.Generator().manual_seed(seed)
    params = methods.one_network()
    return {n: torch.randint(-3, 4, (domains, *v.shape), generator=draw).double() for n, v in params.items()}


def combined(methods, name, each, noise=None, **values):
    """Direction and changes of the state, before the first step."""
    method = methods.make(name, methods.setup(domains=len(each["layers.0.bias"])), **values)
    noise = noise or method.draw(torch.Generator().manual_seed(0), 6)
    return method.combined(each, method.initial_state(methods.one_network()), noise)


def exact(tensor):
    return np.vectorize(Fraction, otypes=[object])(tensor.numpy())


def cosine(a, b, inner):
    return abs(float(inner)) / (float((a * a).sum()) * float((b * b).sum())) ** 0.5


def corgrad(each, n_parts, alpha):
    """One tensor, ``[domains, units, …]``: direction, number of tests, |cosines| of the conflicts."""
    g, tests, cosines = exact(each), 0, []
    for i in range(len(g)):
        for rows in torch.arange(g.shape[1]).chunk(n_parts):
            for p in range(len(g)):
                if p == i:
                    continue
                mine, other = g[i][rows.numpy()], g[p][rows.numpy()]
                inner, tests = (mine * other).sum(), tests + 1
                if inner < 0:
                    cosines.append(cosine(mine, other, inner))
                    g[i][rows.numpy()] = mine - inner / (other * other).sum() * other
    g = g.astype(float)
    norms = np.array([np.sqrt((part**2).sum()) for part in g])
    far = [i for i in range(len(g)) if abs(norms[i] - norms.mean()) > norms.std() * (1 + 1e-12)]
    near = np.mean([g[i] for i in range(len(g)) if i not in far], axis=0)
    for i in far:
        g[i] = alpha * g[i] + (1 - alpha) * near
    return g.sum(0), tests, cosines


@pytest.mark.parametrize("domains", [2, 3, 4])
@pytest.mark.parametrize(("n_parts", "alpha"), [(1, 1.0), (2, 0.6), (4, 0.0), (10, 1.0)])
def test_corgrad_is_the_reference(methods, domains, n_parts, alpha):
    for seed in range(3):
        each = whole_numbers(methods, domains, seed)
        direction, changes = combined(methods, "CorGrad", each, n_parts=n_parts, alpha=alpha)
        for column, (name, g) in enumerate(each.items()):
            expected, tests, cosines = corgrad(g, n_parts, alpha)
            assert np.allclose(direction[name], expected, rtol=0, atol=1e-12), name
            assert changes["conflict_rate"][0, column] == pytest.approx(len(cosines) / tests, abs=1e-12)
            strength = np.mean(cosines) if cosines else 0
            assert changes["conflict_strength"][0, column] == pytest.approx(strength, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rounding_is_no_conflict(methods, dtype):
    # of chunks of one number nothing is left after projection but rounding, of either sign
    draw = torch.Generator().manual_seed(0)
    sizes = {name: (2, *value.shape) for name, value in methods.one_network().items()}
    each = {name: torch.rand(size, generator=draw).to(dtype) + 0.1 for name, size in sizes.items()}
    each = {name: torch.stack([g[0], -g[1]]) for name, g in each.items()}
    direction, changes = combined(methods, "CorGrad", each)
    for column, (name, g) in enumerate(each.items()):
        if g.dim() == 2:  # a bias: every unit is its own chunk
            assert torch.allclose(direction[name], g[1], rtol=1e-5, atol=0)
            assert changes["conflict_rate"][0, column] == 0.5
            assert changes["conflict_strength"][0, column] == pytest.approx(1, abs=1e-6)


def test_pcgrad_is_the_reference(methods):
    for seed in range(5):
        domains, each = 4, whole_numbers(methods, 4, seed)
        noise = methods.make("PCGrad", methods.setup(domains=4)).draw(torch.Generator().manual_seed(seed), 24)
        direction, changes = combined(methods, "PCGrad", each, noise)
        tensors = [exact(g).reshape(domains, -1) for g in each.values()]
        ends = np.cumsum([0] + [t.shape[1] for t in tensors])
        original = np.concatenate(tensors, axis=1)
        total, cosines, tests = 0, [[] for _ in tensors], 0
        for i in range(domains):
            mine = original[i]
            for j in noise["order"][i].tolist():
                other, tests = original[j], tests + 1
                for t, found in enumerate(cosines):
                    a, b = mine[ends[t] : ends[t + 1]], other[ends[t] : ends[t + 1]]
                    if (a * b).sum() < 0:
                        found.append(cosine(a, b, (a * b).sum()))
                if (mine * other).sum() < 0:
                    mine = mine - (mine * other).sum() / (other * other).sum() * other
            total = total + mine
        flat = torch.cat([value.flatten() for value in direction.values()])
        assert np.allclose(flat, total.astype(float), rtol=0, atol=1e-11)
        assert np.allclose(changes["conflict_rate"][0], [len(found) / tests for found in cosines], rtol=0, atol=1e-12)
        strengths = [np.mean(found) if found else 0 for found in cosines]
        assert np.allclose(changes["conflict_strength"][0], strengths, rtol=0, atol=1e-11)


def test_two_opposite_gradients_tell_the_projections_apart(methods):
    g = {name: value[0] for name, value in whole_numbers(methods).items()}
    each = {name: torch.stack([value, -value]) for name, value in g.items()}
    pcgrad, _ = combined(methods, "PCGrad", each)
    corgrad, changes = combined(methods, "CorGrad", each, n_parts=1)
    for name, value in g.items():
        assert torch.allclose(pcgrad[name], torch.zeros_like(value), rtol=0, atol=1e-12)
        assert torch.allclose(corgrad[name], -value, rtol=0, atol=1e-12)  # the second domain's, whole
    assert torch.equal(changes["conflict_rate"][0], torch.full((8,), 0.5).double())
    assert torch.allclose(changes["conflict_strength"][0], torch.ones(8).double())
    assert (changes["conflict_rate"][1:] == 0).all()


@pytest.mark.parametrize("name", ["CorGrad", "PCGrad", "AgrSum", "AgrRand"])
def test_without_conflict_the_direction_is_the_sum(methods, name):
    each = {key: g.abs() + 1 for key, g in whole_numbers(methods).items()}
    direction, changes = combined(methods, name, each)
    for key, g in each.items():
        assert torch.equal(direction[key], g.sum(0))
    assert not any(value.any() for value in changes.values())


def test_agreement_is_the_reference(methods):
    each = whole_numbers(methods)
    each["layers.1.weight"][:, 2] = 0  # a dead unit: no noise there
    noise = {n: v.double() for n, v in methods.make("AgrRand").draw(torch.Generator().manual_seed(1), 18).items()}
    zeroed, _ = combined(methods, "AgrSum", each)
    random, _ = combined(methods, "AgrRand", each, noise)
    sums, places = {}, []
    for name, g in each.items():
        g = g.numpy()
        for place in np.ndindex(g.shape[1:]):
            values = [g[(d, *place)] for d in range(3)]
            places.append((name, place))
            if all(v > 0 for v in values) or all(v < 0 for v in values) or all(v == 0 for v in values):
                sums[name, place] = sum(values)
    scale = np.mean([abs(value) for value in sums.values() if value != 0])
    assert 0 < len(sums) < len(places)
    assert 0 in sums.values()
    for name, place in places:
        assert zeroed[name][place] == sums.get((name, place), 0)
        assert random[name][place] == pytest.approx(sums.get((name, place), scale * float(noise[name][place])))


def test_agr_rand_has_no_scale_where_nothing_agrees(methods):
    each = {name: torch.stack([g[0].abs() + 1, -g[0].abs() - 1]) for name, g in whole_numbers(methods).items()}
    direction, _ = combined(methods, "AgrRand", each)
    assert all((value == 0).all() for value in direction.values())


@pytest.mark.parametrize(
    ("name", "values"),
    [("ANDMask", {"tau": 1.0}), ("ANDMask", {"tau": 0.5}), ("SANDMask", {"k": 0.7}), ("SANDMask", {"tau": 0.1})],
)
def test_masks_are_the_reference(methods, name, values):
    each, method = whole_numbers(methods, 4), methods.make(name, **values)
    direction, _ = combined(methods, name, each, **values)
    for key, g in each.items():
        g = g.numpy()
        masks, means = np.zeros(g.shape[1:]), np.zeros(g.shape[1:])
        for place in np.ndindex(g.shape[1:]):
            column = g[(slice(None), *place)]
            sign, means[place] = abs(np.sign(column).sum()) / 4, column.mean()
            if name == "ANDMask":
                masks[place] = sign >= method.tau
            elif sign > method.tau:
                variance = ((column - column.mean()) ** 2).sum() / 3
                masks[place] = np.tanh(method.k * (sign - method.tau) / variance) if variance else 1
        expected = masks * means / (1e-10 + masks.mean())
        assert np.allclose(direction[key], expected, rtol=1e-12, atol=0), key


def test_sand_mask_learns_nothing_at_the_originals_threshold(methods):
    direction, _ = combined(methods, "SANDMask", whole_numbers(methods), tau=1.0)
    assert all((value == 0).all() for value in direction.values())


def test_conflicts_are_counted_per_epoch(methods):
    setup = methods.setup(domains=2, steps_per_epoch=3, epochs=2)
    method, params = methods.make("CorGrad", setup, n_parts=2, learning_rate=0.05), methods.one_network(setup)
    assert tuple(method.shapes) == tuple(params)
    state = method.initial_state(params)
    found = [[[] for _ in params] for _ in range(2)]
    tests = np.zeros((2, len(params)))
    for step, (x, labels, domains) in enumerate(methods.batches(6, setup, (3,))):
        batch = Batch(2 * x[0] - 3, labels[0], domains[0])
        each, losses = method.domain_gradients(params, batch)
        for column, name in enumerate(params):
            _, number, cosines = corgrad(each[name], 2, 1.0)
            found[step // 3][column] += cosines
            tests[step // 3, column] += number
        params, state, loss = method.update(params, batch, state, {})
        assert torch.allclose(loss, losses.mean())
    rates = np.array([[len(cosines) for cosines in row] for row in found]) / tests
    strengths = np.array([[np.mean(cosines) if cosines else 0 for cosines in row] for row in found])
    assert 0 < rates.mean() < 0.5
    assert (rates[0] != rates[1]).any()
    assert np.allclose(state["conflict_rate"], rates, rtol=0, atol=1e-9)
    assert np.allclose(state["conflict_strength"], strengths, rtol=0, atol=1e-7)


def test_pcgrad_draws_every_order_of_the_others(methods):
    method, draw = methods.make("PCGrad", methods.setup(domains=3)), torch.Generator().manual_seed(0)
    orders = [method.draw(draw, 18)["order"] for _ in range(50)]
    for i in range(3):
        others = [j for j in range(3) if j != i]
        assert {tuple(order[i].tolist()) for order in orders} == {tuple(others), tuple(reversed(others))}


@pytest.mark.parametrize(("dim", "correction"), [(0, 0), (0, 1), (1, 0)])
def test_the_variance_is_that_of_torch_and_exactly_zero_where_all_are_equal(dim, correction):
    values = torch.randn(3, 4, 5) + 1000
    torch.testing.assert_close(variance(values, dim, correction), values.var(dim, correction=correction))
    assert not variance(torch.full((3, 2), 0.1)).any()
