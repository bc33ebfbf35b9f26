"""The figures of a run: from which numbers they are drawn, and of runs that give little to draw."""

import logging
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix

from config import InputError, Settings
from importance import normalize, top_k_mask
from models import FeedforwardClassifier
from storage import Results, load_features, save_features
from study import Study, figures, mask_source
from tests.factories import LEARNING, blobs, make_run, token_blobs


def words(figure):
    return " ".join(text.get_text() for text in figure.texts).replace("\N{NO-BREAK SPACE}", " ")


def small_run(folder, scale=1.0, settings=LEARNING, **kinds):
    """One holdout and two seeds, on features that may be all equal."""
    d = blobs(per_cell=10, **kinds)
    names = d.class_names, d.domain_names, d.files
    save_features(folder / "blobs.safetensors", scale * d.features, d.labels, d.domains, *names)
    return make_run(load_features(folder / "blobs.safetensors"), folder / "r", 2, settings, "photo")


@pytest.mark.parametrize(
    ("kind", "why"), [({"size": 1}, "two dimensions or more"), ({"scale": 0.0}, "features that are not all equal")]
)
def test_features_without_a_projection_are_told(tmp_path, kind, why):
    assert why in words(figures.projection_figure(small_run(tmp_path, **kind)))


def test_all_figures_of_networks_that_learn_nothing_are_drawn(tmp_path, caplog):
    study = Study(small_run(tmp_path, scale=0.0, settings=replace(LEARNING, hidden_sizes=(3, 2))))
    study.train()
    with caplog.at_level(logging.WARNING):
        paths = figures.save_all(study)
    assert caplog.text == ""
    assert {path.stem for path in paths} == {name for name, _ in figures.all_figures(study)}
    assert set(paths) == set((tmp_path / "r" / "plots").glob("*.png"))


def test_masks_that_mark_nothing_have_a_sentence_in_place_of_their_overlap(finished, tmp_path):
    study = Study(small_run(tmp_path, settings=replace(LEARNING, importance_threshold_percentile=0.0)))
    study.phase1()
    figure = figures.overlap_figure(study.run)
    assert "No mask marks a weight (0 % are kept)" in words(figure)
    assert not figure.axes
    assert figures.overlap_figure(finished.run).axes


@pytest.fixture
def drawn(monkeypatch):
    """Figures take a second each to draw: what they would be drawn from is noted, and a file is written."""
    noted = []
    kinds = ("weight_grids", "training_curves", "overlap_matrix", "accuracy_bars", "difference_plot")
    for name in (*kinds, "confusion_matrices", "feature_projection"):
        monkeypatch.setattr(f"visualization.{name}", lambda *given, **options: noted.append((*given, options)))
    monkeypatch.setattr("visualization.save", lambda figure, path: path.write_text("drawn"))
    return noted


@pytest.fixture
def copied(finished, data, tmp_path):
    """A copy of the finished study, to write to."""
    shutil.copytree(finished.run.results.directory, tmp_path, dirs_exist_ok=True)
    (tmp_path / "plots").mkdir(exist_ok=True)
    return Study(make_run(data, tmp_path, settings=LEARNING))


@pytest.mark.usefixtures("drawn")
def test_a_figure_that_fails_is_named_and_the_others_are_drawn_from_files_opened_once(
    copied, tmp_path, monkeypatch, caplog
):
    def fail(*_):
        raise np.linalg.LinAlgError("two\nlines")

    opened, load = [], Results.load

    def noted(self, kind, name):
        opened.append((kind, name))
        return load(self, kind, name)

    monkeypatch.setattr(figures, "overlap_figure", fail)
    monkeypatch.setattr(Results, "load", noted)
    lost = tmp_path / "plots" / "mask_overlap.png"
    lost.write_text("of an earlier run")
    copied.report()
    with caplog.at_level(logging.WARNING):
        paths = figures.save_all(copied)
    assert [path.stem for path in paths] == [n for n, _ in figures.all_figures(copied) if n != "mask_overlap"]
    assert all(path.read_text() == "drawn" for path in paths)
    assert not lost.exists()
    (message,) = (record.getMessage() for record in caplog.records)
    assert "'mask_overlap'" in message
    assert "(two lines)" in message
    assert len(opened) == len(set(opened)) > 10
    chosen = figures.save_all(copied, only=["accuracy", "phase1_art_"], format="pdf")
    assert [path.name for path in chosen] == [
        *(f"phase1_art_{kind}.pdf" for kind in figures.DOMAIN_GRIDS),
        "accuracy.pdf",
    ]


