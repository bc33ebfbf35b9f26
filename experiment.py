"""The command line: ``python experiment.py COMMAND``.

Exit codes: 0 done; 1 a training run failed (one seed, or --strict); 2 bad input, one sentence on stderr; 130 Ctrl-C.
"""

import gc
import os
import signal
import sys

if __name__ == "__main__":  # Ctrl-C while libraries are imported: an exception might be swallowed there
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"\nInterrupted.\n"), os._exit(130)))
    gc.disable()  # looking for garbage among what libraries make when they are imported takes a fifth of the time
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # python -I and python -m do without it

import argparse
import importlib
import logging
import re
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path

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
FOLDERS = {  # below RESULTS_DIR
    "study": "study",
    "forms": "forms",
    "confirm": "confirmation",
    "compare": "compare",
    "columns": "columns",
    "export-domainbed": "compare",
}


class Parser(argparse.ArgumentParser):
    """argparse that reports bad input in one sentence."""

    def error(self, message: str) -> None:
        self.exit(2, f"{message[0].upper()}{message[1:].rstrip('.')}; see {self.prog} --help.\n")


def run(options: argparse.Namespace) -> None:
    from study import Run, Study, finding, lodo_table, wide_table

    study = Study(Run.from_config(holdouts=options.holdouts, **_training(options)))
    print(study.run.features.describe(), flush=True)
    study.train()
    study = study.whole()  # report and figures cover earlier runs into this directory, too
    study.report()
    print(f"\n{wide_table(lodo_table(study.records())).to_string()}\n")
    print(finding(study.records()), *study.warnings(), sep="\n", flush=True)
    if not options.no_figures:
        from study.figures import save_all

        save_all(study, config.DATA_ROOT)
    print(f"Everything is in {config.RESULTS_DIR}: start with summary_report.txt.")
    _warn(study.failures())


def study(options: argparse.Namespace) -> None:
    from evidence import Protocol

    if config.TRAINED_BLOCKS:
        return study_of_blocks(options)
    for name in ("no_controls", "keep_weights"):
        if getattr(options, name):
            raise InputError(f"--{name.replace('_', '-')} is for TRAINED_BLOCKS: leave it out.")
    protocol = Protocol.from_config(sweep_seeds=options.sweep_seeds, **_training(options))
    _carry_out(protocol, protocol.short.run, options)


def study_of_blocks(options: argparse.Namespace) -> None:
    from evidence import BlockProtocol

    choice = {"controls": not options.no_controls, "sweep_seeds": options.sweep_seeds, "weights": options.keep_weights}
    protocol = BlockProtocol.from_config(**choice, **_training(options))
    _carry_out(protocol, protocol.run, options)


def forms(options: argparse.Namespace) -> None:
    from evidence import FormsProtocol

    choice = {"widths": options.widths, "densities": options.densities, "closer": options.closer}
    choice["starts"] = options.starts
    protocol = FormsProtocol.from_config(**choice, **_training(options))
    _carry_out(protocol, next(iter(protocol.runs.values())), options)


def confirm(options: argparse.Namespace) -> None:
    from evidence import Confirmation

    choice = {"overwrite": options.overwrite, "verify": options.verify, "strict": options.strict}
    protocol = Confirmation.from_config(options.place, _directory(options), **choice)
    _carry_out(protocol, protocol.run, options)


def compare(options: argparse.Namespace) -> None:
    from field import Comparison, failed, write

    choice = {"holdouts": options.holdouts, **_training(options)}
    choice |= {"trials": options.trials, "leave_one_out": options.leave_one_out, "rule": options.rule}
    comparison = Comparison.from_config(options.algorithms, **choice)
    print(comparison.run.features.describe(), flush=True)
    comparison.train()
    print(f"\n{write(comparison, figures=False)}", flush=True)
    if not options.no_figures:
        from field.figures import save_all

        save_all(comparison)
    print(f"Everything is in {_directory(options)}: start with comparison.txt.")
    _warn(failed(comparison))


def columns(options: argparse.Namespace) -> None:
    from evidence import ColumnProtocol

    choice = {"overwrite": options.overwrite, "verify": options.verify}
    protocol = ColumnProtocol.from_config(options.seeds, _directory(options), **choice)
    _carry_out(protocol, protocol.run, options)


