"""Backbones of any family: which vector each gives, by whose rule it is pooled, and what the file says of it."""

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from config import InputError
from features import get_features, load_extractor
from models import Preprocessing
from tests.conftest import VIT, make_images, save_model

CONVNET = {"depths": [1] * 4, "hidden_sizes": [8, 8, 8, 12], "image_size": 32}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
EFFICIENTNET = {
    "width_coefficient": 0.1,
    "depth_coefficient": 0.1,
    "initializer_range": 0.5,
    "hidden_dim": 128,
    "image_size": 32,
}
SIGLIP_TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
STAGE = {"hidden_channels": [4], "num_blocks": [1], "num_of_blocks": [1], "depths": [1]}
MODELS = {  # configuration, what "auto" takes, D
    "resnet": (transformers.ResNetConfig(embedding_size=8, **CONVNET, layer_type="basic"), "pooler", 12),
    "convnext": (transformers.ConvNextConfig(**CONVNET), "pooler", 12),
    "swin": (transformers.SwinConfig(**SWIN), "pooler", 16),
    "efficientnet": (transformers.EfficientNetConfig(**EFFICIENTNET), "pooler", 128),
    "siglip": (
        transformers.SiglipConfig(text_config=SIGLIP_TEXT | {"vocab_size": 60}, vision_config=VIT),
        "pooler",
        24,
    ),
    "dinov2": (transformers.Dinov2WithRegistersConfig(**VIT, mlp_ratio=2), "cls", 24),
    "dinov3": (transformers.DINOv3ViTConfig(**VIT, num_register_tokens=4), "cls", 24),
    "segformer": (
        transformers.SegformerConfig(
            num_encoder_blocks=2, depths=[1, 1], hidden_sizes=[8, 12], sr_ratios=[2, 1], num_attention_heads=[1, 2]
        ),
        "mean",
        12,
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    """Folder of a random model, what "auto" takes of it, and D."""
    about, pooling, size = MODELS[request.param]
    return save_model(about, tmp_path_factory.mktemp("models") / request.param), pooling, size


def some_pixels():
    return torch.randint(0, 256, (3, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def outputs(folder):
    """What `transformers` itself makes of the same pixels."""
    model = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        return getattr(model, "vision_model", model)(pixel_values=(some_pixels().float() / 255 - 0.5) / 0.5)


def test_auto_takes_the_cls_token_else_the_models_own_pooling_else_the_mean(model):
    folder, pooling, size = model
    extractor, expected = load_extractor(folder), outputs(folder)
    features = extractor(some_pixels())
    assert (extractor.pooling, features.shape, extractor.feature_size) == (pooling, (3, size), size)
    hidden = expected.last_hidden_state
    if pooling == "cls":
        wanted = hidden[:, 0]
    elif pooling == "pooler":
        wanted = expected.pooler_output.flatten(1)
    else:
        wanted = hidden.mean((2, 3))
    torch.testing.assert_close(features, wanted, rtol=1e-4, atol=1e-5)
    assert (features[0] - features[1]).abs().max() > 1e-3 * features.abs().max()


def test_mean_pooling_is_the_mean_of_all_patches_or_positions(model):
    folder, pooling, _ = model
    features = load_extractor(folder, pooling="mean")(some_pixels())
    hidden = outputs(folder).last_hidden_state
    first = 5 if pooling == "cls" else 0  # after CLS and four registers
    wanted = hidden.mean((2, 3)) if hidden.ndim == 4 else hidden[:, first:].mean(1)
    torch.testing.assert_close(features, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "pooling", "lacking"), [("swin", "cls", "CLS token"), ("segformer", "pooler", "pooled")]
)
def test_a_pooling_that_the_model_has_not_is_refused(kind, pooling, lacking, tmp_path):
    folder = save_model(MODELS[kind][0], tmp_path / kind)
    with pytest.raises(InputError, match=rf"'{kind}' has no {lacking}.*POOLING must be"):
        load_extractor(folder, pooling=pooling)


@pytest.mark.parametrize("choice", [{"layers": "all"}, {"blocks": 1}])
def test_blocks_and_all_layers_need_a_cls_token(choice, tmp_path):
    folder = save_model(MODELS["siglip"][0], tmp_path / "siglip")
    root = make_images(tmp_path / "images")
    with pytest.raises(InputError, match="CLS token"):
        get_features(root, vit_model=folder, cache_dir=tmp_path / "cache", device="cpu", progress=False, **choice)


def test_a_pooler_without_weights_is_not_used(vit):
    """A ViT saved with its random pooler has one; without it there is nothing to pool by."""
    assert load_extractor(vit, pooling="pooler").pooling == "pooler"  # `make_vit` saves it
    from safetensors.torch import load_file, save_file

    weights = {key: value for key, value in load_file(vit / "model.safetensors").items() if "pooler" not in key}
    folder = vit.parent / "without_pooler"
    folder.mkdir()
    for file in ("config.json", "preprocessor_config.json"):
        (folder / file).write_bytes((vit / file).read_bytes())
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert load_extractor(folder).pooling == "cls"
    with pytest.raises(InputError, match="no pooler"):
        load_extractor(folder, pooling="pooler")


def test_a_backbone_that_is_no_model_of_its_own_gives_its_last_map(tmp_path):
    about = transformers.HGNetV2Config(
        stem_channels=[3, 4, 4],
        embedding_size=4,
        depths=[1, 1],
        hidden_sizes=[8, 12],
        stage_in_channels=[4, 8],
        stage_mid_channels=[4, 4],
        stage_out_channels=[8, 12],
        stage_num_blocks=[1, 1],
        stage_downsample=[False, True],
        stage_light_block=[False, False],
        stage_kernel_size=[3, 3],
        stage_numb_of_layers=[1, 1],
    )
    torch.manual_seed(0)
    backbone = transformers.AutoBackbone.from_config(about).eval()
    backbone.save_pretrained(tmp_path / "hgnet")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "hgnet")
    extractor = load_extractor(tmp_path / "hgnet")
    with torch.no_grad():
        maps = backbone((some_pixels().float() / 255 - 0.5) / 0.5).feature_maps
    assert extractor.pooling == "mean"
    torch.testing.assert_close(extractor(some_pixels()), maps[-1].mean((2, 3)), rtol=1e-4, atol=1e-5)


def test_the_feature_file_says_how_it_was_pooled_and_another_pooling_is_another_file(tmp_path, vit):
    root, cache = make_images(tmp_path / "images"), tmp_path / "cache"
    usual = {"vit_model": vit, "cache_dir": cache, "device": "cpu", "progress": False}
    found = {pooling: get_features(root, pooling=pooling, **usual) for pooling in ("auto", "cls", "mean")}
    assert [found[name].header["model"]["pooling"] for name in found] == ["cls", "cls", "mean"]
    assert len(list(cache.glob("*.safetensors"))) == 2  # "auto" is "cls" here
    assert not torch.equal(found["cls"].features, found["mean"].features)


def test_a_text_model_is_refused(tmp_path):
    about = transformers.BertConfig(vocab_size=20, **SIGLIP_TEXT)
    with pytest.raises(InputError, match="takes no images"):
        load_extractor(save_model(about, tmp_path / "bert"))


def test_weights_in_half_precision_are_computed_with_in_float32(vit, tmp_path):
    folder = tmp_path / "half"
    transformers.AutoModel.from_pretrained(vit).half().save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    assert {parameter.dtype for parameter in load_extractor(folder).parameters()} == {torch.float32}


def test_blocks_are_split_on_images_of_the_size_that_the_model_is_given(tmp_path):
    folder = save_model(MODELS["dinov3"][0], tmp_path / "dinov3")  # whose positions depend on it
    transformers.ViTImageProcessor(size={"height": 48, "width": 48}).save_pretrained(folder)
    extractor = load_extractor(folder)
    pixels = torch.randint(0, 256, (2, 3, 48, 48), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    features, tokens = extractor.tokens(pixels, 1)
    torch.testing.assert_close(extractor.tail(1)(tokens), features, rtol=1e-4, atol=1e-5)


# Preprocessing

PROCESSORS = {
    "convnext": lambda: transformers.ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.875),
    "efficientnet": lambda: transformers.EfficientNetImageProcessor(
        size={"height": 32, "width": 32}, do_center_crop=False, rescale_factor=1 / 127.5, rescale_offset=True,
        do_normalize=False,
    ),
    "efficientnet, normalized twice": lambda: transformers.EfficientNetImageProcessor(
        size={"height": 32, "width": 32}, do_center_crop=False, include_top=True
    ),
    "mobilevit": lambda: transformers.MobileViTImageProcessor(
        size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", PROCESSORS)
def test_pixels_are_those_of_the_models_own_processor(kind):
    processor = PROCESSORS[kind]()
    preprocessing = Preprocessing(processor)
    noise = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((90, 40), Image.Resampling.BICUBIC)
    pixels = preprocessing(image).float()
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (preprocessing.mean, preprocessing.std))
    wanted = processor(image, return_tensors="pt")["pixel_values"][0]
    assert pixels.shape == wanted.shape
    torch.testing.assert_close((pixels * preprocessing.scale - mean) / std, wanted.float(), rtol=0, atol=0.02)
    json.dumps(preprocessing.describe())


def test_what_crops_differently_is_described_differently():
    described = [
        Preprocessing(transformers.ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=part)).describe()
        for part in (0.875, 0.9)
    ]
    assert described[0] != described[1]


def test_a_processor_that_keeps_shapes_is_refused(tmp_path):
    folder = save_model(MODELS["convnext"][0], tmp_path / "convnext")
    transformers.ViTImageProcessor(size={"shortest_edge": 32}).save_pretrained(folder)
    with pytest.raises(InputError, match="one shape"):
        load_extractor(folder)


# timm


@pytest.fixture
def timm_model(request, tmp_path):
    """A random model of timm in a directory as timm saves it, and the model."""
    timm = pytest.importorskip("timm", reason="timm is optional")
    from timm.models import save_for_hf

    name, options = request.param
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=5, **options).eval()
    save_for_hf(model, tmp_path / "mine", safe_serialization=True)
    return tmp_path / "mine", model


TIMM = [
    ("resnet10t", {}, "pooler"),
    ("vit_tiny_patch16_384", {"depth": 1}, "cls"),
    ("swin_tiny_patch4_window7_224", {"depths": (1, 1), "num_heads": (2, 2), "embed_dim": 8}, "pooler"),
]


@pytest.mark.parametrize(("timm_model", "pooling"), [(kind[:2], kind[2]) for kind in TIMM], indirect=["timm_model"])
def test_a_model_of_timm_gives_what_timm_itself_gives(timm_model, pooling):
    import timm

    folder, model = timm_model
    extractor = load_extractor(f"timm:{folder}")
    assert (extractor.name, extractor.pooling) == ("mine", pooling)
    data = timm.data.resolve_model_data_config(model)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)).resize((260, 240))
    with torch.no_grad():
        hidden = model.forward_features(timm.data.create_transform(**data)(image)[None])
        wanted = model.forward_head(hidden, pre_logits=True)
    pixels = extractor.preprocessing(image)[None]
    torch.testing.assert_close(extractor(pixels), wanted, rtol=1e-3, atol=1e-3)
    positions = hidden.mean((2, 3)) if hidden.ndim == 4 and hidden.shape[1] == wanted.shape[1] else hidden.mean((1, 2))
    if hidden.ndim == 3:
        positions = hidden[:, 1:].mean(1)  # without CLS
    mean = load_extractor(f"timm:{folder}", pooling="mean")
    torch.testing.assert_close(mean(pixels), positions, rtol=1e-3, atol=1e-3)


def test_without_timm_its_models_are_refused_with_the_command_to_type(monkeypatch):
    monkeypatch.setattr("features.pretrained.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"'timm:resnet50.a1_in1k' needs the package timm.*pip install timm"):
        load_extractor("timm:resnet50.a1_in1k")
