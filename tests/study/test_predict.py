"""Networks from a weights file, and what they say about images."""

import csv
from functools import partial

import pytest
import torch

import config
from config import InputError
from dataset import load_image
from features import load_extractor
from models import FeedforwardClassifier
from storage import Results, ranges
from study import predict_images
from study.predict import load_parameters
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


@pytest.mark.parametrize(("seed", "rows"), [(None, range(4)), (0, [0]), (2, [2])])
def test_networks_of_a_weights_file(tmp_path, seed, rows):
    path, networks = save(tmp_path)
    found, about = load_parameters(path, seed)
    assert (list(found), about) == (list(rows), header())
    for row in rows:
        torch.testing.assert_close(found[row], dict(networks[row].state_dict()), rtol=0, atol=0)
    with pytest.raises(InputError, match=r"seed 9.* 0-3"):
        load_parameters(path, 9)


@pytest.mark.parametrize(
    ("failed", "refused", "usable"),
    [
        (None, {3: "not finite"}, [0, 1, 2]),
        ([0, -1, 2, 0], {1: "importance", 2: "epoch 2", 3: "not finite"}, [0]),
        ([4, -1, 2, 0], {0: "epoch 4", 1: "importance", 2: "epoch 2", 3: "not finite"}, []),
    ],
)
def test_networks_that_failed_do_not_predict(tmp_path, failed, refused, usable):
    bias = torch.zeros(4, 3)
    bias[3, 1] = torch.nan
    more = {"final.layers.2.bias": bias} | ({} if failed is None else {"failed": torch.tensor(failed)})
    path, _ = save(tmp_path, **more)
    for seed in range(4):
        if seed not in refused:
            load_parameters(path, seed)
            continue
        with pytest.raises(InputError, match=refused[seed]) as caught:
            load_parameters(path, seed)
        assert f"Network {seed} " in str(caught.value)
        assert str(caught.value).endswith(f"--seed: {ranges(usable)}." if usable else "all others in the file.")
    if usable:
        assert list(load_parameters(path)[0]) == usable
    else:
        with pytest.raises(InputError, match="Network 0 "):
            load_parameters(path)


@pytest.fixture(scope="module")
def trained_on(tiny_vit):
    """The header of networks that were trained on features of a tiny ViT."""
    extractor = load_extractor(str(tiny_vit))
    model = {"name": "tiny-vit", "weights_sha256": extractor.weights_hash()}
    return header(model, extractor.preprocessing.describe())


@pytest.fixture
def images(tmp_path):
    return sorted(make_images(tmp_path / "images", domains=["art"], classes=["cat"]).rglob("*.png"))


@pytest.mark.parametrize(("seed", "batch_size"), [(1, None), (1, 2), (None, 2)])
def test_probabilities_are_those_of_backbone_and_networks(tmp_path, tiny_vit, trained_on, images, seed, batch_size):
    path, networks = save(tmp_path, about=trained_on)
    found = list(predict_images(path, images, str(tiny_vit), seed=seed, batch_size=batch_size))
    used = networks if seed is None else [networks[seed]]
    extractor = load_extractor(str(tiny_vit))
    assert [image for image, _ in found] == images
    for image, ranked in found:
        features = extractor(extractor.preprocessing(load_image(image))[None]).half().float()
        mean = torch.stack([network(features)[0].softmax(0) for network in used]).mean(0)
        assert dict(ranked) == pytest.approx(dict(zip(CLASSES, mean.tolist(), strict=True)), abs=1e-6)
        chances = [chance for _, chance in ranked]
        assert chances == sorted(chances, reverse=True)


