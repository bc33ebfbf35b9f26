"""The protocol of tusharmanekar/mp-tl-study, bit for bit: its split, subsets, draws, batches and stopping rule.

It is kept to reproduce the published numbers, not recommended. One pretrained network serves all repeats. Training
stops when the accuracy on a fixed validation set, as large whatever the amount of data, has not risen for some epochs,
and goes back to the best epoch then; but where the epochs run out first, the *last* network is kept. The original calls
"test" what is the whole training split of the classes; a record has it as `seen_accuracy`, and the accuracy on the
true test split as `accuracy`.

The original draws everything from PyTorch's global generator, seeded with the number of the repeat: first the subset;
then, seeded again, the fresh layers, and what its data loaders draw in every epoch. A function here does the same, as
the installed PyTorch's data loaders draw, and leaves the generator as it was. Which images share a batch does not
matter while a subset fills no more than one, up to 10 % of MNIST: there its published accuracies come out exactly.
Beyond that, batches are drawn in another order than its own, and why is not known (its PyTorch was an older one): at
50 % and cut 6 accuracies of single repeats then differ by up to 0.13 points.
"""

import copy
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from config import InputError
from engine import failure_reason
from transfer.convnet import ConvClassifier
from transfer.images import Examples

AMOUNTS = (0.001, 0.01, 0.1, 0.5, 1.0)
ARMS = {"FR": "frozen", "F": "frozen+rest", "R": "warm", "FT": "truncated"}  # its names of settings -> arms
ACCURACIES = ("accuracy", "balanced_accuracy", "seen_accuracy", "train_accuracy")
KINDS = (*ARMS.values(), "scratch", "finetune")  # the last two are each two of those, at cut 0 or the depth
FROZEN = ("frozen", "frozen+rest", "truncated")  # arms whose layers before the cut are not trained
OTHER_FACTS = ("network", "pretrained")  # fields of `OriginalSettings` that are no choice of the original
AT_ONCE = 512  # images in a forward pass without gradients
CACHE_BYTES = 2**31  # that the output of a frozen prefix may take; beyond, it is computed again for every batch


def repeats_of(amount: float) -> int:
    """How often the original trains with an amount of data (a share)."""
    return 25 if amount <= 0.01 else 20 if amount < 0.5 else 5


