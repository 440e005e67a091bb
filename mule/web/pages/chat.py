"""Chat: talk to models side by side, and see how sure they were of each token."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from mule.machine import available_bytes
from mule.serve.fields import Fields
from mule.serve.problem import Problem, shown
from mule.web import ids
from mule.web.data_choice import confined
from mule.web.engines import MAX_MODELS, Answer, Chosen, Engines
from mule.web.site import Site, answer, work
from mule.web.threads import in_thread

_ROLES = ("system", "user", "assistant")
_TOP = 5  # of the most probable tokens, that are shown of each place
# What the page may ask for; `mule serve` checks each value.
_ASKED = ("messages", "prompt", "temperature", "top_p", "top_k", "min_p", "max_tokens", "seed")


def routes(site: Site) -> list[Route]:
    """`/chat`: the page; `/chat/...`: the models that are open, and what is asked of them."""
    engines = Engines()
    site.at_close.callback(engines.close)
    page = _Chat(site, engines)
    return [
        Route("/chat", page.page, methods=["GET"]),
        Route("/chat/models", page.state, methods=["GET"]),
        Route("/chat/open", page.open, methods=["POST"]),
        Route("/chat/close", page.close, methods=["POST"]),
        Route("/chat/answer", page.answer, methods=["POST"]),
        Route("/chat/save", page.save, methods=["POST"]),
    ]


@dataclass(frozen=True)
class _Chat:
    """The answers of these routes."""

    site: Site
    engines: Engines

    async def page(self, _request: Request) -> Response:
        from mule.commands.chat import SETTINGS
        from mule.commands.models_here import list_models

        found = await work(list_models, self.site.runs)
        return await self.site.fragment(
            "chat.html",
            models=found["models"],
            kinds=found["kinds"],
            settings=[asdict(setting) for setting in SETTINGS],
            most=MAX_MODELS,
            free_bytes=available_bytes(),
        )

    async def state(self, _request: Request) -> Response:
        return answer(await work(self.engines.state))

    async def open(self, request: Request) -> Response:
        from mule.commands.models_here import list_models

        asked = await self.site.asked(request)
        wanted = asked.get("models")
        if not isinstance(wanted, list) or not 1 <= len(wanted) <= MAX_MODELS:
            raise Problem(
                422, f"choose 1 to {MAX_MODELS} models", param="models", hint="tick them above"
            )
        rows = {row["name"]: row for row in (await work(list_models, self.site.runs))["models"]}
        names = dict.fromkeys(ids.find(str(id), rows, "model") for id in wanted)
        chosen = [Chosen(ids.id_of(name), name, rows[name]["title"]) for name in names]
        await work(self.engines.open, chosen)
        return await self.state(request)

    async def close(self, request: Request) -> Response:
        await self.site.asked(request)
        await work(self.engines.close)
        return await self.state(request)

    async def answer(self, request: Request) -> Response:
        """Server-sent events as `mule serve` gives them, or its refusal."""
        fields = Fields(await self.site.asked(request))
        fields.allow(("model", *_ASKED))
        body = {name: fields.raw(name) for name in _ASKED if name in fields}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        chats = "messages" in body
        body |= {"logprobs": True, "top_logprobs": _TOP} if chats else {"logprobs": _TOP}
        given = await work(self.engines.ask, fields.text("model", 100) or "", body)
        pieces = _pieces(given, self.site.closing)
        if given.status == 200:
            return StreamingResponse(pieces, media_type="text/event-stream")
        refusal = b"".join([piece async for piece in pieces])
        return Response(refusal, given.status, media_type="application/json")

    async def save(self, request: Request) -> Response:
        from mule.commands.chat import save_said

        fields = Fields(await self.site.asked(request))
        fields.allow(("file", "said"))
        file = self._file(fields.text("file", 1_000) or "")
        return answer(await work(save_said, _said(fields), file))

    def _file(self, text: str) -> Path:
        """Where the conversation goes: below the working folder, and among no run's own files."""
        typed = Path(text.strip())
        file = Path(confined(str(typed.parent))) / typed.name
        if file.is_symlink() or file.exists():
            confined(str(file))
        own = [self.site.runs, self.site.jobs.folder.parent]
        if not typed.name or any(file.resolve().is_relative_to(each.resolve()) for each in own):
            raise Problem(
                422,
                f"{shown(text.strip())} is no place for a conversation",
                param="file",
                hint="name a file beside your data, such as chats.jsonl",
            )
        return file


def _said(fields: Fields) -> list[tuple[str, list[dict[str, str]]]]:
    """What was said with each model, by its name: [{"model": ..., "messages": [...]}, ...]."""
    said = fields.raw("said")
    if not isinstance(said, list) or len(said) > MAX_MODELS:
        raise fields.wrong("said", f"must be a list of up to {MAX_MODELS} conversations")
    found = []
    for number, item in enumerate(said):
        part = Fields(item if isinstance(item, dict) else {}, f"said[{number}].")
        part.allow(("model", "messages"))
        messages = part.raw("messages")
        if not isinstance(messages, list) or not all(map(_is_message, messages)):
            raise part.wrong("messages", "must be a list of messages, each a role and a content")
        found.append((part.text("model", 200) or "", messages))
    return found


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"role", "content"}
        and value["role"] in _ROLES
        and isinstance(value["content"], str)
    )


async def _pieces(given: Answer, closing: asyncio.Event) -> AsyncIterator[bytes]:
    """What comes, until its end, the server's, or until the reader leaves."""
    cut = asyncio.create_task(_cut(given, closing))
    try:
        while piece := await in_thread(given.read):
            yield piece
    finally:
        cut.cancel()
        given.close()


async def _cut(given: Answer, closing: asyncio.Event) -> None:
    await closing.wait()
    given.close()
