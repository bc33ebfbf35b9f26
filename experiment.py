"""The command line: ``python experiment.py COMMAND``.

Exit codes: 0 done; 1 a training run failed (one seed, or --strict); 2 bad input, one sentence on stderr; 130 Ctrl-C.
"""

import os
import signal
import sys

if __name__ == "__main__":  # Ctrl-C while libraries are imported: an exception might be swallowed there
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"\nInterrupted.\n"), os._exit(130)))

import argparse
import importlib
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import config
from config import InputError

FOLDERS = {"study": "study", "compare": "compare", "export-domainbed": "compare"}  # below RESULTS_DIR


class Parser(argparse.ArgumentParser):
    """argparse that reports bad input in one sentence."""

    def error(self, message: str) -> None:
        self.exit(2, f"{message[0].upper()}{message[1:].rstrip('.')}; see {self.prog} --help.\n")


def run(options: argparse.Namespace) -> None:
    from study import Run, Study, finding, lodo_table, wide_table

    study = Study(Run.from_config(None, options.holdouts, **_training(options)))
    print(study.run.features.describe(), flush=True)
    study.train()
    study.report()
    if not options.no_figures:
        from study.figures import save_all

        save_all(study, config.DATA_ROOT)
    print(f"\n{wide_table(lodo_table(study.records())).to_string()}\n\n{finding(study.records())}")
    print(f"Everything is in {config.RESULTS_DIR}: start with summary_report.txt.")
    _warn(study.failures())


def study(options: argparse.Namespace) -> None:
    from evidence import Protocol

    sweep = None if options.sweep_seeds is None else range(options.sweep_seeds)
    protocol = Protocol.from_config(None, sweep, **_training(options))
    print(protocol.short.run.features.describe(), flush=True)
    protocol.train()
    print(f"\n{protocol.write()}\nEverything is in {_directory(options)}: start with report.txt.")


def compare(options: argparse.Namespace) -> None:
    from field import Comparison, failed, write

    choice = {"holdouts": options.holdouts, **_training(options)}
    comparison = Comparison.from_config(options.algorithms, options.trials, options.leave_one_out, **choice)
    print(comparison.run.features.describe(), flush=True)
    comparison.train()
    print(f"\n{write(comparison)}\nEverything is in {_directory(options)}: start with comparison.txt.", flush=True)
    if not options.no_figures:
        from field.figures import save_all

        save_all(comparison)
    _warn(failed(comparison))


def features(options: argparse.Namespace) -> None:
    from engine import prepare_machine
    from features import copy_features, get_features

    if config.DATA_ROOT is None:
        raise InputError("features needs --data-root DIR.")
    data = get_features(config.DATA_ROOT, device=prepare_machine(config.DEVICE, config.THREADS), verify=options.verify)
    print(data.describe())
    if options.output:
        copy_features(data, options.output)
        print(f"Copied to {options.output}.")


def predict(options: argparse.Namespace) -> None:
    from engine import prepare_machine
    from study import predict_images

    device, size = prepare_machine(config.DEVICE, config.THREADS), config.EXTRACTION_BATCH_SIZE
    choice = {"seed": options.seed, "device": device, "batch_size": size}
    for image, ranked in predict_images(options.weights, options.images, config.VIT_MODEL, **choice):
        print(f"{image}: " + ", ".join(f"{name} {chance:.3f}" for name, chance in ranked), flush=True)


def export_domainbed(options: argparse.Namespace) -> None:
    from engine import prepare_machine
    from features import get_features
    from field import export_domainbed

    device = prepare_machine(config.DEVICE, config.THREADS)
    source = partial(get_features, config.DATA_ROOT, config.FEATURES_FILE, device=device)
    export_domainbed(_directory(options), options.directory, source)


def import_domainbed(options: argparse.Namespace) -> None:
    from field import domainbed_tables

    print(domainbed_tables(options.directory, options.dataset))


def docs(options: argparse.Namespace) -> None:
    from evidence import benchmark_tables, results_tables, write_pages
    from field import comparison_tables

    root = Path(__file__).resolve().parent
    for path in write_pages(root, results_tables(root) | benchmark_tables(root) | comparison_tables(root)):
        print(f"Wrote {path.relative_to(root)}.")


