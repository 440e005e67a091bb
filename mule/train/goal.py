"""`goal.val_loss`: what each evaluation says of it."""

from __future__ import annotations

from typing import Any

from mule import progress
from mule.config.schema import Recipe
from mule.errors import ConfigError
from mule.plan.forecast import chance_of
from mule.plan.forecast_curve import curve_of
from mule.run import Run

_REACHED = "goal reached"  # the event


def goal_fields(recipe: Recipe, run: Run, row: dict[str, Any]) -> dict[str, Any]:
    """What an evaluation adds to its row of metrics: the chance of the goal, and its update.

    Empty without a goal, or where nothing can be told yet. Reaching it is logged and said, once.
    """
    goal = recipe.goal.val_loss
    if goal is None or row.get("val_loss") is None:
        return {}
    before = [known for known in run.metrics() if known["step"] < row["step"]]
    found = chance_of(curve_of(recipe, [*before, row]), goal)
    if found is None:
        return {}
    if found.step == row["step"] and not run.standing_events(_REACHED):
        run.log_event(_REACHED, step=row["step"], val_loss=row["val_loss"], goal=goal)
        progress.note(
            f"goal reached: the validation loss is {row['val_loss']:.4f} after update "
            f"{row['step']:,} (goal.val_loss = {goal:g})"
        )
    return {"goal_probability": round(found.probability, 3), "goal_step": found.step}


def check_goal_has_rows(recipe: Recipe, *, validates: bool) -> None:
    """ConfigError where nothing is validated that goal.val_loss could be compared with."""
    if recipe.goal.val_loss is not None and not validates:
        raise ConfigError(
            [
                f"goal.val_loss = {recipe.goal.val_loss:g} cannot take effect: there are no "
                "validation rows"
            ],
            "give data.valid, or a data.valid_share above 0; or remove goal.val_loss",
        )
