"""The original's protocol, against PyTorch's own data loaders and, where they are at hand, against its own numbers."""

import copy
import json
import os
import statistics
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset, random_split

from config import InputError
from storage import Results
from study import Execution
from transfer import (
    ConvClassifier,
    ConvNetworks,
    Examples,
    OriginalSettings,
    OriginalStudy,
    arms_of,
    find_images,
    load_original,
    load_task,
    long_table,
)
from transfer.original import ARMS, KINDS, Cut, Maps, OriginalData, cut_network, repeats_of

DATA = os.environ.get("TRANSFER_DATA")
SMALL = OriginalSettings(batch_size=16, epochs=6, patience=2, learning_rate=0.01)


def blobs(count=100, classes=3, size=8, seed=0):
    """Images whose classes differ in their mean picture, some classes rarer than others."""
    draw = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, 1, size, size, generator=draw)
    parts = []
    for number in (count, 60):
        labels = (torch.rand(number, generator=draw) ** 2 * classes).long()
        parts += [centres[labels] + torch.randn(number, 1, size, size, generator=draw), labels]
    return Examples(*parts, classes)


def pretrained(depth=4):
    torch.manual_seed(5)
    return ConvClassifier(1, 8, 5, depth=depth, channels=4)


def accuracy(network, loader):
    with torch.no_grad():
        right = sum(int((network(x).log_softmax(1).argmax(1) == y).sum()) for x, y in loader)
    return right / len(loader.dataset)


def cut_plainly(network, setting, cut, classes):
    """A network cut as the original does it, layer by layer."""
    new = copy.deepcopy(network)
    if setting != "R":
        for conv in new.convs[:cut]:
            conv.requires_grad_(False)
    if setting in ("FR", "R"):
        for conv in new.convs[cut:]:
            conv.reset_parameters()
    if setting == "FT":
        new.convs = new.convs[:cut]
    new.head = nn.Linear(new.flat_size(new.depth), classes)
    return new


def plain_run(network, examples, setting, cut, amount, repeat, settings):
    """One run with data loaders and the whole network; the original's train_acc and test_acc, and those of the test."""
    data = TensorDataset(examples.inputs, examples.labels)
    held = int(settings.validation * len(data))
    seeded = torch.Generator().manual_seed(settings.split_seed)
    training, validation = random_split(data, [len(data) - held, held], generator=seeded)
    torch.manual_seed(repeat)
    labels = torch.tensor([int(label) for _, label in training])
    each, chosen = int(len(training) * amount / examples.classes), []
    for label in range(examples.classes):
        own = [i for i, other in enumerate(labels.tolist()) if other == label]
        chosen += [own[i] for i in torch.randperm(len(own))[:each].tolist()]
    loader = DataLoader(Subset(training, chosen), batch_size=settings.batch_size, shuffle=True)
    torch.manual_seed(repeat)
    new = cut_plainly(network, setting, cut, examples.classes)
    optimizer = torch.optim.Adam(new.parameters(), lr=settings.learning_rate)
    best, state, waited, epochs = 0.0, copy.deepcopy(new.state_dict()), 0, 0
    for _ in range(settings.epochs):
        epochs += 1
        for x, y in loader:
            optimizer.zero_grad()
            F.nll_loss(new(x).log_softmax(1), y).backward()
            optimizer.step()
        accuracy(new, loader)
        reached = accuracy(new, DataLoader(validation, batch_size=settings.batch_size))
        if reached > best:
            best, state, waited = reached, copy.deepcopy(new.state_dict()), 0
            continue
        waited += 1
        if waited >= settings.patience:
            new.load_state_dict(state)
            break
    test = TensorDataset(examples.test_inputs, examples.test_labels)
    shares = [accuracy(new, DataLoader(part, batch_size=50)) for part in (loader.dataset, data, test)]
    return dict(zip(("train_accuracy", "seen_accuracy", "accuracy"), shares, strict=True)), len(chosen), epochs


