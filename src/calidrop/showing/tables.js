"use strict";
// What a recipe's cache held: a cell per layer, kv head and column, of one of the recipe's kinds [form, in words].

const FORMS = ["exact", "coded", "host", "summary", "gone", "blind"]; // best first
const NAMES = {
  exact: "held exactly", coded: "held in fewer bits", host: "in host memory, can be asked again",
  summary: "part of what stands for many", gone: "gone", blind: "out of this layer's sight, whatever the cache",
};
const MARKED = ["coded", "host", "summary"]; // have a mark in the text besides the shade

const total = (column) => column.reduce((a, b) => a + b, 0);
const chosen = (value, n) => (value < 0 ? [...Array(n).keys()] : [value]); // -1: all

class Table {
  // told: as the page brings it, its cells deflated and in base64
  static async of(told, layers, heads) {
    const bytes = Uint8Array.from(atob(told.table), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Table(told, new Uint8Array(await new Response(stream).arrayBuffer()), layers, heads);
  }

  constructor(told, cells, layers, heads) {
    Object.assign(this, { told, cells, layers, heads, columns: cells.length / (layers * heads) });
    this.forms = told.kinds.map(([form]) => FORMS.indexOf(form));
  }

  kind(layer, head, column) {
    return this.cells[(layer * this.heads + head) * this.columns + column];
  }

  form(layer, head, column) {
    return FORMS[this.forms[this.kind(layer, head, column)]];
  }

  count(layer, head) { // of a choice of cells
    return new Counts(this, layer, head);
  }
}

class Counts {
  // forms: per form, how many of the chosen cells of each column have it
  constructor(table, layer, head) {
    const { cells, columns, heads } = table;
    this.columns = columns;
    this.forms = FORMS.map(() => new Uint32Array(columns));
    for (const l of chosen(layer, table.layers))
      for (const h of chosen(head, heads))
        for (let i = 0, from = (l * heads + h) * columns; i < columns; i++) this.forms[table.forms[cells[from + i]]][i]++;
  }

  of(form, column) {
    return this.forms[FORMS.indexOf(form)][column];
  }

  share(column) { // of the heads that could hold it, those that do on the device
    const device = this.of("exact", column) + this.of("coded", column);
    return device / Math.max(1, device + this.of("host", column) + this.of("summary", column) + this.of("gone", column));
  }

  mark(column) { // the commonest form that has one
    let best = "", most = 0;
    for (const form of MARKED) if (this.of(form, column) > most) [best, most] = [form, this.of(form, column)];
    return best;
  }

  words() {
    let every = 0, some = 0, none = 0, host = 0, summary = 0, blind = 0;
    for (let i = 0; i < this.columns; i++) {
      const share = this.share(i);
      if (share === 1) every++;
      else if (share > 0) some++;
      else {
        none++;
        if (this.of("host", i)) host++;
        else if (this.of("summary", i)) summary++;
        else if (!this.of("gone", i)) blind++;
      }
    }
    return { every, some, none, host, summary, blind };
  }
}