def test_the_names_of_all_figures(finished, tmp_path):
    names = [name for name, _ in figures.all_figures(finished)]
    domains = finished.run.domains
    assert len(names) == len(set(names))
    assert set(names) == {
        "features", "phase1_curves", "mask_overlap", "accuracy", "difference",
        *(f"confusion_{of}" for of in ("erm", "importance", "difference")),
        *(f"phase1_{domain}_{kind}" for domain in domains for kind in ("initial", "final", "normalized", "mask")),
        *(f"holdout_{domain}_{kind}" for domain in domains for kind in ("normalized", "mask")),
        *(f"phase2_curves_{domain}" for domain in domains),
    }  # fmt: skip
    assert next(iter(figures.all_figures(finished, tmp_path)))[0] == "samples"


@pytest.mark.parametrize(("seed", "said"), [(None, "seed 0"), (2, "seed 2"), (-1, "mean over 4 seeds")])
def test_grids_are_of_one_seed_or_of_the_mean_and_share_their_colours(finished, drawn, seed, said):
    def of(networks, kind):
        layers = networks.layers(kind)
        return [layer.float().mean(0) if seed == -1 else layer[seed or 0].float() for layer in layers]

    art, masks = finished.run.archive.phase1("art"), finished.run.archive.masks("art")
    for kind in ("initial", "final"):
        figures.domain_grids(finished.run, "art", kind, seed)
    figures.holdout_grids(finished.run, "art", "mask", seed)
    bound = max(float(layer.abs().max()) for kind in ("initial", "final") for layer in of(art, kind))
    stacks = of(art, "initial"), of(art, "final"), of(masks, "mask")
    for (found, title, style, limits, _), stack in zip(drawn, stacks, strict=True):
        assert "art" in title
        assert said in title
        assert limits == (pytest.approx((-bound, bound)) if style == "weights" else None)
        for layer, wanted in zip(found, stack, strict=True):
            torch.testing.assert_close(layer.float(), wanted)
    assert [call[2] for call in drawn] == ["weights", "weights", "importance" if seed == -1 else "mask"]


@pytest.mark.parametrize(("part", "said"), [("all", "images trained on"), ("in", "not trained on")])
def test_curves_of_phase1_say_whether_validation_was_trained_on(data, finished, drawn, tmp_path, part, said):
    run = make_run(data, tmp_path, settings=replace(LEARNING, ph1_data=part))
    run.archive = finished.run.archive
    figures.phase1_curves(run)
    assert said in drawn[0][-1]["names"]["validation_accuracy"]


def test_curves_of_phase2_end_at_the_accuracies_of_the_records(finished, drawn):
    figures.phase2_curves(finished, "photo")
    curves, _, freeze, _ = drawn[0]
    assert freeze == 2
    for arm, label in (("erm", "ERM"), ("importance", "importance mask")):
        last = {
            r["seed"]: r["accuracy"]["full"]
            for r in finished.records()
            if (r["algorithm"], r["holdout"], r["selection"]) == (arm, "photo", "last")
        }
        assert curves[label]["held_out_accuracy"].shape == (3, 4)
        assert curves[label]["held_out_accuracy"][-1].tolist() == pytest.approx([last[seed] for seed in range(4)])


def answers(run, holdout, arm, seed):
    """What an ordinary module with the weights on disk says about the images of the held-out domain; and the truth."""
    network = FeedforwardClassifier(8, 3, run.settings.hidden_sizes)
    network.load_state_dict({n: v[seed] for n, v in run.archive.phase2(holdout, arm).params().items()})
    rows = run.features.domains == run.features.domain_names.index(holdout)
    return network(run.features.features[rows].float()).argmax(1), run.features.labels[rows]


def summed(run, holdout, arm, seeds):
    matrices = []
    for seed in seeds:
        said, true = answers(run, holdout, arm, seed)
        matrices.append(confusion_matrix(true, said, labels=[0, 1, 2]))
    return sum(matrices)


