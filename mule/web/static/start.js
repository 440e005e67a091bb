// Start: a form of the recipe; what is typed is checked and planned, and then started.

import { askJson, fill, problem } from "./ask.js";

const TYPING_MS = 400; // after the last key
const KEPT = "start"; // what was typed, until the window is closed

export async function show(box, place) {
  await fill(box, "/start");
  if (!box.querySelector("#start-form")) return {}; // this server only shows
  const page = new StartPage(box);
  page.listen();
  const { options } = place;
  const from = ["recipe", "own", "run"].find((kind) => options.has(kind));
  if (from) await page.begin(from, options.get(from));
  else page.restore();
  return { close: () => page.close() };
}

class StartPage {
  constructor(box) {
    this.box = box;
    this.seen = ""; // sum of the recipe that this page saved last
    this.checked = undefined;
  }

  find(id) {
    return this.box.querySelector(`[id="${id}"]`);
  }

  close() {
    clearTimeout(this.timer);
    this.asking?.abort();
  }

  listen() {
    this.box.addEventListener("input", (event) => {
      if (event.target.closest("#start-form, [role=radiogroup], #plan-machine")) this.soon();
    });
    this.box.addEventListener("change", (event) => this.chosen(event.target));
    this.box.addEventListener("click", (event) => this.pressed(event.target.closest("button")));
    this.find("start-form").addEventListener("submit", (event) => event.preventDefault());
    this.find("mule-recipes").addEventListener("toggle", () => this.listRecipes());
    this.find("start-labels").addEventListener("toggle", () => this.showRows());
  }

  chosen(select) {
    if (select.dataset.addsTo && select.value) {
      const area = this.find(select.dataset.addsTo);
      area.value = [...lines(area.value), select.value].join("\n");
      select.value = "";
      this.soon();
    } else if (select.dataset.begin && select.value) {
      this.begin(select.dataset.begin, select.value);
    }
  }

  pressed(button) {
    if (!button) return;
    if (button.dataset.begin) this.begin(button.dataset.begin, button.value);
    else if (button.dataset.start) this.showRows(button.dataset.start);
    else if (button.dataset.values) this.apply(JSON.parse(button.dataset.values));
    else ({
      "start-run": () => this.start(button),
      "start-clear": () => this.clear(),
      "go-plan": () => this.goToPlan(),
      "copy-command": () => this.copy(button, this.checked?.command),
      "copy-yaml": () => this.copy(button, this.checked?.recipe),
      "write-example": () => this.writeExample(button),
      "run-demo": () => this.runDemo(button),
      measure: () => this.measure(button),
    })[button.id]?.();
  }

  // -------------------------------------------------------------- the fields

  fields() {
    return [...this.find("start-form").querySelectorAll("[data-key]")];
  }

  values() {
    const found = {};
    for (const field of this.fields()) {
      const value = read(field);
      if (value.length) found[field.dataset.key] = value;
    }
    return found;
  }

  put(values) {
    for (const field of this.fields()) write(field, values[field.dataset.key] ?? "");
  }

  apply(values) {
    for (const [key, value] of Object.entries(values)) {
      const field = this.find(`field-${key}`);
      if (field) write(field, value);
    }
    this.soon(0);
  }

  get isTune() {
    return this.box.querySelector("[name=way]:checked").value === "tune";
  }

  setWay(way) {
    this.box.querySelector(`[name=way][value=${way}]`).checked = true;
  }

  clear() {
    this.put({});
    this.soon(0);
  }

  restore() {
    const kept = JSON.parse(sessionStorage.getItem(KEPT) ?? "null");
    if (kept) {
      this.setWay(kept.way);
      this.put(kept.values);
    }
    this.soon(0);
  }

  async begin(kind, id) {
    await this.told(async () => {
      const found = await askJson(`/start/from/${kind}/${id}`);
      this.setWay("plain"); // a recipe says itself what it is
      this.put({ ...found.values, name: found.name });
      this.soon(0);
      return `The form holds what ${found.name} starts from; change what you like.`;
    });
  }

  async listRecipes(again = false) {
    if (!this.find("mule-recipes").open || (this.listed && !again)) return;
    this.listed = true;
    const list = this.find("mule-recipes-list");
    try {
      await fill(list, "/start/recipes");
    } catch (error) {
      list.replaceChildren(problem(error));
      this.listed = false;
    }
  }

  // -------------------------------------------------------------- check and plan

