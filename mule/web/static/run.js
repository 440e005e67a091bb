// Run: the head, the curves with all charts on one range, what the doctor says, samples, files.

import { ask, askJson, fill, problem } from "./ask.js";
import { COLOURS, discard, draw } from "./chart.js";

const EVERY_MS = 2000; // between two looks at a run that is being written
const SLOW_MS = 15000; // the same for what the doctor and the forecast say
const TYPED_MS = 250; // after the last movement of the slider
const SEVERITIES = { alarm: "--bad", warning: "--warn", note: "--soft" };
const MAX_POINTS = 2000;

export async function show(box, place) {
  const page = new RunPage(box, place);
  await fill(box, page.path);
  page.listen();
  return {
    shown: () => page.start(),
    changed: (keys) => {
      if (!keys.length || keys.includes(`run/${place.id}`) || keys.some((k) => k.startsWith("job/"))) page.soon();
    },
    themed: () => page.paint(),
    close: () => page.close(),
  };
}

class RunPage {
  constructor(box, place) {
    this.box = box;
    this.id = place.id;
    this.path = `/run/${place.id}`;
    const asked = place.options;
    const number = (name) => (asked.get(name) ? Number(asked.get(name)) : null);
    this.view = {
      by: asked.get("x") ?? "steps",
      log: asked.get("log") === "1",
      forecast: asked.get("forecast") !== "0",
      smooth: number("smooth"),
      range: asked.get("from") && asked.get("to") ? [number("from"), number("to")] : null,
    };
    this.charts = new Map(); // name -> the element that is drawn into
    this.data = null;
    this.marks = { findings: [], events: [] };
    this.band = { lines: {}, cannot: [], basis: "" };
    this.slowAt = 0;
  }

  part(name) {
    return this.box.querySelector(`[data-part="${name}"]`);
  }

  async start() {
    await this.load();
    await this.slow();
    await this.fillPart("samples");
    await this.fillPart("about");
  }

  close() {
    this.isClosed = true;
    clearTimeout(this.timer);
    for (const element of this.charts.values()) discard(element);
  }

  // ---------------------------------------------------------------- what is asked

  listen() {
    this.box.addEventListener("click", (event) => this.clicked(event));
    this.bindControls();
  }

