"""Before a server listens: its address, names, token and models; and what it shows."""

from __future__ import annotations

import os
import re
import socket
import stat
from pathlib import Path
from typing import Any

import pytest

from mule import fsio
from mule.cli.serving import show_started, started_lines
from mule.commands import serve as command
from mule.config.docs import DOCS
from mule.errors import StorageError, UserError
from mule.serve import server
from mule.serve.asked import CHAT_FIELDS, HARMLESS, TEXT_FIELDS
from mule.serve.limits import Limits
from mule.serve.token_file import TokenFile
from mule.serve.watch import Watch
from tests.tiny_folder import write_tiny_folder
from tests.unit.test_assume import QWEN


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "mule"


# ---------------------------------------------------------------- the token


def test_every_start_has_a_new_token_that_its_user_alone_reads(runtime: Path) -> None:
    first = TokenFile(None, 8080)
    again = TokenFile(None, 8080)
    assert first.path == runtime / "serve-8080.token" and first.token != again.token
    assert len(again.token) >= 40 and again.path.read_text() == again.token + "\n"
    assert stat.S_IMODE(again.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(runtime.stat().st_mode) == 0o700
    again.close()
    assert not again.path.exists()
    again.close()


def test_without_a_runtime_folder_it_lies_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "missing"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert TokenFile(None, 1).path == tmp_path / "cache" / "mule" / "serve" / "serve-1.token"


def test_a_named_token_file_is_made_once_and_stays(tmp_path: Path) -> None:
    file = tmp_path / "my.token"
    made = TokenFile(file, 0)
    made.close()
    assert TokenFile(file, 0).token == made.token
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("content", "mode", "words"),
    [
        (b"x" * 40, 0o644, r"other users can read or write this token \(mode 644\)"),
        (b"short", 0o600, "holds no token: one word of 20 to 512 ASCII characters"),
        (b"two words of a token, no good", 0o600, "holds no token"),
        (b"", 0o600, "holds no token"),
        (b"\xff" * 40, 0o600, "cannot be read as a token file"),
    ],
)
def test_token_files_that_are_refused(
    tmp_path: Path, content: bytes, mode: int, words: str
) -> None:
    file = tmp_path / "my.token"
    file.write_bytes(content)
    file.chmod(mode)
    with pytest.raises(UserError, match=words):
        TokenFile(file, 0)


def test_a_folder_or_a_missing_place_is_no_token_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"can read or write|holds no token"):
        TokenFile(tmp_path, 0)
    with pytest.raises((StorageError, FileNotFoundError)):
        TokenFile(tmp_path / "no" / "folder", 0)


def test_a_private_file_is_never_written_over(tmp_path: Path) -> None:
    fsio.write_private(tmp_path / "a", "one")
    os.symlink(tmp_path / "elsewhere", tmp_path / "b")
    for name in "ab":
        with pytest.raises(FileExistsError):
            fsio.write_private(tmp_path / name, "two")
    assert (tmp_path / "a").read_text() == "one" and not (tmp_path / "elsewhere").exists()


# ---------------------------------------------------------------- address and names


def test_a_port_that_is_taken_and_an_address_of_nobody() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            UserError, match=rf"cannot listen on 127.0.0.1, port {port}: Address"
        ) as e:
            server.bind("127.0.0.1", port)
        assert "--port 0 takes a free one" in e.value.hint
    with pytest.raises(UserError, match=r"cannot listen on 192\.0\.2\.1"):
        server.bind("192.0.2.1", 0)
    with pytest.raises(UserError, match="no address to listen on"):
        server.bind("no-host.invalid", 0)


@pytest.mark.parametrize(
    ("host", "more", "names", "address"),
    [
        ("127.0.0.1", [], {"localhost", "127.0.0.1", "[::1]"}, "http://127.0.0.1:"),
        ("localhost", [], {"localhost", "127.0.0.1", "[::1]"}, "http://127.0.0.1:"),
        ("127.0.0.1", ["Box"], {"localhost", "127.0.0.1", "[::1]", "box"}, "http://127.0.0.1:"),
        ("0.0.0.0", ["box.local"], {"box.local"}, "http://box.local:"),
    ],
)
def test_the_names_of_a_server(host: str, more: list[str], names: set[str], address: str) -> None:
    with server.bind(host, 0) as bound:
        found = server.own_hosts(bound, host, more)
        assert found == names
        assert server.shown_address(bound, found).startswith(address)
        assert server.is_loopback(bound) is (host != "0.0.0.0")


