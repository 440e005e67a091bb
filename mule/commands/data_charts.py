"""The figures of a check and of prepared rows as bars: what a page plots, and lists as a table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

_MAX_BARS = 30  # of names; the rest is one bar


def of_check(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Lengths, what is learned, turns, roles, files and languages of `mule data check`."""
    return [chart for chart in _of_check(result) if chart["bars"]]


def _of_check(result: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    tokens, noun = result["tokens"], f"{result['kind']}s"
    limit = tokens.get("max_seq_length") if result["kind"] != "document" else None
    yield _chart(
        "Length",
        "tokens",
        noun,
        [
            (f"{each['from']:,} to {each['to']:,}", each["rows"], _is_over(each["from"], limit))
            for each in tokens["histogram"]
        ],
        note=f"Marked: longer than data.max_seq_length = {limit:,}." if limit else "",
    )
    learned = tokens.get("trained", 0)
    if result["trained_token_share"] is not None:
        read = tokens["total"] - learned
        yield _chart("What is learned", "part", "tokens", [("learned", learned), ("read", read)])
    longest = f"The longest conversation has {result['talk']['turns_longest']:,} answers."
    yield _chart("Turns", "answers", noun, result["turns"].items(), note=longest)
    yield _chart("Messages", "role", "messages", result["roles"].items())
    files = [(f"{each['file']} ({each['part']})", each["rows"]) for each in result["files"]]
    yield _chart("Sources", "file", "rows", files)
    spoken = result["languages"]
    note = f"Of {spoken['sampled']:,} texts that were sampled."
    for title, key in (("Languages", "languages"), ("Scripts", "scripts")):
        if len(spoken[key]) > (key == "scripts"):  # one script says nothing
            bars = [(name, round(100 * share, 1)) for name, share in spoken[key].items()]
            yield _chart(title, key.removesuffix("s"), "percent", bars, note=note)


def of_stats(part: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Lengths and sources of one part of `mule data stats`."""
    lengths = [(f"{each['from']:,} to {each['to']:,}", each["count"]) for each in part["histogram"]]
    sources = [(each["file"], each["bytes"]) for each in part["sources"]]
    charts = [
        _chart("Length of prepared examples", "tokens", "examples", lengths),
        _chart("Sources of the rows", "file", "bytes", sources),
    ]
    return [chart for chart in charts if chart["bars"]]


def _is_over(length: int, limit: int | None) -> bool:
    return limit is not None and length > limit


def _chart(
    title: str, of: str, unit: str, bars: Iterable[tuple[Any, ...]], *, note: str = ""
) -> dict[str, Any]:
    """`of` is what the bars are named by, `unit` what they count."""
    told = [
        {"name": str(name), "value": value, "marked": bool(marks and marks[0])}
        for name, value, *marks in bars
    ]
    if len(told) > _MAX_BARS:
        rest = sum(bar["value"] for bar in told[_MAX_BARS:])
        others = f"{len(told) - _MAX_BARS:,} others"
        told = [*told[:_MAX_BARS], {"name": others, "value": rest, "marked": False}]
    return {"title": title, "of": of, "unit": unit, "bars": told, "note": note}
