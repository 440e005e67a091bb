"""A report's parts, and how they become markdown; mule/lab/page.py makes the page of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mule.lab.plots import Figure


@dataclass(frozen=True)
class Text:
    """A paragraph; `kind` note is set apart, warning stands out."""

    words: str
    kind: str = ""


@dataclass(frozen=True)
class Items:
    """A list of short statements."""

    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    """Rows under column heads; the first column names the row, the others are figures.

    `words` are the columns, by place, that hold text.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: Sequence[int] = ()


@dataclass(frozen=True)
class Figures:
    """Plots that stand side by side where there is room."""

    figures: Sequence[Figure]


Block = Text | Items | Table | Figures


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    title: str
    blocks: Sequence[Block] = field(default=())


@dataclass(frozen=True)
class Document:
    """A report: its title, a line below it, its sections."""

    title: str
    subtitle: str
    sections: Sequence[Section]

    @property
    def figures(self) -> list[Figure]:
        blocks = [block for section in self.sections for block in section.blocks]
        return [f for block in blocks if isinstance(block, Figures) for f in block.figures]


def to_markdown(document: Document, figures_dir: str) -> str:
    """The report as markdown, with pictures as files in `figures_dir`, a relative path."""
    parts = [f"# {_plain(document.title)}", _plain(document.subtitle)]
    for section in document.sections:
        parts.append(f"## {_plain(section.title)}")
        parts += [_markdown(block, figures_dir) for block in section.blocks]
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown(block: Block, figures_dir: str) -> str:
    if isinstance(block, Text):
        words = _plain(block.words)
        return {"warning": f"> **Warning.** {words}", "note": f"> {words}"}.get(block.kind, words)
    if isinstance(block, Items):
        return "\n".join(f"- {_plain(item)}" for item in block.items)
    if isinstance(block, Table):
        return _markdown_table(block)
    return "\n\n".join(
        f"![{_plain(f.title)}]({figures_dir}/{f.name}.svg)\n\n*{_plain(f.title)}.* "
        f"{_plain(f.description)}"
        for f in block.figures
    )


def _markdown_table(table: Table) -> str:
    marks = ["---" if p == 0 or p in table.words else "--:" for p in range(len(table.columns))]
    lines = [_row(table.columns), f"|{'|'.join(marks)}|", *(_row(row) for row in table.rows)]
    return f"*{_plain(table.caption)}*\n\n" + "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_plain(cell).replace("|", "\\|") for cell in cells) + " |"


def _plain(text: str) -> str:
    """Text that markdown would take for markup, and names that would be HTML, made harmless."""
    for mark in ("\\", "*", "_", "`", "[", "]"):
        text = text.replace(mark, f"\\{mark}")
    return text.replace("<", "&lt;").replace("\n", " ")