def transfer(options: argparse.Namespace) -> None:
    from transfer import make_study, without_effect

    for name, (_, typed) in _given(options).items():
        if name in without_effect(options.task, options.protocol, OF_FEATURES):
            raise InputError(f"{typed} has no effect on {options.task}, protocol '{options.protocol}': leave it out.")
    names = ("classes", "protocol", "kinds", "cuts", "amounts", "repeats", "pretrained", "overwrite")
    choice = {name: getattr(options, name) for name in names} | {"directory": options.results_dir}
    study = make_study(options.task, options.data, **choice)
    for sentence in study.left_out():
        print(sentence, flush=True)
    if options.probes:
        study.check_probes()
    study.train()
    if options.probes:
        study.probe()
    print(f"\n{study.write()}", flush=True)
    if not options.no_figures:
        from transfer.figures import save_all

        save_all(study.results.directory)
    print(f"Everything is in {study.results.directory}: start with report.txt.")


def features(options: argparse.Namespace) -> None:
    from engine import prepare_machine, rank
    from features import copy_features, get_features

    if config.DATA_ROOT is None:
        raise InputError("features needs --data-root DIR.")
    data = get_features(config.DATA_ROOT, device=prepare_machine(config.DEVICE, config.THREADS), verify=options.verify)
    if rank()[0]:  # the first process speaks for all that torchrun started
        return
    print(data.describe())
    if options.output:
        copy_features(data, options.output)
        print(f"Copied to {options.output}.")


def predict(options: argparse.Namespace) -> None:
    from engine import prepare_machine
    from study import predict_images

    device, size = prepare_machine(config.DEVICE, config.THREADS), config.EXTRACTION_BATCH_SIZE
    vit_model, _ = _given(options).get("VIT_MODEL", (None, ""))
    choice = {"seed": options.seed, "device": device, "batch_size": size, "output": options.output}
    for image, ranked in predict_images(options.weights, options.images, vit_model, **choice):
        print(f"{image}: " + ", ".join(f"{name} {chance:.3f}" for name, chance in ranked), flush=True)


def export_domainbed(options: argparse.Namespace) -> None:
    from engine import prepare_machine
    from features import get_features
    from field import export_domainbed

    device = prepare_machine(config.DEVICE, config.THREADS)
    source = partial(get_features, config.DATA_ROOT, config.FEATURES_FILE, device=device)
    export_domainbed(_directory(options), options.directory, source, options.algorithms)


def import_domainbed(options: argparse.Namespace) -> None:
    from field import domainbed_tables

    print(domainbed_tables(options.directory, options.dataset, options.output))


def export_original(options: argparse.Namespace) -> None:
    from storage import Results
    from transfer import export_clusters, export_original

    if options.data is not None and not options.clusters:
        raise InputError("--data has no effect without --clusters: leave it out.")
    results = Results(options.results_dir)
    written = export_original(options.directory, results)
    written += export_clusters(options.directory, results, options.data) if options.clusters else []
    print("\n".join(map(str, written)))


def import_original(options: argparse.Namespace) -> None:
    from transfer import import_original

    print(import_original(options.directory, options.output)[1])


def report(options: argparse.Namespace) -> None:
    from report import write_page

    print(f"Wrote {write_page(options.directory or config.RESULTS_DIR)}.")


def data(options: argparse.Namespace) -> None:
    from features import catalogue_text, fetch_dataset

    if options.name is None and not (options.output or options.sources or options.any_counts):
        return print(catalogue_text())
    if options.name is None or options.output is None:
        raise InputError("data NAME needs --output DIR.")
    found = fetch_dataset(options.name, options.output, options.sources, options.any_counts)
    words = f"{len(found):,} images in {len(found.domain_names)} domains and {len(found.class_names)} classes"
    print(f"{words} are in {options.output}: give it as --data-root.")


def docs(options: argparse.Namespace) -> None:
    from evidence import benchmark_tables, data_tables, results_tables, write_pages
    from field import comparison_tables
    from transfer import transfer_tables

    root = Path(__file__).resolve().parent
    tables = results_tables(root) | benchmark_tables(root) | comparison_tables(root) | transfer_tables(root)
    tables |= data_tables()
    for path in write_pages(root, tables):
        print(f"Wrote {path.relative_to(root)}.")


