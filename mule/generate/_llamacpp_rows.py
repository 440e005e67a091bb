"""Requests answered together by llama.cpp; only the child process imports this.

Each step is one llama batch: the next token of every answer, and parts of prompts that came in.
Requests join and leave between steps. What a prompt shares with a row of the cache, in use or kept
from an earlier request, is not computed again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy.typing as npt

from mule.errors import MuleError
from mule.generate._libllama import LibraryError
from mule.generate._llamacpp_model import BATCH_TOKENS, Model, Part
from mule.generate.answer import AnswerText, PieceDecoder
from mule.generate.constrain import SchemaCompiler, SchemaConstraint
from mule.generate.request import Ended, Event, Request
from mule.generate.sampler import RowSampler

_PROMPT_TOKENS_BESIDE = 128  # of prompts in a step that others' answers wait for
_WORTH_WAITING = 64  # tokens that another prompt is about to compute for this one too


@dataclass(eq=False)
class Answering:
    """A request on its way: `fresh` holds the ids that are not in the cache yet."""

    number: int
    request: Request
    sampler: RowSampler
    text: AnswerText
    stop_ids: frozenset[int]
    fresh: list[int] = field(default_factory=list)


class Rows:
    """The rows of a model's cache, and the requests that use them.

    `context_tokens` limits one request, prompt and answer; `vocab_size` the tokens drawn.
    """

    def __init__(self, model: Model, *, context_tokens: int, vocab_size: int) -> None:
        self.model, self._context_tokens = model, context_tokens
        self._vocab_size = vocab_size
        self.stop_ids = frozenset(model.end_of_generation())
        self._waiting: deque[Answering] = deque()
        self._running: dict[int, Answering] = {}  # by row, in the order they came
        self._used_at = [0] * len(model.cached)  # the step of a row's last use
        self._num_steps = 0
        self.stop_id: int | None = None  # the stop token that ended the last answer

    @property
    def is_idle(self) -> bool:
        return not self._running and not self._waiting

    def prepare(self, number: int, request: Request) -> Answering:
        """A request checked and ready to `add`; safe to call from another thread.

        Raises UserError for stop texts, logprobs or a schema that cannot be.
        """
        stop_ids = self.stop_ids if request.stop_ids is None else request.stop_ids
        sampler = RowSampler(request, self._vocab_size, self._constraint_of(request))
        decoder = PieceDecoder(self._shown)
        limits = {"stop_ids": stop_ids, "context_tokens": self._context_tokens}
        return Answering(number, request, sampler, AnswerText(request, decoder, **limits), stop_ids)

    def _shown(self, token: int) -> bytes:
        """What a reader sees of a token: nothing of a control token."""
        return b"" if self.model.is_control(token) else self.model.piece(token)

    def _constraint_of(self, request: Request) -> SchemaConstraint | None:
        return None if request.schema is None else self._schemas.compile(request.schema)

    @cached_property
    def _schemas(self) -> SchemaCompiler:
        model, tokens = self.model, range(self._vocab_size)
        return SchemaCompiler(
            [model.piece(token) for token in tokens],
            special_ids={token for token in tokens if model.is_control(token)},
            stop_ids={token for token in self.stop_ids if token in tokens},
            encode=lambda text: model.tokenize(text, add_special=False, parse_special=False),
        )

    def add(self, job: Answering) -> None:
        self._waiting.append(job)

    def cancel(self, number: int) -> list[tuple[int, Event]]:
        """End a request that waits or runs; nothing when it is not there."""
        for job in [*self._waiting, *self._running.values()]:
            if job.number == number:
                return [self._leave(job, job.text.end("cancelled"))]
        return []

    def forget(self) -> None:
        """End everything silently, and empty the cache."""
        self._waiting.clear()
        self._running.clear()
        self.model.forget()

    def step(self) -> list[tuple[int, Event]]:
        """Compute one batch; the events it gives, each with the number of its request."""
        self._num_steps += 1
        while self._waiting and self._place(self._waiting[0]):
            self._waiting.popleft()
        work = self._share_out()
        if not work:
            return []
        try:
            logits = self.model.step([part for _, part in work])
        except LibraryError as error:
            failed = list(self._running.values())
            return [self._leave(job, job.text.end("failed", f"{error}")) for job in failed]
        events: list[tuple[int, Event]] = []
        ready = []
        for job, (_, ids, num_wanted) in work:
            del job.fresh[: len(ids)]
            if num_wanted:
                ready.append(job)
        for job, row in zip(ready, logits, strict=True):
            events += self._advance(job, row)
        return events

    def _advance(self, job: Answering, logits: npt.NDArray) -> list[tuple[int, Event]]:
        """Draw the next token of one answer."""
        try:
            drawn = job.sampler.draw(logits)
        except MuleError as error:
            return [self._leave(job, job.text.end("failed", error.message))]
        self.stop_id = drawn.token if drawn.token in job.stop_ids else None
        job.fresh.append(drawn.token)
        events = job.text.push(drawn, finished=job.sampler.finished)
        return [
            self._leave(job, event) if isinstance(event, Ended) else (job.number, event)
            for event in events
        ]

    def _leave(self, job: Answering, ended: Ended) -> tuple[int, Event]:
        if job in self._waiting:
            self._waiting.remove(job)
        for row, running in list(self._running.items()):
            if running is job:
                del self._running[row]
                self._used_at[row] = self._num_steps
        return job.number, ended

    # ------------------------------------------------------------ one step

    def _share_out(self) -> list[tuple[Answering, Part]]:
        """The next token of every answer, then prompts in the order they came."""
        rows = sorted(self._running, key=lambda row: len(self._running[row].fresh) > 1)
        num_single = sum(len(job.fresh) == 1 for job in self._running.values())
        room = BATCH_TOKENS - num_single
        if num_single:
            room = min(room, _PROMPT_TOKENS_BESIDE)
        work: list[tuple[Answering, Part]] = []
        for row in rows:
            job = self._running[row]
            if len(job.fresh) == 1:
                work.append((job, (row, job.fresh[:], 1)))
            elif ids := job.fresh[:room]:
                room -= len(ids)
                work.append((job, (row, ids, int(len(ids) == len(job.fresh)))))
        return work

    # ------------------------------------------------------------ rows of the cache

    def _place(self, job: Answering) -> bool:
        """Give a request a row, with what some row already knows of it; False when it must wait."""
        model, ids = self.model, job.request.ids
        idle = [row for row in range(len(self._used_at)) if row not in self._running]
        needed = sum(map(self._cells_of, (job, *self._running.values())))
        if not idle or needed > model.n_ctx:
            return False
        common = [_num_common(known, ids) for known in model.cached]
        if self._should_wait(ids, max(common)):
            return False
        best = max(range(len(common)), key=lambda row: (common[row], row in idle))
        if best in idle and 0 < len(model.cached[best]) <= 2 * common[best]:
            row = best
        else:
            row = min(idle, key=lambda row: self._used_at[row] if model.cached[row] else -1)
        idle.remove(row)
        self._drop_kept(sorted(idle, key=lambda row: (row == best, self._used_at[row])), needed)
        if row != best:
            model.cut(row, 0)
            if model.cached[best] and common[best] and not model.has_state:
                model.share(best, row, common[best])
        job.text.num_cached = model.cut(row, common[best])
        job.fresh = list(ids[job.text.num_cached :])
        self._running[row] = job
        return True

    def _should_wait(self, ids: Sequence[int], num_known: int) -> bool:
        """Whether a prompt being read is about to give this one much of its beginning."""
        reading = [job.request.ids for job in self._running.values() if len(job.fresh) > 1]
        coming = max((_num_common(other, ids) for other in reading), default=0)
        return not self.model.has_state and coming - num_known >= _WORTH_WAITING

    def _cells_of(self, job: Answering) -> int:
        request = job.request
        return min(len(request.ids) + request.max_tokens, self._context_tokens)

    def _drop_kept(self, kept: Sequence[int], needed: int) -> None:
        """Empty kept rows, the first ones first, until `needed` tokens fit beside the others."""
        for row in kept:
            if needed + sum(len(self.model.cached[row]) for row in kept) <= self.model.n_ctx:
                return
            self.model.cut(row, 0)


def _num_common(known: Sequence[int], ids: Sequence[int]) -> int:
    """Ids that `known` begins with as `ids` does, short of the last: its logits are wanted."""
    limit = min(len(known), len(ids) - 1)
    for place in range(limit):
        if known[place] != ids[place]:
            return place
    return limit
