"""What Ollama and Docker Model Runner need beside a GGUF file."""

from __future__ import annotations

import shlex
from pathlib import Path

from mule import fsio
from mule.errors import ModelError
from mule.tokenizer.template import ChatTemplate

# Written out, because Ollama before 0.30 ignores the template inside the file.
_CHATML = """\
{{- range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""
_CHATML_STOPS = ("<|im_start|>", "<|im_end|>")
_PROBES = (
    [{"role": "user", "content": " a \n"}],
    [
        {"role": "system", "content": "b\n"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": " d "},
        {"role": "user", "content": "<e>"},
    ],
)


def write_modelfile(
    out_dir: Path | str,
    gguf_name: str,
    chat_template: str | None,
    *,
    num_ctx: int,
    system: str | None = None,
) -> Path:
    """Write `out_dir`/Modelfile for the GGUF file `gguf_name` beside it.

    A template that writes ChatML is written out in Ollama's own language, with its stop words;
    another one is left to Ollama >= 0.30, which runs the template inside the file. Without a
    template the model only continues text.
    """
    file = Path(out_dir) / "Modelfile"
    lines = [f"FROM ./{gguf_name}"]
    if chat_template is None:
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    elif is_chatml(chat_template):
        lines.append(f'TEMPLATE """{_CHATML}"""')
        lines += [f'PARAMETER stop "{stop}"' for stop in _CHATML_STOPS]
    else:
        lines.append("REQUIRES 0.30.0")
    lines.append(f"PARAMETER num_ctx {num_ctx}")
    if system is not None:
        if '"""' in system:
            raise ModelError(
                'the system prompt holds """, which ends it in a Modelfile', "use other quotes"
            )
        lines.append(f'SYSTEM """{system}"""')
    fsio.write_text(file, "\n".join(lines) + "\n")
    return file


def is_chatml(chat_template: str) -> bool:
    """Whether a template writes ChatML and nothing else, found by running it on two chats."""
    template = ChatTemplate(chat_template, {})
    for messages in _PROBES:
        turns = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages]
        try:
            text = template.render(messages, add_generation_prompt=True)
        except ModelError:
            return False
        if text != "".join(turns) + "<|im_start|>assistant\n":
            return False
    return True


def ollama_commands(out_dir: Path | str, name: str) -> list[str]:
    """The two commands that bring the Modelfile in `out_dir` to life."""
    modelfile = shlex.quote(str(Path(out_dir) / "Modelfile"))
    return [f"ollama create {name} -f {modelfile}", f"ollama run {name}"]


def docker_commands(gguf_file: Path | str, name: str, *, num_ctx: int) -> list[str]:
    """The two commands for Docker Model Runner, which wants an absolute path."""
    file = shlex.quote(str(gguf_file))
    if not Path(gguf_file).is_absolute():
        file = f'"$PWD"/{file}'
    return [
        f"docker model package --gguf {file} --context-size {num_ctx} {name}",
        f"docker model run {name}",
    ]
