"""Whether a JSON value follows a JSON schema, for the keywords that answers are checked with.

Source: JSON Schema 2020-12, validation vocabulary. `refusal` names what is not among them.
"""

from __future__ import annotations

import json
import re
from typing import Any

_TYPES: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "null": type(None),
}
_KNOWN = {
    *("type", "enum", "const", "properties", "required", "additionalProperties", "items"),
    *("minItems", "maxItems", "minLength", "maxLength", "pattern", "minimum", "maximum"),
    *("title", "description"),
}
_LIMITS = {
    "minItems": (list, lambda value, limit: len(value) >= limit),
    "maxItems": (list, lambda value, limit: len(value) <= limit),
    "minLength": (str, lambda value, limit: len(value) >= limit),
    "maxLength": (str, lambda value, limit: len(value) <= limit),
    "pattern": (str, lambda value, limit: re.search(limit, value) is not None),
    "minimum": ((int, float), lambda value, limit: value >= limit),
    "maximum": ((int, float), lambda value, limit: value <= limit),
}


def refusal(schema: Any, place: str = "the schema") -> str | None:
    """Why a schema cannot be checked with, None where it can."""
    if not isinstance(schema, dict):
        return f"{place} is no object"
    if unknown := sorted(schema.keys() - _KNOWN):
        return f"{place} has `{unknown[0]}`; what can be checked is {', '.join(sorted(_KNOWN))}"
    types = schema.get("type", [])
    for name in [types] if isinstance(types, str) else types:
        if name not in (*_TYPES, "integer", "number"):
            return f"{place} has the type `{name}`, which JSON has not"
    if "pattern" in schema:
        try:
            re.compile(schema["pattern"])
        except (re.error, TypeError) as error:
            return f"the pattern of {place} is no regular expression: {error}"
    inner = {f"`{name}`": part for name, part in schema.get("properties", {}).items()}
    for name in ("items", "additionalProperties"):
        if not isinstance(schema.get(name, True), bool):
            inner[f"`{name}`"] = schema[name]
    return next((found for at, part in inner.items() if (found := refusal(part, at))), None)


def violations(value: Any, schema: dict[str, Any], place: str = "the answer") -> list[str]:
    """What is wrong with a value; nothing where it follows the schema."""
    types = schema.get("type")
    wanted = [types] if isinstance(types, str) else types
    if wanted and not any(_is(value, name) for name in wanted):
        return [f"{place} is no {' or '.join(wanted)}"]
    found = []
    if "enum" in schema and not any(_same(value, other) for other in schema["enum"]):
        found.append(f"{place} is none of {json.dumps(schema['enum'])}")
    if "const" in schema and not _same(value, schema["const"]):
        found.append(f"{place} is not {json.dumps(schema['const'])}")
    for name, (kind, holds) in _LIMITS.items():
        is_of_kind = isinstance(value, kind) and not isinstance(value, bool)
        if name in schema and is_of_kind and not holds(value, schema[name]):
            found.append(f"{place} breaks {name} {schema[name]}")
    if isinstance(value, dict):
        found += _in_object(value, schema, place)
    if isinstance(value, list) and isinstance(schema.get("items"), dict):
        for number, item in enumerate(value):
            found += violations(item, schema["items"], f"{place}[{number}]")
    return found


def _in_object(value: dict[str, Any], schema: dict[str, Any], place: str) -> list[str]:
    properties = schema.get("properties", {})
    found = [f"{place} lacks {name}" for name in schema.get("required", ()) if name not in value]
    others = schema.get("additionalProperties", True)
    for name, item in value.items():
        part = properties.get(name, others)
        if part is False:
            found.append(f"{place} has {name}")
        elif isinstance(part, dict):
            found += violations(item, part, f"{place}.{name}")
    return found


def _is(value: Any, name: str) -> bool:
    if name in ("integer", "number"):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        return name == "number" or isinstance(value, int) or value.is_integer()
    return isinstance(value, _TYPES[name])


def _same(value: Any, other: Any) -> bool:
    """As JSON has it: 1 is 1.0, and true is no 1."""
    return isinstance(value, bool) == isinstance(other, bool) and value == other
