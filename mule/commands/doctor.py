"""`mule doctor`: is a run healthy, since when not, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mule.errors import UserError
from mule.message import Message, joined
from mule.run import RUNS, Run

if TYPE_CHECKING:
    from mule.doctor.examine import Examination
    from mule.doctor.finding import Finding, Rule
    from mule.french import Language, Speaker

PART = "doctor"  # of Mule, whose sentences these are
HEADINGS = ("What it sees", "Why it matters", "What to do", "Source")


def run(
    run: str, *, root: Path = RUNS, report: bool = False, language: Language = "en"
) -> dict[str, Any]:
    """What every rule finds of a run; `ok` is false when an alarm stands.

    With `report`, also write report.md into its folder. In another language than English the result
    has each text in it too, under that language's name.
    """
    from mule.doctor.examine import examination
    from mule.doctor.history import read_history
    from mule.french import speaker

    opened = Run.open(run, root)
    history = read_history(opened)
    found = examination(history)
    result: dict[str, Any] = {
        "run": opened.name,
        "kind": history.kind,
        "state": opened.state(),
        "steps": history.step,
        "of": history.num_steps,
        "verdict": verdict(found.findings),
        "findings": [as_dict(finding) for finding in found.findings],
        "looked": [rule.code for rule in found.looked],
        "could_not_look": [
            {"code": rule.code, "title": rule.title, "lacks": ", ".join(missing)}
            for rule, missing in found.unable
        ],
        "ok": not any(finding.found.severity == "alarm" for finding in found.findings),
    }
    if language != "en":
        _add_told(result, language, speaker(language, PART))
    if report:
        from mule.commands.report import write_report

        result["report"] = str(write_report(opened))
    return result | {"next": _next(opened, found)}


def _add_told(result: dict[str, Any], language: Language, say: Speaker) -> None:
    """The verdict and each finding in that language, beside the English ones."""
    result |= {"language": language, language: {"verdict": say(result["verdict"])}}
    for finding in result["findings"]:
        finding[language] = {name: say(finding[name]) for name in ("title", "what", "remedy")}


def rules(*, language: Language = "en") -> dict[str, Any]:
    """Every rule, by its code; in another language than English with its title in that one too."""
    from mule.doctor.rules import all_rules

    listed = [{"code": rule.code, "title": rule.title, "for": _kinds(rule)} for rule in all_rules()]
    if language != "en":
        from mule.french import speaker

        say = speaker(language, PART)
        listed = [rule | {language: {"title": say(rule["title"])}} for rule in listed]
    return {
        "rules": listed,
        "language": language,
        "next": f"mule doctor --explain {listed[0]['code']}",
    }


def explain(code: str) -> dict[str, Any]:
    """What a rule sees, why it matters, what to do, and where that comes from."""
    from mule.doctor.rules import all_rules

    known = {rule.code: rule for rule in all_rules()}
    rule = known.get(code.upper())
    if rule is None:
        near = difflib.get_close_matches(code.upper(), known, n=3)
        hint = f"did you mean {', '.join(near)}? " if near else ""
        raise UserError(f"there is no rule `{code}`", f"{hint}all of them: mule doctor --rules")
    title, parts = explanation(rule)
    sections = [{"heading": heading, "text": text} for heading, text in parts.items()]
    said = {"code": rule.code, "title": rule.title, "summary": title}
    return {**said, "sections": sections, "next": "mule doctor RUN"}


def explanation(rule: Rule) -> tuple[str, dict[str, str]]:
    """The first line of a rule's docstring, and its text under each heading."""
    from mule.doctor.rules import rule_texts

    title, _, body = rule_texts()[rule.code].partition("\n\n")
    parts: dict[str, list[str]] = {}
    heading = ""
    for line in body.splitlines():
        start = next((name for name in HEADINGS if line.startswith(f"{name}:")), None)
        if start is not None:
            heading, line = start, line.removeprefix(f"{start}:")
        if heading:
            parts.setdefault(heading, []).append(line.strip())
    texts = {name: " ".join(lines).strip() for name, lines in parts.items()}
    return title, {name: text[:1].upper() + text[1:] for name, text in texts.items()}


def verdict(findings: Sequence[Finding]) -> str:
    """Healthy, or how many alarms and warnings stand."""
    counts = {
        word: sum(finding.found.severity == word for finding in findings)
        for word in ("alarm", "warning")
    }
    told = [_counted(count, word) for word, count in counts.items() if count]
    return joined(" and ", told) or Message("healthy")


def _counted(count: int, word: str) -> Message:
    if word == "alarm":
        return Message("{} alarm", count) if count == 1 else Message("{} alarms", count)
    return Message("{} warning", count) if count == 1 else Message("{} warnings", count)


def as_dict(finding: Finding) -> dict[str, Any]:
    """A finding as JSON has it."""
    found = finding.found
    return {
        "code": finding.code,
        "title": finding.title,
        "severity": found.severity,
        "step": found.step,
        "what": found.what,
        "remedy": found.remedy,
        "evidence": found.evidence,
    }


def _kinds(rule: Rule) -> str:
    from mule.doctor.finding import ALL_KINDS

    return "every run" if set(rule.kinds) == set(ALL_KINDS) else ", ".join(rule.kinds)


def _next(opened: Run, found: Examination) -> str:
    if found.findings:
        return f"mule doctor --explain {found.findings[0].code}"
    return f"mule doctor {opened.folder} --report"
