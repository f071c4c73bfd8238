"use strict";
// The state of the page is what is chosen: a recipe, a layer and a head (-1: all), and the token pointed at (-1: none).

(async () => {
  const { layers, heads, context, held } = data("shown");
  const tables = await Promise.all(held.map((told) => Table.of(told, layers, heads)));
  const at = { recipe: 0, layer: -1, head: -1, token: -1 };
  const narrow = matchMedia("(max-width: 700px)");
  const $ = (id) => document.getElementById(id);
  const read = spans($("text"), context, 0);
  let table, counts, tokens; // of the choice; tokens: those read and those written, as elements

  const cells = () => chosen(at.layer, layers).length * chosen(at.head, heads).length;

  function where() {
    const layer = at.layer < 0 ? `${layers} layers` : `layer ${at.layer}`;
    const head = at.head < 0 ? `${heads} kv heads` : `kv head ${at.head}`;
    return layer + (at.layer < 0 && at.head < 0 ? " × " : ", ") + head;
  }

  function summarise() {
    const { every, some, none, host, summary, blind } = counts.words(), { asked } = table.told;
    const rest = [[host, "are in host memory"], [summary, "are remembered as a part of something"],
      [blind, "are out of the layer's sight, whatever the cache"]];
    const still = rest.filter(([n]) => n).map(([n, words]) => `; ${number(n)} of these ${words}`).join("");
    $("sum").replaceChildren(
      make("b", {}, `Of ${number(table.columns)} tokens`), " ",
      cells() === 1
        ? `${number(every)} are held on the device, ${number(none)} are not`
        : `${number(every)} are held on the device by every head, ${number(some)} by some of them, ${number(none)} by none`,
      `${still} (${where()}).`,
      asked > 0 ? ` While writing, a head went back to those on the host in ${number(100 * asked)} % of the cases.` : "",
    );
  }

  function legend() {
    const there = new Set(held.flatMap((told) => told.kinds.map(([form]) => form)));
    const items = FORMS.filter((form) => there.has(form) && form !== "blind").map((form) => {
      const swatch = make("svg", { viewBox: "0 0 22 14" }, make("rect", { class: form, width: 22, height: 14 }));
      const how = table.told.kinds.filter(([f]) => f === form && form === "coded").map(([, words]) => words).join("; ");
      return make("span", {}, swatch, sample(form), NAMES[form] + (how && ` (${how})`));
    });
    $("legend").replaceChildren(make("span", {}, "held by no head", make("span", { class: "ramp" }), "all heads"), ...items);
  }

  function draw() {
    const lines = table.columns > read.length ? [["end", read.length]] : [];
    if (at.token >= 0) lines.push(["at", at.token + 0.5]);
    const per = survival($("chart"), counts, 96, lines);
    $("each").textContent = "height: share of the heads that hold a token" + (per > 1 ? `; a bar is ${per} tokens` : "");
  }

  // ---- one token

  function tip() {
    const box = $("tip"), it = tokens[at.token];
    box.hidden = !it;
    if (!it) return;
    const kinds = table.told.kinds.map(([form, how]) => ({ form, how, n: 0 })), mine = new Set();
    for (const l of chosen(at.layer, layers)) for (const h of chosen(at.head, heads)) kinds[table.kind(l, h, at.token)].n++;
    for (let l = 0; l < layers; l++)
      for (const h of chosen(at.head, heads)) if (["exact", "coded"].includes(table.form(l, h, at.token))) mine.add(l);
    const text = JSON.stringify(it.textContent).slice(1, -1).replaceAll('\\"', '"');
    const rows = kinds.filter(({ n }) => n).map(({ form, how, n }) =>
      make("tr", {}, make("td", {}, make("b", {}, number(n))), make("td", {}, `${NAMES[form]}: ${how}`)));
    box.replaceChildren(
      make("b", {}, text ? `“${text}”` : "a part of a character"), ` token ${number(at.token + 1)} of ${number(table.columns)}`,
      make("p", { class: "note" }, `In how many of ${number(cells())} (${where()}):`),
      make("table", {}, ...rows),
      grid(table, at.token, at.layer, at.head),
      make("p", { class: "note" }, `Every column a layer (0–${layers - 1}), every row a kv head. `
        + (mine.size ? `On the device in layer${mine.size > 1 ? "s" : ""} ${ranges(mine)}.` : "On the device in no layer.")),
    );
    place(box, it.getClientRects()[0] || it.getBoundingClientRect());
  }

  function place(box, rect) {
    if (narrow.matches) { // it lies at the bottom, and must not cover its token
      scrollBy(0, Math.max(0, rect.bottom + 8 - box.getBoundingClientRect().top));
      return;
    }
    const left = Math.min(Math.max(8, rect.left), document.documentElement.clientWidth - box.offsetWidth - 8);
    const below = rect.bottom + box.offsetHeight + 12 < innerHeight;
    box.style.setProperty("--x", `${left + scrollX}px`);
    box.style.setProperty("--y", `${scrollY + (below ? rect.bottom + 6 : rect.top - box.offsetHeight - 6)}px`);
  }

  function point(i) {
    tokens[at.token]?.classList.remove("on");
    at.token = tokens[i] ? i : -1;
    tokens[at.token]?.classList.add("on");
    draw();
    tip();
  }

  // ---- what is chosen

  function update() {
    counts = table.count(at.layer, at.head);
    tokens.forEach((it, i) => shade(it, counts.share(i), counts.mark(i)));
    for (const [id, n] of [["layer", layers], ["head", heads]]) {
      $(`${id}-is`).textContent = at[id] < 0 ? `all ${n}` : `${at[id]} of 0–${n - 1}`;
      $(id).setAttribute("aria-valuetext", $(`${id}-is`).textContent);
    }
    summarise();
    point(at.token);
  }

  function choose(recipe) {
    at.recipe = recipe;
    table = tables[recipe];
    $("recipe").value = recipe;
    [...$("recipes").rows].forEach((row, i) => row.setAttribute("aria-current", i === recipe));
    const written = spans($("made"), table.told.made, read.length);
    $("after").hidden = !written.length;
    tokens = [...read, ...written];
    legend();
    update();
  }

  tables.forEach((one, i) => {
    const { recipe, device, host, full, per_head: [least, mean, most] } = one.told;
    const per = least === most ? number(mean) : `${number(least)} – ${number(most)}, mean ${number(mean, 1)}`;
    const row = make("tr", {},
      make("td", { class: "text name" }, recipe), make("td", { class: "text strip" }, strip(one)),
      make("td", { "data-name": "MB" }, mega(device)),
      make("td", { "data-name": "MB on the host", class: host ? "" : "nothing" }, host ? mega(host) : "0"),
      make("td", { "data-name": "smaller" }, `${number(full / device, 1)}×`),
      make("td", { "data-name": "tokens per head" }, per));
    row.addEventListener("click", () => choose(i));
    $("recipes").append(row);
    $("recipe").append(make("option", { value: i }, recipe));
  });
  $("recipe").addEventListener("change", () => choose(Number($("recipe").value)));

  for (const [id, n] of [["layer", layers], ["head", heads]]) {
    Object.assign($(id), { min: -1, max: n - 1, step: 1, value: -1 });
    $(id).closest("label").hidden = n === 1;
    $(id).addEventListener("input", () => {
      at[id] = Number($(id).value);
      update();
    });
  }

  const index = (event) => Number(event.target.closest(".t")?.dataset.i ?? -1);
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
      const first = box.id === "text" ? 0 : read.length, last = first + box.children.length - 1;
      point(at.token < first || at.token > last ? first : Math.min(Math.max(at.token + step, first), last));
      box.querySelector(".on").scrollIntoView({ block: "nearest" });
    });
  }
  document.addEventListener("click", (event) => { if (!event.target.closest("#text, #made, #tip, #chart")) point(-1); });
  $("chart").addEventListener("click", (event) => {
    const box = $("chart").getBoundingClientRect();
    const i = Math.min(table.columns - 1, Math.floor(((event.clientX - box.left) / box.width) * table.columns));
    tokens[i].scrollIntoView({ block: "center" });
    point(i);
  });

  choose(0);
  new ResizeObserver(draw).observe($("chart"));
  document.body.dataset.ready = "yes";
})();
