"""Every figure of a run, drawn from its results directory; the notebook and the command line show the same ones."""

from collections.abc import Callable, Iterator, Mapping
from logging import getLogger
from pathlib import Path

import torch
from matplotlib.figure import Figure

import visualization as draw
from dataset import find_dataset, load_image
from drawing import new_figure, styled
from evaluation import AVERAGE, confusion, levels, lodo_table, overlap_table, paired_differences
from importance import flatten
from study import ALGORITHMS, Study, layers_of

log = getLogger(__name__)

MIN_POINTS = 4  # fewer are no picture

# What is drawn of an importance file: kind of number -> (how it is drawn, words for the title)
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


def weight_figure(study: Study, name: str, kind: str, seed: int | None = None) -> Figure:
    """Grids of the tracked layers of one domain or holdout.

    Args:
        study: whose networks.
        name: an importance file: "phase1_<domain>" or "holdout_<domain>".
        kind: one of the kinds of `DOMAIN_GRIDS` and `HOLDOUT_GRIDS`.
        seed: which network; default the first. Use -1 for the mean over all seeds (of a mask: the share marked).
    """
    arrays, header = study.load("importance", name)
    seeds = arrays["seeds"].tolist()
    seed = seeds[0] if seed is None else seed
    whose = f"Phase 1 on {header['domain']}" if header["phase"] == 1 else f"holdout {header['holdout']}"
    style, words = (DOMAIN_GRIDS if header["phase"] == 1 else HOLDOUT_GRIDS)[kind]
    layers = layers_of(arrays, kind)
    if seed == -1:
        layers, of = [layer.float().nanmean(0) for layer in layers], f"mean over {len(seeds)} seeds"
        style = "importance" if style == "mask" else style
    else:
        layers, of = [layer[seeds.index(seed)] for layer in layers], f"seed {seed}"
    limits = (0.0, float(flatten(layers).max())) if kind == "importance" else None
    return draw.weight_grids(layers, f"{whose}: {words} ({of})", style, limits)


def _history(study: Study, name: str) -> dict[str, torch.Tensor]:
    """Curves ``[E, S]`` of one file; failed networks are NaN."""
    arrays, _ = study.load("histories", name)
    sound = arrays["failed"] == 0
    keys = ("loss", "train_accuracy", "validation_accuracy")
    return {key: arrays[key].double().masked_fill(~sound[:, None], torch.nan).T for key in keys}


def phase1_curves(study: Study) -> Figure:
    """Loss and accuracies of Phase 1, one line per domain."""
    histories = {domain: _history(study, f"phase1_{domain}") for domain in study.domains}
    return draw.training_curves(histories, f"Phase 1 on single domains ({_on(study)})")


def phase2_curves(study: Study, holdout: str) -> Figure:
    """Loss and accuracies of Phase 2 for one holdout, one line per algorithm, freeze epoch marked."""
    histories = {name: _history(study, f"phase2_{holdout}_{name}") for name in ALGORITHMS}
    settings = study.settings
    freeze = settings.ph2_freeze_epoch if settings.ph2_freeze_epoch < settings.ph2_num_epochs else None
    return draw.training_curves(histories, f"Phase 2, holdout {holdout} ({_on(study)})", freeze)


def overlap_figure(study: Study) -> Figure:
    """Agreement of the masks that the single domains would give, beside chance."""
    masks = {d: layers_of(study.load("importance", f"phase1_{d}")[0], "mask") for d in study.domains}
    title = f"Overlap (IoU) of the masks of single domains ({_on(study)})"
    if not any(layer.any() for layers in masks.values() for layer in layers):
        percent = study.settings.importance_threshold_percentile
        return sentence_figure(f"No mask marks a weight ({percent:g} % are kept): there is no overlap to show.", title)
    table, chance = overlap_table(masks)
    return draw.overlap_matrix(table.to_numpy(), list(table), title, chance)


def accuracy_figure(study: Study) -> Figure:
    """Held-out accuracy per domain and average, with intervals, chance and majority shares."""
    chance, majority = levels(study.facts["counts"])
    table = lodo_table(study.records())
    table = table[table["holdout"].isin([*study.data.domain_names, AVERAGE])]
    title = f"Accuracy on the held-out domain, last epoch, all its images ({_on(study)})"
    return draw.accuracy_bars(table, title, chance, {d: m for d, m in majority.items() if d in study.holdouts})


