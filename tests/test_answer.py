"""The answer: what is compared, and what it says on records that were made up."""

from itertools import product

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from answer import (
    LONGER,
    contrasts,
    family_arms,
    scaled,
    seed_averages,
    sweep_arms,
    sweep_table,
)
from answer_report import (
    controls_sentence,
    family_sentence,
    length_sentence,
    overlap_sentence,
    probe_sentence,
    sentences,
)
from config import Settings
from trainer_phase2 import unimportant_rate
from variants import parse_name

HOLDOUTS = ("art", "photo", "sketch")
BASELINES = ("erm", "random", "permuted")
SIX = [
    "importance − erm",
    "importance − random",
    "importance − permuted",
    "importance@phase1 − erm@phase1",
    "importance@phase1 − random@phase1",
    "importance@phase1 − permuted@phase1",
]
ARMS = {f"{name}{start}" for name in ("importance", *BASELINES) for start in ("", "@phase1")}


# --- what is fixed in advance --------------------------------------------------------------------------------


def test_three_times_as_long_is_the_same_schedule_stretched():
    short = Settings.current()
    long = scaled(short, LONGER)
    assert (short.ph2_num_epochs, short.ph2_freeze_epoch, short.ph2_lr_decay_rate) == (10, 7, 0.5)
    assert (long.ph2_num_epochs, long.ph2_freeze_epoch) == (30, 21)
    assert long.ph2_lr_decay_rate == pytest.approx(0.5 ** (1 / 3))
    for epoch in range(10):  # the rates of the defaults: 1e-4 halved each epoch, beside 1e-3, zero from epoch 7 on
        expected = 0.1 * 0.5**epoch if epoch < 7 else 0.0
        assert unimportant_rate(3 * epoch, long) == pytest.approx(expected)
    assert unimportant_rate(20, long) > 0 == unimportant_rate(21, long)
    changed = {k for k, v in long.as_dict().items() if v != short.as_dict()[k]}
    assert changed == {"PH2_NUM_EPOCHS", "PH2_FREEZE_EPOCH", "PH2_LR_DECAY_RATE"}
    assert scaled(short, 1) == short


def test_the_family_compares_importance_and_three_baselines_from_both_starts():
    assert set(family_arms()) == ARMS
    assert len(family_arms()) == 8


def test_the_arms_of_the_sweep_differ_from_the_defaults_in_one_setting_each():
    names, base = sweep_arms(), Settings.current()
    assert names[:4] == ["erm", "random", "permuted", "importance"]
    assert len(set(names)) == len(names) == 4 + 9 + 11 + 7
    values = {}
    for name in names[4:]:
        variant, own = parse_name(name, base)
        assert variant == "importance"
        assert own.ph2_init == "fresh"
        different = {k: v for k, v in own.as_dict().items() if v != base.as_dict()[k]}
        assert len(different) <= 1
        for key, value in different.items():
            values.setdefault(key, set()).add(value)
    assert values == {  # the defaults themselves are the points that differ in nothing
        "IMPORTANCE_THRESHOLD_PERCENTILE": {10, 20, 30, 40, 50, 70, 80, 90},
        "PH2_FREEZE_EPOCH": {0, 1, 2, 3, 4, 5, 6, 8, 9, 10},
        "IMPORTANCE_AGGREGATION": {"mean", "max", "min", "union", "intersection", "normalized_sum"},
    }


# --- on records that were made up ------------------------------------------------------------------------------


def record(algorithm, holdout, seed, value, selection="last"):
    parts = None if value is None else {"full": value, "in": 0.111, "out": 0.222}
    balanced = None if value is None else dict.fromkeys(("full", "in", "out"), 0.333)
    return {
        "algorithm": algorithm,
        "holdout": holdout,
        "seed": seed,
        "selection": selection,
        "accuracy": parts,
        "balanced_accuracy": balanced,
        "failed": "it failed" if value is None else None,
    }


def made_up(offsets, seeds=12, noise=0.001, failed=()):
    """Records in which seeds and holdouts differ widely, but arms of a seed by `offsets` and a little noise only."""
    draw, records = np.random.default_rng(0), []
    level = {(seed, holdout): draw.uniform(0.3, 0.8) for seed in range(seeds) for holdout in HOLDOUTS}
    for name, (seed, holdout) in product(offsets, level):
        value = level[seed, holdout] + offsets[name] + noise * draw.uniform(-1, 1)
        records.append(record(name, holdout, seed, None if (name, holdout, seed) in failed else value))
        records.append(record(name, holdout, seed, 0.05, selection="val"))
    return [records[i] for i in draw.permutation(len(records))]


