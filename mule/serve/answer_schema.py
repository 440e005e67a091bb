"""The JSON schema a client may ask an answer to follow, bounded before anything compiles it."""

from __future__ import annotations

import json
from typing import Any

from mule.data.sources.row import type_name
from mule.serve.fields import Fields
from mule.serve.problem import Problem

_ANY_OBJECT = '{"type": "object"}'
_MAX_BYTES, _MAX_DEPTH, _MAX_PARTS, _MAX_COUNT = 16 * 1024, 16, 1_000, 1_000
_REGEXES = ("pattern", "patternProperties")  # a client's regular expression is never compiled
_COUNTS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")
_NAMED = ("properties", "$defs", "definitions", "dependentSchemas")  # keys of theirs are names


def schema_of(fields: Fields) -> str | None:
    """The schema of `response_format` as JSON text; None where any text will do."""
    chosen = fields.group("response_format")
    if chosen is None:
        return None
    kind = chosen.text("type", 32)
    if kind == "json_schema":
        chosen.allow(("type", "json_schema"))
        described = chosen.group("json_schema")
        if described is None or "schema" not in described:
            raise chosen.wrong("json_schema", 'must hold {"name": "...", "schema": {...}}')
        described.allow(("name", "description", "schema", "strict"))
        return _bounded(described.raw("schema"))
    chosen.allow(("type",))
    if kind == "text":
        return None
    if kind != "json_object":
        raise chosen.wrong("type", "must be text, json_object or json_schema")
    return _ANY_OBJECT


def _bounded(schema: Any) -> str:
    text = json.dumps(schema)
    if not isinstance(schema, dict):
        raise _wrong(f"is {type_name(schema)}, not an object")
    if len(text) > _MAX_BYTES:
        raise _wrong(f"has {len(text):,} bytes; at most {_MAX_BYTES:,} are read")
    num_parts = _check(schema, 0)
    if num_parts > _MAX_PARTS:
        raise _wrong(f"has {num_parts:,} parts; at most {_MAX_PARTS:,} are read")
    return text


def _check(part: Any, depth: int, *, names: bool = False) -> int:
    """The number of parts below; Problem 400 for one that is too deep, large or a regex."""
    if depth > _MAX_DEPTH:
        raise _wrong(f"is nested deeper than {_MAX_DEPTH} levels")
    if isinstance(part, list):
        return 1 + sum(_check(item, depth + 1) for item in part)
    if not isinstance(part, dict):
        return 1
    count = 1
    for key, value in part.items():
        if not names:
            _check_keyword(key, value)
        count += _check(value, depth + 1, names=not names and key in _NAMED)
    return count


def _check_keyword(key: str, value: Any) -> None:
    if key in _REGEXES:
        raise _wrong(f"holds {key}: regular expressions of a request are not compiled")
    if key == "$ref" and not (isinstance(value, str) and value.startswith("#")):
        raise _wrong("refers to another place with $ref; only #/... is read")
    is_count = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_COUNT
    if key in _COUNTS and not is_count:
        raise _wrong(f"has a {key} that is not from 0 to {_MAX_COUNT:,}")


def _wrong(what: str) -> Problem:
    where = "response_format.json_schema.schema"
    return Problem(400, f"{where} {what}", param=where)
