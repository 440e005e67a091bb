"""`mule data preview`: the first examples as the model reads them, token by token."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mule.commands.data_inputs import THROW_AWAY, Inputs, open_inputs, read_options
from mule.errors import DataError

if TYPE_CHECKING:
    from mule.data.chat import Example
    from mule.data.sources import Conversation, Document, Item
    from mule.data.sources.items import Preference
    from mule.data.sources.options import ReadOptions
    from mule.tokenizer import Tokenizer

_COUNTED_CHARS = 200_000  # of a document: more are not tokenized to show its beginning
_HEAD_TOKENS = 150  # shown of a document
_AROUND_CUT_TOKENS = 40  # shown on each side of the place where its first row ends


def run(words: list[str], *, tokenizer: str | None = None, n: int = 3) -> dict[str, Any]:
    """The first `n` examples, from each file alike.

    Each is a list of pieces (neighbouring tokens that are alike) which together, where nothing is
    left out between `start`s, are its whole sequence. Raises DataError for an example that training
    would refuse.
    """
    inputs = open_inputs(words, tokenizer)
    data = inputs.data
    examples: list[dict[str, Any]] = []
    for item in _first_items(inputs.paths, read_options(data), n):
        examples += examples_of(inputs.tokenizer, item, data.max_seq_length)
    return {
        "tokenizer": inputs.tokenizer_origin,
        "vocab_size": inputs.tokenizer.vocab_size,
        "max_seq_length": data.max_seq_length,
        "too_long": data.too_long,
        "examples": examples,
        "next": _next(inputs, words, tokenizer, examples),
    }


def _next(
    inputs: Inputs, words: list[str], tokenizer: str | None, examples: list[dict[str, Any]]
) -> str:
    """Prepare the rows; pairs, which are not trained on, can be checked."""
    if any(example["kind"] == "preference" for example in examples):
        return shlex.join(["mule", "data", "check", *words])
    if inputs.tokenizer_origin.startswith(THROW_AWAY):
        tokenizer = "MODEL_FOLDER"
    named = ["--tokenizer", tokenizer] if tokenizer else []
    return shlex.join(["mule", "data", "prepare", *words, *named])


# ---------------------------------------------------------------- which items


def _first_items(files: Sequence[Path], options: ReadOptions, n: int) -> list[Item]:
    """The first `n` items, taken from the files in turn, in the order of the files."""
    readers = [(number, _items(file, options)) for number, file in enumerate(files)]
    taken: list[tuple[int, Item]] = []
    while readers and len(taken) < n:
        left = []
        for number, reader in readers:
            item = next(reader, None) if len(taken) < n else None
            if item is not None:
                taken.append((number, item))
                left.append((number, reader))
        readers = left
    return [item for _, item in sorted(taken, key=lambda pair: pair[0])]


def _items(file: Path, options: ReadOptions) -> Iterator[Item]:
    """The items of a file; of a document in several parts the first only, and none after it."""
    from mule.data.sources import Document, Notice, scan

    for item in scan(file, options):
        if isinstance(item, DataError):
            raise item
        if isinstance(item, Notice):
            continue  # of what is left out; `mule data check` tells them all
        yield item
        if isinstance(item, Document) and not item.ends:
            return


def examples_of(tokenizer: Tokenizer, item: Item, length: int) -> Iterator[dict[str, Any]]:
    """What the model reads of an item; several examples where the template rewrites turns."""
    from mule.data.sources import Conversation, Document

    if isinstance(item, Document):
        yield _document(tokenizer, item, length)
    elif isinstance(item, Conversation):
        yield from _conversation(tokenizer, item, length)
    else:
        yield _preference(tokenizer, item)


# ---------------------------------------------------------------- what is shown of each


def _conversation(
    tokenizer: Tokenizer, conversation: Conversation, length: int
) -> Iterator[dict[str, Any]]:
    """Its examples: one, unless the chat template rewrites earlier turns."""
    from mule.data.contract import render_checked

    examples = render_checked(tokenizer, [conversation])[0]
    for number, example in enumerate(examples, start=1):
        num_tokens = len(example.ids)
        yield {
            "kind": "chat",
            "file": conversation.file,
            "line": conversation.line,
            "part": number,
            "parts": len(examples),
            "tokens": num_tokens,
            "trained": int(example.trained.sum()),
            "fits": num_tokens - 1 <= length,  # the last token is no input
            "more": False,
            "row_ends": [] if num_tokens - 1 <= length else [length + 1],
            **_turns(tokenizer, conversation, example, length),
        }


def _turns(
    tokenizer: Tokenizer, conversation: Conversation, example: Example, length: int
) -> dict[str, Any]:
    """The messages of an example with their counts, and its pieces."""
    from mule.data.spans import message_of_tokens

    owner = message_of_tokens(tokenizer, conversation, example)
    roles = {n: m.role for n, m in enumerate(conversation.messages[: example.answers[-1] + 1])}
    if owner[0] < 0:
        roles = {-1: "tools" if conversation.tools else "template"} | roles
    messages = [
        {
            "index": index,
            "role": role,
            "tokens": int((owner == index).sum()),
            "trained": int(example.trained[owner == index].sum()),
        }
        for index, role in roles.items()
    ]
    pieces = _pieces(
        tokenizer,
        example.ids.tolist(),
        example.trained.tolist(),
        owner=owner.tolist(),
        ends=[length + 1],
    )
    for piece in pieces:
        piece["role"] = roles[piece["message"]]
    return {"messages": messages, "pieces": pieces}


def _document(tokenizer: Tokenizer, document: Document, length: int) -> dict[str, Any]:
    """The beginning of a document and the place where its first row ends."""
    text = document.text[:_COUNTED_CHARS]
    whole = document.ends and len(text) == len(document.text)
    ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids += tokenizer.encode(text) + ([tokenizer.document_end_id] if whole else [])
    ends = list(range(length, len(ids), length))
    trained = [position > 0 for position in range(len(ids))]
    pieces: list[dict[str, Any]] = []
    for start, end in _windows(len(ids), length):
        pieces += _pieces(tokenizer, ids[start:end], trained[start:end], start=start, ends=ends)
    return {
        "kind": "document",
        "file": document.file,
        "line": document.line,
        "tokens": len(ids),
        "trained": len(ids) - 1,  # every token but the first
        "fits": True,  # a document is cut into rows, whatever its length
        "more": not whole,
        "row_ends": ends,
        "messages": [],
        "pieces": pieces,
    }


def _windows(num_tokens: int, length: int) -> list[tuple[int, int]]:
    """The parts of a document that are shown: its head, and around the first row's end."""
    if num_tokens <= _HEAD_TOKENS + 2 * _AROUND_CUT_TOKENS:
        return [(0, num_tokens)]
    around = max(0, length - _AROUND_CUT_TOKENS), min(num_tokens, length + _AROUND_CUT_TOKENS)
    if length >= num_tokens:
        return [(0, _HEAD_TOKENS)]
    if around[0] <= _HEAD_TOKENS:
        return [(0, max(_HEAD_TOKENS, around[1]))]
    return [(0, _HEAD_TOKENS), around]


