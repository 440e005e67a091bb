"""What an engine is asked for, and what it gives back while it works.

Every engine that serves several callers at once speaks this: ours in torch and llama.cpp's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from mule.generate.sampler import Sampling

Message = dict[str, str]
Reason = Literal["stop", "length", "context", "cancelled", "failed"]


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it.

    `ids`: the prompt, with everything the model expects before it.
    `stop_ids`: None takes the model's own; `stop`: texts that end the answer, left out of it.
    `top_logprobs`: None gives no logprobs; n gives that of each token and of the n best.
    `schema`: a JSON schema, as JSON text, that the answer must follow.
    """

    ids: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    stop_ids: frozenset[int] | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    schema: str | None = None


@dataclass(frozen=True)
class Token:
    """One token of an answer. `text` is what may be shown now: whole characters, and nothing that
    may still become one of the request's stop texts. `logprob` is natural, of the model itself:
    before temperature and penalties; `top` holds (id, logprob) of the best, best first."""

    id: int
    text: str
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Ended:
    """The end of an answer: why, the last `text` to show, and what was counted.

    stop: a stop token or text; length: `max_tokens`; context: the model's context is full;
    cancelled: the caller left; failed: see `error`. `num_cached` tokens of the prompt were known
    from an earlier request.
    """

    reason: Reason
    text: str = ""
    num_prompt: int = 0
    num_cached: int = 0
    num_tokens: int = 0
    error: str = ""


Event = Token | Ended
Deliver = Callable[[Event], None]  # called from the engine's thread; must not block


class Job(Protocol):
    """A request that an engine took."""

    def cancel(self) -> None:
        """Stop working on it, soon; `Ended("cancelled")` is delivered unless it ended before."""
        ...


class Engine(Protocol):
    """A model that answers many requests at once."""

    context_tokens: int  # of one answer: prompt and continuation
    max_rows: int  # requests that are computed together; more wait
    vocab_size: int
    chat: bool  # False: a pretrained model, which continues text instead of answering

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, with what the model expects before it; no special token is read."""
        ...

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a chat, ready to be answered."""
        ...

    def piece(self, token: int) -> bytes:
        """The bytes a token stands for, of a special token its name."""
        ...

    def submit(self, request: Request, deliver: Deliver) -> Job:
        """Answer it as soon as there is room; `deliver` gets Tokens, then exactly one Ended.

        Raises UserError for a request that can never be answered (too long, a schema that cannot
        be compiled).
        """
        ...

    def close(self) -> None:
        """End; what is still worked on is cancelled."""
        ...
