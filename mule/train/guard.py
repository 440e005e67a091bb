"""What keeps a bad update from doing harm: spikes are refused, and a run that is stuck goes back.

A refused update leaves the weights alone, so that refusals in a row mean that the weights are what
is broken. Then the newest checkpoint is loaded and the run goes on with the data that comes next:
the batches of before and during the trouble are left out. Sources: the rule for spikes is that of
OLMo-core's SkipStepOptimizer, but for the largest values of the window, which do not count; going
back that of Chowdhery et al. 2022 (PaLM), section 5.1.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np

from mule.errors import CheckFailed
from mule.run import Run

WINDOW_STEPS = 128  # a spike is one against so many updates
MAX_REFUSED_IN_A_ROW = 5
MAX_ROLLBACKS = 3  # in a run, over all its attempts
_RECENT_STEPS = 20  # the reported training loss is the mean over these
_LARGEST_LEFT_OUT = 3  # of the window: a spike that was applied would hide the next
_LEAST_SPREAD = 0.01  # of the mean: where updates are all alike, rounding would be a spike
# Of the mean norm: shorter gradients, which clipping holds, are no spike where norms slowly rise, as
# in the campaign of docs/log.md.
_USUAL_NORMS = 3.0


class Guard:
    """The last applied updates, the updates refused since, and the rollbacks of a run.

    All of it follows from the run's logs, so that a resumed run decides as one that never stopped.
    """

    def __init__(self, max_spike: float | None) -> None:
        self._max_spike = max_spike
        self._applied: deque[tuple[float, float]] = deque(maxlen=WINDOW_STEPS)
        self._refused: list[int] = []
        self._rollbacks: list[int] = []

    @staticmethod
    def read(run: Run, done: int) -> dict[str, Any]:
        """What the logs say about the first `done` updates, for `restore`; fits into JSON."""
        rows = [row for row in run.metrics() if row["step"] <= done]
        rollbacks = [event["step"] for event in run.standing_events("rolled back")]
        return {
            "applied": [(row["loss"], row["grad_norm"]) for row in rows[-WINDOW_STEPS:]],
            "rollbacks": [step for step in rollbacks if step <= done],
        }

    def restore(self, past: dict[str, Any]) -> None:
        """Go on from what `read` found."""
        self._applied.clear()
        self._applied.extend((loss, norm) for loss, norm in past["applied"])
        self._refused, self._rollbacks = [], past["rollbacks"]  # no checkpoint follows a refusal

    def applied(self, loss: float, grad_norm: float) -> None:
        """Note an update that was applied."""
        self._applied.append((loss, grad_norm))
        self._refused = []

    def refused(self, done: int) -> None:
        """Note that the update was refused."""
        self._refused.append(done)

    @property
    def is_stuck(self) -> bool:
        """Whether so many updates in a row were refused that the weights must be to blame."""
        return len(self._refused) >= MAX_REFUSED_IN_A_ROW

    def recent_loss(self) -> float:
        """Mean training loss over the last updates, in nats a target token."""
        losses = [loss for loss, _ in self._applied][-_RECENT_STEPS:]
        return sum(losses) / max(len(losses), 1)

    def spike(self, loss: float, grad_norm: float) -> str | None:
        """Why an update must not be applied; None when it is like those before, or they are few."""
        if self._max_spike is None or len(self._applied) < WINDOW_STEPS:
            return None
        window = np.sort(np.array(self._applied), axis=0)[:-_LARGEST_LEFT_OUT]  # losses, norms
        mean, spread = window.mean(0), window.std(0, ddof=1)
        limits = mean + self._max_spike * np.maximum(spread, _LEAST_SPREAD * mean)
        deviations = (
            f"{self._max_spike:g} standard deviations above the last {WINDOW_STEPS} updates"
        )
        if loss > limits[0]:
            return f"loss {loss:.4g}: a spike beyond {limits[0]:.4g}, which is {deviations}"
        if grad_norm > max(limits[1], usual := _USUAL_NORMS * mean[1]):
            found = f"gradient norm {grad_norm:.4g}: a spike beyond"
            if limits[1] >= usual:
                return f"{found} {limits[1]:.4g}, which is {deviations}"
            return (
                f"{found} {usual:.4g}, which is {_USUAL_NORMS:g} times that of the last "
                f"{WINDOW_STEPS} updates"
            )
        return None

    def check_may_roll_back(self, cause: str, checkpoint: int | None, learning_rate: float) -> None:
        """CheckFailed when there is nothing to go back to, or it was done too often."""
        lower = f"lower optim.learning_rate (now {learning_rate:g}) in a new run"
        if checkpoint is None:
            raise CheckFailed(
                f"{cause}, before the first checkpoint", f"{lower}, or warm up longer"
            )
        if len(self._rollbacks) >= MAX_ROLLBACKS:
            before = ", ".join(map(str, self._rollbacks))
            raise CheckFailed(
                f"{cause}, and going back has not helped (after the updates {before})",
                f"look at the rows of these updates; else {lower}; the checkpoint after update "
                f"{checkpoint} is good: model.path can start from it",
            )

    def why_stuck(self) -> str:
        """The refused updates, in words."""
        first, last = self._refused[0], self._refused[-1]
        return f"{len(self._refused)} updates in a row were refused, {first} to {last}"
