"""One task on one model: the scores of every item, and what was answered."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mule import progress
from mule.evaluate.items import Item, Task
from mule.evaluate.numbers import final_number, same_number
from mule.evaluate.scorers import exact, f1, repeated_share
from mule.evaluate.subject import Answer, Pair, Subject

LOWER_IS_BETTER = ("loss", "repetition")
SHOWN_ALONG = ("stops", "repetition")  # of every task with answers, beside its own scores


@dataclass(frozen=True)
class Outcome:
    """What one model made of a task.

    `scores` has of each measure one number an item, in 0..1; the first measure is the task's own.
    `along` are shares of all answers; `answers` has what is kept of each item.
    """

    scores: dict[str, list[float]]
    along: dict[str, float]
    answers: list[dict[str, Any]]

    def mean(self, measure: str) -> float:
        values = self.scores[measure]
        return sum(values) / len(values)


Outcomes = dict[tuple[str, str], Outcome]  # by the names of task and model


def measure(subject: Subject, task: Task) -> Outcome:
    """Every item of a task on one model."""
    return _choose(subject, task) if task.is_choice else _answer(subject, task)


# ---------------------------------------------------------------- by likelihood


def _choose(subject: Subject, task: Task) -> Outcome:
    """The answer taken is the likeliest: by the sum over its tokens, and by that for each character.

    Source: the second is acc_norm of EleutherAI's lm-evaluation-harness.
    """
    in_chat = task.file.chat == "yes"
    pairs = [
        Pair(item.text, choice if in_chat else f" {choice}", item.messages if in_chat else None)
        for item in task.items
        for choice in item.choices
    ]
    with progress.task(f"{task.name}: {subject.name}", total=len(pairs), unit="texts") as bar:
        found = iter(subject.log_likelihoods(pairs, bar=bar))
    scores: dict[str, list[float]] = {"accuracy": [], "accuracy_norm": []}
    kept = []
    for item in task.items:
        sums = [next(found) for _ in item.choices]
        each = [value / len(choice) for value, choice in zip(sums, item.choices)]
        taken, taken_norm = _best(sums), _best(each)
        scores["accuracy"].append(float(taken == item.right))
        scores["accuracy_norm"].append(float(taken_norm == item.right))
        kept.append({"answer": item.choices[taken], "log_likelihoods": sums})
    return Outcome(scores, {}, kept)


def _best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


# ---------------------------------------------------------------- by answers


def _answer(subject: Subject, task: Task) -> Outcome:
    chat = None if task.file.chat == "auto" else task.file.chat == "yes"
    settings = {"max_tokens": task.file.max_tokens, "stop": task.file.stop}
    total = len(task.items)
    with progress.task(f"{task.name}: {subject.name}", total=total, unit="items") as bar:
        found = subject.answers(task.items, chat=chat, bar=bar, **settings)
    if too_long := sum(answer.ended == "too long" for answer in found):
        progress.note(
            f"{task.name}: {too_long} of {total} questions do not fit into the context of "
            f"{subject.name}, and count as answered with nothing",
            "warning",
        )
    along = {name: _mean([_ALONG[name](answer) for answer in found]) for name in SHOWN_ALONG}
    scores = _scores(task, found)
    kept = [{"answer": answer.text, "ended": answer.ended} for answer in found]
    if task.file.score == "number":
        for part, answer in zip(kept, found):
            number = final_number(answer.text)
            part["number"] = "" if number is None else str(number)
    return Outcome(scores, {k: v for k, v in along.items() if k not in scores}, kept)


_ALONG: dict[str, Callable[[Answer], float]] = {
    "stops": lambda answer: float(answer.ended == "stop"),
    "repetition": lambda answer: repeated_share(answer.text),
}


def _scores(task: Task, found: Sequence[Answer]) -> dict[str, list[float]]:
    score, pattern = task.file.score, re.compile(task.file.pattern or "", re.DOTALL)
    pairs = list(zip(task.items, found, strict=True))
    if score == "checks":
        return _checked(pairs)
    if score in _ALONG:
        return {score: [_ALONG[score](answer) for answer in found]}
    judge: dict[str, tuple[str, Callable[[Item, str], float]]] = {
        "number": ("exact_match", lambda item, text: same_number(text, item.references[0])),
        "exact": ("exact_match", lambda item, text: exact(text, item.references)),
        "f1": ("f1", lambda item, text: f1(text, item.references)),
        "regex": ("match", lambda item, text: pattern.fullmatch(text.strip()) is not None),
    }
    name, judged = judge[score]
    return {name: [float(judged(item, answer.text)) for item, answer in pairs]}


def _checked(pairs: Sequence[tuple[Item, Answer]]) -> dict[str, list[float]]:
    """All checks together first, then each alone."""
    alone = {
        name: [float(item.checks[name](answer.text)) for item, answer in pairs]
        for name in pairs[0][0].checks
    }
    together = [float(all(values)) for values in zip(*alone.values(), strict=True)]
    return {"all_checks": together, **(alone if len(alone) > 1 else {})}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
