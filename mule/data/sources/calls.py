"""Tools of a chat: their descriptions, and the calls an assistant makes."""

from __future__ import annotations

import json
from typing import Any

from mule.data.sources.items import ToolCall
from mule.data.sources.json_text import DECODER
from mule.data.sources.row import Row, type_name

_TOOL = '{"type": "function", "function": {"name": "...", "description": "...", "parameters": {}}}'
_CALL = '{"name": "...", "arguments": {...}}'


def tool_list(row: Row) -> str:
    """The tools of a row ("tools" or "functions") in OpenAI's form as JSON text, or "".

    A description without its wrapping {"type": "function", "function": ...} is given it.
    """
    given = [key for key in ("tools", "functions") if row.value.get(key) not in (None, "", [])]
    if not given:
        return ""
    if len(given) > 1:
        row.fail('both "tools" and "functions" in one row', "keep one of them")
    key = given[0]
    tools = row.value[key]
    if isinstance(tools, str):
        tools = parse_json(row, tools, f'"{key}"')
    if not isinstance(tools, list):
        row.fail(f'"{key}" is {type_name(tools)}, not a list of tools', f"a tool is {_TOOL}")
    wrapped = [_tool(row, tool, f"tool {n}") for n, tool in enumerate(tools, start=1)]
    return _json_text(row, wrapped, f'"{key}"') if wrapped else ""


def tool_calls(row: Row, calls: Any, name: str) -> tuple[ToolCall, ...]:
    """OpenAI's "tool_calls", or bare calls with a name and arguments."""
    if not isinstance(calls, list):
        row.fail(f"{name} is {type_name(calls)}, not a list of calls", f"a call is {_CALL}")
    return tuple(tool_call(row, call, f"call {n} of {name}") for n, call in enumerate(calls, 1))


def tool_call(row: Row, call: Any, name: str) -> ToolCall:
    """One call; its arguments are an object, or the JSON text of one ("" is an empty one)."""
    if not isinstance(call, dict):
        row.fail(f"{name} is {type_name(call)}, not an object", f"a call is {_CALL}")
    function = call.get("function") if call.get("function") is not None else call
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        row.fail(f"{name} names no function", f"a call is {_CALL}")
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        arguments = parse_json(row, arguments, f"the arguments of {name}")
    if arguments in (None, ""):
        arguments = {}
    if not isinstance(arguments, dict):
        row.fail(
            f"the arguments of {name} are {type_name(arguments)}, not an object",
            f"a call is {_CALL}",
        )
    function_name = row.checked_text(function["name"], f"the function of {name}")
    call_id = call.get("id")
    if call_id is not None:
        call_id = row.checked_text(call_id, f'"id" of {name}')
    return ToolCall(function_name, _json_text(row, arguments, name), call_id)


def parse_json(row: Row, text: str, name: str) -> Any:
    """The value of JSON inside a string. Raises DataError."""
    try:
        return DECODER.decode(text)
    except RecursionError:
        reason = "nested too deeply"
    except ValueError as error:
        reason = str(error)
    row.fail(f"{name} is broken JSON inside a string: {reason}", "correct the JSON")


def _tool(row: Row, tool: Any, name: str) -> dict[str, Any]:
    wrapped = tool if isinstance(tool, dict) and "function" in tool else {"function": tool}
    function = wrapped["function"]
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        row.fail(f"{name} has no name", f"a tool is {_TOOL}")
    return {"type": "function", **wrapped}


def _json_text(row: Row, value: Any, name: str) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (RecursionError, TypeError, ValueError):
        row.fail(f"{name} cannot be written as JSON", "use objects, lists, texts and numbers")
    return row.checked_text(text, name)
