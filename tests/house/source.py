"""The source of Mule as the house tests read it."""

from __future__ import annotations

import ast
import functools
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PEERS = ROOT / "bench" / "peers"  # other projects' environments, which git ignores
ALLOWLIST = tomllib.loads((Path(__file__).parent / "allowlist.toml").read_text(encoding="utf-8"))

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """One parsed file; `path` is relative to the repository."""

    path: str
    text: str
    tree: ast.Module

    @property
    def dotted(self) -> str:
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@functools.cache
def modules(*folders: str) -> tuple[Module, ...]:
    """Every Python file below the folders."""
    found_files = (file for folder in folders for file in (ROOT / folder).rglob("*.py"))
    files = sorted(file for file in found_files if not file.is_relative_to(PEERS))
    found = []
    for file in files:
        text = file.read_text(encoding="utf-8")
        found.append(Module(str(file.relative_to(ROOT)), text, ast.parse(text)))
    return tuple(found)


def functions(module: Module) -> Iterator[tuple[str, Function]]:
    """(place, function) of each function; the place is `path::Class.name`."""

    def walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, Function]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Function):
                yield f"{module.path}::{prefix}{child.name}", child
            if isinstance(child, (Function, ast.ClassDef)):
                yield from walk(child, f"{prefix}{child.name}.")
            else:
                yield from walk(child, prefix)

    yield from walk(module.tree, "")


def imports(tree: ast.AST, *, at_start: bool = False) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of each import; with `at_start`, of those run when it is imported.

    Imports for type checking only are left out.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if at_start and isinstance(node, Function):
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import on line {node.lineno}"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)
        else:
            yield from imports(node, at_start=at_start)


def unexpected(found: dict[str, str], section: str) -> list[str]:
    """What is found and not excused, and what is excused without need."""
    excused = ALLOWLIST.get(section, {})
    new = [f"{place}: {what}" for place, what in found.items() if place not in excused]
    stale = [
        f"allowlist.toml [{section}] {place}: no longer needed" for place in excused.keys() - found
    ]
    return new + stale
