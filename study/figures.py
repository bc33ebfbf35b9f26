"""Every figure of a run, drawn from its results directory; the notebook and the command line show the same ones."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

import visualization as draw
from dataset import find_dataset, load_image
from engine import classify
from importance import flatten
from study.archive import SavedNetworks
from study.masks import overlap_table
from study.run import Run
from study.study import Study
from study.tables import AVERAGE, levels, lodo_table, paired_differences

MIN_POINTS = 4  # fewer are no picture

# What is drawn of tracked layers: kind of number -> (how it is drawn, words for the title)
DOMAIN_GRIDS = {
    "initial": ("weights", "initial weights"),
    "final": ("weights", "final weights"),
    "normalized": ("importance", "importance"),
    "mask": ("mask", "mask"),
}
HOLDOUT_GRIDS = {
    "importance": ("importance", "importance, aggregated over source domains"),
    "normalized": ("importance", "aggregated importance, normalized"),
    "mask": ("mask", "mask"),
}


def domain_grids(run: Run, domain: str, kind: str, seed: int | None = None) -> Figure:
    """Grids of the tracked layers after Phase 1 on one domain: a kind of `DOMAIN_GRIDS`; seed as in `layer_grids`."""
    return layer_grids(run.archive.phase1(domain), f"Phase 1 on {domain}", kind, DOMAIN_GRIDS[kind], seed)


def holdout_grids(run: Run, holdout: str, kind: str, seed: int | None = None) -> Figure:
    """Grids of the importance or mask of a holdout: a kind of `HOLDOUT_GRIDS`; seed as in `layer_grids`."""
    return layer_grids(run.archive.masks(holdout), f"holdout {holdout}", kind, HOLDOUT_GRIDS[kind], seed)


def layer_grids(
    networks: SavedNetworks, whose: str, kind: str, drawn: tuple[str, str], seed: int | None = None
) -> Figure:
    """Grids of the tracked layers of one network, or of the mean over all.

    Args:
        networks: from the archive.
        whose: words for the title.
        kind: of the layers, see `SavedNetworks.layers`.
        drawn: how they are drawn, and words for the title.
        seed: which network; default the first. Use -1 for the mean over all seeds (of a mask: the share marked).
    """
    (style, words), seeds = drawn, networks.seeds
    seed = seeds[0] if seed is None else seed
    layers = networks.layers(kind)
    if seed == -1:
        layers, of = [layer.float().nanmean(0) for layer in layers], f"mean over {len(seeds)} seeds"
        style = "importance" if style == "mask" else style
    else:
        layers, of = [layer[seeds.index(seed)] for layer in layers], f"seed {seed}"
    limits = (0.0, float(flatten(layers).max())) if kind == "importance" else None
    return draw.weight_grids(layers, f"{whose}: {words} ({of})", style, limits)


def phase1_curves(run: Run) -> Figure:
    """Loss and accuracies of Phase 1, one line per domain."""
    curves = {domain: run.archive.phase1(domain).curves for domain in run.domains}
    return draw.training_curves(curves, f"Phase 1 on single domains ({run.title})")


def phase2_curves(study: Study, holdout: str) -> Figure:
    """Loss and accuracies of Phase 2 for one holdout, one line per arm, freeze epoch marked."""
    run, settings = study.run, study.run.settings
    curves = {name: run.archive.phase2(holdout, name).curves for name in study.arm_names}
    freeze = settings.ph2_freeze_epoch if settings.ph2_freeze_epoch < settings.ph2_num_epochs else None
    return draw.training_curves(curves, f"Phase 2, holdout {holdout} ({run.title})", freeze)


def overlap_figure(run: Run) -> Figure:
    """Agreement of the masks that the single domains would give, beside chance."""
    masks = {domain: run.archive.phase1(domain).layers("mask") for domain in run.domains}
    title = f"Overlap (IoU) of the masks of single domains ({run.title})"
    if not any(layer.any() for layers in masks.values() for layer in layers):
        percent = run.settings.importance_threshold_percentile
        return sentence_figure(f"No mask marks a weight ({percent:g} % are kept): there is no overlap to show.", title)
    table, chance = overlap_table(masks)
    return draw.overlap_matrix(table.to_numpy(), list(table), title, chance)


def accuracy_figure(study: Study) -> Figure:
    """Held-out accuracy per domain and average, with intervals, chance and majority shares."""
    run = study.run
    chance, majority = levels(run.facts["counts"])
    table = lodo_table(study.records())
    table = table[table["holdout"].isin([*run.features.domain_names, AVERAGE])]
    title = f"Accuracy on the held-out domain, last epoch, all its images ({run.title})"
    return draw.accuracy_bars(table, title, chance, {d: m for d, m in majority.items() if d in run.holdouts})


def difference_figure(study: Study) -> Figure:
    """Paired difference of importance and erm per holdout and on average."""
    table = paired_differences(study.records(), "importance", "erm").rename(columns={"holdout": "label"})
    return draw.difference_plot(table, f"importance − erm, paired by seed, 95 % t interval ({study.run.title})")


def confusion_figure(study: Study, arm: str) -> Figure:
    """Confusion matrices of one arm on every holdout, all seeds together."""
    matrices = {holdout: confusion(study.run, holdout, arm) for holdout in study.run.holdouts}
    title = f"Confusion on the held-out domain: {arm} ({study.run.title})"
    return draw.confusion_matrices(matrices, study.run.features.class_names, title)


def confusion(run: Run, holdout: str, arm: str) -> np.ndarray:
    """Confusion counts of the final networks on all images of the held-out domain, summed over seeds.

    Returns:
        int64 ``[classes, classes]``, rows are the true class; failed networks are left out.
    """
    from sklearn.metrics import confusion_matrix  # takes half a second to import, which only figures need

    networks, classes = run.archive.phase2(holdout, arm), len(run.features.class_names)
    if not networks.ok.any():
        return np.zeros((classes, classes), dtype=np.int64)
    rows = run.data.all_rows([holdout])
    params = {name: value[networks.ok] for name, value in networks.params().items()}
    predicted = classify(params, run.data.features[rows]).flatten().cpu()
    true = run.data.labels[rows].cpu().repeat(int(networks.ok.sum()))
    return confusion_matrix(true, predicted, labels=range(classes))


def projection_figure(run: Run) -> Figure:
    """t-SNE of the features, coloured by domain and by class."""
    data, features = run.features, run.features.features.float()
    names = data.class_names, data.domain_names
    title = f"Features of {data.dataset} ({data.model_name}, {data.feature_size}-d), t-SNE"
    if data.feature_size < 2:
        return sentence_figure("t-SNE needs two dimensions or more; these features have one.", title)
    if len(features) < MIN_POINTS or torch.equal(features, features[:1].expand_as(features)):
        return sentence_figure(f"t-SNE needs {MIN_POINTS} images or more, and features that are not all equal.", title)
    return draw.feature_projection(features, data.labels, data.domains, *names, title)


@draw.styled
def sentence_figure(sentence: str, title: str) -> Figure:
    """In place of a figure that cannot be: its title, and why."""
    figure = draw.new_figure(7.0, 1.6, title)
    figure.text(0.5, 0.35, sentence, ha="center", va="center", wrap=True)
    return figure


def sample_figure(root: str | Path) -> Figure:
    """One image of each domain and class, the first by file name."""
    dataset = find_dataset(root)
    images: dict[str, dict] = {name: {} for name in dataset.domain_names}
    for file, label, domain in zip(dataset.files, dataset.labels.tolist(), dataset.domains.tolist(), strict=True):
        row = images[dataset.domain_names[domain]]
        name = dataset.class_names[label]
        if name not in row:
            row[name] = load_image(dataset.root / file)
    return draw.sample_sheet(images, f"{dataset.name}: the first image of each class and domain")


def all_figures(study: Study, data_root: str | Path | None = None) -> Iterator[tuple[str, Callable[[], Figure]]]:
    """Name and maker of every figure of a study, in the order of the story.

    Args:
        study: trained.
        data_root: folder of the images, for a sheet of samples.
    """
    run = study.run
    if data_root is not None:
        yield "samples", lambda: sample_figure(data_root)
    yield "features", lambda: projection_figure(run)
    yield "phase1_curves", lambda: phase1_curves(run)
    for domain in run.domains:
        for kind in DOMAIN_GRIDS:
            yield f"phase1_{domain}_{kind}", lambda domain=domain, kind=kind: domain_grids(run, domain, kind)
    for holdout in run.holdouts:
        for kind in HOLDOUT_GRIDS:
            yield f"holdout_{holdout}_{kind}", lambda holdout=holdout, kind=kind: holdout_grids(run, holdout, kind)
    yield "mask_overlap", lambda: overlap_figure(run)
    for holdout in run.holdouts:
        yield f"phase2_curves_{holdout}", lambda holdout=holdout: phase2_curves(study, holdout)
    yield "accuracy", lambda: accuracy_figure(study)
    yield "difference", lambda: difference_figure(study)
    for arm in study.arm_names:
        yield f"confusion_{arm}", lambda arm=arm: confusion_figure(study, arm)


def save_all(study: Study, data_root: str | Path | None = None) -> list[Path]:
    """Draw every figure into ``plots/`` of the results directory, see `visualization.save_each`."""
    return draw.save_each(all_figures(study, data_root), study.run.results.directory / "plots")
