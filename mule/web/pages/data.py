"""Data: what is in it, what is wrong with it, and what a model would read and learn of it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from mule.commands import data_charts, data_rows, preview_text
from mule.commands.data_inputs import Inputs, read_options
from mule.serve.problem import Problem
from mule.web.data_choice import Choice, Table
from mule.web.kept import Kept, key_of
from mule.web.site import Site, answer, work

_PLACES = 1000  # of each problem: the rows that can be filtered for
_SHOWN_PLACES = 8  # of each problem in the report
_AT_ONCE_BYTES = 50_000_000  # data of this size is checked when it is opened
_ROWS = 10
_MAX_ROWS = 50
_OPENED = 4
_MAX_NUMBER = 10**12


def routes(site: Site) -> list[Route]:
    """`/data`: what there is; `/data/{id}`: one of it, its report, its rows."""
    page = _Data(site)
    return [
        Route("/data", page.chooser, methods=["GET"]),
        Route("/data/find", page.typed, methods=["GET"]),
        Route("/data/{id}", page.one, methods=["GET"]),
        Route("/data/{id}/report", page.report, methods=["GET"]),
        Route("/data/{id}/check", page.check, methods=["POST"]),
        Route("/data/{id}/prepared", page.prepared, methods=["GET"]),
        Route("/data/{id}/stats", page.stats, methods=["POST"]),
        Route("/data/{id}/rows", page.rows, methods=["GET"]),
    ]


class _Data:
    """The answers of these routes, and the data that is open."""

    def __init__(self, site: Site) -> None:
        self._site, self._table = site, Table(site)
        self._kept = Kept(site.jobs, read_only=site.read_only)
        self._opened: dict[str, _Opened] = {}

    async def chooser(self, _request: Request) -> Response:
        return await self._site.fragment("data.html", **await work(self._table.look))

    async def typed(self, request: Request) -> Response:
        """A path that a person typed becomes an id."""
        choice = await work(self._table.typed, request.query_params.get("path", ""))
        await work(data_rows.locate, list(choice.words))
        return answer({"id": choice.id, "path": choice.path})

    async def one(self, request: Request) -> Response:
        choice = await self._choice(request)
        located = await work(data_rows.locate, list(choice.words))
        return await self._site.fragment(
            "data_one.html",
            choice=choice,
            files=[{"part": part, "file": str(file)} for part, file in located.files],
            tokenizers=await work(self._table.tokenizers),
            reader=request.query_params.get("reader", ""),
        )

    # ------------------------------------------------------------ the report

    async def report(self, request: Request) -> Response:
        choice, located, tokenizer = await self._asked(request)
        words = _check_words(choice, tokenizer)
        found = await work(self._kept.look, self._key(words, located, tokenizer))
        num_bytes = await work(_size, located)
        charts = data_charts.of_check(found["result"]) if found["state"] == "done" else []
        return await self._site.fragment(
            "data_report.html",
            **found,
            charts=charts,
            command=_typed(words),
            num_bytes=num_bytes,
            at_once=num_bytes <= _AT_ONCE_BYTES,
            files=[str(file) for _, file in located.files],
            shown_places=_SHOWN_PLACES,
        )

    async def check(self, request: Request) -> Response:
        await self._site.asked(request)
        choice, located, tokenizer = await self._asked(request)
        words = _check_words(choice, tokenizer)
        return await self._start("check", words, located, tokenizer, choice.path)

    async def prepared(self, request: Request) -> Response:
        choice, located, _ = await self._asked(request)
        words = _stats_words(choice)
        found = await work(self._kept.look, self._key(words, located, None))
        parts = found["result"]["parts"] if found["state"] == "done" else []
        charts = [data_charts.of_stats(part) for part in parts]
        return await self._site.fragment(
            "data_prepared.html", **found, parts=parts, charts=charts, command=_typed(words)
        )

    async def stats(self, request: Request) -> Response:
        await self._site.asked(request)
        choice, located, _ = await self._asked(request)
        return await self._start("stats", _stats_words(choice), located, None, choice.path)

    async def _start(
        self,
        kind: str,
        words: list[str],
        located: data_rows.Located,
        tokenizer: str | None,
        about: str,
    ) -> Response:
        """Start the command, unless it runs or has been."""
        key = self._key(words, located, tokenizer)
        found = await work(self._kept.look, key)
        if found["state"] in ("running", "done"):
            return answer({"state": found["state"]})
        job = await work(self._kept.start, key, kind, words, about)
        return answer({"state": "running", "job": job.id})

    # ------------------------------------------------------------ the rows

    async def rows(self, request: Request) -> Response:
        choice, located, tokenizer = await self._asked(request)
        ask = request.query_params
        number = _number(ask, "file", 0)
        if number >= len(located.files):
            raise Problem(404, f"there are {len(located.files)} files", code="not_found")
        file = located.files[number][1]
        words = _check_words(choice, tokenizer)
        found = await work(self._kept.look, self._key(words, located, tokenizer))
        problems = found["result"]["problems"] if found["state"] == "done" else []
        wanted = _wanted(ask.get("problem", ""), problems, str(file))
        opened = await work(self._open, choice, located, tokenizer)
        start, n = _number(ask, "start", 0), min(_MAX_ROWS, _number(ask, "n", _ROWS) or _ROWS)
        if line := _number(ask, "line", 0):
            start = await work(opened.reader(file).number_of, line)
        shown = await work(opened.show, file, start, n, wanted)
        own = _in_file(problems, str(file))
        for row in shown["rows"]:
            row["problems"] = _problems_of(row, own, opened.reader(file).is_text)
        return await self._site.fragment(
            "data_rows.html",
            **shown,
            file=str(file),
            start=start,
            n=n,
            problem=ask.get("problem", ""),
            lines=wanted,
            preview=preview_text,
        )

    def _open(self, choice: Choice, located: data_rows.Located, tokenizer: str | None) -> _Opened:
        """The data with its tokenizer, kept open for a while: a page of rows follows another."""
        key = self._key([*choice.words, "rows"], located, tokenizer)
        if key not in self._opened:
            inputs = data_rows.open_rows(located, tokenizer, self._site.runs)
            while len(self._opened) >= _OPENED:
                self._opened.pop(next(iter(self._opened)), None)
            self._opened[key] = _Opened(inputs)
        return self._opened[key]

    # ------------------------------------------------------------ what is asked for

    async def _choice(self, request: Request) -> Choice:
        return await work(self._table.find, request.path_params["id"])

    async def _asked(self, request: Request) -> tuple[Choice, data_rows.Located, str | None]:
        """The choice of the address, its files, and the tokenizer chosen for it or its own."""
        choice = await self._choice(request)
        chosen = await work(self._table.tokenizer, request.query_params.get("reader", ""))
        located = await work(data_rows.locate, list(choice.words))
        return choice, located, chosen or choice.tokenizer

    def _key(self, words: Sequence[str], located: data_rows.Located, tokenizer: str | None) -> str:
        files = [file for _, file in located.files]
        recipe = located.given.recipe_file
        own = [] if recipe is None else [recipe, recipe.with_name("lineage.json")]
        read = [] if tokenizer is None else [Path(tokenizer, "tokenizer.json"), Path(tokenizer)]
        return key_of(words, [*files, *own, *read])


class _Opened:
    """Data that is open, and the readers of its files."""

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs
        self._readers: dict[Path, data_rows.RowReader] = {}

    def reader(self, file: Path) -> data_rows.RowReader:
        if file not in self._readers:
            options = read_options(self._inputs.data)
            self._readers[file] = data_rows.RowReader(file, options)
        return self._readers[file]

    def show(self, file: Path, start: int, n: int, lines: Sequence[int] | None) -> dict[str, Any]:
        """`n` rows from `start` on; of `lines`, those at `n` of the lines from `start` on."""
        reader = self.reader(file)
        rows = reader.take(start, n) if lines is None else reader.at_lines(lines[start : start + n])
        return data_rows.show(self._inputs, rows)


def _check_words(choice: Choice, tokenizer: str | None) -> list[str]:
    named = [] if tokenizer is None else ["--tokenizer", tokenizer]
    return ["data", "check", *choice.words, *named, "--places", str(_PLACES), "--json"]


def _stats_words(choice: Choice) -> list[str]:
    if choice.prepared is None:
        raise Problem(
            422,
            f"{choice.path} is no run and no recipe, so no rows were prepared for it",
            code="not_prepared",
            hint=f"mule data prepare {shlex.quote(choice.words[0])} --tokenizer MODEL_FOLDER",
        )
    return ["data", "stats", choice.prepared, "--json"]


def _typed(words: Sequence[str]) -> str:
    """The command as a person would type it."""
    plain = [word for word in words if word not in ("--json", "--places", str(_PLACES))]
    return shlex.join(["mule", *plain])


def _size(located: data_rows.Located) -> int:
    return sum(file.stat().st_size for _, file in located.files)


def _number(asked: Mapping[str, str], name: str, default: int) -> int:
    text = asked.get(name, "")
    if not text:
        return default
    if not (text.isascii() and text.isdigit()) or int(text[:20]) > _MAX_NUMBER:
        raise Problem(422, f"{name} is no whole number", param=name, hint=f"{name}=0")
    return int(text)


# ---------------------------------------------------------------- problems and their rows


def _wanted(asked: str, problems: Sequence[dict[str, Any]], file: str) -> list[int] | None:
    """The lines to show: of one problem (its place in the report), of any, or None for all rows."""
    if not asked:
        return None
    chosen = problems if asked == "any" else [problems[_place({"problem": asked}, problems)]]
    places = [place for problem in chosen for place in problem["places"]]
    return sorted({p["line"] for p in places if p["file"] == file and p["line"] is not None})


def _place(asked: Mapping[str, str], problems: Sequence[Any]) -> int:
    number = _number(asked, "problem", 0)
    if number >= len(problems):
        raise Problem(404, f"the report has {len(problems)} problems", code="not_found")
    return number


def _in_file(problems: Sequence[dict[str, Any]], file: str) -> list[dict[str, Any]]:
    """A row for each place of a problem in the file; `number` is the problem's in the report."""
    return [
        {**problem, "number": number, "text": place["text"], "at": place["line"]}
        for number, problem in enumerate(problems)
        for place in problem["places"]
        if place["file"] == file
    ]


def _problems_of(
    row: Mapping[str, Any], own: Sequence[dict[str, Any]], is_text: bool
) -> list[dict[str, Any]]:
    """What the check found in a row."""
    end = row["until"]
    return [problem for problem in own if _is_in(problem["at"], row["line"], end, is_text)]


def _is_in(line: int | None, begins: int | None, ends: int | None, is_text: bool) -> bool:
    if line is None or begins is None or line == begins:
        return line is not None and line == begins
    return is_text and begins < line and (ends is None or line < ends)
