"""The figures of a run: from its files and records to arrays, which `visualization` draws; and all of them at once."""

import io
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

import visualization as draw
from config import AGGREGATED
from dataset import find_dataset, load_image
from engine import BlockMatrix, accuracies, block_matrices, classify, make_engine
from importance import degenerate, flatten, normalize, top_k_mask
from storage import FeatureSet, Results
from study.archive import SavedNetworks
from study.masks import chance_densities, group_means, overlap_table
from study.run import Run
from study.study import Study, mask_source
from study.tables import AVERAGE, MARGIN, levels, lodo_table, paired_differences
from visualization import Figure

MIN_POINTS = 4  # fewer are no picture
PHASE1_START = "from Phase 1's start".replace(" ", "\N{NO-BREAK SPACE}")
LEFT_OUT = "all images of the held-out domain, last epoch"
WORDS = {  # control -> what figures call it
    "erm": "ERM",
    "importance": "importance mask",
    "random": "random mask",
    "random_layer": "random mask, layer by layer",
    "inverted": "inverted mask",
    "permuted": "permuted mask",
    "other_seed": "mask of another seed",
    "prune": "mask, the others pruned",
    "frozen": "mask, the others frozen",
    "magnitude": "largest weights",
    "head": "head, biases and norms alone",
}
HEAD_ROLES = ("query", "key", "value", "output")  # of matrices that attention heads share out, see `BlockMatrix`
ROLE_WORDS = {"output": "attention out", "gate": "MLP gate", "in": "MLP in", "out": "MLP out"}
MLP_PARTS = 8  # of the MLP's hidden units
TOP_ROWS, MOST_COLUMNS = 6, 400  # of a matrix that a strip shows; of more columns, means of neighbours
MOST_BLOCKS = 2  # whose rows are drawn: a figure of many more would be too tall to look at
# What is drawn of tracked layers: kind of number -> (how it is drawn, words for the title)
DOMAIN_GRIDS = {
    "initial": ("weights", "initial weights"),
    "final": ("weights", "final weights"),
    "normalized": ("importance", "importance"),
    "mask": ("mask", "mask"),
}
HOLDOUT_GRIDS = {
    "normalized": ("importance", "importance, aggregated over source domains"),
    "mask": ("mask", "mask"),
}


def in_words(arm: str) -> str:
    """Name of an arm, as in records, in plain words; after the control may stand a density, as in "random 10 %"."""
    control, _, start = arm.partition("@")
    control, _, density = control.partition(" ")
    words = WORDS.get(control, control) + (f" at {density}" if density else "")
    return words + (f", {PHASE1_START}" if start == "phase1" else "")


def domain_grids(run: Run, domain: str, kind: str, seed: int | None = None) -> Figure:
    """Grids of the tracked layers after Phase 1 on one domain: a kind of `DOMAIN_GRIDS`; seed as in `layer_grids`."""
    return layer_grids(run.archive.phase1(domain), f"Phase 1 on {draw.plain(domain)}", kind, DOMAIN_GRIDS[kind], seed)


def holdout_grids(run: Run, holdout: str, kind: str, seed: int | None = None) -> Figure:
    """Grids of the importance or mask of a holdout: a kind of `HOLDOUT_GRIDS`; seed as in `layer_grids`."""
    return layer_grids(run.archive.masks(holdout), f"Holdout {draw.plain(holdout)}", kind, HOLDOUT_GRIDS[kind], seed)