def test_seed_averages_by_hand():
    values = {("a", 0): (0.1, 0.2, 0.6), ("a", 1): (0.5, 0.5, 0.8), ("b", 0): (0.3, 0.3, 0.0), ("b", 1): (1, 0, None)}
    records = [
        record(name, holdout, seed, value)
        for (name, seed), row in values.items()
        for holdout, value in zip(HOLDOUTS, row, strict=True)
    ]
    records += [record("a", "art", 0, 0.9, selection="val")]
    table = seed_averages(records)
    assert sorted(table.columns) == ["a", "b"]
    assert table.index.tolist() == [0, 1]
    assert table["a"].tolist() == pytest.approx([0.3, 0.6])
    assert table.loc[0, "b"] == pytest.approx(0.2)
    assert np.isnan(table.loc[1, "b"])  # and not the mean of the two that are there


def test_a_missing_holdout_is_as_a_failed_one():
    records = [record("a", h, s, 0.5) for h in HOLDOUTS for s in range(2) if (h, s) != ("photo", 1)]
    table = seed_averages(records)
    assert table.loc[0, "a"] == 0.5
    assert np.isnan(table.loc[1, "a"])


def test_contrasts_are_importance_minus_each_baseline_in_a_fixed_order():
    offsets = {
        "importance": 0.0, "erm": -0.02, "random": 0.03, "permuted": -0.04,
        "importance@phase1": 0.1, "erm@phase1": 0.05, "random@phase1": 0.16, "permuted@phase1": 0.03,
    }  # fmt: skip
    table = contrasts(made_up(offsets))
    assert table["contrast"].tolist() == SIX
    assert table["n"].tolist() == [12] * 6
    expected = [0.02, -0.03, 0.04, 0.05, -0.06, 0.07]
    np.testing.assert_allclose(table["mean"], expected, atol=0.0007)
    assert (table["low"] <= table["mean"]).all()
    assert (table["mean"] <= table["high"]).all()
    assert list(table["verdict"]) == ["helps" if e > 0 else "hurts" for e in expected]
    np.testing.assert_allclose(table["p"], 2 / 2**12)  # all twelve on one side
    np.testing.assert_allclose(table["p_holm"], 6 * 2 / 2**12)


def test_contrasts_by_hand():
    draw = np.random.default_rng(4)
    arms = sorted(ARMS)
    values = dict(zip(arms, draw.uniform(0.4, 0.6, (len(arms), 9, 3)), strict=True))  # seeds × holdouts
    records = [
        record(name, holdout, seed, values[name][seed, h])
        for name in arms
        for seed in range(9)
        for h, holdout in enumerate(HOLDOUTS)
    ]
    table = contrasts(records).set_index("contrast")
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


def test_two_points_better_with_little_noise_helps():
    table = contrasts(made_up({name: 0.02 * name.startswith("importance") for name in ARMS}, noise=0.003))
    assert set(table["verdict"]) == {"helps"}
    assert (table["p_holm"] < 0.05).all()
    lines = sentences(table, 10)
    assert len(lines) == 6
    for line, name in zip(lines, SIX, strict=True):
        assert line.startswith(f"10 epochs, {name}: helps; +")
        assert line.endswith("12 seeds.")


def test_equal_records_make_no_difference():
    table = contrasts(made_up(dict.fromkeys(sorted(ARMS), 0.0), noise=0.0))
    assert (table["p"] == 1).all()
    assert (table["p_holm"] == 1).all()
    assert (table[["mean", "low", "high"]] == 0).all(axis=None)
    assert table["verdict"].str.startswith("no difference").all()
    assert "no difference larger than 0.5 points; +0.00 points [+0.00, +0.00]" in sentences(table, 30)[0]


def test_a_failed_network_leaves_its_seed_out_of_its_contrasts_only():
    failed = {("erm", "photo", 3), ("importance@phase1", "art", 7), ("importance@phase1", "art", 8)}
    table = contrasts(made_up(dict.fromkeys(sorted(ARMS), 0.5), failed=failed))
    assert table["n"].tolist() == [11, 12, 12, 10, 10, 10]


def test_sentences_are_in_points():
    row = {
        "contrast": "importance − erm", "n": 7, "mean": 0.0123, "low": -0.0045, "high": 0.02,
        "p": 0.01, "p_holm": 0.06, "verdict": "undecided",
    }  # fmt: skip
    assert sentences(pd.DataFrame([row]), 5) == [
        "5 epochs, importance − erm: undecided; +1.23 points [-0.45, +2.00], Holm-corrected p = 0.06, 7 seeds."
    ]


