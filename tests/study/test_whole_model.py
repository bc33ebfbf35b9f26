"""The whole model, trained from augmented images: equal to the plain loop, and a run from end to end."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import config
from config import ImageSettings, Settings
from engine import SplitFeatures, training_order
from experiment import main
from features import get_features
from importance import weight_rates
from models import FeedforwardClassifier
from study.predict import predict_images
from tests.conftest import make_images
from tests.factories import dated, make_run
from trainer_phase1 import train_network
from trainer_phase2 import Masking, train_holdout

SETTINGS = Settings.current(trained_blocks="all", image_steps=5, ph2_num_epochs=2, ph1_num_epochs=2, batch_size=3)
OPTIONS = ["--set", "TRAINED_BLOCKS=all", "--steps", "3", "--set", "IMAGE_CHECKPOINTS=2", "--set", "IMAGE_BATCH_SIZE=2"]


@pytest.fixture(autouse=True)
def _settings_as_written():
    yield
    config.reset()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images") / "toy", ("art", "photo", "sketch"), per_class=5)


@pytest.fixture(scope="module")
def data(root, vit, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return get_features(root, vit_model=vit, cache_dir=cache, blocks="all", device="cpu", progress=False)


def test_settings_are_domainbeds():
    settings = Settings.current(trained_blocks="all")
    assert isinstance(settings, ImageSettings)
    assert (settings.batch_size, settings.image_steps, settings.backbone_learning_rate) == (32, 5001, 5e-5)
    assert (settings.ph2_lr_important, settings.ph1_learning_rate, settings.ph2_freeze_epoch) == (5e-5, 5e-5, 0)
    assert sum(settings.steps_per_epoch) == 5001
    assert len(settings.steps_per_epoch) == settings.ph2_num_epochs == 17
    assert Settings.from_dict(settings.as_dict()) == settings


def test_features_come_with_images_and_the_model(data):
    assert data.tokens.shape == (30, 3, 32, 32)
    with torch.no_grad():
        features = data.tail(data.tokens[:8])
    torch.testing.assert_close(features, data.features[:8].float(), rtol=2e-3, atol=2e-3)
    assert "images themselves" in data.describe()
    tracked = data.tail.tracked_names
    assert len(tracked) == 2 * 6
    assert {name.split(".")[1] for name in tracked} == {"0", "1"}  # of both blocks, none of the patches


@pytest.mark.parametrize("density", [None, 0.3])
def test_training_equals_the_plain_loop_on_the_same_images(data, density):
    split = SplitFeatures.from_features(data, SETTINGS, dtype=torch.float64)
    network, seed, sources = split.network(()), 4, ["art", "photo"]
    shapes = [layer.shape for layer in network.tracked(dict(network.named_parameters()))]
    draw = torch.Generator().manual_seed(0)
    mask = [torch.rand(1, *shape, generator=draw) < (density or 1.1) for shape in shapes]
    trained = train_holdout(split, "sketch", (seed,), [Masking(mask, SETTINGS)])

    order, images, steps = training_order(split, (seed,), "phase2/sketch", sources, "in", SETTINGS), [], []
    for _ in range(2):
        for rows in order.next_epoch():
            assert rows.shape == (1, 2 * 3)  # three of each source domain
            images.append(split.inputs.augmented(rows, order.augmentation)[0].double())
            steps.append(split.labels[rows[0]])
    assert len(images) == 5
    head = FeedforwardClassifier(24, 2, ())
    plain = split.network(()).with_head(head).double()
    plain.load_state_dict({name: value[0, 0] for name, value in trained.start.items()}, strict=False)
    tracked = dict(plain.named_parameters())
    rates = {
        tracked[name]: weight_rates(layer[0], 0.0) for name, layer in zip(network.tracked_names, mask, strict=True)
    }
    rows = torch.arange(5 * 6).split(6)
    train_network(plain, torch.cat(images), torch.cat(steps), [rows], 5e-5, lambda epoch: rates if density else {})
    for name, value in plain.named_parameters():
        if "k_proj.bias" not in name and "key.bias" not in name:
            assert torch.allclose(value, trained.final[name][0, 0], rtol=0, atol=1e-9), name
    moved = [
        (after - before).abs() > 0
        for before, after in zip(network.tracked(trained.start), network.tracked(trained.final), strict=True)
    ]
    assert all(torch.equal(changed[0, 0], marked[0]) for changed, marked in zip(moved, mask, strict=True))


def test_a_run_trains_resumes_and_classifies(root, vit, tmp_path, capsys, caplog):
    results = tmp_path / "results"
    command = ["run", "--data-root", str(root), "--vit-model", str(vit), *OPTIONS, "--seeds", "2", "--holdouts", "art"]
    command += ["--results-dir", str(results), "--set", f"CACHE_DIR={tmp_path / 'cache'}", "--device", "cpu"]
    assert main(command) == 0
    assert "images themselves" in capsys.readouterr().out
    before = dated(results / "weights")
    assert {"phase2_art_erm.safetensors", "phase2_art_importance.safetensors"} <= {Path(name).name for name in before}
    assert main([*command, "--no-figures"]) == 0
    assert dated(results / "weights") == before  # nothing was trained again
    weights = results / "weights" / "phase2_art_importance.safetensors"
    with caplog.at_level("INFO"):
        found = dict(predict_images(weights, [root / "art"], str(vit), seed=1, batch_size=4))
    assert "with the whole of" in caplog.text
    right = [Path(image).parent.name == classes[0][0] for image, classes in found.items()]
    records = [json.loads(line) for line in (results / "records.jsonl").read_text().splitlines()]
    (own,) = [r for r in records if (r["algorithm"], r["seed"], r["selection"]) == ("importance", 1, "last")]
    assert own["accuracy"]["full"] == sum(right) / len(right)


def test_memory_counts_every_domains_images_and_one_networks_activations(data, tmp_path, monkeypatch):
    needs = []
    monkeypatch.setattr("study.run.check_memory", lambda need, device, lower: needs.append((need, lower)))
    for batch in (3, 6):
        settings = replace(SETTINGS, batch_size=batch)
        run = make_run(data, tmp_path / str(batch), 1, settings, ["art"])
        for networks in (1, 2):
            run.check_memory([("art", (0,))], networks)
    (small, lower), (double, _), (large, _), _ = needs
    assert "IMAGE_BATCH_SIZE" in lower
    images = 2 * 3  # more, of two source domains
    block = 2 * 60 * 24 * 17  # blocks, activations, features, tokens
    assert large - small == 4 * images * (2 * 3 * 32 * 32 + 2 * 2 + block)
    assert double - small == 4 * 10 * run.network.size  # copies of the parameters alone


@pytest.mark.parametrize("command", ["study", "forms", "compare", "columns"])
def test_other_commands_refuse_it_in_a_sentence(command, root, vit, capsys):
    assert main([command, "--data-root", str(root), "--vit-model", str(vit), *OPTIONS[:2]]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "TRAINED_BLOCKS" in line


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["TRAINED_BLOCKS=some"], "TRAINED_BLOCKS must be a number of blocks or 'all'"),
        (["TRAINED_BLOCKS=all", "BLOCK_BATCH_SIZE=3"], "BLOCK_BATCH_SIZE has no effect.*IMAGE_BATCH_SIZE"),
        (["TRAINED_BLOCKS=1", "IMAGE_STEPS=3"], "IMAGE_STEPS has no effect without TRAINED_BLOCKS = 'all'"),
        (["TRAINED_BLOCKS=all", "IMAGE_STEPS=3"], "more IMAGE_CHECKPOINTS"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, words, root, vit, capsys, tmp_path):
    chosen = [part for setting in settings for part in ("--set", setting)]
    where = ["--results-dir", str(tmp_path / "results"), "--data-root", str(root), "--vit-model", str(vit)]
    assert main(["run", *where, *chosen]) == 2
    assert re.search(words, capsys.readouterr().err)
