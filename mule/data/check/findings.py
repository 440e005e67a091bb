"""What a check finds: problems, each with a code, a severity and its first places."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")

MAX_PLACES = 5  # listed for one problem: enough to see what it is, the rest is counted
KEPT_PLACES = 1000  # at most, where more are asked for
_MAX_SHOWN_CHARS = 100  # of a text beside its place: a line of a terminal


@dataclass(frozen=True, slots=True)
class Place:
    """Where something was found; `text` is what stands there, shortened, secrets masked."""

    file: str
    line: int | None
    text: str = ""


@dataclass(slots=True)
class Finding:
    """How often something was found, and where first."""

    count: int = 0
    places: list[Place] = field(default_factory=list)

    def add(self, place: Place) -> None:
        self.count += 1
        if len(self.places) < KEPT_PLACES:
            self.places.append(Place(place.file, place.line, shorten(place.text)))


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing to know before training; `count` is how many rows it concerns, 0 for the whole."""

    severity: Severity
    code: str
    message: str
    hint: str = ""
    finding: Finding = field(default_factory=Finding)

    def as_dict(self, max_places: int = MAX_PLACES) -> dict[str, Any]:
        places = self.finding.places[:max_places]
        return {
            "severity": self.severity,
            "code": self.code,
            "file": places[0].file if places else None,
            "line": places[0].line if places else None,
            "message": self.message,
            "hint": self.hint,
            "count": self.finding.count,
            "places": [{"file": p.file, "line": p.line, "text": p.text} for p in places],
        }


def by_severity(problems: Iterator[Problem] | list[Problem]) -> list[Problem]:
    """Errors first, then warnings, then notes; each in the order found."""
    return sorted(problems, key=lambda problem: SEVERITIES.index(problem.severity))


def counted(count: int, noun: str) -> str:
    """`1 row`, `1,200 rows`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def are(count: int) -> str:
    """The verb for so many."""
    return "is" if count == 1 else "are"


def share_text(count: int, total: int) -> str:
    """`3.2%`; what is there but tiny is never 0."""
    share = count / max(1, total)
    return "under 0.1%" if 0 < share < 0.001 else f"{share:.1%}"


def shorten(text: str) -> str:
    """One line of at most a hundred characters, safe to print: data may hold terminal commands."""
    words = " ".join(text[: 2 * _MAX_SHOWN_CHARS].split())
    line = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in words)
    return line if len(line) <= _MAX_SHOWN_CHARS else f"{line[: _MAX_SHOWN_CHARS - 1]}…"
