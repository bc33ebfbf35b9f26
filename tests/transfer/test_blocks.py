"""The study on tokens: layers of a block, what is left of a truncated one, and that networks equal the plain loop."""

from dataclasses import replace

import pytest
import torch

import config
from config import InputError
from engine import generator, tail_halves
from models import BackboneTail
from storage import Results
from study import Execution
from tests.factories import token_blobs
from transfer import (
    KINDS,
    FeatureTask,
    TailNetworks,
    TransferSettings,
    TransferStudy,
    arms_of,
    feature_tasks,
    make_study,
    plan,
)
from transfer.arms import bits
from transfer.features import TokenRows
from transfer.study import beginning, stacked
from transfer.training import Course, draw_batches, train_one

SEEDS, CHECKPOINTS, RATE = (0, 3), (2, 12), 1e-3


@pytest.fixture(scope="module")
def features():
    return token_blobs(per_cell=20)


@pytest.fixture(scope="module")
def networks(features):
    return TailNetworks.of(features, RATE)


@pytest.fixture(scope="module")
def examples(features):
    """Of the domain photo, in float64."""
    found = FeatureTask(features, "photo").finetuning()
    every = slice(None)
    return replace(found, inputs=found.inputs[every].double(), test_inputs=found.test_inputs[every].double())


@pytest.fixture(scope="module")
def pretrained(networks, examples):
    """Parameters before and after what stands for pretraining: every number is another."""
    network = networks.outline(examples)
    before = networks.draw(network, generator(0, "start"))
    noise = generator(0, "noise")
    return before, {name: v + 0.1 * torch.randn(v.shape, generator=noise) for name, v in before.items()}


def test_tokens_are_read_when_they_are_asked_for(features):
    task = FeatureTask(features, "photo")
    before, after = task.pretraining(), task.finetuning()
    assert isinstance(after.inputs, TokenRows)
    assert before.inputs.shape == (96, *features.tokens.shape[1:])
    own = features.tokens[features.domains == features.domain_names.index("photo")].float()
    found = torch.cat([after.inputs[torch.arange(len(after))], after.test_inputs[:]])
    assert found.dtype == torch.float32
    assert torch.equal(found.flatten(1).sort(0).values, own.flatten(1).sort(0).values)  # every image, once
    pair = torch.tensor([[1, 2], [3, 1]])
    assert torch.equal(after.inputs[pair][1, 1], after.inputs[1])
    assert after.inputs.to("cpu").tokens is features.tokens  # nothing is copied


def test_layers_are_attention_and_mlp_and_hold_every_parameter_once(networks, examples):
    network = networks.outline(examples)
    params = networks.draw(network, generator(0, "start"))
    attention, mlp, head = networks.layers(params)
    assert networks.depth == 2
    names = [name for layer in (attention, mlp, head) for name in layer.names]
    assert sorted(names) == sorted(params)
    assert len(names) == len(set(names))
    assert set(attention.weights + mlp.weights) == set(network.tracked_names)
    assert len(attention.weights) == 4
    assert {name.split(".")[2] for name in attention.names} == {"attention", "layernorm_before"}
    assert {name for name in mlp.names if name.startswith("norm.")} == {"norm.weight", "norm.bias"}
    for name, parameter in network.named_parameters():  # what is fresh is what the backbone came with
        assert name.startswith("head.") or torch.equal(params[name], parameter)


