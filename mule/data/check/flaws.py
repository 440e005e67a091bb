"""Flaws one can see in a text alone: broken characters, leftovers of templates, pages and forms."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mule.data.check.encoding import first_repair
from mule.data.check.findings import Finding, Problem, Severity, counted, share_text
from mule.data.check.row import CheckRow

# From this share of the rows on, a flaw is what the model learns, not an accident.
_LEARNED_SHARE = 0.2
_REFUSAL_SHARE = 0.01  # a model picks refusing up from few examples
_REFUSAL_CHARS = 300  # a refusal is said at the beginning of an answer

_Found = tuple[int, str]  # position, what to show


@dataclass(frozen=True, slots=True)
class _Flaw:
    """A flaw: where it is in a text, how bad it is, and at what share it gets worse."""

    code: str
    what: str
    hint: str
    find: Callable[[str], _Found | None]
    severity: Severity = "warning"
    worse_from: float | None = None  # share of the rows from which it is one severity higher
    answers_only: bool = False


def _pattern(pattern: str, clue: str, flags: int = 0) -> Callable[[str], _Found | None]:
    """Finds `pattern`, looked for only in texts that hold a character of `clue`."""
    compiled = re.compile(pattern, flags)

    def find(text: str) -> _Found | None:
        if clue and not any(character in text for character in clue):
            return None
        match = compiled.search(text)
        return (match.start(), match[0]) if match else None

    return find


def _control_character(text: str) -> _Found | None:
    match = _CONTROL.search(text)
    return (match.start(), f"U+{ord(match[0]):04X}") if match else None


_CONTROL = re.compile(
    r"[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]"
)  # not those that end a line or page
_MARKUP = (
    r"\[/?INST\]|<</?SYS>>|<\|(?:im_start|im_end|im_sep|system|user|assistant|end|eot_id"
    r"|start_header_id|end_header_id|begin_of_text|end_of_text|endoftext|pad)\|>"
    r"|<(?:start|end)_of_turn>|^### (?:Instruction|Response|Input|Human|Assistant):"
)
_REFUSAL = (
    r"\b(?:as an (?:ai|artificial intelligence)(?: language)? (?:model|assistant)"
    r"|i(?:'|’)?m (?:just )?an ai(?: language model)?\b"
    r"|i(?:'m| am) sorry, (?:but )?i (?:can(?:'|’)?t|cannot|am unable)"
    r"|i (?:cannot|can(?:'|’)t) (?:fulfill|assist with|help with) (?:that|this|your))"
)

_FLAWS = (
    _Flaw(
        "mojibake",
        "double-encoded text",
        "mule data check PATH --fix-encoding writes repaired copies",
        first_repair,
        worse_from=0.1,  # one row in ten: the model would write it so
    ),
    _Flaw(
        "placeholder",
        "a placeholder that was never filled in",
        "replace {{name}} and the like by the real words: the model would say them as they stand",
        _pattern(
            r"(?<!\$)\{\{ ?[A-Za-z_][\w. ]{0,30}\}\}"
            r"|\[(?:YOUR|INSERT|ENTER|ADD) [A-Z ]{2,30}\]|<(?:YOUR|INSERT)[_ ][A-Z_ ]{2,30}>",
            "{[<",
        ),
        worse_from=_LEARNED_SHARE,
    ),
    _Flaw(
        "markup",
        "the markup of a chat template inside a text",
        "split such rows into messages: Mule writes the markup itself, "
        "and reads what is typed as plain characters",
        _pattern(_MARKUP, "<[#", re.MULTILINE),
        worse_from=_LEARNED_SHARE,
    ),
    _Flaw(
        "replacement",
        "U+FFFD, a character that was lost",
        "take the text from its source again, or remove these rows",
        _pattern("\ufffd+", "\ufffd"),
        worse_from=_LEARNED_SHARE,
    ),
    _Flaw(
        "control",
        "a control character",
        "remove it: it stands for nothing a reader sees",
        _control_character,
    ),
    _Flaw(
        "html",
        "leftovers of HTML",
        "clean them, unless the model is meant to write HTML",
        _pattern(r"&(?:amp|nbsp|quot|lt|gt|#\d{2,5});|<br ?/?>|</(?:p|div|span|td|li)>", "&<"),
        severity="note",
    ),
    _Flaw(
        "refusal",
        "a refusal in the answer",
        'remove "As an AI language model..." unless the model is meant to refuse',
        _pattern(_REFUSAL, "", re.IGNORECASE),
        severity="note",
        worse_from=_REFUSAL_SHARE,
        answers_only=True,
    ),
)
_HIGHER: dict[Severity, Severity] = {"note": "warning", "warning": "error", "error": "error"}


class Flaws:
    """Counts the rows with each flaw."""

    def __init__(self) -> None:
        self._findings = {flaw.code: Finding() for flaw in _FLAWS}
        self._num_rows = 0

    def add(self, row: CheckRow) -> None:
        self._num_rows += row.starts
        for flaw in _FLAWS:
            texts = [a[:_REFUSAL_CHARS] for a in row.answers] if flaw.answers_only else row.texts
            for text in texts:
                if (found := flaw.find(text)) is not None:
                    place = row.place(found[1], found[0], text)
                    self._findings[flaw.code].add(place)
                    break

    def problems(self) -> Iterator[Problem]:
        for flaw in _FLAWS:
            finding = self._findings[flaw.code]
            if not finding.count:
                continue
            share = finding.count / max(1, self._num_rows)
            worse = flaw.worse_from is not None and share >= flaw.worse_from
            severity = _HIGHER[flaw.severity] if worse else flaw.severity
            rows = f"{counted(finding.count, 'row')} ({share_text(finding.count, self._num_rows)})"
            yield Problem(severity, flaw.code, f"{rows} with {flaw.what}", flaw.hint, finding)
