// The tokens of an answer on the page, and what else was likely at each: on hover, and by keyboard.

import { visible } from "./chat_answer.js";

/** An empty text that tokens are added to; `name` is whose it is. */
export function tokenBox(name) {
  const box = document.createElement("div");
  box.className = "chat-tokens";
  box.setAttribute("role", "group");
  box.setAttribute("aria-label", `answer of ${name}; arrow keys go from token to token`);
  return box;
}

/** Add a piece of text with its tokens; the first one is where the Tab key lands. */
export function addPiece(box, text, tokens) {
  const span = document.createElement("span");
  span.textContent = visible(text);
  if (tokens.length) {
    span.className = "chat-token";
    span.tabIndex = box.querySelector(".chat-token") ? -1 : 0;
    span.dataset.tokens = JSON.stringify(tokens);
    const probability = Math.exp(Math.min(...tokens.map(([, logprob]) => logprob)));
    const bounds = [0.1, 0.5, 0.9];
    const below = bounds.findIndex((bound) => probability < bound);
    if (below >= 0) span.dataset.sure = String(below);
  }
  box.append(span);
}

/** Mark where a text parts from another: the piece that holds the character of this number. */
export function markPlace(box, pieces, place) {
  let passed = 0;
  const index = pieces.findIndex(([text]) => (passed += [...text].length) > place);
  box.children[index]?.classList.add("parts");
}

/** Show `card` beside the token that is pointed at or focused, anywhere in `area`. */
export function showTokens(area, card) {
  area.addEventListener("pointerover", (event) => open(event.target));
  area.addEventListener("pointerout", () => close());
  area.addEventListener("focusin", (event) => open(event.target));
  area.addEventListener("focusout", () => close());
  area.addEventListener("keydown", (event) => {
    const token = event.target.closest?.(".chat-token");
    if (!token) return;
    if (event.key === "Escape") return close();
    const next = neighbour(token, event.key);
    if (!next) return;
    event.preventDefault();
    token.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });

  let described = null;
  function open(target) {
    const token = target.closest?.(".chat-token");
    if (!token) return;
    close();
    fillCard(card, JSON.parse(token.dataset.tokens));
    card.hidden = false;
    described = token;
    token.setAttribute("aria-describedby", card.id);
    const place = token.getClientRects()[0];
    if (!place) return;
    const left = Math.min(place.left, innerWidth - card.offsetWidth - 8);
    const below = place.bottom + 4 + card.offsetHeight < innerHeight;
    card.style.left = `${Math.max(8, left)}px`;
    card.style.top = `${Math.max(8, below ? place.bottom + 4 : place.top - card.offsetHeight - 4)}px`;
  }
  function close() {
    card.hidden = true;
    described?.removeAttribute("aria-describedby");
    described = null;
  }
}

function neighbour(token, key) {
  const all = [...token.parentElement.querySelectorAll(".chat-token")];
  const here = all.indexOf(token);
  const to = { ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: all.length - 1 }[key];
  return to === undefined ? undefined : all[to];
}

function fillCard(card, tokens) {
  const parts = tokens.map(([text, logprob, top]) => {
    const drawnIsListed = top.some(([other]) => other === text);
    const rows = drawnIsListed ? top : [...top, [text, logprob]];
    const table = document.createElement("table");
    for (const [other, value] of rows) table.append(row(other, Math.exp(value), other === text));
    return table;
  });
  const note = document.createElement("div");
  note.className = "soft";
  note.textContent = "the model's own, before temperature and the other settings";
  card.replaceChildren(...parts, note);
}

function row(text, probability, isDrawn) {
  const line = document.createElement("tr");
  if (isDrawn) line.dataset.drawn = "";
  const share = document.createElement("td");
  share.textContent = inPercent(probability) + (isDrawn ? " drawn" : "");
  const bar = document.createElement("td");
  bar.setAttribute("aria-hidden", "true");
  const filled = document.createElement("div");
  filled.className = "bar";
  filled.style.width = `${(6 * probability).toFixed(2)}rem`;
  bar.append(filled);
  const token = document.createElement("td");
  const code = document.createElement("code");
  code.textContent = `"${visible(text).replaceAll("\n", "⏎").replaceAll("\t", "⇥")}"`;
  token.append(code);
  line.append(token, share, bar);
  return line;
}

function inPercent(probability) {
  return probability >= 0.001 ? `${(100 * probability).toFixed(1)}%` : probability.toExponential(1);
}
