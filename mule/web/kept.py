"""What jobs found, kept by what it depends on: coming back to it asks nobody to work again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mule import __version__, fsio
from mule.serve.problem import Problem
from mule.web.jobs import Job, Jobs

_MAX_KEPT = 200


def key_of(words: Sequence[str], files: Iterable[Path]) -> str:
    """A name for the result of a command on these files, as they are now."""
    stamps = [(str(file), *_stamp(file)) for file in files]
    told = json.dumps([__version__, list(words), stamps])
    return hashlib.sha256(told.encode()).hexdigest()[:32]


def _stamp(file: Path) -> tuple[int, int]:
    try:
        about = file.stat()
    except OSError:
        return 0, 0
    return about.st_size, about.st_mtime_ns


class Kept:
    """Results of jobs in `.mule/results`, by their keys; a read-only server adds none."""

    def __init__(self, jobs: Jobs, *, read_only: bool) -> None:
        self._jobs, self._read_only = jobs, read_only
        self._folder = jobs.folder.with_name("results")

    def start(self, key: str, kind: str, words: Sequence[str], about: str) -> Job:
        """Start `mule <words>`, whose result is looked for under `key`."""
        job = self._jobs.start(kind, words, about)
        fsio.write_json(self._file(key), {"job": job.id})
        self._tidy()
        return job

    def look(self, key: str) -> dict[str, Any]:
        """state: none, running (with what was said last), failed (with why) or done (`result`)."""
        file = self._file(key)
        if not file.is_file():
            return {"state": "none"}
        kept = fsio.read_json(file)
        if "result" in kept:
            return {"state": "done", "result": kept["result"]}
        try:
            job = self._jobs.get(kept["job"])
        except Problem:  # removed before anybody looked
            return {"state": "none"}
        state = self._jobs.state(job)
        if state["state"] == "running":
            said = state["stderr"].strip().splitlines()
            return {"state": "running", "job": job.id, "said": said[-1] if said else ""}
        result = self._jobs.result(job)
        if result is None or "error" in result:
            why = {"error": state["how"], "hint": ""} | (result or {})
            return {"state": "failed", "job": job.id, **why}
        if not self._read_only:
            fsio.write_json(file, {"result": result})
        return {"state": "done", "result": result}

    def _file(self, key: str) -> Path:
        return self._folder / f"{key}.json"

    def _tidy(self) -> None:
        files = sorted(self._folder.glob("*.json"), key=lambda file: file.stat().st_mtime)
        for file in files[:-_MAX_KEPT]:
            file.unlink(missing_ok=True)
