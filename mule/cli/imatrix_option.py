"""`--imatrix`, alone or with a file: an option whose value may be left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typer.core import TyperCommand

from mule.commands.importance import OWN_ROWS

_OPTION = "--imatrix"
# What follows is a file by its ending, and otherwise the next word: `--imatrix runs/my-run`.
_FILES = (".jsonl", ".json", ".txt", ".md", ".csv", ".tsv", ".parquet", ".gguf", ".gz", ".zst")


def with_values(words: list[str]) -> list[str]:
    """The words of a command, each `--imatrix` with a value: the file behind it, or OWN_ROWS."""
    given = []
    for place, word in enumerate(words):
        given.append(word)
        following = words[place + 1] if place + 1 < len(words) else ""
        is_file = following.endswith(_FILES) and not following.startswith("-")
        if word == _OPTION and not (is_file or following == OWN_ROWS or Path(following).is_file()):
            given.append(OWN_ROWS)
    return given


class ExportCommand(TyperCommand):
    """A command with `--imatrix`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, with_values(args))
