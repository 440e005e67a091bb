"""The checkpoints of a run: the newest is loaded, the next saved, the best pointed to."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from mule.data.shards import require_whole
from mule.run import Run
from mule.train.checkpoint import load_checkpoint, save_checkpoint

if TYPE_CHECKING:
    from mule.train.assemble import Parts


class Keeper:
    """Saves and loads for all processes of a run; the first of them writes."""

    def __init__(self, run: Run, parts: Parts) -> None:
        self._run, self._parts, self._group = run, parts, parts.group
        self._best = math.inf

    def load_newest(self) -> int | None:
        """Load the newest good checkpoint; the updates it holds, None when there is none."""
        step = self._group.from_first(self._newest)
        if step is not None:
            self.load(step)
        return step

    def load(self, step: int) -> None:
        """Load the checkpoint after `step` updates."""
        load_checkpoint(self._run.checkpoint_dir(step), self._parts)

    def way_back(self) -> int | None:
        """The newest good checkpoint that every run of the recipe has, else the newest good one.

        One that a signal caused is no way back: a run that was never stopped does not have it, and
        both must go the same way.
        """
        scheduled = self._scheduled_steps()
        return self._group.from_first(
            lambda: self._newest(scheduled.__contains__) or self._newest()
        )

    def are_weights_finite(self) -> bool:
        """Whether all masters and moments of all processes are; what is not must not be saved."""
        # The bounds of a tensor are not finite where a number in it is not; looking makes no copy.
        bounds = [x.float() for flat in self._parts.optimizer.state() for x in flat.aminmax()]
        figures = (~torch.stack(bounds).isfinite()).sum(dtype=torch.float32)[None]
        self._group.sum_(figures)
        return not figures.item()

    def save(self, done: int, val_loss: float | None) -> None:
        """Commit a checkpoint, once all processes are found to have the same weights."""
        require_whole(self._parts.train.shards)
        self.agree_on_weights(done)
        self._run.sync()  # first: a checkpoint must not outlive the rows that led to it
        save_checkpoint(self._run.checkpoint_dir(done), self._parts, done)
        self._group.from_first(lambda: self._point_to(done, val_loss))

    def agree_on_weights(self, done: int) -> None:
        """CheckFailed when processes that must hold the same bits do not."""
        self._group.agree(
            f"the weights after update {done}",
            self._parts.optimizer.digest,
            "give every machine the same files and software; the last checkpoint is good: "
            "go on from it with --resume",
        )

    def point_to_best(self, step: int, val_loss: float | None) -> None:
        """Take the best up from its pointer; make up for one that a killed process did not write.

        A pointer beyond `step` comes again: what counts then is the lowest loss logged.
        """
        pointer = self._run.best()
        if pointer is not None:
            rows = (row for row in self._run.metrics() if self._counts(row["step"], step))
            losses = [row["val_loss"] for row in rows if row.get("val_loss") is not None]
            lowest = min(losses, default=math.inf)
            self._best = pointer["val_loss"] if pointer["step"] <= step else lowest
        if self._group.is_first and self._counts(step, step):
            self._set_best(step, val_loss)

    def _counts(self, step: int, done: int) -> bool:
        """Whether every run of the recipe that made `done` updates had a checkpoint after `step`."""
        recipe, last = self._parts.recipe, self._parts.resolved.num_steps
        scheduled = step % int(recipe.checkpoint.every_steps) == 0 or step == last
        return step <= done and (scheduled or recipe.evaluate.patience is not None)

    def _point_to(self, done: int, val_loss: float | None) -> None:
        """Point to the new checkpoint, and remove old ones."""
        self._run.set_latest(done)
        self._set_best(done, val_loss)
        way_back = max(self._scheduled_steps(), default=None)
        self._run.prune(self._parts.recipe.checkpoint.keep, also=way_back)

    def _set_best(self, done: int, val_loss: float | None) -> None:
        if val_loss is not None and val_loss < self._best:
            self._best = val_loss
            self._run.set_best(done, val_loss)

    def _newest(self, among: Callable[[int], bool] = lambda step: True) -> int | None:
        found = self._run.latest_checkpoint(among)
        return None if found is None else found[0]

    def _scheduled_steps(self) -> set[int]:
        """The checkpoints that the schedule or a rollback made."""
        every = int(self._parts.recipe.checkpoint.every_steps)
        rolled = {event["step"] for event in self._run.standing_events("rolled back")}
        steps = {step for step, _ in self._run.checkpoints()}
        return {step for step in steps if step % every == 0 or step in rolled}
