"""The numbers in README.md and docs/, written from the committed results.

A page marks a place with ``<!-- table: NAME -->`` (or ``<!-- text: NAME -->``) and ``<!-- end -->`` on lines of their
own. `write_pages` puts there what belongs under that name and keeps everything around it. The numbers come from
``results/reference/`` and ``benchmarks/results/``, through the functions that print the same tables in the reports.
"""

import functools
import json
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from config import InputError
from evidence.blocks import controls_shown, decaying_shown, densities_shown, rates_shown, sentences
from evidence.columns import column_sentences, columns_shown
from evidence.confirmation import confirmation_sentence
from evidence.form_tables import forms_wide, ranks_sentence, starts_shown
from evidence.form_tables import sentences as form_sentences
from evidence.report import (
    contrast_sentences,
    family_shown,
    in_points,
    interval,
    probe_sentence,
    splits_shown,
    summary,
    verdict_counts,
    verdict_words,
)
from features import catalogue_rows
from storage import Results, atomic_write
from study import levels, lodo_table, paired_differences, wide_table

WIDTH = 120
PAGES = ("README.md", "docs/*.md")
PLACE = re.compile(r"(<!-- (?:table|text): ([\w-]+) -->\n).*?(^<!-- end -->$)", re.DOTALL | re.MULTILINE)
CHOICES = {  # what else could have been the headline: words -> which records
    "last epoch, all images, accuracy (the headline)": {},
    "last epoch, `in` part, accuracy": {"part": "in"},
    "last epoch, all images, balanced accuracy": {"metric": "balanced_accuracy"},
    "epoch of best source validation, all images, accuracy": {"selection": "val"},
}


class Benchmark(NamedTuple):
    """A table of docs/performance.md.

    Attributes:
        file: name in ``benchmarks/results/``, without ending.
        rows: entry of the file that lists them.
        columns: heading -> entry of a row, "outer.inner" for an entry of an entry.
        keep: whether a row is shown.
    """

    file: str
    rows: str
    columns: Mapping[str, str]
    keep: Callable[[Mapping], bool] = lambda row: True


BENCHMARKS = {
    "stacks": Benchmark(
        "training_cpu",
        "results",
        {
            "D": "feature_size",
            "contender": "name",
            "networks": "networks",
            "arms": "arms",
            "epochs per second": "rate",
            "/ plain": "rate_over.plain",
            "/ fused": "rate_over.fused",
            "/ scikit-learn": "rate_over.scikit_learn",
        },
        lambda row: row["name"].startswith("engine"),
    ),
    "blocks": Benchmark(
        "blocks_cpu",
        "results",
        {
            "contender": "contender",
            "networks": "networks",
            "ms per step": "milliseconds_per_step",
            "query / this": "query_over_this",
            "block / this": "block_over_this",
            "whole ViT / this": "vit_over_this",
            "hours for 800 networks": "extrapolated_hours",
        },
    ),
    "whole": Benchmark("whole_cpu", "results", {"command": "command", "first": "first", "again": "again"}),
    "size": Benchmark(
        "size_cpu",
        "results",
        {
            "images": "images",
            "file (GiB)": "file_gib",
            "seconds": "seconds",
            "of processors": "processor_seconds",
            "anonymous (GiB)": "peak_gib.anonymous",
            "PSS (GiB)": "peak_gib.pss",
            "RSS (GiB)": "peak_gib.rss",
        },
    ),
    "methods": Benchmark(
        "methods_cpu",
        "results",
        {"method": "method", "batches": "batches", "seconds": "seconds", "/ plain training": "over_plain_training"},
    ),
    "extraction": Benchmark(
        "extraction_cpu",
        "results",
        {
            "part": "part",
            "images per second": "images_per_second",
            "/ bare forward pass": "speed_over_bare_forward",
            "by processor time": "by_processor_time",
        },
    ),
}


