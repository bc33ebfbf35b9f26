"""Figures of every kind, from numbers that were made up."""

import numpy as np
import pandas as pd
import torch

import visualization as v

DOMAINS = ["art_painting", "cartoon", "photo", "sketch"]
CLASSES = ["dog", "elephant", "giraffe", "guitar", "horse", "house", "person"]
LONG = "a_really_very_long_domain_name_with_underscores_that_goes_on_and_on"


def random_layers(*shapes, scale=0.3):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) * scale for shape in shapes]


def history(epochs=10, seeds=10, level=0.9, validation=True):
    generator, steps = np.random.default_rng(0), np.arange(epochs)[:, None]
    curve = level - 0.6 * np.exp(-steps / 3)
    result = {"loss": 2 * np.exp(-steps / 4) + 0.1 * generator.random((epochs, seeds))}
    for key in ("train_accuracy", "validation_accuracy")[: 1 + validation]:
        result[key] = curve + 0.03 * generator.random((epochs, seeds))
    return result


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


TEN = [(10, 10)] * 4
FIGURES = {
    "weights": lambda: v.weight_grids(random_layers(*TEN), "Weights after phase 1, sketch, seed 0"),
    "weights unequal": lambda: v.weight_grids(random_layers((8, 10), (6, 8), scale=12), "Unequal"),
    "weights small": lambda: v.weight_grids(random_layers((2, 1), (1, 2), (1, 1)), "A long title for it " * 8),
    "weights wide": lambda: v.weight_grids(random_layers((40, 30), (20, 40)), "Wide"),
    "importance": lambda: v.weight_grids([layer.abs() for layer in random_layers(*TEN)], "I", "importance"),
    "summed": lambda: v.weight_grids([layer.abs() * 9 for layer in random_layers(*TEN)], "I", "importance", (0, 3)),
    "mask": lambda: v.weight_grids([layer > 0 for layer in random_layers(*TEN)], "Mask", "mask"),
    "equal": lambda: v.weight_grids([torch.zeros(10, 10)] * 4, "All equal"),
    "curves": lambda: v.training_curves({"importance": history(), "erm": history(level=0.99)}, "Phase 2", 7),
    "curves long": lambda: v.training_curves({LONG + str(i): history(validation=False) for i in range(5)}, "Phase 1"),
    "curves one": lambda: v.training_curves({"a": {"train_accuracy": np.ones((1, 1))}}, "One epoch, one seed"),
    "bars": lambda: v.accuracy_bars(
        bars_table(["importance", "erm"], [*DOMAINS, "average"]), "Held out", 1 / 7, dict.fromkeys(DOMAINS, 0.2)
    ),
    "bars many": lambda: v.accuracy_bars(bars_table([f"method {i}" for i in range(12)], DOMAINS), "Twelve", 1 / 7),
    "bars high": lambda: v.accuracy_bars(bars_table(["erm"], [LONG, "b"], 0.99), "Near 100 %", 0.5),
    "bars low": lambda: v.accuracy_bars(bars_table(["a", "b", "c"], DOMAINS[:3], 0.0, 0.0), "Near 0 %"),
    "confusion": lambda: v.confusion_matrices(dict.fromkeys(DOMAINS, counts(7)), CLASSES, "Confusion"),
    "confusion 3": lambda: v.confusion_matrices({LONG: counts(3), "b": counts(3)}, ["a long class", "b", "c"], "3"),
    "confusion 10": lambda: v.confusion_matrices({"photo": counts(10)}, [f"class_{i}" for i in range(10)], "10"),
    "confusion 25": lambda: v.confusion_matrices(
        dict.fromkeys("abcde", counts(25)), [f"a class {i}" for i in range(25)], "25"
    ),
    "difference": lambda: v.difference_plot(differences(), "Paired differences"),
    "difference groups": lambda: v.difference_plot(differences(group=["fresh", LONG, "fresh"]), "Groups"),
    "difference one": lambda: v.difference_plot(differences()[:1], "One"),
    "projection": lambda: v.feature_projection(*points(), CLASSES, DOMAINS, "PACS", method="pca"),
    "projection 25": lambda: v.feature_projection(
        *points(300, 25, 2), [f"class {i}" for i in range(25)], [LONG, "b"], "25 classes", method="pca"
    ),
    "samples": lambda: v.sample_sheet(pictures(DOMAINS, CLASSES), "Samples"),
    "samples long": lambda: v.sample_sheet(pictures([LONG, "b"], [LONG, "c_d"]), "Samples"),
    "samples 25": lambda: v.sample_sheet(pictures(DOMAINS, [f"class_{i}" for i in range(25)]), "Samples"),
    "overlap": lambda: v.overlap_matrix(np.linspace(0, 1, 16).reshape(4, 4), DOMAINS, "Overlap", 3 / 7),
    "overlap 2": lambda: v.overlap_matrix(np.eye(2), [LONG, "b"], "Overlap"),
    "settings": lambda: v.accuracy_curves_by_setting(
        sweep([20, 40, 60]), "setting", "Sweep", "kept (%)", {"erm": (0.7, 0.68, 0.72)}, 60
    ),
    "settings names": lambda: v.accuracy_curves_by_setting(
        sweep(["sum", "normalized_sum", LONG]), "setting", "Sweep", "aggregation", default="sum"
    ),
}
