"""What the doctor found, on the screen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.text import Text

from mule.cli import render
from mule.french import Speaker, speaker
from mule.message import Message

if TYPE_CHECKING:
    from rich.console import Console

_STYLES = {"alarm": "bold red", "warning": "yellow", "note": "cyan"}


def show_findings(console: Console, result: dict[str, Any]) -> None:
    """The verdict, each finding with what to do, and what was looked at."""
    language = result.get("language", "en")
    say = speaker(language, "doctor")
    style = "bold green" if result["verdict"] == "healthy" else "bold yellow"
    head = Message(
        "{!s}: {}, update {:,} of {:,}, {}: ",
        *(result[name] for name in ("run", "kind", "steps", "of", "state")),
    )
    verdict = Text(say(result["verdict"]), style=style)
    console.print(Text.assemble(say(head), verdict), soft_wrap=True)
    for finding in result["findings"]:
        _show_finding(console, finding, finding.get(language, finding), say)
    looked = result["looked"]
    told = Message("\nlooked at by {} rules: {}", len(looked), ", ".join(looked))
    render.print_line(console, say(told))
    for lacking, rules in _by_lack(result["could_not_look"]).items():
        told = Message("could not look, without {!s}: {!s}", lacking, ", ".join(rules))
        render.print_line(console, say(told))
    if "report" in result:
        render.print_line(console, f"report  {result['report']}")


def _show_finding(
    console: Console, finding: dict[str, Any], told: dict[str, str], say: Speaker
) -> None:
    """A finding, of which `told` has the texts in the language asked for."""
    severity = finding["severity"]
    since = Message(
        "  {!s} {!s}, since update {:,}", finding["code"], told["title"], finding["step"]
    )
    console.print(
        Text.assemble("\n", (say(severity), _STYLES[severity]), say(since)), soft_wrap=True
    )
    render.print_line(console, f"  {told['what']}")
    render.print_line(console, say(Message("  try  {!s}", told["remedy"])))


def show_rule(console: Console, result: dict[str, Any]) -> None:
    """One rule in words."""
    console.print(Text(f"{result['code']} {result['title']}", style="bold"))
    render.print_line(console, result["summary"])
    for section in result["sections"]:
        console.print(Text.assemble("\n", (section["heading"], "bold")))
        render.print_line(console, section["text"])


def show_rules(console: Console, result: dict[str, Any]) -> None:
    """All rules as a table."""
    say = speaker(result.get("language", "en"), "doctor")
    rows = [[rule["code"], say(rule["title"]), say(rule["for"])] for rule in result["rules"]]
    columns = [say(name) for name in ("code", "sees", "in")]
    render.print_table(console, say("What mule doctor looks for"), columns, rows)


def _by_lack(unable: list[dict[str, Any]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for rule in unable:
        found.setdefault(rule["lacks"], []).append(rule["code"])
    return found
