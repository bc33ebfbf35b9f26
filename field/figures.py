"""Figures of a comparison."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from engine import PureNetwork
from field.compare import PARTNERS, Comparison
from study import MARGIN
from study.figures import in_words
from visualization import Figure, Panel, difference_plot, matrices, plain, save_each, sentence_figure

RULE_WORDS = {
    "training-domain": "chosen by source validation",
    "last": "last epoch",
    "leave-one-domain-out": "chosen by leaving a source out",
    "oracle": "chosen by the held-out domain itself, which is not fair",
}


def all_figures(comparison: Comparison) -> Iterator[tuple[str, Callable[[], Figure]]]:
    """Name and maker of every figure that the comparison has data for."""
    yield "comparison", lambda: difference_figure(comparison)
    for method in comparison.methods:
        name = method.__name__
        if "conflict_rate" in method.record_names:
            yield f"conflicts_{name}", partial(conflict_figure, comparison, name)
        for holdout in comparison.single_holdouts if method.routed else ():
            yield f"experts_{name}_{holdout}", partial(expert_figure, comparison, name, holdout)


def save_all(comparison: Comparison, only: Sequence[str] | None = None, format: str = "png") -> list[Path]:
    """Draw every figure into ``plots/`` of the results directory, see `visualization.save_each`."""
    return save_each(all_figures(comparison), comparison.run.results.directory / "plots", only, format)


def difference_figure(comparison: Comparison) -> Figure:
    """Forest plot: every method minus ERM on the same batches, best first; by the comparison's headline."""
    rule = comparison.headline
    table = comparison.tables()[rule]
    rows = table[table["difference"].notna()].sort_values("difference", ascending=False)
    title = f"Average accuracy minus ERM's, {RULE_WORDS[rule]}, 95 % t interval ({comparison.run.title})"
    if rows.empty:
        sentence = "No method can be compared with its baseline: there are baselines alone, or networks failed."
        return sentence_figure(sentence, title)
    methods = {method.__name__: method for method in comparison.methods}
    kinds = {batches: f"minus ERM, both on {batches} batches" for batches in PARTNERS}  # all, for colours that stay
    shown = pd.DataFrame(
        {
            "label": [in_words(methods[name].control or name) for name in rows.index],
            "mean": rows["difference"],
            "low": rows["low"],
            "high": rows["high"],
            "group": pd.Categorical([kinds[methods[name].batches] for name in rows.index], list(kinds.values())),
        }
    )
    return difference_plot(shown, title, margin=MARGIN)


def conflict_figure(comparison: Comparison, method: str) -> Figure:
    """How often and how strongly gradients of domains conflict, per epoch and parameter tensor, mean over holdouts.

    Grey: gradients of one number each, whose cosine is always 1 or −1.
    """
    run = comparison.run
    saved = [run.archive.method(method, 0, (holdout,)) for holdout in comparison.single_holdouts]
    rate, strength = (
        torch.stack([networks.history[part][networks.ok].mean(0) for networks in saved]).nanmean(0).T.numpy()
        for part in ("conflict_rate", "conflict_strength")
    )  # [tensors, epochs]
    trivial = (strength > 1 - 1e-6).all(1, keepdims=True)
    strength = np.where(trivial, np.nan, strength)
    names = tensor_names(comparison.network)
    epochs = range(1, rate.shape[1] + 1)
    titles = "How often they conflict", "How strongly" + " (grey: single numbers)" * bool(trivial.any())
    panels = [Panel(titles[0], rate, names, epochs, "epoch"), Panel(titles[1], strength, names, epochs, "epoch")]
    title = f"{method}: conflicts of domain gradients ({run.title})"
    return matrices(panels, title, ("part of the tests", "|cosine| where they conflict"), None, square=False)


def tensor_names(network: PureNetwork) -> list[str]:
    """What each parameter tensor of a network is, in words: "layer 2 weights", "block 1 query biases"."""
    kinds, roles = {"weight": "weights", "bias": "biases"}, network.roles
    found = []
    for name in network.shapes:
        layer, _, kind = name.rpartition(".")
        known = f"layer {network.layers.index(layer) + 1}" if layer in network.layers else roles.get(layer, layer)
        found.append(f"{known} {kinds.get(kind, kind)}")
    return found


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
    experts = range(1, use.shape[-1] + 1)
    panels = [
        Panel("By domain", by_domain, domains, experts, "expert"),
        Panel("By class", by_class, run.features.class_names, experts, "expert"),
    ]
    on = f"{run.features.model_name}, {run.features.feature_size}-d, seed {saved.seeds[first]}"
    title = f"{method}: use of the experts, holdout {plain(holdout)} ({on})"
    return matrices(panels, title, "mean gate", square=False)
