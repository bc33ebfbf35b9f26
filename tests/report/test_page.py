"""The page of a results directory: all that is in the files, as it stands there, and nothing else."""

import base64
import csv
import json
import re
import textwrap
from fnmatch import fnmatchcase
from html.parser import HTMLParser

import pytest

from cli import build_parser
from config import InputError
from report import write_page
from report.contents import MOST_ROWS, REPORTS, paragraphs, take_apart
from report.pieces import SHORT
from report.words import FIGURES, TABLES
from storage import Results
from tests.factories import FEATURES, MACHINE, ROOT, SMALL, everything
from tests.report.conftest import KINDS

VOID = {"meta", "img", "input", "br"}


class Page(HTMLParser):
    """Elements of a page, checked to be nested as they should be.

    Attributes:
        tables: heading of each table -> its rows as text, the whole numbers, the header first.
        closed: headings of tables that are closed at first.
        images: file's stem -> its bytes.
        elements: how many there are of each tag.
        text: all that is seen.
    """

    def __init__(self, path):
        super().__init__()
        self.tables, self.closed, self.images, self.elements, self.seen, self.stack = {}, set(), {}, {}, [], []
        self.heading = ""
        self.feed(path.read_text("utf-8"))
        self.close()
        assert not self.stack
        self.text = " ".join(" ".join(self.seen).split())

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.elements[tag] = self.elements.get(tag, 0) + 1
        if tag == "img":
            data = given["src"].removeprefix("data:image/png;base64,")
            self.images[re.search(r"\(([^(]*)\)$", given["alt"])[1]] = base64.b64decode(data, validate=True)
        if tag not in VOID:
            self.stack.append((tag, given))
        if tag == "h3":
            self.heading = ""
        if tag == "table":
            self.tables[self.heading] = []
            if any(name == "details" and "open" not in of for name, of in self.stack):
                self.closed.add(self.heading)
        if tag == "tr":
            self.tables[self.heading].append([])
        if tag in ("td", "th"):
            self.tables[self.heading][-1].append(given.get("title", ""))

    def handle_endtag(self, tag):
        assert self.stack.pop()[0] == tag

    def handle_data(self, data):
        tag, given = self.stack[-1] if self.stack else ("", {})
        if tag not in ("style", "script", "title"):
            self.seen.append(data)
        if any(name == "h3" for name, _ in self.stack):
            self.heading = (data if tag == "code" else self.heading or data).strip()
        if tag in ("td", "th") and "title" not in given:
            self.tables[self.heading][-1][-1] += data


def rows_of(path):
    with path.open(encoding="utf-8", newline="") as file:
        return [*csv.reader(file)]


@pytest.mark.parametrize("kind", KINDS)
def test_all_that_is_in_the_directory_is_on_the_page(kind, results):
    directory = results[kind]
    page = Page(write_page(directory))
    drawn = [*directory.glob("*.png"), *directory.glob("plots/*.png")]
    assert drawn
    assert page.images == {path.stem: path.read_bytes() for path in drawn}
    for path in directory.glob("*.csv"):
        head, *rows = rows_of(path)
        assert page.tables[path.name] == [head, *rows[:MOST_ROWS]]
        assert (path.name in page.closed) == (len(rows) > SHORT)
    text = next((directory / name).read_text("utf-8") for name in REPORTS if (directory / name).is_file())
    assert page.text.count(" ".join(text.split())) == 1  # as it is
    finding, rest = page.text.split("Figures", 1)[1].split("Figures", 1)  # the links name the parts, too
    assert " ".join(text.splitlines()[0].split()) in page.text[: page.text.index("Results directory")]
    assert finding.count(". ") >= 2
    assert "Settings" in rest


def test_the_finding_stands_before_what_was_measured(results):
    text = Page(write_page(results["study"])).text
    finding = text.index("At 10 epochs importance masking helps in 1, hurts in 2")
    assert text.index("Does importance masking help?") < finding < text.index("What was measured")
    assert text.index("What was measured") < text.index("pacs features: 9991 × 192-d")


