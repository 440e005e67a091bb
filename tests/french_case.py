"""That a sentence is told in French to its last part."""

from __future__ import annotations

import re
import string

from mule.french import French, speaker
from mule.message import Message

# A setting or a command, which are the same in every language.
_TYPED = re.compile(r"(mule [a-z]+[^,;:?()]*|[\w.]+=\S+( [\w.]+=\S+)*|[A-Z_]+=\S+ mule train .*)")
_ENGLISH = re.compile(r"\b(the|of|and|with|was|were|is|are|than|its|from|updates?|rows)\b")


def assert_in_french(part: str, text: str) -> None:
    """The sentence of a part of Mule, such as `doctor`, has its French, and so has all within it.

    What a hole with !s or !r holds is told as it is: names, causes from a log, answers of a model.
    """
    say = speaker("fr", part)
    assert isinstance(say, French)
    _assert_told(say, text, part)


def _assert_told(say: French, text: str, part: str) -> None:
    if not isinstance(text, Message):
        told = say(text)
        assert not _ENGLISH.search(told) or _TYPED.fullmatch(text), f"{part}: no French for {text}"
        return
    parts = list(string.Formatter().parse(text.template))
    literals = "".join(literal for literal, *_ in parts)
    if re.search("[A-Za-z]{2}", literals) and not _TYPED.fullmatch(text):
        assert text.template in say.entries, f"{part}: no French for {text.template}"
    holes = [conversion for _, name, _, conversion in parts if name is not None]
    for value, conversion in zip(text.values, holes):
        if isinstance(value, str) and not conversion:
            _assert_told(say, value, part)