def write_pages(root: str | Path, tables: Mapping[str, str]) -> list[Path]:
    """Write the tables into the pages below `root`.

    Args:
        root: the repository.
        tables: name -> Markdown, see `results_tables`, `benchmark_tables` and `field.docs.comparison_tables`.

    Returns:
        The pages that changed; an `InputError` if one marks a place for a table that is not among them.
    """
    changed = []
    for path in sorted(path for pattern in PAGES for path in Path(root).glob(pattern)):
        before = path.read_text("utf-8")
        try:
            after = PLACE.sub(lambda found: f"{found[1]}{tables[found[2]].strip()}\n{found[3]}", before)
        except KeyError as error:
            raise InputError(f"'{path}' has a place for {error}; there are {', '.join(sorted(tables))}.") from None
        if after != before:
            with atomic_write(path) as temporary:
                temporary.write_text(after, encoding="utf-8", newline="\n")
            changed.append(path)
    return changed


def results_tables(root: str | Path) -> dict[str, str]:
    """What ``results/reference/`` says about the question: name -> Markdown."""
    reference = Path(root) / "results" / "reference"
    records = Results(reference).records()
    study = _study_tables(reference / "study")
    epochs = _epochs(reference / "study")
    return {
        "setting": paragraph(_setting(Results(reference).read_settings(), records, study)),
        "finding": paragraph(" ".join(_finding(study, epochs))),
        "accuracy": _accuracies(lodo_table(records)),
        "choices": _choices(records),
        "contrasts": _contrasts(study, epochs),
        "splits": _splits(study["splits"]),
        "study-findings": "\n".join(paragraph(text, "- ") for text in summary(study, epochs)),
        "arms": _accuracies(study["accuracy"]),
        **_blocks_tables(reference / "blocks"),
        **_columns_tables(reference / "columns"),
        **_forms_tables(reference),
    }


def benchmark_tables(root: str | Path) -> dict[str, str]:
    """What ``benchmarks/results/`` says about speed: name -> Markdown. Of repeats, the median."""
    folder, tables = Path(root) / "benchmarks" / "results", {}
    for name, of in BENCHMARKS.items():
        report = json.loads((folder / f"{of.file}.json").read_text("utf-8"))
        rows = [row for row in report[of.rows] if of.keep(row)]
        cells = [[_number(_entry(row, path)) for path in of.columns.values()] for row in rows]
        words = [isinstance(_entry(rows[0], path), str) for path in of.columns.values()]
        tables[name] = markdown_table("".join("l" if word else "r" for word in words), list(of.columns), cells)
    return tables


def data_tables() -> dict[str, str]:
    """The data sets that are known by name: name -> Markdown."""
    sets, sources = [], []
    for name, images, classes, domains, licence, hub, source, paper in catalogue_rows():
        sets.append([f"`{name}`", images, classes, domains])
        there = f"on the hub as `{hub}`, or by hand from" if hub else "by hand from"
        sources.append(paragraph(f"`{name}`, {paper}: {there} {source}; licence {licence}.", "- "))
    return {
        "data-sets": markdown_table("lrrl", ["name", "images", "classes", "domains"], sets),
        "data-sources": "\n".join(sources),
    }


def _blocks_tables(folder: Path) -> dict[str, str]:
    """What the study of trained blocks says: name -> Markdown."""
    tables = {path.stem: pd.read_csv(path) for path in folder.glob("*.csv")}
    densities, rates = densities_shown(tables["densities"]).reset_index(), rates_shown(tables["rates"]).reset_index()
    families = {"contrasts": "contrasts", "fixed-rate": "contrasts_fixed_rate", "schedule": "contrasts_schedule"}
    shown = {f"blocks-{name}": family_shown(tables[table]).reset_index() for name, table in families.items()}
    controls, decaying = (
        controls_shown(tables["controls"]).reset_index(),
        decaying_shown(tables["decaying"]).reset_index(),
    )
    return {
        "blocks-decaying": markdown_table("lrrr", [*decaying], decaying.to_numpy()),
        "blocks-controls": markdown_table("l" + "r" * (controls.shape[1] - 1), [*controls], controls.to_numpy()),
        "blocks-finding": "\n".join(paragraph(text, "- ") for text in sentences(tables)),
        **{name: markdown_table("lrrrl", [*table], table.to_numpy()) for name, table in shown.items()},
        "blocks-accuracy": _accuracies(tables["accuracy"]),
        "blocks-densities": markdown_table("lrrrr", [*densities], densities.to_numpy()),
        "blocks-rates": markdown_table("l" + "r" * (rates.shape[1] - 1), [*rates], rates.to_numpy()),
    }


