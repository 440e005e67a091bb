"""Answering many requests at once with a GGUF file, by llama.cpp in a child process."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mule.errors import ModelError, UserError
from mule.generate.llamacpp import LlamaCpp
from mule.generate.llamacpp_wire import event_of, request_fields
from mule.generate.request import Deliver, Ended, Event, Message, Request

_MAX_TOKENS = 2**31 - 1


@dataclass
class LlamaCppJob:
    """A request that the engine took."""

    number: int
    num_prompt: int
    deliver: Deliver
    engine: LlamaCppEngine

    def cancel(self) -> None:
        """Stop working on it; `Ended("cancelled")` is delivered unless it ended before."""
        self.engine.cancel(self.number)


class LlamaCppEngine:
    """A GGUF file that answers many requests at once: an Engine, see mule.generate.request.

    `context_tokens`: None takes the model's own, up to 4096. `max_rows` share one cache; where the
    memory is too short for all of them at full length, requests wait for room in it. `threads` and
    `exact` as in LlamaCpp.

    A crash of the child ends what it works on with `Ended("failed")`; the next request starts it
    again, unless it has crashed before without answering anything in between.

    What is answered beside a request changes its logits by rounding only: not at all where it counts
    with `exact`; otherwise flash attention adds up in 16 bits, in the order of the shared cache, and
    quantised files round again what that gave. Greedy answers then part where the two best tokens
    are within about 0.001 (f32, f16) or 0.05 (q8_0, q4_k_m) of each other, as measured.
    """

    def __init__(
        self,
        gguf_file: Path | str,
        *,
        context_tokens: int | None = None,
        max_rows: int = 16,
        threads: int | None = None,
        exact: bool = False,
    ) -> None:
        self.max_rows = max_rows
        self._file = gguf_file
        self._options: dict[str, Any] = dict(
            n_ctx=context_tokens, threads=threads, exact=exact, num_rows=max_rows, chats=True
        )
        self._starting = threading.RLock()
        self._numbers = itertools.count(1)
        self._jobs: dict[int, LlamaCppJob] = {}
        self._pieces: dict[int, bytes] = {}
        self._closed = self._was_restarted = False
        self._has_answered = False  # anything since the child started
        self._model = self._open()
        self.vocab_size = self._model.vocab_size
        limit = self._model.n_ctx_train
        if context_tokens is not None and not 2 <= context_tokens <= limit:
            self.close()
            raise UserError(
                f"a context of {context_tokens} tokens was asked for; the model's holds {limit}",
                f"ask for 2 to {limit} tokens",
            )
        self.context_tokens = min(self._model.n_ctx, limit)
        self.chat = self._model.chat_template is not None

    # ------------------------------------------------------------ text

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, with what the model expects before it; no special token is read."""
        model = self._running_model()
        before = model.tokenize_all([""], special=True, add_bos=True)[0]
        return before + model.tokenize(text, special=False)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a chat, ready to be answered; control tokens typed in it stay text."""
        return self._running_model().encode_prompt(messages)

    def piece(self, token: int) -> bytes:
        """The bytes a token stands for, of a special token its name."""
        if not 0 <= token < self._model.num_tokens:
            raise UserError(
                f"there is no token {token}", f"ids go from 0 to {self._model.num_tokens - 1}"
            )
        if token not in self._pieces:
            self._pieces[token] = self._running_model().token_piece(token)
        return self._pieces[token]

    # ------------------------------------------------------------ requests

    def submit(self, request: Request, deliver: Deliver) -> LlamaCppJob:
        """Answer it as soon as there is room; `deliver` gets Tokens, then exactly one Ended.

        Raises UserError for a request that can never be answered.
        """
        self._check(request)
        job = LlamaCppJob(next(self._numbers), len(request.ids), deliver, self)
        with self._starting:
            model = self._running_model()
            self._jobs[job.number] = job
            try:
                model.request("submit", number=job.number, request=request_fields(request))
            except BaseException:
                self._send_cancel(job.number)
                if self._jobs.pop(job.number, None) is not None:
                    raise
        return job

    def cancel(self, number: int) -> None:
        """Stop working on a job, if it is still there."""
        if number in self._jobs:
            self._send_cancel(number)

    def _send_cancel(self, number: int) -> None:
        with contextlib.suppress(ModelError):  # it has ended, and with it the job
            if not self._model.has_ended:
                self._model.request("cancel", number=number)

    def close(self) -> None:
        """End the child; what it still works on is cancelled."""
        with self._starting:
            self._closed = True
            self._model.close()
            self._listener.join()

    def _check(self, request: Request) -> None:
        length, room = len(request.ids), self.context_tokens
        if not 0 < length < room:
            raise UserError(
                f"the prompt has {length:,} tokens; the model's context holds {room:,}",
                "shorten the prompt, or start a new conversation" if length else "say something",
            )
        if not all(0 <= token < self._model.num_tokens for token in request.ids):
            raise UserError(
                f"a token of the prompt is outside 0..{self._model.num_tokens - 1}",
                "use the tokenizer that belongs to this file",
            )
        if not 0 < request.max_tokens <= _MAX_TOKENS:
            raise UserError(
                f"max_tokens is {request.max_tokens}; it must be between 1 and {_MAX_TOKENS:,}",
                "ask for at least one token",
            )

    # ------------------------------------------------------------ the child

    def _running_model(self) -> LlamaCpp:
        """The child, started again if it crashed since it last answered."""
        with self._starting:
            if self._closed:
                raise UserError(f"{self._file}: the engine was closed", "open the file again")
            if self._model.has_ended:
                self._model.kill()
                self._listener.join()
                if self._was_restarted and not self._has_answered:
                    raise ModelError(
                        f"{self._model.crash().message}\nit was started again after a crash before",
                        "check the file with `mule verify`, or use another type of it",
                    )
                self._model.close()
                self._model, self._was_restarted = self._open(), True
            return self._model

    def _open(self) -> LlamaCpp:
        events, child_end = os.pipe()
        try:
            model = LlamaCpp(self._file, pass_fds=(child_end,), **self._options)
            try:
                model.request("serve", events_fd=child_end)
            except BaseException:
                model.close()
                raise
        except BaseException:
            os.close(events)
            raise
        finally:
            os.close(child_end)
        self._has_answered = False
        self._listener = threading.Thread(
            target=self._listen, args=(model, os.fdopen(events, "rb")), daemon=True
        )
        self._listener.start()
        return model

    def _listen(self, model: LlamaCpp, events: IO[bytes]) -> None:
        """Deliver what the child writes until it ends, and end what is left."""
        with events:
            for line in events:
                if line.endswith(b"\n"):  # else it died while writing
                    for number, values in json.loads(line):
                        self._deliver(number, event_of(values))
        reason, error = ("cancelled", "") if self._closed else ("failed", model.crash().message)
        for number, job in list(self._jobs.items()):
            self._deliver(number, Ended(reason, num_prompt=job.num_prompt, error=error))

    def _deliver(self, number: int, event: Event) -> None:
        if isinstance(event, Ended):
            job = self._jobs.pop(number, None)
            self._has_answered |= event.reason in ("stop", "length", "context")
        else:
            job = self._jobs.get(number)
        if job is None:
            return
        try:
            job.deliver(event)
        except RuntimeError:  # its event loop is gone, so nobody waits for the rest
            self.cancel(number)
            self._jobs.pop(number, None)
