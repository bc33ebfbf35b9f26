"""The methods of the field on the same features, seeds, starts and splits, through the one training loop.

A `Comparison` trains every method on every holdout with the same number of trials: trial 0 has the method's defaults
(learning rates and masks as the settings say), the others draw its hyperparameters at random. It resumes by (method,
trial, holdout, chunk of seeds), as `study` does.
What is chosen from it afterwards, and how, is the business of `selection`.
"""

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations, groupby
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

import config
from algorithms import Algorithm, Hyperparameter, code_of, find, register
from algorithms.experts import expert_use
from config import InputError, Settings
from features import FeatureSet
from models import FeedforwardClassifier
from parallel import in_flight, side_by_side
from records import MASKS_SAW_VALIDATION, Results, record_key
from selection import curves_of
from stacks import Params
from study import Study
from trainer_algorithm import MethodNetworks, train_algorithm
from trainer_phase2 import select_epoch
from training import accuracies, failure_reason, raise_failure, tracked_names
from variants import build_arms

log = logging.getLogger(__name__)

PARTNERS = {"pooled": "ERM", "balanced": "ERMBalanced"}  # the baseline of each way of making a batch
Unit = tuple[type[Algorithm], int, tuple[str, ...], tuple[int, ...]]  # method, trial, holdouts, seeds


class Trained(NamedTuple):
    """What is kept of a unit of training: arrays as in `Comparison.load`, and parameters, name -> ``[S, *shape]``."""

    steps_per_epoch: int
    arrays: dict[str, Tensor]
    params: Params


