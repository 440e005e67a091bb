"""Questions before something is changed that others see."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import typer

from mule.cli import export_tables, render
from mule.errors import UserError

if TYPE_CHECKING:
    from mule.commands.push import Plan


def agree(plan: Plan, *, as_json: bool) -> None:
    """Show what would be uploaded and ask; UserError where nobody can be asked, or says no."""
    told = plan.as_dict()
    if not any(file["change"] != "same" for file in told["files"]):
        return
    export_tables.show_push_plan(render.consoles(as_json)[1], told)
    if as_json or not sys.stdin.isatty():
        raise UserError("nobody is here to be asked", "look at the list, then: --yes")
    if not typer.confirm("Upload?", err=True):
        raise UserError("nothing was uploaded", "mule push --help")
