"""The importance of columns: closed forms, planted columns, and a study that goes on from its records."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pandas as pd
import pytest
import torch

from config import InputError, Settings
from engine import fit_linear
from evidence import columns
from evidence.columns import (
    ALL,
    BEST,
    CRITERIA,
    DENSITIES,
    FAMILY,
    LAST,
    STRENGTHS,
    Choice,
    ColumnProtocol,
    Layout,
    arms_of,
    at_chosen,
    chosen_strengths,
    column_importance,
    kept_columns,
)
from evidence.figures import save_columns
from importance import mask_size
from storage import load_features, save_features
from study import Execution, Run
from tests.factories import blobs, dated, everything, make_record, save_blobs

LAYOUT = Layout(3, ("cls", "mean"), 10)
LAYERS = {"blocks": 3, "kinds": ["cls", "mean"], "width": 10}
QUIET = Execution(progress=False)


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """Blobs that pass for all layers of a ViT of three blocks, ten columns wide."""
    d, path = blobs(per_cell=12, size=60), tmp_path_factory.mktemp("layers") / "layers.safetensors"
    x = d.features + 4 * torch.randn(d.features.shape, generator=torch.Generator().manual_seed(1))
    names = d.class_names, d.domain_names, d.files
    save_features(path, x.half(), d.labels, d.domains, *names, dataset="blobs", layers=LAYERS)
    return load_features(path)


def protocol(features, directory, seeds=(0, 1, 2), settings=None):
    return ColumnProtocol(Run(features, settings or Settings.current(), directory, seeds, execution=QUIET))


@pytest.fixture(scope="module")
def whole(features, tmp_path_factory):
    made = protocol(features, tmp_path_factory.mktemp("columns"))
    made.train()
    made.write()
    return made


def test_another_executor_fits_the_same(whole, features, tmp_path):
    with ThreadPoolExecutor(1) as executor:
        execution = Execution(progress=False, executor=executor)
        elsewhere = ColumnProtocol(Run(features, Settings.current(), tmp_path, (0, 1, 2), execution=execution))
        elsewhere.train()
    assert (tmp_path / "records.jsonl").read_bytes() == (whole.run.results.directory / "records.jsonl").read_bytes()


# Importance and what is kept


def test_importance_is_the_squared_norm_of_weights_centred_over_classes():
    weights = torch.tensor([[1.0, 2.0, 0.0], [3.0, 2.0, 0.0]])  # of two classes, three columns
    assert column_importance(weights).tolist() == [2.0, 0.0, 0.0]
    assert torch.equal(column_importance(weights + 5), column_importance(weights))


def test_minimum_asks_for_importance_in_each_domain():
    importances = [torch.rand(60, generator=torch.Generator().manual_seed(domain)) for domain in range(3)]
    lowest, total = torch.stack(importances).amin(0), torch.stack(importances).sum(0)
    for criterion, scores in (("min", lowest), ("sum", total)):
        kept = kept_columns(Choice(criterion=criterion, density=20.0), LAYOUT, importances)
        assert set(kept.nonzero().squeeze(1).tolist()) == set(scores.topk(12).indices.tolist())
        least = kept_columns(Choice("", criterion, "inverted", 20.0), LAYOUT, importances)
        assert set(least.nonzero().squeeze(1).tolist()) == set((-scores).topk(12).indices.tolist())


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("density", DENSITIES)
def test_random_columns_are_as_many_in_each_layer_and_those_of_the_seed(criterion, density):
    importances = [torch.rand(60, generator=torch.Generator().manual_seed(domain)) ** 3 for domain in range(3)]
    kept, drawn, again, other = (
        kept_columns(Choice("", criterion, control, density), LAYOUT, importances, seed, "art")
        for control, seed in (("", 0), ("random_layer", 0), ("random_layer", 0), ("random_layer", 1))
    )
    counts = [mask.view(6, 10).sum(1).tolist() for mask in (kept, drawn, other)]
    assert counts[0] == counts[1] == counts[2]
    assert sum(counts[0]) == mask_size(60, density)
    assert torch.equal(drawn, again)
    assert density < 20 or not torch.equal(drawn, kept)
    assert density < 20 or not torch.equal(drawn, other)


def test_layers_are_blocks_of_columns():
    last = kept_columns(Choice("block 3 cls"), LAYOUT, [])
    assert last.nonzero().squeeze(1).tolist() == [*range(40, 50)]
    assert kept_columns(Choice(), LAYOUT, []).all()
    arms = arms_of(LAYOUT)
    assert len(arms) == 3 + 2 * 3 * 4
    assert {name for pair in FAMILY for name in pair} <= arms.keys()
    assert arms[LAST] == (Choice("block 3 cls"),)
    assert [choice.name for choice in arms[BEST]] == [*LAYOUT.layers]
    assert all(name == choice.name for name, (choice, *_) in arms.items() if name not in (LAST, BEST))


def test_minimum_prefers_what_is_predictive_in_all_domains_and_the_sum_need_not():
    """Column 0 says a little in each domain; column 1 says nearly everything, in one alone."""
    draw = torch.Generator().manual_seed(0)
    importances = []
    for domain in range(3):
        y = torch.arange(200) % 2
        x = torch.randn(200, 4, generator=draw)
        x[:, 0] += y - 0.5
        x[:, 1] += 4 * (y - 0.5) if domain == 0 else 0
        importances.append(column_importance(fit_linear(x, y, 2, [1.0]).weights[0]))
    layout = Layout(2, ("cls",), 2)
    first = {
        criterion: kept_columns(Choice(criterion=criterion, density=25.0), layout, importances).tolist()
        for criterion in CRITERIA
    }
    assert first == {"min": [True, False, False, False], "sum": [False, True, False, False]}


# Selection


def validated(choice, strength, holdout, seed, validation):
    return make_record(choice.at(strength), holdout, seed, strength) | {"validation": validation}


def test_each_arm_takes_c_and_layer_of_best_mean_validation_the_smaller_and_earlier_of_equals():
    one, two = Choice("block 1 cls"), Choice("block 1 mean")
    values = {
        (one, "art"): [(0.1, 0.1), (0.5, 0.6), (0.7, 0.8), (0.9, 0.6), (0.2, 0.2)],
        (two, "art"): [(0.1, 0.1), (0.1, 0.2), (0.8, 0.7), (0.1, 0.1), (0.1, 0.1)],
        (one, "photo"): [(0.1, 0.1), (0.1, 0.1), (0.1, 0.1), (0.1, 0.1), (0.3, 0.3)],
        (two, "photo"): [(0.1, 0.1), (0.1, 0.1), (0.1, 0.1), (0.1, 0.1), (0.4, 0.3)],
    }
    records = [
        validated(choice, strength, holdout, seed, value)
        for (choice, holdout), shares in values.items()
        for strength, of_seeds in zip(STRENGTHS, shares, strict=True)
        for seed, value in enumerate(of_seeds)
    ]
    chosen = chosen_strengths(records, {"single": (one, two)}, ["art", "photo"])
    assert chosen["choice"].tolist() == ["block 1 cls", "block 1 mean"]
    assert chosen["C"].tolist() == [STRENGTHS[2], STRENGTHS[4]]
    assert chosen["validation"].tolist() == pytest.approx([0.75, 0.35])
    assert chosen["edge"].tolist() == [False, True]
    own = at_chosen(records, chosen)
    assert [(r["algorithm"], r["holdout"], r["accuracy"]["full"]) for r in own] == [
        *[("single", "art", STRENGTHS[2])] * 2,
        *[("single", "photo", STRENGTHS[4])] * 2,
    ]


# The study


def test_the_first_seeds_try_every_c_and_the_others_the_chosen_one(whole):
    table = pd.DataFrame(whole.run.records()).groupby("seed").size()
    choices = 1 + 6 + 2 * 3 * 4  # all, single layers, criteria and controls at the densities
    assert table[0] == table[1] == choices * len(STRENGTHS) * 3
    taken = whole.chosen().groupby(["choice", "holdout", "C"]).ngroups
    assert table[2] == taken <= 27 * 3


def test_a_record_is_what_the_columns_of_the_choice_give(whole, features):
    data, seed, holdout = whole.run.data, 1, "photo"
    x = torch.nn.functional.normalize(features.features.float().view(-1, 6, 10), dim=2).flatten(1)
    rows = data.rows(["art", "sketch"], "in", [seed])[0]
    scores = []
    for source in ("art", "sketch"):
        own = data.rows([source], "in", [seed])[0]
        fitted = fit_linear(x[own], data.labels[own], 3, [columns.PHASE1_STRENGTH])
        scores.append(column_importance(fitted.weights[0]))
    kept = torch.stack(scores).amin(0).topk(12).indices
    fitted = fit_linear(x[rows][:, kept], data.labels[rows], 3, [10.0])
    right = fitted.predict(x[:, kept])[0] == data.labels
    (record,) = (
        r for r in whole.run.records() if (r["algorithm"], r["holdout"], r["seed"]) == ("min 20 %[C=10]", holdout, seed)
    )
    assert (record["columns"], record["C"], record["failed"]) == (12, 10.0, None)
    there = data.rows([holdout], "all", [seed])[0]
    assert record["accuracy"]["full"] == pytest.approx(right[there].double().mean().item(), abs=0.03)
    outside = [right[data.rows([s], "out", [seed])[0]].double().mean() for s in ("art", "sketch")]
    assert record["validation"] == pytest.approx(float(sum(outside)) / 2, abs=0.1)


def test_tables_and_report_say_what_was_measured(whole):
    tables, text = whole.tables(), (whole.run.results.directory / "report.txt").read_text()
    averages = tables["seeds"]
    assert averages.shape == (3, 27)
    assert averages.notna().all().all()
    assert tables["contrasts"]["contrast"].tolist() == [f"{arm} − {baseline}" for arm, baseline in FAMILY]
    densities = tables["densities"].set_index(["criterion", "density"])
    assert densities.loc[("min random_layer", 5.0), "mean"] == pytest.approx(averages["min random_layer 5 %"].mean())
    assert densities.loc[(ALL, 100.0), "above"] == 0
    difference = (averages["sum 1 %"] - averages[ALL]).mean()
    assert densities.loc[("sum", 1.0), "above"] == pytest.approx(difference)
    shares = tables["layers"].groupby(["criterion", "density"])["share"].mean()
    assert shares["min", 20.0] == pytest.approx(0.2)
    for word in ("min 5 % − min random_layer 5 %", "too few seeds", "of all layers", "3 seeds", "block 1 cls"):
        assert word in text


def test_what_is_there_is_not_fitted_again_and_equal_runs_write_equal_bytes(whole, features, tmp_path, monkeypatch):
    folder = whole.run.results.directory
    lines = (folder / "records.jsonl").read_text().splitlines(keepends=True)
    half = tmp_path / "half"
    shutil.copytree(folder, half)
    (half / "records.jsonl").write_text("".join(lines[: len(lines) // 2]) + lines[-1][:20])  # torn by a crash
    before, content = dated(folder), everything(folder)
    fitted = []
    monkeypatch.setattr(columns, "fit_linear", lambda *given: fitted.append(given[3]) or fit_linear(*given))
    again = protocol(features, folder)
    again.train()
    again.write()
    assert not fitted
    assert everything(folder) == content
    assert dated(folder)["records.jsonl"] == before["records.jsonl"]
    rest = protocol(features, half)
    rest.train()
    assert sum(map(len, fitted)) == len(lines) - len(lines) // 2
    assert (half / "records.jsonl").read_text() == "".join(lines)
    rest.write()
    assert (half / "report.txt").read_bytes() == (folder / "report.txt").read_bytes()


def test_more_seeds_are_added(whole, features, tmp_path):
    folder = shutil.copytree(whole.run.results.directory, tmp_path / "more")
    more = protocol(features, folder, seeds=range(4))
    more.train()
    assert more.importances("art").keys() == {0, 1, 2, 3}
    assert len(more.tables()["seeds"]) == 4
    about = json.loads((folder / "settings.json").read_text())
    assert set(about["holdouts"].values()) == {"0-3"}


def test_the_figure_is_drawn_from_the_tables(whole, tmp_path):
    folder = shutil.copytree(whole.run.results.directory, tmp_path / "copy")
    assert [path.name for path in save_columns(folder)] == ["density.png"]
    with pytest.raises(InputError, match="no study of columns"):
        save_columns(tmp_path)


def test_what_cannot_be_compared_is_refused(features, tmp_path):
    with pytest.raises(InputError, match="FEATURE_LAYERS"):
        protocol(save_blobs(tmp_path / "plain.safetensors"), tmp_path / "plain")
    for wrong in ({"blocks": 2}, {"kinds": 3}, {"width": "wide"}):
        header = features.header | {"layers": LAYERS | wrong}
        with pytest.raises(InputError, match="FEATURE_LAYERS"):
            Layout.of(replace(features, header=header))
    with pytest.raises(InputError, match="--seeds"):
        protocol(features, tmp_path / "one", seeds=(0,))
    with pytest.raises(InputError, match="SPLIT_SEED"):
        protocol(features, tmp_path / "split", settings=Settings.current(split_seed=0))
