// One answer: asked of the server, read as it comes, and where two part.

import { ask, events } from "./ask.js";

/**
 * Ask one model. `take(text, tokens)` gets what is new: text to show, and the tokens it is of, each
 * [text, logprob, [[text, logprob], ...]]. Gives how many there were, when, and why it ended.
 */
export async function answerOf(body, take, signal) {
  const began = performance.now();
  const passed = () => (performance.now() - began) / 1000;
  const found = { count: 0, first: null, seconds: 0, reason: null };
  let held = []; // tokens whose text is still to come: parts of a character
  let complete = false;
  for await (const event of events(await ask("/chat/answer", { body, signal }))) {
    if (event === "[DONE]") {
      complete = true;
      break;
    }
    const chunk = JSON.parse(event);
    if (chunk.error) throw chunk.error;
    if (chunk.usage) found.count = chunk.usage.completion_tokens;
    const choice = chunk.choices?.[0];
    if (!choice) continue;
    found.reason = choice.finish_reason ?? found.reason;
    const tokens = tokensOf(choice.logprobs);
    if (tokens.length) found.first ??= passed();
    held.push(...tokens);
    const text = (choice.delta ? choice.delta.content : choice.text) ?? "";
    if (text) {
      take(text, held);
      held = [];
    }
  }
  if (!complete) {
    throw { message: "the answer was cut short", hint: "look whether the models are still open" };
  }
  found.seconds = passed();
  return found;
}

/** Both forms of the API, chat and plain text, as one. */
function tokensOf(logprobs) {
  if (!logprobs) return [];
  if (logprobs.content) {
    return logprobs.content.map((entry) => [
      spelled(entry), entry.logprob, entry.top_logprobs.map((top) => [spelled(top), top.logprob]),
    ]);
  }
  return logprobs.tokens.map((text, index) => [
    text, logprobs.token_logprobs[index], Object.entries(logprobs.top_logprobs[index]),
  ]);
}

/** A token that is no whole character is shown by its bytes. */
function spelled({ token, bytes }) {
  return token.includes("\ufffd") && bytes ? bytes.map(hex).join("") : token;
}

const hex = (byte) => `\\x${byte.toString(16).padStart(2, "0")}`;

// What could move text about or hide it; joiners stay, since letters and emoji need them.
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g;

/** Text with its control characters spelled out, as the terminal does it. */
export function visible(text) {
  return text.replace(HIDDEN, (char) => {
    const code = char.codePointAt(0);
    return code < 256 ? hex(code) : `\\u${code.toString(16).padStart(4, "0")}`;
  });
}

export function textOf(answer) {
  return answer.pieces.map(([text]) => text).join("");
}

const BEFORE = 40;
const AFTER = 30;

/** How an answer parts from the first one: {same}, or the place in characters and both ends. */
export function difference(first, other) {
  const [one, two] = [[...textOf(first)], [...textOf(other)]];
  const at = two.findIndex((char, index) => char !== one[index]);
  const place = at < 0 ? two.length : at;
  if (at < 0 && one.length === two.length) return { same: true };
  return {
    same: false,
    place,
    after: one.slice(Math.max(0, place - BEFORE), place).join(""),
    there: one.slice(place, place + AFTER).join(""),
    here: two.slice(place, place + AFTER).join(""),
  };
}

/** The same in words, as `mule chat` says it. */
export function inWords(found, name) {
  if (found.same) return `the same as ${name}`;
  const quoted = (text) => (text ? `"${visible(text).replaceAll("\n", "⏎")}"` : "");
  const where = found.after ? `after ${quoted(found.after)}` : "from the start";
  const here = quoted(found.here) || "nothing more";
  const there = quoted(found.there) || "nothing more";
  return `first differs from ${name} at character ${found.place}, ${where}: ${here} where ${name} has ${there}`;
}
