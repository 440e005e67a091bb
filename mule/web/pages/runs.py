"""Runs: all of them, with the doctor's verdict on each, and the jobs that run."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from mule.commands.run_look import verdicts
from mule.commands.runs import list_runs
from mule.run import list_runs as runs_in
from mule.web.ids import id_of
from mule.web.site import Site, answer, work


def routes(site: Site) -> list[Route]:
    """`/runs`: the list. `/runs/verdicts`: what the doctor says, as far as half a second goes."""

    def found() -> dict[str, Any]:
        last = {run.name: site.looks.last(run) for run in runs_in(site.runs)}
        jobs = [site.jobs.state(job) for job in site.jobs.all()]
        return {
            **list_runs(site.runs, site.summaries),
            "verdicts": {name: look for name, look in last.items() if look},
            "jobs": [job for job in jobs if job["state"] == "running"],
        }

    async def listed(_request: Request) -> Response:
        return await site.fragment("runs.html", **await work(found))

    async def judged(_request: Request) -> Response:
        said = await work(verdicts, site.looks, site.runs)
        return answer(said | {"verdicts": {id_of(k): v for k, v in said["verdicts"].items()}})

    return [
        Route("/runs", listed, methods=["GET"]),
        Route("/runs/verdicts", judged, methods=["GET"]),
    ]
