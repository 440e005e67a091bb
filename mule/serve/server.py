"""Running the application on a socket until a signal says stop."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import math
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Protocol

import uvicorn

from mule.errors import UserError
from mule.serve.guard import Guard
from mule.serve.limits import Limits
from mule.serve.protocol import Connection

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_BACKLOG = 128
_MORE_SECONDS = 3.0  # after answers were cut short, until their connections are closed by force


def bind(host: str, port: int) -> socket.socket:
    """A socket on this address, not listening yet; port 0 takes a free one.

    Raises UserError when the address is not one of this machine, or the port is taken.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = sorted(found, key=lambda each: each[0])[0]
        bound = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"{host}: no address to listen on ({error})", "leave --host out, or give an IP address"
        ) from None
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise UserError(
            f"cannot listen on {host}, port {port}: {error.strerror}",
            "choose another port: --port 0 takes a free one",
        ) from None
    return bound


def is_loopback(bound: socket.socket) -> bool:
    """Whether only this machine can reach it."""
    return ipaddress.ip_address(bound.getsockname()[0].partition("%")[0]).is_loopback


def own_hosts(bound: socket.socket, host: str, more: list[str]) -> frozenset[str]:
    """The names in `Host` that mean this server.

    Raises UserError when it listens everywhere and no name is given.
    """
    names = {name.lower() for name in more}
    address = ipaddress.ip_address(bound.getsockname()[0].partition("%")[0])
    if address.is_loopback:
        names |= {"localhost", "127.0.0.1", "[::1]"}
    if not address.is_unspecified:
        names |= {host.lower(), f"[{address}]" if address.version == 6 else str(address)}
    if not names:
        raise UserError(
            f"{host} means every address of this machine, and none of its names is known",
            "say how it is called: --allow-host NAME, as in http://NAME:PORT (repeatable)",
        )
    return frozenset(names)


class App(Protocol):
    """What a server runs: routes behind a guard, and the end of what is under way."""

    guard: Guard
    limits: Limits

    def cancel_all(self) -> None: ...


class Server(uvicorn.Server):
    """Answers on `bound` until SIGINT or SIGTERM, of which it keeps the number.

    Answers under way then get some seconds; a second signal cuts them at once.
    """

    def __init__(
        self, api: App, bound: socket.socket, on_start: Callable[[], None] = lambda: None
    ) -> None:
        config = uvicorn.Config(
            api.guard,
            http=type("LimitedConnection", (Connection,), {"limits": api.limits}),
            ws="none",
            lifespan="off",
            loop="asyncio",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=_BACKLOG,
            timeout_keep_alive=math.ceil(api.limits.head_seconds),
            timeout_graceful_shutdown=math.ceil(api.limits.closing_seconds + _MORE_SECONDS),
            h11_max_incomplete_event_size=api.limits.header_bytes,
        )
        super().__init__(config)
        self._api, self._bound, self._on_start = api, bound, on_start
        self.signum: int | None = None

    def answer(self) -> int | None:
        """Listen and answer; gives the signal that ended it."""
        self._bound.listen(_BACKLOG)
        self.run(sockets=[self._bound])
        return self.signum

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._api.guard.closing = True
        loop, limits = asyncio.get_running_loop(), self._api.limits
        cut = loop.call_later(
            0 if self.force_exit else limits.closing_seconds, self._api.cancel_all
        )
        await super().shutdown(sockets)
        cut.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True
        self.signum = self.signum or sig

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Without raising them again at the end: the caller decides what they mean."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {signum: signal.signal(signum, self.handle_exit) for signum in _SIGNALS}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)


def shown_address(bound: socket.socket, hosts: frozenset[str]) -> str:
    """How a client calls it: http://NAME:PORT."""
    address, port = bound.getsockname()[:2]
    name = f"[{address}]" if ":" in address else address
    return f"http://{name if name in hosts else min(hosts)}:{port}"


def with_queue(queue: int | None) -> Limits:
    """The limits, with another queue where one is asked for."""
    return Limits() if queue is None else Limits(queue=queue)
