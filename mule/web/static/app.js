// The shell: which page is shown, how it asks the server, and what it hears of changes.

import { ask, events, problem } from "./ask.js";

// Address: #/<page>/<id>?<options>. The script of a page exports `show(box, place)`: it fills `box`
// and gives {shown(), changed(keys), themed(), close()}, all optional: called when the box stands
// in the document, when runs or jobs changed (their keys `run/<id>`, `job/<id>`; none: anything
// may have), when the colours did, and at the end.
const PAGES = ["runs", "run", "start", "jobs", "data", "compare", "export", "chat"];
const SHOWN_UNDER = { run: "runs", jobs: "start" }; // pages without an entry of their own in the head

const main = document.getElementById("main");
let current = {};
let visit = 0; // a page that is left while it loads must not appear

async function navigate() {
  const place = readPlace();
  const here = ++visit;
  current.close?.();
  current = {};
  main.setAttribute("aria-busy", "true");
  for (const link of document.querySelectorAll("header nav a")) {
    const isHere = link.getAttribute("href") === `#/${SHOWN_UNDER[place.page] ?? place.page}`;
    isHere ? link.setAttribute("aria-current", "page") : link.removeAttribute("aria-current");
  }
  const box = document.createElement("div");
  try {
    const page = await import(`./${PAGES.includes(place.page) ? place.page : "runs"}.js`);
    const shown = (await page.show(box, place)) ?? {};
    if (here !== visit) return shown.close?.();
    current = shown;
  } catch (error) {
    if (here !== visit) return;
    box.replaceChildren(problem(error));
  }
  main.replaceChildren(box);
  main.setAttribute("aria-busy", "false");
  document.title = `${box.querySelector("h1")?.textContent ?? "Mule"} · Mule`;
  current.shown?.();
}

function readPlace() {
  const [path, options] = location.hash.replace(/^#\/?/, "").split("?");
  const [page, id] = path.split("/");
  return { page: page || "runs", id, options: new URLSearchParams(options ?? "") };
}

// ---------------------------------------------------------------- what changes

const link = document.getElementById("link");

async function listen() {
  let wait = 1000;
  for (;;) {
    try {
      const response = await ask("/events");
      if (link.dataset.lost) current.changed?.([]); // anything may have happened meanwhile
      say("live");
      wait = 1000;
      for await (const event of events(response)) {
        const { changed, gone } = JSON.parse(event);
        if (changed.length || gone.length) current.changed?.([...changed, ...gone]);
      }
    } catch (error) {
      say(error.status === 401 ? "locked" : "not connected", true);
    }
    await new Promise((resolve) => setTimeout(resolve, wait));
    wait = Math.min(2 * wait, 10000);
  }
}

function say(word, lost = false) {
  link.textContent = word;
  link.className = lost ? "lost" : "";
  lost ? (link.dataset.lost = "yes") : delete link.dataset.lost;
}

// ---------------------------------------------------------------- light and dark

const button = document.getElementById("theme");

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  button.textContent = theme === "dark" ? "Light" : "Dark";
  button.setAttribute("aria-label", `Use ${button.textContent.toLowerCase()} colours`);
  current.themed?.();
}

button.addEventListener("click", () => {
  const next = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  localStorage.setItem("theme", next);
  setTheme(next);
});

const prefersDark = matchMedia("(prefers-color-scheme: dark)");
setTheme(localStorage.getItem("theme") ?? (prefersDark.matches ? "dark" : "light"));

// ---------------------------------------------------------------- start

document.addEventListener("click", async (event) => {
  const copied = event.target.closest?.("[data-copy]");
  if (!copied) return;
  await navigator.clipboard.writeText(copied.dataset.copy);
  copied.textContent = "Copied";
});

const given = location.hash.match(/^#token=([\w.~-]+)$/);
if (given) {
  localStorage.setItem("token", given[1]);
  history.replaceState(null, "", "#/runs"); // not in the history, not in a copied address
}
addEventListener("hashchange", navigate);
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  main.focus();
});
navigate();
listen();
