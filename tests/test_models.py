"""The frozen ViT on tiny random models, and the classifier on top."""

import json
import logging
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.utils import logging as transformers_logging

import config
from config import InputError
from models import FeedforwardClassifier, ImageClassifier, ViTFeatureExtractor

ROOT = Path(__file__).resolve().parent.parent
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
SHAPE = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """Directory of a tiny random ViT with a preprocessor of its own. Read it, don't write to it."""
    folder = tmp_path_factory.mktemp("models") / "tiny-vit"
    torch.manual_seed(0)
    transformers.ViTModel(transformers.ViTConfig(**SHAPE)).save_pretrained(folder)
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=MEAN, image_std=STD)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def copy(vit, tmp_path):
    """A copy of it to damage."""
    return Path(shutil.copytree(vit, tmp_path / "copy"))


def saved(model_config, folder):
    torch.manual_seed(0)
    transformers.AutoModel.from_config(model_config).save_pretrained(folder)
    return folder


def some_pixels(n=3, seed=0):
    return torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def normalized(pixels):
    scaled = pixels.double().numpy() / 255
    return torch.tensor((scaled - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1)), dtype=torch.float32)


# --- classifier ---------------------------------------------------------------------------------------------


def test_the_default_classifier_has_five_hidden_layers_and_four_tracked_matrices():
    model = FeedforwardClassifier(768, 7)
    shapes = [(layer.in_features, layer.out_features) for layer in model.modules() if isinstance(layer, nn.Linear)]
    assert shapes == [(768, 10), (10, 10), (10, 10), (10, 10), (10, 10), (10, 7)]
    tracked = [model.get_parameter(name) for name in model.tracked_names]
    assert [tuple(w.shape) for w in tracked] == [(10, 10)] * 4
    assert sum(w.numel() for w in tracked) == 400


def test_four_hidden_layers_have_three_tracked_matrices():
    assert len(FeedforwardClassifier(768, 7, (10,) * 4).tracked_names) == 3


def test_tracked_matrices_of_unequal_widths_are_those_between_hidden_layers():
    model = FeedforwardClassifier(6, 4, (3, 8, 5))
    assert [tuple(model.get_parameter(name).shape) for name in model.tracked_names] == [(8, 3), (5, 8)]
    assert model(torch.randn(2, 9, 6)).shape == (2, 9, 4)


def test_default_sizes_are_read_when_the_classifier_is_made(monkeypatch):
    monkeypatch.setattr(config, "HIDDEN_SIZES", (4, 4))
    assert len(FeedforwardClassifier(6, 4).tracked_names) == 1


@pytest.mark.parametrize("hidden", [(10,) * 5, (10,) * 4, (3, 8, 5)])
def test_number_of_parameters(hidden):
    sizes = (768, *hidden, 7)
    count = sum((a + 1) * b for a, b in pairwise(sizes))
    assert sum(p.numel() for p in FeedforwardClassifier(768, 7, hidden).parameters()) == count


def test_initialization_is_that_of_linear():
    sizes = (6, 3, 8, 5, 4)
    torch.manual_seed(3)
    model = FeedforwardClassifier(6, 4, (3, 8, 5))
    torch.manual_seed(3)
    layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    expected = [p for layer in layers for p in (layer.weight, layer.bias)]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), expected, strict=True))


def test_forward_is_linear_relu_and_a_linear_at_the_end():
    model = FeedforwardClassifier(6, 4, (3, 8, 5)).double()
    x = torch.randn(7, 6, dtype=torch.float64)
    weights = [p.detach().numpy() for p in model.parameters()]
    hidden = x.numpy()
    for i in range(0, 6, 2):
        hidden = np.maximum(hidden @ weights[i].T + weights[i + 1], 0)
    expected = hidden @ weights[6].T + weights[7]
    np.testing.assert_allclose(model(x).detach().numpy(), expected, rtol=0, atol=1e-12)


# --- feature extractor --------------------------------------------------------------------------------------


def test_features_are_the_cls_token_of_the_last_hidden_state(vit):
    extractor, pixels = ViTFeatureExtractor.from_pretrained(vit), some_pixels()
    features = extractor(pixels)
    reference = transformers.ViTModel.from_pretrained(vit).eval()
    with torch.no_grad():
        expected = reference(pixel_values=normalized(pixels)).last_hidden_state[:, 0]
    assert features.shape == (3, 24)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)
    assert (features[0] - features[1]).abs().max() > 1e-3


