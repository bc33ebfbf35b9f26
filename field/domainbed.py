"""DomainBed's layout of results: runs written for its tools, and its runs read.

DomainBed (https://github.com/facebookresearch/DomainBed; Gulrajani & Lopez-Paz, ICLR 2021) keeps a directory per run,
named by the MD5 of its arguments: ``results.jsonl`` has a line per checkpoint, ``done`` says that the run ended.
Environments are numbered in the alphabetical order of their folders. Its ``collect_results`` reads our runs as its own.

Names there and here: ``trial_seed`` is our seed, ``hparams_seed`` our trial, ``test_envs`` our holdouts. Its ``step``
counts from 0, the number of the last update done; ours is the number of updates done, larger by one. Its runs all
validate after the same updates, and its leave-one-domain-out rule joins runs by ``step``; an epoch of ours has the more
updates the larger the source domains are. So in an export ``step`` is the number of the epoch, from 0, and ``updates``
says how many there were. Its hyperparameters differ from ``trial_seed`` to ``trial_seed``, ours do not.
"""

import hashlib
import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import pandas as pd

from config import InputError
from engine import updates_per_epoch
from field.algorithms import ALGORITHMS, Algorithm
from field.compare import PARTNERS, Comparison
from field.curves import RUN, curves_of, network_rows
from field.report import write_tables
from field.selection import UNITS, as_text, tables_by_rule
from storage import FeatureSet, Results, atomic_write
from study import ERM, Arm, Run

log = logging.getLogger(__name__)

# Folders of its data sets, in the order of its environments.
DOMAINS = {
    "PACS": ("art_painting", "cartoon", "photo", "sketch"),
    "VLCS": ("Caltech101", "LabelMe", "SUN09", "VOC2007"),
    "OfficeHome": ("Art", "Clipart", "Product", "Real World"),
    "TerraIncognita": ("location_100", "location_38", "location_43", "location_46"),
    "DomainNet": ("clipart", "infograph", "painting", "quickdraw", "real", "sketch"),
}
RESULTS, DONE = "results.jsonl", "done"
IDENTITY = {"dataset": str, "algorithm": str, "test_envs": list, "trial_seed": int, "hparams_seed": int}

Hyperparameters = Mapping[tuple, Mapping[str, object]]


def _plain(name: str) -> str:
    """A name without case, spaces and underscores."""
    return "".join(c for c in name.lower() if c.isalnum())


def dataset_name(dataset: str, domain_names: Sequence[str]) -> str:
    """DomainBed's name of a data set of ours, with the same domains in the same order.

    Raises:
        InputError: it has no such data set, or one with other domains or another order.
    """
    names = {_plain(name): name for name in DOMAINS}
    if _plain(dataset) not in names:
        raise InputError(f"DomainBed has no data set '{dataset}'; runs can be exported for {', '.join(DOMAINS)}.")
    name = names[_plain(dataset)]
    if [_plain(d) for d in domain_names] != [_plain(d) for d in DOMAINS[name]]:
        raise InputError(
            f"{name} has in DomainBed the domains {', '.join(DOMAINS[name])}, not {', '.join(domain_names)}."
        )
    return name


