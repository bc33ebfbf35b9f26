"""What a study and a comparison share: features, settings, seeds, holdouts, a results directory, and the machine."""

import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby, islice
from operator import index
from pathlib import Path

from tqdm.auto import tqdm

import config
from config import BlockSettings, ImageSettings, InputError, Settings
from dataset import find_dataset
from engine import (
    Network,
    SplitFeatures,
    check_cluster,
    check_memory,
    prepare_machine,
    side_by_side,
    stacks_at_a_time,
    training_memory,
)
from features import get_features
from importance import marked_weights
from models import BackboneTail
from storage import FeatureSet, Results, environment
from study.archive import Archive

LARGEST_SEED = 10**15
ACTIVATIONS_OF_BLOCK = 60  # numbers kept per image and feature while the blocks of a network are trained


@dataclass(frozen=True)
class Execution:
    """How a run is carried out. Nothing in it changes a result beyond float rounding.

    Attributes:
        device: "cpu" or "cuda".
        threads: CPU threads that one stack of networks is trained with.
        seeds_per_chunk: seeds that are trained together and written together.
        strict: stop at the first failed network instead of recording it.
        progress: show a progress bar for each phase.
        executor: where units are trained: None = on the cores of this machine, else any executor or the address of a
            Dask scheduler.
    """

    device: str = "cpu"
    threads: int = 1
    seeds_per_chunk: int = 50
    strict: bool = False
    progress: bool = True
    executor: Executor | str | None = None

    def __getstate__(self) -> dict[str, object]:
        """Of a unit that is trained elsewhere: there is no further executor."""
        return vars(self) | {"executor": None}

    def __post_init__(self) -> None:
        config.check("SEEDS_PER_CHUNK", self.seeds_per_chunk)


