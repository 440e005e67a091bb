"""Names that a browser may send for files of this machine (rule S6): looked up, never opened."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from mule.serve.problem import Problem, shown

_ID = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_DIGEST_CHARS = 8


def id_of(name: str) -> str:
    """`name` where it can stand in an address; else what of it can, and a few digits of its hash."""
    if _ID.fullmatch(name) and ".." not in name:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:_DIGEST_CHARS]
    plain = re.sub(r"[^a-z0-9_-]+", "-", name.lower()).strip("-_")[: 63 - _DIGEST_CHARS]
    return f"{plain}-{digest}" if plain else digest


def find(wanted: str, names: Iterable[str], what: str) -> str:
    """The name of this id. Problem 404 where there is none."""
    for name in names:
        if id_of(name) == wanted:
            return name
    raise Problem(404, f"no {what} {shown(wanted)} here", code="not_found")


def check_inside(folder: Path, root: Path) -> None:
    """Problem 404 where a link leads out of `root`: the folder itself, or one of its files."""
    entries = folder.iterdir() if folder.is_dir() else ()
    for path in (folder, *entries):
        is_followed = path.is_symlink() and (path == folder or not path.is_dir())
        if is_followed and not path.resolve().is_relative_to(root.resolve()):
            raise Problem(
                404,
                f"{path} is a link that leads out of {root}",
                code="leads_out",
                hint=f"show the folder it leads to: mule ui --runs {path.resolve().parent}",
            )
