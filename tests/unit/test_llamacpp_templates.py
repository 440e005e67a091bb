"""A GGUF file's chat template is foreign code: it fails alone, and is bounded in time and size."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from mule.errors import ModelError
from mule.export.gguf import write_gguf
from mule.generate import llamacpp_templates
from mule.generate.llamacpp_batching import LlamaCppEngine
from tests.parity.tiny_gguf import PROMPTS, TEXTS, save_tiny, tiny_tokenizer

HOSTILE = {
    "endless": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "its chat template did not end within",
    ),
    "memory": (
        "{% set n = namespace(x='aaaaaaaa') %}{% for a in range(40) %}{% set n.x = n.x + n.x %}"
        "{% endfor %}{{ n.x }}",
        "template",
    ),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "template"),
    "syntax": ("{% for %}", "Failed to init server|chat template"),
}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template")
    save_tiny(folder, "qwen3", num_hidden_layers=1)
    write_gguf(folder, folder / "m.gguf", "f32")
    return folder / "m.gguf"


def with_template(file: Path, template: str, out: Path) -> Path:
    """The file with another template in the same place, filled up with a comment."""
    own = (tiny_tokenizer().chat_template or "").encode()
    filled = f"{template}{{#{' ' * (len(own) - len(template) - 4)}#}}".encode()
    assert len(filled) == len(own)
    out.write_bytes(file.read_bytes().replace(own, filled))
    return out


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n == "memory" else n for n in HOSTILE],
)
def test_a_hostile_template_is_an_error(
    name: str, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template, message = HOSTILE[name]
    monkeypatch.setattr(llamacpp_templates, "SECONDS_TO_OPEN", 3.0)
    monkeypatch.setattr(llamacpp_templates, "MEMORY_BYTES", 1 << 30)
    engine = LlamaCppEngine(
        with_template(file, template, tmp_path / "m.gguf"), max_rows=1, threads=1
    )
    try:
        with pytest.raises(ModelError, match=message):
            engine.encode_chat(PROMPTS[0])
        assert engine.encode(TEXTS[0]) == tiny_tokenizer().encode(TEXTS[0])  # alive
    finally:
        engine.close()


def test_what_ended_is_opened_again_and_output_is_bounded(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = LlamaCppEngine(file, max_rows=1, threads=1)
    try:
        expected = tiny_tokenizer().encode_prompt(PROMPTS[1])
        assert engine.encode_chat(PROMPTS[1]) == expected
        opened = engine._model._templates._opened
        assert opened is not None
        os.kill(opened.result()._process.pid, signal.SIGSTOP)  # else it may be quicker than us
        monkeypatch.setattr(llamacpp_templates, "SECONDS_TO_RENDER", 0.1)
        with pytest.raises(ModelError, match=r"its chat template did not end within 0\.1 seconds"):
            engine.encode_chat(PROMPTS[1])
        monkeypatch.undo()
        assert engine.encode_chat(PROMPTS[1]) == expected
        monkeypatch.setattr(llamacpp_templates, "MAX_OUTPUT_CHARS", -30)
        with pytest.raises(ModelError, match="the chat template writes more than 24 bytes"):
            engine.encode_chat([{"role": "user", "content": "How much is that: 1 + 1 + 1 + 1 = "}])
    finally:
        engine.close()


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="there is no /proc")
def test_both_children_get_a_bare_environment(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "PYTHONSTARTUP", "GGML_X"):
        monkeypatch.setenv(name, "secret")
    engine = LlamaCppEngine(file, max_rows=1, threads=1)
    try:
        engine.encode_chat(PROMPTS[0])
        opened = engine._model._templates._opened
        assert opened is not None
        for runtime in (engine._model, opened.result()):
            content = Path(f"/proc/{runtime._process.pid}/environ").read_bytes()
            names = {entry.partition(b"=")[0].decode() for entry in content.split(b"\0") if entry}
            known = {"PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "LC_ALL", "GGML_NO_BACKTRACE"}
            assert known <= names <= known | {"PATH", "TMPDIR"}
    finally:
        engine.close()


def test_one_that_dies_is_given_a_second_try(file: Path) -> None:
    engine = LlamaCppEngine(file, max_rows=1, threads=1)
    try:
        expected = engine.encode_chat(PROMPTS[0])
        opened = engine._model._templates._opened
        assert opened is not None
        os.kill(opened.result()._process.pid, signal.SIGXCPU)  # as at the end of its time
        assert engine.encode_chat(PROMPTS[0]) == expected
    finally:
        engine.close()


def test_closing_does_not_wait_for_an_endless_template(file: Path, tmp_path: Path) -> None:
    hostile = with_template(file, HOSTILE["endless"][0], tmp_path / "m.gguf")
    started_at = time.monotonic()
    LlamaCppEngine(hostile, max_rows=1, threads=1).close()
    assert time.monotonic() - started_at < llamacpp_templates.SECONDS_TO_OPEN / 2
