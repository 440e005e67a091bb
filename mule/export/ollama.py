"""What Ollama and Docker Model Runner need beside a GGUF file."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from mule import fsio
from mule.errors import ModelError, UserError
from mule.export.ollama_template import OllamaTemplate, ollama_template, takes_system
from mule.tokenizer import Tokenizer

MODELFILE = "Modelfile"
_JINJA_SINCE = "0.30.0"  # of Ollama: runs the template inside the file
_NO_NAME = re.compile(r"[^a-z0-9._-]+")
_MAX_LICENCE_CHARS = 50_000


@dataclass(frozen=True)
class OllamaModel:
    """What a Modelfile says: the GGUF file it begins with, by its path from the Modelfile, and more.

    `adapter`: the path of a GGUF adapter on that file. `licence`: its text, or its name.
    """

    base: str
    num_ctx: int
    system: str | None = None
    adapter: str | None = None
    licence: str | None = None


def write_modelfile(folder: Path, model: OllamaModel, tokenizer: Tokenizer) -> list[str]:
    """Write `folder`/Modelfile; returns what about it should be known.

    The chat template is written out in Ollama's own language, with its stop words, where that can
    be done exactly; another one is left to Ollama >= 0.30, which runs the template inside the file.
    Without a chat template the model only continues text. Raises UserError for a system prompt that
    cannot take effect.
    """
    _check_system(model.system, tokenizer)
    lines, notes = [f"FROM {model.base}"], []
    if model.adapter is not None:
        lines.append(f"ADAPTER {model.adapter}")
    template = ollama_template(tokenizer) if tokenizer.chat_template else None
    if tokenizer.chat_template is None:
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    elif template is not None:
        lines.append(f'TEMPLATE """{template.text}"""')
        notes += template.notes
    else:
        lines.append(f"REQUIRES {_JINJA_SINCE}")
        notes.append(
            "its chat template cannot be written in Ollama's language: Ollama must be "
            f"{_JINJA_SINCE} or newer, which runs the template inside the file"
        )
    lines += [f'PARAMETER stop "{stop}"' for stop in _stops(tokenizer, template)]
    lines.append(f"PARAMETER num_ctx {model.num_ctx}")
    if model.system is not None:
        lines.append(f'SYSTEM """{model.system}"""')
    licence = model.licence or ""
    if licence and '"""' not in f'{licence}"' and len(licence) <= _MAX_LICENCE_CHARS:
        lines.append(f'LICENSE """{licence}"""')
    fsio.write_text(folder / MODELFILE, "\n".join(lines) + "\n")
    return notes


def _check_system(system: str | None, tokenizer: Tokenizer) -> None:
    if system is None:
        return
    if '"""' in f'{system}"':
        raise ModelError(
            'the system prompt holds """, or ends with ", which ends it in a Modelfile',
            "use other quotes",
        )
    if tokenizer.chat_template is None:
        raise UserError(
            "the model has no chat template, so a system prompt has no place",
            "leave --system away",
        )
    if not takes_system(tokenizer):
        raise UserError(
            "the model's chat template writes no system prompt: it would have no effect",
            "leave --system away, or put the text into the first message",
        )


def _stops(tokenizer: Tokenizer, template: OllamaTemplate | None) -> list[str]:
    """The texts of the tokens that end an answer, and the one that begins a user's turn."""
    texts = [tokenizer.token_text(token) for token in tokenizer.stop_ids]
    if template is not None:
        spans = tokenizer.special_spans(template.user_start)
        texts = [template.user_start[start:end].strip() for start, end in spans[:1]] + texts
    return [text for text in dict.fromkeys(texts) if text and not set('"\n') & set(text)]


def ollama_commands(out_dir: Path | str, name: str) -> list[str]:
    """The two commands that bring the Modelfile in `out_dir` to life."""
    modelfile = shlex.quote(str(Path(out_dir) / MODELFILE))
    name = command_name(name)
    return [f"ollama create {name} -f {modelfile}", f"ollama run {name}"]


def docker_commands(
    gguf_file: Path | str, name: str, *, num_ctx: int, licence: Path | None = None
) -> list[str]:
    """The two commands for Docker Model Runner, which wants absolute paths."""
    name = command_name(name)
    more = f" --license {_from_here(licence)}" if licence else ""
    return [
        f"docker model package --gguf {_from_here(gguf_file)}{more} --context-size {num_ctx} {name}",
        f"docker model run {name}",
    ]


def _from_here(file: Path | str) -> str:
    quoted = shlex.quote(str(file))
    return quoted if Path(file).is_absolute() else f'"$PWD"/{quoted}'


def command_name(name: str) -> str:
    """A name that both programs take: small letters, digits, and . _ - (a tag and owner may stay)."""
    parts = re.split(r"([/:])", name.lower())
    kept = [p if p in "/:" else _NO_NAME.sub("-", p).strip("-.") for p in parts]
    return "".join(kept) or "model"
