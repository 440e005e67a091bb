"""What can be served: a folder, an adapter on its base, a GGUF file; and how a server ends."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.life.serving import serving
from tests.life.test_cli_life import call
from tests.life.tiny_life import CHAT_RECIPE, LORA, Forker, write_data
from tests.tiny_folder import write_tiny_folder
from tests.unit.test_assume import QWEN

SMALL = QWEN | {"hidden_size": 64}


@pytest.fixture(scope="module")
def home(forker: Forker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, an adapter on it, and the base as GGUF."""
    folder = tmp_path_factory.mktemp("sources")
    write_data(folder)
    write_tiny_folder(folder / "base", SMALL)
    recipe = CHAT_RECIPE.replace("BASE", "base").replace("steps: 16", "steps: 2") + LORA
    (folder / "lora.yaml").write_text(recipe)
    for line in ("train lora.yaml --json", "export base --types f16 --json"):
        code, said = call(forker, folder, line)
        assert code == 0, said
    return folder


def _ask(client: openai.OpenAI, model: str, **options: Any) -> Any:
    messages: Any = [{"role": "user", "content": "the cat"}]
    given = {"temperature": 0, "max_tokens": 6} | options
    return client.chat.completions.create(model=model, messages=messages, **given)


def test_a_folder_an_adapter_and_a_gguf_side_by_side(forker: Forker, home: Path) -> None:
    file = next((home / "exports").rglob("*.gguf"))
    names = [word for name in ("base", "tuned", "gguf") for word in ("--name", name)]
    sources = ["base", "lora", str(file.relative_to(home))]
    with serving(forker, home, *sources, *names, "--max-rows", "2") as served:
        with openai.OpenAI(base_url=served.url, api_key=served.token, max_retries=0) as client:
            answers = {}
            for model in ("base", "tuned", "gguf"):
                whole = _ask(client, model)
                assert whole.model == model and whole.usage.completion_tokens > 0
                chunks = list(_ask(client, model, stream=True))
                parts = [c.choices[0].delta.content or "" for c in chunks if c.choices]
                answers[model] = whole.choices[0].message.content
                assert "".join(parts) == answers[model]
            listed = _ask(client, "gguf", logprobs=True, top_logprobs=2).choices[0].logprobs
            assert listed.content[0].logprob <= 0
    assert all(answers.values())
    assert served.code == 143


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_in_the_middle_of_an_answer(
    forker: Forker, home: Path, stop: signal.Signals
) -> None:
    """The answer is finished, since there is time for it; then the server goes with 128 + n."""
    with serving(forker, home, "base", stop=stop) as served:
        with openai.OpenAI(base_url=served.url, api_key=served.token, max_retries=0) as client:
            stream = iter(_ask(client, "base", stream=True, max_tokens=60, temperature=1, seed=1))
            next(stream)
            os.kill(served.pid, stop)
            chunks = list(stream)
    assert chunks[-1].choices[0].finish_reason in ("length", "stop")
    assert served.code == 128 + stop
    assert not served.token_file.exists()
    last = json.loads(served.log.read_text().splitlines()[-1])
    assert last["error"] == f"stopped by {stop.name}" and last["exit_code"] == 128 + stop


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing-here"], "nothing-here: no run, model folder, adapter or GGUF file"),
        (["base", "--name", "No_Id"], "'No_Id' cannot be the id of a model"),
        (["base", "--context", "999999"], "a context of 999999 tokens was asked for"),
        (["base", "--host", "0.0.0.0"], "0.0.0.0 can be reached from other machines"),
    ],
)
def test_what_cannot_be_served(forker: Forker, home: Path, words: list[str], message: str) -> None:
    code, said = call(forker, home, " ".join(["serve", *words, "--port 0 --json"]))
    assert code == 2 and message in said["error"]
