"""Everything on disk: files that appear whole, a results directory, and the format of a feature file."""

from importlib import import_module

from storage.atomic import atomic_write

# Imported on first use: they need torch, which takes seconds to import, and figures do without it.
_MODULES = {
    "FORMAT_VERSION": "feature_file",
    "FeatureSet": "feature_file",
    "copy_features": "feature_file",
    "load_features": "feature_file",
    "save_features": "feature_file",
    "Results": "results",
    "environment": "results",
    "load_arrays": "results",
    "record_key": "results",
}

__all__ = ["atomic_write", *_MODULES]


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
