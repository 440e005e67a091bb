"""`mule runs watch`: live on a terminal, lines elsewhere, rows with --json."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mule.cli.perform import Json, Result, perform, print_json

if TYPE_CHECKING:
    from rich.console import Console

    from mule.commands.watch import Watched

_LINE_EVERY_S = 5.0  # between two lines where nobody sees them change
_QUIT = b"qQ\x03\x04"


def watch(
    run: Annotated[
        str | None,
        typer.Argument(help="A run's name or folder; else the newest.", show_default=False),
    ] = None,
    *,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0,
    root: Annotated[Path, typer.Option("--root", help="The folder of the runs.")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """Look on while a run trains, wherever it was started; q or Ctrl-C quits, and it goes on."""

    def work() -> Result:
        from mule.cli import render
        from mule.commands.watch import Watched, find

        watched = Watched(find(run, root))
        results, _ = render.consoles(as_json)
        with contextlib.suppress(KeyboardInterrupt):
            if as_json:
                _stream(watched, every)
            elif results.is_terminal and not results.is_dumb_terminal and sys.stdin.isatty():
                _show_live(watched, results, every)
            else:
                _print_lines(watched, results, every)
        return watched.result()

    perform(work, as_json=as_json, show=_show_end)


def _stream(watched: Watched, every: float) -> None:
    """Each row of metrics as it is written, a JSON object a line."""
    while True:
        is_running = watched.run.state() == "running"  # asked before the last rows are read
        for row in watched.new_rows():
            print_json(row)
        if not is_running:
            return
        time.sleep(every)


def _print_lines(watched: Watched, console: Console, every: float) -> None:
    from mule.cli import render, watch_view

    said: set[str] = set()
    due = 0.0
    while (now := watched.now(2))["state"] == "running":
        if time.monotonic() >= due:
            render.print_line(console, watch_view.line(now))
            due = time.monotonic() + _LINE_EVERY_S
        for finding in now["findings"]:
            if finding["code"] not in said and finding["severity"] != "note":
                render.print_line(console, watch_view.told(finding))
            said.add(finding["code"])
        time.sleep(every)


def _show_live(watched: Watched, console: Console, every: float) -> None:
    from rich.live import Live

    from mule.cli import watch_view

    now = watched.now(2 * console.width)
    if now["state"] != "running":
        console.print(watch_view.view(now, console.size, is_live=False))
        return
    with _keys() as pressed, Live(console=console, screen=True, auto_refresh=False) as live:
        while now["state"] == "running":
            live.update(watch_view.view(now, console.size), refresh=True)
            if pressed(every):
                return
            now = watched.now(2 * console.width)


@contextlib.contextmanager
def _keys() -> Iterator[Any]:
    """A function that waits so many seconds for a key that quits, and says whether it came."""
    import termios
    import tty

    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)

    def pressed(seconds: float) -> bool:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if select.select([terminal], [], [], left)[0]:
                typed = os.read(terminal, 64)
                if not typed or any(key in _QUIT for key in typed):
                    return True
        return False

    try:
        tty.setcbreak(terminal)  # a key at a time, unseen; Ctrl-C stays what it is
        yield pressed
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


def _show_end(console: Console, result: Result) -> None:
    from mule.cli import render, watch_view

    render.print_line(console, watch_view.end(result))
    for finding in result["findings"]:
        if finding["severity"] != "note":
            render.print_line(console, watch_view.told(finding))
