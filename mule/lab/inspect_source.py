"""What the source of a user's module shows by itself: lines of forward that compilers dislike."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mule.errors import UserError

_WAITS = {
    "item": (".item() waits for the value", "keep the tensor, of no dimension"),
    "tolist": (".tolist() waits for the values", "keep the tensor; index with it"),
    "numpy": (".numpy() leaves torch", "stay in torch"),
    "cpu": (".cpu() copies from the device and waits", "stay on the ids' device"),
}
_SHAPED = ("nonzero", "masked_select", "unique", "argwhere")
_FIXED = (
    "compute with a mask of fixed shape (torch.where, one_hot), or sort and use F.grouped_mm for "
    "experts"
)
_REDUCED = ("any", "all", "sum", "max", "min", "isnan", "equal", "allclose", "item")


@dataclass(frozen=True)
class Remark:
    """A line of the source, what is found there, and what to write in its place."""

    line: int
    kind: str
    found: str
    change: str


def named_class(module: str, *, before: str = "mule lab check ") -> tuple[Path, str]:
    """The file and the class of FILE.py:Class; nothing is run.

    Raises UserError, whose hint has `before` in front of what to write.
    """
    path, separator, name = module.rpartition(":")
    file = Path(path if separator else module)
    if file.suffix != ".py" or not file.is_file():
        raise UserError(
            f"{file}: no such Python file", f"give a file and a class: {before}model.py:GPT"
        )
    if not separator or not name:
        classes = _classes(file)
        shown = ", ".join(classes) or "none"
        raise UserError(
            f"{file}: which class? It defines {shown}",
            f"name it behind a colon: {before}{file}:{classes[-1] if classes else 'CLASS'}",
        )
    return file, name


def _classes(file: Path) -> list[str]:
    """The classes of a file that derive from something."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return []
    return [node.name for node in tree.body if isinstance(node, ast.ClassDef) and node.bases]


def remarks(file: Path, classes: list[str]) -> list[Remark]:
    """Of all functions that the forward of these classes calls, in order.

    A file that does not parse has none.
    """
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, OSError):
        return []
    found = {
        one for function in _called_by_forward(tree, classes) for one in _in_function(function)
    }
    return sorted(found, key=lambda one: (one.line, one.kind))


def line_advice(source: str, line: int) -> str | None:
    """What to write in place of what stands in this line."""
    told = [one for one in _in_tree(ast.parse(source)) if one.line == line]
    return told[0].change if told else None


def _called_by_forward(tree: ast.Module, classes: list[str]) -> list[ast.FunctionDef]:
    """Every forward of these classes, and what it calls of them and of the file, by name."""
    by_name: dict[str, list[ast.FunctionDef]] = {}
    for holder in tree.body:
        inside = holder.body if isinstance(holder, ast.ClassDef) else [holder]
        if isinstance(holder, ast.ClassDef) and holder.name not in classes:
            continue
        for node in inside:
            if isinstance(node, ast.FunctionDef):
                by_name.setdefault(node.name, []).append(node)
    reached, waiting = set(), ["forward"]
    while waiting:
        name = waiting.pop()
        if name in reached or name == "__init__":
            continue
        reached.add(name)
        for function in by_name.get(name, []):
            waiting += [called for called in _calls(function) if called in by_name]
    return [function for name in reached for function in by_name.get(name, [])]


def _calls(function: ast.FunctionDef) -> Iterator[str]:
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and isinstance(node.func, (ast.Name, ast.Attribute)):
            yield node.func.id if isinstance(node.func, ast.Name) else node.func.attr


def _in_function(function: ast.FunctionDef) -> Iterator[Remark]:
    for statement in function.body:
        yield from _in_tree(statement)


def _in_tree(tree: ast.AST) -> Iterator[Remark]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield from _of_call(node)
        elif isinstance(node, (ast.If, ast.While)) and _reads_values(node.test):
            yield Remark(
                node.lineno,
                "branch",
                "a branch depends on a tensor's values",
                "compute both and choose with torch.where, or branch on a Python number",
            )
        elif isinstance(node, ast.Attribute) and node.attr == "float64":
            yield _float64(node.lineno)


def _of_call(node: ast.Call) -> Iterator[Remark]:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
    if name == "print":
        yield Remark(
            node.lineno,
            "print",
            "print in forward: a graph break at every call",
            "remove it, or print outside of forward; of a value, after the update",
        )
    elif isinstance(node.func, ast.Attribute) and name in _WAITS and not node.args:
        yield Remark(node.lineno, "item", *_WAITS[name])
    elif name in _SHAPED or (name == "where" and len(node.args) == 1):
        text = f"{name} makes a tensor whose size depends on the values"
        yield Remark(node.lineno, "shape", text, _FIXED)
    elif isinstance(node.func, ast.Attribute) and name == "double":
        yield _float64(node.lineno)
    elif ast.unparse(node.func).startswith(("np.", "numpy.")):
        yield Remark(node.lineno, "numpy", "numpy in forward leaves torch", "use torch's function")


def _float64(line: int) -> Remark:
    change = "use torch.float32: float64 is 32 times slower or worse on most accelerators"
    return Remark(line, "float64", "float64 in forward", change)


def _reads_values(test: ast.expr) -> bool:
    """Whether a condition calls what gives a tensor: `(x > 0).any()`, `mask.sum() > 0`."""
    return any(
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in _REDUCED
        for node in ast.walk(test)
    )
