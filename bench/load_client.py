"""A small asynchronous HTTP client that can also behave badly, for bench/load.py."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

HOST = "127.0.0.1"
_SECONDS = 120.0  # that an answer may take


@dataclass(frozen=True)
class Place:
    """A server: its port, its token, the id of its model."""

    port: int
    token: str
    model: str


@dataclass
class Reply:
    """What came back: `first_s` until the first token, `whole_s` until the end."""

    status: int
    body: bytes = b""
    first_s: float = 0.0
    whole_s: float = 0.0
    events: list[dict[str, Any]] = field(default_factory=list)

    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """One connection, kept while the server keeps it."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, path: str, body: dict[str, Any] | None = None) -> Reply:
        """A whole answer, or all events of a stream."""
        started_at = time.perf_counter()
        async with asyncio.timeout(_SECONDS):
            status, headers, reader = await self._begin(path, body)
            reply = Reply(status)
            async for part in _parts(reader, headers):
                reply.first_s = reply.first_s or _since(started_at, part)
                reply.body += part
        reply.whole_s = time.perf_counter() - started_at
        if headers.get("connection") == "close":
            await self.close()
        return reply

    async def hang_up(self, path: str, body: dict[str, Any], num_parts: int) -> int:
        """Leave a stream after so many parts of it; its status."""
        async with asyncio.timeout(_SECONDS):
            status, headers, reader = await self._begin(path, body)
            async for _ in _parts(reader, headers):
                num_parts -= 1
                if num_parts <= 0:
                    break
        await self.close()
        return status

    async def close(self) -> None:
        if self._streams is not None:
            _, writer = self._streams
            self._streams = None
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _begin(
        self, path: str, body: dict[str, Any] | None
    ) -> tuple[int, dict[str, str], asyncio.StreamReader]:
        content = b"" if body is None else json.dumps(body).encode()
        lines = [f"{'GET' if body is None else 'POST'} {path} HTTP/1.1", f"host: {HOST}"]
        lines.append(f"authorization: Bearer {self._place.token}")
        if body is not None:
            lines += ["content-type: application/json", f"content-length: {len(content)}"]
        raw = "\r\n".join([*lines, "", ""]).encode() + content
        for is_fresh in (self._streams is None, True):
            if self._streams is None:
                self._streams = await asyncio.open_connection(HOST, self._place.port)
            reader, writer = self._streams
            try:
                writer.write(raw)
                await writer.drain()
                return (*await _head(reader), reader)
            except (ConnectionError, asyncio.IncompleteReadError):
                await self.close()
                if is_fresh:
                    raise
        raise AssertionError


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    pairs = (line.partition(": ") for line in head[1:] if line)
    return int(head[0].split()[1]), {name.lower(): value for name, _, value in pairs}


async def _parts(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    """The body as it comes: of one length, or in chunks."""
    if "content-length" in headers:
        yield await reader.readexactly(int(headers["content-length"]))
        return
    while size := int(await reader.readuntil(b"\r\n"), 16):
        yield (await reader.readexactly(size + 2))[:-2]
    await reader.readexactly(2)


def _since(started_at: float, part: bytes) -> float:
    """Seconds until a part that holds text; a stream begins with one that holds none."""
    return 0.0 if b'"content": ""' in part else time.perf_counter() - started_at


async def send_garbage(place: Place, raw: bytes) -> int:
    """The status that these bytes get, 0 for a connection that is closed without one."""
    reader, writer = await asyncio.open_connection(HOST, place.port)
    try:
        async with asyncio.timeout(_SECONDS):
            writer.write(raw)
            line = await reader.readline()
        return int(line.split()[1]) if line else 0
    except ConnectionError:
        return 0
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def drip(place: Place, seconds: float) -> bool:
    """Slowloris: headers a byte at a time; whether the server closed the connection."""
    reader, writer = await asyncio.open_connection(HOST, place.port)
    ends_at = time.monotonic() + seconds
    try:
        writer.write(b"GET /health HTTP/1.1\r\nx: ")
        while time.monotonic() < ends_at:
            writer.write(b"a")
            await writer.drain()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    if not await reader.read(1):
                        return True
        return False
    except ConnectionError:
        return True
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
