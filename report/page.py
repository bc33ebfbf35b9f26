"""One page from what a results directory holds: a single file that needs neither a network nor a server.

The page is ``page.html`` with ``page.css`` and ``page.js`` in it. The same directory gives the same bytes.
"""

from html import escape
from pathlib import Path
from string import Template

from report.contents import RECORDS, Text, check_directory, figures, read_text, settings, tables
from report.pieces import DIGITS, closing, figure, paragraphs, scrolling, table
from report.words import TABLES, words_for
from storage import Results

PAGE = "report.html"
NO_FIGURES = (
    "<p>There are no figures here: <code>python experiment.py figures --results-dir DIR</code> draws them, of a "
    "<code>run</code> or <code>compare</code> with its <code>--features</code> or <code>--data-root</code>.</p>\n"
)
NO_REPORT = "<p>There is no report here: the command has not come to its end, or wrote it into the folder above.</p>\n"
AS_IN_FILES = (
    "<p>A heading sorts, a field filters. Accuracies and differences are fractions, as in the files (0.61 is 61 %). A "
    f"number of more than {DIGITS} digits is shown whole when pointed at.</p>\n"
)


def write_page(directory: str | Path) -> Path:
    """Write ``report.html`` into a results directory, whole, and return its path.

    It shows the finding, every figure (PNG) of the directory and its ``plots/``, every table (CSV), the records, the
    settings and the report itself. Of a table of more than `contents.MOST_ROWS` rows it shows the first, and says so.

    Args:
        directory: what ``run``, ``study``, ``forms``, ``confirm``, ``compare``, ``columns`` or ``transfer`` wrote.

    Raises:
        InputError: there are no results, a file is damaged, or the page cannot be written.
    """
    directory = Path(directory)
    check_directory(directory)
    Results(directory).write_text(PAGE, _page(directory))
    return directory / PAGE


def _page(directory: Path) -> str:
    name, text = directory.resolve().name, read_text(directory)
    files = {kind: Path(__file__).with_name(f"page.{kind}").read_text("utf-8") for kind in ("html", "css", "js")}
    sections = {title: content for title, content in _sections(directory, text).items() if content}
    return Template(files["html"]).substitute(
        title=escape(text.title if text and text.title else f"Results in {name}"),
        name=escape(name),
        style=files["css"],
        script=files["js"],
        links="\n".join(f'<a href="#{title.lower()}">{title}</a>' for title in sections),
        sections="\n".join(
            f'<section id="{title.lower()}">\n<h2>{title}</h2>\n{content}</section>'
            for title, content in sections.items()
        ),
    )


def _sections(directory: Path, text: Text | None) -> dict[str, str]:
    """Title -> content, "" where there is nothing of it."""
    drawn, found, made_by = figures(directory), tables(directory), settings(directory)
    only_in_text = all(content.name == RECORDS for content in found)  # then the report's tables are in no other file
    files = [table(content, words_for(content.name.split(".")[0], TABLES), content.name) for content in found]
    return {
        "Finding": _finding(text) if text else NO_REPORT,
        "Figures": f'<div class="figures">\n{"".join(map(figure, drawn))}</div>\n' if drawn else NO_FIGURES,
        "Tables": "".join([AS_IN_FILES, *files]) if files else "",
        "Settings": "".join(table(content, content.name) for content in made_by),
        "Report": _whole(text, only_in_text) if text else "",
    }


def _finding(text: Text) -> str:
    """What the report says before its first table, the finding first."""
    parts = [f'<div class="part">\n{paragraphs(part)}</div>\n' for part in text.finding]
    parts += [f'<div class="part">\n<h3>What was measured</h3>\n{paragraphs(part)}</div>\n' for part in text.measured]
    return "".join(parts)


def _whole(text: Text, opened: bool) -> str:
    return closing("The report as text", scrolling("report", f"<pre>{escape(text.whole)}</pre>\n"), opened)
