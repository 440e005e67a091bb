"""Strict JSON: no NaN, no key twice; and what is said of JSON that cannot be read."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from mule.data.sources.row import Row, type_name
from mule.errors import DataError


def row_of(file: Path, line: int, value: Any) -> Row:
    """DataError unless `value` is an object."""
    if isinstance(value, dict):
        return Row(value, str(file), line)
    found = type_name(value)
    raise DataError(
        file,
        line,
        f"the row is {found}, not an object",
        'every row must look like {"messages": [...]} or {"text": "..."}',
    )


def broken_json(
    file: Path, line: int, error: ValueError | RecursionError, place: str, is_cut: bool = False
) -> DataError:
    """What to tell of text that `DECODER` refused; `is_cut`: the file ends inside it."""
    if not isinstance(error, json.JSONDecodeError):
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        return DataError(file, line, f"broken JSON: {reason}", "correct this row")
    if is_cut:
        return DataError(
            file,
            line,
            f"broken JSON: the file is cut off here ({error.msg}, {place})",
            "copy the file again, or remove this line",
        )
    return DataError(
        file,
        line,
        f"broken JSON: {error.msg} ({place})",
        "one complete JSON object a line, or one JSON list of objects",
    )


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = next(key for key, count in counts.items() if count > 1)
        raise ValueError(f'the key "{twice}" stands there twice')
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
LENIENT_DECODER = json.JSONDecoder()