def test_settings_are_those_of_the_directory_or_of_the_folders_below(results):
    tables = Page(write_page(results["run"])).tables
    stored = json.loads((results["run"] / "settings.json").read_text("utf-8"))
    shown = dict(tables["Settings"][1:])
    assert shown.keys() == stored["settings"].keys()
    assert (shown["PH2_FREEZE_EPOCH"], shown["HIDDEN_SIZES"]) == ("7", "10, 10, 10, 10, 10")
    assert dict(tables["Features"][1:])["fingerprint"] == stored["features"]["fingerprint"]
    assert dict(tables["Environment"][1:])["versions.torch"] == stored["environments"][0]["versions"]["torch"]
    assert tables["Images by class and domain"][1] == ["dog", "379", "389", "189", "772"]
    tables = Page(write_page(results["study"])).tables
    head, *rows = tables["Settings"]
    assert head == ["setting", "epochs_10, sweep", "epochs_30", *(f"splits/{split}" for split in range(5))]
    assert ["PH2_NUM_EPOCHS", "10", "30", *["10"] * 5] in rows


def test_records_are_a_table(results):
    rows = Page(write_page(results["run"])).tables["records.jsonl"]
    records = Results(results["run"]).records()
    assert len(rows) == 1 + len(records)
    for row, record in zip(rows[1:], records, strict=True):
        shown = dict(zip(rows[0], row, strict=True))
        assert float(shown["accuracy.full"]) == record["accuracy"]["full"]
        assert (shown["sources"], shown["failed"]) == (", ".join(record["sources"]), "")


def test_the_page_needs_nothing_else(results):
    text = write_page(results["compare"]).read_text("utf-8")
    links = re.findall(r"\b(?:src|href|srcset|action)=\"?([^\" >]*)", text)
    assert links
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in links)
    assert not re.search(r"url\(|@import|https?:", text)
    assert "default-src 'none'" in text  # a browser would refuse to load anything


def test_the_same_directory_gives_the_same_bytes_and_nothing_else_changes(results):
    directory = results["forms"]
    first = write_page(directory).read_bytes()
    before = everything(directory)
    (directory / "report.html").write_text("of other results, and longer " * 100_000)
    assert write_page(directory) == directory / "report.html"
    assert everything(directory) == before
    assert before["report.html"] == first


NASTY = '<script>alert("1")</script> & $title ${name} \'"><img src=x> </table>'


