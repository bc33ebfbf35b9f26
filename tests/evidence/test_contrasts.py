"""The contrasts fixed in advance, and what the tables say on made-up records."""

from itertools import product

import numpy as np
import pytest
from scipy import stats

from evidence import FAMILY, OTHERS, family_table, seed_averages, sweep_table
from evidence.contrasts import FAMILY_ARMS, domains_table, others_table
from study import CONTROLS, ERM, IMPORTANCE, Arm
from tests.factories import make_record

HOLDOUTS = ("art", "photo", "sketch")
SIX = [
    "importance − erm",
    "importance − random",
    "importance − permuted",
    "importance@phase1 − erm@phase1",
    "importance@phase1 − random@phase1",
    "importance@phase1 − permuted@phase1",
]
NAMES = [arm.name for arm in FAMILY_ARMS]


def made_up(offsets, seeds=12, noise=0.001, failed=()):
    """Records in which seeds and holdouts differ widely, but arms of a seed by `offsets` and a little noise only."""
    draw, records = np.random.default_rng(0), []
    level = {(seed, holdout): draw.uniform(0.3, 0.8) for seed in range(seeds) for holdout in HOLDOUTS}
    for name, (seed, holdout) in product(offsets, level):
        value = level[seed, holdout] + offsets[name] + noise * draw.uniform(-1, 1)
        records.append(make_record(name, holdout, seed, None if (name, holdout, seed) in failed else value))
        records.append(make_record(name, holdout, seed, 0.05, selection="val"))
    return [records[i] for i in draw.permutation(len(records))]


def test_the_family_compares_importance_with_three_baselines_from_both_starts():
    assert [contrast.name for contrast in FAMILY] == SIX
    controls = ("importance", "erm", "random", "permuted")
    assert list(FAMILY_ARMS) == [Arm(control, start) for start in (None, "phase1") for control in controls]


def test_every_other_control_is_compared_outside_the_family():
    baselines = [contrast.baseline for contrast in (*FAMILY, *OTHERS)]
    others = [Arm(control, start) for start in (None, "phase1") for control in CONTROLS if control != "importance"]
    assert sorted(baselines, key=str) == sorted(others, key=str)
    assert {(c.arm.control, c.arm.start == c.baseline.start) for c in OTHERS} == {("importance", True)}


def test_seed_averages_by_hand():
    values = {("a", 0): (0.1, 0.2, 0.6), ("a", 1): (0.5, 0.5, 0.8), ("b", 0): (0.3, 0.3, 0.0), ("b", 1): (1, 0, None)}
    records = [
        make_record(name, holdout, seed, value)
        for (name, seed), row in values.items()
        for holdout, value in zip(HOLDOUTS, row, strict=True)
    ]
    records += [make_record("a", "art", 0, 0.9, selection="val")]
    table = seed_averages(records)
    assert sorted(table.columns) == ["a", "b"]
    assert table.index.tolist() == [0, 1]
    assert table["a"].tolist() == pytest.approx([0.3, 0.6])
    assert table.loc[0, "b"] == pytest.approx(0.2)
    assert np.isnan(table.loc[1, "b"])  # and not the mean of the two that are there


def test_a_missing_holdout_is_as_a_failed_one():
    records = [make_record("a", h, s, 0.5) for h in HOLDOUTS for s in range(2) if (h, s) != ("photo", 1)]
    table = seed_averages(records)
    assert table.loc[0, "a"] == 0.5
    assert np.isnan(table.loc[1, "a"])


def test_the_family_is_importance_minus_each_baseline_in_a_fixed_order():
    offsets = {
        "importance": 0.0, "erm": -0.02, "random": 0.03, "permuted": -0.04,
        "importance@phase1": 0.1, "erm@phase1": 0.05, "random@phase1": 0.16, "permuted@phase1": 0.03,
    }  # fmt: skip
    table = family_table(made_up(offsets))
    assert table["contrast"].tolist() == SIX
    assert table["n"].tolist() == [12] * 6
    expected = [0.02, -0.03, 0.04, 0.05, -0.06, 0.07]
    np.testing.assert_allclose(table["mean"], expected, atol=0.0007)
    assert (table["low"] <= table["mean"]).all()
    assert (table["mean"] <= table["high"]).all()
    assert list(table["verdict"]) == ["helps" if e > 0 else "hurts" for e in expected]
    np.testing.assert_allclose(table["p"], 2 / 2**12)  # all twelve on one side
    np.testing.assert_allclose(table["p_holm"], 6 * 2 / 2**12)


