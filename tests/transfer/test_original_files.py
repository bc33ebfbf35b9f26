"""The original's result files: what they say about themselves, their analysis, and ours in their form."""

import json
import os
from itertools import product
from pathlib import Path

import pytest

import experiment
from config import InputError
from storage import Results
from study import Execution
from transfer import (
    ConvNetworks,
    OriginalSettings,
    OriginalStudy,
    arms_of,
    export_original,
    import_original,
    load_task,
    long_table,
)
from transfer.original_files import cluster_table, common_denominator, common_table, facts, result_files

DATA = os.environ.get("TRANSFER_DATA")
KEYS = ["lr", "sampled_percentage", "sampled_cut_point", "repeat", "train_acc", "test_acc"]
HEADER = {"depth": 2, "batch_size": 64, "num_train": 10, "fine_tune_classes": [2, 3, 4, 5, 6, 7]}
TRAIN, TEST = 30_000, 6_000  # CIFAR-10's images of these classes


def runs(images, cuts=(0, 1, 2), amounts=(0.01, 0.5), repeats=12, shift=0):
    """Runs whose accuracies are whole shares of so many images."""
    made = []
    for number, (amount, cut, repeat) in enumerate(product(amounts, cuts, range(repeats))):
        right = images // 3 + 7 * cut + (31 * number) % 97 + shift
        made.append(dict(zip(KEYS, (0.001, amount, cut, repeat, 1.0, right / images), strict=True)))
    return made


def write(directory, name, entries, header=HEADER, folder="CIFAR"):
    path = directory / folder / "results" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([header, *entries]))
    return path


def said(directory):
    return dict(facts(result_files(directory)))


def test_the_denominator_tells_how_many_images_there_were():
    assert common_denominator([0.25, 1 / 3, 0]) == 12
    assert common_denominator(count / 29_404 for count in (20_284, 23_001, 25_997)) == 29_404
    assert common_denominator([0.123456789123, 0.5, 0.7071067811865]) > 10**6


@pytest.mark.parametrize(("images", "measure"), [(TEST, "accuracy"), (TRAIN, "seen_accuracy")])
def test_the_test_set_is_told_by_the_denominator(tmp_path, images, measure):
    write(tmp_path, "cuts_regular_classes_FR", runs(images))
    (file,) = result_files(tmp_path)
    assert (file.task, file.setting, file.measure, file.images) == ("cifar", "FR", measure, images)
    assert f"{images:,} images" in said(tmp_path)["cifar FR"]
    table = common_table([file])
    other = ({"accuracy", "seen_accuracy"} - {measure}).pop()
    assert table[measure].notna().all()
    assert table[other].isna().all()
    assert set(table["n"]) == {270, 13_500}  # of the 27,000 that validation leaves


def test_settings_become_arms(tmp_path):
    for setting in ("FR", "F", "R", "FT"):
        write(tmp_path, f"cuts_regular_classes_{setting}", runs(TRAIN, repeats=2))
    table = common_table(result_files(tmp_path))
    found = set(zip(table["arm"], table["cut"], strict=True))
    layers = {("frozen", 1), ("frozen", 2), ("frozen+rest", 1), ("warm", 1), ("scratch", 0), ("finetune", 2)}
    assert found == layers | {("truncated", cut) for cut in range(3)}
    assert not table.duplicated(["arm", "cut", "amount", "repeat"]).any()


def test_settings_on_different_images_are_not_compared(tmp_path):
    write(tmp_path, "cuts_regular_classes_FR", runs(TEST, [1, 2], [0.01]))
    write(tmp_path, "cuts_regular_classes_FT", runs(TRAIN, [1, 2], [0.01]))
    (sentence,) = [words for name, words in said(tmp_path).items() if "FR and FT" in name]
    assert "cannot be compared" in sentence
    assert "0 of 12" in sentence
    table, text = import_original(tmp_path)
    assert "cannot be judged" in text
    assert table.groupby("arm")[["accuracy", "seen_accuracy"]].count().loc["truncated"].tolist() == [0, 24]


def test_settings_on_the_same_images_agree_where_they_are_one_program(tmp_path):
    write(tmp_path, "cuts_regular_classes_FR", runs(TRAIN))
    write(tmp_path, "cuts_regular_classes_FT", runs(TRAIN))
    write(tmp_path, "baselines_regular_classes", [run | {"sampled_cut_point": -1} for run in runs(TRAIN, cuts=[0])])
    found = said(tmp_path)
    assert "24 of 24" in found["cifar FR and FT"]
    assert "cannot" not in found["cifar FR and FT"]
    assert "of 24" in found["cifar baselines and cut 0 of FR"]


