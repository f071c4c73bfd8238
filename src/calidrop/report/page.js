"use strict";
// The report: one state, and `draw` shows it. Data come from report/page.py, charts from report/charts.py; the table is
// table.js's.

const RUN = data("run-data"), SPECS = data("specs");
const POINTS = rows(RUN.points), SPOTS = rows(RUN.spots);
const state = { words: [], off: new Set(), picked: "", sort: "", down: false };
const views = {};
const $ = (id) => document.getElementById(id);

function rows({ columns, values }) {
  return values.map((row) => {
    const made = Object.fromEntries(columns.map((name, i) => [name, row[i]]));
    const [recipe, family, parts] = RUN.recipes[made.recipe];
    return { ...made, ...RUN.cells[made.cell], recipe, family, parts };
  });
}

function element(tag, properties = {}, ...inside) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...inside);
  return made;
}

function dot(family) {
  const made = element("span", { className: "dot", title: family });
  made.style.setProperty("--dot", RUN.colours[family]);
  return made;
}

function named(recipe) { // breaks between parts and arguments, not within words
  return element("span", { className: "mono" }, ...recipe.split(/(?=[+(])|(?<=, )/).flatMap((piece) => [piece, element("wbr")]));
}

function shown(point) {
  const name = point.recipe.toLowerCase();
  return !state.off.has(point.family) && state.words.every((word) => name.includes(word));
}

const FORMATS = {
  text: (v) => v,
  count: (v) => String(v),
  score: (v) => v.toFixed(3),
  share: (v) => `${(100 * v).toFixed(0)} %`,
  small: (v) => (v === 0 ? "0" : v < 1e-6 ? "<1e-6" : v < 1e-3 ? v.toExponential(1) : v.toFixed(4)),
  megabytes: (v) => (v === 0 ? "" : (v / 1e6).toFixed(v < 1e8 ? 2 : 0)),
  hundredth: (v) => v.toFixed(2),
  tenth: (v) => v.toFixed(1),
  times: (v) => `${v.toFixed(v < 10 ? 2 : 1)}×`,
};
const format = (value, kind) => (value === null || value === undefined ? "" : FORMATS[kind](value));

// ---- charts

function colours() {
  return Object.fromEntries(["ink", "soft", "line", "ground", "accent"].map((name) => [name, colour(name)]));
}

async function chart(id, name, values, more = {}) {
  const turn = (views[id]?.turn ?? 0) + 1; // a later call overtakes an earlier one
  views[id]?.made?.finalize();
  views[id] = { turn };
  if (!values.length) return $(id).replaceChildren(element("p", { className: "note", textContent: "Nothing to draw." }));
  const set = { ...colours(), picked: state.picked, ...more };
  const params = SPECS[name].params.map((p) => ({ ...p, value: set[p.name] ?? p.value }));
  const spec = { ...SPECS[name], data: { values }, params };
  const made = await vegaEmbed($(id), spec, { actions: false, renderer: "svg", tooltip: { offsetX: 12 } });
  if (views[id].turn !== turn) return made.finalize();
  views[id].made = made;
  made.view.addEventListener("click", (_, item) => item?.datum?.recipe && pick(item.datum.recipe));
}

function drawPareto(id, cost) {
  const cell = +$("cell").value, quality = $("quality").value, key = `${quality}/${cost}`, front = RUN.fronts[cell][key];
  const rank = new Map(front.flatMap((equal, i) => equal.map((index) => [index, i + 1])));
  const paid = { device: "device_bytes", total: "total_bytes", decode: "decode_ms_per_token" }[cost];
  const points = POINTS.map((point, i) => ({ ...point, rank: rank.get(i) ?? 0, shown: shown(point) }))
    .filter((point) => point.cell === cell && point[quality] !== null && point[paid] > 0);
  $(`${id}-y`).textContent = RUN.qualities[quality];
  $(`${id}-x`).textContent = RUN.costs[cost];
  $(`${id}-front`).replaceChildren(...front.flatMap((equal, i) => equal.map((index) => line(index, i + 1, quality, cost))));
  return chart(`${id}-chart`, key, points.some((point) => point.shown) ? points : []);
}

function line(index, rank, quality, cost) {
  const point = POINTS[index], column = RUN.columns.find((c) => c.field === quality);
  const spent = cost === "decode" ? `${format(point.decode_ms_per_token, "tenth")} ms`
    : `${format(cost === "device" ? point.device_bytes : point.total_bytes, "megabytes")} MB`;
  const made = element("li", { tabIndex: 0, role: "button", hidden: !shown(point) },
    element("span", { className: "rank", textContent: rank }), dot(point.family),
    named(point.recipe),
    element("span", { className: "numbers", textContent: `${format(point[quality], column.kind)}, ${spent}` }));
  return pickable(made, point.recipe);
}

function drawHeat() {
  if (!$("heat-cell")) return null;
  const [model, task, question] = JSON.parse($("heat-cell").value);
  const quality = $("heat-quality").value;
  const spots = SPOTS.filter((s) => s.model === model && s.task === task && s.question === question && shown(s)
    && s[quality] !== null);
  return chart("heat-chart", `heat/${quality}`, spots, { names: innerWidth < 600 ? 150 : 420 });
}

// ---- what is picked

function pickable(made, recipe) {
  made.dataset.recipe = recipe;
  made.classList.toggle("on", recipe === state.picked);
  made.addEventListener("click", () => pick(recipe));
  made.addEventListener("keydown", (event) => event.key === "Enter" && pick(recipe));
  return made;
}

function pick(recipe) {
  state.picked = recipe === state.picked ? "" : recipe;
  for (const { made } of Object.values(views)) made?.view.signal("picked", state.picked).runAsync();
  for (const one of document.querySelectorAll("[data-recipe]")) one.classList.toggle("on", one.dataset.recipe === state.picked);
  drawPicked();
}

function drawPicked() {
  const recipe = state.picked;
  if (!recipe) {
    $("picked").replaceChildren(element("p", { className: "note", textContent: "Pick a point or a row to see what its recipe is." }));
    return;
  }
  const { family, parts: texts } = POINTS.find((point) => point.recipe === recipe);
  const parts = texts.map((text) => element("li", {},
    element("code", { textContent: text }), ` ${RUN.parts[text].role}. ${RUN.parts[text].says}`));
  const about = parts.length ? element("ul", {}, ...parts)
    : element("p", { textContent: "A cache of another library, or a method that this version does not know." });
  $("picked").replaceChildren(
    element("h3", {}, dot(family), " ", named(recipe)), element("p", { className: "note", textContent: family }), about);
}

// ---- all of it

async function draw() {
  drawTable();
  await Promise.all([drawPareto("memory", $("memory").value), drawPareto("speed", "decode"), drawHeat()]);
  document.body.dataset.drawn = +(document.body.dataset.drawn ?? 0) + 1;
}

function options(id, values, words = (v) => v) {
  $(id)?.replaceChildren(...values.map((value) => element("option", { value, textContent: words(value) })));
}

function unique(values) {
  return [...new Set(values)];
}

function start() {
  const told = (cell) => [cell.task, ...(cell.length ? [`${cell.length} tokens`] : []),
    ...(cell.question ? [`question ${cell.question}`] : []), ...(RUN.models > 1 ? [cell.model] : [])].join(", ");
  options("cell", RUN.cells.map((_, i) => i), (i) => told(RUN.cells[i]));
  options("heat-cell", unique(SPOTS.map((s) => JSON.stringify([s.model, s.task, s.question]))), (v) => {
    const [model, task, question] = JSON.parse(v);
    return told({ model, task, question });
  });
  for (const id of ["task", "length", "question"]) {
    options(id, ["", ...unique(RUN.cells.map((cell) => cell[id] ?? "–"))], (v) => (v === "" ? "all" : v));
    $(id).value = RUN.cells[0][id] ?? "–"; // lines compare within a task
  }
  tableHead();
  const present = unique(POINTS.map((p) => p.family));
  $("families").replaceChildren(...Object.keys(RUN.colours).filter((f) => present.includes(f)).map((family) => {
    const button = element("button", { type: "button", ariaPressed: "true" }, dot(family), family);
    button.addEventListener("click", () => {
      if (!state.off.delete(family)) state.off.add(family);
      button.ariaPressed = String(!state.off.has(family));
      draw();
    });
    return button;
  }));
  let timer;
  $("search").addEventListener("input", () => {
    state.words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    clearTimeout(timer);
    timer = setTimeout(draw, 150);
  });
  for (const id of ["cell", "quality", "memory"]) $(id).addEventListener("change", draw);
  for (const id of ["heat-cell", "heat-quality"]) $(id)?.addEventListener("change", drawHeat);
  for (const id of ["task", "length", "question"]) $(id).addEventListener("change", drawTable);
  document.addEventListener("theme", draw);
  drawPicked();
  draw();
}

start();
