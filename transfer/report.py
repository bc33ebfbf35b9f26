"""The report of a transfer study: claims, what weakens them, then the tables; and the tables as CSV."""

import textwrap
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from config import InputError
from evidence import interval, with_interval
from storage import atomic_write
from study import FEWEST_SEEDS
from transfer.claims import cautions, claims, studies, updates_words
from transfer.inference import LEVEL, NONINFERIORITY_MARGIN
from transfer.probes import FILE
from transfer.statistics import label, share, tables

FACTS = ("chance", "depth")  # entries of `about` that are used, and not printed
NAMES = (
    "runs", "accuracy", "contrasts", "weights", "truncation", "trend", "letters", "best", "differences", "zero_shot",
    "correlations",
)  # fmt: skip
EXPLANATION = f"""\
Differences are paired by repeat; a repeat that lacks one of two runs is left out of that contrast alone. "Above" and
"below" need a 95 % bootstrap interval on one side of 0, p < {LEVEL} after Holm's correction over the family, and
{FEWEST_SEEDS} repeats. Where no difference, however large, could be rejected with so many repeats, the verdict is
"cannot reject" and not "no difference". In the tables * marks p < {LEVEL} after Holm, and † what cannot be rejected."""


def write(
    directory: Path,
    table: pd.DataFrame,
    about: Mapping[str, object],
    probes: pd.DataFrame | None = None,
    measure: str | None = None,
) -> str:
    """Write the tables as CSV (fractions) and ``report.txt``, each whole or not at all; returns the report.

    A table of an earlier report for which there are no runs now is removed.

    Args:
        directory: made if missing.
        table: the common table, see `transfer.statistics`.
        about: what the study is, a line each: words -> value. "chance" (task -> share of the largest class of the test
            images) and "depth" (task -> number of layers) are not lines: they are used.
        probes: see `statistics.probe_correlations`.
        measure: see `statistics.runs_of`.

    Raises:
        InputError: see `statistics.check`.
    """
    found = tables(table, probes, about.get("depth"), measure)
    text = report(found, about)
    for name in NAMES:
        path = Path(directory) / f"{name}.csv"
        if name in found:
            _write_text(path, found[name].to_csv(float_format="%.6g", index=False))
        else:
            path.unlink(missing_ok=True)
    _write_text(Path(directory) / "report.txt", text)
    return text


def clear(directory: str | Path) -> None:
    """Delete what `write` and the probes of layers have written, of a study whose records are gone."""
    for name in (*(f"{name}.csv" for name in NAMES), FILE, "report.txt"):
        (Path(directory) / name).unlink(missing_ok=True)


def _write_text(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def read(directory: str | Path) -> dict[str, pd.DataFrame]:
    """The tables that `write` wrote.

    Raises:
        InputError: there is no report.
    """
    directory = Path(directory)
    if not (directory / "report.txt").is_file():
        raise InputError(f"'{directory}' holds no transfer study: run transfer first, or give --results-dir.")
    return {name: pd.read_csv(path) for name in NAMES if (path := directory / f"{name}.csv").is_file()}


def report(tables: Mapping[str, pd.DataFrame], about: Mapping[str, object]) -> str:
    """The whole report as text; arguments as in `write`, with the tables computed."""
    lines = ["How many layers of a trained network carry over, and for how much data?", ""]
    for words, value in about.items():
        if words not in FACTS:
            lines += _wrapped(f"{words}: {value}")
    lines.append("")
    for sentence in [*claims(tables), *cautions(tables, about.get("chance") or {})]:
        lines += _wrapped(sentence)
    lines += ["", *EXPLANATION.splitlines()]
    for title, own in studies(tables):
        for heading, shown in shown_tables(own).items():
            heading = f"{title}: {heading}"
            lines += ["", heading, "-" * min(len(heading), 100), shown.to_string()]
    return "\n".join(lines) + "\n"


def _wrapped(sentence: str) -> list[str]:
    """Lines of a sentence, none of which begins with a per cent sign."""
    glued = sentence.replace(" %", "\N{NO-BREAK SPACE}%")
    lines = textwrap.wrap(glued, 118, subsequent_indent="  ", break_on_hyphens=False)
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines]


