"""The methods of the field on the same features, seeds, starts and splits, through the one training loop.

A `Comparison` trains every method on every holdout with the same number of trials: trial 0 has the method's defaults
(learning rates and masks as the settings say), the others draw its hyperparameters at random. It resumes by (method,
trial, holdouts, chunk of seeds), as `study.Study` does. `selection` chooses among the trained networks, `report` and
`figures` show what came out.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.func import grad, vmap

import config
from config import InputError, Settings
from field.algorithms import ALGORITHMS, Algorithm, Hyperparameter, find, register
from field.curves import read_curves
from field.load import load_method
from field.selection import tables_by_rule
from field.unit import Trained, Unit, train_unit
from storage import FeatureSet, Results, damaged
from study import SELECTIONS, Arm, Counted, Run, SavedNetworks, Study, make_records

PARTNERS = {"pooled": "ERM", "balanced": "ERMBalanced"}  # the baseline for each way of making a batch
CLASSIFIERS = 4  # memory that a method may need for a network: experts, averages and adversaries


class Comparison:
    """Methods of the field, compared on one run.

    Args:
        run: features, settings, seeds, holdouts and results directory.
        methods: names, classes that extend `Algorithm`, or where a file has one ("FILE.py:NAME"); the baselines of
            their batches are added.
        trials: random search over hyperparameters: this many for every method, the first with its defaults.
        leave_one_out: hold out every pair of domains as well, for the selection rule of that name.

    Attributes:
        methods: classes of the methods, with baselines.
        holdouts: choices of held-out domains, each a tuple of one or two.

    Raises:
        InputError: an unknown method, an invalid class, no trial, `PH2_INIT` other than "fresh", or domains that
            cannot be left out in pairs.
    """

    def __init__(
        self, run: Run, methods: Iterable[str | type[Algorithm]], trials: int = 1, leave_one_out: bool = False
    ):
        self.run, self.trials = run, trials
        self.methods = check_methods(methods, trials, run.settings)
        self.holdouts = _choices_of_holdouts(run, leave_one_out)
        self._curves: pd.DataFrame | None = None
        self._tables: dict[str, pd.DataFrame] | None = None

    @classmethod
    def from_config(
        cls,
        methods: Iterable[str | type[Algorithm]] | None = None,
        trials: int = 1,
        leave_one_out: bool = False,
        **options,
    ) -> "Comparison":
        """The comparison on the run that the constants of `config` describe, by default of all methods.

        `options` are those of `study.Run.from_config`; the other arguments are those of the class.
        """
        methods = check_methods(sorted(ALGORITHMS) if methods is None else methods, trials, Settings.current())
        check = partial(_check_pairs, leave_one_out)
        return cls(Run.from_config(**options, check=check), methods, trials, leave_one_out)

    @classmethod
    def of(
        cls,
        results: Results | str | Path,
        features: Callable[[], FeatureSet],
        methods: Iterable[str | type[Algorithm]] | None = None,
    ) -> "Comparison":
        """The comparison that a results directory holds, by its records; of all its methods if no others are named.

        `features` returns those that it was made with, and is called once a comparison was found: it may take long.

        Raises:
            InputError: the directory holds no comparison, or one that was made with other features.
        """
        results = results if isinstance(results, Results) else Results(results)
        records = [record for record in results.records() if "trial" in record]
        run = Run.of(results, features, records, "comparison")
        trials = 1 + max(record["trial"] for record in records)
        methods = sorted({record["algorithm"] for record in records}) if methods is None else methods
        return cls(run, methods, trials, any("+" in record["holdout"] for record in records))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the methods, as in records and files."""
        return tuple(method.__name__ for method in self.methods)

    @property
    def partners(self) -> dict[str, str]:
        """Name of a method -> name of the baseline on the same batches."""
        return {method.__name__: PARTNERS[method.batches] for method in self.methods}

    @property
    def single_holdouts(self) -> tuple[str, ...]:
        """Domains that are held out alone."""
        return tuple(holdouts[0] for holdouts in self.holdouts if len(holdouts) == 1)

    def values(self, method: type[Algorithm], trial: int) -> dict[str, float | int | str]:
        """All hyperparameters of a trial: of the settings, else defaults, in trial 0; drawn ones in the others."""
        known = method.known_hyperparameters()
        values = {name: h.default for name, h in known.items()} | method.from_settings(self.run.settings)
        if trial == 0:
            return values
        digest = hashlib.sha256(f"{method.__name__}/{trial}".encode()).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
        return values | {name: known[name].search(rng) for name in sorted(known) if known[name].search is not None}

    def saw_validation(self, method: type[Algorithm]) -> bool:
        """Whether a method's masks depend on images that its networks are validated on."""
        return method.control is not None and Arm(method.control).saw_validation(self.run.settings)

    def train(self) -> None:
        """Train what is missing, with Phase 1 for methods with masks."""
        run, units = self.run, self.missing()
        self._complete_records()
        if not units:
            return
        run.check_memory(units, CLASSIFIERS)
        self._curves = self._tables = None
        if controls := dict.fromkeys(unit.method.control for unit in units if unit.method.control is not None):
            Study(run, [Arm(control) for control in controls]).phase1()

        def train(unit: Unit, tick: Callable[[], None]) -> Trained:
            return train_unit(run, unit, self.values(unit.method, unit.trial), tick)

        vmap(grad(torch.sum))(torch.ones(1, 1))  # torch.func loads 900 modules: here once, not in every process
        with run.writing(units):
            floats, epochs = CLASSIFIERS * run.network.size, run.settings.ph2_num_epochs
            for unit, trained in zip(units, run.side_by_side("Methods", units, train, epochs, floats), strict=True):
                self._save(unit, trained)

    def missing(self) -> list[Unit]:
        """What is not on disk yet.

        Raises:
            InputError: what is on disk is damaged, or was trained by another version of a method or with other
                hyperparameters.
        """
        run, units = self.run, []
        for method, trial, holdouts in product(self.methods, range(self.trials), self.holdouts):
            where = method.__name__, trial, holdouts
            if run.archive.method_seeds(*where, weights=False):
                self._check_stored(method, trial, run.archive.method(*where))
            stored = run.archive.method_seeds(*where, weights=self._keeps_weights(*where))
            units += [Unit(method, trial, holdouts, chunk) for chunk in run.chunks({*run.seeds} - stored)]
        return units

    def _complete_records(self) -> None:
        """Write the records that are missing of networks on disk, as after a full disk: nothing is trained for them."""
        run, records = self.run, self.run.records()
        recorded = Counter((r["algorithm"], r.get("trial"), r["holdout"]) for r in records)
        for method, trial, holdouts in product(self.methods, range(self.trials), self.holdouts):
            where = method.__name__, trial, holdouts
            stored = {*run.seeds} & run.archive.method_seeds(*where, weights=self._keeps_weights(*where))
            if recorded[method.__name__, trial, "+".join(holdouts)] < len(SELECTIONS) * len(stored):
                saved = run.archive.method(*where)
                with run.writing():
                    self._record(Unit(method, trial, holdouts, saved.seeds), saved.history)

    def _check_stored(self, method: type[Algorithm], trial: int, saved: SavedNetworks) -> None:
        """Refuse what is damaged, and to mix results of a method with those that were trained otherwise."""
        name, directory, header = method.__name__, self.run.results.directory, saved.header
        mine, stored, other = self.values(method, trial), header.get("hyperparameters"), None
        if not isinstance(stored, dict) or not isinstance(header.get("steps_per_epoch"), int):
            raise damaged(f"The history {saved.name} in '{directory}'", "its header lacks hyperparameters or steps")
        if header.get("version") != method.version:
            other = f"version {header.get('version')} of {name}, not {method.version}"
        elif differing := [key for key in [*stored, *mine] if mine.get(key) != stored.get(key)]:
            key = differing[0]
            other = f"{name}, trial {trial}, with {key} = {stored.get(key)!r}, not {mine.get(key)!r}"
        if other:
            raise InputError(
                f"'{directory}' contains results of {other}: use another results directory, or --overwrite."
            )

    @staticmethod
    def _keeps_weights(name: str, trial: int, holdouts: Sequence[str]) -> bool:
        """Whether the weights are kept: for the ensemble."""
        return name == PARTNERS["pooled"] and trial == 0 and len(holdouts) == 1

    def _save(self, unit: Unit, trained: Trained) -> None:
        """Write the arrays of a unit, then its records, all at once: what has records has arrays."""
        method, trial, holdouts, seeds = unit
        about = {"algorithm": method.__name__, "holdouts": list(holdouts), "version": method.version}
        about |= self._choice(unit) | {"steps_per_epoch": trained.steps_per_epoch}
        params = trained.params if self._keeps_weights(method.__name__, trial, holdouts) else None
        self.run.archive.save_method(about, seeds, trained.history, params)
        self._record(unit, trained.history)

    def _record(self, unit: Unit, history: Mapping[str, torch.Tensor]) -> None:
        counted = Counted(unit.seeds, *(history[key] for key in ("validation_accuracy", "correct", "failed")))
        choice, peeked = self._choice(unit), self.saw_validation(unit.method)
        records = make_records(self.run, unit.method.__name__, unit.holdouts, counted, choice, peeked)
        self.run.results.append(records)

    def _choice(self, unit: Unit) -> dict[str, object]:
        """What headers and records say of a unit beside method, holdouts and seeds."""
        values = self.values(unit.method, unit.trial)
        return {"trial": unit.trial, "hyperparameters": values, "batches": unit.method.batches}

    def curves(self) -> pd.DataFrame:
        """Accuracies after each epoch of these methods, trials, holdouts and seeds, see `field.curves`.

        Kept until more is trained.

        Raises:
            InputError: something is not trained yet.
        """
        if self._curves is None:
            if missing := self.missing():
                raise InputError(
                    f"The comparison is incomplete: {len(missing)} runs are missing, first {missing[0]}. All methods "
                    "need the same seeds, trials and holdouts: train them first."
                )
            self._curves = read_curves(self.run, self.names, self.trials, self.holdouts)
        return self._curves

    def tables(self) -> dict[str, pd.DataFrame]:
        """`selection.comparison_table` by selection rule, for the rules that the runs allow. Kept like `curves`."""
        if self._tables is None:
            self._tables = tables_by_rule(self.curves(), self.partners)
        return self._tables