def layer_grids(
    networks: SavedNetworks, whose: str, kind: str, drawn: tuple[str, str], seed: int | None = None
) -> Figure:
    """Grids of the tracked layers of one network, or of the mean over all.

    Args:
        networks: from the archive.
        whose: words for the title.
        kind: of the layers, see `SavedNetworks.layers`. Initial and final weights have the same colours.
        drawn: how they are drawn, and words for the title.
        seed: which network; default the first. Use -1 for the mean over all seeds (of a mask: the share marked).
    """
    (style, words), seeds = drawn, networks.seeds
    seed = seeds[0] if seed is None else seed

    def layers(of: str) -> list[torch.Tensor]:
        stacks = networks.layers(of)
        return [s.float().nanmean(0) if seed == -1 else s[seeds.index(seed)] for s in stacks]

    limits = None
    if style == "weights":
        bound = float(torch.cat([flatten(layers("initial")), flatten(layers("final"))]).abs().nan_to_num(0).max())
        limits = (-bound, bound)
    if seed == -1 and style == "mask":
        style, words = "importance", "share of the seeds that mark a weight"
    of = f"mean over {len(seeds)} seeds" if seed == -1 else f"seed {seed}"
    return draw.weight_grids(layers(kind), f"{whose}: {words} ({of})", style, limits)


def domain_mask(run: Run, domain: str, seeds: Sequence[int]) -> list[torch.Tensor]:
    """The mask that a domain alone would give, L × bool ``[S, out, in]``."""
    networks = run.archive.phase1(domain, seeds)
    if run.network.chained:
        return networks.layers("mask")
    return top_k_mask(networks.layers("importance"), run.settings.importance_threshold_percentile)


def block_importance(run: Run, moved: Sequence[torch.Tensor], whose: str) -> Figure:
    """Where in the trained blocks the importance lies: of attention by head, of the MLP by part of its hidden units.

    Args:
        moved: importance of the tracked matrices, L × ``[S, out, in]``; drawn is the mean over seeds.
        whose: words for the title.
    """
    ok = ~degenerate(moved)
    every = flatten(moved)[ok].double().mean(-1)  # of each seed
    means = [(layer[ok].double() / every[:, None, None]).mean(0) for layer in moved]
    matrices, panels = block_matrices(run.network), []
    in_order = sorted(range(len(matrices)), key=lambda i: (matrices[i].block, _place(matrices[i])))
    for roles, title, axis in ((HEAD_ROLES, "Attention", "head"), ((), "MLP", "part of the hidden units")):
        chosen = [i for i in in_order if (matrices[i].role in HEAD_ROLES) == bool(roles)]
        rows = [_groups(matrices[i], means[i]) for i in chosen]
        if rows:
            values = np.full((len(rows), max(map(len, rows))), np.nan)
            for row, of_groups in zip(values, rows, strict=True):
                row[: len(of_groups)] = of_groups
            names = [_name(run, matrices[i]) for i in chosen]
            panels.append(draw.Panel(title, 100 * (values - 1), names, range(1, values.shape[1] + 1), axis))
    bound = max(1.0, *(float(np.nanmax(np.abs(panel.values), initial=0)) for panel in panels))
    title = f"{whose}: mean importance of a weight ({_over(int(ok.sum()))})"
    legend = "% above or below the mean of all"
    return draw.matrices(panels, title, legend, (-bound, bound), "+.0f", square=False)


def _place(matrix: BlockMatrix) -> int:
    """Of a matrix among those of its block, the same for every kind of model."""
    roles = (*HEAD_ROLES, "gate", "in", "out")
    return roles.index(matrix.role) if matrix.role in roles else len(roles)


def _groups(matrix: BlockMatrix, importance: torch.Tensor) -> np.ndarray:
    """Mean importance by head, or by part of the MLP's hidden units, which are the columns of what leads out of it."""
    columns = matrix.role in ("output", "out")
    groups = matrix.heads if matrix.role in HEAD_ROLES else min(MLP_PARTS, importance.shape[1 if columns else 0])
    return group_means(importance, groups, columns).numpy()


def block_densities(run: Run, holdout: str) -> Figure:
    """How much of each matrix of the trained blocks, and of each of its rows, the mask of a holdout marks."""
    mask = run.archive.masks(holdout).layers("mask")
    ok = torch.stack([layer.flatten(1).any(1) for layer in mask]).any(0)  # there is no mask of a network that failed
    mask = [layer[ok] for layer in mask]
    matrices, share = block_matrices(run.network), float(flatten(mask).double().mean())
    names = [_name(run, matrix) for matrix in matrices]
    rows = {name: layer.double().mean(-1).flatten() for name, layer in zip(names, mask, strict=True)}
    chance = {name: chance_densities(share, layer.shape[-1]) for name, layer in zip(names, mask, strict=True)}
    title = f"Holdout {draw.plain(holdout)}: density of the mask by row (rows of {_seeds(len(mask[0]))})"
    return draw.row_densities(rows, title, share, chance)


