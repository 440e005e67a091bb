"""What a client may ask: every field, its range, and what is said of the rest (inputs 94-110)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from mule.errors import UserError
from mule.serve.app import Api
from mule.serve.asked import CHAT_FIELDS, HARMLESS, REFUSED, TEXT_FIELDS
from tests.serve_case import CHAT, HOSTS, MODEL, TEXT, TOKEN, Running, ScriptedEngine, running

USER = {"role": "user", "content": "Hello"}


@pytest.fixture(scope="module")
def served() -> Iterator[Running]:
    with running() as server:
        yield server


def _schema(schema: Any) -> dict[str, Any]:
    named = {"name": "x", "schema": schema, "strict": True}
    return {"response_format": {"type": "json_schema", "json_schema": named}}


def _deep(levels: int) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        found = {"items": found}
    return found


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("94", {"messages": []}, "messages must be a list such as"),
    ("94", {"messages": None}, "messages must be a list such as"),
    ("94", {"messages": "Hello"}, "messages must be a list such as"),
    ("94", {"messages": ["Hello"]}, "messages[0] is a string, not an object"),
    ("94", {"messages": [{"role": "root", "content": "a"}]}, "messages[0].role must be one of sys"),
    ("94", {"messages": [{"content": "a"}]}, "messages[0].role must be one of"),
    ("94", {"messages": [{"role": "user"}]}, "messages[0].content is null; it must be a text"),
    ("94", {"messages": [USER, USER | {"content": None}]}, "messages[1].content is null"),
    ("94", {"messages": [USER | {"content": 5}]}, "content is a number; it must be a text"),
    ("94", {"messages": [USER | {"content": []}]}, "content is a list; it must be a text"),
    ("94", {"messages": [USER | {"content": [{"type": "text"}]}]}, "a part without a text"),
    ("94", {"messages": [USER | {"content": "a" * 5_000_000}]}, "5,000,000 characters; at most"),
    ("94", {"messages": [USER] * 5_000}, "5,000 messages; at most 4,096"),
    ("94", {"messages": [USER | {"tool_calls": [{}]}]}, "tool_calls is not taken: tools are"),
    ("94", {"messages": [USER | {"name": "Ann"}]}, "messages[0].name is not taken"),
    ("94", {"messages": [USER | {"role": "assistant"}]}, "begins with a user; begin with a user"),
    ("95", {"messages": [USER | {"content": "a" * 255}]}, "has 256 tokens; the context holds 256"),
    ("96", {"max_tokens": 0}, "max_tokens is 0; it must be from 1 to 256"),
    ("96", {"max_tokens": -1}, "max_tokens is -1; it must be from 1 to 256"),
    ("96", {"max_tokens": 10**9}, "max_tokens is 1000000000; it must be from 1 to 256"),
    ("96", {"max_tokens": 1.5}, "max_tokens is 1.5, not a whole number"),
    ("96", {"max_tokens": True}, "max_tokens is true, not a whole number"),
    ("96", {"max_tokens": "5"}, 'max_tokens is "5", not a whole number'),
    ("96", {"max_completion_tokens": 9}, "max_tokens differs from max_completion_tokens"),
    ("96", {"temperature": -1}, "temperature is -1; it must be from 0 to 2"),
    ("96", {"temperature": 1e308}, "temperature is 1e+308; it must be from 0 to 2"),
    ("96", {"temperature": "hot"}, 'temperature is "hot", not a number'),
    ("96", {"temperature": False}, "temperature is false, not a number"),
    ("96", {"top_p": 0}, "top_p is 0; it must be above 0 to 1"),
    ("96", {"top_p": 1.01}, "top_p is 1.01; it must be above 0 to 1"),
    ("96", {"top_k": -1}, "top_k is -1; it must be from 0 to 256"),
    ("96", {"min_p": 1}, "min_p is 1; it must be from 0 to 0.999"),
    ("96", {"repeat_penalty": 0}, "repeat_penalty is 0; it must be from 0.1 to 10"),
    ("96", {"presence_penalty": 3}, "presence_penalty is 3; it must be from -2 to 2"),
    ("96", {"frequency_penalty": -3}, "frequency_penalty is -3; it must be from -2 to 2"),
    ("96", {"n": 10**6}, "n is 1000000; it must be from 1 to 8"),
    ("96", {"n": 0}, "n is 0; it must be from 1 to 8"),
    ("96", {"seed": 2**64}, "seed is 18446744073709551616; it must be"),
    ("96", {"seed": -(2**63) - 1}, "seed is -9223372036854775809; it must be"),
    ("96", {"stop": ["a"] * 10**5}, "stop holds 100,000 texts; at most 16"),
    ("96", {"stop": [""]}, "stop must be texts of 1 to 500 characters"),
    ("96", {"stop": "a" * 501}, "stop must be texts of 1 to 500 characters"),
    ("96", {"stop": [1]}, "stop must be a string or a list of strings"),
    ("96", {"stop": 5}, "stop must be a string or a list of strings"),
    ("96", {"logprobs": True, "top_logprobs": 10**6}, "top_logprobs is 1000000; it must be from"),
    ("96", {"top_logprobs": 3}, "top_logprobs needs logprobs: true"),
    ("96", {"logprobs": 3}, "logprobs is 3; it must be true or false"),
    ("96", {"stream": "yes"}, 'stream is "yes"; it must be true or false'),
    ("96", {"stream_options": {"include_usage": True}}, "stream_options needs stream: true"),
    ("96", {"stream": True, "stream_options": {"x": 1}}, 'stream_options."x" is no field'),
    ("104", {"model": "../../etc/passwd"}, 'no model "../../etc/passwd"; served here: tiny'),
    ("104", {"model": "http://169.254.169.254/"}, 'no model "http://169.254.169.254/"'),
    ("104", {"model": "/root/model"}, 'no model "/root/model"; served here: tiny'),
    ("104", {"model": ""}, 'no model ""; served here: tiny'),
    ("104", {"model": None}, "model is missing; served here: tiny"),
    ("104", {"model": 7}, "model is a number, not a string"),
    (
        "105",
        {
            "messages": [
                USER | {"content": [{"type": "image_url", "image_url": {"url": "file:///"}}]}
            ]
        },
        "images, audio and files are not read, nothing is fetched",
    ),
    (
        "105",
        {"messages": [USER | {"content": [{"type": "input_audio", "input_audio": {}}]}]},
        "images, audio and files are not read, nothing is fetched",
    ),
    ("106", {"grammar": "root ::= root"}, "grammar is not taken: a grammar or regular expression"),
    ("106", {"guided_regex": "(a+)+$"}, "guided_regex is not taken"),
    ("106", _schema({"type": "string", "pattern": "(a+)+$"}), "holds pattern: regular expressions"),
    ("106", _schema({"patternProperties": {"(a+)+": {}}}), "holds patternProperties"),
    ("106", _schema({"$ref": "http://evil.example/x.json"}), "refers to another place with $ref"),
    ("106", _schema({"type": "array", "minItems": 10**9}), "has a minItems that is not from 0 to"),
    ("106", _schema({"type": "string", "maxLength": -1}), "has a maxLength that is not from 0 to"),
    ("106", _schema(_deep(17)), "is nested deeper than 16 levels"),
    ("106", _schema({"enum": ["a"] * 2_000}), "has 2,002 parts; at most 1,000 are read"),
    ("106", _schema({"title": "a" * 20_000}), "bytes; at most 16,384 are read"),
    ("106", _schema([1]), "schema is a list, not an object"),
    ("106", _schema({"title": "impossible"}), "this schema cannot be compiled; use a simpler one"),
    ("106", {"response_format": {"type": "grammar"}}, "type must be text, json_object or json_sch"),
    ("106", {"response_format": {"type": "json_schema"}}, "json_schema must hold"),
    ("106", {"response_format": "json"}, "response_format is a string, not an object"),
    ("108", {"chat_template": "{{ 1 }}"}, "chat_template is not taken: the model's own template"),
    ("108", {"chat_template_kwargs": {"a": 1}}, "chat_template_kwargs is not taken"),
    ("", {"tools": [{"type": "function"}]}, "tools is not taken: tools are not called here"),
    ("", {"logit_bias": {"1": 100}}, "logit_bias is not taken"),
    ("", {"repetition_penalty": 1.1}, "no field that is read here; did you mean repeat_penalty?"),
    (
        "",
        {"temprature": 1},
        '"temprature" is no field that is read here; did you mean temperature?',
    ),
    ("", {"a" * 1000: 1}, "is no field that is read here"),
    ("", {"prompt": "a"}, '"prompt" is no field that is read here'),
]


@pytest.mark.parametrize(("number", "change", "words"), BAD, ids=range(len(BAD)))
def test_bad_chats(served: Running, number: str, change: dict[str, Any], words: str) -> None:
    before = len(served.engine.requests)
    status, _, body = served.ask("POST", "/v1/chat/completions", CHAT | change)
    assert status == (404 if words.startswith("no model") else 400), number
    assert words in body["error"]["message"]
    assert len(body["error"]["message"]) < 500
    assert len(served.engine.requests) == before, "it reached the engine"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": None}, "prompt is null; it must be a text or ids"),
        ({"prompt": 5}, "prompt is a number; it must be a text or ids"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": []}, "prompt must be 1 to 8 texts"),
        ({"prompt": ["a"] * 9}, "prompt must be 1 to 8 texts"),
        ({"prompt": ["a"] * 5, "n": 2}, "n makes 10 answers; at most 8 at once"),
        ({"prompt": [-1, 5]}, "prompt has ids outside 0 to 255"),
        ({"prompt": [256]}, "prompt has ids outside 0 to 255"),
        ({"prompt": [[True]]}, "prompt has ids outside 0 to 255"),
        ({"prompt": [{"a": 1}]}, "prompt is an object; it must be a text or ids"),
        ({"prompt": "a" * 256}, "the prompt has 256 tokens; the context holds 256"),
        ({"prompt": [7] * 300}, "the prompt has 300 tokens; the context holds 256"),
        ({"logprobs": 21}, "logprobs is 21; it must be from 0 to 20"),
        ({"logprobs": True}, "logprobs is true, not a whole number"),
        ({"echo": True}, "echo is not taken: the prompt is not repeated"),
        ({"suffix": "end"}, "suffix is not taken"),
        ({"best_of": 3}, "best_of is not taken: use n"),
        ({"messages": [USER]}, '"messages" is no field'),
    ],
    ids=range(18),
)
def test_bad_completions(served: Running, change: dict[str, Any], words: str) -> None:
    status, _, body = served.ask("POST", "/v1/completions", TEXT | change)
    assert (status, body["error"]["type"]) == (400, "invalid_request_error")
    assert words in body["error"]["message"]


def test_a_number_beyond_floats(served: Running) -> None:
    """JSON's 1e999 is infinity to Python."""
    body = b'{"model": "tiny", "prompt": "a", "temperature": 1e999}'
    status, _, found = served.ask("POST", "/v1/completions", body)
    assert status == 400 and "temperature is Infinity" in found["error"]["message"]