def check_methods(
    methods: Iterable[str | type[Algorithm]], trials: int, settings: Settings
) -> tuple[type[Algorithm], ...]:
    """Classes of the methods, baselines first; classes that are not known yet are registered.

    Raises:
        InputError: see `Comparison`.
    """
    config.check("--trials", trials)
    if settings.ph2_init != "fresh":
        raise InputError(
            f"A comparison trains from a fresh start: PH2_INIT must be 'fresh', not '{settings.ph2_init}'."
        )
    asked = [_found(method) for method in methods]
    partners = sorted({PARTNERS[method.batches] for method in asked})
    return tuple(dict.fromkeys([*map(find, partners), *asked]))


def _found(method: str | type[Algorithm]) -> type[Algorithm]:
    """The class that a name, a place in a file or the class itself stands for."""
    if isinstance(method, str) and ":" not in method:
        return find(method)
    return register(_checked(load_method(method) if isinstance(method, str) else method))


def _checked(method: object) -> type[Algorithm]:
    """A class, if it declares what a method has to; an `InputError` that says what is wrong otherwise."""
    name = getattr(method, "__name__", type(method).__name__)
    if not (isinstance(method, type) and issubclass(method, Algorithm)):
        raise InputError(f"A method is a class that extends Algorithm; '{name}' is none.")
    if method.batches not in PARTNERS:
        raise InputError(f"{name}.batches must be one of {', '.join(PARTNERS)}, not {method.batches!r}.")
    for key, value in method.known_hyperparameters().items():
        if not isinstance(value, Hyperparameter):
            raise InputError(f"{name}.hyperparameters['{key}'] must be Hyperparameter(default, meaning), not {value}.")
    if method.control is not None and "kept" not in method.known_hyperparameters():
        raise InputError(f"{name}.hyperparameters needs 'kept', the per cent of the weights that its mask marks.")
    return method


def _choices_of_holdouts(run: Run, leave_one_out: bool) -> tuple[tuple[str, ...], ...]:
    """The run's holdouts one at a time, and if asked for all pairs of domains with one of them."""
    _check_pairs(leave_one_out, run.features)
    domains, single = run.features.domain_names, [(name,) for name in run.features.domain_names if name in run.holdouts]
    pairs = combinations(domains, 2) if leave_one_out else ()
    return (*single, *(pair for pair in pairs if {*pair} & {*run.holdouts}))


def _check_pairs(leave_one_out: bool, features: FeatureSet) -> None:
    """An `InputError` for domains that cannot be left out in pairs, if they are to be."""
    if leave_one_out and len(features.domain_names) < 4:
        raise InputError("--leave-one-out leaves out two domains and trains on two or more: four are needed.")
    if leave_one_out and any("+" in name for name in features.domain_names):
        raise InputError("--leave-one-out joins names of domains by '+', which one of them contains: rename it.")
