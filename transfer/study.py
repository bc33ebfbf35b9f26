"""The transfer study: pretrain, then fine-tune every arm with every amount of data, on the same batches per repeat.

Protocol "updates": every run takes the same number of updates, whatever the amount of data, its last network counts,
and no image is kept for validation; accuracy on the test split is measured at several numbers of updates. Repeat r has
its own pretrained network, subset, batches and fresh start. Subsets are nested and stratified, and the fresh values of
a layer are the same in every arm. So all arms of one repeat and amount are paired.

The study is resumable: it trains what its results directory does not hold yet, in units of (task, amount, chunk of
repeats), and each unit is on disk before the next begins.
"""

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

import config
from config import InputError
from engine import Params, default_workers, free_memory, generator, side_by_side, training_threads
from storage import Results, environment
from study import Execution, check_seeds
from transfer import report
from transfer.arms import NEED_START, ZERO_SHOT, CutArm, bits, layers_of, start_of
from transfer.images import Examples, Task, nested_rows
from transfer.networks import Networks
from transfer.probes import FILE, probe_layers, read_probes
from transfer.tables import long_table
from transfer.training import REPEATS_PER_UNIT, Course, draw_batches

CHECKPOINTS = (50, 100, 200, 400, 1000, 2000)  # updates after which accuracy is measured, and after the last


