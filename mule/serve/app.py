"""The routes, and the application that a server runs: the route table behind the guard."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send

from mule.errors import UserError
from mule.generate.request import Engine, Request
from mule.serve.asked import Asked, messages_of, prompts_of, read_chat, read_text
from mule.serve.desk import Desk
from mule.serve.fields import Fields
from mule.serve.forms import ChatForm, Form, TextForm, stream, whole
from mule.serve.guard import Door, Guard, check_routes
from mule.serve.json_body import parse_body
from mule.serve.limits import Limits
from mule.serve.problem import Problem, shown
from mule.serve.watch import CONTENT_TYPE, Watch

MODEL_ID = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
OPEN_PATHS = frozenset({"/health"})


class Api:
    """Models that are served, by id, and the routes to them."""

    def __init__(
        self,
        engines: Mapping[str, Engine],
        *,
        token: str,
        hosts: frozenset[str],
        limits: Limits | None = None,
    ) -> None:
        for name in engines:
            check_id(name)
        self.limits, self.watch = limits or Limits(), Watch()
        self.desks = {
            name: Desk(name, engine, self.limits, self.watch) for name, engine in engines.items()
        }
        self.routes = [
            Route("/health", self._health, methods=["GET"]),
            Route("/metrics", self._metrics, methods=["GET"]),
            Route("/v1/models", self._models, methods=["GET"]),
            Route("/v1/models/{id}", self._model, methods=["GET"]),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._complete, methods=["POST"]),
        ]
        self.guard = Guard(
            Router(self.routes, redirect_slashes=False),
            check_routes(self.routes),
            door=Door(token, hosts, OPEN_PATHS),
            limits=self.limits,
            watch=self.watch,
        )

    @property
    def num_open(self) -> int:
        """Answers under way or waiting."""
        return sum(desk.num_busy + desk.num_waiting for desk in self.desks.values())

    def cancel_all(self) -> None:
        """Cut short what is still being answered."""
        for desk in self.desks.values():
            desk.cancel_all()

    def close(self) -> None:
        """The end of the server; its engines are closed by whoever opened them."""
        for desk in self.desks.values():
            desk.close()

    # ------------------------------------------------------------ small routes

    async def _health(self, _request: HttpRequest) -> Response:
        if self.guard.closing:
            raise Problem(503, "the server is closing", code="closing")
        return _json({"status": "ok"})

    async def _metrics(self, _request: HttpRequest) -> Response:
        return Response(self.watch.text(), media_type=CONTENT_TYPE)

    async def _models(self, _request: HttpRequest) -> Response:
        return _json({"object": "list", "data": [_listed(d) for d in self.desks.values()]})

    async def _model(self, request: HttpRequest) -> Response:
        return _json(_listed(self._desk(request.path_params["id"])))

    # ------------------------------------------------------------ answers

    async def _chat(self, request: HttpRequest) -> Response:
        desk, body = self._body(await request.body())
        asked = read_chat(body, desk.engine, self.limits)
        messages = messages_of(asked, self.limits)
        if not desk.engine.chat:
            raise Problem(
                400,
                f"{desk.name} was only pretrained: it continues text and knows no chat; "
                "use /v1/completions",
                param="model",
            )
        ids = await desk.compute(desk.engine.encode_chat, messages)
        requests = asked.requests([ids], desk.engine, self.limits)
        form = ChatForm(desk.name, desk.piece, logprobs=asked.top_logprobs is not None)
        return await _answered(desk, asked, requests, form)

    async def _complete(self, request: HttpRequest) -> Response:
        desk, body = self._body(await request.body())
        asked = read_text(body, desk.engine, self.limits)
        prompts = [
            await desk.compute(desk.engine.encode, prompt) if isinstance(prompt, str) else prompt
            for prompt in prompts_of(asked, desk.engine, self.limits)
        ]
        requests = asked.requests(prompts, desk.engine, self.limits)
        form = TextForm(desk.name, desk.piece, logprobs=asked.top_logprobs is not None)
        return await _answered(desk, asked, requests, form)

    def _body(self, content: bytes) -> tuple[Desk, dict[str, Any]]:
        body = parse_body(content, self.limits)
        name = Fields(body).text("model", 4_096)
        if name is None:
            raise Problem(400, f"model is missing; {self._served()}", param="model")
        return self._desk(name), body

    def _desk(self, name: str) -> Desk:
        """The model of this id. An id is looked up in the table, never opened or fetched."""
        if name not in self.desks:
            raise Problem(
                404,
                f"no model {shown(name)}; {self._served()}",
                param="model",
                code="model_not_found",
            )
        return self.desks[name]

    def _served(self) -> str:
        return f"served here: {', '.join(self.desks)}"


def check_id(name: str) -> None:
    """UserError for what no client could name a model by (rule S6)."""
    if not MODEL_ID.fullmatch(name):
        raise UserError(
            f"{name!r} cannot be the id of a model: up to 64 of a-z 0-9 . _ -",
            "give it another: --name NAME",
        )


async def _answered(desk: Desk, asked: Asked, requests: list[Request], form: Form) -> Response:
    """The answers in one piece, or as a stream that ends the engine's work when it is left."""
    async with AsyncExitStack() as stack:
        answers = await stack.enter_async_context(desk.answer(requests))
        if not asked.stream:
            return _json(await whole(answers, form, asked.n, len(requests)))
        kept = stack.pop_all()

    events = stream(answers, form, asked.n, len(requests), include_usage=asked.include_usage)
    return _Stream(events, kept)


class _Stream(StreamingResponse):
    """Server-sent events; the engine's work ends with it, whether it was read or left."""

    def __init__(self, events: AsyncIterator[bytes], kept: AsyncExitStack) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._kept = kept

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._kept:
            await self.stream_response(send)


def _json(value: dict[str, Any]) -> Response:
    content = json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    return Response(content, media_type="application/json")


def _listed(desk: Desk) -> dict[str, Any]:
    return {
        "id": desk.name,
        "object": "model",
        "created": desk.created,
        "owned_by": "mule",
        "context_length": desk.engine.context_tokens,
    }
