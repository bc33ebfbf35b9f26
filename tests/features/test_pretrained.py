"""Models that cannot be used are refused in a sentence; loading one is quiet."""

import json
import logging
import os
import shutil

import huggingface_hub
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

from config import InputError
from features import load_extractor
from tests.conftest import MEAN, VIT, save_model

# Models that cannot be used


def refused(name) -> str:
    """The one sentence with which a model is refused."""
    with pytest.raises(InputError) as caught:
        load_extractor(name)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert ". " not in message
    return message


def test_a_checkpoint_that_lacks_weights_is_refused(copy):
    weights = load_file(copy / "model.safetensors")
    lost = [key for key in weights if "layer" in key and key.endswith("weight")][:2]
    kept = {key: value for key, value in weights.items() if key not in lost}
    save_file(kept, copy / "model.safetensors", metadata={"format": "pt"})
    assert " 2 " in refused(copy)  # as many as are missing


def change(folder, name, **entries):
    """Change entries of a JSON file."""
    facts = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**facts, **entries}))


PROCESSOR = "preprocessor_config.json"


def test_a_processor_that_resizes_nothing_takes_images_of_the_right_size(copy):
    change(copy, PROCESSOR, do_resize=False)
    extractor = load_extractor(copy)
    pixels = extractor.preprocessing(Image.new("RGB", (32, 32)))
    assert extractor(pixels[None]).shape == (1, 24)


DAMAGES = {
    "another architecture": lambda folder: change(folder, "config.json", model_type="beit"),
    "other sizes than the weights": lambda folder: change(folder, "config.json", intermediate_size=40),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "torn weights": lambda folder: os.truncate(folder / "model.safetensors", 20_000),
    "damaged config.json": lambda folder: (folder / "config.json").write_text("{"),
    "damaged preprocessor_config.json": lambda folder: (folder / "preprocessor_config.json").write_text("{"),
    "no configuration": lambda folder: (folder / "config.json").write_text("null"),
    "no width": lambda folder: change(folder, "config.json", hidden_size=0),
    "a width in words": lambda folder: change(folder, "config.json", hidden_size="wide"),
    "no patches": lambda folder: change(folder, "config.json", patch_size=0),
    "an unknown activation": lambda folder: change(folder, "config.json", hidden_act="magic"),
    "images of another size": lambda folder: change(folder, PROCESSOR, size={"height": 48, "width": 48}),
    "images of no size": lambda folder: change(folder, PROCESSOR, size={"height": 0, "width": 0}),
    "a mean of two": lambda folder: change(folder, PROCESSOR, image_mean=[0.5, 0.5]),
    "a mean in words": lambda folder: change(folder, PROCESSOR, image_mean="grey"),
    "an unknown resampling": lambda folder: change(folder, PROCESSOR, resample=77),
    "nothing": lambda folder: shutil.rmtree(folder),
    "an empty folder": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_directory_without_a_usable_model_is_refused(copy, damage):
    DAMAGES[damage](copy)
    assert str(copy) in refused(copy)


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
def test_a_model_that_brings_code_is_refused_and_its_code_is_not_run(copy, file, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    (copy / "own.py").write_text(f"open({str(copy / 'was run')!r}, 'w')")
    brought = {"AutoConfig": "own.C", "AutoModel": "own.M", "AutoImageProcessor": "own.P"}
    change(copy, file, auto_map=brought, model_type="own", image_processor_type="Own")
    assert "code of its own" in refused(copy)
    assert not (copy / "was run").exists()


@pytest.fixture
def offline(vit, tmp_path, monkeypatch):
    """No network, and a hub cache of three models: one complete, two without a preprocessor, one of them known so."""
    commit = "0" * 40
    large = save_model(transformers.ViTConfig(**{**VIT, "image_size": 224, "patch_size": 112}), tmp_path / "large")
    for name in ("complete", "without", "unknown"):
        folder = tmp_path / f"models--me--{name}"
        shutil.copytree(vit if name == "complete" else large, folder / "snapshots" / commit)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(commit)
        if name != "complete":
            (folder / "snapshots" / commit / "preprocessor_config.json").unlink()
        if name == "without":  # as the hub's cache notes that it asked and there was none
            (folder / ".no_exist" / commit).mkdir(parents=True)
            for file in ("preprocessor_config.json", "processor_config.json"):
                (folder / ".no_exist" / commit / file).touch()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(("name", "named"), [("me/nowhere", "VIT_MODEL"), ("me/unknown", "'preprocessor_config.json'")])
def test_a_hub_name_that_cannot_be_loaded_is_refused(name, named, capfd):
    """Nor is no network taken for no preprocessor."""
    message = refused(name)
    assert f"'{name}'" in message
    assert named in message
    assert capfd.readouterr() == ("", "")


def test_a_hub_that_cannot_be_reached_is_asked_once(tmp_path, monkeypatch):
    asked = []

    def unreachable(url, **_):
        asked.append(url)
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", unreachable)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert "no route" in refused("me/nowhere")
    assert len(asked) == 1


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(("name", "size", "mean"), [("complete", 32, MEAN), ("without", 224, [0.5] * 3)])
def test_a_hub_model_in_the_cache_needs_no_network(name, size, mean, capfd):
    """The default preprocessing is taken where it is known that there is none."""
    extractor = load_extractor(f"me/{name}")
    facts = extractor.preprocessing.describe()
    assert (extractor.name, facts["size"], facts["mean"]) == (f"me/{name}", {"height": size, "width": size}, mean)
    assert capfd.readouterr() == ("", "")


# Loading is quiet


@pytest.fixture
def said():
    """What transformers logs (its handler bypasses pytest's capture); its state is restored afterwards."""
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    messages, handler = [], logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    transformers_logging.add_handler(handler)
    yield messages
    transformers_logging.remove_handler(handler)
    transformers_logging.set_verbosity(before[0])
    (transformers_logging.enable_progress_bar if before[1] else transformers_logging.disable_progress_bar)()


@pytest.fixture
def with_head(copy):
    """Like most checkpoints on the hub: a complete classifier, with a head and without a pooler."""
    weights = {f"vit.{k}": v for k, v in load_file(copy / "model.safetensors").items() if "pooler" not in k}
    weights |= {"classifier.weight": torch.zeros(5, 24), "classifier.bias": torch.zeros(5)}
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def test_nothing_is_printed_or_logged_on_loading(with_head, said, capfd):
    transformers_logging.set_verbosity_warning()
    transformers_logging.enable_progress_bar()
    transformers.AutoModel.from_pretrained(with_head)
    assert said  # transformers alone has a lot to say
    assert capfd.readouterr() != ("", "")
    said.clear()
    load_extractor(with_head)
    assert said == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("bars", "good"), [(True, True), (False, True), (True, False), (False, False)])
@pytest.mark.usefixtures("said")
def test_what_others_have_set_of_logging_is_restored(with_head, tmp_path, bars, good):
    transformers_logging.set_verbosity_info()
    (transformers_logging.enable_progress_bar if bars else transformers_logging.disable_progress_bar)()
    hub = logging.getLogger("huggingface_hub").level
    if good:
        load_extractor(with_head)
    else:
        with pytest.raises(InputError):
            load_extractor(tmp_path / "nothing")
    assert transformers_logging.get_verbosity() == transformers_logging.INFO
    assert transformers_logging.is_progress_bar_enabled() is bars
    assert logging.getLogger("huggingface_hub").level == hub


def test_loading_leaves_the_random_generators_alone(vit):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_extractor(vit)
    assert torch.equal(torch.rand(3), expected)
