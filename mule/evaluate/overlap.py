"""Which items of a task the training data holds already: scores on those show memory, not skill."""

from __future__ import annotations

from collections.abc import Sequence

from mule.data.clean.compare import TrainingItem
from mule.data.clean.contamination import Evaluation
from mule.data.sources.items import Conversation, Message
from mule.evaluate.items import Item, Task


class Training:
    """What a model was trained on, as hashed passages of 13 words."""

    def __init__(self, items: Sequence[TrainingItem]) -> None:
        self._passages = Evaluation(items)

    def overlapping(self, task: Task) -> dict[int, str]:
        """Place of an item -> the words that it shares with the training data.

        Of a short question the whole is compared with whole first questions and documents.
        """
        items = [_as_training_item(item) for item in task.items]
        return {leak.index: leak.shared for leak in self._passages.leaks(items)}


def _as_training_item(item: Item) -> TrainingItem:
    turns = [Message(turn["role"], turn["content"]) for turn in item.messages]
    if not item.references:
        return Conversation(tuple(turns), item.place, 0)
    answered = Message("assistant", item.references[0])
    return Conversation((*turns, answered), item.place, 0)
