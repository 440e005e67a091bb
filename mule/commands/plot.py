"""`mule runs plot`: the loss of runs as a picture for a page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mule import fsio
from mule.errors import UserError
from mule.run import RUNS, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FORMATS = (".svg", ".png", ".pdf")
_AXES = {"tokens": "trained tokens", "steps": "updates"}
_SMOOTHED_OVER = 50  # the line is a running mean over 1/50 of the run
MAX_POINTS = 2000  # of the unsmoothed loss: more are not seen, and make a large file
_COLOURS = ("#1f6fb4", "#d1495b", "#2e8b57", "#8e5ea2", "#c77d0a", "#4a4a4a")
STYLE = {
    "svg.hashsalt": "mule",  # the same runs give the same file
    "font.size": 11.0,
    "axes.grid": True,
    "grid.color": "#e3e3e3",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def run(runs: list[str], out: Path, *, by: str = "tokens", root: Path = RUNS) -> dict[str, Any]:
    """Draw the loss of `runs` into `out`, against tokens or steps; white, for any page."""
    _check(out, by)
    opened = [Run.open(name, root) for name in runs]
    curves = [curve_of(run, by) for run in opened]
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(
            "drawing needs matplotlib, which is not installed",
            "install it: pip install matplotlib (or Mule with its extra: mule[report])",
        ) from None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 4.5), layout="constrained", facecolor="white")
        axes = figure.subplots()
        for curve, colour in zip(curves, _colours(len(curves))):
            draw(axes, curve, colour)
        if len(curves) > 1:  # the lines would be too many
            curves = [{**curve, "sources": {}} for curve in curves]
        _draw_sources(axes, curves[0]["sources"])
        _label(axes, curves, by)
        metadata = {"Date": None} if out.suffix == ".svg" else {}
        with fsio.stream_file(out) as temporary:
            figure.savefig(temporary, format=out.suffix[1:], dpi=150, metadata=metadata)
    return {
        "file": str(out),
        "curves": [_summary(curve) for curve in curves],
        "next": f"mule runs show {runs[0]}",
    }


def curve_of(run: Run, by: str) -> dict[str, Any]:
    """x, loss and smoothed loss of each update, and (x, loss) of each validation.

    The latter also of each source, where the run has several.
    """
    rows = [row for row in run.metrics() if row.get("loss") is not None]
    if not rows:
        raise UserError(
            f"{run.folder} has no figures to draw",
            f"train it first: mule train {run.folder / 'recipe.yaml'} --resume",
        )
    x: list[float] = []
    for row in rows:
        before = x[-1] if x else 0.0
        x.append(before + row["num_targets"] if by == "tokens" else row["step"])
    losses = [row["loss"] for row in rows]
    valid = [(at, row["val_loss"]) for at, row in zip(x, rows) if row.get("val_loss") is not None]
    sources: dict[str, list[tuple[float, float]]] = {}
    for at, row in zip(x, rows):
        for source, loss in row.get("val_loss_by", {}).items():
            sources.setdefault(source, []).append((at, loss))
    return {
        "name": run.name,
        "x": x,
        "loss": losses,
        "smoothed": running_mean(losses, max(1, len(losses) // _SMOOTHED_OVER)),
        "valid": valid,
        "sources": sources,
    }


def running_mean(values: list[float], window: int) -> list[float]:
    """The mean of the last `window` values at each place, of fewer at the start."""
    means, total = [], 0.0
    for place, value in enumerate(values):
        total += value
        if place >= window:
            total -= values[place - window]
        means.append(total / min(place + 1, window))
    return means


def draw(axes: Axes, curve: dict[str, Any], colour: str) -> None:
    """The loss as it was, a running mean over it, and the validations."""
    stride = -(-len(curve["x"]) // MAX_POINTS)
    x = curve["x"][::stride]
    axes.plot(x, curve["loss"][::stride], color=colour, alpha=0.22, linewidth=0.8)
    label = f"{curve['name']}, training"
    axes.plot(x, curve["smoothed"][::stride], color=colour, linewidth=1.8, label=label)
    if curve["valid"]:
        places, losses = zip(*curve["valid"])
        label = f"{curve['name']}, validation {losses[-1]:.3f}"
        axes.plot(places, losses, color=colour, linestyle="--", marker="o", ms=4, label=label)


def _draw_sources(axes: Axes, sources: dict[str, list[tuple[float, float]]]) -> None:
    colours = _colours(len(sources) + 1)[1:]  # the first is the run's
    for (source, points), colour in zip(sources.items(), colours):
        places, losses = zip(*points)
        label = f"{source} {losses[-1]:.3f}"
        axes.plot(places, losses, color=colour, linestyle=":", marker=".", label=label)


def _label(axes: Axes, curves: list[dict[str, Any]], by: str) -> None:
    from matplotlib.ticker import EngFormatter

    axes.set_xlabel(_AXES[by])
    axes.set_ylabel("loss (nats a token)")
    axes.set_title("Loss of " + ", ".join(curve["name"] for curve in curves))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlim(left=0)
    # The first updates fall from ln(vocabulary); what follows would be squeezed below them.
    after = [loss for c in curves for loss in c["smoothed"][len(c["smoothed"]) // 20 :]]
    lines = [line for c in curves for line in (c["valid"], *c["sources"].values())]
    held_out = [loss for line in lines for _, loss in line[1:]]
    low, high = min(after + held_out), max(after + held_out)
    margin = 0.08 * max(high - low, 0.1)
    axes.set_ylim(low - margin, high + 2 * margin)
    axes.legend(frameon=False)


def _summary(curve: dict[str, Any]) -> dict[str, Any]:
    last = curve["valid"][-1][1] if curve["valid"] else None
    return {
        "run": curve["name"],
        "updates": len(curve["loss"]),
        "loss": curve["smoothed"][-1],
        "val_loss": last,
    }


def _colours(count: int) -> list[str]:
    return [_COLOURS[place % len(_COLOURS)] for place in range(count)]


def _check(out: Path, by: str) -> None:
    if out.suffix not in _FORMATS:
        raise UserError(
            f"{out}: a picture cannot be written as {out.suffix or 'a file without a suffix'}",
            f"name the file with one of {', '.join(_FORMATS)}: --out {out.with_suffix('.svg')}",
        )
    if by not in _AXES:
        raise UserError(f"there is no axis `{by}`", f"--by takes one of {', '.join(_AXES)}")
