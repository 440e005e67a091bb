"""A GGUF file's chat template, rendered by llama.cpp in a child process of its own.

A template is foreign code, and llama.cpp tries it out as soon as it is opened. Here it can neither
reach the machine nor harm the process that answers with it: its time, its memory and what it writes
are bounded.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from mule.errors import ModelError
from mule.generate.gguf_header import GgufHeader
from mule.generate.llamacpp_process import Runtime
from mule.tokenizer.template import MAX_OUTPUT_CHARS

SECONDS_TO_OPEN, SECONDS_TO_RENDER = 60.0, 10.0
MEMORY_BYTES = 4 << 30  # beside the file: address space, most of it never touched
_MAX_ESCAPED = 6  # bytes that JSON may take for a character
_CPU_SECONDS = 300  # of its life, also when nobody is left to end it: then another one is opened


class TemplateProcess(Runtime):
    """The chat template of one GGUF file."""

    def open(self, header: GgufHeader) -> None:
        """Read the file and try its template out; ModelError, and the end of it, if that fails."""
        try:
            self._ask(
                "open_template",
                SECONDS_TO_OPEN,
                path=str(header.file.resolve()),
                memory_bytes=header.size_bytes + MEMORY_BYTES,
                cpu_seconds=_CPU_SECONDS,
            )
        except BaseException:
            self.close()
            raise

    def render(self, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool) -> str:
        """The conversation as text; ModelError when the template fails or goes beyond its bounds."""
        num_chars = sum(len(str(message.get("content"))) for message in messages)
        return self._ask(
            "template",
            SECONDS_TO_RENDER,
            body={"messages": list(messages), "add_generation_prompt": add_generation_prompt},
            max_bytes=_MAX_ESCAPED * (MAX_OUTPUT_CHARS + num_chars),
        )["text"]

    def _ask(self, op: str, limit_s: float, **fields: Any) -> dict[str, Any]:
        try:
            return self.request(op, limit_s=limit_s, **fields)[0]
        except ModelError:
            if not self.is_late:
                raise
            raise ModelError(
                f"{self.subject}: its chat template did not end within {limit_s:g} seconds",
                "the template is hostile or broken: use another file",
            ) from None


class Templates:
    """A file's template process: opened when first needed, or `at_once` in the background.

    One that ended is opened again.
    """

    def __init__(self, header: GgufHeader, *, at_once: bool) -> None:
        self._header = header
        self._pool = ThreadPoolExecutor(1)
        self._lock = threading.Lock()
        self._newest: TemplateProcess | None = None  # perhaps still opening
        self._is_closed = False
        self._opened = self._open() if at_once else None

    def render(self, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool) -> str:
        """As TemplateProcess.render; one that dies is given a second try."""
        process = self._ready()
        try:
            return process.render(messages, add_generation_prompt=add_generation_prompt)
        except ModelError:
            if process.is_late or not process.has_ended:
                raise
        return self._ready().render(messages, add_generation_prompt=add_generation_prompt)

    def _ready(self) -> TemplateProcess:
        with self._lock:
            opened, self._opened = self._opened or self._open(), None
            process = opened.result()
            if process.has_ended:
                process.close()
                opened = self._open()
                process = opened.result()
            self._opened = opened
        return process

    def close(self) -> None:
        """End it, also one that is still opening."""
        self._is_closed = True
        opened, self._opened = self._opened, None
        if opened is not None and not opened.done() and self._newest is not None:
            self._newest.kill()
        if opened is not None and opened.exception() is None:
            opened.result().close()
        self._pool.shutdown()

    def _open(self) -> Future[TemplateProcess]:
        return self._pool.submit(self._open_now)

    def _open_now(self) -> TemplateProcess:
        self._newest = TemplateProcess(str(self._header.file))
        if self._is_closed:
            self._newest.kill()
        self._newest.open(self._header)
        return self._newest
