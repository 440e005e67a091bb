"""What a disk may hold after the power went: a model of files and folders, synced and not.

A file keeps what was last synced; what was written since is kept, dropped or zeroed. A folder keeps
the names it had when it was last synced; the changes since are kept up to a moment, or each by
chance. A rename is whole or has not happened. Parents of the folder watched are taken as durable.
"""

from __future__ import annotations

import base64
import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(eq=False)
class _File:
    content: bytes = b""
    synced: bytes = b""

    def after_crash(self, chance: random.Random) -> bytes:
        """The synced content, or the newest with what came since kept, zeroed or cut."""
        common = len(self.synced) if self.content.startswith(self.synced) else 0
        fresh = self.content[common:]
        zeroed = self.content[:common] + bytes(len(fresh))
        cut = self.content[: common + chance.randint(0, len(fresh))]
        return chance.choice([self.synced, zeroed, cut, self.content])


@dataclass(eq=False)
class _Change:
    """One operation on names: what each folder loses and gains by it."""

    number: int
    parts: list[tuple[_Folder, str, Any]] = field(default_factory=list)  # (folder, name, node|None)


@dataclass(eq=False)
class _Folder:
    names: dict[str, Any] = field(default_factory=dict)
    synced: dict[str, Any] = field(default_factory=dict)
    pending: list[_Change] = field(default_factory=list)


class Disk:
    """A folder as a recorded trace of operations leaves it."""

    def __init__(self, root: Path) -> None:
        self._root_path, self._root, self._number = str(root), _Folder(), 0

    def apply(self, event: dict[str, Any]) -> None:
        """One line of a report of `tests.life.faults`, with contents; others are left out."""
        self._number += 1
        path = event.get("path", "")
        if "op" not in event or not path.startswith(self._root_path):
            return
        if event["op"] == "fsync":
            self._sync(self._find(path))
            return
        if path == self._root_path:
            return
        folder, name = self._place(path)
        if event["op"] == "write":
            self._write(folder, name, base64.b64decode(event["content"]))
        elif event["op"] == "mkdir":
            self._change((folder, name, _Folder()))
        elif event["op"] in ("unlink", "rmdir"):
            self._change((folder, name, None))
        elif event["op"] == "rename":
            target, new = self._place(event["to"])
            self._change((folder, name, None), (target, new, folder.names[name]))

    def promised(self, name: str) -> bytes | None:
        """What a file of the root holds whatever is lost; None when it may be absent."""
        node = self._root.synced.get(name)
        return node.synced if isinstance(node, _File) else None

    def write_after_crash(self, out: Path, chance: random.Random) -> None:
        """Write to `out` one of the states the disk may be found in."""
        horizon = chance.choice([None, self._number - int(chance.expovariate(0.1))])
        coins: dict[_Change, bool] = {}

        def happened(change: _Change) -> bool:
            if horizon is not None:  # a journal: all up to a moment
                return change.number <= horizon
            return coins.setdefault(change, chance.random() < 0.5)

        self._rebuild(self._root, out, happened, chance)

    # ------------------------------------------------------------ inside

    def _rebuild(self, folder: _Folder, out: Path, happened: Any, chance: random.Random) -> None:
        out.mkdir(parents=True, exist_ok=True)
        names = dict(folder.synced)
        for change in folder.pending:
            if happened(change):
                for place, name, node in change.parts:
                    if place is folder:
                        names.pop(name, None)
                        if node is not None:
                            names[name] = node
        for name, node in names.items():
            if isinstance(node, _Folder):
                self._rebuild(node, out / name, happened, chance)
            else:
                (out / name).write_bytes(node.after_crash(chance))

    def _change(self, *parts: tuple[_Folder, str, Any]) -> None:
        change = _Change(self._number, list(parts))
        for folder, name, node in parts:
            folder.names.pop(name, None)
            if node is not None:
                folder.names[name] = node
            if change not in folder.pending:
                folder.pending.append(change)

    def _write(self, folder: _Folder, name: str, content: bytes) -> None:
        if name not in folder.names:
            self._change((folder, name, _File()))
        folder.names[name].content = content

    def _sync(self, node: Any) -> None:
        if isinstance(node, _File):
            node.synced = node.content
        elif node is not None:
            node.synced, node.pending = dict(node.names), []

    def _find(self, path: str) -> Any:
        node: Any = self._root
        for part in Path(path).relative_to(self._root_path).parts:
            node = node.names.get(part) if isinstance(node, _Folder) else None
        return node

    def _place(self, path: str) -> tuple[_Folder, str]:
        parent = self._find(str(Path(path).parent))
        assert isinstance(parent, _Folder), path
        return parent, Path(path).name


def read_trace(report: Path) -> list[dict[str, Any]]:
    """The lines of a report, in order."""
    return [json.loads(line) for line in report.read_text().splitlines()]
