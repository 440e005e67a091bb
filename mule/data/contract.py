"""The label contract: what an example must fulfil before a model learns from it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, NoReturn

import numpy as np

from mule.data.chat import Example, Rendered, Turn, encode_turns, render_turns
from mule.data.sources.items import Conversation, Message
from mule.data.template_markup import check_markup
from mule.errors import DataError, ModelError
from mule.tokenizer import Tokenizer

_SAMPLED_ROWS = 32  # one row of so many has its prompts encoded once more
_STOP_HINT = "use a chat_template.jinja that ends each assistant turn with a stop token"


def render_checked(
    tokenizer: Tokenizer, conversations: Sequence[Conversation]
) -> list[list[Example]]:
    """The examples of each conversation, all of which keep the contract.

    For every row: serving sends the text that is trained, up to the answer; no message is lost;
    something is trained, ending with its one stop token; begin-of-text is there once. Prompts are
    encoded a second time, by `encode_prompt`, for each row with typed special tokens, for one
    prompt of each row with several answers, and for all prompts of every 32nd row: of the others
    the text is that of serving, and equal text has equal ids.

    Raises DataError for the first row that does not.
    """
    rendered = [render_turns(tokenizer, conversation) for conversation in conversations]
    stops = [tokenizer.token_text(token_id) for token_id in tokenizer.stop_ids]
    for item in rendered:
        _check_text(item, stops)
    groups = encode_turns(tokenizer, rendered)
    suspects = _suspects(tokenizer, groups)
    for item, group in zip(rendered, groups):
        for example in group:
            if id(example) in suspects or item.mark or item.conversation.line % _SAMPLED_ROWS == 1:
                check_example(tokenizer, item.conversation, example)
        if len(item.turns) > 1 and not item.mark:
            _check_one_prompt(tokenizer, item.conversation, group)
    return groups


def check_example(tokenizer: Tokenizer, conversation: Conversation, example: Example) -> None:
    """Check labels against the conversation and against what serving sends.

    Raises DataError, with the row, unless: something is trained; every trained run ends with its
    only stop token; the ids before it are `encode_prompt` of the messages before it; and there is
    one BOS where the model wants one.
    """
    starts, ends = trained_runs(example.trained)
    if len(starts) == 0 or starts[0] == 0:
        _fail(conversation, "no token to learn after a prompt", "give the assistant an answer")
    if len(starts) != len(example.answers):
        _fail(
            conversation,
            f"{len(starts)} trained runs for {len(example.answers)} answers",
            _STOP_HINT,
        )
    stops = np.isin(example.ids, tokenizer.stop_ids)
    for start, end, index in zip(starts, ends, example.answers, strict=True):
        _check_prompt(tokenizer, conversation, example.ids[:start], index)
        if not stops[end - 1] or stops[start : end - 1].any():
            _fail_stop(tokenizer, conversation, index)
    _check_bos(tokenizer, conversation, example)


def check_template(tokenizer: Tokenizer) -> None:
    """Check once that the chat template fits the tokenizer and keeps the contract on two chats.

    Raises ModelError for markup that is no token here, for a turn without a stop token, and for
    words of others in what is trained. What a template refuses (a second turn) is left to the rows.
    """
    for roles in _PROBES:
        texts = [f"mule{role}{number}" for number, role in enumerate(roles)]
        messages = tuple(Message(role, text) for role, text in zip(roles, texts))
        conversation = Conversation(messages, "chat template", 1)
        try:
            tokenizer.render_chat(conversation.as_dicts(), add_generation_prompt=False)
        except ModelError as error:
            if len(roles) == len(_PROBES[0]):
                raise ModelError(f"chat template: {error.message}", error.hint) from None
            continue
        check_markup(tokenizer, messages)
        try:
            render_checked(tokenizer, [conversation])
            for turn in render_turns(tokenizer, conversation).turns:
                _check_answer_is_own(turn, texts)
        except DataError as error:
            raise ModelError(f"chat template: {error.what}", error.hint) from None


def trained_runs(trained: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Start and end (exclusive) of each run of True in `trained` (n,)."""
    edges = np.flatnonzero(np.diff(trained.astype(np.int8), prepend=0, append=0))
    return edges[::2], edges[1::2]


# ---------------------------------------------------------------- text


_PROBES = (("user", "assistant"), ("user", "assistant", "user", "assistant"))


