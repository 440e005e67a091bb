"""The command line as a page: `python -m mule.cli.reference` prints it (docs/cli.md)."""

from __future__ import annotations

import re
import sys
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from mule.cli.main import app
from mule.errors import CheckFailed, Interrupted, MuleError, UserError

_HEAD = """\
# Commands

<!-- Generated from mule/cli by `make docs`; edit the verb's file there. -->

`mule VERB --help` says the same in the terminal. Of every verb:

- `--json` ends what it prints with one JSON object on a line, for scripts; notes go to stderr.
- It ends by naming the next command.
- Settings are given as `section.key=value`; [settings](configuration.md) lists them.
- `--debug`, anywhere, shows the traceback of an error.

## Exit codes

| code | means |
|--:|---|
"""
_SIGNALS = {2: "Ctrl-C", 15: "SIGTERM"}


def reference() -> str:
    """The page: exit codes, a table of the verbs, then each with its arguments and options."""
    command = typer.main.get_command(app)
    assert isinstance(command, TyperGroup)
    context = command.make_context("mule", [], resilient_parsing=True)
    verbs = list(_leaves(command, context))
    listed = "".join(
        f"| [`{name}`](#{name.replace(' ', '-')}) | {_first_line(verb)} |\n"
        for name, verb, _ in verbs
    )
    parts = [
        _HEAD + "".join(f"| {code} | {meaning} |\n" for code, meaning in _exit_codes()),
        f"## Verbs\n\n| verb | does |\n|---|---|\n{listed}",
        *(_section(*verb) for verb in verbs),
        f"## mule\n\n{_table('option', _records(command, context, 'option'))}",
    ]
    return "\n".join(parts)


def _exit_codes() -> list[tuple[int, str]]:
    stopped = [
        (Interrupted(number, "").exit_code, f"stopped by {name}, after saving; `--resume` goes on")
        for number, name in _SIGNALS.items()
    ]
    assert MuleError.exit_code == CheckFailed.exit_code
    return [
        (0, "done"),
        (CheckFailed.exit_code, "a check failed, an alarm stands, or a defect of Mule"),
        (UserError.exit_code, "the input cannot work: nothing was written; the hint says the edit"),
        *stopped,
    ]


def _leaves(group: TyperGroup, context: Any, before: str = "mule") -> Any:
    """Name, command and context of every verb, those of a group together."""
    for part in group.list_commands(context):
        command = group.commands[part]
        if command.hidden:
            continue
        name = f"{before} {part}"
        inner = command.make_context(name, [], parent=context, resilient_parsing=True)
        if isinstance(command, TyperGroup):
            yield from _leaves(command, inner, name)
        else:
            yield name, command, inner


def _section(name: str, command: TyperCommand, context: Any) -> str:
    usage = " ".join([name, *command.collect_usage_pieces(context)])
    parts = [f"## {name}\n\n{_flowing(command.help or '')}\n\n```text\n{usage}\n```\n"]
    for kind in ("argument", "option"):
        if records := _records(command, context, kind):
            parts.append(_table(kind, records))
    return "\n".join(parts)


def _records(command: Any, context: Any, kind: str) -> list[tuple[str, str]]:
    """The parameters of one kind: how each is written, and what it is."""
    found = [
        param.get_help_record(context)
        for param in command.get_params(context)
        if param.param_type_name == kind
    ]
    return [record for record in found if record is not None]


def _table(kind: str, records: list[tuple[str, str]]) -> str:
    rows = "".join(f"| `{_cell(name)}` | {_cell(text)} |\n" for name, text in records)
    return f"| {kind} | |\n|---|---|\n{rows}"


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", r"\|")


def _flowing(text: str) -> str:
    """Paragraphs without the line breaks of the source."""
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


def _first_line(command: TyperCommand) -> str:
    return _cell((command.help or "").split("\n\n")[0])


if __name__ == "__main__":
    sys.stdout.write(reference())
