"""Tables, intervals, paired differences and the report, against scipy and cases worked out by hand."""

import math
import re

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from sklearn.metrics import confusion_matrix

from config import Settings
from evaluation import (
    AVERAGE,
    WITHOUT_HARDEST,
    accuracy_table,
    confusion,
    finding,
    levels,
    lodo_table,
    overlap_table,
    paired_differences,
    report,
    statistics_table,
    t_interval,
    wide_table,
)
from models import FeedforwardClassifier
from training import Problem


def make_record(algorithm, holdout, seed, accuracy, selection="last"):
    """As `Study` makes them; the other parts and the balanced accuracy are shifted, so that a mix-up shows."""

    def shifted(by):
        return {"full": accuracy + by, "in": accuracy + by + 0.01, "out": accuracy + by - 0.02}

    return {
        "key": f"{algorithm}/{holdout}/{seed}/{selection}",
        "algorithm": algorithm,
        "dataset": "toy",
        "features": "abc",
        "holdout": holdout,
        "seed": seed,
        "selection": selection,
        "settings": "123",
        "accuracy": None if accuracy is None else shifted(0),
        "balanced_accuracy": None if accuracy is None else shifted(-0.05),
        "epoch": None if accuracy is None else 10,
        "failed": "the loss is no longer finite in epoch 2" if accuracy is None else None,
    }


def make_records(table, selections=("last",)):
    """From {algorithm: {holdout: accuracies by seed}}; under "val" everything is 0.03 lower."""
    drop = {"last": 0, "val": 0.03}
    return [
        make_record(algorithm, holdout, seed, None if value is None else value - drop[selection], selection)
        for selection in selections
        for algorithm, holdouts in table.items()
        for holdout, values in holdouts.items()
        for seed, value in enumerate(values)
    ]


# erm is worst on sketch (0.5), importance on photo (0.3).
HAND = {
    "erm": {"art": [0.9, 0.8, 0.7], "photo": [0.5, 0.7, 0.6], "sketch": [0.6, 0.4, 0.5]},
    "importance": {"art": [0.95, 0.85, 0.9], "photo": [0.3, 0.4, 0.2], "sketch": [0.9, 0.9, 0.9]},
}


def row(table, algorithm, holdout):
    found = table[(table["algorithm"] == algorithm) & (table["holdout"] == holdout)]
    assert len(found) == 1
    return found.iloc[0]


def assert_interval(found, values):
    """Row of n, mean, low, high against scipy's own interval for the values."""
    mean, error = sum(values) / len(values), np.std(values, ddof=1) / len(values) ** 0.5
    low, high = stats.t.interval(0.95, len(values) - 1, loc=mean, scale=error) if error > 0 else (mean, mean)
    assert found["n"] == len(values)
    assert [found["mean"], found["low"], found["high"]] == pytest.approx([mean, low, high], abs=1e-12)


# --- intervals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 10, 50])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_t_interval_is_that_of_scipy(n, confidence):
    values = np.random.default_rng(n).normal(0.7, 0.05, n)
    low, high = stats.t.interval(confidence, n - 1, loc=values.mean(), scale=stats.sem(values))
    assert t_interval(values, confidence) == pytest.approx((values.mean(), low, high), abs=1e-14)


def test_t_interval_from_a_table_of_students_distribution():
    # 1, 2, 3: s = 1, and t at 97.5 % with 2 degrees of freedom is 4.303
    assert t_interval([1, 2, 3]) == pytest.approx((2, 2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5), abs=1e-3)


def test_t_interval_covers_as_often_as_it_says():
    values = np.random.default_rng(0).normal(1.0, 2.0, (1000, 5))
    hits = [low <= 1.0 <= high for _, low, high in map(t_interval, values)]
    assert np.mean(hits) == pytest.approx(0.95, abs=0.028)  # 4 standard errors


def test_t_interval_of_too_few():
    mean, low, high = t_interval([0.7])
    assert mean == 0.7
    assert math.isnan(low)
    assert math.isnan(high)
    assert all(map(math.isnan, t_interval([])))


def test_t_interval_of_equal_values_is_a_point():
    assert t_interval([0.5, 0.5, 0.5]) == (0.5, 0.5, 0.5)


