"""The transfer study on features: pretrain the package's classifier on some domains, fine-tune it on another.

Cuts are the hidden layers of `FeedforwardClassifier`. Classes are the same on both sides, but in every arm except
`zero-shot` the head is fresh all the same, as it is for new classes. A split is fixed: of each domain and class 80 % to
train on, 20 % to test on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from dataset import split
from engine import MatmulEngine, Params
from features import bundled_features, load_features
from models import FeedforwardClassifier
from storage import FeatureSet
from transfer.arms import CutArm
from transfer.images import TEST_FRACTION, Examples

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
        parts = [(data.features[part].float(), data.labels[part]) for part in (rows & inside, rows & ~inside)]
        return Examples(*parts[0], *parts[1], len(data.class_names))


def feature_tasks(data: str | Path | None = None) -> list[FeatureTask]:
    """A task for each domain of a feature file; default the bundled features."""
    features = bundled_features() if data is None else load_features(data)
    return [FeatureTask(features, holdout) for holdout in features.domain_names]


@dataclass(frozen=True)
class FeatureNetworks:
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
        self,
        network: FeedforwardClassifier,
        start: Params,
        freeze: Params,
        prefix: int,
        examples: Examples,
        batches: Tensor,
        checkpoints: Sequence[int],
        learning_rate: float,
        tick: Callable[[], object] = lambda: None,
    ) -> tuple[Params, Tensor]:
        """As `training.train_stack`, by the engine of the package's own study."""
        engine = MatmulEngine(start, learning_rate)
        rates = {name: (~frozen).to(examples.inputs) for name, frozen in freeze.items() if frozen.any()}
        classes, counts = F.one_hot(examples.test_labels, examples.classes).double(), []
        for first, last in pairwise((0, *checkpoints)):
            for update in range(first, last):
                rows = batches[:, update]
                engine.step(examples.inputs[rows], examples.labels[rows], rates, rows)
            right = engine.right(examples.test_inputs, examples.test_labels).double() @ classes
            finite = [value.isfinite().flatten(2).all(-1) for value in engine.params.values()]
            counts.append(torch.where(torch.stack(finite).all(0)[..., None], right.long(), -1))
            for _ in range(engine.shape.numel()):
                tick()
        return dict(engine.params), torch.stack(counts, 2)
