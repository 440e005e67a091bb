"""The way of a request to an engine and of its tokens back into the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import TypeVar

from mule.errors import MuleError
from mule.generate.request import Deliver, Ended, Engine, Event, Job, Request, Token
from mule.serve.limits import Limits
from mule.serve.problem import Problem
from mule.serve.watch import Watch

Answers = AsyncIterator[tuple[int, Event]]
T = TypeVar("T")
_LONGEST_WAIT_SECONDS = 60  # that a caller is told to come back after


class Desk:
    """One model of the server: its engine, how many it answers now, and who waits.

    An answer counts until the engine has ended it, so a caller who left holds its row no longer
    and no shorter than the engine works on it.
    """

    def __init__(self, name: str, engine: Engine, limits: Limits, watch: Watch) -> None:
        self.name, self.engine = name, engine
        self.created = int(time.time())
        self._pieces: dict[int, bytes] = {}  # as they come up; a vocabulary at most
        self._limits, self._watch = limits, watch
        self._jobs: dict[int, Job] = {}  # by identity
        self._num_open = 0
        self._answer_seconds = 1.0  # of an answer lately
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=f"serve-{name}")
        watch.rows(name, busy=lambda: self.num_busy, waiting=lambda: self.num_waiting)

    @property
    def num_busy(self) -> int:
        return min(self._num_open, self.engine.max_rows)

    @property
    def num_waiting(self) -> int:
        return self._num_open - self.num_busy

    async def compute(self, work: Callable[..., T], *arguments: object) -> T:
        """Run what takes a while (encoding a prompt) beside the event loop.

        Problem 400 for what the engine refuses.
        """
        future = self._pool.submit(work, *arguments)
        try:
            return await asyncio.wrap_future(future)
        except MuleError as error:
            raise refusal(error) from None

    def piece(self, token: int) -> bytes:
        """The bytes of a token whose log-probability an answer gave."""
        return self._pieces[token]

    async def learn(self, token: Token) -> None:
        """Know the pieces of a token and of those beside it; the engine may have to be asked."""
        new = {token.id, *(i for i, _ in token.top)} - self._pieces.keys()
        if new:
            self._pieces |= await self.compute(lambda: {i: self.engine.piece(i) for i in new})

    @asynccontextmanager
    async def answer(self, requests: Sequence[Request]) -> AsyncIterator[Answers]:
        """Submit the requests; gives (index, event) as they come, until all have ended.

        What still runs when the block is left is cancelled. Problem 429 when the queue is full.
        """
        self._require_room(len(requests))
        inbox = _Inbox(self, len(requests))
        try:
            for index, request in enumerate(requests):
                await self._submit(inbox, index, request)
            yield inbox.events()
        finally:
            inbox.cancel()

    def cancel_all(self) -> None:
        """End every answer under way."""
        for job in tuple(self._jobs.values()):
            self.cancel(job)

    def cancel(self, job: Job) -> None:
        """Tell the engine, beside the event loop: one in another process may be at work."""
        self._pool.submit(_cancel, job)

    def close(self) -> None:
        """No more work for the engine, which whoever opened it closes."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    # ------------------------------------------------------------ inside

    def _require_room(self, num_requests: int) -> None:
        room = self.engine.max_rows + self._limits.queue - self._num_open
        if num_requests > room:
            rounds = self.num_waiting / self.engine.max_rows + 1
            wait = min(_LONGEST_WAIT_SECONDS, max(1, round(rounds * self._answer_seconds)))
            raise Problem(
                429,
                f"{self.num_busy} answers are being written and {self.num_waiting} wait, which is "
                f"all this server takes; come back in {wait} s",
                code="queue_full",
                headers={"retry-after": str(wait)},
            )

    async def _submit(self, inbox: _Inbox, index: int, request: Request) -> None:
        self._num_open += 1
        future = self._pool.submit(self.engine.submit, request, inbox.deliver(index))
        try:
            job = await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            inbox.abandon(future)
            raise
        except MuleError as error:
            self.refused()
            raise refusal(error) from None
        except Exception:
            self.refused()
            raise
        inbox.took(index, job)
        if not inbox.has_ended(index):
            self._jobs[id(job)] = job

    def refused(self) -> None:
        """A request that the engine did not take after all."""
        self._num_open -= 1

    def ended(self, job: Job | None, ended: Ended, seconds: float) -> None:
        """An answer is over; called in the event loop."""
        self._num_open -= 1
        self._jobs.pop(id(job), None)
        if ended.reason not in ("cancelled", "failed"):
            self._answer_seconds += 0.1 * (seconds - self._answer_seconds)
        self._watch.answered(self.name, ended)
        if ended.reason == "failed":
            self._watch.said(f"{self.name}: an answer failed: {ended.error}")

    def saw_token(self, seconds: float, *, is_first: bool) -> None:
        self._watch.token(self.name, seconds, is_first=is_first)


class _Inbox:
    """The events of the answers of one HTTP request, brought over from the engine's thread."""

    def __init__(self, desk: Desk, num_answers: int) -> None:
        self._desk = desk
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._jobs: dict[int, Job] = {}
        self._running = set(range(num_answers))
        self._started_at = time.perf_counter()
        self._last_at: dict[int, float] = {}

    def deliver(self, index: int) -> Deliver:
        def deliver(event: Event) -> None:
            with suppress(RuntimeError):  # the loop has ended: nobody is left to hear it
                self._loop.call_soon_threadsafe(self._put, index, event, time.perf_counter())

        return deliver

    def took(self, index: int, job: Job) -> None:
        self._jobs[index] = job

    def has_ended(self, index: int) -> bool:
        return index not in self._running

    def _put(self, index: int, event: Event, at: float) -> None:
        if isinstance(event, Ended):
            self._running.discard(index)
            self._desk.ended(self._jobs.get(index), event, at - self._started_at)
        else:
            before = self._last_at.get(index)
            since = self._started_at if before is None else before
            self._desk.saw_token(at - since, is_first=before is None)
            self._last_at[index] = at
        self._queue.put_nowait((index, event))

    async def events(self) -> Answers:
        ended = 0
        while ended < len(self._jobs):
            index, event = await self._queue.get()
            ended += isinstance(event, Ended)
            if isinstance(event, Token) and event.logprob is not None:
                await self._desk.learn(event)
            yield index, event

    def abandon(self, future: Future[Job]) -> None:
        """The caller left while the engine was taking its request."""

        def settle() -> None:
            if future.cancelled() or future.exception() is not None:
                self._desk.refused()
            else:
                self._desk.cancel(future.result())

        future.cancel()
        future.add_done_callback(lambda _: self._loop.call_soon_threadsafe(settle))

    def cancel(self) -> None:
        for index in self._running & self._jobs.keys():
            self._desk.cancel(self._jobs[index])


def refusal(error: MuleError) -> Problem:
    """What an engine or a tokenizer refuses, told to the client: its message, and the remedy."""
    hint = f"; {error.hint}" if error.hint else ""
    return Problem(400, f"{error.message}{hint}", code="refused")


def _cancel(job: Job) -> None:
    with suppress(MuleError):  # an engine that crashed has ended it already
        job.cancel()