# --- tables -------------------------------------------------------------------------------------------------


def test_accuracy_table_puts_each_result_in_its_place():
    table = accuracy_table(make_records(HAND, ("last", "val")))
    assert table.index.tolist() == [0, 1, 2]
    for algorithm, holdouts in HAND.items():
        for holdout, values in holdouts.items():
            assert table[algorithm, holdout].tolist() == values
    assert table.shape == (3, 6)


def test_accuracy_table_does_not_depend_on_the_order_of_records():
    records = make_records(HAND)
    pd.testing.assert_frame_equal(
        lodo_table(records).sort_values(["algorithm", "holdout"], ignore_index=True),
        lodo_table(records[::-1]).sort_values(["algorithm", "holdout"], ignore_index=True),
    )


@pytest.mark.parametrize(
    ("choice", "shift"),
    [
        ({}, 0),
        ({"part": "in"}, 0.01),
        ({"part": "out"}, -0.02),
        ({"metric": "balanced_accuracy"}, -0.05),
        ({"selection": "val"}, -0.03),
        ({"selection": "val", "part": "in", "metric": "balanced_accuracy"}, -0.07),
    ],
)
def test_choice_of_selection_part_and_metric(choice, shift):
    records = make_records(HAND, ("last", "val"))
    assert accuracy_table(records, **choice)["erm", "art"].tolist() == pytest.approx(
        [0.9 + shift, 0.8 + shift, 0.7 + shift]
    )
    assert row(lodo_table(records, **choice), "erm", "photo")["mean"] == pytest.approx(0.6 + shift)
    difference = paired_differences(records, "importance", **choice).set_index("holdout")
    assert difference.loc["sketch", "mean"] == pytest.approx(0.4)


@pytest.mark.parametrize("function", [accuracy_table, lodo_table])
def test_an_unknown_selection_is_an_error(function):
    with pytest.raises(ValueError, match="'best'"):
        function(make_records(HAND), selection="best")
    with pytest.raises(ValueError, match="'last'"):
        function([])


def test_lodo_table_by_hand():
    table = lodo_table(make_records(HAND))
    assert table.columns.tolist() == ["algorithm", "holdout", "n", "mean", "low", "high"]
    assert len(table) == 2 * 5
    for algorithm, holdouts in HAND.items():
        for holdout, values in holdouts.items():
            assert_interval(row(table, algorithm, holdout), values)
    assert_interval(row(table, "erm", AVERAGE), [2.0 / 3, 1.9 / 3, 1.8 / 3])
    assert_interval(row(table, "importance", AVERAGE), [2.15 / 3, 2.15 / 3, 2.0 / 3])
    # sketch goes, where erm is worst, although importance is worst on photo
    assert_interval(row(table, "erm", WITHOUT_HARDEST), [0.7, 0.75, 0.65])
    assert_interval(row(table, "importance", WITHOUT_HARDEST), [1.25 / 2, 1.25 / 2, 1.1 / 2])


def test_averages_are_taken_within_seeds_first():
    """Holdouts that go up and down together with the seed, and against each other: same means, other intervals."""
    together = lodo_table(make_records({"erm": {"a": [0.4, 0.6], "b": [0.4, 0.6]}}))
    against = lodo_table(make_records({"erm": {"a": [0.4, 0.6], "b": [0.6, 0.4]}}))
    assert_interval(row(together, "erm", AVERAGE), [0.4, 0.6])
    found = row(against, "erm", AVERAGE)
    assert [found["mean"], found["low"], found["high"]] == pytest.approx([0.5, 0.5, 0.5])
    assert found["n"] == 2  # seeds, never seeds × domains


def test_two_domains():
    table = lodo_table(
        make_records({"erm": {"a": [0.8, 0.9], "b": [0.3, 0.5]}, "importance": {"a": [0.1, 0.2], "b": [0.6, 0.8]}})
    )
    assert_interval(row(table, "erm", WITHOUT_HARDEST), [0.8, 0.9])
    assert_interval(row(table, "importance", WITHOUT_HARDEST), [0.1, 0.2])
    assert_interval(row(table, "importance", AVERAGE), [0.35, 0.5])


