"""What Mule says, told in French: sentences from a catalogue, figures as French writes them.

A catalogue is a file french.json of a part of Mule: in each of its sections English templates, as
`Message` has them, or fixed words, and what each is in French. A hole of a French template stands
for the one at its place in the English template, or has that one's number where the order differs.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Literal

from mule import fsio
from mule.message import Message

Language = Literal["en", "fr"]
Speaker = Callable[[str], str]
CATALOGUE = "french.json"
_UNITS = {"days": "jours", "bytes": "octets", "GiB": "Gio", "MiB": "Mio", "KiB": "Kio"}
_UNIT = "nats|s|min|h|days|bytes|GiB|MiB|KiB"
_FIGURE = re.compile(
    r"(?P<number>[-+]?\d[\d,]*(\.\d+)?(e[-+]?\d+)?)(?P<letter>[TBM%]?)"
    rf"( (?P<unit>{_UNIT}))?(?P<mark> \?)?"
)
_NARROW, _FIXED = "\u202f", "\u00a0"  # spaces at which no line ends


def speaker(language: Language, part: str) -> Speaker:
    """What tells the sentences of a part of Mule, such as `doctor`, in that language."""
    if language == "en":
        return str
    return French(Path(__file__).parent / part / CATALOGUE)


def retold(value: Any, say: Speaker, *, kept: Collection[str]) -> Any:
    """A copy of a result with all its texts told, but for those of the keys in `kept`."""
    if isinstance(value, dict):
        return {
            key: item if key in kept else retold(item, say, kept=kept)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [retold(item, say, kept=kept) for item in value]
    return say(value) if isinstance(value, str) else value


class French:
    """Tells messages and fixed words in French; what the catalogue does not hold stays as it is."""

    def __init__(self, catalogue: Path) -> None:
        sections: dict[str, dict[str, str]] = fsio.read_json(catalogue)
        self.entries = {
            english: spaced(french)
            for section in sections.values()
            for english, french in section.items()
        }

    def __call__(self, text: str) -> str:
        if not isinstance(text, Message):
            return self.entries.get(text) or figure(text)
        french = self.entries.get(text.template)
        if french is None and re.search("[A-Za-z]{2}", _literals(text.template)):
            return str(text)
        return (french or _frame(text.template)).format(*self._values(text))

    def _values(self, message: Message) -> list[str]:
        told = []
        holes = [hole for hole in string.Formatter().parse(message.template) if hole[1] is not None]
        for value, (before, _, spec, conversion) in zip(message.values, holes):
            if isinstance(value, str) and not spec and not conversion:
                told.append(self(value))
                continue
            shown = format(repr(value) if conversion == "r" else value, spec or "")
            is_setting = before.endswith("=")  # for the machine to read
            is_figure = isinstance(value, (int, float)) and not is_setting
            told.append(figure(shown) if is_figure else shown)
        return told


def figure(text: str) -> str:
    """1,234.5% as French writes it; a text that is no figure, as it is."""
    found = _FIGURE.fullmatch(text)
    if found is None:
        return text
    number = found["number"].replace(",", _NARROW).replace(".", ",")
    letter = f"{_NARROW}%" if found["letter"] == "%" else found["letter"]
    unit = f"{_FIXED}{_UNITS.get(found['unit'], found['unit'])}" if found["unit"] else ""
    return number + letter + unit + (f"{_NARROW}?" if found["mark"] else "")


def spaced(text: str) -> str:
    """With the spaces that French has before : ; ! ? % and inside its quotation marks."""
    text = re.sub(" ([;!?%])", rf"{_NARROW}\1", text).replace(" :", f"{_FIXED}:")
    return text.replace("« ", f"«{_FIXED}").replace(" »", f"{_FIXED}»")


def _literals(template: str) -> str:
    return "".join(literal for literal, *_ in string.Formatter().parse(template))


def _frame(template: str) -> str:
    """A template without words, such as `{}: {:.3f}`, with French spaces and bare holes."""
    parts = []
    for literal, name, _, _ in string.Formatter().parse(template):
        literal = re.sub("([:;]) ", r" \1 ", literal).replace("{", "{{").replace("}", "}}")
        parts.append(literal + ("" if name is None else "{}"))
    return spaced("".join(parts))
