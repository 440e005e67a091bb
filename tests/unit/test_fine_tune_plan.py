"""What a fine-tune on chats does where its recipe leaves it open, and what is said of it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from mule.config.load import load_recipe
from mule.config.schema import Recipe
from mule.errors import ConfigError
from mule.plan import fine_tune
from mule.plan.resolve import Resolved, resolve
from tests.unit.test_resolve import FACTS, TINY

# 400 chats, 5 to a packed row.
CHATS = dataclasses.replace(FACTS, num_rows=80, examples_per_row=5.0, num_chats=400, isolated=True)
NEW, TUNED = "model.size=2m", "model.path=runs/base"


def recipe(*overrides: str) -> Recipe:
    return load_recipe(None, ["data.train=[a.jsonl]", *overrides]).recipe


def tuned(*overrides: str, **facts: Any) -> Resolved:
    return resolve(recipe(TUNED, *overrides), TINY, dataclasses.replace(CHATS, **facts))


@pytest.mark.parametrize(
    ("num_chats", "epochs"),
    [(1, 10), (50, 10), (200, 10), (400, 5), (1_000, 3), (3_000, 3), (5_000, 2), (50_000, 1)],
)
def test_few_chats_are_read_often(num_chats: int, epochs: int) -> None:
    assert fine_tune.chosen_epochs(num_chats) == epochs


@pytest.mark.parametrize(("num_chats", "examples"), [(10, 4), (400, 4), (1_000, 10), (9_000, 16)])
def test_an_update_holds_more_of_many_chats(num_chats: int, examples: int) -> None:
    assert fine_tune.chosen_examples(num_chats) == examples


@pytest.mark.parametrize("num_steps", [1, 2, 7, 40, 79, 237, 300, 395, 790, 5_000])
@pytest.mark.parametrize("per_epoch", [0.5, 4.4, 79.0, 250.0])
def test_there_are_ten_evaluations_or_three_an_epoch(num_steps: int, per_epoch: float) -> None:
    every, reason = fine_tune.chosen_cadence(num_steps, per_epoch)
    epochs = num_steps / per_epoch
    evaluations = math.ceil(num_steps / every)  # the last update has one
    assert evaluations >= min(num_steps, 10, max(3, int(3 * epochs))) and reason
    assert num_steps // every <= max(2 * 10 + 2, 2 * epochs), (every, reason)


def test_evaluations_come_at_the_ends_of_epochs() -> None:
    assert fine_tune.chosen_cadence(790, 79.0) == (79, "an evaluation an epoch")
    assert fine_tune.chosen_cadence(240, 80.0) == (27, "3 evaluations an epoch")
    assert fine_tune.chosen_cadence(76, 76.0) == (26, "3 evaluations an epoch")  # 26, 52, and 76
    assert fine_tune.chosen_cadence(2400, 80.0) == (240, "one evaluation in 3 epochs")
    assert fine_tune.chosen_cadence(40, 80.0) == (14, "3 evaluations in less than an epoch")


def test_what_is_chosen_for_chats_and_why() -> None:
    found = tuned()
    settings = found.recipe
    # 4 chats are not even one packed row of 5.
    assert (found.step_rows, found.num_steps) == (1, 400)
    assert found.reasons["train.step_rows"] == "about 4 of 400 chats, at 5.00 a row"
    assert found.reasons["train.steps"] == "5 epochs of 80.0 updates, chosen for 400 chats"
    assert (settings.evaluate.every_steps, settings.checkpoint.every_steps) == (40, 40)
    assert found.reasons["evaluate.every_steps"] == "2 evaluations an epoch"
    assert found.reasons["checkpoint.every_steps"] == "at each evaluation, so that the best is kept"
    assert tuned(num_processes=3).step_rows == 3, "each process needs a row"


def test_what_is_given_is_kept() -> None:
    found = tuned("train.epochs=2", "train.step_examples=10", "evaluate.every_steps=7")
    assert (found.num_steps, found.step_rows) == (80, 2)
    assert found.recipe.evaluate.every_steps == 7
    assert found.recipe.checkpoint.every_steps == 7
    few = tuned("train.steps=1000", "evaluate.every_steps=1")
    assert few.recipe.checkpoint.every_steps == 50, "at most 20 checkpoints"
    assert few.reasons["checkpoint.every_steps"].startswith("at every 50 evaluations")


def test_other_runs_are_as_before() -> None:
    for found in (resolve(recipe(NEW), TINY, CHATS), resolve(recipe(TUNED), TINY, FACTS)):
        assert found.step_rows == 32 and "about 8,192 tokens" in found.reasons["train.step_rows"]
        assert found.reasons["evaluate.every_steps"] == "20 evaluations in the run"
        assert found.told(CHATS if found.recipe.model.size else FACTS, validates=True) == []


@pytest.mark.parametrize(
    ("overrides", "rate", "reason"),
    [
        ((NEW,), 6e-4, "a new model has everything to learn"),
        (
            (TUNED, "adapter.kind=lora"),
            2e-4,
            "an adapter begins at nothing: about ten times the rate of all weights",
        ),
        ((TUNED,), 2e-5, "all weights of a trained model: a higher rate undoes what it knows"),
    ],
)
def test_the_learning_rate(overrides: tuple[str, ...], rate: float, reason: str) -> None:
    found = resolve(recipe(*overrides), TINY, FACTS)
    assert found.recipe.optim.learning_rate == rate
    assert found.reasons["optim.learning_rate"] == reason
    given = resolve(recipe(*overrides, "optim.learning_rate=3e-3"), TINY, FACTS)
    assert given.recipe.optim.learning_rate == 3e-3
    assert "optim.learning_rate" not in given.reasons


def test_a_lowest_rate_above_the_chosen_one_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        tuned("optim.min_learning_rate=1e-4")
    assert caught.value.problems == [
        "optim.min_learning_rate = 0.0001 is above the 2e-05 that is chosen for optim.learning_rate"
    ]
    assert caught.value.hint == "lower it, or set optim.learning_rate"


def test_the_length_is_said_in_both_units() -> None:
    assert tuned("train.steps=300").told(CHATS, validates=True) == [
        ("400 chats: 300 updates = 3.75 epochs of 80 updates", "info")
    ]


def test_learning_by_heart_is_said_before() -> None:
    (_, _), (warning, level) = tuned("train.epochs=30").told(CHATS, validates=True)
    assert level == "warning"
    assert warning == (
        "every chat is seen 30 times: the model will know these 400 by heart, and answer others "
        "worse; set evaluate.patience=3 to stop when the validation loss rises, or train at most "
        "train.epochs=10"
    )
    (_, _), (warning, _) = tuned("train.steps=2400").told(CHATS, validates=False)
    assert "hold out some chats (data.valid) to see it, train at most train.epochs=10" in warning
    assert len(tuned("train.epochs=30", "evaluate.patience=3").told(CHATS, validates=True)) == 1
    assert len(tuned("train.epochs=10").told(CHATS, validates=True)) == 1
    many = dataclasses.replace(CHATS, num_chats=6_000)
    assert len(tuned("train.epochs=30").told(many, validates=True)) == 1


def test_patience_that_cannot_end_the_run_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        tuned("train.steps=100", "evaluate.every_steps=25", "evaluate.patience=3")
    assert caught.value.problems == [
        "evaluate.patience = 3 cannot take effect: it ends a run after 4 evaluations at the "
        "soonest, one in 25 updates, and this run has 100 updates"
    ]
    assert caught.value.hint == (
        "lower evaluate.patience or evaluate.every_steps, train longer, or remove evaluate.patience"
    )
    tuned("train.steps=101", "evaluate.every_steps=25", "evaluate.patience=3")


def test_a_resolved_fine_tune_resolves_to_itself() -> None:
    found = tuned()
    again = resolve(found.recipe, TINY, CHATS)
    assert again.recipe == found.recipe and not again.reasons
