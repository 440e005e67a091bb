"""A task file: what is asked, of whom the answers come, and how they are judged. Read strictly."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from mule.config.hints import near
from mule.config.load import recipe_text
from mule.config.reader import YamlProblem, parse_yaml, plain
from mule.config.schema import Count, Text
from mule.config.section import Problem, Section, knob, section
from mule.config.section_check import Places, checked
from mule.errors import ConfigError, UserError
from mule.evaluate.json_schema import refusal

Score = Literal["choice", "number", "exact", "regex", "f1", "checks", "stops", "repetition"]
REFERRING = ("choice", "number", "exact", "f1")  # these compare with a reference
BUNDLED = Path(__file__).resolve().parent / "tasks"
_HINT = "docs/eval.md describes a task file"


class CheckSection(Section):
    """What every answer must be, where score is checks; {column} is filled from the row."""

    contains: list[Text] = knob([], "Words that must be there, all of them, in any case.")
    contains_any: list[Text] = knob([], "Words of which one must be there.")
    lacks: list[Text] = knob([], "Words that must not be there.")
    matches: Text | None = knob(None, "A regular expression that must be found.")
    lacks_match: Text | None = knob(None, "A regular expression that must not be found.")
    json_schema: dict[str, Any] | None = knob(
        None, "The schema that the answer, as JSON, must follow.", form="a JSON schema"
    )
    language: Annotated[str, Field(pattern="^[a-z]{2}$")] | None = knob(
        None, "The language it must be in.", form="a code of two letters, such as en"
    )
    min_words: Count | None = knob(None, "The fewest words.")
    max_words: Count | None = knob(None, "The most words.")
    max_characters: Count | None = knob(None, "The most characters.")
    max_lines: Count | None = knob(None, "The most lines.")

    def conflicts(self) -> Iterator[Problem]:
        for name in ("matches", "lacks_match"):
            yield from _bad_pattern(name, getattr(self, name))
        if self.json_schema is not None and (reason := refusal(self.json_schema)):
            yield Problem("json_schema", reason)


class TaskFile(Section):
    """One task; docs/eval.md shows some."""

    about: Text | None = knob(None, "What the task shows, in one line.")
    score: Score = knob(..., "How an answer is judged.")
    data: Text | None = knob(None, "A file of rows, beside the task file.")
    items: list[dict[str, Any]] = knob(
        [], "The rows themselves, in place of a file.", form="a list of rows, each with its columns"
    )
    prompt: Text | None = knob(
        None, "The question, with {columns}. Without it the rows are chats, and ask themselves."
    )
    text_prompt: Text | None = knob(
        None, "What a model is given that continues text and knows no chat. Default: the prompt."
    )
    system: Text | None = knob(None, "A system prompt.")
    answer: Text | list[Text] | None = knob(
        None, "The right answer, with {columns}, or several of which each is right."
    )
    choices: Text | list[Text] | None = knob(
        None, "Of score choice: the column that has the list of answers, or the list itself."
    )
    pattern: Text | None = knob(None, "Of score regex: what the whole answer must match.")
    checks: CheckSection = section(CheckSection)
    group: Text | None = knob(None, "A column by which the scores are listed too.")
    chat: Literal["auto", "yes", "no"] = knob(
        "auto",
        "Whether to ask as in a chat. auto: as the model does, but never for score choice.",
    )
    max_tokens: Count = knob(256, "Length of an answer at most.", unit="tokens")
    stop: list[Text] = knob([], "Texts that end an answer.")

    def idle(self) -> Iterator[Problem]:
        why = "cannot take effect: nothing is generated where score is choice; remove it"
        for key in ("max_tokens", "stop") if self.score == "choice" else ():
            yield Problem(key, why, because="score")
        why = f"cannot take effect where score is {self.score}; remove it"
        for key, score in (("choices", "choice"), ("pattern", "regex")):
            if self.score != score:
                yield Problem(key, why, because="score")
        if self.score not in REFERRING:
            yield Problem("answer", why, because="score")
        if self.prompt is None:
            yield Problem("text_prompt", "cannot take effect without a prompt; add one")
            yield Problem("group", "cannot take effect where the rows are chats; add a prompt")

    def conflicts(self) -> Iterator[Problem]:
        if self.data is not None and self.items:
            yield Problem("items", "the rows are in data too; remove one of the two")
        if self.items and self.prompt is None:
            yield Problem("items", "rows written here need a prompt, such as prompt: '{question}'")
        if self.score == "choice":
            yield from self._choice_conflicts()
        elif self.score in REFERRING and self.prompt is not None and self.answer is None:
            yield Problem("answer", f"is missing: score {self.score} compares with it")
        if self.score == "regex" and self.pattern is None:
            yield Problem("pattern", "is missing: score regex needs one")
        yield from _bad_pattern("pattern", self.pattern)
        given = self.checks.given()
        if given and self.score != "checks":
            why = f"cannot take effect where score is {self.score}; remove them, or score: checks"
            yield Problem("checks", why)
        if not given and self.score == "checks":
            yield Problem("checks", "are missing: score checks needs one at least")

    def _choice_conflicts(self) -> Iterator[Problem]:
        for key in ("prompt", "choices", "answer"):
            if getattr(self, key) is None:
                yield Problem(key, "is missing: score choice needs prompt, choices and answer")
        if isinstance(self.choices, list) and len(set(self.choices)) < max(2, len(self.choices)):
            yield Problem("choices", "must be two or more, each other than the rest")
        if isinstance(self.answer, list):
            yield Problem("answer", "is one text where score is choice")


def bundled() -> dict[str, Path]:
    """Name -> file of each task that comes with Mule."""
    return {file.stem: file for file in sorted(BUNDLED.glob("*.yaml"))}


def find_task(name: str) -> Path:
    """The file of a task: one of Mule's by its name, or the user's own."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
        raise UserError(f"{path}: no such task file", f"tasks of Mule: {', '.join(bundled())}")
    if name in bundled():
        return bundled()[name]
    match = near(name, bundled())
    hint = f"did you mean {match}?" if match else f"tasks of Mule: {', '.join(bundled())}"
    raise UserError(f"there is no task called {name}", f"{hint} Your own: --task FILE.yaml")


def read_task(file: Path) -> TaskFile:
    """A task file, checked. Raises ConfigError, listing every problem with its line."""
    text = recipe_text(file)
    try:
        node = parse_yaml(text)
        values = plain(node) if node is not None else {}
    except YamlProblem as problem:
        raise ConfigError([f"{file}:{problem.line}: {problem.message}"], _HINT) from None
    if not isinstance(values, dict):
        raise ConfigError([f"{file}: a task is keys and values, such as score: exact"], _HINT)
    found, problems = checked(TaskFile, values, Places(str(file), node, {}, "a task"))
    if found is None:
        raise ConfigError(problems, _HINT)
    return found


def _bad_pattern(key: str, pattern: str | None) -> Iterator[Problem]:
    try:
        re.compile(pattern or "")
    except re.error as error:
        yield Problem(key, f"is no regular expression: {error}")
