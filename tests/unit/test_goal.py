"""`goal.val_loss`: what an evaluation says of it, and when it cannot take effect."""

from __future__ import annotations

from pathlib import Path

import pytest

from mule import progress
from mule.config.load import identity_fingerprint
from mule.errors import ConfigError
from mule.figures import figures_line
from mule.plan import forecast
from mule.train.goal import check_goal_has_rows, goal_fields
from tests.forecast_curves import TABLE, course, curve, recipe_of, write_run

WHOLE = curve(course())


@pytest.fixture(autouse=True)
def _table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast, "known", lambda: TABLE)


class Notes(progress.Silence):
    """What was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str, level: str) -> None:
        self.said.append(text)


def row_at(step: int) -> dict[str, float]:
    return {
        "step": step,
        "loss": WHOLE.losses[step - 1][1],
        "val_loss": dict(WHOLE.valid)[step],
        "epoch": step / WHOLE.course.steps_per_epoch,
    }


def test_an_evaluation_says_how_likely_the_goal_is(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs", "part", WHOLE, until=199)
    goal = WHOLE.valid[-1][1] + 0.05
    recipe = recipe_of(tmp_path / "new", 400, f"goal.val_loss={goal}")
    found = goal_fields(recipe, run, row_at(200))
    assert 0.6 < found["goal_probability"] <= 0.95
    assert 200 < found["goal_step"] <= 400
    assert figures_line(found) == (
        f"goal {found['goal_probability']:.0%} · at update {found['goal_step']:,}"
    )
    assert not run.standing_events("goal reached")


def test_reaching_it_is_said_and_logged_once(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs", "part", WHOLE, until=199)
    loss = row_at(200)["val_loss"]
    recipe = recipe_of(tmp_path / "new", 400, f"goal.val_loss={loss + 0.001}")
    sink = Notes()
    with run.lock(), progress.using(sink):
        first, again = goal_fields(recipe, run, row_at(200)), goal_fields(recipe, run, row_at(200))
        later = goal_fields(recipe, run, row_at(220))
    assert first == again == {"goal_probability": 1.0, "goal_step": 200}
    assert later["goal_probability"] == 1.0
    (event,) = run.standing_events("goal reached")
    assert (event["step"], event["val_loss"]) == (200, loss)
    assert sink.said == [
        f"goal reached: the validation loss is {loss:.4f} after update 200 "
        f"(goal.val_loss = {loss + 0.001:g})"
    ]


def test_without_a_goal_or_too_early_nothing_is_said(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs", "part", WHOLE, until=19)
    assert goal_fields(recipe_of(tmp_path / "a", 400), run, row_at(20)) == {}
    assert goal_fields(recipe_of(tmp_path / "b", 400, "goal.val_loss=0.1"), run, row_at(20)) == {}


def test_a_goal_needs_validation_rows(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path / "new", 400, "goal.val_loss=2.5")
    with pytest.raises(ConfigError) as caught:
        check_goal_has_rows(recipe, validates=False)
    assert caught.value.problems == [
        "goal.val_loss = 2.5 cannot take effect: there are no validation rows"
    ]
    assert caught.value.hint == (
        "give data.valid, or a data.valid_share above 0; or remove goal.val_loss"
    )
    check_goal_has_rows(recipe, validates=True)


def test_a_goal_changes_nothing_that_is_learned(tmp_path: Path) -> None:
    plain, aimed = recipe_of(tmp_path / "a", 400), recipe_of(tmp_path / "b", 400, "goal.val_loss=2")
    assert identity_fingerprint(plain) == identity_fingerprint(aimed)
