"""A fork server whose children meet faults: a disk that fails, a signal in the middle of a phase.

A job may carry `fault`, with one of these:

at, kind, report   the operation numbered `at` below the job's folder fails as `kind` says (EIO once;
                   ENOSPC and EDQUOT from then on; short: half is written). Each is noted in `report`.
call, nth, act     at the nth call of a function (dotted path): a signal number, a full disk, a limit
                   of memory, an error, files cut or removed; the file `stamp` is touched before
poison             updates that go wrong: see tests/life/poison.py
"""

from __future__ import annotations

import base64
import builtins
import errno
import functools
import importlib
import io
import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.life import forker, poison

SPACE = {"ENOSPC", "EDQUOT"}
_STICKY = ("write", "fsync", "mkdir")  # what a disk without space goes on refusing
_OWN_FILES = ("output.log", "durable_calls", "ballast")  # of the test, not of Mule
_real_open, _real_write, _real_os_open = io.open, os.write, os.open


def main() -> None:
    """The server of `tests.life.forker`, with children that meet their job's fault."""
    import mule.commands.export
    import mule.export.gguf  # noqa: F401  (imported once here, instead of in every child)

    plain = forker._child

    def child(job: dict[str, Any]) -> None:
        if fault := job.get("fault"):
            _meet(fault, Path(job["folder"]))
        plain(job)

    forker._child = child
    forker.serve()


def _meet(fault: dict[str, Any], folder: Path) -> None:
    if "poison" in fault:
        poison.install(fault["poison"])
    if "report" in fault:
        _Disk(folder, fault)
    elif "call" in fault:
        _act_at_call(fault)


# ---------------------------------------------------------------- a function is called


def _act_at_call(fault: dict[str, Any]) -> None:
    """Wrap the function `call`, so that its nth call begins with the act."""
    owner, name = _owner(fault["call"])
    original, calls = getattr(owner, name), [0]

    @functools.wraps(original)
    def wrapped(*args: Any, **settings: Any) -> Any:
        calls[0] += 1
        if calls[0] == fault["nth"]:
            if stamp := fault.get("stamp"):
                Path(stamp).touch()
            _act(fault["act"])
        return original(*args, **settings)

    setattr(owner, name, wrapped)


def _owner(dotted: str) -> tuple[Any, str]:
    """The module or class that holds the function, and the function's name."""
    parts = dotted.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            owner = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:-1]:
            owner = getattr(owner, part)
        return owner, parts[-1]
    raise ValueError(f"no module in {dotted}")


def _act(act: int | dict[str, Any]) -> None:
    if isinstance(act, int):
        os.kill(os.getpid(), act)
    elif "ballast" in act:
        fill(Path(act["ballast"]), act["free"])
    elif "raise" in act:
        raise ValueError(act["raise"])
    elif "cut" in act:
        for file in Path().glob(act["cut"]):
            os.truncate(file, act.get("to", file.stat().st_size - act.get("by", 0)))
    elif "remove" in act:
        for file in Path().glob(act["remove"]):
            file.unlink()
    elif "more_memory" in act:  # bytes beyond what is mapped now
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + act["more_memory"]
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (act["limit"], resource.RLIM_INFINITY))


def fill(ballast: Path, free: int) -> None:
    """Write a file until its disk has `free` bytes left."""
    with _real_open(ballast, "ab") as file:
        file.write(bytes(max(0, shutil.disk_usage(ballast.parent).free - free)))


# ---------------------------------------------------------------- a disk that fails


