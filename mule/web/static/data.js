// Data: what is in it, what is wrong with it, and its rows as a model reads them.

import { ask, askJson, fill, problem } from "./ask.js";
import { discard, draw } from "./chart.js";

const LOOK_MS = 1500; // while a check runs: how far it is

export async function show(box, place) {
  box.className = "data-page"; // its style sheet is for it alone
  return place.id ? one(box, place) : chooser(box);
}

// ---------------------------------------------------------------- what there is

async function chooser(box) {
  await fill(box, "/data");
  const form = box.querySelector("[data-typed]");
  const found = box.querySelector("[data-typed-problem]");
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    try {
      const path = new FormData(form).get("path");
      const { id } = await askJson(`/data/find?${new URLSearchParams({ path })}`);
      location.hash = `#/data/${id}?${new URLSearchParams({ path })}`;
    } catch (error) {
      found.replaceChildren(problem(error));
    }
  });
}

// ---------------------------------------------------------------- one of it

async function one(box, place) {
  const view = new View(box, place);
  await view.open();
  return {
    shown: () => view.drawAll(),
    changed: (keys) => view.changed(keys),
    themed: () => view.drawAll(),
    close: () => view.close(),
  };
}

class View {
  constructor(box, place) {
    this.box = box;
    this.id = place.id;
    this.asked = {}; // what the address says: reader, file, start, problem, path
    for (const [name, value] of place.options) this.asked[name] = value;
    this.isClosed = false;
    this.visit = 0; // an answer that comes after a later question is dropped
    this.drawn = Promise.resolve(); // one chart at a time: plotly must not draw what is discarded
  }

  address(part = "", more = {}) {
    const query = new URLSearchParams(more);
    if (this.asked.reader) query.set("reader", this.asked.reader);
    return `/data/${this.id}${part}${query.size ? `?${query}` : ""}`;
  }

  async open() {
    try {
      await fill(this.box, this.address());
    } catch (error) {
      // A typed path is known to the server until it ends: say it again.
      if (error.status !== 404 || !this.asked.path) throw error;
      await ask(`/data/find?${new URLSearchParams({ path: this.asked.path })}`);
      await fill(this.box, this.address());
    }
    this.form = this.box.querySelector("[data-rows-form]");
    if (this.asked.file) this.form.elements.file.value = this.asked.file;
    this.listen();
    await this.report();
    await Promise.all([this.prepared(), this.rows()]);
  }

