"""How well classes cluster in each layer, in the form of the original's files."""

import json
import math

import numpy as np
import pytest
import torch
from sklearn.cluster import AgglomerativeClustering
from sklearn.metrics import adjusted_rand_score

from config import InputError
from storage import Results
from study import Execution
from transfer import (
    ConvNetworks,
    TransferSettings,
    TransferStudy,
    arms_of,
    export_clusters,
    export_original,
    import_original,
    load_task,
    original_clusters,
)
from transfer.original_clusters import pair_scores
from transfer.original_files import cluster_table
from transfer.study import filled, subset

KEYS = ["Percentage", "Repeat", "Layer", "Precision", "Recall", "Accuracy", "ARI", "Dataset", "Split"]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A short study of the digits."""
    networks = ConvNetworks(channels=4)
    settings, execution = TransferSettings(5, 20, 16, 1e-2, networks.facts()), Execution(progress=False)
    arms, results = arms_of(["scratch", "frozen"], [0, 6], 6), Results(tmp_path_factory.mktemp("study"))
    own = TransferStudy(
        [load_task("digits")], networks, settings, results, arms, [0.1, 1.0], [0, 3], execution=execution
    )
    own.train()
    return own


def test_pairs_are_counted_as_by_hand():
    clusters, labels = np.array([0, 0, 0, 1, 1]), np.array([0, 0, 1, 1, 1])
    assert pair_scores(clusters, labels) == (2 / 4, 2 / 4)  # together: 01 02 12 34; the same: 01 23 24 34
    assert pair_scores(labels, labels) == (1, 1)
    assert pair_scores(np.array([0, 0, 0]), np.array([0, 0, 1])) == (1 / 3, 1)
    assert math.isnan(pair_scores(np.array([0, 1, 2]), np.array([0, 0, 1]))[0])


def test_there_is_an_entry_for_each_amount_repeat_and_convolution(study, tmp_path):
    (path,) = export_clusters(tmp_path, study.results, progress=False)
    assert path == tmp_path / "digits" / "results" / "regular_classes_cluster.json"
    entries = json.loads(path.read_text("utf-8"))
    assert all(list(entry) == KEYS for entry in entries)
    units = [(entry["Percentage"], entry["Repeat"], entry["Layer"]) for entry in entries]
    assert units == [(a, r, f"conv{c}") for a in (0.1, 1.0) for r in (0, 3) for c in range(6)]
    for entry in entries:
        assert all(entry[name] is None or 0 <= entry[name] <= 1 for name in ("Precision", "Recall", "Accuracy"))
    before = path.read_bytes()
    export_clusters(tmp_path, study.results, progress=False)
    assert path.read_bytes() == before


def test_what_is_clustered_is_what_the_convolutions_give_for_the_subset(study, tmp_path):
    (path,) = export_clusters(tmp_path, study.results, progress=False)
    entries = {(e["Percentage"], e["Repeat"], e["Layer"]): e for e in json.loads(path.read_text("utf-8"))}
    (task,) = study.tasks
    examples = study.finetuning(task)
    rows = subset(task, examples, 0.1, 3)
    assert len(rows) == 72
    network = filled(study.networks.outline(examples), study.networks_of(task)[3][1])
    with torch.no_grad():
        maps = network.convs[1](network.prefix(examples.inputs[rows], 1)).mean((2, 3)).double().numpy()
    found = AgglomerativeClustering(5, metric="cosine", linkage="average").fit_predict(maps)
    wanted = adjusted_rand_score(examples.labels[rows], found)
    assert entries[0.1, 3, "conv1"]["ARI"] == pytest.approx(wanted, abs=1e-6)


def test_the_import_reads_them(study, tmp_path):
    export_original(tmp_path, study.results)
    export_clusters(tmp_path, study.results, progress=False)
    table = cluster_table(tmp_path)
    assert set(table["measure"]) == {"ari at 10 %", "ari at 100 %"}
    assert table.groupby("measure").size().tolist() == [12, 12]
    assert "ARI points at the layers" in " ".join(import_original(tmp_path)[1].split())


def test_maps_without_a_direction_give_null(study, tmp_path, monkeypatch):
    def dead(network, images):
        return [np.zeros((len(images), 4), np.float32)]

    monkeypatch.setattr(original_clusters, "averaged_maps", dead)
    (path,) = export_clusters(tmp_path, study.results, progress=False)
    entries = json.loads(path.read_text("utf-8"))
    assert {entry["ARI"] for entry in entries} == {entry["Recall"] for entry in entries} == {None}
    assert cluster_table(tmp_path)["value"].isna().all()


def test_subsets_that_are_too_large_are_left_out(study, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(original_clusters, "MOST_IMAGES", 100)
    (path,) = export_clusters(tmp_path, study.results, progress=False)
    assert {entry["Percentage"] for entry in json.loads(path.read_text("utf-8"))} == {0.1}
    assert "717 images are not clustered" in caplog.text


def test_a_network_that_is_not_finite_is_said(study, tmp_path, monkeypatch):
    monkeypatch.setattr(original_clusters, "averaged_maps", lambda *given: [np.full((72, 4), np.nan)])
    with pytest.raises(InputError, match="repeat 0 of digits is not finite"):
        export_clusters(tmp_path, study.results, progress=False)
    assert not list(tmp_path.iterdir())


def test_images_must_be_those_of_the_study(study, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="no networks pretrained"):
        export_clusters(tmp_path, Results(tmp_path))
    stored = study.results.read_settings()
    stored["features"]["fingerprint"] = "another"
    monkeypatch.setattr(Results, "read_settings", lambda self: stored)
    with pytest.raises(InputError, match="on other images"):
        export_clusters(tmp_path, study.results)


def test_the_command(study, tmp_path, command):
    options = "out", "--results-dir", study.results.directory
    code, printed, _ = command("export-original", *options, "--clusters")
    assert code == 0
    assert [line.rpartition("/")[2] for line in printed.split()][-1] == "regular_classes_cluster.json"
    assert command("export-original", *options, "--data", "x")[0] == 2
