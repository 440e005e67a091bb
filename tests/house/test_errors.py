"""Every error a user can see says what to do."""

from __future__ import annotations

import ast

from tests.house.source import functions, modules, unexpected

# class -> the place of its hint among the arguments
HINT_AT = {
    "UserError": 1,
    "ConfigError": 1,
    "DataError": 3,
    "ModelError": 1,
    "StorageError": 1,
    "BusyError": 1,
}


def _raised(node: ast.AST) -> ast.Call | None:
    """The error a statement raises, when it is one for users."""
    if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call):
        return None
    name = ast.unparse(node.exc.func).rpartition(".")[2]
    return node.exc if name in HINT_AT else None


def _has_hint(error: ast.Call) -> bool:
    place = HINT_AT[ast.unparse(error.func).rpartition(".")[2]]
    given = [keyword.value for keyword in error.keywords if keyword.arg == "hint"]
    given += error.args[place : place + 1]
    return any(not (isinstance(hint, ast.Constant) and not hint.value) for hint in given)


def _own_nodes(function: ast.AST) -> list[ast.AST]:
    """The nodes of a function, those of functions inside it left out."""
    found: list[ast.AST] = []
    for child in ast.iter_child_nodes(function):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found += [child, *_own_nodes(child)]
    return found


def test_every_user_error_has_a_hint() -> None:
    bare: dict[str, str] = {}
    for module in modules("mule"):
        for place, function in functions(module):
            for node in _own_nodes(function):
                error = _raised(node)
                if error is not None and not _has_hint(error):
                    bare[place] = f"line {error.lineno} raises an error without a hint"
    assert not (wrong := unexpected(bare, "no_hint")), "\n".join(wrong)


def test_the_test_sees_a_missing_hint() -> None:
    for code, has in (
        ('raise UserError("no")', False),
        ('raise UserError("no", "")', False),
        ('raise UserError("no", "do this")', True),
        ('raise errors.DataError(file, 3, "no")', False),
        ('raise DataError(file, 3, "no", hint=text)', True),
    ):
        error = _raised(ast.parse(code).body[0])
        assert error is not None
        assert _has_hint(error) is has, code
    assert _raised(ast.parse("raise ValueError(1)").body[0]) is None
