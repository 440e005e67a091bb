"""WikiText: tokenised articles, each after a line ` = Title = `; every article is a document.

`wikitext=keep` gives an article as published, from its title line to the next. `clean` undoes the
tokenising, in this order:
1. A heading ` = = Name = = ` becomes the line `Name`.
2. `<unk>` is removed (with the space before it).
3. ` @-@ `, ` @,@ ` and ` @.@ ` become `-`, `,` and `.` without spaces.
4. The space before , . ; : ! ? % ) ] } and before 's 't 're 've 'll 'd 'm goes, the space after
   ( [ { and after a $ before a digit, and the spaces around a dash – between digits.
5. Double quotes open and close in turn within a line: the spaces inside them go.
6. Space at the ends of lines goes, several spaces become one, several empty lines become one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from mule.data.sources.format import Format
from mule.data.sources.items import Document
from mule.data.sources.text import split

_TITLE = re.compile(r"^(?= = [^=\s].* = ?(?:\n|\Z))", re.MULTILINE)
_HEADING = re.compile(r"^ ?(?P<marks>=(?: =)*) (?P<name>.*?) (?P=marks) ?$", re.MULTILINE)
_CLEANING = (
    (_HEADING, r"\g<name>"),
    (re.compile(r" ?<unk>"), ""),
    (re.compile(r" ?@([-,.])@ ?"), r"\1"),
    (re.compile(r" +([,.;:!?%)\]}])"), r"\1"),
    (re.compile(r" +'(s|t|re|ve|ll|d|m)\b"), r"'\1"),
    (re.compile(r"([(\[{]|\$(?= \d)) +"), r"\1"),
    (re.compile(r"(?<=\d) – (?=\d)"), "–"),
    (re.compile(r'" *([^"\n]*?) *"'), r'"\1"'),
    (re.compile(r" {2,}"), " "),
    (re.compile(r"^ +| +$", re.MULTILINE), ""),
    (re.compile(r"\n{3,}"), "\n\n"),
)


def is_wikitext(start: str) -> bool:
    """Whether a text begins as WikiText does: its first line is a title."""
    stripped = start.lstrip("\n \t")
    first = start[start.rfind("\n", 0, len(start) - len(stripped)) + 1 :].split("\n", 1)[0]
    return _TITLE.match(first) is not None


def documents(file: str, parts: Iterable[tuple[str, int]], *, clean: bool) -> Iterator[Document]:
    """The articles in `parts`."""
    for piece in split(parts, _TITLE):
        text = cleaned(piece.text) if clean else piece.text
        yield Document(text, file, piece.line, piece.ends)


def cleaned(text: str) -> str:
    """An article without the marks of tokenising; what was `<unk>` is lost."""
    for pattern, replacement in _CLEANING:
        text = pattern.sub(replacement, text)
    return text.strip("\n") + "\n"


FORMAT = Format(
    "wikitext",
    "document",
    "WikiText's tokenised articles, kept as published or cleaned (data.wikitext)",
)
