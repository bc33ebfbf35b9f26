"""What a comparison says: tables per selection rule, the report, and figures."""

import textwrap
from collections.abc import Callable
from logging import getLogger

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

import drawing
from compare import PARTNERS, Comparison
from drawing import new_figure, settled, styled
from evaluation import AVERAGE
from models import FeedforwardClassifier
from probe import linear_probe
from selection import as_text, comparison_table, select
from stacks import apply_stack
from visualization import difference_plot, save

log = getLogger(__name__)

TITLES = {
    "training-domain": "Training-domain validation (epoch and trial of best mean source `out` accuracy)",
    "last": "Last epoch (trial of best mean source `out` accuracy at that epoch)",
    "leave-one-domain-out": "Leave-one-domain-out validation",
    "oracle": "Oracle: last epoch, trial ranked by the target's own `out` part. NOT a fair rule: it saw the target",
}
HEADLINE = "training-domain"


def tables_by_rule(comparison: Comparison) -> dict[str, pd.DataFrame]:
    """`selection.comparison_table` by rule, for the rules that the runs allow."""
    curves, partners = comparison.curves(), comparison.partners
    pairs = any(len(holdouts) == 2 for holdouts in comparison.holdouts)
    return {
        rule: comparison_table(select(curves, rule), partners)
        for rule in TITLES
        if pairs or rule != "leave-one-domain-out"
    }


def ensemble(comparison: Comparison) -> pd.Series:
    """Accuracy of the mean probabilities of the ERM networks of all seeds: last epoch, all images; by holdout.

    Empty where ERM on pooled batches is not among the methods.

    An ensemble has no seed of its own, hence no interval, and is paired with nothing.
    """
    problem, found = comparison.problem, {}
    if PARTNERS["pooled"] not in {cls.__name__ for cls in comparison.algorithms}:
        return pd.Series(found, dtype=float)
    for holdout in single(comparison):
        arrays, header = comparison.study.load("weights", f"compare_{PARTNERS['pooled']}_0_{holdout}")
        params = {k.removeprefix("final."): v for k, v in arrays.items() if k.startswith("final.")}
        sound = arrays["failed"] == 0
        rows = problem.rows([holdout], "all")
        params = {name: value[sound].unsqueeze(1) for name, value in params.items()}
        template = FeedforwardClassifier.outline(
            problem.features.shape[1], len(problem.class_names), header["hidden_sizes"]
        )
        chances = apply_stack(template, params, problem.features[rows].cpu()).softmax(-1).mean((0, 1))
        found[holdout] = float((chances.argmax(-1) == problem.labels[rows].cpu()).double().mean())
    return pd.Series(found, dtype=float)


def finding(table: pd.DataFrame, together: pd.Series, probe: pd.Series) -> str:
    """What a table says, in plain sentences, computed.

    Args:
        table: as `selection.comparison_table` returns it.
        together: accuracy of the ensemble by holdout, as `ensemble` returns it.
        probe: accuracy of logistic regression on the features by holdout, on the same images as the table.
    """
    rows = table.sort_values("rank")

    def names(chosen: pd.Series) -> str:
        return ", ".join(rows.index[chosen]) or "none"

    best = rows[f"{AVERAGE}_mean"].max()
    text = f"Above ERM on the same batches, with an interval that excludes 0: {names(rows['low'] > 0)}. "
    text += f"Below it: {names(rows['high'] < 0)}. "
    yardsticks = {"Logistic regression on the same features": probe, "The ensemble of the ERM networks": together}
    for name, values in yardsticks.items():
        if len(values) > 1:
            relation = "above" if values.mean() > best else "not above"
            text += f"{name} has {100 * values.mean():.1f} %, {relation} the mean of every method. "
    if "ImportanceMask" in rows.index and np.isfinite(rows.loc["ImportanceMask", "difference"]):
        row = rows.loc["ImportanceMask"]
        text += f"Importance masking is number {int(row['rank'])} of {len(rows)}, {signed(row)} points from ERM."
    return text.rstrip()


def signed(row: pd.Series) -> str:
    """Difference and interval in points, as "+0.31 [−0.10, +0.72]"."""
    numbers = [f"{100 * row[name]:+.2f}".replace("-", "−") for name in ("difference", "low", "high")]
    return f"{numbers[0]} [{numbers[1]}, {numbers[2]}]"


