"""Jobs: what was started from these pages, what it says, and how it ended."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from mule.web.ids import id_of
from mule.web.jobs import Job
from mule.web.site import Site, answer, work


def routes(site: Site) -> list[Route]:
    """`/jobs`: all of them; `/jobs/{id}`: one, live; stopping it, and forgetting what ended."""
    page = _Jobs(site)
    return [
        Route("/jobs", page.listed, methods=["GET"]),
        Route("/jobs/{id}", page.one, methods=["GET"]),
        Route("/jobs/{id}/stop", page.stop, methods=["POST"]),
        Route("/jobs/{id}/remove", page.remove, methods=["POST"]),
        Route("/jobs/remove/ended", page.tidy, methods=["POST"]),
    ]


@dataclass(frozen=True)
class _Jobs:
    """The answers of these routes."""

    site: Site

    async def listed(self, _request: Request) -> Response:
        rows = await work(lambda: [self._told(job) for job in self.site.jobs.all()])
        return await self.site.fragment("jobs.html", jobs=rows)

    async def one(self, request: Request) -> Response:
        job = await self._job(request)
        told = await work(lambda: self._told(job) | {"result": self.site.jobs.result(job)})
        return await self.site.fragment("job.html", job=told)

    async def stop(self, request: Request) -> Response:
        await self.site.asked(request)
        job = await self._job(request)
        await work(self._stop, job)
        return answer({"stopping": job.id})

    async def remove(self, request: Request) -> Response:
        await self.site.asked(request)
        job = await self._job(request)
        await work(self.site.jobs.remove, job)
        return answer({"removed": 1})

    async def tidy(self, request: Request) -> Response:
        await self.site.asked(request)
        return answer({"removed": await work(self.site.jobs.tidy, 0)})

    async def _job(self, request: Request) -> Job:
        return await work(self.site.jobs.get, request.path_params["id"])

    def _stop(self, job: Job) -> None:
        """A run that trains is asked as on its own page, so that both together ask it once."""
        from mule.commands import stop
        from mule.run import Run

        run = Run(self.site.runs / job.about)
        if self.site.jobs.state(job)["state"] != "running":
            return  # somebody else may train the run by now
        if job.kind == "train" and stop.holder(run) is not None:
            stop.run(run.name, self.site.runs)
        else:
            self.site.jobs.stop(job)

    def _told(self, job: Job) -> dict[str, Any]:
        """The state of a job, its command as one would type it, and the run that it trains."""
        words = [word for word in job.words if word != "--json"]
        trains = job.kind == "train" and (self.site.runs / job.about / "recipe.yaml").is_file()
        return {
            **self.site.jobs.state(job),
            "command": shlex.join(["mule", *words]),
            "run": id_of(job.about) if trains else None,
        }
