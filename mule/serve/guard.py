"""What every request passes before any route sees it: one middleware around the route table.

Rules S4, S6, S7 and S10: who may ask (Host, Origin, token), for what (path, method), in which form
(headers, content type, body), and for how long. Nothing is answered that is not allowed here, so a
new route is guarded by being in the table.
"""

from __future__ import annotations

import asyncio
import hmac
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mule.errors import UserError
from mule.serve.limits import Limits
from mule.serve.problem import Problem, shown
from mule.serve.watch import Exchange, Watch

HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)
STRICTEST_POLICY = "default-src 'none'; frame-ancestors 'none'"
_ONCE = (b"host", b"origin", b"authorization", b"content-type", b"content-length")
_OVERRIDES = (b"x-http-method-override", b"x-http-method", b"x-method-override")
_PATH = re.compile(rb"/|(/[A-Za-z0-9._-]+)+")  # nothing of ours is written with escapes
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?")
_SECRET_KEY = re.compile(rb"(?i)token|key|auth|secret|password|bearer")
_MAX_DIGITS = 18  # of a Content-Length
_DISCARDED_BYTES, _DISCARD_SECONDS = 16_000_000, 0.5  # of a body that nobody will read


@dataclass(frozen=True)
class Door:
    """Who may ask: the token, the names in `Host`, and the paths that need no token.

    `command` is what started the server, for messages; `content_policy` what its pages may load.
    """

    token: str
    hosts: frozenset[str]
    open_paths: frozenset[str]
    command: str = "mule serve"
    content_policy: str = STRICTEST_POLICY


