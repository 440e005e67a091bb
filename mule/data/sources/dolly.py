"""Dolly's instructions: {"instruction": ..., "context": ..., "response": ..., "category": ...}."""

from __future__ import annotations

from mule.data.sources.alpaca import prompt_of
from mule.data.sources.format import Format
from mule.data.sources.items import Conversation, Message
from mule.data.sources.row import Row
from mule.data.sources.turns import conversation


def _parse(row: Row) -> Conversation:
    answer = Message("assistant", row.text("response"))
    return conversation(row, [*prompt_of(row, context="context"), answer])


FORMAT = Format(
    "dolly",
    "conversation",
    "instructions with an optional context, as databricks-dolly-15k writes them",
    keys=(("instruction", "context", "response"), ("instruction", "response", "category")),
    facts=("category",),
    parse=_parse,
)