def test_confusion_is_summed_over_seeds_and_all_images_of_the_domain(finished, drawn):
    figures.confusion_figure(finished, "importance", "erm")
    counts, _, title, baseline, _ = drawn[0]
    assert "importance mask − ERM" in title
    for arm, found in (("importance", counts), ("erm", baseline)):
        for holdout in ("art", "photo"):
            assert (found[holdout] == summed(finished.run, holdout, arm, range(4))).all()
            assert found[holdout].sum() == 4 * 90
            assert (found[holdout] != found[holdout].T).any()  # else rows and columns could be swapped unseen


@pytest.mark.parametrize("failed", [[0, 2, 0, -1], [1, 1, 1, 1]])
def test_confusion_leaves_out_networks_that_failed(finished, copied, failed):
    arrays, header = copied.run.results.load("histories", "phase2_art_erm")
    seeds = arrays.pop("seeds").tolist()
    copied.run.results.save("histories", "phase2_art_erm", seeds, arrays | {"failed": torch.tensor(failed)}, header)
    found = figures.confusion(copied.run, "art", "erm")
    ok = [seed for seed in range(4) if not failed[seed]]
    assert (found == (summed(finished.run, "art", "erm", ok) if ok else np.zeros((3, 3)))).all()


def test_a_study_is_found_again_in_its_directory(finished, data, tmp_path):
    study = figures.study_of(finished.run.results, lambda: data)
    assert (study.run.seeds, study.run.holdouts) == (finished.run.seeds, finished.run.holdouts)
    assert study.run.settings == finished.run.settings
    with pytest.raises(InputError, match="--results-dir"):
        figures.study_of(Results(tmp_path), lambda: pytest.fail("it looked for features"))
    other = small_run(tmp_path).features
    with pytest.raises(InputError, match="--features"):
        figures.study_of(finished.run.results, lambda: other)


def test_large_matrices_of_trained_blocks_have_figures_of_their_own(tmp_path):
    settings = Settings.current(trained_blocks=1, batch_size=16, ph1_num_epochs=1, ph2_num_epochs=1)
    study = Study(make_run(token_blobs(), tmp_path, 2, settings, "photo"))
    study.train()
    drawn = {path.stem for path in figures.save_all(study)}
    assert {f"holdout_photo_{kind}" for kind in ("importance", "density", "rows")} <= drawn
    assert {"phase1_art_importance", "phase1_sketch_importance", "confusion_erm"} <= drawn
    assert not any(name.endswith(("_initial", "_normalized", "_mask")) for name in drawn)
    again = Study(make_run(token_blobs(), tmp_path, 2, settings, "photo"))
    again.train()
    masks = again.run.archive.masks("photo").layers("mask")
    assert [layer.shape[1:] for layer in masks] == [(12, 12)] * 4 + [(16, 12), (12, 16)]
    n = sum(layer[0].numel() for layer in masks)
    assert sum(layer[0].sum() for layer in masks) == int(0.6 * n + 0.5)


@pytest.fixture(scope="module")
def of_blocks(tmp_path_factory):
    """Two seeds of one holdout, with the last block of a tiny ViT trained: 12-d, three heads."""
    settings = Settings.current(trained_blocks=1, batch_size=16, ph1_num_epochs=1, ph2_num_epochs=1)
    study = Study(make_run(token_blobs(), tmp_path_factory.mktemp("blocks"), 2, settings, "photo"))
    study.train()
    return study


def figure_of(study, name):
    return dict(figures.all_figures(study))[name]()


def test_the_names_of_all_figures_of_blocks(of_blocks):
    names = [name for name, _ in figures.all_figures(of_blocks)]
    assert len(names) == len(set(names))
    assert set(names) == {
        "features", "phase1_curves", "mask_overlap", "accuracy", "difference", "phase2_curves_photo",
        *(f"confusion_{of}" for of in ("erm", "importance", "difference")),
        "phase1_art_importance", "phase1_sketch_importance",
        *(f"holdout_photo_{kind}" for kind in ("importance", "density", "rows")),
    }  # fmt: skip


