"""What every page works with: the folders, the templates, and how work is done and answered."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import jinja2
from starlette.requests import Request
from starlette.responses import Response

from mule.commands.run_files import Kept
from mule.commands.run_look import looks
from mule.commands.runs import summaries
from mule.errors import UserError
from mule.run import RUNS, list_runs
from mule.serve.json_body import parse_body
from mule.serve.limits import Limits
from mule.serve.problem import Problem
from mule.web import ids
from mule.web.jobs import Jobs
from mule.web.threads import in_thread
from mule.web.words import FILTERS

_CLOSING_SECONDS = 0.5
P = ParamSpec("P")
T = TypeVar("T")


def _templates() -> jinja2.Environment:
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("mule.web"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= FILTERS
    return templates


@dataclass
class Site:
    """The folder that is shown is the working folder; its runs lie in `runs`.

    `read_only` shows everything and starts, stops and writes nothing. What a page holds open it
    gives to `at_close`, which the server closes at its end.
    """

    runs: Path = RUNS
    read_only: bool = False
    jobs: Jobs = field(default_factory=Jobs)
    limits: Limits = field(default_factory=lambda: Limits(closing_seconds=_CLOSING_SECONDS))
    summaries: Kept[dict[str, Any]] = field(default_factory=summaries, repr=False)  # of runs
    looks: Kept[dict[str, Any]] = field(default_factory=looks, repr=False)  # the doctor's
    closing: asyncio.Event = field(default_factory=asyncio.Event)  # streams end when it is set
    at_close: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _environment: jinja2.Environment = field(default_factory=_templates, repr=False)

    def run_of(self, request: Request) -> str:
        """The name of the run of this address's `{id}`. Problem 404 where there is none."""
        names = (run.name for run in list_runs(self.runs))
        name = ids.find(request.path_params["id"], names, "run")
        ids.check_inside(self.runs / name, self.runs)
        return name

    async def fragment(self, template: str, **values: Any) -> Response:
        """A piece of a page: a template of mule/web/templates with these values."""
        page = self._environment.get_template(template)
        text = await work(lambda: page.render(read_only=self.read_only, **values))
        return Response(text, media_type="text/html; charset=utf-8")

    async def asked(self, request: Request) -> dict[str, Any]:
        """The JSON object that was sent. Problem 403 where nothing may be changed."""
        if self.read_only:
            raise Problem(
                403,
                "this server only shows: it was started with --read-only",
                code="read_only",
                hint="start it without: mule ui",
            )
        return parse_body(await request.body(), self.limits)


async def work(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Do it in a thread, so that other requests are answered meanwhile.

    Raises Problem 422 with the message and the hint of a UserError, as a terminal shows them.
    """
    try:
        return await in_thread(lambda: call(*args, **kwargs))
    except UserError as error:
        raise Problem(422, error.message, code="user_error", hint=error.hint) from None


def answer(value: Any) -> Response:
    """As JSON."""
    content = json.dumps(value, ensure_ascii=False, allow_nan=False, default=str).encode()
    return Response(content, media_type="application/json")