def test_images_are_pooled_as_those_were_that_the_networks_were_trained_on(tmp_path, tiny_vit, trained_on, images):
    model = trained_on["features"]["model"] | {"pooling": "mean"}
    path, networks = save(tmp_path, about=trained_on | {"features": trained_on["features"] | {"model": model}})
    [(_, ranked)] = predict_images(path, images[:1], str(tiny_vit), seed=0)
    extractor = load_extractor(str(tiny_vit), pooling="mean")
    features = extractor(extractor.preprocessing(load_image(images[0]))[None]).half().float()
    expected = networks[0](features)[0].softmax(0).tolist()
    assert dict(ranked) == pytest.approx(dict(zip(CLASSES, expected, strict=True)), abs=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": None}, "unknown model"),
        ({"model": {"name": "mine"}}, "unknown model"),
        ({"mean": [0.1] * 3}, "--vit-model"),  # prepares images otherwise
        ({}, "--vit-model"),  # has other weights
    ],
)
def test_networks_of_another_or_an_unknown_model_cannot_see_images(
    tmp_path, tiny_vit, trained_on, images, change, message
):
    facts = trained_on["features"]
    facts = facts | ({"preprocessing": facts["preprocessing"] | change} if "mean" in change else change)
    path, _ = save(tmp_path, about=trained_on | {"features": facts})
    with pytest.raises(InputError, match=message):
        list(predict_images(path, images, str(tiny_vit if change else make_vit(tmp_path / "other", seed=1))))


def test_an_image_that_cannot_be_read_is_named_after_the_batches_before_it(tmp_path, tiny_vit, trained_on, images):
    path, _ = save(tmp_path, about=trained_on)
    broken = tmp_path / "broken.png"
    broken.write_bytes(images[0].read_bytes()[:-200])
    found = predict_images(path, [*images, broken], str(tiny_vit), batch_size=2)
    assert [next(found)[0], next(found)[0]] == images[:2]
    with pytest.raises(InputError, match=r"broken\.png"):
        next(found)


