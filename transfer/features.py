"""The transfer study on features: pretrain the package's classifier on some domains, fine-tune it on another.

Cuts are the hidden layers of `FeedforwardClassifier`; on tokens, `transfer.blocks` has the network. Classes are the
same on both sides, but in every arm except `zero-shot` the head is fresh all the same, as it is for new classes. A
split is fixed: of each domain and class 80 % to train on, 20 % to test on.
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from dataset import split
from engine import MatmulEngine, Params, TailEngine, rows_at_a_time
from features import bundled_features, load_features
from models import FeedforwardClassifier
from storage import FeatureSet
from transfer.arms import CutArm
from transfer.images import TEST_FRACTION, Examples
from transfer.networks import Chain
from transfer.training import Course

SPLIT_SEED = 0


@dataclass(frozen=True, eq=False)
class FeatureTask:
    """Pretrain on all domains but one, fine-tune on that one. It is used as `images.Task` is."""

    features: FeatureSet
    holdout: str

    @property
    def name(self) -> str:
        """Of data set and domain."""
        return f"{self.features.dataset}-{self.holdout}"

    @property
    def source(self) -> FeatureSet:
        """Where names of classes and the fingerprint come from."""
        return self.features

    target = source

    @property
    def source_classes(self) -> tuple[int, ...]:
        """Numbers of all classes."""
        return tuple(range(len(self.features.class_names)))

    target_classes = source_classes

    @property
    def model(self) -> dict[str, str] | None:
        """What made the features."""
        return self.features.header.get("model")

    def pretraining(self) -> Examples:
        """The domains before fine-tuning."""
        return self._examples(self.features.domains != self._holdout)

    def finetuning(self) -> Examples:
        """The domain held out."""
        return self._examples(self.features.domains == self._holdout)

    @property
    def _holdout(self) -> int:
        return self.features.domain_names.index(self.holdout)

    def _examples(self, rows: Tensor) -> Examples:
        data = self.features
        names = data.domain_names, data.class_names
        inside = split(data.files, data.labels, data.domains, *names, SPLIT_SEED, TEST_FRACTION)
        parts = [(self._inputs(part), data.labels[part]) for part in (rows & inside, rows & ~inside)]
        return Examples(*parts[0], *parts[1], len(data.class_names))

    def _inputs(self, rows: Tensor) -> "Tensor | TokenRows":
        if self.features.tokens is None:
            return self.features.features[rows].float()
        return TokenRows(self.features.tokens, rows.nonzero().squeeze(1))


class TokenRows:
    """Tokens of some images as `images.Examples` has them, read from the disk when they are asked for.

    Args:
        tokens: of all images, ``[N, T, D]``, as they are stored.
        rows: the images, int64 ``[n]``.
    """

    dtype = torch.float32  # of what is read

    def __init__(self, tokens: Tensor, rows: Tensor):
        self.tokens, self.rows, self.shape = tokens, rows, torch.Size([len(rows), *tokens.shape[1:]])

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.tokens.device

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: int | slice | Tensor) -> Tensor:
        return self.tokens[self.rows[rows]].to(self.dtype)

    def to(self, device: torch.device | str) -> "TokenRows":
        """The same rows there; tokens that are there already are not copied."""
        return TokenRows(self.tokens.to(device), self.rows.to(device))


def feature_tasks(data: FeatureSet | str | Path | None = None) -> list[FeatureTask]:
    """A task for each domain of features or of a file of them; default the bundled features."""
    if not isinstance(data, FeatureSet):
        data = bundled_features() if data is None else load_features(data)
    return [FeatureTask(data, holdout) for holdout in data.domain_names]


@dataclass(frozen=True)
class FeatureNetworks(Chain):
    """Networks of `FeedforwardClassifier`, see `networks.Networks`."""

    hidden_sizes: tuple[int, ...]
    convolutional: ClassVar[bool] = False

    @property
    def depth(self) -> int:
        """Hidden layers."""
        return len(self.hidden_sizes)

    def facts(self) -> dict[str, object]:
        """See `networks.Networks`."""
        return {"HIDDEN_SIZES": list(self.hidden_sizes)}

    def outline(self, examples: Examples, depth: int | None = None) -> FeedforwardClassifier:
        """See `networks.Networks`."""
        sizes = self.hidden_sizes[:depth]
        return FeedforwardClassifier.outline(examples.inputs.shape[1], examples.classes, sizes)

    def prefix(self, arm: CutArm) -> int:
        """None: the first layer of all arms of a repeat is one product, which no cache would make cheaper."""
        return 0

    def train(
        self, network: FeedforwardClassifier, start: Params, freeze: Params, prefix: int, course: Course
    ) -> tuple[Params, Tensor]:
        """As `training.train_stack`, by the engine of the package's own study."""
        return train_engine(MatmulEngine(start, course.learning_rate), freeze, course)


def train_engine(engine: MatmulEngine | TailEngine, freeze: Params, course: Course) -> tuple[Params, Tensor]:
    """Train the networks of an engine and count their right answers, see `training.train_stack`."""
    examples = course.examples
    rates = {name: (~frozen).to(examples.inputs.dtype) for name, frozen in freeze.items() if frozen.any()}
    counts = []
    for first, last in pairwise((0, *course.checkpoints)):
        for update in range(first, last):
            rows = course.batches[:, update]
            engine.step(examples.inputs[rows], examples.labels[rows], rates, rows)
        counts.append(count_right(engine, examples))
        for _ in range(engine.shape.numel()):
            course.tick()
    return dict(engine.params), torch.stack(counts, 2)


def count_right(engine: MatmulEngine | TailEngine, examples: Examples) -> Tensor:
    """Right answers on the test images by class ``[S, V, classes]``; -1 where a network is not finite."""
    rows = torch.arange(len(examples.test_labels), device=examples.test_labels.device)
    parts = rows.split(rows_at_a_time(engine, examples.test_inputs))
    right = [engine.right(examples.test_inputs[part], examples.test_labels[part]) for part in parts]
    counts = torch.cat(right, -1).double() @ F.one_hot(examples.test_labels, examples.classes).double()
    finite = [value.isfinite().flatten(2).all(-1) for value in engine.params.values()]
    return torch.where(torch.stack(finite).all(0)[..., None], counts.long(), -1)
