"""The experiment without a notebook: ``python experiment.py run``, ``study``, ``features`` or ``predict``.

Exit codes: 0 done; 1 a training run failed (one seed, or --strict); 2 bad input, one sentence on stderr; 130 Ctrl-C.
"""

import os
import signal
import sys

if __name__ == "__main__":  # Ctrl-C before `main` can see to it, as early as can be
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"\nInterrupted.\n"), os._exit(130)))

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import config
import field
from config import InputError


class Parser(argparse.ArgumentParser):
    """argparse that reports bad input in one sentence."""

    def error(self, message: str) -> None:
        self.exit(2, f"{message[0].upper()}{message[1:].rstrip('.')}; see {self.prog} --help.\n")


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="experiment.py", description="Domain generalization with importance-based weight masking.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    run = commands.add_parser("run", help="train both phases, write table, report and figures")
    run.add_argument("--holdouts", metavar="A,B", help="domains to leave out (default: each in turn)")
    run.add_argument("--no-figures", action="store_true", help="write numbers only")
    study = commands.add_parser("study", help="variants and controls, sweeps and diagnostics: the whole answer")
    study.add_argument(
        "--sweep-seeds", type=int, metavar="N", help="seeds of the exploratory sweep (default: 50 at most)"
    )
    compare, others = field.add_commands(commands.add_parser)
    trained = [run, study, compare]
    for command in trained:
        command.add_argument("--seeds", type=int, metavar="N", help=f"seeds 0 … N-1 (default {config.NUM_SEEDS})")
        command.add_argument("--features", metavar="FILE", help="a feature file, in the format of data/README.md")
        command.add_argument(
            "--results-dir",
            metavar="DIR",
            help=f"default {config.RESULTS_DIR}; below it study and compare have theirs",
        )
        command.add_argument("--overwrite", action="store_true", help="delete the results that are there first")
        command.add_argument("--strict", action="store_true", help="stop at the first network that fails")
    features = commands.add_parser("features", help="run the frozen ViT over a folder of images, nothing else")
    features.add_argument("--output", metavar="FILE", help="copy the features there")
    for command in (*trained, features):
        command.add_argument("--data-root", metavar="DIR", help="folder of domain folders of class folders of images")
        command.add_argument("--vit-model", metavar="ID_OR_DIR", help=f"default {config.VIT_MODEL}")
        command.add_argument("--verify", action="store_true", help="read all image files again, trust no time stamp")
    predict = commands.add_parser("predict", help="class probabilities of images")
    predict.add_argument("images", nargs="+", metavar="IMAGE")
    predict.add_argument("--weights", required=True, metavar="FILE", help="of results/weights/, Phase 1 or 2")
    predict.add_argument("--vit-model", metavar="ID_OR_DIR", help="the model the weights were trained on")
    predict.add_argument("--seed", type=int, metavar="N", help="which network of the file (default: its first)")
    for command in (*trained, features, predict, *others):
        command.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
        command.add_argument("--threads", type=int, metavar="N", help="CPU threads")
        command.add_argument(
            "--set", action="append", default=[], metavar="NAME=VALUE", help="any name of config.py; may be repeated"
        )
    return parser


def apply_options(options: argparse.Namespace) -> None:
    """Put the options into `config`.

    Raises:
        InputError: an unknown setting, a value of the wrong type, options that exclude each other.
    """
    config.apply(dict(config.parse(assignment) for assignment in options.set))
    names = {"data_root": "DATA_ROOT", "vit_model": "VIT_MODEL", "features": "FEATURES_FILE", "device": "DEVICE"}
    names |= {"results_dir": "RESULTS_DIR", "seeds": "NUM_SEEDS", "threads": "THREADS"}
    config.apply({n: v for option, n in names.items() if (v := getattr(options, option, None)) is not None})
    for option in ("results_dir", "output", "weights", "directory"):  # the shell does not expand --option=~/x
        if getattr(options, option, None):
            setattr(options, option, os.path.expanduser(getattr(options, option)))
    paths = {name: getattr(config, name) for name in ("DATA_ROOT", "FEATURES_FILE", "RESULTS_DIR", "CACHE_DIR")}
    config.apply({name: os.path.expanduser(path) for name, path in paths.items() if path})
    if config.NUM_SEEDS < 1:
        raise InputError(f"--seeds must be at least 1, not {config.NUM_SEEDS}.")
    if not config.RESULTS_DIR:
        raise InputError("RESULTS_DIR is empty: which folder?")
    if config.DATA_ROOT is not None and config.FEATURES_FILE is not None:
        raise InputError("--data-root and --features exclude each other: images or features, not both.")
    if options.command in ("run", "study", "compare") and options.vit_model and config.DATA_ROOT is None:
        raise InputError("--vit-model needs --data-root: without images there is nothing to run a model on.")


