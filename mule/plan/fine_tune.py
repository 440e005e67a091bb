"""What a fine-tune on chats does where its recipe leaves it open: how long, how much at once, how fast.

Pure functions; docs/fine-tuning-runs.md gives the reasons and the sources of the rules.
"""

from __future__ import annotations

import math

from mule.config.schema import Recipe
from mule.errors import ConfigError

_USUAL_EPOCHS = 3  # of Alpaca's recipe, and what hosted fine-tuning begins with
_FEW_READ = 2_000  # fewer chats are repeated until so many were read,
_MOST_EPOCHS = 10  # but not more often than this (LIMA chose among the epochs 5 to 10)
_MANY_READ = 10_000  # more chats are not repeated beyond so many
_FEWEST_AN_UPDATE, _MOST_AN_UPDATE = 4, 16
_UPDATES_AN_EPOCH = 100  # where the sizes above allow it
_EVALUATIONS, _MOST_AN_EPOCH, _MOST_SAVES = 10, 3, 20
_NEW_MODEL, _ADAPTER, _ALL_WEIGHTS = 6e-4, 2e-4, 2e-5
_BY_HEART_EPOCHS, _BY_HEART_CHATS = 10, 5_000


def chosen_epochs(num_chats: int) -> int:
    """Passes over the chats when no length is given: many over few, one over very many."""
    wanted = max(_USUAL_EPOCHS, _FEW_READ / num_chats)
    return max(1, round(min(wanted, _MOST_EPOCHS, _MANY_READ / num_chats)))


def chosen_examples(num_chats: int) -> int:
    """Chats of an update when no size is given: an epoch of few has few updates anyway."""
    wanted = round(num_chats / _UPDATES_AN_EPOCH)
    return min(_MOST_AN_UPDATE, max(_FEWEST_AN_UPDATE, wanted))


def chosen_rate(recipe: Recipe) -> tuple[float, str]:
    """The learning rate when none is given, and why."""
    if recipe.model.path is None:
        return _NEW_MODEL, "a new model has everything to learn"
    if recipe.adapter.kind != "none":
        return _ADAPTER, "an adapter begins at nothing: about ten times the rate of all weights"
    return _ALL_WEIGHTS, "all weights of a trained model: a higher rate undoes what it knows"


def chosen_cadence(num_steps: int, per_epoch: float) -> tuple[int, str]:
    """Updates between evaluations: about ten of them, at the ends of epochs where that fits.

    Not more than three an epoch: a fifth of the chats is held out, and reading those three times
    takes about as long as a quarter to a half of the epoch. Rounded up: the last update has one too,
    which must not follow on the heels of another.
    """
    epochs = num_steps / per_epoch
    if epochs < 1:
        every = math.ceil(num_steps / _MOST_AN_EPOCH)
        return every, f"{_MOST_AN_EPOCH} evaluations in less than an epoch"
    if epochs >= 2 * _EVALUATIONS:
        apart = int(epochs // _EVALUATIONS)
        return math.ceil(apart * per_epoch), f"one evaluation in {apart} epochs"
    an_epoch = min(_MOST_AN_EPOCH, math.ceil(_EVALUATIONS / epochs))
    words = "an evaluation" if an_epoch == 1 else f"{an_epoch} evaluations"
    return math.ceil(per_epoch / an_epoch), f"{words} an epoch"


def chosen_saves(num_steps: int, evaluate_every: int) -> tuple[int, str]:
    """Updates between checkpoints: each has an evaluation, so that the best can be kept."""
    apart = max(1, math.ceil(num_steps / _MOST_SAVES / evaluate_every))
    which = "each evaluation" if apart == 1 else f"every {apart} evaluations"
    return apart * evaluate_every, f"at {which}, so that the best is kept"


def check_patience(patience: int | None, evaluate_every: int, num_steps: int) -> None:
    """ConfigError when the run ends before evaluate.patience can end it."""
    if patience is None or (patience + 1) * evaluate_every < num_steps:
        return
    raise ConfigError(
        [
            f"evaluate.patience = {patience} cannot take effect: it ends a run after "
            f"{patience + 1} evaluations at the soonest, one in {evaluate_every:,} updates, and "
            f"this run has {num_steps:,} updates"
        ],
        "lower evaluate.patience or evaluate.every_steps, train longer, or remove evaluate.patience",
    )


def length_in_words(num_steps: int, per_epoch: float, num_chats: int) -> str:
    """The length of the run in both units."""
    epochs = num_steps / per_epoch
    return f"{num_chats:,} chats: {num_steps:,} updates = {epochs:.3g} epochs of {per_epoch:.3g} updates"


def by_heart(
    num_steps: int, per_epoch: float, num_chats: int, *, patience: int | None, validates: bool
) -> str | None:
    """What to say of a run that sees few chats so often that it learns them by heart."""
    epochs = num_steps / per_epoch
    if patience or epochs <= _BY_HEART_EPOCHS * 1.05 or num_chats > _BY_HEART_CHATS:
        return None
    remedy = (
        "set evaluate.patience=3 to stop when the validation loss rises, or"
        if validates
        else "hold out some chats (data.valid) to see it,"
    )
    return (
        f"every chat is seen {epochs:.0f} times: the model will know these {num_chats:,} by heart, "
        f"and answer others worse; {remedy} train at most train.epochs={_MOST_EPOCHS}"
    )
