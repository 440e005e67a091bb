"""The child process that runs llama.cpp: one JSON line in, one JSON line and raw bytes out.

A request is `{"op": ...}`; when it names `bytes`, that many raw bytes follow. An answer is
`{"ok": true, "bytes": n, ...}` and n raw bytes, or `{"ok": false, "error": ...}`. After `serve`,
requests that were submitted are answered in a thread, which writes what it draws to a pipe of its
own: one JSON line a step. The process ends when its input does, so it never outlives the one that
started it.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib
import json
import os
import queue
import resource
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from typing import IO, Any

from mule.errors import MuleError
from mule.generate._libllama import LibraryError, load_library
from mule.generate._llamacpp_model import Model
from mule.generate._llamacpp_rows import Answering, Rows
from mule.generate._quantize_rows import quantize_parts, quantize_values
from mule.generate.llamacpp_wire import event_fields, request_of
from mule.generate.sampler import log_total


class Worker:
    """The requests, each a method `do_<op>` that returns the answer's fields and its bytes."""

    def __init__(self, requests: IO[bytes], answers: IO[bytes]) -> None:
        self.requests, self.answers = requests, answers
        self.library = load_library()
        self.model: Model | None = None
        self.rows: Rows | None = None
        self.thread: _AnswerThread | None = None
        self.server: _TemplateServer | None = None

    @property
    def loaded(self) -> Model:
        if self.model is None:
            raise LibraryError("no file is loaded")
        return self.model

    @property
    def own_rows(self) -> Rows:
        """The rows, when no thread works on them."""
        if self.rows is None or self.thread is not None:
            raise LibraryError("no file is loaded, or requests are being answered")
        return self.rows

    def serve(self) -> None:
        while line := self.requests.readline():
            request = json.loads(line)
            data, sequence = self.requests.read(request.pop("bytes")), request.pop("seq")
            operation: Callable[..., tuple[dict[str, Any], list[Any]]]
            operation = getattr(self, f"do_{request.pop('op')}")
            blobs: list[Any] = []
            try:
                fields, blobs = operation(data, **request)
            except MuleError as error:
                fields = {"ok": False, "error": error.message, "hint": error.hint}
            except (RuntimeError, OSError, ValueError, http.client.HTTPException) as error:
                fields = {"ok": False, "error": f"{error}"}
            num_bytes = sum(len(blob) for blob in blobs)
            head = {"ok": True, "seq": sequence, "bytes": num_bytes}
            self.answers.write(json.dumps(head | fields).encode() + b"\n")
            for blob in blobs:
                self.answers.write(blob)
            self.answers.flush()

    def do_load(self, _: bytes, path: str, context_tokens: int, vocab_size: int, **options: Any):
        model = self.model = Model(self.library, path, **options)
        vocab_size = vocab_size or model.num_tokens
        self.rows = Rows(model, context_tokens=context_tokens, vocab_size=vocab_size)
        vocab, library = model.vocab, self.library
        return {
            "num_tokens": model.num_tokens,
            "vocab_size": vocab_size,
            "n_ctx_train": model.n_ctx_train,
            "bos": library.llama_vocab_bos(vocab),
            "eos": library.llama_vocab_eos(vocab),
            "eot": library.llama_vocab_eot(vocab),
            "add_bos": library.llama_vocab_get_add_bos(vocab),
            "eog": sorted(self.rows.stop_ids),
            "chat_template": model.chat_template,
        }, []

    def do_tokenize(self, _: bytes, texts: list[str], add_special: bool, parse_special: bool):
        model = self.loaded
        return {"ids": [model.tokenize(text, add_special, parse_special) for text in texts]}, []

    def do_piece(self, _: bytes, id: int):
        return {}, [self.loaded.piece(id)]

    def do_logits(self, _: bytes, ids: list[int]):
        self.own_rows.forget()
        return {}, [part.tobytes() for part in self.loaded.feed(ids)]

    def do_log_probabilities(self, _: bytes, ids: list[int], start: int):
        self.own_rows.forget()
        found: list[float] = []
        place = 0
        for part in self.loaded.feed(ids[:-1]):
            for row in part:
                place += 1  # of the id that the row predicts
                if place >= start:
                    found.append(float(row[ids[place]]) - log_total(row))
        return {"log_probabilities": found}, []

    def do_adapter(self, _: bytes, path: str, scale: float):
        self.own_rows.forget()
        self.loaded.use_adapter(path, scale)
        return {}, []

    def do_start(self, _: bytes, request: dict[str, Any]):
        rows = self.own_rows
        job = rows.prepare(0, request_of(request))
        rows.cancel(0)
        rows.add(job)
        return {}, []

    def do_next(self, _: bytes):
        rows, events = self.own_rows, []
        while not events:
            if rows.is_idle:
                raise LibraryError("no generation is running")
            events = rows.step()
        return {"events": [event_fields(event) for _, event in events], "stop": rows.stop_id}, []

    def do_serve(self, _: bytes, events_fd: int):
        self.thread = _AnswerThread(self.own_rows, os.fdopen(events_fd, "wb"))
        self.thread.start()
        return {}, []

    def do_submit(self, _: bytes, number: int, request: dict[str, Any]):
        if self.thread is None:
            raise LibraryError("no requests are answered")
        self.thread.inbox.put(self.thread.rows.prepare(number, request_of(request)))
        return {}, []

    def do_cancel(self, _: bytes, number: int):
        if self.thread is not None:
            self.thread.inbox.put(number)
        return {}, []

    def do_open_template(self, _: bytes, path: str, memory_bytes: int, cpu_seconds: int):
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
        if sys.platform == "linux":  # macOS does not keep to it
            resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
        self.server = _TemplateServer(path)
        return {}, []

    def do_template(self, _: bytes, body: dict[str, Any], max_bytes: int):
        if self.server is None:
            raise LibraryError("no template is open")
        return {"text": self.server.render(body, max_bytes)}, []

    def do_quantize(self, data: bytes, **matrix: int):
        return {}, [quantize_values(self.library, data, **matrix)]

    def do_quantize_file(self, data: bytes, out: str, parts: list[dict[str, Any]]):
        return quantize_parts(self.library, out, parts, data), []


