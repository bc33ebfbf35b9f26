"""What a results directory holds for people: the text of its report, its figures, its tables and its settings.

Everything is read as it stands in the files; nothing is computed again.
"""

import csv
import json
import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from config import InputError
from report.words import FIGURES, TABLES
from storage import Results, damaged

REPORTS = ("report.txt", "summary_report.txt", "comparison.txt")  # each command writes one of them
RECORDS = "records.jsonl"
MOST_ROWS = 2000  # of a table that are shown
NARROWEST = 100  # characters: a line of a report that ends before this, with room for a word, ends there on purpose
MEASURED = re.compile(r"Features: |Images of |.*\bfeatures: \d")  # how the part begins that says what was measured


class Table(NamedTuple):
    """A table as text.

    Attributes:
        name: the file, or what the table is.
        columns: headings.
        rows: the first `MOST_ROWS`.
        total: rows that there are.
    """

    name: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    total: int


class Text(NamedTuple):
    """A report, taken apart; a part is a list of paragraphs.

    Attributes:
        title: its first line; "" if it has none.
        finding: the parts before the tables, the finding first.
        measured: the part that says what was measured, or none.
        whole: as it stands in the file.
    """

    title: str
    finding: list[list[str]]
    measured: list[list[str]]
    whole: str


def check_directory(directory: Path) -> None:
    """Raise an `InputError` if there are no results in a directory; it names the folders below it that have some."""
    if not directory.is_dir():
        raise InputError(f"There is no directory '{directory}': give one that run, study or another command wrote.")
    if _has_results(directory):
        return
    inner = [path.name for path in sorted(directory.iterdir()) if path.is_dir() and _has_results(path)]
    advice = f"one of the folders in it that have, {', '.join(inner)}" if inner else "one that a command wrote"
    raise InputError(f"There are no results in '{directory}': give {advice}.")


def _has_results(directory: Path) -> bool:
    return any((directory / name).is_file() for name in (*REPORTS, RECORDS))


def read_text(directory: Path) -> Text | None:
    """The report of a directory; None where a command did not come to its end, or wrote it into the folder above."""
    path = next((directory / name for name in REPORTS if (directory / name).is_file()), None)
    if path is None:
        return None
    try:
        return take_apart(path.read_text("utf-8"))
    except UnicodeDecodeError as error:
        raise damaged(f"'{path}'", error) from error


def take_apart(text: str) -> Text:
    """Title, finding and what was measured, from all that stands before the first table."""
    lines = text.splitlines()
    underlined = (i for i, below in enumerate(lines[1:]) if lines[i] and re.fullmatch("-{3,}", below))
    head = "\n".join(lines[: next(underlined, len(lines))]).strip()
    parts = [part for part in re.split(r"\n\s*\n", head) if part.strip()]
    title = parts.pop(0) if len(parts) > 1 and "\n" not in parts[0] else ""
    measured = [part for part in parts if MEASURED.match(part)][:1]
    finding = [part for part in parts if part not in measured]
    return Text(title, [*map(paragraphs, finding)], [*map(paragraphs, measured)], text)


def paragraphs(part: str) -> list[str]:
    """Lines of a report, wrapped to a width that is not known exactly, as whole paragraphs.

    Where lines are indented, these go on with what stands before them. Elsewhere a line goes on in the next one if it
    ends in the middle of a sentence, as far as that can be seen.
    """
    found: list[list[str]] = []
    hanging = re.search("^ ", part, re.MULTILINE)
    for line in filter(str.strip, part.splitlines()):
        on = line.startswith(" ") if hanging else found and _goes_on(found[-1][-1], line)
        if on and found:
            found[-1].append(line.strip())
        else:
            found.append([line.strip()])
    return [" ".join(lines) for lines in found]


def _goes_on(line: str, following: str) -> bool:
    """Whether a line ends within a sentence: in a comma or a small letter, or where the next word had no room."""
    if line.endswith((".", ":")):
        return False
    return line[-1] == "," or line[-1].islower() or len(f"{line} {following.split()[0]}") > NARROWEST


def figures(directory: Path) -> list[Path]:
    """Figures of a directory, beside its tables and in ``plots/``: those first that `words` has first."""
    return sorted([*directory.glob("*.png"), *directory.glob("plots/**/*.png")], key=_place(FIGURES))


