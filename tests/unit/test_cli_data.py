"""The data verbs as a user meets them: options, exit codes, messages, JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mule.data.sources.options import ReadOptions
from tests.conftest import Mule

Fake = Callable[..., None]


def chat(question: str, answer: str) -> str:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns}) + "\n"


@pytest.fixture
def chats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("chats.jsonl").write_text("".join(chat(f"What is {n}?", "A number.") for n in range(9)))
    return "chats.jsonl"


def kept(calls: list[Any], result: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    """A command that notes how it was called."""

    def work(*args: Any, **options: Any) -> dict[str, Any]:
        calls.append((args, options))
        return result

    return work


# ---------------------------------------------------------------- preview


def test_preview_in_a_pipe(mule_cli: Mule, chats: str) -> None:
    code, out, err = mule_cli("data", "preview", chats, "--n", "1")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("tokenizer: a throw-away tokenizer of ")
    assert "[[A number.«<|im_end|>»]]" in lines
    assert out.count("chats.jsonl:") == 1
    assert lines[-1] == "next: mule data prepare chats.jsonl --tokenizer MODEL_FOLDER"


def test_preview_as_json_has_every_token(mule_cli: Mule, chats: str) -> None:
    code, out, err = mule_cli("data", "preview", chats, "--json")
    assert code == 0
    result = json.loads(out)
    assert len(result["examples"]) == 3
    example = result["examples"][0]
    assert set(example["pieces"][0]) == {
        *("start", "ids", "text", "trained", "special", "message", "role"),
    }
    assert sum(len(piece["ids"]) for piece in example["pieces"]) == example["tokens"]
    assert "learned: " in err


def test_preview_writes_a_page(mule_cli: Mule, chats: str) -> None:
    code, out, _ = mule_cli("data", "preview", chats, "--html", "out/page.html", "--json")
    assert code == 0
    assert json.loads(out)["html"] == "out/page.html"
    assert Path("out/page.html").read_text().startswith("<!doctype html>")
    _, out, _ = mule_cli("data", "preview", chats, "--html", "page.htm")
    assert "page  page.htm\n" in out


def test_a_page_never_replaces_a_data_file(mule_cli: Mule, chats: str) -> None:
    before = Path(chats).read_bytes()
    code, _, err = mule_cli("data", "preview", chats, "--html", chats)
    assert code == 2
    assert err == (
        "error: --html chats.jsonl: not the name of a page\nhint: --html chats.jsonl.html\n"
    )
    assert Path(chats).read_bytes() == before


def test_a_broken_row_is_one_error_with_its_place(mule_cli: Mule, chats: str) -> None:
    with Path(chats).open("a") as file:
        file.write("{broken\n")
    code, out, err = mule_cli("data", "preview", chats, "--n", "20")
    assert (code, out) == (2, "")
    assert err.startswith("error: chats.jsonl:10: ")
    assert "\nhint: " in err and "Traceback" not in err


# ---------------------------------------------------------------- check


def test_check_exits_with_1_when_training_would_be_a_mistake(
    mule_cli: Mule, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mule.cli import render_check

    calls: list[Any] = []
    fake("data_check", "run", kept(calls, {"ok": False, "problems": []}))
    monkeypatch.setattr(render_check, "print_check", lambda console, result: None)
    code, out, _ = mule_cli("data", "check", "x.jsonl", "data.threads=all", "--json")
    assert code == 1
    assert json.loads(out)["ok"] is False
    fake("data_check", "run", kept(calls, {"ok": True, "problems": []}))
    words = ("--tokenizer", "m", "--fix-encoding", "--out", "fixed")
    assert mule_cli("data", "check", "x.jsonl", *words)[0] == 0
    assert calls == [
        (
            (["x.jsonl", "data.threads=all"],),
            {"tokenizer": None, "fix_encoding": False, "out": None, "places": 5},
        ),
        (
            (["x.jsonl"],),
            {"tokenizer": "m", "fix_encoding": True, "out": Path("fixed"), "places": 5},
        ),
    ]


def test_places_are_listed_in_the_json_only(
    mule_cli: Mule, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mule.cli import render_check

    calls: list[Any] = []
    fake("data_check", "run", kept(calls, {"ok": True, "problems": []}))
    monkeypatch.setattr(render_check, "print_check", lambda console, result: None)
    assert mule_cli("data", "check", "x.jsonl", "--places", "50", "--json")[0] == 0
    assert calls[0][1]["places"] == 50
    code, out, err = mule_cli("data", "check", "x.jsonl", "--places", "50")
    assert (code, out, len(calls)) == (2, "", 1)
    assert "--places has no effect without --json" in err
    assert "hint: add --json, or leave out --places 50" in err


# ---------------------------------------------------------------- mix and split


@pytest.fixture
def mixed(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """How mix was called; nothing is mixed."""
    from mule.cli import render_mix

    calls: list[Any] = []
    fake("data_mix", "mix", kept(calls, {"ok": True}))
    monkeypatch.setattr(render_mix, "print_mix", lambda console, result: None)
    return calls


def test_mix_takes_its_options_by_source(mule_cli: Mule, mixed: list[Any]) -> None:
    words = ("a.json", "b=c.jsonl", "owner/set", "data.threads=all", "--out", "mixed")
    Path("b=c.jsonl").touch()
    options = ("--cap", "a.json=50", "--cap", "b=c.jsonl=7", "--weight", "a.json=0.5")
    options += ("--repeat", "owner/set=3", "--max-examples", "80000", "--no-near")
    options += ("--decontaminate", "test.jsonl", "--decontaminate", "more.jsonl", "--seed", "4")
    assert mule_cli("data", "mix", *words, *options)[0] == 0
    assert mixed == [
        (
            (["a.json", "b=c.jsonl", "owner/set"],),
            {
                "out": Path("mixed"),
                "caps": {"a.json": 50, "b=c.jsonl": 7},
                "weights": {"a.json": 0.5},
                "repeats": {"owner/set": 3},
                "max_examples": 80_000,
                "valid_share": 0.05,
                "seed": 4,
                "near": None,
                "decontaminate": ["test.jsonl", "more.jsonl"],
                "options": ReadOptions.make(threads="all"),
            },
        )
    ]


def test_mix_removes_near_duplicates_unless_told_not_to(mule_cli: Mule, mixed: list[Any]) -> None:
    mule_cli("data", "mix", "a.json", "--out", "m")
    mule_cli("data", "mix", "a.json", "--out", "m", "--near", "0.9")
    assert [options["near"] for _, options in mixed] == [0.8, 0.9]


@pytest.mark.parametrize(
    ("option", "word", "message", "hint"),
    [
        ("--cap", "a.json", "a source and a number are needed", "--cap a.json=2"),
        ("--cap", "=5", "a source and a number are needed", "--cap data.jsonl=2"),
        ("--cap", "a.json=many", "`many` is not a whole number", "--cap a.json=2"),
        ("--repeat", "a.json=1.5", "`1.5` is not a whole number", "--repeat a.json=2"),
        ("--weight", "a.json=half", "`half` is not a number", "--weight a.json=2"),
    ],
)
def test_mix_explains_what_it_cannot_read(
    mule_cli: Mule, mixed: list[Any], option: str, word: str, message: str, hint: str
) -> None:
    code, _, err = mule_cli("data", "mix", "a.json", "--out", "m", option, word)
    assert code == 2
    assert err == f"error: {option} {word}: {message}\nhint: {hint}\n"
    assert mixed == []


def test_mix_refuses_a_source_given_twice(mule_cli: Mule, mixed: list[Any]) -> None:
    words = ("data", "mix", "a.json", "--out", "m", "--cap", "a.json=1", "--cap", "a.json=2")
    code, _, err = mule_cli(*words)
    assert code == 2
    assert err == "error: --cap: a.json is given twice\nhint: leave out one of them\n"


def test_split_passes_its_options_on(mule_cli: Mule, fake: Fake, mixed: list[Any]) -> None:
    calls: list[Any] = []
    fake("data_mix", "split", kept(calls, {"ok": True}))
    assert mule_cli("data", "split", "a.json", "data.format=alpaca", "--out", "s")[0] == 0
    options = ReadOptions.make("alpaca")
    assert calls == [
        ((["a.json"],), {"out": Path("s"), "valid_share": 0.2, "seed": 0, "options": options})
    ]


@pytest.mark.parametrize("verb", ["mix", "split"])
def test_a_folder_to_write_must_be_named(mule_cli: Mule, verb: str) -> None:
    code, _, err = mule_cli("data", verb, "a.json")
    assert code == 2
    assert "--out" in err


# ---------------------------------------------------------------- prepare and stats


def test_prepare_then_stats(mule_cli: Mule, chats: str) -> None:
    words = ("tokenizer.vocab_size=300", "data.max_seq_length=64", "data.valid_share=0.2")
    code, out, _ = mule_cli("data", "prepare", chats, *words)
    assert code == 0
    assert "tokens per second  " in out and "fill " in out
    following = out.splitlines()[-1].removeprefix("next: mule ").split()
    assert following[:2] == ["data", "stats"]
    code, out, err = mule_cli(*following)
    assert (code, err) == (0, "")
    assert "integrity  verified" in out
    code, out, _ = mule_cli(*following, "--json")
    assert json.loads(out.splitlines()[-1])["verified"] is True


def test_prepare_without_a_tokenizer_names_the_command(mule_cli: Mule, chats: str) -> None:
    code, out, err = mule_cli("data", "prepare", chats)
    assert (code, out) == (2, "")
    assert "hint: mule data prepare chats.jsonl --tokenizer MODEL_FOLDER; or" in err


def test_a_process_of_its_own_without_colours(chats: str) -> None:
    """As in a terminal that knows nothing: NO_COLOR, TERM=dumb, an ASCII locale."""
    environment = {**os.environ, "NO_COLOR": "1", "TERM": "dumb", "LC_ALL": "C"}
    code = "from mule.cli.main import main; main()"
    command = [sys.executable, "-c", code, "data", "preview", chats]
    ran = subprocess.run(command, capture_output=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    assert b"\x1b" not in ran.stdout
    assert "[[A number.«<|im_end|>»]]" in ran.stdout.decode()
