// Compare: runs with runs, a setup with published ones, and the lab's campaigns.

import { askJson, fill, problem } from "./ask.js";
import { COLOURS, discard, draw } from "./chart.js";

const POINTS = 800; // of a curve: more are not seen

export async function show(box, place) {
  box.className = "compare-page"; // its style sheet is for it alone
  if (place.id) {
    await fill(box, `/compare/campaign/${place.id}`);
    return {};
  }
  await fill(box, "/compare");
  const view = new View(box);
  await view.restore(place.options);
  return {
    shown: () => view.compare(place.options),
    themed: () => view.draw(),
    close: () => view.close(),
  };
}

class View {
  constructor(box) {
    this.box = box;
    this.result = box.querySelector("[data-result]");
    this.visit = 0; // an answer that comes after a later question is dropped
    this.drawn = Promise.resolve(); // one at a time: plotly must not draw what is discarded
    for (const form of box.querySelectorAll("form")) {
      form.addEventListener("submit", (event) => {
        event.preventDefault();
        const asked = new URLSearchParams(new FormData(form));
        history.replaceState(null, "", `#/compare?${asked}`); // a reload shows the same
        this.compare(asked, true);
      });
    }
    box.querySelector("[data-published]")?.addEventListener("toggle", () => this.published());
    this.result.addEventListener("change", (event) => {
      if (event.target.matches("[data-axis], [data-log]")) this.draw();
    });
  }

  /** The catalogue, once somebody wants to see it. */
  published() {
    const list = this.box.querySelector("[data-published] > div");
    this.listed ??= fill(list, "/compare/published")
      .catch((error) => list.replaceChildren(problem(error)))
      .finally(() => list.setAttribute("aria-busy", "false"));
    return this.listed;
  }

  /** Check the boxes of what the address asks for. */
  async restore(asked) {
    if (asked.has("beside") && this.box.querySelector("[data-published]")) await this.published();
    for (const name of ["run", "beside"]) {
      const chosen = asked.getAll(name);
      for (const input of this.box.querySelectorAll(`input[name="${name}"]`)) {
        input.checked = chosen.includes(input.value);
      }
    }
    const of = this.box.querySelector('select[name="of"]');
    if (of && asked.has("of")) of.value = asked.get("of");
  }

  async compare(asked, isMoving = false) {
    const part = asked.has("of") ? "setup" : asked.has("run") || isMoving ? "runs" : "";
    if (!part) return;
    const here = ++this.visit;
    this.result.setAttribute("aria-busy", "true");
    const fresh = document.createElement("div");
    try {
      await fill(fresh, `/compare/${part}?${asked}`);
    } catch (error) {
      fresh.replaceChildren(problem(error));
    }
    if (here !== this.visit) return;
    await this.close();
    this.result.replaceChildren(...fresh.childNodes);
    this.result.setAttribute("aria-busy", "false");
    if (isMoving) this.result.querySelector("h2, .problem")?.scrollIntoView({ block: "start" });
    if (isMoving) this.result.querySelector("h2")?.focus({ preventScroll: true });
    await this.draw();
  }

  draw() {
    this.drawn = this.drawn.then(() => this.drawNow());
    return this.drawn;
  }

  /** The losses of the runs in one picture. */
  async drawNow() {
    const chart = this.result.querySelector("[data-curves]");
    if (!chart) return;
    const by = this.result.querySelector("[data-axis]").value;
    const isLog = this.result.querySelector("[data-log]").checked;
    const names = chart.dataset.runs.trim().split(" ");
    try {
      const curves = await Promise.all(
        names.map((id) => askJson(`/run/${id}/curves?${new URLSearchParams({ x: by, points: POINTS })}`)),
      );
      const traces = curves.flatMap((curve, place) => lines(curve, place));
      if (!chart.isConnected) return;
      chart.setAttribute("role", "figure");
      chart.setAttribute("aria-label", `Loss of ${curves.map((curve) => curve.run).join(", ")} along ${curves[0].axis}`);
      await draw(chart, traces, {
        xaxis: { title: { text: curves[0].axis }, rangemode: "tozero" },
        yaxis: { title: { text: "loss (nats a token)" }, type: isLog ? "log" : "linear" },
        legend: { orientation: "h", y: -0.25 },
        uirevision: `${by} ${isLog}`,
      });
    } catch (error) {
      this.result.querySelector("[data-curves-told]").replaceChildren(problem(error));
    }
  }

  async close() {
    const chart = this.result.querySelector("[data-curves]");
    this.drawn = this.drawn.then(() => chart && discard(chart));
    await this.drawn;
  }
}

/** Training, as its running mean where it has one, and validation, dashed; a colour for each run. */
function lines(curve, place) {
  const loss = curve.charts.find((chart) => chart.name === "loss");
  const traces = loss?.traces ?? [];
  const training = traces.filter((trace) => trace.figure === "loss");
  const shown = [training.find((trace) => trace.kind === "mean") ?? training[0], traces.find((trace) => trace.figure === "val_loss")];
  return shown.filter(Boolean).map((trace) => {
    const isValidation = trace.figure === "val_loss";
    return {
      type: "scatter",
      name: `${curve.run}, ${isValidation ? "validation" : "training"}`,
      x: trace.x,
      y: trace.y,
      mode: isValidation ? "lines+markers" : "lines",
      line: { color: COLOURS[place % COLOURS.length], dash: isValidation ? "dash" : "solid", width: isValidation ? 1.4 : 2 },
      marker: { symbol: place % 8, size: 6 },
    };
  });
}
