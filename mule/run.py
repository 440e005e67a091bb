"""A run folder: everything about one training run, for anyone to read, live or years later.

    runs/<name>/
      recipe.yaml     as typed              resolved.yaml   as run, with the reasons
      lineage.json    hashes, chained       metrics.jsonl   a row an update, each with its attempt
      events.jsonl    starts, stops, notes  samples.jsonl   answers while training
      facts.json      data, labels, base    report.md       what the doctor says of it
      checkpoint-*/   complete or absent    latest.json, best.json   which checkpoint
      run.lock        held while it runs

Only the process that holds the lock writes. An attempt is one start of the trainer: a resumed run
has several, and readers keep the newest row of each update.
"""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import itertools
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from mule import attempts, fsio, locks, logs, progress
from mule.errors import BusyError, StorageError, UserError
from mule.logs import Rows

RUNS = Path("runs")
State = Literal["new", "running", "finished", "interrupted", "failed"]

_RECIPE, _LOCK, _LATEST, _BEST = "recipe.yaml", "run.lock", "latest.json", "best.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d{8,})")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_ENDINGS = ("finished", "interrupted", "failed")
_LOCK_PATIENCE_S = 0.5  # a reader asking for the state holds the lock for an instant


class Run:
    """One run folder; make it with `create` or `open`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._logs: dict[str, fsio.AppendLog] = {}
        self._attempt: int | None = None
        self._locked = False

    @classmethod
    def create(cls, root: Path, name: str, recipe_text: str) -> Run:
        """A new run; UserError when its folder already holds something."""
        if not _NAME.fullmatch(name):
            raise UserError(
                f"`{name}` cannot name a run: letters, digits, dot, dash and underscore only",
                "give another: --name my-run",
            )
        folder = root / name
        if folder.exists() and (not folder.is_dir() or _holds_work(folder)):
            raise UserError(
                f"{folder} already exists: a new run would mix with it",
                f"go on with it: --resume; or start another: --name {_free_name(root, name)}",
            )
        fsio.write_text(folder / _RECIPE, recipe_text)
        return cls(folder)

    @classmethod
    def open(cls, path_or_name: Path | str, root: Path = RUNS) -> Run:
        """An existing run, by its folder or its name below `root`; UserError names near ones."""
        for folder in (Path(path_or_name), root / path_or_name):
            if (folder / _RECIPE).is_file():
                return cls(folder)
        text = str(path_or_name)
        if Path(text).is_dir():
            raise UserError(f"{text} is not a run: it has no {_RECIPE}", _runs_hint(text, root))
        raise UserError(f"no run called `{text}` in {root}", _runs_hint(text, root))

    def discard(self) -> None:
        """Remove a run that never began; hold its lock."""
        assert self.attempt == 0, "an update was made: the run is worth keeping"
        self._close_logs()
        shutil.rmtree(self.folder)

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    # ------------------------------------------------------------ lock and state

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run while it is written; BusyError names the process that holds it.

        The system lets go of the lock when the process ends, however it ends.
        """
        path = self.folder / _LOCK
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            hint = "choose a folder you can write to, or change its permissions"
            raise StorageError(f"cannot write {path}: {error.strerror}", hint) from None
        try:
            self._take(descriptor)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
            self._locked = True
            fsio.remove_leftovers(self.folder)
            yield
        finally:
            self._locked = False
            self._close_logs()
            os.close(descriptor)

    def state(self) -> State:
        """What the run is doing; killed without a word counts as interrupted."""
        if self._is_held():
            return "running"
        ends = [event for event in self.events() if event["kind"] in ("started", *_ENDINGS)]
        if not ends:
            return "new"
        return "interrupted" if ends[-1]["kind"] == "started" else ends[-1]["kind"]

    def killed_after(self, rows: Sequence[dict[str, Any]] | None = None) -> dict[str, Any] | None:
        """The last row of an attempt that ended without a word; None when it said how it ended.

        A row of step 0 stands for an attempt that made no update. Ask when the run is not running;
        `rows` are the newest of `metrics`, where they are at hand.
        """
        ends = [event for event in self.events() if event["kind"] in ("started", *_ENDINGS)]
        if not ends or ends[-1]["kind"] != "started":
            return None
        begun = {"step": ends[-1].get("from_step", 0), "attempt": ends[-1]["attempt"]}
        own = [r for r in rows or self.metrics() if r["attempt"] == begun["attempt"]]
        return own[-1] if own else begun

    def start_attempt(self, from_step: int | None = None) -> int:
        """Begin the next attempt and log it; its number, counted from 1.

        With `from_step`, the update resumed after, readers forget later rows of older attempts.
        """
        self._attempt = self.attempt + 1
        fields = {} if from_step is None else {"from_step": from_step}
        self.log_event("started", pid=os.getpid(), **fields)
        return self._attempt

    @property
    def attempt(self) -> int:
        """The newest attempt; 0 before the first."""
        if self._attempt is None:
            self._attempt = max((event.get("attempt", 0) for event in self.events()), default=0)
        return self._attempt

    # ------------------------------------------------------------ documents

    def write_resolved(self, yaml_text: str) -> None:
        fsio.write_text(self.folder / "resolved.yaml", yaml_text)

    def write_lineage(self, lineage: dict[str, Any]) -> None:
        fsio.write_json(self.folder / "lineage.json", lineage)

    def read_lineage(self) -> dict[str, Any]:
        """The recorded hashes; empty before any were."""
        path = self.folder / "lineage.json"
        return fsio.read_json(path) if path.exists() else {}

    # ------------------------------------------------------------ logs

    def log_metrics(self, row: dict[str, Any]) -> None:
        """Append figures of an update; `step` is required, a figure that is not finite is null."""
        assert "step" in row, "a row of metrics belongs to a step"
        self._append("metrics", {**row})

    def log_event(self, kind: str, **fields: Any) -> None:
        """Append an event; `started`, `finished`, `interrupted` and `failed` make the state."""
        self._append("events", {"kind": kind, **fields})

    def log_samples(self, step: int, answers: dict[str, str], **about: dict[str, Any]) -> None:
        """Append the answer to each prompt, and `about` it: `tokens`, `stopped`, `copied`."""
        self._append("samples", {"step": step, "answers": answers, **about})

    def sync(self) -> None:
        """Make every log durable."""
        for log in self._logs.values():
            log.sync()

    def metrics(self, kind: str | None = None) -> Rows:
        """The rows by step, the newest attempt of each; `kind` keeps the rows that carry it.

        Updates that a rollback undid are left out.
        """
        stands, log = attempts.stands(self.events()), logs.iter_log(self.folder / "metrics.jsonl")
        rows = Rows(row for row in log if stands(row) and kind in (None, row.get("kind")))
        steps = rows.pick("step")
        is_ordered = all(before < after for before, after in itertools.pairwise(steps))
        return rows if is_ordered else Rows(attempts.newest(rows))

    def samples(self) -> list[dict[str, Any]]:
        """The logged answers by step, the newest attempt of each."""
        return self.standing(self._read("samples"))

    def standing(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows of updates that are part of the run: neither made again later nor rolled back."""
        return list(filter(attempts.stands(self.events()), attempts.newest(rows)))

    def events(self) -> list[dict[str, Any]]:
        """Every event of every attempt, in order."""
        return self._read("events")

    def standing_events(self, *kinds: str) -> list[dict[str, Any]]:
        """Events about updates, without those of updates that a later attempt makes again."""
        return attempts.standing_events(self.events(), *kinds)

    # ------------------------------------------------------------ checkpoints

    def checkpoint_dir(self, step: int) -> Path:
        return self.folder / f"checkpoint-{step:08d}"

    def checkpoints(self) -> list[tuple[int, Path]]:
        """(step, folder) of each checkpoint on the disk, oldest first."""
        found = [(_CHECKPOINT.fullmatch(path.name), path) for path in self.folder.iterdir()]
        return sorted((int(match[1]), path) for match, path in found if match and path.is_dir())

    def set_latest(self, step: int, **info: Any) -> None:
        """Point latest.json at a checkpoint that is complete on the disk."""
        self._point(_LATEST, step, info)

    def set_best(self, step: int, val_loss: float, **info: Any) -> None:
        """Point best.json at the checkpoint with the lowest validation loss."""
        self._point(_BEST, step, {"val_loss": val_loss, **info})

    def latest(self) -> dict[str, Any] | None:
        """latest.json as written; None when it is missing."""
        return self._pointer(_LATEST)

    def best(self) -> dict[str, Any] | None:
        """best.json as written; None when it is missing."""
        return self._pointer(_BEST)

    def latest_checkpoint(
        self, among: Callable[[int], bool] = lambda step: True
    ) -> tuple[int, Path] | None:
        """The newest checkpoint whose files match their sums; None when there is none at all.

        A damaged one is passed over with a warning. Raises StorageError when all are damaged.
        """
        checkpoints = [item for item in self.checkpoints() if among(item[0])]
        first = self._latest_step()
        checkpoints.sort(key=lambda item: (item[0] == first, item[0]), reverse=True)
        for step, path in checkpoints:
            try:
                fsio.verify_folder(path)
            except StorageError as error:
                self._pass_over(path, error)
                continue
            return step, path
        if checkpoints:
            raise StorageError(
                f"{self.folder}: none of its {len(checkpoints)} checkpoints is intact",
                f"train anew: --name {_free_name(self.folder.parent, self.name)}",
            )
        return None

    def prune(self, keep: int, also: int | None = None) -> None:
        """Remove all but the newest `keep` checkpoints, the latest, the best, and `also`."""
        checkpoints = self.checkpoints()
        kept = {also, *(step for step, _ in checkpoints[-keep:])}
        kept |= {pointer["step"] for pointer in (self.latest(), self.best()) if pointer}
        for step, path in checkpoints:
            if step not in kept:
                doomed = path.with_name(fsio.partial_name(path.name))  # never seen half removed
                try:
                    os.rename(path, doomed)
                except OSError as error:  # an old checkpoint too many hurts nobody
                    progress.note(f"{path} could not be removed: {error.strerror}", "warning")
                shutil.rmtree(doomed, ignore_errors=True)

    # ------------------------------------------------------------ inside

    def _take(self, descriptor: int) -> None:
        give_up_at = time.monotonic() + _LOCK_PATIENCE_S
        while not _try_lock(descriptor):
            if time.monotonic() > give_up_at:
                pid = os.pread(descriptor, 32, 0).decode().strip() or "unknown"
                raise BusyError(
                    f"{self.folder} is being written by process {pid}",
                    f"wait for it, or stop it: kill {pid}" if pid.isdigit() else "wait for it",
                )
            time.sleep(0.02)

    def _is_held(self) -> bool:
        return self._locked or locks.is_locked(self.folder / _LOCK)

    def _append(self, name: str, row: dict[str, Any]) -> None:
        if name not in self._logs:
            self._logs[name] = fsio.AppendLog(self.folder / f"{name}.jsonl")
        stamped = {"at": round(time.time(), 3), "attempt": self.attempt, **row}
        self._logs[name].append({key: _finite(value) for key, value in stamped.items()})

    def _read(self, name: str) -> list[dict[str, Any]]:
        return logs.read_log(self.folder / f"{name}.jsonl")

    def _close_logs(self) -> None:
        for log in self._logs.values():
            log.close()
        self._logs.clear()

    def _point(self, file: str, step: int, info: dict[str, Any]) -> None:
        assert self.checkpoint_dir(step).is_dir(), "save the checkpoint before pointing to it"
        row = {"step": step, "folder": self.checkpoint_dir(step).name, **info}
        fsio.write_json(self.folder / file, {key: _finite(value) for key, value in row.items()})

    def _pointer(self, file: str) -> dict[str, Any] | None:
        path = self.folder / file
        return fsio.read_json(path) if path.exists() else None

    def _latest_step(self) -> int | None:
        try:
            latest = self.latest()
        except StorageError as error:
            self._pass_over(self.folder / _LATEST, error)
            return None
        return latest["step"] if latest else None

    def _pass_over(self, path: Path, error: StorageError) -> None:
        progress.note(f"{path.name} is damaged and passed over ({error.message})", "warning")
        if self._locked:
            self.log_event("damaged", path=path.name, cause=error.message)


def list_runs(root: Path = RUNS) -> list[Run]:
    """Every run below `root`, by name."""
    return [Run(path.parent) for path in sorted(root.glob(f"*/{_RECIPE}"))]


def _holds_work(folder: Path) -> bool:
    """Whether anything but the leftovers of a process killed at its start is there."""
    return any(not path.name.startswith(".partial-") for path in folder.iterdir())


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _free_name(root: Path, name: str) -> str:
    number = 2
    while (root / f"{name}-{number}").exists():
        number += 1
    return f"{name}-{number}"


def _runs_hint(text: str, root: Path) -> str:
    names = [run.name for run in list_runs(root)]
    if not names:
        return f"there is none in {root} yet; `mule train RECIPE` makes one"
    if near := difflib.get_close_matches(Path(text).name, names, n=1):
        return f"did you mean `{near[0]}`?"
    shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    return f"runs there: {shown}"
