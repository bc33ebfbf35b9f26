"""Figures of a comparison."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from field.compare import PARTNERS, Comparison
from field.selection import HEADLINE
from visualization import difference_plot, ink, new_figure, save_each, settled, styled


def all_figures(comparison: Comparison) -> Iterator[tuple[str, Callable[[], Figure]]]:
    """Name and maker of every figure that the comparison has data for."""
    yield "comparison", lambda: difference_figure(comparison)
    for method in comparison.methods:
        name = method.__name__
        if "conflict_rate" in method.record_names:
            yield f"conflicts_{name}", lambda name=name: conflict_figure(comparison, name)
        for holdout in comparison.single_holdouts if method.routed else ():
            make = lambda name=name, holdout=holdout: expert_figure(comparison, name, holdout)  # noqa: E731
            yield f"experts_{name}_{holdout}", make


def save_all(comparison: Comparison) -> list[Path]:
    """Draw every figure into ``plots/`` of the results directory, see `visualization.save_each`."""
    return save_each(all_figures(comparison), comparison.run.results.directory / "plots")


def difference_figure(comparison: Comparison, rule: str = HEADLINE) -> Figure:
    """Forest plot: every method minus ERM on the same batches, best first."""
    table = comparison.tables()[rule]
    rows = table[table["difference"].notna()].sort_values("difference", ascending=False)
    batches = {method.__name__: method.batches for method in comparison.methods}
    shown = pd.DataFrame(
        {
            "label": rows.index,
            "mean": rows["difference"],
            "low": rows["low"],
            "high": rows["high"],
            "group": [f"{batches[name]} batches: minus {PARTNERS[batches[name]]}" for name in rows.index],
        }
    )
    what = "Average accuracy minus ERM's on the same batches, paired by seed, 95 % t interval"
    return difference_plot(shown, f"{what} ({comparison.run.title}, {rule})")


@styled
def conflict_figure(comparison: Comparison, method: str) -> Figure:
    """How often and how strongly gradients of domains conflict, per epoch and parameter tensor, mean over holdouts.

    Grey: gradients of one number each, whose cosine is always 1 or −1.
    """
    run = comparison.run
    saved = [run.archive.method(method, 0, (holdout,)) for holdout in comparison.single_holdouts]
    parts = {"conflict_rate": "part of the tests that conflict", "conflict_strength": "|cosine| where they conflict"}
    depth = len(run.settings.hidden_sizes) + 1
    names = [f"layer {i + 1} {kind}" for i in range(depth) for kind in ("weights", "biases")]
    figure = new_figure(9.5, 1.8 + 0.3 * len(names), f"{method}: conflicts of domain gradients ({run.title})")
    axes = figure.subplots(1, 2, sharey=True)
    for ax, (part, label) in zip(axes, parts.items(), strict=True):
        means = [networks.history[part][networks.ok].mean(0) for networks in saved]
        values = torch.stack(means).nanmean(0).T.numpy()  # [tensors, epochs]
        if part == "conflict_strength":
            trivial = (values > 1 - 1e-6).all(1, keepdims=True)
            values, label = np.where(trivial, np.nan, values), label + " (grey: single numbers)" * bool(trivial.any())
            ax.set_facecolor("0.85")
        image = ax.imshow(values, cmap="viridis", vmin=0, aspect="auto")
        ax.set_yticks(range(len(names)), names)
        ax.set_xticks(range(values.shape[1]), range(1, values.shape[1] + 1))
        ax.set(xlabel="epoch")
        figure.colorbar(image, ax=ax, label=label)
    return settled(figure)


@styled
def expert_figure(comparison: Comparison, method: str, holdout: str) -> Figure:
    """Mean gate of each expert by domain and by class, of one seed: experts of different seeds do not correspond."""
    run = comparison.run
    saved = run.archive.method(method, 0, (holdout,))
    if not saved.ok.any():
        raise ValueError(f"All networks of {method} failed.")
    first = int(saved.ok.nonzero()[0])
    use = saved.history["expert_use"][first]
    images = run.data.totals.sum(1).double().cpu().unsqueeze(-1)  # per domain and class
    by_domain, by_class = (((use.nan_to_num() * images).sum(i) / images.sum(i)).numpy() for i in (1, 0))
    domains = [f"{d} (held out)" if d == holdout else d for d in run.features.domain_names]
    on = f"{run.features.model_name}, {run.features.feature_size}-d, seed {saved.seeds[first]}"
    figure = new_figure(8.0, 3.6, f"{method}: mean gate of the experts, holdout {holdout} ({on})")
    axes = figure.subplots(1, 2)
    for ax, values, names in ((axes[0], by_domain, domains), (axes[1], by_class, run.features.class_names)):
        image = ax.imshow(values, cmap="viridis", vmin=0, vmax=1, aspect="auto")
        ax.set_yticks(range(len(names)), names)
        ax.set_xticks(range(values.shape[1]), range(1, values.shape[1] + 1))
        ax.set(xlabel="expert")
        for row, column in np.ndindex(values.shape):
            colour = ink(image.cmap(image.norm(values[row, column])))
            ax.text(column, row, f"{values[row, column]:.2f}", ha="center", va="center", color=colour, fontsize=7)
    figure.colorbar(image, ax=axes, label="mean gate")
    return settled(figure)
