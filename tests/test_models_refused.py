"""Models that cannot be used are refused in a sentence; loading one is quiet."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from conftest import MEAN, save_model
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

from config import InputError
from models import ViTFeatureExtractor

ROOT = Path(__file__).resolve().parent.parent

# --- models that cannot be used -----------------------------------------------------------------------------


def refused(name) -> str:
    """The one sentence with which a model is refused."""
    with pytest.raises(InputError) as caught:
        ViTFeatureExtractor.from_pretrained(name)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert ". " not in message
    return message


@pytest.mark.parametrize("kind", ["convnext", "swin"])
def test_a_model_without_a_cls_token_is_refused(kind, tmp_path):
    if kind == "convnext":
        model_config = transformers.ConvNextConfig(hidden_sizes=[8] * 4, depths=[1] * 4, image_size=32)
    else:
        sizes = {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
        model_config = transformers.SwinConfig(image_size=32, patch_size=4, **sizes)
    assert "no CLS token" in refused(save_model(model_config, tmp_path / kind))


def test_a_checkpoint_that_lacks_weights_is_refused(copy):
    weights = load_file(copy / "model.safetensors")
    lost = [key for key in weights if "layer" in key and key.endswith("weight")][:2]
    kept = {key: value for key, value in weights.items() if key not in lost}
    save_file(kept, copy / "model.safetensors", metadata={"format": "pt"})
    message = refused(copy)
    assert "lack 2 of its parameters" in message


def test_a_checkpoint_of_another_architecture_is_refused(copy):
    facts = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**facts, "model_type": "beit"}))
    assert str(copy) in refused(copy)


def test_a_directory_that_is_not_there_is_refused(tmp_path):
    assert "VIT_MODEL" in refused(tmp_path / "nothing")


def test_a_directory_without_a_model_is_refused(tmp_path):
    assert str(tmp_path) in refused(tmp_path)


def test_a_directory_without_weights_is_refused(copy):
    (copy / "model.safetensors").unlink()
    assert str(copy) in refused(copy)


def test_a_torn_weights_file_is_refused(copy):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:20_000])
    assert str(copy) in refused(copy)


def test_weights_of_other_sizes_than_the_configuration_are_refused(copy):
    facts = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**facts, "intermediate_size": 40}))
    assert str(copy) in refused(copy)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_a_damaged_configuration_is_refused(copy, name):
    (copy / name).write_text("{")
    assert str(copy) in refused(copy)


@pytest.fixture
def offline(vit, tmp_path, monkeypatch):
    """No network, and a hub cache of three models: one complete, two without a preprocessor, one of them known so."""
    commit = "0" * 40
    for name in ("complete", "without", "unknown"):
        folder = tmp_path / f"models--me--{name}"
        shutil.copytree(vit, folder / "snapshots" / commit)
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
def test_a_hub_name_that_cannot_be_had_is_refused(capfd):
    message = refused("me/nowhere")
    assert message.startswith("The model 'me/nowhere' cannot be had")
    assert message.endswith("a local directory that holds config.json and the weights.")
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("offline")
def test_a_hub_model_in_the_cache_needs_no_network(capfd):
    extractor = ViTFeatureExtractor.from_pretrained("me/complete")
    assert extractor.name == "me/complete"
    assert extractor.preprocessing.mean == MEAN
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("offline")
def test_a_hub_model_in_the_cache_that_is_known_to_have_no_preprocessor_gets_the_default():
    preprocessing = ViTFeatureExtractor.from_pretrained("me/without").preprocessing
    assert preprocessing.describe()["size"] == {"height": 224, "width": 224}


@pytest.mark.usefixtures("offline")
def test_no_network_is_not_taken_for_no_preprocessor():
    assert refused("me/unknown") == (
        "'preprocessor_config.json' of 'me/unknown' cannot be had: no network, and it is not in the cache."
    )


# --- manners ------------------------------------------------------------------------------------------------


@pytest.fixture
def said():
    """What transformers logs (its own handler writes past pytest's capture); its state is put back afterwards."""
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
    """As most checkpoints on the hub: of a whole classifier, with a head and without a pooler."""
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
    ViTFeatureExtractor.from_pretrained(with_head)
    assert said == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("bars", [True, False])
@pytest.mark.parametrize("good", [True, False])
@pytest.mark.usefixtures("said")
def test_what_others_have_set_of_logging_is_restored(with_head, tmp_path, bars, good):
    transformers_logging.set_verbosity_info()
    (transformers_logging.enable_progress_bar if bars else transformers_logging.disable_progress_bar)()
    hub = logging.getLogger("huggingface_hub").level
    if good:
        ViTFeatureExtractor.from_pretrained(with_head)
    else:
        with pytest.raises(InputError):
            ViTFeatureExtractor.from_pretrained(tmp_path / "nothing")
    assert transformers_logging.get_verbosity() == transformers_logging.INFO
    assert transformers_logging.is_progress_bar_enabled() is bars
    assert logging.getLogger("huggingface_hub").level == hub


def test_loading_leaves_the_random_generators_alone(vit):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    ViTFeatureExtractor.from_pretrained(vit)
    assert torch.equal(torch.rand(3), expected)


def test_import_is_quiet_and_light():
    """Nothing printed or seeded; transformers, which takes seconds, only when a model is loaded."""
    code = "import sys, models; assert 'transformers' not in sys.modules; assert 'matplotlib' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