  bindControls() {
    const form = this.box.querySelector("[data-controls]");
    if (!form) return;
    this.form = form.elements;
    this.form.x.value = this.view.by;
    this.form.log.checked = this.view.log;
    this.form.forecast.checked = this.view.forecast;
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.zoomTyped();
    });
    this.form.x.addEventListener("change", () => this.look({ by: this.form.x.value, range: null }, true));
    this.form.log.addEventListener("change", () => this.look({ log: this.form.log.checked }));
    this.form.forecast.addEventListener("change", () => this.look({ forecast: this.form.forecast.checked }));
    this.form.smooth.addEventListener("input", () => {
      const window = windowOf(this.form.smooth.value, this.data?.updates ?? 1);
      this.tellWindow(window);
      clearTimeout(this.typing);
      this.typing = setTimeout(() => this.look({ smooth: window }), TYPED_MS);
    });
  }

  async clicked(event) {
    const button = event.target.closest("button");
    if (button?.dataset.zoom === "whole") this.look({ range: null });
    if (button?.dataset.act) await this.act(button);
  }

  zoomTyped() {
    const [from, to] = [this.form.from.valueAsNumber, this.form.to.valueAsNumber];
    if (Number.isFinite(from) && Number.isFinite(to) && from < to) this.look({ range: [from, to] });
  }

  async act(button) {
    button.disabled = true;
    const said = this.part("said");
    said.replaceChildren();
    try {
      await ask(`/start/${button.dataset.act}/${this.id}`, { body: {} });
    } catch (error) {
      said.replaceChildren(problem(error));
    }
    await this.fillPart("head");
  }

  /** Look otherwise at the curves; the address tells it, so that it survives a reload. */
  async look(changes, isOtherAxis = false) {
    Object.assign(this.view, changes);
    const told = new URLSearchParams();
    if (this.view.by !== "steps") told.set("x", this.view.by);
    if (this.view.log) told.set("log", "1");
    if (!this.view.forecast) told.set("forecast", "0");
    if (this.view.smooth) told.set("smooth", this.view.smooth);
    if (this.view.range) {
      told.set("from", this.view.range[0]);
      told.set("to", this.view.range[1]);
    }
    const options = told.toString();
    history.replaceState(null, "", `#/run/${this.id}${options ? `?${options}` : ""}`);
    await this.load();
    if (isOtherAxis) await this.slow();
  }

  // ---------------------------------------------------------------- what changes

  /** After what is going on now, and not too often. */
  soon() {
    if (this.timer || this.isClosed) return;
    this.timer = setTimeout(async () => {
      await this.refresh();
      this.timer = null;
    }, EVERY_MS);
  }

  async refresh() {
    if (!this.form) {
      const next = await fill(document.createElement("div"), this.path).catch(() => null);
      if (this.isClosed || !next) return;
      if (next.querySelector("[data-controls]")) {
        this.box.replaceChildren(...next.childNodes); // the first update has come
        this.bindControls();
        return this.start();
      }
    }
    const before = this.state();
    await this.fillPart("head");
    await this.load();
    const isOther = before !== this.state();
    if (isOther || Date.now() - this.slowAt > SLOW_MS) {
      await this.slow();
      await this.fillPart("samples");
    }
    if (isOther) await this.fillPart("about");
  }

  state() {
    return this.box.querySelector(".state")?.textContent;
  }

  async fillPart(name) {
    const element = this.part(name);
    const next = document.createElement("div");
    try {
      await fill(next, `${this.path}/${name}`);
    } catch (error) {
      next.append(problem(error));
    }
    if (this.isClosed || element.innerHTML === next.innerHTML) return;
    const opened = [...element.querySelectorAll("details")].map((details) => details.open);
    const held = document.activeElement?.closest?.("[data-act], [data-copy]");
    const focused = held && element.contains(held) ? (held.dataset.act ? "[data-act]" : "[data-copy]") : "";
    element.replaceChildren(...next.childNodes);
    [...element.querySelectorAll("details")].forEach((details, at) => (details.open = opened[at] ?? false));
    if (focused) element.querySelector(focused)?.focus();
  }

  /** The charts of what is looked at; a second call while one is on its way waits for it. */
  async load() {
    if (!this.form) return;
    if (this.loading) {
      this.again = true;
      return this.loading;
    }
    this.loading = this.fetchCharts();
    await this.loading;
    this.loading = null;
    if (this.again) {
      this.again = false;
      await this.load();
    }
  }

  async fetchCharts() {
    const { by, smooth, range } = this.view;
    const width = this.box.clientWidth * (window.devicePixelRatio || 1);
    const asked = new URLSearchParams({ x: by, points: Math.min(MAX_POINTS, Math.max(400, Math.round(2 * width))) });
    if (smooth) asked.set("smooth", smooth);
    if (range) {
      asked.set("from", range[0]);
      asked.set("to", range[1]);
    }
    try {
      this.data = await askJson(`${this.path}/curves?${asked}`);
    } catch (error) {
      this.charts.clear();
      return this.part("charts").replaceChildren(problem(error));
    }
    if (!this.isClosed) await this.paint();
  }

  /** What takes longer: the doctor's findings with their places, and the forecast. */
  async slow() {
    this.slowAt = Date.now();
    await this.fillPart("findings");
    if (!this.form) return;
    const by = this.view.by;
    const told = (path) => askJson(`${this.path}/${path}?x=${by}`).catch(() => null);
    this.marks = (await told("marks")) ?? this.marks;
    this.band = (await told("forecast")) ?? { lines: {}, cannot: [], basis: "" };
    if (this.isClosed || by !== this.view.by) return;
    await this.fillPart("head");
    await this.paint();
  }

  // ---------------------------------------------------------------- drawing

  async paint() {
    const { data, view } = this;
    if (!data || !this.form) return;
    this.tellWindow(data.window);
    this.form.smooth.value = sliderOf(data.window, data.updates);
    const lines = view.forecast ? this.band.lines : {};
    const ends = Object.values(lines).flatMap((line) => line.x);
    const whole = [data.whole[0], Math.max(data.whole[1], ...ends)];
    const range = view.range ?? whole;
    if (!document.activeElement?.matches("[name=from], [name=to]")) {
      this.form.from.value = range[0]; // not while it is typed
      this.form.to.value = range[1];
    }
    this.tellForecast(view.forecast);
    for (const chart of data.charts) await this.paintChart(chart, range, lines);
  }

  tellForecast(isShown) {
    const told = isShown ? [this.band.basis, ...this.band.cannot.map((row) => `${row.what}: ${row.why}`)] : [];
    this.part("forecast-words").textContent = told.filter(Boolean).join(". ");
  }

  tellWindow(window) {
    this.form.window.value = window > 1 ? `mean of ${window.toLocaleString("en")} updates` : "none";
  }

  async paintChart(chart, range, lines) {
    const element = this.charts.get(chart.name) ?? this.makeChart(chart);
    const style = getComputedStyle(document.documentElement);
    const traces = tracesOf(chart);
    if (chart.name === "loss") traces.push(...bandsOf(lines, range));
    const isSeen = (mark) => mark.chart === chart.name && mark.x >= range[0] && mark.x <= range[1];
    const pins = this.marks.findings.filter(isSeen);
    const isLog = this.view.log && chart.name !== "share_of_peak";
    element.pins = pins;
    const caption = element.parentElement.querySelector("figcaption");
    caption.textContent = inWords(chart);
    element.setAttribute("aria-label", `${chart.title}: ${caption.textContent}`);
    await draw(element, traces, {
      uirevision: `${range}`, // the range is what all charts share
      showlegend: chart.traces.length > 1,
      legend: { orientation: "h", x: 0, y: 1.01, yanchor: "bottom", font: { size: 11 } },
      margin: { l: 50, r: 10, t: 28, b: 36 },
      xaxis: { range, title: { text: this.data.axis, font: { size: 11 } } },
      yaxis: { type: isLog ? "log" : "linear", fixedrange: true, ticksuffix: chart.unit === "%" ? "%" : "" },
      shapes: shapesOf(this.marks, style),
      annotations: pins.map((pin, at) => annotationOf(pin, at, isLog, style)),
    });
    this.hear(element);
  }

  makeChart(chart) {
    const figure = document.createElement("figure");
    const title = document.createElement("h3");
    title.textContent = chart.unit && chart.unit !== "tokens a second" ? `${chart.title} (${chart.unit})` : chart.title;
    const element = document.createElement("div");
    element.className = "chart";
    element.setAttribute("role", "group");
    element.dataset.chart = chart.name;
    figure.append(title, element, document.createElement("figcaption"));
    if (!this.charts.size) this.part("charts").replaceChildren();
    this.part("charts").append(figure);
    this.charts.set(chart.name, element);
    return element;
  }

  hear(element) {
    if (element.isHeard) return;
    element.isHeard = true;
    element.on("plotly_relayout", (change) => {
      const [from, to] = [change["xaxis.range[0]"], change["xaxis.range[1]"]];
      if (change["xaxis.autorange"]) this.look({ range: null });
      else if (from !== undefined && to !== undefined) this.look({ range: [round(from), round(to)] });
    });
    element.on("plotly_clickannotation", ({ index }) => this.openRule(element.pins[index]));
  }

  openRule(pin) {
    const rule = this.box.querySelector(`#rule-${CSS.escape(pin.code)}`);
    if (!rule) return;
    rule.open = true;
    rule.closest("li").scrollIntoView({ block: "center" });
    rule.querySelector("summary").focus();
  }
}

