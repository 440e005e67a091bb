"""From the token ids of one answer to what its reader gets: text, and why it ended."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Set
from typing import Protocol

from mule.errors import UserError
from mule.generate.request import Ended, Event, Reason, Request, Token
from mule.generate.sampler import Drawn

MAX_STOPS, MAX_STOP_CHARACTERS = 16, 500


class TextDecoder(Protocol):
    """Text from token ids as they arrive; mule.tokenizer's StreamDecoder is one."""

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes, often ""."""
        ...

    def flush(self) -> str:
        """What is still held back."""
        ...


class PieceDecoder:
    """A TextDecoder from the bytes of each token; half a character is held back."""

    def __init__(self, piece: Callable[[int], bytes]) -> None:
        self._piece = piece
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        return self._utf8.decode(self._piece(token_id))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class AnswerText:
    """The events of one answer: `push` each drawn token until an Ended comes.

    Every token but a stop token gives one Token, and is counted. A stop text ends the answer as
    soon as it is complete, and is cut off where it begins; of two that are complete at the same
    character the longer counts. What may still become one is held back.

    `stop_ids`: those that count: the request's, or else the model's own.
    `context_tokens`: of prompt and answer together.
    """

    def __init__(
        self,
        request: Request,
        decoder: TextDecoder,
        *,
        stop_ids: Set[int],
        context_tokens: int,
    ) -> None:
        _check_stops(request.stop)
        self._request, self._decoder, self._stop_ids = request, decoder, stop_ids
        self._room = context_tokens - len(request.ids)
        self.num_cached = 0  # tokens of the prompt that were known; the engine sets it
        self._num_tokens = 0
        self._held = ""  # may be the beginning of a stop text
        self._longest = max(map(len, request.stop), default=0)

    def push(self, drawn: Drawn, *, finished: bool = False) -> list[Event]:
        """What a drawn token gives its reader; an Ended, if there is one, comes last.

        `finished`: the answer's constraint is met, and nothing can follow.
        """
        if drawn.token in self._stop_ids:
            return [self.end("stop")]
        self._num_tokens += 1
        text, stopped = self._until_stop(self._decoder.push(drawn.token))
        token = Token(drawn.token, text, drawn.logprob, drawn.top)
        if stopped:
            return [token, self._ended("stop", "")]
        if finished:
            return [token, self.end("stop")]
        if self._num_tokens >= self._request.max_tokens:
            return [token, self.end("length")]
        if self._num_tokens > self._room:  # the last token is drawn from a full context
            return [token, self.end("context")]
        return [token]

    def end(self, reason: Reason, error: str = "") -> Ended:
        """The end of the answer, with the text that was held back."""
        text, stopped = self._until_stop(self._decoder.flush())
        if not stopped:
            text, self._held = text + self._held, ""
        return self._ended(reason, text, error)

    def _ended(self, reason: Reason, text: str, error: str = "") -> Ended:
        counts = (len(self._request.ids), self.num_cached, self._num_tokens)
        return Ended(reason, text, *counts, error=error)

    def _until_stop(self, new: str) -> tuple[str, bool]:
        """What can be shown now that `new` came, and whether a stop text is complete."""
        text, self._held = self._held + new, ""
        found = [
            (text.find(stop) + len(stop), -len(stop)) for stop in self._request.stop if stop in text
        ]
        if found:
            end, minus_length = min(found)
            return text[: end + minus_length], True
        for length in range(min(len(text), self._longest - 1), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._request.stop):
                self._held = text[-length:]
                return text[:-length], False
        return text, False


def _check_stops(stops: tuple[str, ...]) -> None:
    if len(stops) > MAX_STOPS:
        raise UserError(
            f"there are {len(stops)} stop texts; the most is {MAX_STOPS}", "give fewer stop texts"
        )
    if "" in stops:
        raise UserError(
            "a stop text is empty, so the answer would end before it begins",
            "leave the empty stop text out",
        )
    if (longest := max(map(len, stops), default=0)) > MAX_STOP_CHARACTERS:
        raise UserError(
            f"a stop text has {longest} characters; the most is {MAX_STOP_CHARACTERS}",
            "give its beginning only",
        )
