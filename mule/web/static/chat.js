// Chat: the same message to several models, their answers beside each other.

import { ask, askJson, fill, problem } from "./ask.js";
import { answerOf, difference, inWords, textOf } from "./chat_answer.js";
import { addPiece, markPlace, showTokens, tokenBox } from "./chat_tokens.js";

const KEPT = "chat"; // in the session's storage: it survives a refresh, and ends with the tab
const LOOK_MS = 5000;
const LOADING_MS = 400;

export async function show(box, place) {
  await fill(box, "/chat");
  if (!box.querySelector("#chat-ask")) return {};
  const chat = new Chat(box);
  chat.restore(place.options.get("models"));
  await chat.look();
  const timer = setInterval(() => document.hidden || chat.look(), LOOK_MS);
  return {
    close() {
      clearInterval(timer);
      chat.stop();
    },
  };
}

class Chat {
  constructor(box) {
    this.find = (id) => box.querySelector(`#chat-${id}`);
    this.turns = []; // {question, seed, answers: {model id: {title, chat, pieces, ...}}}
    this.running = null; // what stops the answers under way
    this.engine = { state: "closed", models: [] };
    showTokens(this.find("said"), this.find("token"));
    this.listen(box);
  }

  listen(box) {
    const on = (id, kind, act) => this.find(id).addEventListener(kind, act);
    const submitted = (act) => (event) => {
      event.preventDefault();
      this.trying(act);
    };
    on("choice", "input", () => this.chosenChanged());
    on("choice", "submit", submitted(() => this.open()));
    on("close", "click", () => this.trying(() => this.close()));
    on("ask", "submit", submitted(() => this.send(this.find("question").value)));
    on("save", "submit", submitted(() => this.save()));
    on("stop", "click", () => this.stop());
    on("retry", "click", () => this.trying(() => this.retry()));
    on("new", "click", () => this.begin());
    on("question", "keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.find("ask").requestSubmit();
    });
    box.querySelector("#chat-settings").addEventListener("input", () => this.keep());
  }

  /** Do it, and show what goes wrong as the terminal would. */
  async trying(act) {
    this.find("problem").replaceChildren();
    try {
      await act();
    } catch (error) {
      if (error.name !== "AbortError") this.find("problem").replaceChildren(problem(error));
      await this.look();
    }
  }

  // -------------------------------------------------------------- models

  get boxes() {
    return [...this.find("choice").querySelectorAll("[name=model]")];
  }

  get chosen() {
    return this.boxes.filter((each) => each.checked);
  }

  chosenChanged() {
    const { most, free } = this.find("choice").dataset;
    const full = this.chosen.length >= Number(most);
    for (const each of this.boxes) each.disabled = full && !each.checked;
    const bytes = this.chosen.reduce((sum, each) => sum + Number(each.dataset.bytes), 0);
    const memory = this.find("memory");
    memory.className = bytes > Number(free) ? "over" : "soft";
    memory.textContent =
      `${this.chosen.length} chosen, ${gibibytes(bytes)} of weights on the disk; when this page was ` +
      `loaded ${gibibytes(Number(free))} of memory was free. One set is open at a time: opening ` +
      `another closes it, and so does a quarter of an hour without use.`;
    this.find("open").disabled = !this.chosen.length;
    this.keep();
  }

  /** Open the chosen models and wait until they answer. */
  async open() {
    const models = this.chosen.map((each) => each.value);
    this.told(await askJson("/chat/open", { body: { models } }));
    while (this.engine.state === "loading") {
      await new Promise((resolve) => setTimeout(resolve, LOADING_MS));
      await this.look();
    }
    if (this.engine.state === "failed") throw this.engine.error;
    if (this.engine.state !== "open") {
      throw { message: "the models were closed", hint: "open them again" };
    }
  }

  async close() {
    this.stop();
    this.told(await askJson("/chat/close", { body: {} }));
  }

  async look() {
    try {
      this.told(await askJson("/chat/models"));
    } catch (error) {
      this.find("state").textContent = error.message;
    }
  }

  told(engine) {
    this.engine = engine;
    const names = engine.models.map((model) => model.title).join(", ");
    const since = engine.state === "loading" ? ` (${Math.round(engine.seconds)} s)` : "";
    this.find("state").textContent = engine.why || `${engine.state}${names ? `: ${names}` : ""}${since}`;
    this.find("close").disabled = engine.state === "closed";
    const place = this.find("engine");
    const said = engine.state === "open" ? "" : engine.said.trim();
    if (place.dataset.said === said && engine.state !== "failed") return;
    place.dataset.said = said;
    place.replaceChildren();
    if (engine.state === "failed") place.append(problem(engine.error));
    if (said) {
      const lines = document.createElement("pre");
      lines.tabIndex = 0;
      lines.textContent = said;
      place.append(lines);
    }
  }

  // -------------------------------------------------------------- asking

  async send(question) {
    if (!question.trim() || this.running) return;
    const settings = this.settings();
    if (!settings) return;
    if (!this.chosen.length) {
      throw { message: "no model is chosen", hint: "tick one or several under Models" };
    }
    this.working(new AbortController());
    try {
      this.say("opening the models");
      await this.open();
      this.find("question").value = "";
      const turn = { question, seed: settings.seed, answers: {} };
      this.turns.push(turn);
      const place = this.drawTurn(turn);
      for (const model of this.engine.models) await this.answer(turn, model, settings, place);
      this.compare(turn, place);
    } finally {
      this.working(null);
      this.keep();
    }
  }

  /** The answer of one model; the models take turns, so that each speed is of one at work. */
  async answer(turn, model, settings, place) {
    if (this.running.signal.aborted) return;
    const answer = { title: model.title, chat: model.chat, pieces: [] };
    const body = { model: model.id, ...settings, ...this.asked(turn, model) };
    turn.answers[model.id] = answer;
    const drawn = drawAnswer(place, answer);
    this.say(`${model.title} answers`);
    const take = (text, tokens) => {
      answer.pieces.push([text, tokens]);
      addPiece(drawn.text, text, tokens);
    };
    try {
      Object.assign(answer, await answerOf(body, take, this.running.signal));
      this.say(`${model.title}: ${figures(answer)}`);
    } catch (error) {
      answer.error = error.name === "AbortError" ? { message: "stopped" } : error;
      if (error.name !== "AbortError") throw error;
    } finally {
      drawn.end();
    }
  }

  /** What the model is given: the conversation, or the text alone where it knows no chat. */
  asked(turn, model) {
    if (!model.chat) return { prompt: turn.question };
    return { messages: [...this.history(model.id), { role: "user", content: turn.question }] };
  }

  /** The messages with one model: of the turns that it answered to the end. */
  history(id) {
    const system = this.find("system").value.trim();
    const messages = system ? [{ role: "system", content: system }] : [];
    for (const { question, answers } of this.turns) {
      const answer = answers[id];
      if (!answer?.chat || !answer.reason) continue;
      messages.push({ role: "user", content: question });
      messages.push({ role: "assistant", content: textOf(answer) });
    }
    return messages;
  }

  async retry() {
    const last = this.turns.at(-1);
    if (!last || this.running) return;
    this.turns.pop();
    this.find("said").lastElementChild?.remove();
    this.find("seed").value = Number(this.find("seed").value) + 1;
    await this.send(last.question);
  }

  stop() {
    this.running?.abort();
  }

  begin() {
    this.stop();
    this.turns = [];
    this.find("said").replaceChildren();
    this.working(null);
    this.keep();
  }

  /** The settings as numbers; null where one is out of its range, which the browser then says. */
  settings() {
    const form = this.find("settings").querySelector("form");
    if (!form.checkValidity()) {
      this.find("settings").open = true;
      form.reportValidity();
      return null;
    }
    const inputs = [...form.querySelectorAll("input")];
    return Object.fromEntries(inputs.map((each) => [each.name, Number(each.value)]));
  }

  working(controller) {
    this.running = controller;
    const busy = controller !== null;
    for (const id of ["send", "open", "close"]) this.find(id).disabled = busy;
    this.find("stop").disabled = !busy;
    for (const id of ["retry", "new"]) this.find(id).disabled = busy || !this.turns.length;
    if (!busy && !this.chosen.length) this.find("open").disabled = true;
  }

  say(text) {
    this.find("status").textContent = text;
  }

  // -------------------------------------------------------------- what was said

  drawTurn(turn) {
    const place = document.createElement("article");
    place.className = "chat-turn";
    const question = document.createElement("p");
    question.className = "chat-question";
    question.textContent = turn.question;
    const answers = document.createElement("div");
    answers.className = "chat-answers";
    place.append(question, answers);
    this.find("said").append(place);
    place.scrollIntoView({ block: "nearest" });
    return answers;
  }

  /** Below each answer but the first: how it differs from the first. */
  compare(turn, place) {
    const answers = Object.values(turn.answers);
    if (answers.length < 2 || answers.some((answer) => !answer.reason)) return;
    for (const [index, other] of answers.entries()) {
      if (!index) continue;
      const found = difference(answers[0], other);
      const line = document.createElement("p");
      line.className = "chat-differs";
      line.textContent = inWords(found, answers[0].title);
      const card = place.children[index];
      card.append(line);
      if (!found.same) markPlace(card.querySelector(".chat-tokens"), other.pieces, found.place);
    }
  }

  async save() {
    const place = this.find("saved");
    const models = new Map();
    for (const { answers } of this.turns) {
      for (const [id, answer] of Object.entries(answers)) if (answer.chat) models.set(id, answer);
    }
    const said = [...models].map(([id, { title }]) => ({ model: title, messages: this.history(id) }));
    const file = this.find("file").value;
    place.replaceChildren();
    const saved = await askJson("/chat/save", { body: { file, said } });
    place.textContent = `saved; ${saved.file} has ${saved.rows} rows now. Next: ${saved.next}`;
  }

  // -------------------------------------------------------------- across a refresh

  keep() {
    const inputs = [...this.find("settings").querySelectorAll("input, textarea")];
    const state = {
      models: this.chosen.map((each) => each.value),
      settings: Object.fromEntries(inputs.map((each) => [each.name, each.value])),
      turns: this.turns,
    };
    store(state);
  }

  restore(wanted) {
    const state = JSON.parse(sessionStorage.getItem(KEPT) ?? "{}");
    const models = wanted ? wanted.split(",") : (state.models ?? []);
    for (const each of this.boxes) each.checked = models.includes(each.value);
    for (const each of this.find("settings").querySelectorAll("input, textarea")) {
      each.value = state.settings?.[each.name] ?? each.value;
    }
    this.turns = state.turns ?? [];
    for (const turn of this.turns) {
      const place = this.drawTurn(turn);
      for (const answer of Object.values(turn.answers)) {
        if (!answer.reason) answer.error ??= { message: "stopped" };
        const drawn = drawAnswer(place, answer);
        for (const [text, tokens] of answer.pieces) addPiece(drawn.text, text, tokens);
        drawn.end();
      }
      this.compare(turn, place);
    }
    this.chosenChanged();
    this.working(null);
  }
}

