"""Sentences that keep the template and the values they were made of, to be told in another language."""

from __future__ import annotations

from collections.abc import Sequence


class Message(str):
    """An English sentence: `Message("{} of {:,} updates", 3, 200)` is the text `3 of 200 updates`.

    `template` and `values` are what it was made of; a value may be a message itself.
    """

    template: str
    values: tuple[object, ...]

    def __new__(cls, template: str, *values: object) -> Message:
        made = super().__new__(cls, template.format(*values))
        made.template, made.values = template, values
        return made

    def __getnewargs__(self) -> tuple[object, ...]:  # type: ignore[override]
        return (self.template, *self.values)

    def __add__(self, other: str) -> Message:
        return Message("{}{}", self, other)

    def __radd__(self, other: str) -> Message:
        return Message("{}{}", other, self)


def joined(separator: str, parts: Sequence[str]) -> Message:
    """The parts with the separator between them, each still as it was made."""
    return Message(separator.join(["{}"] * len(parts)), *parts)
