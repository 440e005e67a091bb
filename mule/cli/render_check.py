"""The page of `mule data check`: the verdict first, then figures, then what to mend and where."""

from __future__ import annotations

import os
import textwrap
from typing import TYPE_CHECKING, Any

from mule.cli import render

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

_STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}
_TITLES = {
    "error": "Mend before training",
    "warning": "Worth a look",
    "note": "Good to know",
}
_BAR_WIDTH = 32
_MAX_BINS = 8  # of the histogram: the page should fit a screen
_MAX_TURNS = 4  # lengths of conversations listed
_SHOWN_PLACES = 3  # of the five in the result
_MAX_FILES = 2  # named in the heading; of more, their folder
_BLOCKS = " ▏▎▍▌▋▊▉█"
_INDENT = "    "
_MAX_WIDTH = 110  # of a line of prose: longer ones are hard to read
_LABEL_WIDTH = 12


def print_check(console: Console, result: dict[str, Any]) -> None:
    """The whole page; plain text where the console is no terminal."""
    _print_heading(console, result)
    console.print()
    for label, text in _figures(result):
        _print_pair(console, label, text)
    if result["tokens"]["histogram"]:
        console.print()
        _print_histogram(console, result["tokens"], result["kind"])
    for severity, title in _TITLES.items():
        problems = [p for p in result["problems"] if p["severity"] == severity]
        if problems:
            console.print()
            console.print(_text(title, "bold"))
            for problem in problems:
                _print_problem(console, problem)
    console.print()


# ---------------------------------------------------------------- heading


def _print_heading(console: Console, result: dict[str, Any]) -> None:
    from rich.text import Text

    counts = {name: 0 for name in _TITLES}
    for problem in result["problems"]:
        counts[problem["severity"]] += 1
    if not result["ok"]:
        verdict, style = f"FIX FIRST: {_some(counts['error'], 'error')}", "bold red"
    elif counts["warning"]:
        verdict, style = f"FIT TO TRAIN, with {_some(counts['warning'], 'warning')}", "bold yellow"
    else:
        verdict, style = "FIT TO TRAIN", "bold green"
    heading = Text.assemble((verdict, style), ("   " + _named(result["files"]), "bold"))
    console.print(heading, soft_wrap=True)


def _named(files: list[dict[str, Any]]) -> str:
    names = [file["file"] for file in files]
    if len(names) <= _MAX_FILES:
        return ", ".join(names)
    return f"{len(names):,} files in {os.path.commonpath(names) or '.'}"


# ---------------------------------------------------------------- figures


