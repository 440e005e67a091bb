"""A forecast on the terminal: its figures, and the curve as a plot of text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mule.cli import render
from mule.cli.text_plot import Line, text_plot

if TYPE_CHECKING:
    from rich.console import Console

_FIGURES = {
    "loss": "training loss",
    "val_loss": "validation loss",
    "best_val_loss": "lowest validation loss",
}
_KINDS = {"new model": "a new model", "fine-tune": "a fine-tune"}


def show_forecast(console: Console, result: dict[str, Any]) -> None:
    """Where the run is, what is expected of it, and what cannot be told."""
    now = result["now"]
    told = [f"{name} {now[key]:.4f}" for key, name in _FIGURES.items() if now.get(key) is not None]
    render.print_line(
        console,
        f"{result['run']}, {_KINDS[result['kind']]}, {result['state']}: update {result['step']:,} of "
        f"{result['num_steps']:,} ({result['share_done']:.0%}); {', '.join(told)}",
    )
    if result["path"]:
        render.print_line(console, "")
        for line in text_plot(_lines(result)):
            render.print_line(console, line)
    _show_estimates(console, result)
    _show_came(console, result["came"] or ())
    for line in _sentences(result):
        render.print_line(console, line)
    if result["forecast"] or result["twice"]:
        render.print_line(console, f"\n{result['basis']}")


def _lines(result: dict[str, Any]) -> list[Line]:
    curve, path = result["curve"], result["path"]
    return [
        Line(".", "training", curve["loss"]),
        Line("-", "training, expected", path.get("loss", ())),
        Line("o", "validation", curve["val_loss"]),
        Line("=", "validation, expected", path.get("val_loss", ())),
    ]


def _show_estimates(console: Console, result: dict[str, Any]) -> None:
    rows = [
        [_FIGURES[row["figure"]], f"{row['step']:,}", *_interval(row)] for row in result["forecast"]
    ]
    rows += [[f"lowest with {row['what']}", "", *_interval(row)] for row in result["twice"]]
    if rows:
        columns = ["expected", "at update", "nats a token", "80% interval"]
        render.print_table(console, "", columns, rows)


def _interval(row: dict[str, Any]) -> list[str]:
    return [f"{row['expected']:.4f}", f"{row['low']:.4f} to {row['high']:.4f}"]


def _show_came(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    if not rows:
        return
    cells = [
        [
            _FIGURES[row["figure"]],
            f"{row['step']:,}",
            f"{row['expected']:.4f}",
            f"{row['came']:.4f}",
            f"{row['off']:+.4f}",
            "yes" if row["held"] else "no",
        ]
        for row in rows
    ]
    columns = ["what came", "at update", "forecast", "came", "off by", "in the interval"]
    render.print_table(console, "", columns, cells)


def _sentences(result: dict[str, Any]) -> list[str]:
    lines = [""]
    if stop := result["stop"]:
        lines.append(f"when to stop: {stop['why']}")
    if goal := result["goal"]:
        lines.append(f"goal: {_goal(goal)}")
    return lines + [f"{row['what']}: {row['why']}" for row in result["cannot"]]


def _goal(goal: dict[str, Any]) -> str:
    loss = f"a validation loss of {goal['val_loss']:g}"
    if goal["probability"] == 1:
        return f"{loss} was reached after update {goal['step']:,}"
    if goal["probability"] == 0:
        return f"{loss} was not reached"
    when = f"at update {goal['step']:,}" if goal["step"] else "after the end, if at all"
    return f"{loss} is reached with a chance of {goal['probability']:.0%}; expected {when}"