@pytest.mark.parametrize(
    ("setting", "cut"), [*product(("FR", "FT"), (0, 1, 2, 4)), *product(("F", "R"), (0, 3)), ("F", 4)]
)
def test_a_run_is_that_of_plain_loaders_on_the_whole_network(setting, cut):
    examples, network = blobs(), pretrained()
    own = Cut.of(network, OriginalData.of(examples, SMALL), ARMS[setting], cut)
    for amount, repeat in ((0.1, 0), (0.5, 1), (1.0, 2)):
        wanted, count, epochs = plain_run(network, examples, setting, cut, amount, repeat, SMALL)
        found = own.run(amount, repeat, SMALL)
        assert {name: found[name] for name in wanted} == wanted
        assert (found["n"], found["epochs"], found["failed"]) == (count, epochs, None)
        assert found["updates"] == epochs * -(-count // SMALL.batch_size)


def test_the_last_network_is_kept_where_the_epochs_run_out_and_the_best_where_patience_does():
    examples, network = blobs(), pretrained()
    own = Cut.of(network, OriginalData.of(examples, SMALL), "frozen", 4)
    found = {}
    for patience in (1, 2, 100):
        settings = OriginalSettings(batch_size=16, epochs=6, patience=patience, learning_rate=0.5)
        found[patience] = own.run(0.5, 3, settings)
        wanted, _, epochs = plain_run(network, examples, "FR", 4, 0.5, 3, settings)
        assert found[patience]["seen_accuracy"] == wanted["seen_accuracy"]
        assert found[patience]["epochs"] == epochs
    assert found[1]["epochs"] < found[100]["epochs"] == 6
    assert found[1]["seen_accuracy"] != found[100]["seen_accuracy"]


def test_a_run_changes_neither_the_pretrained_network_nor_the_global_generator():
    network, before = pretrained(), torch.random.get_rng_state()
    state = copy.deepcopy(network.state_dict())
    data = OriginalData.of(blobs(), SMALL)
    before = torch.random.get_rng_state()
    for arm in KINDS:
        Cut.of(network, data, arm, 2).run(0.5, 0, SMALL)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_names_for_one_program():
    """What `arms_of` takes for the same arm gives the same run."""
    network, data = pretrained(), OriginalData.of(blobs(), SMALL)
    for first, second in (
        [("scratch", 0), ("frozen", 0)],
        [("scratch", 0), ("warm", 0)],
        [("finetune", 4), ("frozen+rest", 0)],
        [("finetune", 4), ("warm", 4)],
        [("frozen", 4), ("truncated", 4)],
        [("frozen", 4), ("frozen+rest", 4)],
    ):
        runs = [Cut.of(network, data, *arm).run(0.5, 1, SMALL) for arm in (first, second)]
        assert runs[0] == runs[1]


def test_maps_that_do_not_fit_in_memory_are_computed_where_needed(monkeypatch):
    network, images, rows = pretrained(), blobs().inputs, torch.tensor([3, 0, 90])
    kept = Maps(network, images, 3)
    monkeypatch.setattr("transfer.original.CACHE_BYTES", 1000)
    anew = Maps(network, images, 3)
    assert (len(kept.images[0]), len(anew.images[0])) == (4, 1)
    assert torch.allclose(kept[rows], anew[rows], atol=1e-6)
    assert torch.equal(anew[rows], network.prefix(images[rows], 3))


def test_what_cannot_be_cut_or_drawn_is_refused():
    network, data = pretrained(), OriginalData.of(blobs(), SMALL)
    for arm, cut in (("moved", 2), ("frozen", 5), ("frozen", -1)):
        with pytest.raises(InputError):
            cut_network(network, arm, cut, 3)
    for amount in (0.001, 0, 1.5):
        with pytest.raises(InputError, match="class"):
            data.subset(amount, 0)


def test_a_run_whose_loss_is_not_finite_has_failed():
    data = OriginalData.of(blobs(), SMALL)
    data.seen[data.training] = float("nan")
    found = Cut.of(pretrained(), data, "frozen", 2).run(0.5, 0, SMALL)
    assert "epoch 1" in found["failed"]
    assert found["accuracy"] is None


def test_settings_and_repeats_are_those_of_the_original():
    assert [repeats_of(amount) for amount in (0.001, 0.01, 0.1, 0.5, 1.0)] == [25, 25, 20, 5, 5]
    own, cifar = OriginalSettings.of("mnist"), OriginalSettings.of("cifar_random", pretrained="abc")
    assert (own.batch_size, own.epochs, own.patience) == (4096, 40, 6)
    assert (cifar.batch_size, cifar.epochs, cifar.patience) == (64, 10, 5)
    assert own.hash != cifar.hash
    assert cifar.as_dict()["pretrained"] == "abc"


def study(directory, kinds=("scratch", "frozen"), repeats=(0, 1), **others):
    networks = ConvNetworks(channels=4)
    settings = OriginalSettings(epochs=3, network=networks.facts())
    arms, execution = arms_of(kinds, [0, 4], 6), Execution(progress=False)
    given = {"amounts": [0.001, 0.1, 1.0], "repeats": repeats, "execution": execution} | others
    return OriginalStudy([load_task("digits")], networks, settings, Results(directory), arms, **given)


def test_a_study_resumes_and_gives_the_same_bytes(tmp_path):
    whole = study(tmp_path / "whole")
    assert "0.1 %" in whole.left_out()[0]
    whole.train()
    study(tmp_path / "parts", kinds=("scratch",)).train()
    study(tmp_path / "parts").train()
    files = [(tmp_path / name / "records.jsonl").read_bytes() for name in ("whole", "parts")]
    assert files[0] == files[1]
    study(tmp_path / "whole").train()
    assert (tmp_path / "whole" / "records.jsonl").read_bytes() == files[0]
    table = long_table(whole.records())
    assert len(table) == 2 * 2 * 2
    assert set(table["protocol"]) == {"original"}
    assert table[["accuracy", "balanced_accuracy", "seen_accuracy"]].notna().all(axis=None)
    assert whole.write() == (tmp_path / "whole" / "report.txt").read_text("utf-8")


def test_an_amount_has_no_more_repeats_than_the_original(tmp_path):
    own = study(tmp_path, kinds=("truncated",), repeats=range(7))
    own.train()
    counts = long_table(own.records()).groupby("amount")["repeat"].nunique()
    assert counts.to_dict() == {0.1: 7, 1.0: 5}


def test_a_study_starts_from_the_network_that_is_given(tmp_path):
    """Whose head may have other classes, or be of images of another size: it is not used."""
    state = ConvClassifier(1, 8, 5, channels=4).state_dict()
    own = study(tmp_path, kinds=("frozen",), pretrained=state | {"head.weight": torch.zeros(3, 64)})
    own.train()
    network = ConvClassifier(1, 8, 5, channels=4)
    network.load_state_dict(state)
    data = OriginalData.of(own.tasks[0].finetuning(), own.settings)
    for record in (r for r in own.records() if r["arm"] == "frozen"):
        found = Cut.of(network, data, "frozen", record["cut"]).run(record["amount"], record["repeat"], own.settings)
        assert record["seen_accuracy"] == {str(found["updates"]): found["seen_accuracy"]}


def test_a_study_refuses_other_arms_and_networks(tmp_path):
    with pytest.raises(InputError, match="moved"):
        study(tmp_path / "a", kinds=("moved",))
    other = ConvClassifier(3, 8, 5, channels=4).state_dict()
    with pytest.raises(InputError, match="pretrained"):
        study(tmp_path / "b", pretrained=other).train()


@pytest.fixture(scope="module")
def published():
    """MNIST's pretrained network and results of the original, and the data."""
    if not DATA:
        pytest.skip("TRANSFER_DATA names no folder with MNIST and the original's files")
    found = sorted(Path(DATA).rglob("MNIST/pretrained_models/regular_classes.pth"))
    if not found:
        pytest.skip("TRANSFER_DATA has no MNIST/pretrained_models/regular_classes.pth of the original")
    find_images("mnist", DATA)
    network = ConvClassifier(1, 28, 5, channels=64)
    network.load_state_dict(load_original(found[0]))
    file = found[0].parents[1] / "results" / "cuts_regular_classes_FR.json"
    runs = {(r["sampled_percentage"], r["sampled_cut_point"], r["repeat"]): r for r in json.loads(file.read_text())[1:]}
    return network, OriginalData.of(load_task("mnist", DATA).finetuning(), OriginalSettings()), runs


@pytest.mark.parametrize(
    ("cut", "amounts", "within"), [(6, {0.001: 78.35, 0.01: 88.29, 0.1: 90.04}, 0.005), (5, {0.001: 82.33}, 0.05)]
)
def test_the_published_medians_come_out(published, cut, amounts, within):
    network, data, runs = published
    own = Cut.of(network, data, "frozen", cut)
    for amount, median in amounts.items():
        found = [own.run(amount, repeat, OriginalSettings()) for repeat in range(repeats_of(amount))]
        values = [100 * run["seen_accuracy"] for run in found]
        assert abs(statistics.median(values) - median) <= within
        wanted = [100 * runs[amount, cut, repeat]["test_acc"] for repeat in range(len(found))]
        assert max(abs(a - b) for a, b in zip(values, wanted, strict=True)) <= within
