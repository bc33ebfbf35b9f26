"""Tables of a transfer study: which contrasts, which checkpoint, which repeats; and the sentences they allow."""

import numpy as np
import pandas as pd
import pytest

from config import InputError
from tests.transfer.made_tables import MEANS, common_table, probe_table
from transfer.claims import cautions, claims
from transfer.statistics import tables

SMALL = {0.1: (0.80, 0.90, 0.82), 1.0: (0.96, 0.93, 0.90)}  # two amounts, two layers


@pytest.fixture(scope="module")
def toy():
    return common_table()


@pytest.fixture(scope="module")
def found(toy):
    return tables(toy)


def sentence(found, words):
    (text,) = [text for text in claims(found) if words in text]
    return text


def selected(table, **values):
    for name, value in values.items():
        table = table[table[name] == value]
    return table


def test_the_family_is_every_cut_above_0_at_every_amount(found):
    family = found["contrasts"]
    assert len(family) == 9
    assert set(zip(family["cut"], family["amount"], strict=True)) == {(c, a) for c in (1, 2, 3) for a in MEANS}
    row = selected(family, cut=2, amount=0.01).iloc[0]
    assert row["contrast"] == "frozen@2 − scratch, 1 %"
    assert (row["images"], row["repeats"], row["verdict"]) == (10, 12, "helps")
    assert row["mean"] == pytest.approx(0.2, abs=0.01)  # at the last checkpoint; at the first it would be 0.3
    assert row["p_holm"] == pytest.approx(row["p"] * 9)


def test_the_second_family_is_corrected_by_itself(found):
    family = found["weights"]
    assert family["contrast"].str.split(",").str[0].unique().tolist() == [
        "moved@2 − random_layer@2",
        "moved@2 − frozen@2",
    ]
    assert (family["verdict"] == "helps").all()
    assert family["p_holm"].max() == pytest.approx(6 * family["p"].min())


def test_what_images_of_the_new_domain_are_worth_is_measured_against_the_pretrained_network():
    others = {"zero-shot": (-0.1, (3,))}  # than frozen@3: 0.60, 0.65 and 0.70
    found = tables(common_table(others=others, sd=1e-4))["zero_shot"]
    assert found["contrast"].tolist()[:3] == [f"scratch − zero-shot, {share} %" for share in ("1", "10", "100")]
    assert found["baseline_mean"].to_numpy() == pytest.approx([0.6, 0.65, 0.7] * 2, abs=1e-3)
    assert found["mean"].to_numpy() == pytest.approx([0, 0.15, 0.26, 0.21, 0.26, 0.27], abs=1e-3)
    assert (found["low"] < found["mean"]).all()
    assert (found["repeats"] == 12).all()
    assert "zero_shot" not in tables(common_table())


def test_truncating_is_judged_below_the_depth(found):
    assert found["truncation"]["cut"].unique().tolist() == [1, 2]  # finetune says that there are three layers
    assert found["truncation"]["noninferior"].eq("no worse by more than 1 point").all()
    table = common_table(means=SMALL, others={"truncated": (0.0, (1,))}, updates=(9,))
    frozen = table[(table["arm"] == "frozen") & (table["cut"] == 2)]
    table = pd.concat([table[table["arm"] != "finetune"], frozen.assign(arm="truncated")])
    assert tables(table)["truncation"]["cut"].unique().tolist() == [1]  # at 2 it is one program under two names
    assert "truncation" not in tables(table, depths={"toy": 1})


def test_repeats_are_paired_and_one_that_is_missing_leaves_only_its_contrasts(toy):
    table = toy.copy()
    gone = (table["arm"] == "frozen") & (table["cut"] == 1) & (table["amount"] == 0.1) & (table["repeat"] == 3)
    failed = (table["arm"] == "frozen") & (table["cut"] == 2) & (table["amount"] == 1.0) & (table["repeat"] == 7)
    table.loc[failed, "failed"] = "the loss is no longer finite"
    found = tables(table[~gone])
    counts = found["contrasts"].set_index(["cut", "amount"])["repeats"]
    assert counts[1, 0.1] == counts[2, 1.0] == 11
    assert (counts.drop([(1, 0.1), (2, 1.0)]) == 12).all()
    accuracy = selected(found["accuracy"], arm="frozen", updates=2000).set_index(["cut", "amount"])
    assert accuracy.loc[(2, 1.0), ["repeats", "failed"]].tolist() == [11, 1]
    assert accuracy.loc[(1, 0.1), ["repeats", "failed"]].tolist() == [11, 0]
    assert selected(found["trend"], updates=2000)[["repeats", "left_out"]].to_numpy().tolist() == [[10, 2]]
    said = cautions(found, {"toy": 0.2})
    assert any("1 runs failed" in text and "frozen 1" in text for text in said)
    assert any("11 to 12 at 10 %" in text for text in said)


