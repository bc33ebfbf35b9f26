"""What a study and a comparison share: features, settings, seeds, holdouts, a results directory, and the machine."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from operator import index
from pathlib import Path

import torch
from tqdm.auto import tqdm

import config
from config import InputError, Settings
from dataset import find_dataset
from engine import SplitFeatures, prepare_machine, side_by_side, stacks_at_a_time
from features import get_features
from models import FeedforwardClassifier
from storage import FeatureSet, Results, environment
from study.archive import Archive


@dataclass(frozen=True)
class Execution:
    """How a run is carried out. Nothing in it changes a result beyond float rounding.

    Attributes:
        device: "cpu" or "cuda".
        threads: CPU threads that one stack of networks is trained with.
        seeds_per_chunk: seeds that are trained together and written together.
        strict: stop at the first failed network instead of recording it.
        progress: show a progress bar for each phase.
    """

    device: str = "cpu"
    threads: int = 1
    seeds_per_chunk: int = 50
    strict: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        if self.seeds_per_chunk < 1:
            raise InputError(f"SEEDS_PER_CHUNK must be at least 1, not {self.seeds_per_chunk}.")


class Run:
    """One set of settings on one set of features, written to one results directory.

    Args:
        features: what the backbone made of the images.
        settings: of training.
        results: a results directory; it becomes that of these settings and features.
        seeds: seed numbers. (A single seed is always strict.)
        holdouts: domains to leave out, each in turn; default all.
        execution: how it is carried out.

    Attributes:
        data: the features on the device, with the split of every seed.
        archive: reads and writes the run's files.
        facts: where the features come from, for headers; no paths.

    Raises:
        InputError: invalid seeds, an unknown holdout, or a results directory created with other settings.
    """

    def __init__(
        self,
        features: FeatureSet,
        settings: Settings,
        results: Results | str | Path,
        seeds: Sequence[int],
        holdouts: Sequence[str] | str | None = None,
        execution: Execution | None = None,
    ):
        self.features, self.settings = features, settings
        self.results = results if isinstance(results, Results) else Results(results)
        self.seeds, self.holdouts = check_seeds(seeds), check_holdouts(holdouts, features.domain_names)
        self.execution = execution or Execution()
        self.data = SplitFeatures.from_features(features, settings, self.execution.device)
        self.facts = feature_facts(features)
        self.archive = Archive(self.results, self.seeds, self.network, self._header())
        with self.writing():
            pass  # an unfit directory is refused now, not after Phase 1

    @classmethod
    def from_config(
        cls,
        seeds: Sequence[int] | None = None,
        holdouts: Sequence[str] | str | None = None,
        *,
        directory: str | Path | None = None,
        overwrite: bool = False,
        verify: bool = False,
        strict: bool = False,
        check: Callable[[FeatureSet], object] = lambda features: None,
    ) -> "Run":
        """The run that the constants of `config` describe.

        Args:
            seeds: default 0 … `NUM_SEEDS` − 1.
            holdouts: default each domain in turn.
            directory: default `RESULTS_DIR`.
            overwrite: delete what an earlier run wrote to the results directory.
            verify: read all image files again, see `features.extract`.
            strict: see `Execution`.
            check: raises an InputError for features that cannot be used; called before anything is deleted.
        """
        settings, execution = Settings.current(), current_execution(strict)
        results = Results(config.RESULTS_DIR if directory is None else directory)
        seeds = check_seeds(range(config.NUM_SEEDS) if seeds is None else seeds)
        check_before_extraction(holdouts, {results: settings}, overwrite)
        features = get_features(config.DATA_ROOT, config.FEATURES_FILE, device=execution.device, verify=verify)
        check(features)
        if overwrite:
            clear_results([results], features, settings, holdouts)
        return cls(features, settings, results, seeds, holdouts, execution)

    def beside(
        self, directory: str | Path, settings: Settings | None = None, seeds: Sequence[int] | None = None
    ) -> "Run":
        """A run on the same features and holdouts in a directory of its own, with other settings or seeds."""
        seeds = self.seeds if seeds is None else seeds
        return Run(self.features, settings or self.settings, Results(directory), seeds, self.holdouts, self.execution)

    @property
    def network(self) -> FeedforwardClassifier:
        """The classifier that is trained, as an outline without weights."""
        return self.data.network(self.settings.hidden_sizes)

    @property
    def strict(self) -> bool:
        """Whether the first failed network ends the run."""
        return self.execution.strict or len(self.seeds) == 1

    @property
    def domains(self) -> tuple[str, ...]:
        """Domains that Phase 1 is needed for: the sources of any holdout."""
        needed = {name for holdout in self.holdouts for name in self.data.sources(holdout)}
        return tuple(name for name in self.features.domain_names if name in needed)

    @property
    def title(self) -> str:
        """What the run was measured on, for titles of figures: backbone, size of the features, number of seeds."""
        seeds = f"{len(self.seeds)} seed{'s' if len(self.seeds) > 1 else ''}"
        return f"{self.features.model_name}, {self.features.feature_size}-d, {seeds}"

    @contextmanager
    def writing(self, units: Sequence = ()) -> Iterator[None]:
        """Lock the results directory and make sure that it is that of these settings.

        Args:
            units: what is going to be trained; if there is any, the environment that trains it is noted.
        """
        with self.results:
            self.results.claim(self.settings, self.facts, self.environment if units else None)
            yield

    @cached_property
    def environment(self) -> dict[str, object]:
        """What the results may depend on beside settings and features: versions, device, threads, commit."""
        return environment(self.execution.device, self.execution.threads)

    def chunks(self, seeds: Sequence[int]) -> list[tuple[int, ...]]:
        """Seeds by chunk. Which seeds share one depends on their numbers alone, so that resuming keeps the bytes."""
        size = self.execution.seeds_per_chunk
        return [tuple(group) for _, group in groupby(sorted(seeds), key=lambda seed: seed // size)]

    def side_by_side(self, phase: str, units: Sequence, train: Callable, epochs: int, floats_per_seed: int) -> Iterator:
        """Results of `train` for each unit, in order; on a CPU as many at a time as cores and memory allow.

        Args:
            phase: label of the progress bar.
            units: what to train, each with its chunk of seeds last.
            train: (unit, tick) -> result.
            epochs: of a unit, for the progress bar.
            floats_per_seed: numbers in the networks of one seed, for the memory.
        """
        quiet = {} if self.execution.progress and units else {"disable": True}  # else as TQDM_DISABLE says
        seeds = max((len(unit[-1]) for unit in units), default=0)
        at_a_time = 1 if self.data.features.is_cuda else stacks_at_a_time(seeds, floats_per_seed)
        with tqdm(total=len(units) * epochs, desc=phase, unit="epoch", **quiet) as bar:
            yield from side_by_side(train, units, at_a_time, bar)

    def records(self) -> list[dict]:
        """Records on disk of these seeds and holdouts."""
        known = {*self.holdouts}
        wanted = [r for r in self.results.records() if r["seed"] in self.seeds]
        return [r for r in wanted if r["holdout"] in known or known & {*r["holdout"].split("+")}]  # one, or a pair

    def _header(self) -> dict[str, object]:
        """What every file of networks says, so that it can be used later: names, sizes, features."""
        return {
            "class_names": list(self.features.class_names),
            "domain_names": list(self.features.domain_names),
            "hidden_sizes": list(self.settings.hidden_sizes),
            "features": self.facts,
            "settings": self.settings.hash,
        }


def current_execution(strict: bool = False) -> Execution:
    """`Execution` as the constants of `config` say; sets up the machine."""
    device = prepare_machine(config.DEVICE, config.THREADS)
    return Execution(device, config.THREADS or 1, config.SEEDS_PER_CHUNK, strict)


def check_before_extraction(
    holdouts: Sequence[str] | str | None, places: Mapping[Results, Settings], overwrite: bool
) -> None:
    """Refuse what can be refused before an extraction that may take long.

    Args:
        holdouts: domains to leave out, or None.
        places: results directories and the settings that they are for.
        overwrite: the directories are going to be cleared.

    Raises:
        InputError: an unknown holdout, or an unfit results directory.
    """
    if config.DATA_ROOT is not None:
        check_holdouts(holdouts, find_dataset(config.DATA_ROOT).domain_names)
    for results, settings in places.items():
        results.check(settings, overwrite)


def clear_results(
    places: Iterable[Results], features: FeatureSet, settings: Settings, holdouts: Sequence[str] | str | None = None
) -> None:
    """Delete what earlier runs wrote, once it is certain that a run on these features and holdouts can be made.

    Raises:
        InputError: such a run cannot be made; nothing is deleted then.
    """
    check_holdouts(holdouts, features.domain_names)
    SplitFeatures.from_features(features, settings)  # refuses domains that are too small to be split
    for results in places:
        results.clear()


def check_holdouts(holdouts: Sequence[str] | str | None, domain_names: Sequence[str]) -> tuple[str, ...]:
    """Holdouts, each once (all domains for None); an `InputError` for the first that is no domain."""
    wanted = [holdouts] if isinstance(holdouts, str) else list(holdouts or domain_names)
    for name in wanted:
        if name not in domain_names:
            raise InputError(f"There is no domain '{name}' to hold out; there are {', '.join(domain_names)}.")
    return tuple(dict.fromkeys(wanted))


def check_seeds(seeds: Sequence[int]) -> tuple[int, ...]:
    """Seeds sorted, each once; an `InputError` if there is none or one is not a whole number from 0."""
    try:
        found = sorted({index(seed) for seed in seeds})
    except TypeError:
        found = []
    if not found or found[0] < 0:
        raise InputError(f"Seeds must be whole numbers from 0, and one or more of them, not {seeds!r}.")
    return tuple(found)


def feature_facts(features: FeatureSet) -> dict[str, object]:
    """Where features come from, for headers and settings.json; no paths."""
    facts = {"dataset": features.dataset, "fingerprint": features.fingerprint, "feature_size": features.feature_size}
    facts |= {key: features.header.get(key) for key in ("model", "preprocessing")}
    classes, domains = features.class_names, features.domain_names
    cells = features.domains.long() * len(classes) + features.labels.long()
    counts = torch.bincount(cells, minlength=len(classes) * len(domains)).view(len(domains), -1).tolist()
    return facts | {"counts": {d: dict(zip(classes, row, strict=True)) for d, row in zip(domains, counts, strict=True)}}
