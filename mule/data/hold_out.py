"""Holding out a share of the data for validation, by seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mule.data.sources import Conversation, Document
from mule.errors import UserError

Item = Document | Conversation


def split_held_out(items: Sequence[Item], share: float, seed: int) -> tuple[list[Item], list[Item]]:
    """(kept, held out), each in the given order; equal items stay on one side.

    Conversations are held out whole, at least one. Of documents, about `share` of the characters:
    whole ones while they fit, and the tail of the next where half the share is still missing.
    Raises UserError when one side would be empty.
    """
    groups = _groups_of_equals(items)
    bits = np.random.Philox(key=[seed, 0]).random_raw(len(groups))
    order = np.argsort(bits, kind="stable").tolist()
    sizes = [sum(_size(items[number]) for number in group) for group in groups]
    wanted = share * sum(sizes)
    held: list[int] = []
    held_size = 0
    while order[1:] and held_size + sizes[order[0]] <= wanted:
        held_size += sizes[order[0]]
        held += groups[order.pop(0)]
    following = groups[order[0]]
    if isinstance(document := items[following[0]], Document):
        missing = int(wanted - held_size) if held_size < wanted / 2 else 0
        head, tail = _cut_tail(document, missing)
    else:
        if not held and order[1:]:
            held += groups[order.pop(0)]
        following, head, tail = [], document, None
    if not held and tail is None:
        raise UserError(
            f"nothing can be held out of {len(items)} equal or very short items",
            "add other data, or give data.valid files",
        )
    held_numbers = frozenset(held)
    kept = [
        head if number in following else item
        for number, item in enumerate(items)
        if number not in held_numbers
    ]
    held_items = [items[number] for number in sorted(held)]
    return kept, held_items if tail is None else [*held_items, tail]


def _groups_of_equals(items: Sequence[Item]) -> list[list[int]]:
    groups: dict[object, list[int]] = {}
    for number, item in enumerate(items):
        content = item.text if isinstance(item, Document) else item.messages
        groups.setdefault(content, []).append(number)
    return list(groups.values())


def _size(item: Item) -> int:
    return len(item.text) if isinstance(item, Document) else 1


def _cut_tail(document: Document, num_chars: int) -> tuple[Document, Document | None]:
    """The document without its last `num_chars` or so, cut after a line; and that tail."""
    text = document.text
    place = len(text) - num_chars
    place = text.rfind("\n", 0, place) + 1 or place
    if num_chars == 0 or not text[:place].strip() or not text[place:].strip():
        return document, None
    line = document.line + text.count("\n", 0, place)
    return replace(document, text=text[:place]), replace(document, text=text[place:], line=line)
