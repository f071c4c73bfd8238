"use strict";
// The state of the page is what is chosen: a recipe, a layer and a head (-1: all), and the token pointed at (-1: none).
// `counts` turns a recipe's table [layers,heads,columns] into how many cells of the choice have each form, per column.

(async () => {
  const FORMS = ["exact", "coded", "host", "summary", "gone", "blind"];
  const NAMES = {
    exact: "held exactly", coded: "held in fewer bits", host: "in host memory: can be asked again",
    summary: "part of what stands for many", gone: "gone", blind: "out of this layer's sight, whatever the cache",
  };
  const MARKED = ["coded", "host", "summary"];
  const { layers, heads, context, held } = data("shown");
  const narrow = matchMedia("(max-width: 700px)");
  const at = { recipe: 0, layer: -1, head: -1, token: -1 };
  const $ = (id) => document.getElementById(id);
  const number = (n, digits = 0) => n.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
  const mega = (n) => number(n / 1e6, n < 1e8 ? 2 : 0);
  const make = (tag, attributes = {}, ...inside) => {
    const svg = ["svg", "rect", "path", "line", "text"].includes(tag);
    const it = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) it.setAttribute(name, value);
    it.append(...inside);
    return it;
  };

  for (const one of held) {
    const bytes = Uint8Array.from(atob(one.table), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    one.table = new Uint8Array(await new Response(stream).arrayBuffer());
    one.columns = one.table.length / (layers * heads);
    one.form = one.kinds.map(([form]) => FORMS.indexOf(form));
  }

  const cell = (one, layer, head, token) => one.table[(layer * heads + head) * one.columns + token];
  const chosen = (value, n) => (value < 0 ? [...Array(n).keys()] : [value]);

  function counts(one, layer = at.layer, head = at.head) {
    const out = FORMS.map(() => new Uint32Array(one.columns));
    for (const l of chosen(layer, layers))
      for (const h of chosen(head, heads))
        for (let i = 0, from = (l * heads + h) * one.columns; i < one.columns; i++) out[one.form[one.table[from + i]]][i]++;
    return out;
  }

  const total = (column) => column.reduce((a, b) => a + b, 0);
  const seeing = (n, i) => n[0][i] + n[1][i] + n[2][i] + n[3][i] + n[4][i]; // cells that could hold it
  const share = (n, i) => (n[0][i] + n[1][i]) / Math.max(1, seeing(n, i));

  function marked(n, i) { // the commonest form of those that are not exact and not gone
    let best = "", most = 0;
    for (const form of MARKED) {
      const here = n[FORMS.indexOf(form)][i];
      if (here > most) [best, most] = [form, here];
    }
    return best;
  }

  // ---- the text

  function spans(box, { text, special }, first) {
    box.replaceChildren(...text.map((piece, i) => {
      const it = make("span", { class: "t", "data-i": first + i });
      if (special.includes(i)) it.classList.add("special");
      if (!piece) it.classList.add("part");
      piece.split(/(\n)/).forEach((part) => it.append(...(part === "\n" ? [make("i", { class: "nl" }), "\n"] : [part])));
      return it;
    }));
    return [...box.children];
  }

  let tokens = spans($("text"), context, 0), written = [], now = [];

  function shade() {
    const all = [...tokens, ...written];
    now = counts(held[at.recipe]);
    all.forEach((it, i) => {
      const f = share(now, i), mark = marked(now, i), look = `${f} ${mark}`;
      if (it.look === look) return; // most look the same from step to step
      it.look = look;
      it.style.setProperty("--f", f > 0 ? (0.15 + 0.85 * f).toFixed(3) : "0");
      it.classList.toggle("none", f === 0);
      MARKED.forEach((form) => it.classList.toggle(`m-${form}`, form === mark));
    });
  }

  // ---- where in the text

  function area(from, to, bin, height) {
    let up = "", down = "";
    from.forEach((low, i) => {
      const x0 = (i * bin).toFixed(2), x1 = ((i + 1) * bin).toFixed(2);
      up += `${i ? "L" : "M"}${x0} ${(height - to[i]).toFixed(2)}L${x1} ${(height - to[i]).toFixed(2)}`;
      down = `L${x1} ${(height - low).toFixed(2)}L${x0} ${(height - low).toFixed(2)}${down}`;
    });
    return `${up}${down}Z`;
  }

  function draw() {
    const chart = $("chart"), one = held[at.recipe], width = chart.clientWidth, height = 96;
    const per = Math.max(1, Math.ceil(one.columns / (width / 2))), bins = Math.ceil(one.columns / per);
    const bin = (width * per) / one.columns;
    const sums = FORMS.map((_, form) => Array.from({ length: bins }, (_, b) => total(now[form].subarray(b * per, (b + 1) * per))));
    const all = sums[0].map((_, b) => Math.max(1, sums.slice(0, 5).reduce((n, form) => n + form[b], 0)));
    let floor = all.map(() => 0);
    const paths = FORMS.slice(0, 4).map((form, f) => {
      const top = floor.map((low, b) => low + (sums[f][b] / all[b]) * height);
      const path = make("path", { class: form, d: area(floor, top, bin, height) });
      floor = top;
      return path;
    });
    const line = (i, kind) => make("line", { class: kind, x1: (i * width) / one.columns, x2: (i * width) / one.columns, y1: 0, y2: height });
    if (one.columns > tokens.length) paths.push(line(tokens.length, "end"));
    if (at.token >= 0) paths.push(line(at.token + 0.5, "at"));
    chart.setAttribute("viewBox", `0 0 ${width} ${height}`);
    chart.replaceChildren(...paths);
    $("each").textContent = "height: share of the heads that hold a token" + (per > 1 ? `; a bar is ${per} tokens` : "");
  }

  // ---- what is said

  const where = () =>
    `${at.layer < 0 ? `all ${layers} layers` : `layer ${at.layer}`}, ${at.head < 0 ? `all ${heads} kv heads` : `kv head ${at.head}`}`;

  const cells = () => (at.layer < 0 ? layers : 1) * (at.head < 0 ? heads : 1);

  function summarise() {
    const one = held[at.recipe], n = one.columns;
    let every = 0, some = 0, none = 0, host = 0, summary = 0;
    for (let i = 0; i < n; i++) {
      const f = share(now, i);
      if (f === 1) every++;
      else if (f > 0) some++;
      else {
        none++;
        if (now[2][i]) host++;
        else if (now[3][i]) summary++;
      }
    }
    const rest = [[host, "are in host memory"], [summary, "are remembered as a part of something"]];
    const still = rest.filter(([x]) => x).map(([x, words]) => `${number(x)} of these ${words}`).join(", ");
    $("sum").replaceChildren(
      make("b", {}, `Of ${number(n)} tokens`), " ",
      cells() === 1
        ? `${number(every)} are held on the device, ${number(none)} are not`
        : `${number(every)} are held on the device by every head, ${number(some)} by some of them, ${number(none)} by none`,
      `${still ? `; ${still}` : ""} (${where()}).`,
      one.asked > 0 ? ` While writing, a head went back to those on the host in ${number(100 * one.asked, 0)} % of the cases.` : "",
    );
  }

  function legend() {
    const one = held[at.recipe], there = new Set(held.flatMap((x) => x.kinds.map(([form]) => form)));
    const items = [make("span", {}, "held by no head", make("span", { class: "ramp" }), "all heads")];
    for (const form of FORMS.filter((form) => there.has(form) && form !== "blind")) {
      const look = MARKED.includes(form) ? `m-${form}` : form === "gone" ? "none" : "";
      const sample = make("span", { class: `t ${look}` }, "word");
      sample.style.setProperty("--f", form === "exact" || form === "coded" ? 0.6 : 0);
      const how = form === "coded" ? one.kinds.filter(([f]) => f === form).map(([, text]) => text) : [];
      const svg = make("svg", { viewBox: "0 0 22 14" }, make("rect", { class: form, width: 22, height: 14 }));
      items.push(make("span", {}, svg, sample, NAMES[form] + (how.length ? ` (${how.join("; ")})` : "")));
    }
    $("legend").replaceChildren(...items);
  }

  const ranges = (list) => {
    const out = [];
    for (const x of list) {
      const last = out[out.length - 1];
      if (last && last[1] === x - 1) last[1] = x;
      else out.push([x, x]);
    }
    return out.map(([a, b]) => (a === b ? `${a}` : `${a}–${b}`)).join(", ");
  };

  function grid(one) {
    const size = 10, svg = make("svg", { viewBox: `0 0 ${layers * size} ${heads * size}` });
    for (let l = 0; l < layers; l++)
      for (let h = 0; h < heads; h++) {
        const off = (at.layer >= 0 && at.layer !== l) || (at.head >= 0 && at.head !== h);
        const form = FORMS[one.form[cell(one, l, h, at.token)]];
        svg.append(make("rect", { class: `cell ${form}${off ? " off" : ""}`, x: l * size, y: h * size, width: size, height: size }));
      }
    svg.style.maxWidth = `${layers * 14}px`;
    return svg;
  }

  function tip() {
    const box = $("tip"), one = held[at.recipe], i = at.token, it = [...tokens, ...written][i];
    box.hidden = !it;
    if (!it) return;
    const kinds = one.kinds.map(() => 0), mine = [];
    for (const l of chosen(at.layer, layers))
      for (const h of chosen(at.head, heads)) kinds[cell(one, l, h, i)]++;
    for (let l = 0; l < layers; l++)
      if (chosen(at.head, heads).some((h) => one.form[cell(one, l, h, i)] < 2)) mine.push(l);
    const rows = one.kinds.map(([form, how], k) => [form, how, kinds[k]]).filter(([, , n]) => n);
    const text = JSON.stringify(it.textContent).slice(1, -1).replaceAll('\\"', '"');
    box.replaceChildren(
      make("b", {}, text ? `“${text}”` : "a part of the character before"), ` token ${number(i + 1)} of ${number(one.columns)}`,
      make("p", { class: "note" }, `In how many of ${number(cells())} kv heads (${where()}):`),
      make("table", {}, ...rows.map(([form, how, n]) =>
        make("tr", {}, make("td", {}, make("b", {}, number(n))), make("td", {}, `${NAMES[form]}: ${how}`)))),
      grid(one),
      make("p", { class: "note" }, `Every column a layer (0–${layers - 1}), every row a kv head. `
        + (mine.length ? `On the device in layer${mine.length > 1 ? "s" : ""} ${ranges(mine)}.` : "On the device in no layer.")),
    );
    const rect = it.getClientRects()[0] || it.getBoundingClientRect(), edge = document.documentElement.clientWidth;
    if (narrow.matches) { // the tip lies at the bottom, and must not cover its token
      const hidden = rect.bottom + 8 - box.getBoundingClientRect().top;
      if (hidden > 0) scrollBy(0, hidden);
      return;
    }
    const left = Math.min(Math.max(8, rect.left), edge - box.offsetWidth - 8);
    const below = rect.bottom + box.offsetHeight + 12 < innerHeight;
    box.style.setProperty("--x", `${left + scrollX}px`);
    box.style.setProperty("--y", `${scrollY + (below ? rect.bottom + 6 : rect.top - box.offsetHeight - 6)}px`);
  }

  function point(i) {
    const all = [...tokens, ...written];
    all[at.token]?.classList.remove("on");
    at.token = i >= 0 && i < all.length ? i : -1;
    all[at.token]?.classList.add("on");
    draw();
    tip();
  }

  // ---- recipes and controls

  function strip(one) {
    const sums = counts(one, -1, -1).map(total), all = sums.slice(0, 5).reduce((a, b) => a + b, 0);
    const svg = make("svg", { class: "share", viewBox: "0 0 190 14", preserveAspectRatio: "none" });
    let x = 0;
    sums.slice(0, 4).forEach((n, f) => {
      svg.append(make("rect", { class: FORMS[f], x, width: (190 * n) / all, height: 14 }));
      x += (190 * n) / all;
    });
    const words = sums.slice(0, 5).map((n, f) => (n ? `${number((100 * n) / all, 0)} % ${NAMES[FORMS[f]]}` : "")).filter(Boolean);
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", words.join(", "));
    svg.append(document.createElementNS("http://www.w3.org/2000/svg", "title"));
    svg.lastChild.textContent = words.join(", ");
    return svg;
  }

  held.forEach((one, i) => {
    const [least, mean, most] = one.per_head, even = least === most;
    const row = make("tr", { "data-i": i },
      make("td", { class: "text name" }, one.recipe), make("td", { class: "text strip" }, strip(one)),
      make("td", { "data-name": "MB" }, mega(one.device)),
      make("td", { "data-name": "MB on the host", class: one.host ? "" : "nothing" }, one.host ? mega(one.host) : "0"),
      make("td", { "data-name": "smaller" }, `${number(one.full / one.device, 1)}×`),
      make("td", { "data-name": "tokens per head" }, even ? number(mean) : `${number(least)} – ${number(most)}, mean ${number(mean, 1)}`));
    row.addEventListener("click", () => choose(i));
    $("recipes").append(row);
    $("recipe").append(make("option", { value: i }, one.recipe));
  });

  function choose(recipe) {
    at.recipe = recipe;
    $("recipe").value = recipe;
    for (const row of $("recipes").rows) row.setAttribute("aria-current", Number(row.dataset.i) === recipe);
    const { made } = held[recipe];
    written = spans($("made"), made, tokens.length);
    $("after").hidden = !written.length;
    legend();
    update();
  }

  function update() {
    shade();
    const range = (id, value, all, one) => {
      $(`${id}-is`).textContent = value < 0 ? all : one;
      $(id).setAttribute("aria-valuetext", $(`${id}-is`).textContent);
    };
    range("layer", at.layer, `all ${layers}`, `${at.layer} of 0–${layers - 1}`);
    range("head", at.head, `all ${heads}`, `${at.head} of 0–${heads - 1}`);
    summarise();
    point(at.token);
  }

  for (const [id, n] of [["layer", layers], ["head", heads]]) {
    Object.assign($(id), { min: -1, max: n - 1, step: 1, value: -1 });
    $(id).addEventListener("input", () => { at[id] = Number($(id).value); update(); });
    $(id).closest("label").hidden = n === 1;
  }
  $("recipe").addEventListener("change", () => choose(Number($("recipe").value)));

  const index = (event) => Number(event.target.closest?.(".t")?.dataset.i ?? -1);
  const hovers = (event) => event.pointerType === "mouse" && !narrow.matches;
  for (const box of [$("text"), $("made")]) {
    box.addEventListener("pointerover", (event) => { if (hovers(event)) point(index(event)); });
    box.addEventListener("pointerleave", (event) => { if (hovers(event)) point(-1); });
    box.addEventListener("click", (event) => point(index(event)));
    box.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (event.key === "Escape") point(-1);
      if (!step) return;
      event.preventDefault();
      const first = box.id === "text" ? 0 : tokens.length, last = first + box.children.length - 1;
      point(at.token < first || at.token > last ? first : Math.min(Math.max(at.token + step, first), last));
      box.querySelector(".on")?.scrollIntoView({ block: "nearest" });
    });
  }
  document.addEventListener("click", (event) => { if (!event.target.closest("#text, #made, #tip, #chart")) point(-1); });
  $("chart").addEventListener("click", (event) => {
    const box = $("chart").getBoundingClientRect(), one = held[at.recipe];
    const i = Math.min(one.columns - 1, Math.floor(((event.clientX - box.left) / box.width) * one.columns));
    [...tokens, ...written][i].scrollIntoView({ block: "center" });
    point(i);
  });
  new ResizeObserver(draw).observe($("chart"));
  choose(0);
  document.body.dataset.ready = "yes";
})();
