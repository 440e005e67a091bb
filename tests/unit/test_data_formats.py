"""What the rows of each chat format become, and what is said of rows that cannot be used."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mule.data.sources import (
    Conversation,
    Message,
    ReadOptions,
    ToolCall,
    read,
    scan,
)
from mule.data.sources.message import ROLE_NAMES
from mule.data.sources.row import Row
from mule.data.sources.turns import conversation
from mule.errors import DataError

TOOL = {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}
CALL = {"name": "add", "arguments": {"a": 1, "b": "é"}}


def _write(folder: Path, *rows: dict[str, Any], name: str = "a.jsonl") -> Path:
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def _one(folder: Path, row: dict[str, Any], **options: Any) -> Conversation:
    found = list(read([_write(folder, row)], ReadOptions.make(**options)))
    assert len(found) == 1 and isinstance(found[0], Conversation)
    return found[0]


def _said(found: Conversation) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in found.messages]


def _chat(*turns: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


def _shared(*turns: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"from": role, "value": value} for role, value in turns]


# ---------------------------------------------------------------- messages


def test_a_chat_with_tools(tmp_path: Path) -> None:
    wrapped = {"type": "function", "function": TOOL}
    openai = {"id": "c1", "type": "function", "function": {**CALL, "arguments": '{"a": 1}'}}
    messages = [
        {"role": "user", "content": "1+1?", "name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": [openai, CALL]},
        {"role": "tool", "content": "2", "tool_call_id": "c1", "name": "add"},
        {"role": "tool", "content": ""},
        {"role": "assistant", "content": "It is 2."},
    ]
    found = _one(tmp_path, {"messages": messages, "tools": [wrapped], "functions": None})
    assert found.tool_list() == [wrapped]
    assert found.messages[0] == Message("user", "1+1?", name="Ann")
    assert found.messages[1].content == ""
    assert found.messages[1].tool_calls == (
        ToolCall("add", '{"a": 1}', "c1"),
        ToolCall("add", '{"a": 1, "b": "é"}', None),
    )
    assert found.messages[2] == Message("tool", "2", name="add", tool_call_id="c1")


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), json.dumps([{"function": TOOL}])])
@pytest.mark.parametrize("key", ["tools", "functions"])
def test_tools_are_written_in_one_form(tmp_path: Path, key: str, tools: object) -> None:
    found = _one(tmp_path, {"messages": _chat(("user", "a"), ("assistant", "b")), key: tools})
    assert found.tool_list() == [{"type": "function", "function": TOOL}]


@pytest.mark.parametrize("tools", [[], "", "[]", None])
def test_no_tools(tmp_path: Path, tools: object) -> None:
    found = _one(tmp_path, {"messages": _chat(("user", "a"), ("assistant", "b")), "tools": tools})
    assert found.tools == "" and found.tool_list() is None


def test_the_older_function_call(tmp_path: Path) -> None:
    called = {"role": "assistant", "content": "Wait.", "function_call": {"name": "f"}}
    messages = [*_chat(("user", "a")), called, *_chat(("function", "3"), ("assistant", "b"))]
    found = _one(tmp_path, {"messages": messages})
    assert found.messages[1].content == "Wait."
    assert found.messages[1].tool_calls == (ToolCall("f", "{}"),)
    assert found.messages[2].role == "tool"


def test_text_parts_are_joined(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "one "}, {"text": "two"}]
    found = _one(tmp_path, {"messages": _chat(("user", parts), ("assistant", "b"))})
    assert found.messages[0].content == "one two"


def test_an_empty_system_message_is_kept_and_an_empty_system_field_is_none(tmp_path: Path) -> None:
    rows = {"messages": _chat(("system", ""), ("user", "a"), ("assistant", "b"))}
    assert _said(_one(tmp_path, rows))[0] == ("system", "")
    shared = {"conversations": _shared(("human", "a"), ("gpt", "b")), "system": " "}
    assert _said(_one(tmp_path, shared))[0] == ("user", "a")


def test_marks_that_say_what_mule_does_anyway(tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "a", "weight": 0, "name": None},
        {"role": "assistant", "content": "b", "weight": 1, "train": True, "tool_calls": []},
    ]
    assert _said(_one(tmp_path, {"messages": messages})) == [("user", "a"), ("assistant", "b")]


_ASKED = ("user", "a")
_CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [*_chat(_ASKED), {**_CALLED, "train": False}]}, 'has "train": False, which'),
        (
            {"messages": _chat(("user", [{"type": "image_url", "url": "x"}]), ("assistant", "b"))},
            "part 1 .* of message 1 is of the type 'image_url', and Mule learns from text only",
        ),
        (
            {"messages": [*_chat(_ASKED), {**_CALLED, "tool_calls": [3]}]},
            "call 1 of .* is a number, not an object",
        ),
        (
            {"messages": [*_chat(_ASKED), {**_CALLED, "tool_calls": {}}]},
            '"content" of message 2|an assistant message is empty',
        ),
        (
            {"messages": [*_chat(_ASKED), {**_CALLED, "tool_calls": "f"}]},
            '"tool_calls" of message 2 is a string, not a list of calls',
        ),
        (
            {"messages": [*_chat(_ASKED), {**_CALLED, "tool_calls": [{"arguments": {}}]}]},
            "call 1 of .* names no function",
        ),
        (
            {"messages": [*_chat(_ASKED), {**_CALLED, "tool_calls": [{**CALL, "arguments": 3}]}]},
            "the arguments of call 1 .* are a number, not an object",
        ),
        (
            {"messages": [*_chat(_ASKED), {**_CALLED, "tool_calls": [{**CALL, "arguments": "{"}]}]},
            "the arguments of call 1 .* is broken JSON inside a string",
        ),
        ({"messages": [{**_CALLED, "role": "user"}]}, "message 1 is from user and calls a tool"),
        ({"messages": _chat(_ASKED, ("tool", "3"))}, "message 2 is from tool where assistant must"),
        (
            {"messages": [*_chat(_ASKED), _CALLED, *_chat(("assistant", "b"))]},
            "message 3 is from assistant where tool must speak",
        ),
        (
            {"messages": _chat(_ASKED, ("assistant", "b")), "tools": {"a": 1}},
            '"tools" is an object, not a list of tools',
        ),
        (
            {"messages": _chat(_ASKED, ("assistant", "b")), "tools": "[{]"},
            '"tools" is broken JSON inside a string',
        ),
        ({"messages": _chat(_ASKED, ("assistant", "b")), "tools": [{}]}, "tool 1 has no name"),
        (
            {"messages": _chat(_ASKED, ("assistant", "b")), "tools": [TOOL], "functions": [TOOL]},
            'both "tools" and "functions"',
        ),
        (
            {"messages": [{"role": "user", "content": "a", "mask": 1}]},
            'message 1 has "mask", which',
        ),
        (
            {"conversations": _shared(("gpt", "hi"), ("human", "a"), ("gpt", "b"))},
            "message 1 is from assistant where user must speak",
        ),
        ({"conversations": _shared(("alien", "hi"))}, "message 1 has the unknown role 'alien'"),
        ({"conversations": _shared(("human", "a"), ("gpt", " "))}, "an assistant message is empty"),
        (
            {"conversations": _shared(("human", "a"), ("function_call", "f(3)"))},
            "message 2 is broken JSON inside a string",
        ),
        (
            {"conversations": _shared(("human", 5), ("gpt", "b"))},
            '"value" of message 1 is a number',
        ),
        (
            {"conversations": _shared(("system", "a"), ("human", "a")), "system": "b"},
            '"system" is given beside a first system message',
        ),
        ({"instruction": "a", "output": None, "input": ""}, '"output" is null, not a string'),
        ({"instruction": ["a"], "output": "b"}, '"instruction" is a list, not a string'),
        ({"instruction": "a", "output": "b", "history": "x"}, '"history" is a string, not a list'),
        ({"instruction": "a", "output": "b", "history": [["q"]]}, "round 1 of .* is not a pair"),
        ({"instruction": "a", "output": "b", "history": [["q", 4]]}, 'round 1 of "history" is a n'),
        ({"instruction": "a", "context": 7, "response": "b"}, '"context" is a number'),
        ({"prompt": "a", "completion": ""}, "an assistant message is empty"),
        ({"prompt": {"a": 1}, "completion": "b"}, '"prompt" is an object, not a string'),
        ({"text": "a", "code": None, "test_list": []}, None),
    ],
)
def test_rows_that_cannot_be_used(tmp_path: Path, row: dict, message: str | None) -> None:
    file = _write(tmp_path, row)
    if message is None:  # a null counts as not there
        assert list(read([file]))
        return
    with pytest.raises(DataError, match=f"a.jsonl:1: .*({message})") as caught:
        list(read([file]))
    assert caught.value.hint


def test_a_first_answer_is_told_what_to_do(tmp_path: Path) -> None:
    file = _write(tmp_path, {"conversations": _shared(("gpt", "hi"), ("human", "a"))})
    with pytest.raises(DataError, match="hint: remove this first message, or put the user's"):
        list(read([file]))


# ---------------------------------------------------------------- sharegpt and the rest


@pytest.mark.parametrize("spelling", [*ROLE_NAMES, "Human", "GPT"])
def test_every_spelling_of_a_role(tmp_path: Path, spelling: str) -> None:
    role, call = ROLE_NAMES[spelling.lower()], json.dumps(CALL)
    value = call if spelling in ("function_call", "tool_call") else "x"
    turns: list[tuple[str, str]] = [("human", "a"), ("function_call", call), ("tool", "1")]
    turns = {
        "system": [(spelling, value), ("human", "a")],
        "user": [(spelling, value)],
        "assistant": [("human", "a"), (spelling, value)],
        "tool": [("human", "a"), ("function_call", call), (spelling, value)],
    }[role]
    if role != "assistant":
        turns.append(("gpt", "b"))
    roles = {"conversations": _shared(*turns)}
    found = _one(tmp_path, roles)
    assert role in [message.role for message in found.messages]


def test_sharegpt_calls_and_fields(tmp_path: Path) -> None:
    turns = [
        ("human", "a"),
        ("function_call", json.dumps([CALL, {"name": "f", "arguments": "{}"}])),
        ("observation", "3"),
        ("gpt", "b"),
    ]
    row = {"conversations": _shared(*turns), "system": "Be.", "tools": json.dumps([TOOL])}
    found = _one(tmp_path, row)
    assert _said(found) == [
        ("system", "Be."),
        ("user", "a"),
        ("assistant", ""),
        ("tool", "3"),
        ("assistant", "b"),
    ]
    assert [call.name for call in found.messages[2].tool_calls] == ["add", "f"]
    assert found.tool_list() == [{"type": "function", "function": TOOL}]
    spelled = {"conversations": _chat(("user", "a"), ("assistant", "b"))}
    assert _said(_one(tmp_path, spelled)) == [("user", "a"), ("assistant", "b")]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {
                "instruction": "a",
                "input": "i",
                "output": "b",
                "system": "s",
                "history": [["q", "r"]],
            },
            [("system", "s"), ("user", "q"), ("assistant", "r"), ("user", "a\n\ni"), "b"],
        ),
        ({"instruction": "a", "input": " ", "response": "b"}, [("user", "a"), "b"]),
        (
            {"instruction": "a", "context": "c", "response": "b", "category": "x"},
            [("user", "a\n\nc"), "b"],
        ),
        ({"instruction": "a", "response": "b", "category": "x"}, [("user", "a"), "b"]),
        ({"question": "a", "answer": "b\n#### 3"}, [("user", "a"), "b\n#### 3"]),
        ({"prompt": "a", "completion": "b", "system": "s"}, [("system", "s"), ("user", "a"), "b"]),
        ({"prompt": "a", "response": "b"}, [("user", "a"), "b"]),
        (
            {"prompt": _chat(("system", "s"), ("user", "a")), "completion": _chat(("gpt", "b"))},
            [("system", "s"), ("user", "a"), "b"],
        ),
        (
            {"text": "a", "code": "b\r\n", "test_list": ["c"], "task_id": 1},
            [("user", "a"), "b\r\n"],
        ),
    ],
)
def test_what_rows_become(tmp_path: Path, row: dict, said: list) -> None:
    expected = [("assistant", turn) if isinstance(turn, str) else turn for turn in said]
    assert _said(_one(tmp_path, row)) == expected


def test_humaneval_is_trained_on_only_when_named(tmp_path: Path) -> None:
    row = {"task_id": "1", "prompt": "def f():", "canonical_solution": "  pass", "test": "t"}
    file = _write(tmp_path, row)
    with pytest.raises(DataError, match=r"a.jsonl:1: .*HumanEval(.|\n)*data.format=humaneval"):
        list(read([file]))
    assert len(list(scan(file))) == 1
    assert _said(_one(tmp_path, row, format="humaneval"))[1] == ("assistant", "  pass")


# ---------------------------------------------------------------- order

_TURN = st.tuples(
    st.sampled_from(["system", "user", "assistant", "tool"]),
    st.sampled_from(["", "x"]),
    st.booleans(),
)


@given(st.lists(_TURN, max_size=8))
def test_only_chats_in_order_pass(turns: list[tuple[str, str, bool]]) -> None:
    call = (ToolCall("f", "{}"),)
    messages = [
        Message(role, text, tool_calls=call if calls and role == "assistant" else ())
        for role, text, calls in turns
    ]
    try:
        found = conversation(Row({}, "f", 1), messages)
    except DataError:
        assert not _in_order(messages)
    else:
        assert _in_order(messages) and found.messages == tuple(messages)


def _in_order(messages: list[Message]) -> bool:
    """The rule again, as a regular expression over letters: C an assistant that calls."""
    letters = {"system": "S", "user": "U", "tool": "T"}
    spelled = "".join(
        letters.get(m.role) or ("C" if m.tool_calls else "A" if m.content else "E")
        for m in messages
    )
    answer = "(?:CT+)*A"
    whole = f"S?(?:U{answer})*"
    ends = "(?:U|U(?:CT+)*(?:C|CT+)?)?"
    return bool(re.fullmatch(whole + ends, spelled)) and bool(set("AC") & set(spelled))
