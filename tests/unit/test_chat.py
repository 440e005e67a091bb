"""`mule chat`: one model or several, in torch and in llama.cpp; its commands and its errors."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mule import machine
from mule.cli import talk
from mule.commands import chat, data_check
from mule.errors import ModelError, UserError
from mule.export.gguf import write_gguf
from mule.generate.conversation import Conversation, Reply, Speaker, differences
from mule.generate.request import Ended, Request
from mule.generate.sampler import Sampling
from tests.badinput.test_gguf_files import GGUFS
from tests.parity.tiny_gguf import save_tiny

GREEDY = Sampling()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with two GGUF files of it, and another's."""
    folder = tmp_path_factory.mktemp("chat") / "taught"
    save_tiny(folder, "qwen3", num_hidden_layers=1)
    for kind in ("f32", "f16"):
        write_gguf(folder, folder.parent / f"taught-{kind}.gguf", kind)
    save_tiny(folder.parent / "other", "qwen3", num_hidden_layers=1, seed=4)
    write_gguf(folder.parent / "other", folder.parent / "other.gguf", "f16")
    return folder


@pytest.fixture(scope="module")
def three(folder: Path) -> Iterator[Conversation]:
    """The model in torch, as f32 and another one's file; all computed in fp32."""
    sources = [str(folder), f"{folder}-f32.gguf", str(folder.parent / "other.gguf")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "has_fast_bf16", lambda: False)
        opened = chat.open_chat(sources, sampling=GREEDY, max_tokens=6)
    yield opened
    opened.close()


@pytest.fixture
def fresh(three: Conversation) -> Conversation:
    three.reset()
    three.system, three.sampling, three.max_tokens = None, GREEDY, 6
    return three


def converse(conversation: Conversation, monkeypatch: pytest.MonkeyPatch, *lines: str) -> str:
    """Type lines; the notices."""
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    notices = io.StringIO()
    talk.talk(conversation, Console(file=notices, width=200))
    return notices.getvalue()


# ---------------------------------------------------------------- several models


