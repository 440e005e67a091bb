"""What changed below the folder, as a stream of events: pages ask again for what they show.

Runs are watched by their files, so it does not matter who writes them: this server's job, a
terminal, or another machine that shares the folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from mule.commands.export import EXPORTS
from mule.locks import is_locked
from mule.web.ids import id_of
from mule.web.site import Site
from mule.web.threads import in_thread

_LOOK_SECONDS = 1.0
_WATCHED = ("metrics.jsonl", "events.jsonl", "samples.jsonl", "run.lock", "report.md")
Stamps = dict[str, tuple[int, ...]]


def routes(site: Site) -> list[Route]:
    """`/events`: each event holds the ids of the runs and jobs that changed, and lists them all."""

    look = _Look(site)

    async def events(_request: Request) -> Response:
        return StreamingResponse(_events(site, look), media_type="text/event-stream")

    return [Route("/events", events, methods=["GET"])]


class _Look:
    """What stands in the folder: looked at once a second, however many pages are open."""

    def __init__(self, site: Site) -> None:
        self._site, self._lock = site, asyncio.Lock()
        self._found: Stamps = {}
        self._until = 0.0

    async def stamps(self) -> Stamps:
        async with self._lock:
            if time.monotonic() >= self._until:
                self._found = await in_thread(lambda: _stamps(self._site))
                self._until = time.monotonic() + _LOOK_SECONDS / 2
        return self._found


async def _events(site: Site, look: _Look) -> AsyncIterator[bytes]:
    seen = await look.stamps()
    yield _event({"changed": [], "gone": []})
    while not await _is_closing(site):
        now = await look.stamps()
        changed = [key for key, stamp in now.items() if seen.get(key) != stamp]
        gone = [key for key in seen if key not in now]
        seen = now
        # A comment where nothing changed: a caller who has left is noticed by it.
        yield _event({"changed": changed, "gone": gone}) if changed or gone else b":\n\n"


async def _is_closing(site: Site) -> bool:
    """After a second, or at once when the server ends."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(site.closing.wait(), _LOOK_SECONDS)
    return site.closing.is_set()


def _event(value: dict[str, list[str]]) -> bytes:
    return f"data: {json.dumps(value)}\n\n".encode()


def _stamps(site: Site) -> Stamps:
    """Size and time of the files that tell of a run, a job or an export, as `run/<id>` and so on."""
    found: Stamps = {}
    for recipe in site.runs.glob("*/recipe.yaml"):
        folder = recipe.parent
        # A killed process changes no file: its run is told by the lock that is free again.
        stamp = (*_stamp(folder, _WATCHED), is_locked(folder / "run.lock"))
        found[f"run/{id_of(folder.name)}"] = stamp
    for job in site.jobs.folder.glob("*/job.json"):
        found[f"job/{job.parent.name}"] = _stamp(job.parent, ("stdout", "stderr", "exit"))
    for record in EXPORTS.glob("*/export.json"):
        found[f"export/{id_of(record.parent.name)}"] = _stamp(record.parent, (record.name,))
    return found


def _stamp(folder: Path, names: tuple[str, ...]) -> tuple[int, ...]:
    stamp: list[int] = []
    for name in names:
        try:
            about = (folder / name).stat()
        except FileNotFoundError:
            continue
        stamp += (about.st_size, about.st_mtime_ns)
    return tuple(stamp)
