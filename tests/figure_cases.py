"""Figures of every kind, from numbers that were made up."""

import numpy as np
import pandas as pd
import torch

import visualization as v

DOMAINS = ["art_painting", "cartoon", "photo", "sketch"]
CLASSES = ["dog", "elephant", "giraffe", "guitar", "horse", "house", "person"]
MANY = [f"a class {i}" for i in range(22)]
LONG = "a_really_very_long_domain_name_with_underscores_that_goes_on_and_on"
TEN = [(10, 10)] * 4


def random_layers(*shapes, scale=0.3):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) * scale for shape in shapes]


def history(epochs=10, seeds=10, level=0.9, keys=tuple(v.PANELS)):
    generator, steps = np.random.default_rng(0), np.arange(epochs)[:, None]
    curve = level - 0.6 * np.exp(-steps / 3)
    result = {"loss": 2 * np.exp(-steps / 4) + 0.1 * generator.random((epochs, seeds))}
    return {key: result.get(key, curve + 0.03 * generator.random((epochs, seeds))) for key in keys}


def bars_table(algorithms, holdouts, base=0.4, half=0.02):
    rows = []
    for i, algorithm in enumerate(algorithms):
        for j, holdout in enumerate(holdouts):
            mean = min(base + 0.04 * i + 0.06 * j, 0.999)
            rows.append((algorithm, holdout, mean, mean - half, mean + 2 * half))
    return pd.DataFrame(rows, columns=["algorithm", "holdout", "mean", "low", "high"])


def counts(classes, seed=0):
    generator = np.random.default_rng(seed)
    return torch.tensor(generator.poisson(2, (classes, classes)) + np.diag(generator.integers(0, 90, classes)))


def differences(**columns):
    table = {"label": ["importance − erm", LONG, "zero"], "mean": [0.012, -0.2, 0.0]}
    return pd.DataFrame(table | {"low": [-0.001, -0.31, 0.0], "high": [0.025, -0.1, 0.0]} | columns)


def many_differences():
    """Fifteen methods, of which two are far from the others."""
    mean = np.array([0.31, *np.linspace(0.02, -0.02, 13), -0.154])
    table = {"label": [f"method {i}" for i in range(15)], "mean": mean, "low": mean - 0.003, "high": mean + 0.004}
    return pd.DataFrame(table | {"group": pd.Categorical(["b"] * 15, ["a", "b"])})


def points(n=300, classes=7, domains=4):
    generator = np.random.default_rng(0)
    labels, where = generator.integers(0, classes, n), generator.integers(0, domains, n)
    features = generator.normal(size=(n, 16)) + 3 * generator.normal(size=(classes, 16))[labels]
    return torch.tensor(features).half(), torch.tensor(labels), torch.tensor(where)


def sweep(values):
    rows = [(name, x, 0.6 + i / 9, 0.57, 0.8) for name in ("importance", "random") for i, x in enumerate(values)]
    return pd.DataFrame(rows, columns=["algorithm", "setting", "mean", "low", "high"])


def pictures(domains, classes, size=(40, 60, 3)):
    return {d: dict.fromkeys(classes, np.random.default_rng(0).integers(0, 255, size, dtype=np.uint8)) for d in domains}


def panels(columns):
    values = np.linspace(0, 1, 3 * columns).reshape(3, columns)
    return [v.Panel(title, values, ["a", "b", LONG], range(1, columns + 1), "epoch") for title in ("One", "Two")]


def row_shares():
    generator = np.random.default_rng(0)
    return {name: generator.beta(6, 4, size) for name, size in (("query", 192), ("MLP in", 768), (LONG, 24))}