def _columns_tables(folder: Path) -> dict[str, str]:
    """What the importance of features says: name -> Markdown."""
    tables = {path.stem: pd.read_csv(path) for path in folder.glob("*.csv")}
    contrasts, densities = (
        shown.reset_index() for shown in (family_shown(tables["contrasts"]), columns_shown(tables["densities"]))
    )
    return {
        "columns-finding": "\n".join(paragraph(text, "- ") for text in column_sentences(tables)),
        "columns-contrasts": markdown_table("lrrrl", [*contrasts], contrasts.to_numpy()),
        "columns-densities": markdown_table("lrrrr", [*densities], densities.to_numpy()),
    }


def _forms_tables(reference: Path) -> dict[str, str]:
    """What the studies of forms, and their confirmation, say: name -> Markdown."""
    found = [path.parent for path in reference.glob("forms/*/forms.csv")]
    parts = sorted(found, key=lambda path: (len(path.name), path.name))  # width_64, width_128
    explored = [pd.read_csv(path / "forms.csv") for path in parts]
    confirmed = pd.read_csv(reference / "confirmation" / "forms.csv")
    contrasts = pd.read_csv(reference / "confirmation" / "contrasts.csv")
    each = [(part, table) for own in explored for part, table in own.groupby("part", sort=False)]
    found = [text for part, table in each for text in form_sentences(table, part)]
    tables = [table for _, table in each]
    widths = {part: table for part, table in each if part.startswith("width_")}
    wide, elsewhere = forms_wide(tables), forms_wide([table for _, table in confirmed.groupby("place", sort=False)])
    starts = starts_shown(pd.read_csv(reference / "forms" / "width_10" / "starts.csv")).reset_index()
    near = [pd.read_csv(path / "closer.csv") for path in parts if (path / "closer.csv").is_file()]
    closer = [row for table in near for row in _closer_rows(table)]
    return {
        "forms-findings": "\n".join(paragraph(text, "- ") for text in found),
        "forms-ranks": paragraph(ranks_sentence(widths)),
        "forms-table": markdown_table("lr" + "r" * (wide.shape[1] - 2), [*wide], wide.to_numpy()),
        "forms-elsewhere": markdown_table("lr" + "r" * (elsewhere.shape[1] - 2), [*elsewhere], elsewhere.to_numpy()),
        "forms-closer": markdown_table("lllr", ["part", "form", "difference", "points"], closer),
        "forms-starts": markdown_table("llrrr", [*starts], starts.to_numpy()),
        "confirmation-finding": "\n".join(paragraph(text, "- ") for text in contrast_sentences(contrasts)),
        "confirmation-short": paragraph(confirmation_sentence(contrasts)),
    }


def _closer_rows(table: pd.DataFrame) -> list[tuple]:
    """A part's `closer_table` for reading."""
    return [
        (row.part, f"{row.criterion} {row.density:g} %", row.difference, in_points(row.mean, row.low, row.high))
        for row in table.itertuples()
    ]


def _entry(row: Mapping, path: str) -> object:
    """An entry of a benchmark's row; of several repeats, the median."""
    value = functools.reduce(lambda found, name: found[name], path.split("."), row)
    return value["median"] if isinstance(value, Mapping) else value


def _number(value: object) -> str:
    """A cell: numbers with three digits, whole ones whole."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}"
    return "" if value is None else f"{value}"


def markdown_table(align: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; `align` has a letter per column, "l" or "r"."""
    rules = ["---" if letter == "l" else "--:" for letter in align]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (header, rules, *rows))


def paragraph(text: str, bullet: str = "") -> str:
    """Text on lines of the pages' width, after a bullet if there is one."""
    indent = " " * len(bullet)
    return textwrap.fill(text, WIDTH, initial_indent=bullet, subsequent_indent=indent, break_on_hyphens=False)


