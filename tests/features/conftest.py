"""What the tests of extraction and of tokens need: a pass over a few images that can be counted and made to fail."""

import pytest
import torch

from dataset import find_dataset
from features import extract, load_extractor
from models import FeatureExtractor

ASKED = 1  # image that `extract` puts through the model to know the number of tokens


class Counting(FeatureExtractor):
    """Counts images, and can be told to misbehave."""

    seen, fail_after, fits, spoil = 0, None, None, False
    white = 0.0  # a token of a white image

    def count(self, pixels):
        if self.fits is not None and len(pixels) > self.fits:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        if self.fail_after is not None and self.seen >= self.fail_after:
            raise KeyboardInterrupt
        self.seen += len(pixels)

    def tokens(self, pixels, blocks):
        self.count(pixels)
        features, tokens = super().tokens(pixels, blocks)
        tokens = tokens.clone()
        tokens[(pixels == 255).flatten(1).all(1), 3, 2] = self.white
        return features, tokens

    def forward(self, pixels):
        self.count(pixels)
        result = super().forward(pixels)
        if self.spoil:
            result = result.clone()
            result[-1, 0] = 1e5  # finite, but not in float16
        return result


@pytest.fixture
def extractor(tiny_vit):
    plain = load_extractor(tiny_vit)
    return Counting(plain.model, plain.preprocessing, plain.name)


@pytest.fixture
def toy(image_root):
    return find_dataset(image_root)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def run(toy, extractor, cache):
    """Extract in this process and without a bar; keyword arguments replace the usual ones."""

    def run(**settings):
        usual = {"dataset": toy, "extractor": extractor, "cache_dir": cache, "workers": 0, "progress": False}
        return extract(**usual | settings)

    return run
