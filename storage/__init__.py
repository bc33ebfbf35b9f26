"""Everything on disk: files that appear whole, a results directory, and the format of a feature file."""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

for name in ("config", "dataset", "models"):  # others call files of theirs so as well; the faces import this first
    found = Path(find_spec(name).origin).resolve()
    if found.parent != Path(__file__).resolve().parents[1]:
        raise ImportError(
            f"'{found}' hides this project's {name}: rename it, or put the project's folder first on Python's path "
            "with sys.path.insert(0, DIR)."
        )

from storage.atomic import WriteError, atomic_write, remove_leftovers, write_errors  # noqa: E402

# Imported on first use: they need torch, which takes seconds to import, and figures do without it.
_MODULES = {
    "FORMAT_VERSION": "feature_file",
    "FeatureSet": "feature_file",
    "copy_features": "feature_file",
    "load_features": "feature_file",
    "save_features": "feature_file",
    "Results": "results",
    "check_arrays": "schema",
    "damaged": "schema",
    "environment": "results",
    "load_arrays": "results",
    "ranges": "results",
    "record_key": "results",
}

__all__ = ["WriteError", "atomic_write", "remove_leftovers", "write_errors", *_MODULES]


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
