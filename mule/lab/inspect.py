"""Examining a user's module from outside: their file runs in a child process only.

A check in which that process dies or does not come to an end is a finding; the checks after it are
made by a fresh process. No torch here.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mule
from mule import machine, progress
from mule.lab.inspect_source import remarks

CHECKS = {  # name -> what it is about, in the order in which they are made
    "forward": "ids (B, T) in, logits (B, T, V) out",
    "shapes": "several B and T; rows keep to themselves",
    "operations": "lines that wait, change shapes, use float64 or write in place",
    "training": "updates without NaN; the loss falls on a repeated batch",
    "parameters": "total and active parameters, tied embeddings, experts",
    "causality": "no token sees later ones",
    "attention": "query heads that share keys",
    "cache": "cached logits equal uncached ones",
    "bf16": "the same in bf16",
    "compile": "graph breaks and recompiles",
}
_ALL = ("build", *CHECKS)
_NEEDED = frozenset({"start", "build", "forward"})
_START_S = 300.0  # for Python and torch to be loaded
_LAST_WORDS_S = 3.0
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')
_LEVELS = ("fault", "warning", "note")


@dataclass
class _Report:
    facts: dict[str, Any] = field(default_factory=dict)
    findings: list[dict[str, Any]] = field(default_factory=list)
    states: dict[str, str] = field(default_factory=dict)  # check -> ended, failed

    def take(self, event: dict[str, Any]) -> None:
        self.states[event["check"]] = event["state"]
        self.facts |= event.get("facts", {})
        for finding in event.get("findings", []):
            self.findings.append({"check": event["check"], **finding})


def examine(
    file: Path,
    name: str,
    settings: dict[str, Any],
    *,
    limit_s: float,
    checks: Sequence[str] = tuple(CHECKS),
    fits: dict[str, int] | None = None,
) -> dict[str, Any]:
    """Facts, findings and how far each check came; `limit_s` seconds are given to each check.

    `fits` are the vocab_size and max_seq_length of a campaign that the module is for: settings that
    say these are filled in.
    """
    report = _Report()
    left = list(checks)
    with progress.task("Checking", total=1 + len(checks), unit="checks") as bar:
        while left:
            request = {
                "file": str(file.resolve()),
                "name": name,
                "settings": settings,
                "checks": ["forward", *(check for check in left if check != "forward")],
                "threads": machine.physical_cores(),
                "fits": fits,
            }
            broke_at = _one_process(request, report, limit_s, bar)
            if broke_at is None or broke_at in _NEEDED:
                break
            left = left[left.index(broke_at) + 1 :]
    _add_source(report, file)
    report.findings.sort(key=lambda one: _LEVELS.index(one["level"]))
    return {
        "facts": report.facts,
        "findings": report.findings,
        "checks": [
            {"check": check, "about": about, "outcome": _outcome(report, check)}
            for check, about in CHECKS.items()
            if check in checks
        ],
    }


def _outcome(report: _Report, check: str) -> str:
    state = report.states.get(check)
    if state is None:
        return "not reached"
    levels = {one["level"] for one in report.findings if one["check"] == check}
    return next((level for level in _LEVELS if level in levels), "good")


def _add_source(report: _Report, file: Path) -> None:
    """What the source shows in lines of which nothing has been said."""
    told = {one["place"] for one in report.findings}
    for remark in remarks(file, report.facts.get("classes", [])):
        place = f"{file.name}:{remark.line}"
        if place not in told:
            told.add(place)
            report.findings.append(
                {"check": "source", "level": "note", "found": remark.found}
                | {"change": remark.change, "place": place}
            )


# ---------------------------------------------------------------- one process


def _one_process(
    request: dict[str, Any], report: _Report, limit_s: float, bar: progress.Task
) -> str | None:
    """Take in what one process tells; the check in which it broke off, or None."""
    with tempfile.TemporaryDirectory(prefix="mule-check-") as folder:
        said = Path(folder) / "stderr"
        with open(said, "ab") as opened:
            child = subprocess.Popen(
                [sys.executable, "-P", "-m", "mule.lab._check_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=opened,
                env=_environment(),
                cwd=Path(request["file"]).parent,
                start_new_session=True,
            )
        listened = _Child(child, request, said)
        try:
            return _listen(listened, report, limit_s, bar)
        finally:
            _end(listened)


@dataclass
class _Child:
    """The process, what it was asked, and the file of what it writes to stderr."""

    process: subprocess.Popen[bytes]
    request: dict[str, Any]
    said: Path
    reader: threading.Thread | None = None

    def after(self, check: str) -> str:
        """What it does when `check` is told."""
        order = ["start", "build", *self.request["checks"], "all"]
        return order[min(order.index(check) + 1, len(order) - 1)]


def _listen(child: _Child, report: _Report, limit_s: float, bar: progress.Task) -> str | None:
    lines = _lines_of(child)
    running, known = "start", set(report.states)
    while True:
        try:
            line = lines.get(timeout=_START_S if running == "start" else limit_s)
        except queue.Empty:
            report.take(_event(running, _endless(running, limit_s), _where(child)))
            return running
        if line is None:
            if running == "all":
                return None
            died = _died(running, child.process.wait())
            report.take(_event(running, died, _place_in(child)))
            return running
        event = json.loads(line)
        running = event["check"]
        if event["state"] == "begins":
            continue
        if running not in known:  # a second process makes the first checks again
            report.take(event)
            bar.advance(int(running in _ALL))
        if event["state"] == "failed" and running in _NEEDED:
            return running
        running = child.after(running)


def _lines_of(child: _Child) -> queue.Queue[bytes | None]:
    """The process's lines as they come, then None."""
    found: queue.Queue[bytes | None] = queue.Queue()
    asked, told = child.process.stdin, child.process.stdout
    assert asked is not None and told is not None
    with contextlib.suppress(BrokenPipeError), asked:
        asked.write(json.dumps(child.request).encode())

    def read() -> None:
        with told:
            for line in told:
                found.put(line)
        found.put(None)

    child.reader = threading.Thread(target=read, daemon=True)
    child.reader.start()
    return found