def test_what_the_engine_gets(served: Running) -> None:
    asked = {
        "model": MODEL,
        "messages": [
            {"role": "developer", "content": "a"},
            {"role": "user", "content": [{"type": "text", "text": t} for t in "bc"]},
            {"role": "tool", "content": "d", "tool_call_id": "1"},
        ],
        "max_completion_tokens": 5,
        "max_tokens": 5,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "repeat_penalty": 1.2,
        "presence_penalty": -1,
        "frequency_penalty": 1.5,
        "seed": 2**64 - 1,
        "n": 2,
        "stop": ["x", "y"],
        "logprobs": True,
        "top_logprobs": 2,
        "stream": False,
        **dict.fromkeys(HARMLESS, "anything"),
        "tools": [],
        "tool_choice": "auto",
        "logit_bias": {},
        "parallel_tool_calls": True,
        **_schema({"type": "object", "properties": {"pattern": {"type": "string"}}}),
    }
    status, _, body = served.ask("POST", "/v1/chat/completions", asked)
    assert status == 200, body
    first, second = served.engine.requests[-2:]
    assert bytes(first.ids) == b"\0ab\ncd"
    assert (first.max_tokens, first.stop, first.top_logprobs) == (5, ("x", "y"), 2)
    s = first.sampling
    assert (s.temperature, s.top_p, s.top_k, s.min_p, s.repeat_penalty) == (0.5, 0.9, 7, 0.1, 1.2)
    assert (s.presence_penalty, s.frequency_penalty, s.seed) == (-1.0, 1.5, 2**64 - 1)
    assert second.sampling.seed == 0, "each of n has a seed of its own"
    assert first.schema == '{"type": "object", "properties": {"pattern": {"type": "string"}}}'