def test_every_address_needs_a_name() -> None:
    with server.bind("0.0.0.0", 0) as bound, pytest.raises(UserError, match="none of its names"):
        server.own_hosts(bound, "0.0.0.0", [])


def test_another_address_is_refused_without_a_token_file(tmp_path: Path) -> None:
    """Before a model is even looked for."""
    address = command.Address("0.0.0.0", 0, ["box"])
    with pytest.raises(UserError, match=r"0.0.0.0 can be reached from other machines") as caught:
        command.run(["nothing"], address=address)
    assert "--token-file FILE" in caught.value.hint


# ---------------------------------------------------------------- models


def test_names_of_models(tmp_path: Path) -> None:
    write_tiny_folder(tmp_path / "My Model", QWEN)
    text = str(tmp_path / "My Model")
    found = command._find_all([text], [], None)
    assert list(found) == ["my-model"] and found["my-model"].model_dir == tmp_path / "My Model"
    assert list(command._find_all([text, text], ["a", "b"], None)) == ["a", "b"]
    with pytest.raises(UserError, match="two models would be called my-model"):
        command._find_all([text, text], [], None)
    with pytest.raises(UserError, match="1 models and 2 names"):
        command._find_all([text], ["a", "b"], None)
    with pytest.raises(UserError, match="--base says where one adapter's base is"):
        command._find_all([text, text], ["a", "b"], text)


def test_the_queue_that_is_asked_for() -> None:
    assert server.with_queue(None) == Limits() and server.with_queue(3).queue == 3


STARTED: dict[str, Any] = {
    "url": "http://127.0.0.1:8080/v1",
    "token_file": "/run/me/serve-8080.token",
    "models": ["tiny"],
    "chat": ["tiny"],
}


def test_what_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    lines = started_lines(STARTED)
    assert lines[0] == "serving tiny at http://127.0.0.1:8080/v1"
    assert "/run/me/serve-8080.token" in lines[1]
    assert lines[3].startswith("curl http://127.0.0.1:8080/v1/chat/completions -H @<(echo ")
    assert (
        """-d '{"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]}'""" in lines[4]
    )
    for part in lines[6:9]:
        compile(part, "shown", "exec")
    text = "\n".join(started_lines(STARTED | {"chat": []}))
    assert "/v1/completions -H" in text and '"prompt": "Once upon a time"' in text
    assert 'create(model="tiny", prompt="Once upon a time").choices[0].text)' in text
    show_started(STARTED, as_json=True)
    show_started(STARTED, as_json=False)
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith('{"url": "http://127.0.0.1:8080/v1"')
    assert shown[1:] == lines


# ---------------------------------------------------------------- the command and its page


def test_the_options_reach_the_command(mule_cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(command, "run", lambda *words, **named: calls.append((words, named)) or {})
    line = "serve a b.gguf --host 0.0.0.0 --port 0 --max-rows 3 --context 99 --queue 5 --name x "
    line += "--name y --allow-host h --token-file t --base c"
    assert mule_cli(*line.split())[0] == 0
    assert mule_cli("serve", "a")[0] == 0
    (words, named), (_, plain) = calls
    assert words == (["a", "b.gguf"],) and named["names"] == ["x", "y"] and named["base"] == "c"
    assert named["address"] == command.Address("0.0.0.0", 0, ["h"], Path("t"))
    assert named["room"] == command.Room(99, 3, 5)
    assert plain["address"] == command.Address() and plain["room"] == command.Room()


def _page() -> str:
    return (DOCS / "serve.md").read_text(encoding="utf-8")


def test_the_page_names_every_option_and_no_other(mule_cli: Any) -> None:
    known = set(re.findall(r"--[a-z-]+", mule_cli("serve", "--help")[1])) - {"--help"}
    table = {
        word for line in _page().splitlines() if line.startswith("| `--") for word in line.split()
    }
    assert known == {word.strip("`") for word in table if word.startswith("`--")}


def test_the_page_names_every_field_and_figure() -> None:
    page = _page()
    for name in {*CHAT_FIELDS, *TEXT_FIELDS, *HARMLESS}:
        assert f"`{name}`" in page or f"`{name}." in page, name
    watch = Watch()
    names = set(re.findall(r"^# TYPE (mule_\w+)", watch.text().decode(), re.MULTILINE))
    assert len(names) >= 10
    for name in names - {name for name in names if name.endswith("_created")}:
        assert name in page, name
