"use strict";
// Elements made of tables; what is chosen is passed in.

const SVG = ["svg", "rect", "path", "line", "title"];
const number = (n, digits = 0) => n.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
const mega = (n) => number(n / 1e6, n < 1e8 ? 2 : 0);

function make(tag, attributes = {}, ...inside) {
  const it = SVG.includes(tag) ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) it.setAttribute(name, value);
  it.append(...inside);
  return it;
}

// The pieces of a text, as text alone. A line's end is shown too, but no part of it.
function spans(box, { text, special }, first) {
  box.replaceChildren(...text.map((piece, i) => {
    const it = make("span", { class: "t", "data-i": first + i });
    if (special.includes(i)) it.classList.add("special");
    if (!piece) it.classList.add("part");
    for (const part of piece.split(/(\n)/)) it.append(...(part === "\n" ? [make("i", { class: "nl" }), "\n"] : [part]));
    return it;
  }));
  return [...box.children];
}

function shade(it, share, mark) {
  const look = `${share} ${mark}`;
  if (it.look === look) return; // most look the same from step to step
  it.look = look;
  it.style.setProperty("--f", share > 0 ? (0.15 + 0.85 * share).toFixed(3) : "0"); // one head of many can be seen too
  it.classList.toggle("none", share === 0);
  for (const form of MARKED) it.classList.toggle(`m-${form}`, form === mark);
}

function sample(form) {
  const it = make("span", { class: "t" }, "word");
  shade(it, ["exact", "coded"].includes(form) ? 0.6 : 0, MARKED.includes(form) ? form : "");
  return it;
}

function area(from, to, bin, height) {
  let up = "", down = "";
  from.forEach((low, i) => {
    const x0 = (i * bin).toFixed(2), x1 = ((i + 1) * bin).toFixed(2);
    up += `${i ? "L" : "M"}${x0} ${(height - to[i]).toFixed(2)}L${x1} ${(height - to[i]).toFixed(2)}`;
    down = `L${x1} ${(height - low).toFixed(2)}L${x0} ${(height - low).toFixed(2)}${down}`;
  });
  return `${up}${down}Z`;
}

// Shares of the forms over the text, one on top of the other. -> the tokens that a bar is the mean of
function survival(chart, counts, height, lines) {
  const { columns } = counts, width = chart.clientWidth;
  const per = Math.max(1, Math.ceil(columns / (width / 2))), bins = Math.ceil(columns / per);
  const sum = (n) => Array.from({ length: bins }, (_, b) => total(n.subarray(b * per, (b + 1) * per)));
  const sums = counts.forms.slice(0, 5).map(sum), all = sums[0].map((_, b) => Math.max(1, total(sums.map((n) => n[b]))));
  let floor = all.map(() => 0);
  const paths = sums.slice(0, 4).map((n, f) => {
    const top = floor.map((low, b) => low + (n[b] / all[b]) * height);
    const path = make("path", { class: FORMS[f], d: area(floor, top, (width * per) / columns, height) });
    floor = top;
    return path;
  });
  for (const [kind, token] of lines) {
    const x = (token * width) / columns;
    paths.push(make("line", { class: kind, x1: x, x2: x, y1: 0, y2: height }));
  }
  chart.setAttribute("viewBox", `0 0 ${width} ${height}`);
  chart.replaceChildren(...paths);
  return per;
}

// All cells of a recipe in one bar.
function strip(table) {
  const sums = table.count(-1, -1).forms.slice(0, 5).map(total), all = total(sums);
  const words = sums.map((n, f) => (n ? `${number((100 * n) / all)} % ${NAMES[FORMS[f]]}` : "")).filter(Boolean).join(", ");
  const svg = make("svg", { class: "share", viewBox: "0 0 190 14", preserveAspectRatio: "none", role: "img", "aria-label": words });
  let x = 0;
  sums.slice(0, 4).forEach((n, f) => {
    svg.append(make("rect", { class: FORMS[f], x, width: (190 * n) / all, height: 14 }));
    x += (190 * n) / all;
  });
  svg.append(make("title", {}, words));
  return svg;
}

// One token: a column per layer, a row per kv head.
function grid(table, token, layer, head) {
  const size = 10, { layers, heads } = table, svg = make("svg", { viewBox: `0 0 ${layers * size} ${heads * size}` });
  for (let l = 0; l < layers; l++)
    for (let h = 0; h < heads; h++) {
      const off = chosen(layer, layers).includes(l) && chosen(head, heads).includes(h) ? "" : " off";
      const place = { x: l * size, y: h * size, width: size, height: size };
      svg.append(make("rect", { class: `cell ${table.form(l, h, token)}${off}`, ...place }));
    }
  svg.style.maxWidth = `${layers * 14}px`;
  return svg;
}

function ranges(list) {
  const out = [];
  for (const x of list) {
    const last = out[out.length - 1];
    if (last && last[1] === x - 1) last[1] = x;
    else out.push([x, x]);
  }
  return out.map(([a, b]) => (a === b ? `${a}` : `${a}–${b}`)).join(", ");
}
