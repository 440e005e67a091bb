"""A previewed example in words, for the terminal and the pages: what is said above and between."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from mule.figures import short

_ADDED = {"tools": "tools", "template": "added by the template"}
_UNSEEN = (  # no reader sees them, and some turn the text around them
    *(*range(0x80, 0xA0), 0xAD, 0x61C, 0x180E, *range(0x200B, 0x2010), *range(0x2028, 0x202F)),
    *(*range(0x2060, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFC), *range(0xE0000, 0xE0080)),
    *range(0xD800, 0xE000),  # halves of a pair, which cannot be written as UTF-8
)
_INVISIBLE = {  # they would act on a terminal, or be passed over by the reader
    **{code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"},
    0x7F: 0x2421,
    **{code: f"‹U+{code:04X}›" for code in _UNSEEN if code not in (0x200C, 0x200D)},
}


def visible(text: str) -> str:
    """The text with control and direction characters written out; lines and tabs stay.

    So do the joiners U+200C and U+200D, which Persian, Hindi and emoji are written with.
    """
    return text.translate(_INVISIBLE)


def heading(example: dict[str, Any], result: dict[str, Any]) -> str:
    """Where an example is from, its counts, and whether it fits."""
    place = f"{example['file']}:{example['line']}"
    if example["kind"] == "preference":
        what = "preference pair" if example["label"] is None else "judged answer"
        return f"{place} · {what}: read and checked, not trained on"
    tokens, trained = example["tokens"], example["trained"]
    if example["more"]:
        return f"{place} · more than {short(tokens)} tokens, all learned but the first"
    words = [place, f"{tokens:,} tokens, {trained:,} learned ({trained / tokens:.0%})"]
    length = result["max_seq_length"]
    if example["kind"] == "document":
        words.append(f"{_rows(example)} of {length:,}")
    elif example["fits"]:
        words.append(f"fits data.max_seq_length={length:,}")
    else:
        words.append(f"over data.max_seq_length={length:,}: data.too_long={result['too_long']}")
    if example.get("parts", 1) > 1:
        words.append(
            f"example {example['part']} of {example['parts']}: the chat template rewrites earlier "
            "turns, so each answer is learned after the prompt that serving would send"
        )
    return " · ".join(words)


def _rows(example: dict[str, Any]) -> str:
    count = len(example["row_ends"]) + 1
    return "within one row" if count == 1 else f"over {count:,} rows"


def sections(
    example: dict[str, Any],
) -> Iterator[tuple[dict[str, Any] | None, list[dict[str, Any]]]]:
    """Each message (None: a document) and its pieces, with {"notice": text} where tokens are left
    out or a row ends."""
    messages = {message["index"]: message for message in example["messages"]}
    place, pieces = 0, example["pieces"]
    for index, group in groupby(pieces, key=lambda piece: piece.get("message")):
        shown: list[dict[str, Any]] = []
        for piece in group:
            shown += [{"notice": text} for text in _notices(example, place, piece["start"])]
            shown.append(piece)
            place = piece["start"] + len(piece["ids"])
        if shown[-1] is pieces[-1]:
            shown += [{"notice": text} for text in _notices(example, place, None)]
        yield None if index is None else messages[index], shown


def _notices(example: dict[str, Any], place: int, start: int | None) -> Iterator[str]:
    """What is to be said between token `place` and the piece that begins at `start`."""
    num_left_out = (example["tokens"] if start is None else start) - place
    if num_left_out or (start is None and example["more"]):
        more = "more than " if start is None and example["more"] else ""
        yield f"… {more}{num_left_out:,} tokens are not shown …"
    if start in example["row_ends"]:
        if example["kind"] == "document":
            yield "✂ a row that begins with this document ends here"
        else:
            yield "✂ data.max_seq_length ends here"


def title(message: dict[str, Any]) -> str:
    """Whose the next lines are: `2 user`; what the template adds by itself has no number."""
    if message["index"] < 0:
        return _ADDED[message["role"]]
    return f"{message['index'] + 1} {message['role']}"


def verdicts(example: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The messages of a preference pair, each with what it is: prompt, chosen, rejected..."""
    names = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
    if example["label"] is not None:
        names |= dict.fromkeys(("chosen", "rejected"), "wanted" if example["label"] else "unwanted")
    return [(names[part], message) for part in names for message in example[part]]
