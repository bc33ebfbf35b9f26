"""The linear probe: logistic regression on the features, a yardstick without random starts."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from config import InputError
from engine import SplitFeatures, logistic_regression
from study import Run

FILE = "linear_probe.csv"  # in a results directory
STRENGTHS = tuple(10.0**power for power in range(-4, 3))  # of C, the inverse of the penalty
SPLITS = 10  # on which it is fitted, at most
PATIENCE = 2  # larger values of C in a row that are no better, after which no larger one is tried
STEPS = 1000  # of Newton's method, at most
MOST_IMAGES = 20_000  # that one is fitted to; of more, as many are taken evenly, by class and domain
PIECE = 2**14  # images classified at a time
COLUMNS = ("holdout", "split", "C", "validation", "full", "in", "out")


def kept_probe(run: Run, holdouts: Sequence[str] | None = None) -> pd.DataFrame:
    """`linear_probe` on the splits of a run's first `SPLITS` seeds; kept in its results directory.

    C is chosen on the first split, and the others take it.

    Args:
        run: features, splits and seeds.
        holdouts: default those of the run.

    Returns:
        A row per holdout and split, indexed by holdout: see `linear_probe`, and "split", the seed whose split it is
        (the number of the split where all seeds share one).

    Raises:
        InputError: the file that was kept is damaged.
    """
    holdouts = [*(run.holdouts if holdouts is None else holdouts)]
    splits = [*run.seeds[:SPLITS]] if run.data.split_seed == "seed" else [run.data.split_seed]
    path = run.results.directory / FILE
    kept = _read(path)
    for part in (splits[:1], splits[1:]):
        missing = [unit for unit in product(holdouts, part) if unit not in kept.index]
        if missing:
            chosen = {name: [kept.loc[(name, splits[0]), "C"]] for name in holdouts} if part != splits[:1] else {}
            rows = _fit(run, missing, chosen)
            kept = rows if kept.empty else pd.concat([kept, rows]).sort_index()
            with run.writing():
                run.results.write_text(FILE, kept.reset_index().to_csv(index=False))
    return kept.loc[pd.MultiIndex.from_product([holdouts, splits], names=kept.index.names)].reset_index("split")


def _read(path: Path) -> pd.DataFrame:
    """What was kept, by holdout and split."""
    try:
        table = pd.read_csv(path) if path.is_file() else pd.DataFrame(columns=COLUMNS)
        return table[[*COLUMNS]].set_index(["holdout", "split"])
    except (ValueError, KeyError):
        raise InputError(f"'{path}' is damaged: delete it, and logistic regression is fitted again.") from None


def _fit(run: Run, units: Sequence[tuple[str, int]], strengths: Mapping[str, Sequence[float]]) -> pd.DataFrame:
    """Rows for pairs of a holdout and a split, with a holdout's own values of C if it has any."""
    import sklearn.linear_model  # noqa: F401 - once here, not in every process that fits

    def fit(unit: tuple[str, tuple[int]], tick: Callable[[], object]) -> pd.DataFrame:
        holdout, (split,) = unit
        row = linear_probe(run.data, [holdout], split, strengths.get(holdout, STRENGTHS)).reset_index()
        tick()
        return row.assign(split=split)[[*COLUMNS]]

    chunks = [(holdout, (split,)) for holdout, split in units]
    floats = 2 * min(len(run.features), MOST_IMAGES) * run.features.feature_size
    rows = pd.concat(run.side_by_side("Linear probe", chunks, fit, 1, floats, "fit"))
    return rows.set_index(["holdout", "split"]).sort_index()


def probe_words(probe: pd.DataFrame, data: SplitFeatures) -> str:
    """What a table of `kept_probe` on this data is, for a heading."""
    splits, inside = probe["split"].nunique(), data.totals[:, 0].sum(-1)
    words = f"logistic regression on the features, mean of {splits} splits" if splits > 1 else "logistic regression"
    if (inside.sum() - inside).max() > MOST_IMAGES:  # of the sources of a holdout
        words += f"; fitted to {MOST_IMAGES:,} images at most, taken evenly by class and domain"
    return words


def linear_probe(
    data: SplitFeatures,
    holdouts: Sequence[str],
    seed: int = 0,
    strengths: Sequence[float] = STRENGTHS,
    steps: int = STEPS,
) -> pd.DataFrame:
    """Held-out accuracy of logistic regression, trained on the `in` split of the source domains.

    C is the one with the best unweighted mean accuracy on the sources' `out` splits, the smallest in case of a tie;
    the search ends after `PATIENCE` larger ones in a row that are no better.
    Each fit begins at the last one's solution; see `engine.logistic_regression`. Of more than `MOST_IMAGES` to train
    on, as many are taken, every k-th by class and domain: with hundreds of classes a fit to all takes very long.

    Args:
        data: features, labels and splits.
        holdouts: domains to leave out, each in turn.
        seed: whose split; of no effect where all seeds share one.
        strengths: values of C to choose from.
        steps: after which a fit is given up.

    Returns:
        A row per holdout: C, validation (mean `out` accuracy of the sources), and full, in, out (accuracy on those
        parts of the held-out domain); fractions.

    Raises:
        RuntimeError: a fit did not converge.
    """
    labels, table = data.labels.cpu().numpy(), []
    for holdout in holdouts:
        parts = {
            (domain, part): data.rows([domain], part, [seed])[0].cpu().numpy()
            for domain in data.domain_names
            for part in ("all", "in", "out")
        }
        sources = data.sources(holdout)
        rows = np.concatenate([parts[source, "in"] for source in sources])
        if len(rows) > MOST_IMAGES:
            order = np.lexsort((data.domains.cpu().numpy()[rows], labels[rows]))
            rows = rows[order[np.linspace(0, len(rows) - 1, MOST_IMAGES).round().astype(int)]]
        best, chosen = -1.0, None
        for strength, model in _path(_features(data, rows), labels[rows], strengths, steps):
            validation = float(np.mean([_score(model, data, parts[source, "out"]) for source in sources]))
            if validation > best:
                best, worse = validation, 0
                there = (parts[holdout, part] for part in ("all", "in", "out"))
                chosen = strength, best, *(_score(model, data, own) for own in there)
            else:
                worse += 1
            if worse == PATIENCE:
                break
        table.append((holdout, *chosen))
    return pd.DataFrame(table, columns=["holdout", "C", "validation", "full", "in", "out"]).set_index("holdout")


def _features(data: SplitFeatures, rows: np.ndarray) -> np.ndarray:
    """Features of some rows: float64 ``[n, D]``."""
    return data.features[torch.from_numpy(rows)].double().cpu().numpy()


def _score(model, data: SplitFeatures, rows: np.ndarray) -> float:
    """Accuracy of a fitted `LogisticRegression` on some rows."""
    pieces = (rows[first : first + PIECE] for first in range(0, len(rows), PIECE))
    predicted = np.concatenate([model.predict(_features(data, piece)) for piece in pieces])
    return float(np.mean(predicted == data.labels.cpu().numpy()[rows]))


def _path(x: np.ndarray, y: np.ndarray, strengths: Sequence[float], steps: int) -> Iterator[tuple]:
    """(C, `LogisticRegression` fitted with it), from the smallest C; each fit begins at the solution of the last."""
    model = None
    for strength in sorted(strengths):
        model = logistic_regression(x, y, strength, model, steps)
        yield strength, model
