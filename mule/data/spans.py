"""Which message each token of a rendered conversation belongs to: for people, not for training."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from mule.data.chat import Example
from mule.data.contract import trained_runs
from mule.data.sources import Conversation
from mule.errors import MuleError
from mule.tokenizer import StreamDecoder, Tokenizer

_SLACK = 2  # tokens in which a chat that ends here may differ from one that goes on
_TAIL_CHARS = (40, 20, 8)  # of a message, by which its end is found where it was rewritten


def message_of_tokens(
    tokenizer: Tokenizer, conversation: Conversation, example: Example
) -> np.ndarray:
    """The index of the message of each token, (n,) int64; ascending.

    What a template writes around a message counts to it; a turn that it writes before the first
    (tools, or a system prompt of its own) is number -1. A message whose end cannot be found, as its
    template joins it with the following one, counts to that one.
    """
    ids = example.ids.tolist()
    num_messages = example.answers[-1] + 1
    _, run_ends = trained_runs(example.trained)
    known = dict(zip(example.answers, run_ends.tolist(), strict=True))
    rendered = _rendered_ends(tokenizer, conversation, ids, num_messages)
    texts = _token_texts(tokenizer, ids)
    owner = np.full(len(ids), num_messages - 1, dtype=np.int64)
    start = 0
    for index in range(num_messages - 1):
        end = rendered[index] or known.get(index)
        if end is None:
            content = conversation.messages[index].content
            end = _end_in_text(tokenizer, ids, texts, content, start)
        if end is not None and end > start:
            owner[start:end] = index
            start = end
    if conversation.messages[0].role != "system":
        owner[: _preamble_end(tokenizer, ids, texts, int((owner == 0).sum()))] = -1
    return owner


def _preamble_end(tokenizer: Tokenizer, ids: list[int], texts: list[str], first_end: int) -> int:
    """Where a turn before the first message ends: it has a stop token, as that message has one."""
    stops = [n for n in range(first_end) if ids[n] in tokenizer.stop_ids]
    if stops and first_end - stops[-1] <= _SLACK:
        stops.pop()
    return _over_space(texts, stops[-1] + 1) if stops else 0


def _over_space(texts: list[str], place: int) -> int:
    return place + 1 if place < len(texts) and texts[place].isspace() else place


def _rendered_ends(
    tokenizer: Tokenizer, conversation: Conversation, ids: list[int], num_messages: int
) -> list[int | None]:
    """For each message but the last, where the chat that stops after it ends in `ids`."""
    messages, tools, mark = tokenizer.protect(conversation.as_dicts(), conversation.tool_list())
    ends: list[int | None] = []
    for count in range(1, num_messages):
        try:
            text = tokenizer.render_chat(messages[:count], add_generation_prompt=False, tools=tools)
            part = tokenizer.encode_rendered(text, mark)
        except MuleError:  # some templates refuse a chat that stops here
            ends.append(None)
            continue
        common = _num_common(ids, part)
        ends.append(common if common >= len(part) - _SLACK else None)
    return ends


def _num_common(left: Sequence[int], right: Sequence[int]) -> int:
    pairs = enumerate(zip(left, right, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(left), len(right)))


def _token_texts(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = StreamDecoder(tokenizer, skip_special=False)
    return [decoder.push(token_id) for token_id in ids]


def _end_in_text(
    tokenizer: Tokenizer, ids: list[int], texts: list[str], content: str, start: int
) -> int | None:
    """Where the end of `content` is found after token `start`, with the stop token behind it."""
    content, text = content.strip(), "".join(texts[start:])
    tails = [content[-num_chars:] for num_chars in _TAIL_CHARS]
    tail = next((tail for tail in tails if tail and tail in text), "")
    if not tail:
        return None
    place = text.find(tail)
    lengths = accumulate(len(text) for text in texts[start:])
    end = next(n for n, total in enumerate(lengths, start + 1) if total >= place + len(tail))
    if end < len(ids) and ids[end] in tokenizer.stop_ids:
        return _over_space(texts, end + 1)
    return end