class Guard:
    """ASGI middleware in front of `app`, whose whole route table is `routes`."""

    def __init__(
        self, app: ASGIApp, routes: Sequence[Route], *, door: Door, limits: Limits, watch: Watch
    ) -> None:
        self._app, self._routes, self._door = app, routes, door
        self._limits, self._watch = limits, watch
        self.closing = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._answer(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope["method"], scope["path"])
        reply = _Reply(send, exchange, self._door.content_policy)
        try:
            headers = _checked_headers(scope, self._limits.header_bytes)
            self._check_caller(scope["path"], headers)
            route = self._find_route(scope, exchange)
            self._check_token(scope, headers)
            body = await self._read_body(route, headers, receive)
            reply.body_is_read = True
            await self._run(scope, receive, reply, body)
        except Problem as problem:
            await self._refuse(problem, receive, reply)
        except Exception as error:
            self._watch.failed(exchange, error)
            if not reply.started:
                await self._refuse(_DEFECT, receive, reply)
        finally:
            self._watch.ended(exchange)

    # ------------------------------------------------------------ who, and what

    def _check_caller(self, path: str, headers: dict[bytes, bytes]) -> None:
        """A browser tells where its page came from; only the server's own name may be asked.

        A person may come from anywhere to a page that needs no token.
        """
        host = headers.get(b"host", b"").decode("latin-1").lower()
        match = _HOST.fullmatch(host)
        if match is None or match[1] not in self._door.hosts:
            raise Problem(
                403,
                f"Host is {shown(host)}; this server answers to {', '.join(sorted(self._door.hosts))}"
                f" only ({self._door.command} --allow-host NAME adds one)",
                code="host_not_allowed",
            )
        origin = headers.get(b"origin")
        if origin is not None and origin.decode("latin-1").lower() != f"http://{host}":
            raise Problem(
                403,
                f"Origin is {shown(origin.decode('latin-1'))}; pages of other places may not ask",
                code="origin_not_allowed",
            )
        comes = path in self._door.open_paths and headers.get(b"sec-fetch-mode") == b"navigate"
        site = headers.get(b"sec-fetch-site", b"none")
        if site not in (b"none", b"same-origin") and not comes:
            raise Problem(
                403,
                "a page of another place may not ask (Sec-Fetch-Site)",
                code="origin_not_allowed",
            )

    def _find_route(self, scope: Scope, exchange: Exchange) -> Route:
        raw = scope.get("raw_path") or scope["path"].encode()
        found = _PATH.fullmatch(raw) and b".." not in raw
        for route in self._routes if found else ():
            if route.path_regex.match(scope["path"]):
                exchange.route = route.path
                allowed = route.methods or set()
                if scope["method"] in allowed:
                    return route
                names = ", ".join(sorted(allowed))
                raise Problem(
                    405,
                    f"{scope['method'][:16]} is not possible here; use {names}",
                    code="method_not_allowed",
                    headers={"allow": names},
                )
        paths = ", ".join(route.path for route in self._routes)
        raise Problem(404, f"no such path; there are {paths}", code="not_found")

    def _check_token(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        for pair in scope.get("query_string", b"").split(b"&"):
            if _SECRET_KEY.search(pair.partition(b"=")[0]):
                raise Problem(
                    400,
                    "a secret in the address ends up in logs; send it as a header: "
                    "Authorization: Bearer TOKEN",
                    code="secret_in_address",
                )
        if scope["path"] in self._door.open_paths:
            return
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        same = hmac.compare_digest(given.strip(), self._door.token.encode())
        if scheme.lower() != b"bearer" or not same:
            what = "is not the one of this server" if given else "is missing"
            raise Problem(
                401,
                f"the token {what}; send Authorization: Bearer TOKEN, with the token that "
                f"`{self._door.command}` wrote to the file it named when it started",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        if self.closing:
            raise Problem(
                503, "the server is closing", code="closing", headers={"retry-after": "10"}
            )

    # ------------------------------------------------------------ the body

    async def _read_body(
        self, route: Route, headers: dict[bytes, bytes], receive: Receive
    ) -> bytes | None:
        """The whole body, counted as it comes; None where the route takes none."""
        length = headers.get(b"content-length", b"0")
        if "POST" not in (route.methods or ()):
            if length != b"0" or b"transfer-encoding" in headers:
                raise Problem(400, "this route takes no body", code="unexpected_body")
            return None
        _check_content(headers)
        if not length.isdigit():
            raise Problem(400, "Content-Length is no number of bytes", code="bad_headers")
        if len(length) > _MAX_DIGITS or int(length) > self._limits.body_bytes:
            raise self._too_large()
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                return await self._collect(receive)
        except TimeoutError:
            raise Problem(
                408,
                f"the body was not there after {self._limits.body_seconds:g} seconds",
                code="timeout",
            ) from None

    async def _collect(self, receive: Receive) -> bytes:
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _Departure
            body += message.get("body", b"")
            if len(body) > self._limits.body_bytes:
                raise self._too_large()
            if not message.get("more_body", False):
                return bytes(body)

    def _too_large(self) -> Problem:
        return Problem(
            413, f"the body has more than {self._limits.body_bytes:,} bytes", code="body_too_large"
        )

    # ------------------------------------------------------------ the answer

    async def _run(self, scope: Scope, receive: Receive, reply: _Reply, body: bytes | None) -> None:
        """Let the route answer, until the caller has gone or it took too long."""
        answer = self._app(scope, _replay(body or b""), reply.send)
        served = asyncio.ensure_future(answer)
        gone = asyncio.create_task(_until_gone(receive))
        try:
            await asyncio.wait(
                {served, gone},
                timeout=self._limits.request_seconds,
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            reply.exchange.is_cut = not served.done()
            for task in (served, gone):
                task.cancel()
            await asyncio.gather(served, gone, return_exceptions=True)
        if not served.cancelled():
            served.result()
        elif not gone.cancelled():
            raise _Departure
        elif not reply.started:
            raise Problem(
                504,
                f"no answer after {self._limits.request_seconds:g} seconds; ask for fewer tokens",
                code="timeout",
            )

    async def _refuse(self, problem: Problem, receive: Receive, reply: _Reply) -> None:
        if reply.started or isinstance(problem, _Departure):
            reply.exchange.status = reply.exchange.status or problem.status
            return
        headers = {"content-type": "application/json", **problem.headers}
        if not reply.body_is_read:
            headers["connection"] = "close"
            await _discard(receive)
        body = problem.as_bytes()
        fields = [(name.encode(), value.encode()) for name, value in headers.items()]
        fields.append((b"content-length", str(len(body)).encode()))
        await reply.send(
            {"type": "http.response.start", "status": problem.status, "headers": fields}
        )
        await reply.send({"type": "http.response.body", "body": body})


class _Departure(Problem):
    """The caller has left; there is nobody to tell."""

    def __init__(self) -> None:
        super().__init__(499, "the caller has gone")


_DEFECT = Problem(500, "this is a defect of Mule; the server's log names the place", code="defect")


class _Reply:
    """`send`, with our headers on every answer."""

    def __init__(self, send: Send, exchange: Exchange, content_policy: str) -> None:
        self._send, self.exchange = send, exchange
        self._headers = (*HEADERS, (b"content-security-policy", content_policy.encode()))
        self.started = self.body_is_read = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            self.exchange.status = message["status"]
            message = {**message, "headers": [*message.get("headers", ()), *self._headers]}
        await self._send(message)


def check_routes(routes: Iterable[Any]) -> list[Route]:
    """The routes, all plain ones; UserError for a kind that the guard cannot look into."""
    checked = []
    for route in routes:
        if not isinstance(route, Route) or not route.methods:
            raise UserError(
                f"{route!r} is no plain route, so its methods cannot be checked",
                "use starlette's Route with methods",
            )
        checked.append(route)
    return checked


# ---------------------------------------------------------------- headers and bodies


def _checked_headers(scope: Scope, max_bytes: int) -> dict[bytes, bytes]:
    """The headers by name. Problem 400 or 431 for what could be read in two ways."""
    pairs = scope["headers"]
    size = len(scope.get("raw_path") or b"") + len(scope.get("query_string", b""))
    if size + sum(len(name) + len(value) + 4 for name, value in pairs) > max_bytes:
        raise Problem(
            431, f"the headers have more than {max_bytes:,} bytes", code="headers_too_large"
        )
    names = [name for name, _ in pairs]
    for name in _ONCE:
        if names.count(name) > 1:
            raise Problem(400, f"the header {name.decode()} stands there twice", code="bad_headers")
    if b"transfer-encoding" in names and b"content-length" in names:
        raise Problem(
            400,
            "Transfer-Encoding and Content-Length: the body has two lengths",
            code="bad_headers",
        )
    headers = dict(pairs)
    for name in _OVERRIDES:
        if name in headers:
            raise Problem(400, f"{name.decode()} is not taken", code="method_override")
    if headers.get(b"upgrade", b"").lower() == b"websocket":
        raise Problem(400, "no route speaks websocket; use stream: true", code="no_websocket")
    return headers


def _check_content(headers: dict[bytes, bytes]) -> None:
    kind, _, options = headers.get(b"content-type", b"").lower().partition(b";")
    charset = options.strip().replace(b'"', b"")
    if kind.strip() != b"application/json" or charset not in (b"", b"charset=utf-8"):
        raise Problem(
            415, "the body must be sent as Content-Type: application/json", code="content_type"
        )
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise Problem(415, "a compressed body is not taken; send it plain", code="content_encoding")


def _replay(body: bytes) -> Receive:
    """Gives the body that was read, then nothing: the guard itself sees a caller leave."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if messages:
            return messages.pop()
        await asyncio.Event().wait()
        raise AssertionError

    return receive


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _discard(receive: Receive) -> None:
    """Take what is still being sent, for a while: a caller who is cut off sees no answer."""
    num_bytes = 0
    try:
        async with asyncio.timeout(_DISCARD_SECONDS):
            while num_bytes < _DISCARDED_BYTES:
                message = await receive()
                num_bytes += len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body"):
                    return
    except TimeoutError:
        return
