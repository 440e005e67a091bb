"""A model that is evaluated: how likely it finds texts, and what it answers. Ours or a GGUF file."""

from __future__ import annotations

import contextlib
import math
import queue
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch

from mule import progress
from mule.adapters.source import Source, load_source
from mule.batch import IGNORE, Batch
from mule.errors import ModelError, UserError
from mule.generate.batching import BatchEngine
from mule.generate.llamacpp import LlamaCpp
from mule.generate.llamacpp_batching import LlamaCppEngine
from mule.generate.request import Ended, Engine, Event, Message, Request
from mule.generate.sampler import Sampling
from mule.models.decoder import Decoder
from mule.models.eager import uncompiled
from mule.tokenizer import Tokenizer

CONTEXT_TOKENS = 2048  # a hub model's whole context would not fit in memory
_ROWS = 8  # answers computed together
_BATCH_TOKENS = 4096  # of texts whose likelihood is computed together


@dataclass(frozen=True)
class Pair:
    """A text and what may follow it: what is asked is how likely that is."""

    context: str
    continuation: str
    messages: tuple[Message, ...] | None = None  # asked as a chat, in place of the context


class Question(Protocol):
    """What is asked, in a chat and as plain text."""

    @property
    def messages(self) -> tuple[Message, ...]: ...
    @property
    def text(self) -> str: ...


@dataclass(frozen=True)
class Answer:
    """What a model answered, and why it ended there; `too long`: the question does not fit."""

    text: str
    ended: str
    num_tokens: int = 0


class Encoder(Protocol):
    """Text and chats as ids, with what the model expects before them."""

    def encode(self, text: str) -> list[int]: ...
    def encode_chat(self, messages: Sequence[Message]) -> list[int]: ...


class Subject:
    """A named model; its weights are read when they are first needed, and once."""

    def __init__(self, name: str, source: Source, *, knows_chats: bool = True) -> None:
        self.name, self.source, self._knows_chats = name, source, knows_chats

    @cached_property
    def loaded(self) -> tuple[Decoder, Tokenizer]:
        """Our decoder and its tokenizer; a GGUF file has neither."""
        with progress.task(f"Loading {self.name}"):
            return load_source(self.source)

    def release(self) -> None:
        """Let go of the weights: the next model needs their memory."""
        self.__dict__.pop("loaded", None)

    # ------------------------------------------------------------ likelihoods

    def log_likelihoods(self, pairs: Sequence[Pair], *, bar: progress.Task) -> list[float]:
        """The natural logarithm of the probability of each continuation behind its context."""
        if self.source.gguf_file is not None:
            with LlamaCpp(self.source.gguf_file, n_ctx=None) as runtime:
                spoken = _Spoken(runtime)
                found = []
                for pair in pairs:
                    ids, start = _ids_of(spoken, pair, runtime.n_ctx)
                    found.append(sum(runtime.log_probabilities(ids, start)))
                    bar.advance()
            return _numbers(found, self.name)
        model, tokenizer = self.loaded
        limit = min(model.config.max_position_embeddings, CONTEXT_TOKENS)
        spoken = _Own(tokenizer)
        texts = [_ids_of(spoken, pair, limit) for pair in pairs]
        return _numbers(_log_likelihoods(model, texts, bar), self.name)

    # ------------------------------------------------------------ answers

    def answers(
        self,
        questions: Sequence[Question],
        *,
        chat: bool | None,
        max_tokens: int,
        stop: Sequence[str],
        bar: progress.Task,
    ) -> list[Answer]:
        """The greedy answers, in order; `chat` None asks as the model is used to."""
        if self.source.gguf_file is not None:
            with contextlib.closing(
                LlamaCppEngine(self.source.gguf_file, max_rows=_ROWS)
            ) as engine:
                prompts = _prompts(engine, questions, engine.chat if chat is None else chat)
                return _answered(engine, prompts, max_tokens, stop, bar)
        model, tokenizer = self.loaded
        knows = self._knows_chats and tokenizer.chat_template is not None
        prompts = _prompts(_Own(tokenizer), questions, knows if chat is None else chat)
        needed = max(map(len, prompts)) + max_tokens + 1  # a longer cache would only take memory
        limit = min(model.config.max_position_embeddings, CONTEXT_TOKENS)
        rows = min(_ROWS, len(prompts))
        own = BatchEngine(model, tokenizer, max_rows=rows, context_tokens=min(limit, needed))
        with contextlib.closing(own):
            return _answered(own, prompts, max_tokens, stop, bar)


# ---------------------------------------------------------------- inside


def _prompts(encoder: Encoder, questions: Sequence[Question], in_chat: bool) -> list[list[int]]:
    if in_chat:
        return [encoder.encode_chat(question.messages) for question in questions]
    return [encoder.encode(question.text) for question in questions]