def _figures(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    noun = result["kind"]
    formats = ", ".join(
        name if len(result["formats"]) == 1 else f"{name} {count:,}"
        for name, count in result["formats"].items()
    )
    unreadable = result["unreadable"]
    broken = f", {unreadable:,} more cannot be read" if unreadable else ""
    yield "rows", f"{_some(result['rows'], noun)} ({formats}){broken}"
    held = [f for f in result["files"] if f["part"] != "train"]
    if held:
        told = ", ".join(f"{f['rows']:,} in {f['file']}" for f in held[:_MAX_FILES])
        yield "held out", told
    yield "enough for", result["size"]["purpose"]
    yield from _token_figures(result["tokens"], result["trained_token_share"], noun)
    yield from _talk_figures(result)
    if spoken := result["languages"]["languages"]:
        scripts = result["languages"]["scripts"]
        told = _shares(spoken)
        if len(scripts) > 1:
            told += f"; letters: {_shares(scripts)}"
        yield "languages", f"{told} (of {result['languages']['sampled']:,} texts)"
    yield "repeated", _duplicates(result)
    yield "tokenizer", result["tokenizer"]
    if result["repaired"] is not None:
        yield "repaired", _repaired(result["repaired"])


def _token_figures(
    tokens: dict[str, Any], share: float | None, noun: str
) -> Iterator[tuple[str, str]]:
    if not tokens["total"]:
        return
    learned = "" if share is None else f", {share:.0%} of them learned"
    yield "tokens", f"{tokens['total']:,}{learned}"
    cut = f"; {tokens['too_long']:,} over data.max_seq_length={tokens['max_seq_length']:,}"
    parts = tokens["percentiles"]
    yield (
        "length",
        f"half up to {parts['p50']:,} tokens, 90% up to {parts['p90']:,}, 99% up to "
        f"{parts['p99']:,}, the longest {parts['max']:,}" + ("" if noun == "document" else cut),
    )


def _talk_figures(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if not result["roles"]:
        return
    roles = ", ".join(f"{name} {count:,}" for name, count in result["roles"].items())
    yield "messages", roles
    if turns := result["turns"]:
        shown = list(turns.items())[:_MAX_TURNS]
        told = ", ".join(f"{_some(turn, 'answer')} in {count:,} rows" for turn, count in shown)
        longest = result["talk"]["turns_longest"]
        more = f", up to {longest}" if longest > shown[-1][0] else ""
        tools = result["talk"]["with_tools"]
        yield "turns", f"{told}{more}" + (f"; {tools:,} rows call tools" if tools else "")


def _duplicates(result: dict[str, Any]) -> str:
    found, leaks = result["duplicates"], result["leaks"]
    told = f"{found['exact']:,} rows exactly, {found['near']:,} nearly ({found['share']:.1%})"
    if leaks["rows"]:
        told += (
            f"; of {leaks['rows']:,} held-out rows {leaks['exact'] + leaks['near']:,} in training"
        )
    return told


def _shares(shares: dict[str, float]) -> str:
    return ", ".join(f"{name} {share:.0%}" for name, share in shares.items())


def _repaired(copies: dict[str, int]) -> str:
    if not copies:
        return "nothing: no text is double-encoded, so no copy was written"
    return "; ".join(f"{_some(count, 'text')} in {file}" for file, count in copies.items())


def _print_histogram(console: Console, tokens: dict[str, Any], noun: str) -> None:
    from rich.text import Text

    bins = _few_bins(tokens["histogram"])
    most = max(entry["rows"] for entry in bins)
    limit = None if noun == "document" else tokens["max_seq_length"]
    for entry in bins:
        span = f"{entry['from']:,}-{entry['to']:,}"
        over = limit is not None and entry["from"] > limit
        bar = _bar(entry["rows"] / most)
        line = Text.assemble(
            (f"{span:>17} ", "dim"), (bar, "red" if over else "green"), f" {entry['rows']:,}"
        )
        if over:
            line.append(" too long", style="red")
        console.print(line, soft_wrap=True)


def _few_bins(bins: list[dict[str, int]]) -> list[dict[str, int]]:
    """The shortest lengths together where there are too many bins for a page."""
    surplus = len(bins) - _MAX_BINS
    if surplus <= 0:
        return bins
    first, rest = bins[: surplus + 1], bins[surplus + 1 :]
    rows = sum(entry["rows"] for entry in first)
    return [{"from": first[0]["from"], "to": first[-1]["to"], "rows": rows}, *rest]


def _bar(share: float) -> str:
    """A bar of block characters; what is there is never invisible."""
    eighths = round(share * _BAR_WIDTH * 8)
    if share > 0:
        eighths = max(1, eighths)
    return "█" * (eighths // 8) + _BLOCKS[eighths % 8].strip()


# ---------------------------------------------------------------- problems


def _print_problem(console: Console, problem: dict[str, Any]) -> None:
    from rich.text import Text

    width = min(_MAX_WIDTH, console.width) - len(_INDENT)
    lines = textwrap.wrap(problem["message"], width, break_on_hyphens=False) or [""]
    mark = {"error": "✗", "warning": "!", "note": "·"}[problem["severity"]]
    console.print(
        Text.assemble((f"  {mark} ", _STYLES[problem["severity"]]), lines[0]), soft_wrap=True
    )
    for line in lines[1:]:
        render.print_line(console, _INDENT + line)
    _print_places(console, problem)
    for line in _hint_lines(problem["hint"], width):
        console.print(Text.assemble(_INDENT, (line, "italic")), soft_wrap=True)


def _hint_lines(hint: str, width: int) -> list[str]:
    """A hint with a command stays on one line, to be copied."""
    if "mule data " in hint:
        return [hint]
    return textwrap.wrap(hint, width, break_on_hyphens=False, break_long_words=False)


def _print_places(console: Console, problem: dict[str, Any]) -> None:
    """A line for each place; of a note, one line for all."""
    from rich.text import Text

    places, message = problem["places"], problem["message"]
    more = problem["count"] - len(places)
    if problem["severity"] == "note":
        told = ", ".join(_where(place, places[0]) for place in places)
        if told:
            told += f" and {more:,} more" if more > 0 else ""
            render.print_line(console, f"{_INDENT}  {told}")
        return
    more += max(0, len(places) - _SHOWN_PLACES)
    for place in places[:_SHOWN_PLACES]:
        text = "" if message.startswith(place["text"]) else place["text"]
        line = Text.assemble(_INDENT, "  ", (_where(place), "bold"), (f"  {text}", "dim"))
        line.rstrip()
        console.print(line, soft_wrap=True)
    if more > 0:
        console.print(_text(f"{_INDENT}  and {more:,} more", "dim"))


def _where(place: dict[str, Any], before: dict[str, Any] | None = None) -> str:
    """file:line; only :line after a place in the same file."""
    if place["line"] is None:
        return place["file"]
    again = before is not None and before is not place and before["file"] == place["file"]
    return f"{'' if again else place['file']}:{place['line']}"


def _print_pair(console: Console, label: str, text: str) -> None:
    from rich.text import Text

    width = min(_MAX_WIDTH, console.width) - _LABEL_WIDTH
    lines = textwrap.wrap(text, width, break_on_hyphens=False, break_long_words=False)
    for number, line in enumerate(lines):
        name = label if number == 0 else ""
        console.print(Text.assemble((f"{name:<{_LABEL_WIDTH}}", "dim"), line), soft_wrap=True)


def _text(text: str, style: str) -> Any:
    from rich.text import Text

    return Text(text, style=style)


def _some(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
