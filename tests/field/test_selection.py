"""Selection rules against plain loops over the definition; tables against numbers worked out by hand."""

import itertools
import math
import random
from statistics import fmean

import numpy as np
import pandas as pd
import pytest

from config import InputError
from field import RULES, as_text, comparison_table, curves_of, select, tables_by_rule

NAN = float("nan")
DOMAINS = ("art", "cartoon", "photo")
SINGLES = [(d,) for d in DOMAINS]
PAIRS = list(itertools.combinations(DOMAINS, 2))


def random_rows(seed, failures=0.2):
    """Two algorithms, three trials, all holdouts, on a grid so coarse that many networks are equal."""
    draw, rows = random.Random(seed), []
    columns = ("algorithm", "trial", "holdouts", "seed", "epoch", "step", "domain", "in", "out", "full")
    for run in itertools.product(("B", "A"), (0, 1, 2), [*SINGLES, *PAIRS], (3, 1)):
        failed = draw.random() < failures
        for epoch, domain in itertools.product(range(1, draw.choice((3, 4))), DOMAINS):
            shares = [NAN if failed else draw.randrange(5) / 4 for _ in range(3)]
            rows.append(dict(zip(columns, (*run, epoch, 5 * epoch, domain, *shares), strict=True)))
    return rows


def by_definition(rows, rule):
    """(algorithm, holdout, seed) -> [trial, epoch, validation, in, out, full], in plain loops."""
    at = {(r["algorithm"], r["seed"], r["trial"], frozenset(r["holdouts"]), r["epoch"], r["domain"]): r for r in rows}
    last = {}
    for a, s, t, h, e, _ in at:
        last[a, s, t, h] = max(e, last.get((a, s, t, h), 0))
    chosen = {}
    for (a, s, t, h, e, d), row in sorted(at.items(), key=lambda item: (item[0][2], item[0][4])):  # trial, epoch
        if h != {d} or (rule in ("oracle", "last") and e < last[a, s, t, h]):
            continue
        others = [v for v in DOMAINS if v != d]
        if rule == "oracle":
            value = row["out"]
        elif rule == "leave-one-domain-out":
            partners = [at.get((a, s, t, frozenset([d, v]), e, v)) for v in others]
            if None in partners:
                continue
            value = sum(p["in"] for p in partners) / len(partners)
        else:
            value = sum(at[a, s, t, h, e, v]["out"] for v in others) / len(others)
        value = NAN if math.isnan(row["in"]) else value
        best = chosen.get((a, d, s))
        if best is None or value > best[2] or (math.isnan(best[2]) and not math.isnan(value)):
            row = row if not math.isnan(value) else dict.fromkeys(("in", "out", "full"), NAN)
            chosen[a, d, s] = [t, e, value, row["in"], row["out"], row["full"]]
    return chosen


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("failures", [0, 0.2, 0.7])
def test_a_rule_chooses_what_its_definition_says(rule, failures):
    for seed in range(2):
        rows = random_rows(seed, failures)
        expected = by_definition(rows, rule)
        table = select(curves_of(rows), rule)
        assert [*zip(table["algorithm"], table["holdout"], table["seed"], strict=True)] == [
            key for key in itertools.product(("B", "A"), DOMAINS, (1, 3)) if key in expected
        ]
        for row in table.itertuples(index=False):
            np.testing.assert_array_equal(row[3:], expected[row[:3]], strict=False)
        # the order of the rows says nothing but in which order to report
        shuffled = select(curves_of(random.Random(seed).sample(rows, len(rows))), rule)
        key = ["algorithm", "holdout", "seed"]
        pd.testing.assert_frame_equal(shuffled.set_index(key).sort_index(), table.set_index(key).sort_index())


def test_leave_one_domain_out_leaves_out_what_lacks_a_pair():
    rows = random_rows(0, failures=0)
    no_pairs = [r for r in rows if len(r["holdouts"]) == 1]
    with pytest.raises(InputError, match="--leave-one-out"):
        select(curves_of(no_pairs), "leave-one-domain-out")
    assert len(select(curves_of(no_pairs), "training-domain")) == 12
    lacks = [r for r in rows if (r["seed"], r["holdouts"]) != (1, ("art", "photo"))]
    left = select(curves_of(lacks), "leave-one-domain-out")
    assert set(left[left["seed"] == 1]["holdout"]) == {"cartoon"}
    assert set(left[left["seed"] == 3]["holdout"]) == set(DOMAINS)
    with pytest.raises(InputError, match="single domain"):
        select(curves_of([r for r in rows if len(r["holdouts"]) == 2]), "last")
    with pytest.raises(InputError, match=r"'val'.*training-domain, last, leave-one-domain-out, oracle"):
        select(curves_of(rows), "val")


def test_there_is_a_table_for_each_rule_that_the_runs_allow():
    rows, baselines = random_rows(0), {"B": "A"}
    tables = tables_by_rule(curves_of(rows), baselines, "in")
    assert list(tables) == list(RULES)
    for rule, table in tables.items():
        pd.testing.assert_frame_equal(table, comparison_table(select(curves_of(rows), rule), baselines, "in"))
    single = tables_by_rule(curves_of([row for row in rows if len(row["holdouts"]) == 1]), baselines)
    assert set(RULES) - set(single) == {"leave-one-domain-out"}


