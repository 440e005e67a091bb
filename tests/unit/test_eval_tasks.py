"""Task files: those of Mule, what is refused and in which words, and the items they make."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mule.errors import ConfigError, DataError, UserError
from mule.evaluate.items import load_task, needs_data
from mule.evaluate.task_file import bundled, read_task


def task(folder: Path, text: str, rows: list[dict[str, Any]] | None = None) -> str:
    """A task file, and its rows beside it."""
    file = folder / "mine.yaml"
    file.write_text(text)
    if rows is not None:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / "rows.jsonl").write_text("".join(lines))
    return str(file)


def test_the_tasks_of_mule_are_sound() -> None:
    assert set(bundled()) == {"general", "gsm8k", "repetition", "stops"}
    general = load_task("general")
    assert len(general.items) == 100
    assert {item.group for item in general.items} == {"facts", "arithmetic", "completion", "format"}
    assert len({item.text for item in general.items}) == 100
    for item in general.items:
        assert len(item.choices) == 4 and item.choices[item.right] == item.references[0]
    places = [item.right for item in general.items]
    assert all(15 <= places.count(place) <= 35 for place in range(4))  # none is right by its place
    longest = [max(item.choices, key=len) for item in general.items]
    taken = sum(item.choices[item.right] == text for item, text in zip(general.items, longest))
    assert taken < 50  # nor by its length
    assert len(load_task("stops").items) == len(load_task("repetition").items) == 20
    assert needs_data("gsm8k") and not needs_data("general")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "score is missing"),
        ("- score", "a task is keys and values, such as score: exact"),
        ("score: exact\nscore: f1", ":2: score: given twice; remove one"),
        ("scores: exact", ":1: scores: no such key; did you mean `score`?"),
        ("score: exat", ":1: score: expected choice, number, exact, regex, f1, checks, stops or "),
        ("score: exat", "found `exat`; did you mean `exact`?"),
        ("score: exact\nzz: 1", "no such key; a task has about, score, data, items, prompt"),
        ("score: exact\nprompt: '{q}'", "answer: is missing: score exact compares with it"),
        ("score: choice", "score choice needs prompt, choices and answer"),
        (
            "score: choice\nprompt: q\nchoices: [a, a]\nanswer: a",
            ":3: choices: must be two or more, each other than the rest",
        ),
        (
            "score: choice\nprompt: q\nchoices: c\nanswer: a\nmax_tokens: 9",
            ":5: max_tokens: cannot take effect: nothing is generated where score is choice",
        ),
        ("score: regex", "pattern: is missing: score regex needs one"),
        ("score: regex\npattern: '('", ":2: pattern: is no regular expression: missing )"),
        ("score: exact\npattern: a", ":2: pattern: cannot take effect where score is exact"),
        ("score: stops\nanswer: a", ":2: answer: cannot take effect where score is stops"),
        ("score: checks", "checks: are missing: score checks needs one at least"),
        ("score: exact\nchecks: {max_words: 3}", ":2: checks: cannot take effect where score is"),
        ("score: checks\nchecks: {contain: [a]}", "no such key; did you mean `contains`?"),
        ("score: checks\nchecks: {contains: a}", "expected a list of texts, found `a`; write [a]"),
        ("score: checks\nchecks: {max_words: 0}", "expected a whole number of at least 1"),
        ("score: checks\nchecks: {language: english}", "a code of two letters, such as en"),
        (
            "score: checks\nchecks: {json_schema: {anyOf: []}}",
            ":2: checks.json_schema: the schema has `anyOf`; what can be checked is",
        ),
        ("score: exact\ntext_prompt: a", "text_prompt: cannot take effect without a prompt"),
        ("score: exact\nitems: [{a: b}]", "rows written here need a prompt"),
        (
            "score: stops\nprompt: a\nitems: [{a: b}]\ndata: x.jsonl",
            "items: the rows are in data too; remove one of the two",
        ),
        ("score: stops\nprompt: a\nitems: [1]", ":3: items: expected entries of a name"),
        ("score: !!python/name:os.system x", "the tag"),
    ],
)
def test_what_a_task_file_cannot_say(tmp_path: Path, text: str, said: str) -> None:
    file = task(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        read_task(Path(file))
    assert said in caught.value.message
    assert file in caught.value.message
    assert caught.value.hint == "docs/eval.md describes a task file"


def test_a_task_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_task("generl")
    assert caught.value.message == "there is no task called generl"
    assert caught.value.hint == "did you mean general? Your own: --task FILE.yaml"
    with pytest.raises(UserError, match="no such task file"):
        load_task(str(tmp_path / "x.yaml"))
    with pytest.raises(UserError) as caught:
        load_task("gsm8k")
    assert caught.value.message == "the task gsm8k comes without data"
    assert caught.value.hint == "name it: --task gsm8k --data FILE"


CHOICE = "score: choice\nprompt: 'Q: {q}'\nchoices: c\nanswer: '{a}'\ndata: rows.jsonl\n"
EXACT = "score: exact\nprompt: '{q}'\nanswer: '{a}'\ndata: rows.jsonl\n"


@pytest.mark.parametrize(
    ("answer", "right"), [(1, 1), ("no", 1), ("A", 0), ("yes", 0), ("c", 2), (2, 2)]
)
def test_the_right_answer_by_text_letter_or_place(
    tmp_path: Path, answer: str | int, right: int
) -> None:
    file = task(tmp_path, CHOICE, [{"q": "?", "c": ["yes", "no", "perhaps"], "a": answer}])
    (item,) = load_task(file).items
    assert (item.text, item.right) == ("Q: ?", right)
    assert item.place == "rows.jsonl:1"


@pytest.mark.parametrize(
    ("text", "row", "said", "hint"),
    [
        (CHOICE, {"q": "?", "c": ["yes", "no"], "a": 2}, "which is none of 2 choices", "from 0"),
        (CHOICE, {"q": "?", "c": ["yes", "no"], "a": "nein"}, "'nein', which is none", "its text"),
        (CHOICE, {"q": "?", "c": "yes", "a": 0}, '"c" is no list of two or more', "list the"),
        (CHOICE, {"q": "?", "c": ["a", "a"], "a": 0}, "an answer twice", "correct the list"),
        (
            EXACT,
            {"question": "?", "a": "b"},
            'asks for "q"; the row\'s columns are question, a',
            "in the task file",
        ),
        (EXACT, {"q": "?", "ab": "b"}, 'the task asks for "a"', "did you mean {ab}?"),
        (EXACT, {"q": " ", "a": "b"}, "the question is empty", "remove the row"),
        (EXACT, {"q": "?", "a": ""}, "the right answer is empty", "write it"),
        (EXACT, {"q": {"x": 1}, "a": "b"}, '"q" is an object, not text', "a column of texts"),
        (
            EXACT.replace("exact", "number"),
            {"q": "?", "a": "two"},
            "holds no number: 'two'",
            "####",
        ),
    ],
)
def test_a_row_that_does_not_fit(
    tmp_path: Path, text: str, row: dict[str, Any], said: str, hint: str
) -> None:
    good = {"q": "?", "c": ["x", "y"], "a": 1}
    with pytest.raises(DataError) as caught:
        load_task(task(tmp_path, text, [good, row]))
    assert caught.value.line == 2
    assert said in caught.value.message and hint in caught.value.hint


def test_columns_fill_prompts_answers_and_checks(tmp_path: Path) -> None:
    text = """\