def shown_tables(own: Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """The tables of one task and protocol for reading: title -> table with words and numbers as text.

    Args:
        own: as `claims.studies` gives them.
    """
    accuracy, found = own["accuracy"], {}
    first, last = accuracy["updates"].min(), accuracy["updates"].max()
    at, margin = updates_words(last), f"{100 * NONINFERIORITY_MARGIN:g}"
    makers = (
        ("contrasts", "CONFIRMATORY: frozen minus scratch (points)", contrasts_shown),
        (
            "letters",
            f"accuracy (%) by frozen layers, {at}; those that share a letter are not told apart",
            letters_shown,
        ),
        ("best", f"how often each number of frozen layers is best under the bootstrap (%), {at}", best_shown),
        ("trend", "does the best cut fall as data grow? (Kendall's τ; the last row is the test)", trend_shown),
        ("weights", "SECOND FAMILY: the weights that moved minus others (points)", contrasts_shown),
        (
            "truncation",
            f"truncated minus frozen (points; ok: no worse by more than {margin}, no: worse)",
            truncation_shown,
        ),
        ("correlations", "Spearman's ρ across layers, probe and accuracy of the frozen cut", correlations_shown),
    )
    found[f"accuracy (%), mean ± standard error, {at}"] = accuracy_shown(accuracy[accuracy["updates"] == last])
    found |= {heading: maker(own[name]) for name, heading, maker in makers if name in own}
    for updates in dict.fromkeys((first, last)) if "differences" in own else ():
        rows = own["differences"][own["differences"]["updates"] == updates]
        found[f"EXPLORATORY: minus scratch {updates_words(updates)} (points)"] = differences_shown(rows)
    return found


def _wide(rows: pd.DataFrame, index: list[str], cells: list[str]) -> pd.DataFrame:
    """Cells by row and amount of data, in the order of the table."""
    wide = rows.assign(cell=cells).pivot(index=index, columns="amount", values="cell").fillna("")
    wide = wide.loc[list(dict.fromkeys(rows.set_index(index).index))]
    wide.columns = [share(amount) for amount in wide.columns]
    wide.index.name = None
    return wide


def accuracy_shown(rows: pd.DataFrame) -> pd.DataFrame:
    """Arms × amounts of one checkpoint of `statistics.accuracies`, and how many images and valid repeats there are."""
    rows = rows[rows["repeats"] + rows["failed"] > 0]
    cells = [
        "–" if pd.isna(row.mean) else f"{100 * row.mean:.2f}" + ("" if pd.isna(row.se) else f" ± {100 * row.se:.2f}")
        for row in rows.itertuples()
    ]
    arms = [label(row.arm, row.cut) for row in rows.itertuples()]
    wide = _wide(rows.assign(row=arms), ["row"], cells)
    counts = rows.groupby("amount").agg(images=("images", "max"), low=("repeats", "min"), high=("repeats", "max"))
    wide.loc["training images"] = [f"{images:,}" for images in counts["images"]]
    wide.loc["repeats"] = [
        f"{low}" if low == high else f"{low}-{high}" for low, high in zip(counts["low"], counts["high"], strict=True)
    ]
    return wide


def contrasts_shown(table: pd.DataFrame) -> pd.DataFrame:
    """A family of `inference.paired_family`: contrast × amount, with marks as in the explanation."""
    cells = [f"{interval(row)}{mark(row)}" for row in table.itertuples()]
    names = table["contrast"].str.rsplit(", ", n=1).str[0]
    return _wide(table.assign(row=names), ["row"], cells)


def mark(row) -> str:
    """What is rejected after Holm's correction has "*", what so few repeats cannot reject "†"."""
    return " *" if row.p_holm < LEVEL else " †" if row.lowest_p >= LEVEL else ""


def truncation_shown(table: pd.DataFrame) -> pd.DataFrame:
    """As `contrasts_shown`, with the verdict of non-inferiority."""
    words = {"no worse": " ok", "worse": " no"}
    ends = [
        next((end for start, end in words.items() if verdict.startswith(start)), "") for verdict in table["noninferior"]
    ]
    cells = [f"{interval(row)}{mark(row)}{end}" for row, end in zip(table.itertuples(), ends, strict=True)]
    return _wide(table.assign(row=table["contrast"].str.rsplit(", ", n=1).str[0]), ["row"], cells)


def letters_shown(table: pd.DataFrame) -> pd.DataFrame:
    """Cuts × amounts of `statistics.letters`: "93.27 ab"; without letters where nothing could be rejected."""
    able = table["lowest_p"] < LEVEL
    cells = [
        "–" if pd.isna(row.mean) else f"{100 * row.mean:.2f} {row.letters if can else '†'}"
        for row, can in zip(table.itertuples(), able, strict=True)
    ]
    return _wide(table, ["cut"], cells)


def best_shown(table: pd.DataFrame) -> pd.DataFrame:
    """Cuts × amounts at the last checkpoint of `statistics.best`."""
    table = table[table["updates"] == table["updates"].max()]
    cells = ["–" if pd.isna(row.share) else f"{100 * row.share:.1f}" for row in table.itertuples()]
    return _wide(table, ["cut"], cells)


def trend_shown(table: pd.DataFrame) -> pd.DataFrame:
    """`statistics.trends`, a row per checkpoint."""
    first, last = share(table["first_amount"].iloc[0]), share(table["last_amount"].iloc[0])
    rows = [
        (
            row.updates or "end",
            row.repeats,
            row.left_out,
            f"{row.first_cut:.2f}",
            f"{row.last_cut:.2f}",
            with_interval(row.tau, row.low, row.high),
            f"{row.p:.2g}",
            row.verdict,
        )
        for row in table.itertuples()
    ]
    columns = ["updates", "repeats", "left out", f"best cut, {first}", f"best cut, {last}", "τ", "p", "verdict"]
    return pd.DataFrame(rows, columns=columns).set_index("updates")


def correlations_shown(table: pd.DataFrame) -> pd.DataFrame:
    """Measures × amounts of `statistics.probe_correlations`, and the mean over the amounts with its verdict."""
    cells = [with_interval(row.mean, row.low, row.high) for row in table.itertuples()]
    single = table["amount"].notna().to_numpy()
    wide = _wide(table[single], ["measure"], [cell for cell, of in zip(cells, single, strict=True) if of])
    whole = table[~single].assign(cell=[cell for cell, of in zip(cells, single, strict=True) if not of])
    whole = whole.set_index("measure").loc[wide.index]
    return wide.assign(**{"all amounts": whole["cell"], "verdict": whole["verdict"].fillna("exploratory")})


def differences_shown(rows: pd.DataFrame) -> pd.DataFrame:
    """Arms × amounts of one checkpoint of `statistics.differences`."""
    arms = [label(row.arm, row.cut) for row in rows.itertuples()]
    return _wide(rows.assign(row=arms), ["row"], [interval(row) for row in rows.itertuples()])
