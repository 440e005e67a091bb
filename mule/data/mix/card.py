"""The card of a mix: a page of markdown on what went in, what fell out, and why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_REASONS = {
    "duplicate": "equal to another row, but for white space",
    "near-duplicate": "shares most of its runs of five words with another row, and its answer",
    "contaminated": "shares a passage of 13 words with an evaluation set, or is in it whole",
    "cap": "above the cap of its source",
    "weight": "more than the share of its source",
    "limit": "above the limit of all examples",
}
_SUM_CHARS = 12  # of a SHA-256: enough to recognise a file


def card(figures: dict[str, Any]) -> str:
    """The page, from what mix.json holds."""
    parts = [
        f"# {figures['train']:,} rows to train on, {figures['valid']:,} to validate with",
        f"Made by `{figures['made_by']}` (Mule {figures['mule']}): {figures['kind']} from "
        f"{len(figures['sources'])} source{'s' * (len(figures['sources']) != 1)}. "
        "The same figures for machines: `mix.json`.",
        "## What went in, what fell out",
        _table(figures["sources"]),
        "Every row is counted once, in the first column that took it. *Kept* are the rows in the "
        "result; *train* counts a repeated row as often as it is repeated.",
        "## How",
        "\n".join(f"{n}. {step}" for n, step in enumerate(_steps(figures["settings"]), start=1)),
        *_examples(figures["examples"]),
        *(
            ["## Notes", "\n".join(f"- {note}" for note in figures["notes"])]
            * bool(figures["notes"])
        ),
        "## Sources and licences",
        _files(figures["sources"]),
        "Mule does not know the licences of these sources: make sure that each allows your use.",
        "## Again",
        f"```\n{figures['command']}\n```",
        "The same files, options and version give the same bytes.",
    ]
    return "\n\n".join(parts) + "\n"


def _table(sources: list[dict[str, Any]]) -> str:
    shown = [reason for reason in _REASONS if any(source[reason] for source in sources)]
    columns = ["read", *shown, "kept", "train", "valid"]
    rows = [f"| {_cell(s['name'])} | {_counts(s, columns)} |" for s in sources]
    if len(sources) > 1:
        total = {column: sum(source[column] for source in sources) for column in columns}
        rows.append(f"| **all** | {_counts(total, columns)} |")
    head = f"| source | {' | '.join(columns)} |"
    return "\n".join([head, "|---|" + "--:|" * len(columns), *rows])


def _counts(row: dict[str, Any], columns: list[str]) -> str:
    return " | ".join(f"{row[column]:,}" for column in columns)


def _steps(settings: dict[str, Any]) -> Iterator[str]:
    """What was done, in order."""
    yield "Every row was read and checked."
    if settings["exact"]:
        yield "Exact duplicates were taken out: equal but for white space. The first one stays."
    else:
        yield "Duplicates were kept."
    if settings["near"] is not None:
        yield (
            "Near-duplicates were taken out: a Jaccard index of at least "
            f"{settings['near']:g} over runs of five words, system prompts left aside, and over "
            "the words of the answers: many questions on one text are no duplicates. "
            "The first one stays; rows given for validation stay in any case."
        )
    if settings["decontaminate"]:
        names = ", ".join(f"`{name}`" for name in settings["decontaminate"])
        yield (
            f"Decontaminated against {names}: rows that share 13 words in a row with an item, or "
            "are the same where it is shorter, were taken out of training."
        )
    for word, given in (("Caps", "caps"), ("Repeats", "repeats"), ("Weights", "weights")):
        if settings[given]:
            shown = ", ".join(f"{key} {value:g}" for key, value in settings[given].items())
            yield f"{word}: {shown}."
    if settings["max_examples"] is not None:
        yield f"At most {settings['max_examples']:,} examples, from every source in proportion."
    if settings["valid_share"]:
        yield (
            f"A share of {settings['valid_share']:g} was held out for validation, in proportion "
            "from every file; near-duplicates and rows with the same first question are on one "
            "side. Sources with validation rows of their own kept those instead. No validation row "
            "is repeated."
        )
    yield f"Shuffled. Every draw comes from seed {settings['seed']}."


def _examples(examples: dict[str, list[dict[str, str]]]) -> Iterator[str]:
    if examples:
        yield "## Examples of what fell out"
    for reason, shown in examples.items():
        rows = [
            f"- `{row['removed']}` because of `{row['because']}`: {_cell(row['text'])}"
            for row in shown
        ]
        yield f"**{reason}**: {_REASONS[reason]}\n\n" + "\n".join(rows)


def _files(sources: list[dict[str, Any]]) -> str:
    rows = [
        f"| {_cell(source['name'])} | `{file['path']}` | {file['bytes']:,} "
        f"| `{file['sha256'][:_SUM_CHARS]}` "
        f"| {', '.join(f'`{name}`' for name in source['licences']) or 'unknown'} |"
        for source in sources
        for file in source["files"]
    ]
    head = "| source | file | bytes | SHA-256 | licence |\n|---|---|--:|---|---|"
    return "\n".join([head, *rows])


def _cell(text: str) -> str:
    """Text from the data, harmless inside a table or a list."""
    escaped = "".join(f"\\{char}" if char in "\\`*_[]<>|#" else char for char in text)
    return " ".join(escaped.split())
