"""`mule runs forecast` on run folders: what it prints, its JSON, its errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mule.cli import render_plan
from mule.cli.main import app
from mule.cli.text_plot import Line, text_plot
from mule.commands import forecast as command
from mule.errors import UserError
from mule.plan import forecast, forecast_before, forecast_errors
from tests.forecast_curves import TABLE, course, curve, write_run

WHOLE = curve(course())


@pytest.fixture(autouse=True)
def _table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors that do not change when they are measured anew."""
    for module in (forecast, forecast_before, forecast_errors):
        monkeypatch.setattr(module, "known", lambda: TABLE)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("forecast") / "runs"
    write_run(root, "whole", WHOLE, "goal.val_loss=2.6")
    write_run(root, "part", WHOLE, until=200)
    write_run(root, "young", WHOLE, until=8)
    return root


def invoke(root: Path, *words: str) -> str:
    done = CliRunner().invoke(app, ["runs", "forecast", *words, "--root", str(root)])
    assert done.exit_code == 0, done.output
    return done.output


def as_json(root: Path, *words: str) -> dict[str, Any]:
    return json.loads(invoke(root, *words, "--json").splitlines()[-1])


def test_a_run_that_was_interrupted(root: Path) -> None:
    found = as_json(root, "part", "--at", "350")
    assert (found["step"], found["num_steps"], found["kind"]) == (200, 400, "new model")
    steps = {(row["figure"], row["step"]) for row in found["forecast"]}
    assert {("loss", 350), ("val_loss", 350), ("loss", 400), ("val_loss", 400)} <= steps
    for row in found["forecast"]:
        assert row["low"] < row["expected"] < row["high"]
    assert found["came"] is None and found["goal"] is None
    assert found["next"] == f"mule train {root / 'part' / 'recipe.yaml'} --resume"


def test_half_of_a_finished_run_beside_what_came(root: Path) -> None:
    found = as_json(root, "whole", "--from-share", "0.5")
    end = next(row for row in found["came"] if (row["figure"], row["step"]) == ("val_loss", 400))
    assert end["came"] == WHOLE.valid[-1][1]
    assert end["off"] == pytest.approx(end["came"] - end["expected"])
    assert found["goal"]["val_loss"] == 2.6 and 0 < found["goal"]["probability"] <= 1
    assert found["next"] == "mule runs show whole"


def test_the_page(root: Path) -> None:
    page = invoke(root, "whole", "--from-share", "0.5")
    for text in (
        "whole, a new model, finished: update 200 of 400 (50%); training loss 2.",
        ". training  - training, expected  o validation  = validation, expected",
        "80% interval",
        "lowest validation loss",
        "lowest with twice the updates",
        "in the interval",
        "when to stop: the validation loss is expected to fall to the end",
        "goal: a validation loss of 2.6 is reached with a chance of ",
        "twice the data: no change: the run reads its data 0.50 times",
        "80% intervals from the errors of such forecasts on",
        "next: mule runs show whole",
    ):
        assert text in page


def test_a_finished_run_has_nothing_to_come(root: Path) -> None:
    page = invoke(root, "whole")
    assert "goal: a validation loss of 2.6 was reached after update " in page
    assert "next: mule runs forecast whole --from-share 0.5" in page
    assert "lowest with twice the updates" in page


