// Jobs: the list, or one of them, live.

import { askJson, fill, problem } from "./ask.js";

export async function show(box, place) {
  const path = place.id ? `/jobs/${place.id}` : "/jobs";

  async function refill() {
    const log = box.querySelector("#job-log");
    const reads = log && log.scrollTop + log.clientHeight < log.scrollHeight - 4;
    const from = log?.scrollTop;
    const held = document.activeElement?.dataset?.post; // the keyboard stays where it is
    await fill(box, path);
    if (held) box.querySelector(`[data-post="${held}"]`)?.focus();
    const now = box.querySelector("#job-log");
    if (now) now.scrollTop = reads ? from : now.scrollHeight;
  }

  box.addEventListener("click", async (event) => {
    const button = event.target.closest("[data-post]");
    if (!button) return;
    button.disabled = true;
    try {
      const { job } = await askJson(button.dataset.post, { body: {} });
      if (button.dataset.then) location.hash = button.dataset.then;
      if (button.dataset.job) location.hash = `#/jobs/${job}`;
      else if (!place.id) await refill();
    } catch (error) {
      box.querySelector("#job-told").replaceChildren(problem(error));
      button.disabled = false;
    }
  });

  await refill();
  return {
    shown() {
      const log = box.querySelector("#job-log");
      if (log) log.scrollTop = log.scrollHeight;
    },
    async changed(keys) {
      const own = place.id ? [`job/${place.id}`] : keys.filter((key) => key.startsWith("job/"));
      const waits = place.id && !box.querySelector('a[href^="#/run/"]'); // for its run to be there
      if (waits) own.push(...keys.filter((key) => key.startsWith("run/")));
      if (!keys.length || own.some((key) => keys.includes(key))) {
        await refill().catch((error) => box.replaceChildren(problem(error)));
      }
    },
  };
}
