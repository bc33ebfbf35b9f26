"""Which settings of `config` a command uses, and how options become settings."""

import argparse
import os

import config
from config import InputError

TRAINING = ("run", "study", "forms", "confirm", "compare", "columns")
IMAGES = ("VIT_MODEL", "POOLING", "FEATURE_LAYERS", "CACHE_DIR", "EXTRACTION_BATCH_SIZE", "EXTRACTION_WORKERS")
MACHINE = ("DEVICE", "THREADS")
TRAINED_ON = (*MACHINE, "SCHEDULER")
TRANSFER = tuple(name for name in config.names() if name.startswith("TRANSFER_"))
OF_FEATURES = ("DATA_ROOT", *IMAGES, "FEATURES_FILE", "TRAINED_BLOCKS", "BACKBONE_LEARNING_RATE", "HIDDEN_SIZES")
HONOURED = {  # the settings that a command uses, where these are not all; it refuses the others
    "columns": ("DATA_ROOT", *IMAGES, "FEATURES_FILE", "OUT_FRACTION", "NUM_SEEDS", "RESULTS_DIR", *TRAINED_ON),
    "figures": ("DATA_ROOT", *IMAGES, "FEATURES_FILE", "RESULTS_DIR", *MACHINE),
    "features": ("DATA_ROOT", *IMAGES, "TRAINED_BLOCKS", *MACHINE),
    "predict": ("VIT_MODEL", "EXTRACTION_BATCH_SIZE", *MACHINE),
    "transfer": (*TRANSFER, *OF_FEATURES, "RESULTS_DIR", *TRAINED_ON),
    "export-domainbed": ("DATA_ROOT", *IMAGES, "FEATURES_FILE", "RESULTS_DIR", *MACHINE),
    "import-domainbed": (),
    "export-original": ("RESULTS_DIR",),
    "import-original": (),
    "report": ("RESULTS_DIR",),
    "data": (),
    "docs": (),
}
CONSTANTS = {  # option -> the setting that it gives
    "data_root": "DATA_ROOT",
    "vit_model": "VIT_MODEL",
    "features": "FEATURES_FILE",
    "results_dir": "RESULTS_DIR",
    "seeds": "NUM_SEEDS",
    "device": "DEVICE",
    "threads": "THREADS",
    "scheduler": "SCHEDULER",
    "steps": "IMAGE_STEPS",
    "updates": "TRANSFER_UPDATES",
    "channels": "TRANSFER_CHANNELS",
}


def apply_options(options: argparse.Namespace) -> None:
    """Put the options into `config`.

    Raises:
        InputError: an unknown setting, a value of the wrong type, options that exclude each other.
    """
    given = typed_settings(options)
    blocks, _ = given.get("TRAINED_BLOCKS", (config.TRAINED_BLOCKS, ""))
    if options.command in TRAINING and options.command != "run":
        config.refuse_whole_model(options.command, blocks)
    idle = [config.without_effect(name, blocks) for name in given] if options.command in TRAINING else []
    if any(idle):
        raise InputError(next(filter(None, idle)))
    config.apply({name: value for name, (value, _) in given.items()})
    for option in ("results_dir", "output", "weights", "directory"):  # the shell does not expand --option=~/x
        if getattr(options, option, None):
            setattr(options, option, os.path.expanduser(getattr(options, option)))
    paths = {name: getattr(config, name) for name in ("DATA_ROOT", "FEATURES_FILE", "RESULTS_DIR", "CACHE_DIR")}
    config.apply({name: os.path.expanduser(path) for name, path in paths.items() if path})
    for option, called in (("directory", "DIR"), ("output", "--output")):
        if getattr(options, option, None) is not None and not getattr(options, option).strip():
            raise InputError(f"{called} must not be empty.")
    if config.DATA_ROOT is not None and config.FEATURES_FILE is not None:
        raise InputError("--data-root and --features exclude each other: images or features, not both.")
    of_images = [typed for name, (_, typed) in given.items() if name in IMAGES]
    of_images += ["--verify"] if getattr(options, "verify", False) else []
    if options.command != "predict" and of_images and config.DATA_ROOT is None:
        raise InputError(f"{of_images[0]} needs --data-root: without images there is nothing to run a model on.")


def typed_settings(options: argparse.Namespace) -> dict[str, tuple[object, str]]:
    """The settings that were typed: name -> value, and how it was typed."""
    typed_values = [(*config.parse(assignment), f"--set {assignment}") for assignment in getattr(options, "set", ())]
    for option, value in vars(options).items():
        if option in CONSTANTS and value is not None:
            typed_values.append((CONSTANTS[option], value, f"--{option.replace('_', '-')}"))
    given = {}
    for name, value, typed in typed_values:
        if name not in HONOURED.get(options.command, config.names().keys() - TRANSFER):
            raise InputError(f"{options.command} does not use {name}: leave it out.")
        if name in given:
            raise InputError(f"{given[name][1]} and {typed} both say what {name} is: give one of them.")
        given[name] = len(value) if typed == "--seeds" else value, typed
    return given