def figures(options: argparse.Namespace) -> None:
    import evidence.figures
    import field.figures
    import study.figures
    import transfer.figures
    from engine import prepare_machine
    from features import get_features
    from storage import Results

    results, choice = Results(_directory(options)), {"only": options.only, "format": options.format}
    own, compared = options.algorithms or [], any("trial" in record for record in results.records())
    if known := [name for name in own if ":" not in name]:
        raise InputError(f"--algorithms says where methods of yours are, FILE.py:NAME, and '{known[0]}' does not.")
    if own and not compared:
        raise InputError(f"--algorithms is for comparisons, and '{results.directory}' holds none.")
    device = prepare_machine(config.DEVICE, config.THREADS)
    source = partial(get_features, config.DATA_ROOT, config.FEATURES_FILE, device=device)
    if evidence.figures.is_confirmation(results.directory):
        paths = evidence.figures.save_confirmation(results.directory, **choice)
    elif (results.directory / "forms.csv").is_file():
        paths = evidence.figures.save_forms(results.directory, **choice)
    elif (results.directory / "densities.csv").is_file() and (results.directory / "grid").is_dir():
        paths = evidence.figures.save_blocks(results.directory, **choice)
    elif (results.directory / "layers.csv").is_file():
        paths = evidence.figures.save_columns(results.directory, **choice)
    elif (results.directory / "letters.csv").is_file():
        paths = transfer.figures.save_all(results.directory, **choice)
    elif (results.directory / "contrasts.csv").is_file():
        paths = evidence.figures.save_all(results.directory, **choice)
    elif compared:
        paths = field.figures.save_all(field.Comparison.of(results, source, own=own), **choice)
    else:
        paths = study.figures.save_all(study.figures.study_of(results, source), config.DATA_ROOT, **choice)
    for path in paths:
        print(path)


# name -> what it does, its package (imported once the options are known to be right: it takes seconds), help
COMMANDS = {
    "run": (run, "study", "train both phases, write table, report and figures"),
    "study": (study, "evidence.figures", "arms and controls, sweeps and diagnostics: the whole answer"),
    "forms": (forms, "evidence.figures", "which form of importance wins: criteria, densities and widths"),
    "confirm": (confirm, "evidence.figures", "the forms that looked best, on data and features nobody tuned on"),
    "compare": (compare, "field", "the methods of the field on the same features, seeds and splits"),
    "columns": (columns, "evidence.figures", "importance of features: which columns of all layers carry over"),
    "transfer": (transfer, "transfer", "how many layers of a small network carry over to new classes"),
    "figures": (figures, "field", "draw the figures of a results directory again, also as PDF or SVG"),
    "report": (report, "report", "write what a results directory holds as one page to look at"),
    "features": (features, "features", "run the frozen backbone over a folder of images, nothing else"),
    "predict": (predict, "study", "class probabilities of images"),
    "export-domainbed": (export_domainbed, "field", "write a comparison or a run as DomainBed does"),
    "import-domainbed": (import_domainbed, "field", "tables of DomainBed's own runs, by its selection rules"),
    "export-original": (export_original, "transfer", "write transfer runs as tusharmanekar/mp-tl-study does"),
    "import-original": (import_original, "transfer", "analyse the result files of tusharmanekar/mp-tl-study"),
    "data": (data, "features", "get a known data set, or list them"),
    "docs": (docs, "field", "write the tables of docs/ and README.md from results/reference/"),
}


