"""Networks from a weights file, and what they say about images."""

import pytest
import torch

from config import InputError
from dataset import load_image
from features import load_extractor
from models import FeedforwardClassifier
from storage import Results
from study import predict_images
from study.predict import load_classifier
from tests.conftest import make_images, make_vit

CLASSES = ["cat", "dog", "owl"]


def header(model=None, preprocessing=None):
    facts = {"feature_size": 24, "model": model, "preprocessing": preprocessing}
    return {"class_names": CLASSES, "hidden_sizes": [6, 5], "features": facts}


def save(folder, count=4, about=None, **more):
    """A weights file of random networks, and the networks."""
    torch.manual_seed(0)
    networks = [FeedforwardClassifier(24, 3, [6, 5]) for _ in range(count)]
    params = {n: torch.stack([net.state_dict()[n] for net in networks]) for n in networks[0].state_dict()}
    arrays = {f"final.{name}": value for name, value in params.items()} | {
        f"start.{name}": torch.zeros_like(value) for name, value in params.items()
    }
    Results(folder).save("weights", "networks", range(count), arrays | more, about or header())
    return folder / "weights" / "networks.safetensors", networks


@pytest.mark.parametrize(("seed", "row"), [(None, 0), (0, 0), (2, 2)])
def test_a_network_of_a_weights_file(tmp_path, seed, row):
    path, networks = save(tmp_path)
    found, about = load_classifier(path, seed)
    assert about == header()
    x = torch.randn(5, 24)
    assert torch.equal(found(x), networks[row](x))


def test_a_seed_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    path, _ = save(tmp_path, 2)
    with pytest.raises(InputError, match=r"seed 9.* 0, 1"):
        load_classifier(path, 9)


@pytest.mark.parametrize(
    ("failed", "refused", "usable"),
    [
        (None, {3: "not finite"}, "0, 1, 2"),
        ([0, -1, 2, 0], {1: "importance", 2: "epoch 2", 3: "not finite"}, "0"),
        ([4, -1, 2, 0], {0: "epoch 4", 1: "importance", 2: "epoch 2", 3: "not finite"}, None),
    ],
)
def test_networks_that_failed_do_not_predict(tmp_path, failed, refused, usable):
    bias = torch.zeros(4, 3)
    bias[3, 1] = torch.nan
    more = {"final.layers.2.bias": bias} | ({} if failed is None else {"failed": torch.tensor(failed)})
    path, _ = save(tmp_path, **more)
    for seed in range(4):
        if seed not in refused:
            load_classifier(path, seed)
            continue
        with pytest.raises(InputError, match=refused[seed]) as caught:
            load_classifier(path, seed)
        assert f"Network {seed} " in str(caught.value)
        assert str(caught.value).endswith(f"--seed: {usable}." if usable else "all others in the file.")


@pytest.fixture(scope="module")
def trained_on(tiny_vit):
    """The header of networks that were trained on features of a tiny ViT."""
    extractor = load_extractor(str(tiny_vit))
    model = {"name": "tiny-vit", "weights_sha256": extractor.weights_hash()}
    return header(model, extractor.preprocessing.describe())


@pytest.fixture
def images(tmp_path):
    return sorted(make_images(tmp_path / "images", domains=["art"], classes=["cat"]).rglob("*.png"))


@pytest.mark.parametrize("batch_size", [None, 2])
def test_probabilities_are_those_of_backbone_and_classifier(tmp_path, tiny_vit, trained_on, images, batch_size):
    path, networks = save(tmp_path, about=trained_on)
    found = list(predict_images(path, images, str(tiny_vit), seed=1, batch_size=batch_size))
    extractor = load_extractor(str(tiny_vit))
    assert [image for image, _ in found] == images
    for image, ranked in found:
        features = extractor(extractor.preprocessing(load_image(image))[None]).half().float()
        expected = dict(zip(CLASSES, networks[1](features)[0].softmax(0).tolist(), strict=True))
        assert dict(ranked) == pytest.approx(expected, abs=1e-6)
        chances = [chance for _, chance in ranked]
        assert chances == sorted(chances, reverse=True)


def test_another_model_is_refused(tmp_path, trained_on, images):
    path, _ = save(tmp_path, about=trained_on)
    with pytest.raises(InputError, match="--vit-model"):
        list(predict_images(path, images, str(make_vit(tmp_path / "other", seed=1))))


def test_the_same_model_with_another_preprocessing_is_refused(tmp_path, tiny_vit, trained_on, images):
    other = trained_on["features"] | {"preprocessing": trained_on["features"]["preprocessing"] | {"mean": [0.1] * 3}}
    path, _ = save(tmp_path, about=trained_on | {"features": other})
    with pytest.raises(InputError, match="--vit-model"):
        list(predict_images(path, images, str(tiny_vit)))


@pytest.mark.parametrize("model", [None, {"name": "mine"}])
def test_networks_of_an_unknown_model_cannot_see_images(tmp_path, tiny_vit, images, model):
    path, _ = save(tmp_path, about=header(model))
    with pytest.raises(InputError, match="unknown model"):
        list(predict_images(path, images, str(tiny_vit)))


def test_an_image_that_cannot_be_read_is_named_after_the_batches_before_it(tmp_path, tiny_vit, trained_on, images):
    path, _ = save(tmp_path, about=trained_on)
    broken = tmp_path / "broken.png"
    broken.write_bytes(images[0].read_bytes()[:-200])
    found = predict_images(path, [*images, broken], str(tiny_vit), batch_size=2)
    assert [next(found)[0], next(found)[0]] == images[:2]
    with pytest.raises(InputError, match=r"broken\.png"):
        next(found)


def test_batches_hold_an_image_or_more(tmp_path):
    with pytest.raises(InputError, match="EXTRACTION_BATCH_SIZE"):
        next(predict_images(tmp_path / "none", [], "none", batch_size=0))
