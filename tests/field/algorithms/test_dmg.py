"""Masks per domain against a plain loop with PyTorch's own optimizers, hand-computed overlaps, and the limit ERM."""

from itertools import combinations

import pytest
import torch
from torch.nn import functional as F

from config import InputError
from engine import generator
from field.algorithms.dmg import mean_overlap, soft_iou


@pytest.fixture
def three(methods):
    """Three pairs of domains: a sum of overlaps is not their mean."""
    return methods.setup(domains=3)


class Keep(torch.autograd.Function):
    """The straight-through estimator, written out."""

    @staticmethod
    def forward(ctx, p, u):
        return torch.where(u < p, 1.0, 0.0).to(p.dtype)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def plain_loss(params, x, labels, domains, u, overlap_weight, sparsity_weight):
    """One image after the other, one layer after the other."""
    layers = range(4)
    losses = []
    for row, label, domain, numbers in zip(x, labels, domains, u, strict=True):
        used = 0
        for i in layers:
            mask = Keep.apply(params[f"masks.{i}"][domain].sigmoid(), numbers[used : used + len(row)])
            used += len(row)
            row = params[f"layers.{i}.weight"] @ (row * mask) + params[f"layers.{i}.bias"]
            row = row if i == layers[-1] else row.relu()
        losses.append(F.cross_entropy(row, label))
    loss = torch.stack(losses).mean()
    for i in layers:
        p = params[f"masks.{i}"].sigmoid()
        for a, b in combinations(range(3), 2):
            both, either = (p[a] * p[b]).sum(), (p[a] + p[b] - p[a] * p[b]).sum()
            loss = loss + overlap_weight / 3 * (both + 1e-6) / (either + 1e-6)
        loss = loss + sparsity_weight * p.sum()
    return loss


def test_training_is_a_plain_loop_with_two_optimizers_of_torch(methods, three):
    values = {"overlap_weight": 0.7, "sparsity_weight": 0.02, "mask_learning_rate": 0.02, "initial": "random_uniform"}
    values |= {"weight_decay": 0.1, "mask_weight_decay": 0.3, "learning_rate": 0.01}
    found = methods.run("DMG", 5, (3,), three, **values)

    draw = generator(3, "noise", "test")
    leaves = methods.one_network(three)
    for i, width in enumerate((8, 6, 5, 4)):
        leaves[f"masks.{i}"] = torch.rand(3, width, generator=draw).double()
    leaves = methods.leaves(leaves)
    masks = [value for name, value in leaves.items() if name.startswith("masks.")]
    layers = [value for name, value in leaves.items() if name.startswith("layers.")]
    optimizers = torch.optim.Adam(layers, 0.01, weight_decay=0.1), torch.optim.Adam(masks, 0.02, weight_decay=0.3)
    for x, labels, domains in methods.batches(5, three, (3,), balanced=False):
        u = torch.rand(6, 8 + 6 + 5 + 4, generator=draw).double()
        for optimizer in optimizers:
            optimizer.zero_grad()
        plain_loss(leaves, x[0], labels[0], domains[0], u, 0.7, 0.02).backward()
        for optimizer in optimizers:
            optimizer.step()
    for name, value in leaves.items():
        assert torch.allclose(found.params[name][0], value, rtol=0, atol=1e-9), name


def test_masks_learn_by_default(methods, three):
    assert (methods.run("DMG", 5, of=three).params["masks.0"] != 3).all()


def test_prediction_is_the_mean_over_domains_of_the_soft_masks(methods, three):
    algorithm, params, x = methods.make("DMG", three), methods.one_network(three), methods.one_batch(three).features
    for i, width in enumerate((8, 6, 5, 4)):
        params[f"masks.{i}"] = torch.randn(3, width, generator=generator(0, "test", str(i))).double()
    expected = torch.zeros(len(x), 3, dtype=torch.float64)
    for domain in range(3):
        values = x
        for i in range(4):
            values = values / (1 + torch.exp(-params[f"masks.{i}"][domain]))
            values = values @ params[f"layers.{i}.weight"].T + params[f"layers.{i}.bias"]
            values = values.clamp(min=0) if i < 3 else values
        expected += values / 3
    assert torch.allclose(algorithm.logits(params, {}, x), expected, rtol=0, atol=1e-12)


def test_soft_iou_by_hand():
    a, b = torch.tensor([1.0, 0.5, 0.0]).double(), torch.tensor([0.5, 0.5, 1.0]).double()
    assert soft_iou(a, b).item() == pytest.approx(0.75 / (1 + 0.75 + 1), abs=1e-6)  # 0.5 + 0.25 + 0 over the union
    hard = torch.tensor([1.0, 0.0, 1.0, 1.0]).double()
    assert soft_iou(hard, hard).item() == 1
    assert soft_iou(hard, 1 - hard).item() == pytest.approx(0, abs=1e-6)
    closed = torch.zeros(4).double().requires_grad_()
    assert soft_iou(closed, closed).item() == 1
    assert torch.autograd.grad(soft_iou(closed, closed), closed)[0].isfinite().all()


def test_overlap_is_a_mean_over_pairs():
    p = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0]]).double()
    assert mean_overlap(p).item() == pytest.approx((1 + 1 / 3 + 1 / 3) / 3, abs=1e-6)
    assert mean_overlap(p[:1]).item() == 0  # a single domain overlaps with none


def test_one_domain_has_masks_too(methods):
    assert all(v.isfinite().all() for v in methods.run("DMG", 3, of=methods.setup(domains=1)).params.values())


def test_an_unknown_start_is_refused(methods):
    with pytest.raises(InputError, match="`initial` of DMG"):
        methods.run("DMG", 1, initial="random")