def test_several_models_answer_side_by_side(
    fresh: Conversation, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    converse(fresh, monkeypatch, "hello", "and you?", "/quit", "not read")
    shown = capsys.readouterr().out
    assert shown.count("[taught]\n") == shown.count("[taught-f32]\n") == 2
    assert len(re.findall(r"\n\(\d+ tokens, \d+\.\d tokens/s\)\n", shown)) == 6
    assert "taught-f32: the same as taught\n" in shown
    assert re.search(r'other: first differs from taught at character \d+, .*: ".*" where', shown)
    torch, gguf, other = (speaker.history for speaker in fresh.speakers)
    assert torch == gguf and torch != other  # each has its own history
    assert [message["role"] for message in other] == ["user", "assistant"] * 2


def test_all_answers_come_as_json(folder: Path) -> None:
    sources = [f"{folder}-f32.gguf", f"{folder}-f16.gguf"]
    result = chat.run(sources, prompt="hello", sampling=GREEDY, max_tokens=5)
    first, second = result["answers"]
    assert (first["model"], second["model"]) == ("taught-f32", "taught-f16")
    assert first["tokens"] == 5 and first["ended"] == "length" and first["tokens_per_second"] > 0
    assert result["differences"][0]["same"] is (first["text"] == second["text"])
    one = chat.run(sources[:1], prompt="hello", sampling=GREEDY, max_tokens=5)
    assert one["text"] == first["text"] and one["prompt"] == "hello" and "answers" not in one


def test_differences_are_told_plainly() -> None:
    texts = ("It is Paris.", "It is Paris.", "It is Lyon,\nI think.", "It is", "")
    engine: Any = None
    request = Request((1,), 1, GREEDY)
    replies = [Reply(Speaker(f"m{i}", engine), request, text) for i, text in enumerate(texts)]
    lines = [talk.difference_line(difference) for difference in differences(replies)]
    assert lines == [
        "m1: the same as m0",
        'm2: first differs from m0 at character 6, after "It is ": "Lyon,⏎I think." '
        'where m0 has "Paris."',
        'm3: first differs from m0 at character 5, after "It is": nothing more where m0 has " Paris."',
        "m4: first differs from m0 at character 0, from the start: nothing more where m0 has "
        '"It is Paris."',
    ]
    assert differences(replies[:1]) == []


# ---------------------------------------------------------------- commands


def test_commands_change_the_settings(fresh: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    notices = converse(
        fresh,
        monkeypatch,
        *("hello", "/system You are a pirate", "/set temperature 0.5", "/set top_k 7"),
        *("/set max_tokens 9", "/set colour 1", "/set top_p abc", "/set top_p 7", "/nonsense"),
        *("/set max_tokens 0", "/retry", "/save", "/save a.txt", "/save a.jsonl", "/help"),
        "word " * 2000,
    )
    assert all(not speaker.history for speaker in fresh.speakers)
    assert fresh.system == "You are a pirate"
    assert (fresh.sampling.temperature, fresh.sampling.top_k) == (0.5, 7)
    assert (fresh.max_tokens, fresh.sampling.top_p) == (9, 1.0)
    for said in (
        "error: there is no setting `colour`\nhint: one of temperature, top_k",
        "error: `abc` is not a number\nhint: for example: /set top_p 1",
        "error: top_p is 7.0; it must be",
        "error: no command /nonsense\nhint: /help lists them",
        "error: max_tokens is 0; it must be 1 or more",
        "error: there is nothing to retry\nhint: ask something first",
        "error: /save needs a file\nhint: for example: /save chats.jsonl",
        "error: there is no conversation to save\nhint: ask something first",
        "/set NAME VALUE   temperature, top_k",
    ):
        assert said in notices
    assert re.search(r"error: the conversation has [\d,]+ tokens for taught; its context", notices)
    assert "start afresh with /reset" in notices


def test_retry_draws_again_and_keeps_one_answer(
    fresh: Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    converse(fresh, monkeypatch, "/set temperature 2", "hello", "again", "/retry")
    histories = [speaker.history for speaker in fresh.speakers]
    assert [len(history) for history in histories] == [4, 4, 4]
    assert histories[0][2] == {"role": "user", "content": "again"}
    assert fresh.sampling.seed == 1


def test_a_saved_conversation_is_training_data(
    fresh: Conversation, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "a"}, ')
    file.write_text(file.read_text() + '{"role": "assistant", "content": "b"}]}')  # no newline
    notices = converse(fresh, monkeypatch, "/system Be brief.", "hello", "go on", f"/save {file}")
    assert f"saved; {file} has 3 rows now" in notices  # torch and f32 said the same
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    roles = ["system", *("user", "assistant") * 2]
    assert [message["role"] for message in rows[1]["messages"]] == roles
    assert rows[1]["messages"][0]["content"] == "Be brief."
    for number, speaker in enumerate(fresh.speakers):
        speaker.history[1]["content"] = "It is a city in the south of France."
        speaker.history[3]["content"] = f"It has {number} old bridges over a wide river."
    plain = tmp_path / "plain.jsonl"
    assert chat.save(fresh, plain) == 3
    found = data_check.run([str(plain)])
    assert found["ok"] and found["rows"] == 3 and found["files"][0]["format"] == "messages"
    with pytest.raises(UserError, match=r"a\.txt: conversations are saved as JSONL") as error:
        chat.save(fresh, tmp_path / "a.txt")
    assert error.value.hint.endswith("a.jsonl")


def test_an_empty_reply_is_not_saved(fresh: Conversation, tmp_path: Path) -> None:
    fresh.speakers[0].history[:] = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": " "},
    ]
    with pytest.raises(UserError, match="taught has answered with nothing"):
        chat.save(fresh, tmp_path / "a.jsonl")


# ---------------------------------------------------------------- replies


def test_ctrl_c_stops_a_reply_and_not_the_conversation(
    fresh: Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    converse(fresh, monkeypatch, "hello")
    before = [list(speaker.history) for speaker in fresh.speakers]
    written: list[str] = []

    def interrupt(text: str) -> None:
        written.append(text)
        if len(written) == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout.write", interrupt)
        notices = converse(fresh, patch, "/set max_tokens 900", "/retry")
    assert "stopped; this turn is not kept" in notices
    assert [speaker.history for speaker in fresh.speakers] == before
    converse(fresh, monkeypatch, "/set max_tokens 4", "still there?")
    assert [len(speaker.history) for speaker in fresh.speakers] == [4, 4, 4]


def test_control_characters_of_a_reply_are_spelled(capsys: pytest.CaptureFixture[str]) -> None:
    talk._say(["a\x1b]0;title\x07", "b\tc\nd\x9b1m"])
    assert capsys.readouterr().out == "a\\x1b]0;title\\x07b\tc\nd\\x9b1m\n"


def test_it_says_why_a_reply_was_cut(fresh: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "(cut after 6 tokens: /set max_tokens" in converse(fresh, monkeypatch, "hello")

    class Full:
        chat, context_tokens = True, 1000

        def submit(self, request: Request, deliver: Any) -> Any:
            deliver(Ended("context"))
            return self

        def cancel(self) -> None: ...

    reply = Reply(Speaker("full", Full()), Request((1,), 1, GREEDY))  # type: ignore[arg-type]
    assert list(reply.stream()) == []
    assert talk._why_cut(reply) == "(cut: the context of 1,000 tokens is full)"


# ---------------------------------------------------------------- what cannot be


def test_models_that_cannot_be_opened_are_refused(folder: Path) -> None:
    file = f"{folder}-f32.gguf"

    def refused(*sources: str, **settings: Any) -> str:
        with pytest.raises(UserError) as error:
            chat.open_chat(sources, sampling=GREEDY, **settings)
        return f"{error.value.message} | {error.value.hint}"

    assert "is named twice | name each model once" in refused(file, file)
    assert "no such file" in refused(file, "nothing.gguf")
    assert "a GGUF file runs in llama.cpp, and --mlx" in refused(file, mlx=True)
    assert "--context has no effect with --mlx" in refused(str(folder), mlx=True, context=9)
    assert "a context of 2000 tokens was asked for; the model's holds 1024" in refused(
        file, context=2000
    )
    with pytest.raises(UserError, match="--json answers one prompt"):
        talk.run([file], None, {}, as_json=True)


def test_two_of_one_name_are_called_as_typed(folder: Path, tmp_path: Path) -> None:
    assert chat.distinct_names(["a/m.gguf", "b/m.gguf", "c"], ["m", "m", "c"]) == [
        "a/m.gguf",
        "b/m.gguf",
        "c",
    ]


@pytest.mark.parametrize("name", GGUFS)
def test_a_damaged_file_never_reaches_llama_cpp(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, message = GGUFS[name]
    file = tmp_path / "m.gguf"
    file.write_bytes(content)
    monkeypatch.setattr("subprocess.Popen", None)
    with pytest.raises(ModelError) as error:
        chat.run([str(file)], prompt="hello", sampling=GREEDY)
    assert message in error.value.message and "m.gguf" in error.value.message


def test_a_gguf_file_is_opened_without_torch(folder: Path) -> None:
    """Its import takes seconds, and the model runs in llama.cpp."""
    code = (
        "import sys\n"
        "import mule.serve.app, mule.serve.server\n"
        "from mule.adapters.source import find_source\n"
        "from mule.commands.serve import open_engine\n"
        "engine = open_engine(find_source(sys.argv[1]), context=64, max_rows=1)\n"
        "engine.close()\n"
        "print('torch' in sys.modules)\n"
    )
    command = [sys.executable, "-c", code, f"{folder}-f32.gguf"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.returncode) == ("False", 0), done.stderr