def test_one_holdout_alone_has_an_average_and_none_without_it():
    table = lodo_table(make_records({"erm": {"a": [0.8, 0.9]}}))
    assert table["holdout"].tolist() == ["a", AVERAGE]
    assert_interval(row(table, "erm", AVERAGE), [0.8, 0.9])


def test_hardest_without_erm_is_worst_for_all_together():
    table = lodo_table(make_records({"x": {"a": [0.5, 0.5], "b": [0.4, 0.4]}, "y": {"a": [0.1, 0.1], "b": [0.9, 0.9]}}))
    assert row(table, "x", WITHOUT_HARDEST)["mean"] == pytest.approx(0.4)
    assert row(table, "y", WITHOUT_HARDEST)["mean"] == pytest.approx(0.9)


def test_a_single_seed_has_no_interval():
    table = lodo_table(make_records({"erm": {"a": [0.8], "b": [0.6]}}))
    assert table["n"].tolist() == [1] * 4
    assert row(table, "erm", AVERAGE)["mean"] == pytest.approx(0.7)
    assert table[["low", "high"]].isna().all(axis=None)


# --- failed and missing networks ----------------------------------------------------------------------------

FAILED = {**HAND, "importance": {**HAND["importance"], "photo": [0.3, None, 0.2]}}


def test_a_failed_network_leaves_out_its_seed_s_averages():
    table = lodo_table(make_records(FAILED))
    assert_interval(row(table, "importance", "photo"), [0.3, 0.2])
    assert_interval(row(table, "importance", "art"), [0.95, 0.85, 0.9])
    assert_interval(row(table, "importance", AVERAGE), [2.15 / 3, 2.0 / 3])
    assert_interval(row(table, "erm", AVERAGE), [2.0 / 3, 1.9 / 3, 1.8 / 3])  # erm's own networks are sound


def test_a_failed_network_leaves_out_its_pair():
    table = paired_differences(make_records(FAILED), "importance").assign(algorithm="difference")
    assert_interval(row(table, "difference", "photo"), [-0.2, -0.4])
    assert_interval(row(table, "difference", "art"), [0.05, 0.05, 0.2])
    assert_interval(row(table, "difference", AVERAGE), [0.15 / 3, 0.2 / 3])
    assert_interval(row(table, "difference", WITHOUT_HARDEST), [-0.15 / 2, -0.2 / 2])


def test_seeds_that_one_algorithm_lacks_are_left_out_of_the_pairs():
    records = [r for r in make_records(HAND) if (r["algorithm"], r["seed"]) != ("erm", 2)]
    table = paired_differences(records, "importance").assign(algorithm="difference")
    assert_interval(row(table, "difference", "art"), [0.05, 0.05])
    assert_interval(row(table, "difference", AVERAGE), [0.15 / 3, 0.25 / 3])


def test_an_algorithm_that_lacks_a_holdout_has_no_average():
    """Else an average over fewer, maybe easier, domains would stand in the same column."""
    records = [r for r in make_records(HAND) if (r["algorithm"], r["holdout"]) != ("importance", "sketch")]
    table = lodo_table(records)
    averages = table[(table["algorithm"] == "importance") & (table["holdout"] == AVERAGE)]
    assert averages["mean"].isna().all()
    assert_interval(row(table, "erm", AVERAGE), [2.0 / 3, 1.9 / 3, 1.8 / 3])


def test_tables_of_networks_that_all_failed():
    """As after a learning rate that is far too large: the report says so, instead of falling over."""
    records = make_records({name: {"a": [None, None], "b": [None, None]} for name in ("erm", "importance")})
    table = lodo_table(records)
    assert (table["n"] == 0).all()
    assert table["mean"].isna().all()
    assert (paired_differences(records, "importance")["n"] == 0).all()


def test_a_domain_on_which_all_networks_of_erm_failed():
    records = make_records(
        {"erm": {"a": [0.8, 0.9], "b": [None, None]}, "importance": {"a": [0.7, 0.7], "b": [0.5, 0.6]}}
    )
    table = lodo_table(records)
    assert row(table, "erm", "b")["n"] == 0
    assert row(table, "erm", AVERAGE)["n"] == 0
    assert_interval(row(table, "importance", AVERAGE), [0.6, 0.65])


# --- paired differences -------------------------------------------------------------------------------------


