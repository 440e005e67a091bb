"""The pages of the documentation: their headings, links and blocks, and the commands they show."""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_SHELLS = ("", "sh", "bash", "shell", "console", "text")
PROGRAMS = (
    *("mule", "make", "python", "pytest", "torchrun", "pip", "sbatch"),
    *("ollama", "docker", "curl", "git"),
)
_LINK = re.compile(r"\[[^\]]*\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)")
_CODE = re.compile(r"(?<!`)`([^`]+)`(?!`)")


@dataclass(frozen=True)
class Block:
    """What stands between two fences; `line` is its first."""

    page: str
    line: int
    language: str
    lines: tuple[str, ...]

    @property
    def text(self) -> str:
        return "\n".join(self.lines) + "\n"


@dataclass(frozen=True)
class Shown:
    """A command that a page shows, in a block or in the middle of a sentence."""

    page: str
    line: int
    words: tuple[str, ...]
    in_block: bool

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {shlex.join(self.words)}"


def pages() -> list[str]:
    """Every page, relative to the checkout."""
    files = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    return sorted(str(file.relative_to(ROOT)) for file in files)


@functools.cache
def parts(page: str) -> tuple[tuple[tuple[int, str], ...], tuple[Block, ...]]:
    """The numbered lines outside of blocks, and the blocks."""
    prose: list[tuple[int, str]] = []
    blocks: list[Block] = []
    fence, language, begun, inside = "", "", 0, []
    text = (ROOT / page).read_text(encoding="utf-8")
    for number, line in enumerate(text.splitlines(), start=1):
        mark = re.match(r"\s*(```+)\s*(\S*)", line)
        if fence and mark and mark[1] == fence:
            blocks.append(Block(page, begun, language, tuple(inside)))
            fence = ""
        elif fence:
            inside.append(line)
        elif mark:
            fence, language, begun, inside = mark[1], mark[2], number + 1, []
        else:
            prose.append((number, line))
    assert not fence, f"{page}:{begun - 1}: a block that does not end"
    return tuple(prose), tuple(blocks)


def anchors(page: str) -> set[str]:
    """The anchors of its headings, as GitHub makes them."""
    found: dict[str, int] = {}
    names = set()
    for _, line in parts(page)[0]:
        if heading := re.match(r"#{1,6}\s+(.+?)\s*#*$", line):
            title = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1]).replace("`", "")
            kept = "".join(c for c in title.lower() if c.isalnum() or c in " -_")
            name = kept.replace(" ", "-")
            count = found.get(name, 0)
            found[name] = count + 1
            names.add(f"{name}-{count}" if count else name)
    return names


def links(page: str) -> Iterator[tuple[int, str]]:
    """Line and target of every link and picture."""
    for number, line in parts(page)[0]:
        for match in _LINK.finditer(_CODE.sub("`code`", line)):
            yield number, match[1]


def inline_code(page: str) -> Iterator[tuple[int, str]]:
    """Line and text of what stands between backticks."""
    for number, line in parts(page)[0]:
        for match in _CODE.finditer(line):
            yield number, match[1].replace("\\|", "|")


def commands(page: str) -> list[Shown]:
    """Every command that the page shows, in its order."""
    found = [
        Shown(page, number, words, True)
        for block in parts(page)[1]
        if block.language in _SHELLS
        for number, text in _shell_lines(block)
        if (words := words_of(text)) and words[0] in PROGRAMS
    ]
    found += [
        Shown(page, number, words, False)
        for number, text in inline_code(page)
        if re.match(rf"(\$ )?(\.venv/bin/)?({'|'.join(PROGRAMS)}) ", text)
        and (words := words_of(text.removeprefix("$ ")))
    ]
    return sorted(found, key=lambda shown: shown.line)


def _shell_lines(block: Block) -> Iterator[tuple[int, str]]:
    """Its lines of commands: of a transcript those after a prompt; a backslash joins two."""
    is_transcript = any(line.startswith("$ ") for line in block.lines)
    joined, begun = "", 0
    for number, line in enumerate(block.lines, start=block.line):
        begun = begun if joined else number
        joined += line.removesuffix("\\")
        if line.endswith("\\"):
            continue
        if not is_transcript or joined.startswith("$ "):
            yield begun, joined.removeprefix("$ ").strip()
        joined = ""


def words_of(text: str) -> tuple[str, ...]:
    """The words of one command as a shell splits them, up to a pipe or a comment."""
    first = text.split(" ")[0].removeprefix(".venv/bin/")
    if first not in PROGRAMS:
        return ()
    lexer = shlex.shlex(re.sub(r"\$\w+", "1", text), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words = list(takewhile(lambda word: not set(word) <= set("|&;<>()"), lexer))
    return (first, *words[1:])
