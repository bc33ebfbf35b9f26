"""The transfer study by the protocol of the original: one pretrained network, and the numbers of repeats it used."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from tqdm.auto import tqdm

from config import InputError
from engine import training_threads
from storage import environment
from transfer.arms import CutArm
from transfer.convnet import ConvClassifier
from transfer.images import Task
from transfer.original import ACCURACIES, KINDS, Cut, Maps, OriginalData, OriginalSettings, hits, pretrain, repeats_of
from transfer.study import TransferStudy, file_of, key_of


@dataclass
class OriginalStudy(TransferStudy):
    """As `TransferStudy`, by the protocol "original"; of its repeats each amount has at most as many as the original.

    All repeats start from one pretrained network: `pretrained`, or one that is trained as the original trains its own.
    A record has the true accuracy, `seen_accuracy` (the original's "test") and train_accuracy, by the number of updates
    at which its run ended, and the number of epochs.

    Raises:
        InputError: as `TransferStudy`; an arm that the original does not have.
    """

    settings: OriginalSettings

    def __post_init__(self) -> None:
        if unknown := [arm.name for arm in self.arms if arm.kind not in KINDS]:
            raise InputError(f"The original has no arm like '{unknown[0]}'; it has {', '.join(KINDS)}.")
        super().__post_init__()

    def data(self, task: Task) -> OriginalData:
        """What its networks are fine-tuned on, kept."""
        kept = self.__dict__.setdefault("_data", {})
        if task.name not in kept:
            kept[task.name] = OriginalData.of(self.finetuning(task), self.settings)
        return kept[task.name]

    def rows(self, task: Task, amount: float, repeat: int) -> Tensor | None:
        """Rows of a repeat's subset; None if it would lack a class."""
        data = self.data(task)
        return data.subset(amount, repeat) if data.each(amount) else None

    def train(self) -> None:
        """Pretrain, if need be, and fine-tune what is missing; what one amount gives is written at once."""
        missing = list(self._missing_runs())
        quiet = {} if self.execution.progress and missing else {"disable": True}
        if missing:
            machine = environment(self.execution.device, self.execution.threads)
            with self.results:
                self.results.claim(self.settings, self.facts, machine)
        with self.results, training_threads(self.execution.threads):
            for task in {task.name: task for task, *_ in missing}.values():
                self._pretrain(task, [0])
            with tqdm(total=len(missing), desc="Fine-tuning", unit="network", **quiet) as bar:
                for (task, arm), runs in groupby(missing, key=lambda run: run[:2]):
                    cut = Cut.of(self.network(task), self.data(task), arm.kind, arm.cut)
                    for amount, some in groupby(runs, key=lambda run: run[2]):
                        repeats = [repeat for *_, repeat in some]
                        self.results.append(
                            [self._run(task, arm, cut, amount, repeat, bar.update) for repeat in repeats]
                        )

    def _missing_runs(self) -> list[tuple[Task, CutArm, float, int]]:
        """What is not on disk yet, by task, arm and amount."""
        there = {(r["task"], r["arm"], r["cut"], r["amount"], r["repeat"]) for r in self.results.records()}
        return [
            (task, arm, amount, repeat)
            for task in self.tasks
            for arm in self.arms
            for amount in self.amounts_of(task)
            for repeat in self.repeats[: repeats_of(amount)]
            if (task.name, arm.kind, arm.cut, amount, repeat) not in there
        ]

    def _pretrain(self, task: Task, repeats: list[int]) -> None:
        """Pretrain the one network, unless it is given or on disk."""
        name = file_of(task.name)
        if self.pretrained is not None or self.results.has("weights", name):
            return
        data = OriginalData.of(self.pretraining(task), self.settings)
        network = pretrain(data, self.settings, self.networks.channels, self.networks.depth)
        right = hits(network, 0, Maps(network, data.test, 0), torch.arange(len(data.test)), data.test_labels)
        arrays = {f"final.{key}": value[None].cpu() for key, value in network.state_dict().items()}
        names = [task.source.class_names[c] for c in task.source_classes]
        header = {"class_names": names, "features": self.facts, "settings": self.settings.hash}
        self.results.save("weights", name, repeats, arrays | {"accuracy": right.float().mean()[None].cpu()}, header)

    def network(self, task: Task) -> ConvClassifier:
        """The pretrained network, but for its head, which holds nothing: every cut draws another."""
        if self.pretrained is not None:
            state = self.pretrained
        else:
            arrays, _ = self.results.load("weights", file_of(task.name))
            state = {key.removeprefix("final."): value[0] for key, value in arrays.items() if key.startswith("final.")}
        network = self.networks.outline(self.finetuning(task)).to_empty(device="cpu")
        network.convs.load_state_dict({k.removeprefix("convs."): v for k, v in state.items() if k.startswith("convs.")})
        return network.to(self.execution.device)

    def _run(
        self, task: Task, arm: CutArm, cut: Cut, amount: float, repeat: int, tick: Callable[[], object]
    ) -> dict[str, object]:
        """The record of one run."""
        identity = {
            "task": task.name,
            "protocol": "original",
            "arm": arm.kind,
            "cut": arm.cut,
            "amount": amount,
            "repeat": repeat,
            "settings": self.settings.hash,
        }
        found = cut.run(amount, repeat, self.settings)
        tick()
        step = str(found["updates"])
        shares = {name: None if found[name] is None else {step: found[name]} for name in ACCURACIES}
        return {"key": key_of(self.facts["fingerprint"], identity), **identity, **found, **shares}