def test_paired_differences_by_hand():
    table = paired_differences(make_records(HAND), "importance")
    assert table.columns.tolist() == ["holdout", "n", "mean", "low", "high"]
    table = table.assign(algorithm="difference")
    assert_interval(row(table, "difference", "art"), [0.05, 0.05, 0.2])
    assert_interval(row(table, "difference", "photo"), [-0.2, -0.3, -0.4])
    assert_interval(row(table, "difference", "sketch"), [0.3, 0.5, 0.4])
    assert_interval(row(table, "difference", AVERAGE), [0.15 / 3, 0.25 / 3, 0.2 / 3])
    assert_interval(row(table, "difference", WITHOUT_HARDEST), [-0.15 / 2, -0.25 / 2, -0.2 / 2])


def test_differences_are_paired_by_seed_number_not_by_position():
    records = make_records(HAND)
    shuffled = [records[i] for i in np.random.default_rng(0).permutation(len(records))]
    found = paired_differences(shuffled, "importance").set_index("holdout").sort_index()
    pd.testing.assert_frame_equal(found, paired_differences(records, "importance").set_index("holdout").sort_index())


def test_the_sign_is_algorithm_minus_baseline():
    records = make_records(HAND)
    forward = paired_differences(records, "importance", "erm").set_index("holdout")["mean"]
    backward = paired_differences(records, "erm", "importance").set_index("holdout")["mean"]
    pd.testing.assert_series_equal(forward, -backward)
    assert (paired_differences(records, "erm")["mean"] == 0).all()


# --- the finding --------------------------------------------------------------------------------------------


def pairs(differences, domains=("a", "b", "c")):
    """Records whose differences, averaged over domains, are as given."""
    base = [0.5 + 0.1 * seed for seed in range(len(differences))]
    better = [b + d for b, d in zip(base, differences, strict=True)]
    return make_records({"erm": dict.fromkeys(domains, base), "importance": dict.fromkeys(domains, better)})


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([0.02, 0.03, 0.04], "Importance masking helps here"),
        ([-0.02, -0.03, -0.04], "Importance masking hurts here"),
        ([-0.02, 0.03, 0.01], "No difference is shown"),
        ([0.0, 0.0, 0.0], "No difference is shown"),
        ([-0.01, -0.05], "No difference is shown"),
        ([0.01, 0.05], "No difference is shown"),  # t with one degree of freedom is 12.7
    ],
)
def test_three_verdicts(differences, verdict):
    text = finding(pairs(differences))
    assert text.startswith(verdict)
    mean = np.mean(differences)
    low, high = (
        stats.t.interval(0.95, len(differences) - 1, loc=mean, scale=stats.sem(differences))
        if any(differences)
        else (0, 0)
    )
    numbers = [float(number) for number in re.findall(r"[-+]\d+\.\d\d", text)]
    assert numbers == pytest.approx([100 * mean, 100 * low, 100 * high], abs=0.0051)
    assert f"{len(differences)} seeds" in text
    assert "against erm" in text
    assert "3 held-out domains" in text


def test_the_finding_is_on_the_last_epoch_and_all_images():
    """Helps at the last epoch on all images; the other choices say the opposite."""
    records = pairs([0.02, 0.03, 0.04])
    for record in records:
        if record["algorithm"] == "importance":
            record["accuracy"] |= {"in": 0.0, "out": 0.0}
            record["balanced_accuracy"] = {"full": 0.0, "in": 0.0, "out": 0.0}
    opposite = [{**r, "selection": "val"} for r in pairs([-0.02, -0.03, -0.04])]
    assert finding(records + opposite).startswith("Importance masking helps here: +3.00 points")


def test_one_seed_gives_no_verdict():
    text = finding(pairs([0.05]))
    assert text.startswith("One seed gives no interval")
    assert "helps" not in text


def test_one_seed_that_is_left_is_told_from_one_that_was_asked_for():
    text = finding(make_records({"erm": {"a": [0.5, 0.6, 0.7]}, "importance": {"a": [None, 0.6, None]}}))
    assert text.startswith("One sound seed is left, networks of 2 others failed")
    assert "use more seeds" not in text


