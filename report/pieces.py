"""The pieces of the page as HTML: a figure, a table, what can be closed, what scrolls. All text is escaped here."""

import base64
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from PIL import Image

from report.contents import Table
from report.words import FIGURES, words_for
from storage import damaged

PIXELS = 96  # of a screen, per inch
SHORT = 50  # rows: a longer table is closed at first
DIGITS = 6  # of a number that are shown
NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?(e[+-]?\d{1,3})?|inf)|nan", re.IGNORECASE)


def figure(path: Path) -> str:
    """A figure, at most as large as it was drawn, with its words, which are also for those who cannot see it."""
    data, words = base64.b64encode(path.read_bytes()).decode(), escape(words_for(path.stem, FIGURES))
    try:
        with Image.open(path) as image:
            dots = image.info.get("dpi", (PIXELS,))[0] or PIXELS
            width, height = (round(PIXELS / dots * pixels) for pixels in image.size)
    except (OSError, Image.DecompressionBombError) as error:
        raise damaged(f"'{path}'", error) from error
    size = f'width="{width}" height="{height}"'
    shown = f'<img {size} src="data:image/png;base64,{data}" alt="{words} ({escape(path.stem)})">'
    return f"<figure>\n{shown}\n<figcaption>{words} <code>{escape(path.name)}</code></figcaption>\n</figure>\n"


def table(content: Table, words: str, file: str = "") -> str:
    """A table under its heading, closed if it is long.

    Args:
        content: what stands in it.
        words: what it shows.
        file: the file that it is from, if it is of one.
    """
    numeric = [_is_numeric([row[number] for row in content.rows if number < len(row)]) for number in _range(content)]
    heads = "".join(_head(name, number) for name, number in zip(content.columns, numeric, strict=True))
    rows = "".join(f"<tr>{_cells(row, numeric)}</tr>\n" for row in content.rows)
    inner = f"<table>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table>\n"
    size = f"{content.total:,} row{'s' * (content.total != 1)}"
    title = f"{escape(words)} {f'<code>{escape(file)}</code> ' * bool(file)}<small>{size}</small>"
    shown = len(content.rows)
    more = f"<p>The first {shown:,} of {size}; the file has them all.</p>\n" if shown < content.total else ""
    return closing(title, more + scrolling(f"{words} {file}".strip(), inner), content.total <= SHORT)


def _range(content: Table) -> range:
    return range(len(content.columns))


def _is_numeric(cells: Sequence[str]) -> bool:
    """Whether all that stands in a column is numbers."""
    return any(cells) and all(NUMBER.fullmatch(text) for text in cells if text)


def _head(name: str, number: bool) -> str:
    return f'<th scope="col"{" class=n" * number}>{escape(name)}</th>'


def _cells(row: Sequence[str], numeric: Sequence[bool]) -> str:
    cells = zip(row, numeric, strict=False)  # a row of a file may be too short, or too long
    return "".join(_number(text) if number else f"<td>{escape(text)}</td>" for text, number in cells)


def _number(text: str) -> str:
    """A cell with a number; of many digits the first, and all of them as its title."""
    short = f"{float(text):.{DIGITS}g}" if "." in text else text
    whole = f' title="{escape(text)}"' if len(short) < len(text) else ""
    return f"<td class=n{whole}>{escape(short if whole else text)}</td>"


def closing(title: str, content: str, opened: bool) -> str:
    """Something under a heading that opens and closes it; the heading is HTML."""
    return f"<details{' open' * opened}>\n<summary><h3>{title}</h3></summary>\n{content}</details>\n"


def scrolling(words: str, content: str) -> str:
    """Something wide in a box that scrolls by itself, by keyboard as well."""
    return f'<div class="scroll" role="region" aria-label="{escape(words)}" tabindex="0">\n{content}</div>\n'


def paragraphs(texts: Sequence[str]) -> str:
    """Plain paragraphs, with `names` as code; warnings look like warnings."""
    glued = (text.replace(" %", "\N{NO-BREAK SPACE}%") for text in texts)
    marked = ((text, re.sub("`([^`]+)`", r"<code>\1</code>", escape(text))) for text in glued)
    return "".join(f"<p{' class=warning' * text.startswith('Warning:')}>{inner}</p>\n" for text, inner in marked)