# name -> what it does, its package (imported when it is known that the options are right: it takes seconds), help
COMMANDS = {
    "run": (run, "study", "train both phases, write table, report and figures"),
    "study": (study, "evidence", "arms and controls, sweeps and diagnostics: the whole answer"),
    "compare": (compare, "field", "the methods of the field on the same features, seeds and splits"),
    "features": (features, "features", "run the frozen ViT over a folder of images, nothing else"),
    "predict": (predict, "study", "class probabilities of images"),
    "export-domainbed": (export_domainbed, "field", "write the runs of a comparison as DomainBed does"),
    "import-domainbed": (import_domainbed, "field", "tables of DomainBed's own runs, by its selection rules"),
    "docs": (docs, "field", "write the tables of docs/ and README.md from results/reference/"),
}


def names(text: str) -> list[str]:
    """A list of names, separated by commas."""
    found = [name.strip() for name in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError("a name in the list is empty")
    return found


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="experiment.py", description="Domain generalization with importance-based weight masking.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    machine, images, training = _machine_options(), _image_options(), _training_options()
    shared = {name: [training, images, machine] for name in ("run", "study", "compare")} | {
        "features": [images, machine]
    }
    added = {}
    for name, (_, _, text) in COMMANDS.items():
        about = {"help": text, "description": f"{text[0].upper()}{text[1:]}."}
        added[name] = commands.add_parser(name, parents=shared.get(name, [machine]), **about)
    for name in ("run", "compare"):
        added[name].add_argument("--holdouts", type=names, metavar="A,B", help="domains to leave out (default: each)")
        added[name].add_argument("--no-figures", action="store_true", help="write numbers only")
    add = added["study"].add_argument
    add("--sweep-seeds", type=int, metavar="N", help="seeds of the exploratory sweep (default: 50 at most)")
    add = added["compare"].add_argument
    add("--algorithms", type=names, metavar="A,B", help="names (default: all; a wrong one lists them)")
    add("--trials", type=int, default=1, metavar="N", help="hyperparameters tried per method (default 1)")
    add("--leave-one-out", action="store_true", help="train without every pair of domains as well")
    added["features"].add_argument("--output", metavar="FILE", help="copy the features there")
    add = added["predict"].add_argument
    add("images", nargs="+", metavar="IMAGE")
    add("--weights", required=True, metavar="FILE", help="of results/weights/, Phase 1 or 2")
    add("--vit-model", metavar="ID_OR_DIR", help="the model the weights were trained on")
    add("--seed", type=int, metavar="N", help="which network of the file (default: its first)")
    add = added["export-domainbed"].add_argument
    add("directory", metavar="DIR", help="of the runs; what is there is kept")
    add("--results-dir", metavar="DIR", help=f"of the comparison (default {config.RESULTS_DIR}/compare)")
    add("--features", metavar="FILE", help="the feature file that it was made with")
    add("--data-root", metavar="DIR", help="or the images")
    add("--vit-model", metavar="ID_OR_DIR", help="and their model")
    add = added["import-domainbed"].add_argument
    add("directory", metavar="DIR", help="of DomainBed's runs")
    add("--dataset", metavar="NAME", help="where the runs are of several")
    return parser


def _machine_options() -> Parser:
    parent = Parser(add_help=False)
    parent.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parent.add_argument("--threads", type=int, metavar="N", help="CPU threads")
    setting = {"action": "append", "default": [], "metavar": "NAME=VALUE"}
    parent.add_argument("--set", **setting, help="any name of config.py; may be repeated")
    return parent


def _image_options() -> Parser:
    parent = Parser(add_help=False)
    parent.add_argument("--data-root", metavar="DIR", help="folder of domain folders of class folders of images")
    parent.add_argument("--vit-model", metavar="ID_OR_DIR", help=f"default {config.VIT_MODEL}")
    parent.add_argument("--verify", action="store_true", help="read all image files again, trust no time stamp")
    return parent


def _training_options() -> Parser:
    parent = Parser(add_help=False)
    parent.add_argument("--seeds", type=int, metavar="N", help=f"seeds 0 … N-1 (default {config.NUM_SEEDS})")
    parent.add_argument("--features", metavar="FILE", help="a feature file, in the format of data/README.md")
    where = f"default {config.RESULTS_DIR}; for study and compare a folder below it"
    parent.add_argument("--results-dir", metavar="DIR", help=where)
    parent.add_argument("--overwrite", action="store_true", help="delete the results that are there first")
    parent.add_argument("--strict", action="store_true", help="stop at the first network that fails")
    return parent


def apply_options(options: argparse.Namespace) -> None:
    """Put the options into `config`.

    Raises:
        InputError: an unknown setting, a value of the wrong type, options that exclude each other.
    """
    config.apply(dict(config.parse(assignment) for assignment in options.set))
    constants = {"data_root": "DATA_ROOT", "vit_model": "VIT_MODEL", "features": "FEATURES_FILE", "device": "DEVICE"}
    constants |= {"results_dir": "RESULTS_DIR", "seeds": "NUM_SEEDS", "threads": "THREADS"}
    config.apply({n: v for option, n in constants.items() if (v := getattr(options, option, None)) is not None})
    for option in ("results_dir", "output", "weights", "directory"):  # the shell does not expand --option=~/x
        if getattr(options, option, None):
            setattr(options, option, os.path.expanduser(getattr(options, option)))
    paths = {name: getattr(config, name) for name in ("DATA_ROOT", "FEATURES_FILE", "RESULTS_DIR", "CACHE_DIR")}
    config.apply({name: os.path.expanduser(path) for name, path in paths.items() if path})
    if config.NUM_SEEDS < 1:
        raise InputError(f"--seeds must be at least 1, not {config.NUM_SEEDS}.")
    if not config.RESULTS_DIR:
        raise InputError("RESULTS_DIR must not be empty.")
    if not getattr(options, "directory", "given").strip():
        raise InputError("DIR must not be empty.")
    if config.DATA_ROOT is not None and config.FEATURES_FILE is not None:
        raise InputError("--data-root and --features exclude each other: images or features, not both.")
    if options.command in ("run", "study", "compare") and options.vit_model and config.DATA_ROOT is None:
        raise InputError("--vit-model needs --data-root: without images there is nothing to run a model on.")


def _directory(options: argparse.Namespace) -> Path:
    """Where a command's results are: --results-dir, else RESULTS_DIR or a folder of the command's below it."""
    given = getattr(options, "results_dir", None)
    return Path(given) if given else Path(config.RESULTS_DIR) / FOLDERS.get(options.command, "")


def _training(options: argparse.Namespace) -> dict[str, object]:
    """What `Run.from_config` is told by the options of a command that trains."""
    choice = {name: getattr(options, name) for name in ("overwrite", "verify", "strict")}
    return {"directory": _directory(options), **choice}


def _warn(failures: Sequence[str]) -> None:
    if failures:
        text = f"Warning: {len(failures)} networks failed and are left out, first {failures[0]}."
        print(text, file=sys.stderr)


def interrupt(*_) -> None:
    """Ctrl-C while a command works: end in good order, and do not be disturbed while doing so."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = build_parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for library in ("httpx", "matplotlib"):  # requests, and a new list of fonts
        logging.getLogger(library).setLevel(logging.WARNING)
    perform, package, _ = COMMANDS[options.command]
    importlib.import_module(package)
    from engine import TrainingFailedError

    if __name__ == "__main__":  # not where another program calls this function
        signal.signal(signal.SIGINT, interrupt)
    try:
        apply_options(options)
        perform(options)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        where = f" '{error.filename}'" if error.filename else ""
        print(f"The file{where} cannot be used: {error.strerror or error}.", file=sys.stderr)
        return 2
    except TrainingFailedError as error:
        advice = "Without --strict and with more seeds, failed networks are recorded and left out."
        print(f"{error} {advice}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        change = "without --overwrite, " if "--overwrite" in arguments else ""
        print(f"\nInterrupted; {change}the same command goes on from here.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    code = main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # there is nothing left to interrupt
    sys.exit(code)