def test_no_sound_pair_is_not_called_one_seed():
    records = make_records(
        {"erm": {"a": [0.5, 0.6], "b": [0.5, 0.6]}, "importance": {"a": [None, None], "b": [0.5, 0.6]}}
    )
    text = finding(records)
    assert not text.startswith("One seed")
    assert "helps" not in text
    assert "hurts" not in text


# --- for reading --------------------------------------------------------------------------------------------


def test_wide_table_text():
    tidy = pd.DataFrame(
        [
            ("erm", "sketch", 3, 0.71234, 0.70234, 0.72234),
            ("erm", "art", 3, 0.5, 0.475, 0.525),
            ("importance", "sketch", 1, 0.666, np.nan, np.nan),
            ("importance", "art", 2, 1.0, 1.0, 1.0),
        ],
        columns=["algorithm", "holdout", "n", "mean", "low", "high"],
    )
    wide = wide_table(tidy)
    assert wide.index.tolist() == ["erm", "importance"]
    assert wide.columns.tolist() == ["sketch", "art"]  # in the order of the table
    assert wide.loc["erm"].tolist() == ["71.2 ± 1.0", "50.0 ± 2.5"]
    assert wide.loc["importance"].tolist() == ["66.6", "100.0 ± 0.0"]


def test_wide_table_ends_with_the_averages():
    columns = wide_table(lodo_table(make_records(HAND))).columns.tolist()
    assert columns == ["art", "photo", "sketch", AVERAGE, WITHOUT_HARDEST]


def test_levels():
    chance, majority = levels({"art": {"dog": 3, "cat": 1, "bee": 0}, "photo": {"dog": 2, "cat": 2, "bee": 2}})
    assert chance == pytest.approx(1 / 3)
    assert majority == {"art": 0.75, "photo": pytest.approx(1 / 3)}


# --- importance and masks -------------------------------------------------------------------------------------


def test_statistics_table_by_hand_and_without_the_networks_that_say_nothing():
    moved = [torch.tensor([[[0.0, 1.0]], [[2.0, 3.0]], [[0.0, 0.0]]]), torch.tensor([[[5.0]], [[4.0]], [[0.0]]])]
    mask = [
        torch.tensor([[[False, True]], [[False, False]], [[False] * 2]]),
        torch.tensor([[[True]], [[True]], [[False]]]),
    ]
    table = statistics_table(moved, mask)  # the third of three seeds moved nothing
    assert table.index.tolist() == ["1", "2", "overall"]
    assert table["weights"].tolist() == [2, 1, 3]
    assert table["mean"].tolist() == pytest.approx([(0.5 + 2.5) / 2, 4.5, (2 + 3) / 2])
    assert table["std"].tolist() == pytest.approx([0.5, 0, (np.std([0, 1, 5]) + np.std([2, 3, 4])) / 2])
    assert table["min"].tolist() == [1, 4.5, 1]
    assert table["max"].tolist() == [2, 4.5, 4.5]
    assert table["marked"].tolist() == [0.5, 1, 1.5]
    assert table["density"].tolist() == pytest.approx([0.25, 1, (2 / 3 + 1 / 3) / 2])
    assert table["zero"].tolist() == [0.5, 0, 0.5]
    assert table["marked_zero"].tolist() == [0, 0, 0]


def marked(*networks):
    """Masks of one layer 1×6, from the positions marked in each network."""
    mask = torch.zeros(len(networks), 1, 6, dtype=torch.bool)
    for s, positions in enumerate(networks):
        mask[s, 0, list(positions)] = True
    return [mask]


def test_overlap_table_by_hand():
    table, chance = overlap_table(
        {"a": marked((0, 1), (0, 1)), "b": marked((0, 1), (1, 2)), "c": marked((4, 5), (0, 5))}
    )
    assert table.index.tolist() == table.columns.tolist() == ["a", "b", "c"]
    expected = [[1, (1 + 1 / 3) / 2, 1 / 6], [(1 + 1 / 3) / 2, 1, 0], [1 / 6, 0, 1]]
    np.testing.assert_allclose(table.to_numpy(), expected)
    # 2 of 6 marked twice: 15 pairs of positions, 1 of them shared whole, 8 by half, 6 not at all
    assert chance == pytest.approx((1 * 1 + 8 / 3) / 15)


