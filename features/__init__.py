"""From images to features: the frozen backbone runs once over a data set, and the result is cached."""

import storage  # noqa: F401 - first: it says if a module of another project hides one of this
from features.check import check_images, image_problem
from features.extraction import bundled_features, extract, get_features
from features.pretrained import load_extractor
from storage import FeatureSet, copy_features, load_features, save_features

__all__ = [
    "FeatureSet",
    "bundled_features",
    "check_images",
    "copy_features",
    "extract",
    "get_features",
    "image_problem",
    "load_extractor",
    "load_features",
    "save_features",
]
