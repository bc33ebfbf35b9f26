"""Accuracies after each epoch, as one table: what selection rules, reports and exports read.

A table of *curves* has one row per (algorithm, trial, holdouts, seed, epoch, domain):

- ``algorithm`` (str): name of the method;
- ``trial`` (int): number of its hyperparameters, 0 = the defaults;
- ``holdouts`` (tuple of 1 or 2 domain names, in the order of the domains): left out of training;
- ``seed`` (int);
- ``epoch`` (int from 1); in imported runs the rank of the checkpoint;
- ``step`` (int): updates done;
- ``domain`` (str): what was measured; every epoch has all domains, held out or not;
- ``in``, ``out``, ``full`` (float): accuracies in [0, 1] on the training part, the validation part and all images of
  the domain. ``full`` is NaN where it is not known, as in imported runs. A failed network is NaN throughout.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import product

import numpy as np
import pandas as pd
import torch

from config import InputError
from engine import accuracies
from study import Run, SavedNetworks

PARTS = ("in", "out", "full")
RUN = ["algorithm", "trial", "holdouts", "seed"]
COLUMNS = (*RUN, "epoch", "step", "domain", *PARTS)


def curves_of(rows: pd.DataFrame | Iterable[Mapping]) -> pd.DataFrame:
    """Make curves (see above) from rows, and check them.

    Args:
        rows: a table, or a mapping per row; other columns are dropped.

    Returns:
        Columns `COLUMNS`; the rows keep their order.

    Raises:
        InputError: no rows; a column, domain or epoch is missing; a duplicated row; holdouts that are not one or two
            domains; an accuracy outside [0, 1]; a network that failed in some epochs only.
    """
    curves = pd.DataFrame(rows if isinstance(rows, pd.DataFrame) else list(rows))
    if curves.empty:
        raise InputError("There are no runs to compare.")
    for name in COLUMNS:
        if name not in curves:
            raise InputError(f"Curves need a column '{name}'.")
    curves = curves[[*COLUMNS]].reset_index(drop=True).astype(dict.fromkeys(PARTS, float))
    curves["holdouts"] = curves["holdouts"].map(tuple)
    _check_holdouts(curves)
    _check_accuracies(curves)
    return curves


def read_curves(run: Run, methods: Iterable[str], trials: int, holdouts: Sequence[tuple[str, ...]]) -> pd.DataFrame:
    """Curves of what a run's archive holds: of each method (its name), trial and choice of held-out domains."""
    saved = {one: run.archive.method(*one) for one in product(methods, range(trials), holdouts)}
    rows = [network_rows(run, networks, *one, networks.header["steps_per_epoch"]) for one, networks in saved.items()]
    return curves_of(pd.concat(rows, ignore_index=True))


def network_rows(
    run: Run, saved: SavedNetworks, method: str, trial: int, holdouts: tuple[str, ...], steps: int | Sequence[int]
) -> pd.DataFrame:
    """Rows of curves, one per seed, epoch and domain, of the networks of one method, trial and choice of holdouts.

    `steps` are the updates of an epoch, or of each.
    """
    shares = accuracies(saved.history["correct"], run.data.totals.cpu())  # part -> [S, E, domains]
    failed = ~saved.ok.view(-1, 1, 1)
    shape = shares["full"].shape
    s, e, d = (axis.flatten().numpy() for axis in torch.meshgrid(*map(torch.arange, shape), indexing="ij"))
    columns = {
        "algorithm": method,
        "trial": trial,
        "holdouts": [holdouts] * len(s),
        "seed": np.array(saved.seeds)[s],
        "epoch": e + 1,
        "step": steps * (e + 1) if isinstance(steps, int) else np.cumsum(steps)[e],
        "domain": np.array(run.features.domain_names)[d],
    }
    return pd.DataFrame(columns | {part: shares[part].masked_fill(failed, torch.nan).flatten() for part in PARTS})


def _check_holdouts(curves: pd.DataFrame) -> None:
    """Known domains, one or two, and two in one order only."""
    domains, seen = set(curves["domain"]), {}
    for holdouts in curves["holdouts"].unique():
        if len(holdouts) not in (1, 2) or len(set(holdouts)) < len(holdouts) or not set(holdouts) <= domains:
            raise InputError(f"A run holds out one or two of {', '.join(sorted(domains))}, not {holdouts}.")
        if seen.setdefault(frozenset(holdouts), holdouts) != holdouts:
            raise InputError(f"Runs hold out the same two domains in both orders: {holdouts}.")


def _check_accuracies(curves: pd.DataFrame) -> None:
    """All domains once per epoch; fractions; failed throughout or not at all."""
    run = curves.groupby(RUN, sort=False).ngroup()
    where, values = curves[["epoch", "domain"]].assign(run=run), curves[[*PARTS]]
    count = where.groupby(["run", "epoch"])["domain"].transform("size")
    missing = values[["in", "out"]].isna().sum(axis=1).groupby(run).transform("mean")
    faults = {
        "There are two accuracies of the same network": where.duplicated(),
        "The accuracy of a domain is missing": count < curves["domain"].nunique(),
        "An accuracy does not lie in [0, 1]": ((values < 0) | (values > 1)).any(axis=1),
        "A network is NaN throughout or not at all, this one is in part": ~missing.isin([0, 2]),
    }
    for message, wrong in faults.items():
        if wrong.any():
            first = curves.iloc[int(wrong.argmax())]
            raise InputError(f"{message}: {', '.join(f'{key} {first[key]}' for key in [*RUN, 'epoch'])}.")
