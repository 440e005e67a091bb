"""The generated part of docs/serve.md: a server under load, as bench/load.py measured it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mule import fsio

PAGE = "serve.md"
_NOTHING_YET = "Not measured yet: `python -m bench.load run`.\n"
_COLUMNS = (
    *("clients", "requests", "left", "hostile", "429", "errors", "requests/s", "tokens/s"),
    *("first token p50 / p99", "whole answer p50 / p99", "memory", "descriptors"),
)


def load_markdown(results: Path) -> str:
    """A row for each number of clients, and a line for each further part."""
    file = results / "load.json"
    if not file.is_file():
        return _NOTHING_YET
    found = fsio.read_json(file)
    rows = [_row(load) for load in found["load"]]
    rule = ["--:"] * len(_COLUMNS)
    table = "".join(f"| {' | '.join(line)} |\n" for line in (_COLUMNS, rule, *rows))
    return f"{table}\n{''.join(f'- {line}' for line in _lines(found))}\n{_measured(found)}"


def _row(load: dict[str, Any]) -> list[str]:
    first, whole = load["first_token_s"], load["latency_s"]
    return [
        str(load["clients"]),
        f"{load['requests']:,}",
        f"{load['hung_up']:,}",
        f"{load['hostile']:,}",
        f"{load['busy']:,}",
        f"**{load['errors']:,}**",
        f"{load['requests_per_second']:,.0f}",
        f"{load['tokens_per_second']:,.0f}",
        _pair(first),
        _pair(whole),
        _change(load, "rss_mb", " MB"),
        _change(load, "descriptors", ""),
    ]


def _lines(found: dict[str, Any]) -> list[str]:
    equal, slow, long = found["equality"], found["slowloris"], found["endurance"]
    sweep = found["sweep"]
    failures = len(sweep["failures"])
    return [
        f"Equality, {found['precision']}: of {equal['compared']} greedy answers given to 64 clients at "
        f"once {equal['equal']} are those given alone ({equal['different_answers_alone']} different "
        f"ones); {equal['different_beyond_margin']} differ where the two best tokens are more than "
        "1e-3 apart.\n",
        f"Slowloris: {slow['sockets']} connections, of which the server closed "
        f"{slow['closed_by_server']}; `/health` meanwhile {slow['health_ms']['p50']:g} ms, at most "
        f"{slow['health_ms']['max']:g} ms in {slow['health_asked']} requests.\n",
        f"Endurance: {long['requests']:,} requests of one token at {long['requests_per_second']:,.0f} a "
        f"second; memory {_change(long, 'rss_mb', ' MB')}, descriptors "
        f"{_change(long, 'descriptors', '')}.\n",
        f"Sweep: {sweep['attempts']} hostile requests on {sweep['routes']} routes, "
        f"{sweep['attempts'] - failures} answered as they must be.\n",
    ]


def _measured(found: dict[str, Any]) -> str:
    machine = found["machine"]
    return (
        f"{machine['cpu']}, {machine['cores']} cores, server and clients together; {found['date']}, "
        f"`{found['command']}`. *Left* are clients that hung up in the middle of a stream.\n"
    )


def _pair(quantiles: dict[str, float]) -> str:
    return " / ".join(_duration(quantiles[name]) for name in ("p50", "p99")) if quantiles else "-"


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def _change(part: dict[str, Any], name: str, unit: str) -> str:
    return f"{part['before'][name]:g} → {part['after'][name]:g}{unit}"
