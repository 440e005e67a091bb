"""`mule data preview` and `stats` in the terminal; without colours, marks say what they would."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.text import Text

from mule.cli.render import print_line, print_table
from mule.commands.preview_text import heading, sections, title, verdicts, visible
from mule.figures import in_bytes

if TYPE_CHECKING:
    from rich.console import Console

ROLE_STYLES = {
    "system": "magenta",
    "user": "cyan",
    "assistant": "green",
    "tool": "yellow",
    "tools": "yellow",
    "template": "blue",
}
_VERDICT_STYLES = {"chosen": "green", "wanted": "green", "rejected": "red", "unwanted": "red"}
_BAR_CHARS = 40


def print_preview(console: Console, result: dict[str, Any]) -> None:
    """Each example as the model reads it, message by message."""
    coloured = console.color_system is not None
    print_line(console, f"tokenizer: {result['tokenizer']}")
    console.print(_legend(coloured), soft_wrap=True)
    for example in result["examples"]:
        console.print()
        console.print(Text(visible(heading(example, result)), style="bold"), soft_wrap=True)
        if example["kind"] == "preference":
            _print_pair(console, example, coloured)
        else:
            _print_example(console, example, coloured)
    console.print()
    if "html" in result:
        print_line(console, f"page  {result['html']}")


def _legend(coloured: bool) -> Text:
    legend = Text("learned: ", style="dim")
    legend.append(*(("like this", "green") if coloured else ("[[like this]]", "")))
    legend.append(" · special token: ")
    legend.append(*(("<|like this|>", "reverse") if coloured else ("«<|like this|>»", "")))
    legend.append(" · line break: ↵")
    return legend


# ---------------------------------------------------------------- one example


def _print_example(console: Console, example: dict[str, Any], coloured: bool) -> None:
    """The pieces of each message, below a line that says whose they are."""
    for message, shown in sections(example):
        if message is not None:
            style = ROLE_STYLES[message["role"]]
            console.print(_label(title(message), message, style, coloured), soft_wrap=True)
        text = Text()
        for before, piece, after in zip([{}, *shown], shown, [*shown[1:], {}], strict=False):
            if "notice" in piece:
                text.append(f"\n{piece['notice']}\n", "dim italic")
            elif coloured:
                _append_coloured(text, piece)
            else:
                opens = piece["trained"] and not before.get("trained")
                closes = piece["trained"] and not after.get("trained")
                text.append(f"{'[[' * opens}{_marked(piece)}{']]' * closes}")
        text.rstrip()
        console.print(text, soft_wrap=True)


def _label(who: str, message: dict[str, Any], style: str, coloured: bool) -> Text:
    """The line above a message; without colours, dashes set it apart from the text below."""
    counts = f"{message['tokens']:,} tokens"
    if message.get("trained"):
        counts += f", {message['trained']:,} learned"
    if not coloured:
        return Text(f"--- {who} · {counts}")
    return Text.assemble((f" {who} ", f"reverse {style}"), (f" {counts}", "dim"))


def _append_coloured(text: Text, piece: dict[str, Any]) -> None:
    style = ("green" if piece["trained"] else "") + (" reverse" if piece["special"] else "")
    first, *lines = visible(piece["text"]).split("\n")
    text.append(first, style)
    for line in lines:
        text.append("↵", "dim")
        text.append("\n")
        text.append(line, style)


def _marked(piece: dict[str, Any]) -> str:
    content = visible(piece["text"]).replace("\n", "↵\n")
    return f"«{content}»" if piece["special"] else content


def _print_pair(console: Console, example: dict[str, Any], coloured: bool) -> None:
    """What was asked, and the answers with their verdict."""
    for name, message in verdicts(example):
        style = _VERDICT_STYLES.get(name) or ROLE_STYLES[message["role"]]
        who = f"{name}: {message['role']}"
        console.print(_label(who, message, style, coloured), soft_wrap=True)
        console.print(Text(visible(message["text"])), soft_wrap=True)


# ---------------------------------------------------------------- stats


def print_stats(console: Console, result: dict[str, Any]) -> None:
    """Figures, lengths and sources of each prepared folder."""
    for part in result["parts"]:
        console.print(Text(part["folder"], style="bold"), soft_wrap=True)
        for name, words in _stats_lines(part):
            console.print(Text.assemble((f"{name:<11}", "dim"), words), soft_wrap=True)
        print_bars(console, part["histogram"])
        print_table(
            console,
            "",
            ["source", "size", "SHA-256"],
            [[s["file"], in_bytes(s["bytes"]), s["sha256"][:16]] for s in part["sources"]],
        )
        console.print()


def _stats_lines(part: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "integrity", "verified: every file is as it was written"
    rows = f"{part['rows']:,} of {part['row_length']:,} tokens, {part['fill']:.1%} full"
    yield (
        "rows",
        rows + (f", {part['examples_per_row']:.1f} examples a row" if part["packing"] else ""),
    )
    yield (
        "tokens",
        f"{part['tokens']:,}, of which {part['targets']:,} learned ({part['share_targets']:.1%})",
    )
    chat, count = part["kind"] == "chat", part["examples"]
    examples = f"{count:,} {'chat example' if chat else 'document'}{'s' * (count != 1)}"
    lost = [f"{part[what]:,} {what}" for what in ("dropped", "truncated") if part[what]]
    yield "examples", ", ".join([examples, *(lost or ["none left out or cut off"] * chat)])
    yield "split", part["split"]
    yield "tokenizer", part["tokenizer"][:16]
    lengths = part["lengths"]
    if lengths:
        words = [f"{name} {lengths[name]:,}" for name in ("min", "p5", "p50", "p95", "p99", "max")]
        yield "lengths", f"{' · '.join(words)} tokens"


def print_bars(console: Console, bins: Sequence[dict[str, int]]) -> None:
    """A bar for each bin of lengths."""
    most = max((each["count"] for each in bins), default=0)
    width = max((len(f"{each['from']:,}-{each['to']:,}") for each in bins), default=0)
    for each in bins:
        span = f"{each['from']:,}-{each['to']:,}"
        bar = "█" * round(_BAR_CHARS * each["count"] / most) or "▏" * bool(each["count"])
        console.print(Text(f"  {span:>{width}}  {bar} {each['count']:,}"), soft_wrap=True)
