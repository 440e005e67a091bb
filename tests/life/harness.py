"""Harness A: figures F1-F5, F10 and F12 of reliability, as lists of trials with a seed each.

A trial does something cruel to a tiny run and says what went wrong, if anything. The tests run a few
of them, `python -m bench.reliability run` all; each can be repeated by its figure and its label.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mule import fsio
from mule.errors import StorageError
from mule.run import Run
from tests.life.lost_writes import Disk, read_trace
from tests.life.tiny_life import Forker, kill, outcome, write_data

TRAIN = ("train", "pretrain.yaml")
# Few updates with two checkpoints: where a run is repeated for each of its operations.
SHORT = ("train.steps=4", "checkpoint.every_steps=2", "evaluate.every_steps=2", "checkpoint.keep=1")
FP32 = ("train.precision=fp32",)
RUN = Path("runs") / "pretrain"
_STEP = "mule.train.loop.train_step"
_SAVE = "mule.train.checkpoint.save_model"
_MOST_OPERATIONS = 2000  # a run that has more is not the tiny one


@dataclass(frozen=True)
class Trial:
    """`work` returns what it measured; AssertionError is a failure."""

    label: str
    work: Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Figure:
    """One line of RELIABILITY.md: what is done, what must hold, and how its trials are made."""

    title: str
    promise: str
    trials: Callable[[Lab, bool], Iterator[Trial]]  # the bool: all of them, or a few


class FaultForker(Forker):
    """The fork server of `tests.life.faults`."""

    def __init__(self) -> None:
        super().__init__("tests.life.faults")


@dataclass
class Lab:
    """A fork server, a place to work, and what undisturbed runs come to."""

    scratch: Path
    server: FaultForker
    _references: dict[tuple[str, ...], dict[str, Any]] = field(default_factory=dict)
    _count: int = 0

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """A fresh folder with data and recipes, removed at the end."""
        self._count += 1
        folder = self.scratch / f"trial-{self._count}"
        write_data(folder)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def reference(self, *extra: str) -> dict[str, Any]:
        """The run of TRAIN with these settings that nothing disturbed; made once."""
        if extra not in self._references:
            if not self._references:  # the first run of a server measures the machine
                with self.folder() as folder:
                    assert self.server.run(folder, *TRAIN, "train.steps=1") == 0, said(folder)
            folder = self.scratch / f"reference-{len(self._references)}"
            write_data(folder)
            report = folder.with_suffix(".trace")
            fault = {"report": str(report), "contents": bool(extra)}
            started_at = time.perf_counter()
            code = self.server.run(folder, *TRAIN, *extra, fault=fault)
            assert code == 0, said(folder)
            self._references[extra] = {
                "folder": folder,
                "outcome": outcome(folder / RUN),
                "seconds": time.perf_counter() - started_at,
                "durable_calls": int((folder / "durable_calls").read_text()),
                "trace": report,
            }
        return self._references[extra]

    def check_goes_on(self, folder: Path, *extra: str, words: tuple[str, ...] = ()) -> None:
        """Resume what is in `folder`: it must come to the very same bits."""
        code = self.server.run(folder, *TRAIN, "--resume", *extra, *words)
        assert code == 0, f"the resumed run ended with {code}: {said(folder)}"
        found, expected = outcome(folder / RUN), self.reference(*extra)["outcome"]
        different = [key for key in expected if found[key] != expected[key]]
        assert not different, f"the resumed run differs in {', '.join(different)}"
        assert not list((folder / RUN).glob(".partial-*")), "leftovers stay"
        assert Run.open(folder / RUN).state() == "finished"


def said(folder: Path) -> str:
    """The end of what the commands in `folder` printed."""
    log = folder / "output.log"
    return " ".join(log.read_text().split())[-600:] if log.exists() else ""


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below `folder`."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def check_clear_error(folder: Path, code: int) -> None:
    """Exit code 1 or 2 and words for a person."""
    text = said(folder)
    assert code in (1, 2), f"exit code {code}: {text}"
    assert "error:" in text and "hint:" in text, f"no clear error: {text}"
    assert "Traceback" not in text and "defect of Mule" not in text, f"a raw error: {text}"


# ---------------------------------------------------------------- F1: kill -9


def killed(lab: Lab, full: bool) -> Iterator[Trial]:
    for seed in range(100 if full else 2):
        yield Trial(f"seed {seed}", lambda seed=seed: _killed(lab, seed))


def _killed(lab: Lab, seed: int) -> dict[str, Any]:
    """SIGKILL at a random time, or (every second seed) just before a random fsync or rename."""
    chance, reference = random.Random(seed), lab.reference()
    with lab.folder() as folder:
        if seed % 2:
            die_at = chance.randrange(reference["durable_calls"])
            code = lab.server.run(folder, *TRAIN, die_at=die_at)
        else:
            delay_s = chance.uniform(0, reference["seconds"])

            def meanwhile(pid: int) -> None:
                time.sleep(delay_s)
                kill(pid)

            code = lab.server.run(folder, *TRAIN, meanwhile=meanwhile)
        assert code in (0, -signal.SIGKILL), said(folder)
        lab.check_goes_on(folder)
    return {"killed": code != 0}


# ---------------------------------------------------------------- F2: the n-th operation fails


def failing_operation(lab: Lab, full: bool) -> Iterator[Trial]:
    """With `full`, one operation after the other, until a run meets no fault any more."""
    events = [event for event in read_trace(lab.reference(*SHORT)["trace"]) if "op" in event]
    for kind in ("EIO", "ENOSPC", "EDQUOT", "short"):
        few = [random.Random(kind).choice(events)["number"]]
        for at in range(_MOST_OPERATIONS) if full else few:
            fired: list[bool] = []
            yield Trial(
                f"{kind} at operation {at}", lambda k=kind, n=at, f=fired: _failing(lab, k, n, f)
            )
            if fired == [False]:
                break


def _failing(lab: Lab, kind: str, at: int, was_fired: list[bool]) -> dict[str, Any]:
    """The operation numbered `at` fails; `was_fired` gets whether there was one."""
    reference = lab.reference(*SHORT)
    with lab.folder() as folder:
        report = lab.scratch / "faults.jsonl"
        report.unlink(missing_ok=True)
        fault = {"at": at, "kind": kind, "report": str(report)}
        code = lab.server.run(folder, *TRAIN, *SHORT, fault=fault)
        fired = any("fault" in event for event in read_trace(report))
        was_fired.append(fired)
        if code:
            assert fired and kind != "short", f"failed without cause: {said(folder)}"
            check_clear_error(folder, code)
            _check_last_good(folder / RUN)
            lab.check_goes_on(folder, *SHORT)
        else:
            assert outcome(folder / RUN) == reference["outcome"], "it ended well, but differs"
    return {"fired": fired, "survived": fired and code == 0}


def _check_last_good(run_folder: Path) -> None:
    """The checkpoint that latest.json names, or a newer one, is intact."""
    if not run_folder.exists():
        return
    run = Run(run_folder)
    latest, found = run.latest(), run.latest_checkpoint()
    assert latest is None or (found is not None and found[0] >= latest["step"]), "a step back"


# ---------------------------------------------------------------- F3: a full disk

_FULL = {  # what is being written when the disk fills up: the function, its call, the words
    "checkpoint": (_SAVE, 1, (*TRAIN, "--resume")),
    "log": (_STEP, 5, (*TRAIN, "--resume", "checkpoint.every_steps=1000")),
    "data": ("mule.train.assemble.prepared_rows", 1, (*TRAIN, "--name", "other")),
    "export": ("mule.export.gguf.add_metadata", 1, ("export", "pretrain", "--types", "f16")),
}


def full_disk(lab: Lab, full: bool) -> Iterator[Trial]:
    for what in _FULL:
        if what == "export" and os.geteuid() and not full:
            continue  # a size limit is met inside a tensor: test_reliability_found.py
        for free in (0, 4096, 20_000, 60_000) if full else (0,):
            yield Trial(f"{what}, {free} bytes free", lambda w=what, f=free: _full_disk(lab, w, f))


def _full_disk(lab: Lab, what: str, free: int) -> dict[str, Any]:
    """The disk fills up in the middle; with no right to mount one, a file size limit does."""
    call, nth, words = _FULL[what]
    with small_disk(lab) as (folder, mounted):
        write_data(folder)
        stop = {"call": _STEP, "nth": 9, "act": int(signal.SIGTERM)}
        whole = what in ("export", "data")
        code = lab.server.run(folder, *TRAIN, fault=None if whole else stop)
        assert code == (0 if whole else 143), said(folder)
        if what == "export":
            assert lab.server.run(folder, *words) == 0, said(folder)
        if what == "data":
            with open(folder / "text.txt", "a") as file:
                file.write("One more line.\n" * 3000)
        earlier = _artefacts(folder)
        ballast = folder / "ballast"
        # What the command prints is a file too: the limit leaves it room.
        act = {"ballast": str(ballast), "free": free} if mounted else {"limit": 20_000}
        code = lab.server.run(folder, *words, fault={"call": call, "nth": nth, "act": act})
        check_clear_error(folder, code)
        now = hashes(folder)
        lost = [name for name, total in earlier.items() if now.get(name) != total]
        assert not lost, f"changed by a full disk: {', '.join(lost)}"
        ballast.unlink(missing_ok=True)
        if whole:
            assert lab.server.run(folder, *words) == 0, said(folder)
        else:
            lab.check_goes_on(folder)
    return {"real_disk": mounted}


def _artefacts(folder: Path) -> dict[str, str]:
    """Checkpoints, exported files and prepared rows."""
    kept = ("checkpoint-", ".gguf", ".prepared")
    return {name: total for name, total in hashes(folder).items() if any(k in name for k in kept)}


@contextmanager
def small_disk(lab: Lab) -> Iterator[tuple[Path, bool]]:
    """(a folder, whether it is a disk of its own of 256 MiB)."""
    with lab.folder() as folder:
        disk = folder / "disk"
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", str(disk)]
        mounted = not os.geteuid() and not subprocess.run(command, capture_output=True).returncode
        try:
            yield disk, mounted
        finally:
            if mounted:
                subprocess.run(["umount", "--lazy", str(disk)], check=True)


# ---------------------------------------------------------------- F4: corruption


def corrupted(lab: Lab, full: bool) -> Iterator[Trial]:
    for seed in range(1000 if full else 60):
        yield Trial(f"seed {seed}", lambda seed=seed: _corrupted(lab, seed, resume=False))
    for seed in range(1000, 1010 if full else 1001):
        yield Trial(f"seed {seed}, resumed", lambda s=seed: _corrupted(lab, s, resume=True))


def _corrupted(lab: Lab, seed: int, *, resume: bool) -> dict[str, Any]:
    """Damage a file of the newest checkpoint: it is named, and the one before is taken."""
    chance = random.Random(seed)
    reference = lab.reference()
    with lab.folder() as folder:
        shutil.copytree(reference["folder"] / "runs", folder / "runs")
        run = Run(folder / RUN)
        (before, _), (step, newest) = run.checkpoints()[-2:]
        how, name = _damage(newest, run.checkpoint_dir(before), chance)
        try:
            fsio.verify_folder(newest)
        except StorageError as error:
            assert name is None or name in error.message, f"{how}: names another file"
        else:
            raise AssertionError(f"{how}: not seen")
        found = run.latest_checkpoint()
        assert found is not None and found[0] == before < step, f"{how}: no way back"
        if resume:
            lab.check_goes_on(folder)
    return {"how": how.split(" in ")[0]}


def _damage(newest: Path, before: Path, chance: random.Random) -> tuple[str, str | None]:
    """(what was done, the name the error must say); never a change without effect.

    The name is None for the manifest: damaged, it may speak ill of any file.
    """
    file = chance.choice(sorted(file for file in newest.iterdir() if file.is_file()))
    how = chance.choice(["flip", "flip", "cut", "zeros", "swap"])
    content = bytearray(file.read_bytes())
    name = None if file.name == fsio.MANIFEST else file.name
    if how == "swap" and name and (before / name).read_bytes() != content:
        shutil.copy(before / name, file)
        return f"swap in {name}", name
    if how == "cut":  # a manifest without its last line feed says the same
        file.write_bytes(content[: chance.randrange(len(content) - 1)])
        return f"cut in {file.name}", name
    place = chance.randrange(len(content))
    page = slice(place // 4096 * 4096, place // 4096 * 4096 + 4096)
    if how == "zeros" and any(content[page]):
        content[page] = bytes(len(content[page]))
    else:
        how = "flip"
        content[place] ^= 1 << chance.randrange(8)
    file.write_bytes(content)
    return f"{how} in {file.name}", name


# ---------------------------------------------------------------- F4: writes lost with the power


def lost_writes(lab: Lab, full: bool) -> Iterator[Trial]:
    for seed in range(500 if full else 60):
        resume = seed % 20 == (19 if full else 59)
        yield Trial(f"seed {seed}", lambda s=seed, r=resume: _lost_writes(lab, s, resume=r))


def _lost_writes(lab: Lab, seed: int, *, resume: bool) -> dict[str, Any]:
    """The power goes after a random operation of a recorded run."""
    chance, reference = random.Random(seed), lab.reference(*SHORT)
    home = (reference["folder"] / RUN).resolve()
    events = [event for event in read_trace(reference["trace"]) if "op" in event]
    disk, newest = Disk(home), 0
    for event in events[: chance.randint(1, len(events))]:
        disk.apply(event)
        name = Path(event.get("to", "")).name
        if event["op"] == "rename" and name.startswith("checkpoint-"):
            newest = max(newest, int(name.removeprefix("checkpoint-")))
    pointer = disk.promised("latest.json")
    promised = json.loads(pointer)["step"] if pointer else 0
    with lab.folder() as folder:
        shutil.copytree(reference["folder"] / "runs" / ".prepared", folder / "runs" / ".prepared")
        disk.write_after_crash(folder / RUN, chance)
        run = Run(folder / RUN)
        run.latest(), run.best(), run.metrics(), run.events()
        found = run.latest_checkpoint()
        step = found[0] if found else 0
        assert promised <= step <= newest, f"{step} found, {promised} promised, {newest} written"
        if resume:
            lab.check_goes_on(folder, *SHORT)
    return {"step": step, "resumed": resume}