/** Where an answer is written; `end` adds its figures, or what went wrong. */
function drawAnswer(place, answer) {
  const card = document.createElement("section");
  card.className = "chat-answer";
  card.setAttribute("aria-label", answer.title);
  const name = document.createElement("h3");
  name.textContent = answer.title;
  const text = tokenBox(answer.title);
  card.append(name, text);
  place.append(card);
  return {
    text,
    end() {
      if (answer.error) {
        const error = { ...answer.error };
        error.message += answer.pieces.length ? "; not part of the conversation" : "";
        card.append(problem(error));
        return;
      }
      const line = document.createElement("p");
      line.className = "soft";
      line.textContent = figures(answer);
      card.append(line);
    },
  };
}

const WHY = { length: ", cut at max_tokens or the end of the context" };

/** Of the whole answer, the reading of the prompt included, as `mule chat` counts. */
function figures({ count, first, seconds, reason }) {
  const rate = seconds ? (count / seconds).toFixed(1) : "-";
  const begun = first === null ? "" : `, first after ${first.toFixed(2)} s`;
  return `${count} tokens, ${rate} tokens/s${begun}${WHY[reason] ?? ""}`;
}

/** Without the tokens of older turns where all of it is too much for the browser. */
function store(state) {
  for (const turns of [state.turns, state.turns.map(withoutTokens)]) {
    try {
      sessionStorage.setItem(KEPT, JSON.stringify({ ...state, turns }));
      return;
    } catch {
      continue; // the quota
    }
  }
}

function withoutTokens(turn) {
  const bare = (answer) => ({ ...answer, pieces: [[textOf(answer), []]] });
  const answers = Object.entries(turn.answers).map(([id, answer]) => [id, bare(answer)]);
  return { ...turn, answers: Object.fromEntries(answers) };
}

function gibibytes(count) {
  return count >= 2 ** 30 ? `${(count / 2 ** 30).toFixed(1)} GiB` : `${Math.ceil(count / 2 ** 20)} MiB`;
}
