"""A run on a terminal: state, bar, plots of text, findings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mule.cli.text_plot import Line, text_plot
from mule.figures import duration, figures_line, short

if TYPE_CHECKING:
    from rich.console import ConsoleDimensions, RenderableType

_STATES = {"running": "cyan", "finished": "green", "interrupted": "yellow", "new": "yellow"}
_WORST = {"good": "green", "warning": "yellow", "alarm": "red"}
_FEWEST_LINES = 22  # of a terminal that has room for the small plots too
_MOST_FINDINGS = 3
_SCALE = 10  # columns that the scale of a plot takes
_MARKS = {"training": ".", "training, mean": "*", "validation": "o"}


def view(now: dict[str, Any], size: ConsoleDimensions, *, is_live: bool = True) -> RenderableType:
    """The whole screen; in a small one what matters first."""
    from rich.console import Group
    from rich.text import Text

    findings = _findings(now)
    small = size.height >= _FEWEST_LINES
    left = size.height - 8 - len(findings) - (6 if small else 0)
    parts: list[RenderableType] = [_head(now), _progress(now, size.width)]
    parts.append(Text(figures_line(now["figures"]), no_wrap=True, overflow="ellipsis"))
    parts.append(Text(""))
    parts += _loss(now, size.width, max(3, left))
    if small:
        parts.append(_pair(now, size.width))
    parts += findings
    if is_live:
        parts.append(Text("q quits; the run goes on", style="dim"))
    return Group(*parts)


def line(now: dict[str, Any]) -> str:
    """The run in one line."""
    told = [f"{now['run']}: {now['state']}", _count(now), _left(now), figures_line(now["figures"])]
    told.append(f"doctor: {now['verdict']}" if now["verdict"] else "")
    return " · ".join(part for part in told if part)


def told(finding: dict[str, Any]) -> str:
    """A finding in one line."""
    return (
        f"{finding['severity']} {finding['code']} {finding['title']}, since update "
        f"{finding['step']:,}: {finding['what']}. Try {finding['remedy']}"
    )


def end(result: dict[str, Any]) -> str:
    """How the run stands when nobody looks on any more."""
    parts = [f"{result['run']}: {result['state']}", _count(result)]
    parts += [
        f"{name} {result[key]:.4f}"
        for key, name in (("loss", "loss"), ("val_loss", "val"))
        if result[key] is not None
    ]
    parts.append(f"doctor: {result['verdict']}" if result["verdict"] else "")
    return " · ".join(part for part in parts if part)


# ---------------------------------------------------------------- parts


def _head(now: dict[str, Any]) -> RenderableType:
    from rich.text import Text

    head = Text(now["run"], style="bold", no_wrap=True, overflow="ellipsis")
    head.append(f"  {now['state']}", style=_STATES.get(now["state"], "red"))
    if now["stage"]:
        head.append(f"  {now['stage']}", style="not bold")
    if now["verdict"]:
        head.append("  doctor: ", style="not bold")
        head.append(now["verdict"], style=_WORST.get(now["worst"], ""))
    return head


def _progress(now: dict[str, Any], width: int) -> RenderableType:
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    row = Table.grid(padding=(0, 2))
    words = "  ".join(part for part in (_count(now), _left(now)) if part)
    bar = ProgressBar(
        total=now["num_steps"] or 1, completed=now["steps"], width=min(40, width // 3)
    )
    row.add_row(bar, Text(words, no_wrap=True))
    return row


def _count(now: dict[str, Any]) -> str:
    if not now["num_steps"]:
        return f"update {now['steps']:,}" if now["steps"] else "no update yet"
    return f"{now['steps']:,}/{now['num_steps']:,} ({now['steps'] / now['num_steps']:.0%})"


def _left(now: dict[str, Any]) -> str:
    return "" if now["left_s"] is None else f"{duration(now['left_s'])} left"


def _loss(now: dict[str, Any], width: int, height: int) -> list[RenderableType]:
    from rich.text import Text

    lines = [
        Line(_MARKS.get(trace["label"], "x"), trace["label"], list(zip(trace["x"], trace["y"])))
        for trace in now["charts"].get("loss", {"traces": ()})["traces"]
    ]
    plot = text_plot(lines, width=max(20, width - _SCALE), height=height)
    if not plot:
        return [Text("the curves begin with the first update", style="dim")]
    return [Text(row, no_wrap=True) for row in plot]


def _pair(now: dict[str, Any], width: int) -> RenderableType:
    """The gradient norm and the tokens a second, beside each other."""
    from rich.table import Table
    from rich.text import Text

    row = Table.grid(padding=(0, 2))
    cells = []
    for name, label in (("grad_norm", "{:.3g}".format), ("tokens_per_second", short)):
        chart = now["charts"].get(name)
        if chart is None:
            continue
        trace = chart["traces"][-1]
        points = [Line("*", chart["title"].lower(), list(zip(trace["x"], trace["y"])))]
        plot = text_plot(points, width=max(16, width // 2 - _SCALE), height=3, label=label)
        cells.append(Text("\n".join(plot), no_wrap=True))
    if cells:
        row.add_row(*cells)
    return row


def _findings(now: dict[str, Any]) -> list[RenderableType]:
    from rich.text import Text

    grave = [row for row in now["findings"] if row["severity"] != "note"]
    shown: list[RenderableType] = [
        Text(told(row), style=_WORST[row["severity"]], no_wrap=True, overflow="ellipsis")
        for row in grave[:_MOST_FINDINGS]
    ]
    if len(grave) > _MOST_FINDINGS:
        shown.append(Text(f"and {len(grave) - _MOST_FINDINGS} more: mule doctor {now['run']}"))
    return shown