def test_text_of_files_stays_text(small):
    (small / "report.txt").write_text(f"Title {NASTY}\n\nFinding {NASTY}\n\nTable\n-----\n{NASTY}\n", "utf-8")
    with (small / "a&b.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([[NASTY, "x"], [NASTY, "0.12345678901"], ["short"], ["", "1", "too long"]])
    page = Page(write_page(small))
    assert page.tables["a&b.csv"] == [[NASTY, "x"], [NASTY, "0.12345678901"], ["short"], ["", "1"]]
    assert (page.elements["script"], page.elements.get("img", 0)) == (1, 0)
    for words in (f"Title {NASTY}", f"Finding {NASTY}", "a&b.csv"):
        assert words in page.text


def test_an_interrupted_run_has_a_page_that_says_so_and_names_the_command_that_draws(small):
    page = Page(write_page(small))
    assert "There is no report here" in page.text
    (command,) = re.findall(r"python experiment.py (figures --results-dir DIR)", page.text)
    build_parser().parse_args(command.split())
    assert len(page.tables["records.jsonl"]) == 1 + 1


def test_of_a_very_long_table_the_first_rows_are_shown_and_the_page_says_so(small):
    rows = [[str(row)] for row in range(MOST_ROWS + 1)]
    for name, shown in (("long", rows), ("just", rows[:-1])):
        with (small / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([["row"], *shown])
    page = Page(write_page(small))
    assert page.tables["long.csv"] == page.tables["just.csv"] == [["row"], *rows[:-1]]
    assert page.text.count("The first 2,000 of 2,001 rows; the file has them all.") == 1
    assert page.text.count("The first ") == 1


def test_numbers_are_short_and_whole_when_pointed_at(small):
    (small / "a.csv").write_text("x,y,z\n0.123456789,5,2\n-1.5e-05,1234567,inf\n,7,nan\n", "utf-8")
    text = write_page(small).read_text("utf-8")
    assert '<td class=n title="0.123456789">0.123457</td><td class=n>5</td>' in text
    assert "<td class=n>-1.5e-05</td><td class=n>1234567</td><td class=n>inf</td>" in text


# Where there is nothing to show


def test_a_directory_without_results_is_one_sentence_and_exit_code_2(command, small, tmp_path):
    (tmp_path / "results" / "plots").mkdir(parents=True)
    for given, said in (
        (("nowhere",), "There is no directory 'nowhere'"),
        ((), "There are no results in 'results': give one that"),
        ((tmp_path,), "one of the folders in it that have, small."),
        (("",), "DIR must not be empty"),
    ):
        code, printed, (sentence,) = command("report", *given)
        assert (code, printed) == (2, "")
        assert said in sentence
    assert not [path for path in tmp_path.rglob("*") if path.name == "report.html"]


DAMAGED = {
    "a.csv": b"x\n\xff\n",
    "plots/a.png": b"no image",
    "settings.json": b"{}",
    "records.jsonl": b"{}\n",
    "report.txt": b"\xff",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_named(name, command, small):
    (small / "plots").mkdir()
    (small / name).write_bytes(DAMAGED[name])
    code, _, (sentence,) = command("report", small)
    assert code == 2
    assert name in sentence
    assert "damaged" in sentence
    assert not (small / "report.html").exists()


def test_the_command_says_where_the_page_is(command, small, tmp_path):
    assert command("report", "small") == (0, "Wrote small/report.html.\n", [])
    small.rename(tmp_path / "results")
    assert command("report") == (0, "Wrote results/report.html.\n", [])


def test_overwrite_deletes_the_page_of_the_results_that_it_deletes(tmp_path):
    results = Results(tmp_path)
    results.claim(SMALL, FEATURES, MACHINE)
    results.write_text("summary_report.txt", "An answer\n")
    assert write_page(tmp_path).is_file()
    results.clear()
    assert not everything(tmp_path)


# Text and words

SENTENCES = [
    "At 10 epochs " + "importance masking helps in 1 and hurts in 2 of them; " * 5 + "this is all.",
    "Nothing else differs.",
    "min 5 %: " + "nothing that any other test could tell from nothing at all in any of the domains " * 2 + "is seen.",
    "width_10: of 33 forms " + "one or two are above their random twins and " * 6 + "none below.",
]


@pytest.mark.parametrize("width", [110, 114, 118])
def test_wrapped_lines_become_paragraphs_again(width):
    for indent in ("", "  "):
        lines = (textwrap.wrap(text, width, subsequent_indent=indent) for text in SENTENCES)
        assert paragraphs("\n".join(line for one in lines for line in one)) == SENTENCES


def test_a_report_is_taken_apart_at_its_first_table():
    text = "A title\n\npacs features: 9 × 2-d (blobs)\nMore.\n\nIt helps.\n\nA word.\n\nTable\n-----\n  a\n\nB\n---\n"
    found = take_apart(text)
    assert (found.title, found.whole) == ("A title", text)
    assert found.finding == [["It helps."], ["A word."]]
    assert found.measured == [["pacs features: 9 × 2-d (blobs)", "More."]]
    assert take_apart("One line\n").finding == [["One line"]]
    assert take_apart("").finding == []


@pytest.mark.parametrize(("ending", "words"), [("png", FIGURES), ("csv", TABLES)])
def test_every_committed_file_has_words_of_its_own(ending, words):
    paths = [*(ROOT / "results" / "reference").rglob(f"*.{ending}")]
    assert len(paths) > 30
    assert not [path.name for path in paths if not any(fnmatchcase(path.stem, pattern) for pattern in words)]


def test_no_pattern_is_hidden_by_one_before_it():
    for words in (FIGURES, TABLES):
        patterns = [*words]
        for number, pattern in enumerate(patterns):
            assert not any(fnmatchcase(pattern.replace("*", "x"), before) for before in patterns[:number]), pattern


def test_a_page_that_cannot_be_written_is_one_sentence(small):
    (small / "report.html").mkdir()
    with pytest.raises(InputError, match=r"report\.html' cannot be written"):
        write_page(small)
