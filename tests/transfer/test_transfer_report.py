"""What the report writes: complete tables in fractions, the same bytes each time, and words for what they say."""

import numpy as np
import pandas as pd
import pytest

from config import InputError
from tests.transfer.made_tables import common_table, probe_table
from transfer.claims import claims, studies
from transfer.report import read, report, shown_tables, write
from transfer.statistics import tables

MEANS = {0.01: (0.60, 0.70, 0.80), 1.0: (0.96, 0.93, 0.90)}
ABOUT = {"pretrained on": "0-4", "chance": {"toy": 0.2}, "depth": {"toy": 2}}
PROBES = probe_table(14, layers=3, ari_kmeans=lambda layer: layer)


@pytest.fixture(scope="module")
def table():
    return common_table(14, MEANS)


@pytest.fixture(scope="module")
def written(table, tmp_path_factory):
    folder = tmp_path_factory.mktemp("transfer") / "new"
    return folder, write(folder, table, ABOUT, PROBES)


def test_every_table_and_the_report_are_written_and_can_be_read(written, table):
    folder, text = written
    found = tables(table, PROBES, ABOUT["depth"])
    assert {path.name for path in folder.iterdir()} == {f"{name}.csv" for name in found} | {"report.txt"}
    assert (folder / "report.txt").read_text("utf-8") == text
    again = read(folder)
    for name, expected in found.items():
        pd.testing.assert_frame_equal(again[name], expected, check_dtype=False, rtol=1e-5, atol=1e-9)
    assert again["accuracy"]["mean"].between(0, 1).all()
    assert claims(again) == claims(found)


def test_the_report_says_what_the_study_is_and_claims_before_tables(written):
    _, text = written
    lines = text.splitlines()
    assert "pretrained on: 0-4" in lines
    assert not any(line.startswith(("chance", "depth")) for line in lines)
    assert text.index("toy: the first c layers") < text.index("CONFIRMATORY") < text.index("SECOND FAMILY")
    assert max(map(len, text[: text.index("CONFIRMATORY")].splitlines())) <= 120
    for word in ("frozen@2", "+20.", "truncated@1 − frozen@1", "ari_kmeans", "training images", "50 updates"):
        assert word in text


def test_a_second_report_has_the_same_bytes_and_no_table_of_another_study(written, table, tmp_path):
    folder, text = written
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    shuffled = table.sample(frac=1, random_state=1)
    assert write(tmp_path, shuffled, ABOUT, PROBES) == text
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    write(tmp_path, common_table(3, MEANS, others={}, updates=(9,)), ABOUT)
    gone = {"weights.csv", "truncation.csv", "correlations.csv"}
    assert {path.name for path in tmp_path.iterdir()} == before.keys() - gone


def test_tables_for_reading_are_in_per_cent_and_points_with_marks(table):
    few = table[(table["amount"] == 0.01) | (table["repeat"] < 5)]
    ((title, own),) = studies(tables(few))
    shown = shown_tables(own)

    def table_of(start):
        return next(cells for heading, cells in shown.items() if heading.startswith(start))

    assert title == "toy"
    accuracy = table_of("accuracy (%), mean")
    assert accuracy.loc["repeats"].to_dict() == {"1 %": "14", "100 %": "5"}
    assert accuracy.loc["training images"].to_dict() == {"1 %": "10", "100 %": "1,000"}
    assert accuracy.loc["frozen@2", "1 %"].startswith("80.")
    assert " ± 0." in accuracy.loc["frozen@2", "1 %"]
    family = table_of("CONFIRMATORY")
    assert family.loc["frozen@1 − scratch", "1 %"].endswith("] *")
    assert family.loc["frozen@1 − scratch", "100 %"].startswith("−")
    assert family.loc["frozen@1 − scratch", "100 %"].endswith("] †")
    truncated = table_of("truncated")
    assert truncated.loc["truncated@1 − frozen@1", "1 %"].endswith(" ok")
    assert truncated.loc["truncated@1 − frozen@1", "100 %"].endswith("†")


def test_arms_that_were_never_measured_are_no_rows(table):
    unmeasured = table.assign(
        protocol="original", seen_accuracy=0.5, accuracy=table["accuracy"].mask(table["arm"] == "truncated")
    )
    text = report(tables(unmeasured[unmeasured["updates"] == 2000]), {})
    assert "truncated was never measured" in text
    assert "truncated@1  " not in text
    assert "nan" not in text


def test_one_repeat_is_reported_without_intervals_or_verdicts(table):
    text = report(tables(table[table["repeat"] == 0]), ABOUT)
    assert "nan" not in text
    assert "] *" not in text
    assert "cannot reject with 1 repeat" in text


def test_runs_that_all_failed_are_counted(table):
    broken = table.assign(failed=np.where(table["arm"] == "moved", "the loss is no longer finite", None))
    found = tables(broken[broken["updates"] == 2000])
    text = report(found, ABOUT)
    assert f"{14 * 2} runs failed and are left out of every comparison (moved 28)" in text
    assert found["weights"]["verdict"].eq("no pairs").all()


def test_a_directory_without_a_report_is_refused(tmp_path):
    with pytest.raises(InputError, match="--results-dir"):
        read(tmp_path)
