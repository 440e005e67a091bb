"""What the evaluations of a run say: that it learns by heart, and that it should end early.

All of it follows from the run's logs, so that a resumed run decides as one that never stopped; and
from sums over all processes, so that all of them decide alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from mule.config.schema import Recipe
from mule.errors import ConfigError

_WORSE_IN_A_ROW = 2  # evaluations above the best before it is called overfitting,
_LEAST_RISE = 0.005  # and by this share of it: less is chance


@dataclass(frozen=True)
class Evaluation:
    """Validation loss after an update, and the mean training loss since the evaluation before."""

    step: int
    val_loss: float
    train_loss: float


@dataclass
class Evaluations:
    """The evaluations so far, and the training losses since the last one."""

    patience: int | None
    done: list[Evaluation] = field(default_factory=list)
    loss_sum: float = 0.0
    num_losses: int = 0

    @staticmethod
    def read(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """What rows of metrics say, for `restore`; fits into JSON."""
        found = Evaluations(None)
        for row in rows:
            found.trained(row["loss"])
            if "val_loss" in row:
                loss = row["val_loss"]
                found.evaluated(row["step"], math.nan if loss is None else loss)  # not finite: null
        return asdict(found)

    def restore(self, past: dict[str, Any]) -> None:
        """Go on from what `read` found."""
        self.done = [Evaluation(**evaluation) for evaluation in past["done"]]
        self.loss_sum, self.num_losses = past["loss_sum"], past["num_losses"]

    def trained(self, loss: float) -> None:
        """Note the loss of an update."""
        self.loss_sum += loss
        self.num_losses += 1

    def evaluated(self, step: int, val_loss: float) -> None:
        """Note an evaluation."""
        mean = self.loss_sum / self.num_losses if self.num_losses else math.nan
        self.done.append(Evaluation(step, val_loss, mean))
        self.loss_sum, self.num_losses = 0.0, 0

    @property
    def best(self) -> Evaluation | None:
        """The first with the lowest loss."""
        finite = [found for found in self.done if math.isfinite(found.val_loss)]
        return min(finite, key=lambda found: found.val_loss, default=None)

    @property
    def is_best_now(self) -> bool:
        """Whether the newest evaluation is better than all before."""
        return bool(self.done) and self.best is self.done[-1]

    def why_stop(self) -> str | None:
        """Why the run should end now; None when it should not."""
        if self.patience is None or self._since_best() < self.patience:
            return None
        best = self.best
        lowest = f"{best.val_loss:.4f} after update {best.step}" if best else "never finite"
        return f"{self.patience} evaluations without a better validation loss ({lowest})"

    def overfitting(self) -> str | None:
        """The figures of a run that learns its data by heart; None of one that does not."""
        best = self.best
        if best is None or self._since_best() < _WORSE_IN_A_ROW:
            return None
        now = self.done[-1]
        rose = now.val_loss > (1 + _LEAST_RISE) * best.val_loss
        if not (rose and now.train_loss < best.train_loss):
            return None
        return (
            f"the validation loss rose from {best.val_loss:.4f} (update {best.step}) to "
            f"{now.val_loss:.4f} (update {now.step}), while the training loss fell from "
            f"{best.train_loss:.4f} to {now.train_loss:.4f}"
        )

    def _since_best(self) -> int:
        """Evaluations after the best one."""
        best = self.best
        return len(self.done) - (self.done.index(best) + 1 if best else 0)


def check_patience_has_rows(recipe: Recipe, *, validates: bool) -> None:
    """ConfigError where nothing is validated that evaluate.patience could wait for."""
    if recipe.evaluate.patience is not None and not validates:
        raise ConfigError(
            [
                f"evaluate.patience = {recipe.evaluate.patience} cannot take effect: there are no "
                "validation rows"
            ],
            "give data.valid, or a data.valid_share above 0; or remove evaluate.patience",
        )