def test_few_repeats_are_said_to_reject_nothing(tmp_path):
    write(tmp_path, "cuts_regular_classes_FR", runs(TRAIN, repeats=5) + runs(TRAIN, amounts=[0.1]))
    words = said(tmp_path)["cifar FR"]
    assert "5 at 1 %, 12 at 10 %, 5 at 50 %" in words
    assert "at 1 %, 50 % no test can reject (p ≥ 0.0625)" in words
    assert "at most 50, 430, 2,110 updates" in words


def test_clusters_of_a_convolution_are_those_of_the_cut_above_it(tmp_path):
    assert cluster_table(tmp_path) is None
    entries = [
        {"Percentage": amount, "Repeat": repeat, "Layer": f"conv{layer}", "ARI": layer / 10}
        for amount, repeat, layer in product((0.01, 0.1), range(4), range(3))
    ]
    path = write(tmp_path, "regular_classes_cluster", [])
    path.write_text(json.dumps(entries))
    table = cluster_table(tmp_path)
    assert table.groupby("measure").size().to_dict() == {"ari at 1 %": 12, "ari at 10 %": 12}
    assert (table["value"] == (table["layer"] - 1) / 10).all()
    assert set(table["layer"]) == {1, 2, 3}
    path.write_text(json.dumps([*entries, {"Layer": "fc"}]))
    with pytest.raises(InputError, match="entry 25"):
        cluster_table(tmp_path)


RUN = runs(TEST)[0]


@pytest.mark.parametrize(
    ("entries", "header", "named"),
    [
        ([RUN | {"test_acc": 1.5}], HEADER, "test_acc"),
        ([RUN | {"test_acc": None}], HEADER, "test_acc"),
        ([RUN | {"train_acc": "high"}], HEADER, "train_acc"),
        ([RUN | {"sampled_cut_point": 3}], HEADER, "sampled_cut_point"),
        ([RUN | {"sampled_cut_point": True}], HEADER, "sampled_cut_point"),
        ([RUN | {"sampled_percentage": 0}], HEADER, "sampled_percentage"),
        ([RUN | {"repeat": -1}], HEADER, "repeat"),
        ([{name: value for name, value in RUN.items() if name != "lr"}], HEADER, "lr"),
        ([RUN, RUN], HEADER, "twice"),
        ([], HEADER, "no runs"),
        ([3], HEADER, "list"),
        ([RUN], {}, "parameters"),
        ([RUN], HEADER | {"fine_tune_classes": [2, 10]}, "fine_tune_classes"),
        ([RUN | {"test_acc": 0.123457}], HEADER, "30000"),
    ],
)
def test_damaged_files_are_refused_in_one_sentence(tmp_path, entries, header, named):
    write(tmp_path, "cuts_regular_classes_FR", entries, header)
    with pytest.raises(InputError, match=named):
        import_original(tmp_path)


def test_places_without_files_or_with_unknown_ones(tmp_path):
    with pytest.raises(InputError, match="no directory"):
        import_original(tmp_path / "nowhere")
    with pytest.raises(InputError, match="cuts_"):
        import_original(tmp_path)
    path = write(tmp_path, "cuts_regular_classes_FR", [RUN], folder="SVHN")
    with pytest.raises(InputError, match="SVHN"):
        import_original(tmp_path)
    path.rename(write(tmp_path, "cuts_regular_classes_X", [RUN]))
    with pytest.raises(InputError, match="'X'"):
        import_original(tmp_path / "CIFAR")
    write(tmp_path / "more", "cuts_regular_classes_FR", [RUN])
    write(tmp_path / "more" / "copy", "cuts_regular_classes_FR", [RUN])
    with pytest.raises(InputError, match="twice"):
        import_original(tmp_path / "more")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A short study of the digits, by the original's protocol."""
    networks = ConvNetworks(channels=2)
    kinds = ("scratch", "finetune", "frozen", "frozen+rest", "truncated")
    arms = arms_of(kinds, [0, 1, 6], networks.depth)
    settings, execution = OriginalSettings(epochs=1, network=networks.facts()), Execution(progress=False)
    results = Results(tmp_path_factory.mktemp("study"))
    own = OriginalStudy([load_task("digits")], networks, settings, results, arms, [0.1, 1.0], [0, 1], None, execution)
    own.train()
    return own