def test_pairs_are_of_the_same_repeat_in_whatever_order():
    table = common_table(means=SMALL, others={}, updates=(9,))
    shifted = table.assign(accuracy=table["accuracy"] - 0.02 * table["repeat"] / 12).sample(frac=1, random_state=0)
    pd.testing.assert_frame_equal(tables(shifted)["contrasts"], tables(table)["contrasts"])


def test_numbers_by_arm_and_checkpoint(found, toy):
    row = selected(found["accuracy"], arm="frozen", cut=1, amount=0.1, updates=50).iloc[0]
    values = selected(toy, arm="frozen", cut=1, amount=0.1, updates=50)["accuracy"]
    assert row["mean"] == pytest.approx(values.mean())
    assert row["median"] == pytest.approx(values.median())
    assert row["se"] == pytest.approx(values.std(ddof=1) / 12**0.5)
    assert row["mean_balanced_accuracy"] == pytest.approx(values.mean())
    assert found["runs"]["updates"].unique().tolist() == [2000]
    early = selected(found["differences"], arm="frozen", cut=2, amount=0.01, updates=50).iloc[0]
    assert early["mean"] == pytest.approx(0.3, abs=0.01)


def test_letters_and_shares_have_scratch_as_cut_0(found):
    letters = selected(found["letters"], amount=1.0).set_index("cut")["letters"]
    assert letters.to_dict() == {0: "a", 1: "b", 2: "c", 3: "d"}
    best = selected(found["best"], amount=0.01, updates=2000).set_index("cut")["share"]
    assert best.to_dict() == {0: 0, 1: 0, 2: 1, 3: 0}


def test_tasks_are_families_of_their_own():
    table = common_table(means=SMALL, others={}, updates=(9,))
    both, alone = tables(pd.concat([table, table.assign(task="other")])), tables(table)
    for name, expected in alone.items():
        own = selected(both[name], task="toy").reset_index(drop=True)
        pd.testing.assert_frame_equal(own, expected.reset_index(drop=True))
    assert {text.split(":")[0] for text in claims(both)} == {"toy", "other"}


def original(repeats, means=MEANS):
    table = common_table(repeats, means, {"truncated": (0.0, (1,))}, updates=(40,), protocol="original")
    stopped = 7 + table["repeat"] % 5  # each run stops by itself
    return table.assign(updates=stopped)


def test_runs_of_the_original_end_by_themselves_and_have_unequal_repeats():
    found = tables(original({0.01: 25, 0.1: 20, 1.0: 5}))
    family = found["contrasts"].groupby("amount")
    assert family["repeats"].unique().map(list).to_dict() == {0.01: [25], 0.1: [20], 1.0: [5]}
    assert family["verdict"].agg(set)[1.0] == {"cannot reject with 5 repeats"}
    assert set(found["accuracy"]["updates"]) == {0}
    assert found["trend"][["repeats", "left_out"]].to_numpy().tolist() == [[5, 20]]
    assert "too few repeats (5" in sentence(found, "as data grow")
    assert "cannot reject with 5 repeats in 3" in sentence(found, "fixed in advance, Holm")
    assert any("5 at 100 %" in text for text in cautions(found, {"toy": 0.2}))


def test_the_seen_accuracy_is_used_where_there_is_no_other_and_said():
    table = original(12, SMALL)
    table = table.assign(seen_accuracy=table["accuracy"], accuracy=np.nan, balanced_accuracy=np.nan)
    found = tables(table)
    assert set(found["accuracy"]["measure"]) == {"seen_accuracy"}
    assert found["contrasts"]["repeats"].eq(12).all()
    assert any("measured on the training split" in text for text in cautions(found, {"toy": 0.2}))


