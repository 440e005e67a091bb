"""Every durable write of Mule goes through here.

A reader sees the old content or the new content, never a mixture: everything is written beside its
destination, flushed to the disk, and renamed. Folders carry a manifest of SHA-256 sums, because no
weight format detects a flipped bit by itself.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mule.errors import MuleError, StorageError, UserError

MANIFEST = "manifest.json"
_HASHED_BYTES = 1 << 22  # at once
_TEMPORARY = ".partial-"  # prefix of everything that is not yet committed
_OLD = f"{_TEMPORARY}~"  # prefix of what is being replaced
_RANDOM = "?" * 8  # how tempfile ends the names of folders


# ---------------------------------------------------------------- one file


def write_text(path: Path | str, text: str) -> None:
    """Replace `path` by `text` (UTF-8), atomically."""
    with atomic_file(path) as file:
        file.write(text.encode())


def write_json(path: Path | str, value: Any) -> None:
    """Replace `path` by `value` as indented JSON, atomically. NaN is refused: it is not JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_private(path: Path | str, text: str) -> None:
    """A new file that its user alone can read. Raises UserError when something is there already."""
    path = Path(path)
    with explain_storage(path):
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        descriptor = os.open(path, flags, 0o600)
        with open(descriptor, "wb") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())


def read_json(path: Path | str) -> Any:
    """The JSON value in `path`; StorageError when it is missing or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StorageError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StorageError(
            f"{path}: not valid JSON ({error})", "restore it, or make it again"
        ) from None


@contextlib.contextmanager
def atomic_file(path: Path | str) -> Iterator[IO[bytes]]:
    """An open binary file that becomes `path` when the block ends well, else vanishes."""
    with stream_file(path) as temporary, open(temporary, "wb") as file:
        yield file


@contextlib.contextmanager
def stream_file(path: Path | str, check: Callable[[Path], None] | None = None) -> Iterator[Path]:
    """A temporary path beside `path` for a large output; checked, flushed, renamed at the end."""
    path = Path(path)
    with explain_storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary_name(path)
        try:
            yield temporary
            if check is not None:
                check(temporary)
            _fsync(temporary)
            os.replace(temporary, path)
            _fsync(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


# ---------------------------------------------------------------- a folder


@contextlib.contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """A temporary folder that becomes `path`, with a SHA-256 manifest, when the block ends well.

    An existing `path` is replaced: it is moved aside first and removed last, so that one of the two
    is complete at every moment.
    """
    path = Path(path)
    with explain_storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f"{_TEMPORARY}{path.name}-", dir=path.parent))
        try:
            temporary.chmod(0o755)
            yield temporary
            write_manifest(temporary)
            for file in sorted(temporary.rglob("*")):
                _fsync(file)
            _fsync(temporary)
            _replace_folder(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def write_manifest(folder: Path) -> None:
    """Record size and SHA-256 of every file below `folder` in its manifest."""
    files = {
        str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != MANIFEST
    }
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=2) + "\n", encoding="utf-8")


def verify_folder(folder: Path | str) -> None:
    """Check `folder` against its manifest; StorageError names the first file that differs."""
    folder = Path(folder)
    hint = "use an older checkpoint, or make this folder again"
    for name, num_bytes, sha256 in _entries(folder / MANIFEST, hint):
        file = folder / name
        if not file.is_file():
            raise StorageError(f"{file}: listed in the manifest but missing", hint)
        if file.stat().st_size != num_bytes:
            raise StorageError(
                f"{file}: {file.stat().st_size:,} bytes, the manifest says {num_bytes:,}", hint
            )
        if sha256_file(file) != sha256:
            raise StorageError(
                f"{file}: its content differs from its SHA-256 in the manifest", hint
            )


def _entries(manifest: Path, hint: str) -> list[tuple[str, int, str]]:
    """(name, bytes, SHA-256) of every file in a manifest, which may be damaged itself."""
    try:
        files = read_json(manifest)["files"]
        return [(name, int(entry["bytes"]), entry["sha256"]) for name, entry in files.items()]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise StorageError(f"{manifest}: this manifest is damaged", hint) from None


def remove_leftovers(parent: Path | str, name: str | None = None) -> None:
    """Delete what a killed process left uncommitted in `parent`, or of the folder `name` in it.

    What it had moved aside to replace it, and did not, is brought back. Hold a lock: of the run, or
    on that folder.
    """
    ends = "*" if name is None else f"{glob.escape(name)}-{_RANDOM}"
    for aside in Path(parent).glob(f"{_OLD}{ends}") if name else ():
        kept, place = aside / str(name), Path(parent) / str(name)
        if kept.exists() and not place.exists():
            os.rename(kept, place)
        shutil.rmtree(aside, ignore_errors=True)
    for path in Path(parent).glob(f"{_TEMPORARY}{ends}"):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


# ---------------------------------------------------------------- work that survives a kill


@dataclass(frozen=True)
class Unfinished:
    """Folders in the making, and `log`, a JSONL file for how far they are; kept until all is done."""

    folders: list[Path]
    log: Path


@contextlib.contextmanager
def resumable_folders(root: Path, *paths: Path) -> Iterator[Unfinished]:
    """Folders that become `paths` (beside `root`) when the block ends well, with manifests.

    `root` is where they lie until then, under a name that the next process finds again: what was
    there is there again. It goes when the block raises a UserError about the input; any other
    failure keeps it. Hold a lock on `root`: one process at a time.
    """
    work = Unfinished([root / path.name for path in paths], root / "progress.jsonl")
    with explain_storage(root):
        for folder in work.folders:
            folder.mkdir(parents=True, exist_ok=True)
        try:
            yield work
            for folder in work.folders:
                write_manifest(folder)
                for file in sorted(folder.rglob("*")):
                    _fsync(file)
                _fsync(folder)
            for folder, path in zip(work.folders, paths, strict=True):
                _replace_folder(folder, path)
        except UserError as error:
            if not isinstance(error, StorageError):
                shutil.rmtree(root, ignore_errors=True)
            raise
        shutil.rmtree(root, ignore_errors=True)


def partial_name(name: str) -> str:
    """What uncommitted work for `name` is called."""
    return f"{_TEMPORARY}{name}"


# ---------------------------------------------------------------- logs


class AppendLog:
    """A JSONL file, one object a line, one write a line; `sync` makes it durable."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        with explain_storage(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _cut_torn_tail(self.path)
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def append(self, row: dict[str, Any]) -> None:
        line = json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"
        content = line.encode()
        with explain_storage(self.path):
            while content:  # once, but for a disk that fills up: the second write then says so
                content = content[os.write(self._descriptor, content) :]

    def sync(self) -> None:
        with explain_storage(self.path):
            os.fsync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)