  listen() {
    this.box.querySelector("[data-reading]").addEventListener("change", (event) => {
      this.keep({ reader: event.target.value, start: "" });
      this.report().then(() => this.rows());
    });
    this.box.querySelector("[data-reading]").addEventListener("submit", (event) => event.preventDefault());
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.rows({ line: this.form.elements.line.value });
    });
    this.form.elements.file.addEventListener("change", () => {
      this.keep({ file: this.form.elements.file.value, start: "" });
      this.rows();
    });
    this.form.elements.problem.addEventListener("change", () => {
      this.keep({ problem: this.form.elements.problem.value, start: "" });
      this.rows();
    });
    this.box.addEventListener("click", (event) => this.clicked(event));
  }

  async clicked(event) {
    const found = event.target.closest?.("[data-go], [data-only], [data-start]");
    if (!found || !this.box.contains(found)) return;
    const told = found.dataset;
    if (told.go !== undefined) {
      event.preventDefault();
      this.choose(told.file, "");
      await this.rows({ line: told.line });
      this.toRows();
    } else if (told.only !== undefined) {
      this.choose(told.file, told.only);
      await this.rows();
      this.toRows();
    } else if (told.start === "check" || told.start === "stats") {
      found.disabled = true;
      await this.begin(told.start);
    } else {
      this.keep({ start: told.start });
      await this.rows();
      this.toRows();
    }
  }

  choose(file, chosen) {
    this.form.elements.file.value = file;
    this.form.elements.problem.value = chosen;
    this.keep({ file, problem: chosen, start: "" });
  }

  /** Note in the address what is looked at, so that a reload shows the same. */
  keep(values) {
    Object.assign(this.asked, values);
    const options = Object.entries(this.asked).filter(([, value]) => value !== "" && value !== undefined);
    const query = new URLSearchParams(options);
    history.replaceState(null, "", `#/data/${this.id}${query.size ? `?${query}` : ""}`);
  }

  toRows() {
    const rows = this.box.querySelector("[data-rows]");
    const first = rows.querySelector("h3") ?? rows;
    first.setAttribute("tabindex", "-1");
    first.focus({ preventScroll: true });
    first.scrollIntoView({ block: "start" });
  }

  // -------------------------------------------------------------- the parts

  async report() {
    const part = this.box.querySelector("[data-report]");
    await this.refill(part, this.address("/report"));
    if (this.isClosed) return;
    const state = part.querySelector("[data-state]");
    if (state?.dataset.atOnce !== undefined) return this.begin("check");
    const offered = part.querySelector("[data-problems]");
    const choice = this.form.elements.problem;
    choice.replaceChildren(...(offered ? [...offered.cloneNode(true).children] : [new Option("all rows", "")]));
    choice.value = this.asked.problem ?? "";
    if (choice.selectedIndex < 0) {
      choice.value = "";
      this.keep({ problem: "" });
    }
    this.wait(state, () => this.report().then(() => this.rows()));
  }

  async prepared() {
    const part = this.box.querySelector("[data-prepared]");
    if (!part) return;
    await this.refill(part, this.address("/prepared"));
    this.wait(part.querySelector("[data-state]"), () => this.prepared());
  }

  /** Look again while the work of a part runs. */
  wait(state, again) {
    if (state?.dataset.state !== "running" || this.isClosed) return;
    setTimeout(() => !this.isClosed && again(), LOOK_MS);
  }

  async begin(what) {
    const part = this.box.querySelector(what === "check" ? "[data-report]" : "[data-prepared]");
    try {
      await ask(this.address(`/${what}`), { body: {} });
    } catch (error) {
      part.replaceChildren(problem(error));
      return;
    }
    await (what === "check" ? this.report() : this.prepared());
  }

  async rows(more = {}) {
    const box = this.box.querySelector("[data-rows]");
    const here = ++this.visit;
    box.setAttribute("aria-busy", "true");
    if (!box.firstElementChild) box.textContent = "Reading the rows…";
    const query = {};
    for (const name of ["file", "start", "problem"]) {
      if (this.asked[name]) query[name] = this.asked[name];
    }
    if (more.line) {
      query.line = more.line;
      delete query.start;
      delete query.problem;
      this.form.elements.problem.value = "";
    }
    const fresh = document.createElement("div");
    try {
      await fill(fresh, this.address("/rows", query));
    } catch (error) {
      fresh.replaceChildren(problem(error));
    }
    if (here !== this.visit || this.isClosed) return;
    box.replaceChildren(...fresh.childNodes);
    box.setAttribute("aria-busy", "false");
    const at = box.querySelector("[data-at]")?.dataset.at;
    if (more.line && at) this.keep({ problem: "", start: at });
  }

  async refill(part, address) {
    part.setAttribute("aria-busy", "true");
    await this.discardAll(part);
    try {
      await fill(part, address);
    } catch (error) {
      part.replaceChildren(problem(error));
    }
    part.setAttribute("aria-busy", "false");
    if (part.isConnected) await this.drawAll(part);
  }

  // -------------------------------------------------------------- charts

  drawAll(part = this.box) {
    this.drawn = this.drawn.then(async () => {
      for (const figure of part.querySelectorAll("[data-bars]")) {
        if (!this.isClosed && figure.isConnected) await bars(figure);
      }
    });
    return this.drawn;
  }

  discardAll(part = this.box) {
    const plots = [...part.querySelectorAll("[data-plot]")];
    this.drawn = this.drawn.then(async () => {
      for (const plot of plots) await discard(plot);
    });
    return this.drawn;
  }

  changed(keys) {
    const jobs = [...this.box.querySelectorAll("[data-job]")].map((each) => `job/${each.dataset.job}`);
    if (!keys.length) return this.report();
    if (jobs.some((job) => keys.includes(job))) return Promise.all([this.report(), this.prepared()]);
    return undefined;
  }

  async close() {
    this.isClosed = true;
    await this.discardAll();
  }
}

/** Draw a table of names and values as bars; the table stays as the text of it. */
async function bars(figure) {
  const rows = [...figure.querySelectorAll("tbody tr")];
  const names = rows.map((row) => row.cells[0].textContent);
  const values = rows.map((row) => Number(row.querySelector("[data-value]").dataset.value));
  const [of, unit] = [...figure.querySelectorAll("thead th")].map((cell) => cell.textContent);
  const plot = figure.querySelector("[data-plot]");
  plot.setAttribute("role", "figure");
  plot.setAttribute("aria-label", `${figure.dataset.bars}: ${unit} by ${of}; the table below has the values`);
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name).trim();
  const trace = {
    type: "bar",
    orientation: "h",
    y: names.map((name) => (name.length > 34 ? `…${name.slice(-33)}` : name)),
    x: values,
    marker: {
      color: rows.map((row) => colour(row.dataset.marked === undefined ? "--accent" : "--bad")),
      pattern: { shape: rows.map((row) => (row.dataset.marked === undefined ? "" : "/")) },
    },
    hovertemplate: "%{y}: %{x:,}<extra></extra>",
  };
  plot.style.height = `${Math.max(7, 4.5 + 1.5 * rows.length)}rem`;
  await draw(plot, [trace], {
    hovermode: "closest",
    dragmode: false,
    margin: { l: 10, r: 10, t: 5, b: 35 },
    xaxis: { title: { text: unit }, rangemode: "tozero", fixedrange: true },
    yaxis: { autorange: "reversed", type: "category", fixedrange: true },
  });
}