score: checks
system: You are {{brief}}.
prompt: "Say {word}, {{please}}."
text_prompt: "Word: {word}\\nSaid:"
checks: {contains: ["{word}"], lacks: ["{others}"], max_words: 9}
data: rows.jsonl
"""
    rows = [{"word": "ahoy", "others": ["hello", "hi"]}, {"word": "arr", "others": "hello"}]
    found = load_task(task(tmp_path, text, rows))
    assert found.name == "mine"
    first, second = found.items
    assert [m["content"] for m in first.messages] == ["You are {{brief}}.", "Say ahoy, {please}."]
    assert first.text == "Word: ahoy\nSaid:"
    assert list(first.checks) == ["contains", "lacks", "max_words"]
    assert first.checks["contains"]("Ahoy!") and not second.checks["contains"]("Ahoy!")
    assert not first.checks["lacks"]("hi") and second.checks["lacks"]("hi")


def test_without_a_prompt_rows_are_chats(tmp_path: Path) -> None:
    turns = [("system", "Be brief."), ("user", "a?"), ("assistant", "b"), ("user", "c?")]
    chat = [{"role": role, "content": text} for role, text in [*turns, ("assistant", "d")]]
    rows = [{"messages": chat}, {"messages": chat[1:3]}]
    found = load_task(task(tmp_path, "score: exact\nsystem: Own.\ndata: rows.jsonl\n", rows))
    first, second = found.items
    assert [m["content"] for m in first.messages] == ["Be brief.", "a?", "b", "c?"]
    assert first.text == "Be brief.\nQuestion: a?\nAnswer: b\nQuestion: c?\nAnswer:"
    assert first.references == ("d",)
    assert [m["content"] for m in second.messages] == ["Own.", "a?"]
    (tmp_path / "rows.txt").write_text("A text.\n")
    plain = task(tmp_path, "score: exact\ndata: rows.txt\n")
    with pytest.raises(DataError, match="text, where a task has questions"):
        load_task(plain)


def test_several_right_answers_and_fixed_choices(tmp_path: Path) -> None:
    text = "score: f1\nprompt: '{q}'\nanswer: ['{a}', '{b} or {a}']\ndata: rows.jsonl\n"
    rows = [{"q": "?", "a": ["x", "y"], "b": "z"}]
    with pytest.raises(DataError, match='"a" is a list, not text'):
        load_task(task(tmp_path, text, rows))
    text = text.replace("'{b} or {a}'", "'{b}'")
    assert load_task(task(tmp_path, text, rows)).items[0].references == ("x", "y", "z")
    fixed = "score: choice\nprompt: '{q}'\nchoices: [yes, no]\nanswer: '{a}'\ndata: rows.jsonl\n"
    rows = [{"q": "Is it {so}?", "a": "no"}]
    (item,) = load_task(task(tmp_path, fixed, rows)).items
    assert (item.text, item.choices, item.right) == ("Is it {so}?", ("yes", "no"), 1)


def test_data_named_on_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "test.jsonl"
    row = {"question": "How many?", "answer": "2+2=<<2+2=4>>4\n#### 4"}
    file.write_text(json.dumps(row) + "\n")
    (item,) = load_task("gsm8k", [file]).items
    assert item.text == "Question: How many?\nAnswer:"
    assert item.question == "How many?"
    file.write_text("")
    with pytest.raises(DataError):
        load_task("gsm8k", [file])
