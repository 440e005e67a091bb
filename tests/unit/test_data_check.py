"""`mule data check`: every problem planted in a small file is found at its line, and no other."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mule.data.check import Part, Settings, check
from mule.data.sources.options import ReadOptions
from mule.tokenizer import Tokenizer

Row = dict[str, Any]
_TOPICS = "bread rain iron glass wool salt paper stone honey copper linen amber coal reed".split()
_VERBS = "made kept sold found cut dried mixed carried weighed stored painted shaped".split()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    words = [f"How is {topic} {verb} in winter by hand?" for topic in _TOPICS for verb in _VERBS]
    return Tokenizer.train(words, 400)


def _chat(number: int, answer: str | None = None, question: str | None = None) -> Row:
    """A row unlike every other number's."""
    topic, verb = _TOPICS[number % len(_TOPICS)], _VERBS[number // len(_TOPICS) % len(_VERBS)]
    ask = f"How is {topic} {verb} in the {number}th week of a year?"
    told = f"{topic.capitalize()} {number} is {verb} by {number + 7} hands, then left to rest."
    messages = [
        {"role": "user", "content": ask if question is None else question},
        {"role": "assistant", "content": told if answer is None else answer},
    ]
    return {"messages": messages}


def _chats(count: int = 60) -> list[Row]:
    return [_chat(number) for number in range(count)]


def _write(file: Path, rows: Sequence[object]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def _check(
    tokenizer: Tokenizer,
    train: Sequence[Path] | Path,
    valid: Path | None = None,
    *,
    max_seq_length: int = 512,
    too_long: str = "drop",
) -> dict[str, Any]:
    files: dict[Part, list[Path]] = {"train": [train] if isinstance(train, Path) else [*train]}
    if valid is not None:
        files["valid"] = [valid]
    return check(files, tokenizer, Settings(ReadOptions(), max_seq_length, too_long))


def _found(result: dict[str, Any], code: str) -> dict[str, Any]:
    """The one problem with this code."""
    (problem,) = [problem for problem in result["problems"] if problem["code"] == code]
    return problem


def _codes(result: dict[str, Any]) -> list[str]:
    return [problem["code"] for problem in result["problems"]]


# ---------------------------------------------------------------- clean data


def test_clean_conversations_have_no_problem(tokenizer: Tokenizer, tmp_path: Path) -> None:
    result = _check(tokenizer, _write(tmp_path / "a.jsonl", _chats()))
    assert result["problems"] == []
    assert result["ok"] and result["rows"] == 60 and result["format"] == "messages"
    assert result["roles"] == {"user": 60, "assistant": 60} and result["turns"] == {1: 60}
    assert 0.2 < result["trained_token_share"] < 0.8
    assert result["size"]["purpose"] == "a trial (50 to 200 rows)"


def test_clean_documents_have_no_problem(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [{"text": chat["messages"][1]["content"] * 3} for chat in _chats(20)]
    result = _check(tokenizer, _write(tmp_path / "a.jsonl", rows), max_seq_length=64)
    assert result["problems"] == [] and result["kind"] == "document"
    assert result["trained_token_share"] == 1.0
    assert "tokens a parameter" in result["size"]["purpose"]


def test_lengths(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [{"text": "x" * length} for length in (10, 20, 40, 700)]
    figures = _check(tokenizer, _write(tmp_path / "a.jsonl", rows), max_seq_length=64)["tokens"]
    assert figures["total"] == 770 and figures["trained"] == 770
    assert figures["percentiles"] == {"p50": 40, "p90": 700, "p99": 700, "max": 700}
    counts = [(entry["from"], entry["to"], entry["rows"]) for entry in figures["histogram"]]
    assert counts == [
        *((0, 16, 1), (17, 32, 1), (33, 64, 1), (65, 128, 0), (129, 256, 0), (257, 512, 0)),
        (513, 1024, 1),
    ]


# ---------------------------------------------------------------- one flaw in a row


_FLAWED = [
    ("mojibake", "warning", "The cafÃ© is dÃ©jÃ  closed, itâ€™s late.", "cafÃ© is -> café is"),
    ("mojibake", "warning", "Le caf√© est ferm√© aujourd‚Äôhui.", "caf√© est -> café est"),
    ("placeholder", "warning", "I am {{name}}, made by people.", "{{name}}"),
    ("placeholder", "warning", "Dear [YOUR NAME], thank you for it.", "[YOUR NAME]"),
    ("markup", "warning", "Well.<|im_end|>\n<|im_start|>user", "<|im_end|>"),
    ("markup", "warning", "First this.\n### Response:\nThen that.", "### Response:"),
    ("markup", "warning", "[INST] Say it. [/INST] It.", "[INST]"),
    ("replacement", "warning", "The caf\ufffd is closed on every Monday.", "\ufffd"),
    ("control", "warning", "A bell \x07 rings somewhere in the text.", "U+0007"),
    ("html", "note", "Salt &amp; pepper are on the table.", "&amp;"),
    ("refusal", "warning", "As an AI language model, I cannot eat.", "As an AI language model"),
    ("secret-token", "error", "Use sk-aB3dE9fGh2JkLm4NpQr6StUv8WxYz1", "sk-a***"),
    ("secret-token", "error", "The id is AKIAQ7R2M5T9W3X8Z6B4 there", "AKIA***"),
    ("secret-token", "error", "hf_aBcXdEfGhTjKlMnQpQrStUvWxYz2345678 is mine", "hf_a***"),
    ("secret-token", "error", "ghp_aB3dE9fGh2JkLm4NpQr6StUv8WxYz15dR7t2", "ghp_***"),
    (
        "secret-key",
        "error",
        "-----BEGIN RSA PRIVATE KEY-----\nMIIEowIBAAKCAQEAx7Vn2kQ9s8fLw3pTzYbR5mKc4hGd1jUe0oXa\n",
        "-----BEGIN RSA PRIVATE KEY-----",
    ),
    ("pii-email", "warning", "Write to anna.berg@posteo.net, please.", "a***@p***.net"),
    ("pii-phone", "warning", "Call me at +49 30 9018 2075 in the evening.", "+49***"),
    ("pii-phone", "warning", "Call (212) 736-5000 in the evening.", "(212***"),
    ("pii-card", "warning", "The card is 4539 5787 6362 1486, valid.", "4539***"),
    ("pii-iban", "warning", "Pay to DE44 5001 0517 5407 3249 31 today.", "DE44***"),
    ("pii-ssn", "warning", "His number is 536-22-8471 in the files.", "536-***"),
    ("pii-ip", "warning", "The server at 151.101.65.140 is down.", "151.***"),
]


@pytest.mark.parametrize(("code", "severity", "text", "shown"), _FLAWED)
def test_a_flaw_in_one_row(
    tokenizer: Tokenizer, tmp_path: Path, code: str, severity: str, text: str, shown: str
) -> None:
    rows = [*_chats()[:41], _chat(41, answer=text), *_chats()[42:]]
    file = _write(tmp_path / "a.jsonl", rows)
    result = _check(tokenizer, file)
    assert _codes(result) == [code]
    problem = result["problems"][0]
    assert problem["severity"] == severity and problem["count"] == 1
    assert (problem["file"], problem["line"]) == (str(file), 42)
    assert problem["places"][0]["text"] == shown
    assert problem["message"].startswith("1 row ") and problem["hint"]
    assert result["ok"] is (severity != "error")
    if code.startswith(("secret", "pii")):
        told = json.dumps(result)
        secrets = [word for word in text.split() if len(word) > 8 and re.search(r"\d|@", word)]
        assert secrets or code in ("pii-phone", "pii-card", "pii-iban")
        assert not [word for word in secrets if word.strip(".,") in told]


@pytest.mark.parametrize(
    "text",
    [
        "She had 1,234,567 apples and sold 4532 - 1200 = 3332 of them for $12.50 each.",
        "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n#### 72",
        "Mail john.doe@example.com or admin@test.com, or call 555-123-4567 or 123-456-7890.",
        "ip = '192.168.0.1'; host = '10.1.2.3'; version 1.2.3.4; dns 8.8.8.8",
        "OPENAI_API_KEY=sk-your-key-here-xxxxxxxxxxxxxxxx and AKIAIOSFODNN7EXAMPLE",
        "The card 4111 1111 1111 1111 is for tests; 4539 5787 6362 1487 fails the checksum.",
        "ISBN 978-3-16-148410-0, order 2024-05-17-0001, pi is 3.14159265358979323846",
        "du café, l'été, où ça, Ärger, naïve, 5 °C, ½ – “quoted” … √16 = 4",
        'for (i = 0; i < 10; i++) { printf("%d\\n", a[i]); }  # {x} [note] <tag>',
        "on: ${{ github.repository }}",
        "GB82 TEST 1234 5698 7654 33 is no account.",
        "SSN 000-12-3456, 666-12-3456, 912-34-5678, 123-45-6789",
    ],
)
def test_no_false_alarm(tokenizer: Tokenizer, tmp_path: Path, text: str) -> None:
    rows = [*_chats(), _chat(60, answer=text)]
    assert _codes(_check(tokenizer, _write(tmp_path / "a.jsonl", rows))) == []


def test_what_most_rows_have_is_learned_and_an_error(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [_chat(n, answer=f"Number {n} is {{{{name}}}} of {n + 9}.") for n in range(30)]
    result = _check(tokenizer, _write(tmp_path / "a.jsonl", [*_chats(), *rows]))
    problem = _found(result, "placeholder")
    assert problem["severity"] == "error" and problem["line"] == 61
    assert problem["message"] == ("30 rows (33.3%) with a placeholder that was never filled in")
    assert [place["line"] for place in problem["places"]] == [61, 62, 63, 64, 65]
    assert not result["ok"]


def test_lines_inside_a_text_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("One line.\nTwo lines.\nWrite to anna.berg@posteo.net\n" * 20, encoding="utf-8")
    assert _found(_check(tokenizer, file, max_seq_length=32), "pii-email")["line"] == 3


def test_what_is_shown_cannot_command_a_terminal(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = _chats()
    for number, row in enumerate(rows[:30]):
        row["messages"][1]["content"] = f"Oh \x1b[2J\x1b[31m so {{{{name}}}} it {number} is."
    found = _check(tokenizer, _write(tmp_path / "a.jsonl", rows))
    shown = json.dumps([[p["message"], p["places"]] for p in found["problems"]])
    assert "openings" in _codes(found) and "\\u001b" not in shown
    assert '"Oh \\x1b[2J\\x1b[31m so {{name}}"' in _found(found, "openings")["message"]


# ---------------------------------------------------------------- rows that cannot be used


def test_unreadable_rows_are_grouped_and_counted(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    lines = [json.dumps(row) for row in _chats()]
    for number in (4, 9, 14, 19, 24, 29, 34):
        lines[number] = '{"messages": [}'
    lines[40] = json.dumps({"messages": [{"role": "narrator", "content": "Once"}]})
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    result = _check(tokenizer, file)
    problems = [p for p in result["problems"] if p["code"] == "unreadable"]
    assert [(p["severity"], p["line"], p["count"]) for p in problems] == [
        ("error", 5, 7),
        ("error", 41, 1),
    ]
    assert [place["line"] for place in problems[0]["places"]] == [5, 10, 15, 20, 25]
    assert problems[0]["message"].endswith("(and 6 rows like it)") and problems[0]["hint"]
    assert "narrator" in problems[1]["message"]
    assert result["rows"] == 52 and result["unreadable"] == 8 and not result["ok"]


def test_documents_and_conversations_in_one_set(tokenizer: Tokenizer, tmp_path: Path) -> None:
    chats = _write(tmp_path / "a.jsonl", _chats())
    texts = _write(tmp_path / "b.jsonl", [{"text": "Once upon a time there was a village."}])
    result = _check(tokenizer, [chats, texts])
    problem = _found(result, "mixed-kinds")
    assert (problem["severity"], problem["file"], problem["line"]) == ("error", str(texts), 1)
    assert problem["message"] == "conversations and documents in one set"
    assert result["format"] == "mixed" and result["formats"] == {"messages": 60, "text_rows": 1}


def test_two_formats_in_one_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [*_chats(), {"instruction": "Name a metal.", "output": "Copper is one of them."}]
    result = _check(tokenizer, _write(tmp_path / "a.jsonl", rows))
    problem = _found(result, "unreadable")
    assert "several formats: messages (60 rows" in problem["message"]
    assert result["format"] == "mixed" and result["rows"] == 61 and not result["ok"]


def test_preferences_are_read_but_not_trained_on(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"Name {n} of them.", "chosen": f"It is {n}.", "rejected": f"No {n}."}
        for n in range(60)
    ]
    rows[7]["rejected"] = rows[7]["chosen"]
    result = _check(tokenizer, _write(tmp_path / "a.jsonl", rows))
    assert _found(result, "preference")["severity"] == "error"
    assert _found(result, "no-preference")["line"] == 8
    assert result["trained_token_share"] is None and result["kind"] == "preference"


def test_an_empty_file_has_no_rows(tokenizer: Tokenizer, tmp_path: Path) -> None:
    result = _check(tokenizer, _write(tmp_path / "a.jsonl", []))
    assert not result["ok"] and _found(result, "no-rows")["severity"] == "error"
    assert result["rows"] == 0 and result["tokens"]["histogram"] == []


def test_a_template_that_cannot_work_is_told_once(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink()
    plain = Tokenizer.load(tmp_path / "plain")
    result = _check(plain, _write(tmp_path / "a.jsonl", _chats()))
    problem = _found(result, "template")
    assert problem["severity"] == "error" and "chat template" in problem["message"]
    assert result["tokens"]["total"] > 0 and result["trained_token_share"] is None


def test_a_row_that_breaks_the_contract(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "strict")
    template = tmp_path / "strict" / "chat_template.jinja"
    refusal = (
        "{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
    )
    template.write_text(refusal + template.read_text(encoding="utf-8"), encoding="utf-8")
    rows = _chats()
    for number in (8, 50):
        rows[number]["messages"].insert(0, {"role": "system", "content": "Be kind."})
    file = _write(tmp_path / "a.jsonl", rows)
    result = _check(Tokenizer.load(tmp_path / "strict"), file)
    problem = _found(result, "contract")
    assert (problem["severity"], problem["line"], problem["count"]) == ("error", 9, 2)
    assert "System role not supported" in problem["message"] and not result["ok"]
    assert [place["line"] for place in problem["places"]] == [9, 51]


# ---------------------------------------------------------------- lengths


def test_rows_that_are_too_long(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [*_chats(), _chat(60, answer="A long answer, which has no end. " * 40)]
    file = _write(tmp_path / "a.jsonl", rows)
    problem = _found(_check(tokenizer, file, max_seq_length=256), "too-long")
    assert problem["severity"] == "warning" and problem["line"] == 61
    assert problem["message"] == (
        "1 row (1.6%) is longer than data.max_seq_length=256 and would be left out"
    )
    assert "raise data.max_seq_length (the longest needs " in problem["hint"]
    refused = _found(_check(tokenizer, file, max_seq_length=256, too_long="error"), "too-long")
    assert refused["severity"] == "error" and "would be refused" in refused["message"]
    cut = _found(_check(tokenizer, file, max_seq_length=256, too_long="truncate"), "too-long")
    assert "would be cut off" in cut["message"]


def test_every_row_too_long_is_an_error(tokenizer: Tokenizer, tmp_path: Path) -> None:
    result = _check(tokenizer, _write(tmp_path / "a.jsonl", _chats()), max_seq_length=8)
    problem = _found(result, "too-long")
    assert problem["severity"] == "error" and not result["ok"]
    assert problem["message"].startswith("every row is longer than data.max_seq_length=8")


def test_fewer_tokens_than_a_row(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = _write(tmp_path / "a.jsonl", [{"text": "How is bread made in winter?"}])
    problem = _found(_check(tokenizer, file, max_seq_length=64), "too-little-text")
    assert problem["severity"] == "error"
    assert "fewer than one row of 64" in problem["message"]


def test_little_is_learned(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [_chat(n, question=f"{n} " + f"How is it {n} made? " * 40) for n in range(60)]
    file = _write(
        tmp_path / "a.jsonl", [_with_answer(row, f"So {n}.") for n, row in enumerate(rows)]
    )
    problem = _found(_check(tokenizer, file, max_seq_length=2048), "little-trained")
    assert problem["severity"] == "warning" and "are learned" in problem["message"]


def _with_answer(row: Row, answer: str) -> Row:
    return {"messages": [row["messages"][0], {"role": "assistant", "content": answer}]}


# ---------------------------------------------------------------- likeness


def test_duplicates_exact_and_near(tokenizer: Tokenizer, tmp_path: Path) -> None:
    words = " ".join(f"w{n}" for n in range(60))
    rows = [*_chats(), _chat(3), _chat(61, words, "Count."), _chat(62, f"{words} more", "Count!")]
    file = _write(tmp_path / "a.jsonl", rows)
    result = _check(tokenizer, file)
    exact, near = _found(result, "duplicate"), _found(result, "near-duplicate")
    assert (exact["line"], exact["places"][0]["text"]) == (61, "same as line 4")
    assert (near["line"], near["places"][0]["text"]) == (63, "nearly line 62")
    assert exact["severity"] == near["severity"] == "note"
    assert exact["message"] == "1 row (1.6%) is the same as an earlier one"
    assert result["duplicates"]["exact"] == result["duplicates"]["near"] == 1


def test_many_duplicates_are_a_warning_and_most_an_error(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    some = _check(tokenizer, _write(tmp_path / "a.jsonl", [*_chats(), *_chats(6)]))
    assert _found(some, "duplicate")["severity"] == "warning" and some["ok"]
    most = _check(tokenizer, _write(tmp_path / "b.jsonl", [_chat(1)] * 60))
    assert _found(most, "duplicate")["severity"] == "error" and not most["ok"]


def test_two_answers_to_one_prompt(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [*_chats(), _chat(5, answer="Nobody knows how that was done, or why, in those days.")]
    result = _check(tokenizer, _write(tmp_path / "a.jsonl", rows))
    problem = _found(result, "conflict")
    assert (problem["severity"], problem["line"]) == ("warning", 61)
    assert problem["places"][0]["text"] == "same prompt as line 6"
    assert _codes(result) == ["conflict"]


def test_a_leak_into_the_validation(tokenizer: Tokenizer, tmp_path: Path) -> None:
    train = _write(tmp_path / "train.jsonl", _chats())
    valid = _write(tmp_path / "valid.jsonl", [_chat(90), _chat(7), _chat(91)])
    result = _check(tokenizer, train, valid)
    problem = _found(result, "leak")
    assert (problem["severity"], problem["file"], problem["line"]) == ("error", str(valid), 2)
    assert problem["places"][0]["text"] == f"same as {train}:8"
    assert problem["message"] == "1 of 3 held-out rows (33.3%) is also in the training files"
    assert result["leaks"] == {"rows": 3, "exact": 1, "near": 0, "share": 1 / 3}
    assert not result["ok"] and result["rows"] == 60


def test_a_rare_leak_is_a_warning(tokenizer: Tokenizer, tmp_path: Path) -> None:
    train = _write(tmp_path / "train.jsonl", _chats())
    held = [_chat(7), *(_chat(number) for number in range(100, 220))]
    valid = _write(tmp_path / "valid.jsonl", held)
    result = _check(tokenizer, train, valid)
    assert _found(result, "leak")["severity"] == "warning" and result["ok"]


def test_a_near_leak(tokenizer: Tokenizer, tmp_path: Path) -> None:
    words = " ".join(f"w{n}" for n in range(60))
    train = _write(tmp_path / "train.jsonl", [*_chats(), _chat(61, words, "Count.")])
    valid = _write(tmp_path / "valid.jsonl", [_chat(90), _chat(62, f"{words} more", "Count!")])
    result = _check(tokenizer, train, valid)
    problem = _found(result, "near-leak")
    assert (problem["severity"], problem["line"]) == ("error", 2)
    assert problem["places"][0]["text"] == f"nearly {train}:61"


def test_a_large_set_is_searched_in_part_and_says_so(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mule.data.check.similar.MAX_NEAR_ROWS", 40)
    words = " ".join(f"w{n}" for n in range(60))
    train = _write(tmp_path / "train.jsonl", [_chat(61, words, "Count."), *_chats()])
    valid = _write(tmp_path / "valid.jsonl", [_chat(62, f"{words} more", "Count!"), _chat(59)])
    result = _check(tokenizer, train, valid)
    assert _found(result, "sampled")["message"] == (
        "near-duplicates were looked for among 32 of 63 rows, the first of each part; "
        "exact ones among all"
    )
    assert _found(result, "near-leak")["line"] == 1 and _found(result, "leak")["line"] == 2


# ---------------------------------------------------------------- talk


def test_system_prompts_that_vary(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = _chats()
    for number, row in enumerate(rows[:40]):
        said = "You are kind." if number % 4 else "You are strict."
        row["messages"].insert(0, {"role": "system", "content": said})
    result = _check(tokenizer, _write(tmp_path / "a.jsonl", rows))
    mixed, varies = _found(result, "system-mixed"), _found(result, "system-varies")
    assert mixed["message"] == "40 of 60 rows have a system prompt, 20 have none"
    assert varies["message"].startswith(
        '2 different system prompts; the most common ("You are kind.") in 50.0% of the rows'
    )
    assert (mixed["severity"], varies["severity"]) == ("warning", "note")


def test_answers_that_open_alike(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [_chat(n, f"Sure, here is the number {n} of {n + 5}.") for n in range(20)]
    result = _check(tokenizer, _write(tmp_path / "a.jsonl", [*rows, *_chats()[20:]]))
    problem = _found(result, "openings")
    assert problem["severity"] == "warning"
    assert problem["message"] == '33.3% of the answers begin with "Sure, here is the"'


def test_answers_that_say_nothing_new(tokenizer: Tokenizer, tmp_path: Path) -> None:
    echo = "How is nothing at all ever made by nobody?"
    rows = [*_chats(), _chat(60, answer=echo, question=echo)]
    problem = _found(_check(tokenizer, _write(tmp_path / "a.jsonl", rows)), "echo")
    assert (problem["severity"], problem["line"]) == ("warning", 61)
    assert problem["message"] == "1 answer identical to the prompt"


def test_one_word_answers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [*_chats(), *(_chat(60 + n, answer=f"Word{n}") for n in range(6))]
    problem = _found(_check(tokenizer, _write(tmp_path / "a.jsonl", rows)), "one-word")
    assert (problem["severity"], problem["line"], problem["count"]) == ("note", 61, 6)


def test_near_empty_documents(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [{"text": chat["messages"][1]["content"]} for chat in _chats(20)]
    rows[4] = {"text": "ab"}
    result = _check(tokenizer, _write(tmp_path / "a.jsonl", rows), max_seq_length=64)
    assert (_found(result, "near-empty")["line"], _codes(result)) == (5, ["near-empty"])


# ---------------------------------------------------------------- what it is for


@pytest.mark.parametrize(
    ("count", "purpose"),
    [
        (49, "less than a trial (under 50 rows)"),
        (60, "a trial (50 to 200 rows)"),
        (200, "a light fine-tune (200 to 500 rows)"),
        (500, "a real fine-tune (500 to 2,000 rows)"),
        (2000, "a thorough fine-tune (2,000 rows and more)"),
    ],
)
def test_size_against_purpose(count: int, purpose: str) -> None:
    from mule.data.check.purpose import size_of

    assert size_of("conversation", count, 0)["purpose"] == purpose


def test_too_few_rows(tokenizer: Tokenizer, tmp_path: Path) -> None:
    problem = _found(_check(tokenizer, _write(tmp_path / "a.jsonl", _chats(9))), "too-few")
    assert problem["severity"] == "warning" and problem["message"].startswith("9 rows: ")


def test_evaluation_sets(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [{"question": f"{n} + {n + 3}?", "answer": f"It is {2 * n + 3}"} for n in range(60)]
    problem = _found(_check(tokenizer, _write(tmp_path / "test.jsonl", rows)), "evaluation-set")
    assert problem["severity"] == "warning" and "GSM8K test set" in problem["message"]
    trained = _check(tokenizer, _write(tmp_path / "train.jsonl", rows))
    assert "evaluation-set" not in _codes(trained)


def test_languages(tokenizer: Tokenizer, tmp_path: Path) -> None:
    french = (
        "Le pain est fait avec de la farine, de l'eau, du sel et de la levure, puis il est cuit "
        "au four pendant une heure environ, numéro {}."
    )
    english = (
        "Bread is made of flour, water, salt and yeast, and then it is baked in an oven for an "
        "hour or so, number {}."
    )
    rows = [_chat(n, (french if n % 3 else english).format(n)) for n in range(60)]
    result = _check(tokenizer, _write(tmp_path / "a.jsonl", rows))
    shares = result["languages"]["languages"]
    assert list(shares) == ["fr", "en"] and shares["fr"] == pytest.approx(2 / 3, abs=0.05)
    assert result["languages"]["scripts"] == {"latin": 1.0}
    problem = _found(result, "languages")
    assert problem["severity"] == "note" and problem["message"].startswith("several languages: fr")
