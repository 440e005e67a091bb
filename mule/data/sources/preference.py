"""Answers judged: chosen and rejected, or one with a label. Read and checked, not trained on."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import NoReturn

from mule.data.sources.alpaca import prompt_of
from mule.data.sources.files import compression, data_suffix
from mule.data.sources.format import Format
from mule.data.sources.items import Message, Preference
from mule.data.sources.message import message, messages_of
from mule.data.sources.pairs import spoken
from mule.data.sources.row import Row, type_name
from mule.data.sources.sharegpt import with_system
from mule.data.sources.turns import check_order

_LABELS = ("label", "kto_tag")
_CHATS = ("messages", "conversations")


def _parse(row: Row) -> Preference:
    label = next((key for key in _LABELS if row.value.get(key) is not None), None)
    if label is None or row.value.get("chosen") is not None:
        return _compared(row)
    return _judged(row, label)


def _compared(row: Row) -> Preference:
    """A prompt with a better and a worse answer."""
    prompt = _prompt(row)
    chosen, rejected = (_answer(row, key) for key in ("chosen", "rejected"))
    if not prompt or chosen[0].role != "assistant":
        prompt, chosen, rejected = _shared_start(row, chosen, rejected)
    for answer in (chosen, rejected):
        check_order(row, [*prompt, *answer])
    return Preference(tuple(prompt), tuple(chosen), tuple(rejected), None, row.file, row.line)


def _judged(row: Row, key: str) -> Preference:
    """One answer with a label under `key`: true is good (KTO)."""
    label = row.value[key]
    if not isinstance(label, bool):
        row.fail(
            f'"{key}" is {type_name(label)}, not true or false',
            f'write true for a good answer, or remove "{key}" to train on the row',
        )
    prompt = _prompt(row)
    for answer in ("completion", "output"):
        if row.value.get(answer) is not None:
            prompt += spoken(row, answer, "assistant")
    check_order(row, prompt)
    if not prompt or prompt[-1].role != "assistant":
        row.fail("no answer to judge", "the last message must be the assistant's")
    answered = (tuple(prompt[-1:]), ()) if label else ((), tuple(prompt[-1:]))
    return Preference(tuple(prompt[:-1]), *answered, label, row.file, row.line)


def _prompt(row: Row) -> list[Message]:
    for key in _CHATS:
        if row.value.get(key) is not None:
            return with_system(row, messages_of(row, key))
    if row.value.get("instruction") is not None:
        return prompt_of(row)
    if row.value.get("prompt") is not None:
        return with_system(row, spoken(row, "prompt", "user"))
    return []


def _answer(row: Row, key: str) -> list[Message]:
    if isinstance(row.value.get(key), dict):
        return [message(row, row.value[key], 1)]
    return spoken(row, key, "assistant")


def _shared_start(
    row: Row, chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """Where both answers are whole chats, the prompt is what they begin with alike."""
    num_shared = 0
    for good, bad in zip(chosen, rejected, strict=False):
        if good != bad:
            break
        num_shared += 1
    if num_shared == 0:
        row.fail('no "prompt", and the two answers do not begin alike', 'add "prompt" to the row')
    return chosen[:num_shared], chosen[num_shared:], rejected[num_shared:]


def _refuse(row: Row) -> NoReturn:
    row.fail(
        "these are preference data (answers judged), which Mule checks but does not train on",
        f"train on the good answers alone: {_command(row)}",
    )


def _command(row: Row) -> str:
    """The command that keeps the good answers."""
    file = Path(row.file)
    if data_suffix(file) not in (".json", ".jsonl") or compression(file) == ".zst":
        return 'write them as rows of "prompt" and "completion"'
    read = "zcat" if compression(file) else "cat"
    new = f"chosen-{file.name.partition('.')[0]}.jsonl"
    rows = '(if type == "array" then .[] else . end)'
    return f"{read} {shlex.quote(row.file)} | jq -c '{rows} | {_jq(row)}' > {shlex.quote(new)}"


def _jq(row: Row) -> str:
    value = row.value
    label = next((key for key in _LABELS if value.get(key) is not None), None)
    if label and value.get("chosen") is None:
        return f"select(.{label}) | del(.{label})"
    for key in _CHATS:
        if value.get(key) is not None:
            answers = ".chosen" if isinstance(value["chosen"], list) else "[.chosen]"
            return f"{{{key}: (.{key} + {answers})}}"
    if value.get("instruction") is not None:
        return "{instruction, input, output: .chosen}"
    if isinstance(value["chosen"], list):
        return "{messages: ((.prompt // []) + .chosen)}"
    return "{prompt, completion: .chosen}"


_PAIR = ("chosen", "rejected")
FORMAT = Format(
    "preference",
    "preference",
    "chosen and rejected answers (DPO), or answers with a label (KTO); checked, not trained on",
    keys=(
        _PAIR,
        ("prompt", *_PAIR),
        ("messages", *_PAIR),
        ("conversations", *_PAIR),
        ("instruction", *_PAIR),
        ("instruction", "output", *_PAIR),
        *(
            (*answered, label)
            for label in _LABELS
            for answered in (
                ("messages",),
                ("conversations",),
                ("prompt", "completion"),
                ("instruction", "output"),
            )
        ),
    ),
    optional=("input", "system", "history", "tools", "functions"),
    parse=_parse,
    refuse=_refuse,
)
