"""The label contract: what an example must fulfil before a model learns from it."""

from __future__ import annotations

from typing import NoReturn

import numpy as np

from mule.data.chat import Example
from mule.data.sources import Conversation
from mule.errors import DataError
from mule.tokenizer import Tokenizer


def check_example(tokenizer: Tokenizer, conversation: Conversation, example: Example) -> None:
    """Check labels against the conversation and against what serving sends.

    Raises DataError, with the row, unless: something is trained; every trained run ends with its
    only stop token; the ids before it are `encode_prompt` of the messages before it; and there is
    at most one BOS.
    """
    starts, ends = trained_runs(example.trained)
    if len(starts) == 0 or starts[0] == 0:
        _fail(conversation, "no token to learn after a prompt", "give the assistant an answer")
    if len(starts) != len(example.answers):
        _fail(
            conversation,
            f"{len(starts)} trained runs for {len(example.answers)} answers",
            "use a chat_template.jinja that ends each assistant turn with its stop token",
        )
    _check_bos(tokenizer, conversation, example)
    stops = np.isin(example.ids, tokenizer.stop_ids)
    messages = conversation.as_dicts()
    for start, end, index in zip(starts, ends, example.answers, strict=True):
        if not stops[end - 1] or stops[start : end - 1].any():
            names = ", ".join(tokenizer.token_text(token_id) for token_id in tokenizer.stop_ids)
            _fail(
                conversation,
                f"message {index + 1} is not ended by one stop token ({names}), "
                "so the model would not learn to stop",
                "use a chat_template.jinja that ends each assistant turn with one of them",
            )
        if example.ids[:start].tolist() != tokenizer.encode_prompt(messages[:index]):
            _fail(
                conversation,
                f"the prompt before message {index + 1} is not what serving would send",
                "use a chat_template.jinja that writes earlier turns the same every time",
            )


def trained_runs(trained: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Start and end (exclusive) of each run of True in `trained` (n,)."""
    edges = np.flatnonzero(np.diff(trained.astype(np.int8), prepend=0, append=0))
    return edges[::2], edges[1::2]


def _check_bos(tokenizer: Tokenizer, conversation: Conversation, example: Example) -> None:
    if tokenizer.bos_id is None:
        return
    count = int((example.ids == tokenizer.bos_id).sum())
    if count > 1:
        _fail(
            conversation,
            f"{count} begin-of-text tokens ({tokenizer.token_text(tokenizer.bos_id)}) in one row",
            "remove bos_token from the turns in chat_template.jinja",
        )


def _fail(conversation: Conversation, message: str, hint: str) -> NoReturn:
    raise DataError(conversation.file, conversation.line, message, hint)
