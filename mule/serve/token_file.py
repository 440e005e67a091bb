"""The secret that callers of a server must know, and the file it is handed over in."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
from pathlib import Path

from mule import fsio, machine
from mule.errors import StorageError, UserError

_SHORTEST = 20  # characters of a token that someone chose


class TokenFile:
    """A token and its file, readable by the user alone; `close` removes a file made for one start.

    Without `path` the token is new and its file lies in the runtime folder of the user, or in the
    cache. With `path` the file is read; if there is none it is made, and stays.
    Raises UserError for a file that others can read, or that holds no token.
    """

    def __init__(self, path: Path | None, port: int) -> None:
        self.path = path or _folder() / f"serve-{port}.token"
        self._is_ours = path is None
        if path is None:
            self.path.unlink(missing_ok=True)  # of a server that was killed on this port
        if self._is_ours or not self.path.exists():
            self.token = secrets.token_urlsafe(32)
            fsio.write_private(self.path, self.token + "\n")
        else:
            self.token = _read(self.path)

    def close(self) -> None:
        if self._is_ours:
            with contextlib.suppress(OSError):
                self.path.unlink()


def _folder() -> Path:
    """A folder of ours that nobody else can write to."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    there = runtime is not None and Path(runtime).is_dir()
    folder = Path(str(runtime)) / "mule" if there else machine.cache_dir() / "serve"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
    except OSError as error:
        raise StorageError(
            f"{folder}: cannot hold the token ({error.strerror})", "name a file: --token-file FILE"
        ) from None
    return folder


def _read(path: Path) -> str:
    try:
        mode = path.stat().st_mode
        text = path.read_text(encoding="utf-8").strip() if stat.S_ISREG(mode) else ""
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: cannot be read as a token file ({error})", "name another: --token-file FILE"
        ) from None
    if mode & 0o077:
        raise UserError(
            f"{path}: other users can read or write this token (mode {stat.S_IMODE(mode):03o})",
            f"chmod 600 {path}",
        )
    if not re.fullmatch(rf"[\x21-\x7e]{{{_SHORTEST},512}}", text):
        raise UserError(
            f"{path}: holds no token: one word of {_SHORTEST} to 512 ASCII characters",
            f"remove the file, and the next start writes a new token: rm {path}",
        )
    return text