def export_domainbed(
    results: Results | str | Path,
    directory: str | Path,
    features: Callable[[], FeatureSet],
    methods: Iterable[str | type[Algorithm]] | None = None,
) -> int:
    """Write what a results directory holds as DomainBed's runs; returns how many were written.

    That is a comparison, or the arms of a run: `erm` under its name there, ``ERM``, the others under their own, with
    the settings that they were trained with as hyperparameters.

    Args:
        results, features: see `Comparison.of`.
        directory: see `export_runs`.
        methods: these only, of a run arms by their names in records; default all that the directory holds.

    Raises:
        InputError: see `Comparison.of` and `export_runs`; or records alone were kept of an arm.
    """
    results = results if isinstance(results, Results) else Results(results)
    records = results.records()
    if any("trial" in record for record in records):
        comparison = Comparison.of(results, features, methods)
        run, curves, trials = comparison.run, comparison.curves(), range(comparison.trials)
        values = {(m.__name__, trial): comparison.values(m, trial) for m in comparison.methods for trial in trials}
    else:
        run = Run.of(results, features, records, "run or comparison")
        networks = _networks(run, records, methods)
        curves = curves_of(pd.concat([_arm_rows(run, *one) for one in networks], ignore_index=True))
        settings = {arm: Arm.of(arm).settings(run.settings) for arm, _ in networks}
        values = {(_algorithm(arm), 0): of_arm.as_dict() for arm, of_arm in settings.items()}
    data, settings = run.features, run.settings
    facts = {"holdout_fraction": settings.out_fraction, "features": data.fingerprint, "settings": settings.hash}
    return export_runs(curves, values, directory, data.dataset, data.domain_names, facts)


def _algorithm(arm: str) -> str:
    """What DomainBed is told that an arm is called: plain training as its baseline is, so that its tables know it."""
    return "ERM" if arm == ERM.name else arm


def _networks(run: Run, records: Sequence[Mapping], arms: Iterable[str] | None) -> list[tuple[str, str]]:
    """Arm and holdout of what there are records of; an `InputError` unless its accuracies were kept as well."""
    found = dict.fromkeys((record["algorithm"], record["holdout"]) for record in records)
    known, place = {arm for arm, _ in found}, run.results.directory
    wanted = known if arms is None else [*arms]
    if unknown := [arm for arm in wanted if arm not in known]:
        raise InputError(f"'{place}' has no results of {unknown[0]}; it has {', '.join(sorted(known))}.")
    chosen = [(arm, holdout) for arm, holdout in found if arm in wanted]
    for arm, holdout in chosen:
        seeds = {r["seed"] for r in records if (r["algorithm"], r["holdout"]) == (arm, holdout)}
        if not seeds <= run.archive.phase2_seeds(holdout, [arm], weights=False):
            raise InputError(
                f"'{place}' keeps of '{arm}' on {holdout} the records alone, and DomainBed's layout needs the accuracy "
                "on every domain after each epoch: export a run, or what study --keep-weights adds (chosen/)."
            )
    return chosen


def _arm_rows(run: Run, arm: str, holdout: str) -> pd.DataFrame:
    """Rows of curves of an arm on a holdout."""
    steps = updates_per_epoch(run.data, run.data.sources(holdout), run.settings)
    return network_rows(run, run.archive.phase2(holdout, arm), _algorithm(arm), 0, (holdout,), steps)


def export_runs(
    curves: pd.DataFrame,
    hyperparameters: Hyperparameters,
    directory: str | Path,
    dataset: str,
    domain_names: Sequence[str],
    facts: Mapping[str, object],
) -> int:
    """Write runs as DomainBed does, so that its tools read them.

    A run that is there already is left as it is, one that was interrupted is written again, and nothing else in the
    directory is touched. Failed networks are not written, because DomainBed has none; nor is `full`, because it knows
    only the two parts.

    Args:
        curves: see `field.curves`.
        hyperparameters: all values of (algorithm, trial), or of (algorithm, trial, seed) where they differ by seed.
        directory: of the runs; made if need be.
        dataset: one of DomainBed's, in any case ("pacs").
        domain_names: all domains, in order.
        facts: what else tells these runs from others, ready for JSON, with "holdout_fraction", the part of each domain
            that is `out`. They are added to the arguments of each run, which its name is made from.

    Returns:
        Number of runs written.

    Raises:
        InputError: a data set or domains that DomainBed does not have; a directory that cannot be written to, or that
            holds another run of the same algorithm, holdouts, seed and trial, which its tools would mix with this one.
    """
    directory, dataset = Path(directory), dataset_name(dataset, domain_names)
    if "holdout_fraction" not in facts:
        raise ValueError("The facts of an export need 'holdout_fraction'.")
    if unknown := set(curves["domain"]) - set(domain_names):
        raise InputError(f"The runs were measured on {', '.join(sorted(unknown))}, which are not among the domains.")
    runs, failed = {}, 0
    for key, run in curves.groupby(RUN, sort=False):
        if run[["in", "out"]].isna().any(axis=None):
            failed += 1
            continue
        args = _arguments(key, int(run["epoch"].max()), hyperparameters, dataset, domain_names, facts)
        name = hashlib.md5(json.dumps(args, sort_keys=True).encode(), usedforsecurity=False).hexdigest()
        runs[name] = args, run  # as DomainBed's sweep names the directory of a run
    _refuse_others(directory, {name: args for name, (args, _) in runs.items()})
    written = sum(_write_run(directory / name, args, run, domain_names) for name, (args, run) in runs.items())
    if failed:
        log.warning("%d failed networks are not exported.", failed)
    log.info("%d runs written to %s, %d were there.", written, directory, len(runs) - written)
    return written