def test_overlap_table_leaves_out_networks_without_a_mask():
    """The mask of a failed network is empty; two such are no agreement, and one is no disagreement."""
    table, chance = overlap_table({"a": marked((0, 1), ()), "b": marked((1, 2), ()), "c": marked((0, 1), (3, 4))})
    np.testing.assert_allclose(table.to_numpy(), [[1, 1 / 3, 1], [1 / 3, 1, 1 / 3], [1, 1 / 3, 1]])
    assert chance == pytest.approx((1 * 1 + 8 / 3) / 15)


# --- confusion ----------------------------------------------------------------------------------------------

HIDDEN = (5, 6)


@pytest.fixture
def problem():
    """Two domains, three classes, of which "photo" has no image of the second."""
    g = torch.Generator().manual_seed(0)
    domains = torch.tensor([0, 1] * 30)
    labels = torch.randint(0, 3, (60,), generator=g)
    labels[(domains == 1) & (labels == 1)] = 2
    features = torch.randn(60, 4, generator=g) + labels.unsqueeze(1)
    inside = torch.rand(60, generator=g) < 0.8
    return Problem(features, labels, domains, inside, ("dog", "cat", "bee"), ("art", "photo"))


def networks(seeds):
    """Networks as modules, and as the arrays of a weights file, with starts that must not be used."""
    modules = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        modules.append(FeedforwardClassifier(4, 3, HIDDEN))
        for p in modules[-1].parameters():
            p.data *= 3
    names = [name for name, _ in modules[0].named_parameters()]
    arrays = {f"final.{n}": torch.stack([m.get_parameter(n).detach() for m in modules]) for n in names}
    arrays |= {f"start.{n}": torch.zeros_like(arrays[f"final.{n}"]) for n in names}
    return modules, {"seeds": torch.arange(seeds), **arrays}


def answers(module, features):
    weights = [p.detach().double().numpy() for p in module.parameters()]
    hidden = np.maximum(features.double().numpy() @ weights[0].T + weights[1], 0)
    hidden = np.maximum(hidden @ weights[2].T + weights[3], 0)
    return (hidden @ weights[4].T + weights[5]).argmax(1)


@pytest.mark.parametrize("holdout", ["art", "photo"])
def test_confusion_is_summed_over_seeds_and_all_images_of_the_domain(problem, holdout):
    modules, arrays = networks(3)
    rows = problem.domains == problem.domain_names.index(holdout)
    expected = np.zeros((3, 3), int)
    for module in modules:
        for true, predicted in zip(problem.labels[rows], answers(module, problem.features[rows]), strict=True):
            expected[true, predicted] += 1
    found = confusion(problem, holdout, arrays, HIDDEN, torch.tensor([True] * 3))
    assert found.shape == (3, 3)
    assert (found == expected).all()
    assert found.sum() == 3 * int(rows.sum())
    assert (found != found.T).any()  # else rows and columns could be swapped unseen
    if holdout == "photo":
        assert (found[1] == 0).all()


def test_confusion_leaves_out_networks_that_failed(problem):
    modules, arrays = networks(3)
    rows = problem.domains == 0
    sound = [answers(modules[i], problem.features[rows]) for i in (0, 2)]
    expected = confusion_matrix(np.tile(problem.labels[rows].numpy(), 2), np.concatenate(sound), labels=[0, 1, 2])
    assert (confusion(problem, "art", arrays, HIDDEN, torch.tensor([True, False, True])) == expected).all()


def test_confusion_of_networks_that_all_failed_is_empty(problem):
    _, arrays = networks(2)
    none = torch.tensor([False, False])
    assert (confusion(problem, "art", arrays, HIDDEN, none) == np.zeros((3, 3))).all()


# --- report -------------------------------------------------------------------------------------------------


@pytest.fixture
def about():
    """As `Results.read_settings` gives it."""
    settings = Settings.current()
    features = {
        "dataset": "toy",
        "fingerprint": "f1n6e2",
        "feature_size": 24,
        "model": {"name": "tiny-vit"},
        "preprocessing": {},
        "counts": {
            "art": {"dog": 3, "cat": 1},
            "photo": {"dog": 2, "cat": 2},
            "sketch": {"dog": 1, "cat": 7},
        },
    }
    return {"hash": settings.hash, "settings": settings.as_dict(), "features": features, "environments": []}


