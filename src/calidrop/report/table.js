"use strict";
// The table of a report, of the state and data that page.js has.

function drawTable() {
  const is = (id, value) => $(id).value === "" || $(id).value === String(value ?? "–");
  let some = POINTS.filter((p) => shown(p) && is("task", p.task) && is("length", p.length) && is("question", p.question));
  if (state.sort) {
    const field = state.sort, sign = state.down ? -1 : 1, none = (v) => v === null || v === undefined;
    some = [...some].sort((a, b) => none(a[field]) - none(b[field]) || // what is not there comes last
      sign * (typeof a[field] === "string" ? a[field].localeCompare(b[field]) : a[field] - b[field]));
  }
  const columns = RUN.columns.filter(({ field }) => !$(field)?.value); // what is chosen need not be told in each row
  document.querySelector("#table tbody").replaceChildren(...some.map((p) => pickable(
    element("tr", {}, ...columns.map((column) => entry(p, column))), p.recipe)));
  for (const head of document.querySelectorAll("#table th")) {
    head.hidden = !columns.some(({ field }) => field === head.dataset.field);
    if (head.dataset.field === state.sort) head.ariaSort = state.down ? "descending" : "ascending";
    else head.removeAttribute("aria-sort");
  }
  $("count").textContent = `${some.length} of ${POINTS.length} lines`;
}

function entry(point, { field, kind }) {
  const value = format(point[field], kind), made = element("td", { className: kind === "text" ? "text" : "" });
  if (field === "recipe") made.append(element("span", { className: "recipe" }, dot(point.family), named(value)));
  else made.append(value);
  const aside = field === "n" && point.errors ? `${point.errors} failed`
    : field === "score" && point.low !== null ? `${point.low.toFixed(2)}–${point.high.toFixed(2)}` : "";
  if (aside) made.append(" ", element("span", { className: "aside", textContent: aside }));
  return made;
}

function sortBy(field) {
  state.down = state.sort === field ? !state.down : field === "score" || field === "agreement" || field === "ratio";
  state.sort = field;
  drawTable();
}

function tableHead() {
  document.querySelector("#table thead tr").replaceChildren(...RUN.columns.map(({ field, head, about, kind }) => {
    const button = element("button", { type: "button", textContent: head, title: about });
    button.addEventListener("click", () => sortBy(field));
    const made = element("th", { className: kind === "text" ? "text" : "", scope: "col" }, button);
    made.dataset.field = field;
    return made;
  }));
}