@dataclass(frozen=True)
class TransferSettings:
    """What determines a result, besides images, arm, amount and repeat; the names are those of the constants.

    Raises:
        InputError: a value that the setting does not allow.
    """

    transfer_updates: int
    transfer_pretraining: int
    transfer_batch_size: int
    transfer_learning_rate: float
    network: Mapping[str, object]  # further settings, see `networks.Networks.facts`
    protocol: str = "updates"
    pretrained: str | None = None  # hash of the file that all repeats start from

    def __post_init__(self) -> None:
        for name in ("transfer_updates", "transfer_pretraining", "transfer_batch_size", "transfer_learning_rate"):
            config.check(name.upper(), getattr(self, name))

    def as_dict(self) -> dict[str, object]:
        """Ready for JSON."""
        own = {name.upper(): value for name, value in vars(self).items() if name.startswith("transfer_")}
        return own | {**self.network, "protocol": self.protocol, "pretrained": self.pretrained}

    @property
    def hash(self) -> str:
        """First 12 hex digits of the SHA-256 of the settings as sorted JSON."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()[:12]

    @property
    def checkpoints(self) -> tuple[int, ...]:
        """Numbers of updates after which accuracy is measured."""
        return (*(step for step in CHECKPOINTS if step < self.transfer_updates), self.transfer_updates)


class Unit(NamedTuple):
    """What is trained together: all arms that are missing of some repeats, with one amount of data."""

    task: Task
    amount: float
    arms: tuple[CutArm, ...]
    repeats: tuple[int, ...]


@dataclass
class TransferStudy:
    """Arms, amounts of data and repeats of one or more tasks, in one results directory.

    Args:
        tasks: what is pretrained and fine-tuned on what; `features.FeatureTask` are such tasks as well.
        networks: what is trained, see `networks`.
        results: gets records, settings, pretrained networks and the report.
        arms: see `arms.arms_of`.
        amounts: shares of the training images, above 0 and at most 1. Those that are less than one image of some class
            are left out, see `left_out`.
        repeats: numbers of the repeats.
        pretrained: parameters that all repeats start from, instead of pretraining a network for each.

    Raises:
        InputError: invalid repeats or amounts, an arm that needs the start of pretraining where there is none, or the
            same classes where they are others, or a directory with results of other settings or images.
    """

    tasks: Sequence[Task]
    networks: Networks
    settings: TransferSettings
    results: Results
    arms: Sequence[CutArm]
    amounts: Sequence[float]
    repeats: Sequence[int]
    pretrained: Params | None = None
    execution: Execution = field(default_factory=Execution)
    _kept: dict[tuple[str, str], Examples] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self.repeats = check_seeds(self.repeats)
        self.amounts = sorted(dict.fromkeys(self.amounts))
        for amount in self.amounts:
            if not 0 < amount <= 1:
                raise InputError(f"An amount of data lies above 0 and at most at 100 %, not at {100 * amount:g} %.")
        if self.pretrained is not None:
            self._check_pretrained()
        if any(arm.kind == ZERO_SHOT for arm in self.arms):
            self._check_classes()
        with self.results:
            self.results.claim(self.settings, self.facts)

    def __getstate__(self) -> dict[str, object]:
        """What another machine trains with: all but the results directory, which this process alone uses."""
        return vars(self) | {"results": None}

    def _check_pretrained(self) -> None:
        """Refuse a given network that does not fit the images, and arms that cannot be made from it."""
        if needy := [arm.name for arm in self.arms if arm.kind in NEED_START]:
            raise InputError(
                f"The arm '{needy[0]}' needs to know how far weights moved in pretraining, and --pretrained gives the "
                "network after it alone: leave out one of them."
            )
        for task in self.tasks:
            *layers, _ = layers_of(wanted := dict(self.networks.outline(self.pretraining(task)).named_parameters()))
            for name in (name for pair in layers for name in pair):
                if wanted[name].shape != self.pretrained[name].shape:
                    raise InputError(f"The pretrained network does not fit the images of {task.name}, see its {name}.")

    def _check_classes(self) -> None:
        """Refuse to keep a head whose classes are not those of the images."""
        for task in self.tasks:
            before = [task.source.class_names[c] for c in task.source_classes]
            after = [task.target.class_names[c] for c in task.target_classes]
            if before != after:
                raise InputError(
                    f"The arm '{ZERO_SHOT}' keeps the head, and the classes of {task.name} are others than those that "
                    "were pretrained on: leave it out."
                )
        if self.pretrained is not None:
            raise InputError(
                f"The arm '{ZERO_SHOT}' keeps the head, and --pretrained does not say which classes its head has: "
                "leave out one of them."
            )

    @cached_property
    def facts(self) -> dict[str, object]:
        """Where the images come from, for headers; no paths."""
        inputs = self.pretraining(self.tasks[0]).inputs
        return {
            "dataset": ", ".join(task.name for task in self.tasks),
            "fingerprint": fingerprint(self.tasks),
            "feature_size": inputs[0].numel(),
            "model": getattr(self.tasks[0], "model", None),
            "counts": {name: counts for task in self.tasks for name, counts in self._counts(task)},
        }

    def _counts(self, task: Task) -> Iterator[tuple[str, dict[str, int]]]:
        for part, examples, images, classes in (
            ("pretraining", self.pretraining(task), task.source, task.source_classes),
            ("fine-tuning", self.finetuning(task), task.target, task.target_classes),
        ):
            for split, labels in (("", examples.labels), (", test", examples.test_labels)):
                counts = torch.bincount(labels, minlength=examples.classes).tolist()
                names = [images.class_names[c] for c in classes]
                yield f"{task.name}, {part}{split}", dict(zip(names, counts, strict=True))

    def pretraining(self, task: Task) -> Examples:
        """What its networks are pretrained on, kept."""
        return self._examples(task, "pretraining")

    def finetuning(self, task: Task) -> Examples:
        """What its networks are fine-tuned on, kept."""
        return self._examples(task, "finetuning")

    def _examples(self, task: Task, part: str) -> Examples:
        if (task.name, part) not in self._kept:
            found, device = getattr(task, part)(), self.execution.device
            tensors = (found.inputs, found.labels, found.test_inputs, found.test_labels)
            self._kept[task.name, part] = Examples(*(tensor.to(device) for tensor in tensors), found.classes)
        return self._kept[task.name, part]

    def rows(self, task: Task, amount: float, repeat: int) -> Tensor | None:
        """Rows of a repeat's subset; None if it would lack a class."""
        return subset(task, self.finetuning(task), amount, repeat)

    def amounts_of(self, task: Task) -> list[float]:
        """Amounts that are at least one image per class."""
        return [amount for amount in self.amounts if self.rows(task, amount, 0) is not None]

    def left_out(self) -> list[str]:
        """A sentence for each task with amounts that are too small."""
        sentences = []
        for task in self.tasks:
            if out := [amount for amount in self.amounts if amount not in self.amounts_of(task)]:
                shares = ", ".join(f"{100 * amount:g} %" for amount in out)
                sentences.append(f"{task.name}: {shares} would be less than one image per class, and is left out.")
        return sentences

    def train(self) -> None:
        """Pretrain and fine-tune what is missing."""
        units = list(self._missing())
        for task in self.tasks:
            self._pretrain(task, sorted({repeat for unit in units if unit.task is task for repeat in unit.repeats}))
        pretrained = {task.name: self.networks_of(task) for task in self.tasks} if units else {}
        steps = len(self.settings.checkpoints)

        def train(unit: Unit, tick: Callable[[], object]) -> list[dict]:
            return self._fine_tune(unit, pretrained[unit.task.name], tick)

        with self.results:
            total = steps * sum(len(unit.arms) * len(unit.repeats) for unit in units)
            for records in self._side_by_side("Fine-tuning", train, units, total):
                self.results.append(records)

    def _side_by_side(self, what: str, work: Callable, units: Sequence, total: int) -> Iterator:
        """Results of `work` for each unit, in order, as many at a time as cores and memory allow."""
        if units:
            self.results.claim(self.settings, self.facts, environment(self.execution.device, self.execution.threads))
        fit = free_memory() / 2 / self.networks.memory(len(self.arms))  # infinite where it is not known
        at_a_time = 1 if self.execution.device == "cuda" else max(1, int(min(default_workers(), fit)))
        quiet = {} if self.execution.progress and units else {"disable": True}

        def one(unit: object, tick: Callable[[], object]) -> object:
            with training_threads(self.execution.threads):  # the same whichever process does it
                return work(unit, tick)

        with tqdm(total=total, desc=what, unit="test", **quiet) as bar:
            yield from side_by_side(one, units, at_a_time, bar, self.execution.executor)

    def _missing(self) -> Iterator[Unit]:
        """What is not on disk yet. Which repeats share a unit depends on their numbers alone."""
        there = {(r["task"], r["amount"], r["arm"], r["cut"], r["repeat"]) for r in self.results.records()}
        for task in self.tasks:
            for amount, some in product(self.amounts_of(task), chunks(self.repeats)):
                lacking = {
                    repeat: tuple(a for a in self.arms if (task.name, amount, a.kind, a.cut, repeat) not in there)
                    for repeat in some
                }
                for arms in dict.fromkeys(lacking.values()):
                    if arms:
                        yield Unit(task, amount, arms, tuple(r for r in some if lacking[r] == arms))

    def networks_of(self, task: Task) -> Mapping[int, tuple[Params | None, Params]]:
        """Start and final parameters of the pretrained network of each repeat that is on disk."""
        if self.pretrained is not None:
            return dict.fromkeys(self.repeats, (None, self.pretrained))
        return stored_networks(self.results, task.name)

    def pretrained_accuracy(self, task: Task) -> Tensor | None:
        """On the test split of the classes that it was pretrained on, by repeat; None of a network from a file."""
        if self.pretrained is not None:
            return None
        return self.results.load("weights", file_of(task.name))[0]["accuracy"]

    def _pretrain(self, task: Task, repeats: Sequence[int]) -> None:
        """Pretrain the networks of these repeats that are not on disk."""
        if self.pretrained is not None:
            return
        name = file_of(task.name)
        if self.results.has("weights", name):
            known = self.results.load("weights", name)[0]["seeds"].tolist()
            repeats = [repeat for repeat in repeats if repeat not in known]

        def train(some: Sequence[int], tick: Callable[[], object]) -> dict[str, Tensor]:
            return self._pretrained(task, some, tick)

        names = [task.source.class_names[c] for c in task.source_classes]
        header = {"class_names": names, "features": self.facts, "settings": self.settings.hash}
        with self.results:
            made = self._side_by_side("Pretraining", train, chunks(repeats), len(repeats))
            for some, arrays in zip(chunks(repeats), made, strict=True):
                self.results.save("weights", name, some, arrays, header)

    def _pretrained(self, task: Task, repeats: Sequence[int], tick: Callable[[], object]) -> dict[str, Tensor]:
        """Networks of some repeats before and after pretraining, and their accuracy: name -> ``[S, …]``."""
        examples, updates = self.pretraining(task), self.settings.transfer_pretraining
        network = self.networks.outline(examples)
        starts = [self.networks.draw(network, generator(repeat, "start", "transfer")) for repeat in repeats]
        start = stacked(starts, examples.inputs, 1)
        freeze = {name: torch.zeros_like(value, dtype=torch.bool) for name, value in start.items()}
        rows = [torch.arange(len(examples))] * len(repeats)
        batches = self._batches(repeats, rows, updates, f"transfer/{task.name}/pretraining")
        course = Course(examples, batches, [updates], self.settings.transfer_learning_rate, tick)
        final, right = self.networks.train(network, start, freeze, 0, course)
        arrays = {f"start.{name}": value[:, 0].cpu() for name, value in start.items()}
        arrays |= {f"final.{name}": value[:, 0].cpu() for name, value in final.items()}
        return arrays | {"accuracy": right[:, 0, 0].sum(-1).cpu() / len(examples.test_labels)}

    def _batches(self, repeats: Sequence[int], rows: Sequence[Tensor], updates: int, stream: str) -> Tensor:
        """Batches of the rows of each repeat, int64 ``[S, U, B]``."""
        size = self.settings.transfer_batch_size
        drawn = [
            draw_batches(own, size, updates, generator(repeat, "order", stream))
            for repeat, own in zip(repeats, rows, strict=True)
        ]
        return torch.stack(drawn).to(self.execution.device)

    def _fine_tune(self, unit: Unit, pretrained: Mapping, tick: Callable[[], object]) -> list[dict]:
        """Records of a unit, by arm and repeat."""
        examples, checkpoints = self.finetuning(unit.task), self.settings.checkpoints
        rows = [self.rows(unit.task, unit.amount, repeat) for repeat in unit.repeats]
        batches = self._batches(unit.repeats, rows, checkpoints[-1], f"transfer/{unit.task.name}/{unit.amount!r}")
        course = Course(examples, batches, checkpoints, self.settings.transfer_learning_rate, tick)
        groups: dict[tuple, list[CutArm]] = {}
        for arm in unit.arms:  # those of one shape, with as many first layers that are run once
            groups.setdefault((arm.cut if arm.kind == "truncated" else None, self.networks.prefix(arm)), []).append(arm)
        right = {}
        for (depth, prefix), arms in groups.items():
            network = self.networks.outline(examples, depth)
            runs = [(arm, *pretrained[repeat], repeat) for repeat in unit.repeats for arm in arms]
            made = [beginning(self.networks, network, *run) for run in runs]
            start, freeze = (stacked(each, examples.inputs, len(arms)) for each in zip(*made, strict=True))
            del made  # of large networks several copies would not fit
            _, counts = self.networks.train(network, start, freeze, prefix, course)
            right.update(zip(arms, counts.cpu().unbind(1), strict=True))
        totals = torch.bincount(examples.test_labels, minlength=examples.classes).cpu()
        return [
            self._record(unit, arm, repeat, len(own), right[arm][s], totals)
            for arm in unit.arms
            for s, (repeat, own) in enumerate(zip(unit.repeats, rows, strict=True))
        ]

    def _record(self, unit: Unit, arm: CutArm, repeat: int, n: int, right: Tensor, totals: Tensor) -> dict:
        """The record of one run; right answers ``[K, classes]``."""
        identity = {
            "task": unit.task.name,
            "protocol": self.settings.protocol,
            "arm": arm.kind,
            "cut": arm.cut,
            "amount": unit.amount,
            "repeat": repeat,
            "settings": self.settings.hash,
        }
        steps = self.settings.checkpoints
        shares = {
            "accuracy": right.sum(-1).double() / totals.sum(),
            "balanced_accuracy": (right.double() / totals)[:, totals > 0].mean(-1),
        }
        bad = [step for step, counts in zip(steps, right, strict=True) if counts[0] < 0]
        record = identity | {"n": n, "updates": steps[-1]}
        record["failed"] = f"the outputs are no longer finite after {bad[0]} updates" if bad else None
        for name, values in shares.items():
            record[name] = None if bad else {str(k): float(v) for k, v in zip(steps, values, strict=True)}
        return {"key": key_of(self.facts["fingerprint"], identity), **record}

    def check_probes(self) -> None:
        """Raise an `InputError` if `probe` cannot: the networks are not convolutional, or were not pretrained here."""
        if self.pretrained is not None or self.settings.protocol != "updates" or not self.networks.convolutional:
            raise InputError("Layers are probed of CNNs that are pretrained here: leave --probes out.")

    def probe(self) -> None:
        """Measure what each layer of the pretrained networks holds and keep it, see `probes.probe_layers`.

        Raises:
            InputError: see `check_probes`.
        """
        self.check_probes()
        for task in self.tasks:
            known, outline = self.networks_of(task), self.networks.outline(self.pretraining(task))
            repeats = [repeat for repeat in self.repeats if repeat in known]
            untrained, final = zip(*(known[repeat] for repeat in repeats), strict=True)
            made = [[filled(outline, params) for params in some] for some in (final, untrained)]
            names = [task.target.class_names[c] for c in task.target_classes]
            where = {"repeats": repeats, "task": task.name, "path": self.results.directory / FILE}
            with self.results:
                probe_layers(*made, self.finetuning(task), names, **where, progress=self.execution.progress)

    def records(self) -> list[dict]:
        """What is on disk of these tasks, arms, amounts and repeats."""
        arms, tasks = {(arm.kind, arm.cut) for arm in self.arms}, {task.name for task in self.tasks}
        return [
            r
            for r in self.results.records()
            if (r["arm"], r["cut"]) in arms
            and r["task"] in tasks
            and r["amount"] in self.amounts
            and r["repeat"] in self.repeats
        ]

    def table(self) -> pd.DataFrame:
        """Everything that the directory holds, also of earlier commands: see `tables.long_table`."""
        return long_table(self.results.records())

    def write(self) -> str:
        """Write the report and its tables, of everything that the directory holds; returns the report."""
        with self.results:
            directory = self.results.directory
            return report.write(directory, self.table(), self.about(), read_probes(directory))

    def about(self) -> dict[str, object]:
        """What the study is, for the report: words -> value; "chance" and "depth" by task are for its computations."""
        chance = {}
        for task in self.tasks:
            labels = self.finetuning(task).test_labels
            chance[task.name] = float(torch.bincount(labels).max() / len(labels))
        lines = {
            f"Images of {name}": ", ".join(f"{c} {n}" for c, n in n.items()) for name, n in self.facts["counts"].items()
        }
        settings = ", ".join(f"{name} = {value}" for name, value in self.settings.as_dict().items())
        for task in self.tasks:
            if (accuracy := self.pretrained_accuracy(task)) is not None:
                spread = f"{100 * accuracy.mean():.1f} % ({100 * accuracy.min():.1f}–{100 * accuracy.max():.1f})"
                lines[f"Pretrained accuracy of {task.name}"] = f"{spread} on the test images of its own classes"
        depth = {task.name: self.networks.depth for task in self.tasks}
        lines |= self.networks.about()
        return lines | {"Settings": settings, "chance": chance, "depth": depth}


