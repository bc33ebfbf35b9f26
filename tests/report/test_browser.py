"""The page in a real browser, without a window: sorting, filtering, and that nothing is cut off on screens and phones.

Pages lie in frames of a page of the tests, whose script does what a reader does and says what is then to be seen.
"""

import html
import json
import re
import shutil
import subprocess

import pytest

from report import write_page
from tests.report.conftest import KINDS

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(NAMES)} is installed")

OUTSIDE = """
<!doctype html>
<meta charset="utf-8">
<pre id="said"></pre>
{frames}
<script>
const look = (view, page) => {{ {script} }};
onload = () => {{
  const said = [...document.querySelectorAll("iframe")].map((frame) => {{
    try {{ return look(frame.contentWindow, frame.contentDocument); }} catch (error) {{ return String(error); }}
  }});
  document.getElementById("said").textContent = JSON.stringify(said);
}};
</script>
"""


@pytest.fixture
def look(tmp_path):
    """What a script says of pages, each at a width in pixels: (page and width, …), script -> answers."""

    def ask(pages, script):
        frames = (
            f'<iframe width="{width}" height="800" style="border: 0" srcdoc="{html.escape(page)}"></iframe>'
            for page, width in pages
        )
        outside = tmp_path / "outside.html"
        outside.write_text(OUTSIDE.format(frames="\n".join(frames), script=script), "utf-8")
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--dump-dom"]
        command = [BROWSER, *options, f"--user-data-dir={tmp_path / 'profile'}", outside.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=300, check=True)
        said = re.search('<pre id="said">(.*?)</pre>', done.stdout, re.DOTALL)[1]
        return json.loads(html.unescape(said))

    return ask


TABLE = "name,score,text\nb10,0.5,Red\nb2,-1.25e-05,green\nB3,,red green\nb1,0.12345678901,\nb4,0.12345678899,blue\n"


@pytest.fixture
def page(small):
    """A page whose first table is `TABLE`; numbers that look equal are not, and some are missing."""
    (small / "a.csv").write_text(TABLE, "utf-8")
    return write_page(small).read_text("utf-8")


SEEN = """
const table = page.querySelector("table"), heads = [...table.tHead.rows[0].cells];
const seen = () => [...table.tBodies[0].rows].filter((row) => row.getClientRects().length)
  .map((row) => row.cells[0].textContent);
const field = table.closest("details").querySelector("input");
const type = (text) => { field.value = text; field.dispatchEvent(new Event("input")); return seen(); };
"""
SORT = f"""{SEEN}
const said = [[seen(), heads.map((head) => head.getAttribute("aria-sort"))]];
for (const column of [1, 1, 0, 0, 2]) {{
  heads[column].querySelector("button").click();
  said.push([seen(), heads.map((head) => head.getAttribute("aria-sort"))]);
}}
return said;
"""


def test_a_heading_sorts_up_and_down_with_what_is_missing_last(look, page):
    up, down = "ascending", "descending"
    (said,) = look([(page, 1280)], SORT)
    assert said == [
        [["b10", "b2", "B3", "b1", "b4"], [None, None, None]],
        [["b2", "b4", "b1", "b10", "B3"], [None, up, None]],
        [["b10", "b1", "b4", "b2", "B3"], [None, down, None]],
        [["b1", "b2", "B3", "b4", "b10"], [up, None, None]],
        [["b10", "b4", "B3", "b2", "b1"], [down, None, None]],
        [["b4", "b2", "b10", "B3", "b1"], [None, None, up]],
    ]


FILTER = f"""{SEEN}
const count = table.closest("details").querySelector("output");
const said = ["red", "GREEN  red", "", "0.5", "nothing"].map((text) => [type(text), count.textContent]);
type("red");
heads[0].querySelector("button").click();
said.push([seen(), ""]);
return said;
"""


def test_a_field_filters_by_all_its_words_and_counts(look, page):
    (said,) = look([(page, 1280)], FILTER)
    assert said == [
        [["b10", "B3"], "2 of 5 rows"],
        [["B3"], "1 of 5 rows"],
        [["b10", "b2", "B3", "b1", "b4"], ""],
        [["b10"], "1 of 5 rows"],
        [[], "0 of 5 rows"],
        [["B3", "b10"], ""],  # sorted, and filtered still
    ]


REACHED = """
return [...page.querySelectorAll("table")].map((table) => {
  const reached = (element) => { element.focus(); return page.activeElement === element && element.tabIndex === 0; };
  table.closest("details").open = true;
  const buttons = [...table.tHead.rows[0].cells].map((head) => head.querySelector("button"));
  const field = table.closest("details").querySelector(".filter input");
  return buttons.every(reached) && reached(field) && field.labels[0].textContent.startsWith("Filter")
    && reached(table.closest(".scroll")) && table.closest(".scroll").getAttribute("aria-label") !== "";
});
"""


def test_all_of_it_is_reached_by_the_keyboard(look, page):
    (said,) = look([(page, 1280)], REACHED)
    assert len(said) >= 3
    assert all(said)


LAYOUT = """
for (const closed of page.querySelectorAll("details")) closed.open = true;
const all = [...page.querySelectorAll("body *")], boxes = [...page.querySelectorAll(".scroll")];
const name = (element) => element.outerHTML.slice(0, 80);
const beyond = (element) => {
  const { left, right, width } = element.getBoundingClientRect();
  return width > 0 && (left < 0 || right > view.innerWidth);
};
const overflows = (element) => element.scrollWidth > element.clientWidth + 1;
const style = (element) => view.getComputedStyle(element);
return {
  width: view.innerWidth,
  sideways: page.scrollingElement.scrollWidth,
  outside: all.filter((element) => !element.parentElement.closest(".scroll") && beyond(element)).map(name),
  clipped: all.filter((element) => /hidden|clip/.test(style(element).overflow) && overflows(element)).map(name),
  cells: [...page.querySelectorAll("th, td")].filter(overflows).map(name),
  stuck: boxes.filter((box) => {
    box.scrollTo(1e6, 1e6);
    const inner = box.firstElementChild.getBoundingClientRect(), outer = box.getBoundingClientRect();
    return inner.right > outer.right + 1 || inner.bottom > outer.bottom + 1;
  }).map(name),
  scroll: boxes.filter(overflows).length,
  images: [...page.images].filter((image) => !image.naturalWidth).length,
  buttons: page.querySelectorAll("th button").length - page.querySelectorAll("th").length,
};
"""


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_cut_off(width, look, results):
    pages = [(write_page(results[kind]).read_text("utf-8"), width) for kind in KINDS]
    said = look(pages, LAYOUT)
    fine = {"width": width, "sideways": width, "outside": [], "clipped": [], "cells": [], "stuck": [], "images": 0}
    for kind, found in zip(KINDS, said, strict=True):
        assert found.pop("scroll") > 0 or width > 390, kind  # there is something wide, in a box of its own
        assert found == fine | {"buttons": 0}, kind
