"""Start: a recipe made in a form, its plan beside it, and the training that it starts."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from mule.errors import UserError
from mule.serve.fields import Fields
from mule.serve.problem import Problem, shown
from mule.web import ids
from mule.web.site import Site, answer, work

_MAX_TEXT = 200  # of names; what is typed into the fields is bounded by the body
_EXAMPLE = Path("example")  # the folder of `mule init` from the page


def routes(site: Site) -> list[Route]:
    """`/start`: the form; what one can begin with; check and plan of what was typed; and starting."""
    page = _Start(site)
    return [
        Route("/start", page.form, methods=["GET"]),
        Route("/start/recipes", page.recipes, methods=["GET"]),
        Route("/start/from/{kind}/{id}", page.begin, methods=["GET"]),
        Route("/start/check", page.check, methods=["POST"]),
        Route("/start/plan", page.plan, methods=["POST"]),
        Route("/start/run", page.start, methods=["POST"]),
        Route("/start/resume/{id}", page.resume, methods=["POST"]),
        Route("/start/stop/{id}", page.stop, methods=["POST"]),
        Route("/start/prepare", page.prepare, methods=["POST"]),
    ]


@dataclass(frozen=True)
class _Start:
    """The answers of these routes."""

    site: Site

    async def form(self, _request: Request) -> Response:
        from mule.commands import form, form_choices

        here = await work(form_choices.here, self.site.runs)
        return await self.site.fragment("start.html", here=here, **await work(form.fields))

    async def recipes(self, _request: Request) -> Response:
        from mule.commands import form_choices

        return await self.site.fragment("start_recipes.html", **await work(form_choices.of_mule))

    async def begin(self, request: Request) -> Response:
        from mule.commands import form

        kind, wanted = request.path_params["kind"], request.path_params["id"]
        name = ids.find(wanted, await work(_names, self.site, kind), kind)
        return answer(await work(form.begin, kind, name, runs=self.site.runs))

    async def check(self, request: Request) -> Response:
        from mule.commands import form_recipe

        asked = _Asked(await self.site.asked(request))
        return answer(
            await work(
                form_recipe.check,
                asked.values,
                assume=asked.assume,
                runs=self.site.runs,
                seen=asked.seen,
            )
        )

    async def plan(self, request: Request) -> Response:
        """The page of the plan; what stands against it is part of the page, as one is typing."""
        asked = _Asked(await self.site.asked(request))
        plan, problem = await work(_planned, self.site, asked)
        return await self.site.fragment("start_plan.html", plan=plan, problem=problem)

    async def start(self, request: Request) -> Response:
        from mule.commands import form_recipe

        asked = _Asked(await self.site.asked(request))
        saved = await work(
            form_recipe.save,
            asked.values,
            assume=asked.assume,
            runs=self.site.runs,
            seen=asked.seen,
        )
        words = [*saved["words"], "--json"]
        job = await work(self.site.jobs.start, "train", words, saved["name"])
        return answer({**saved, "job": job.id})

    async def resume(self, request: Request) -> Response:
        from mule.run import Run

        await self.site.asked(request)
        run = Run(self.site.runs / self.site.run_of(request))
        if await work(run.state) == "running":
            raise Problem(
                409, f"{run.folder} is running", code="running", hint="stop it first, or wait"
            )
        words = ["train", str(run.folder / "recipe.yaml"), "--resume"]
        job = await work(self.site.jobs.start, "train", [*words, "--json"], run.name)
        return answer({"job": job.id, "command": shlex.join(["mule", *words])})

    async def stop(self, request: Request) -> Response:
        from mule.commands import stop

        await self.site.asked(request)
        return answer(await work(stop.run, self.site.run_of(request), self.site.runs))

    async def prepare(self, request: Request) -> Response:
        """What a person needs who has nothing yet: an example, a tiny model, this machine measured."""
        from mule import calibration
        from mule.commands import init

        fields = Fields(await self.site.asked(request))
        fields.allow(("what", "model"))
        what = fields.text("what", _MAX_TEXT)
        if what == "example":
            model = fields.text("model", _MAX_TEXT)
            written = await work(init.run, _EXAMPLE, model=model)
            return answer({"recipe": ids.id_of(written["recipe"])})
        if what == "demo":
            job = await work(self.site.jobs.start, "demo", ["demo", "--json"])
            return answer({"job": job.id})
        if what == "machine":
            known = await work(calibration.calibration)
            return answer({"device": known.device_name})
        raise fields.wrong("what", f"is {shown(what)}; known: example, demo, machine")


class _Asked:
    """What the form sends: the fields by their keys, and how they are meant."""

    def __init__(self, sent: dict[str, Any]) -> None:
        fields = Fields(sent)
        fields.allow(("values", "assume", "seen", "machine"))
        values = fields.raw("values")
        if not isinstance(values, dict):
            raise fields.wrong("values", "must be an object of fields")
        self.values: Mapping[str, Any] = values
        self.assume = fields.flag("assume")
        self.seen = fields.text("seen", _MAX_TEXT) or ""
        self.machine = fields.text("machine", _MAX_TEXT) or None


def _planned(site: Site, asked: _Asked) -> tuple[dict[str, Any] | None, UserError | None]:
    from mule.commands import form_recipe

    try:
        found = form_recipe.plan(
            asked.values, assume=asked.assume, runs=site.runs, machine=asked.machine
        )
    except UserError as error:
        return None, error
    return found, None


def _names(site: Site, kind: str) -> list[str]:
    """What can be begun with, by name: recipes of Mule, recipes of the folder, runs."""
    from mule.commands import form_choices
    from mule.config.presets import presets

    if kind == "recipe":
        return list(presets())
    here = form_choices.here(site.runs)
    return {"own": here["recipes"], "run": here["runs"]}.get(kind, [])
