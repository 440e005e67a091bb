"""A small sample of held-out data that stays with a run, to verify what is made from it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from mule import progress
from mule.config.schema import DataSection
from mule.data.hold_out import Item, decide_split, sides
from mule.data.prepare import read_options, valid_files
from mule.data.produce import ByteCount
from mule.data.sources import expand, read
from mule.data.sources.items import Document
from mule.tokenizer import Tokenizer

_MAX_TEXTS = 16
_MAX_PROMPTS = 50
_MAX_CHARS = 2000
_MORE_TEXTS, _MORE_CHARS = 256, 20_000  # for figures that need many tokens


def held_out_sample(data: DataSection, seed: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """`texts` for logits and perplexity, `prompts` (chats ending with the user) for answers.

    Chats become texts as they are trained, with their special tokens: `rendered` says so.
    From the validation rows; a run without validation gives training rows.
    """
    texts, prompts = [], []
    for item in _chosen(data, seed, _Sample(_MAX_PROMPTS)):
        texts.append(as_trained(item, tokenizer))
        if isinstance(item, Document):
            continue
        messages = item.as_dicts()
        roles = [message.role for message in item.messages]
        if not item.tools:  # the runtimes that answer prompts are given plain chats
            prompts.append(messages[: roles.index("assistant")])
    some = texts[:: max(1, -(-len(texts) // _MAX_TEXTS))]
    return {"texts": some, "rendered": bool(prompts), "prompts": prompts}


def further_texts(
    data: DataSection, seed: int, tokenizer: Tokenizer, known: Collection[str], *, trained: bool
) -> list[str]:
    """More texts than the sample's, as they are trained: held out, or `trained` on.

    What is among the `known` texts of the sample is left out, of documents their beginning.
    """
    sample = _Sample(_MORE_TEXTS, _MORE_CHARS, trained)
    texts = (as_trained(item, tokenizer) for item in _chosen(data, seed, sample))
    texts = (text[_MAX_CHARS:] if text[:_MAX_CHARS] in known else text for text in texts)
    return [text for text in texts if text and text not in known]


def as_trained(item: Item, tokenizer: Tokenizer) -> str:
    """A document's text, or a chat as it is trained, with its special tokens."""
    if isinstance(item, Document):
        return item.text
    messages, tools = item.as_dicts(), item.tool_list()
    return tokenizer.render_chat(messages, add_generation_prompt=False, tools=tools)


class _Sample(NamedTuple):
    """How much is taken: items, characters of a document; from what is held out or trained on."""

    max_texts: int
    max_chars: int = _MAX_CHARS
    trained: bool = False


def _chosen(data: DataSection, seed: int, sample: _Sample) -> list[Item]:
    """Items evenly spread over what is held out, or trained on."""
    given = data.valid or valid_files(data.train)
    files = expand(data.train if sample.trained else given or data.train)
    count = ByteCount()
    read_items = partial(read, files, read_options(data), count)
    num_bytes = sum(file.stat().st_size for file in files)
    quiet = progress.using(progress.Silence())  # what reading notes was told by the preparation
    if given or data.valid_share == 0:
        with count.shown("Choosing a sample", num_bytes), quiet:
            return _spread(_beginnings(read_items(), sample.max_chars), sample.max_texts)
    with count.shown("Choosing a sample", 2 * num_bytes), quiet:
        split = decide_split(read_items, float(data.valid_share), seed)
        wanted = 0 if sample.trained else 1
        items = (item for side, item in sides(read_items(), split) if side == wanted)
        return _spread(_beginnings(items, sample.max_chars), sample.max_texts)


def _beginnings(items: Iterable[Item], max_chars: int) -> Iterator[Item]:
    """The items, of a document its first characters only."""
    text = ""
    for item in items:
        if not isinstance(item, Document):
            yield item
            continue
        text += item.text[: max_chars - len(text)]
        if item.ends:
            yield replace(item, text=text)
            text = ""


def _spread(items: Iterable[Item], most: int) -> list[Item]:
    """Every n-th item, n doubled whenever twice too many were kept: one pass, and no length."""
    kept: list[Item] = []
    step = 1
    for number, item in enumerate(items):
        if number % step == 0:
            kept.append(item)
        if len(kept) == 2 * most:
            kept, step = kept[::2], 2 * step
    return kept[:: max(1, -(-len(kept) // most))]