def section(text, title):
    """Lines from a title to the next empty line."""
    lines = text.split("\n")
    start = next(i for i, line in enumerate(lines) if line.startswith(title))
    return lines[start : lines.index("", start)]


def test_report(about):
    records = make_records(HAND, ("last", "val"))
    note = "Phase 1 trained on all images."
    records = [
        {**r, "note": note} if r["selection"] == "val" and r["algorithm"] == "importance" else r for r in records
    ]
    text = report(records, about, ["importance, holdout art, seed 4: the importance is all equal or not finite"])
    assert text.endswith("\n")
    assert "toy, tiny-vit, 24-d (fingerprint f1n6e2)" in text
    assert about["hash"] in text
    assert all(f"{name} = {value}" in text for name, value in about["settings"].items())
    assert finding(records) in text
    assert "Chance is 50.0 %" in text
    assert re.search(r"art: 75\.0\n.*photo: 50\.0\n.*sketch: 87\.5\n", text)
    assert text.count(note) == 1
    assert "1 network" in text
    assert "importance, holdout art, seed 4: the importance is all equal or not finite" in text


def test_the_tables_of_the_report(about):
    records = make_records(HAND, ("last", "val"))
    text = report(records, about)
    for title, choice in (
        ("Accuracy (%), all images of the held-out domain, last epoch", {}),
        ("Accuracy (%), its `in` part", {"part": "in"}),
        ("Balanced accuracy (%), all images", {"metric": "balanced_accuracy"}),
        ("Accuracy (%), all images of the held-out domain, epoch of best source validation", {"selection": "val"}),
    ):
        lines = section(text, title)
        table = lodo_table(records, **choice)
        for algorithm in ("erm", "importance"):
            (line,) = (line for line in lines if re.match(rf"{algorithm} +\d", line))
            cells = re.findall(r"\d+\.\d ± \d+\.\d", line)
            expected = table[table["algorithm"] == algorithm]
            means = [float(cell.split(" ± ")[0]) for cell in cells]
            assert means == pytest.approx((100 * expected["mean"]).tolist(), abs=0.051)
        assert any(re.match(r"\s+photo: -30\.00 \[-54\.84, -5\.16\], 3 seeds", line) for line in lines), lines


def test_the_report_says_nothing_of_notes_and_failures_where_there_are_none(about):
    text = report(make_records(HAND, ("last", "val")), about)
    assert "Note" not in text
    assert "failed" not in text


def test_the_report_without_a_named_model(about):
    about["features"]["model"] = None
    assert "toy, a model that is not named, 24-d" in report(make_records(HAND, ("last", "val")), about)


def test_the_report_of_one_seed(about):
    table = {name: {holdout: values[:1] for holdout, values in holdouts.items()} for name, holdouts in HAND.items()}
    text = report(make_records(table, ("last", "val")), about)
    assert "One seed gives no interval" in text
    assert " ± " not in text
    assert "nan" not in text


def test_the_report_of_networks_that_all_failed(about):
    records = make_records({name: {"art": [None] * 2, "photo": [None] * 2} for name in HAND}, ("last", "val"))
    text = report(records, about, ["erm, holdout art, seed 0: the loss is no longer finite in epoch 1"])
    assert "the loss is no longer finite in epoch 1" in text
    assert "nan" not in text
    assert text.count("art: no seed whose networks are sound") == 4


def test_the_report_names_the_hardest_domain(about):
    records = make_records(HAND, ("last", "val"))
    for record in records:
        if record["accuracy"] and record["algorithm"] == "erm" and record["holdout"] == "photo":
            record["accuracy"]["in"] = 0.0
    text = report(records, about)
    assert "The hardest domain is sketch." in section(text, "Accuracy (%), all images of the held-out domain, last")
    assert "The hardest domain is photo." in section(text, "Accuracy (%), its `in` part")
    alone = [record for record in records if record["holdout"] == "art"]
    assert "hardest" not in report(alone, about)


def test_the_report_is_the_same_for_the_same_records(about):
    records = make_records(FAILED, ("last", "val"))
    assert report(records, about) == report(records, about)
