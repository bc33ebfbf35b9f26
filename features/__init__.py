"""From images to features: getting a data set; the frozen backbone runs over it once, and the result is cached."""

import storage  # noqa: F401 - first: it says if a module of another project hides one of this
from features.catalogue import catalogue_rows, catalogue_text, known_sets
from features.check import check_images, image_problem
from features.extraction import bundled_features, extract, get_features
from features.fetch import fetch_dataset
from features.pretrained import load_extractor
from storage import FeatureSet, copy_features, load_features, save_features

__all__ = [
    "FeatureSet",
    "bundled_features",
    "catalogue_rows",
    "catalogue_text",
    "check_images",
    "copy_features",
    "extract",
    "fetch_dataset",
    "get_features",
    "image_problem",
    "known_sets",
    "load_extractor",
    "load_features",
    "save_features",
]