def _study_tables(folder: Path) -> dict[str, pd.DataFrame]:
    by_seed = ("seeds", "seeds_longer", "sources", "sources_longer")
    found = {path.stem: pd.read_csv(path) for path in folder.glob("*.csv")}
    return found | {name: found[name].set_index("seed") for name in by_seed}


def _epochs(folder: Path) -> tuple[int, int]:
    """Epochs of Phase 2 in the study and in its longer repetition."""
    settings = [Results(path).read_settings()["settings"] for path in folder.glob("epochs_*")]
    shorter, longer = sorted(of["PH2_NUM_EPOCHS"] for of in settings)
    return shorter, longer


def _setting(about: Mapping, records: Sequence[Mapping], study: Mapping[str, pd.DataFrame]) -> str:
    """What the reference was measured on."""
    facts, split = about["features"], about["settings"]["SPLIT_SEED"]
    chance, largest = levels(facts["counts"])
    images = sum(sum(classes.values()) for classes in facts["counts"].values())
    shares = f"{100 * min(largest.values()):.1f} to {100 * max(largest.values()):.1f} %"
    return (
        f"Data set `{facts['dataset']}`, {images:,} images in {len(largest)} domains; model "
        f"`{facts['model']['name']}`, {facts['feature_size']} numbers per image; "
        f"{len({record['seed'] for record in records})} seeds in the run, "
        f"{len(study['seeds'])} in the study; {'each seed its own split' if split == 'seed' else 'one split for all'}. "
        f"Chance is {100 * chance:.1f} %; the largest class of a domain holds {shares} of it."
    )


def _finding(study: Mapping[str, pd.DataFrame], epochs: tuple[int, int]) -> list[str]:
    """The README's three sentences: the first contrast, all of them, and how far the features alone go."""
    first = [next(study[name].itertuples()) for name in ("contrasts", "contrasts_longer")]
    said = [
        f"{verdict_words(row.verdict)} at {count} epochs ({interval(row)} points)"
        for row, count in zip(first, epochs, strict=True)
    ]
    family = pd.concat([study["contrasts"], study["contrasts_longer"]])
    counts = verdict_counts(family)
    *most, last = (f"{words} in {count}" for words, count in counts.items() if count or words == "helps")
    return [
        f"Against plain training, importance masking {' and '.join(said)}; 95 % intervals over {first[0].n} seeds.",
        f"In the {len(family)} contrasts fixed in advance, with plain training, random and permuted masks, from two "
        f"starts, at {epochs[0]} and {epochs[1]} epochs (Holm's correction over {len(study['contrasts'])} at each), it "
        f"{', '.join(most)} and {last} of them.",
        probe_sentence(study["linear_probe"], {epochs[0]: study["accuracy"], epochs[1]: study["accuracy_longer"]}),
    ]


def _accuracies(table: pd.DataFrame) -> str:
    """A `study.lodo_table` as Markdown, with its arms in the order given."""
    wide = wide_table(table).loc[list(dict.fromkeys(table["algorithm"]))]
    return markdown_table("l" + "r" * wide.shape[1], ["arm", *wide.columns], wide.reset_index().to_numpy())


def _choices(records: Sequence[Mapping]) -> str:
    """The paired difference under the headline's rule and under others."""
    rows = []
    for words, choice in CHOICES.items():
        table = paired_differences(records, "importance", "erm", **choice)
        rows.append([words, *(interval(row) for row in table.itertuples() if row.holdout.startswith("average"))])
    return markdown_table("lrr", ["selection, part, metric", "average", "average without hardest"], rows)


def _contrasts(study: Mapping[str, pd.DataFrame], epochs: tuple[int, int]) -> str:
    tables = [family_shown(study[name]) for name in ("contrasts", "contrasts_longer")]
    shown = pd.concat(dict(zip(epochs, tables, strict=True)), names=["epochs"]).reset_index()
    return markdown_table("rlrrrl", [*shown], shown.to_numpy())


def _splits(table: pd.DataFrame) -> str:
    columns = ["split", "seeds", "erm (%)", "importance − erm (points)"]
    return markdown_table("rrrr", columns, splits_shown(table).reset_index().to_numpy())
