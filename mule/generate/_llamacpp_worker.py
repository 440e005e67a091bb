"""The child process that runs llama.cpp: one JSON line in, one JSON line and raw bytes out.

A request is `{"op": ...}`; when it names `bytes`, that many raw bytes follow. An answer is
`{"ok": true, "bytes": n, ...}` and n raw bytes, or `{"ok": false, "error": ...}`. The process ends
when its input does, so it never outlives the one that started it.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib
import json
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any

import numpy as np

from mule.generate._libllama import LibraryError, Model, load_library, num_cores, quantize_rows

_QUANTIZE_ROWS = 64  # rows a thread takes at a time


class Worker:
    """The requests, each a method `do_<op>` that returns the answer's fields and its bytes."""

    def __init__(self, requests: IO[bytes], answers: IO[bytes]) -> None:
        self.requests, self.answers = requests, answers
        self.library = load_library()
        self.path = ""
        self.model: Model | None = None
        self.server: _TemplateServer | None = None
        self.generation: Iterator[dict[str, Any]] = iter(())

    @property
    def loaded(self) -> Model:
        if self.model is None:
            raise LibraryError("no file is loaded")
        return self.model

    def serve(self) -> None:
        while line := self.requests.readline():
            request = json.loads(line)
            data, sequence = self.requests.read(request.pop("bytes")), request.pop("seq")
            operation: Callable[..., tuple[dict[str, Any], list[Any]]]
            operation = getattr(self, f"do_{request.pop('op')}")
            try:
                fields, blobs = operation(data, **request)
            except (RuntimeError, OSError, ValueError, http.client.HTTPException) as error:
                fields, blobs = {"ok": False, "error": f"{error}"}, []
            num_bytes = sum(len(blob) for blob in blobs)
            head = {"ok": True, "seq": sequence, "bytes": num_bytes}
            self.answers.write(json.dumps(head | fields).encode() + b"\n")
            for blob in blobs:
                self.answers.write(blob)
            self.answers.flush()

    def do_load(self, _: bytes, path: str, n_ctx: int, threads: int, exact: bool):
        model = self.model = Model(self.library, path, n_ctx, threads, exact)
        self.path = path
        vocab, library = model.vocab, self.library
        return {
            "num_tokens": model.num_tokens,
            "n_ctx": model.n_ctx,
            "n_ctx_train": model.n_ctx_train,
            "bos": library.llama_vocab_bos(vocab),
            "eos": library.llama_vocab_eos(vocab),
            "eot": library.llama_vocab_eot(vocab),
            "add_bos": library.llama_vocab_get_add_bos(vocab),
            "eog": model.end_of_generation(),
            "chat_template": model.chat_template,
        }, []

    def do_tokenize(self, _: bytes, texts: list[str], add_special: bool, parse_special: bool):
        model = self.loaded
        return {"ids": [model.tokenize(text, add_special, parse_special) for text in texts]}, []

    def do_piece(self, _: bytes, id: int):
        return {}, [self.loaded.piece(id)]

    def do_logits(self, _: bytes, ids: list[int]):
        self.generation = iter(())  # its cache is gone
        self.loaded.forget()
        return {}, [part.tobytes() for part in self.loaded.feed(ids, every=True)]

    def do_start(self, _: bytes, ids: list[int], options: dict[str, Any]):
        self.loaded.keep_prefix(ids)
        self.generation = _generate(self.loaded, ids, options)
        return {}, []

    def do_next(self, _: bytes):
        if (answer := next(self.generation, None)) is None:
            raise LibraryError("no generation is running")
        return answer, []

    def do_template(self, _: bytes, messages: list[dict[str, Any]], add_generation_prompt: bool):
        if self.server is None:
            self.server = _TemplateServer(self.path)
        return {"text": self.server.render(messages, add_generation_prompt)}, []

    def do_quantize(self, data: bytes, type_id: int, rows: int, columns: int, row_bytes: int):
        self.library.ggml_quantize_init(type_id)
        values = np.frombuffer(data, np.float32).reshape(rows, columns)
        out = np.empty((rows, row_bytes), np.uint8)

        def quantize(start: int) -> None:
            part = slice(start, start + _QUANTIZE_ROWS)
            quantize_rows(self.library, type_id, values[part], out[part])

        with ThreadPoolExecutor(num_cores()) as pool:
            list(pool.map(quantize, range(0, rows, _QUANTIZE_ROWS)))
        return {}, [out.data.cast("B")]


