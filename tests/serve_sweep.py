"""Hostile requests to every route of a server, with the answers that they may get.

The routes come from the server's own table, so a new one is attacked without being named here.
"""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from starlette.routing import Route

from mule.serve.app import OPEN_PATHS
from mule.serve.guard import STRICTEST_POLICY

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND", "get")
FOREIGN_HOSTS = (
    *("evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "0.0.0.0"),
    *(
        "169.254.169.254",
        "evil.example:80@127.0.0.1",
        "127.0.0.1:99999999",
        "[::1",
        "localhost\t.x",
    ),
)
FOREIGN_ORIGINS = (
    "null",
    "http://evil.example",
    "https://127.0.0.1",
    "file://",
    "http://127.0.0.1:1",
)
CONTENT_TYPES = (
    *("", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"),
    *("application/jsonp", "application/json; charset=utf-16", "text/json, application/json"),
)
HOSTILE_IDS = (
    *("..", ".", "...", "%2e%2e", "%2e%2e%2f%2e%2e%2fetc%2fpasswd", "..%2f..%2fetc%2fpasswd"),
    *("..%5c..%5cwindows", "%252e%252e%252f", "..%c0%af..", "%00", "a%00.json", "%2fetc%2fpasswd"),
    *("~", "~root", "$HOME", "*", "a" * 300, "-rf", "CON", "%e2%80%ae", "%0d%0aset-cookie:x=1"),
    *("recipe.yaml", ".mule", ".git", "nowhere", "%F0%9F%90%B4", "[a-z]"),
)
_NAME = re.compile(r"{[^}]*}")  # in the path of a route
_REFUSED = frozenset(range(400, 500))


@dataclass(frozen=True)
class Attempt:
    """One request as bytes, and the statuses that answer it well."""

    label: str
    raw: bytes
    want: frozenset[int]


@dataclass(frozen=True)
class Target:
    """A server: where it listens, its token, one of its models, a body each writing route takes.

    `model` stands for every name in an address.
    """

    port: int
    token: str
    model: str
    bodies: dict[str, dict[str, object]]
    open_paths: frozenset[str] = OPEN_PATHS


@dataclass(frozen=True)
class _Good:
    """The request that a route answers with 200; attempts change one thing of it."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    def raw(
        self,
        *,
        method: str = "",
        path: str = "",
        add: str = "",
        body: bytes | None = None,
        **headers: str | None,
    ) -> bytes:
        """With these changes; a header of None is left out, `add` is a line more."""
        fields: dict[str, str | None] = {**self.headers}
        fields |= {name.replace("_", "-"): value for name, value in headers.items()}
        content = self.body if body is None else body
        if content and "content-length" not in fields:
            fields["content-length"] = str(len(content))
        lines = [f"{method or self.method} {path or self.path} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in fields.items() if value is not None]
        lines += [add] if add else []
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + content


def attempts(routes: Iterable[Route], target: Target) -> Iterator[Attempt]:
    """Every attempt on every route."""
    for route in routes:
        good = _good(route, target)
        for label, raw, want in (
            *_callers(good, target),
            *_methods(good, route),
            *_tokens(good, route, target),
            *_paths(good),
            *_ids(good, route),
            *(_bodies(good) if good.body else _no_body(good)),
        ):
            statuses = want if isinstance(want, frozenset) else frozenset({want})
            yield Attempt(f"{route.path}: {label}", raw, statuses)


def send(port: int, raw: bytes) -> tuple[int, dict[str, str], bytes]:
    """(status, headers, what follows) of the answer to these bytes."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(raw)
        received = b""
        while b"\r\n\r\n" not in received:
            if not (more := connection.recv(65_536)):
                break
            received += more
        head, _, body = received.partition(b"\r\n\r\n")
        status, *lines = head.decode("latin-1").split("\r\n")
        pairs = (line.partition(": ") for line in lines)
        headers = {name.lower(): value for name, _, value in pairs}
        length = int(headers.get("content-length", 0))
        while len(body) < length and (more := connection.recv(65_536)):
            body += more
    return int(status.split(" ")[1]) if status else 0, headers, body


def wrong(attempt: Attempt, port: int, policies: Sequence[str] = (STRICTEST_POLICY,)) -> str:
    """What is wrong with the answer to an attempt, "" when nothing is.

    `policies` are the content policies that an answer may have.
    """
    status, headers, body = send(port, attempt.raw)
    if status not in attempt.want:
        return f"{attempt.label}: {status}, not {sorted(attempt.want)}: {body[:120]!r}"
    for name, values in (
        ("x-content-type-options", ("nosniff",)),
        ("x-frame-options", ("DENY",)),
        ("content-security-policy", policies),
    ):
        if headers.get(name) not in values:
            return f"{attempt.label}: {name} is {headers.get(name)!r}"
    if any(name.startswith("access-control") for name in headers):
        return f"{attempt.label}: a CORS header"
    if status >= 400 and not attempt.raw.startswith(b"HEAD"):
        try:
            found = set(json.loads(body)["error"])
        except (ValueError, KeyError, TypeError):
            return f"{attempt.label}: not OpenAI's error: {body[:120]!r}"
        if found - {"hint"} != {"message", "type", "param", "code"}:
            return f"{attempt.label}: an error of {sorted(found)}"
    return ""


# ---------------------------------------------------------------- what is tried

_Tried = Iterator[tuple[str, bytes, int | frozenset[int]]]


def _good(route: Route, target: Target) -> _Good:
    path = _NAME.sub(target.model, route.path)
    headers = {"host": f"127.0.0.1:{target.port}", "connection": "close"}
    headers["authorization"] = f"Bearer {target.token}"
    if "POST" not in (route.methods or ()):
        return _Good("GET", path, headers, b"")
    headers["content-type"] = "application/json"
    body = json.dumps(target.bodies[route.path]).encode()
    return _Good("POST", path, headers, body)


def _callers(good: _Good, target: Target) -> _Tried:
    yield "as it should be", good.raw(), 200
    for name in (f"localhost:{target.port}", "LocalHost", "[::1]:80"):
        yield f"own host {name}", good.raw(host=name), 200
    yield "own origin", good.raw(origin=f"http://127.0.0.1:{target.port}"), 200
    for name in FOREIGN_HOSTS:
        yield f"host {name!r}", good.raw(host=name), frozenset({400, 403})
    yield "no host", good.raw(host=None), 400
    yield "two hosts", good.raw(add="host: evil.example"), 400
    for origin in FOREIGN_ORIGINS:
        yield f"origin {origin}", good.raw(origin=origin), 403
    for site in ("cross-site", "same-site"):
        yield f"sec-fetch-site {site}", good.raw(sec_fetch_site=site), 403
    yield "websocket", good.raw(connection="upgrade", upgrade="websocket"), 400
    yield "headers of 40 kB", good.raw(x="a" * 40_000), frozenset({400, 431})
    pieces = ",".join(f"{i}-{i}" for i in range(1_500))
    yield "a range of 1,500 pieces", good.raw(range=f"bytes={pieces}"), 200
    yield "no HTTP", b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400
    yield "a line in a header", good.raw(x="a\r\nhost: evil.example"), 400


def _methods(good: _Good, route: Route) -> _Tried:
    for method in METHODS:
        if method not in (route.methods or ()):
            yield f"method {method}", good.raw(method=method), 405
    yield (
        "preflight",
        good.raw(
            method="OPTIONS", origin="http://evil.example", access_control_request_method="POST"
        ),
        403,
    )
    for name in ("x_http_method_override", "x_method_override", "x_http_method"):
        yield f"{name} DELETE", good.raw(**{name: "DELETE"}), 400


def _tokens(good: _Good, route: Route, target: Target) -> _Tried:
    yield "token in the address", good.raw(path=f"{good.path}?token={target.token}"), 400
    yield "key in the address", good.raw(path=f"{good.path}?a=1&api_key=x"), 400
    want = 200 if route.path in target.open_paths else 401
    for label, value in (
        ("no token", None),
        ("another token", "Bearer wrong-token-of-some-length"),
        ("half a token", f"Bearer {target.token[:-1]}"),
        ("a token and more", f"Bearer {target.token}x"),
        ("Basic", f"Basic {target.token}"),
        ("no scheme", target.token),
        ("an empty token", "Bearer "),
        ("bytes beyond ASCII", "Bearer \xff\xfe"),
    ):
        yield label, good.raw(authorization=value), want
    yield "a cookie", good.raw(authorization=None, cookie=f"token={target.token}"), want
    yield "two tokens", good.raw(add="authorization: Bearer x"), 400


def _paths(good: _Good) -> _Tried:
    bad = frozenset({400, 404})
    for path in (
        *(f"{good.path}/", f"/{good.path}", f"{good.path}/../health", f"/x/..{good.path}"),
        *(f"/%2e%2e{good.path}", f"/%252e%252e{good.path}", good.path.replace("/", "\\")),
        *(f"{good.path}%00", f"{good.path}/%2Fetc%2Fpasswd", f"{good.path};x=1", "/NUL", "/c:/"),
        *(
            f"{good.path.upper()}X",
            f"http://evil.example{good.path}",
            "*",
            f"{good.path}%0d%0ax: y",
        ),
    ):
        yield f"path {path}", good.raw(path=path), bad


def _ids(good: _Good, route: Route) -> _Tried:
    """What may stand where the address has a name: never a way to another file."""
    for place in _NAME.finditer(route.path):
        before, after = route.path[: place.start()], route.path[place.end() :]
        for name in HOSTILE_IDS:
            path = f"{_NAME.sub('x', before)}{name}{_NAME.sub('x', after)}"
            yield f"id {name[:40]!r}", good.raw(path=path), frozenset({400, 404, 409, 422})


def _no_body(good: _Good) -> _Tried:
    yield "a body", good.raw(body=b"{}"), 400
    yield (
        "a chunked body",
        good.raw(transfer_encoding="chunked", add="", body=b"") + b"0\r\n\r\n",
        400,
    )


def _bodies(good: _Good) -> _Tried:
    for kind in CONTENT_TYPES:
        yield f"content type {kind!r}", good.raw(content_type=kind), 415
    yield "no content type", good.raw(content_type=None), 415
    yield "two content types", good.raw(add="content-type: text/plain"), 400
    yield "gzip", good.raw(content_encoding="gzip"), 415
    yield "two lengths", good.raw(add="content-length: 1"), 400
    yield "chunked, and a length", good.raw(transfer_encoding="chunked"), 400
    yield (
        "an unknown coding",
        good.raw(transfer_encoding="gzip", content_length=None),
        _REFUSED | {501},
    )
    for length in ("-1", "1e3", "0x10", "9" * 30):
        yield f"length {length}", good.raw(content_length=length), frozenset({400, 413})
    yield "a length beyond the limit", good.raw(content_length="8000001"), 413
    for label, body in (
        ("empty", b""),
        ("no JSON", b"hello"),
        ("a list", b"[]"),
        ("NaN", b'{"temperature": NaN}'),
        ("a key twice", b'{"model": "a", "model": "b"}'),
        ("nested 65 deep", b'{"a": ' + b"[" * 65 + b"]" * 65 + b"}"),
        ("nested 100,000 deep", b'{"a": ' + b"[" * 100_000),
        ("not UTF-8", b'{"model": "\xff"}'),
        ("UTF-16", '{"model": "a"}'.encode("utf-16")),
        ("a number of 5,000 digits", b'{"seed": ' + b"1" * 5000 + b"}"),
    ):
        yield f"body {label}", good.raw(body=body), 400
