"""What the doctor found, on the screen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.text import Text

from mule.cli import render

if TYPE_CHECKING:
    from rich.console import Console

_STYLES = {"alarm": "bold red", "warning": "yellow", "note": "cyan"}


def show_findings(console: Console, result: dict[str, Any]) -> None:
    """The verdict, each finding with what to do, and what was looked at."""
    style = "bold green" if result["verdict"] == "healthy" else "bold yellow"
    head = f"{result['run']}: {result['kind']}, update {result['steps']:,} of {result['of']:,}"
    console.print(
        Text.assemble(head, f", {result['state']}: ", (result["verdict"], style)), soft_wrap=True
    )
    for finding in result["findings"]:
        severity = finding["severity"]
        console.print(
            Text.assemble(
                "\n",
                (severity, _STYLES[severity]),
                f"  {finding['code']} {finding['title']}, since update {finding['step']:,}",
            ),
            soft_wrap=True,
        )
        render.print_line(console, f"  {finding['what']}")
        render.print_line(console, f"  try  {finding['remedy']}")
    looked = result["looked"]
    looked = result["looked"]
    render.print_line(console, f"\nlooked at by {len(looked)} rules: {', '.join(looked)}")
    for lacking, rules in _by_lack(result["could_not_look"]).items():
        render.print_line(console, f"could not look, without {lacking}: {', '.join(rules)}")
    if "report" in result:
        render.print_line(console, f"report  {result['report']}")


def show_rule(console: Console, result: dict[str, Any]) -> None:
    """One rule in words."""
    console.print(Text(f"{result['code']} {result['title']}", style="bold"))
    render.print_line(console, result["summary"])
    for section in result["sections"]:
        console.print(Text.assemble("\n", (section["heading"], "bold")))
        render.print_line(console, section["text"])


def show_rules(console: Console, result: dict[str, Any]) -> None:
    """All rules as a table."""
    rows = [[rule["code"], rule["title"], rule["for"]] for rule in result["rules"]]
    render.print_table(console, "What mule doctor looks for", ["code", "sees", "in"], rows)


def _by_lack(unable: list[dict[str, Any]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for rule in unable:
        found.setdefault(rule["lacks"], []).append(rule["code"])
    return found
