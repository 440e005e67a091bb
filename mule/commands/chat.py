"""`mule chat`: talk to a run, a folder, an adapter or a GGUF file, or to several side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mule.errors import UserError

if TYPE_CHECKING:
    from mule.adapters.source import Source
    from mule.generate.conversation import Conversation, Talker
    from mule.generate.sampler import Sampling


DEFAULTS: dict[str, Any] = {"temperature": 0.7, "min_p": 0.05}  # lively, and nothing very unlikely


@dataclass(frozen=True)
class Setting:
    """How an answer is drawn, as a form asks for it: what is usual, and from where to where."""

    name: str
    usual: float
    low: float
    high: float | None
    step: float
    help: str


SETTINGS = (
    Setting(
        "temperature",
        DEFAULTS["temperature"],
        0,
        2,
        0.05,
        "Divides the logits; 0 always takes the best token.",
    ),
    Setting("top_p", 1, 0.01, 1, 0.01, "Of the best tokens that make up this share; 1: of all."),
    Setting("top_k", 0, 0, None, 1, "Of so many best tokens; 0: of all."),
    Setting(
        "min_p",
        DEFAULTS["min_p"],
        0,
        0.99,
        0.01,
        "Of those this likely beside the best; 0: of all.",
    ),
    Setting("max_tokens", 256, 1, None, 1, "The longest answer, in tokens."),
    Setting("seed", 0, 0, 2**32 - 1, 1, "The random numbers; the same seed draws the same."),
)


def open_chat(
    sources: Sequence[str],
    *,
    sampling: Sampling,
    base: str | None = None,
    mlx: bool = False,
    context: int | None = None,
    **settings: Any,
) -> Conversation:
    """Load what each of `sources` names; `settings` are Conversation's max_tokens and system."""
    from contextlib import ExitStack

    from mule import progress
    from mule.adapters.source import find_source
    from mule.generate.conversation import Conversation, Speaker

    found = [find_source(text, base=base) for text in sources]
    names = distinct_names(sources, [source.name for source in found])
    with ExitStack() as opened:
        speakers = []
        for name, source in zip(names, found, strict=True):
            with progress.task(f"Loading {name}"):
                engine = _open(source, mlx=mlx, context=context)
            opened.callback(engine.close)
            speakers.append(Speaker(name, engine))
        opened.pop_all()
    return Conversation(speakers, sampling, **settings)


def run(sources: Sequence[str], *, prompt: str, **settings: Any) -> dict[str, Any]:
    """One answer of each model to one prompt: its text, token count and speed.

    Of several models `answers` has each one's, and `differences` how they part.
    """
    from mule.generate.conversation import differences

    chat = open_chat(sources, **settings)
    try:
        replies = chat.ask(prompt)
        for reply in replies:
            for _ in reply.stream():
                pass
    finally:
        chat.close()
    answers = [reply.as_dict() for reply in replies]
    if len(answers) == 1:
        return {"prompt": prompt} | answers[0]
    return {"prompt": prompt, "answers": answers, "differences": differences(replies)}


def save(chat: Conversation, file: Path) -> int:
    """Add the conversation to a JSONL file of training data; the rows that the file has now.

    Raises UserError when nothing was said, or the file is no JSONL.
    """
    return _add_rows(chat.rows(), file)


def save_said(said: Sequence[tuple[str, Sequence[dict[str, str]]]], file: Path) -> dict[str, Any]:
    """The same of messages by the name of who answered, as the chat page keeps them."""
    from mule.generate.conversation import training_rows

    num_rows = _add_rows(training_rows(said), file)
    return {"file": str(file), "rows": num_rows, "next": f"mule data check {file}"}


def _add_rows(rows: Sequence[dict[str, Any]], file: Path) -> int:
    from mule import fsio

    if file.suffix != ".jsonl":
        raise UserError(
            f"{file}: conversations are saved as JSONL, a row each",
            f"for example: /save {file.with_suffix('.jsonl')}",
        )
    with fsio.explain_storage(file):
        before = file.read_bytes() if file.exists() else b""
    if before and not before.endswith(b"\n"):
        before += b"\n"
    lines = [json.dumps(row, ensure_ascii=False, allow_nan=False).encode() for row in rows]
    with fsio.atomic_file(file) as stream:
        stream.write(before + b"".join(line + b"\n" for line in lines))
    return before.count(b"\n") + len(rows)


def distinct_names(sources: Sequence[str], names: Sequence[str]) -> list[str]:
    """What each model is called: its short name, and as it was typed where two are alike.

    Raises UserError when a model is named twice.
    """
    for text in sources:
        if list(sources).count(text) > 1:
            raise UserError(f"{text} is named twice", "name each model once")
    return [
        text if list(names).count(name) > 1 else name
        for text, name in zip(sources, names, strict=True)
    ]


def _open(source: Source, *, mlx: bool, context: int | None) -> Talker:
    if mlx:
        return _open_on_mlx(source, context)
    from mule.commands.serve import open_engine

    return open_engine(source, context=context, max_rows=1)


def _open_on_mlx(source: Source, context: int | None) -> Talker:
    if source.gguf_file is not None:
        raise UserError(
            f"{source.gguf_file}: a GGUF file runs in llama.cpp, and --mlx is Apple's mlx-lm",
            "leave --mlx out, or name the run or folder the file was made from",
        )
    if context is not None:
        raise UserError(
            "--context has no effect with --mlx, whose cache grows as it is needed",
            "leave --context out",
        )
    import torch

    from mule.commands.lineage import lineage_of
    from mule.generate.stream_talker import StreamTalker
    from mule.train.mlx.decoder import load_on_mlx

    precision = "bf16" if torch.backends.mps.is_available() else "fp32"
    is_chat = lineage_of(source).get("kind", "chat") == "chat"
    return StreamTalker(*load_on_mlx(source, precision), chat=is_chat)