def _answered(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    stop: Sequence[str],
    bar: progress.Task,
) -> list[Answer]:
    """Questions that do not fit have no answer."""
    inbox: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()
    found: list[Answer | None] = [None] * len(prompts)
    texts = ["" for _ in prompts]
    waited = 0
    for number, ids in enumerate(prompts):
        room = engine.context_tokens - len(ids)
        if room < 2:
            found[number] = Answer("", "too long")
            bar.advance()
            continue
        request = Request(tuple(ids), min(max_tokens, room - 1), Sampling(), stop=tuple(stop))
        engine.submit(request, lambda event, number=number: inbox.put((number, event)))
        waited += 1
    while waited:
        number, event = inbox.get()
        texts[number] += event.text
        if isinstance(event, Ended):
            if event.reason == "failed":
                raise ModelError(event.error, "look at the model with `mule verify`")
            found[number] = Answer(texts[number], event.reason, event.num_tokens)
            waited -= 1
            bar.advance()
    return [answer for answer in found if answer is not None]


class _Own:
    """Our tokenizer as an Encoder."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        bos = self._tokenizer.bos_id
        return [*([] if bos is None else [bos]), *self._tokenizer.encode(text)]

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        return self._tokenizer.encode_prompt(list(messages))


class _Spoken:
    """A GGUF file's tokenizer as an Encoder."""

    def __init__(self, runtime: LlamaCpp) -> None:
        self._runtime = runtime

    def encode(self, text: str) -> list[int]:
        before = self._runtime.tokenize_all([""], special=True, add_bos=True)[0]
        return before + self._runtime.tokenize(text, special=False)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        return self._runtime.encode_prompt(messages)


def _ids_of(encoder: Encoder, pair: Pair, limit: int) -> tuple[list[int], int]:
    """The ids of both parts together, and where the continuation begins among them.

    Text is encoded as one: where a token spans the seam, the continuation begins with it.
    Raises UserError where it does not fit into the context.
    """
    if pair.messages is not None:
        before = encoder.encode_chat(pair.messages)
        empty = len(encoder.encode(""))
        ids = before + encoder.encode(pair.continuation)[empty:]
        start = len(before)
    else:
        before = encoder.encode(pair.context.rstrip())  # spaces belong to what follows
        ids = encoder.encode(pair.context + pair.continuation)
        pairs = enumerate(zip(before, ids))
        start = next((n for n, (a, b) in pairs if a != b), min(len(before), len(ids) - 1))
    if not 0 < start < len(ids) <= limit:
        raise UserError(
            f"a question of {len(ids)} tokens with its answer; the context holds {limit}"
            if len(ids) > limit
            else "a question without a token, so no answer can be likely after it",
            "shorten it" if len(ids) > limit else "write a question before the answers",
        )
    return ids, start


def _numbers(values: list[float], name: str) -> list[float]:
    """The values, unless one is none."""
    if not all(map(math.isfinite, values)):
        raise ModelError(
            f"{name} gives probabilities that are no numbers",
            "its weights are damaged or overflow: try `mule verify`, or an earlier checkpoint",
        )
    return values


@torch.no_grad()
def _log_likelihoods(
    model: Decoder, texts: Sequence[tuple[list[int], int]], bar: progress.Task
) -> list[float]:
    """Texts of like length together, so that little is padded."""
    found = [0.0] * len(texts)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i][0]))
    while order:
        longest = len(texts[order[-1]][0])
        chosen = [order.pop() for _ in range(min(len(order), max(1, _BATCH_TOKENS // longest)))]
        batch, rows = _padded([texts[i] for i in chosen])
        with uncompiled():
            each = model.nll_of_targets(batch.to(model.device)).double().cpu()
        sums = torch.zeros(len(chosen), dtype=torch.float64).index_add_(0, rows, each)
        for i, nll in zip(chosen, sums.tolist()):
            found[i] = -nll
        bar.advance(len(chosen))
    return found


def _padded(texts: Sequence[tuple[list[int], int]]) -> tuple[Batch, torch.Tensor]:
    """The texts as rows whose targets are the continuations, and the row of each target (N,)."""
    shape = (len(texts), max(len(ids) for ids, _ in texts) - 1)
    ids = torch.zeros(shape, dtype=torch.int64)
    targets = torch.full(shape, IGNORE, dtype=torch.int64)
    for row, (tokens, start) in enumerate(texts):
        found = torch.tensor(tokens)
        ids[row, : len(tokens) - 1] = found[:-1]
        targets[row, start - 1 : len(tokens) - 1] = found[start:]
    positions = torch.arange(shape[1]).expand(shape)
    batch = Batch(ids, targets, positions, torch.ones_like(ids), isolated=False)
    return batch, (targets != IGNORE).nonzero()[:, 0]
