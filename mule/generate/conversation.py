"""One conversation with one model, or the same one with several beside each other."""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from mule.errors import ModelError, UserError
from mule.generate.request import Deliver, Ended, Event, Job, Message, Reason, Request
from mule.generate.sampler import Sampling

_SHOWN_BEFORE = 40  # characters of the common text that a difference is shown with
_SHOWN_AFTER = 30  # and of each reply from there on


class Talker(Protocol):
    """What a conversation needs of an Engine of mule.generate.request."""

    context_tokens: int
    chat: bool

    def encode(self, text: str) -> list[int]: ...
    def encode_chat(self, messages: Sequence[Message]) -> list[int]: ...
    def submit(self, request: Request, deliver: Deliver) -> Job: ...
    def close(self) -> None: ...


@dataclass
class Speaker:
    """A model in the conversation, by the name it is shown under, with its own history."""

    name: str
    engine: Talker
    history: list[Message] = field(default_factory=list)


@dataclass
class Reply:
    """What one model says to a question; complete once `stream` was read to its end."""

    speaker: Speaker
    request: Request
    text: str = ""
    num_tokens: int = 0
    first_s: float = 0.0  # from the request to the first token
    duration_s: float = 0.0
    reason: Reason | None = None

    @property
    def tokens_per_second(self) -> float:
        """Of the whole reply, the reading of the prompt included."""
        return self.num_tokens / self.duration_s if self.duration_s else 0.0

    def stream(self) -> Iterator[str]:
        """The text as it is written. Raises ModelError when the model fails."""
        started_at = time.perf_counter()
        for event in _events(self.speaker.engine, self.request):
            now = time.perf_counter() - started_at
            if not isinstance(event, Ended) and not self.num_tokens:
                self.first_s = now
            if isinstance(event, Ended):
                self.reason, self.duration_s, self.num_tokens = event.reason, now, event.num_tokens
                if event.reason == "failed":
                    raise ModelError(event.error, "look at the file with `mule verify`")
            else:
                self.num_tokens += 1
            self.text += event.text
            if event.text:
                yield event.text

    def as_dict(self) -> dict[str, Any]:
        """The reply with its figures, as JSON values."""
        return {
            "model": self.speaker.name,
            "text": self.text,
            "tokens": self.num_tokens,
            "tokens_per_second": self.tokens_per_second,
            "first_token_seconds": self.first_s,
            "ended": self.reason,
        }


@dataclass
class Conversation:
    """What was said to each model, and the settings of the next reply."""

    speakers: list[Speaker]
    sampling: Sampling
    max_tokens: int = 256
    system: str | None = None

    def ask(self, text: str) -> list[Reply]:
        """The replies to `text`, one a model, still to be streamed; `keep` them afterwards.

        Raises UserError when it does not fit into a model's context.
        """
        return [self._reply_of(speaker, text) for speaker in self.speakers]

    def keep(self, text: str, replies: Sequence[Reply]) -> None:
        """Take a question and its complete replies into the histories."""
        for reply in replies:
            if reply.speaker.engine.chat:
                reply.speaker.history += [
                    {"role": "user", "content": text},
                    {"role": "assistant", "content": reply.text},
                ]

    def take_back(self) -> str:
        """Forget the last question and its replies; the next seed is another. The question.

        Raises UserError when nothing was asked.
        """
        asked = [speaker for speaker in self.speakers if speaker.history]
        if not asked:
            raise UserError("there is nothing to retry", "ask something first")
        question = asked[0].history[-2]["content"]
        for speaker in asked:
            del speaker.history[-2:]
        self.sampling = dataclasses.replace(self.sampling, seed=self.sampling.seed + 1)
        return question

    @contextlib.contextmanager
    def restoring(self) -> Iterator[None]:
        """The histories become what they were when the block does not end well."""
        before = [list(speaker.history) for speaker in self.speakers]
        try:
            yield
        except BaseException:
            for speaker, history in zip(self.speakers, before, strict=True):
                speaker.history[:] = history
            raise

    def reset(self) -> None:
        """Forget what was said; the system prompt stays."""
        for speaker in self.speakers:
            speaker.history.clear()

    def rows(self) -> list[dict[str, Any]]:
        """The conversation as rows of training data, one a model; equal ones once.

        Raises UserError when nothing was said, or a reply is empty.
        """
        before = self._before()
        return training_rows([(s.name, [*before, *s.history]) for s in self.speakers])

    def close(self) -> None:
        for speaker in self.speakers:
            speaker.engine.close()

    def _before(self) -> list[Message]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def _reply_of(self, speaker: Speaker, text: str) -> Reply:
        engine = speaker.engine
        if engine.chat:
            question: Message = {"role": "user", "content": text}
            ids = engine.encode_chat([*self._before(), *speaker.history, question])
        else:
            ids = engine.encode(text)
        room = engine.context_tokens - len(ids)
        if room < 1:
            raise UserError(
                f"the conversation has {len(ids):,} tokens for {speaker.name}; its context holds "
                f"{engine.context_tokens:,}",
                "start afresh with /reset, or say it in fewer words",
            )
        return Reply(speaker, Request(tuple(ids), min(self.max_tokens, room), self.sampling))


def training_rows(said: Iterable[tuple[str, Sequence[Message]]]) -> list[dict[str, Any]]:
    """What was said with each model, by its name, as rows of training data; equal ones once.

    Raises UserError when nothing was said, or a reply is empty.
    """
    rows = []
    for name, messages in said:
        spoken = [message for message in messages if message["role"] != "system"]
        if not all(message["content"].strip() for message in spoken):
            raise UserError(
                f"{name} has answered with nothing, which is no training data",
                "ask again (/retry), or start afresh (/reset)",
            )
        row = {"messages": list(messages)}
        if spoken and row not in rows:
            rows.append(row)
    if not rows:
        raise UserError("there is no conversation to save", "ask something first (of a chat model)")
    return rows


def differences(replies: Sequence[Reply]) -> list[dict[str, Any]]:
    """How each reply differs from the first one: where, and what each says from there on."""
    first, found = replies[0], []
    for other in replies[1:]:
        place = _num_equal(first.text, other.text)
        same = first.text == other.text
        difference: dict[str, Any] = {"model": other.speaker.name, "than": first.speaker.name}
        difference |= {"same": same, "from_character": None if same else place}
        if not same:
            difference["after"] = first.text[max(0, place - _SHOWN_BEFORE) : place]
            difference["there"] = first.text[place : place + _SHOWN_AFTER]
            difference["here"] = other.text[place : place + _SHOWN_AFTER]
        found.append(difference)
    return found


def _num_equal(one: str, other: str) -> int:
    pairs = zip(one, other)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _events(engine: Talker, request: Request) -> Iterator[Event]:
    """What an engine delivers for a request; leaving the loop cancels it."""
    inbox: queue.SimpleQueue[Event] = queue.SimpleQueue()
    job = engine.submit(request, inbox.put)
    try:
        while True:
            event = inbox.get()
            yield event
            if isinstance(event, Ended):
                return
    finally:
        job.cancel()
