"""The curves of report.md: loss, learning rate, gradient norm and memory, in one picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mule import fsio
from mule.commands.plot import MAX_POINTS, STYLE, draw
from mule.doctor import signals

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from mule.doctor.history import History, Series

_COLOUR, _LIMIT = "#1f6fb4", "#d1495b"


def draw_curves(history: History, curve: dict[str, Any], out: Path) -> None:
    """Draw the four curves; `curve` as of mule.commands.plot.curve_of, by steps."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 6.5), layout="constrained", facecolor="white")
        loss, rate, norm, memory = figure.subplots(2, 2).flat
        draw(loss, curve, _COLOUR)
        after = curve["smoothed"][len(curve["smoothed"]) // 20 :]
        shown = after + [value for _, value in curve["valid"]]
        margin = 0.08 * max(max(shown) - min(shown), 0.1)
        loss.set_ylim(min(shown) - margin, max(shown) + 2 * margin)
        loss.set_title("Loss (nats a token)")
        loss.legend(frameon=False, fontsize=9)
        _line(rate, history.series("learning_rate"), "Learning rate")
        _norms(norm, history)
        name = "memory_now_bytes" if history.has("memory_now_bytes") else "memory_bytes"
        found = history.series(name)
        _line(memory, type(found)(found.steps, [v / 2**30 for v in found.values]), "Memory (GiB)")
        memory.set_ylim(bottom=0)
        for axes in (loss, rate, norm, memory):
            axes.set_xlabel("updates")
            axes.set_xlim(left=0)
        with fsio.stream_file(out) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})


def _line(axes: Axes, series: Series, title: str) -> None:
    stride = max(1, -(-len(series) // MAX_POINTS))
    axes.plot(series.steps[::stride], series.values[::stride], color=_COLOUR, linewidth=1.5)
    axes.set_title(title)


def _norms(axes: Axes, history: History) -> None:
    norms, limit = history.series("grad_norm"), history.recipe.optim.max_grad_norm
    stride = max(1, -(-len(norms) // MAX_POINTS))
    axes.plot(
        norms.steps[::stride], norms.values[::stride], color=_COLOUR, alpha=0.3, linewidth=0.8
    )
    smooth = signals.smoothed(norms, max(1, len(norms) // 50))
    axes.plot(smooth.steps[::stride], smooth.values[::stride], color=_COLOUR, linewidth=1.8)
    axes.axhline(limit, color=_LIMIT, linestyle="--", linewidth=1.0)
    axes.set_yscale("log")
    axes.set_title("Gradient norm, and where it is clipped")
