"""What the doctor and the forecast say of runs that are looked at again and again."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from mule.commands.run_files import Kept
from mule.errors import UserError
from mule.run import RUNS, Run, list_runs

_SHARE_OF_TIME = 0.05  # that looking at a live run may take
_LARGE_BYTES = 4 * 2**20  # of a log: ten thousand updates, of which reading alone takes a while
_MILESTONES = 8  # of what is still to come


def looks() -> Kept[dict[str, Any]]:
    """Keeps what the doctor says of each run."""
    return Kept(_look, _SHARE_OF_TIME)


def outlooks() -> Kept[dict[str, Any]]:
    """Keeps the forecast of each run."""
    return Kept(_outlook, _SHARE_OF_TIME)


def verdicts(
    kept: Kept[dict[str, Any]], root: Path = RUNS, *, seconds: float = 0.5
) -> dict[str, Any]:
    """The doctor's verdict on each run, the one written last first, as far as the time goes.

    `more` says that some are still to be looked at: ask again.
    """
    found: dict[str, dict[str, str]] = {}
    began = time.monotonic()
    runs = sorted(list_runs(root), key=_written_at, reverse=True)
    for run in runs:
        if not kept.is_fresh(run) and time.monotonic() - began > seconds:
            return {"verdicts": found, "more": True}
        looked = kept.of(run)
        found[run.name] = {"verdict": looked["verdict"], "worst": looked["worst"]}
    return {"verdicts": found, "more": False}


def _look(run: Run) -> dict[str, Any]:
    """`mule doctor`, with why each finding matters, and the gravest severity as `worst`."""
    from mule.commands import doctor

    if not _has_begun(run):
        return {"verdict": "", "worst": "", "findings": [], "could_not_look": [], "looked": []}
    folder = str(run.folder)
    found = _asked("doctor", folder) if _is_large(run) else doctor.run(folder)
    for finding in found["findings"]:
        finding["sections"] = doctor.explain(finding["code"])["sections"]
    grave = [row["severity"] for row in found["findings"] if row["severity"] != "note"]
    return {**found, "verdict": str(found["verdict"]), "worst": grave[0] if grave else "good"}


def _outlook(run: Run) -> dict[str, Any]:
    """`mule runs forecast`, at some updates between now and the end."""
    from mule.commands import forecast
    from mule.commands.runs import summary

    now = summary(run) if _has_begun(run) else {"steps": 0, "num_steps": 0}
    left = (now["num_steps"] or 0) - now["steps"]
    if left <= 0:  # nothing is to come, or nothing is known
        return {"forecast": [], "path": {}, "cannot": [], "basis": "", "step": now["steps"]}
    between = {now["steps"] + left * part // _MILESTONES for part in range(1, _MILESTONES)}
    at = sorted(step for step in between if step > now["steps"])
    folder = str(run.folder)
    if _is_large(run):
        return _asked("runs", "forecast", folder, *(word for s in at for word in ("--at", str(s))))
    return forecast.run(folder, at=at)


def _asked(*words: str) -> dict[str, Any]:
    """What a command says, run as a process of its own: seconds of work would hold up every page."""
    command = [sys.executable, "-m", "mule.cli.main", *words, "--json"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    result = json.loads(ran.stdout.splitlines()[-1])
    if "error" in result:
        raise UserError(result["error"], result["hint"])
    return result


def _is_large(run: Run) -> bool:
    return (run.folder / "metrics.jsonl").stat().st_size > _LARGE_BYTES


def _has_begun(run: Run) -> bool:
    """Whether there is an update to look at."""
    log = run.folder / "metrics.jsonl"
    return (run.folder / "resolved.yaml").is_file() and log.is_file() and log.stat().st_size > 0


def _written_at(run: Run) -> float:
    log = run.folder / "metrics.jsonl"
    return (log if log.is_file() else run.folder / "recipe.yaml").stat().st_mtime