def test_a_table_of_a_folder_is_written_whole_or_not_at_all(tmp_path, tiny_vit, trained_on, images, caplog):
    caplog.set_level("INFO")
    path, _ = save(tmp_path, about=trained_on | {"phase": 2, "holdout": "photo", "algorithm": "importance"})
    (tmp_path / "images" / "notes.txt").touch()
    predict = partial(predict_images, path, [tmp_path / "images"], str(tiny_vit), output=tmp_path / "table.csv")
    found = list(predict())
    assert [file for file, _ in found] == images
    for said in ("Phase 2", "photo", "importance", "0-3", "tiny-vit"):
        assert said in caplog.text
    written = (tmp_path / "table.csv").read_bytes()
    with (tmp_path / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row, (file, ranked) in zip(rows, found, strict=True):
        assert (row.pop("file"), row.pop("predicted")) == (str(file), ranked[0][0])
        assert {name: float(value) for name, value in row.items()} == dict(ranked)
    (tmp_path / "images" / "zzz.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"zzz\.png"):
        list(predict())
    assert (tmp_path / "table.csv").read_bytes() == written
    assert not list(tmp_path.glob(".table*"))


def test_the_backbone_is_the_one_in_the_header(tmp_path, tiny_vit, trained_on, images, monkeypatch):
    path, _ = save(tmp_path, about=trained_on)
    expected = list(predict_images(path, images, str(tiny_vit)))
    with pytest.raises(InputError, match=r"'tiny-vit'.*--vit-model"):  # it was local, and this is another place
        list(predict_images(path, images))
    monkeypatch.setattr(config, "VIT_MODEL", str(tiny_vit))
    assert list(predict_images(path, images)) == expected
    monkeypatch.setattr(config, "VIT_MODEL", "some/other")
    monkeypatch.chdir(tiny_vit.parent)
    assert list(predict_images(path, images)) == expected


@pytest.mark.parametrize(("given", "output", "named"), [("empty", None, "empty"), ("images", ".", "--output")])
def test_folders_in_wrong_places_are_named(tmp_path, tiny_vit, trained_on, images, given, output, named):
    path, _ = save(tmp_path, about=trained_on)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=named):
        list(predict_images(path, [tmp_path / given], str(tiny_vit), output=output))


def test_batches_hold_an_image_or_more(tmp_path):
    with pytest.raises(InputError, match="EXTRACTION_BATCH_SIZE"):
        next(predict_images(tmp_path / "none", [], "none", batch_size=0))


@pytest.fixture
def of_blocks(tmp_path, tiny_vit, trained_on):
    """A weights file of two networks whose last `blocks` blocks were trained: (blocks, changes, header) -> path."""

    def saved(blocks=1, changes=None, **about):
        torch.manual_seed(0)
        tail = load_extractor(str(tiny_vit)).tail(blocks).with_head(FeedforwardClassifier(24, 3, []))
        moved = {n: 0.2 * torch.randn(2, *p.shape) for n, p in tail.named_parameters()}
        head = {f"final.{n}": p.detach() + moved.pop(n) for n, p in tail.named_parameters() if n.startswith("head.")}
        drawn = head | {f"change.{name}": value for name, value in moved.items()}
        arrays = {name: value for name, value in (drawn | (changes or {})).items() if value is not None}
        own = trained_on | {"hidden_sizes": [], "trained_blocks": blocks, "tokens": "float16"} | about
        Results(tmp_path).save("weights", "blocks", range(2), arrays, own)
        return tmp_path / "weights" / "blocks.safetensors", arrays

    return saved


@pytest.mark.parametrize("blocks", [1, 2])
def test_trained_blocks_take_the_place_of_the_models_own(of_blocks, tiny_vit, images, blocks):
    path, arrays = of_blocks(blocks)
    extractor = load_extractor(str(tiny_vit))
    for image, ranked in predict_images(path, images, str(tiny_vit), batch_size=2):
        _, tokens = extractor.tokens(extractor.preprocessing(load_image(image))[None], blocks)
        chances = []
        for row in range(2):
            network = extractor.tail(blocks).with_head(FeedforwardClassifier(24, 3, []))
            for name, p in network.named_parameters():
                p.data = p + arrays[f"change.{name}"][row] if "head" not in name else arrays[f"final.{name}"][row]
            chances.append(network(tokens.half().float())[0].softmax(0))
        expected = torch.stack(chances).mean(0).tolist()
        assert dict(ranked) == pytest.approx(dict(zip(CLASSES, expected, strict=True)), abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "about", "named"),
    [
        ({"change.blocks.0.attention.q_proj.weight": torch.zeros(2, 3, 3)}, {}, "q_proj.weight is not as its model"),
        ({"change.norm.bias": None}, {}, "norm.bias is not as its model"),
        ({"change.norm.bias": torch.zeros(2, 24, dtype=torch.long)}, {}, "norm.bias cannot be"),
        ({"change.more": torch.zeros(2, 3)}, {}, "more is not as its model"),
        ({"final.norm.bias": torch.zeros(2, 24)}, {}, "norm.bias is not as its header"),
        ({"final.head.layers.0.bias": torch.zeros(2, 4)}, {}, "head.layers.0.bias is not as its header"),
        ({}, {"tokens": "int8"}, "in which type"),
        ({}, {"trained_blocks": 2}, "blocks.1"),
        ({}, {"trained_blocks": 9}, "1 … 2"),
    ],
)
def test_weights_of_blocks_that_are_not_the_models_are_refused(of_blocks, tiny_vit, images, changes, about, named):
    path, _ = of_blocks(1, changes, **about)
    with pytest.raises(InputError, match=named) as caught:
        list(predict_images(path, images, str(tiny_vit)))
    assert "\n" not in str(caught.value)


def test_weights_of_blocks_of_another_model_are_refused(of_blocks, tmp_path, images):
    path, _ = of_blocks(1)
    with pytest.raises(InputError, match="--vit-model"):
        list(predict_images(path, images, str(make_vit(tmp_path / "other", seed=1))))
