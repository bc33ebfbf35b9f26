"""Features of all layers: the same pass, [CLS] and mean patch of every block, with a key and a header of their own."""

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import config
from config import InputError
from features import copy_features, get_features, load_extractor, load_features
from tests.conftest import VIT, make_images, save_model
from tests.factories import dated, everything
from tests.features.conftest import Counting


@pytest.fixture
def all_layers(tiny_vit):
    plain = load_extractor(tiny_vit, "all")
    return Counting(plain.model, plain.preprocessing, plain.name, "all")


def by_hand(folder, pixels, prefix):
    """What `transformers` itself gives after each block: its [CLS], and the mean of the tokens from `prefix` on."""
    model = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        states = getattr(model, "vision_model", model)(pixel_values=pixels, output_hidden_states=True).hidden_states[1:]
    return torch.cat([part for state in states for part in (state[:, 0], state[:, prefix:].mean(1))], dim=1)


def test_every_block_gives_cls_and_mean_patch_before_the_final_norm(tmp_path, tiny_vit, cache):
    root = make_images(tmp_path / "exact", size=(32, 32))  # the model's own size: nothing to resize
    usual = {"vit_model": tiny_vit, "cache_dir": cache, "device": "cpu", "progress": False}
    result = get_features(root, layers="all", **usual)
    pixels = np.stack([np.asarray(Image.open(root / file)) for file in result.files]).astype(np.float32) / 255
    expected = by_hand(tiny_vit, torch.from_numpy((pixels - 0.5) / 0.5).permute(0, 3, 1, 2), prefix=1)
    assert (result.features.shape, result.features.dtype) == ((12, 2 * 2 * 24), torch.float16)
    torch.testing.assert_close(result.features.float(), expected, rtol=1e-3, atol=1e-3)
    assert result.header["layers"] == {"blocks": 2, "kinds": ["cls", "mean"], "width": 24}
    assert "12 × 96-d of all layers" in result.describe()
    last = get_features(root, layers="last", **usual)
    assert "layers" not in last.header
    norm = load_extractor(tiny_vit).model.layernorm
    with torch.no_grad():  # the last block's [CLS] is what the final norm makes the usual features of
        normed = norm(result.features.float().view(12, 2, 2, 24)[:, 1, 0])
    torch.testing.assert_close(normed, last.features.float(), rtol=1e-2, atol=1e-2)


MODELS = {  # tokens before those of the patches
    "deit": (transformers.DeiTConfig, {}, 2),
    "registers": (transformers.Dinov2WithRegistersConfig, {"num_register_tokens": 3, "mlp_ratio": 2}, 4),
    "clip": (transformers.CLIPVisionConfig, {}, 1),
}


@pytest.mark.parametrize("kind", MODELS)
def test_tokens_that_are_no_patches_are_left_out_of_the_mean(kind, tmp_path):
    made, more, prefix = MODELS[kind]
    folder = save_model(made(**VIT | more), tmp_path / kind)
    extractor = load_extractor(folder, "all")
    pixels = torch.randint(0, 256, (3, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    seen = (pixels.float() * extractor.preprocessing.scale - extractor.mean) / extractor.std
    torch.testing.assert_close(extractor(pixels), by_hand(folder, seen, prefix), rtol=1e-4, atol=1e-5)


def test_a_model_whose_patches_cannot_be_told_apart_is_refused(tmp_path):
    sizes = VIT | {"image_size": [32, 32], "num_detection_tokens": 2}
    folder = save_model(transformers.YolosConfig(**sizes), tmp_path / "yolos")
    assert load_extractor(folder).feature_size == 24
    with pytest.raises(InputError, match="'yolos' cannot be told from its other tokens: leave out FEATURE_LAYERS"):
        load_extractor(folder, "all")


def test_all_layers_have_a_key_of_their_own(run, extractor, all_layers, cache, tmp_path):
    last = run()
    before = dated(cache)
    every = run(extractor=all_layers)
    assert (last.feature_size, every.feature_size) == (24, 96)
    assert before.items() <= dated(cache).items()
    assert run(extractor=all_layers).fingerprint == every.fingerprint
    assert (extractor.seen, all_layers.seen) == (12, 12)  # one pass each
    file = copy_features(every, tmp_path / "copy.safetensors")
    assert load_features(file).header == every.header


def test_all_layers_resume_after_an_interruption(run, all_layers, cache, tmp_path, monkeypatch):
    monkeypatch.setattr("features.extraction.SHARD_ROWS", 4)
    all_layers.fail_after = 6
    with pytest.raises(KeyboardInterrupt):
        run(extractor=all_layers, batch_size=2)
    all_layers.seen, all_layers.fail_after = 0, None
    run(extractor=all_layers, batch_size=2)
    assert all_layers.seen == 8
    run(extractor=all_layers, batch_size=2, cache_dir=tmp_path / "at-once")
    kept = {name: content for name, content in everything(cache).items() if name.endswith(".safetensors")}
    assert len(kept) == 1
    assert kept.items() <= everything(tmp_path / "at-once").items()


@pytest.mark.parametrize(
    ("settings", "given", "named"),
    [
        ({"FEATURE_LAYERS": "all"}, {}, "FEATURE_LAYERS = 'all' needs DATA_ROOT"),
        ({"FEATURE_LAYERS": "all"}, {"features_file": "x.safetensors"}, "FEATURE_LAYERS = 'all' needs DATA_ROOT"),
        ({"FEATURE_LAYERS": "all", "TRAINED_BLOCKS": 1}, {"data_root": "x"}, "FEATURE_LAYERS = 'all' and TRAINED"),
        ({"FEATURE_LAYERS": "first"}, {"data_root": "x"}, "FEATURE_LAYERS must be 'last' or 'all'"),
    ],
)
def test_what_does_not_fit_all_layers_is_refused(settings, given, named, monkeypatch):
    for name, value in settings.items():
        monkeypatch.setattr(config, name, value)
    with pytest.raises(InputError, match=named):
        get_features(**given)