# ---------------------------------------------------------------- sums and space


def sha256_file(path: Path | str, on_bytes: Callable[[int], None] = lambda _: None) -> str:
    """SHA-256 of a file's content, as hexadecimal; `on_bytes` is told of every piece read."""
    content_sum = hashlib.sha256()
    with open(path, "rb") as file:
        while content := file.read(_HASHED_BYTES):
            content_sum.update(content)
            on_bytes(len(content))
    return content_sum.hexdigest()


def sha256_json(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form (sorted keys, no spaces)."""
    return hashlib.sha256(
        json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


def require_space(folder: Path | str, num_bytes: int, what: str) -> None:
    """StorageError unless the disk of `folder` has room for `num_bytes` and a tenth more."""
    folder = Path(folder)
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < num_bytes * 1.1:
        raise StorageError(
            f"{what} needs {num_bytes / 2**20:,.0f} MiB in {folder}, "
            f"which has {free / 2**20:,.0f} MiB free",
            "free some space, or choose another folder on a larger disk",
        )


# ---------------------------------------------------------------- inside


def _temporary_name(path: Path) -> Path:
    return path.with_name(f"{_TEMPORARY}{path.name[:100]}-{os.getpid()}")


def _replace_folder(temporary: Path, path: Path) -> None:
    if not path.exists():
        os.rename(temporary, path)
        _fsync(path.parent)
        return
    old = Path(tempfile.mkdtemp(prefix=f"{_OLD}{path.name}-", dir=path.parent))
    os.rename(path, old / path.name)
    os.rename(temporary, path)
    _fsync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cut_torn_tail(path: Path) -> None:
    """Drop the bytes after the last newline, so that the next line starts clean."""
    if not path.exists() or not (content := path.read_bytes()) or content.endswith(b"\n"):
        return
    with open(path, "r+b") as file:
        file.truncate(content.rfind(b"\n") + 1)


_CAUSES = {
    errno.ENOSPC: (
        "no space left on the disk",
        "free some space, then try again: what was saved before is untouched",
    ),
    errno.EDQUOT: (
        "the disk quota is used up",
        "free some space, then try again: what was saved before is untouched",
    ),
    errno.EROFS: ("the file system is read-only", "choose a folder you can write to"),
    errno.EACCES: ("permission denied", "choose a folder you can write to"),
    errno.ENOTDIR: ("a parent of this path is a file, not a folder", "choose another path"),
    errno.EIO: (
        "the disk reported an input/output error",
        "check the disk; what was saved before is untouched",
    ),
    errno.EFBIG: (
        "the file would exceed the allowed size",
        "raise the file size limit (ulimit -f)",
    ),
}


_SHORT_WRITE = re.compile(r"\d+ requested and \d+ written")
_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # how Rust libraries (safetensors) tell an errno


def _errno_of(error: Exception) -> int | None:
    """The system's number of an error, also where a library tells it in words."""
    if told := _OS_ERROR.search(str(error)):
        return int(told[1])
    if isinstance(error, OSError):  # numpy's tofile says no more than that it wrote too little
        return errno.ENOSPC if _SHORT_WRITE.search(str(error)) else error.errno
    return None


@contextlib.contextmanager
def explain_storage(path: Path) -> Iterator[None]:
    """Turn what the system says about a failed write to `path` into a StorageError that teaches."""
    try:
        yield
    except MuleError:
        raise
    except Exception as error:
        number = _errno_of(error)
        if number not in _CAUSES:
            raise
        cause, hint = _CAUSES[number]
        raise StorageError(f"cannot write {path}: {cause}", hint) from error