def test_a_young_run_says_so(root: Path) -> None:
    page = invoke(root, "young")
    assert "the losses: cannot be told: the run is too young: update 8 of 400" in page


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (
            {"from_share": 0.9},
            "--from-share 0.9 is still to come: 50% of the run is done",
            "give less than 0.50, or leave it out for the forecast of now",
        ),
        (
            {"from_share": 1.5},
            "--from-share 1.5 is not a part of a run",
            "give one between 0 and 1, as 0.5",
        ),
        (
            {"at": [100]},
            "--at 100 is no update to come: 200 of 400 are done",
            "give one from 201 to 400",
        ),
    ],
)
def test_what_cannot_be_asked(root: Path, words: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        command.run("part", root=root, **words)
    assert (caught.value.message, caught.value.hint) == (message, hint)


def test_nothing_is_left_of_a_finished_run_to_ask_for(root: Path) -> None:
    with pytest.raises(UserError) as caught:
        command.run("whole", at=[400], root=root)
    assert caught.value.hint == "leave it out: the run is over"


def test_a_run_without_updates(tmp_path: Path) -> None:
    from mule.run import Run

    Run.create(tmp_path, "new", "model: {}\n")
    with pytest.raises(UserError) as caught:
        command.run("new", root=tmp_path)
    assert caught.value.message == (
        f"{tmp_path / 'new'} has made no update yet: there is no curve to go by"
    )
    assert caught.value.hint == f"start it: mule train {tmp_path / 'new' / 'recipe.yaml'} --resume"


# ---------------------------------------------------------------- the plot


def test_a_plot_of_text() -> None:
    falling = [(float(x), 10.0 - x) for x in range(11)]
    rows = text_plot([Line(".", "loss", falling), Line("o", "end", [(10.0, 0.0)])])
    assert rows[0].startswith("9.000 |") and rows[13].startswith("0.000 |")
    assert rows[13].endswith("o")  # the later line covers the earlier one
    assert rows[14].split() == ["0", "10"]
    assert rows[15].strip() == ". loss  o end"
    assert text_plot([Line(".", "loss", [])]) == []


# ---------------------------------------------------------------- before the start


def test_the_loss_before_the_start_from_runs_on_the_same_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mule import fsio
    from mule.plan.forecast_before import forecast_before
    from mule.plan.shape import new_model_config
    from mule.run import list_runs
    from tests.forecast_curves import recipe_of, true_loss

    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("a text\n")
    sums = fsio.sha256_file(tmp_path / "text.txt")
    for seed in (1, 2):
        write_run(tmp_path / "runs", f"like-{seed}", curve(course(), seed=seed), sums=sums)
    write_run(tmp_path / "runs", "other", curve(course(), floor=5.0), sums="other")
    write_run(tmp_path / "runs", "begun", WHOLE, until=100, sums=sums)
    recipe = recipe_of(tmp_path / "new", 800)
    config = new_model_config(recipe, 300)
    found = forecast_before(recipe, config, list_runs(tmp_path / "runs"))
    assert found.cannot is None and list(found.runs) == ["like-1", "like-2"]
    assert [e.step for e in found.estimates] == [200, 400, 600, 800]
    last = found.estimates[-1]
    assert abs(last.expected - (true_loss(course(800), 800) + 0.1)) < 0.1
    assert last.low < last.expected < last.high
    rows = found.as_dict()["milestones"]
    assert rows[-1] == {
        "step": 800,
        "val_loss": last.expected,
        "low": last.low,
        "high": last.high,
    }
    page = render_plan._forecast(found.as_dict())
    assert page.startswith("validation, 80% intervals, from 2 finished runs: update 200 2.")
    assert page.endswith(f"update 800 {last.expected:.3f} ({last.low:.3f} to {last.high:.3f})")


def test_before_the_start_losses_of_other_data_are_no_guide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mule.plan.forecast_before import forecast_before
    from mule.plan.shape import new_model_config
    from mule.run import list_runs
    from tests.forecast_curves import recipe_of

    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("a text\n")
    recipe = recipe_of(tmp_path / "new", 800)
    config = new_model_config(recipe, 300)
    none = forecast_before(recipe, config, list_runs(tmp_path / "runs"))
    assert none.cannot == "cannot be told: no finished run is here to compare with"
    write_run(tmp_path / "runs", "other", WHOLE, sums="other")
    other = forecast_before(recipe, config, list_runs(tmp_path / "runs"))
    assert not other.estimates
    assert other.cannot == (
        "cannot be told: none of 1 finished runs learned from the same files with the same tokenizer, "
        "held out alike; losses of others are no guide"
    )
