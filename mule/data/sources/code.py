"""Programming problems: MBPP as chats, HumanEval as a set to measure with."""

from __future__ import annotations

from typing import NoReturn

from mule.data.sources.format import Format
from mule.data.sources.items import Conversation, Message
from mule.data.sources.row import Row
from mule.data.sources.turns import conversation


def _parse_mbpp(row: Row) -> Conversation:
    task, code = row.text("text"), row.text("code")
    return conversation(row, [Message("user", task), Message("assistant", code)])


def _parse_humaneval(row: Row) -> Conversation:
    task, code = row.text("prompt"), row.text("canonical_solution")
    return conversation(row, [Message("user", task), Message("assistant", code)])


def _refuse_humaneval(row: Row) -> NoReturn:
    row.fail(
        "these are HumanEval's problems, made to measure a model: one trained on them has no score",
        "leave the file out; or set data.format=humaneval, to use it all the same",
    )


MBPP = Format(
    "mbpp",
    "conversation",
    "a task in words and its Python code, as MBPP writes them",
    keys=(("text", "code", "test_list"),),
    facts=("task_id", "test_list", "test_setup_code", "challenge_test_list"),
    parse=_parse_mbpp,
)
HUMANEVAL = Format(
    "humaneval",
    "conversation",
    "HumanEval's functions to complete; to measure with, so read for training only when named",
    keys=(("prompt", "canonical_solution"),),
    facts=("task_id", "test", "entry_point"),
    parse=_parse_humaneval,
    refuse=_refuse_humaneval,
)