def tables(directory: Path) -> list[Table]:
    """Tables of a directory: every CSV, those first that `words` has first, and then its records."""
    found = [_csv_table(path) for path in sorted(directory.glob("*.csv"), key=_place(TABLES))]
    if (directory / RECORDS).is_file():
        rows = [_flat(record) for record in Results(directory).records()]
        names = list(dict.fromkeys(name for row in rows for name in row))
        shown = [[row.get(name, "") for name in names] for row in rows[:MOST_ROWS]]
        found.append(Table(RECORDS, names, shown, len(rows)))
    return found


def _place(words: Mapping[str, str]) -> Callable[[Path], tuple]:
    """Where a file stands among the others: by the first pattern that its name fits, then by name."""

    def place(path: Path) -> tuple:
        fits = (number for number, pattern in enumerate(words) if fnmatchcase(path.stem, pattern))
        return next(fits, len(words)), path.stem, str(path)

    return place


def _csv_table(path: Path) -> Table:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            columns, *rows = [*csv.reader(file)] or [[]]
    except (ValueError, csv.Error) as error:
        raise damaged(f"'{path}'", error) from error
    return Table(path.name, columns, rows[:MOST_ROWS], len(rows))


def _flat(value: Mapping, before: str = "") -> dict[str, str]:
    """A JSON object as one row: ``{"accuracy": {"in": 0.5}}`` -> ``{"accuracy.in": "0.5"}``; null is "".

    Hyperparameters stay together, as each method has others.
    """
    row = {}
    for name, item in value.items():
        if isinstance(item, Mapping) and name != "hyperparameters":
            row |= _flat(item, f"{before}{name}.")
        else:
            row[before + name] = _plain(item)
    return row


def _plain(item: object) -> str:
    if item is None or isinstance(item, str):
        return item or ""
    if item and isinstance(item, list) and not any(isinstance(part, list | dict) for part in item):
        return ", ".join(map(_plain, item))
    return json.dumps(item)


def settings(directory: Path) -> list[Table]:
    """What ``settings.json`` says, as tables: of the directory, or of the folders below it where it has none."""
    paths = [directory / "settings.json"]
    if not paths[0].is_file():
        paths = sorted([*directory.glob("*/settings.json"), *directory.glob("*/*/settings.json")])
        paths = [path for path in paths if not any(part.startswith(".") for part in path.relative_to(directory).parts)]
    stored = {_folder(path, directory): Results(path.parent).read_settings() for path in paths}
    features = {folder: content["features"] for folder, content in stored.items()}
    facts = {name: {k: v for k, v in content.items() if k != "counts"} for name, content in features.items()}
    environments = {
        f"{folder} ({number})" if len(content["environments"]) > 1 else folder: environment
        for folder, content in stored.items()
        for number, environment in enumerate(content["environments"], 1)
    }
    found = [
        _side_by_side("Settings", "setting", {folder: content["settings"] for folder, content in stored.items()}),
        _side_by_side("Features", "fact", facts),
        *_counts([content["counts"] for content in features.values()]),
        _side_by_side("Seeds", "held out", {folder: content.get("holdouts", {}) for folder, content in stored.items()}),
        _side_by_side("Environment", "fact", environments),
    ]
    return [table for table in found if table.rows]


def _folder(path: Path, directory: Path) -> str:
    """Heading of what a file in a folder below a directory says, or in the directory itself."""
    return "value" if path.parent == directory else path.parent.relative_to(directory).as_posix()


def _side_by_side(name: str, first: str, contents: Mapping[str, Mapping]) -> Table:
    """A row for each name in any of the contents, a column for each content; equal ones share a column."""
    columns: list[tuple[list[str], dict[str, str]]] = []  # headings, and what they all have
    for heading, content in contents.items():
        row = _flat(content)
        same = next((headings for headings, other in columns if other == row), None)
        if same is None:
            columns.append(([heading], row))
        else:
            same.append(heading)
    names = dict.fromkeys(name for _, row in columns for name in row)
    rows = [[name, *(row.get(name, "") for _, row in columns)] for name in names]
    return Table(name, [first, *(", ".join(headings) for headings, _ in columns)], rows[:MOST_ROWS], len(rows))


def _counts(counts: Sequence[Mapping[str, Mapping[str, int]]]) -> list[Table]:
    """Images by class and domain, of each data set once."""
    made = []
    for number, domains in enumerate(counts):
        classes = dict.fromkeys(label for of_domain in domains.values() for label in of_domain)
        rows = [[label, *(str(of_domain.get(label, 0)) for of_domain in domains.values())] for label in classes]
        if domains not in counts[:number]:
            made.append(Table("Images by class and domain", ["class", *domains], rows[:MOST_ROWS], len(rows)))
    return made
