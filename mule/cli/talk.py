"""The conversation of `mule chat` in the terminal: one line in, each reply as it is written."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mule.cli import render
from mule.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from mule.generate.conversation import Conversation, Reply

_HELP = """\
/system TEXT      set the system prompt, and start afresh (without TEXT: no system prompt)
/reset            forget the conversation
/retry            answer the last question again, with other random numbers
/save FILE.jsonl  add the conversation to a file of training data
/set NAME VALUE   {settings}
/quit             leave (also Ctrl-D); Ctrl-C stops a reply"""

# A model's reply must not move the cursor or rename the window: control characters are spelled.
_VISIBLE = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}
_VISIBLE |= {ord("\n"): "\n", ord("\t"): "\t"}


def run(
    sources: Sequence[str], prompt: str | None, given: dict[str, Any], *, as_json: bool
) -> dict[str, Any]:
    """One answer when there is a prompt, else a conversation; `given` are the options set."""
    from mule.commands import chat

    if as_json:
        if prompt is None:
            raise UserError("--json answers one prompt", "add --prompt TEXT")
        return chat.run(sources, prompt=prompt, **_settings(given))
    notices = render.consoles(as_json=False)[1]
    opened = chat.open_chat(sources, **_settings(given))
    try:
        if prompt is None:
            talk(opened, notices)
        else:
            _show(opened.ask(prompt), notices)
    finally:
        opened.close()
    return {}


def talk(chat: Conversation, notices: Console) -> None:
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
            render.print_line(notices, "\nstopped; this turn is not kept")


def _ask() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        return None


def _turn(chat: Conversation, line: str, notices: Console) -> None:
    word, _, rest = line.partition(" ")
    rest = rest.strip()
    if word == "/help":
        render.print_line(notices, _HELP.format(settings=", ".join(_settable(chat))))
    elif word == "/reset":
        chat.reset()
    elif word == "/retry":
        with chat.restoring():
            _answer(chat, chat.take_back(), notices)
    elif word == "/system":
        chat.system = rest or None
        chat.reset()
    elif word == "/save":
        _save(chat, rest, notices)
    elif word == "/set":
        _set(chat, rest)
    elif line.startswith("/") and " " not in line:
        raise UserError(f"no command {line}", "/help lists them")
    else:
        _answer(chat, line, notices)


def _answer(chat: Conversation, text: str, notices: Console) -> None:
    replies = chat.ask(text)
    _show(replies, notices)
    chat.keep(text, replies)


# ---------------------------------------------------------------- replies


def _show(replies: list[Reply], notices: Console) -> None:
    """Write the replies as they come; several under their names, then how they differ."""
    from mule.generate.conversation import differences

    for reply in replies:
        if len(replies) > 1:
            _say([f"[{reply.speaker.name}]"])
        _say(reply.stream())
        if line := _why_cut(reply):
            render.print_line(notices, line)
        if len(replies) > 1:
            _say([f"({reply.num_tokens} tokens, {reply.tokens_per_second:.1f} tokens/s)\n"])
    for difference in differences(replies):
        _say([difference_line(difference)])


def _say(pieces: Iterable[str]) -> None:
    """Write a line to stdout as its pieces come."""
    for piece in pieces:
        sys.stdout.write(piece.translate(_VISIBLE))
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()


def _why_cut(reply: Reply) -> str:
    if reply.reason == "length":
        return f"(cut after {reply.num_tokens} tokens: /set max_tokens or --max-tokens allows more)"
    if reply.reason == "context":
        return f"(cut: the context of {reply.speaker.engine.context_tokens:,} tokens is full)"
    return ""


def difference_line(difference: dict[str, Any]) -> str:
    """One reply beside the first one, in words."""
    pair = f"{difference['model']}: "
    if difference["same"]:
        return f"{pair}the same as {difference['than']}"
    place, after = difference["from_character"], difference["after"]
    where = f"after {_quoted(after)}" if after else "from the start"
    ends = {side: _quoted(difference[side]) or "nothing more" for side in ("here", "there")}
    return (
        f"{pair}first differs from {difference['than']} at character {place}, {where}: "
        f"{ends['here']} where {difference['than']} has {ends['there']}"
    )


def _quoted(text: str) -> str:
    return f'"{text.translate(_VISIBLE | {10: "⏎", 9: " "})}"' if text else ""


# ---------------------------------------------------------------- commands


def _save(chat: Conversation, rest: str, notices: Console) -> None:
    from mule.commands import chat as command

    if not rest:
        raise UserError("/save needs a file", "for example: /save chats.jsonl")
    num_rows = command.save(chat, Path(rest).expanduser())
    rows = "1 row" if num_rows == 1 else f"{num_rows} rows"
    render.print_line(notices, f"saved; {rest} has {rows} now. mule data check {rest}")


def _settable(chat: Conversation) -> list[str]:
    return [*(field.name for field in dataclasses.fields(chat.sampling)), "max_tokens"]


def _set(chat: Conversation, rest: str) -> None:
    name, _, text = rest.partition(" ")
    owner: Any = chat if name == "max_tokens" else chat.sampling
    if name not in (names := _settable(chat)):
        raise UserError(f"there is no setting `{name}`", f"one of {', '.join(names)}")
    try:
        value = type(getattr(owner, name))(text)
    except ValueError:
        raise UserError(f"`{text}` is not a number", f"for example: /set {name} 1") from None
    if owner is not chat:
        chat.sampling = dataclasses.replace(chat.sampling, **{name: value})
    elif value < 1:
        raise UserError(f"max_tokens is {value}; it must be 1 or more", "/set max_tokens 256")
    else:
        chat.max_tokens = value


def _settings(given: dict[str, Any]) -> dict[str, Any]:
    """The command line's options, the sampling ones gathered into one."""
    from mule.commands.chat import DEFAULTS
    from mule.generate.sampler import Sampling

    names = {field.name for field in dataclasses.fields(Sampling)}
    chosen = DEFAULTS | {name: value for name, value in given.items() if name in names}
    sampling = Sampling(**chosen)
    return {"sampling": sampling} | {k: v for k, v in given.items() if k not in names}
