"""The tables of docs/transfer.md, written from the committed studies; see `evidence.docs`."""

from pathlib import Path

from evidence import markdown_table, paragraph
from transfer.claims import claims, studies
from transfer.report import accuracy_shown, read

TASKS = (  # folders of results/reference/transfer
    "digits",
    "mnist",
    "mnist_2000",
    "mnist_weights",
    "fashion",
    "features",
    "blocks",
)
PARTS = {"mnist_weights": ("weights",)}  # tables of a folder whose claims are stated, where these are not all


def transfer_tables(root: str | Path) -> dict[str, str]:
    """What ``results/reference/transfer`` says: name -> Markdown.

    "NAME-claims" is the list of claims of a folder, and "NAME-accuracy" the table of arms and amounts of data after the
    last update, where it is of a single task.
    """
    found = {}
    for name in TASKS:
        tables = read(Path(root) / "results" / "reference" / "transfer" / name)
        stated = {own: tables[own] for own in ("accuracy", *PARTS.get(name, tables))}
        found[f"transfer-{name}-claims"] = "\n".join(paragraph(sentence, "- ") for sentence in claims(stated))
        (title, own), *others = studies(tables)
        if not others:
            accuracy = own["accuracy"]
            shown = accuracy_shown(accuracy[accuracy["updates"] == accuracy["updates"].max()])
            rows = [[row, *cells] for row, cells in zip(shown.index, shown.to_numpy(), strict=True)]
            found[f"transfer-{name}-accuracy"] = markdown_table("l" + "r" * shown.shape[1], [title, *shown], rows)
    return found
