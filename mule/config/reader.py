"""Reading YAML 1.2 strictly: plain data only, every value with its line.

Refused: tags (`!!python/...`), merge keys, a second document, other YAML versions, tabs in the
indentation, deep nesting and aliases that expand without end.
"""

from __future__ import annotations

from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import DocumentStartEvent, ScalarEvent
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode

MAX_BYTES = 1_000_000
_MAX_DEPTH = 12
_MAX_VALUES = 20_000
_TAG = "tag:yaml.org,2002:"


class YamlProblem(ValueError):
    """Text that is not the YAML a recipe may hold; `line` counts from 1."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line, self.message = line, message


def parse_yaml(text: str) -> Node | None:
    """The node tree of a document, None when it is empty. Raises YamlProblem."""
    try:
        _check_events(text)
        return YAML(typ="safe", pure=True).compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlProblem(mark.line + 1 if mark else 1, _plain_words(error)) from None
    except YAMLError as error:  # an unprintable character carries no mark
        raise YamlProblem(1, f"not valid YAML: {str(error).splitlines()[0]}") from None


def plain(node: Node) -> Any:
    """The Python value of a node. Raises YamlProblem when aliases expand without end."""
    return _Plain().value(node, 0)


def mapping_items(node: MappingNode) -> list[tuple[str, int, Node]]:
    """(key, line, value node) of each entry, in order, with repetitions. Raises YamlProblem."""
    for key, _ in node.value:
        if not isinstance(key, ScalarNode):
            raise YamlProblem(line_of(key), "a list or mapping as a key; keys are plain words")
    return [(key.value, line_of(key), value) for key, value in node.value]


def line_of(node: Node) -> int:
    return node.start_mark.line + 1


def _check_events(text: str) -> None:
    """Refuse what the composer would take or choke on: versions, tags, depth."""
    depth = 0
    for event in YAML(typ="safe", pure=True).parse(text):
        line = event.start_mark.line + 1
        if isinstance(event, DocumentStartEvent) and event.version not in (None, (1, 2)):
            raise YamlProblem(line, "only YAML 1.2 is read; remove the %YAML line")
        tag = getattr(event, "tag", None)
        if tag is not None and not str(tag).startswith(_TAG + "str"):
            raise YamlProblem(
                line, f"the tag {_short_tag(str(tag))} is refused; write plain values"
            )
        if not isinstance(event, ScalarEvent):
            name = type(event).__name__
            depth += name.endswith("StartEvent") - name.endswith("EndEvent")
        if depth > _MAX_DEPTH:
            raise YamlProblem(line, "nested too deeply for a recipe")


class _Plain:
    def __init__(self) -> None:
        self._count = 0

    def value(self, node: Node, depth: int) -> Any:
        self._count += 1
        if self._count > _MAX_VALUES or depth > _MAX_DEPTH:
            raise YamlProblem(line_of(node), "its aliases expand without end; write the values out")
        if isinstance(node, ScalarNode):
            return _scalar(node)
        if isinstance(node, MappingNode):
            return self._mapping(node, depth)
        return [self.value(item, depth + 1) for item in node.value]

    def _mapping(self, node: MappingNode, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, line, item in mapping_items(node):
            if key in found:
                raise YamlProblem(line, f"{key}: given twice; remove one")
            found[key] = self.value(item, depth + 1)
        return found


def _scalar(node: ScalarNode) -> Any:
    kind, text = str(node.tag).removeprefix(_TAG), node.value
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        digits = text.replace("_", "").lower()
        try:
            return int(digits, 0 if digits.lstrip("+-")[:2] in ("0x", "0o", "0b") else 10)
        except ValueError:  # `-_` is no number
            return text
    if kind == "float":
        return float(text.lower().replace("_", "").replace(".inf", "inf").replace(".nan", "nan"))
    return text


def _plain_words(error: MarkedYAMLError) -> str:
    problem = str(error.problem or error.context or "not valid YAML")
    if "'\\t'" in problem:
        return "a tab; YAML is indented with spaces"
    if "another document" in problem:
        return "a second document (---); a recipe is one document"
    if "mapping values are not allowed" in problem:
        return "a colon where none can be; put text that holds `: ` in quotes"
    return f"not valid YAML: {problem}"


def _short_tag(tag: str) -> str:
    return "!!" + tag.removeprefix(_TAG) if tag.startswith(_TAG) else tag
