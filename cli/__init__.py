"""The command line: what can be typed, and how it becomes settings. Commands themselves are in `experiment`."""

from cli.parser import build_parser
from cli.settings import OF_FEATURES, apply_options, typed_settings

__all__ = ["OF_FEATURES", "apply_options", "build_parser", "typed_settings"]
