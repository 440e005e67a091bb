"""What a rule is, and what it finds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mule.doctor.history import History, Kind

# alarm: what is learned is lost or wrong; warning: it will hurt; note: good to know.
Severity = Literal["alarm", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("alarm", "warning", "note")
ALL_KINDS: tuple[Kind, ...] = ("pretrain", "fine-tune", "adapter")


@dataclass(frozen=True)
class Found:
    """What a rule's `check` returns.

    `step` is the update at which it began, `what` one sentence with the figures, `remedy` the exact
    setting or command, `evidence` the figures by name.
    """

    severity: Severity
    step: int
    what: str
    remedy: str
    evidence: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rule:
    """One kind of trouble. A rule is one file: its docstring has the headings that docs print.

    `code` is such as D101, `title` a few words. `needs` is what it cannot look without: figures of
    the rows, `samples`, or keys of facts.json as `facts.<key>`.
    """

    code: str
    title: str
    check: Callable[[History], Found | None]
    kinds: Sequence[Kind] = ALL_KINDS
    needs: Sequence[str] = ("loss",)


@dataclass(frozen=True)
class Finding:
    """What was found of a run, by which rule."""

    code: str
    title: str
    found: Found
