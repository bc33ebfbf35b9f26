"""The methods of the field on the same features, seeds, starts and splits, through the one training loop.

A `Comparison` trains every method on every holdout with the same number of trials: trial 0 has the method's defaults
(learning rates and masks as the settings say), the others draw its hyperparameters at random. Trials of a method that
need networks of the same shapes are trained in one stack. It resumes by (method, trial, holdouts, chunk of seeds), as
`study.Study` does. `selection` chooses among the trained networks, `report` and `figures` show what came out.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import combinations, product
from logging import getLogger
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.func import grad, vmap

import config
from config import BlockSettings, InputError, Settings
from engine import PureNetwork, fit_probes
from field.algorithms import ALGORITHMS, Algorithm, Hyperparameter, find, register
from field.curves import read_curves
from field.load import load_method
from field.phase1 import PHASE1
from field.selection import HEADLINE, RULES, find_rule, tables_by_rule
from field.unit import Trained, Unit, train_unit
from storage import FeatureSet, Results, damaged
from study import SELECTIONS, Arm, Counted, Run, SavedNetworks, Study, make_records

log = getLogger(__name__)

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
        rule: the one rule to report by, of `selection.RULES`; its pairs of domains are held out if it needs them.
            Default all that the runs allow, and in words and figures `selection.HEADLINE`.

    Attributes:
        methods: classes of the methods, with baselines.
        holdouts: choices of held-out domains, each a tuple of one or two.
        network: what the methods train.

    Raises:
        InputError: an unknown method, an invalid class, no trial, `PH2_INIT` other than "fresh", a method that cannot
            train this network, or domains that cannot be left out in pairs.
    """

    def __init__(
        self,
        run: Run,
        methods: Iterable[str | type[Algorithm]],
        trials: int = 1,
        leave_one_out: bool = False,
        rule: str | None = None,
    ):
        self.run, self.trials, self.rule = run, trials, rule
        self.methods = check_methods(methods, trials, run.settings)
        self.holdouts = _choices_of_holdouts(run, leave_one_out or _needs_pairs(rule))
        self.network = PureNetwork(run.network, run.data.shortcut)
        for method in self.methods:
            if words := method.refusal(self.network):
                raise InputError(f"{words}, which needs a single block that the shortcut covers: leave it out.")
        self._curves: pd.DataFrame | None = None
        self._tables: dict[str, pd.DataFrame] | None = None

    @classmethod
    def from_config(
        cls,
        methods: Iterable[str | type[Algorithm]] | None = None,
        trials: int = 1,
        leave_one_out: bool = False,
        rule: str | None = None,
        **options,
    ) -> "Comparison":
        """The comparison on the run that the constants of `config` describe, by default of all methods that can.

        `options` are those of `study.Run.from_config`; the other arguments are those of the class.
        """
        wanted = check_methods(sorted(ALGORITHMS) if methods is None else methods, trials, Settings.current())
        check = partial(_check_pairs, leave_one_out or _needs_pairs(rule))
        run = Run.from_config(**options, check=check)
        if methods is None:
            network = PureNetwork(run.network, run.data.shortcut)
            refused = [method.__name__ for method in wanted if method.refusal(network)]
            wanted = [method for method in wanted if method.__name__ not in refused]
            if refused:
                log.info("Without %s, which need a single block that the shortcut covers.", ", ".join(refused))
        return cls(run, wanted, trials, leave_one_out, rule)

    @classmethod
    def of(
        cls,
        results: Results | str | Path,
        features: Callable[[], FeatureSet],
        methods: Iterable[str | type[Algorithm]] | None = None,
        own: Iterable[str] = (),
    ) -> "Comparison":
        """The comparison that a results directory holds, by its records; by one rule if it was reported so.

        Args:
            features: returns those that it was made with; called once a comparison was found, as it may take long.
            methods: these only; default all that it holds.
            own: where files have those of its methods that are not known by name ("FILE.py:NAME").

        Raises:
            InputError: the directory holds no comparison, or one that was made with other features; a method is not
                known, or one of `own` is none of the comparison's.
        """
        results = results if isinstance(results, Results) else Results(results)
        records = [record for record in results.records() if "trial" in record]
        run = Run.of(results, features, records, "comparison")
        trials = 1 + max(record["trial"] for record in records)
        held = {record["algorithm"] for record in records}
        if foreign := [place for place in own if _found(place).__name__ not in held]:
            raise InputError(f"'{results.directory}' has no results of {foreign[0]}; it has {', '.join(sorted(held))}.")
        methods = sorted(held) if methods is None else methods
        reported = [rule for rule in RULES if (results.directory / f"comparison_{rule}.csv").is_file()]
        rule = reported[0] if len(reported) == 1 else None
        return cls(run, methods, trials, any("+" in record["holdout"] for record in records), rule)

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
        """Whether what a method is given depends on images that its networks are validated on."""
        if method.phase1:
            return self.run.settings.ph1_data == "all"
        return method.control is not None and Arm(method.control).saw_validation(self.run.settings)

    def train(self) -> None:
        """Train what is missing, with Phase 1 for methods that are given something of it."""
        run, units = self.run, self.missing()
        if not units:
            return
        run.check_memory([(unit.seeds * len(unit.trials),) for unit in units], CLASSIFIERS)
        self._curves = self._tables = None
        if any("networks" in unit.method.phase1.values() for unit in units):
            run.archive.keeps_networks = True
        if controls := dict.fromkeys(unit.method.control or "importance" for unit in units if unit.method.given()):
            Study(run, [Arm(control) for control in controls]).phase1()

        def train(unit: Unit, tick: Callable[[], None]) -> list[Trained]:
            return train_unit(run, unit, [self.values(unit.method, trial) for trial in unit.trials], tick)

        self._fit_starts(units)
        vmap(grad(torch.sum))(torch.ones(1, 1))  # torch.func loads 900 modules: here once, not in every process
        with run.writing(units):
            run.keep_phase1(weights=any("networks" in unit.method.phase1.values() for unit in units))
            floats = CLASSIFIERS * run.network.size * max(len(unit.trials) for unit in units)
            epochs = run.settings.ph2_num_epochs
            for unit, trained in zip(units, run.side_by_side("Methods", units, train, epochs, floats), strict=True):
                self._save(unit, trained)

    def _fit_starts(self, units: Sequence[Unit]) -> None:
        """Fit the classifiers that networks with blocks begin with, which all methods share, once."""
        run = self.run
        if not isinstance(run.settings, BlockSettings) or run.settings.head_start != "probe":
            return

        def fit(start: tuple[tuple[str, ...], tuple[int]], tick: Callable[[], None]) -> dict:
            holdouts, seeds = start
            found = fit_probes(run.data, seeds, run.settings, run.data.sources(holdouts), "in")
            tick()
            return found

        every = dict.fromkeys((unit.holdouts, (seed,)) for unit in units for seed in unit.seeds)
        rows = {start: run.data.rows(run.data.sources(start[0]), "in", start[1]) for start in every}
        starts = [*{tuple(own[0].tolist()): start for start, own in rows.items()}.values()]  # splits may be the same
        for found in run.side_by_side("Starts", starts, fit, 1, 0, "fit"):
            run.data.probes.update(found)

    def missing(self) -> list[Unit]:
        """What is not on disk yet.

        Raises:
            InputError: what is on disk is damaged, or was trained by another version of a method or with other
                hyperparameters.
        """
        run, units, recorded = self.run, [], self._recorded()
        for method, holdouts in product(self.methods, self.holdouts):
            missing = [self._missing_seeds(method, trial, holdouts, recorded) for trial in range(self.trials)]
            for chunk in run.chunks(set().union(*missing)):
                stacks = defaultdict(list)  # what trials have to share for a stack -> trials
                for trial, seeds in enumerate(missing):
                    if own := tuple(seed for seed in chunk if seed in seeds):
                        stacks[own, self._fixed(method, trial)].append(trial)
                for (seeds, _), trials in stacks.items():
                    size = max(1, run.execution.seeds_per_chunk // len(seeds))
                    parts = [tuple(trials[i : i + size]) for i in range(0, len(trials), size)]
                    units += [Unit(method, part, holdouts, seeds) for part in parts]
        return units

    def _recorded(self) -> set[tuple]:
        """Method, trial, holdouts and seed of the networks with all their records."""
        counts = Counter((r["algorithm"], r.get("trial"), r["holdout"], r["seed"]) for r in self.run.records())
        return {network for network, count in counts.items() if count == len(SELECTIONS)}

    def _missing_seeds(
        self, method: type[Algorithm], trial: int, holdouts: tuple[str, ...], recorded: set[tuple]
    ) -> set[int]:
        """Seeds whose networks are not whole on disk; without records, the stack that was written may be cut off."""
        run, where = self.run, (method.__name__, trial, holdouts)
        if run.archive.method_seeds(*where, weights=False):
            self._check_stored(method, trial, run.archive.method(*where))
        stored = run.archive.method_seeds(*where, weights=self._keeps_weights(*where))
        held_out = "+".join(holdouts)
        return {s for s in run.seeds if s not in stored or (method.__name__, trial, held_out, s) not in recorded}

    def _fixed(self, method: type[Algorithm], trial: int) -> tuple:
        """The hyperparameters of a trial in which the networks of a stack must not differ."""
        return tuple(value for name, value in self.values(method, trial).items() if name not in method.tensors())

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

    def _save(self, unit: Unit, trained: Sequence[Trained]) -> None:
        """Write the arrays of a unit, then its records, all at once: what has records has arrays."""
        (method, trials, holdouts, seeds), records = unit, []
        for trial, own in zip(trials, trained, strict=True):
            about = {"algorithm": method.__name__, "holdouts": list(holdouts), "version": method.version}
            about |= self._choice(method, trial) | {"steps_per_epoch": own.steps_per_epoch}
            params = own.params if self._keeps_weights(method.__name__, trial, holdouts) else None
            self.run.archive.save_method(about, seeds, own.history, params)
            records += self._records(method, trial, holdouts, seeds, own.history)
        self.run.results.append(records)

    def _records(
        self, method: type[Algorithm], trial: int, holdouts: Sequence[str], seeds: Sequence[int], history: Mapping
    ) -> list[dict]:
        """Records of the networks of a trial."""
        counted = Counted(seeds, *(history[key] for key in ("validation_accuracy", "correct", "failed")))
        choice, peeked = self._choice(method, trial), self.saw_validation(method)
        return make_records(self.run, method.__name__, holdouts, counted, choice, peeked)

    def _choice(self, method: type[Algorithm], trial: int) -> dict[str, object]:
        """What headers and records say of a trial beside method, holdouts and seeds."""
        return {"trial": trial, "hyperparameters": self.values(method, trial), "batches": method.batches}

    def curves(self) -> pd.DataFrame:
        """Accuracies after each epoch of these methods, trials, holdouts and seeds, see `field.curves`.

        Kept until more is trained.

        Raises:
            InputError: something is not trained yet.
        """
        if self._curves is None:
            if missing := [run for unit in self.missing() for run in unit.runs]:
                raise InputError(
                    f"The comparison is incomplete: {len(missing)} runs are missing, first {missing[0]}. All methods "
                    "need the same seeds, trials and holdouts: train them first."
                )
            self._curves = read_curves(self.run, self.names, self.trials, self.holdouts)
        return self._curves

    @property
    def headline(self) -> str:
        """The rule that words and figures follow."""
        return self.rule or HEADLINE

    def tables(self) -> dict[str, pd.DataFrame]:
        """`selection.comparison_table` by selection rule, for the rules to report by. Kept like `curves`."""
        if self._tables is None:
            self._tables = tables_by_rule(self.curves(), self.partners, rules=self.rule and [self.rule])
        return self._tables


def check_methods(
    methods: Iterable[str | type[Algorithm]], trials: int, settings: Settings
) -> tuple[type[Algorithm], ...]:
    """Classes of the methods, baselines first; classes that are not known yet are registered.

    Raises:
        InputError: see `Comparison`.
    """
    config.check("--trials", trials)
    if isinstance(settings, BlockSettings):
        config.refuse_whole_model("A comparison", settings.trained_blocks)
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
    if unknown := [kind for kind in method.phase1.values() if kind not in PHASE1]:
        raise InputError(f"{name}.phase1 has no '{unknown[0]}' to take; there are {', '.join(PHASE1)}.")
    return method


def _needs_pairs(rule: str | None) -> bool:
    return rule is not None and find_rule(rule).needs_pairs


def _choices_of_holdouts(run: Run, leave_one_out: bool) -> tuple[tuple[str, ...], ...]:
    """The run's holdouts one at a time, and if asked for all pairs of domains with one of them."""
    _check_pairs(leave_one_out, run.features)
    domains, single = run.features.domain_names, [(name,) for name in run.features.domain_names if name in run.holdouts]
    pairs = combinations(domains, 2) if leave_one_out else ()
    return (*single, *(pair for pair in pairs if {*pair} & {*run.holdouts}))


def _check_pairs(leave_one_out: bool, features: FeatureSet) -> None:
    """An `InputError` for domains that cannot be left out in pairs, if they are to be."""
    if leave_one_out and len(features.domain_names) < 4:
        raise InputError(
            "Leave-one-domain-out validation leaves out two domains and trains on two or more: four are needed."
        )
    if leave_one_out and any("+" in name for name in features.domain_names):
        raise InputError(
            "Leave-one-domain-out validation joins names of domains by '+', which one of them has: rename it."
        )