def _event(check: str, said: tuple[str, str], place: str | None) -> dict[str, Any]:
    finding = {"level": "fault", "found": said[0], "change": said[1], "place": place}
    return {"check": check, "state": "failed", "facts": {}, "findings": [finding]}


def _endless(check: str, limit_s: float) -> tuple[str, str]:
    return (
        f"no end after {limit_s:g} s in the check of {check}; the process was stopped",
        "see the loop at this line; where it is only slow, check a smaller shape, or give it longer: "
        "--limit-s 900",
    )


def _died(check: str, code: int) -> tuple[str, str]:
    if code >= 0:
        return (
            f"the process ended by itself (code {code}) in the check of {check}",
            "remove what ends it (os._exit, exit); keep scripts below: if __name__ == '__main__':",
        )
    name = signal.Signals(-code).name
    why = {"SIGKILL": "memory ran out, most likely: check a smaller shape"}.get(
        name, "native code crashed at this line: see the sizes and types that reach it"
    )
    return f"the process died of {name} in the check of {check}", why


def _where(child: _Child) -> str | None:
    """The user's line that runs now: the process writes it when it is asked to."""
    before = child.said.stat().st_size
    with contextlib.suppress(ProcessLookupError):
        child.process.send_signal(signal.SIGUSR1)
    until = time.monotonic() + _LAST_WORDS_S
    while time.monotonic() < until:
        if (place := _place_in(child, before)) is not None:
            return place
        time.sleep(0.05)
    return None


def _place_in(child: _Child, start: int = 0) -> str | None:
    """The first of the user's lines in a dump of faulthandler: its innermost frame comes first."""
    text = child.said.read_bytes()[start:].decode("utf-8", "replace")
    folder = Path(child.request["file"]).parent
    for frame in _FRAME.finditer(text):
        if folder in Path(frame["file"]).parents and "site-packages" not in frame["file"]:
            return f"{Path(frame['file']).name}:{frame['line']}"
    return None


def _environment() -> dict[str, str]:
    root = str(Path(mule.__file__).parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1"}


def _end(child: _Child) -> None:
    """No process of the user's code stays."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.process.pid, signal.SIGKILL)
    child.process.wait()
    if child.reader is not None:
        child.reader.join(_LAST_WORDS_S)
