"""Holding out a share of the data for validation, by seed, without holding the data."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from mule.data.sources.items import Conversation, Document
from mule.errors import UserError

Item = Document | Conversation
ReadItems = Callable[[], Iterable[Item]]  # each call reads the same items again

FEWEST_CHATS = 5  # of fewer none is held out: every one is needed, and one would say little
_MOST_CHATS = 400  # are enough to measure by, of however many
_SHARE_OF_CHATS, SHARE_OF_DOCUMENTS = 0.2, 0.02


@dataclass(frozen=True, eq=False)
class Split:
    """Which items are held out: `held` (num_items,) bool.

    The documents `cut_items`, all equal, lose what comes after `place` characters; of the first
    of them that tail is held out.
    """

    held: np.ndarray
    cut_items: tuple[int, ...] = ()
    place: int = 0


class Digests:
    """The digest of each item as it goes by; of a document in several parts, at its last one."""

    def __init__(self) -> None:
        self._document = hashlib.blake2b(digest_size=8)

    def of(self, item: Item) -> int | None:
        """64 bits of its content, wherever it stands; None where the document goes on."""
        if isinstance(item, Conversation):
            content = hashlib.blake2b(item.tools.encode(), digest_size=8)
            for message in item.messages:
                # Lengths and not separators: no text can look like the end of another.
                content.update(f"{message.role} {len(message.content)} ".encode())
                content.update(message.content.encode())
                if message.name or message.tool_calls or message.tool_call_id:
                    extra = (message.name, message.tool_calls, message.tool_call_id)
                    content.update(repr(extra).encode())
            return int.from_bytes(content.digest(), "little")
        self._document.update(item.text.encode())
        if not item.ends:
            return None
        digest = int.from_bytes(self._document.digest(), "little")
        self._document = hashlib.blake2b(digest_size=8)
        return digest


def chosen_share(items: Iterable[Item]) -> float:
    """The share to hold out where none is given: of documents, of chats, or 0 of very few chats.

    Reads chats to their end, for they are counted, and of documents the first.
    """
    digests, num_chats = Digests(), 0
    different: set[int | None] = set()
    for item in items:
        if isinstance(item, Document):
            return SHARE_OF_DOCUMENTS
        num_chats += 1
        if len(different) < FEWEST_CHATS:
            different.add(digests.of(item))
    if len(different) < FEWEST_CHATS:
        return 0.0
    return share_of_chats(num_chats)


def share_of_chats(num_chats: int) -> float:
    """The share of so many different chats to hold out where none is given."""
    if num_chats < FEWEST_CHATS:
        return 0.0
    return min(_SHARE_OF_CHATS, float(f"{_MOST_CHATS / num_chats:.4g}"))


def decide_split(read_items: ReadItems, share: float, seed: int) -> Split:
    """What to hold out: about `share` of the items, equal ones on one side.

    Conversations are held out whole, at least one. Of documents, `share` of the characters: whole
    ones while they fit, and the tail of the next where half the share is still missing.
    Raises UserError when one side would be empty.
    """
    digests, sizes, are_documents = _survey(read_items())
    group_of = _groups_of_equals(digests)
    group_sizes = np.bincount(group_of, weights=sizes).astype(np.int64)
    bits = np.random.Philox(key=[seed, 0]).random_raw(len(group_sizes))
    order = np.argsort(bits, kind="stable")
    reached = np.cumsum(group_sizes[order])
    wanted = share * int(sizes.sum())
    num_held = min(int(np.searchsorted(reached, wanted, side="right")), len(order) - 1)
    following = np.flatnonzero(group_of == order[num_held])
    place = None
    if are_documents:
        held_size = int(reached[num_held - 1]) if num_held else 0
        missing = int(wanted - held_size) if held_size < wanted / 2 else 0
        first, size = int(following[0]), int(sizes[following[0]])
        if missing >= size:  # many equal documents, each shorter than what is missing
            missing = size // 2
        if missing:
            place = _find_cut(read_items(), first, size - missing)
    elif num_held == 0 and len(order) > 1:
        num_held = 1
    if num_held == 0 and place is None:
        raise UserError(
            f"nothing can be held out of {len(sizes)} equal or very short items",
            "add other data, or give data.valid files",
        )
    held = np.isin(group_of, order[:num_held])
    return Split(held) if place is None else Split(held, tuple(following.tolist()), place)


def sides(items: Iterable[Item], split: Split | None) -> Iterator[tuple[int, Item]]:
    """Each item, in order, with its side: 0 is kept, 1 is held out; a cut one comes as two."""
    number = start = 0
    for item in items:
        if split is None:
            yield 0, item
            continue
        if number in split.cut_items and isinstance(item, Document):
            yield from _cut(item, split.place - start, has_tail=number == split.cut_items[0])
        else:
            yield int(split.held[number]), item
        if isinstance(item, Document) and not item.ends:
            start += len(item.text)
        else:
            number, start = number + 1, 0


def _survey(items: Iterable[Item]) -> tuple[np.ndarray, np.ndarray, bool]:
    """The digest and the size of each item, and whether they are documents."""
    digests, sizes = array("Q"), array("q")
    digest_of, size = Digests(), 0
    are_documents = False
    for item in items:
        are_documents = isinstance(item, Document)
        size += len(item.text) if isinstance(item, Document) else 1
        digest = digest_of.of(item)
        if digest is not None:
            digests.append(digest)
            sizes.append(size)
            size = 0
    return np.frombuffer(digests, np.uint64), np.frombuffer(sizes, np.int64), are_documents


def _groups_of_equals(digests: np.ndarray) -> np.ndarray:
    """The group of each item; groups are numbered by their first item."""
    _, firsts, group_of = np.unique(digests, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(firsts))[group_of]


def _find_cut(items: Iterable[Item], wanted: int, place: int) -> int | None:
    """Where to cut a document, after the last line before `place`; None leaves it whole.

    It stays whole where one side would hold no words.
    """
    number = start = line_end = 0
    first_word, last_word = None, -1
    for item in items:
        assert isinstance(item, Document)
        if number == wanted:
            if first_word is None and (words := item.text.lstrip()):
                first_word = start + len(item.text) - len(words)
            if words := item.text.rstrip():
                last_word = start + len(words) - 1
            if start < place:
                found = item.text.rfind("\n", 0, place - start)
                line_end = start + found + 1 if found >= 0 else line_end
            start += len(item.text)
        if item.ends:
            if number == wanted:
                break
            number += 1
    cut = line_end or place
    return cut if first_word is not None and first_word < cut <= last_word else None


def _cut(part: Document, place: int, *, has_tail: bool) -> Iterator[tuple[int, Document]]:
    """A part of the document that is cut `place` characters after the start of this part."""
    if place <= 0 or place > len(part.text):
        if place > 0 or has_tail:
            yield int(place <= 0), part
        return
    yield 0, replace(part, text=part.text[:place], ends=True)
    if has_tail and place < len(part.text):
        line = part.line + part.text.count("\n", 0, place)
        yield 1, replace(part, text=part.text[place:], line=line)
