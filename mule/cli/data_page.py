"""`mule data preview --html`: one page that needs nothing else; every text in it is escaped."""

from __future__ import annotations

from html import escape
from typing import Any

from mule.commands.preview_text import heading, sections, title, verdicts, visible

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Mule: data preview</title>
<style>
:root {{ color-scheme: light dark;
  --page: #fbfbfa; --box: #fff; --ink: #1f2328; --faint: #6a737d; --line: #d8dee4;
  --learned: #d3f0d8; --special: #e4e7eb; --learned-special: #7fd08f; --notice: #9a6700; }}
@media (prefers-color-scheme: dark) {{ :root {{
  --page: #15181c; --box: #1d2126; --ink: #dfe3e8; --faint: #949ea9; --line: #363c44;
  --learned: #17452a; --special: #3a414a; --learned-special: #2c8048; --notice: #d9a941; }} }}
body {{ margin: 2rem auto; max-width: 62rem; padding: 0 1rem; background: var(--page);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }}
h1 {{ font-size: 1.4rem; margin: 0 0 .5rem; }}
h2 {{ font-size: 1rem; margin: 0; padding: .7rem 1rem; border-bottom: 1px solid var(--line); }}
section {{ background: var(--box); border: 1px solid var(--line); border-radius: 8px;
  margin: 1.5rem 0; overflow: hidden; }}
.turn {{ display: grid; grid-template-columns: 9rem 1fr; border-top: 1px solid var(--line); }}
h2 + .turn {{ border-top: 0; }}
.who {{ padding: .7rem 1rem; font-weight: 600; }}
.who small {{ display: block; font-weight: 400; color: var(--faint); }}
pre {{ margin: 0; padding: .7rem 1rem; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 14px/1.6 ui-monospace, Menlo, Consolas, monospace; }}
b, i, em {{ font-weight: inherit; font-style: inherit; border-radius: 3px; }}
b {{ background: var(--learned); }}
i {{ background: var(--special); padding: 1px 2px; }}
b i {{ background: var(--learned-special); }}
s {{ text-decoration: none; color: var(--faint); user-select: none; }}
em {{ color: var(--notice); }}
@media (max-width: 40rem) {{ .turn {{ grid-template-columns: 1fr; }} .who {{ padding-bottom: 0; }} }}
</style>
<h1>What the model reads, and what it learns</h1>
<p><b>learned</b> · <i>special token</i> · <b><i>both</i></b> · line break <s>↵</s><br>
tokenizer: {tokenizer}</p>
{examples}
</html>
"""


def page(result: dict[str, Any]) -> str:
    """The page of a preview's result."""
    examples = "\n".join(_example(example, result) for example in result["examples"])
    return _PAGE.format(tokenizer=escape(result["tokenizer"]), examples=examples)


def _example(example: dict[str, Any], result: dict[str, Any]) -> str:
    turns = _pair(example) if example["kind"] == "preference" else _turns(example)
    title = escape(heading(example, result))
    return f"<section>\n<h2>{title}</h2>\n" + "\n".join(turns) + "\n</section>"


def _turns(example: dict[str, Any]) -> list[str]:
    """A block for each message, or for the document."""
    turns = []
    for message, shown in sections(example):
        content = "".join(map(_piece, shown))
        if message is None:
            turns.append(f"<pre>{content}</pre>")
            continue
        counts = f"{message['tokens']:,} tokens"
        counts += f"<br>{message['trained']:,} learned" if message["trained"] else ""
        turns.append(_turn(title(message), counts, content))
    return turns


def _pair(example: dict[str, Any]) -> list[str]:
    return [
        _turn(f"{name}: {m['role']}", f"{m['tokens']:,} tokens", _text(m["text"]))
        for name, m in verdicts(example)
    ]


def _turn(who: str, counts: str, content: str) -> str:
    """`counts` and `content` are HTML already."""
    name = f'<div class="who">{escape(who)}<small>{counts}</small></div>'
    return f'<div class="turn">{name}<pre>{content}</pre></div>'


def _piece(piece: dict[str, Any]) -> str:
    if "notice" in piece:
        return f"\n<em>{escape(piece['notice'])}</em>\n"
    content = _text(piece["text"])
    content = f"<i>{content}</i>" if piece["special"] else content
    return f"<b>{content}</b>" if piece["trained"] else content


def _text(text: str) -> str:
    return escape(visible(text)).replace("\n", "<s>↵</s>\n")
