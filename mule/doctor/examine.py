"""All rules on one history."""

from __future__ import annotations

from dataclasses import dataclass

from mule.doctor.finding import SEVERITIES, Finding, Rule
from mule.doctor.history import History
from mule.doctor.rules import all_rules


@dataclass(frozen=True)
class Examination:
    """What was found, which rules looked, and which could not, each with the figures it lacked."""

    findings: list[Finding]
    looked: list[Rule]
    unable: list[tuple[Rule, list[str]]]


def examination(history: History) -> Examination:
    """Ask every rule that is for this kind of run; the gravest findings first, then the earliest."""
    found = Examination([], [], [])
    for rule in all_rules():
        if history.kind not in rule.kinds:
            continue
        if missing := [name for name in rule.needs if not history.has(name)]:
            found.unable.append((rule, missing))
            continue
        found.looked.append(rule)
        if (seen := rule.check(history)) is not None:
            found.findings.append(Finding(rule.code, rule.title, seen))
    found.findings.sort(key=lambda f: (SEVERITIES.index(f.found.severity), f.found.step, f.code))
    return found


def examine(history: History) -> list[Finding]:
    """What the rules find, the gravest first, then by where it began."""
    return examination(history).findings
