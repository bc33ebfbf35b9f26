"""The contrasts fixed in advance, and what the tables say on made-up records."""

from itertools import product

import numpy as np
import pytest
from scipy import stats

from evidence import FAMILY, OTHERS, family_table, seed_averages, sweep_table
from evidence.contrasts import FAMILY_ARMS, domains_table, others_table
from study import CONTROLS, ERM, IMPORTANCE, Arm
from tests.factories import assert_interval, make_record

FROZEN_FEATURES = CONTROLS.keys() - {"importance", "magnitude", "head"}
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
    others = [Arm(control, start) for start in (None, "phase1") for control in FROZEN_FEATURES]
    assert sorted(baselines, key=str) == sorted(others, key=str)
    assert {(c.arm.control, c.arm.start == c.baseline.start) for c in OTHERS} == {("importance", True)}


def test_seed_averages_by_hand():
    values = {("a", 0): (0.1, 0.2, 0.6), ("a", 1): (0.5, 0.5, 0.8), ("b", 0): (0.3, 0.3, 0.0), ("b", 1): (1, 0, None)}
    values["b", 2] = (0.5, 0.5)  # a holdout is missing
    records = [
        make_record(name, holdout, seed, value)
        for (name, seed), row in values.items()
        for holdout, value in zip(HOLDOUTS, row, strict=False)
    ]
    table = seed_averages([*records, make_record("a", "art", 0, 0.9, selection="val")])
    assert sorted(table.columns) == ["a", "b"]
    assert table.index.tolist() == [0, 1, 2]
    assert table["a"].tolist() == pytest.approx([0.3, 0.6, np.nan], nan_ok=True)
    assert table["b"].tolist() == pytest.approx([0.2, np.nan, np.nan], nan_ok=True)  # and not the mean of two


def test_the_family_by_hand():
    draw = np.random.default_rng(4)
    values = dict(zip(sorted(NAMES), draw.uniform(0.4, 0.6, (len(NAMES), 9, 3)), strict=True))  # seeds × holdouts
    records = [
        make_record(name, holdout, seed, values[name][seed, h])
        for name, seed, (h, holdout) in product(values, range(9), enumerate(HOLDOUTS))
    ]
    table = family_table(records).set_index("contrast")
    assert table.index.tolist() == SIX
    assert table["n"].tolist() == [9] * 6
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
    if better:
        np.testing.assert_allclose(table["mean"], better, atol=0.002)
        np.testing.assert_allclose(table["p"], 2 / 2**12)  # all twelve seeds on one side
        np.testing.assert_allclose(table["p_holm"], 6 * 2 / 2**12)
    else:
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
        assert_interval(table.loc[contrast.name], difference.tolist())
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
    assert_interval(table.loc[("erm", "", "")], seed_averages(records)["erm"].tolist())
