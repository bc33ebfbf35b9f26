"""The commands about the methods of the field: ``compare``, ``export-domainbed`` and ``import-domainbed``."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import config
from config import InputError

FOLDER = "compare"  # below RESULTS_DIR


def add_commands(add: Callable[..., argparse.ArgumentParser]) -> tuple[argparse.ArgumentParser, list]:
    """Add the parsers: that of ``compare``, which trains as others do, and those of the two others.

    Args:
        add: `add_parser` of the command line's subcommands.
    """
    compare_ = add("compare", help="the methods of the field on the same features, seeds and splits")
    compare_.add_argument("--algorithms", metavar="A,B", help="names (default: all; a wrong one lists them)")
    compare_.add_argument(
        "--trials", type=int, default=1, metavar="N", help="hyperparameters tried per method (default 1)"
    )
    compare_.add_argument("--holdouts", metavar="A,B", help="domains to leave out (default: each in turn)")
    compare_.add_argument("--leave-one-out", action="store_true", help="train without every pair of domains as well")
    compare_.add_argument("--no-figures", action="store_true", help="write numbers only")
    export = add("export-domainbed", help="write the runs of a comparison as DomainBed does")
    export.add_argument("directory", metavar="DIR", help="of the runs; what is there is kept")
    export.add_argument(
        "--results-dir", metavar="DIR", help=f"of the comparison (default {config.RESULTS_DIR}/{FOLDER})"
    )
    export.add_argument("--features", metavar="FILE", help="the feature file that it was made with")
    export.add_argument("--data-root", metavar="DIR", help="or the images")
    export.add_argument("--vit-model", metavar="ID_OR_DIR", help="and their model")
    import_ = add("import-domainbed", help="tables of DomainBed's own runs, by its selection rules")
    import_.add_argument("directory", metavar="DIR", help="of DomainBed's runs")
    import_.add_argument("--dataset", metavar="NAME", help="where the runs are of several")
    return compare_, [export, import_]


def results_folder(options: argparse.Namespace) -> Path:
    """Where the comparison lives."""
    return Path(options.results_dir or Path(config.RESULTS_DIR) / FOLDER)


def compare(options: argparse.Namespace) -> None:
    """Train every method on every holdout, write tables, report and figures."""
    from algorithms import ALGORITHMS, find
    from compare import Comparison
    from compare_report import failed, write
    from dataset import find_dataset
    from features import get_features
    from records import Results
    from study import check_holdouts
    from training import prepare_machine

    if config.PH2_INIT != "fresh":
        raise InputError("compare trains from a fresh start: PH2_INIT must be 'fresh'.")
    names = sorted(ALGORITHMS) if options.algorithms is None else _split(options.algorithms)
    for name in names:
        find(name)
    device = prepare_machine()
    directory, settings = results_folder(options), replace(config.Settings.current(), ph2_init="fresh")
    holdouts = _split(options.holdouts)
    if config.DATA_ROOT is not None:  # what can be known before an extraction that may take long
        check_holdouts(holdouts, find_dataset(config.DATA_ROOT).domain_names)
    Results(directory).check(settings, options.overwrite)
    data = get_features(config.DATA_ROOT, config.FEATURES_FILE, device=device, verify=options.verify)
    print(data.describe(), flush=True)
    choice = {"trials": options.trials, "holdouts": holdouts, "leave_one_out": options.leave_one_out}
    choice |= {"device": device, "strict": options.strict, "overwrite": options.overwrite}
    comparison = Comparison(data, settings, Results(directory), range(config.NUM_SEEDS), names, **choice)
    comparison.run()
    print(f"\n{write(comparison, figures=not options.no_figures)}")
    print(f"Everything is in {directory}: start with comparison.txt.")
    if texts := failed(comparison):
        print(f"Warning: {len(texts)} networks failed and are left out, first {texts[0]}.")


def export_domainbed(options: argparse.Namespace) -> None:
    """Write what a results directory of `compare` holds as DomainBed's runs."""
    from compare import Comparison
    from domainbed import export_runs
    from features import get_features
    from records import Results
    from training import prepare_machine

    _named(options.directory)
    results = Results(results_folder(options))
    records = [r for r in results.records() if "trial" in r]
    about = results.read_settings()
    if not records or about is None:
        raise InputError(f"'{results.directory}' holds no comparison: run compare first, or give --results-dir.")
    data = get_features(config.DATA_ROOT, config.FEATURES_FILE, device=prepare_machine())
    if data.fingerprint != about["features"]["fingerprint"]:
        raise InputError("The comparison was made with other features: give them with --features or --data-root.")
    made_with = {name.lower(): value for name, value in about["settings"].items()}
    settings = config.Settings.current(**made_with)
    comparison = Comparison.of(data, settings, results, records)
    values = {(c.__name__, t): comparison.values(c, t) for c in comparison.algorithms for t in range(comparison.trials)}
    facts = {"holdout_fraction": settings.out_fraction, "features": data.fingerprint, "settings": settings.hash}
    names = data.domain_names
    export_runs(comparison.curves(), values, options.directory, data.dataset, names, facts)


def import_domainbed(options: argparse.Namespace) -> None:
    """Print our tables of DomainBed's runs."""
    from domainbed import import_runs
    from selection import RULES, as_text, comparison_table, select

    _named(options.directory)
    curves, _ = import_runs(options.directory, options.dataset)
    algorithms = list(curves["algorithm"].unique())
    baselines = {name: base for name in algorithms if (base := _baseline(name, algorithms)) is not None}
    print(
        "Accuracy (%) on the `in` part of the held-out domain, mean ± standard error over trial seeds.\n"
        "Differences, in points, are from ERM on the same kind of batches, with 95 % t intervals over trial seeds;\n"
        "they are conditional on images and backbone."
    )
    for rule in RULES:
        if rule == "leave-one-domain-out" and all(len(holdouts) == 1 for holdouts in curves["holdouts"]):
            continue
        print(f"\nSelection: {rule}\n{as_text(comparison_table(select(curves, rule), baselines, 'in'))}")


def _baseline(name: str, algorithms: Sequence[str]) -> str | None:
    """Which of the algorithms one is compared with: ERM on its own kind of batches, if it is there.

    In DomainBed's own runs all batches are balanced, and its ERM is the baseline of all; the runs of this project have
    an `ERMBalanced` for that.
    """
    from algorithms import ALGORITHMS
    from compare import PARTNERS

    own = "ERMBalanced" in algorithms and name in ALGORITHMS
    base = PARTNERS[ALGORITHMS[name].batches] if own else "ERM"
    return base if base in algorithms else None


def _split(text: str | None) -> list[str] | None:
    if text is not None and not text.strip():
        raise InputError("A list of names is empty: leave the option out for all.")
    return None if text is None else [name.strip() for name in text.split(",")]


def _named(directory: str) -> None:
    if not directory.strip():
        raise InputError("DIR is empty: which folder?")
