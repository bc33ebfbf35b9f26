"""The tables of docs/field.md, written from the committed comparisons; see `evidence.docs`."""

import re
from pathlib import Path

import pandas as pd

from evidence import markdown_table, paragraph
from field.algorithms import ALGORITHMS, Algorithm
from field.selection import HEADLINE, as_cells, signed
from study import t_interval

TWINS = (  # a method that uses Phase 1 or the domains, and the same without
    ("ImportanceMask", "RandomLayerMask"),
    ("ImportanceMask", "PermutedMask"),
    ("ImportanceMixout", "PermutedMixout"),
    ("ImportanceGMixout", "PermutedGMixout"),
    ("LFME", "FreeLunch"),
    ("DSPReg", "L2SPBalanced"),
)


def comparison_tables(root: str | Path) -> dict[str, str]:
    """What the comparisons in ``results/reference/`` say about the methods: name -> Markdown."""
    reference = Path(root) / "results" / "reference"
    known = [cls for _, cls in sorted(ALGORITHMS.items()) if cls.__module__.startswith(f"{__package__}.")]
    found = {"algorithms": "\n".join(_entry(cls) for cls in known)}
    found["compare-twins"] = twins_markdown(
        pd.read_csv(reference / "compare" / "comparison_seeds.csv", index_col="seed")
    )
    for name in ("compare", "search", "domainbed", "blocks_compare"):
        table = pd.read_csv(reference / name / f"comparison_{HEADLINE}.csv", index_col="algorithm")
        found[name] = comparison_markdown(table)
        found[f"{name}-finding"] = paragraph(_finding(reference / name / "comparison.txt"))
    return found


def twins_markdown(averages: pd.DataFrame) -> str:
    """Uses of Phase 1 minus their twins without it, as Markdown; `averages` are seeds × methods, fractions."""
    rows = []
    for method, twin in TWINS:
        difference = (averages[method] - averages[twin]).dropna()
        found = pd.Series(t_interval(difference), ["difference", "low", "high"])
        rows.append([method, twin, len(difference), signed(found)])
    return markdown_table("llrr", ["method", "its twin", "seeds", "difference (points)"], rows)


def comparison_markdown(table: pd.DataFrame) -> str:
    """A table of `field.selection.comparison_table` as Markdown, best method first: per cent, and points."""
    cells = as_cells(table).rename(columns={"difference": "minus ERM (points)"})
    batches = {name: ALGORITHMS[name].batches if name in ALGORITHMS else "–" for name in cells.index}
    rows = [[name, batches[name], *row] for name, row in zip(cells.index, cells.to_numpy(), strict=True)]
    return markdown_table("ll" + "r" * cells.shape[1], ["method", "batches", *cells.columns], rows)


def _entry(method: type[Algorithm]) -> str:
    """A method in a list: what it is, with its paper, by the first paragraph of its docstring."""
    first = re.split(r"\n\s*\n", method.__doc__.strip())[0]
    return paragraph(f"**{method.__name__}**: {' '.join(first.split())}", "- ")


def _finding(report: Path) -> str:
    """What a report of `compare` finds: its paragraph between the description and the tables."""
    return " ".join(report.read_text("utf-8").split("\n\n")[2].split())