def report(comparison: Comparison) -> str:
    """The whole comparison as text."""
    study, found, seeds = comparison.study, tables_by_rule(comparison), len(comparison.seeds)
    together, probe = ensemble(comparison), probe_of(comparison)
    lines = [
        "Methods of the field on frozen features",
        "",
        f"{study.data.describe()}",
        f"Classifier: {study.data.feature_size} -> {' -> '.join(map(str, comparison.settings.hidden_sizes))} -> "
        f"{len(comparison.problem.class_names)}; {comparison.settings.ph2_num_epochs} epochs; {seeds} seeds; "
        f"hyperparameters of every method: its defaults{_draws(comparison.trials)}.",
        "Accuracy (%) on all images of the held-out domain, mean ± standard error over seeds. Differences are from",
        "ERM on the same kind of batches (pooled, or balanced by domain), paired by seed and averaged over the",
        "holdouts, in points, with 95 % t intervals over seeds: they cover starts and batch orders, conditional on",
        "images, split and backbone. With many methods some intervals exclude 0 by chance: a survey, not a test.",
    ]
    if peeking := [cls.__name__ for cls in comparison.algorithms if comparison.masks_saw_validation(cls)]:
        text = f"The masks of {', '.join(peeking)} saw the validation images: Phase 1 trained on all images."
        lines += textwrap.wrap(text, 110)
    lines += ["", *textwrap.wrap(finding(found[HEADLINE], together, probe), 110)]
    for rule, table in found.items():
        title = TITLES[rule]
        lines += ["", title, "-" * len(title), as_text(table)]
        if rule == "oracle" and comparison.trials == 1:
            lines += ["(There is one trial to choose from: the same networks as at the last epoch.)"]
    lines += _yardstick("Logistic regression on the features (deterministic; unpaired)", probe)
    lines += _yardstick(
        f"Ensemble (mean probabilities of the ERM networks of {seeds} seeds, last epoch; no interval, unpaired)",
        together,
    )
    if failures := failed(comparison):
        lines += ["", f"{len(failures)} networks failed and are left out:", *(f"  {text}" for text in failures)]
    return "\n".join(lines) + "\n"


def _draws(trials: int) -> str:
    return f", and {trials - 1} random draw{'s' if trials > 2 else ''}" if trials > 1 else ""


def _yardstick(title: str, values: pd.Series) -> list[str]:
    """Accuracies by holdout and their average, in a line below a title; nothing where there are none."""
    cells = [f"{name} {100 * value:.1f}" for name, value in values.items()]
    cells += [f"average {100 * values.mean():.1f}"] if len(values) > 1 else []
    return ["", f"{title}:", f"  {', '.join(cells)}"] if cells else []


def single(comparison: Comparison) -> list[str]:
    """Domains that are held out alone."""
    return [holdouts[0] for holdouts in comparison.holdouts if len(holdouts) == 1]


def probe_of(comparison: Comparison) -> pd.Series:
    """Accuracy of logistic regression on the features by holdout; kept on disk, because it takes a while."""
    path, holdouts = comparison.results.directory / "linear_probe.csv", single(comparison)
    kept = pd.read_csv(path, index_col="holdout") if path.is_file() else pd.DataFrame()
    if not set(holdouts) <= set(kept.index):
        kept = linear_probe(comparison.problem, holdouts)
        comparison.results.write_text(path.name, kept.to_csv())
    return kept.loc[holdouts, "full"]


def seed_averages(comparison: Comparison) -> pd.DataFrame:
    """Accuracy on all images, mean over the holdouts, under the headline's rule: seeds × methods."""
    chosen = select(comparison.curves(), HEADLINE)
    by_holdout = chosen.pivot(index=["algorithm", "seed"], columns="holdout", values="full")
    return by_holdout.mean(axis=1, skipna=False).unstack("algorithm")


def failed(comparison: Comparison) -> list[str]:
    """One sentence per failed network."""
    names = {cls.__name__ for cls in comparison.algorithms}
    return [
        f"{r['algorithm']}, trial {r['trial']}, holdout {r['holdout']}, seed {r['seed']}: {r['failed']}"
        for r in comparison.results.records()
        if r["failed"] and r["selection"] == "last" and r["algorithm"] in names and r["seed"] in comparison.seeds
    ]


def write(comparison: Comparison, figures: bool = True) -> str:
    """Write ``comparison.txt``, a table per rule as CSV and, if asked, the figures; returns the text."""
    text, directory = report(comparison), comparison.results.directory
    with comparison.study.writing():
        comparison.results.write_text("comparison.txt", text)
        comparison.results.write_text("comparison_seeds.csv", seed_averages(comparison).to_csv(float_format="%.6g"))
        found = tables_by_rule(comparison)
        for rule in TITLES:
            name = f"comparison_{rule}.csv"
            if rule in found:
                comparison.results.write_text(name, found[rule].to_csv())
            else:
                (directory / name).unlink(missing_ok=True)  # of other runs
        for name, make in all_figures(comparison).items() if figures else ():
            try:
                save(make(), directory / "plots" / f"{name}.png")
            except Exception as error:  # whatever it is: the numbers stand
                log.warning("The figure '%s' cannot be drawn (%s); the others are.", name, " ".join(str(error).split()))
    return text