@dataclass(frozen=True)
class OriginalSettings:
    """How the original trains; the defaults are those of its results on MNIST and FashionMNIST."""

    batch_size: int = 4096
    epochs: int = 40
    patience: int = 6  # epochs without a better validation accuracy
    learning_rate: float = 1e-3  # Adam
    validation: float = 0.1  # share of the training split
    split_seed: int = 42
    network: Mapping[str, object] = field(default_factory=dict)  # further settings, see `networks.Networks.facts`
    pretrained: str | None = None  # hash of the file that all repeats start from

    @classmethod
    def of(cls, task: str, **others) -> "OriginalSettings":
        """Those of a task of `images.PRESETS`; on CIFAR-10 the original used other ones."""
        cifar = {"batch_size": 64, "epochs": 10, "patience": 5} if task.startswith("cifar") else {}
        return cls(**cifar, **others)

    def as_dict(self) -> dict[str, object]:
        """Ready for JSON."""
        own = {f"ORIGINAL_{name.upper()}": value for name, value in vars(self).items() if name not in OTHER_FACTS}
        return own | {**self.network, "protocol": "original", "pretrained": self.pretrained}

    @property
    def hash(self) -> str:
        """First 12 hex digits of the SHA-256 of the settings as sorted JSON."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True, eq=False)
class OriginalData:
    """Images of a task's classes with the original's fixed validation split."""

    seen: Tensor  # float32 [N, C, H, W], the training split of the classes: the original's "test"
    seen_labels: Tensor  # int64 [N]
    training: Tensor  # int64, rows of `seen` to draw subsets from, in the original's order
    validation: Tensor  # int64, the other rows
    test: Tensor  # the true test split
    test_labels: Tensor
    classes: int

    @classmethod
    def of(cls, examples: Examples, settings: OriginalSettings) -> "OriginalData":
        """Split as `torch.utils.data.random_split` does."""
        count = len(examples)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(settings.split_seed))
        training, validation = order.split([count - (held := int(settings.validation * count)), held])
        inputs = examples.inputs, examples.labels, training, validation, examples.test_inputs, examples.test_labels
        return cls(*inputs, examples.classes)

    def each(self, amount: float) -> int:
        """Images of each class in a subset, if it has so many."""
        return int(len(self.training) * amount / self.classes)

    def subset(self, amount: float, repeat: int) -> Tensor:
        """Rows of `seen` of the original's subset: as many of each class, or all it has, and so not all for 100 %.

        Subsets of different amounts are not nested.

        Raises:
            InputError: the amount is less than one image per class, or more than there are.
        """
        labels, each = self.seen_labels.cpu()[self.training], self.each(amount)
        if not 0 < amount <= 1 or each < 1:
            raise InputError(f"{100 * amount:g} % of {len(labels)} images is less than one of each class.")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(repeat)
            own = [(labels == label).nonzero().flatten() for label in range(self.classes)]
            return self.training[torch.cat([rows[torch.randperm(len(rows))[:each]] for rows in own])]


def cut_network(network: ConvClassifier, arm: str, cut: int, classes: int) -> ConvClassifier:
    """A copy of a network on the CPU, cut at a layer; fresh layers are drawn from its generator, the head last.

    Args:
        network: the pretrained one.
        arm: "frozen", "frozen+rest", "warm", "truncated", "scratch" or "finetune"; see `transfer.arms`.
        cut: number of convolutions that are kept, 0 … depth; of no effect for the last two.
        classes: of the new task.
    """
    if arm not in KINDS:
        raise InputError(f"The original has no arm '{arm}'; it has {', '.join(KINDS)}.")
    if not 0 <= cut <= network.depth:
        raise InputError(f"A cut lies in 0 … {network.depth}, the convolutions of the network, not at {cut}.")
    cut = {"scratch": 0, "finetune": network.depth}.get(arm, cut)
    new = copy.deepcopy(network).cpu()  # layers are drawn there, whatever the device
    if arm == "truncated":
        new = new.truncated(cut, classes)
    else:
        for layer in new.convs[cut:] if arm != "frozen+rest" else ():
            layer.reset_parameters()
        new.head = torch.nn.Linear(new.head.in_features, classes)
    new.convs[: cut if arm in FROZEN else 0].requires_grad_(False)
    return new


class Maps:
    """What the frozen layers of a network make of images: computed once if it fits in memory, else where needed.

    Args:
        network: whose first layers are applied.
        images: float32 ``[N, C, H, W]``.
        cut: number of frozen convolutions.
    """

    def __init__(self, network: ConvClassifier, images: Tensor, cut: int):
        self.network, self.images, self.cut = network, images, cut
        if cut and images.element_size() * len(images) * network.flat_size(cut) <= CACHE_BYTES:
            self.images, self.cut = torch.cat([self[rows] for rows in torch.arange(len(images)).split(AT_ONCE)]), 0

    @torch.no_grad()
    def __getitem__(self, rows: Tensor) -> Tensor:
        """Maps of some rows: ``[n, C, H, W]``."""
        return self.network.prefix(self.images[rows], self.cut)


def drawn_seed() -> int:
    """A seed as data loaders and their samplers draw them from the global generator."""
    return int(torch.empty((), dtype=torch.int64).random_())


def drawn_order(count: int) -> Tensor:
    """Order of one pass of a shuffling data loader: it draws a seed for workers, its sampler one of its own."""
    drawn_seed()
    return torch.randperm(count, generator=torch.Generator().manual_seed(drawn_seed()))


@torch.no_grad()
def hits(network: ConvClassifier, cut: int, maps: Maps, rows: Tensor, labels: Tensor) -> Tensor:
    """Whether each image is classified right, bool ``[n]``, from its maps below the cut."""
    parts = zip(rows.split(AT_ONCE), labels.split(AT_ONCE), strict=True)
    guesses = [network.rest(maps[part], cut).log_softmax(1).argmax(1) == wanted for part, wanted in parts]
    return torch.cat(guesses)


def fit(
    network: ConvClassifier, cut: int, maps: Maps, data: OriginalData, rows: Tensor, settings: OriginalSettings
) -> tuple[int, str | None]:
    """Train the layers from `cut` on, in place, as the original does.

    Args:
        network: its layers before the cut are frozen, or the cut is 0.
        maps: of `data.seen`, at that cut.
        rows: of `data.seen`, to train on.

    Returns:
        Epochs that were trained, also those after the best one; and why it failed, or None.
    """
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=settings.learning_rate)
    best, state, waited, failed = 0.0, copy.deepcopy(network.state_dict()), 0, 0
    for epoch in range(1, settings.epochs + 1):
        for batch in rows[drawn_order(len(rows))].split(settings.batch_size):
            optimizer.zero_grad()
            loss = F.nll_loss(network.rest(maps[batch], cut).log_softmax(1), data.seen_labels[batch])
            loss.backward()
            optimizer.step()
            failed = failed or epoch * (not math.isfinite(loss.item()))
        drawn_order(0)  # the original measures the training accuracy here, in another order,
        drawn_seed()  # and then that on the validation set: both draw
        right = hits(network, cut, maps, data.validation, data.seen_labels[data.validation])
        accuracy = int(right.sum()) / len(right)
        if accuracy > best:
            best, state, waited = accuracy, copy.deepcopy(network.state_dict()), 0
        else:
            waited += 1
            if waited == settings.patience:
                network.load_state_dict(state)
                break
    return epoch, failure_reason(failed) if failed else None


def pretrain(
    data: OriginalData, settings: OriginalSettings, channels: int = 64, depth: int = 6, seed: int = 0
) -> ConvClassifier:
    """A network trained on all training images, from a random start, as the original trains its own.

    The original's own networks cannot be drawn again, because their notebooks draw other things before them.
    """
    _, colours, size, _ = data.seen.shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ConvClassifier(colours, size, data.classes, depth=depth, channels=channels).to(data.seen.device)
        fit(network, 0, Maps(network, data.seen, 0), data, data.training, settings)
    return network


@dataclass(frozen=True)
class Cut:
    """An arm at a cut, and what its frozen layers make of all images: they are run once."""

    network: ConvClassifier  # the pretrained one
    data: OriginalData  # of the new task
    arm: str  # see `cut_network`
    cut: int
    seen: Maps
    test: Maps

    @classmethod
    def of(cls, network: ConvClassifier, data: OriginalData, arm: str, cut: int) -> "Cut":
        """Run the frozen layers on all images."""
        frozen = cut if arm in FROZEN else 0
        return cls(network, data, arm, cut, *(Maps(network, images, frozen) for images in (data.seen, data.test)))

    @property
    def frozen(self) -> int:
        """Number of frozen layers."""
        return self.cut if self.arm in FROZEN else 0

    def run(self, amount: float, repeat: int, settings: OriginalSettings) -> dict[str, object]:
        """Fine-tune once, and test.

        Returns:
            n (training images), epochs and updates that were trained, failed (why, or None); accuracy and
            balanced_accuracy on the true test split; seen_accuracy on the training split of the classes, the
            original's "test_acc"; train_accuracy on the n images. These are fractions, None of a failed run.
        """
        rows = self.data.subset(amount, repeat)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(repeat)
            new = cut_network(self.network, self.arm, self.cut, self.data.classes).to(self.data.seen.device)
            epochs, failed = fit(new, self.frozen, self.seen, self.data, rows, settings)
        updates = epochs * math.ceil(len(rows) / settings.batch_size)
        shares = dict.fromkeys(ACCURACIES) if failed else self._accuracies(new, rows)
        return {"n": len(rows), "epochs": epochs, "updates": updates, "failed": failed} | shares

    def _accuracies(self, network: ConvClassifier, rows: Tensor) -> dict[str, float]:
        data = self.data
        right = hits(network, self.frozen, self.test, torch.arange(len(data.test)), data.test_labels).cpu()
        known = hits(network, self.frozen, self.seen, torch.arange(len(data.seen)), data.seen_labels).cpu()
        recalls = [right[data.test_labels.cpu() == label].double().mean() for label in range(data.classes)]
        whole, seen, train = (int(part.sum()) / len(part) for part in (right, known, known[rows]))
        return dict(zip(ACCURACIES, (whole, float(sum(recalls)) / len(recalls), seen, train), strict=True))