def run(options: argparse.Namespace) -> None:
    """Train both phases and write everything a run writes."""
    from evaluation import finding, lodo_table, wide_table
    from study import Study

    holdouts = [name.strip() for name in options.holdouts.split(",")] if options.holdouts else None
    choice = {"overwrite": options.overwrite, "verify": options.verify, "strict": options.strict}
    study = Study.from_config(None, holdouts, **choice)
    print(study.data.describe(), flush=True)
    study.phase1()
    study.phase2()
    study.report()
    if not options.no_figures:
        from figures import save_all  # takes a second to import

        save_all(study, config.DATA_ROOT)
    print(f"\n{wide_table(lodo_table(study.records())).to_string()}\n")
    print(finding(study.records()))
    print(f"Everything is in {config.RESULTS_DIR}: start with summary_report.txt.")
    if failures := study.failures():
        print(f"Warning: {len(failures)} networks failed and are left out, first {failures[0]}.", file=sys.stderr)


def study(options: argparse.Namespace) -> None:
    """Variants and controls from both starts, twice as to length, sweeps, diagnostics, report."""
    from answer import Answer
    from config import Settings
    from features import get_features
    from training import prepare_machine

    seeds = config.NUM_SEEDS
    sweep = min(seeds, 50) if options.sweep_seeds is None else options.sweep_seeds
    if seeds < 2 or sweep < 2:
        raise InputError("A study compares over seeds: --seeds and --sweep-seeds must be at least 2.")
    device, directory = prepare_machine(), options.results_dir or Path(config.RESULTS_DIR) / "study"
    Answer.check(Settings.current(), directory, options.overwrite)  # before an extraction that may take long
    data = get_features(config.DATA_ROOT, config.FEATURES_FILE, device=device, verify=options.verify)
    print(data.describe(), flush=True)
    choice = {"device": device, "strict": options.strict, "overwrite": options.overwrite}
    answer = Answer(data, Settings.current(), directory, seeds, sweep, **choice)
    answer.run()
    print(f"\n{answer.write()}\nEverything is in {directory}: start with report.txt.")


def features(options: argparse.Namespace) -> None:
    """Extract features, and copy them where asked."""
    from features import copy_features, get_features
    from training import prepare_machine

    if config.DATA_ROOT is None:
        raise InputError("--data-root is missing: which images?")
    data = get_features(config.DATA_ROOT, device=prepare_machine(), verify=options.verify)
    print(data.describe())
    if options.output:
        copy_features(data, options.output)
        print(f"Copied to {options.output}.")


def predict(options: argparse.Namespace) -> None:
    """Print the class probabilities of images, best first, a line per image, batch by batch."""
    from dataset import load_image, problem_of
    from records import load_arrays
    from training import prepare_machine

    size = 8 if config.EXTRACTION_BATCH_SIZE is None else config.EXTRACTION_BATCH_SIZE
    if size < 1:
        raise InputError(f"EXTRACTION_BATCH_SIZE must be at least 1, not {size}.")

    arrays, header = load_arrays(options.weights)
    if not any(name.startswith("final.") for name in arrays):
        raise InputError(f"'{options.weights}' holds no networks: give a file of results/weights/.")
    seeds = arrays["seeds"].tolist()
    seed = seeds[0] if options.seed is None else options.seed
    if seed not in seeds:
        raise InputError(f"'{options.weights}' has no seed {seed}; it has {', '.join(map(str, seeds))}.")
    refuse_failed(Path(options.weights), arrays, seed)
    model = joined_model(arrays, header, seeds.index(seed)).to(prepare_machine())
    for paths in (options.images[i : i + size] for i in range(0, len(options.images), size)):
        images = []
        for path in paths:
            try:
                images.append(load_image(path))
            except Exception as error:  # Pillow's decoders raise anything
                reason = problem_of(error, Path(path))
                raise InputError(f"'{path}' cannot be read as an image ({reason}).") from error
        for path, chances in zip(paths, model.predict(images), strict=True):
            ranked = sorted(zip(chances.tolist(), model.class_names, strict=True), reverse=True)
            print(f"{path}: " + ", ".join(f"{name} {chance:.3f}" for chance, name in ranked), flush=True)