@pytest.mark.parametrize("shortcut", [True, False])
@pytest.mark.parametrize(
    ("kinds", "cuts", "depth"),
    [
        ([kind for kind in KINDS if kind not in ("truncated", "zero-shot")], [1], None),
        (["frozen", "zero-shot"], [2], None),
        (["truncated"], [0], 0),
        (["truncated"], [1], 1),
    ],
)
def test_every_arm_equals_the_plain_loop(networks, examples, pretrained, kinds, cuts, depth, shortcut):
    made = networks if shortcut else replace(networks, shortcut=None)
    network, arms = made.outline(examples, depth), arms_of(kinds, cuts, 2)
    (prefix,) = {made.prefix(arm) for arm in arms}
    assert prefix == (0 if cuts == [1] and depth is None else 2)  # trained together
    begun = [beginning(made, network, arm, *pretrained, seed) for seed in SEEDS for arm in arms]
    start, freeze = (stacked(each, examples.inputs, len(arms)) for each in zip(*begun, strict=True))
    rows = torch.arange(len(examples))
    orders = [draw_batches(rows, 16, CHECKPOINTS[-1], generator(seed, "order")) for seed in SEEDS]
    course = Course(examples, torch.stack(orders), CHECKPOINTS, RATE)
    params, right = made.train(network, start, freeze, prefix, course)
    for s, order in enumerate(orders):
        for v, arm in enumerate(arms):
            own = [{name: value[s, v] for name, value in values.items()} for values in (start, freeze)]
            wanted, counts = train_one(network, *own, examples, order, CHECKPOINTS, RATE)
            assert torch.equal(right[s, v], counts)
            for name, value in wanted.items():
                assert (params[name][s, v] - value).abs().max() <= 1e-7, (arm.name, name)
                assert torch.equal(params[name][s, v][freeze[name][s, v]], start[name][s, v][freeze[name][s, v]])


@pytest.mark.parametrize("prefix", [0, 2])
def test_blocks_and_head_have_their_own_learning_rates(networks, examples, pretrained, prefix):
    made = replace(networks, learning_rate=1e-6)
    network, (arm,) = made.outline(examples), arms_of(["frozen" if prefix else "scratch"], [2], 2)
    begun = beginning(made, network, arm, *pretrained, 0)
    start, freeze = (stacked([each], examples.inputs, 1) for each in begun)
    batches = torch.arange(16)[None, None]
    params, _ = made.train(network, start, freeze, prefix, Course(examples, batches, (1,), 1e-2))
    moved = {name: (params[name] - start[name]).abs().max().item() for name in start}  # Adam's first step: the rate
    for name, distance in moved.items():
        wanted = 1e-2 if name.startswith("head.") else 0 if prefix else 1e-6
        if "k_proj.bias" not in name and "key.bias" not in name:  # which has no gradient
            assert distance == pytest.approx(wanted, rel=0.3), name  # less where a gradient is near its 1e-8


def test_a_tail_of_two_blocks_has_four_layers_and_is_trained_as_by_the_plain_loop(features, examples):
    block, *_ = features.tail.blocks
    tail = BackboneTail([block, block], [((None,), {})] * 2, features.tail.norm, torch.nn.Identity())
    networks = TailNetworks.of(replace(features, tail=tail), RATE)
    assert (networks.depth, networks.shortcut) == (4, None)
    network = networks.outline(examples)
    before = networks.draw(network, generator(0, "start"))
    after = {name: value + 0.01 for name, value in before.items()}
    (arm,) = arms_of(["frozen"], [3], 4)
    start, freeze = beginning(networks, network, arm, before, after, 0)
    frozen = {name for name, mask in freeze.items() if mask.all()}
    assert frozen == {name for layer in networks.layers(start)[:3] for name in layer.names}
    assert {name.split(".")[1] for name in frozen} == {"0", "1"}
    order = draw_batches(torch.arange(len(examples)), 16, 3, generator(0, "order"))
    given = (stacked([each], examples.inputs, 1) for each in (start, freeze))
    params, right = networks.train(network, *given, 0, Course(examples, order[None], (3,), RATE))
    double = {name: value.double() for name, value in start.items()}
    wanted, counts = train_one(network, double, freeze, examples, order, (3,), RATE)
    assert torch.equal(right[0, 0], counts)
    assert all((params[name][0, 0] - value).abs().max() <= 1e-7 for name, value in wanted.items())


def test_a_block_with_a_parameter_of_its_own_is_one_layer(features):
    tail = features.tail.with_head(torch.nn.Identity())
    tail.blocks[0].lambda_2 = torch.nn.Parameter(torch.ones(12))  # as in BEiT, where it scales what the MLP gives
    (half,) = tail_halves(tail)
    assert "blocks.0.lambda_2" in half.names
    assert half.output == ()


