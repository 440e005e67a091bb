"""The conversation of `mule chat` in the terminal: one line in, the reply as it is written."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mule.cli import render
from mule.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from mule.commands.chat import Chat

_HELP = """\
/reset            forget the conversation
/retry            answer the last question again
/system TEXT      set the system prompt, and start afresh
/set NAME VALUE   temperature, top_k, top_p, min_p, repeat_penalty, seed or max_tokens
/quit             leave (also Ctrl-D); Ctrl-C stops a reply"""

_DEFAULTS: dict[str, Any] = {
    "temperature": 0.7,
    "min_p": 0.05,
}  # lively, and nothing that is very unlikely


def run(source: str, prompt: str | None, given: dict[str, Any], *, as_json: bool) -> dict[str, Any]:
    """One answer when there is a prompt, else a conversation; `given` are the options set."""
    from mule.commands import chat

    if as_json:
        if prompt is None:
            raise UserError("--json answers one prompt", "add --prompt TEXT")
        return chat.run(source, prompt=prompt, **_settings(given))
    opened = chat.open_chat(source, **_settings(given))
    try:
        if prompt is None:
            talk(opened, render.consoles(as_json=False)[1])
        else:
            say(opened.reply(prompt))
    finally:
        opened.engine.close()
    return {}


def say(pieces: Iterator[str]) -> None:
    """Write a reply to stdout as it comes."""
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def talk(chat: Chat, notices: Console) -> None:
    """Ask and answer until the end of the input."""
    with contextlib.suppress(ImportError):  # line editing, where Python has it
        import readline  # noqa: F401

    if sys.stdin.isatty():
        render.print_line(notices, "type a message; /help lists the commands")
    while (line := _ask()) is not None:
        if line in ("/quit", "/exit"):
            return
        try:
            if line:
                _turn(chat, line, notices)
        except UserError as error:
            render.print_error(notices, error.message, error.hint)
        except KeyboardInterrupt:
            render.print_line(notices, "\nstopped; this reply is not kept")


def _ask() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        return None


def _turn(chat: Chat, line: str, notices: Console) -> None:
    word, _, rest = line.partition(" ")
    if word == "/help":
        render.print_line(notices, _HELP)
    elif word == "/reset":
        chat.reset()
    elif word == "/retry":
        say(chat.retry())
    elif word == "/system":
        chat.system = rest.strip() or None
        chat.reset()
    elif word == "/set":
        _set(chat, rest)
    elif line.startswith("/") and " " not in line:
        raise UserError(f"no command {line}", "/help lists them")
    else:
        say(chat.reply(line))


def _set(chat: Chat, rest: str) -> None:
    name, _, text = rest.partition(" ")
    owner = chat if name == "max_tokens" else chat.sampling
    names = [field.name for field in dataclasses.fields(chat.sampling)] + ["max_tokens"]
    if name not in names:
        raise UserError(f"there is no setting `{name}`", f"one of {', '.join(names)}")
    try:
        value = type(getattr(owner, name))(text)
    except ValueError:
        raise UserError(f"`{text}` is not a number", f"for example: /set {name} 1") from None
    if owner is chat:
        chat.max_tokens = max(1, int(value))
    else:
        chat.sampling = dataclasses.replace(chat.sampling, **{name: value})


def _settings(given: dict[str, Any]) -> dict[str, Any]:
    """The command line's options, the sampling ones gathered into one."""
    from mule.generate.sampler import Sampling

    names = {field.name for field in dataclasses.fields(Sampling)}
    chosen = _DEFAULTS | {name: value for name, value in given.items() if name in names}
    sampling = Sampling(**chosen)
    return {"sampling": sampling} | {k: v for k, v in given.items() if k not in names}
