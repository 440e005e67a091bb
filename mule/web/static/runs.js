// Runs: the list, live. Rows that stay as they are stay where they are: focus and selection too.

import { askJson, fill, problem } from "./ask.js";

const EVERY_MS = 2000; // between two looks at a list that changes all the time

export async function show(box) {
  let isClosed = false;
  let waiting = false;
  await fill(box, "/runs");

  async function refresh() {
    const next = document.createElement("div");
    try {
      await fill(next, "/runs");
    } catch (error) {
      next.append(problem(error));
    }
    if (isClosed) return;
    const [old, now] = [box.querySelector("tbody"), next.querySelector("tbody")];
    const around = (element) => [...element.children].filter((child) => !child.querySelector("tbody"));
    const isSame = around(box).length === around(next).length
      && around(box).every((child, place) => child.isEqualNode(around(next)[place]));
    old && now && isSame ? merge(old, now) : box.replaceChildren(...next.childNodes);
    judge();
  }

  let isJudging = false;
  async function judge() {
    if (isJudging) return;
    isJudging = true;
    try {
      for (let more = true; more && !isClosed; ) {
        const found = await askJson("/runs/verdicts");
        for (const [id, said] of Object.entries(found.verdicts)) tell(id, said);
        more = found.more;
      }
    } catch {
      // The list says what is wrong when it is asked for again.
    } finally {
      isJudging = false;
    }
  }

  function tell(id, { verdict, worst }) {
    const cell = box.querySelector(`tr[data-run="${CSS.escape(id)}"] [data-verdict]`);
    if (!cell) return;
    const word = document.createElement("span");
    word.className = `verdict verdict-${worst || "none"}`;
    word.textContent = verdict || "no update yet";
    if (!cell.firstElementChild?.isEqualNode(word)) cell.replaceChildren(word);
  }

  return {
    shown: judge,
    changed() {
      if (waiting) return;
      waiting = true;
      setTimeout(() => {
        waiting = false;
        if (!isClosed) refresh();
      }, EVERY_MS);
    },
    close() {
      isClosed = true;
    },
  };
}

/** The rows of `now` into `old`, by their runs. */
function merge(old, now) {
  const known = new Map([...old.children].map((row) => [row.dataset.run, row]));
  const focused = document.activeElement?.getAttribute?.("href");
  let place = old.firstElementChild;
  for (const row of [...now.children]) {
    const before = known.get(row.dataset.run);
    known.delete(row.dataset.run);
    const kept = before?.isEqualNode(row) ? before : row;
    if (before && kept !== before) {
      if (place === before) place = before.nextElementSibling;
      before.remove();
    }
    if (kept === place) place = place.nextElementSibling;
    else old.insertBefore(kept, place);
  }
  for (const row of known.values()) row.remove();
  if (focused && document.activeElement === document.body) {
    old.querySelector(`a[href="${CSS.escape(focused)}"]`)?.focus();
  }
}