def test_importance_of_blocks_is_shown_by_head_and_by_part_of_the_hidden_units(of_blocks, monkeypatch):
    noted = []
    monkeypatch.setattr("visualization.matrices", lambda *given, **options: noted.append(given))
    figure_of(of_blocks, "holdout_photo_importance")
    ((attention, mlp), title, _, (low, high), _), *_ = noted
    moved = [of_blocks.run.archive.phase1(domain).layers("importance") for domain in ("art", "sketch")]
    summed = [a.double() + b.double() for a, b in zip(*moved, strict=True)]
    mean = torch.cat([layer.flatten(1) for layer in summed], 1).mean(1)
    query, _, _, output, first, last = summed  # as a ViT has them
    rows = dict(zip(attention.rows, attention.values, strict=True)) | dict(zip(mlp.rows, mlp.values, strict=True))
    assert [*rows] == ["query", "key", "value", "attention out", "MLP in", "MLP out"]
    for name, layer in (("query", query), ("attention out", output.mT), ("MLP in", first), ("MLP out", last.mT)):
        groups = 3 if layer.shape[1] == 12 and name in attention.rows else figures.MLP_PARTS
        parts = torch.stack([part.mean((1, 2)) for part in layer.tensor_split(groups, dim=1)], 1)
        torch.testing.assert_close(torch.tensor(rows[name]), 100 * ((parts / mean[:, None]).mean(0) - 1))
    assert "2 seeds" in title
    assert -low == high == max(abs(values).max() for values in rows.values())


def test_rows_of_blocks_are_those_of_largest_mean_importance(of_blocks, monkeypatch):
    noted = []
    monkeypatch.setattr("visualization.matrices", lambda *given, **options: noted.append(given))
    figure_of(of_blocks, "holdout_photo_rows")
    monkeypatch.setattr(figures, "MOST_COLUMNS", 6)
    figure_of(of_blocks, "holdout_photo_rows")
    monkeypatch.setattr(figures, "MOST_BLOCKS", 0)
    figure_of(of_blocks, "holdout_photo_rows")
    assert ["last block" in title for _, title, *_ in noted] == [False, False, True]
    wide, narrow, _ = (panels[0] for panels, *_ in noted)
    scores = normalize(mask_source(of_blocks.run, ["photo"], (0, 1)).own(of_blocks.run.settings).scores)
    mean = scores[0].double().mean(0)
    best = mean.mean(1).argsort(descending=True)[: figures.TOP_ROWS]
    assert list(wide.rows) == [f"row {row + 1}" for row in best.tolist()]
    np.testing.assert_allclose(wide.values, mean[best], rtol=1e-6)
    np.testing.assert_allclose(narrow.values, mean[best].view(-1, 6, 2).mean(-1), rtol=1e-6)
    assert (list(narrow.columns), narrow.xlabel) == ([1, 3, 5, 7, 9, 11], "column (means of 2)")


def test_density_of_blocks_is_of_the_mask_by_row(of_blocks, monkeypatch):
    noted = []
    monkeypatch.setattr("visualization.row_densities", lambda *given: noted.append(given))
    figure_of(of_blocks, "holdout_photo_density")
    ((rows, title, share, chance),) = noted
    mask = of_blocks.run.archive.masks("photo").layers("mask")
    assert share == pytest.approx(576 / 960)
    assert [*rows] == [*chance] == ["query", "key", "value", "attention out", "MLP in", "MLP out"]
    torch.testing.assert_close(rows["MLP in"], mask[4].double().mean(-1).flatten())
    assert "2 seeds" in title


def test_confusion_of_blocks_is_that_of_the_networks(of_blocks):
    """As many right answers as the records count."""
    for arm in ("erm", "importance"):
        counts = figures.confusion(of_blocks.run, "photo", arm)
        shares = [
            r["accuracy"]["full"]
            for r in of_blocks.records()
            if (r["algorithm"], r["selection"]) == (arm, "last")
        ]  # fmt: skip
        assert counts.trace() == pytest.approx(30 * sum(shares))
        assert counts.sum() == 60


def test_single_domains_of_blocks_have_masks_of_their_own_importance(of_blocks):
    (mask, *_) = figures.domain_mask(of_blocks.run, "art", [0, 1])
    moved = of_blocks.run.archive.phase1("art").layers("importance")
    assert torch.equal(mask, top_k_mask(moved, 60.0)[0])
