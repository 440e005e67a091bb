"""The part of Go's text/template that our Modelfiles use, rendered here to prove them.

Actions: `range .Messages` (with or without `$i, $_ :=`), `if`, `else if`, `else`, `end`, and the
output of a field. Values: `.Field`, `$.Field`, `$i`, text, numbers, and the functions `eq`, `not`,
`and`, `or`, `len`, `slice`.
Source: pkg.go.dev/text/template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_ACTION = re.compile(r"\{\{(?P<left>-\s)?\s*(?P<words>.*?)\s*(?P<right>\s-)?\}\}", re.DOTALL)
_WORD = re.compile(r'\s*(\(|\)|"(?:[^"\\]|\\.)*"|\d+|\$?[.\w]*)')
_RANGE = re.compile(r"(?:(\$\w+),\s*\$\w+\s*:=\s*)?\.(\w+)")
_SPACE = " \t\r\n"  # what a dash beside an action takes away


class GoTemplateError(ValueError):
    """The template uses what is not known here, or is not well formed."""


@dataclass(frozen=True)
class _Output:
    value: Any


@dataclass(frozen=True)
class _If:
    branches: list[tuple[Any, list[Any]]]  # (condition, None for else; what is written)


@dataclass(frozen=True)
class _Range:
    variable: str | None
    name: str
    body: list[Any]


@dataclass(frozen=True)
class _Scope:
    """What names mean: `dot` is the innermost message, `root` what the template was given."""

    root: Mapping[str, Any]
    dot: Mapping[str, Any]
    variables: Mapping[str, int] = field(default_factory=dict)


def render_go(template: str, data: Mapping[str, Any]) -> str:
    """The text that Go writes for `template` with `data`. Raises GoTemplateError."""
    pieces = list(_pieces(template))
    body, ended_by = _parse(pieces, 0)
    if ended_by != len(pieces):
        raise GoTemplateError(f"{pieces[ended_by][1]} without a beginning")
    return "".join(_render(body, _Scope(data, data)))


def ollama_data(messages: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """What Ollama gives a template: messages of one role in a row are joined, and all system texts.

    Source: collate in template/template.go of Ollama.
    """
    joined: list[dict[str, str]] = []
    for message in messages:
        role, content = message["role"], message["content"]
        if joined and joined[-1]["Role"] == role:
            joined[-1]["Content"] += f"\n\n{content}"
        else:
            joined.append({"Role": role, "Content": content})
    system = [message["content"] for message in messages if message["role"] == "system"]
    return {"Messages": joined, "System": "\n\n".join(system)}


# ---------------------------------------------------------------- reading


def _pieces(template: str) -> Iterator[tuple[str, str]]:
    """("text", ...) and ("action", ...) by turns, dashes obeyed."""
    end, trim = 0, False
    for match in _ACTION.finditer(template):
        text = template[end : match.start()]
        text = text.lstrip(_SPACE) if trim else text
        yield "text", text.rstrip(_SPACE) if match["left"] else text
        yield "action", match["words"]
        end, trim = match.end(), match["right"] is not None
    text = template[end:]
    yield "text", text.lstrip(_SPACE) if trim else text


def _parse(pieces: list[tuple[str, str]], place: int) -> tuple[list[Any], int]:
    """The nodes from `place` on, and where their `else` or `end` stands."""
    nodes: list[Any] = []
    while place < len(pieces):
        kind, text = pieces[place]
        verb, _, rest = text.partition(" ")
        if kind == "text":
            nodes.append(text)
        elif verb in ("end", "else"):
            return nodes, place
        elif verb == "if":
            node, place = _parse_if(pieces, place, rest)
            nodes.append(node)
        elif verb == "range":
            node, place = _parse_range(pieces, place, rest)
            nodes.append(node)
        else:
            nodes.append(_Output(_parse_value(text)))
        place += 1
    return nodes, place


def _parse_if(pieces: list[tuple[str, str]], place: int, words: str) -> tuple[_If, int]:
    branches: list[tuple[Any, list[Any]]] = []
    condition: Any = _parse_value(words)
    while True:
        body, place = _parse(pieces, place + 1)
        branches.append((condition, body))
        ended_by = pieces[place][1] if place < len(pieces) else ""
        if ended_by == "end":
            return _If(branches), place
        verb, _, words = ended_by.removeprefix("else").strip().partition(" ")
        if not ended_by.startswith("else") or verb not in ("", "if") or condition is None:
            raise GoTemplateError("an `if` without its end")
        condition = _parse_value(words) if verb else None


def _parse_range(pieces: list[tuple[str, str]], place: int, words: str) -> tuple[_Range, int]:
    match = _RANGE.fullmatch(words)
    body, place = _parse(pieces, place + 1)
    if match is None or place == len(pieces) or pieces[place][1] != "end":
        raise GoTemplateError(f"range {words}: not understood, or without its end")
    return _Range(match[1], match[2], body), place


def _parse_value(words: str) -> Any:
    """A nested list: [function, argument, ...], or one word."""
    stack: list[list[Any]] = [[]]
    place = 0
    while place < len(words):
        match = _WORD.match(words, place)
        if match is None or not match[1]:
            raise GoTemplateError(f"{words[place:]}: not understood")
        place = match.end()
        if match[1] == "(":
            stack.append([])
        elif match[1] == ")" and len(stack) > 1:
            stack[-2].append(stack.pop())
        else:
            stack[-1].append(match[1])
    if len(stack) != 1 or not stack[0]:
        raise GoTemplateError(f"{words}: not understood")
    return stack[0]


# ---------------------------------------------------------------- writing


def _render(nodes: list[Any], scope: _Scope) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, str):
            yield node
        elif isinstance(node, _Output):
            yield str(_value(node.value, scope))
        elif isinstance(node, _If):
            chosen = (b for c, b in node.branches if c is None or _value(c, scope))
            yield from _render(next(chosen, []), scope)
        elif isinstance(node, _Range):
            for number, item in enumerate(scope.root[node.name]):
                named = {node.variable: number} if node.variable else {}
                yield from _render(
                    node.body, _Scope(scope.root, item, {**scope.variables, **named})
                )


def _value(expression: Any, scope: _Scope) -> Any:
    """What a value is worth; an empty text, 0 and false count as false, as in Go."""
    if isinstance(expression, str):
        return _word(expression, scope)
    name, *rest = expression
    if not rest:
        return _value(name, scope)
    values = [_value(part, scope) for part in rest]
    if name == "eq" and len(values) == 2:
        return values[0] == values[1]
    if name == "not" and len(values) == 1:
        return not values[0]
    if name == "len" and len(values) == 1:
        return len(values[0])
    if name == "slice" and len(values) == 2:
        return values[0][values[1] :]
    if name == "and":
        return next((value for value in values if not value), values[-1])
    if name == "or":
        return next((value for value in values if value), values[-1])
    raise GoTemplateError(f"{name}: no function known here")


def _word(word: str, scope: _Scope) -> Any:
    if word.startswith('"'):
        return json.loads(word)
    if word.isdigit():
        return int(word)
    place, name = (scope.root, word[2:]) if word.startswith("$.") else (scope.dot, word[1:])
    if word.startswith((".", "$.")) and name in place:
        return place[name]
    if word in scope.variables:
        return scope.variables[word]
    raise GoTemplateError(f"{word}: no value known here")