# --- figures ------------------------------------------------------------------------------------------------


def all_figures(comparison: Comparison) -> dict[str, Callable[[], Figure]]:
    """File name -> function that draws, of every figure that the comparison has data for."""
    made = {"comparison": lambda: difference_figure(comparison)}
    for cls in comparison.algorithms:
        if "conflict_rate" in cls.record_names:
            made[f"conflicts_{cls.__name__}"] = lambda c=cls.__name__: conflict_figure(comparison, c)
        if hasattr(cls, "routing"):
            for holdout in single(comparison):
                made[f"experts_{cls.__name__}_{holdout}"] = lambda c=cls.__name__, h=holdout: expert_figure(
                    comparison, c, h
                )
    return made


def difference_figure(comparison: Comparison, rule: str = HEADLINE) -> Figure:
    """Forest plot: every method minus ERM on the same batches, best first."""
    table = tables_by_rule(comparison)[rule]
    rows = table[table["difference"].notna()].sort_values("difference", ascending=False)
    batches = {cls.__name__: cls.batches for cls in comparison.algorithms}
    shown = pd.DataFrame(
        {
            "label": rows.index,
            "mean": rows["difference"],
            "low": rows["low"],
            "high": rows["high"],
            "group": [f"{batches[name]} batches: minus {PARTNERS[batches[name]]}" for name in rows.index],
        }
    )
    title = (
        f"Average accuracy minus ERM's on the same batches, paired by seed, 95 % t interval ({_on(comparison)}, {rule})"
    )
    return difference_plot(shown, title)


@styled
def conflict_figure(comparison: Comparison, algorithm: str) -> Figure:
    """How often and how strongly gradients of domains conflict, per epoch and parameter tensor, mean over holdouts.

    Grey: gradients of one number each, whose cosine is 1 or −1 whatever they are.
    """
    parts = {"conflict_rate": "part of the tests that conflict", "conflict_strength": "|cosine| where they conflict"}
    depth = len(comparison.settings.hidden_sizes) + 1
    names = [f"layer {i + 1} {kind}" for i in range(depth) for kind in ("weights", "biases")]
    figure = new_figure(9.5, 1.8 + 0.3 * len(names), f"{algorithm}: conflicts of domain gradients ({_on(comparison)})")
    axes = figure.subplots(1, 2, sharey=True)
    for ax, (part, label) in zip(axes, parts.items(), strict=True):
        means = []
        for holdout in single(comparison):
            arrays, _ = comparison.load(algorithm, 0, (holdout,))
            means.append(arrays[part][arrays["failed"] == 0].mean(0))
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
def expert_figure(comparison: Comparison, algorithm: str, holdout: str) -> Figure:
    """Mean gate of each expert by domain and by class, of one seed: expert 1 of another is another expert."""
    arrays, _ = comparison.load(algorithm, 0, (holdout,))
    sound = (arrays["failed"] == 0).nonzero().flatten()
    problem = comparison.problem
    if len(sound) == 0:
        raise ValueError(f"All networks of {algorithm} failed.")
    use, seed = arrays["expert_use"][sound[0]], int(arrays["seeds"][sound[0]])
    weights = problem.totals.sum(1).double().cpu().unsqueeze(-1)  # images per domain and class
    by_domain = ((use.nan_to_num() * weights).sum(1) / weights.sum(1)).numpy()
    by_class = ((use.nan_to_num() * weights).sum(0) / weights.sum(0)).numpy()
    domains = [f"{d} (held out)" if d == holdout else d for d in problem.domain_names]
    data = comparison.study.data
    on = f"{data.model_name}, {data.feature_size}-d, seed {seed}"
    figure = new_figure(8.0, 3.6, f"{algorithm}: mean gate of the experts, holdout {holdout} ({on})")
    axes = figure.subplots(1, 2)
    for ax, values, names in ((axes[0], by_domain, domains), (axes[1], by_class, problem.class_names)):
        image = ax.imshow(values, cmap="viridis", vmin=0, vmax=1, aspect="auto")
        ax.set_yticks(range(len(names)), names)
        ax.set_xticks(range(values.shape[1]), range(1, values.shape[1] + 1))
        ax.set(xlabel="expert")
        for row, column in np.ndindex(values.shape):
            colour = drawing.ink(image.cmap(image.norm(values[row, column])))
            ax.text(column, row, f"{values[row, column]:.2f}", ha="center", va="center", color=colour, fontsize=7)
    figure.colorbar(image, ax=axes, label="mean gate")
    return settled(figure)


def _on(comparison: Comparison) -> str:
    """What a figure was measured on."""
    data, seeds = comparison.study.data, len(comparison.seeds)
    return f"{data.model_name}, {data.feature_size}-d, {seeds} {'seed' if seeds == 1 else 'seeds'}"
