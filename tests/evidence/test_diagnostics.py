"""What explains a result, against plain numpy on the files of a small run and against units renamed on purpose."""

import shutil
from dataclasses import replace
from itertools import pairwise, permutations, product

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from scipy.stats import hypergeom

from evidence import domain_overlap, mask_density, seed_stability, zero_importance
from evidence.diagnostics import chance_overlap, hidden_activations, match_units, rename_units, spread_by_chance
from models import FeedforwardClassifier
from study import IMPORTANCE, Study, overlap
from tests.factories import LEARNING, make_run

HIDDEN = (6, 5, 4)
WEIGHTS, MARKED = 6 * 5 + 5 * 4, 30  # tracked; 60 per cent of them
SETTINGS = replace(LEARNING, hidden_sizes=HIDDEN, ph1_learning_rate=1e-2, ph2_num_epochs=1, ph2_freeze_epoch=1)
DYING = (2, 2, 3)  # hidden sizes of which the ReLUs of seed 1 are dead from Phase 1's start on
LAYERS = ((30, 20, 360), (20, 25, 200))  # rows, columns, marked
SEEDS = 4
DOMAINS = ("art", "photo", "sketch")


def trained(data, directory, settings=SETTINGS):
    """A run of which both phases are done."""
    study = Study(make_run(data, directory, SEEDS, settings), [IMPORTANCE])
    study.train()
    return study.run


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    return trained(data, tmp_path_factory.mktemp("diagnostics"))


@pytest.fixture(scope="module")
def failing(data, tmp_path_factory):
    """A run whose Phase 1 networks of seed 1 all failed."""
    return trained(data, tmp_path_factory.mktemp("failing"), replace(SETTINGS, hidden_sizes=DYING))


@pytest.fixture(params=[("run", range(SEEDS)), ("failing", (0, 2, 3))], ids=["complete", "failing"])
def either(request):
    """A run and its valid seeds."""
    name, valid = request.param
    return request.getfixturevalue(name), valid


def on_disk(run, name, kind):
    """Layers of an importance file, read with numpy alone."""
    with np.load(run.results.directory / "importance" / f"{name}.npz", allow_pickle=False) as file:
        return [file[f"{kind}_{i}"] for i in (1, 2)]


def flat(layers, seed):
    return np.concatenate([layer[seed].ravel() for layer in layers])


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


def chance(weights=WEIGHTS, marked=MARKED):
    shared = np.arange(marked + 1)
    return float((hypergeom(weights, marked, marked).pmf(shared) * shared / (2 * marked - shared)).sum())


