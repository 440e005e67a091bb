// Export: the form that starts one, what there is, and one export with its verification.

import { ask, askJson, fill, problem } from "./ask.js";
import { COLOURS, discard, draw } from "./chart.js";

export async function show(box, place) {
  return place.id ? one(box, place.id) : all(box);
}

// ---------------------------------------------------------------- all of them

async function all(box) {
  await fill(box, "/export");
  const list = box.querySelector("#export-list");
  await fill(list, "/exports");
  listenForStops(list);
  const form = box.querySelector("#export-form");
  if (form) await live(form);
  return {
    async changed(keys) {
      if (concerns(keys)) await fillAgain(list, "/exports");
    },
  };
}

function concerns(keys) {
  return !keys.length || keys.some((key) => /^(job|export)\//.test(key));
}

/** What was opened or closed by hand stays so. */
async function fillAgain(element, path) {
  const states = [...element.querySelectorAll("details")].map((each) => each.open);
  await fill(element, path);
  const now = element.querySelectorAll("details");
  if (now.length === states.length) now.forEach((each, index) => (each.open = states[index]));
}

function listenForStops(element) {
  element.addEventListener("click", async (event) => {
    const job = event.target.closest?.("[data-stop]")?.dataset.stop;
    if (!job) return;
    event.target.disabled = true;
    try {
      await ask(`/export/stop/${job}`, { body: {} });
    } catch (error) {
      element.prepend(problem(error));
    }
  });
}

async function live(form) {
  const told = form.querySelector("#export-problem");
  form.addEventListener("input", () => refresh(form));
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    told.replaceChildren();
    try {
      await ask("/export/start", { body: asked(form) });
      document.getElementById("export-list").scrollIntoView({ block: "start" });
    } catch (error) {
      told.replaceChildren(problem(error));
    }
  });
  await refresh(form);
}

let turn = 0;

/** Show what the chosen model can become, and the command that does it. */
async function refresh(form) {
  const here = ++turn;
  const model = form.elements.model.selectedOptions[0].dataset;
  const possible = model.forms.split(" ");
  for (const choice of form.elements.form) {
    choice.disabled = !possible.includes(choice.value);
    choice.closest("label").hidden = choice.disabled;
  }
  if (form.elements.form.value === "" || !possible.includes(form.elements.form.value)) {
    form.querySelector(`[name=form][value=${possible[0]}]`).checked = true;
  }
  const what = form.elements.form.value;
  form.querySelector("#export-note").textContent = note(model.kind, what);
  const types = form.querySelector("#export-types");
  types.hidden = !["gguf", "adapter"].includes(what);
  for (const row of types.querySelectorAll("tbody tr")) {
    row.hidden = what === "adapter" && row.dataset.adapter === undefined;
  }
  for (const part of form.querySelectorAll("[data-for]")) {
    const fits = part.dataset.for.split(" ").includes(what);
    part.hidden = !fits || (model.kind === "gguf" && !part.querySelector("[name=imatrix]"));
  }
  form.querySelector("#export-more").hidden = what === "merge";
  const told = form.querySelector("#export-problem");
  let command = "";
  try {
    command = (await askJson("/export/command", { body: asked(form) })).command;
    if (here === turn) told.replaceChildren();
  } catch (error) {
    if (here === turn) told.replaceChildren(problem(error));
  }
  if (here !== turn) return;
  form.querySelector("#export-command").textContent = command;
  form.querySelector("#export-copy").dataset.copy = command;
  form.querySelector("#export-copy").textContent = "Copy";
  form.querySelector("button.main").disabled = !command;
}

function note(kind, what) {
  if (what === "merge") return "The adapter and its base become one folder, proven equal.";
  if (kind === "adapter" && what !== "adapter") return "The adapter is merged into its base first.";
  if (kind === "gguf") return "Further types are made of this file; the run is not needed.";
  return "";
}

/** What the form says, without what has no effect. */
function asked(form) {
  const values = { model: form.elements.model.value, form: form.elements.form.value };
  if (!form.querySelector("#export-types").hidden) {
    const chosen = [...form.querySelectorAll("[name=types]:checked")];
    values.types = chosen.filter((type) => !type.closest("tr").hidden).map((type) => type.value);
  }
  for (const part of form.querySelectorAll("[data-for]")) {
    const input = part.querySelector("input, textarea");
    const value = input.type === "checkbox" ? input.checked : input.value.trim();
    if (!part.hidden && value) values[input.name] = value;
  }
  return values;
}

// ---------------------------------------------------------------- one of them

async function one(box, id) {
  const path = `/exports/${id}`;
  let measure = "kl_mean";
  let rows = [];

  async function refill() {
    await fillAgain(box, path);
    if (!box.querySelector("#export-chart")) return;
    rows = await askJson(`${path}/quality`);
    box.querySelector("#export-measure").value = measure;
  }
  const paint = () => plot(box.querySelector("#export-chart"), rows, measure);

  await refill();
  listenForStops(box);
  box.addEventListener("change", (event) => {
    if (event.target.id !== "export-measure") return;
    measure = event.target.value;
    paint();
  });
  box.addEventListener("click", async (event) => {
    if (event.target.id !== "export-verify") return;
    event.target.disabled = true;
    try {
      await ask(`${path}/verify`, { body: {} });
    } catch (error) {
      box.querySelector("#export-problem").replaceChildren(problem(error));
      event.target.disabled = false;
    }
  });
  return {
    shown: paint,
    themed: paint,
    async changed(keys) {
      if (!concerns(keys)) return;
      await refill();
      paint();
    },
    close() {
      const chart = box.querySelector("#export-chart");
      if (chart) discard(chart);
    },
  };
}

const MEASURES = {
  kl_mean: { title: "KL, nats", type: "log" },
  ppl: { title: "perplexity" },
  top1: { title: "same best token", tickformat: ".1%" },
};

function plot(element, rows, measure) {
  if (!element || !rows.length) return;
  const megabytes = rows.map((row) => row.size_bytes / 1e6);
  const traces = [{
    x: megabytes,
    y: rows.map((row) => row[measure]),
    text: rows.map((row) => row.type),
    mode: "markers+text",
    textposition: "top center",
    marker: { size: 10 },
    name: "file",
    hovertemplate: "%{text}: %{x:.1f} MB, %{y:.4g}<extra></extra>",
    cliponaxis: false,
  }];
  const shapes = measure !== "ppl" ? [] : [{
    type: "line", xref: "paper", x0: 0, x1: 1, y0: rows[0].ppl_reference, y1: rows[0].ppl_reference,
    line: { dash: "dot", color: COLOURS[5] },
    label: { text: "the model", textposition: "start" },
  }];
  return draw(element, traces, {
    xaxis: { title: { text: "size, MB" }, rangemode: "tozero" },
    yaxis: { ...MEASURES[measure], title: { text: MEASURES[measure].title } },
    hovermode: "closest",
    showlegend: false,
    shapes,
    uirevision: measure,
  });
}