def _preference(tokenizer: Tokenizer, pair: Preference) -> dict[str, Any]:
    """A pair as it was read: Mule trains on no preferences, so nothing is rendered."""

    def turns(messages: Sequence[Any]) -> list[dict[str, Any]]:
        return [
            {"role": m.role, "text": m.content, "tokens": len(tokenizer.encode(m.content))}
            for m in messages
        ]

    return {
        "kind": "preference",
        "file": pair.file,
        "line": pair.line,
        "prompt": turns(pair.prompt),
        "chosen": turns(pair.chosen),
        "rejected": turns(pair.rejected),
        "label": pair.label,
    }


# ---------------------------------------------------------------- pieces


def _pieces(
    tokenizer: Tokenizer,
    ids: list[int],
    trained: list[bool],
    *,
    owner: list[int] | None = None,
    start: int = 0,
    ends: Sequence[int] = (),
) -> list[dict[str, Any]]:
    """Neighbouring tokens of one message that are all trained, or all not; specials one by one.

    `start` is the place of the first of `ids` in its example; a piece ends at each of `ends`.
    """
    cuts = set(ends)
    row = 0

    def kind(position: int) -> tuple[int, int, bool, int]:
        nonlocal row
        row += start + position in cuts
        alone = position if tokenizer.is_special(ids[position]) else -1
        return row, alone, trained[position], owner[position] if owner else -1

    pieces = []
    for (_, alone, is_trained, message), group in groupby(range(len(ids)), key=kind):
        places = list(group)
        own = ids[places[0] : places[-1] + 1]
        piece: dict[str, Any] = {
            "start": start + places[0],
            "ids": own,
            "text": text_of(tokenizer, ids[: places[0]][-1:], own),
            "trained": is_trained,
            "special": alone >= 0,
        }
        pieces.append(piece | {"message": message} if owner else piece)
    return pieces


def text_of(tokenizer: Tokenizer, before: list[int], own: list[int]) -> str:
    """The text of ids after the one before them: some tokenizers drop the space they begin with."""
    lead, joined = tokenizer.decode(before), tokenizer.decode(before + own)
    return joined[len(lead) :] if joined.startswith(lead) else tokenizer.decode(own)
