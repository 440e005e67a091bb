"""Whether the base knows the language and the form of the data, before the first update.

The loss of a small model on foreign text may exceed that of guessing, and that of the right model need
not be low. What weights that belong to these tokens always do is to find words likelier in their order
than shuffled; random weights, and right ones behind another vocabulary, do not. The form of chats is
judged against the base's own: the same answers, after prompts as either template writes them.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mule.batch import IGNORE, Batch
from mule.data.chat import Example, render_examples
from mule.data.loader import Labelled
from mule.data.prepare import read_options
from mule.data.sources import Conversation, read
from mule.errors import MuleError
from mule.evaluate.loss import HeldOutLoss, held_out_loss
from mule.models.decoder import Decoder
from mule.statistics import mean_interval
from mule.tokenizer import Tokenizer
from mule.train.assemble import Parts

_MAX_TEXTS, _TEXT_TOKENS = 12, 32  # read twice: far less than an update
_FEWEST_TEXTS, _FEWEST_TOKENS = 3, 12
_MAX_ROWS = 24  # of the first update
_MAX_READ, _CHAT_TOKENS = 200, 96  # chats looked at for short ones


def base_facts(parts: Parts) -> dict[str, Any]:
    """Losses in nats a token of the rows as plain text, and of the same tokens shuffled.

    `order_gain` is by how much the order helps. Where the chat template is not the base's own,
    `template_cost` is by how much answers are less likely with it. Each has its standard error over
    texts. Empty of a new model, of texts too short, and where one process has not the whole model.
    """
    base_dir = parts.base[0]
    if base_dir == Path() or parts.is_sharded or parts.recipe.adapter.engine == "mlx":
        return {}
    own = _other_template(parts, base_dir)
    facts: dict[str, Any] = {"template_differs": own is not None}
    if own is not None:
        facts |= _template_cost(parts, own)
    return facts | _order_gain(parts)


def _order_gain(parts: Parts) -> dict[str, Any]:
    texts, start = _texts(parts), parts.tokenizer.bos_id
    if len(texts) < _FEWEST_TEXTS:
        return {}
    draw = np.random.Generator(np.random.Philox(key=[parts.recipe.train.seed, len(texts)]))
    mixed = [draw.permutation(text) for text in texts]
    begun = [] if start is None else [start]
    plain, shuffled = (
        _losses(parts.model, [(np.array([*begun, *text]), None) for text in chosen])
        for chosen in (texts, mixed)
    )
    return {
        "plain_loss": plain.loss,
        "shuffled_loss": shuffled.loss,
        **_difference("order_gain", plain, shuffled),
        "num_texts": len(texts),
    }


def _template_cost(parts: Parts, own: Tokenizer) -> dict[str, Any]:
    """Of answers to the first chats that are short enough, beside the base's own template."""
    data = parts.recipe.data
    pairs: list[tuple[Example, Example]] = []
    try:
        for item in itertools.islice(read(data.train, read_options(data)), _MAX_READ):
            if isinstance(item, Conversation) and len(pairs) < _MAX_TEXTS:
                pair = _first_example(parts.tokenizer, item), _first_example(own, item)
                if max(len(example.ids) for example in pair) <= _CHAT_TOKENS:
                    pairs.append(pair)
    except MuleError:
        return {}  # what one of the two templates cannot write is no measure
    if len(pairs) < _FEWEST_TEXTS:
        return {}
    ours, theirs = (
        _losses(parts.model, [(pair[side].ids, pair[side].trained) for pair in pairs])
        for side in (0, 1)
    )
    return _difference("template_cost", theirs, ours)


def _first_example(tokenizer: Tokenizer, chat: Conversation) -> Example:
    """Of a chat; where a template rewrites earlier turns there are several."""
    return render_examples(tokenizer, [chat])[0][0]


def _difference(name: str, first: HeldOutLoss, second: HeldOutLoss) -> dict[str, float]:
    """By how much the loss of each text is higher in the second, and the error of the mean."""
    losses = [
        [nll / count for nll, count in zip(found.nll, found.counts)] for found in (first, second)
    ]
    interval = mean_interval([later - before for before, later in zip(*losses)])
    assert interval is not None and interval.sd is not None
    return {name: interval.mean, f"{name}_error": interval.sd / math.sqrt(interval.n)}


def _texts(parts: Parts) -> list[np.ndarray]:
    """The first examples or documents of the first update, without their special tokens."""
    rows = parts.train.rows_for_step(0)[:_MAX_ROWS]
    batch = parts.train.batch(rows)
    ids, segments = batch.input_ids.cpu().numpy(), batch.segments.cpu().numpy()
    special = list(parts.tokenizer.special_ids)
    texts: list[np.ndarray] = []
    for row, numbers in zip(ids, segments):
        for number in range(1, int(numbers.max(initial=0)) + 1):
            text = row[numbers == number]
            text = text[~np.isin(text, special)][:_TEXT_TOKENS]
            if len(text) >= _FEWEST_TOKENS and len(texts) < _MAX_TEXTS:
                texts.append(text)
    return texts


def _losses(model: Decoder, texts: list[tuple[np.ndarray, np.ndarray | None]]) -> HeldOutLoss:
    """Of each text (its ids, and which of them count, or None for all), each on its own."""
    shape = len(texts), max(len(ids) for ids, _ in texts) - 1
    inputs, segments = (torch.zeros(shape, dtype=torch.int64) for _ in range(2))
    targets = torch.full(shape, IGNORE)
    for row, (ids, counts) in enumerate(texts):
        tokens, length = torch.from_numpy(ids.astype(np.int64)), len(ids) - 1
        inputs[row, :length], segments[row, :length] = tokens[:-1], 1
        chosen = torch.ones(length, dtype=torch.bool)
        if counts is not None:
            chosen = torch.from_numpy(counts[1:].astype(np.bool_))
        targets[row, :length] = tokens[1:].where(chosen, IGNORE)
    positions = torch.arange(shape[1]).expand(shape).contiguous()
    batch = Batch(inputs, targets, positions, segments, isolated=False)
    labels = torch.arange(len(texts))[:, None].expand(shape).contiguous()
    return held_out_loss(model, [Labelled(batch, labels)], len(texts))


def _other_template(parts: Parts, base_dir: Path) -> Tokenizer | None:
    """The base's own tokenizer, where it has the same words and writes chats otherwise."""
    try:
        own = Tokenizer.load(base_dir)
    except MuleError:
        return None  # a folder without a tokenizer says nothing
    ours = parts.tokenizer
    same_words = own.vocabulary_fingerprint() == ours.vocabulary_fingerprint()
    if not same_words or own.chat_template in (None, ours.chat_template):
        return None
    return own if parts.train.shards.kind == "chat" else None
