"""docs/doctor-rules.md: every rule of `mule doctor`, from its own docstring."""

from __future__ import annotations

from mule.commands.doctor import explanation
from mule.doctor.finding import ALL_KINDS
from mule.doctor.rules import all_rules

PAGE = "doctor-rules.md"
_TEXT = """\
# What `mule doctor` looks for

<!-- Generated from mule/doctor/rules by `make docs`; edit the rule's file there. -->

One rule a kind of trouble. An **alarm** means that what is learned is lost or wrong, a **warning** that
something will hurt, a **note** that something is good to know. `mule doctor RUN` asks them all,
`mule doctor --explain CODE` prints one. How often they are right was measured: see
[docs/accuracy.md](accuracy.md); [Is my run healthy?](is-my-run-healthy.md) shows them on real runs.

"""
_GROUPS = {
    "1": "Loss",
    "2": "Gradient norm and batch",
    "3": "Learning rate and schedule",
    "4": "Learning by heart",
    "5": "Data and labels",
    "6": "Memory and speed",
    "7": "Experts",
    "8": "Adapter and base",
}


def rules_markdown() -> str:
    """The page: a table of all rules, then each in its own words."""
    rules = all_rules()
    table = ["| code | sees | in |", "| --- | --- | --- |"]
    for rule in rules:
        every = set(rule.kinds) == set(ALL_KINDS)
        kinds = "every run" if every else ", ".join(rule.kinds)
        table.append(
            f"| [{rule.code}](#{_anchor(rule.code, rule.title)}) | {rule.title} | {kinds} |"
        )
    parts = [_TEXT + "\n".join(table) + "\n"]
    group = ""
    for rule in rules:
        if rule.code[1] != group:
            group = rule.code[1]
            parts.append(f"## {_GROUPS.get(group, 'More')}\n")
        summary, sections = explanation(rule)
        said = [f"### {rule.code} {rule.title}\n", f"{summary}\n"]
        said += [f"- **{heading}.** {text}" for heading, text in sections.items()]
        parts.append("\n".join(said) + "\n")
    return "\n".join(parts)


def _anchor(code: str, title: str) -> str:
    """As Markdown viewers make it of a heading."""
    kept = "".join(c for c in f"{code} {title}".lower() if c.isalnum() or c in " -")
    return kept.replace(" ", "-")
