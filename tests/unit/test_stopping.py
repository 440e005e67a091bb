"""What the evaluations say: early stopping and overfitting, and that a resumed run says the same."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from mule.config.load import load_recipe
from mule.errors import ConfigError
from mule.run import Run
from mule.train.stopping import Evaluations, check_patience_has_rows


def after(*losses: float, patience: int | None = None, train: str = "falls") -> Evaluations:
    """Evaluations every 5 updates, with a training loss that falls or rises steadily."""
    found = Evaluations(patience)
    for number, loss in enumerate(losses, start=1):
        for step in range(5):
            change = 0.1 * number + 0.01 * step
            found.trained(3 - change if train == "falls" else 3 + change)
        found.evaluated(5 * number, loss)
    return found


def test_patience_counts_evaluations_since_the_best() -> None:
    assert after(3.0, 2.0, 2.1, 2.1, patience=3).why_stop() is None
    assert after(3.0, 2.0, 2.1, 2.1, 2.0, patience=3).why_stop() == (
        "3 evaluations without a better validation loss (2.0000 after update 10)"
    )
    assert after(3.0, 2.0, 2.1, 2.1, 1.9, 2.0, 2.0, patience=3).why_stop() is None
    assert after(3.0, *[4.0] * 50).why_stop() is None, "without patience a run goes on"


def test_a_loss_that_is_not_finite_is_no_better() -> None:
    found = after(2.0, math.nan, math.nan, patience=2)
    assert found.why_stop() is not None and not found.is_best_now
    assert found.best is not None and found.best.step == 5
    lost = after(math.nan, math.nan, patience=2)
    assert lost.best is None and lost.overfitting() is None
    assert lost.why_stop() == "2 evaluations without a better validation loss (never finite)"


def test_the_best_is_the_first_of_equals() -> None:
    found = after(2.0, 1.0, 1.0)
    assert found.best is not None and found.best.step == 10
    assert not found.is_best_now and after(2.0, 1.0).is_best_now


def test_overfitting_is_a_rise_while_the_training_loss_falls() -> None:
    assert after(2.0, 1.5, 1.6, 1.7).overfitting() == (
        "the validation loss rose from 1.5000 (update 10) to 1.7000 (update 20), while the "
        "training loss fell from 2.7800 to 2.5800"
    )
    assert after(2.0, 1.5, 1.6).overfitting() is None, "one evaluation is chance"
    assert after(2.0, 1.5, 1.6, 1.501).overfitting() is None, "so little is chance too"
    assert after(2.0, 1.5, 1.6, 1.7, train="rises").overfitting() is None
    assert after(2.0, 1.5, 1.4, 1.3).overfitting() is None


@pytest.mark.parametrize("done", [0, 3, 5, 12, 20])
def test_a_resumed_run_goes_on_from_the_log(tmp_path: Path, done: int) -> None:
    run = Run.create(tmp_path, "r", "")
    run.start_attempt()
    expected = Evaluations(2)
    for step in range(1, 21):
        row = {"step": step, "loss": 3 / step, "grad_norm": 1.0}
        if step <= done:
            expected.trained(row["loss"])
        if step % 5 == 0:
            row["val_loss"] = math.nan if step == 10 else 2.0 + step / 100
            if step <= done:
                expected.evaluated(step, row["val_loss"])
        run.log_metrics(row)
    found = Evaluations(2)
    rows = (row for row in run.metrics() if row["step"] <= done)
    found.restore(json.loads(json.dumps(Evaluations.read(rows))))
    assert str(found) == str(expected)  # NaN is not equal to itself
    assert found.why_stop() == expected.why_stop()
    assert (found.why_stop() is not None) == (done == 20)


def test_patience_needs_validation_rows() -> None:
    words = ["data.train=[a.jsonl]", "model.size=2m"]
    patient = load_recipe(None, [*words, "evaluate.patience=2"]).recipe
    with pytest.raises(ConfigError) as caught:
        check_patience_has_rows(patient, validates=False)
    assert caught.value.problems == [
        "evaluate.patience = 2 cannot take effect: there are no validation rows"
    ]
    assert caught.value.hint == (
        "give data.valid, or a data.valid_share above 0; or remove evaluate.patience"
    )
    check_patience_has_rows(patient, validates=True)
    check_patience_has_rows(load_recipe(None, words).recipe, validates=False)