def refuse_failed(path: Path, arrays: dict, seed: int) -> None:
    """Raise an `InputError` if this network failed, by the code in its weights file or else in the history beside it.

    A network is not sound because its weights are finite: its mask may have come from a source network that failed.
    """
    from records import load_arrays
    from training import failure_reason

    seeds, coded = arrays["seeds"].tolist(), arrays
    history = path.parent.parent / "histories" / f"{path.stem}.npz"
    if "failed" not in arrays and history.is_file():  # weights of an earlier version
        coded = load_arrays(history)[0]
    codes = dict(zip(coded["seeds"].tolist(), coded["failed"].tolist(), strict=True)) if "failed" in coded else {}
    reasons = {number: failure_reason(code) for number, code in codes.items() if code}
    finals = [value.flatten(1).isfinite().all(1) for name, value in arrays.items() if name.startswith("final.")]
    for row, number in enumerate(seeds):
        if not all(finite[row] for finite in finals):
            reasons.setdefault(number, "its weights are not finite")
    if seed in reasons:
        sound = ", ".join([str(number) for number in seeds if number not in reasons][:10])
        advice = f"give another one with --seed: {sound}" if sound else "and so did all others in the file"
        raise InputError(f"Network {seed} of '{path}' failed in training ({reasons[seed]}); {advice}.")


def joined_model(arrays: dict, header: dict, index: int):
    """Frozen ViT and network number `index` of a weights file, as one model.

    Raises:
        InputError: the ViT is not the one whose features the network was trained on.
    """
    from models import FeedforwardClassifier, ImageClassifier, ViTFeatureExtractor

    trained_on, made_by = header["features"]["model"] or {}, header["features"]["preprocessing"]
    if "weights_sha256" not in trained_on:
        raise InputError(
            "These networks were trained on features of a model that is not known: they cannot see images."
        )
    extractor = ViTFeatureExtractor.from_pretrained()
    if extractor.weights_hash() != trained_on["weights_sha256"] or extractor.preprocessing.describe() != made_by:
        raise InputError(
            f"The weights were trained on features of '{trained_on['name']}', and '{extractor.name}' is another "
            "model or prepares images otherwise: give the right one with --vit-model."
        )
    classes = header["class_names"]
    classifier = FeedforwardClassifier(extractor.feature_size, len(classes), header["hidden_sizes"])
    state = {n.removeprefix("final."): v[index] for n, v in arrays.items() if n.startswith("final.")}
    classifier.load_state_dict(state)
    return ImageClassifier(extractor, classifier, classes).eval()


COMMANDS = {"run": run, "study": study, "features": features, "predict": predict, "compare": field.compare}
COMMANDS |= {"export-domainbed": field.export_domainbed, "import-domainbed": field.import_domainbed}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        return perform(arguments)
    except KeyboardInterrupt:
        if signal.getsignal(signal.SIGINT) is leave:  # not where a notebook calls this function
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        print(f"\n{goodbye(arguments)}", file=sys.stderr, flush=True)
        return 130


def perform(arguments: Sequence[str]) -> int:
    """Run a command; returns the exit code, unless it is interrupted."""
    options = build_parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for library in ("httpx", "matplotlib"):  # requests, and a new list of fonts
        logging.getLogger(library).setLevel(logging.WARNING)
    from training import TrainingFailedError

    try:
        apply_options(options)
        COMMANDS[options.command](options)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        where = f" '{error.filename}'" if error.filename else ""
        print(f"The file{where} cannot be used: {error.strerror or error}.", file=sys.stderr)
        return 2
    except TrainingFailedError as error:
        print(
            f"{error} Without --strict and with more seeds, failed networks are recorded and left out.", file=sys.stderr
        )
        return 1
    return 0


def goodbye(arguments: Sequence[str]) -> str:
    """What is said at Ctrl-C."""
    change = "without --overwrite, " if "--overwrite" in arguments else ""
    return f"Interrupted; {change}the same command goes on from here."


def interrupt(number: int, frame: FrameType | None) -> None:
    """The first Ctrl-C: `KeyboardInterrupt`, but the end at once inside an import, which may lose the exception."""
    outer = frame
    while outer is not None:
        if outer.f_code.co_filename == "<frozen importlib._bootstrap>":
            leave(number, frame)
        outer = outer.f_back
    signal.signal(signal.SIGINT, leave)
    raise KeyboardInterrupt


def leave(_number: int, _frame: FrameType | None) -> None:
    """The second Ctrl-C, while the first one waits for work that is in flight: the end at once, without a traceback."""
    os.write(2, f"\n{goodbye(sys.argv)}\n".encode())
    os._exit(130)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, interrupt)
    code = main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is said and done
    sys.stdout.flush()
    if code == 130:
        os._exit(code)  # no thread or library is waited for, which a second Ctrl-C would stop in the middle
    sys.exit(code)
