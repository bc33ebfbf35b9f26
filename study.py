"""Variants of Phase 2 on the same seeds, starts and batches: Phase 1, masks, Phase 2, everything on disk.

A `Study` is resumable: it trains what its results directory does not hold yet, in units of (phase, domain or holdout,
chunk of seeds), and each unit is on disk before the next begins. Which seeds form a chunk depends on the seed
numbers alone.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, cached_property
from itertools import groupby
from operator import index

import torch
from torch import Tensor
from tqdm.auto import tqdm

import config
from config import InputError, Settings
from dataset import find_dataset
from evaluation import report
from features import FeatureSet, get_features
from importance import normalize, top_k_mask
from models import FeedforwardClassifier
from parallel import in_flight, side_by_side
from records import MASKS_SAW_VALIDATION, Results, environment, record_key
from trainer_phase1 import DomainNetworks, train_domain
from trainer_phase2 import HoldoutMasks, HoldoutNetworks, masks_for, select_epoch, train_holdout
from training import Problem, accuracies, choose_engine, failure_reason, prepare_machine, tracked
from variants import build_arms

log = logging.getLogger(__name__)

ALGORITHMS = ("erm", "importance")  # trained side by side; see `variants` for more
SELECTIONS = ("last", "val")


class Study:
    """One set of settings on one set of features.

    Args:
        data: the features.
        settings: of training.
        results: where results are kept; the directory becomes that of these settings and features.
        seeds: seed numbers.
        holdouts: domains to leave out, one after the other; None = all.
        algorithms: arms of Phase 2, see `variants`.
        keep_weights: write the weights of Phase 2; a study of many arms can do without them.
        device: "cpu" or "cuda".
        strict: stop at the first failed network instead of recording it. (A single seed is always strict.)
        progress: show a progress bar per phase.
        overwrite: delete what an earlier run left in the results directory.

    Raises:
        InputError: seeds that are none, an unknown holdout, or a results directory of other settings.
    """

    def __init__(
        self,
        data: FeatureSet,
        settings: Settings,
        results: Results,
        seeds: Sequence[int],
        holdouts: Sequence[str] | None = None,
        *,
        algorithms: Sequence[str] = ALGORITHMS,
        keep_weights: bool = True,
        device: str = "cpu",
        strict: bool = False,
        progress: bool = True,
        overwrite: bool = False,
    ):
        if isinstance(holdouts, str):
            holdouts = [holdouts]
        if config.SEEDS_PER_CHUNK < 1:
            raise InputError(f"SEEDS_PER_CHUNK must be at least 1, not {config.SEEDS_PER_CHUNK}.")
        check_holdouts(holdouts, data.domain_names)
        self.data, self.settings, self.results = data, settings, results
        self.seeds = check_seeds(seeds)
        self.holdouts = tuple(dict.fromkeys(holdouts)) if holdouts else data.domain_names
        self.algorithms, self.keep_weights = tuple(algorithms), keep_weights
        self.strict, self.progress = strict or len(self.seeds) == 1, progress
        self.problem = Problem.from_features(data, settings, device)
        self.facts = feature_facts(data)
        with results:
            if overwrite:
                results.clear()
            with self.writing():
                pass  # an unfit directory is refused now, not after Phase 1

    @classmethod
    def from_config(
        cls,
        seeds: Sequence[int] | None = None,
        holdouts: Sequence[str] | None = None,
        *,
        verify: bool = False,
        **options,
    ) -> "Study":
        """The study that the constants of `config` describe: features, settings, device, results directory.

        Args:
            seeds: default 0 … `NUM_SEEDS` - 1.
            holdouts: default each domain in turn.
            verify: see `features.extract`.
            options: `strict`, `progress`, `overwrite`, see the class.
        """
        settings, device, results = Settings.current(), prepare_machine(), Results(config.RESULTS_DIR)
        seeds = check_seeds(range(config.NUM_SEEDS) if seeds is None else seeds)
        if config.DATA_ROOT is not None:  # what can be known before an extraction that may take long
            check_holdouts(holdouts, find_dataset(config.DATA_ROOT).domain_names)
            results.check(settings, options.get("overwrite", False))
        data = get_features(config.DATA_ROOT, config.FEATURES_FILE, device=device, verify=verify)
        return cls(data, settings, results, seeds, holdouts, device=device, **options)

    @property
    def domains(self) -> tuple[str, ...]:
        """Domains that Phase 1 is needed for: the sources of any holdout."""
        needed = {name for holdout in self.holdouts for name in self.problem.sources(holdout)}
        return tuple(name for name in self.data.domain_names if name in needed)

    def phase1(self) -> None:
        """Train what is missing of Phase 1: one network per domain and seed."""
        units = [(domain, chunk) for domain in self.domains for chunk in self._missing(domain)]

        def train(unit: tuple[str, tuple[int, ...]], tick: Callable[[], None]) -> DomainNetworks:
            domain, seeds = unit
            how = {"strict": self.strict, "engine": self.engine, "on_epoch": tick}
            return train_domain(self.problem, domain, seeds, self.settings, **how)

        with self.writing(units):
            for networks in self._side_by_side("Phase 1", units, train, self.settings.ph1_num_epochs):
                self._save_domain(networks)

    def phase2(self) -> None:
        """Train what is missing of Phase 2: all algorithms per holdout and seed, from masks of Phase 1."""
        units = [(holdout, chunk) for holdout in self.holdouts for chunk in self._missing_records(holdout)]

        def train(unit: tuple[str, tuple[int, ...]], tick: Callable[[], None]) -> tuple:
            holdout, seeds = unit
            masks_of, next_masks_of = (
                self.mask_maker(self.problem.sources(holdout), seeds),
                self.mask_maker(self.problem.sources(holdout), [s + 1 for s in seeds]),
            )
            arms = build_arms(self.algorithms, holdout, seeds, masks_of, next_masks_of, self.settings)
            how = {"strict": self.strict, "engine": self.engine, "on_epoch": tick}
            networks = train_holdout(self.problem, holdout, seeds, arms, **how)
            return networks, masks_of(self.settings)

        with self.writing(units):
            for networks, masks in self._side_by_side("Phase 2", units, train, self.settings.ph2_num_epochs):
                self._save_holdout(networks, masks)
                self.results.append(self._records(networks))

    def report(self) -> str:
        """The answer as text, written to ``summary_report.txt`` as well."""
        with self.writing():
            text = report(self.records(), self.results.read_settings(), self.failures())
            self.results.write_text("summary_report.txt", text)
        return text

    def records(self) -> list[dict]:
        """What is on disk of these seeds and holdouts."""
        return [r for r in self.results.records() if r["seed"] in self.seeds and r["holdout"] in self.holdouts]

    def load(self, kind: str, name: str) -> tuple[dict[str, Tensor], dict]:
        """`records.Results.load`, these seeds only."""
        arrays, header = self.results.load(kind, name)
        mine = torch.isin(arrays["seeds"], torch.tensor(self.seeds))
        return {key: value[mine] for key, value in arrays.items()}, header

    def failures(self) -> list[str]:
        """One sentence per failed network, for the warning at the end."""
        return [
            f"{record['algorithm']}, holdout {record['holdout']}, seed {record['seed']}: {record['failed']}"
            for record in self.records()
            if record["failed"] and record["selection"] == "last"
        ]

    @contextmanager
    def writing(self, units: Sequence = (), **facts: object) -> Iterator[None]:
        """The results directory locked, and made sure to be that of these settings; noted what trains `units`.

        Args:
            units: what is going to be trained; if nothing, nothing is noted.
            facts: entries of `environment` that are others than this study's own.
        """
        with self.results:
            self.results.claim(self.settings, self.facts)
            if units:
                self.results.claim(self.settings, self.facts, self.environment | facts)
            yield

    @property
    def environment(self) -> dict[str, object]:
        """What the results may depend on beside settings and features: see `records.environment`."""
        return environment(self.problem.features.device.type, config.THREADS or 1, self.engine)

    @cached_property
    def engine(self) -> str:
        """How the networks are computed: see `training.choose_engine`."""
        problem, settings = self.problem, self.settings
        rows = sum(len(problem.rows(problem.sources(holdout), "in")) for holdout in self.holdouts)
        steps = settings.ph2_num_epochs * rows / settings.batch_size
        sizes = (problem.features.shape[1], len(problem.class_names), settings.hidden_sizes)
        work = steps * len(self.seeds) * len(self.algorithms)
        return choose_engine(work, problem.features.device.type, settings.batch_size, sizes)

    # --- what is there, what is missing ---------------------------------------------------------------------

    def _chunks(self, seeds: Sequence[int]) -> list[tuple[int, ...]]:
        return [tuple(group) for _, group in groupby(sorted(seeds), key=lambda seed: seed // config.SEEDS_PER_CHUNK)]

    @property
    def _needs_next_seed(self) -> bool:
        return any(name.startswith("other_seed") for name in self.algorithms)

    def _missing(self, domain: str) -> list[tuple[int, ...]]:
        there = [self.results.seeds(kind, f"phase1_{domain}") for kind in ("importance", "histories", "weights")]
        wanted = {seed + i for seed in self.seeds for i in range(2 if self._needs_next_seed else 1)}
        return self._chunks(wanted - set.intersection(*there))

    def _missing_records(self, holdout: str) -> list[tuple[int, ...]]:
        names = [f"phase2_{holdout}_{algorithm}" for algorithm in self.algorithms]
        kinds = ("histories", "weights") if self.keep_weights else ("histories",)
        there = [self.results.seeds(kind, name) for kind in kinds for name in names]
        there.append(self.results.seeds("importance", f"holdout_{holdout}"))
        found = {(r["algorithm"], r["seed"], r["selection"]) for r in self.results.records() if r["holdout"] == holdout}
        wanted = [(algorithm, selection) for algorithm in self.algorithms for selection in SELECTIONS]
        there.append({s for s in self.seeds if all((a, s, selection) in found for a, selection in wanted)})
        return self._chunks(set(self.seeds) - set.intersection(*there))

    def _side_by_side(self, phase: str, units: list, train: Callable, epochs: int) -> Iterator:
        """Results of `train` for each unit, in order; on a CPU as many at a time as cores and memory allow."""
        quiet = {} if self.progress and units else {"disable": True}  # else as TQDM_DISABLE in the environment says
        sizes = (self.problem.features.shape[1], len(self.problem.class_names), self.settings.hidden_sizes)
        floats = sum(p.numel() for p in FeedforwardClassifier.outline(*sizes).parameters())
        networks = max((len(seeds) for _, seeds in units), default=0) * len(self.algorithms)
        at_a_time = 1 if self.problem.features.is_cuda else in_flight(networks, floats)
        with tqdm(total=len(units) * epochs, desc=phase, unit="epoch", **quiet) as bar:
            yield from side_by_side(train, units, at_a_time, bar)

    # --- to disk and back -----------------------------------------------------------------------------------

    def header(self, **facts) -> dict[str, object]:
        """What a file of networks must say to be used later: names, sizes, features."""
        return {
            "class_names": list(self.data.class_names),
            "domain_names": list(self.data.domain_names),
            "hidden_sizes": list(self.settings.hidden_sizes),
            "features": self.facts,
            "settings": self.settings.hash,
            **facts,
        }

    def _save_domain(self, networks: DomainNetworks) -> None:
        name, seeds = f"phase1_{networks.domain}", networks.seeds
        header = self.header(phase=1, domain=networks.domain)
        layers = {
            "initial": tracked(networks.start, self.settings.hidden_sizes),
            "final": tracked(networks.final, self.settings.hidden_sizes),
            "importance": networks.importance,
            "normalized": normalize(networks.importance),
            "mask": top_k_mask(networks.importance, self.settings.importance_threshold_percentile),
        }
        history = {key: getattr(networks, key) for key in ("loss", "train_accuracy", "validation_accuracy", "failed")}
        self.results.save("importance", name, seeds, _numbered(layers), header)
        self.results.save("histories", name, seeds, history, header)
        weights = _both(networks.start, networks.final) | {"failed": networks.failed}
        self.results.save("weights", name, seeds, weights, header)

    def _save_holdout(self, networks: HoldoutNetworks, masks: HoldoutMasks) -> None:
        seeds, hidden = networks.seeds, self.settings.hidden_sizes
        layers = {"importance": masks.scores, "normalized": masks.normalized, "mask": masks.mask}
        for v, algorithm in enumerate(networks.algorithms):
            name = f"phase2_{networks.holdout}_{algorithm}"
            header = self.header(phase=2, holdout=networks.holdout, algorithm=algorithm)
            start, final = ({k: value[:, v] for k, value in p.items()} for p in (networks.start, networks.final))
            keys = ("loss", "train_accuracy", "validation_accuracy", "correct", "failed")
            self.results.save("histories", name, seeds, {k: getattr(networks, k)[:, v] for k in keys}, header)
            if self.keep_weights:
                weights = _both(start, final) | {"failed": networks.failed[:, v]}
                self.results.save("weights", name, seeds, weights, header)
            if algorithm == "importance":
                layers = {"initial": tracked(start, hidden), "final": tracked(final, hidden)} | layers
        header = self.header(phase=2, holdout=networks.holdout)
        self.results.save("importance", f"holdout_{networks.holdout}", seeds, _numbered(layers), header)

    def mask_maker(self, sources: Sequence[str], seeds: Sequence[int]) -> Callable[[Settings], HoldoutMasks]:
        """Masks from source domains for S seeds, as settings say, by the importances on disk (read when asked for)."""

        @cache
        def importances() -> tuple[dict[str, list[Tensor]], dict[str, Tensor]]:
            moved, failed = {}, {}
            for domain in sources:
                arrays, _ = self.results.load("importance", f"phase1_{domain}")
                rows = torch.isin(arrays["seeds"], torch.tensor(seeds))
                moved[domain] = [layer[rows] for layer in layers_of(arrays, "importance")]
                failed[domain] = self.results.load("histories", f"phase1_{domain}")[0]["failed"][rows]
            return moved, failed

        return cache(lambda settings: masks_for(*importances(), settings))

    def _records(self, networks: HoldoutNetworks) -> list[dict]:
        """One record per algorithm, seed and selection rule."""
        plain = accuracies(networks.correct, self.problem.totals.cpu())
        balanced = accuracies(networks.correct, self.problem.totals.cpu(), balanced=True)
        target = self.data.domain_names.index(networks.holdout)
        records = []
        for v, algorithm in enumerate(networks.algorithms):
            for selection in SELECTIONS:
                epochs = select_epoch(networks.validation_accuracy[:, v], selection).tolist()
                for s, (seed, epoch) in enumerate(zip(networks.seeds, epochs, strict=True)):
                    record = self._identity(algorithm, networks.holdout, seed, selection)
                    code = int(networks.failed[s, v])
                    values = ({k: float(a[s, v, epoch, target]) for k, a in p.items()} for p in (plain, balanced))
                    names = ("accuracy", "balanced_accuracy")
                    record |= dict.fromkeys(names) if code else dict(zip(names, values, strict=True))
                    record |= {"epoch": None if code else epoch + 1, "failed": failure_reason(code) if code else None}
                    records.append(record)
        return records

    def _identity(self, algorithm: str, holdout: str, seed: int, selection: str) -> dict[str, object]:
        record = {
            "algorithm": algorithm,
            "dataset": self.data.dataset,
            "features": self.data.fingerprint,
            "holdout": holdout,
            "sources": list(self.problem.sources(holdout)),
            "seed": seed,
            "selection": selection,
            "settings": self.settings.hash,
        }
        if algorithm.partition("@")[0] != "erm" and selection == "val" and self.settings.ph1_data == "all":
            record["note"] = MASKS_SAW_VALIDATION
        return {"key": record_key(record), **record}


def check_holdouts(holdouts: Sequence[str] | str | None, domain_names: Sequence[str]) -> None:
    """Raise an `InputError` for the first holdout that is no domain."""
    for name in [holdouts] if isinstance(holdouts, str) else holdouts or ():
        if name not in domain_names:
            raise InputError(f"There is no domain '{name}' to hold out; there are {', '.join(domain_names)}.")


def check_seeds(seeds: Sequence[int]) -> tuple[int, ...]:
    """Seeds sorted, each once; an `InputError` if there is none or one that is no whole number from 0."""
    try:
        found = sorted({index(seed) for seed in seeds})
    except TypeError:
        found = []
    if not found or found[0] < 0:
        raise InputError(f"Seeds must be whole numbers from 0, and one or more of them, not {seeds!r}.")
    return tuple(found)


def feature_facts(data: FeatureSet) -> dict[str, object]:
    """Where features come from, for headers and settings.json; no paths."""
    facts = {"dataset": data.dataset, "fingerprint": data.fingerprint, "feature_size": data.feature_size}
    facts |= {key: data.header.get(key) for key in ("model", "preprocessing")}
    return {**facts, "counts": _counts(data)}


def _counts(data: FeatureSet) -> dict[str, dict[str, int]]:
    """Number of images: domain -> class -> count."""
    counts = {domain: dict.fromkeys(data.class_names, 0) for domain in data.domain_names}
    for domain, label in zip(data.domains.tolist(), data.labels.tolist(), strict=True):
        counts[data.domain_names[domain]][data.class_names[label]] += 1
    return counts


def layers_of(arrays: Mapping[str, Tensor], kind: str) -> list[Tensor]:
    """Tracked layers of one kind ("initial", "final", "importance", "normalized", "mask") of an importance file."""
    names = sorted((k for k in arrays if k.startswith(f"{kind}_")), key=lambda k: int(k.rpartition("_")[2]))
    return [arrays[name] for name in names]


def _numbered(layers: Mapping[str, list[Tensor]]) -> dict[str, Tensor]:
    return {f"{kind}_{i}": layer for kind, stack in layers.items() for i, layer in enumerate(stack, start=1)}


def _both(start: Mapping[str, Tensor], final: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{when}.{k}": v for when, params in (("start", start), ("final", final)) for k, v in params.items()}
