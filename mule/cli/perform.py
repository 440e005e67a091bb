"""Running one command: its sink, its result on the screen or as JSON, its errors and exit code."""

from __future__ import annotations

import json
import math
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from mule import progress
from mule.errors import MuleError

if TYPE_CHECKING:
    from rich.console import Console

DEBUG = "--debug"
Result = dict[str, Any]
Base = Annotated[str | None, typer.Option(help="Where an adapter's base model is now.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object as the last line of stdout.")]
PLAIN: dict[str, Any] = {"no_args_is_help": True, "rich_markup_mode": None}  # of a typer.Typer


def perform(
    work: Callable[[], Result],
    *,
    as_json: bool,
    show: Callable[[Console, Result], None] | None = None,
) -> None:
    """Do the work and show its result; with `as_json` the last line of stdout is one JSON object.

    A result whose `ok` is false exits with 1.
    """
    from mule.cli import render

    results, notices = render.consoles(as_json)
    try:
        with progress.using(render.sink_for(notices)):
            result = work()
    except (typer.Exit, BrokenPipeError):
        raise
    except KeyboardInterrupt:
        _fail(notices, "stopped", "", 130, as_json)
    except MuleError as error:
        _fail(notices, error.message, error.hint, error.exit_code, as_json)
    except Exception as error:
        message = f"{type(error).__name__}: {error} (at {_place(error)})"
        hint = "this is a defect of Mule, not of your input; the same with --debug shows where"
        _fail(notices, message, hint, 1, as_json)
    (show or render.print_result)(results, result)
    if result.get("next"):
        render.next_command(results, result["next"], result.get("language", "en"))
    if as_json:
        print_json(result)
    if result.get("ok") is False:
        raise typer.Exit(1)


def tabled(name: str) -> Callable[[Console, Result], None]:
    """The table of that name in cli/tables.py, imported when it is shown."""

    def show(console: Console, result: Result) -> None:
        from mule.cli import tables

        getattr(tables, name)(console, result)

    return show


def print_json(value: Result) -> None:
    """One line of JSON on stdout; paths become text, figures that are not finite null."""
    sys.stdout.write(json.dumps(_plain(value), ensure_ascii=False, allow_nan=False) + "\n")
    sys.stdout.flush()


def split_words(words: list[str]) -> tuple[Path | None, list[str]]:
    """The recipe, when the first word names one, and the `key=value` words."""
    if words and ("=" not in words[0] or Path(words[0]).exists()):
        return Path(words[0]), words[1:]
    return None, words


def _fail(notices: Console, message: str, hint: str, code: int, as_json: bool) -> NoReturn:
    from mule.cli import render

    if DEBUG in sys.argv:
        traceback.print_exc()
    render.print_error(notices, message, hint)
    if as_json:
        print_json({"ok": False, "error": message, "hint": hint, "exit_code": code})
    raise typer.Exit(code)


def _place(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
