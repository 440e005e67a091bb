"""OpenAssistant's trees: every path, the best one, and what is left out."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mule.data.sources import Conversation, Notice, ReadOptions, scan
from mule.data.sources.oasst import FORMAT
from mule.data.sources.row import Row
from mule.errors import DataError

SHARED = Path(__file__).resolve().parents[2] / "../shared/data"
BEST, ALL = ReadOptions.make(), ReadOptions.make(threads="all")
Tree = dict[str, Any]


def _collected(rows: list[Tree], options: ReadOptions) -> list[Any]:
    assert FORMAT.collect is not None
    trees = FORMAT.collect("f.jsonl", options)
    found = [item for n, row in enumerate(rows, 1) for item in trees.add(Row(row, "f.jsonl", n))]
    return [*found, *trees.finish()]


def _paths(found: list[Any]) -> list[str]:
    return [" ".join(m.content for m in c.messages) for c in found if isinstance(c, Conversation)]


def _notices(found: list[Any]) -> list[str]:
    return [notice.message for notice in found if isinstance(notice, Notice)]


def _message(name: str, parent: str | None = None, **other: Any) -> Tree:
    role = "prompter" if name[0] == "p" else "assistant"
    return {"message_id": name, "parent_id": parent, "text": name, "role": role, **other}


FLAT = [
    _message("a3", "p1", rank=None),  # before its parent
    _message("p1"),
    _message("a1", "p1", rank=1),
    _message("a2", "p1", rank=0),
    _message("p2", "a2"),
    _message("p3", "a2", deleted=False),
    _message("a4", "p3", rank=0),
    _message("p4", "a4"),
]


def test_the_best_path_and_every_path() -> None:
    assert _paths(_collected(FLAT, BEST)) == ["p1 a2"]
    assert _paths(_collected(FLAT, ALL)) == ["p1 a3", "p1 a1", "p1 a2", "p1 a2 p3 a4"]
    lines = [c.line for c in _collected(FLAT, ALL) if isinstance(c, Conversation)]
    assert lines == [1, 3, 4, 7]  # of the last message


def test_the_first_in_the_file_wins_a_tie() -> None:
    tied = [_message("p1"), _message("a1", "p1", rank=2), _message("a2", "p1", rank=2)]
    assert _paths(_collected(tied, BEST)) == ["p1 a1"]


def test_what_is_left_out_is_counted() -> None:
    rows = [
        _message("p1"),
        _message("a1", "p1", deleted=True),
        _message("p2", "a1"),
        _message("a2", "p2"),
        _message("a3", "p1", review_result=False),
        _message("a4", "p1"),
        _message("p5"),
        _message("p6", "nobody"),
        _message("a6", "p6"),
    ]
    found = _collected(rows, ALL)
    assert _paths(found) == ["p1 a4"]
    assert _notices(found) == [
        "2 messages left out: they hang on 1 parents that are not in the file",
        "1 deleted messages left out",
        "1 messages that reviewers rejected left out",
        "2 replies to these left out",
        "1 trees without an answer left out",
    ]
    assert all(notice.lost for notice in found if isinstance(notice, Notice))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"role": "system"}, "this message has the unknown role 'system'"),
        ({"rank": "0"}, '"rank" of this message is a string, not a number'),
        ({"deleted": "no"}, '"deleted" of this message is a string'),
        ({"text": 5}, '"text" of this message is a number'),
        ({"message_id": "p1"}, 'the "message_id" p1 was given before'),
        ({"parent_id": 3}, '"parent_id" is a number'),
    ],
)
def test_messages_that_cannot_be_read(change: Tree, message: str) -> None:
    with pytest.raises(DataError, match=r"f\.jsonl:2: ") as caught:
        _collected([_message("p1"), _message("a1", "p1") | change], ALL)
    assert message in caught.value.what and caught.value.hint


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("hi", "prompt is a string, not an object"),
        ({"role": "prompter", "text": "a", "replies": 3}, '"replies" is a number, not a list'),
        ({"role": "prompter", "text": "a", "replies": [3]}, "a reply is a number, not an object"),
    ],
)
def test_trees_that_cannot_be_read(prompt: object, message: str) -> None:
    with pytest.raises(DataError, match=r"f\.jsonl:1: ") as caught:
        _collected([{"message_tree_id": "1", "prompt": prompt}], ALL)
    assert message in caught.value.what


def test_an_empty_answer_is_a_problem_of_its_line(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    rows = [_message("p1"), _message("a1", "p1") | {"text": " "}, _message("a2", "p1")]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = list(scan(file, ALL))
    assert _paths(found) == ["p1 a2"]
    errors = [str(error) for error in found if isinstance(error, DataError)]
    assert errors[0].startswith(f"{file}:2: an assistant message is empty")


def test_a_circle_of_parents_is_in_no_tree() -> None:
    rows = [_message("p1", "a1"), _message("a1", "p1"), _message("p2"), _message("a2", "p2")]
    found = _collected(rows, ALL)
    assert _paths(found) == ["p2 a2"]
    assert _notices(found) == ["2 messages left out: their parents go round in a circle"]


def test_a_very_deep_tree() -> None:
    depth = 30_000
    tree: Tree = {"role": "assistant", "text": "end"}
    for n in range(depth - 1):
        tree = {"role": ("prompter", "assistant")[n % 2], "text": "x", "replies": [tree]}
    (found,) = _collected([{"message_tree_id": "1", "prompt": tree}], BEST)
    assert len(found.messages) == depth


# ---------------------------------------------------------------- random trees

_RANKS = st.one_of(st.none(), st.integers(0, 3))


@st.composite
def trees(draw: st.DrawFn) -> list[Tree]:
    """The flat messages of one tree, its texts being their own ids."""
    rows = [_message("p0", deleted=False)]
    for n in range(1, draw(st.integers(1, 14))):
        parent = draw(st.sampled_from(rows))
        kind = "a" if parent["role"] == "prompter" else "p"
        deleted = draw(st.sampled_from([False, False, False, True]))
        rows.append(_message(f"{kind}{n}", parent["text"], rank=draw(_RANKS), deleted=deleted))
    return draw(st.permutations(rows))


def _nested(rows: list[Tree], name: str = "p0") -> Tree:
    own = next(row for row in rows if row["text"] == name)
    replies = [_nested(rows, row["text"]) for row in rows if row["parent_id"] == name]
    return {**own, "replies": replies}


@given(trees())
def test_every_path_is_real_and_complete(rows: list[Tree]) -> None:
    named = {row["text"]: row for row in rows}
    paths = [path.split() for path in _paths(_collected(rows, ALL))]
    assert len({tuple(path) for path in paths}) == len(paths)
    ends = {path[-1] for path in paths}
    kept = set()  # messages of which no message above is deleted
    for name in named:
        above = [name]
        while (parent := named[above[-1]]["parent_id"]) is not None:
            above.append(parent)
        if not any(named[n]["deleted"] for n in above):
            kept.add(name)
    for path in paths:
        assert path[0] == "p0" and path[-1][0] == "a" and set(path) <= kept
        assert all(named[b]["parent_id"] == a for a, b in pairwise(path))
    answers = {n for n in kept if n[0] == "a"}
    leaves = {
        n for n in answers if not any(r["parent_id"] == n and r["text"] in kept for r in rows)
    }
    assert leaves <= ends and answers <= {name for path in paths for name in path}
    best = [path.split() for path in _paths(_collected(rows, BEST))]
    assert len(best) <= 1 and all(path in paths for path in best)


@given(trees(), st.sampled_from([BEST, ALL]))
def test_flat_and_nested_trees_agree(rows: list[Tree], options: ReadOptions) -> None:
    nested = [{"message_tree_id": "1", "prompt": _nested(rows)}]
    flat, deep = _collected(rows, options), _collected(nested, options)
    assert _paths(flat) == _paths(deep)
    assert _notices(flat) == _notices(deep)


# ---------------------------------------------------------------- published

_needs_data = pytest.mark.skipif(not SHARED.exists(), reason="needs the development data")


@pytest.mark.shared
@_needs_data
def test_the_published_messages() -> None:
    file = SHARED / "oasst/oasst1-en-validation.messages.jsonl"
    found = list(scan(file, ALL))
    assert _notices(found)[:3] == [
        "3 messages left out: they hang on 3 parents that are not in the file",
        "40 deleted messages left out",
        "43 messages that reviewers rejected left out",
    ]
    ours = _chats(found)
    derived = _chats(list(scan(SHARED / "sharegpt/oasst1-en-validation-sharegpt.json")))
    assert len(derived) == 911 and derived <= ours
    assert len(ours) == 914  # three more: answers to which every reply was left out
    assert _chats(list(scan(file))) <= ours


def _chats(found: list[Any]) -> set[tuple[str, ...]]:
    chats = [c for c in found if isinstance(c, Conversation)]
    unique = {tuple(m.content for m in c.messages) for c in chats}
    assert len(unique) == len(chats)
    return unique
