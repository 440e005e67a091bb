"""Conversations as ids and labels: only the assistant's words and their stop token are trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, NamedTuple

import numpy as np

from mule.data.sources.items import Conversation
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


@dataclass(slots=True)
class Turn:
    """An assistant message: the prompt it answers, and what the template adds for it."""

    index: int
    prompt: str
    answer: str


@dataclass(slots=True)
class Rendered:
    """A conversation as text; `mark` protects the special tokens typed in its `messages`."""

    conversation: Conversation
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    mark: str
    turns: list[Turn]


class _TurnIds(NamedTuple):
    """An assistant turn in ids; `num_trained` of the answer, up to its stop token."""

    index: int
    prompt: np.ndarray
    answer: np.ndarray
    num_trained: int


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
    return encode_turns(tokenizer, [render_turns(tokenizer, c) for c in conversations])


def render_turns(tokenizer: Tokenizer, conversation: Conversation) -> Rendered:
    """The assistant turns as text, each as it is served and as it is answered.

    Raises DataError where the template refuses the conversation, or writes an answered prompt
    otherwise than the prompt.
    """
    turns = []
    try:
        messages, tools, mark = tokenizer.protect(conversation.as_dicts(), conversation.tool_list())
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, answered = messages[:index], messages[: index + 1]
            prompt = tokenizer.render_chat(before, add_generation_prompt=True, tools=tools)
            whole = tokenizer.render_chat(answered, add_generation_prompt=False, tools=tools)
            if not whole.startswith(prompt):
                raise _prompt_not_continued(conversation, prompt, whole)
            turns.append(Turn(index, prompt, whole[len(prompt) :]))
    except DataError:
        raise
    except UserError as error:
        raise _at(conversation, error) from None
    return Rendered(conversation, messages, tools, mark, turns)


def encode_turns(tokenizer: Tokenizer, rendered: Sequence[Rendered]) -> list[list[Example]]:
    """The examples of each rendered conversation."""
    groups = [_join_turns(turns) for turns in _turn_ids(tokenizer, rendered)]
    examples = iter(_examples(list(chain.from_iterable(groups))))
    return [[next(examples) for _ in group] for group in groups]


# ---------------------------------------------------------------- ids


def _turn_ids(tokenizer: Tokenizer, rendered: Sequence[Rendered]) -> list[list[_TurnIds]]:
    """Prompt and answer ids of every turn, from one encoding of all the text that is new."""
    plans = [[] if item.mark else _plan(tokenizer, item.turns) for item in rendered]
    texts: list[str] = []
    for item, plan in zip(rendered, plans):
        texts += [turn.answer for turn, _ in zip(item.turns, plan)]
        texts += [turn.prompt for turn, cut in zip(item.turns, plan) if cut is None]
    encoded = iter(tokenizer.encode_arrays(texts, special=True))
    prompts: list[np.ndarray] = []
    answers: list[np.ndarray] = []
    for item, plan in zip(rendered, plans):
        if item.mark:
            for prompt, answer in _encode_marked(tokenizer, item):
                prompts.append(prompt)
                answers.append(answer)
            continue
        answers += [next(encoded) for _ in plan]
        own = [next(encoded) if cut is None else _NO_IDS for cut in plan]
        for number in range(len(plan) - 2, -1, -1):
            if (cut := plan[number]) is not None:
                text = item.turns[number].prompt
                own[number] = _shorter_prompt(tokenizer, text, cut, own[number + 1])
        prompts += own
    ends = _num_trained(answers, tokenizer.stop_ids)
    indices = [turn.index for item in rendered for turn in item.turns]
    turns = map(_TurnIds, indices, prompts, answers, ends)
    return [[next(turns) for _ in item.turns] for item in rendered]


_NO_IDS = np.empty(0, dtype=np.uint32)


def _num_trained(answers: list[np.ndarray], stop_ids: tuple[int, ...]) -> list[int]:
    """How many ids of each answer are trained: up to its first stop token, or all."""
    if not answers:
        return []
    ids = np.concatenate(answers)
    ends = np.cumsum([len(answer) for answer in answers])
    starts = ends - [len(answer) for answer in answers]
    is_stop = np.zeros(len(ids), dtype=np.bool_)
    for stop in stop_ids:
        is_stop |= ids == stop
    stops = np.append(np.flatnonzero(is_stop), len(ids))
    first = stops[np.searchsorted(stops, starts)]
    return (np.minimum(first + 1, ends) - starts).tolist()


_Cut = tuple[int, int]  # where the last special token starts, and how many stand before it


def _plan(tokenizer: Tokenizer, turns: list[Turn]) -> list[_Cut | None]:
    """For each turn where its prompt parts from the longer one of the next turn.

    None where its ids cannot be cut from that one's, so it is encoded by itself.
    """
    plan: list[_Cut | None] = [None] * len(turns)
    if len(turns) == 1 or not tokenizer.splits_at_specials:
        return plan
    spans: list[tuple[int, int]] = []
    for number in range(len(turns) - 2, -1, -1):
        text, longer = turns[number].prompt, turns[number + 1].prompt
        if not longer.startswith(text):
            spans = []
            continue
        spans = [span for span in spans or tokenizer.special_spans(longer) if span[1] <= len(text)]
        if spans:
            plan[number] = (spans[-1][0], len(spans) - 1)
    return plan


def _shorter_prompt(tokenizer: Tokenizer, text: str, cut: _Cut, longer: np.ndarray) -> np.ndarray:
    """Ids of `text` from those of a longer prompt that begins with it: a special token, and what
    follows it, does not change what stands before."""
    start, num_before = cut
    specials = np.flatnonzero(np.isin(longer, list(tokenizer.special_ids)))
    tail = tokenizer.encode_arrays([text[start:]], special=True)[0]
    return np.concatenate([longer[: specials[num_before]], tail])


def _encode_marked(
    tokenizer: Tokenizer, rendered: Rendered
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    try:
        for turn in rendered.turns:
            both = (turn.prompt, turn.answer)
            prompt, answer = (tokenizer.encode_rendered(text, rendered.mark) for text in both)
            yield np.array(prompt, dtype=np.uint32), np.array(answer, dtype=np.uint32)
    except UserError as error:
        raise _at(rendered.conversation, error) from None


def _join_turns(turns: list[_TurnIds]) -> list[list[_TurnIds]]:
    """The turns of each example: one as long as every prompt begins with the ids before it."""
    if len(turns) == 1:
        return [turns]
    joined = [turns[:1]]
    for last, turn in pairwise(turns):
        start, end = len(last.prompt), len(last.prompt) + len(last.answer)
        if np.array_equal(turn.prompt[:start], last.prompt) and np.array_equal(
            turn.prompt[start:end], last.answer
        ):
            joined[-1].append(turn)
        else:
            joined.append([turn])
    return joined


def _examples(groups: list[list[_TurnIds]]) -> list[Example]:
    """The examples as parts of two common arrays; what follows the last stop trains nothing."""
    if not groups:
        return []
    parts = [p for g in groups for p in (g[-1].prompt, g[-1].answer[: g[-1].num_trained])]
    ids = np.concatenate(parts, dtype=np.int32, casting="unsafe")
    trained = np.zeros(len(ids), dtype=np.bool_)
    examples = []
    first = 0
    for group in groups:
        for _, prompt, _, num_trained in group:
            start = first + len(prompt)
            trained[start : start + num_trained] = True
        end = first + len(group[-1].prompt) + group[-1].num_trained
        answers = tuple([turn.index for turn in group])
        examples.append(Example(ids[first:end], trained[first:end], answers))
        first = end
    return examples


# ---------------------------------------------------------------- errors


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