def test_arms_on_different_test_images_are_not_compared():
    table = original(12, SMALL)
    truncated = table["arm"] == "truncated"
    table = table.assign(seen_accuracy=table["accuracy"].where(truncated), accuracy=table["accuracy"].mask(truncated))
    found = tables(table)
    assert (found["truncation"]["noninferior"] == "no pairs").all()
    assert "cannot be judged" in sentence(found, "truncating")
    assert any(text.startswith("toy, original protocol: truncated was never measured") for text in cautions(found, {}))
    assert tables(table, measure="seen_accuracy")["accuracy"].set_index("arm").loc["frozen", "repeats"].max() == 0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda table: table.drop(columns=["amount", "failed"]), "amount, failed"),
        (lambda table: pd.concat([table, table.iloc[[4]]]), "repeat 0"),
        (lambda table: table.assign(accuracy=100 * table["accuracy"]), "accuracy"),
        (lambda table: table.iloc[:0], "no runs"),
    ],
)
def test_what_is_no_common_table_is_refused(change, named, toy):
    with pytest.raises(InputError, match=named):
        tables(change(toy))


def test_claims_have_the_verdict_of_their_tests(found):
    assert "above 0 in 5 (cuts 1-3 at 1 %, cuts 1-2 at 10 %), below 0 in 4 (cut 3 at 10 %" in sentence(
        found, "fixed in advance, Holm"
    )
    assert ": supported; mean Kendall's τ of cut and amount −1.00" in sentence(found, "as data grow")
    assert "EXPLORATORY, after 50 updates" in sentence(found, "as data grow")
    assert "fixed in advance): supported; of 6 contrasts" in sentence(found, "truncating")
    assert "moved@c − frozen@c, 3 contrasts, above 0 in 3" in sentence(found, "weights that moved")
    assert "1 %: +30.0 (cut 2) and +20" in sentence(found, "updates against data").replace("29.9", "30.0")
    assert not any("ARI" in text for text in claims(found))


def test_claims_that_are_wrong_are_not_supported():
    rising = dict(zip(SMALL, reversed(SMALL.values()), strict=True))
    others = {"truncated": (-0.05, (1,)), "moved": (0.0, (2,)), "random_layer": (0.01, (2,))}
    found = tables(common_table(means=rising, others=others, updates=(9,)))
    assert 'grow": contradicted' in sentence(found, "as data grow")
    assert "not supported in general" in sentence(found, "truncating")
    assert "moved@c − random_layer@c, 2 contrasts, above 0 in 0, below 0 in 2" in sentence(found, "weights that moved")


def test_few_repeats_claim_nothing():
    found = tables(common_table(4, SMALL))
    for words in ("fixed in advance, Holm", "truncating", "weights that moved"):
        assert "cannot reject with 4 repeats" in sentence(found, words)
    assert "no verdict" in sentence(found, "truncating")
    assert "above 0 in 0, below 0 in 0" in sentence(found, "fixed in advance, Holm")
    one = tables(common_table(1, SMALL))
    assert "best cut" not in " ".join(text for text in claims(one) if "bootstrap" in text)
    assert "cannot reject with 1 repeat;" in sentence(one, "as data grow")


def test_a_study_without_other_arms_states_no_claim_about_them():
    found = tables(common_table(means=SMALL, others={}, updates=(9,)))
    assert not {"truncation", "weights", "correlations"} & found.keys()
    assert not any("truncating" in text or "weights that moved" in text for text in claims(found))


def test_amounts_at_which_nothing_was_learned_are_named(found):
    assert not any("learned" in text for text in cautions(found, {"toy": 0.2}))
    (warning,) = [text for text in cautions(found, {"toy": 0.81}) if "learned" in text]
    assert "at 1 % (8" in warning  # what was learned at the other amounts is enough
    assert any("was not checked" in text for text in cautions(found, {}))


def test_probes_are_correlated_with_the_frozen_cuts(toy):
    flat = dict.fromkeys(MEANS, (0.5, 0.6, 0.7, 0.8))  # the deeper the better
    probes = probe_table(14, ari_up=lambda layer: layer, ari_down=lambda layer: -layer, linear=lambda layer: layer)
    table = common_table(14, flat, {}, updates=(9,))
    everything = tables(table, probes)
    assert "supported by 1 of 2 measures" in sentence(everything, "ARI")
    found = everything["correlations"]
    whole = found[found["amount"].isna()].set_index("measure")
    assert whole["mean"].to_dict() == pytest.approx({"ari_up": 1, "ari_down": -1, "linear": 1})
    assert whole["verdict"].to_dict() == {"ari_up": "supported", "ari_down": "contradicted", "linear": np.nan}
    assert whole["p_holm"].isna().to_dict() == {"ari_up": False, "ari_down": False, "linear": True}
    assert len(found[found["amount"].notna()]) == 9
    few = tables(table[table["repeat"] < 4], probes)
    assert "supported by 0 of 2 measures" in sentence(few, "ARI")
    assert "correlations" not in tables(table[table["repeat"] < 2], probes.assign(task="other"))
