"""Phase 1's networks merged into one: each rule by hand, and as the start of Phase 2."""

from dataclasses import replace

import pytest
import torch

import config
from config import InputError
from engine import network_start
from study import ERM, IMPORTANCE, Arm, Study
from study.merging import MERGES, merge
from tests.factories import SMALL, make_run

START = {"a": torch.zeros(1, 2, 2), "b": torch.ones(1, 1)}  # five parameters of one seed
CHANGES = torch.tensor(
    [
        [4.0, -1.0, 3.0, 0.5, 0.1],
        [2.0, 5.0, -6.0, 0.2, 0.3],
        [3.0, 1.0, 2.0, -7.0, 0.0],
    ]
)


def moved(change):
    return {"a": START["a"] + change[:4].view(1, 2, 2), "b": START["b"] + change[4]}


@pytest.mark.parametrize(
    ("rule", "change"),
    [
        ("merged_mean", [3.0, 5 / 3, -1 / 3, -2.1, 0.4 / 3]),
        # the largest two of each: (4, 3), (5, -6), (3, -7); the third parameter's sum is −3: only −6 counts
        ("merged_ties", [3.5, 5.0, -6.0, -7.0, 0.0]),
        ("merged_consensus", [3.0, 0.0, -1 / 3, 0.0, 0.0]),  # large in two domains: the first and the third
    ],
)
def test_a_rule_merges_as_by_hand(rule, change):
    found = merge(rule, START, [moved(row) for row in CHANGES], percent=40)
    expected = moved(torch.tensor(change))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_every_start_of_the_settings_is_known():
    assert ("fresh", "phase1", *MERGES) == config.STARTS


@pytest.mark.parametrize("rule", MERGES)
def test_equal_networks_merge_into_themselves_where_all_is_kept(rule):
    found = merge(rule, START, [moved(CHANGES[0])] * 3, percent=100)
    for name, value in moved(CHANGES[0]).items():
        torch.testing.assert_close(found[name], value)


def test_seeds_do_not_mix_and_a_failed_one_has_no_number():
    two = [{k: torch.cat([v, v + 1]) for k, v in moved(row).items()} for row in CHANGES]
    start = {k: torch.cat([v, v + 1]) for k, v in START.items()}
    two[1]["a"][1, 0, 0] = torch.inf
    found = merge("merged_ties", start, two, percent=40)
    alone = merge("merged_ties", START, [moved(row) for row in CHANGES], percent=40)
    for name in START:
        assert torch.equal(found[name][0], alone[name][0])
        assert found[name][1].isnan().all()


@pytest.mark.parametrize("rule", MERGES)
def test_phase_2_begins_with_the_merged_networks_of_its_sources(data, tmp_path, rule):
    run = make_run(data, tmp_path, seeds=2)
    study = Study(run, [ERM, Arm("erm", rule), Arm("importance", rule)])
    study.train()
    percent = run.settings.importance_threshold_percentile
    for holdout in run.holdouts:
        sources = [run.archive.phase1(domain) for domain in run.data.sources([holdout])]
        expected = merge(rule, sources[0].params("start"), [own.params() for own in sources], percent)
        for arm in study.arm_names[1:]:
            found = run.archive.phase2(holdout, arm).params("start")
            for name, value in expected.items():
                assert torch.equal(found[name], value), (arm, name)
    fresh = network_start(run.data, (0, 1), "fresh_start", run.settings, run.domains, "in")
    assert torch.equal(run.archive.phase2(holdout, "erm").params("start")["layers.0.weight"], fresh["layers.0.weight"])
    assert [arm.saw_validation(run.settings) for arm in study.arms] == [False, True, True]


def test_the_setting_gives_the_start_of_the_arm(data, tmp_path):
    by_setting = Study(make_run(data, tmp_path / "a", seeds=2, settings=replace(SMALL, ph2_init="merged_ties")))
    by_arm = Study(make_run(data, tmp_path / "b", seeds=2), [Arm("erm", "merged_ties"), Arm(start="merged_ties")])
    for study in (by_setting, by_arm):
        study.train()
    for one, other in zip((ERM, IMPORTANCE), by_arm.arms, strict=True):
        a, b = (s.run.archive.phase2("art", arm.name).params() for s, arm in ((by_setting, one), (by_arm, other)))
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_an_unknown_start_is_refused():
    with pytest.raises(InputError, match="no start 'merged'; there are fresh, phase1, merged_mean"):
        Arm("erm", "merged")
