"""docs/cli.md names every verb, argument and option, and the exit codes that errors have."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from typer.core import TyperGroup

from mule.cli.reference import reference
from mule.commands.docs_cli import cli_markdown
from mule.errors import BusyError, CheckFailed, ConfigError, DataError, Interrupted, UserError
from tests.cli_words import root


def _verbs(group: TyperGroup, before: str = "mule") -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if isinstance(command, TyperGroup):
            yield from _verbs(command, f"{before} {name}")
        else:
            yield f"{before} {name}", command


def test_every_verb_has_a_section_with_all_it_takes() -> None:
    page = reference()
    sections = dict(re.findall(r"^## (mule\b.*)\n\n((?s:.*?))(?=^## |\Z)", page, re.MULTILINE))
    verbs = dict(_verbs(root()))
    assert sections.keys() == verbs.keys() | {"mule"}
    for name, command in [*verbs.items(), ("mule", root())]:
        text = sections[name]
        assert name == "mule" or " ".join((command.help or "").split()[:4]) in text
        for param in command.params:
            words = param.opts if param.param_type_name == "option" else [param.metavar or ""]
            assert all(word.replace("|", r"\|") in text for word in words), (name, words)
    listed = re.findall(r"^\| \[`(mule .+?)`\]\(#(.+?)\) \|", page, re.MULTILINE)
    assert {name for name, _ in listed} == verbs.keys()
    assert all(anchor == name.replace(" ", "-") for name, anchor in listed)


def test_the_exit_codes_are_those_of_the_errors() -> None:
    codes = {int(code) for code in re.findall(r"^\| (\d+) \| ", reference(), re.MULTILINE)}
    assert codes == {
        0,
        CheckFailed.exit_code,
        UserError.exit_code,
        Interrupted(2, "").exit_code,
        Interrupted(15, "").exit_code,
    }
    for kind in (ConfigError, DataError, BusyError):
        assert kind.exit_code in codes


def test_the_page_is_what_the_program_prints() -> None:
    assert cli_markdown() == reference()