// ---------------------------------------------------------------- traces

const LINES = {
  raw: { width: 1 },
  mean: { width: 2 },
  line: { width: 1.6 },
  points: { width: 1.6, dash: "dash" },
};

function tracesOf(chart) {
  const figures = [...new Set(chart.traces.map((trace) => trace.figure))];
  return chart.traces.map(({ figure, label, kind, x, y }) => ({
    type: "scatter", // drawn as SVG; the other kind needs eval
    name: label,
    x,
    y,
    mode: kind === "points" ? "lines+markers" : "lines",
    line: { ...LINES[kind], color: COLOURS[figures.indexOf(figure) % COLOURS.length] },
    marker: { size: 5 },
    opacity: kind === "raw" ? 0.35 : 1,
    hoverinfo: kind === "raw" ? "skip" : undefined,
    showlegend: kind !== "raw",
  }));
}

function bandsOf(lines, range) {
  const seen = Object.entries(lines).filter(([, line]) => line.x[0] < range[1]);
  return seen.flatMap(([figure, line]) => {
    const colour = COLOURS[figure === "loss" ? 0 : 1];
    return [
      {
        type: "scatter",
        name: `${line.label}, 80% of forecasts`,
        x: [...line.at, ...[...line.at].reverse()],
        y: [...line.high, ...[...line.low].reverse()],
        mode: "lines",
        fill: "toself",
        fillcolor: `${colour}33`,
        line: { width: 0 },
        hoverinfo: "skip",
      },
      { type: "scatter", name: `${line.label}, expected`, x: line.x, y: line.expected, mode: "lines", showlegend: false, line: { color: colour, width: 1.4, dash: "dot" } },
    ];
  });
}

