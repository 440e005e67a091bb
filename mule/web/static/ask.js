// Asking the server, and what a page does with the answer.

function token() {
  return localStorage.getItem("token") ?? "";
}

/** What the server answered; throws {message, hint, status} as the terminal would say it. */
export async function ask(path, { body, signal } = {}) {
  const headers = { authorization: `Bearer ${token()}` };
  if (body !== undefined) headers["content-type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method: body === undefined ? "GET" : "POST",
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw { message: "The server does not answer.", hint: "start it again: mule ui", status: 0 };
  }
  if (response.ok) return response;
  if (response.status === 401) throw LOCKED;
  const said = await response.json().catch(() => ({ error: { message: response.statusText } }));
  throw { ...said.error, status: response.status };
}

const LOCKED = {
  message: "This page does not know the server's token.",
  hint: "open the whole address that `mule ui` printed; each start has a new one",
  status: 401,
};

export async function askJson(path, options) {
  return (await ask(path, options)).json();
}

/** Put the fragment at `path` into `element`; what is typed and where one reads stays. */
export async function fill(element, path, options) {
  const text = await (await ask(path, options)).text();
  const piece = new DOMParser().parseFromString(text, "text/html");
  element.replaceChildren(...piece.body.childNodes);
  return element;
}

/** An error as the terminal shows it: what was found, and what helps. */
export function problem(error) {
  const box = document.createElement("section");
  box.className = "problem";
  box.setAttribute("role", "alert");
  const what = document.createElement("p");
  what.textContent = error.message ?? String(error);
  box.append(what);
  if (error.hint) {
    const hint = document.createElement("p");
    hint.textContent = `hint: ${error.hint}`;
    box.append(hint);
  }
  return box;
}

/** The events of a server-sent stream, as they come. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value;
    const parts = rest.split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (part.startsWith("data: ")) yield part.slice(6);
    }
  }
}
