"""The items of a task: what each asks, in a chat and as plain text, and what is right."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mule.config.hints import near
from mule.data.sources import Conversation, Document, expand, read
from mule.data.sources.row import Row, type_name
from mule.data.sources.rows import read_rows
from mule.errors import DataError, UserError
from mule.evaluate.numbers import final_number
from mule.evaluate.scorers import Check, checks_of
from mule.evaluate.task_file import REFERRING, CheckSection, TaskFile, find_task, read_task
from mule.generate.request import Message

_COLUMN = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")
_FILLED_CHECKS = ("contains", "contains_any", "lacks")  # the others hold braces of their own
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Item:
    """One question. `text` is what a model is given that knows no chat.

    `references` are the right answers; of a choice, `right` is the place of its answer among
    `choices`. `place` says where it stands, for messages.
    """

    messages: tuple[Message, ...]
    text: str
    references: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    right: int = 0
    group: str = ""
    checks: dict[str, Check] = field(default_factory=dict)
    place: str = ""

    @property
    def question(self) -> str:
        """The last thing that is asked."""
        return self.messages[-1]["content"]


@dataclass(frozen=True)
class Task:
    """A task with its items."""

    name: str
    file: TaskFile
    items: tuple[Item, ...]

    @property
    def is_choice(self) -> bool:
        return self.file.score == "choice"


def load_task(name: str, data: Sequence[str | Path] | None = None) -> Task:
    """The task called `name`, or of the file `name`; `data` are its rows where it has none.

    Raises ConfigError and UserError for the task, DataError with the line for a row.
    """
    path = find_task(name)
    task = read_task(path)
    rows: list[Row]
    if task.items:
        rows = [Row(value, f"{path} item", i) for i, value in enumerate(task.items, start=1)]
        return Task(path.stem, task, tuple(_of_row(task, row) for row in rows))
    if task.data is not None:
        data = [path.parent / task.data]
    if not data:
        raise UserError(
            f"the task {path.stem} comes without data", f"name it: --task {name} --data FILE"
        )
    files = expand(data)
    if task.prompt is None:
        items = [_of_chat(task, item) for item in read(files)]
    else:
        items = [_of_row(task, row) for file in files for row in read_rows(file)]
    if not items:
        raise UserError(f"{files[0]}: no rows in it", "name a file that has some")
    return Task(path.stem, task, tuple(items))


def needs_data(name: str) -> bool:
    """Whether a task has no rows of its own."""
    task = read_task(find_task(name))
    return not task.items and task.data is None


# ---------------------------------------------------------------- from a row


def _of_row(task: TaskFile, row: Row) -> Item:
    assert task.prompt is not None
    question = _filled(task.prompt, row)
    if not question.strip():
        row.fail("the question is empty", "write one, or remove the row")
    text = _filled(task.text_prompt, row) if task.text_prompt else question
    choices, right, references = (), 0, ()
    if task.score == "choice":
        choices = _choices(task, row)
        right = _right(task, row, choices)
        references = (choices[right],)
    elif task.answer is not None:
        given = [task.answer] if isinstance(task.answer, str) else task.answer
        references = tuple(part for template in given for part in _parts(template, row))
        _check_references(task, references, row)
    return Item(
        _messages(task, question),
        text,
        references,
        choices,
        right,
        str(row.value.get(task.group, "")) if task.group else "",
        checks_of(_checks(task, row)),
        _place(row.file, row.line),
    )


def _of_chat(task: TaskFile, item: Document | Conversation) -> Item:
    """The last answer of a chat is the reference; what stands before it is the question."""
    if isinstance(item, Document):
        raise DataError(
            item.file, item.line, "text, where a task has questions", "add a prompt to the task"
        )
    place = max(i for i, turn in enumerate(item.messages) if turn.role == "assistant")
    before = [{"role": turn.role, "content": turn.content} for turn in item.messages[:place]]
    if not before or before[-1]["role"] == "system":
        raise DataError(item.file, item.line, "nothing is asked before the answer", "remove it")
    if task.system is not None and before[0]["role"] != "system":
        before.insert(0, {"role": "system", "content": task.system})
    references: tuple[str, ...] = ()
    if task.score in REFERRING:
        references = (item.messages[place].content,)
        _check_references(task, references, Row({}, item.file, item.line))
    checks = checks_of(_checks(task, Row({}, item.file, item.line)))
    where = _place(item.file, item.line)
    return Item(tuple(before), _as_text(before), references, checks=checks, place=where)


def _messages(task: TaskFile, question: str) -> tuple[Message, ...]:
    asked: Message = {"role": "user", "content": question}
    return (asked,) if task.system is None else ({"role": "system", "content": task.system}, asked)


def _as_text(messages: Sequence[Message]) -> str:
    """A chat for a model that continues text."""
    names = {"user": "Question", "assistant": "Answer"}
    said = [(names.get(m["role"], ""), m["content"]) for m in messages]
    return "\n".join(f"{name}: {text}" if name else text for name, text in said) + "\nAnswer:"


def _check_references(task: TaskFile, references: Sequence[str], row: Row) -> None:
    if not any(part.strip() for part in references):
        row.fail("the right answer is empty", "write it, or remove the row")
    if task.score == "number" and final_number(references[0]) is None:
        row.fail(
            f"the right answer holds no number: {references[0][:60]!r}",
            "write one, as in `#### 24`, or remove the row",
        )


def _choices(task: TaskFile, row: Row) -> tuple[str, ...]:
    if isinstance(task.choices, list):
        return tuple(_filled(text, row) for text in task.choices)
    assert task.choices is not None
    found = _column(task.choices, row)
    if isinstance(found, dict) and isinstance(found.get("text"), list):
        found = found["text"]  # ARC's {"text": [...], "label": [...]}
    if not isinstance(found, list) or len(found) < 2:
        row.fail(f'"{task.choices}" is no list of two or more answers', "list the answers there")
    texts = tuple(part if isinstance(part, str) else str(part) for part in found)
    if len(set(texts)) < len(texts) or not all(text.strip() for text in texts):
        row.fail(f'"{task.choices}" has an answer twice, or an empty one', "correct the list")
    return texts


def _right(task: TaskFile, row: Row, choices: Sequence[str]) -> int:
    """A number is a place, from 0; a text is one of the answers, or else its letter."""
    assert isinstance(task.answer, str)
    (found,) = _parts(task.answer, row, raw=True)[:1] or [""]
    if isinstance(found, int) and not isinstance(found, bool):
        place = found
    elif str(found) in choices:
        place = choices.index(str(found))
    else:
        text = str(found).strip().upper()
        place = _LETTERS.index(text) if len(text) == 1 and text in _LETTERS else -1
    if not 0 <= place < len(choices):
        row.fail(
            f"the right answer is {found!r}, which is none of {len(choices)} choices",
            "give its text, its letter (A, B, ...) or its place, from 0",
        )
    return place


def _checks(task: TaskFile, row: Row) -> dict[str, Any]:
    """The checks of one item, their columns filled."""
    wanted = {name.partition(".")[0] for name in task.checks.given()}
    found = {}
    for name in CheckSection.model_fields:
        if name in wanted:
            value = getattr(task.checks, name)
            if name in _FILLED_CHECKS:
                value = [part for template in value for part in _parts(template, row)]
            found[name] = value
    return found


# ---------------------------------------------------------------- columns


def _filled(template: str, row: Row) -> str:
    """The template with each {column} replaced; {{ and }} are braces."""

    def put(match: re.Match[str]) -> str:
        if match[0] in ("{{", "}}"):
            return match[0][0]
        value = _column(match[1], row)
        if isinstance(value, (dict, list)) or value is None:
            row.fail(f'"{match[1]}" is {type_name(value)}, not text', "name a column of texts")
        return str(value)

    return _COLUMN.sub(put, template)


def _parts(template: str, row: Row, *, raw: bool = False) -> list[Any]:
    """What a template gives: where it is one column that holds a list, each of its texts."""
    whole = re.fullmatch(r"\{([^{}]+)\}", template)
    if whole is None:
        return [_filled(template, row)]
    value = _column(whole[1], row)
    values = value if isinstance(value, list) else [value]
    if any(isinstance(part, (dict, list)) or part is None for part in values):
        row.fail(f'"{whole[1]}" is {type_name(value)}, not text', "name a column of texts")
    return values if raw else [str(part) for part in values]


def _column(name: str, row: Row) -> Any:
    if name not in row.value:
        has = ", ".join(row.value) or "none"
        match = near(name, row.value)
        hint = f"did you mean {{{match}}}?" if match else "name one of them in the task file"
        row.fail(f'the task asks for "{name}"; the row\'s columns are {has}', hint)
    return row.value[name]


def _place(file: str, line: int) -> str:
    return f"{Path(file).name}:{line}"
