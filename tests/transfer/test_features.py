"""The study on features: what is pretrained and fine-tuned on what, and that its networks equal the plain loop."""

from dataclasses import replace

import pytest
import torch

from engine import generator
from storage import Results
from study import Execution
from tests.factories import save_blobs
from transfer import (
    KINDS,
    FeatureNetworks,
    FeatureTask,
    TransferSettings,
    TransferStudy,
    arms_of,
    feature_tasks,
)
from transfer.study import beginning, stacked
from transfer.training import Course, draw_batches, draw_start, train_one

NETWORKS = FeatureNetworks((6, 5, 4))
SEEDS, CHECKPOINTS = (0, 3), (5, 50)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("features") / "blobs.safetensors"


@pytest.fixture(scope="module")
def features(path):
    return save_blobs(path, per_cell=30)


def test_each_domain_is_held_out_in_turn_and_a_fifth_of_it_is_the_test(features, path):
    tasks = feature_tasks(path)
    assert [task.name for task in tasks] == ["blobs-art", "blobs-photo", "blobs-sketch"]
    before, after = tasks[1].pretraining(), tasks[1].finetuning()
    assert (len(before), len(before.test_labels), len(after), len(after.test_labels)) == (144, 36, 72, 18)
    assert torch.equal(after.test_labels.bincount(), torch.tensor([6, 6, 6]))
    own = features.features[features.domains == 1].float()
    found = torch.cat([after.inputs, after.test_inputs])
    assert torch.equal(found.sort(0).values, own.sort(0).values)  # every image of the domain, once
    assert torch.equal(after.inputs, feature_tasks(path)[1].finetuning().inputs)  # the split is fixed


@pytest.mark.parametrize("depth", [None, 2, 0])
def test_every_arm_equals_the_plain_loop(features, depth):
    task = FeatureTask(features, "photo")
    found = task.finetuning()
    examples = replace(found, inputs=found.inputs.double(), test_inputs=found.test_inputs.double())
    whole, network = NETWORKS.outline(examples), NETWORKS.outline(examples, depth)
    if depth is None:
        arms = [arm for arm in arms_of(KINDS, [2], 3) if arm.kind != "truncated"]
    else:
        arms = arms_of(["truncated"], [depth], 3)
    made = []
    for seed in SEEDS:
        before, after = (draw_start(whole, generator(seed, name)) for name in ("start", "final"))
        made += [beginning(NETWORKS, network, arm, before, after, seed) for arm in arms]
    start, freeze = (stacked(each, examples.inputs, len(arms)) for each in zip(*made, strict=True))
    orders = [draw_batches(torch.arange(72), 16, CHECKPOINTS[-1], generator(seed, "order")) for seed in SEEDS]
    course = Course(examples, torch.stack(orders), CHECKPOINTS, 1e-2)
    params, right = NETWORKS.train(network, start, freeze, 0, course)
    for s, order in enumerate(orders):
        for v, arm in enumerate(arms):
            own = [{name: value[s, v] for name, value in values.items()} for values in (start, freeze)]
            wanted, counts = train_one(network, *own, examples, order, CHECKPOINTS, 1e-2)
            assert torch.equal(right[s, v], counts)
            assert all((params[name][s, v] - value).abs().max() <= 1e-9 for name, value in wanted.items()), arm


def test_a_study_of_all_domains_is_one_directory(features, path, tmp_path):
    settings = TransferSettings(60, 100, 16, 1e-2, NETWORKS.facts())
    arms, execution = arms_of(KINDS, range(4), NETWORKS.depth), Execution(progress=False)
    given = NETWORKS, settings, Results(tmp_path), arms, [0.1, 1.0], range(2)
    study = TransferStudy(feature_tasks(path), *given, execution=execution)
    study.train()
    table = study.table()
    assert len(table) == 3 * len(arms) * 2 * 2 * 2
    last = table[(table["updates"] == 60) & (table["amount"] == 1)].groupby("arm")["accuracy"].mean()
    assert last["finetune"] > last["truncated"] - 0.2
    assert last["finetune"] > 0.8
    assert set(table["task"]) == {task.name for task in study.tasks}
    assert {"blobs-art", "blobs-photo", "blobs-sketch"} == study.about()["chance"].keys()
    whole, task = table[table["arm"] == "zero-shot"], study.tasks[1]
    assert (whole.groupby(["task", "repeat"])["accuracy"].nunique() == 1).all()  # at every amount and checkpoint
    after, network = study.finetuning(task), NETWORKS.outline(study.pretraining(task)).to_empty(device="cpu")
    for repeat, (_, params) in study.networks_of(task).items():
        network.load_state_dict(params)
        right = network(after.test_inputs).argmax(1) == after.test_labels
        own = whole[(whole["task"] == task.name) & (whole["repeat"] == repeat)]
        assert own["accuracy"].iloc[0] == pytest.approx(right.double().mean().item())
    report = " ".join(study.write().split())
    assert "blobs-photo: EXPLORATORY, the pretrained network as it is (zero-shot) has" in report
