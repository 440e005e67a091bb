"""The doctor beside a training: what it finds is said once, and logged as the event `doctor`.

It reads the run folder, as `mule doctor` does, and changes nothing: a run that is watched learns bit by
bit what one that is not learns. Looking takes at most 1% of the time: after each look it waits a hundred
times as long as that look took, however often the run evaluates.
"""

from __future__ import annotations

import time
from typing import Any

from mule import progress
from mule.config.schema import Recipe
from mule.doctor.examine import examine
from mule.doctor.finding import Finding
from mule.doctor.history import read_history
from mule.run import Run

DOCTOR = "doctor"  # the event: code, title, severity, since, what, remedy
_SHARE_OF_TIME = 0.01
_SAID_BY_TRAINING = ("D401",)  # overfitting: by the evaluator, with the remedy


class Watch:
    """Looks at a run that is being trained. `writes` is false of a process that only computes."""

    def __init__(self, run: Run, recipe: Recipe, *, writes: bool) -> None:
        self._run, self._recipe, self._writes = run, recipe, writes
        self._next_at = 0.0
        self._verdict: str | None = None

    @property
    def line(self) -> dict[str, Any]:
        """What the live line shows of the last look."""
        return {} if self._verdict is None else {"doctor": self._verdict}

    def look(self, done: int, *, is_last: bool = False) -> None:
        """Ask the rules after `done` updates, unless the last look was too short a time ago."""
        started_at = time.monotonic()
        if not self._writes or (started_at < self._next_at and not is_last):
            return
        try:
            self._tell(examine(read_history(self._run, self._recipe)), done)
        except Exception as error:  # a defect of a rule must not cost anybody a run
            self._writes = False
            cause = f"{type(error).__name__}: {error}"
            self._run.log_event("doctor failed", step=done, cause=cause)
            progress.note(f"the doctor stopped watching ({cause}): a defect of Mule", "warning")
        took = time.monotonic() - started_at
        self._next_at = started_at + took / _SHARE_OF_TIME

    def _tell(self, findings: list[Finding], done: int) -> None:
        grave = [finding for finding in findings if finding.found.severity != "note"]
        self._verdict = ", ".join(finding.code for finding in grave) or "healthy"
        said = {(event["code"], event["severity"]) for event in self._run.standing_events(DOCTOR)}
        for finding in grave:
            found = finding.found
            if (finding.code, found.severity) in said:
                continue
            self._run.log_event(
                DOCTOR,
                step=done,
                code=finding.code,
                title=finding.title,
                severity=found.severity,
                since=found.step,
                what=found.what,
                remedy=found.remedy,
            )
            if finding.code in _SAID_BY_TRAINING:
                continue
            progress.note(
                f"{finding.title} ({finding.code}, {found.severity}, since update {found.step}): "
                f"{found.what}. Try {found.remedy}; mule doctor --explain {finding.code} says why",
                "warning",
            )
