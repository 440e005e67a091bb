"""Whatever JSON a row holds, it becomes items or a DataError that names its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mule.data.sources import FORMATS, Item, Notice, ReadOptions, scan
from mule.data.sources.message import ROLE_NAMES
from mule.errors import DataError

_FIELDS = sorted(set().union(*(known.used for known in FORMATS.values())))
_WORDS = st.sampled_from(
    ["", " ", "x", "[]", "{}", "[", '{"name": "f", "arguments": {}}', "\ud800"]
)
_ROLES = st.sampled_from([*ROLE_NAMES, "x"])
_INNER = (
    "role from content value name tool_calls function_call function arguments weight type text "
    "id message_id parent_id rank deleted replies review_result"
).split()
_ANY: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 2) | st.just(0.5) | _WORDS | _ROLES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(_INNER), inner, max_size=4)
        | st.fixed_dictionaries({"role": _ROLES, "content": inner})
        | st.fixed_dictionaries({"from": _ROLES, "value": inner})
    ),
    max_leaves=12,
)
_MESSAGE = st.fixed_dictionaries(
    {"role": _ROLES}, optional={"content": _ANY, "tool_calls": _ANY, "name": _ANY, "train": _ANY}
)
_VALUE = _ANY | st.lists(_MESSAGE, max_size=4)


@st.composite
def rows(draw: st.DrawFn) -> dict[str, Any]:
    """The keys of a format and a few more, with any values."""
    needed = draw(st.sampled_from([keys for known in FORMATS.values() for keys in known.keys]))
    more = draw(st.lists(st.sampled_from(_FIELDS), max_size=2))
    return {key: draw(_VALUE) for key in [*needed, *more]}


@pytest.mark.parametrize("threads", ["best", pytest.param("all", marks=pytest.mark.slow)])
@given(
    given_rows=st.lists(rows(), min_size=1, max_size=4), format=st.sampled_from(["auto", *FORMATS])
)
@settings(max_examples=150, deadline=None)
def test_any_row(
    tmp_path_factory: pytest.TempPathFactory,
    threads: Literal["best", "all"],
    given_rows: list[dict[str, Any]],
    format: str,
) -> None:
    file: Path = tmp_path_factory.getbasetemp() / "any.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in given_rows))
    for found in scan(file, ReadOptions.make(format, threads=threads)):
        assert isinstance(found, Item | DataError | Notice)
        if isinstance(found, DataError):
            assert found.hint and found.what and "\n" not in found.what
        elif not isinstance(found, Notice):
            hash(found)
            assert 1 <= found.line <= len(given_rows)