@pytest.mark.parametrize("cut", [0, 1])
def test_a_truncated_network_has_nothing_above_its_cut_but_norm_and_head(networks, examples, pretrained, cut):
    (arm,) = arms_of(["truncated"], [cut], 2)
    network = networks.outline(examples, cut)
    start, freeze = beginning(networks, network, arm, *pretrained, 0)
    assert {name for name, mask in freeze.items() if not mask.all()} == {"head.layers.0.weight", "head.layers.0.bias"}
    network.double().load_state_dict(
        {name: torch.empty(p.shape) for name, p in network.named_parameters()} | start, assign=True
    )
    network.double()
    seen, block = examples.inputs, network.blocks[0]
    cls = seen[:, 0]
    if cut == 1:  # attention as the pretrained network has it
        attended = block.attention(block.layernorm_before(seen))
        cls = cls + (attended[0] if isinstance(attended, tuple) else attended)[:, 0]
    wanted = network.head(network.norm(cls))
    assert torch.allclose(network(seen), wanted, atol=1e-12)


def test_weight_wise_arms_mark_as_many_weights_as_attention_has(networks, examples, pretrained):
    layers = networks.layers(pretrained[1])
    size = sum(pretrained[1][name].numel() for name in layers[0].weights)
    found = {}
    for arm in arms_of(["moved", "random", "random_layer", "permuted", "least"], [1], 2):
        keep, freeze = bits(arm, *pretrained, 0, layers, networks.chained)
        names = layers[0].weights + layers[1].weights
        found[arm.kind] = {name: keep[name] for name in names}
        assert sum(int(keep[name].sum()) for name in names) == size
        assert all(torch.equal(keep[name], freeze[name]) for name in keep)
        assert all(keep[name].all() for name in layers[0].others)
        assert not any(keep[name].any() for name in layers[1].others + layers[2].names)
    both = sum(int((mask & found["least"][name]).sum()) for name, mask in found["moved"].items())
    total = sum(mask.numel() for mask in found["moved"].values())
    assert both == max(0, 2 * size - total)  # as few as there can be
    for name, mask in found["moved"].items():
        assert found["random_layer"][name].sum() == mask.sum()
        assert torch.equal(found["permuted"][name].sum(1).sort().values, mask.sum(1).sort().values)
        assert torch.equal(found["permuted"][name].sum(0).sort().values, mask.sum(0).sort().values)


def test_a_study_of_blocks_is_trained_reported_and_resumed(features, networks, tmp_path):
    settings = TransferSettings(30, 40, 16, 1e-2, networks.facts())
    arms, execution = arms_of(KINDS, range(3), networks.depth), Execution(progress=False)
    given = networks, settings, Results(tmp_path), arms, [0.2, 1.0], range(2)
    study = TransferStudy(feature_tasks(features), *given, execution=execution)
    study.train()
    table = study.table()
    assert len(table) == 3 * len(arms) * 2 * 2
    last = table[table["amount"] == 1].groupby("arm")["accuracy"].mean()
    assert last["finetune"] > 0.8
    whole, task = table[table["arm"] == "zero-shot"], study.tasks[1]
    after, network = study.finetuning(task), networks.outline(study.finetuning(task)).to_empty(device="cpu")
    for repeat, (before, params) in study.networks_of(task).items():
        assert any(not torch.equal(before[name], params[name]) for name in network.tracked_names)
        network.load_state_dict(params)
        right = network(after.test_inputs[:]).argmax(1) == after.test_labels
        own = whole[(whole["task"] == task.name) & (whole["repeat"] == repeat)]
        assert own["accuracy"].tolist() == pytest.approx([right.double().mean().item()] * 2)
    assert "the pretrained network as it is (zero-shot) has" in " ".join(study.write().split())
    records = (tmp_path / "records.jsonl").read_bytes()
    study.train()
    assert (tmp_path / "records.jsonl").read_bytes() == records


