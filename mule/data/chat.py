"""Conversations as ids and labels: only the assistant's words and their stop token are trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mule.data.sources import Conversation
from mule.errors import DataError, UserError
from mule.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One training sequence; it ends with a trained stop token.

    ids (n,) int32, trained (n,) bool. `answers` has, for each run of trained tokens, the index of
    the message it teaches; the ids before the run are the prompt that serving would send.
    """

    ids: np.ndarray
    trained: np.ndarray
    answers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Turn:
    """An assistant message: the prompt it answers, and what the template adds for it."""

    index: int
    prompt: str
    answer: str


def render_example(tokenizer: Tokenizer, conversation: Conversation) -> Example:
    """The one example of a conversation. Raises DataError when its template needs several."""
    examples = render_examples(tokenizer, [conversation])[0]
    if len(examples) > 1:
        raise DataError(
            conversation.file,
            conversation.line,
            f"this chat template makes {len(examples)} examples of the conversation, not one",
            "it rewrites earlier turns; use render_examples",
        )
    return examples[0]


def render_examples(
    tokenizer: Tokenizer, conversations: Sequence[Conversation]
) -> list[list[Example]]:
    """The examples of each conversation, encoded in one batch.

    A conversation is one example as long as every prompt begins with the ids that came before it;
    where the template rewrites earlier turns, a new example starts.
    """
    rendered = [_render_turns(tokenizer, conversation) for conversation in conversations]
    plain = [
        text for turns, mark in rendered if not mark for t in turns for text in (t.prompt, t.answer)
    ]
    encoded = iter(tokenizer.encode_batch(plain, special=True))
    results = []
    for conversation, (turns, mark) in zip(conversations, rendered, strict=True):
        ids = []
        for turn in turns:
            if mark:
                prompt, answer = _encode_marked(tokenizer, conversation, turn, mark)
            else:
                prompt, answer = next(encoded), next(encoded)
            ids.append((turn.index, prompt, answer))
        results.append(_join_turns(ids, frozenset(tokenizer.stop_ids)))
    return results


def _render_turns(tokenizer: Tokenizer, conversation: Conversation) -> tuple[list[_Turn], str]:
    """The assistant turns as text, and the mark that protects typed special tokens in it."""
    turns = []
    try:
        messages, mark = tokenizer.protect(conversation.as_dicts())
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = tokenizer.render_chat(messages[:index], add_generation_prompt=True)
            whole = tokenizer.render_chat(messages[: index + 1], add_generation_prompt=False)
            if not whole.startswith(prompt):
                raise _prompt_not_continued(conversation, prompt, whole)
            turns.append(_Turn(index, prompt, whole[len(prompt) :]))
    except DataError:
        raise
    except UserError as error:
        raise _at(conversation, error) from None
    return turns, mark


def _encode_marked(
    tokenizer: Tokenizer, conversation: Conversation, turn: _Turn, mark: str
) -> tuple[list[int], list[int]]:
    try:
        prompt = tokenizer.encode_rendered(turn.prompt, mark)
        return prompt, tokenizer.encode_rendered(turn.answer, mark)
    except UserError as error:
        raise _at(conversation, error) from None


def _join_turns(
    turns: list[tuple[int, list[int], list[int]]], stop_ids: frozenset[int]
) -> list[Example]:
    """Examples from (message index, prompt ids, answer ids) of each assistant turn."""
    examples: list[Example] = []
    ids: list[int] = []
    spans: list[tuple[int, int, int]] = []  # start, end, message index of what is trained
    for index, prompt, answer in turns:
        if spans and prompt[: len(ids)] != ids:
            examples.append(_example(ids, spans))
            spans = []
        stop = next((n for n, token_id in enumerate(answer) if token_id in stop_ids), len(answer))
        start = len(prompt)
        spans.append((start, min(start + stop + 1, start + len(answer)), index))
        ids = prompt + answer
    examples.append(_example(ids, spans))
    return examples


def _example(ids: list[int], spans: list[tuple[int, int, int]]) -> Example:
    length = spans[-1][1]  # what follows the last stop token trains nothing
    trained = np.zeros(length, dtype=np.bool_)
    for start, end, _ in spans:
        trained[start:end] = True
    answers = tuple(index for _, _, index in spans)
    return Example(np.asarray(ids[:length], dtype=np.int32), trained, answers)


def _at(conversation: Conversation, error: UserError) -> DataError:
    return DataError(conversation.file, conversation.line, error.message, error.hint)


def _prompt_not_continued(conversation: Conversation, prompt: str, whole: str) -> DataError:
    return DataError(
        conversation.file,
        conversation.line,
        f"the chat template asks for an answer after {prompt[-40:]!r} but writes the same chat as "
        f"{whole[-60:]!r}, so what is trained would not be what is served",
        "use a chat_template.jinja whose generation prompt begins the assistant's turn",
    )