def _arguments(
    key: tuple,
    epochs: int,
    hyperparameters: Hyperparameters,
    dataset: str,
    domain_names: Sequence[str],
    facts: Mapping[str, object],
) -> dict[str, object]:
    """Arguments of DomainBed's training script that tell a run from all others."""
    algorithm, trial, holdouts, seed = key
    values = hyperparameters.get((algorithm, trial, seed), hyperparameters.get((algorithm, trial)))
    if values is None:
        raise InputError(f"The hyperparameters of {algorithm}, trial {trial}, are not given.")
    args = {
        "algorithm": algorithm,
        "checkpoint_freq": 1,
        "data_dir": None,
        "dataset": dataset,
        "hparams": json.dumps(dict(values), sort_keys=True),  # drawn here, not by its registry
        "hparams_seed": int(trial),
        "seed": int(seed),
        "steps": epochs,
        "task": "domain_generalization",
        "test_envs": sorted(list(domain_names).index(name) for name in holdouts),
        "trial_seed": int(seed),
    }
    if both := args.keys() & facts.keys():
        raise ValueError(f"Facts of an export cannot be called {', '.join(sorted(both))}.")
    return {**args, **facts}


def _identity(args: Mapping[str, object]) -> str:
    """What DomainBed's tools tell runs apart by, as text: the arguments `IDENTITY`."""
    return json.dumps([sorted(args[name]) if name == "test_envs" else args[name] for name in IDENTITY])


def _refuse_others(directory: Path, mine: Mapping[str, Mapping]) -> None:
    """Raise an `InputError` if this is not a directory, or has runs that would be mistaken for these."""
    if directory.exists() and not directory.is_dir():
        raise InputError(f"'{directory}' is not a directory.")
    wanted = {_identity(args): name for name, args in mine.items()}
    for path in sorted(directory.glob(f"*/{RESULTS}")):
        try:
            with path.open("rb") as file:
                there = _identity(json.loads(file.readline())["args"])
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            continue  # not a run that its tools could mix with ours
        if wanted.get(there, path.parent.name) != path.parent.name:
            raise InputError(
                f"'{path.parent}' is another run of the same algorithm, holdouts, seed and trial, and DomainBed would "
                "mix the two: export to another directory."
            )


