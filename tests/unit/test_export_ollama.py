"""What is written for Ollama and Docker Model Runner."""

from __future__ import annotations

from pathlib import Path

import pytest

from mule.errors import ModelError
from mule.export.ollama import docker_commands, is_chatml, ollama_commands, write_modelfile
from mule.tokenizer.core import CHATML

QWEN_LIKE = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n"
    "{% endif %}" + CHATML
)
LLAMA3_LIKE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content | trim }}<|eot|>{% endfor %}"
)


def test_chatml_is_written_out_with_its_stops(tmp_path: Path) -> None:
    file = write_modelfile(tmp_path, "m-q4.gguf", CHATML, num_ctx=777, system="Be brief.")
    assert file.read_text() == (
        "FROM ./m-q4.gguf\n"
        'TEMPLATE """{{- range .Messages }}<|im_start|>{{ .Role }}\n'
        "{{ .Content }}<|im_end|>\n"
        "{{ end }}<|im_start|>assistant\n"
        '"""\n'
        'PARAMETER stop "<|im_start|>"\n'
        'PARAMETER stop "<|im_end|>"\n'
        "PARAMETER num_ctx 777\n"
        'SYSTEM """Be brief."""\n'
    )


def test_another_template_is_left_to_the_file(tmp_path: Path) -> None:
    text = write_modelfile(tmp_path, "m.gguf", LLAMA3_LIKE, num_ctx=5).read_text()
    assert text == "FROM ./m.gguf\nREQUIRES 0.30.0\nPARAMETER num_ctx 5\n"


def test_without_a_template_text_is_continued(tmp_path: Path) -> None:
    text = write_modelfile(tmp_path, "m.gguf", None, num_ctx=5).read_text()
    assert 'TEMPLATE """{{ .Prompt }}"""' in text


def test_chatml_is_recognised_by_what_it_writes() -> None:
    assert is_chatml(CHATML)
    assert is_chatml(CHATML.replace("message['role']", "message.role"))
    assert not is_chatml(QWEN_LIKE)  # adds a system turn of its own
    assert not is_chatml(LLAMA3_LIKE)
    assert not is_chatml("{{ raise_exception('no') }}")


def test_a_system_prompt_that_would_end_itself_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match='the system prompt holds """'):
        write_modelfile(tmp_path, "m.gguf", CHATML, num_ctx=5, system='a """ b')


def test_commands_quote_their_paths(tmp_path: Path) -> None:
    create, start = ollama_commands("my models", "mule")
    assert create == "ollama create mule -f 'my models/Modelfile'"
    assert start == "ollama run mule"
    package, start = docker_commands(tmp_path / "m.gguf", "me/mule:q4", num_ctx=64)
    assert package == (
        f"docker model package --gguf {tmp_path / 'm.gguf'} --context-size 64 me/mule:q4"
    )
    assert start == "docker model run me/mule:q4"
    package, _ = docker_commands("my models/m.gguf", "m", num_ctx=64)  # no folder of the user's
    assert package.startswith("""docker model package --gguf "$PWD"/'my models/m.gguf' """)
