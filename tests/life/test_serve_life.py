"""A real server with a tiny model, used by the official client."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from tests.life.serving import Served, serving
from tests.life.tiny_life import Forker
from tests.tiny_folder import write_tiny_folder
from tests.unit.test_assume import QWEN

MODEL = "tiny"
PROMPTS = [
    f"the {word} cat sat on mat {n}" for n, word in enumerate("old young red blue".split() * 3)
]


@pytest.fixture(scope="module")
def served(forker: Forker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("serve")
    write_tiny_folder(folder / MODEL, QWEN)
    with serving(forker, folder, MODEL, "--max-rows", "3", "--context", "256") as server:
        yield server
    assert server.code == 143
    assert not server.token_file.exists()


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=served.url, api_key=served.token, max_retries=0) as client:
        yield client


def _chat(client: openai.OpenAI, text: str, **options: Any) -> Any:
    messages: Any = [{"role": "user", "content": text}]
    # An untrained model has one best token for all prompts: seeds make its answers differ.
    given = {"model": MODEL, "temperature": 1, "seed": 7, "max_tokens": 12} | options
    return client.chat.completions.create(messages=messages, **given)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "mule"


def test_a_chat_whole_and_streamed_is_the_same(client: openai.OpenAI) -> None:
    whole = _chat(client, "the red cat")
    chunks = list(_chat(client, "the red cat", stream=True, stream_options={"include_usage": True}))
    parts = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(parts) == whole.choices[0].message.content != ""
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert [reason for reason in reasons if reason] == [whole.choices[0].finish_reason]


def test_the_asynchronous_client(served: Served, client: openai.OpenAI) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=served.url, api_key=served.token) as asynchronous:
            return await asyncio.gather(*(_streamed(asynchronous, text) for text in PROMPTS[:4]))

    async def _streamed(asynchronous: openai.AsyncOpenAI, text: str) -> str:
        chunks: Any = await asynchronous.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": text}],
            temperature=1,
            seed=7,
            max_tokens=12,
            stream=True,
        )
        return "".join([c.choices[0].delta.content or "" async for c in chunks])

    expected = [_chat(client, text).choices[0].message.content for text in PROMPTS[:4]]
    assert asyncio.run(ask()) == expected


def test_answers_at_once_are_those_of_one_after_the_other(client: openai.OpenAI) -> None:
    """Twelve over three rows: what a row computes does not depend on its neighbours."""
    asked = list(enumerate(PROMPTS))

    def ask(number: int, text: str) -> str:
        return _chat(client, text, seed=number).choices[0].message.content

    alone = [ask(number, text) for number, text in asked]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda one: ask(*one), asked))
    assert together == alone and len(set(alone)) == len(alone)


def test_options_reach_the_model(client: openai.OpenAI) -> None:
    warm = {"temperature": 1.5, "max_tokens": 20}
    first, second, other = (
        _chat(client, "the cat", seed=seed, **warm).choices[0].message.content for seed in (1, 1, 2)
    )
    assert first == second != other
    text = _chat(client, "the cat").choices[0].message.content
    stop = text[3:6]
    cut = _chat(client, "the cat", stop=[stop]).choices[0]
    assert cut.message.content == text[: text.index(stop)] and cut.finish_reason == "stop"
    several = _chat(client, "the cat", n=2, seed=1, **warm)
    assert [choice.index for choice in several.choices] == [0, 1]
    assert several.choices[0].message.content == first
    listed = _chat(client, "the cat", logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert len(listed) == 12
    assert all(entry.logprob <= entry.top_logprobs[0].logprob <= 0 for entry in listed)
    pieces = [bytes(entry.bytes) for entry in listed if not entry.token.startswith("<|")]
    assert b"".join(pieces).decode(errors="replace") == text


def test_an_answer_that_follows_a_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "kind": {"enum": ["a", "b"]}},
        "required": ["ok", "kind"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    choice = _chat(client, "the cat", response_format=form, max_tokens=100).choices[0]
    assert choice.finish_reason == "stop"
    found = json.loads(choice.message.content)
    assert isinstance(found["ok"], bool) and found["kind"] in ("a", "b")


def test_completions(client: openai.OpenAI) -> None:
    given: Any = {"model": MODEL, "temperature": 0, "max_tokens": 8}
    whole = client.completions.create(prompt="the old dog", **given)
    chunks = client.completions.create(prompt="the old dog", stream=True, **given)
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    several = client.completions.create(prompt=["the old dog", [5, 6, 7]], **given)
    assert several.choices[0].text == whole.choices[0].text and len(several.choices) == 2


def test_a_prompt_known_before_is_not_computed_again(client: openai.OpenAI) -> None:
    text = "the fish ran near the hill and the king saw the river " * 3
    _chat(client, text)
    again = _chat(client, text)
    assert again.usage.prompt_tokens_details.cached_tokens > 50


def test_errors_are_those_of_openai(served: Served, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature is 3; it must be from 0 to 2"):
        _chat(client, "a", temperature=3)
    with pytest.raises(openai.NotFoundError, match="no model"):
        _chat(client, "a", model="gpt-4")
    with pytest.raises(openai.BadRequestError, match="tokens; the context holds 256") as caught:
        _chat(client, "the cat " * 400)
    assert caught.value.code == "context_length_exceeded"
    with openai.OpenAI(base_url=served.url, api_key="wrong", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError, match="is not the one of this server"):
            stranger.models.list()


def test_who_hangs_up_frees_the_row(served: Served, client: openai.OpenAI) -> None:
    for _ in range(6):
        stream = _chat(client, "the cat", max_tokens=200, stream=True, temperature=1)
        next(iter(stream))
        stream.close()
    deadline = time.monotonic() + 10
    while 'mule_busy_rows{model="tiny"} 0.0' not in (text := _metrics(client)):
        assert time.monotonic() < deadline, text
        time.sleep(0.05)


def _metrics(client: openai.OpenAI) -> str:
    url = str(client.base_url).replace("/v1/", "/metrics")
    return client._client.get(url, headers={"Authorization": f"Bearer {client.api_key}"}).text


def test_the_log_holds_no_secret(served: Served, client: openai.OpenAI) -> None:
    _chat(client, "my password is sk-canary-123456")
    log = served.log.read_text()
    assert "POST /v1/chat/completions 200" in log
    assert served.token not in log and "canary" not in log and "password" not in log
