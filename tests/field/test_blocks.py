"""Methods of the field on the last blocks of a ViT: each in its own form, and a comparison from end to end."""

import copy
import os
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn import Identity
from transformers import Dinov2Config, Dinov2Model

from config import InputError, Settings
from engine import Batch, SplitFeatures, networks
from field import ALGORITHMS, Comparison, write
from field.algorithms.experts import load_balance
from field.figures import tensor_names
from field.train import train_method
from models import BackboneTail
from study import ERM, MaskSource, Study
from tests.factories import everything, make_run, token_blobs
from trainer_phase2 import HoldoutMasks, train_holdout

SETTINGS = Settings.current(trained_blocks=1, batch_size=8, ph1_num_epochs=2, ph2_num_epochs=2)
SEEDS = (0, 1)
EVERY_KIND = ["CorGrad", "DMG", "GMoE", "ImportanceMask", "LFME", "Mixup", "SWAD"]  # of what is recorded and given


@pytest.fixture(scope="module")
def data():
    return token_blobs()


@pytest.fixture(scope="module")
def compared(data, tmp_path_factory):
    comparison = Comparison(make_run(data, tmp_path_factory.mktemp("blocks"), 2, SETTINGS), EVERY_KIND)
    comparison.train()
    return comparison


@pytest.mark.parametrize("head_start", ["probe", "random"])
def test_erm_is_the_arm_erm_with_its_two_learning_rates(data, head_start):
    settings = replace(SETTINGS, head_start=head_start)
    split = SplitFeatures.from_features(data, settings, dtype=torch.float64)
    network = split.network(())
    tracked = network.tracked(dict(network.named_parameters()))
    masks = HoldoutMasks([], [], [torch.zeros(2, *layer.shape, dtype=torch.bool) for layer in tracked], None)
    source = MaskSource("sketch", SEEDS, lambda settings: masks, lambda settings: None, network)
    arm = train_holdout(split, "sketch", SEEDS, [ERM.masking(source, settings)])
    method = train_method(split, ["sketch"], SEEDS, ALGORITHMS["ERM"], settings)
    for name, value in method.params.items():
        assert torch.allclose(value, arm.final[name][:, 0], rtol=0, atol=1e-9), name
    assert torch.equal(method.correct, arm.correct[:, 0])
    assert torch.allclose(method.loss, arm.loss[:, 0], rtol=0, atol=1e-9)


def test_a_comparison_trains_writes_and_resumes(compared, data):
    text, directory = write(compared), compared.run.results.directory
    assert text.startswith("Methods of the field on the last block of the ViT")
    assert "Classifier after the last block of the ViT: 12 -> 3" in text
    for name in (*EVERY_KIND, "ERM", "ERMBalanced"):
        assert name in text
        assert (directory / "histories" / f"compare_{name}_0_art.npz").is_file()
    assert "Ensemble (" in text
    before = everything(directory)
    again = Comparison(make_run(data, directory, 2, SETTINGS), EVERY_KIND)
    assert not again.missing()
    again.train()
    assert write(again) == text
    assert everything(directory) == before


def test_erm_and_the_mask_have_the_records_of_the_study(compared, data, tmp_path):
    study = Study(make_run(data, tmp_path, 2, SETTINGS))
    study.phase1()
    study.phase2()
    names = {"erm": "ERM", "importance": "ImportanceMask"}
    wanted = {
        (names[r["algorithm"]], r["holdout"], r["seed"], r["selection"]): r["accuracy"] for r in study.run.records()
    }
    found = {(r["algorithm"], r["holdout"], r["seed"], r["selection"]): r["accuracy"] for r in compared.run.records()}
    assert wanted
    assert {key: found[key] for key in wanted} == wanted


def test_starts_are_fitted_once(data, tmp_path, monkeypatch):
    fits = []
    fit = networks.logistic_regression
    monkeypatch.setattr(networks, "logistic_regression", lambda *args: fits.append(1) or fit(*args))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)  # this process alone
    for split_seed, expected in (("seed", 4), (3, 2)):  # seeds × holdouts; or one split for all
        run = make_run(data, tmp_path / str(split_seed), 2, replace(SETTINGS, split_seed=split_seed), ["art", "photo"])
        Comparison(run, ["ERM", "SD", "Mixup"]).train()
        assert len(run.data.probes) == len(fits) == expected
        fits.clear()