def chosen_of(values):
    """{(algorithm, holdout): full by seed} as `select` returns it."""
    rows = [
        {"algorithm": a, "holdout": h, "seed": s, "trial": 0, "epoch": 1, "validation": 0.5}
        | {"in": v / 2, "out": NAN, "full": v}
        for (a, h), by_seed in values.items()
        for s, v in enumerate(by_seed)
    ]
    return pd.DataFrame(rows)


CHOSEN = {
    ("ERM", "art"): [0.60, 0.62, 0.70],
    ("ERM", "photo"): [0.80, 0.90, 0.50],
    ("IRM", "art"): [0.64, 0.60, 0.10],
    ("IRM", "photo"): [0.84, 0.90, NAN],
}
PAIRED = {"ERM": "ERM", "IRM": "ERM"}


def test_the_table_holds_what_one_computes_by_hand():
    table = comparison_table(chosen_of(CHOSEN), PAIRED)
    assert list(table.index) == ["ERM", "IRM"]
    erm, irm = table.loc["ERM"], table.loc["IRM"]
    assert erm["art_mean"] == pytest.approx(0.64)
    assert erm["art_error"] == pytest.approx(math.sqrt((0.04**2 + 0.02**2 + 0.06**2) / 2 / 3))
    assert irm["photo_mean"] == pytest.approx(0.87)  # without the failed network
    assert irm["photo_error"] == pytest.approx(0.03)
    assert erm["average_mean"] == pytest.approx(fmean([0.70, 0.76, 0.60]))
    assert irm["average_mean"] == pytest.approx(fmean([0.74, 0.75]))  # seed 2 lacks photo
    assert irm["average_error"] == pytest.approx(0.005)
    assert table["n"].to_list() == [3, 2]
    assert table["rank"].to_list() == [2, 1]
    # seed 0: 0.74 - 0.70, seed 1: 0.75 - 0.76; t of one degree of freedom at 97.5 %: tan(0.475 pi)
    half = 0.025 * math.tan(0.475 * math.pi)
    assert irm["difference"] == pytest.approx(0.015)
    assert (irm["low"], irm["high"]) == (pytest.approx(0.015 - half), pytest.approx(0.015 + half))
    assert (irm["baseline"], irm["n_paired"]) == ("ERM", 2)
    assert np.isnan([erm["difference"], erm["low"], erm["high"]]).all()
    halved = comparison_table(chosen_of(CHOSEN), PAIRED, part="in")
    assert halved.loc["IRM", "difference"] == pytest.approx(0.0075)


def test_one_seed_has_no_error_and_no_interval():
    table = comparison_table(chosen_of({key: values[:1] for key, values in CHOSEN.items()}), {"IRM": "ERM"})
    assert table.loc["IRM", "difference"] == pytest.approx(0.04)
    assert table[["art_error", "average_error"]].isna().all(axis=None)
    assert np.isnan(table.loc["IRM", ["low", "high"]].to_numpy(float)).all()


def test_an_algorithm_that_lacks_a_holdout_has_no_average():
    values = {key: v for key, v in CHOSEN.items() if key != ("IRM", "photo")}
    table = comparison_table(chosen_of(values), PAIRED)
    assert table.loc["IRM", "art_mean"] == pytest.approx(fmean([0.64, 0.60, 0.10]))
    assert math.isnan(table.loc["IRM", "average_mean"])
    assert (table.loc["IRM", "n"], table.loc["IRM", "n_paired"]) == (0, 0)
    assert pd.isna(table.loc["IRM", "rank"])
    text = as_text(table).splitlines()
    assert text[1].startswith("ERM ")
    assert text[2].split() == ["IRM", "44.7", "±", "17.4", "–", "–", "0"]


def test_the_text_has_per_cent_and_points_best_first():
    table = comparison_table(chosen_of(CHOSEN), PAIRED)
    header, first, second = as_text(table).splitlines()
    assert header.split() == ["rank", "art", "photo", "average", "seeds", "difference", "from"]
    assert " ".join(first.split()) == "IRM 1 44.7 ± 17.4 87.0 ± 3.0 74.5 ± 0.5 2 +1.50 [−30.27, +33.27] ERM"
    assert " ".join(second.split()) == "ERM 2 64.0 ± 3.1 73.3 ± 12.0 68.7 ± 4.7 3"


def test_tables_refuse_what_is_not_known():
    with pytest.raises(InputError, match="in, out, full"):
        comparison_table(chosen_of(CHOSEN), PAIRED, part="test")
    with pytest.raises(InputError, match="no accuracies on the part 'out'"):
        comparison_table(chosen_of(CHOSEN), PAIRED, part="out")
    with pytest.raises(InputError, match="baseline of IRM, ERMBalanced"):
        comparison_table(chosen_of(CHOSEN), {"IRM": "ERMBalanced"})
