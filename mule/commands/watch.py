"""`mule runs watch`: a run as it is now, looked at again and again while another process writes it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from mule import logs
from mule.commands.columns import Columns
from mule.commands.curves import curves
from mule.commands.run_look import looks
from mule.commands.runs import following, list_runs, summaries
from mule.errors import UserError
from mule.run import RUNS, Run

_TAIL_BYTES = 8 * 1024  # of the log, for its newest row


def find(name: str | None, root: Path = RUNS) -> Run:
    """The run of this name; without one the newest that is running, or else was."""
    if name is not None:
        return Run.open(name, root)
    rows = list_runs(root)["runs"]
    if not rows:
        raise UserError(f"there is no run in {root} to watch", "start one: mule train RECIPE")
    running = [row for row in rows if row["state"] == "running"]
    return Run.open((running or rows)[0]["run"], root)


class Watched:
    """A run, what was read of it, and what the doctor said last; looking never waits for it."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._columns, self._summaries, self._looks = Columns(run), summaries(), looks()
        self._looking: threading.Thread | None = None
        self._log = run.folder / "metrics.jsonl"
        self._end = 0

    def now(self, max_points: int) -> dict[str, Any]:
        """State, figures, charts of at most so many points a curve, and findings."""
        summary = self._summaries.of(self.run)
        columns = self._columns.refresh()
        figures = {name: column.values[-1] for name, column in columns.figures.items()}
        if not self._looks.is_fresh(self.run) and not (self._looking and self._looking.is_alive()):
            self._looking = threading.Thread(target=self._look, daemon=True)
            self._looking.start()
        look = self._looks.last(self.run) or {}
        return {
            **summary,
            "figures": {**figures, "epoch": summary["epoch"]},
            "charts": {c["name"]: c for c in curves(columns, max_points=max_points)["charts"]},
            "verdict": look.get("verdict", ""),
            "worst": look.get("worst", ""),
            "findings": look.get("findings", []),
        }

    def result(self) -> dict[str, Any]:
        """How the run stands in the end, with the doctor's last word on it."""
        if self._looking:
            self._looking.join()
        self._look()
        found = self.now(2)
        kept = ("run", "state", "stage", "steps", "num_steps", "loss", "val_loss", "updated_at")
        findings = [
            {key: row[key] for key in ("code", "title", "severity", "step", "what", "remedy")}
            for row in found["findings"]
        ]
        return {
            **{key: found[key] for key in kept},
            "verdict": found["verdict"],
            "findings": findings,
            "next": following(self.run),
        }

    def new_rows(self) -> list[dict[str, Any]]:
        """The rows of metrics that were written since the last call; at first the newest one."""
        if self._end:
            rows, self._end = logs.read_log_from(self._log, self._end)
            return rows
        size = self._log.stat().st_size if self._log.is_file() else 0
        rows, self._end = logs.read_log_from(self._log, max(0, size - _TAIL_BYTES))
        return rows[-1:]

    def _look(self) -> None:
        try:
            self._looks.of(self.run)
        except UserError:  # it has no update yet, or its recipe is not readable: nothing to say
            return
