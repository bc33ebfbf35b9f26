"""Images as inputs of a network: as features see them, and augmented by a stream of random numbers."""

import numpy as np
import pytest
import torch
from PIL import Image

from config import InputError
from dataset import find_dataset
from features import load_extractor
from features.check import content_hash
from features.images import NUMBERS, ImageInputs, augment, crop_box
from tests.conftest import make_images

HALF = [0.5] * NUMBERS  # no change of colour


@pytest.fixture
def inputs(vit, tmp_path):
    dataset = find_dataset(make_images(tmp_path / "toy"))
    contents = [content_hash(dataset.read(row)) for row in range(len(dataset))]
    return ImageInputs(dataset, load_extractor(vit).preprocessing, (32, 32), contents)


def test_tested_images_are_those_that_features_were_extracted_from(inputs, vit):
    assert inputs.shape == (12, 3, 32, 32)
    every = torch.cat([*inputs.split(5)])
    assert every.shape == inputs.shape
    assert every.dtype == torch.uint8
    image = Image.open(inputs.dataset.path(7)).convert("RGB")
    assert torch.equal(every[7], load_extractor(vit).preprocessing(image))
    assert torch.equal(inputs[7], every[7])
    assert torch.equal(inputs[2:5], every[2:5])
    assert torch.equal(inputs[torch.tensor([7, 0, 7])], every[[7, 0, 7]])


def test_augmentation_is_a_function_of_the_seeds_stream(inputs):
    rows = torch.tensor([[0, 1, 0], [0, 1, 2]])

    def draws(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    found = inputs.augmented(rows, draws(1, 2))
    assert (found.shape, found.dtype) == ((2, 3, 3, 32, 32), torch.uint8)
    assert torch.equal(found, inputs.augmented(rows, draws(1, 2)))
    assert torch.equal(found[1:], inputs.augmented(rows[1:], draws(2)))  # whatever is trained beside it
    assert not torch.equal(found[0, 0], found[0, 2])  # the same image, seen twice
    assert not torch.equal(found[0, 0], found[1, 0])


def test_an_image_that_is_gone_or_another_one_is_named(inputs):
    inputs.dataset.path(3).write_bytes(inputs.dataset.read(4))
    with pytest.raises(InputError, match=f"{inputs.dataset.files[3]}.*changed"):
        inputs[torch.tensor([3])]
    inputs.dataset.path(3).unlink()
    with pytest.raises(InputError, match=f"{inputs.dataset.files[3]}.*No such file"):
        inputs.augmented(torch.tensor([[3]]), [torch.Generator()])


@pytest.mark.parametrize("seed", range(20))
def test_crops_have_the_area_and_the_sides_of_the_protocol(seed):
    top, left, height, width = crop_box((227, 200), np.random.default_rng(seed).random(22).tolist())
    assert 0 <= left <= left + width <= 227
    assert 0 <= top <= top + height <= 200
    assert 0.69 < width * height / (227 * 200) < 1.01
    assert 0.74 < width / height < 1.34


def test_a_crop_that_does_not_fit_is_the_largest_that_is_allowed():
    assert crop_box((400, 100), [0.9, 0.5] * 11) == (0, 133, 100, 133)
    assert crop_box((100, 400), [0.9, 0.5] * 11) == (133, 0, 133, 100)


def test_each_number_changes_what_it_is_for():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    whole = [1.0, 0.5] * 10 + HALF[20:]  # all of its area, square
    plain = np.asarray(augment(image, (40, 40), whole))
    assert abs(plain.astype(int) - pixels).mean() < 1  # hue goes through another colour space and back

    def changed(place, value):
        return np.asarray(augment(image, (40, 40), [*whole[:place], value, *whole[place + 1 :]])).astype(int)

    assert (changed(22, 0.4) == plain[:, ::-1]).all()  # mirrored
    grey = changed(31, 0.05)
    assert (grey == grey[..., :1]).all()
    assert changed(27, 1.0).mean() > 1.15 * plain.mean()  # brightness
    assert changed(28, 0.0).std() < 0.8 * plain.std()  # contrast
    spread = np.ptp(plain.astype(int), axis=2).mean()
    assert np.ptp(changed(29, 0.0), axis=2).mean() < 0.8 * spread  # saturation
    assert abs(changed(30, 1.0) - plain).mean() > 20  # hue
    small = np.asarray(augment(image, (20, 30), whole))
    assert small.shape == (20, 30, 3)


def test_the_crop_moves_with_its_numbers():
    pixels = np.zeros((40, 40, 3), dtype=np.uint8)
    pixels[:, 20:] = 200
    image, part = Image.fromarray(pixels), [0.0, 0.5] * 10
    left, right = (
        np.asarray(augment(image, (32, 32), [*part, 0.5, corner, *HALF[22:]])).astype(int).mean()
        for corner in (0.0, 0.99)
    )
    assert right > left + 20
