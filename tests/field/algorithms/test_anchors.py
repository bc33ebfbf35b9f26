"""Methods that draw weights back to an anchor against plain loops with `torch.optim.Adam`, and their limits."""

import pytest
import torch
from torch.nn import functional as F

from engine import Batch, generator
from field.algorithms import ALGORITHMS

MATRICES = [f"layers.{i}.weight" for i in range(4)]
STEPS = 10
RANKED = {
    "ImportanceMixout": "Mixout",
    "PermutedMixout": "Mixout",
    "ImportanceGMixout": "GMixout",
    "PermutedGMixout": "GMixout",
}


class Plain:
    """One network, trained step by step: `set_gradients(this, x, y)`, Adam, `after(this, before)` for what follows."""

    def __init__(self, methods, of, balanced, set_gradients, after=lambda run, before: None):
        self.methods, self.of, self.memory, self.step = methods, of, {}, 0
        self.weights = methods.leaves(methods.one_network(of))
        self.start = {name: value.detach().clone() for name, value in self.weights.items()}
        optimizer = torch.optim.Adam(list(self.weights.values()), lr=0.01)
        for x, y, _ in methods.batches(STEPS, of, (3,), balanced):
            optimizer.zero_grad()
            set_gradients(self, x[0], y[0])
            before = {name: value.detach().clone() for name, value in self.weights.items()}
            optimizer.step()
            with torch.no_grad():
                after(self, before)
            self.step += 1

    def risk(self, x, y, weights=None):
        return F.cross_entropy(self.methods.plain_logits(weights or self.weights, x), y)

    def gradients(self, x, y):
        return dict(zip(self.weights, torch.autograd.grad(self.risk(x, y), self.weights.values()), strict=True))


def mixout(q, decay, period, ranked=None):
    """Gradients and anchor of `Mixout`, by the papers' formula; `ranked`: chances of the tracked matrices."""
    draw, ranked = generator(3, "noise", "test"), ranked or {}

    def gradients(run, x, y):
        anchor = run.memory.setdefault("anchor", dict(run.start))
        fresh = {name: torch.rand(run.start[name].shape, generator=draw).double() for name in MATRICES}
        if run.step % period == 0:
            run.memory["drawn"] = fresh
        mixed = dict(run.weights)
        for name in MATRICES:
            chance, w, a = ranked.get(name, torch.tensor(q, dtype=torch.float64)), run.weights[name], anchor[name]
            m = (run.memory["drawn"][name] < chance).double()
            mixed[name] = (m * w + (1 - m) * a - (1 - chance) * a) / chance
        run.risk(x, y, mixed).backward()

    def after(run, before):
        anchor = run.memory["anchor"]
        run.memory["anchor"] = {name: decay * anchor[name] + (1 - decay) * run.weights[name] for name in MATRICES}

    return gradients, after


def assert_same(ours, plain):
    for key, value in plain.weights.items():
        assert torch.allclose(ours.params[key][0], value, rtol=0, atol=1e-9), key


@pytest.mark.parametrize(
    ("name", "values", "plain"),
    [
        ("Mixout", {"keep": 0.3}, (0.3, 1.0, 1)),
        ("GMixout", {"keep": 0.6, "anchor_decay": 0.8}, (0.6, 0.8, 1)),
        ("GMixout", {"keep": 0.6, "anchor_decay": 0.8, "period": 3}, (0.6, 0.8, 3)),
        ("GMixout", {"keep": 0.5, "anchor_decay": 1.0, "period": 100}, (0.5, 1.0, 100)),  # a fixed mask
    ],
)
def test_resampling_is_that_of_a_plain_loop(methods, name, values, plain):
    of = methods.setup()
    ours = methods.run(name, STEPS, (3,), of, learning_rate=0.01, **values)
    assert_same(ours, Plain(methods, of, False, *mixout(*plain)))


