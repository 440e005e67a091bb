"""A report as one HTML page that needs nothing else: no scripts, no fonts, no files beside it."""

from __future__ import annotations

import re
from html import escape

from mule.lab.document import Block, Document, Items, Section, Table, Text
from mule.lab.plot_style import style_sheet
from mule.lab.plots import Figure

_STYLE = """
:root { color-scheme: light dark; --page: #f6f7f8; --box: #ffffff; --ink: #1f2328;
  --faint: #59636e; --line: #d8dee4; --head: #eef1f4; --warn: #fff6dc; --edge: #b07d00;
  --link: #0060a8; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --box: #1d2126; --ink: #e3e7eb;
  --faint: #a5b0bb; --line: #363e47; --head: #262c33; --warn: #3a3018; --edge: #d9a941;
  --link: #6cb6ff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); overflow-wrap: break-word;
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { margin: 0 auto; max-width: 92rem; padding: 1.5rem clamp(.9rem, 3vw, 3rem) 4rem; }
header { margin: 1rem 0 1.5rem; }
h1 { font-size: clamp(1.5rem, 1.2rem + 1.4vw, 2.2rem); line-height: 1.2; margin: 0 0 .4rem; }
header p { margin: 0; color: var(--faint); max-width: 50rem; }
nav ul { list-style: none; display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; padding: 0;
  margin: 1rem 0 0; }
a { color: var(--link); }
section { background: var(--box); border: 1px solid var(--line); border-radius: 10px;
  margin: 1.2rem 0; padding: 1.1rem clamp(.9rem, 2vw, 2rem) 1.4rem; }
h2 { font-size: 1.3rem; margin: 0 0 .7rem; }
p, li { max-width: 58rem; }
section > p, section > ul { margin: .6rem 0; }
ul { padding-left: 1.3rem; }
.note { color: var(--faint); font-size: .92rem; }
.warning { background: var(--warn); border-left: 4px solid var(--edge); padding: .6rem .9rem;
  border-radius: 4px; }
.scroll { overflow-x: auto; margin: 1rem 0; border: 1px solid var(--line); border-radius: 8px;
  max-width: max-content; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .93rem; }
caption { text-align: left; padding: .6rem .8rem; color: var(--faint); position: sticky; left: 0;
  max-width: min(58rem, 84vw); }
th, td { padding: .4rem .8rem; border-top: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
th { background: var(--head); font-weight: 600; }
tbody th { background: var(--box); position: sticky; left: 0; }
th:first-child, .words { text-align: left; }
td.words { white-space: normal; min-width: 11rem; }
.figures { display: grid; gap: 1.4rem 2rem; margin: 1.2rem 0;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 25rem), 1fr)); }
figure { margin: 0; max-width: 32rem; }
figcaption { font-size: .92rem; color: var(--faint); }
figcaption b { color: var(--ink); }
@media (max-width: 40rem) { th, td { padding: .35rem .55rem; }
  tbody th { max-width: 40vw; white-space: normal; } }
@media print { section { break-inside: avoid-page; border: 0; } nav { display: none; } }
"""
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}{plots}</style>
</head>
<body>
<main>
<header><h1>{title}</h1>
<p>{subtitle}</p>
<nav aria-label="Sections"><ul>{links}</ul></nav></header>
{sections}
</main>
</body>
</html>
"""


def to_page(document: Document) -> str:
    """The whole page; every text in it is escaped."""
    links = "".join(
        f'<li><a href="#{_anchor(section.title)}">{escape(section.title)}</a></li>'
        for section in document.sections
    )
    return _PAGE.format(
        title=escape(document.title),
        subtitle=escape(document.subtitle),
        style=_STYLE,
        plots=style_sheet(),
        links=links,
        sections="\n".join(_section(section) for section in document.sections),
    )


def _section(section: Section) -> str:
    anchor = _anchor(section.title)
    blocks = "\n".join(_block(block) for block in section.blocks)
    return (
        f'<section aria-labelledby="{anchor}"><h2 id="{anchor}">{escape(section.title)}</h2>\n'
        f"{blocks}\n</section>"
    )


def _block(block: Block) -> str:
    if isinstance(block, Text):
        kind = f' class="{block.kind}"' if block.kind else ""
        return f"<p{kind}>{escape(block.words)}</p>"
    if isinstance(block, Items):
        return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in block.items) + "</ul>"
    if isinstance(block, Table):
        return _table(block)
    return f'<div class="figures">{"".join(_figure(f) for f in block.figures)}</div>'


def _table(table: Table) -> str:
    """In a box that scrolls by itself, and that the keyboard reaches."""
    kinds = [
        ' class="words"' if place in table.words else "" for place in range(len(table.columns))
    ]
    head = "".join(
        f'<th scope="col"{kind}>{escape(column)}</th>' for kind, column in zip(kinds, table.columns)
    )
    rows = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td{kind}>{escape(cell)}</td>" for kind, cell in zip(kinds[1:], row[1:]))
        + "</tr>"
        for row in table.rows
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(table.caption)}">'
        f"<table><caption>{escape(table.caption)}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _figure(figure: Figure) -> str:
    return (
        f"<figure>{figure.svg}<figcaption><b>{escape(figure.title)}.</b> "
        f"{escape(figure.description)}</figcaption></figure>"
    )


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