def random_network(seed, hidden=HIDDEN, size=8, dead=()):
    """Parameters of a network; `dead` names (layer, unit) that never fire."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = FeedforwardClassifier(size, 3, hidden)
    with torch.no_grad():
        for layer in network.layers[:-1]:
            layer.bias += 0.5  # so that no other unit is dead
        for layer, unit in dead:
            network.layers[layer].bias[unit] = -100.0
    return {name: value.detach() for name, value in network.named_parameters()}


def renamed(params, names):
    """The same network with hidden unit `names[i][j]` of the given one as its unit j of layer i."""
    given = [np.arange(params["layers.0.weight"].shape[1]), *names, np.arange(3)]
    new = {}
    for i, (before, after) in enumerate(pairwise(given)):
        new[f"layers.{i}.weight"] = params[f"layers.{i}.weight"][after][:, before]
        new[f"layers.{i}.bias"] = params[f"layers.{i}.bias"][after]
    return new


def images(n=200, seed=3):
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(seed))


def shuffles(seed, hidden=HIDDEN):
    draw = np.random.default_rng(seed)
    return [draw.permutation(width) for width in hidden]


OUTLINE = FeedforwardClassifier.outline(8, 3, HIDDEN)


def activations(params):
    return hidden_activations(OUTLINE, params, images())


def test_hidden_activations_are_those_of_the_written_out_formula():
    params, x = random_network(0), images().double()
    hidden = activations(params)
    activations(random_network(1))  # a second network leaves those of the first alone
    assert [tuple(h.shape) for h in hidden] == [(200, 6), (200, 5), (200, 4)]
    for i, found in enumerate(hidden):
        x = (x @ params[f"layers.{i}.weight"].double().T + params[f"layers.{i}.bias"].double()).clamp(min=0)
        torch.testing.assert_close(found.double(), x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(2))
def test_renamed_units_are_found_and_their_mask_comes_back(seed):
    params, names = random_network(seed), shuffles(seed)
    matches = match_units(activations(params), activations(renamed(params, names)))
    assert [m.tolist() for m in matches] == [np.argsort(n).tolist() for n in names]
    draw = torch.Generator().manual_seed(seed)
    mask_a = [torch.rand(5, 6, generator=draw) < 0.6, torch.rand(4, 5, generator=draw) < 0.6]
    mask_b = [mask_a[i][names[i + 1]][:, names[i]] for i in range(2)]
    assert float(overlap(mask_a, mask_b)) < 1
    back = rename_units(mask_b, matches)
    assert all(torch.equal(x, y) for x, y in zip(back, mask_a, strict=True))
    assert float(overlap(mask_a, back)) == 1


def test_units_are_matched_on_correlation_whatever_their_scale_and_offset():
    x = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    y = torch.stack([1e3 * x[:, 2] + 5, 1e-3 * x[:, 0], x[:, 1], x[:, 3] - 7], dim=1)
    assert match_units([x], [y])[0].tolist() == [1, 2, 0, 3]
    assert match_units([x[:, :2]], [-x[:, :2]])[0].tolist() == [1, 0]  # those that do the opposite are not matched


@pytest.mark.parametrize(
    "dead", [[(0, 2), (1, 4), (2, 0)], [(0, 0), (0, 2), (0, 3), *((2, unit) for unit in range(4))]], ids=["one", "many"]
)
def test_dead_units_take_the_places_that_are_left(dead):
    params, names = random_network(1, dead=dead), shuffles(9)
    a = activations(params)
    matches = match_units(a, activations(renamed(params, names)))
    for i, (match, name) in enumerate(zip(matches, names, strict=True)):
        assert sorted(match) == list(range(HIDDEN[i]))
        gone = (a[i] == 0).all(0)
        assert int(gone.sum()) == sum(layer == i for layer, _ in dead)
        found = slice(None) if gone.sum() <= 1 else ~gone.numpy()  # several dead ones cannot be told apart
        assert match[found].tolist() == np.argsort(name)[found].tolist()


def by_hand(run, domain, seed):
    """Hidden activations of one Phase 1 network on its domain, in numpy."""
    arrays = load_file(run.results.directory / "weights" / f"phase1_{domain}.safetensors")
    x = run.features.features.numpy()[run.features.domains.numpy() == DOMAINS.index(domain)].astype(float)
    hidden = []
    for i in range(3):
        x = np.maximum(x @ arrays[f"final.layers.{i}.weight"][seed].T + arrays[f"final.layers.{i}.bias"][seed], 0)
        hidden.append(x)
    return hidden


def best_matches(x, y):
    """All orders of y's units whose correlations with x's sum to the most: every permutation is tried."""
    x, y = x - x.mean(0), y - y.mean(0)
    lengths = np.outer(np.linalg.norm(x, axis=0), np.linalg.norm(y, axis=0))
    correlation = np.divide(x.T @ y, lengths, out=np.zeros_like(lengths), where=lengths > 1e-6)
    orders = np.array(list(permutations(range(len(correlation)))))
    sums = correlation[np.arange(len(correlation)), orders].sum(1)
    return orders[sums > sums.max() - 1e-5]


def test_seed_stability_by_hand(run):
    table, few, unique = seed_stability(run), seed_stability(run, pairs=2), 0
    assert table.index.tolist() == list(DOMAINS)
    assert table.columns.tolist() == ["pairs", "by_position", "matched", "matched_sd", "renamed", "chance"]
    for domain in DOMAINS:
        masks, low, high, plain = on_disk(run, f"phase1_{domain}", "mask"), [], [], []
        for a in range(SEEDS - 1):
            b = a + 1
            plain.append(iou(flat(masks, a), flat(masks, b)))
            first, second, third = (
                best_matches(x, y) for x, y in zip(by_hand(run, domain, a), by_hand(run, domain, b), strict=True)
            )
            possible = [
                iou(flat(masks, a), np.concatenate([masks[0][b][q][:, p].ravel(), masks[1][b][r][:, q].ravel()]))
                for p, q, r in product(first, second, third)
            ]
            unique += len(possible) == 1
            low.append(min(possible))
            high.append(max(possible))
        row = table.loc[domain]
        assert (row["pairs"], few.loc[domain, "pairs"]) == (SEEDS - 1, 2)
        assert row["by_position"] == pytest.approx(np.mean(plain))
        assert few.loc[domain, "by_position"] == pytest.approx(np.mean(plain[:2]))
        assert np.mean(low) - 1e-9 <= row["matched"] <= np.mean(high) + 1e-9  # dead units leave more than one match
        assert row["chance"] == pytest.approx(chance())
    assert unique >= 3  # or the bounds above say nothing


def test_seed_stability_of_networks_that_differ_in_their_names_only(data, run, tmp_path):
    run = make_run(data, shutil.copytree(run.results.directory, tmp_path / "copy"), SEEDS, SETTINGS)
    for domain in DOMAINS:
        weights, header = run.results.load("weights", f"phase1_{domain}")
        arrays, _ = run.results.load("importance", f"phase1_{domain}")
        original = random_network(5)
        for s, names in enumerate((None, shuffles(1), shuffles(2), shuffles(3))):
            params = original if names is None else renamed(original, names)
            for name, value in params.items():
                weights[f"final.{name}"][s] = value
            for i in (1, 2) if names else ():
                for kind in ("importance", "mask"):
                    arrays[f"{kind}_{i}"][s] = arrays[f"{kind}_{i}"][0][names[i]][:, names[i - 1]]
        for kind, content in (("weights", weights), ("importance", arrays)):
            seeds = content.pop("seeds").tolist()
            run.results.save(kind, f"phase1_{domain}", seeds, content, header)
    table = seed_stability(make_run(data, tmp_path / "copy", SEEDS, SETTINGS))
    assert (table["matched"] == 1).all()
    assert (table["matched_sd"] == 0).all()
    assert (table["renamed"] < 1).all()  # nothing but the names was what agreed
    assert (table["by_position"] < 1).all()


def test_domain_overlap_by_hand(either):
    run, valid = either
    table = domain_overlap(run)
    masks = {domain: on_disk(run, f"phase1_{domain}", "mask") for domain in DOMAINS}
    for a, b in product(DOMAINS, DOMAINS):
        expected = np.mean([iou(flat(masks[a], s), flat(masks[b], s)) for s in valid])
        assert table.loc[a, b] == pytest.approx(expected)
    assert table.loc["art", "photo"] < 1


def test_zero_importance_by_hand(either):
    run, valid = either
    table = zero_importance(run)
    for domain in DOMAINS:
        moved, masks = (on_disk(run, f"phase1_{domain}", kind) for kind in ("importance", "mask"))
        still = {s: flat(moved, s) == 0 for s in valid}
        assert table.loc[domain, "share_zero"] == pytest.approx(np.mean([*still.values()]))
        marked = np.mean([(z & flat(masks, s)).sum() for s, z in still.items()])
        assert table.loc[domain, "marked_zero"] == pytest.approx(marked)
    assert (table["share_zero"] > 0).any()


def test_mask_density_by_hand(run):
    table = mask_density(run)
    for holdout in DOMAINS:
        first, second = on_disk(run, f"holdout_{holdout}", "mask")
        row = table.loc[holdout]
        assert row["overall"] == pytest.approx(MARKED / WEIGHTS)
        assert row["layer 1"] == pytest.approx(first.mean())
        assert row["layer 2"] == pytest.approx(second.mean())
        for axis, name in ((2, "spread of rows"), (1, "spread of columns")):
            spread = [np.mean([m[s].mean(axis - 1).std() for m in (first, second)]) for s in range(SEEDS)]
            assert row[name] == pytest.approx(np.mean(spread))
            assert 0 < row[f"{name}, by chance"] < 0.5


def test_the_spread_by_chance_is_that_of_random_masks():
    """By the hypergeometric variance of a row's marks among those of its layer."""
    first, second = (torch.arange(rows * columns).view(rows, columns) < marked for rows, columns, marked in LAYERS)
    spreads = spread_by_chance([first.expand(500, -1, -1), second.expand(500, -1, -1)], "art")
    for name, axis in (("spread of rows", 1), ("spread of columns", 0)):
        expected = []
        for rows, columns, marked in LAYERS:
            size, count, share = (rows, columns)[axis], rows * columns, marked / (rows * columns)
            expected.append((share * (1 - share) / size * (count - size) / (count - 1)) ** 0.5)
        assert spreads[name] == pytest.approx(np.mean(expected), rel=0.04)


def test_a_failed_network_is_left_out(run, failing):
    assert (seed_stability(failing)["pairs"] == 1).all()  # of seeds 2 and 3
    assert not flat(on_disk(failing, "phase1_art", "mask"), 1).any()
    np.testing.assert_allclose(mask_density(failing)["overall"], 0.6)
    assert (chance_overlap(run), chance_overlap(failing)) == pytest.approx((chance(), chance(10, 6)))
