"""Export: models become files for other programs, what `mule verify` found of them, how to run them."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from mule.serve.fields import Fields
from mule.serve.problem import Problem, shown
from mule.web import ids
from mule.web.jobs import Job
from mule.web.site import Site, answer, work

KINDS = ("export", "merge", "verify")  # of the jobs that are shown here
FORMS = {
    "gguf": "GGUF files",
    "adapter": "the adapter alone, for a GGUF file of its base",
    "hf": "a folder for transformers",
    "merge": "merge only",
}
_OPTIONS = {  # form -> the options of the command that have an effect on it
    "gguf": ("types", "system", "author", "imatrix", "no_master"),
    "adapter": ("types", "system", "author"),
    "hf": ("author",),
    "merge": (),
}
_ADAPTER_TYPES = ("f32", "f16")
_DEFAULT_TYPES = ("q8_0", "q4_k_m")
_MAX_TEXT = 20_000
_NUM_JOBS = 5


def routes(site: Site) -> list[Route]:
    """`/export`: the form; `/exports`: what there is; and the jobs that are started from both."""
    page = _Export(site)
    return [
        Route("/export", page.form, methods=["GET"]),
        Route("/export/command", page.command, methods=["POST"]),
        Route("/export/start", page.start, methods=["POST"]),
        Route("/export/stop/{id}", page.stop, methods=["POST"]),
        Route("/exports", page.listed, methods=["GET"]),
        Route("/exports/{id}", page.one, methods=["GET"]),
        Route("/exports/{id}/quality", page.quality, methods=["GET"]),
        Route("/exports/{id}/verify", page.verify, methods=["POST"]),
    ]


@dataclass(frozen=True)
class _Export:
    """The answers of these routes."""

    site: Site

    async def form(self, _request: Request) -> Response:
        from mule.commands.models_here import KINDS as kinds

        return await self.site.fragment(
            "export.html",
            models=[row for row in await _models(self.site) if row["forms"]],
            kinds=kinds,
            types=await work(_type_rows),
            forms=FORMS,
            chosen=_DEFAULT_TYPES,
            of_adapters=_ADAPTER_TYPES,
        )

    async def listed(self, _request: Request) -> Response:
        from mule.commands.exports import list_exports

        jobs = await work(_jobs, self.site)
        return await self.site.fragment("exports.html", jobs=jobs, **await work(list_exports))

    async def one(self, request: Request) -> Response:
        from mule.commands.exports import show

        export = await _export_of(request)
        jobs = [job for job in await work(_jobs, self.site) if job["about"] == export]
        found = await work(show, export)
        return await self.site.fragment("export_one.html", jobs=jobs, **found)

    async def quality(self, request: Request) -> Response:
        from mule.commands.exports import show

        return answer((await work(show, await _export_of(request)))["quality"])

    async def command(self, request: Request) -> Response:
        words, _ = await _asked_for(self.site, request)
        return answer({"command": _as_typed(words)})

    async def start(self, request: Request) -> Response:
        words, about = await _asked_for(self.site, request)
        return await self._started(words, about)

    async def verify(self, request: Request) -> Response:
        await self.site.asked(request)
        export = await _export_of(request)
        return await self._started(["verify", export], export)

    async def stop(self, request: Request) -> Response:
        await self.site.asked(request)
        job = await work(self.site.jobs.get, request.path_params["id"])
        if job.kind not in KINDS:
            raise Problem(404, f"no export {shown(job.id)} here", code="not_found")
        await work(self.site.jobs.stop, job)
        return answer({"stopping": job.id})

    async def _started(self, words: list[str], about: str) -> Response:
        job = await work(self.site.jobs.start, words[0], [*words, "--json"], about)
        return answer({"job": job.id, "command": _as_typed(words)})


async def _models(site: Site) -> list[dict[str, Any]]:
    from mule.commands.models_here import list_models

    return (await work(list_models, site.runs))["models"]


def _type_rows() -> list[dict[str, Any]]:
    from mule.export.type_words import type_rows

    return type_rows()


async def _export_of(request: Request) -> str:
    """The folder of this address's `{id}`. Problem 404 where there is none."""
    from mule.commands.exports import list_exports

    known = (await work(list_exports))["exports"]
    return ids.find(request.path_params["id"], (row["export"] for row in known), "export")


# ---------------------------------------------------------------- what is to be done


async def _asked_for(site: Site, request: Request) -> tuple[list[str], str]:
    """The command's words, and the model it works on."""
    fields = Fields(await site.asked(request))
    fields.allow(("model", "form", "types", "system", "author", "imatrix", "no_master"))
    models = {row["name"]: row for row in await _models(site)}
    name = ids.find(fields.text("model", 100) or "", models, "model")
    form = fields.text("form", 20) or ""
    if form not in models[name]["forms"]:
        raise fields.wrong(
            "form", f"is {shown(form)}; possible: {', '.join(models[name]['forms'])}"
        )
    if form == "merge":
        return ["merge", name], name
    flag = {"adapter": ["--adapter-only"], "hf": ["--hf"]}.get(form, [])
    return ["export", name, *flag, *await _options(fields, form)], name


async def _options(fields: Fields, form: str) -> list[str]:
    given = [
        name for name in ("types", "system", "author", "imatrix", "no_master") if name in fields
    ]
    for name in given:
        if name not in _OPTIONS[form] and fields.raw(name):
            raise fields.wrong(name, f"has no effect on {FORMS[form]}")
    words: list[str] = []
    if "types" in _OPTIONS[form]:
        words += ["--types", ",".join(await _types(fields))]
    for name in ("system", "author"):
        if text := fields.text(name, _MAX_TEXT):
            words.append(f"--{name}={text}")
    if fields.flag("imatrix"):
        words.append("--imatrix")
    if fields.flag("no_master"):
        words.append("--no-master")
    return words


async def _types(fields: Fields) -> list[str]:
    chosen = fields.raw("types")
    known = [row["type"] for row in await work(_type_rows)]
    if not isinstance(chosen, list) or not chosen:
        raise Problem(422, "no type is chosen", param="types", hint="choose one, such as q8_0")
    for name in chosen:
        if name not in known:
            raise fields.wrong("types", f"has {shown(name)}; known: {', '.join(known)}")
    return chosen


def _as_typed(words: list[str]) -> str:
    return shlex.join(["mule", *words])


# ---------------------------------------------------------------- jobs


def _jobs(site: Site) -> list[dict[str, Any]]:
    """The newest ones of this page, each with its result or its error."""
    jobs = [job for job in site.jobs.all() if job.kind in KINDS][:_NUM_JOBS]
    return [_described(site, job) for job in jobs]


def _described(site: Site, job: Job) -> dict[str, Any]:
    """Its state, and `result`: what it printed as JSON, an error with its hint among it."""
    words = [word for word in job.words if word != "--json"]
    result = site.jobs.result(job) or {}
    return {**site.jobs.state(job), "command": _as_typed(words), "result": result}