def test_what_is_taken_where_nothing_is_said(served: Running) -> None:
    served.ask("POST", "/v1/chat/completions", {"model": MODEL, "messages": [USER]})
    served.ask("POST", "/v1/chat/completions", {"model": MODEL, "messages": [USER], "seed": None})
    first, second = served.engine.requests[-2:]
    assert (first.sampling.temperature, first.sampling.top_p, first.sampling.min_p) == (1, 1, 0)
    assert first.max_tokens == 250, "what is left of the context"
    assert first.sampling.seed != second.sampling.seed
    assert first.schema is None and first.top_logprobs is None and first.stop == ()
    served.ask("POST", "/v1/chat/completions", CHAT | {"response_format": {"type": "json_object"}})
    assert served.engine.requests[-1].schema == '{"type": "object"}'


def test_no_field_is_both_read_and_refused() -> None:
    assert not set(CHAT_FIELDS) & {*REFUSED, *HARMLESS}
    assert not set(TEXT_FIELDS) & {*REFUSED, *HARMLESS}


def test_a_pretrained_model_is_no_chat() -> None:
    with running(ScriptedEngine(chat=False)) as server:
        status, _, body = server.ask("POST", "/v1/chat/completions", CHAT)
        assert status == 400 and "use /v1/completions" in body["error"]["message"]
        assert server.ask("POST", "/v1/completions", TEXT)[0] == 200


@pytest.mark.parametrize("name", ["Tiny", "a/b", "..", "-a", "", "a" * 65, "a b"])
def test_ids_that_are_no_ids(name: str) -> None:
    with pytest.raises(UserError, match="cannot be the id of a model"):
        Api({name: ScriptedEngine()}, token=TOKEN, hosts=HOSTS)
