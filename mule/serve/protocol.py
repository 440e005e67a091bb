"""Uvicorn's HTTP connection, with limits on how many there are and on how slow one may be."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from mule.serve.guard import HEADERS, STRICTEST_POLICY
from mule.serve.limits import Limits
from mule.serve.problem import Problem

_BROKEN = Problem(400, "this is no HTTP request that can be read", code="bad_request")
_FULL = Problem(503, "too many connections; come back later", code="too_many_connections")


class Connection(H11Protocol):
    """One connection: dropped when its headers do not come, or when nobody reads its answer.

    Slow headers would hold a descriptor for ever, and an answer that is not read its memory.
    """

    limits: ClassVar[Limits] = Limits()

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._head_timer: asyncio.TimerHandle | None = None
        self._read_timer: asyncio.TimerHandle | None = None
        self.idle_since = 0.0  # in the loop's time

    # ------------------------------------------------------------ events of the connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            self._make_room()
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head_timer, self._read_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE and self._head_timer is not None:
            self._head_timer.cancel()  # the headers are there
            self._head_timer = None

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.their_state is h11.IDLE or self.transport.is_closing():
            self._await_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._read_timer = self.loop.call_later(self.limits.read_seconds, self._drop)

    def resume_writing(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
        super().resume_writing()

    def shutdown(self) -> None:
        with contextlib.suppress(h11.LocalProtocolError):
            return super().shutdown()
        self._drop()

    def send_400_response(self, msg: str) -> None:
        """In our form; nothing where an answer has begun, since it cannot be told any more."""
        if not self.transport.is_closing() and self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.write(_raw(_BROKEN, b"400 Bad Request"))
        self.transport.close()
        self._await_head()

    # ------------------------------------------------------------ inside

    def _make_room(self) -> None:
        """Drop who has been idle longest; where all are being answered, turn this one away."""
        others = [each for each in self.connections if isinstance(each, Connection)]
        idle = [each for each in others if each.is_idle and each is not self]
        if idle:
            min(idle, key=lambda each: each.idle_since)._drop()
        else:
            self.transport.write(_raw(_FULL, b"503 Service Unavailable"))
            self.transport.close()

    @property
    def is_idle(self) -> bool:
        """Open, and no request of it is being answered."""
        is_answered = self.cycle is None or self.cycle.response_complete
        return is_answered and not self.transport.is_closing()

    def _await_head(self) -> None:
        self.idle_since = self.loop.time()
        if self._head_timer is not None:
            self._head_timer.cancel()
        self._head_timer = self.loop.call_later(self.limits.head_seconds, self._drop)

    def _drop(self) -> None:
        """Close without waiting for the other side."""
        self.transport.abort()


def _raw(problem: Problem, status: bytes) -> bytes:
    """A whole answer, where there is no request that it could belong to."""
    body = problem.as_bytes()
    lines = [b"HTTP/1.1 " + status, b"content-type: application/json", b"connection: close"]
    lines += [name + b": " + value for name, value in HEADERS]
    lines.append(b"content-security-policy: " + STRICTEST_POLICY.encode())
    lines += [b"content-length: " + str(len(body)).encode(), b"", body]
    return b"\r\n".join(lines)