def names(text: str) -> list[str]:
    """A list of names, separated by commas."""
    found = [name.strip() for name in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError("a name in the list is empty")
    return found


def seeds(text: str) -> list[int]:
    """Seeds as they are typed: "N" is 0 … N-1, "100-199" a range, "0,3,7-9" a list of numbers and ranges."""
    parts = [re.fullmatch(r" *(\d{1,18}) *(?:- *(\d{1,18}) *)?", part) for part in text.split(",")]
    if not all(parts):
        raise argparse.ArgumentTypeError(f"'{text}' is neither N (seeds 0 to N-1) nor A-B nor a list such as 0,3,7-9")
    ranges = [range(int(part[1]), int(part[2] or part[1]) + 1) for part in parts]
    if text.strip().isdigit():
        ranges = [range(int(text))]
    if not all(ranges):
        raise argparse.ArgumentTypeError(f"there are no seeds in '{text}'")
    return [*islice(chain(*ranges), config.LIMITS["NUM_SEEDS"][1] + 1)]  # one too many is refused


def cuts(text: str) -> list[int]:
    """Cuts as they are typed: "0-6" or "0,2,4"; unlike seeds, "6" is the cut 6."""
    return seeds(f"{text}-{text}" if text.strip().isdigit() else text)


def classes(text: str) -> tuple[list[str], list[str]]:
    """Classes as they are typed: "A,B:C,D", two lists of names."""
    before, colon, after = text.partition(":")
    if not colon:
        raise argparse.ArgumentTypeError(f"'{text}' is not two lists of classes such as cat,dog:car,truck")
    return names(before), names(after)


def widths(text: str) -> list[int]:
    """Widths as they are typed: "10,32"; each as `HIDDEN_SIZES` allows."""
    found = cuts(text)
    for width in found:
        config.check("HIDDEN_SIZES", (width, width))
    return found


def densities(text: str) -> list[float]:
    """Densities of masks as they are typed, "60,10" or "60%,10%", in per cent."""
    try:
        found = [float(part.strip().removesuffix("%")) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of densities such as 60,10") from None
    for density in found:
        config.check("IMPORTANCE_THRESHOLD_PERCENTILE", density)
    return found


def amounts(text: str) -> list[float]:
    """Amounts of data as they are typed, "0.1%,50%" or "0.001,0.5", as shares."""
    try:
        return [
            float(part.strip().removesuffix("%")) / (100 if part.strip().endswith("%") else 1)
            for part in text.split(",")
        ]
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no list of shares such as 0.1%,50%") from None


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="experiment.py", description="Domain generalization with importance-based weight masking.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    added = {}
    for name, (_, _, text) in COMMANDS.items():
        added[name] = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        _shared_options(name, added[name].add_argument)
    for name in ("run", "compare"):
        added[name].add_argument("--holdouts", type=names, metavar="A,B", help="domains to leave out (default: each)")
        added[name].add_argument("--no-figures", action="store_true", help="write numbers only")
    steps = f"updates with TRAINED_BLOCKS=all (default {config.IMAGE_STEPS})"
    added["run"].add_argument("--steps", type=int, metavar="N", help=steps)
    add = added["study"].add_argument
    add("--sweep-seeds", type=seeds, metavar="N", help="of what is exploratory (default: 50 at most, of blocks 10)")
    add("--no-controls", action="store_true", help="of blocks: the arms of the confirmatory family alone")
    add("--keep-weights", action="store_true", help="of blocks: keep those of each arm at its chosen learning rate")
    add = added["forms"].add_argument
    add("--widths", type=widths, metavar="10,32", help="units of each hidden layer (default 10,32,64,128)")
    add("--densities", type=densities, metavar="60,10", help="per cent of the weights marked (default 60,30,10)")
    add("--closer", action="store_true", help="the best two also in other scopes, and beside further controls")
    add("--starts", action="store_true", help="plain training and the own mask from every start, too")
    add = added["confirm"].add_argument
    add("--place", required=True, metavar="NAME", help="where: one of evidence/confirmation.py")
    add = added["compare"].add_argument
    add("--algorithms", type=names, metavar="A,B", help="names, or FILE.py:NAME of yours (default: all that are known)")
    add("--trials", type=int, default=1, metavar="N", help="hyperparameters tried per method (default 1)")
    add("--leave-one-out", action="store_true", help="train without every pair of domains as well")
    add("--rule", metavar="NAME", help="report by this selection rule alone (default: all that the runs allow)")
    add = added["transfer"].add_argument
    add("--task", default="digits", metavar="NAME", help="what is pretrained and fine-tuned on what (default digits)")
    add("--data", metavar="DIR", help="where its images are, or of the task 'features' the feature file")
    add("--classes", type=classes, metavar="A,B:C,D", help="of the task 'images': pretrain on A and B, then C and D")
    add("--protocol", choices=("updates", "original"), default="updates", help="how to fine-tune (default updates)")
    add("--arms", dest="kinds", type=names, metavar="A,B", help="kinds of arms (default: as suits the task)")
    add("--cuts", type=cuts, metavar="0-6", help="numbers of layers that are kept, likewise")
    add("--amounts", type=amounts, metavar="0.1%,1%", help="shares of the training images, likewise")
    add("--repeats", type=seeds, metavar="N", help="0 … N-1, or 5-9, or 0,3 (default 20; of the original, its own)")
    add("--updates", type=int, metavar="N", help="of fine-tuning, for every amount of data, likewise")
    add("--channels", type=int, metavar="N", help="of each convolution; the original has 64")
    add("--probes", action="store_true", help="also measure what each layer of the pretrained networks holds")
    add("--pretrained", metavar="FILE", help="a network that all repeats start from, as the original saves them")
    add("--results-dir", metavar="DIR", help=f"default {config.RESULTS_DIR}/transfer/NAME")
    add("--overwrite", action="store_true", help="delete the results that are there first")
    add("--no-figures", action="store_true", help="write numbers only")
    add = added["figures"].add_argument
    add("--results-dir", metavar="DIR", help=f"of run, study or compare (default {config.RESULTS_DIR})")
    add(
        "--only",
        type=names,
        metavar="A,B",
        help="names of figures, or how they begin (default: all)",
    )
    add("--format", choices=("png", "pdf", "svg"), default="png")
    add("--algorithms", type=names, metavar="A,B", help="FILE.py:NAME of each method of yours in a comparison")
    add("--features", metavar="FILE", help="the feature file that the results were made with")
    add("--data-root", metavar="DIR", help="or the images")
    add("--vit-model", metavar="ID_OR_DIR", help="and their model")
    where = f"what another command wrote (default {config.RESULTS_DIR})"
    added["report"].add_argument("directory", nargs="?", metavar="DIR", help=where)
    added["features"].add_argument("--output", metavar="FILE", help="copy the features there")
    add = added["data"].add_argument
    add("name", nargs="?", metavar="NAME", help="of a known data set (default: list them)")
    where = "archives or folders, as it is distributed (default: the Hugging Face hub, where it is there)"
    add("--from", dest="sources", nargs="+", default=(), metavar="PATH", help=where)
    add("--output", metavar="DIR", help="write domain/class/file there; what is there is kept")
    add("--any-counts", action="store_true", help="accept other numbers of images than the known ones")
    add = added["predict"].add_argument
    add("images", nargs="+", metavar="IMAGE", help="image files, and folders of images at any depth")
    add("--weights", required=True, metavar="FILE", help="of results/weights/, Phase 1 or 2")
    add("--vit-model", metavar="ID_OR_DIR", help="where the model lies (default: the name in the weights' header)")
    add("--seed", type=int, metavar="N", help="one network of the file (default: the mean over all seeds)")
    add("--output", metavar="FILE.csv", help="also write file, predicted class and all probabilities there")
    add = added["export-domainbed"].add_argument
    add("directory", metavar="DIR", help="of the runs; what is there is kept")
    add("--results-dir", metavar="DIR", help=f"of compare or run (default {config.RESULTS_DIR}/compare)")
    add("--algorithms", type=names, metavar="A,B", help="these only: methods, FILE.py:NAME of yours; of a run, arms")
    add("--features", metavar="FILE", help="the feature file that it was made with")
    add("--data-root", metavar="DIR", help="or the images")
    add("--vit-model", metavar="ID_OR_DIR", help="and their model")
    add = added["import-domainbed"].add_argument
    add("directory", metavar="DIR", help="of DomainBed's runs")
    add("--dataset", metavar="NAME", help="where the runs are of several")
    add("--output", metavar="DIR", help="write the tables there as well: domainbed.txt, and CSV")
    add = added["export-original"].add_argument
    add("directory", metavar="DIR", help="gets SET/results/cuts_CLASSES_SETTING.json and baselines_CLASSES.json")
    add("--results-dir", metavar="DIR", required=True, help="of transfer")
    add("--clusters", action="store_true", help="cluster what each layer gives as well: CLASSES_cluster.json")
    add("--data", metavar="DIR", help="where the images are, for --clusters")
    add = added["import-original"].add_argument
    add("directory", metavar="DIR", help="with its files cuts_*.json, at any depth")
    add("--output", metavar="DIR", help="write the report and its tables there as well: report.txt, and CSV")
    return parser


def _shared_options(command: str, add: Callable) -> None:
    if command in TRAINING:
        if command != "confirm":  # where they are fixed
            counts = f"0 … N-1, or 100-199, or 0,3,7-9 (default {config.NUM_SEEDS})"
            add("--seeds", type=seeds, metavar="N", help=counts)
        add("--features", metavar="FILE", help="a feature file, in the format of data/README.md")
        where = f"default {config.RESULTS_DIR}; for the others than run a folder below it"
        add("--results-dir", metavar="DIR", help=where)
        add("--overwrite", action="store_true", help="delete the results that are there first")
        if command != "columns":
            add("--strict", action="store_true", help="stop at the first network that fails")
    if command in (*TRAINING, "features", "transfer"):
        where = "folder of domain folders of class folders of images, or of Parquet files"
        add("--data-root", metavar="DIR", help=where)
        add("--vit-model", metavar="ID_OR_DIR", help=f"default {config.VIT_MODEL}")
    if command in (*TRAINING, "features"):
        add("--verify", action="store_true", help="read all image files again, trust no time stamp")
    if command in (*TRAINING, "transfer"):
        add("--scheduler", metavar="ADDRESS", help="train on the Dask cluster of this scheduler, as tcp://HOST:8786")
    if {*MACHINE} <= {*HONOURED.get(command, MACHINE)}:
        add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
        add("--threads", type=int, metavar="N", help="CPU threads")
        setting = {"action": "append", "default": [], "metavar": "NAME=VALUE"}
        add("--set", **setting, help="a setting of config.py that the command uses; may be repeated")


def apply_options(options: argparse.Namespace) -> None:
    """Put the options into `config`.

    Raises:
        InputError: an unknown setting, a value of the wrong type, options that exclude each other.
    """
    given = _given(options)
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


def _given(options: argparse.Namespace) -> dict[str, tuple[object, str]]:
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


def _directory(options: argparse.Namespace) -> Path:
    """Where a command's results are: --results-dir, else RESULTS_DIR or a folder of the command's below it."""
    given = getattr(options, "results_dir", None)
    return Path(given) if given else Path(config.RESULTS_DIR) / FOLDERS.get(options.command, "")


def _training(options: argparse.Namespace) -> dict[str, object]:
    """What `Run.from_config` is told by the options of a command that trains."""
    told = ("seeds", "overwrite", "verify", "strict")
    return {"directory": _directory(options)} | {name: getattr(options, name) for name in told}


def _carry_out(protocol, run, options: argparse.Namespace) -> None:
    """Train what a protocol of `evidence` compares on a run, and write its report and figures."""
    print(run.features.describe(), flush=True)
    protocol.train()
    print(f"\n{protocol.write()}", flush=True)
    protocol.save_figures()
    print(f"Everything is in {_directory(options)}: start with report.txt.")


def _warn(failures: Sequence[str]) -> None:
    if failures:
        print(f"Warning: {len(failures)} networks failed and are left out, first {failures[0]}.", file=sys.stderr)


def interrupt(*_) -> None:
    """Ctrl-C while a command works: end in good order, and do not be disturbed while doing so."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = build_parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for library in ("httpx", "matplotlib", "fontTools"):  # requests, a list of fonts and where to keep it, PDF
        logging.getLogger(library).setLevel(logging.ERROR)
    perform, package, _ = COMMANDS[options.command]
    importlib.import_module(package)
    from engine import TrainingFailedError, rank

    if __name__ == "__main__":  # not where another program calls this function
        gc.freeze()  # libraries stay: nobody looks through them again
        gc.enable()
        signal.signal(signal.SIGINT, interrupt)
    try:
        apply_options(options)
        if rank()[0]:
            logging.getLogger().setLevel(logging.WARNING)
        if rank()[1] > 1 and options.command != "features":
            raise InputError(
                f"Only 'features' runs in several processes of torchrun: give '{options.command}' without."
            )
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
