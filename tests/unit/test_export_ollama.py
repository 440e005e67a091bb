"""What is written for Ollama and Docker Model Runner."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mule.errors import ModelError, UserError
from mule.export.go_template import GoTemplateError, ollama_data, render_go
from mule.export.ollama import OllamaModel, docker_commands, ollama_commands, write_modelfile
from mule.export.ollama_template import ollama_template, takes_system
from mule.tokenizer import Tokenizer
from mule.tokenizer.core import CHATML as OURS
from tests.parity.template_styles import (
    CHATML,
    GEMMA,
    LLAMA3,
    MISTRAL,
    PHI3,
    QWEN3,
    STYLES,
    Style,
    load,
)

CHATS = (
    [{"role": "user", "content": "Hello! What's 1 < 2?"}],
    [
        {"role": "system", "content": 'Be "brief".\nAlways.'},
        {"role": "user", "content": "Ça va {{ .Role }}?"},
        {"role": "assistant", "content": "Oui.\n\nEt toi ?"},
        {"role": "user", "content": "user"},
    ],
)
QWEN2 = replace(
    CHATML,
    template="{% if messages[0].role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n"
    "{% endif %}" + OURS,
)
DATED = replace(
    LLAMA3,
    template=LLAMA3.template.replace(
        "{{ bos_token }}", "{{ bos_token }}Today is {{ strftime_now('%Y') }}.\n"
    ),
)
GEMMA3 = replace(  # the real one: the system message begins the first user's turn
    GEMMA,
    template="{{ bos_token }}{% set start = '' %}{% if messages[0].role == 'system' %}"
    "{% set start = messages[0].content + '\n\n' %}{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) "
    "+ '\n' + (start if loop.first else '') + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    system=True,
)
NEMO = replace(  # the real one: the system message stands in the last user's turn
    MISTRAL,
    template="{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '[INST]' "
    "+ (system + '\n\n' if loop.last and system is defined else '') + m.content + '[/INST]' }}"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}",
    system=True,
)
PHI3_5 = replace(  # the real one: a chat that is not to be answered ends with eos
    PHI3,
    template=f"{PHI3.template}{{% if not add_generation_prompt %}}{{{{ eos_token }}}}{{% endif %}}",
)
COUNTED = replace(CHATML, template="{{ messages | length }}" + CHATML.template)


def without_bos(tokenizer: Tokenizer, chat: list[dict[str, str]]) -> str:
    text = tokenizer.render_chat(chat, add_generation_prompt=True)
    bos = "" if tokenizer.bos_id is None else tokenizer.token_text(tokenizer.bos_id)
    assert text.startswith(bos)
    return text.removeprefix(bos)


@pytest.mark.parametrize(
    "style", [*STYLES, QWEN2, DATED, GEMMA3, NEMO, PHI3_5], ids=lambda style: style.name
)
def test_a_template_is_written_in_gos_language(style: Style) -> None:
    tokenizer = load(style)
    found = ollama_template(tokenizer)
    assert found is not None and found.takes_system == style.system == takes_system(tokenizer)
    for chat in CHATS[: 1 + style.system]:
        assert render_go(found.text, ollama_data(chat)) == without_bos(tokenizer, chat)


def test_what_gos_language_cannot_do_is_told() -> None:
    def notes(style: Style) -> str:
        found = ollama_template(load(style))
        assert found is not None
        return " ".join(found.notes)

    assert notes(CHATML) == ""
    assert "takes white space off the ends of messages" in notes(LLAMA3)
    assert "leaves out the thoughts of earlier answers" in notes(QWEN3)
    assert "writes the date: in the Modelfile it stays that of 2" in notes(DATED)


def test_go_templates_are_read_as_go_reads_them() -> None:
    data = {"System": "", "Messages": [{"Role": "a", "Content": "1"}, {"Role": "b", "Content": ""}]}
    for template, text in (
        ("x  {{- .System }} y {{ .System -}}  z", "x y z"),
        ("{{ range $i, $_ := .Messages }}{{ if $i }}, {{ end }}{{ .Role }}{{ end }}", "a, b"),
        (
            '{{ range .Messages }}{{ if .Content }}c{{ else if eq .Role "b" }}d{{ end }}{{ end }}',
            "cd",
        ),
        ("{{ if and (not .System) (or 0 1) }}yes{{ else }}no{{ end }}", "yes"),
        ("{{ range .Messages }}{{ if $.System }}x{{ end }}{{ .Content }}{{ end }}", "1"),
        ('{{ "a\\n" }}{ }', "a\n{ }"),
    ):
        assert render_go(template, data) == text
    for template in ("{{ end }}", "{{ if .System }}", "{{ .Nothing }}", "{{ html .System }}"):
        with pytest.raises(GoTemplateError):
            render_go(template, data)


def test_ollama_joins_messages_of_one_role() -> None:
    said = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    data = ollama_data(
        [*said, {"role": "user", "content": "c"}, {"role": "system", "content": "d"}]
    )
    assert data["System"] == "a\n\nd"
    assert [m["Content"] for m in data["Messages"]] == ["a", "b\n\nc", "d"]


def modelfile(folder: Path, style: Style, **changes: object) -> tuple[str, list[str]]:
    model = replace(OllamaModel("./m-q4.gguf", 777), **changes)  # type: ignore[arg-type]
    notes = write_modelfile(folder, model, load(style))
    return (folder / "Modelfile").read_text(), notes


def test_chatml_is_written_out_with_its_stops(tmp_path: Path) -> None:
    text, notes = modelfile(tmp_path, CHATML, system="Be brief.", licence="mit")
    assert text == (
        "FROM ./m-q4.gguf\n"
        'TEMPLATE """{{- range .Messages }}<|im_start|>{{ .Role }}\n'
        "{{ .Content }}<|im_end|>\n"
        "{{ end }}<|im_start|>assistant\n"
        '"""\n'
        'PARAMETER stop "<|im_start|>"\n'
        'PARAMETER stop "<|im_end|>"\n'
        'PARAMETER stop "<|endoftext|>"\n'
        "PARAMETER num_ctx 777\n"
        'SYSTEM """Be brief."""\n'
        'LICENSE """mit"""\n'
    )
    assert notes == []