def _write_run(folder: Path, args: Mapping, run: pd.DataFrame, domain_names: Sequence[str]) -> bool:
    """Write one run, `done` last; False if it is there already, with all of its lines."""
    results, number = folder / RESULTS, {name: i for i, name in enumerate(domain_names)}
    finished = (folder / DONE).is_file() and results.is_file()
    if finished and results.read_bytes().count(b"\n") == run["epoch"].nunique():
        return False
    about = {"args": {**args, "output_dir": folder.name}, "hparams": json.loads(args["hparams"])}
    lines = {}
    columns = (run[name].tolist() for name in ("epoch", "step", "domain", "in", "out"))
    for epoch, step, domain, in_part, out_part in zip(*columns, strict=True):
        line = lines.setdefault(epoch, {**about, "epoch": epoch, "step": epoch - 1, "updates": step})
        line |= {f"env{number[domain]}_in_acc": in_part, f"env{number[domain]}_out_acc": out_part}
    content = [json.dumps(lines[epoch], sort_keys=True, allow_nan=False) + "\n" for epoch in sorted(lines)]
    for name, text in ((RESULTS, "".join(content)), (DONE, "done")):
        with atomic_write(folder / name) as path:
            path.write_text(text, "utf-8")
    return True


def domainbed_tables(directory: str | Path, dataset: str | None = None, output: str | Path | None = None) -> str:
    """Tables of DomainBed's runs as text, one for each selection rule that they allow.

    Args:
        directory: of the runs, see `import_runs`, like `dataset`.
        output: a folder, made if need be, that gets the text as ``domainbed.txt`` and each table as
            ``domainbed_<rule>.csv``, with columns as in `selection.comparison_table`: fractions.
    """
    curves, _ = import_runs(directory, dataset)
    names = list(curves["algorithm"].unique())
    baselines = {name: base for name in names if (base := _baseline(name, names)) is not None}
    text = (
        f"{UNITS} They are conditional on images and backbone.\n"
        "Accuracy is measured on the `in` part of the held-out domain; differences are from ERM on the same kind of "
        "batches.\n"
    )
    tables = tables_by_rule(curves, baselines, "in")
    text += "".join(f"\nSelection: {rule}\n{as_text(table)}\n" for rule, table in tables.items())
    if output is not None:
        write_tables(Results(output), "domainbed", text, tables)
    return text


def _baseline(name: str, names: Sequence[str]) -> str | None:
    """Which of the algorithms one is compared with: ERM on the same kind of batches; None if it is not among them.

    In DomainBed's own runs all batches are balanced, and its ERM is the baseline of all; the runs of this project have
    `ERMBalanced` for that.
    """
    own = "ERMBalanced" in names and name in ALGORITHMS
    base = PARTNERS[ALGORITHMS[name].batches] if own else "ERM"
    return base if base in names else None


