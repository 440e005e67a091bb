"""`mule runs forecast`: what is to be expected of the rest of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mule.errors import UserError
from mule.run import RUNS, Run

if TYPE_CHECKING:
    from mule.plan.forecast import Estimate, Forecast
    from mule.plan.forecast_curve import Curve

_MILESTONES = (0.25, 0.5, 0.75)
_SHOWN_POINTS = 64


def run(
    name: str, *, at: Sequence[int] = (), from_share: float | None = None, root: Path = RUNS
) -> dict[str, Any]:
    """Losses at the end and at milestones, when to stop, what twice as much would give.

    With `from_share` what would have been said at that share of the run, beside what came.
    """
    from mule.config.load import load_recipe
    from mule.plan.forecast import forecast
    from mule.plan.forecast_curve import read_curve

    opened = Run.open(name, root)
    whole = read_curve(opened)
    recipe = load_recipe(opened.folder / "resolved.yaml", []).recipe
    curve = whole if from_share is None else _early(whole, from_share)
    _check_steps(curve, at)
    milestones = at or [round(share * curve.num_steps) for share in _MILESTONES]
    found = forecast(curve, at=milestones, goal=recipe.goal.val_loss)
    state = opened.state()
    return {
        "run": opened.name,
        "state": state,
        "kind": curve.kind,
        "step": curve.step,
        "num_steps": curve.num_steps,
        "share_done": curve.share,
        "now": _now(curve),
        **_as_dict(found),
        "came": None if from_share is None else _what_came(whole, found),
        "basis": _basis(),
        "curve": _curve(curve),
        "path": found.path,
        "next": _next(opened, state, over=from_share is None and curve.step >= curve.num_steps),
    }


def _early(whole: Curve, share: float) -> Curve:
    """The curve as it was at that share of the run."""
    if not 0 < share < 1:
        raise UserError(
            f"--from-share {share:g} is not a part of a run", "give one between 0 and 1, as 0.5"
        )
    if share > whole.share:
        raise UserError(
            f"--from-share {share:g} is still to come: {whole.share:.0%} of the run is done",
            f"give less than {whole.share:.2f}, or leave it out for the forecast of now",
        )
    return whole.until(round(share * whole.num_steps))


def _check_steps(curve: Curve, at: Sequence[int]) -> None:
    for step in at:
        if not curve.step < step <= curve.num_steps:
            raise UserError(
                f"--at {step} is no update to come: {curve.step:,} of {curve.num_steps:,} are done",
                f"give one from {curve.step + 1} to {curve.num_steps}"
                if curve.step < curve.num_steps
                else "leave it out: the run is over",
            )


def _now(curve: Curve) -> dict[str, Any]:
    best = curve.best_valid()
    return {
        "loss": curve.mean_loss(curve.step),
        "val_loss": curve.valid[-1][1] if curve.valid else None,
        "best_val_loss": best[1] if best else None,
        "best_step": best[0] if best else None,
    }


def _as_dict(found: Forecast) -> dict[str, Any]:
    stop, goal = found.stop, found.goal
    return {
        "forecast": [{"figure": e.figure, "step": e.step, **_interval(e)} for e in found.estimates],
        "stop": {"verdict": stop.verdict, "step": stop.step, "why": stop.why} if stop else None,
        "twice": [
            {"what": e.figure, "figure": "best_val_loss", **_interval(e)} for e in found.twice
        ],
        "goal": None
        if goal is None
        else {"val_loss": goal.val_loss, "probability": goal.probability, "step": goal.step},
        "cannot": [{"what": what, "why": why} for what, why in found.cannot],
    }


def _interval(estimate: Estimate) -> dict[str, float]:
    return {"expected": estimate.expected, "low": estimate.low, "high": estimate.high}


def _what_came(whole: Curve, found: Forecast) -> list[dict[str, Any]]:
    """Of each forecast of an update that was reached: what came, and whether the interval held."""
    rows = []
    for estimate in found.estimates:
        if estimate.figure == "best_val_loss":
            best = whole.best_valid()
            came = best[1] if best and whole.step >= whole.num_steps else None
        else:
            came = whole.value(estimate.figure, estimate.step)
        if came is not None:
            held = estimate.low <= came <= estimate.high
            rows.append(
                {
                    "figure": estimate.figure,
                    "step": estimate.step,
                    "expected": estimate.expected,
                    "came": came,
                    "off": came - estimate.expected,
                    "held": held,
                }
            )
    return rows


def _basis() -> str:
    """What the intervals stand on."""
    from mule import fsio
    from mule.plan.forecast_errors import FILE

    known = fsio.read_json(FILE)
    return (
        f"80% intervals from the errors of such forecasts on {known['num_runs']} finished runs over "
        f"{known['num_data_sets']} data sets; docs/forecast.md says how often they held"
    )


def _curve(curve: Curve) -> dict[str, list[tuple[int, float]]]:
    """The curve so far, thinned to what a plot of text can show."""
    from statistics import fmean

    size = -(-len(curve.losses) // _SHOWN_POINTS)
    parts = [curve.losses[start : start + size] for start in range(0, len(curve.losses), size)]
    means = [(part[-1][0], fmean(loss for _, loss in part)) for part in parts]
    return {"loss": means, "val_loss": list(curve.valid)}


def _next(run: Run, state: str, *, over: bool) -> str:
    if over:
        return f"mule runs forecast {run.name} --from-share 0.5"
    if state in ("interrupted", "failed", "new"):
        return f"mule train {run.folder / 'recipe.yaml'} --resume"
    return f"mule runs show {run.name}"