def test_another_template_is_left_to_the_file(tmp_path: Path) -> None:
    text, notes = modelfile(tmp_path, COUNTED)
    assert text == (
        'FROM ./m-q4.gguf\nREQUIRES 0.30.0\nPARAMETER stop "<|im_end|>"\n'
        'PARAMETER stop "<|endoftext|>"\nPARAMETER num_ctx 777\n'
    )
    assert "Ollama must be 0.30.0 or newer" in notes[0]


def test_an_adapter_has_its_line(tmp_path: Path) -> None:
    text, _ = modelfile(tmp_path, MISTRAL, base="../b/b.gguf", adapter="./lora.gguf")
    assert text.startswith(
        'FROM ../b/b.gguf\nADAPTER ./lora.gguf\nTEMPLATE """{{- range .Messages }}'
    )
    assert 'PARAMETER stop "[INST]"\nPARAMETER stop "</s>"\n' in text


def test_without_a_template_text_is_continued(tmp_path: Path) -> None:
    tokenizer = load(CHATML)
    tokenizer.chat_template = None
    write_modelfile(tmp_path, OllamaModel("./m.gguf", 5), tokenizer)
    assert 'TEMPLATE """{{ .Prompt }}"""' in (tmp_path / "Modelfile").read_text()
    with pytest.raises(UserError, match="no chat template, so a system prompt has no place"):
        write_modelfile(tmp_path, OllamaModel("./m.gguf", 5, system="a"), tokenizer)


def test_a_system_prompt_that_cannot_take_effect_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match='the system prompt holds """'):
        modelfile(tmp_path, CHATML, system='a """ b')
    with pytest.raises(UserError, match="writes no system prompt"):
        modelfile(tmp_path, MISTRAL, system="a")


def test_commands_quote_their_paths(tmp_path: Path) -> None:
    create, start = ollama_commands("my models", "My mule")
    assert create == "ollama create my-mule -f 'my models/Modelfile'"
    assert start == "ollama run my-mule"
    file, licence = tmp_path / "m.gguf", tmp_path / "LICENSE"
    package, start = docker_commands(file, "me/mule:q4", num_ctx=64, licence=licence)
    assert package == (
        f"docker model package --gguf {file} --license {licence} --context-size 64 me/mule:q4"
    )
    assert start == "docker model run me/mule:q4"
    package, _ = docker_commands("my models/m.gguf", "m", num_ctx=64)  # no folder of the user's
    assert package.startswith("""docker model package --gguf "$PWD"/'my models/m.gguf' """)
