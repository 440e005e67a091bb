"""The page Chat: its models are a child of the server, and answer token by token."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from mule.commands import data_check
from mule.commands.chat import DEFAULTS, SETTINGS
from mule.export.gguf import write_gguf
from mule.serve.asked import read_chat
from mule.serve.limits import Limits
from mule.serve.problem import Problem
from mule.web.engines import MAX_MODELS, Chosen, Engines
from mule.web.ids import id_of
from mule.web.site import Site
from tests.parity.tiny_gguf import save_tiny
from tests.serve_case import TOKEN, ScriptedEngine
from tests.web_case import RunningUi, ui_running

ASKED = {"role": "user", "content": "Hello"}
PATIENCE_S = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file, and one that is damaged."""
    folder = tmp_path_factory.mktemp("chat")
    save_tiny(folder / "model", "qwen3", num_hidden_layers=1)
    write_gguf(folder / "model", folder / "good.gguf", "f16")
    (folder / "bad.gguf").write_bytes((folder / "good.gguf").read_bytes()[:200])
    return folder


@pytest.fixture
def running(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningUi]:
    monkeypatch.chdir(folder)
    with ui_running(Site()) as found:
        yield found


def until(holds: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while not (found := holds()):
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.05)
    return found


def asked(running: RunningUi, path: str, body: Any = None) -> tuple[int, Any]:
    status, _, content = running.ask(path, body)
    return status, json.loads(content)


def refusal(running: RunningUi, path: str, body: Any) -> str:
    status, found = asked(running, path, body)
    assert 400 <= status < 500
    return found["error"]["message"]


def settled(running: RunningUi) -> dict[str, Any]:
    """The state of the models once they are loaded."""
    found = until(lambda: (s := asked(running, "/chat/models")[1])["state"] != "loading" and s)
    return found


def answering(running: RunningUi, body: dict[str, Any]) -> http.client.HTTPResponse:
    """An answer under way; closing it is leaving."""
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=PATIENCE_S)
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    connection.request("POST", "/chat/answer", json.dumps(body), headers | {"Connection": "close"})
    return connection.getresponse()


def children() -> list[psutil.Process]:
    own = psutil.Process().children(recursive=True)
    return [child for child in own if "mule.web.owned_process" in child.cmdline()]


# ---------------------------------------------------------------- the page


def test_the_page_lists_models_and_settings(running: RunningUi) -> None:
    page = running.ask("/chat")[2].decode()
    for name in ("model", "good.gguf", "bad.gguf"):
        assert f'value="{id_of(name)}"' in page
    for setting in SETTINGS:
        assert f'name="{setting.name}"' in page and setting.help in page
    assert asked(running, "/chat/models")[1] == {
        "state": "closed",
        "models": [],
        "said": "",
        "why": "",
    }


def test_settings_are_what_the_api_takes() -> None:
    engine = ScriptedEngine()

    def takes(name: str, value: float) -> bool:
        try:
            found = read_chat({name: value, "messages": [ASKED]}, engine, Limits())
            found.max_tokens(engine, Limits())
        except Problem:
            return False
        return True

    whole = {"top_k", "max_tokens", "seed"}
    for setting in SETTINGS:
        kind = int if setting.name in whole else float
        assert takes(setting.name, kind(setting.low))
        if setting.high is not None:
            assert takes(setting.name, kind(setting.high))
        assert takes(setting.name, kind(setting.usual))
        if setting.name != "seed":
            assert not takes(setting.name, kind(setting.low) - 1)
    assert DEFAULTS.items() <= {each.name: each.usual for each in SETTINGS}.items()


def test_a_server_that_only_shows_starts_no_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    with ui_running(Site(read_only=True)) as running:
        page = running.ask("/chat")[2].decode()
        assert "--read-only does not start" in page and "<form" not in page
        for path in ("open", "close", "answer", "save"):
            assert "only shows" in refusal(running, f"/chat/{path}", {})


def test_without_a_model_the_page_says_how_to_get_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with ui_running(Site()) as running:
        page = running.ask("/chat")[2].decode()
        assert "There is no model to talk to yet." in page and "mule demo" in page


def test_what_cannot_be_opened_or_asked(running: RunningUi) -> None:
    few = f"choose 1 to {MAX_MODELS} models"
    assert refusal(running, "/chat/open", {"models": []}) == few
    assert refusal(running, "/chat/open", {"models": ["a"] * (MAX_MODELS + 1)}) == few
    assert 'no model "../x" here' in refusal(running, "/chat/open", {"models": ["../x"]})
    status, found = asked(running, "/chat/answer", {"model": "good.gguf", "messages": [ASKED]})
    assert status == 409 and found["error"]["message"] == '"good.gguf" is not open'
    assert found["error"]["hint"] == "choose the models and press Open"
    assert "tools" in refusal(running, "/chat/answer", {"model": "x", "tools": []})
    assert children() == []


# ---------------------------------------------------------------- answers