# ---------------------------------------------------------------- generating


def _generate(model: Model, ids: list[int], options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One answer a token, then one with the reason of the end: stop, length or context."""
    rng = np.random.default_rng(options["seed"])
    stops = set(options["stop_ids"])
    context, fresh = list(ids), ids[len(model.cached) :]
    for _ in range(options["max_tokens"]):
        if len(model.cached) + len(fresh) > model.n_ctx:
            yield {"id": None, "reason": "context"}
            return
        (logits,) = model.feed(fresh, every=False)
        token = _sample(logits[-1], context, options, rng)
        if token in stops:
            yield {"id": None, "reason": "stop", "stop_id": token}
            return
        yield {"id": token}
        context.append(token)
        fresh = [token]
    yield {"id": None, "reason": "length"}


def _sample(
    raw: np.ndarray, context: list[int], options: dict[str, Any], rng: np.random.Generator
) -> int:
    """The same rules, in the same order, as mule.generate.sampler; other random numbers."""
    logits = raw[: options["vocab_size"]].astype(np.float64)
    if (penalty := options["repeat_penalty"]) != 1.0:
        seen = np.unique(np.asarray(context))
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    if options["temperature"] <= 0:
        return int(logits.argmax())
    logits /= options["temperature"]
    order = np.argsort(-logits, kind="stable")
    ordered = np.exp(logits[order] - logits[order[0]])
    ordered /= ordered.sum()
    before = np.cumsum(ordered) - ordered  # probability of all better tokens
    keep = (before < options["top_p"]) & (ordered >= options["min_p"] * ordered[0])
    keep[options["top_k"] or len(keep) :] = False
    keep[0] = True
    return int(rng.choice(order, p=ordered * keep / (ordered * keep).sum()))


# ---------------------------------------------------------------- chat template


class _TemplateServer:
    """llama.cpp's own Jinja, which it offers only through its server: here on a private socket."""

    def __init__(self, path: str) -> None:
        xllamacpp: Any = importlib.import_module("xllamacpp")  # it carries no types

        self.folder = tempfile.TemporaryDirectory(prefix="mule-")  # closed to other users
        self.socket_file = os.path.join(self.folder.name, "llama.sock")
        params = xllamacpp.CommonParams()
        params.model.path = path
        params.hostnames = [self.socket_file]
        params.n_ctx, params.n_parallel, params.n_batch = 256, 1, 64
        params.warmup = params.ui = params.fit_params = False
        params.use_jinja = True
        params.cpuparams.n_threads = 1
        self.server = xllamacpp.Server(params)

    def render(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        body = {"messages": messages, "add_generation_prompt": add_generation_prompt}
        connection = http.client.HTTPConnection("localhost")
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as connection.sock:
            connection.sock.connect(self.socket_file)
            connection.request(
                "POST", "/apply-template", json.dumps(body), {"Content-Type": "application/json"}
            )
            answer = json.loads(connection.getresponse().read())
        if "prompt" not in answer:
            raise LibraryError(f"the chat template failed: {answer.get('error', answer)}")
        return answer["prompt"]

    def close(self) -> None:
        """Remove the socket; the server itself ends with the process."""
        self.folder.cleanup()


def main() -> None:
    # What native code prints must not mix with the answers: it goes to stderr.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    greeting: dict[str, Any] = {"ok": True, "seq": 0}
    worker = None
    try:
        worker = Worker(sys.stdin.buffer, answers)
    except LibraryError as error:
        greeting |= {"ok": False, "error": f"{error}"}
    answers.write(json.dumps(greeting).encode() + b"\n")
    answers.flush()
    if worker is None:
        return
    try:
        worker.serve()
    finally:
        if worker.server is not None:
            worker.server.close()
    # Nothing is left to save, and stopping the server's threads was seen to hang, rarely.
    os._exit(0)


if __name__ == "__main__":
    main()
