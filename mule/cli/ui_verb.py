"""`mule ui`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mule.cli.perform import Json, Result, perform, print_json
from mule.run import RUNS


def ui(
    *,
    runs: Annotated[Path, typer.Option(help="The folder of the runs.")] = RUNS,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0 takes a free one.")] = 8700,
    token_file: Annotated[
        Path | None, typer.Option(help="The file of the token, kept; made if there is none.")
    ] = None,
    read_only: Annotated[
        bool, typer.Option("--read-only", help="Show everything, start and change nothing.")
    ] = False,
    browser: Annotated[
        bool, typer.Option("--browser/--no-browser", help="Open it in your browser.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Show runs, data, plans, exports and chat in the browser, on this machine."""

    def started(about: dict[str, Any]) -> None:
        if as_json:
            print_json(about)
            return
        from mule.cli import render

        results, _ = render.consoles(as_json)
        render.print_line(results, f"open {about['open']}")
        render.print_line(results, "Ctrl-C stops the pages; runs that were started there go on.")

    def work() -> Result:
        from mule.web import server

        return server.run(
            runs=runs,
            host=host,
            port=port,
            token_file=token_file,
            read_only=read_only,
            browser=browser and not as_json,
            on_start=started,
        )

    perform(work, as_json=as_json, show=lambda _console, _result: None)