def fingerprint(tasks: Sequence[Task]) -> str:
    """Of the images and classes of tasks, 16 hex digits."""
    names = [(task.name, task.source.fingerprint, task.target.fingerprint) for task in tasks]
    classes = [(task.source_classes, task.target_classes) for task in tasks]
    return hashlib.sha256(json.dumps([names, classes]).encode()).hexdigest()[:16]


def subset(task: Task, examples: Examples, amount: float, repeat: int) -> Tensor | None:
    """Rows of the training images that a repeat fine-tunes on; None if they would lack a class."""
    return nested_rows(examples.labels.cpu(), amount, generator(repeat, "subset", f"transfer/{task.name}"))


def file_of(task: str) -> str:
    """Name of the file of pretrained networks of a task."""
    return f"pretrained_{task}"


def stored_networks(results: Results, task: str) -> dict[int, tuple[Params, Params]]:
    """Start and final parameters of the pretrained network of each repeat that is on disk."""
    arrays, _ = results.load("weights", file_of(task))

    def params(kind: str, i: int) -> Params:
        return {name.removeprefix(kind): value[i] for name, value in arrays.items() if name.startswith(kind)}

    return {r: (params("start.", i), params("final.", i)) for i, r in enumerate(arrays["seeds"].tolist())}


def filled(outline: torch.nn.Module, params: Params) -> torch.nn.Module:
    """A network with these parameters, on the CPU."""
    network = copy.deepcopy(outline).to_empty(device="cpu")
    network.load_state_dict(params)
    return network