def test_a_method_that_needs_one_block_is_refused_on_two_and_left_out_of_all(data, tmp_path):
    blocks, norm = [*data.tail.blocks, *data.tail.blocks], data.tail.norm
    header = {**data.header, "tokens": {**data.header["tokens"], "blocks": 2}}
    two = replace(data, tail=BackboneTail(blocks, data.tail.arguments * 2, norm, Identity()), header=header)
    run = make_run(two, tmp_path, 2, replace(SETTINGS, trained_blocks=2), ["art"])
    for name, words in (("DMG", "inputs"), ("GMoE", "experts"), ("SFMoE", "experts")):
        with pytest.raises(InputError, match=f"{name} .*{words}.*single block"):
            Comparison(run, [name])
    comparison = Comparison(run, ["SD"])
    comparison.train()
    assert "last 2 blocks of the ViT" in write(comparison, figures=False)


def test_experts_begin_as_copies_of_the_mlp(data):
    split = SplitFeatures.from_features(data, SETTINGS, dtype=torch.float64)
    still = [partial(ALGORITHMS[name], learning_rate=1e-12) for name in ("SFMoE", "ERM")]
    experts, erm = (train_method(split, ["art"], (0,), method, SETTINGS) for method in still)
    assert torch.equal(experts.correct, erm.correct)  # gates sum to 1, so that equal experts are the MLP
    assert experts.params["experts.in.weight"].shape == (1, 4, 16, 12)


def with_swiglu(data):
    """The same tokens before a block whose MLP has a gate."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 3, "use_swiglu_ffn": True}
    model = Dinov2Model(Dinov2Config(**sizes)).eval()
    return replace(data, tail=BackboneTail(model.encoder.layer, [((), {})], model.layernorm, Identity()))


@pytest.mark.parametrize("gated", [False, True])
def test_experts_take_the_place_of_the_mlp_image_by_image(data, gated):
    """Against the module itself with a mixture written out in its block."""
    split = SplitFeatures.from_features(with_swiglu(data) if gated else data, SETTINGS, dtype=torch.float64)
    trained = train_method(split, ["art"], (0,), partial(ALGORITHMS["SFMoE"], learning_rate=0.01), SETTINGS)
    params = {name: value[0] for name, value in trained.params.items()}
    tail = copy.deepcopy(split.network(())).to_empty(device="cpu").double()
    tail.load_state_dict({name: value for name, value in params.items() if name in tail.state_dict()})
    assert ("experts.gate.weight" in params) == gated

    def layer(role, e, row):
        return params[f"experts.{role}.weight"][e] @ row + params[f"experts.{role}.bias"][e]

    def expert(mlp, e, row):
        if gated:
            return layer("out", e, mlp.act_fn(layer("gate", e, row)) * layer("in", e, row))
        return layer("out", e, mlp.activation_fn(layer("in", e, row)))

    def mixture(mlp, inputs, output):
        mixed = []
        for row in inputs[0].flatten(0, 1):
            p = (params["router.weight"] @ row).softmax(0)
            best = p.topk(2).indices.tolist()
            mixed.append(sum(p[e] * expert(mlp, e, row) for e in best) / p[best].sum())
        return torch.stack(mixed).view_as(output)

    tail.blocks[0].mlp.register_forward_hook(mixture)
    tokens = split.tokens[:10].double()
    with torch.no_grad():
        torch.testing.assert_close(trained.method.forward(params, tokens), tail(tokens), rtol=0, atol=1e-7)


def test_the_loss_of_experts_holds_their_load(data):
    split = SplitFeatures.from_features(data, SETTINGS, dtype=torch.float64)
    trained = train_method(
        split, ["art"], (0,), partial(ALGORITHMS["GMoE"], gate_noise=0.0, balance_weight=2.0), SETTINGS
    )
    params, method = {name: value[0] for name, value in trained.params.items()}, trained.method
    batch = Batch(split.tokens[:9].double(), split.labels[:9], split.domains[:9])
    loss, _ = method.loss(params, batch, {}, {"gate": torch.zeros(9, 6).double()})
    logits, probabilities = method.routed_forward(params, batch.features)
    error = torch.nn.functional.cross_entropy(logits, batch.labels)
    assert loss.item() == pytest.approx((error + 2 * load_balance(probabilities)).item(), abs=1e-9)


def test_figures_name_the_tensors_of_a_block(compared):
    names = tensor_names(compared.network)
    assert len(set(names)) == len(names) == len(compared.run.network.state_dict())
    assert {"query weights", "out biases", "norm weights", "layer 1 biases"} <= set(names)
    saved = {path.name for path in (compared.run.results.directory / "plots").glob("*.png")}
    assert {"comparison.png", "conflicts_CorGrad.png", "experts_GMoE_art.png"} <= saved
