"""The JSON of a request, read strictly and without letting it grow."""

from __future__ import annotations

import re
from typing import Any

from mule.data.sources.json_text import DECODER
from mule.data.sources.row import type_name
from mule.serve.limits import Limits
from mule.serve.problem import Problem

# Possessive: no state is kept for going back, however long the string.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_MAX_SHOWN = 200  # characters of what the parser says: it quotes the body
_NOT_STRUCTURE = bytes(byte for byte in range(256) if byte not in b"[]{},")


def parse_body(body: bytes, limits: Limits) -> dict[str, Any]:
    """The object in `body`. Problem 400 for anything but one strict JSON object.

    Depth and number of values are counted before a parser builds anything; UTF-8 only, no NaN, no
    key twice, no half of a character.
    """
    structure = _STRING.sub(b"", body).translate(None, _NOT_STRUCTURE)
    if len(structure) > limits.json_values:
        raise _broken(f"it holds more than {limits.json_values:,} values", "send less at once")
    if _depth(structure) > limits.json_depth:
        raise _broken(f"it is nested deeper than {limits.json_depth} levels", "flatten it")
    try:
        value = DECODER.decode(body.decode())
    except UnicodeDecodeError as error:
        raise _broken(f"byte {error.start} is not UTF-8", "encode it as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise _broken(str(error)[:_MAX_SHOWN], "send one JSON object") from None
    if not isinstance(value, dict):
        raise _broken(f"it is {type_name(value)}, not an object", 'send {"model": "...", ...}')
    if b"\\u" in body:
        _refuse_half_characters(value)
    return value


def _depth(structure: bytes) -> int:
    depth = deepest = 0
    for byte in structure:
        if byte in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif byte != 0x2C:  # a comma
            depth -= 1
    return deepest


def _refuse_half_characters(value: Any) -> None:
    """Bounded by the depth that was counted before."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(value[error.start]):04x}"
            raise _broken(f"{half} is half of a character", "write the whole character") from None
    elif isinstance(value, dict):
        for key, item in value.items():
            _refuse_half_characters(key)
            _refuse_half_characters(item)
    elif isinstance(value, list):
        for item in value:
            _refuse_half_characters(item)


def _broken(reason: str, remedy: str) -> Problem:
    return Problem(400, f"the body cannot be read as JSON: {reason}; {remedy}", code="invalid_json")