def _check_text(rendered: Rendered, stops: list[str]) -> None:
    """Every message must be in the text, each answer in its own part and before its stop token."""
    messages, conversation = rendered.messages, rendered.conversation
    done, checked = "", 0
    for turn in rendered.turns:
        if not done or not turn.prompt.startswith(done):
            checked = 0
        before = turn.prompt if checked == 0 else turn.prompt[len(done) :]
        _check_messages(conversation, messages[checked : turn.index], before, checked)
        if checked == 0 and rendered.tools:
            for name in _tool_names(rendered.tools):
                if name not in turn.prompt:
                    _fail_lost(conversation, f"the description of the tool {name!r}", 0)
        answer = messages[turn.index]
        end = _find_content(turn.answer, answer["content"], 0)
        if end < 0:
            _fail_lost(conversation, _beginning(answer), turn.index)
        end = max(end, _check_calls(conversation, answer, turn.answer, turn.index))
        if any(0 <= turn.answer.find(stop) < end for stop in stops):
            _fail(
                conversation,
                f"the chat template writes a stop token inside the answer of message "
                f"{turn.index + 1}, so not all of it would be learned",
                _STOP_HINT,
            )
        done, checked = turn.prompt + turn.answer, turn.index + 1


def _check_messages(
    conversation: Conversation, messages: list[dict[str, Any]], text: str, first: int
) -> None:
    position = 0
    for number, message in enumerate(messages, start=first):
        role, content = message["role"], message["content"]
        is_system = role == "system"  # some templates write it into the last question
        end = _find_content(text, content, 0 if is_system else position)
        if end < 0 and role == "assistant" and "</think>" in content:
            end = _find_content(text, content.rpartition("</think>")[2], position)
        if end < 0:
            _fail_lost(conversation, _beginning(message), number)
        if not is_system:
            position = end
        if message.get("tool_calls"):
            _check_calls(conversation, message, text, number)


def _check_calls(
    conversation: Conversation, message: dict[str, Any], text: str, number: int
) -> int:
    """The end of the last call's name in `text`; every call must be there with its arguments."""
    position = 0
    for call in message.get("tool_calls", ()):
        function = call["function"]
        found = text.find(function["name"], position)
        if found < 0:
            _fail_lost(conversation, f"the call of {function['name']!r}", number)
        position = found + len(function["name"])
        for value in _leaves(function["arguments"]):
            if not any(form in text for form in _forms(value)):
                what = f"the argument {value[:40]!r} of {function['name']!r}"
                _fail_lost(conversation, what, number)
    return position


def _find_content(text: str, content: str, start: int) -> int:
    """Where `content` ends in `text`, -1 if it is not there; templates may trim it or quote it."""
    content = content.strip()
    if (found := text.find(content, start)) >= 0:
        return found + len(content)
    if "</think>" in content:  # thinking is taken apart and its spaces written anew
        thought, _, words = content.rpartition("</think>")
        thought = thought.replace("<think>", "").strip()
        if (found := text.find(thought, start)) >= 0:
            return _find_content(text, words, found + len(thought))
    for quoted in _forms(content)[1:]:
        if (found := text.find(quoted, start)) >= 0:
            return found + len(quoted)
    return -1


def _forms(text: str) -> tuple[str, str, str]:
    """A text as it is, and as JSON writes it."""
    return text, json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1]


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, str):
        yield value


def _tool_names(tools: list[dict[str, Any]]) -> Iterator[str]:
    for tool in tools:
        described = tool.get("function", tool)
        if isinstance(described, dict) and isinstance(described.get("name"), str):
            yield described["name"]


def _check_answer_is_own(turn: Turn, texts: list[str]) -> None:
    """In what is trained stand no words of the messages before."""
    if other := next((text for text in texts[: turn.index] if text in turn.answer), None):
        raise DataError(
            "chat template",
            None,
            f"it repeats message {texts.index(other) + 1} in the answer of message "
            f"{turn.index + 1}, where it would be learned",
            "use a chat_template.jinja that writes only the answer after its generation prompt",
        )


# ---------------------------------------------------------------- ids


