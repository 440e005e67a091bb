"""One run: its head, its curves, what the doctor and the forecast say, its samples and its files."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from mule.commands.columns import Columns, ColumnStore
from mule.commands.curves import MAX_POINTS, band, curves, marks
from mule.commands.run_look import outlooks
from mule.commands.run_page import about, head, samples
from mule.run import Run
from mule.serve.problem import Problem, shown
from mule.web.site import Site, answer, work

T = TypeVar("T")


def routes(site: Site) -> list[Route]:
    """`/run/{id}` and its parts. Stopping and resuming it is with the page Start."""
    page = _RunPage(site)
    read = {
        "": page.whole,
        "/head": page.head,
        "/curves": page.curves,
        "/marks": page.marks,
        "/forecast": page.forecast,
        "/findings": page.findings,
        "/samples": page.samples,
        "/about": page.about,
    }
    return [Route(f"/run/{{id}}{path}", reply, methods=["GET"]) for path, reply in read.items()]


class _RunPage:
    """The answers of these routes; what was read or found out of runs is kept until they change."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.columns, self.outlooks = ColumnStore(), outlooks()

    async def whole(self, request: Request) -> Response:
        run = await self._run(request)
        return await self.site.fragment("run.html", **await work(self._head, run))

    async def head(self, request: Request) -> Response:
        run = await self._run(request)
        return await self.site.fragment("run_head.html", **await work(self._head, run))

    async def curves(self, request: Request) -> Response:
        """JSON: the charts of a range; x, from, to, smooth, points."""
        run, asked = await self._run(request), request.query_params
        first, last = (_number(asked.get(name), name) for name in ("from", "to"))
        smooth, points = (_number(asked.get(name), name) for name in ("smooth", "points"))
        return await self._drawn(
            run,
            lambda columns: curves(
                columns,
                by=asked.get("x", "steps"),
                first=first,
                last=last,
                smooth=None if smooth is None else int(smooth),
                max_points=MAX_POINTS if points is None else int(points),
            ),
        )

    async def marks(self, request: Request) -> Response:
        """JSON: where the findings and the events lie on the charts."""
        run, by = await self._run(request), request.query_params.get("x", "steps")
        look = await work(self.site.looks.of, run)
        return await self._drawn(run, lambda columns: marks(columns, look["findings"], by=by))

    async def forecast(self, request: Request) -> Response:
        """JSON: what is expected of the rest, with its band."""
        run, by = await self._run(request), request.query_params.get("x", "steps")
        found = await work(self.outlooks.of, run)
        return await self._drawn(run, lambda columns: band(columns, found, by=by))

    async def findings(self, request: Request) -> Response:
        run = await self._run(request)
        return await self.site.fragment("run_findings.html", **await work(self.site.looks.of, run))

    async def samples(self, request: Request) -> Response:
        run = await self._run(request)
        return await self.site.fragment("run_samples.html", prompts=await work(samples, run))

    async def about(self, request: Request) -> Response:
        run = await self._run(request)
        return await self.site.fragment("run_about.html", **await work(about, run))

    # ------------------------------------------------------------ inside

    async def _run(self, request: Request) -> Run:
        name = await work(self.site.run_of, request)
        return Run(self.site.runs / name)

    async def _drawn(self, run: Run, draw: Callable[[Columns], T]) -> Response:
        return answer(await work(self.columns.use, run, draw))

    def _head(self, run: Run) -> dict[str, Any]:
        """With the look that was taken last, and the last job of this run."""
        found = head(run, self.site.summaries)
        jobs = [job for job in self.site.jobs.all() if job.about == run.name]
        job = self.site.jobs.state(jobs[0]) if jobs else {"state": "", "stderr": ""}
        is_told = job["state"] == "running" or job.get("started_at", 0.0) >= found["updated_at"]
        return found | {
            "look": self.site.looks.last(run),
            "job": job if is_told else {"state": "", "stderr": ""},
        }


def _number(text: str | None, name: str) -> float | None:
    """A number of the address. Problem 422 for anything else."""
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise Problem(422, f"{name} is {shown(text)}, not a number", param=name, code="no_number")
    return value