class _AnswerThread(threading.Thread):
    """Answers what comes into its inbox: requests, and the numbers of those to cancel."""

    def __init__(self, rows: Rows, events: IO[bytes]) -> None:
        super().__init__(daemon=True)
        self.rows, self._events = rows, events
        self.inbox: queue.SimpleQueue[Answering | int] = queue.SimpleQueue()

    def run(self) -> None:
        try:
            while True:
                events = self._take() + self.rows.step()
                if events:
                    lines = [[number, event_fields(event)] for number, event in events]
                    self._events.write(json.dumps(lines).encode() + b"\n")
                    self._events.flush()
        except BaseException:
            traceback.print_exc()
            os._exit(1)  # the other side sees a crash

    def _take(self) -> list[Any]:
        """Add and cancel what came in; waits while there is nothing to do."""
        events = []
        with contextlib.suppress(queue.Empty):
            while True:
                item = self.inbox.get(block=self.rows.is_idle)
                if isinstance(item, int):
                    events += self.rows.cancel(item)
                    if events and self.rows.is_idle:
                        break
                else:
                    self.rows.add(item)
        return events


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

    def render(self, body: dict[str, Any], max_bytes: int) -> str:
        connection = http.client.HTTPConnection("localhost")
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as connection.sock:
            connection.sock.connect(self.socket_file)
            connection.request(
                "POST", "/apply-template", json.dumps(body), {"Content-Type": "application/json"}
            )
            text = connection.getresponse().read(max_bytes + 1)
        if len(text) > max_bytes:
            raise LibraryError(f"the chat template writes more than {max_bytes:,} bytes")
        answer = json.loads(text)
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