def difference_figure(study: Study) -> Figure:
    """Paired difference of importance and erm per holdout and on average."""
    table = paired_differences(study.records(), "importance", "erm").rename(columns={"holdout": "label"})
    return draw.difference_plot(table, f"importance − erm, paired by seed, 95 % t interval ({_on(study)})")


def confusion_figure(study: Study, algorithm: str) -> Figure:
    """Confusion matrices of one algorithm on every holdout, all seeds together."""
    matrices = {}
    for holdout in study.holdouts:
        name = f"phase2_{holdout}_{algorithm}"
        arrays, sound = study.load("weights", name)[0], study.load("histories", name)[0]["failed"] == 0
        matrices[holdout] = confusion(study.problem, holdout, arrays, study.settings.hidden_sizes, sound)
    title = f"Confusion on the held-out domain: {algorithm} ({_on(study)})"
    return draw.confusion_matrices(matrices, study.data.class_names, title)


def projection_figure(study: Study) -> Figure:
    """t-SNE of the features, coloured by domain and by class."""
    data, features = study.data, study.data.features.float()
    names = data.class_names, data.domain_names
    title = f"Features of {data.dataset} ({data.model_name}, {data.feature_size}-d), t-SNE"
    if data.feature_size < 2:
        return sentence_figure("t-SNE needs two dimensions or more; these features have one.", title)
    if len(features) < MIN_POINTS or torch.equal(features, features[:1].expand_as(features)):
        return sentence_figure(f"t-SNE needs {MIN_POINTS} images or more, and features that are not all equal.", title)
    return draw.feature_projection(features, data.labels, data.domains, *names, title)


@styled
def sentence_figure(sentence: str, title: str) -> Figure:
    """In place of a figure that cannot be: its title, and why."""
    figure = new_figure(7.0, 1.6, title)
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


def _on(study: Study) -> str:
    seeds = f"{len(study.seeds)} seeds" if len(study.seeds) > 1 else "1 seed"
    return f"{study.data.model_name}, {study.data.feature_size}-d, {seeds}"


def all_figures(study: Study, data_root: str | Path | None = None) -> Iterator[tuple[str, Callable[[], Figure]]]:
    """Name and maker of every figure of a run, in the order of the story."""
    if data_root is not None:
        yield "samples", lambda: sample_figure(data_root)
    yield "features", lambda: projection_figure(study)
    yield "phase1_curves", lambda: phase1_curves(study)
    grids: Mapping[str, Mapping] = {f"phase1_{d}": DOMAIN_GRIDS for d in study.domains}
    grids |= {f"holdout_{d}": HOLDOUT_GRIDS for d in study.holdouts}
    for name, kinds in grids.items():
        for kind in kinds:
            yield f"{name}_{kind}", lambda name=name, kind=kind: weight_figure(study, name, kind)
    yield "mask_overlap", lambda: overlap_figure(study)
    for holdout in study.holdouts:
        yield f"phase2_curves_{holdout}", lambda holdout=holdout: phase2_curves(study, holdout)
    yield "accuracy", lambda: accuracy_figure(study)
    yield "difference", lambda: difference_figure(study)
    for algorithm in ALGORITHMS:
        yield f"confusion_{algorithm}", lambda algorithm=algorithm: confusion_figure(study, algorithm)


def save_all(study: Study, data_root: str | Path | None = None) -> list[Path]:
    """Draw every figure into ``plots/`` of the results directory; the paths written.

    A figure that cannot be drawn is told in a warning, and the others are drawn all the same.
    """
    paths = []
    for name, make in all_figures(study, data_root):
        path = study.results.directory / "plots" / f"{name}.png"
        try:
            draw.save(make(), path)
        except Exception as error:  # whatever it is: hours of training stand behind the others
            why = " ".join(str(error).split()) or type(error).__name__
            path.unlink(missing_ok=True)  # or one of an earlier run would be taken for this one's
            log.warning("The figure '%s' cannot be drawn (%s); the others are.", name, why)
        else:
            paths.append(path)
    return paths
