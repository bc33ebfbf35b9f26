"""Figures of a transfer study, from the tables (CSV) that its directory holds."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.colors import Normalize
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from study import MARGIN
from transfer.arms import ZERO_SHOT
from transfer.claims import studies, updates_words
from transfer.inference import LEVEL
from transfer.probe_figures import all_figures as probe_figures
from transfer.probes import read_probes
from transfer.report import read
from transfer.statistics import FINETUNE, FROZEN, MEASURES, SCRATCH, WEIGHT_BASELINES, share
from visualization import (
    COLORS,
    DASHED,
    DIVERGING,
    SEQUENTIAL,
    WIDTH,
    Figure,
    Panel,
    add_legend,
    difference_plot,
    drawing,
    line_style,
    matrices,
    new_figure,
    save_each,
    settled,
    write_numbers,
    written,
)

BAND = "#D9D9D9"
DOTTED = {"color": COLORS[1], "linestyle": (0, (1, 2)), "linewidth": 1.4}
NOT_REJECTED, NOT_ABLE = "·", "†"


def all_figures(directory: str | Path) -> Iterator[tuple[str, Callable[[], Figure]]]:
    """Name and maker of every figure that there are tables for; names end in the task's.

    boxes (accuracy by cut at each amount of data), heatmap (means, and minus scratch), budget (minus scratch against
    amount, after few and after all updates), best (which cut is best under the bootstrap), weights (forest plot of the
    second family); and, where layers were probed, those of `probe_figures.all_figures`.

    Raises:
        InputError: the directory holds no transfer study.
    """
    tables, probes = read(directory), read_probes(directory)
    for title, own in studies(tables):
        name = re.sub(r"\W+", "_", title.removesuffix(" protocol")).strip("_")
        makers = {"boxes": boxes_figure, "heatmap": heatmap_figure, "best": best_figure, "budget": budget_figure}
        if "letters" in own and "contrasts" in own:
            for kind, maker in makers.items():
                yield f"{kind}_{name}", partial(maker, own, title)
        if "weights" in own:
            yield f"weights_{name}", partial(weights_figure, own, title)
    if probes is not None:
        yield from probe_figures(probes, tables["runs"])


def save_all(directory: str | Path, only: Sequence[str] | None = None, format: str = "png") -> list[Path]:
    """Draw every figure into the directory itself, see `visualization.save_each`."""
    return save_each(all_figures(directory), directory, only, format)


def counted(repeats: pd.Series) -> str:
    """Numbers of repeats in words: "20 repeats", "5 to 25 repeats"."""
    low, high = int(repeats.min()), int(repeats.max())
    return f"{low} repeats" if low == high else f"{low} to {high} repeats"


def _on(own: Mapping[str, pd.DataFrame], title: str) -> str:
    """What a figure shows, for the end of its title."""
    accuracy = own["accuracy"]
    last = accuracy["updates"].max()
    measure = accuracy["measure"].iloc[0]
    seen = "" if measure == "accuracy" else f", on {MEASURES[measure]}"
    return f"{title}, {updates_words(last)}, {counted(own['letters']['repeats'])}{seen}"


def boxes_figure(own: Mapping[str, pd.DataFrame], title: str) -> Figure:
    """Accuracy by number of frozen layers, a panel per amount of data; arguments as `claims.studies` gives them."""
    words = f"Accuracy by number of frozen layers ({_on(own, title)})"
    return cut_boxes(own["runs"], own["letters"], words)


@drawing
def cut_boxes(runs: pd.DataFrame, letters: pd.DataFrame, title: str) -> Figure:
    """Box plots over cuts, every repeat as a point, a panel per amount of data with a scale of its own.

    Args:
        runs: arm, cut, amount, images, repeat, value (fraction): frozen at cuts above 0; scratch, which is cut 0 and
            whose middle half is a band behind the others; finetune and zero-shot, whose medians are a dashed and a
            dotted line.
        letters: amount, cut, letters, lowest_p: two cuts that share a letter are not told apart.
    """
    amounts = sorted(letters["amount"].unique())
    across = min(3, len(amounts))
    down = -(-len(amounts) // across)
    figure = new_figure(WIDTH, 0.75 + 2.1 * down, title)
    grid = figure.subplots(down, across, squeeze=False)
    for ax, amount in zip(grid.flat, amounts, strict=False):
        _boxes(ax, runs[runs["amount"] == amount], letters[letters["amount"] == amount])
    for ax in grid.flat[len(amounts) :]:
        ax.set_axis_off()
    for ax in grid[:, 0]:
        ax.set_ylabel("accuracy (%)")
    for number, ax in enumerate(grid.flat[: len(amounts)]):
        if number + across >= len(amounts):
            ax.set_xlabel("frozen layers (0 = scratch)")
    handles = [
        Patch(facecolor=BAND, label="scratch: middle half"),
        Line2D([], [], color="black", linewidth=1.4, label="median"),
        Line2D([], [], linestyle="", marker="o", markersize=3, color=COLORS[0], label="repeat"),
    ]
    if (runs["arm"] == FINETUNE).any():
        handles.append(Line2D([], [], **DASHED, label="finetune: median"))
    if (runs["arm"] == ZERO_SHOT).any():
        handles.append(Line2D([], [], **DOTTED, label=f"{ZERO_SHOT}: median"))
    few = f"; {NOT_ABLE}: too few repeats to tell any apart" * bool((letters["lowest_p"] >= LEVEL).any())
    add_legend(figure, handles, f"cuts that share a letter are not told apart (Wilcoxon, Holm, p < {LEVEL}){few}")
    return settled(figure)


def _boxes(ax, runs: pd.DataFrame, letters: pd.DataFrame) -> None:
    """One panel of `cut_boxes`."""
    own = runs[(runs["arm"] == SCRATCH) | ((runs["arm"] == FROZEN) & (runs["cut"] > 0))]
    values = {cut: 100 * rows["value"].dropna().to_numpy() for cut, rows in own.groupby("cut")}
    values = {cut: found for cut, found in values.items() if len(found)}
    places = {cut: place for place, cut in enumerate(sorted(letters["cut"]))}
    if 0 in values:
        ax.axhspan(*np.quantile(values[0], [0.25, 0.75]), color=BAND, linewidth=0, zorder=0)
    for arm, style in ((FINETUNE, DASHED), (ZERO_SHOT, DOTTED)):
        whole = 100 * runs.loc[runs["arm"] == arm, "value"].dropna()
        if len(whole):
            ax.axhline(whole.median(), **style, zorder=1)
    box = {"showfliers": False, "widths": 0.62, "patch_artist": True, "manage_ticks": False, "zorder": 2}
    lines = {name: {"color": "black", "linewidth": width} for name, width in (("whiskerprops", 0.8), ("capprops", 0.8))}
    fill = {"boxprops": {"facecolor": "white", "alpha": 0.75, "linewidth": 0.8}}
    median = {"medianprops": {"color": "black", "linewidth": 1.4}}
    ax.boxplot(list(values.values()), positions=[places[cut] for cut in values], **box, **lines, **fill, **median)
    for cut, found in values.items():
        aside = 0.44 * ((np.arange(len(found)) * 0.618) % 1 - 0.5)  # spread evenly, the same every time
        ax.plot(
            places[cut] + aside, found, linestyle="", marker="o", markersize=2, color=COLORS[0], alpha=0.6, zorder=4
        )
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + 0.13 * (high - low))
    words = letters.set_index("cut")
    for cut, place in places.items():
        said = words.loc[cut, "letters"] if words.loc[cut, "lowest_p"] < LEVEL else NOT_ABLE
        ax.annotate(said, (place, 1), (0, -1), xycoords=("data", "axes fraction"), textcoords="offset points",
                    ha="center", va="top", fontsize=7.5)  # fmt: skip
    images, repeats = runs["images"].max(), sorted(len(found) for found in values.values())
    said = f"{repeats[0]}" if repeats[0] == repeats[-1] else f"{repeats[0]}-{repeats[-1]}"
    ax.set_title(f"{share(runs['amount'].iloc[0])}: {images:,} images, n = {said}")
    ax.set_xticks(list(places.values()), list(map(str, places)))
    ax.set_xlim(-0.6, len(places) - 0.4)
    ax.yaxis.set_major_locator(MaxNLocator(5))


def heatmap_figure(own: Mapping[str, pd.DataFrame], title: str) -> Figure:
    """Mean accuracy, and its difference from scratch, by amount and cut."""
    return amount_by_cut(own["letters"], own["contrasts"], f"Frozen layers and amounts of data ({_on(own, title)})")


@drawing
def amount_by_cut(means: pd.DataFrame, contrasts: pd.DataFrame, title: str) -> Figure:
    """Two matrices, amount × cut: mean accuracy (%), and the paired difference from scratch (points).

    Args:
        means: amount, cut, mean (fraction).
        contrasts: amount, cut, repeats, mean (fraction), p_holm, lowest_p. A difference that Holm's correction does not
            reject has a "·", one that so few repeats cannot reject a "†".
    """
    accuracy = 100 * means.pivot(index="amount", columns="cut", values="mean")
    shape = {"index": accuracy.index, "columns": accuracy.columns}
    wide = contrasts.pivot(index="amount", columns="cut").reindex(**{"index": accuracy.index})
    differences = 100 * wide["mean"].reindex(**shape)
    marks = np.where(wide["p_holm"].reindex(**shape) < LEVEL, "", f" {NOT_REJECTED}")
    marks = np.where(wide["lowest_p"].reindex(**shape) >= LEVEL, f" {NOT_ABLE}", marks)
    figure = new_figure(WIDTH, 1.5 + 0.6 * len(accuracy), title)
    axes = figure.subplots(2, 1)
    bound = max(1.0, np.nanmax(np.abs(differences.to_numpy()), initial=0.0))
    rows = [share(amount) for amount in accuracy.index]
    counts = contrasts.groupby("amount")["repeats"].max()
    named = [f"{row} (n = {counts.get(at, 0)})" for row, at in zip(rows, accuracy.index, strict=True)]
    low, high = np.nanmin(accuracy.to_numpy()), np.nanmax(accuracy.to_numpy())
    forms = [[written(value, ".1f") for value in row] for row in accuracy.to_numpy()]
    _heatmap(axes[0], accuracy, forms, rows, (SEQUENTIAL, Normalize(low, high), "accuracy (%)"), "mean accuracy (%)")
    forms = [
        [written(value, "+.1f") + end for value, end in zip(*both, strict=True)]
        for both in zip(differences.to_numpy(), marks, strict=True)
    ]
    colours = DIVERGING, Normalize(-bound, bound), "points"
    said = f"minus scratch, paired (points; {NOT_REJECTED} not rejected after Holm"
    said += f", {NOT_ABLE} too few repeats to reject)" if (marks == f" {NOT_ABLE}").any() else ")"
    _heatmap(axes[1], differences, forms, named, colours, said)
    axes[1].set_xlabel("frozen layers (0 = scratch)")
    return settled(figure)


def _heatmap(ax, table: pd.DataFrame, texts: Sequence, rows: Sequence[str], colours: tuple, title: str) -> None:
    """A matrix as colours with a text in each cell that has a value."""
    cmap, norm, legend = colours
    values = table.to_numpy()
    image = ax.imshow(np.ma.masked_invalid(values), cmap=cmap, norm=norm, aspect="auto", interpolation="nearest")
    x, y = np.meshgrid(*map(np.arange, values.shape[::-1]))
    order = iter([text for row, known in zip(texts, np.isfinite(values), strict=True)
                  for text, there in zip(row, known, strict=True) if there])  # fmt: skip
    write_numbers(ax, x, y, values, image, lambda _: next(order), 7.5)
    ax.set_xticks(range(values.shape[1]), list(map(str, table.columns)))
    ax.set_yticks(range(values.shape[0]), rows)
    ax.set(ylabel="amount of data", title=title, facecolor="#E8E8E8")
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    ax.figure.colorbar(image, ax=ax, label=legend, fraction=0.05, pad=0.02)


def budget_figure(own: Mapping[str, pd.DataFrame], title: str) -> Figure:
    """Frozen minus scratch against the amount of data, after the first and the last number of updates."""
    table = own["differences"]
    frozen = table[(table["arm"] == FROZEN) & (table["cut"] > 0)]
    ends = list(dict.fromkeys((frozen["updates"].min(), frozen["updates"].max())))
    panels = {updates_words(updates): frozen[frozen["updates"] == updates] for updates in ends}
    words = f"Frozen layers minus scratch, by amount of data ({title}, {counted(frozen['repeats'])})"
    return difference_curves(panels, words)


@drawing
def difference_curves(panels: Mapping[str, pd.DataFrame], title: str) -> Figure:
    """Difference from scratch against the amount of data (logarithmic), a line per cut with its band.

    Args:
        panels: title -> amount, cut, mean, low, high (fractions); all panels have one scale.
    """
    figure = new_figure(WIDTH, 3.2, title)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    cuts = sorted({cut for table in panels.values() for cut in table["cut"]})
    for ax, (words, table) in zip(axes, panels.items(), strict=True):
        ax.axhline(0, color="black", linewidth=1, zorder=1)
        for index, cut in enumerate(cuts):
            rows = table[table["cut"] == cut].sort_values("amount")
            x, mean, low, high = rows[["amount", "mean", "low", "high"]].to_numpy(float).T * 100
            style = line_style(index)
            known = np.isfinite(low + high)
            ax.fill_between(x[known], low[known], high[known], color=style["color"], alpha=0.15, linewidth=0)
            ax.plot(x, mean, **style, zorder=3)
        amounts = sorted(table["amount"].unique())
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(FixedLocator([100 * amount for amount in amounts]))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xticklabels([f"{100 * amount:g}" for amount in amounts])
        ax.set(title=words, xlabel="amount of data (% of the images)")
    axes[0].set_ylabel("minus scratch, paired (points)")
    handles = [Line2D([], [], **line_style(i), label=f"cut {cut}") for i, cut in enumerate(cuts)]
    add_legend(figure, handles, "mean over repeats; band: 95 % t interval of each difference alone")
    return settled(figure)


def best_figure(own: Mapping[str, pd.DataFrame], title: str) -> Figure:
    """In how many bootstrap resamples each cut is best, after the first and the last number of updates."""
    table = own["best"]
    ends = list(dict.fromkeys((table["updates"].min(), table["updates"].max())))
    panels = []
    for updates in ends:
        rows = table[table["updates"] == updates]
        wide = 100 * rows.pivot(index="amount", columns="cut", values="share")
        names = [share(amount) for amount in wide.index], list(map(str, wide.columns))
        panels.append(Panel(updates_words(updates), wide.to_numpy(float), *names, "frozen layers", "amount of data"))
    words = f"How often each cut is best under the bootstrap ({title}, {counted(table['repeats'])})"
    return matrices(panels, words, "% of the resamples", (0, 100), ".0f", square=False)


def weights_figure(own: Mapping[str, pd.DataFrame], title: str) -> Figure:
    """Forest plot of the second family: the weights that moved most, minus others of the same number."""
    table = own["weights"]
    groups = {"random_layer": "minus random weights of the same layers", FROZEN: "minus whole layers of the same size"}
    rows = table.assign(
        label=[f"{share(row.amount)}, as many as cut {row.cut}" for row in table.itertuples()],
        group=pd.Categorical(table["baseline"].map(groups), [groups[name] for name in WEIGHT_BASELINES]),
    )
    rows = rows.sort_values(["amount", "cut", "group"], kind="stable")
    words = f"The weights that moved most, kept and frozen ({title}, {counted(table['repeats'])})"
    return difference_plot(rows, words, "difference in accuracy, paired by repeat (points)", MARGIN)
