"""A stack of pure functions: each network has its own noise, state and validation, whatever is beside it."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from config import Settings
from engine import BatchOrder, FunctionalEngine, Validation, generator, train
from tests.factories import split_blobs

SEEDS = (3, 4, 5)


class Descent:
    """Gradient descent of a linear classifier on noisy features; its temperature, a scalar, is trained too."""

    setup = SimpleNamespace(steps_per_epoch=4)
    validate_every = 0.5

    def extra_parameters(self, draw):
        return {"temperature": 1 + torch.rand((), generator=draw)}

    def initial_state(self, params):
        zero = torch.zeros((), dtype=torch.float64)
        return {"validations": torch.zeros((), dtype=torch.long), "loss": zero, "domains": torch.zeros(4).long()}

    def begin(self, params, state):
        return {**params, "weight": params["weight"] * state["kept"]}

    def draw(self, draw, rows):
        return {"features": torch.randn(rows, 8, generator=draw)}

    def update(self, params, batch, state, noise):
        def loss(p):
            return F.cross_entropy(self.forward(p, batch.features + noise["features"]), batch.labels)

        gradient, value = torch.func.grad_and_value(loss)(params)
        new = {name: parameter - 0.1 * gradient[name] for name, parameter in params.items()}
        return new, {**state, "domains": batch.domains[:4]}, value

    def validated(self, params, state, loss):
        return {"validations": state["validations"] + 1, "loss": loss}

    def forward(self, params, features):
        return features @ params["weight"].T / params["temperature"]

    def logits(self, params, state, features):
        return self.forward(params, features)


def engine(seeds, rows=None):
    """A stack before its first step; domains 0 and 2 are the sources."""
    draw = {seed: generator(seed, "test") for seed in seeds}
    weight = torch.stack([torch.randn(3, 8, generator=draw[seed]) for seed in seeds]).double()
    kept = torch.stack([torch.rand(3, 8, generator=draw[seed]) < 0.5 for seed in seeds])
    x = torch.randn(9, 8, generator=generator(0, "test")).double()
    own = [torch.randperm(9, generator=draw[seed])[:6] for seed in seeds]
    validation = Validation(x, torch.arange(9) % 3, torch.stack(own) if rows is None else rows.expand(len(seeds), -1))
    noise = [generator(seed, "noise", "test") for seed in seeds]
    methods = [Descent() for _ in seeds]
    return FunctionalEngine(methods, {"weight": weight}, noise, (0, 2), validation, given={"kept": kept})


def step(stack, seeds, number=0, rates=None):
    draws = [generator(seed, "batch", str(number)) for seed in seeds]
    x = torch.stack([torch.randn(5, 8, generator=draw) for draw in draws]).double()
    labels, domains = torch.arange(5) % 3, 2 * (torch.arange(5) % 2)
    return stack.step(x, labels.expand(len(seeds), -1), rates or {}, domains.expand(len(seeds), -1))


def test_a_stack_equals_single_networks():
    stack, singles = engine(SEEDS), [engine([seed]) for seed in SEEDS]
    for number in range(8):
        losses, right = step(stack, SEEDS, number)
        assert torch.allclose(losses, torch.cat([step(s, [n], number)[0] for s, n in zip(singles, SEEDS, strict=True)]))
        assert right.isnan().all()  # not counted
    for s, single in enumerate(singles):
        for name, value in stack.params.items():
            assert torch.allclose(value[s], single.params[name][0], rtol=0, atol=1e-12), name
        assert torch.allclose(stack.state["loss"][s], single.state["loss"][0], rtol=0, atol=1e-12)
    assert stack.shape == (3,)
    assert (stack.params["weight"][0] != stack.params["weight"][1]).any()


@pytest.mark.parametrize("rows", [None, torch.arange(4)], ids=["own rows", "shared rows"])
def test_validation_is_on_the_rows_of_the_seed_every_half_epoch(rows):
    stack = engine(SEEDS, rows)
    for number in range(5):
        step(stack, SEEDS, number)
        assert (stack.state["validations"] == (number + 1) // 2).all()
        if number % 2:
            x, labels, own = stack.validation
            for s in range(3):
                params = {name: value[s] for name, value in stack.params.items()}
                wanted = F.cross_entropy(Descent().forward(params, x[own[s]]), labels[own[s]])
                assert torch.allclose(stack.state["loss"][s], wanted, rtol=0, atol=1e-12)


def test_the_state_is_given_domains_are_numbered_among_the_sources_and_rates_are_refused():
    stack = engine(SEEDS)
    assert (stack.params["weight"][~stack.state["kept"]] == 0).all()
    step(stack, SEEDS)
    assert (stack.state["domains"] == torch.tensor([0, 1, 0, 1])).all()
    assert stack.steps_taken == 1
    with pytest.raises(ValueError, match="`rates`"):
        step(stack, SEEDS, rates={"weight": torch.ones(3, 8)})


def test_rows_are_classified_in_pieces_as_all_at_once():
    stack, x = engine(SEEDS), torch.randn(10, 8, generator=generator(1, "test")).double()
    labels = torch.arange(10) % 3
    whole = stack.right(x, labels)
    assert torch.equal(whole, stack.logits(x).argmax(-1) == labels)
    parts = [stack.right(*pair) for pair in zip(x.split(4), labels.split(4), strict=True)]
    assert torch.equal(torch.cat(parts, dim=1), whole)


def test_the_one_loop_trains_it_with_a_scalar_parameter():
    settings = Settings.current(batch_size=16)
    data, stack = split_blobs(settings=settings), engine(SEEDS)
    order = BatchOrder(SEEDS, "test", data.rows(["art", "sketch"], "in", SEEDS), settings.batch_size)
    trained = train(data, stack, SEEDS, order, 3)
    assert trained.params["temperature"].shape == (3,)
    assert trained.correct.shape == (3, 3, *data.cell_shape)
    assert (trained.loss[:, -1] < trained.loss[:, 0]).all()
    assert trained.failed.tolist() == [0, 0, 0]