def import_runs(directory: str | Path, dataset: str | None = None) -> tuple[pd.DataFrame, dict[tuple, dict]]:
    """Read the runs in a directory, written by DomainBed or by `export_runs`; `dataset` is needed if it holds several.

    Runs without ``done`` are left out. Domains have the names of their folders if the data set is known; otherwise they
    are called ``env0``, ``env1``, … `full` is NaN, and the epoch is the rank of the checkpoint.

    Returns:
        The curves (see `field.curves`), and all hyperparameters by (algorithm, trial, seed): DomainBed draws other ones
        for every seed.

    Raises:
        InputError: no finished runs, runs of several data sets, a duplicated run, or a damaged file, which is named.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(f"There is no directory '{directory}'.")
    paths = sorted(directory.glob(f"*/{RESULTS}"))
    finished = [path for path in paths if (path.parent / DONE).is_file()]
    if len(finished) < len(paths):
        log.warning("%d runs in %s have no '%s' and are skipped.", len(paths) - len(finished), directory, DONE)
    runs = {path: _read_run(path) for path in finished}
    names = sorted({lines[0]["args"]["dataset"] for lines in runs.values()})
    if dataset is None and len(names) > 1:
        raise InputError(f"'{directory}' has runs of {', '.join(names)}: say which data set to read.")
    runs = {p: lines for p, lines in runs.items() if dataset is None or lines[0]["args"]["dataset"] == dataset}
    if not runs:
        raise InputError(f"'{directory}' has no finished runs" + (f" of {dataset}." if dataset else " of DomainBed."))
    seen, rows, hyperparameters = {}, [], {}
    for path, lines in runs.items():
        args = lines[0]["args"]
        if (other := seen.setdefault(_identity(args), path)) != path:
            raise InputError(f"'{other}' and '{path}' are the same run.")
        rows += _rows(lines)
        key = (args["algorithm"], args["hparams_seed"], args["trial_seed"])
        if hyperparameters.setdefault(key, lines[0]["hparams"]) != lines[0]["hparams"]:
            raise InputError(f"'{path}' has other hyperparameters than runs with the same seeds on other holdouts.")
    return curves_of(rows), hyperparameters


def _rows(lines: Sequence[Mapping]) -> Iterator[dict]:
    """Rows of curves of one run."""
    args, names = lines[0]["args"], _domains(lines[0])
    about = {"algorithm": args["algorithm"], "trial": args["hparams_seed"], "seed": args["trial_seed"]}
    about["holdouts"] = tuple(names[i] for i in sorted(args["test_envs"]))
    for rank, line in enumerate(lines, start=1):
        updates = line.get("updates", line["step"] + 1)
        for i, name in enumerate(names):
            shares = {part: line[f"env{i}_{part}_acc"] for part in ("in", "out")}
            yield {**about, "epoch": rank, "step": updates, "domain": name, **shares, "full": math.nan}


def _domains(line: Mapping) -> tuple[str, ...]:
    """Names of the environments of a run."""
    numbers = {found[1] for key in line if (found := re.fullmatch(r"env(\d+)_(?:in|out)_acc", key))}
    return DOMAINS.get(line["args"]["dataset"]) or tuple(f"env{i}" for i in range(len(numbers)))


def _read_run(path: Path) -> list[dict]:
    """Lines of a ``results.jsonl``, checked, in the order of steps."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"'{path}' cannot be read: {error}.") from None
    if not text.endswith("\n"):
        raise InputError(f"'{path}' is empty or its last line is torn.")
    lines = []
    for number, content in enumerate(text.split("\n")[:-1], start=1):
        try:
            line = json.loads(content)
        except (ValueError, RecursionError):
            raise InputError(f"'{path}', line {number}, is not JSON.") from None
        if fault := _fault(line):
            raise InputError(f"'{path}', line {number}: {fault}.")
        lines.append(line)
    if len({_identity(line["args"]) for line in lines}) > 1 or len({len(_domains(line)) for line in lines}) > 1:
        raise InputError(f"'{path}' holds lines of several runs.")
    if len({line["step"] for line in lines}) < len(lines):
        raise InputError(f"'{path}' has a step twice: the run was started twice.")
    return sorted(lines, key=lambda line: line["step"])


def _usable(value: object) -> bool:
    """Whether a number fits in a table, and a text can be printed."""
    return (not isinstance(value, str) or value.isprintable()) and (type(value) is not int or 0 <= value < 2**63 - 1)


def _fault(line: object) -> str | None:
    """What is wrong with a line, if anything."""
    if not isinstance(line, dict) or not all(isinstance(line.get(key), dict) for key in ("args", "hparams")):
        return "it has no 'args' and 'hparams'"
    args = line["args"]
    for name, kind in IDENTITY.items():
        if type(args.get(name)) is not kind or not _usable(args[name]):
            return f"args has no '{name}', or one of another type"
    if not all(type(count) is int and _usable(count) for count in (line.get("step"), line.get("updates", 0))):
        return "it has no 'step', or 'step' or 'updates' is no whole number"
    for i in range(count := len(_domains(line))):
        for key in (f"env{i}_in_acc", f"env{i}_out_acc"):
            if type(line.get(key)) not in (int, float) or not 0 <= line[key] <= 1:
                return f"it has no '{key}', or none in [0, 1]"
    left_out = args["test_envs"]
    known = all(type(i) is int and 0 <= i < count for i in left_out)
    if not known or len(left_out) not in (1, 2) or len(set(left_out)) < len(left_out):
        return f"test_envs are {left_out}, not one or two of its {count} environments"
    return None
