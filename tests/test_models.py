"""The frozen ViT on tiny random models, and the classifier on top."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from config import InputError
from features import load_extractor
from models import FeedforwardClassifier, ImageClassifier
from tests.conftest import MEAN, STD, VIT, reference_features, save_model


def some_pixels(n=3, seed=0):
    return torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def normalized(pixels):
    scaled = pixels.double().numpy() / 255
    return torch.tensor((scaled - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1)), dtype=torch.float32)


# Classifier


@pytest.mark.parametrize(
    ("hidden", "tracked"), [((10,) * 5, [(10, 10)] * 4), ((10,) * 4, [(10, 10)] * 3), ((3, 8, 5), [(8, 3), (5, 8)])]
)
def test_tracked_matrices_are_those_between_hidden_layers(hidden, tracked):
    model = FeedforwardClassifier(6, 4, hidden)
    assert [(layer.in_features, layer.out_features) for layer in model.layers] == list(pairwise((6, *hidden, 4)))
    params = dict(model.named_parameters())
    assert [tuple(weight.shape) for weight in model.tracked(params)] == tracked
    assert [id(weight) for weight in model.tracked(params)] == [id(params[name]) for name in model.tracked_names]
    assert model.size == sum((a + 1) * b for a, b in pairwise((6, *hidden, 4)))
    assert model(torch.randn(2, 9, 6)).shape == (2, 9, 4)


def test_an_outline_has_the_shapes_but_no_weights_and_draws_nothing():
    before = torch.random.get_rng_state()
    outline = FeedforwardClassifier.outline(6, 4, (3, 8))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(parameter.is_meta for parameter in outline.parameters())
    assert outline.tracked_names == ("layers.1.weight",)


def test_forward_is_linear_relu_and_a_linear_at_the_end():
    model = FeedforwardClassifier(6, 4, (3, 8, 5)).double()
    x = torch.randn(7, 6, dtype=torch.float64)
    weights = [p.detach().numpy() for p in model.parameters()]
    hidden = x.numpy()
    for i in range(0, 6, 2):
        hidden = np.maximum(hidden @ weights[i].T + weights[i + 1], 0)
    expected = hidden @ weights[6].T + weights[7]
    np.testing.assert_allclose(model(x).detach().numpy(), expected, rtol=0, atol=1e-12)


# Feature extractor


def test_features_are_the_cls_token_of_the_last_hidden_state(vit):
    extractor, pixels = load_extractor(vit), some_pixels()
    features = extractor(pixels)
    assert (features.shape, features.dtype) == ((3, 24), torch.float32)
    torch.testing.assert_close(features, reference_features(vit, normalized(pixels)), rtol=0, atol=1e-5)
    assert (features[0] - features[1]).abs().max() > 1e-3


def test_whole_path_from_image_to_features_is_that_of_the_models_own_processor(vit):
    noise = np.random.default_rng(0).integers(0, 256, (20, 50, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((90, 40), Image.Resampling.BICUBIC)
    extractor = load_extractor(vit)
    pixels = extractor.preprocessing(image)
    assert (pixels.shape, pixels.dtype) == ((3, 32, 32), torch.uint8)
    inputs = transformers.AutoImageProcessor.from_pretrained(vit)(image, return_tensors="pt")
    expected = reference_features(vit, inputs["pixel_values"])
    torch.testing.assert_close(extractor(pixels.unsqueeze(0)), expected, rtol=0, atol=2e-3)


def test_features_do_not_depend_on_what_else_is_in_the_batch(vit):
    extractor, pixels = load_extractor(vit), some_pixels(4)
    one_by_one = torch.cat([extractor(image.unsqueeze(0)) for image in pixels])
    torch.testing.assert_close(extractor(pixels), one_by_one, rtol=0, atol=1e-5)


def test_the_extractor_is_frozen_and_stays_in_eval_mode(vit):
    extractor = load_extractor(vit)
    assert not any(p.requires_grad for p in extractor.parameters())
    assert extractor.train() is extractor
    assert not any(module.training for module in extractor.modules())
    ImageClassifier(extractor, FeedforwardClassifier(24, 2, (10, 10)), ("a", "b")).train()
    assert not any(module.training for module in extractor.modules())
    assert not extractor(some_pixels()).requires_grad


def test_feature_size_and_name_are_those_of_the_model(vit, tmp_path):
    assert load_extractor(vit).feature_size == 24
    assert load_extractor(vit).name == load_extractor(str(vit)).name == vit.name
    other = save_model(transformers.ViTConfig(**{**VIT, "hidden_size": 16}), tmp_path / "other")
    assert load_extractor(other).feature_size == 16


@pytest.mark.parametrize("kind", ["dinov2", "deit", "beit", "clip"])
def test_other_models_with_a_cls_token_work(kind, tmp_path):
    if kind == "clip":
        text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        text |= {"vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2, "projection_dim": 8}
        vision = {**VIT, "projection_dim": 8}
        model_config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    else:
        model_config = transformers.AutoConfig.for_model(kind, **VIT)
    extractor = load_extractor(save_model(model_config, tmp_path / kind))
    features = extractor(some_pixels())
    assert features.shape == (3, extractor.feature_size) == (3, 24)
    expected = reference_features(tmp_path / kind, (some_pixels().float() / 255 - 0.5) / 0.5)
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)


def test_a_model_that_drops_patches_at_random_gives_no_random_features(tmp_path):
    """ViTMAE hides three patches of four by chance, in eval mode too: refuse it or switch that off."""
    folder = save_model(transformers.ViTMAEConfig(**VIT), tmp_path / "mae")
    try:
        extractor = load_extractor(folder)
    except InputError:
        return
    assert torch.equal(extractor(some_pixels()), extractor(some_pixels()))


# Preprocessing


def test_preprocessing_is_read_from_the_model(vit):
    facts = load_extractor(vit).preprocessing.describe()
    assert facts["size"] == {"height": 32, "width": 32}
    assert (facts["mean"], facts["std"]) == (MEAN, STD)
    assert facts["scale"] == pytest.approx(1 / 255)
    assert json.loads(json.dumps(facts)) == facts


def test_preprocessing_without_a_preprocessor(tmp_path):
    folder = save_model(transformers.ViTConfig(**{**VIT, "image_size": 224, "patch_size": 112}), tmp_path / "bare")
    (folder / "preprocessor_config.json").unlink()
    preprocessing = load_extractor(folder).preprocessing
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
    facts = load_extractor(copy).preprocessing.describe()
    assert (facts["size"], facts["mean"], facts["std"]) == ({"height": 32, "width": 32}, MEAN, STD)


def test_a_processor_that_does_not_normalize_is_followed(copy):
    path = copy / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "do_normalize": False}))
    expected = reference_features(copy, some_pixels().float() / 255)
    torch.testing.assert_close(load_extractor(copy)(some_pixels()), expected, rtol=0, atol=1e-5)


def test_preprocessing_tells_processors_apart(vit, copy):
    path = copy / "preprocessor_config.json"
    before = load_extractor(vit).preprocessing.describe()
    crop = {"do_center_crop": True, "crop_size": {"height": 32, "width": 32}}
    for change in ({"resample": 3}, crop, {"image_std": [0.2, 0.25, 0.31]}):
        path.write_text(json.dumps({**json.loads((vit / path.name).read_text()), **change}))
        assert load_extractor(copy).preprocessing.describe() != before


# Hash of the weights


def test_weights_hash_is_of_the_weights_without_a_pooler(vit, copy):
    """A pooler is not used, and each load of a checkpoint that lacks one would draw it again."""
    first = load_extractor(vit).weights_hash()
    assert len(first) == 64
    weights = load_file(copy / "model.safetensors")
    kept = {key: value for key, value in weights.items() if "pooler" not in key}
    assert len(kept) < len(weights)
    save_file(kept, copy / "model.safetensors", metadata={"format": "pt"})
    assert load_extractor(copy).weights_hash() == first  # whatever the folder is called
    name = next(key for key in sorted(kept) if key.endswith("weight"))
    kept[name].view(-1)[0] += 1e-3
    save_file(kept, copy / "model.safetensors", metadata={"format": "pt"})
    assert load_extractor(copy).weights_hash() != first


# The two joined


def test_image_classifier_gives_the_softmax_of_the_classifier_on_the_features(vit):
    extractor, names = load_extractor(vit), ("dog", "house", "person")
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
    model = ImageClassifier(load_extractor(vit), FeedforwardClassifier(24, 2, (10, 10)), ["a", "b"])
    rng, shapes = np.random.default_rng(0), [(20, 50, 3), (64, 33, 3)]
    images = [Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)) for shape in shapes]
    pixels = torch.stack([model.extractor.preprocessing(image) for image in images])
    assert torch.equal(model.predict(images), model(pixels))
