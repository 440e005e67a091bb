"""Words of a command line, read by the CLI's own parser; nothing is run."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from mule.cli.main import app
from mule.config.knobs import knobs
from mule.config.layers import read_overrides
from mule.config.load import load_recipe
from mule.errors import ConfigError

_DEPENDS = "cannot take effect"  # beside other settings, which the recipe of the command may have


@functools.cache
def root() -> TyperGroup:
    """The command `mule`."""
    command = typer.main.get_command(app)
    assert isinstance(command, TyperGroup)
    return command


def verb(words: Sequence[str]) -> tuple[str, TyperCommand | TyperGroup | None]:
    """The verb that the words after `mule` begin with, and its command; None where there is none."""
    command: Any = root()
    name = ""
    for word in words:
        if not isinstance(command, TyperGroup) or word.startswith("-"):
            break
        name, command = f"{name} {word}".strip(), command.commands.get(word)
    return name, command


def parse(words: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The verb that the words after `mule` name, and what it is given.

    Raises typer's error where the words do not fit, `typer.Exit` for --help and --version.
    """
    command: Any = root()
    context = command.make_context("mule", list(words))
    name = ""
    while isinstance(command, TyperGroup):
        rest = [*context._protected_args, *context.args]
        part, command, rest = command.resolve_command(context, rest)
        name = f"{name} {part}".strip()
        assert command is not None
        context = command.make_context(part, rest, parent=context)
    return name, context.params


def setting_problems(words: Sequence[str]) -> list[str]:
    """What is wrong with `section.key=value` words of a recipe, each taken alone."""
    problems = []
    for word in words:
        found = read_overrides([word], 1).problems
        if not found:
            try:
                load_recipe(None, [word], complete=False)
            except ConfigError as error:
                found = [problem for problem in error.problems if _DEPENDS not in problem]
        problems += found
    return problems


def is_setting(word: str) -> bool:
    """Whether a word is meant as a setting of a recipe."""
    key = word.partition("=")[0]
    return "=" in word and (key in knobs() or re.fullmatch(r"[a-z_]+(\.\w+)+", key) is not None)
