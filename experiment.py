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
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import config
from cli import OF_FEATURES, apply_options, build_parser, typed_settings
from config import InputError

FOLDERS = {  # below RESULTS_DIR
    "study": "study",
    "forms": "forms",
    "confirm": "confirmation",
    "compare": "compare",
    "columns": "columns",
    "export-domainbed": "compare",
}


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

    for name, (_, typed) in typed_settings(options).items():
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
    vit_model, _ = typed_settings(options).get("VIT_MODEL", (None, ""))
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


# name -> what it does, and its package (imported once the options are known to be right: it takes seconds)
COMMANDS = {
    "run": (run, "study"),
    "study": (study, "evidence.figures"),
    "forms": (forms, "evidence.figures"),
    "confirm": (confirm, "evidence.figures"),
    "compare": (compare, "field"),
    "columns": (columns, "evidence.figures"),
    "transfer": (transfer, "transfer"),
    "figures": (figures, "field"),
    "report": (report, "report"),
    "features": (features, "features"),
    "predict": (predict, "study"),
    "export-domainbed": (export_domainbed, "field"),
    "import-domainbed": (import_domainbed, "field"),
    "export-original": (export_original, "transfer"),
    "import-original": (import_original, "transfer"),
    "data": (data, "features"),
    "docs": (docs, "field"),
}


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
    perform, package = COMMANDS[options.command]
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