def block_rows(run: Run, moved: Sequence[torch.Tensor], whose: str) -> Figure:
    """The rows with the largest mean importance of each matrix of the trained blocks, a strip of their weights.

    Of many blocks those of the last one alone. Arguments as in `block_importance`.
    """
    ok, panels, blocks = ~degenerate(moved), [], len(run.network.blocks)
    means = [layer[ok].mean(0) for layer in normalize([layer.double() for layer in moved])]
    for matrix, mean in zip(block_matrices(run.network), means, strict=True):
        if blocks > MOST_BLOCKS and matrix.block < blocks - 1:
            continue
        best = mean.mean(1).argsort(descending=True, stable=True)[:TOP_ROWS]
        names, together = [f"row {row + 1}" for row in best.tolist()], -(-mean.shape[1] // MOST_COLUMNS)
        strips = torch.stack([group_means(row[None], -(-len(row) // together), columns=True) for row in mean[best]])
        words = "column" if together == 1 else f"column (means of {together})"
        columns = range(1, mean.shape[1] + 1, together)
        panels.append(
            draw.Panel(f"{_name(run, matrix)}: {len(best)} of {len(mean)} rows", strips.numpy(), names, columns, words)
        )
    top = max(float(np.nanmax(panel.values, initial=1e-9)) for panel in panels)
    of = ", last block" if blocks > MOST_BLOCKS else ""
    title = f"{whose}: the rows of largest mean importance{of} ({_over(int(ok.sum()))})"
    return draw.matrices(panels, title, "importance (0 to 1)", (0, top), square=False)


def _name(run: Run, matrix: BlockMatrix) -> str:
    """A matrix in words; with that of its block, where there are several."""
    blocks = run.settings.trained_blocks
    words = ROLE_WORDS.get(matrix.role, matrix.role)
    return words if blocks == 1 else f"{words} ({matrix.block + 1} of {len(run.network.blocks)})"


def _seeds(count: int) -> str:
    return f"{count} seed{'s' if count != 1 else ''}"


def _over(count: int) -> str:
    return f"mean over {_seeds(count)}" if count != 1 else "one seed"


def phase1_curves(run: Run) -> Figure:
    """Loss and accuracies of Phase 1, one line per domain; whether it was trained on what validates it is said."""
    curves = {domain: run.archive.phase1(domain).curves for domain in run.domains}
    seen = run.settings.ph1_data == "all"
    validation = f"validation accuracy\n(images {'trained on, too' if seen else 'not trained on'})"
    title = f"Phase 1 on single domains ({run.title})"
    return draw.training_curves(curves, title, names={"validation_accuracy": validation})


def phase2_curves(study: Study, holdout: str) -> Figure:
    """Loss and accuracies of Phase 2 for one holdout, one line per arm, freeze epoch marked."""
    run, settings, curves = study.run, study.run.settings, {}
    domain = run.data.domain_names.index(holdout)
    for name in study.arm_names:
        networks = run.archive.phase2(holdout, name)
        right = accuracies(networks.history["correct"], run.data.totals.cpu())["full"][..., domain]
        curves[in_words(name)] = networks.curves | {"held_out_accuracy": right.T}
    freeze = settings.ph2_freeze_epoch if 0 < settings.ph2_freeze_epoch < settings.ph2_num_epochs else None
    frozen = "" if settings.ph2_freeze_epoch else ", unmarked weights frozen"
    names = {
        "validation_accuracy": "validation accuracy (sources' `out` part)",
        "held_out_accuracy": f"accuracy on the held-out {draw.plain(holdout)}",
    }
    title = f"Phase 2, holdout {draw.plain(holdout)}{frozen} ({run.title})"
    return draw.training_curves(curves, title, freeze, names=names)


def overlap_figure(run: Run) -> Figure:
    """Agreement of the masks that the single domains would give, beside chance."""
    shared = set.intersection(*({*run.archive.phase1(domain).seeds} for domain in run.domains))
    masks = {domain: domain_mask(run, domain, sorted(shared)) for domain in run.domains}
    title = f"Overlap (IoU) of the masks of single domains ({run.title})"
    if not any(layer.any() for layers in masks.values() for layer in layers):
        percent = run.settings.importance_threshold_percentile
        sentence = f"No mask marks a weight ({percent:g} % are kept): there is no overlap to show."
        return draw.sentence_figure(sentence, title)
    table, chance = overlap_table(masks)
    return draw.overlap_matrix(table.to_numpy(), list(table), title, chance)


def accuracy_figure(study: Study) -> Figure:
    """Held-out accuracy per domain and average, with intervals, chance and majority shares."""
    run = study.run
    chance, majority = levels(run.facts["counts"])
    table = lodo_table(study.records())
    table = table[table["holdout"].isin([*run.features.domain_names, AVERAGE])]
    table = table.assign(algorithm=table["algorithm"].map(in_words))
    title = f"Accuracy on {LEFT_OUT} ({run.title})"
    return draw.accuracy_bars(table, title, chance, {d: m for d, m in majority.items() if d in run.holdouts})


def difference_figure(study: Study) -> Figure:
    """Paired difference of importance and erm per holdout and on average."""
    table = paired_differences(study.records(), "importance", "erm").rename(columns={"holdout": "label"})
    title = f"Importance mask − ERM on {LEFT_OUT}, 95 % t interval ({study.run.title})"
    return draw.difference_plot(table, title, margin=MARGIN)


def confusion_figure(study: Study, arm: str, baseline: str | None = None) -> Figure:
    """Confusion matrices of one arm on every holdout, all seeds together; or what it adds to those of another."""
    run = study.run
    counts, base = ({h: confusion(run, h, name) for h in run.holdouts} if name else None for name in (arm, baseline))
    what = in_words(arm) + (f" − {in_words(baseline)}" if baseline else "")
    title = f"Confusion on {LEFT_OUT}: {what} ({run.title})"
    return draw.confusion_matrices(counts, run.features.class_names, title, base)


def confusion(run: Run, holdout: str, arm: str) -> np.ndarray:
    """Confusion counts of the final networks on all images of the held-out domain, summed over seeds.

    Returns:
        int64 ``[classes, classes]``, rows are the true class; failed networks are left out.
    """
    networks, classes = run.archive.phase2(holdout, arm), len(run.features.class_names)
    if not networks.ok.any():
        return np.zeros((classes, classes), dtype=np.int64)
    rows = run.data.all_rows([holdout])
    params = {name: value[networks.ok][:, None] for name, value in networks.params().items()}
    engine = make_engine(run.data, run.settings, params, 0.0, [0.0])  # the rates are of no effect
    predicted = classify(engine, run.data, rows)[:, 0].cpu()  # [S, N]
    cells = run.data.labels[rows].cpu().long() * classes + predicted
    return torch.bincount(cells.flatten(), minlength=classes**2).view(classes, classes).numpy()


def projection_figure(run: Run) -> Figure:
    """t-SNE of the features, coloured by domain and by class."""
    data, features = run.features, run.features.features
    if features.dtype not in (torch.float16, torch.float32, torch.float64):  # NumPy has no other
        features = features.float()
    names = data.class_names, data.domain_names
    title = f"Features of {data.dataset} ({data.model_name}, {data.feature_size}-d), t-SNE"
    if data.feature_size < 2:
        return draw.sentence_figure("t-SNE needs two dimensions or more; these features have one.", title)
    if len(features) < MIN_POINTS or torch.equal(features, features[:1].expand_as(features)):
        sentence = f"t-SNE needs {MIN_POINTS} images or more, and features that are not all equal."
        return draw.sentence_figure(sentence, title)
    return draw.feature_projection(features, data.labels, data.domains, *names, title)


def sample_figure(root: str | Path) -> Figure:
    """One image of each domain and class, the first by file name."""
    dataset = find_dataset(root)
    images: dict[str, dict] = {name: {} for name in dataset.domain_names}
    for row, (label, domain) in enumerate(zip(dataset.labels.tolist(), dataset.domains.tolist(), strict=True)):
        shown, name = images[dataset.domain_names[domain]], dataset.class_names[label]
        if name not in shown:
            shown[name] = load_image(io.BytesIO(dataset.read(row)))
    return draw.sample_sheet(images, f"{dataset.name}: the first image of each class and domain")


def grid_figures(run: Run) -> Iterator[tuple[str, Callable[[], Figure]]]:
    """Name and maker of the figures of small tracked matrices."""
    for domain in run.domains:
        for kind in DOMAIN_GRIDS:
            yield f"phase1_{domain}_{kind}", partial(domain_grids, run, domain, kind)
    for holdout in run.holdouts:
        for kind in HOLDOUT_GRIDS:
            yield f"holdout_{holdout}_{kind}", partial(holdout_grids, run, holdout, kind)


def block_figures(run: Run) -> Iterator[tuple[str, Callable[[], Figure]]]:
    """Name and maker of the figures of the large matrices of trained blocks."""

    def of_domain(domain: str) -> Figure:
        moved = run.archive.phase1(domain).layers("importance")
        return block_importance(run, moved, f"Phase 1 on {draw.plain(domain)}")

    def of_holdout(figure: Callable, holdout: str) -> Figure:
        moved, settings = mask_source(run, [holdout], run.seeds).own(run.settings).scores, run.settings
        how = f"{settings.importance_aggregation} over source domains"
        if settings.importance_criterion != "movement":
            how = f"{settings.importance_criterion}" + f", {how}" * (settings.importance_criterion in AGGREGATED)
        return figure(run, moved, f"Holdout {draw.plain(holdout)}, {how}")

    for domain in run.domains:
        yield f"phase1_{domain}_importance", partial(of_domain, domain)
    for holdout in run.holdouts:
        yield f"holdout_{holdout}_importance", partial(of_holdout, block_importance, holdout)
        yield f"holdout_{holdout}_density", partial(block_densities, run, holdout)
        yield f"holdout_{holdout}_rows", partial(of_holdout, block_rows, holdout)


def all_figures(study: Study, data_root: str | Path | None = None) -> Iterator[tuple[str, Callable[[], Figure]]]:
    """Name and maker of every figure of a study, in the order of the story.

    Args:
        study: trained.
        data_root: folder of the images, for a sheet of samples.
    """
    run, arms = study.run, study.arm_names
    if data_root is not None:
        yield "samples", lambda: sample_figure(data_root)
    yield "features", lambda: projection_figure(run)
    yield "phase1_curves", lambda: phase1_curves(run)
    yield from grid_figures(run) if run.network.chained else block_figures(run)
    yield "mask_overlap", lambda: overlap_figure(run)
    for holdout in run.holdouts:
        yield f"phase2_curves_{holdout}", partial(phase2_curves, study, holdout)
    yield "accuracy", lambda: accuracy_figure(study)
    if {"importance", "erm"} <= {*arms}:
        yield "difference", lambda: difference_figure(study)
        yield "confusion_difference", lambda: confusion_figure(study, "importance", "erm")
    for arm in arms:
        yield f"confusion_{arm}", partial(confusion_figure, study, arm)


def save_all(
    study: Study, data_root: str | Path | None = None, only: Sequence[str] | None = None, format: str = "png"
) -> list[Path]:
    """Draw every figure into ``plots/`` of the results directory, see `visualization.save_each`."""
    return draw.save_each(all_figures(study, data_root), study.run.results.directory / "plots", only, format)


def study_of(results: Results, features: Callable[[], FeatureSet]) -> Study:
    """The study that the directory of a `run` holds, by its records.

    Args:
        results: the directory.
        features: returns the features that it was made with; called once results were found.

    Raises:
        InputError: there is no run, or it was made with other features.
    """
    return Study(Run.of(results, features, results.records(), "run"))
