"""The answers as OpenAI writes them: whole, or piece by piece as server-sent events."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from mule.generate.request import Ended, Token
from mule.serve.desk import Answers
from mule.serve.problem import Problem

Piece = Callable[[int], bytes]
_REASONS = {"stop": "stop", "length": "length", "context": "length"}


class Form(Protocol):
    """How one route writes its answers."""

    head: dict[str, Any]  # id, created, model
    kind: str
    chunk_kind: str

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """A whole answer."""
        ...

    def first(self, index: int) -> dict[str, Any] | None:
        """What a stream begins with."""
        ...

    def delta(
        self, index: int, text: str, tokens: list[Token], reason: str | None
    ) -> dict[str, Any]:
        """What is new of an answer."""
        ...


@dataclass
class Answer:
    """What came of one request so far."""

    text: list[str] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    ended: Ended | None = None

    @property
    def reason(self) -> str:
        assert self.ended is not None
        return _REASONS[self.ended.reason]


async def whole(answers: Answers, form: Form, n: int, num_answers: int) -> dict[str, Any]:
    """The complete answers and what they used. Problem 500 or 503 when one came to nothing."""
    found = [Answer() for _ in range(num_answers)]
    async for index, event in answers:
        found[index].text.append(event.text)
        if isinstance(event, Token):
            found[index].tokens.append(event)
        else:
            _check(event)
            found[index].ended = event
    choices = [form.choice(index, answer) for index, answer in enumerate(found)]
    ended = [answer.ended for answer in found if answer.ended is not None]
    return {**form.head, "object": form.kind, "choices": choices, "usage": usage(ended, n)}


async def stream(
    answers: Answers, form: Form, n: int, num_answers: int, *, include_usage: bool
) -> AsyncIterator[bytes]:
    """Server-sent events: what is new of each answer, what was used, and [DONE].

    An answer that comes to nothing ends the stream with an error in place of a choice.
    """
    nothing = {"usage": None} if include_usage else {}
    head = {**form.head, "object": form.chunk_kind}
    for index in range(num_answers):
        if (first := form.first(index)) is not None:
            yield _event({**head, "choices": [first], **nothing})
    ended: dict[int, Ended] = {}
    async for index, event in answers:
        if isinstance(event, Token):
            if event.text or event.logprob is not None:
                delta = form.delta(index, event.text, [event], None)
                yield _event({**head, "choices": [delta], **nothing})
            continue
        try:
            _check(event)
        except Problem as problem:
            yield _event(problem.as_dict())
            return
        ended[index] = event
        delta = form.delta(index, event.text, [], _REASONS[event.reason])
        yield _event({**head, "choices": [delta], **nothing})
    if include_usage:
        used = usage([ended[index] for index in sorted(ended)], n)
        yield _event({**head, "choices": [], "usage": used})
    yield b"data: [DONE]\n\n"


def usage(ended: list[Ended], n: int) -> dict[str, Any]:
    """Tokens of the prompts, each counted once for its n answers, and of the answers."""
    num_prompt = sum(each.num_prompt for each in ended[::n])
    num_tokens = sum(each.num_tokens for each in ended)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_tokens,
        "total_tokens": num_prompt + num_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(each.num_cached for each in ended[::n])},
    }


def _check(ended: Ended) -> None:
    if ended.reason == "cancelled":
        raise Problem(503, "the server is closing; this answer was cut short", code="closing")
    if ended.reason == "failed":
        raise Problem(500, f"the model failed: {ended.error}", code="engine_failed")


def _event(value: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


def _finite(logprob: float | None) -> float | None:
    """JSON has no -inf; OpenAI writes -9999 for it."""
    return None if logprob is None else max(logprob, -9999.0)


def _head(prefix: str, model: str) -> dict[str, Any]:
    return {
        "id": f"{prefix}-{secrets.token_hex(12)}",
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": None,
    }


# ---------------------------------------------------------------- chat


class ChatForm:
    """/v1/chat/completions."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def __init__(self, model: str, piece: Piece, *, logprobs: bool) -> None:
        self.head = _head("chatcmpl", model)
        self._piece, self._logprobs = piece, logprobs

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        message = {"role": "assistant", "content": "".join(answer.text), "refusal": None}
        logprobs = self._listed(answer.tokens)
        return {
            "index": index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": answer.reason,
        }

    def first(self, index: int) -> dict[str, Any] | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def delta(
        self, index: int, text: str, tokens: list[Token], reason: str | None
    ) -> dict[str, Any]:
        new = {"content": text} if text or reason is None else {}
        logprobs = self._listed(tokens) if tokens else None
        return {"index": index, "delta": new, "logprobs": logprobs, "finish_reason": reason}

    def _listed(self, tokens: list[Token]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        content = [
            self._entry(token.id, token.logprob)
            | {"top_logprobs": [self._entry(i, logprob) for i, logprob in token.top]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        piece = self._piece(token)
        text = piece.decode(errors="replace")
        return {"token": text, "logprob": _finite(logprob), "bytes": list(piece)}


# ---------------------------------------------------------------- plain text


class TextForm:
    """/v1/completions."""

    kind = chunk_kind = "text_completion"

    def __init__(self, model: str, piece: Piece, *, logprobs: bool) -> None:
        self.head = _head("cmpl", model)
        self._piece, self._logprobs = piece, logprobs
        self._offsets: dict[int, int] = {}  # where the next token of an answer begins

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        return self.delta(index, "".join(answer.text), answer.tokens, answer.reason)

    def first(self, index: int) -> dict[str, Any] | None:
        return None

    def delta(
        self, index: int, text: str, tokens: list[Token], reason: str | None
    ) -> dict[str, Any]:
        logprobs = self._listed(index, tokens) if tokens else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _listed(self, index: int, tokens: list[Token]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        texts = [self._text(token.id) for token in tokens]
        offsets = []
        for text in texts:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(text)
        return {
            "tokens": texts,
            "token_logprobs": [_finite(token.logprob) for token in tokens],
            "top_logprobs": [{self._text(i): _finite(p) for i, p in token.top} for token in tokens],
            "text_offset": offsets,
        }

    def _text(self, token: int) -> str:
        return self._piece(token).decode(errors="replace")