def test_whole_path_from_image_to_features_is_that_of_the_models_own_processor(vit):
    noise = np.random.default_rng(0).integers(0, 256, (20, 50, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((90, 40), Image.Resampling.BICUBIC)
    extractor = ViTFeatureExtractor.from_pretrained(vit)
    pixels = extractor.preprocessing(image)
    assert pixels.shape == (3, 32, 32)
    assert pixels.dtype == torch.uint8
    inputs = transformers.AutoImageProcessor.from_pretrained(vit)(image, return_tensors="pt")
    with torch.no_grad():
        expected = transformers.ViTModel.from_pretrained(vit).eval()(**inputs).last_hidden_state[:, 0]
    torch.testing.assert_close(extractor(pixels.unsqueeze(0)), expected, rtol=0, atol=2e-3)


def test_features_do_not_depend_on_what_else_is_in_the_batch(vit):
    extractor, pixels = ViTFeatureExtractor.from_pretrained(vit), some_pixels(4)
    one_by_one = torch.cat([extractor(image.unsqueeze(0)) for image in pixels])
    torch.testing.assert_close(extractor(pixels), one_by_one, rtol=0, atol=1e-5)


def test_the_extractor_is_frozen_and_stays_in_eval_mode(vit):
    extractor = ViTFeatureExtractor.from_pretrained(vit)
    assert not any(p.requires_grad for p in extractor.parameters())
    assert extractor.train() is extractor
    assert not any(module.training for module in extractor.modules())
    ImageClassifier(extractor, FeedforwardClassifier(24, 2), ("a", "b")).train()
    assert not any(module.training for module in extractor.modules())
    assert not extractor(some_pixels()).requires_grad


def test_feature_size_is_read_from_the_model(vit, tmp_path):
    assert ViTFeatureExtractor.from_pretrained(vit).feature_size == 24
    other = saved(transformers.ViTConfig(**{**SHAPE, "hidden_size": 16}), tmp_path / "other")
    assert ViTFeatureExtractor.from_pretrained(other).feature_size == 16


def test_default_model_is_the_one_in_config(vit, monkeypatch):
    monkeypatch.setattr(config, "VIT_MODEL", str(vit))
    assert ViTFeatureExtractor.from_pretrained().name == "tiny-vit"  # a directory is called by its name, not path


@pytest.mark.parametrize("kind", ["dinov2", "deit", "beit", "clip"])
def test_other_models_with_a_cls_token_work(kind, tmp_path):
    if kind == "clip":
        text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        text |= {"vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2, "projection_dim": 8}
        vision = {**SHAPE, "projection_dim": 8}
        model_config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    else:
        model_config = transformers.AutoConfig.for_model(kind, **SHAPE)
    extractor = ViTFeatureExtractor.from_pretrained(saved(model_config, tmp_path / kind))
    features = extractor(some_pixels())
    assert features.shape == (3, extractor.feature_size) == (3, 24)
    reference = transformers.AutoModel.from_pretrained(tmp_path / kind).eval()
    pixels = (some_pixels().float() / 255 - 0.5) / 0.5
    with torch.no_grad():
        hidden = getattr(reference, "vision_model", reference)(pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(features, hidden[:, 0], rtol=0, atol=1e-5)


def test_a_model_that_drops_patches_at_random_gives_no_random_features(tmp_path):
    """ViTMAE hides three patches of four by chance, in eval mode too: refuse it or switch that off."""
    folder = saved(transformers.ViTMAEConfig(**SHAPE), tmp_path / "mae")
    try:
        extractor = ViTFeatureExtractor.from_pretrained(folder)
    except InputError:
        return
    assert torch.equal(extractor(some_pixels()), extractor(some_pixels()))


# --- preprocessing ------------------------------------------------------------------------------------------


def test_preprocessing_is_read_from_the_model(vit):
    facts = ViTFeatureExtractor.from_pretrained(vit).preprocessing.describe()
    assert facts["size"] == {"height": 32, "width": 32}
    assert (facts["mean"], facts["std"]) == (MEAN, STD)
    assert facts["scale"] == pytest.approx(1 / 255)
    assert json.loads(json.dumps(facts)) == facts


def test_preprocessing_without_a_preprocessor(copy):
    (copy / "preprocessor_config.json").unlink()
    preprocessing = ViTFeatureExtractor.from_pretrained(copy).preprocessing
    facts = preprocessing.describe()
    assert facts["size"] == {"height": 224, "width": 224}
    assert facts["resample"] == Image.Resampling.BILINEAR
    assert (facts["mean"], facts["std"]) == ([0.5] * 3, [0.5] * 3)
    assert not facts.get("do_center_crop")
    wide = np.zeros((100, 448, 3), np.uint8)
    wide[:, :224] = 255  # the left half; squashed to 224 it is still the left half, cropped it would not all be there
    pixels = preprocessing(Image.fromarray(wide))
    assert pixels.shape == (3, 224, 224)
    assert (pixels[:, :, :110] == 255).all()
    assert (pixels[:, :, 114:] == 0).all()


def test_preprocessing_inside_a_processor_of_images_and_text_is_read(copy):
    """As transformers 5 saves a CLIP processor: one processor_config.json for both halves."""
    inner = json.loads((copy / "preprocessor_config.json").read_text())
    (copy / "preprocessor_config.json").unlink()
    (copy / "processor_config.json").write_text(json.dumps({"image_processor": inner}))
    assert list(transformers.AutoImageProcessor.from_pretrained(copy).image_mean) == MEAN  # they are to be found there
    facts = ViTFeatureExtractor.from_pretrained(copy).preprocessing.describe()
    assert (facts["size"], facts["mean"], facts["std"]) == ({"height": 32, "width": 32}, MEAN, STD)


def test_a_processor_that_does_not_normalize_is_followed(copy):
    path = copy / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "do_normalize": False}))
    extractor, pixels = ViTFeatureExtractor.from_pretrained(copy), some_pixels()
    with torch.no_grad():
        expected = transformers.ViTModel.from_pretrained(copy).eval()(pixel_values=pixels.float() / 255)
    torch.testing.assert_close(extractor(pixels), expected.last_hidden_state[:, 0], rtol=0, atol=1e-5)


def test_preprocessing_tells_processors_apart(vit, copy):
    path = copy / "preprocessor_config.json"
    before = ViTFeatureExtractor.from_pretrained(vit).preprocessing.describe()
    for change in ({"resample": 3}, {"size": {"height": 30, "width": 32}}, {"image_std": [0.2, 0.25, 0.31]}):
        path.write_text(json.dumps({**json.loads((vit / path.name).read_text()), **change}))
        assert ViTFeatureExtractor.from_pretrained(copy).preprocessing.describe() != before


# --- hash of the weights ------------------------------------------------------------------------------------


def test_weights_hash_is_of_the_weights(vit, copy):
    first = ViTFeatureExtractor.from_pretrained(vit).weights_hash()
    assert first == ViTFeatureExtractor.from_pretrained(vit).weights_hash()
    assert first == ViTFeatureExtractor.from_pretrained(copy).weights_hash()  # whatever the folder is called
    assert len(first) == 64
    weights = load_file(copy / "model.safetensors")
    name = next(key for key in sorted(weights) if "pooler" not in key and key.endswith("weight"))
    weights[name].view(-1)[0] += 1e-3
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert first != ViTFeatureExtractor.from_pretrained(copy).weights_hash()


def test_weights_hash_ignores_a_pooler_that_the_checkpoint_lacks(vit, copy):
    """It is not used, and would be random anew with each load."""
    weights = load_file(copy / "model.safetensors")
    kept = {key: value for key, value in weights.items() if "pooler" not in key}
    assert len(kept) < len(weights)
    save_file(kept, copy / "model.safetensors", metadata={"format": "pt"})
    expected = ViTFeatureExtractor.from_pretrained(vit).weights_hash()
    assert ViTFeatureExtractor.from_pretrained(copy).weights_hash() == expected


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
    assert "no CLS token" in refused(saved(model_config, tmp_path / kind))


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


# --- the two joined -----------------------------------------------------------------------------------------


def test_image_classifier_gives_the_softmax_of_the_classifier_on_the_features(vit):
    extractor, names = ViTFeatureExtractor.from_pretrained(vit), ("dog", "house", "person")
    classifier = FeedforwardClassifier(24, 3, (10, 10))
    with torch.no_grad():
        for p in classifier.parameters():
            p.mul_(3)  # so that the probabilities are not all alike
    model = ImageClassifier(extractor, classifier, names)
    pixels = some_pixels(5)
    probabilities = model(pixels)
    features = extractor(pixels).numpy().astype(np.float16).astype(np.float64)  # stored features are float16
    weights = [p.detach().double().numpy() for p in classifier.parameters()]
    hidden = np.maximum(features @ weights[0].T + weights[1], 0)
    logits = np.maximum(hidden @ weights[2].T + weights[3], 0) @ weights[4].T + weights[5]
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert probabilities.shape == (5, 3)
    np.testing.assert_allclose(probabilities.numpy().sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(probabilities.numpy(), expected, atol=1e-5)
    assert model.class_names == names


def test_predict_takes_images_of_any_size(vit):
    model = ImageClassifier(ViTFeatureExtractor.from_pretrained(vit), FeedforwardClassifier(24, 2), ["a", "b"])
    rng = np.random.default_rng(0)
    shapes = [(20, 50, 3), (64, 33, 3)]
    images = [Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)) for shape in shapes]
    both = model.predict(images)
    pixels = torch.stack([model.extractor.preprocessing(image) for image in images])
    assert torch.equal(both, model(pixels))
    np.testing.assert_allclose(both.sum(1).numpy(), [1, 1], atol=1e-6)