class Run:
    """One set of settings on one set of features, written to one results directory.

    Args:
        results: a results directory; it becomes that of these settings and features.
        seeds: seed numbers. (A single seed is always strict.)
        holdouts: domains to leave out, each in turn; default all.

    Attributes:
        data: the features on the device, with the split of every seed.
        facts: where the features come from, for headers; no paths.

    Raises:
        InputError: invalid seeds, an unknown holdout, features without the tokens that the settings need, or a results
            directory created with other settings or with damaged records.
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
        check_tokens(features, settings)
        self.data = SplitFeatures.from_features(features, settings, self.execution.device)
        self.facts = {key: getattr(features, key) for key in ("dataset", "fingerprint", "feature_size")}
        self.facts |= {key: features.header.get(key) for key in ("model", "preprocessing", "counts")}
        self.facts |= {"layers": features.header["layers"]} if "layers" in features.header else {}
        header = {  # of every file of networks, so that they can be used later
            "class_names": list(features.class_names),
            "domain_names": list(features.domain_names),
            "hidden_sizes": list(settings.hidden_sizes),
            **({} if self.data.tail is None else _about_blocks(features)),
            "features": self.facts,
            "settings": settings.hash,
        }
        self.archive = Archive(self.results, self.seeds, self.network, header)
        with self.results:  # an unfit directory is refused now, not after Phase 1
            self.results.claim(settings, self.facts)

    def __getstate__(self) -> dict[str, object]:
        """What another machine trains with: all but the results directory, which this process alone uses."""
        return {name: value for name, value in vars(self).items() if name not in ("results", "environment")}

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
            check: raises an InputError for features that cannot be used; called before anything is deleted.
        """
        places = {Results(config.RESULTS_DIR if directory is None else directory): Settings.current()}
        options = {"overwrite": overwrite, "verify": verify, "strict": strict, "check": check}
        return cls.in_places(places, seeds, holdouts, **options)

    @classmethod
    def in_places(
        cls,
        places: Mapping[Results, Settings],
        seeds: Sequence[int] | None = None,
        holdouts: Sequence[str] | str | None = None,
        *,
        overwrite: bool = False,
        verify: bool = False,
        strict: bool = False,
        check: Callable[[FeatureSet], object] = lambda features: None,
    ) -> "Run":
        """The run in the first of several results directories, on the features that the constants of `config` describe.

        What is wrong with any of the directories is found before features are extracted. Arguments as in
        `from_config`; `places` are results directories -> the settings that they are for.
        """
        results, settings = next(iter(places.items()))
        seeds = check_seeds(range(config.NUM_SEEDS) if seeds is None else seeds)
        execution = current_execution(strict)
        check_before_extraction(holdouts, places, overwrite)
        options = {"device": execution.device, "verify": verify, "check_tail": partial(check_density, settings)}
        features = get_features(config.DATA_ROOT, config.FEATURES_FILE, **options)
        check(features)
        if overwrite:
            clear_results(places, features, settings, holdouts)
        return cls(features, settings, results, seeds, holdouts, execution)

    @classmethod
    def of(cls, results: Results, features: Callable[..., FeatureSet], records: Sequence[Mapping], what: str) -> "Run":
        """The run that records of a results directory are of, to read them.

        Args:
            features: returns those that it was made with, if blocks were trained with the argument `blocks`, their
                number; called once there are records, as it may take long.
            what: the records are, for the message.

        Raises:
            InputError: there are none, or they were made with other features.
        """
        about = results.read_settings()
        if not records or about is None:
            raise InputError(f"'{results.directory}' holds no {what}: make one, or give another --results-dir.")
        blocks = about["settings"].get("TRAINED_BLOCKS")
        data = features(blocks=blocks) if blocks else features()
        if data.fingerprint != about["features"]["fingerprint"]:
            raise InputError(f"The {what} was made with other features: give them with --features or --data-root.")
        settings = Settings.from_dict(about["settings"])
        held_out, seeds = {record["holdout"] for record in records}, sorted({record["seed"] for record in records})
        holdouts = [name for name in data.domain_names if name in held_out]
        return cls(data, settings, results, seeds, holdouts, Execution(progress=False))

    def beside(
        self, results: Results | str | Path, settings: Settings | None = None, seeds: Sequence[int] | None = None
    ) -> "Run":
        """A run on the same features and holdouts in a directory of its own, with other settings or seeds."""
        seeds = self.seeds if seeds is None else seeds
        return Run(self.features, settings or self.settings, results, seeds, self.holdouts, self.execution)

    @property
    def network(self) -> Network:
        """What is trained, see `SplitFeatures.network`."""
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
        """For titles of figures: backbone, size of the features, number of seeds."""
        seeds = f"{len(self.seeds)} seed{'s' if len(self.seeds) > 1 else ''}"
        return f"{self.features.model_name}, {self.features.feature_size}-d, {seeds}"

    @contextmanager
    def writing(self, units: Sequence = ()) -> Iterator[None]:
        """Lock the results directory, make sure that it is that of these settings, note what trains `units` if any.

        Afterwards `settings.json` says what the directory holds.
        """
        with self.results:
            self.results.claim(self.settings, self.facts, self.environment if units else None)
            yield
            self.results.note_contents()

    @cached_property
    def environment(self) -> dict[str, object]:
        """What the results may depend on beside settings and features: versions, device, threads, commit."""
        return environment(self.execution.device, self.execution.threads)

    def chunks(self, seeds: Sequence[int]) -> list[tuple[int, ...]]:
        """Seeds by chunk. Which seeds share one depends on their numbers alone, so that resuming keeps the bytes."""
        size = self.execution.seeds_per_chunk
        return [tuple(group) for _, group in groupby(sorted(seeds), key=lambda seed: seed // size)]

    def side_by_side(
        self, phase: str, units: Sequence, train: Callable, epochs: int, floats_per_seed: int, unit: str = "epoch"
    ) -> Iterator:
        """Results of `train` for each unit, in order; on a CPU as many at a time as cores and memory allow.

        With an executor of `execution`, `train` gets all but the results directory of this run there.

        Args:
            units: what to train, each with its chunk of seeds last.
            train: (unit, tick) -> result.
            epochs: of a unit, for the progress bar.
            floats_per_seed: numbers in the networks of one seed, for the memory.
            unit: of the bar.
        """
        quiet = {} if self.execution.progress and units else {"disable": True}  # else as TQDM_DISABLE says
        seeds, large = max((len(unit[-1]) for unit in units), default=0), isinstance(self.settings, ImageSettings)
        of_batch = self._numbers_of_a_batch(1) if large else 0
        numbers = self._numbers(floats_per_seed)
        at_a_time = 1 if self.data.features.is_cuda else stacks_at_a_time(seeds, numbers, of_batch)
        with tqdm(total=len(units) * epochs, desc=phase, unit=unit, **quiet) as bar:
            yield from side_by_side(train, units, at_a_time, bar, self.execution.executor)

    def keep_phase1(self, weights: bool = False) -> None:
        """Have Phase 1 in memory for units that read it elsewhere, see `Archive.keep_phase1`."""
        if self.execution.executor is not None:
            self.archive.keep_phase1(weights)

    def check_memory(self, units: Sequence, networks: int) -> None:
        """Refuse to train units (see `side_by_side`) of so many networks per seed if they do not fit into memory.

        That of other machines is not known here.
        """
        if self.execution.executor is not None:
            return
        if not units:
            return
        seeds, numbers = max(len(unit[-1]) for unit in units), self._numbers(networks * self.network.size)
        need = training_memory(seeds, numbers, self._numbers_of_a_batch(networks))
        lower = ("SEEDS_PER_CHUNK", "HIDDEN_SIZES", "BATCH_SIZE")
        if self.data.tail is not None:
            lower = ("BLOCK_SEEDS_PER_CHUNK", self.settings.constant("batch_size"))
        check_memory(need, self.execution.device, lower)

    def _numbers_of_a_batch(self, networks: int) -> int:
        """Numbers of a seed's batch and of what so many networks compute of it, for `engine.training_memory`."""
        whole = isinstance(self.settings, ImageSettings)
        domains = max(len(self.data.sources(holdout)) for holdout in self.holdouts) if whole else 1
        batch = min(domains * self.settings.batch_size, len(self.features))
        computed = 2 * (sum(self.settings.hidden_sizes) + self.features.num_classes)  # and gradients
        if self.data.tail is not None and self.data.shortcut is not None:  # all of it is of [CLS] alone
            computed += ACTIVATIONS_OF_BLOCK * self.features.feature_size
        elif self.data.tail is not None:  # networks are differentiated one after the other
            tokens = self.data.tail.sequence if whole else self.data.tokens.shape[1]
            computed += ACTIVATIONS_OF_BLOCK * self.features.feature_size * len(self.data.tail.blocks) * tokens
            networks = 1
        return batch * (2 * self.data.inputs[0].numel() + networks * computed)

    def _numbers(self, floats: int) -> int:
        """Numbers of a seed for `engine.training_memory`: of its networks, and one for each image.

        What a seed keeps of an image, in its split, its cells and its batches, is five int64 at most: as much as the
        copies of a number of a network. Features take none: they are mapped, or on the device already.
        """
        return floats + len(self.features)

    def records(self) -> list[dict]:
        """Records on disk of these seeds and holdouts."""
        known = {*self.holdouts}
        wanted = [r for r in self.results.records() if r["seed"] in self.seeds]
        return [r for r in wanted if r["holdout"] in known or known & {*r["holdout"].split("+")}]  # one, or a pair


def current_execution(strict: bool = False) -> Execution:
    """`Execution` as the constants of `config` say; sets up the machine, and looks whether a cluster is fit."""
    device = prepare_machine(config.DEVICE, config.THREADS)
    if config.SCHEDULER is not None and config.TRAINED_BLOCKS == "all":
        raise InputError("The whole model is trained on this machine, which has the images: leave out SCHEDULER.")
    if config.SCHEDULER is not None:
        check_cluster(config.SCHEDULER)
    chunk = config.BLOCK_SEEDS_PER_CHUNK if config.TRAINED_BLOCKS else config.SEEDS_PER_CHUNK
    return Execution(device, config.THREADS or 1, chunk, strict, executor=config.SCHEDULER)


def check_tokens(features: FeatureSet, settings: Settings) -> None:
    """Raise an `InputError` unless features have tokens exactly where the settings train blocks on them."""
    wanted = settings.trained_blocks if isinstance(settings, BlockSettings) else 0
    found = 0 if features.tail is None else features.header["tokens"]["blocks"]
    if wanted != found:
        has = "images" if found == "all" else f"the tokens before {found} blocks" if found else "no tokens"
        raise InputError(f"TRAINED_BLOCKS is {wanted} and these features have {has}: get them with DATA_ROOT and it.")


def check_density(settings: Settings, tail: BackboneTail) -> None:
    """Raise an `InputError` if a mask of these settings marks no weight of the blocks."""
    percent, layers = settings.importance_threshold_percentile, tail.tracked(dict(tail.named_parameters()))
    if marked_weights(layers, percent, settings.mask_scope) == 0:
        weights, each = sum(layer.numel() for layer in layers), {"global": "", "row": " of each row"}
        raise InputError(
            f"{percent:g} % of the {weights:,} weights of the blocks{each.get(settings.mask_scope, ' of each matrix')} "
            "are none: raise IMPORTANCE_THRESHOLD_PERCENTILE (in Python, Arm('head') trains none of them)."
        )


def _about_blocks(features: FeatureSet) -> dict[str, object]:
    """What a header says of trained blocks: how many, and in which type the tokens before them are stored."""
    tokens = features.header["tokens"]
    return {"trained_blocks": tokens["blocks"], "tokens": tokens["type"]}


def check_before_extraction(
    holdouts: Sequence[str] | str | None, places: Mapping[Results, Settings], overwrite: bool
) -> None:
    """Raise the `InputError` that `Run` would, before an extraction that may take long.

    Args:
        places: results directories -> the settings that they are for.
        overwrite: the directories are going to be cleared.
    """
    if config.DATA_ROOT is not None:
        check_holdouts(holdouts, find_dataset(config.DATA_ROOT).domain_names)
    elif config.changed("VIT_MODEL"):
        raise InputError("VIT_MODEL needs DATA_ROOT: without images there is nothing to run a model on.")
    for results, settings in places.items():
        results.check(settings, overwrite)


def clear_results(
    places: Iterable[Results], features: FeatureSet, settings: Settings, holdouts: Sequence[str] | str | None = None
) -> None:
    """Delete what earlier runs wrote; if no run on these features can be made, raise an `InputError` instead."""
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
    """Seeds sorted, each once; an `InputError` if there is none, too many, or one is no whole number from 0."""
    _, most = config.LIMITS["NUM_SEEDS"]
    try:
        found = sorted({index(seed) for seed in islice(seeds, most + 1)})
    except TypeError:
        found = []
    if not found or found[0] < 0 or found[-1] > LARGEST_SEED or len(found) > most:
        raise InputError(
            f"Seeds must be whole numbers from 0 to {LARGEST_SEED}, one of them or more and {most} at most, not "
            f"{reprlib.repr(seeds)}."
        )
    return tuple(found)
