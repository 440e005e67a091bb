"""`mule chat A B` as a person uses it: in a real terminal, typed line by line, stopped by Ctrl-C."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mule.export.gguf import write_gguf
from tests.parity.tiny_gguf import save_tiny
from tests.terminal_case import Terminal


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("terminal")
    save_tiny(folder / "model", "qwen3", num_hidden_layers=1)
    for kind in ("f32", "f16"):
        write_gguf(folder / "model", folder / f"{kind}.gguf", kind)
    return folder


def test_a_conversation_in_a_terminal(folder: Path) -> None:
    terminal = Terminal(folder, "chat", "f32.gguf", "f16.gguf", "--max-tokens", "8", "--seed", "3")
    terminal.until(r"/help lists the commands")
    terminal.until("> ")
    terminal.type("hello\n")
    seen = terminal.until(r"f16: (the same as|first differs from) f32.*\n")
    assert seen.index("[f32]") < seen.index("[f16]")
    assert len(re.findall(r"tokens, [\d.]+ tokens/s\)", seen)) == 2

    terminal.until("> ")
    terminal.type("/set max_tokens 900\n")
    terminal.until("> ")
    terminal.type("go on\n")
    terminal.until(r"\[f32\]\n[^\n]{20}")  # it is being written
    terminal.type("\x03")
    terminal.until("stopped; this turn is not kept")

    terminal.until("> ")
    terminal.type("/set max_tokens 4\n/retry\n")
    terminal.until(r"f16: .* f32.*\n")
    terminal.until("> ")
    terminal.type("/nonsense\n")
    terminal.until("error: no command /nonsense\nhint: /help lists them")
    terminal.type("/save said.jsonl\n")
    terminal.until(r"saved; said\.jsonl has \d rows? now")
    terminal.until("> ")  # sent sooner, it is lost when the line editor takes the terminal over
    terminal.type("\x04")  # Ctrl-D
    assert terminal.end() == 0
    rows = [json.loads(line) for line in (folder / "said.jsonl").read_text().splitlines()]
    assert [message["role"] for message in rows[0]["messages"]] == ["user", "assistant"]
    assert rows[0]["messages"][0]["content"] == "hello"