def _suspects(tokenizer: Tokenizer, groups: list[list[Example]]) -> set[int]:
    """The id() of each example that may break the contract, found for all of a batch at once."""
    examples = list(chain.from_iterable(groups))
    if not examples:
        return set()
    ids = np.concatenate([example.ids for example in examples])
    trained = np.concatenate([example.trained for example in examples])
    lengths = np.array([len(example.ids) for example in examples])
    owner = np.repeat(np.arange(len(examples)), lengths)
    firsts = np.cumsum(lengths) - lengths
    starts, ends = trained_runs(trained)
    stops = _among(ids, tokenizer.stop_ids)
    num_answers = [len(example.answers) for example in examples]
    bad = trained[firsts]
    bad |= np.bincount(owner[starts], minlength=len(examples)) != num_answers
    bad[owner[ends[~stops[ends - 1]] - 1]] = True
    bad |= np.bincount(owner[stops & trained], minlength=len(examples)) != num_answers
    if tokenizer.bos_id is not None:
        is_bos = ids == tokenizer.bos_id
        bad |= ~is_bos[firsts] | (np.bincount(owner[is_bos], minlength=len(examples)) != 1)
    return {id(examples[number]) for number in np.flatnonzero(bad)}


def _among(ids: np.ndarray, chosen: tuple[int, ...]) -> np.ndarray:
    found = np.zeros(len(ids), dtype=np.bool_)
    for token_id in chosen:
        found |= ids == token_id
    return found


def _check_one_prompt(
    tokenizer: Tokenizer, conversation: Conversation, group: list[Example]
) -> None:
    """One prompt of a row with several answers; which one changes from row to row."""
    example = group[conversation.line % len(group)]
    starts, _ = trained_runs(example.trained)
    number = conversation.line % len(starts)
    ids = example.ids[: starts[number]]
    _check_prompt(tokenizer, conversation, ids, example.answers[number])


def _check_prompt(
    tokenizer: Tokenizer, conversation: Conversation, ids: np.ndarray, index: int
) -> None:
    before = [message.as_dict() for message in conversation.messages[:index]]
    if ids.tolist() != tokenizer.encode_prompt(before, conversation.tool_list()):
        _fail(
            conversation,
            f"the prompt before message {index + 1} is not what serving would send",
            "use a chat_template.jinja that writes earlier turns the same every time",
        )


def _check_bos(tokenizer: Tokenizer, conversation: Conversation, example: Example) -> None:
    """One BOS, at the start; where a template begins each exchange with one (Llama 2), also after
    the stop token of the exchange before."""
    if tokenizer.bos_id is None:
        return
    name = tokenizer.token_text(tokenizer.bos_id)
    is_bos = example.ids == tokenizer.bos_id
    if not is_bos[0]:
        _fail(
            conversation,
            f"the row does not begin with the begin-of-text token ({name}) the tokenizer adds",
            'begin chat_template.jinja with {{ bos_token }}, or set "add_bos_token": false in '
            "tokenizer_config.json",
        )
    if tokenizer.bos_id in tokenizer.stop_ids:  # the same token also ends answers
        is_bos[1:] &= is_bos[:-1]
    positions = np.flatnonzero(is_bos)
    asked = [m for m in conversation.messages[: example.answers[-1]] if m.role in ("user", "tool")]
    follows_stop = np.isin(example.ids[positions[1:] - 1], tokenizer.stop_ids).all()
    if is_bos[1] or not follows_stop or len(positions) > max(1, len(asked)):
        _fail(
            conversation,
            f"{len(positions)} begin-of-text tokens ({name}) in one row",
            "remove bos_token from the turns in chat_template.jinja",
        )


# ---------------------------------------------------------------- errors


def _beginning(message: dict[str, Any]) -> str:
    return f"its text {message['content'].strip()[:40]!r}"


def _fail_stop(tokenizer: Tokenizer, conversation: Conversation, index: int) -> NoReturn:
    names = ", ".join(tokenizer.token_text(token_id) for token_id in tokenizer.stop_ids)
    _fail(
        conversation,
        f"message {index + 1} is not ended by one stop token ({names}), "
        "so the model would not learn to stop",
        "use a chat_template.jinja that ends each assistant turn with one of them",
    )


def _fail_lost(conversation: Conversation, what: str, index: int) -> NoReturn:
    role = conversation.messages[index].role
    _fail(
        conversation,
        f"the chat template loses or changes message {index + 1} ({role}): {what} "
        "is not in what it writes",
        "use a chat_template.jinja that writes it as it is, or take it out of the row",
    )


def _fail(conversation: Conversation, message: str, hint: str) -> NoReturn:
    raise DataError(conversation.file, conversation.line, message, hint)