class Comparison:
    """Methods of `algorithms` on one set of features.

    Args:
        data: the features.
        settings: of training; `PH2_NUM_EPOCHS`, `BATCH_SIZE`, `HIDDEN_SIZES` and the split for all methods, those of
            Phase 1 for methods with masks.
        results: where results are kept; the directory becomes that of these settings and features.
        seeds: seed numbers.
        algorithms: names, or classes of one's own; the baselines of their batches are added.
        trials: random search over hyperparameters: this many for every method, the first with its defaults.
        holdouts: domains to leave out; None = each in turn.
        leave_one_out: train on every pair of held-out domains as well, for that selection rule.
        options: of `Study`: device, strict, progress, overwrite.

    Raises:
        InputError: an unknown method or holdout, no trial, or a results directory of other settings.
    """

    def __init__(
        self,
        data: FeatureSet,
        settings: Settings,
        results: Results,
        seeds: Sequence[int],
        algorithms: Iterable[str | type[Algorithm]],
        *,
        trials: int = 1,
        holdouts: Sequence[str] | None = None,
        leave_one_out: bool = False,
        **options,
    ):
        if trials < 1:
            raise InputError(f"--trials must be at least 1, not {trials}: trial 0 has the defaults.")
        asked = [find(a) if isinstance(a, str) else register(sound(a)) for a in algorithms]
        partners = [find(PARTNERS[cls.batches]) for cls in asked]
        self.algorithms = tuple(dict.fromkeys([*sorted(set(partners), key=lambda c: c.__name__), *asked]))
        variants = tuple(dict.fromkeys(cls.variant for cls in self.algorithms if getattr(cls, "masked", False)))
        settings = replace(settings, ph2_init="fresh")
        self.study = Study(data, settings, results, seeds, holdouts, algorithms=variants or ("erm",), **options)
        self.settings, self.results, self.trials = settings, results, trials
        self.problem, self.seeds = self.study.problem, self.study.seeds
        domains = data.domain_names
        self.holdouts = [(name,) for name in domains if name in self.study.holdouts]
        if leave_one_out:
            if len(domains) < 4:
                raise InputError("--leave-one-out leaves out two domains and trains on two or more: four are needed.")
            if any("+" in name for name in domains):
                raise InputError("--leave-one-out joins names of domains by '+', which one of them has: rename it.")
            self.holdouts += [pair for pair in combinations(domains, 2) if set(pair) & set(self.study.holdouts)]

    @classmethod
    def of(cls, data: FeatureSet, settings: Settings, results: Results, records: Sequence[Mapping]) -> "Comparison":
        """The comparison that a results directory holds, by its records."""
        holdouts = [name for name in data.domain_names if any(r["holdout"] == name for r in records)]
        return cls(
            data,
            settings,
            results,
            sorted({r["seed"] for r in records}),
            sorted({r["algorithm"] for r in records}),
            trials=1 + max(r["trial"] for r in records),
            holdouts=holdouts,
            leave_one_out=any("+" in r["holdout"] for r in records),
            progress=False,
        )

    def run(self) -> None:
        """Train what is missing."""
        units = self._missing()
        if any(getattr(cls, "masked", False) for cls, *_ in units):
            self.study.phase1()
        quiet = {} if self.study.progress and units else {"disable": True}
        sizes = (self.problem.features.shape[1], len(self.problem.class_names), self.settings.hidden_sizes)
        floats = 4 * sum(p.numel() for p in FeedforwardClassifier.outline(*sizes).parameters())  # experts, averages …
        networks = max((len(seeds) for *_, seeds in units), default=0)
        at_a_time = 1 if self.problem.features.is_cuda else in_flight(networks, floats)
        with (
            self.study.writing(units, engine="vmap"),
            tqdm(total=len(units) * self.settings.ph2_num_epochs, desc="Methods", unit="epoch", **quiet) as bar,
        ):
            for unit, trained in zip(units, side_by_side(self._train, units, at_a_time, bar), strict=True):
                self._save(unit, trained)

    def hyperparameters(self, algorithm: type[Algorithm], trial: int) -> dict[str, float | int | str]:
        """Those that are not the method's defaults: in trial 0 the settings' own, in others drawn, always the same."""
        own = algorithm.from_settings(self.settings)
        if trial == 0:
            return own
        digest = hashlib.sha256(f"{algorithm.__name__}/{trial}".encode()).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
        searched = {name: h.search for name, h in algorithm.known_hyperparameters().items() if h.search is not None}
        return own | {name: searched[name](rng) for name in sorted(searched)}

    def values(self, algorithm: type[Algorithm], trial: int) -> dict[str, float | int | str]:
        """All hyperparameters of a trial."""
        defaults = {name: h.default for name, h in algorithm.known_hyperparameters().items()}
        return defaults | self.hyperparameters(algorithm, trial)

    @property
    def partners(self) -> dict[str, str]:
        """Method -> baseline on the same batches."""
        return {cls.__name__: PARTNERS[cls.batches] for cls in self.algorithms}

    def curves(self) -> pd.DataFrame:
        """Accuracies after each epoch, of these methods, trials, holdouts and seeds: see `selection`."""
        if missing := self._missing():
            cls, trial, holdouts, _ = missing[0]
            raise InputError(
                f"The comparison is incomplete: {len(missing)} runs are missing, first {cls.__name__}, trial {trial}, "
                f"without {' and '.join(holdouts)}. All methods need the same seeds, trials and holdouts: run compare."
            )
        parts = []
        for cls in self.algorithms:
            for trial in range(self.trials):
                for holdouts in self.holdouts:
                    arrays, header = self.load(cls.__name__, trial, holdouts)
                    shares = accuracies(arrays["correct"], self.problem.totals.cpu())
                    sound = (arrays["failed"] == 0).view(-1, 1, 1)
                    shares = {part: torch.where(sound, value, torch.nan) for part, value in shares.items()}
                    part = self._long(arrays["seeds"], shares, header["steps_per_epoch"])
                    parts.append(part.assign(algorithm=cls.__name__, trial=trial, holdouts=[holdouts] * len(part)))
        return curves_of(pd.concat(parts, ignore_index=True))

    def _long(self, seeds: Tensor, shares: Mapping[str, Tensor], steps: int) -> pd.DataFrame:
        """``[S, E, domains]`` per part -> a row per seed, epoch and domain."""
        shape = next(iter(shares.values())).shape
        s, e, d = (axis.flatten() for axis in torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij"))
        names = np.array(self.problem.domain_names)[d.numpy()]
        frame = {"seed": seeds[s].numpy(), "epoch": (e + 1).numpy(), "step": (steps * (e + 1)).numpy(), "domain": names}
        return pd.DataFrame(frame | {part: shares[part].flatten().numpy() for part in ("in", "out", "full")})

    def load(self, algorithm: str, trial: int, holdouts: Sequence[str]) -> tuple[dict[str, Tensor], dict]:
        """Histories of a method, these seeds only; and the header.

        Arrays: "seeds" ``[S]``, "loss" and "validation_accuracy" ``[S, E]``, "correct"
        ``[S, E, domains, 2, classes]``, "failed" ``[S]``; and what the method records: "conflict_rate" and
        "conflict_strength" ``[S, E, tensors]`` or "expert_use" ``[S, domains, classes, experts]``.
        """
        return self.study.load("histories", _name(algorithm, trial, holdouts))

    # --- training -------------------------------------------------------------------------------------------

    def _missing(self) -> list[Unit]:
        """What is not on disk; checks that what is there was trained with the same hyperparameters."""
        names = ("algorithm", "trial", "holdout", "seed")
        units, recorded = [], {tuple(r.get(name) for name in names) for r in self.results.records()}
        for cls in self.algorithms:
            for trial in range(self.trials):
                for holdouts in self.holdouts:
                    name, where = cls.__name__, "+".join(holdouts)
                    there = self.results.seeds("histories", _name(name, trial, holdouts))
                    if there:
                        self._check(cls, trial, self.results.load("histories", _name(name, trial, holdouts))[1])
                    if self._keeps_weights(cls, trial, holdouts):
                        there &= self.results.seeds("weights", _name(name, trial, holdouts))
                    wanted = [s for s in self.seeds if s not in there or (name, trial, where, s) not in recorded]
                    groups = groupby(sorted(wanted), key=lambda seed: seed // config.SEEDS_PER_CHUNK)
                    units += [(cls, trial, holdouts, tuple(group)) for _, group in groups]
        return units

    @staticmethod
    def _keeps_weights(cls: type[Algorithm], trial: int, holdouts: Sequence[str]) -> bool:
        """Whether the weights are kept: for the ensemble."""
        return cls.__name__ == PARTNERS["pooled"] and trial == 0 and len(holdouts) == 1

    def _check(self, cls: type[Algorithm], trial: int, header: Mapping) -> None:
        codes = {header.get("code"), code_of(cls)} - {None}
        if len(codes) > 1:
            raise InputError(
                f"'{self.results.directory}' holds {cls.__name__} as it was before its code changed: give the class "
                "another name, choose another results directory, or use overwrite=True, which deletes all in it."
            )
        mine, there = self.values(cls, trial), header["hyperparameters"]
        for name in [*there, *mine]:
            if mine.get(name) != there.get(name):
                raise InputError(
                    f"'{self.results.directory}' holds {cls.__name__}, trial {trial}, with {name} = "
                    f"{there.get(name)!r}, not {mine.get(name)!r}: give another RESULTS_DIR (--results-dir), or use "
                    "--overwrite."
                )

    def _train(self, unit: Unit, tick: Callable[[], None]) -> Trained:
        cls, trial, holdouts, seeds = unit
        values = self.hyperparameters(cls, trial)
        given, useless = self._given(cls, self.values(cls, trial), holdouts, seeds)
        networks = train_algorithm(
            self.problem, holdouts, seeds, cls, values, self.settings, given=given, on_epoch=tick
        )
        if useless is not None:
            networks.failed = torch.where(networks.failed == 0, useless, networks.failed)
        if self.study.strict:
            raise_failure(networks.failed, seeds, f"{cls.__name__}, trial {trial}, holdout {'+'.join(holdouts)}")
        arrays = {key: getattr(networks, key) for key in ("loss", "validation_accuracy", "correct", "failed")}
        arrays |= {key: networks.engine.state[key].cpu() for key in cls.record_names}
        if hasattr(cls, "routing"):
            arrays["expert_use"] = self._expert_use(networks)
        return Trained(networks.algorithm.setup.steps_per_epoch, arrays, networks.params)

    def _given(
        self, cls: type[Algorithm], values: Mapping, holdouts: Sequence[str], seeds: Sequence[int]
    ) -> tuple[dict | None, Tensor | None]:
        """The masks of a method that needs them, from the source domains alone: name -> bool ``[S, out, in]``.

        And codes of the seeds whose mask is of no use, as in `training.Trained.failed`.
        """
        if not getattr(cls, "masked", False):
            return None, None
        settings = replace(self.settings, importance_threshold_percentile=float(values["kept"]))
        sources = tuple(name for name in self.problem.domain_names if name not in holdouts)
        masks_of = self.study.mask_maker(sources, seeds)
        next_of = self.study.mask_maker(sources, [seed + 1 for seed in seeds])
        arm = build_arms([cls.variant], "+".join(holdouts), seeds, masks_of, next_of, settings)[cls.variant]
        device = self.problem.features.device
        names = tracked_names(settings.hidden_sizes)
        return {"mask": {name: mask.to(device) for name, mask in zip(names, arm.mask, strict=True)}}, arm.failed

    def masks_saw_validation(self, cls: type[Algorithm]) -> bool:
        """Whether a method's masks are made from images that it is validated on."""
        return getattr(cls, "masked", False) and cls.variant != "random" and self.settings.ph1_data == "all"

    # --- to disk --------------------------------------------------------------------------------------------

    def _save(self, unit: Unit, trained: Trained) -> None:
        cls, trial, holdouts, seeds = unit
        name = _name(cls.__name__, trial, holdouts)
        about = {"algorithm": cls.__name__, "trial": trial, "holdouts": list(holdouts), "batches": cls.batches}
        about |= {"hyperparameters": self.values(cls, trial), "steps_per_epoch": trained.steps_per_epoch}
        about["code"] = code_of(cls)
        header = self.study.header(**about)
        self.results.save("histories", name, seeds, trained.arrays, header)
        if self._keeps_weights(cls, trial, holdouts):
            final = {f"final.{key}": value for key, value in trained.params.items()}
            self.results.save("weights", name, seeds, final | {"failed": trained.arrays["failed"]}, header)
        self.results.append(self._records(unit, trained.arrays))

    def _expert_use(self, networks: MethodNetworks) -> Tensor:
        """Mean gates of each domain and class, on all images: ``[S, domains, classes, experts]``."""
        problem, engine = self.problem, networks.engine
        groups = problem.domains * len(problem.class_names) + problem.labels
        count = len(problem.domain_names) * len(problem.class_names)
        use = []
        for s in range(len(networks.seeds)):
            params = {name: value[s] for name, value in engine.networks.items()}
            use.append(expert_use(networks.algorithm.routing(params, problem.features), groups, count))
        shape = (len(problem.domain_names), len(problem.class_names), -1)
        return torch.stack([value.detach().view(shape).cpu() for value in use])

    def _records(self, unit: Unit, arrays: Mapping[str, Tensor]) -> list[dict]:
        """One record per seed and epoch rule; with two holdouts the accuracies are those on the first of them."""
        cls, trial, holdouts, seeds = unit
        plain = accuracies(arrays["correct"], self.problem.totals.cpu())
        balanced = accuracies(arrays["correct"], self.problem.totals.cpu(), balanced=True)
        target = self.problem.domain_names.index(holdouts[0])
        sources = [name for name in self.problem.domain_names if name not in holdouts]
        records = []
        for selection in ("last", "val"):
            epochs = select_epoch(arrays["validation_accuracy"], selection).tolist()
            for s, (seed, epoch) in enumerate(zip(seeds, epochs, strict=True)):
                code = int(arrays["failed"][s])
                record = {
                    "algorithm": cls.__name__,
                    "dataset": self.study.data.dataset,
                    "features": self.study.data.fingerprint,
                    "holdout": "+".join(holdouts),
                    "sources": sources,
                    "seed": seed,
                    "selection": selection,
                    "settings": self.settings.hash,
                    "trial": trial,
                    "hyperparameters": self.values(cls, trial),
                    "batches": cls.batches,
                    "validation": None if code else float(arrays["validation_accuracy"][s, epoch]),
                    "epoch": None if code else epoch + 1,
                    "failed": failure_reason(code) if code else None,
                }
                if selection == "val" and self.masks_saw_validation(cls):
                    record["note"] = MASKS_SAW_VALIDATION
                for key, shares in (("accuracy", plain), ("balanced_accuracy", balanced)):
                    record[key] = None if code else {k: float(v[s, epoch, target]) for k, v in shares.items()}
                records.append({"key": record_key(record), **record})
        return records


def sound(algorithm: type[Algorithm]) -> type[Algorithm]:
    """A class of one's own, if it declares what a method has to.

    Raises:
        InputError: what is wrong, in one sentence.
    """
    if not (isinstance(algorithm, type) and issubclass(algorithm, Algorithm)):
        raise InputError(f"A method is a class that extends Algorithm, not {algorithm!r}.")
    name = algorithm.__name__
    if algorithm.batches not in PARTNERS:
        raise InputError(f"{name}.batches must be one of {', '.join(PARTNERS)}, not {algorithm.batches!r}.")
    for knob, value in algorithm.known_hyperparameters().items():
        if not isinstance(value, Hyperparameter):
            raise InputError(f"{name}.hyperparameters['{knob}'] must be Hyperparameter(default, meaning), not {value}.")
    return algorithm


def _name(algorithm: str, trial: int, holdouts: Sequence[str]) -> str:
    """File name of a method's histories."""
    return f"compare_{algorithm}_{trial}_{'+'.join(holdouts)}"