def beginning(
    networks: Networks, network: torch.nn.Module, arm: CutArm, before: Params | None, after: Params, repeat: int
) -> tuple[Params, Params]:
    """Where an arm starts and what it freezes, see `arms.bits`.

    Args:
        network: outline of what is fine-tuned; a truncated one has fewer layers than the pretrained one.
        before, after: parameters of the pretrained network before and after pretraining.
    """
    fresh = networks.draw(network, generator(repeat, "fresh_start", "transfer"))
    layers = networks.layers(fresh)
    head = () if arm.kind == ZERO_SHOT else layers[-1].names
    known = {name: value if name in head else after[name] for name, value in fresh.items()}
    keep, freeze = bits(arm, before, known, repeat, layers, networks.chained)
    start = start_of(fresh, known, keep)
    return networks.cut_short(start, freeze, arm.cut) if arm.kind == "truncated" else (start, freeze)


def stacked(params: Sequence[Params], like: Tensor, arms: int) -> Params:
    """Parameters of S · V networks -> name -> ``[S, V, *shape]``, on the device of `like`, floats in its type."""
    found = {name: torch.stack([own[name] for own in params]).unflatten(0, (-1, arms)) for name in params[0]}
    return {n: v.to(like.device, like.dtype if v.is_floating_point() else v.dtype) for n, v in found.items()}


def chunks(repeats: Sequence[int]) -> list[tuple[int, ...]]:
    """Repeats by chunk: which share one depends on their numbers alone, so that resuming keeps the bytes."""
    numbers = sorted({repeat // REPEATS_PER_UNIT for repeat in repeats})
    return [tuple(r for r in sorted(repeats) if r // REPEATS_PER_UNIT == number) for number in numbers]


def key_of(fingerprint: str, identity: Mapping[str, object]) -> str:
    """Identity of a record, 16 hex digits."""
    return hashlib.sha256(json.dumps([fingerprint, *identity.values()]).encode()).hexdigest()[:16]