@pytest.mark.parametrize("name", RANKED)
@pytest.mark.parametrize("keep", [0.3, 0.8])
def test_important_weights_are_used_more_often(methods, name, keep):
    of = methods.setup()
    ranks = {key: value[0].double() for key, value in methods.given(name, of, (3,))["ranks"].items()}
    chances = {key: keep + 1.2 * min(keep, 1 - keep) * (rank - 0.5) for key, rank in ranks.items()}  # 2 · 0.6
    ours = methods.run(name, STEPS, (3,), of, learning_rate=0.01, keep=keep, contrast=0.6)
    decay = 0.99 if RANKED[name] == "GMixout" else 1.0
    assert_same(ours, Plain(methods, of, False, *mixout(keep, decay, 1, chances)))


def test_the_chances_have_the_mean_that_is_kept_and_follow_the_rank(methods):
    ranks = torch.linspace(0.005, 0.995, 100, dtype=torch.float64)  # 1/200 … 199/200, as of 100 weights
    for keep in (0.1, 0.5, 0.9):
        for contrast in (-1.0, 0.4, 1.0):
            chances = methods.make("ImportanceMixout", keep=keep, contrast=contrast).chances({"ranks": {"w": ranks}})
            assert chances["w"].mean().item() == pytest.approx(keep, abs=1e-12)
            assert ((chances["w"] > 0) & (chances["w"] < 1)).all()
            assert (chances["w"].diff().sign() == (1 if contrast > 0 else -1)).all()
            assert chances["layers.0.weight"] == keep  # not tracked
    proportional = methods.make("ImportanceMixout", keep=0.3, contrast=1.0).chances({"ranks": {"w": ranks}})
    assert torch.allclose(proportional["w"] / ranks, torch.full_like(ranks, 0.6), rtol=1e-12)


@pytest.mark.parametrize("name", RANKED)
def test_without_contrast_all_weights_are_used_equally_often(methods, name):
    assert methods.same(methods.run(name, contrast=0.0), methods.run(RANKED[name]), 1e-12)
    assert not methods.same(methods.run(name), methods.run(RANKED[name]), 1e-4)


def test_an_anchor_that_does_not_move_is_the_start(methods):
    fixed, moving = methods.run("Mixout"), methods.run("GMixout", anchor_decay=0.5)
    still = methods.run("GMixout", anchor_decay=1.0)
    for name, value in fixed.params.items():
        assert torch.equal(still.params[name], value)
    assert not methods.same(moving, fixed, 1e-5)


def test_the_mean_of_the_resampled_weights_is_the_weights(methods):
    method = methods.make("Mixout", keep=0.25)
    start = methods.one_network()
    state = method.initial_state(start)
    params = {name: value + 0.5 for name, value in start.items()}
    draw, total = generator(0, "test"), {name: torch.zeros_like(value) for name, value in params.items()}
    for _ in range(4000):
        used = method.resampled(params, state, method.draw(draw, 6))
        total = {name: total[name] + used[name] / 4000 for name in total}
    for name, value in params.items():
        bias = name.endswith("bias")  # is not resampled
        assert torch.allclose(total[name], value, rtol=0, atol=1e-9 if bias else 0.06)  # one has deviation 0.5·√3