def test_a_block_that_does_not_say_what_its_modules_do_is_one_layer(features, examples):
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mixed = torch.nn.Linear(12, 12)

        def forward(self, tokens):
            return tokens + self.mixed(tokens)

    tail = BackboneTail([Plain(), Plain()], [((), {})] * 2, torch.nn.LayerNorm(12), torch.nn.Identity())
    networks = TailNetworks.of(replace(features, tail=tail), RATE)
    assert [half.output for half in tail_halves(tail)] == [(), ()]
    assert networks.shortcut is None
    params = networks.draw(networks.outline(examples), generator(0, "start"))
    first, second, _ = networks.layers(params)
    assert first == (("blocks.0.mixed.weight",), ("blocks.0.mixed.bias",))
    assert second.others == ("blocks.1.mixed.bias", "norm.weight", "norm.bias")
    with pytest.raises(InputError, match="cannot be cut short"):
        networks.outline(examples, 1)


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"TRAINED_BLOCKS": "all"}, "trains the last blocks at most"),
        ({"TRAINED_BLOCKS": 1, "SCHEDULER": "tcp://127.0.0.1:1"}, "leave out --scheduler"),
        ({"TRAINED_BLOCKS": 1}, "TRAINED_BLOCKS needs DATA_ROOT"),
    ],
)
def test_what_cannot_be_trained_is_one_sentence(settings, message):
    config.apply(settings)
    with pytest.raises(InputError, match=message):
        make_study("features")


@pytest.fixture
def found(features, monkeypatch):
    """Stands for the features of images, whose blocks are checked before."""

    def found(root, file, device, check_tail):
        assert (root, file) == (config.DATA_ROOT, None)
        check_tail(features.tail)
        return features

    monkeypatch.setattr(plan, "get_features", found)


@pytest.mark.usefixtures("restored", "found")
def test_with_trained_blocks_the_task_on_features_is_on_blocks(tmp_path, monkeypatch):
    config.apply({"TRAINED_BLOCKS": 1, "DATA_ROOT": "pacs", "RESULTS_DIR": str(tmp_path), "DEVICE": "cpu"})
    study = make_study("features", repeats=range(1))
    assert study.results.directory == tmp_path / "transfer" / "blocks"
    assert study.networks.learning_rate == config.BACKBONE_LEARNING_RATE
    assert (study.settings.transfer_updates, study.settings.network["TRAINED_BLOCKS"]) == (300, 1)
    assert {arm.kind for arm in study.arms} == {*KINDS}
    with pytest.raises(InputError, match="Cuts lie in 0 … 2"):
        make_study("features", cuts=[3])
    monkeypatch.setattr("engine.machine.free_memory", lambda device="cpu": 1e3)
    with pytest.raises(InputError, match="lower TRAINED_BLOCKS or the number of arms"):
        make_study("features")


@pytest.mark.usefixtures("restored", "found")
def test_probes_of_blocks_are_refused_before_anything_is_trained(command, tmp_path):
    config.apply({"TRAINED_BLOCKS": 1, "DATA_ROOT": "pacs", "DEVICE": "cpu"})
    code, _, error = command("transfer", "--task", "features", "--probes", "--results-dir", "out")
    assert (code, len(error)) == (2, 1)
    assert "leave --probes out" in error[0]
    assert not (tmp_path / "out" / "weights").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--set", "TRAINED_BLOCKS=1"), "has no effect on digits"),
        (("--data-root", "pacs"), "has no effect on digits"),
        (("--task", "features", "--data", "a", "--data-root", "b"), "exclude each other"),
        (("--task", "features", "--set", "BACKBONE_LEARNING_RATE=1e-3"), "has no effect on features"),
        (("--task", "features", "--vit-model", "x"), "needs --data-root"),
    ],
)
def test_options_of_blocks_that_do_not_fit_are_refused(command, options, message):
    code, _, error = command("transfer", *options)
    assert code == 2
    assert len(error) == 1
    assert message in error[0]