def test_a_model_answers_token_by_token(running: RunningUi) -> None:
    name = id_of("good.gguf")
    status, found = asked(running, "/chat/open", {"models": [name]})
    assert status == 200 and found["state"] == "loading"
    found = settled(running)
    assert found["state"] == "open"
    assert found["models"] == [{"id": name, "title": "good", "chat": True}]
    body = {"model": name, "messages": [ASKED], "max_tokens": 4, "temperature": 0, "seed": 1}
    given = answering(running, body)
    assert given.status == 200
    assert given.headers["content-type"].startswith("text/event-stream")
    events = [line[6:] for line in given.read().decode().split("\n\n") if line]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert chunks[-1]["usage"]["completion_tokens"] == 4
    listed = [c["choices"][0]["logprobs"] for c in chunks if c["choices"]]
    tokens = [entry for found in listed if found for entry in found["content"]]
    assert len(tokens) == 4 and all(len(token["top_logprobs"]) == 5 for token in tokens)
    assert "temperature is 9" in refusal(running, "/chat/answer", body | {"temperature": 9})
    text = {"model": name, "prompt": "Once", "max_tokens": 2, "seed": 1}
    assert '"prompt" is no field' in refusal(running, "/chat/answer", text)  # it knows chats
    said = json.dumps([found, asked(running, "/chat/models")[1]])
    assert "token_file" not in said and "http://" not in said and TOKEN not in said

    # Who leaves in the middle stops it: the next one need not wait.
    long = answering(running, body | {"max_tokens": 900})
    assert long.read(20)
    long.close()
    assert answering(running, body).read().endswith(b"[DONE]\n\n")
    (child,) = children()
    running.ui.site.at_close.close()
    assert not child.is_running()


def test_models_that_cannot_be_opened_say_why(running: RunningUi) -> None:
    asked(running, "/chat/open", {"models": [id_of("bad.gguf")]})
    found = settled(running)
    assert found["state"] == "failed"
    assert "bad.gguf" in found["error"]["message"] and found["error"]["hint"]
    assert found["error"]["message"] in found["said"].replace("\n", " ")
    assert asked(running, "/chat/close", {})[1]["state"] == "closed"


@pytest.mark.slow
def test_models_are_closed_when_nobody_asks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    engines = Engines(idle_seconds=3.0)
    engines.open([Chosen("good", "good.gguf", "good")])
    until(lambda: engines.state()["state"] == "open")
    given = engines.ask("good", {"messages": [ASKED], "max_tokens": 3})
    assert given.status == 200 and given.read()
    given.close()
    until(lambda: engines.state()["state"] == "closed")
    assert engines.state()["why"] == "closed after 0.05 minutes without use"
    assert children() == []


def test_an_owned_process_ends_with_its_owner() -> None:
    sleeps = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"]
    owned = subprocess.Popen(
        [sys.executable, "-m", "mule.web.owned_process", *sleeps],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert owned.stdin is not None and owned.stdout is not None
    assert owned.stdout.readline() == b"begun\n"
    (child,) = psutil.Process(owned.pid).children()
    owned.stdin.close()
    assert owned.wait(PATIENCE_S) == 143
    assert not child.is_running()
    owned.stdout.close()


# ---------------------------------------------------------------- saving


def test_a_conversation_becomes_training_data(running: RunningUi, folder: Path) -> None:
    messages = [ASKED, {"role": "assistant", "content": "Good day."}]
    said = [{"model": name, "messages": messages} for name in ("a", "b")]  # the same: one row
    body = {"file": "kept.jsonl", "said": said}
    assert asked(running, "/chat/save", body) == (
        200,
        {"file": "kept.jsonl", "rows": 1, "next": "mule data check kept.jsonl"},
    )
    assert asked(running, "/chat/save", body)[1]["rows"] == 2
    rows = [json.loads(line) for line in (folder / "kept.jsonl").read_text().splitlines()]
    assert rows == [{"messages": messages}] * 2
    assert data_check.run([str(folder / "kept.jsonl")])["ok"]


@pytest.mark.parametrize(
    ("file", "messages", "message"),
    [
        ("kept.txt", [ASKED], "conversations are saved as JSONL"),
        ("../kept.jsonl", [ASKED], "is not below the folder"),
        ("/tmp/kept.jsonl", [ASKED], "is not below the folder"),
        ("none/kept.jsonl", [ASKED], "is nothing in the folder"),
        ("", [ASKED], "is no place for a conversation"),
        (".mule/kept.jsonl", [ASKED], "is no place for a conversation"),
        ("kept.jsonl", [], "there is no conversation to save"),
        ("kept.jsonl", [ASKED, {"role": "assistant", "content": " "}], "answered with nothing"),
        ("kept.jsonl", [{"role": "tool", "content": "x"}], "must be a list of messages"),
        ("kept.jsonl", [ASKED | {"more": 1}], "must be a list of messages"),
        ("kept.jsonl", "Hello", "must be a list of messages"),
    ],
)
def test_what_cannot_be_saved(
    running: RunningUi, folder: Path, file: str, messages: Any, message: str
) -> None:
    (folder / ".mule").mkdir(exist_ok=True)
    body = {"file": file, "said": [{"model": "a", "messages": messages}]}
    assert message in refusal(running, "/chat/save", body)
    body = {"file": "kept.jsonl", "said": 3}
    assert "must be a list of up to" in refusal(running, "/chat/save", body)