def test_an_export_has_exactly_the_keys_of_the_original(tmp_path, study):
    paths = export_original(tmp_path, study.results)
    names = {f"cuts_regular_classes_{setting}" for setting in ("FR", "F", "FT")} | {"baselines_regular_classes"}
    assert {path.stem for path in paths} == names
    for path in paths:
        header, *entries = json.loads(path.read_text("utf-8"))
        assert header["test"] == "true"
        assert header["fine_tune_classes"] == [5, 6, 7, 8, 9]
        assert all(list(entry) == KEYS for entry in entries)
        cuts = {entry["sampled_cut_point"] for entry in entries}
        assert cuts == ({-1} if path.stem.startswith("baselines") else {0, 1, 6})
        order = [(entry["sampled_percentage"], entry["sampled_cut_point"], entry["repeat"]) for entry in entries]
        assert order == sorted(order)
    before = {path: path.read_bytes() for path in paths}
    assert {path: path.read_bytes() for path in export_original(tmp_path, study.results)} == before


def test_what_was_exported_is_read_again(tmp_path, study):
    export_original(tmp_path, study.results)
    table, text = import_original(tmp_path, tmp_path / "report")
    assert text == (tmp_path / "report" / "report.txt").read_text("utf-8")
    columns = ["task", "protocol", "arm", "cut", "amount", "n", "repeat", "accuracy"]
    own = long_table(study.records())[columns]
    twice = (table["arm"] == "truncated") & (table["cut"] == 6)  # the same runs as frozen at 6
    again = table.loc[~twice, columns]
    order = ["arm", "cut", "amount", "repeat"]
    assert again.sort_values(order, ignore_index=True).equals(own.sort_values(order, ignore_index=True))


def test_the_last_checkpoint_is_exported_and_the_rest_left_out(tmp_path, study, caplog):
    results, (record, *_) = Results(tmp_path / "own"), study.records()
    results.claim(study.settings, study.facts)
    shares = {"50": 0.25, "200": 0.75, "100": 0.5}
    own = record | {"key": "a", "accuracy": shares, "balanced_accuracy": shares, "arm": "frozen", "cut": 3}
    del own["train_accuracy"]
    others = [{"arm": "moved"}, {"task": "pacs"}, {"failed": "why", "accuracy": None}]
    results.append([own, *(own | {"key": str(i)} | other for i, other in enumerate(others))])
    (path,) = export_original(tmp_path / "out", results)
    (entry,) = json.loads(path.read_text("utf-8"))[1:]
    assert (entry["sampled_cut_point"], entry["test_acc"], entry["train_acc"]) == (3, 0.75, None)
    assert "3 records" in caplog.text


def test_nothing_to_export(tmp_path):
    with pytest.raises(InputError, match="layer-wise"):
        export_original(tmp_path / "out", Results(tmp_path))
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("restored")
def test_commands(tmp_path, study, capsys):
    out, report = str(tmp_path / "out"), tmp_path / "report"
    assert experiment.main(["export-original", out, "--results-dir", str(study.results.directory)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    assert experiment.main(["import-original", out, "--output", str(report)]) == 0
    assert capsys.readouterr().out.strip() == (report / "report.txt").read_text("utf-8").strip()
    assert experiment.main(["import-original", str(tmp_path / "nowhere")]) == 2
    assert experiment.main(["export-original", out, "--results-dir", str(tmp_path / "nowhere")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


@pytest.mark.skipif(not DATA, reason="TRANSFER_DATA names no folder with the original's files")
def test_the_eleven_published_files():
    if not list(Path(DATA).rglob("cuts_*_FT.json")):
        pytest.skip("TRANSFER_DATA has no files of the original")
    files = [file for file in result_files(DATA) if file.setting]
    assert len(files) == 11
    assert {file.name for file in files if file.measure == "accuracy"} == {"cifar FR", "cifar_random FR"}
    assert all(len(file.runs) == 560 for file in files)
    found = said(DATA)
    assert "0 of 80" in found["cifar FR and FT"]
    assert "80 of 80" in found["fashion FR and FT"]
    table = common_table(files)
    own = table[(table["task"] == "mnist") & (table["amount"] == 0.01)]
    medians = own.groupby("cut")["seen_accuracy"].median().mul(100).round(2)
    assert medians.tolist() == [86.40, 76.63, 76.80, 91.60, 93.27, 92.52, 88.29]