@pytest.mark.parametrize("name", ["Mixout", "GMixout", "ImportanceMixout"])
def test_prediction_uses_the_weights_themselves(methods, name):
    stack, x = methods.run(name), methods.one_batch().features
    plain = {key: value[0] for key, value in stack.params.items()}
    assert torch.allclose(stack.logits(x)[0], methods.plain_logits(plain, x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["L2SP", "L2SPBalanced"])
def test_the_pull_to_the_start_is_that_of_a_plain_loop(methods, name):
    def gradients(run, x, y):
        far = sum((value - run.start[key]).pow(2).sum() for key, value in run.weights.items())
        (run.risk(x, y) + 0.7 / 2 * far).backward()

    of = methods.setup()
    ours = methods.run(name, STEPS, (3,), of, learning_rate=0.01, pull=0.7)
    assert_same(ours, Plain(methods, of, name == "L2SPBalanced", gradients))


def dsp_reg(run, x, y):
    """Each weight by the variance of its gradient over the domains, relative to the mean over all weights."""
    each = [run.gradients(*rows) for rows in zip(x.chunk(3), y.chunk(3), strict=True)]
    memory = run.memory.setdefault("variance", {name: torch.zeros_like(value) for name, value in run.start.items()})
    for name in memory:
        own = torch.stack([gradient[name] for gradient in each])
        memory[name] = 0.6 * memory[name] + 0.4 * ((own - own.mean(0)) ** 2).sum(0) / 3
    mean = torch.cat([value.flatten() for value in memory.values()]).mean()
    for name, value in run.weights.items():
        average = sum(gradient[name] for gradient in each) / 3
        value.grad = average + 0.7 * memory[name] / mean * (value.detach() - run.start[name])


def test_weights_on_which_domains_disagree_are_pulled_more(methods):
    of = methods.setup(domains=3)
    ours = methods.run("DSPReg", STEPS, (3,), of, learning_rate=0.01, pull=0.7, memory=0.6)
    assert_same(ours, Plain(methods, of, True, dsp_reg))


def moved(methods, name, by=0.1, **values):
    """A method, parameters at an equal distance from the start in every weight, and the state."""
    method, start = methods.make(name, **values), methods.one_network()
    return method, {key: value + by for key, value in start.items()}, method.initial_state(start)


def test_the_mean_strength_is_that_of_the_control(methods):
    """Where all weights are equally far from the start, both penalties are the same."""
    batch, losses = methods.one_batch(), []
    for name in ("DSPReg", "L2SPBalanced", "ERMBalanced"):
        method, params, state = moved(methods, name, **({} if name == "ERMBalanced" else {"pull": 0.7}))
        losses.append(method.gradients(params, batch, state, {})[1].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    assert losses[0] > losses[2]


def test_where_domains_agree_nothing_is_pulled(methods):
    rows = methods.one_batch()
    batch = Batch(torch.cat([rows.features[:6]] * 2), torch.cat([rows.labels[:6]] * 2), rows.domains)
    method, params, state = moved(methods, "DSPReg", pull=1e3)
    found, loss, changes = method.gradients(params, batch, state, {})
    plain, risk, _ = methods.make("ERMBalanced").gradients(params, batch, {}, {})
    assert not changes["variance"].any()
    assert loss.item() == pytest.approx(risk.item(), rel=1e-12)
    assert all(torch.allclose(found[name], value, rtol=0, atol=1e-12) for name, value in plain.items())


def test_selective_projection_is_that_of_a_plain_loop(methods):
    asked = []

    def gradients(run, x, y):
        run.risk(x, y).backward()

    def after(run, before):
        for name, value in run.weights.items():
            was, now = before[name] - run.start[name], value - run.start[name]
            back = float((value.grad * was).sum()) > 0
            asked.append(back)
            if back:
                ratio = min(1.0, max(0.0, float(now.norm() - was.norm()) / float(now.norm())))
                value -= 1.5 * ratio * now

    of = methods.setup()
    plain = Plain(methods, of, False, gradients, after)
    assert any(asked)
    assert not all(asked)
    assert_same(methods.run("SPD", STEPS, (3,), of, learning_rate=0.01, pull=1.5), plain)


def test_a_tensor_that_asks_to_go_back_keeps_its_distance(methods):
    spd = methods.make("SPD", pull=1.0)
    start, old, new = torch.zeros(2), torch.tensor([3.0, 4.0]), torch.tensor([6.0, 8.0])
    back, on = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 0.0])
    assert torch.allclose(spd.projected(start, old, new, back), torch.tensor([3.0, 4.0]))  # norm 10 -> 5
    assert torch.equal(spd.projected(start, old, new, on), new)
    assert torch.equal(spd.projected(start, new, old, back), old)  # it came nearer by itself
    assert torch.equal(spd.projected(start, start, start, back), start)  # not 0/0


def test_what_is_given_is_what_phase_1_makes():
    made = {name: dict(ALGORITHMS[name].phase1) for name in RANKED}
    shuffled = {"ranks": "shuffled_ranks"}
    assert made == {name: shuffled if name.startswith("Permuted") else {"ranks": "ranks"} for name in RANKED}
