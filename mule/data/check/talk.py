"""What the conversations are made of: roles, turns, system prompts, answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from mule.data.check.findings import Finding, Problem, counted, share_text, shorten
from mule.data.check.row import CheckRow
from mule.data.sources.items import Conversation, Preference

_MAX_DISTINCT = 20_000  # system prompts and openings kept: memory stays bounded
_OPENING_WORDS = 4
_OPENING_SHARE = 0.2  # one answer in five opens alike: the model will open so too
_MIN_ANSWERS = 20  # fewer cannot show a habit
_SYSTEM_SHARE = 0.05  # below it, rows with or without a system prompt are a slip
_SHORT_SHARE = 0.05  # of one-word answers, worth a word
_SAME_SHARE = 0.01  # of answers that repeat the prompt
_MAX_TURNS_LISTED = 8


class Talk:
    """Counts over the conversations of the training files."""

    def __init__(self) -> None:
        self.roles: Counter[str] = Counter()
        self.turns: Counter[int] = Counter()
        self._systems: Counter[str] = Counter()
        self._openings: Counter[str] = Counter()
        self._num_rows = self._num_answers = self._with_tools = 0
        self._one_word, self._repeats = Finding(), Finding()
        self._no_question, self._no_choice = Finding(), Finding()

    def add(self, row: CheckRow) -> None:
        if not row.messages:
            return
        self._num_rows += 1
        self.roles.update(message.role for message in row.messages)
        _count(self._systems, next((m.content for m in row.messages if m.role == "system"), ""))
        if isinstance(row.item, Preference):
            self._add_preference(row, row.item)
        elif isinstance(row.item, Conversation):
            self._add_conversation(row, row.item)

    def _add_conversation(self, row: CheckRow, item: Conversation) -> None:
        answers = [m for m in item.messages if m.role == "assistant"]
        self.turns[len(answers)] += 1
        self._with_tools += any(m.tool_calls for m in answers)
        if any(m.role == "user" and not m.content.strip() for m in item.messages):
            self._no_question.add(row.place())
        for before, message in zip(item.messages, item.messages[1:], strict=False):
            if message.role == "assistant" and message.content.strip():
                self._add_answer(row, before.content, message.content)

    def _add_answer(self, row: CheckRow, prompt: str, answer: str) -> None:
        self._num_answers += 1
        words = answer.split(maxsplit=_OPENING_WORDS)
        if len(words) == 1 and len(answer) < 40:  # a line of code is one word too
            self._one_word.add(row.place(answer))
        if len(words) > _OPENING_WORDS:
            _count(self._openings, " ".join(words[:_OPENING_WORDS]))
        if answer.strip() == prompt.strip():
            self._repeats.add(row.place(answer))

    def _add_preference(self, row: CheckRow, item: Preference) -> None:
        if item.rejected and item.chosen == item.rejected:
            self._no_choice.add(row.place())

    def figures(self) -> dict[str, Any]:
        turns = dict(sorted(self.turns.items())[:_MAX_TURNS_LISTED])
        return {
            "roles": dict(self.roles),
            "turns": turns,
            "turns_longest": max(self.turns, default=0),
            "with_tools": self._with_tools,
            "system_prompts": len([text for text in self._systems if text]),
        }

    def problems(self) -> Iterator[Problem]:
        yield from self._about_systems()
        yield from self._about_answers()
        if self._no_question.count:
            yield Problem(
                "warning",
                "empty-prompt",
                f"{counted(self._no_question.count, 'row')} in which the user says nothing",
                "write the question, or remove the row: the answer would come from nowhere",
                self._no_question,
            )
        if self._no_choice.count:
            yield Problem(
                "warning",
                "no-preference",
                f"{counted(self._no_choice.count, 'pair')} whose two answers are the same",
                "remove them: there is nothing to prefer",
                self._no_choice,
            )

    def _about_systems(self) -> Iterator[Problem]:
        distinct = len([text for text in self._systems if text])
        without = self._systems[""]
        total = self._systems.total()
        share_without = without / max(1, total)
        if distinct and without:
            few = min(share_without, 1 - share_without) < _SYSTEM_SHARE
            yield Problem(
                "warning",
                "system-mixed",
                f"{total - without:,} of {total:,} rows have a system prompt, {without:,} have none"
                + (" (a slip?)" if few else ""),
                "give every row one, or none: with the other kind the model would be a stranger",
            )
        if distinct > 1:
            text, count = max(
                ((t, n) for t, n in self._systems.items() if t), key=lambda pair: pair[1]
            )
            yield Problem(
                "note",
                "system-varies",
                f'{distinct:,} different system prompts; the most common ("{shorten(text)}") '
                f"in {share_text(count, total)} of the rows",
                "fine if it is meant; for one persona, use one text everywhere",
            )

    def _about_answers(self) -> Iterator[Problem]:
        total = self._num_answers
        if self._openings and total >= _MIN_ANSWERS:
            words, count = self._openings.most_common(1)[0]
            if count > _OPENING_SHARE * total:
                yield Problem(
                    "warning",
                    "openings",
                    f'{share_text(count, total)} of the answers begin with "{shorten(words)}"',
                    "vary them, or the model will open nearly every answer so",
                )
        if self._repeats.count:
            yield Problem(
                "warning" if self._repeats.count > _SAME_SHARE * total else "note",
                "echo",
                f"{counted(self._repeats.count, 'answer')} identical to the prompt",
                "remove them, or give the answer that was meant",
                self._repeats,
            )
        if self._one_word.count > _SHORT_SHARE * total:
            yield Problem(
                "note",
                "one-word",
                f"{counted(self._one_word.count, 'answer')} of one word "
                f"({share_text(self._one_word.count, total)})",
                "fine for a classifier; a model for talking becomes curt",
                self._one_word,
            )


def _count(counter: Counter[str], text: str) -> None:
    """Count `text`; once the counter is full, only what it knows already."""
    if text in counter or len(counter) < _MAX_DISTINCT:
        counter[text] += 1
