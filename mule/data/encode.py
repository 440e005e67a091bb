"""Items to blocks of tokens, in batches whose borders leave no trace in the result."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from mule.data.chat import Example
from mule.data.contract import render_checked
from mule.data.hold_out import Item
from mule.data.shard_writer import Block
from mule.data.sources.items import Conversation, Document
from mule.errors import DataError
from mule.tokenizer import Tokenizer

TooLong = Literal["drop", "error", "truncate"]

_BATCH_CHARS = 1_000_000  # encoded at once: bounds the memory of a long text
_BATCH_CONVERSATIONS = 512
_MAX_PENDING_CHARS = 1_000_000  # more of an unfinished text than this is not put into the log


class Sided(NamedTuple):
    """An item with its side of the split, its digest where it ends, and its label."""

    side: int
    item: Item
    digest: int | None
    label: int


@dataclass(frozen=True)
class State:
    """Between two batches: how many items were taken, and what of a document is still to come.

    `pending` is text that was taken but waits for what follows it; `started` says whether the
    document in progress has tokens already.
    """

    num_items: int = 0
    pending: str = ""
    started: bool = False


class Piece(NamedTuple):
    """A part of a document, short enough to encode."""

    side: int
    text: str
    is_first: bool
    is_last: bool
    label: int


@dataclass
class Batch:
    """What is encoded at once; `state` where a process may go on after it.

    `conversations` are (side, conversation, label).
    """

    pieces: list[Piece] = field(default_factory=list)
    conversations: list[tuple[int, Conversation, int]] = field(default_factory=list)
    digests: tuple[list[int], list[int]] = field(default_factory=lambda: ([], []))
    num_chars: int = 0
    state: State | None = None


def text_batches(items: Iterable[Sided], tokenizer: Tokenizer, state: State) -> Iterator[Batch]:
    """Documents as pieces; a part that ends in the middle of a word waits for the next part."""
    batch = Batch()
    num_items, pending, is_first = state.num_items, state.pending, not state.started
    for side, document, digest, label in items:
        assert isinstance(document, Document)
        num_items += 1
        *pieces, pending = tokenizer.cut(pending + document.text)
        if document.ends:
            pieces.append(pending)
            pending = ""
        for number, piece in enumerate(pieces, start=1):
            if batch.num_chars >= _BATCH_CHARS:
                yield batch
                batch = Batch()
            is_last = document.ends and number == len(pieces)
            batch.pieces.append(Piece(side, piece, is_first, is_last, label))
            batch.num_chars += len(piece)
            is_first = is_last
        if digest is not None:
            batch.digests[side].append(digest)
        if batch.num_chars >= _BATCH_CHARS:
            if len(pending) <= _MAX_PENDING_CHARS:
                batch.state = State(num_items, pending, not is_first)
            yield batch
            batch = Batch()
    if batch.pieces:
        batch.state = State(num_items)
        yield batch


def chat_batches(items: Iterable[Sided], state: State) -> Iterator[Batch]:
    """Conversations as they are, so many at once."""
    batch = Batch()
    num_items = state.num_items
    for side, conversation, digest, label in items:
        assert isinstance(conversation, Conversation) and digest is not None
        num_items += 1
        batch.conversations.append((side, conversation, label))
        batch.digests[side].append(digest)
        batch.num_chars += sum(len(message.content) for message in conversation.messages)
        if batch.num_chars >= _BATCH_CHARS or len(batch.conversations) >= _BATCH_CONVERSATIONS:
            batch.state = State(num_items)
            yield batch
            batch = Batch()
    if batch.conversations:
        batch.state = State(num_items)
        yield batch


def encode_text(tokenizer: Tokenizer, batch: Batch) -> tuple[Block, Block]:
    """The tokens of each side: BOS where the tokenizer adds it, the text, the document's end."""
    encoded = tokenizer.encode_arrays([piece.text for piece in batch.pieces])
    ids, ends = (array("I"), array("I")), (array("q"), array("q"))
    labels = (array("B"), array("B"))
    for piece, piece_ids in zip(batch.pieces, encoded, strict=True):
        out = ids[piece.side]
        if piece.is_first and tokenizer.bos_id is not None:
            out.append(tokenizer.bos_id)
        out.frombytes(piece_ids.tobytes())
        if piece.is_last:
            out.append(tokenizer.document_end_id)
            ends[piece.side].append(len(out))
            labels[piece.side].append(piece.label)
    kept, held = (
        Block(
            np.frombuffer(ids[side], np.uint32),
            None,
            np.frombuffer(ends[side], np.int64),
            np.array(batch.digests[side], dtype=np.uint64),
            np.frombuffer(labels[side], np.uint8),
        )
        for side in (0, 1)
    )
    return kept, held


def encode_chat(
    tokenizer: Tokenizer, batch: Batch, max_seq_length: int, too_long: TooLong
) -> tuple[Block, Block]:
    """The checked examples of each side that fit a row."""
    conversations = [conversation for _, conversation, _ in batch.conversations]
    rendered = render_checked(tokenizer, conversations)
    sides: tuple[list[Example], list[Example]] = ([], [])
    labels: tuple[list[int], list[int]] = ([], [])
    lost = {"num_dropped": [0, 0], "num_truncated": [0, 0]}
    limit = max_seq_length + 1  # the last token is a target only
    for (side, conversation, label), examples in zip(batch.conversations, rendered, strict=True):
        before = len(sides[side])
        for example in examples:
            if len(example.ids) <= limit:
                sides[side].append(example)
            elif too_long == "error":
                raise _too_long(conversation, example, max_seq_length)
            elif too_long == "truncate" and example.trained[:limit].any():
                cut = Example(example.ids[:limit], example.trained[:limit], example.answers)
                sides[side].append(cut)
                lost["num_truncated"][side] += 1
            else:
                lost["num_dropped"][side] += 1
        labels[side].extend([label] * (len(sides[side]) - before))
    kept, held = (
        _join(
            sides[side],
            batch.digests[side],
            labels[side],
            **{name: count[side] for name, count in lost.items()},
        )
        for side in (0, 1)
    )
    return kept, held


def _join(
    examples: list[Example],
    digests: list[int],
    labels: list[int],
    *,
    num_dropped: int,
    num_truncated: int,
) -> Block:
    lengths = [len(example.ids) for example in examples]
    return Block(
        np.concatenate([np.empty(0, np.int32), *(example.ids for example in examples)]),
        np.concatenate([np.empty(0, np.bool_), *(example.trained for example in examples)]),
        np.cumsum(lengths, dtype=np.int64),
        np.array(digests, dtype=np.uint64),
        np.array(labels, dtype=np.uint8),
        num_dropped,
        num_truncated,
    )


def _too_long(conversation: Conversation, example: Example, max_seq_length: int) -> DataError:
    return DataError(
        conversation.file,
        conversation.line,
        f"{len(example.ids) - 1:,} tokens, more than data.max_seq_length={max_seq_length:,}",
        'shorten it, raise data.max_seq_length, or set data.too_long to "drop"',
    )
