"""Compare: runs with runs, a setup with published ones, and the lab's campaigns."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from mule.commands import compare
from mule.commands.lab_report import list_campaigns, read
from mule.run import Run, list_runs
from mule.serve.problem import Problem
from mule.web import ids
from mule.web.data_choice import Choice, Table
from mule.web.site import Site, work

_MAX_RUNS = 8  # more curves than that nobody tells apart
_MAX_BESIDE = 6
_KEPT = 16
_CUT_CHARS = 80  # of a setting's value
_NAMES = ("run", "folder")


def routes(site: Site) -> list[Route]:
    """`/compare`: what can be compared; below it the three comparisons."""
    page = _Compare(site)
    return [
        Route("/compare", page.chooser, methods=["GET"]),
        Route("/compare/published", page.published, methods=["GET"]),
        Route("/compare/runs", page.runs, methods=["GET"]),
        Route("/compare/setup", page.setup, methods=["GET"]),
        Route("/compare/campaign/{id}", page.campaign, methods=["GET"]),
    ]


class _Compare:
    """The answers of these routes; what was compared is kept until its files change."""

    def __init__(self, site: Site) -> None:
        self._site, self._table = site, Table(site)
        self._kept: dict[str, dict[str, Any]] = {}

    async def chooser(self, _request: Request) -> Response:
        return await self._site.fragment("compare.html", **await work(self._choices))

    async def published(self, _request: Request) -> Response:
        """The catalogue, asked for when it is opened: it is a second's work to read."""
        return await self._site.fragment(
            "compare_published.html", **await work(compare.list_published)
        )

    async def runs(self, request: Request) -> Response:
        asked = list(dict.fromkeys(request.query_params.getlist("run")))
        if not 2 <= len(asked) <= _MAX_RUNS:
            raise Problem(
                422,
                f"{len(asked)} runs are chosen",
                param="run",
                code="how_many",
                hint=f"choose two to {_MAX_RUNS} runs, and compare them",
            )
        names = [run.name for run in list_runs(self._site.runs)]
        folders = [self._site.runs / ids.find(id, names, "run") for id in asked]
        words = [str(folder) for folder in folders]
        files = [folder / name for folder in folders for name in ("metrics.jsonl", "resolved.yaml")]
        found = await work(
            self._once, words, files, lambda: compare.run(words, root=self._site.runs)
        )
        return await self._site.fragment(
            "compare_runs.html",
            **found,
            reached=[name for name in found["runs"][0] if name not in _NAMES],
            settings=[_told(row) for row in (*found["differs"], *found["differs_mechanically"])],
            command=f"mule compare {' '.join(words)}",
        )

    async def setup(self, request: Request) -> Response:
        query = request.query_params
        choice = await work(self._table.find, query.get("of", ""))
        word = _setup_word(choice)
        published = [row["name"] for row in (await work(compare.list_published))["published"]]
        beside = [ids.find(id, published, "published setup") for id in query.getlist("beside")]
        if len(beside) > _MAX_BESIDE:
            raise Problem(
                422,
                f"{len(beside)} published setups are chosen",
                param="beside",
                code="how_many",
                hint=f"choose up to {_MAX_BESIDE}, or none for the nearest",
            )
        words = [word, *dict.fromkeys(beside)]
        found = await work(
            self._once,
            words,
            [Path(choice.words[0])],
            lambda: compare.run(words, root=self._site.runs),
        )
        return await self._site.fragment(
            "compare_setup.html", **found, command=f"mule compare {' '.join(words)}"
        )

    async def campaign(self, request: Request) -> Response:
        known = {row["campaign"]: row for row in (await work(list_campaigns))["campaigns"]}
        name = ids.find(request.path_params["id"], known, "campaign")
        folder = Path(known[name]["folder"])
        files = sorted([*folder.glob("*/*.json"), *folder.glob("runs/*/metrics.jsonl")])
        report = await work(self._once, [str(folder)], files, lambda: _report(folder))
        command = f"mule lab report {folder}"
        return await self._site.fragment("compare_campaign.html", **report, command=command)

    def _choices(self) -> dict[str, Any]:
        found = self._table.look()
        runs = [run for run in list_runs(self._site.runs) if _has_begun(run)]
        begun = {run.name for run in runs}
        return {
            "runs": [run.name for run in runs],
            "recipes": found["recipes"],
            "setups": [choice for choice in found["runs"] if choice.path in begun],
            "campaigns": list_campaigns()["campaigns"],
            "max_runs": _MAX_RUNS,
        }

    def _once(
        self, words: Sequence[str], files: Iterable[Path], call: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """What `call` gives, kept while the files stay as they are."""
        from mule.web.kept import key_of

        key = key_of(words, files)
        if key not in self._kept:
            found = call()
            while len(self._kept) >= _KEPT:
                self._kept.pop(next(iter(self._kept)), None)
            self._kept[key] = found
        return self._kept[key]


def _has_begun(run: Run) -> bool:
    return (run.folder / "resolved.yaml").is_file()


def _setup_word(choice: Choice) -> str:
    """What `mule compare` takes. Problem 422 for data, which is no setup."""
    if choice.prepared is None:
        raise Problem(
            422,
            f"{choice.path} is no recipe and no run",
            code="no_setup",
            hint="choose one of them",
        )
    return choice.prepared


def _told(row: dict[str, Any]) -> dict[str, Any]:
    """A setting with its values as text."""
    texts = [json.dumps(value, default=str, ensure_ascii=False) for value in row["values"]]
    shown = [t if len(t) <= _CUT_CHARS else f"{t[: _CUT_CHARS - 1]}…" for t in texts]
    return {"key": row["key"], "values": shown, "is_mechanical": row["role"] != "identity"}


def _report(folder: Path) -> dict[str, Any]:
    """The campaign's report, its plots as pictures that hold no script that could run."""
    report = read(folder)
    for section in report["sections"]:
        for block in section["blocks"]:
            for figure in block.get("figures", ()):
                content = base64.b64encode(figure.pop("svg").encode()).decode()
                figure["picture"] = f"data:image/svg+xml;base64,{content}"
    return report