def test_the_family_by_hand():
    draw = np.random.default_rng(4)
    arms = sorted(NAMES)
    values = dict(zip(arms, draw.uniform(0.4, 0.6, (len(arms), 9, 3)), strict=True))  # seeds × holdouts
    records = [
        make_record(name, holdout, seed, values[name][seed, h])
        for name in arms
        for seed in range(9)
        for h, holdout in enumerate(HOLDOUTS)
    ]
    table = family_table(records).set_index("contrast")
    p = []
    for name in SIX:
        better, worse = name.split(" − ")
        difference = (values[better] - values[worse]).mean(1)
        p.append(stats.wilcoxon(difference, method="exact").pvalue)
        assert table.loc[name, "mean"] == pytest.approx(difference.mean())
        assert table.loc[name, "p"] == pytest.approx(p[-1])
    largest = 0.0
    for rank, i in enumerate(np.argsort(p)):  # Holm
        largest = min(1.0, max(largest, (6 - rank) * p[i]))
        assert table["p_holm"].iloc[i] == pytest.approx(largest)


@pytest.mark.parametrize(
    ("better", "noise", "verdict"), [(0.02, 0.003, "helps"), (0.0, 0.0, "no difference larger than 0.5 points")]
)
def test_verdicts_of_planted_differences(better, noise, verdict):
    table = family_table(made_up({name: better * name.startswith("importance") for name in NAMES}, noise=noise))
    assert set(table["verdict"]) == {verdict}
    assert (table["p_holm"] < 0.05).all() == (better > 0)
    if not noise:
        assert (table[["p", "p_holm"]] == 1).all(axis=None)
        assert (table[["mean", "low", "high"]] == 0).all(axis=None)


def test_a_failed_network_leaves_its_seed_out_of_its_contrasts_only():
    failed = {("erm", "photo", 3), ("importance@phase1", "art", 7), ("importance@phase1", "art", 8)}
    records = made_up(dict.fromkeys(sorted(NAMES), 0.1), failed=failed)
    assert family_table(records)["n"].tolist() == [11, 12, 12, 10, 10, 10]
    table = domains_table(records, 5).set_index(["contrast", "holdout"])
    assert set(table["epochs"]) == {5}
    assert len(table) == 6 * len(HOLDOUTS)
    assert table["n"].sum() == 6 * 3 * 12 - 1 - 3 * 2
    assert table.loc[("importance − erm", "photo"), "n"] == 11
    assert table.loc[("importance@phase1 − erm@phase1", "photo"), "n"] == 12


def test_other_controls_are_measured_by_t_intervals():
    arms = dict.fromkeys(arm.name for contrast in OTHERS for arm in contrast)
    records = made_up(dict.fromkeys(arms, 0.0), seeds=6, noise=0.02, failed={("prune", "art", 2)})
    table, averages = others_table(records).set_index("contrast"), seed_averages(records)
    assert table.index.tolist() == [contrast.name for contrast in OTHERS]
    for contrast in OTHERS:
        difference = (averages[contrast.arm.name] - averages[contrast.baseline.name]).dropna()
        n, mean = len(difference), difference.mean()
        expected = [n, mean, *stats.t.interval(0.95, n - 1, mean, stats.sem(difference))]
        assert table.loc[contrast.name].tolist() == pytest.approx(expected)
    assert table.loc["importance − prune", "n"] == 5


def test_the_table_of_the_sweep_names_what_each_arm_changes():
    frozen = Arm("importance", None, {"PH2_FREEZE_EPOCH": 3})
    normalized = Arm("importance", None, {"IMPORTANCE_AGGREGATION": "normalized_sum"})
    arms = (ERM, IMPORTANCE, frozen, normalized)
    records = made_up({arm.name: i / 100 for i, arm in enumerate(arms)}, seeds=5, failed={(frozen.name, "art", 2)})
    table = sweep_table(records, arms).set_index(["algorithm", "setting", "value"])
    assert table.index.tolist() == [
        ("erm", "", ""),
        ("importance", "", ""),
        ("importance", "PH2_FREEZE_EPOCH", "3"),
        ("importance", "IMPORTANCE_AGGREGATION", "normalized_sum"),
    ]
    assert table["n"].tolist() == [5, 5, 4, 5]
    averages = {}
    for r in records:
        if (r["algorithm"], r["selection"]) == ("erm", "last"):
            averages.setdefault(r["seed"], []).append(r["accuracy"]["full"])
    values = np.mean([averages[seed] for seed in range(5)], axis=1)
    expected = [5, values.mean(), *stats.t.interval(0.95, 4, values.mean(), stats.sem(values))]
    assert table.loc[("erm", "", "")].tolist() == pytest.approx(expected)
