"use strict";
// Headings that sort and a field that filters, for every table; without this script they are plain tables.

const words = new Intl.Collator("en", { numeric: true });

for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  const rows = [...body.rows];
  [...table.tHead.rows[0].cells].forEach((head, column) => addSorting(head, column, body, rows));
  addFilter(table, rows);
}

function addSorting(head, column, body, rows) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = head.textContent || "row";
  head.replaceChildren(button);
  const value = head.classList.contains("n") ? number : text;
  button.onclick = () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const keyed = rows.map((row) => [row, value(row.cells[column])]);
    keyed.sort(([, a], [, b]) => compare(a, b, down ? -1 : 1));
    body.append(...keyed.map(([row]) => row));
  };
}

function number(cell) {
  const found = parseFloat((cell?.title || cell?.textContent || "").replace(/inf/i, "Infinity"));
  return Number.isNaN(found) ? null : found;
}

function text(cell) {
  return cell?.textContent || null;
}

function compare(a, b, direction) {
  if (a === null || b === null) return (a === null) - (b === null); // what is missing comes last, both ways
  return direction * (typeof a === "number" ? a - b : words.compare(a, b));
}

function addFilter(table, rows) {
  const line = document.createElement("label");
  const field = document.createElement("input");
  const count = document.createElement("output");
  line.className = "filter";
  field.type = "search";
  line.append("Filter", field, count);
  field.oninput = () => {
    const wanted = field.value.toLowerCase().split(/\s+/);
    let left = 0;
    for (const row of rows) {
      const found = [...row.cells].map((cell) => cell.textContent.toLowerCase()).join(" ");
      row.hidden = !wanted.every((word) => found.includes(word));
      left += !row.hidden;
    }
    count.textContent = field.value ? `${left} of ${rows.length} rows` : "";
  };
  table.parentNode.before(line);
}