class _Disk:
    """Counts what is done below a folder, notes it, and lets one operation fail."""

    def __init__(self, folder: Path, fault: dict[str, Any]) -> None:
        self.root = os.path.realpath(folder)
        self.at, self.kind = fault.get("at"), fault.get("kind", "EIO")
        self.contents = fault.get("contents", False)
        self.count, self.fired = 0, False
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self.report = os.open(fault["report"], flags, 0o644)
        self._patch()

    def meet(self, what: str, path: str) -> bool:
        """Count an operation; raises its OSError when it is to fail, True for a short write."""
        if not self._is_watched(path):
            return False
        number, self.count = self.count, self.count + 1
        again = self.fired and self.kind in SPACE and what in _STICKY
        if number != self.at and not again:
            return False
        self.fired = True
        self.note(fault=what, path=path)
        if self.kind == "short":
            return what == "write"
        code = getattr(errno, self.kind)
        raise OSError(code, os.strerror(code), path)

    def note(self, **event: Any) -> None:
        _real_write(self.report, (json.dumps(event) + "\n").encode())

    def done(self, what: str, path: str, to: str | None = None) -> None:
        """Note an operation that went well; with `contents`, what a file holds after it."""
        if not self._is_watched(path):
            return
        event: dict[str, Any] = {"op": what, "path": path, "number": self.count - 1}
        event |= {"to": to} if to else {}
        if self.contents and what == "write":
            with _real_open(path, "rb") as file:
                event["content"] = base64.b64encode(file.read()).decode()
        self.note(**event)

    def _is_watched(self, path: str) -> bool:
        return path.startswith(self.root + "/") and os.path.basename(path) not in _OWN_FILES

    # ------------------------------------------------------------ where it looks

    def _patch(self) -> None:
        import safetensors.torch

        for name in ("mkdir", "rmdir", "unlink", "remove"):
            setattr(os, name, self._on_path(name, getattr(os, name)))
        for name in ("rename", "replace"):
            setattr(os, name, self._on_two_paths(getattr(os, name)))
        os.open, os.write = self._open_descriptor, self._write
        os.fsync = self._fsync(os.fsync)
        builtins.open = io.open = self._open_file  # ty: ignore
        safetensors.torch.serialize_file = self._save(safetensors.torch.serialize_file)

    def _on_path(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        what = {"remove": "unlink"}.get(name, name)

        def call(path: Any, *args: Any, dir_fd: int | None = None, **settings: Any) -> Any:
            full = _full(path, dir_fd)
            self.meet(what, full)
            result = original(path, *args, dir_fd=dir_fd, **settings)
            self.done(what, full)
            return result

        return call

    def _on_two_paths(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(source: Any, target: Any, **settings: Any) -> None:
            full = _full(source)
            self.meet("rename", full)
            original(source, target, **settings)
            self.done("rename", full, _full(target))

        return call

    def _fsync(self, original: Callable[[int], None]) -> Callable[[int], None]:
        def call(descriptor: int) -> None:
            path = _path_of(descriptor)
            self.meet("fsync", path)
            original(descriptor)
            self.done("fsync", path)

        return call

    def _open_descriptor(
        self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None
    ) -> int:
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes:
            self.meet("open", _full(path, dir_fd))
        descriptor = _real_os_open(path, flags, mode, dir_fd=dir_fd)
        if writes:
            self.done("write", _full(path, dir_fd))
        return descriptor

    def _write(self, descriptor: int, data: Any) -> int:
        path = _path_of(descriptor)
        if self.meet("write", path):
            data = memoryview(data)[: len(data) // 2]
        written = _real_write(descriptor, data)
        self.done("write", path)
        return written

    def _open_file(self, file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **named: Any):
        """What `open` gives, over a raw file that may fail to write."""
        if isinstance(file, int) or not set(mode) & set("wax+"):
            return _real_open(file, mode, buffering, *rest, **named)
        path = _full(file)
        self.meet("open", path)
        raw = _Raw(self, path, mode.replace("b", "").replace("t", ""))
        self.done("write", path)
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        if "b" in mode:
            return buffered
        return io.TextIOWrapper(buffered, *rest, **named)

    def _save(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """safetensors writes with code of its own: its failure looks as its library tells it."""
        from safetensors import SafetensorError

        def call(tensors: Any, filename: Any, **settings: Any) -> None:
            path = _full(filename)
            try:
                short = self.meet("write", path)
            except OSError as error:
                Path(path).write_bytes(b"half of a file")
                text = f"Error while serializing: I/O error: {error.strerror}"
                raise SafetensorError(f"{text} (os error {error.errno})") from None
            assert not short or self.kind == "short"  # its library writes on by itself
            original(tensors, filename, **settings)
            self.done("write", path)

        return call


class _Raw(io.FileIO):
    """A file opened for writing that asks the disk before each write."""

    def __init__(self, disk: _Disk, path: str, mode: str) -> None:
        super().__init__(path, mode)
        self._disk, self._path = disk, path

    def write(self, data: Any, /) -> int:
        if self._disk.meet("write", self._path) and len(data) > 1:
            data = memoryview(data)[: len(data) // 2]
        written = super().write(data)
        self._disk.done("write", self._path)
        return written


def _full(path: Any, dir_fd: int | None = None) -> str:
    folder = os.getcwd() if dir_fd is None else _path_of(dir_fd)
    return os.path.normpath(os.path.join(folder, os.fspath(path)))


def _path_of(descriptor: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return ""


if __name__ == "__main__":
    main()