FIGURES = {
    "weights": lambda: v.weight_grids(random_layers(*TEN), "Weights after phase 1, sketch, seed 0"),
    "weights small": lambda: v.weight_grids(random_layers((2, 1), (1, 2), (1, 1)), "A long title for it " * 8),
    "weights wide": lambda: v.weight_grids(random_layers((40, 30), (20, 40)), "Wide"),
    "weights large": lambda: v.weight_grids(random_layers((8, 12), (6, 8), scale=12), "One below the other"),
    "summed": lambda: v.weight_grids([layer.abs() * 9 for layer in random_layers((5, 4))], "I", "importance", (0, 3)),
    "mask": lambda: v.weight_grids([layer > 0 for layer in random_layers((4, 4), (4, 4))], "Mask", "mask"),
    "curves": lambda: v.training_curves({"importance": history(100), "erm": history(100, level=0.99)}, "Phase 2", 70),
    "curves long": lambda: v.training_curves(
        {LONG + str(i): history(keys=("loss", "train_accuracy")) for i in range(5)}, "1"
    ),
    "curves one": lambda: v.training_curves({"a": {"train_accuracy": np.ones((1, 1))}}, "One epoch, one seed"),
    "bars": lambda: v.accuracy_bars(
        bars_table(["importance", "erm"], [*DOMAINS, "average"]), "Held out", 1 / 7, dict.fromkeys(DOMAINS, 0.2)
    ),
    "bars many": lambda: v.accuracy_bars(bars_table([f"method {i}" for i in range(12)], DOMAINS[:3]), "Twelve", 1 / 7),
    "bars high": lambda: v.accuracy_bars(bars_table(["erm"], [LONG, "b"], 0.99, 0.6), "Near 100 %", 0.5),
    "bars low": lambda: v.accuracy_bars(bars_table(["a", "b", "c"], DOMAINS[:3], 0.0, 0.0), "Near 0 %"),
    "confusion": lambda: v.confusion_matrices(dict.fromkeys(DOMAINS[:3], counts(7)), CLASSES, "Confusion"),
    "confusion long": lambda: v.confusion_matrices({LONG: counts(3), "b": counts(3)}, ["a long class", "b", "c"], "3"),
    "confusion 12": lambda: v.confusion_matrices({"a": counts(12), "b": counts(12)}, MANY[:12], "12"),
    "confusion 22": lambda: v.confusion_matrices({"a": counts(22)}, MANY, "22"),
    "confusion difference": lambda: v.confusion_matrices({"a": counts(7)}, CLASSES, "D", {"a": counts(7, seed=1)}),
    "difference": lambda: v.difference_plot(differences(), "Paired differences", margin=0.005),
    "difference pairs": lambda: v.difference_plot(
        differences(label=["x", "x", LONG], group=["1", LONG, "1"]), "Groups"
    ),
    "difference many": lambda: v.difference_plot(many_differences(), "Fifteen", margin=0.005),
    "projection": lambda: v.feature_projection(*points(), CLASSES, DOMAINS, "PACS", method="pca"),
    "projection 22": lambda: v.feature_projection(*points(100, 22, 2), MANY, [LONG, "b"], "25 classes", method="pca"),
    "samples": lambda: v.sample_sheet(pictures([LONG, "b"], [LONG, "c"]), "Samples"),
    "samples many": lambda: v.sample_sheet(pictures(["a"], [f"class_{i}" for i in range(14)]), "Samples"),
    "overlap": lambda: v.overlap_matrix(np.linspace(0, 1, 16).reshape(4, 4), DOMAINS, "Overlap", 3 / 7),
    "overlap long": lambda: v.overlap_matrix(np.eye(2), [LONG, "b"], "Overlap"),
    "settings": lambda: v.accuracy_curves_by_setting(
        sweep([20, 40, 60]), "setting", "Sweep", "kept (%)", {"erm": (0.7, 0.68, 0.72)}, 60
    ),
    "settings names": lambda: v.accuracy_curves_by_setting(
        sweep(["sum", "normalized_sum", LONG]), "setting", "Sweep", "aggregation", default="sum"
    ),
    "panels": lambda: v.matrices(panels(6), "Panels", "gate", square=False),
    "panels wide": lambda: v.matrices(panels(40), "Panels", ("rate", "strength"), None, square=False),
    "rows": lambda: v.row_densities(row_shares(), "Rows", 0.6, {"query": (0.5, 0.7), LONG: (0.55, 0.65)}),
    "rows few": lambda: v.row_densities({"query": np.full(9, 0.001), "empty": np.zeros(4)}, "Rows", 0.001),
    "panels divergent": lambda: v.matrices(
        [v.Panel("P", np.linspace(-30, 30, 24).reshape(3, 8), ["a", "b", LONG], range(1, 9), "part")] * 2,
        "Importance",
        "% above or below the mean of all",
        (-30, 30),
        "+.0f",
        square=False,
    ),
    "sentence": lambda: v.sentence_figure("There is nothing to show. " * 4, "A title"),
}