def test_the_family_in_a_sentence_counts_verdicts_and_names_what_stands():
    verdicts = ["hurts", "helps", "no difference larger than 0.5 points", "undecided (about 9 seeds would decide)"]
    table = pd.DataFrame({"contrast": list("abcd"), "mean": [-0.1, 0.1, 0.0, 0.0], "verdict": verdicts})
    table["p_holm"] = [0.001, 0.06, 1.0, 1.0]
    assert family_sentence(table, 10) == (
        "At 10 epochs importance masking helps in 1, hurts in 1, makes no difference larger than 0.5 points in 1 and "
        "is undecided in 1 of 4 contrasts; after Holm's correction (p < 0.05) stand: a (below 0)."
    )
    assert family_sentence(table.assign(p_holm=1.0), 10).endswith("stand: none.")


def test_the_other_controls_in_a_sentence():
    names = [f"importance − {name}" for name in ("frozen", "prune", "inverted")]
    table = pd.DataFrame({"contrast": names, "mean": [0.01, -0.02, 0.0], "low": [0.005, -0.03, -0.01]})
    text = controls_sentence(table.assign(high=[0.015, -0.01, 0.01]), 10)
    assert "above frozen (+1.00 [+0.50, +1.50]) and below prune (−2.00 [−3.00, −1.00]);" in text
    assert "inverted" not in text


def test_what_more_training_changes_in_a_sentence():
    held_out = pd.DataFrame({"erm": [-0.01, -0.03], "importance": [0.0, float("nan")]})
    sources = pd.DataFrame({"erm": [0.02, 0.02], "importance": [0.01, 0.03]})
    text = length_sentence(held_out, sources, (10, 30))
    low, high = (f"{x:+.2f}".replace("-", "−") for x in stats.t.interval(0.95, 1, -2, 1))
    assert f"(points): erm −2.00 [{low}, {high}] on the held-out domains, +2.00 [+2.00, +2.00] on the sources'" in text
    assert "importance +0.00 [+nan, +nan] on the held-out domains" in text


def test_overlap_between_starts_in_a_sentence():
    columns = {"by_position": [0.44, 0.46], "matched": [0.5, 0.504], "renamed": [0.4, 0.4], "chance": [0.43, 0.43]}
    assert overlap_sentence(pd.DataFrame(columns)) == (
        "A domain's masks from two starts overlap (IoU) by 0.44 to 0.46 by position and by 0.50 after matching units; "
        "0.40 where the matched units are renamed at random, 0.43 by chance."
    )


def test_the_table_of_the_sweep_knows_settings_and_values_from_names():
    offsets = {
        "erm": 0.0,
        "importance": 0.1,
        "importance[PH2_FREEZE_EPOCH=3]": 0.02,
        "importance[IMPORTANCE_AGGREGATION=normalized_sum]": 0.03,
    }
    records = made_up(offsets, seeds=5, failed={("importance[PH2_FREEZE_EPOCH=3]", "art", 2)})
    table = sweep_table(records).set_index(["algorithm", "setting", "value"])
    assert set(table.index) == {
        ("erm", "", ""),
        ("importance", "", ""),
        ("importance", "PH2_FREEZE_EPOCH", "3"),
        ("importance", "IMPORTANCE_AGGREGATION", "normalized_sum"),
    }
    assert table.loc[("importance", "PH2_FREEZE_EPOCH", "3"), "n"] == 4
    values = [
        np.mean(
            [
                r["accuracy"]["full"]
                for r in records
                if (r["algorithm"], r["seed"], r["selection"]) == ("erm", seed, "last")
            ]
        )
        for seed in range(5)
    ]
    row = table.loc[("erm", "", "")]
    low, high = stats.t.interval(0.95, 4, np.mean(values), stats.sem(values))
    assert row[["n", "mean", "low", "high"]].tolist() == pytest.approx([5, np.mean(values), low, high])


@pytest.mark.parametrize(
    ("full", "place"), [(0.72, "above every network"), (0.68, "not above the best network")], ids=["above", "below"]
)
def test_where_the_probe_stands(full, place):
    probe = pd.DataFrame({"full": [full - 0.1, full + 0.1], "in": [1.0, 1.0], "out": [0.0, 0.0]})
    rows = [("erm", "art", 0.99), ("erm", "average", 0.61), ("erm", "average without hardest", 0.9)]
    rows += [("importance", "art", 0.1), ("importance", "average", 0.7), ("random", "average", float("nan"))]
    text = probe_sentence(probe, {10: pd.DataFrame(rows, columns=["algorithm", "holdout", "mean"])})
    assert text == (
        f"Logistic regression on the same features reaches {100 * full:.1f} %, {place}; "
        "the best network (importance, 10 epochs) has 70.0 %."
    )
