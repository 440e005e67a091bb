"""The engine that answers many requests at once with our decoder.

Continuous batching: every step gives each running answer its next token and computes a piece of the
prompts that wait, so that requests join and leave between steps. Source: Yu et al. 2022 (Orca).
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from mule import fsio, machine, progress
from mule.errors import ModelError, MuleError, UserError
from mule.generate.answer import AnswerText
from mule.generate.constrain import SchemaCompiler
from mule.generate.forward import Forward, ModuleForward, Part
from mule.generate.native.build import library
from mule.generate.native.decoder import NativeForward, can_be_native
from mule.generate.request import Deliver, Ended, Event, Message, Request
from mule.generate.sampler import Drawn, RowSampler
from mule.generate.slots import Slot, Slots, common_length
from mule.models.cost import kv_bytes_per_token, state_bytes
from mule.models.decoder import Decoder
from mule.models.folder import read_config
from mule.models.loadable import CONFIG
from mule.models.rope import changes_at
from mule.tokenizer import StreamDecoder, Tokenizer

_CACHE_SHARE = 0.5  # of the free memory: the most that a context chosen here may come to take
_WORTH_WAITING = 64  # tokens that another prompt is about to compute for this one too


def open_forward(model: Decoder, num_slots: int, context_tokens: int) -> Forward:
    """The fastest way to compute this model here."""
    kind = NativeForward if can_be_native(model) else ModuleForward
    return kind(model, num_slots, context_tokens)


def serving_dtype(folder: Path, *, adapted: bool) -> torch.dtype:
    """The precision to load a model folder in for an engine on the processor.

    bf16 where the processor multiplies it in hardware; and where the weights are stored in it and our
    own C++ reads them, computing in fp32, which it does for models without an adapter (`adapted`),
    experts or state-space layers.
    """
    raw = fsio.read_json(folder / CONFIG)
    stored = raw.get("dtype") or raw.get("torch_dtype")
    reads_bf16 = stored == "bfloat16" and not adapted and library() is not None
    if reads_bf16:
        config = read_config(folder)
        reads_bf16 = config.moe is None and config.mamba is None
    return torch.bfloat16 if machine.has_fast_bf16() or reads_bf16 else torch.float32


@dataclass(eq=False)
class _Row:
    """A request and how far it is; `pending` are the tokens that its slot lacks."""

    engine: BatchEngine
    request: Request
    deliver: Deliver
    sampler: RowSampler
    answer: AnswerText
    slot: Slot | None = None
    pending: list[int] = field(default_factory=list)
    is_cancelled: bool = False

    def cancel(self) -> None:
        """Stop working on it with the next step."""
        self.is_cancelled = True
        self.engine.wake()

    @property
    def is_prefilling(self) -> bool:
        return self.slot is not None and len(self.pending) > 1


class BatchEngine:
    """An Engine (mule.generate.request) for a decoder of ours; see docs/serve.md.

    `max_rows` requests are computed together, each in a slot of `context_tokens`; the others wait
    in the order of their arrival. Answers do not depend on what is computed beside them.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        *,
        chat: bool = True,
        max_rows: int = 8,
        context_tokens: int | None = None,
    ) -> None:
        self.context_tokens = _context(model, max_rows, context_tokens)
        self.max_rows, self.chat = max_rows, chat
        self.vocab_size = tokenizer.vocab_size
        self.cache_bytes_per_token = _bytes_per_token(model)
        self._tokenizer, self._model_vocab_size = tokenizer, model.config.vocab_size
        self._long_text = changes_at(model.config)
        self._forward = open_forward(model, max_rows, self.context_tokens)
        self._slots = Slots(max_rows, whole=bool(model.config.mamba_layers))
        self._rows: list[_Row] = []  # in the order of their arrival
        self._waiting: deque[_Row] = deque()
        self._changed = threading.Condition()  # guards _waiting, _is_closed and the wish to look
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="mule-engine", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------ what callers use

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, with what the model expects before it."""
        bos = self._tokenizer.bos_id
        return [*([] if bos is None else [bos]), *self._tokenizer.encode(text)]

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a chat, ready to be answered."""
        return self._tokenizer.encode_prompt(list(messages))

    def piece(self, token: int) -> bytes:
        """The bytes a token stands for, of a special token its name."""
        return self._tokenizer.piece(token)

    def submit(self, request: Request, deliver: Deliver) -> _Row:
        """Answer it as soon as there is room. Raises UserError if it can never be answered."""
        self._check(request)
        stop_ids = request.stop_ids
        answer = AnswerText(
            request,
            StreamDecoder(self._tokenizer),
            stop_ids=frozenset(self._tokenizer.stop_ids) if stop_ids is None else stop_ids,
            context_tokens=self.context_tokens,
        )
        constraint = None if request.schema is None else self._schemas.compile(request.schema)
        sampler = RowSampler(request, self.vocab_size, constraint)
        row = _Row(self, request, deliver, sampler, answer, pending=list(request.ids))
        with self._changed:
            if self._is_closed:
                raise UserError("the engine is closed", "start it again")
            self._waiting.append(row)
            self._changed.notify()
        return row

    def close(self) -> None:
        """End; what is still worked on is cancelled."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def wake(self) -> None:
        """Look at the requests again."""
        with self._changed:
            self._changed.notify()

    @cached_property
    def _schemas(self) -> SchemaCompiler:
        return SchemaCompiler.of_tokenizer(self._tokenizer)

    def _check(self, request: Request) -> None:
        if not request.ids:
            raise UserError("the prompt is empty", "give at least one word")
        if (num_ids := len(request.ids)) >= self.context_tokens:
            raise UserError(
                f"the prompt has {num_ids} tokens; the context holds {self.context_tokens}",
                f"shorten it to at most {self.context_tokens - 1} tokens, or start a new conversation",
            )
        if request.max_tokens < 1:
            raise UserError(
                f"max_tokens is {request.max_tokens}; an answer has at least 1",
                "set max_tokens to 1",
            )
        outside = [i for i in request.ids if not 0 <= i < self._model_vocab_size]
        if outside:
            raise UserError(
                f"token id {outside[0]} is not in the model, which has {self._model_vocab_size:,}",
                "encode the prompt with the model's own tokenizer",
            )

    # ------------------------------------------------------------ the worker

    def _work(self) -> None:
        while self._admit():
            self._drop_cancelled()
            parts = self._parts()
            if not parts:
                continue
            try:
                logits = self._forward.extend([part for _, part in parts])
            except Exception as error:  # whatever it is, the next requests may be well
                for row, _ in parts:
                    self._end(row, row.answer.end("failed", _said(error)), spoilt=True)
                continue
            self._take(parts, logits)
        for row in [*self._rows, *self._waiting]:
            self._end(row, row.answer.end("cancelled"))

    def _admit(self) -> bool:
        """Wait for work and let waiting requests in; False once the engine is closed."""
        with self._changed:
            while not (self._waiting or self._rows or self._is_closed):
                self._changed.wait()
            for row in [row for row in self._waiting if row.is_cancelled]:
                self._waiting.remove(row)
                self._rows.append(row)  # to be ended with the others
            while self._waiting and len(self._rows) < self.max_rows:
                self._rows.append(self._waiting.popleft())
            return not self._is_closed

    def _drop_cancelled(self) -> None:
        for row in [row for row in self._rows if row.is_cancelled]:
            self._end(row, row.answer.end("cancelled"))

    def _parts(self) -> list[tuple[_Row, Part]]:
        """What the next step computes: a token of every answer, and pieces of prompts in turn."""
        is_answering = any(row.slot is not None and len(row.pending) == 1 for row in self._rows)
        forward = self._forward
        room = forward.chunk_tokens if is_answering else forward.idle_chunk_tokens
        parts = []
        for row in self._rows:
            if row.slot is None:
                if not room or self._should_wait(row):
                    continue
                self._begin(row)
            assert row.slot is not None
            num_pending = len(row.pending)
            count = min(num_pending, room) if num_pending > 1 else 1
            if not count:
                continue
            room -= count if num_pending > 1 else 0
            start = len(row.slot.ids)
            part = Part(
                row.slot.index,
                start,
                row.pending[:count],
                start + num_pending,
                count == num_pending,
            )
            parts.append((row, part))
        return parts

    def _should_wait(self, row: _Row) -> bool:
        """Whether a prompt being computed is about to give this one much of its beginning."""
        if self._slots.whole:
            return False
        ids = row.request.ids
        coming = max(
            (common_length(r.request.ids, ids) for r in self._rows if r.is_prefilling), default=0
        )
        known = self._slots.known(ids, is_long=self._is_long(len(ids)))
        return min(coming, len(ids) - 1) - known >= _WORTH_WAITING

    def _begin(self, row: _Row) -> None:
        ids = row.request.ids
        slot, source, num_known = self._slots.claim(ids, is_long=self._is_long(len(ids)))
        if source is not slot:
            self._forward.copy(source.index, slot.index, num_known)
        row.slot, row.answer.num_cached = slot, num_known
        row.pending = list(ids[num_known:])

    def _is_long(self, num_tokens: int) -> bool:
        return self._long_text is not None and num_tokens > self._long_text

    def _take(self, parts: Sequence[tuple[_Row, Part]], logits: torch.Tensor) -> None:
        """Note what was computed, draw the next tokens and deliver them."""
        for row, part in parts:
            assert row.slot is not None
            row.slot.ids += part.ids
            del row.pending[: len(part.ids)]
        drawing = [row for row, part in parts if part.wanted]
        if not drawing:
            return
        scores = logits[:, : self.vocab_size].numpy()
        best = scores.argmax(-1)
        for row, one, token in zip(drawing, scores, best.tolist(), strict=True):
            try:
                if row.sampler.takes_best:
                    row.sampler.accept(token, float(one[token]))
                    drawn = Drawn(token)
                else:
                    drawn = row.sampler.draw(one)
                events = row.answer.push(drawn, finished=row.sampler.finished)
            except Exception as error:
                self._end(row, row.answer.end("failed", _said(error)), spoilt=True)
                continue
            self._deliver(row, events, drawn.token)

    def _deliver(self, row: _Row, events: Sequence[Event], token: int) -> None:
        for event in events:
            if isinstance(event, Ended):
                return self._end(row, event)
            try:
                row.deliver(event)
            except Exception:  # nobody listens any more
                return self._end(row, row.answer.end("cancelled"))
        slot = row.slot
        assert slot is not None
        row.pending = [token]
        if not slot.is_long and self._is_long(len(slot.ids) + 1):
            row.pending = [*slot.ids, token]  # all positions turn otherwise from now on
            slot.ids, slot.is_long = [], True

    def _end(self, row: _Row, event: Ended, *, spoilt: bool = False) -> None:
        if row in self._rows:
            self._rows.remove(row)
        if row.slot is not None:
            if spoilt:
                self._forward.clear(row.slot.index)
            self._slots.release(row.slot, spoilt=spoilt)
        with contextlib.suppress(Exception):  # it is the listener's
            row.deliver(event)


def _said(error: Exception) -> str:
    return error.message if isinstance(error, MuleError) else f"{type(error).__name__}: {error}"


def _bytes_per_token(model: Decoder) -> int:
    return kv_bytes_per_token(model.config, model.lm_head.weight.element_size())


def _context(model: Decoder, max_rows: int, wanted: int | None) -> int:
    """Tokens of a slot: what is asked for, or the model's context as far as memory allows."""
    limit = model.config.max_position_embeddings
    if wanted is not None:
        if not 2 <= wanted <= limit:
            raise UserError(
                f"a context of {wanted} tokens was asked for; the model's holds {limit}",
                f"ask for 2 to {limit} tokens",
            )
        return wanted
    if model.device.type != "cpu":
        return limit
    each = _bytes_per_token(model) * max_rows
    states = state_bytes(model.config, model.lm_head.weight.element_size()) * max_rows
    room = int(machine.available_bytes() * _CACHE_SHARE) - states
    fitting = room // each if each else limit
    if fitting >= limit:
        return limit
    if fitting < 2:
        raise ModelError("there is no memory for a cache", "serve fewer rows, or a smaller model")
    progress.note(
        f"the context is {fitting:,} tokens of the model's {limit:,}: {max_rows} answers at once "
        f"take {each:,} bytes a token, and half of the free memory is theirs; fewer rows give more"
    )
    return fitting