function shapesOf(marks, style) {
  const line = (x, colour, dash) => ({
    type: "line", x0: x, x1: x, y0: 0, y1: 1, yref: "paper", layer: "below",
    line: { color: style.getPropertyValue(colour).trim(), width: 1, dash },
  });
  return [
    ...marks.events.map((event) => line(event.x, "--soft", "dot")),
    ...marks.findings.map((found) => line(found.x, SEVERITIES[found.severity], "dash")),
  ];
}

function annotationOf(pin, at, isLog, style) {
  const colour = style.getPropertyValue(SEVERITIES[pin.severity]).trim();
  const isOnCurve = pin.y !== null && (!isLog || pin.y > 0);
  return {
    x: pin.x,
    y: isOnCurve ? (isLog ? Math.log10(pin.y) : pin.y) : 1,
    yref: isOnCurve ? "y" : "paper",
    text: pin.code,
    hovertext: `${pin.severity}: ${pin.title}, since update ${pin.step}`,
    captureevents: true,
    ax: 24 + 10 * (at % 3),
    ay: -24 - 18 * (at % 3),
    arrowcolor: colour,
    bordercolor: colour,
    bgcolor: style.getPropertyValue("--back").trim(),
    font: { size: 11, color: colour },
  };
}

// ---------------------------------------------------------------- words and figures

function inWords(chart) {
  if (!chart.told) return "nothing in this range";
  const said = Object.entries(chart.told).map(([name, value]) => `${name} ${Number(value.toPrecision(4)).toLocaleString("en", { maximumSignificantDigits: 4 })}`);
  return said.join(", ");
}

/** The slider goes from one update to all of them, by factors. */
function windowOf(position, updates) {
  return Math.max(1, Math.round(updates ** (position / 100)));
}

function sliderOf(window, updates) {
  return updates > 1 ? Math.round((100 * Math.log(window)) / Math.log(updates)) : 0;
}

function round(value) {
  return Number(Number(value).toPrecision(7));
}