  soon(wait = TYPING_MS) {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.refresh(), wait);
  }

  asked() {
    return { values: this.values(), assume: this.isTune, seen: this.seen };
  }

  async refresh() {
    this.asking?.abort();
    const asking = (this.asking = new AbortController());
    const body = this.asked();
    const way = this.isTune ? "tune" : "plain";
    sessionStorage.setItem(KEPT, JSON.stringify({ way, values: body.values }));
    try {
      const found = await askJson("/start/check", { body, signal: asking.signal });
      this.showCheck(found);
      this.showRows();
      const plan = this.find("start-plan");
      if (!found.ok) return;
      plan.setAttribute("aria-busy", "true");
      const machine = this.find("plan-machine").value.trim();
      const { seen, ...same } = body;
      await fill(plan, "/start/plan", { body: { ...same, machine }, signal: asking.signal });
      plan.setAttribute("aria-busy", "false");
    } catch (error) {
      if (error.name === "AbortError") return;
      this.find("start-plan").replaceChildren(problem(error));
    }
  }

  showCheck(found) {
    this.checked = found;
    const untaken = this.showProblems(found.problems);
    const missing = found.missing.map((each) => each.message);
    this.find("start-run").disabled = !found.ok;
    this.find("start-command").textContent = found.command;
    this.find("start-ready").hidden = !found.ok;
    this.find("start-yaml").textContent = found.recipe;
    this.find("start-file").textContent = found.ok ? `The recipe is saved as ${found.file}.` : "";
    this.find("field-name").placeholder = found.name;
    this.link(found);
    const told = this.find("start-problems");
    told.replaceChildren(...untaken.map((each) => problem({ message: each.message })));
    if (found.problems.length) told.append(line(`${found.problems.length} to correct`));
    if (missing.length) told.append(line(`Still to give: ${missing.join("; ")}`));
    if (!found.ok) this.find("start-plan").replaceChildren(line("There is a plan once nothing is missing."));
  }

  /** Each problem at its field; gives those that have none. */
  showProblems(problems) {
    for (const field of this.fields()) {
      const own = problems.filter((each) => each.key === field.dataset.key);
      const wrong = this.find(`wrong-${field.dataset.key}`);
      wrong.textContent = own.map((each) => each.message).join("\n");
      wrong.hidden = !own.length;
      own.length ? field.setAttribute("aria-invalid", "true") : field.removeAttribute("aria-invalid");
      const section = field.closest("details");
      if (own.length && section) section.open = true;
    }
    for (const section of this.box.querySelectorAll("details.section")) {
      const fields = [...section.querySelectorAll("[data-key]")];
      const set = fields.filter((field) => read(field).length).length;
      const count = section.querySelector(".count");
      const number = `${fields.length} setting${fields.length > 1 ? "s" : ""}`;
      count.textContent = `${number}${set ? `, ${set} changed` : ""}`;
    }
    return problems.filter((each) => !this.find(`field-${each.key}`));
  }

  goToPlan() {
    const aside = this.box.querySelector("aside");
    aside.scrollIntoView();
    aside.focus({ preventScroll: true });
  }

  /** The first rows of the data, as the page Data shows them. */
  async showRows(start = "0") {
    const [path] = this.values()["data.train"] ?? [];
    const rows = this.find("start-rows");
    if (!this.find("start-labels").open) return;
    const model = this.values()["tokenizer.path"] ?? this.values()["model.path"];
    const known = [...this.find("known-tokenizers").options].find((each) => each.value === model);
    const query = new URLSearchParams({ n: "2", start, reader: known?.dataset.id ?? "" });
    if (this.rowsOf === `${path}?${query}`) return;
    this.rowsOf = `${path}?${query}`;
    if (!path) return rows.replaceChildren(line("Name the data first."));
    try {
      const { id } = await askJson(`/data/find?${new URLSearchParams({ path })}`);
      await fill(rows, `/data/${id}/rows?${query}`);
    } catch (error) {
      rows.replaceChildren(problem(error));
    }
  }

  link(found) {
    const save = this.find("save-yaml");
    if (save.href) URL.revokeObjectURL(save.href);
    save.href = URL.createObjectURL(new Blob([found.recipe], { type: "application/yaml" }));
    save.download = `${found.name}.yaml`;
  }

  async copy(button, text) {
    if (!text) return;
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  }

  // -------------------------------------------------------------- starting

  async start(button) {
    await this.told(async () => {
      const started = await askJson("/start/run", { body: this.asked() });
      this.seen = started.sha256;
      location.hash = `#/jobs/${started.job}`;
      return "Started.";
    }, button);
  }

  async writeExample(button) {
    await this.told(async () => {
      const model = this.values()["model.path"];
      const { recipe } = await askJson("/start/prepare", { body: { what: "example", model } });
      await this.begin("own", recipe);
      return "Written to the folder example; the form holds its recipe.";
    }, button);
  }

  async measure(button) {
    await this.told(async () => {
      await askJson("/start/prepare", { body: { what: "machine" } });
      await this.listRecipes(true);
      return "This machine was measured.";
    }, button);
  }

  async runDemo(button) {
    await this.told(async () => {
      const { job } = await askJson("/start/prepare", { body: { what: "demo" } });
      location.hash = `#/jobs/${job}`;
      return "Started.";
    }, button);
  }

  /** Do it, and say what came of it; the button rests meanwhile. */
  async told(work, button) {
    const told = this.find("start-told");
    if (button) button.disabled = true;
    try {
      told.replaceChildren(line(await work()));
    } catch (error) {
      told.replaceChildren(problem(error));
      told.scrollIntoView({ block: "nearest" });
    } finally {
      if (button) button.disabled = false;
    }
  }
}

function line(text) {
  const paragraph = document.createElement("p");
  paragraph.textContent = text;
  return paragraph;
}

function lines(text) {
  return text.split("\n").map((each) => each.trim()).filter(Boolean);
}

/** What is typed: a text, or a list of texts; of nothing an empty one. */
function read(field) {
  const { kind } = field.dataset;
  if (kind === "several") {
    return [...field.querySelectorAll("input:checked")].map((each) => each.value);
  }
  return kind === "lines" || kind === "map" ? lines(field.value) : field.value.trim();
}

function write(field, value) {
  if (field.dataset.kind === "several") {
    for (const box of field.querySelectorAll("input")) box.checked = value.includes(box.value);
  } else {
    field.value = Array.isArray(value) ? value.join("\n") : value;
  }
}
