"""`mule data mix` and `mule data split`, from files to folder and card."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from mule import fsio, machine
from mule.cli.render_mix import print_mix
from mule.commands import data_mix
from mule.data.mix import MixSettings
from mule.data.sources import ReadOptions, expand, read
from mule.errors import DataError, UserError

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
PASSAGE = "the quick brown fox jumps over the lazy dog while seven green birds sing loudly today"
LONG = " ".join(f"word{number}" for number in range(80))
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "Now", "parameters": {"type": "object"}},
}

Mix = Callable[..., dict[str, Any]]


@pytest.fixture
def mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mix:
    """`mix(sources, cap=..., ...)` in an empty folder, into `out`, without near-duplicate search."""
    monkeypatch.chdir(tmp_path)

    def run(
        *sources: str, out: str = "out", near: float | None = None, **more: Any
    ) -> dict[str, Any]:
        given = {
            "caps": {},
            "weights": {},
            "repeats": {},
            "max_examples": None,
            "valid_share": 0.0,
            "seed": 0,
            "decontaminate": [],
            "options": ReadOptions(),
        }
        return data_mix.mix(list(sources), out=Path(out), near=near, **(given | more))

    return run


def _chat(question: str, answer: str, system: str = "") -> dict[str, Any]:
    first = [{"role": "system", "content": system}] if system else []
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": first + turns}


def _chats(start: int, count: int) -> list[dict[str, Any]]:
    return [
        _chat(f"What is {n} times {n}?", f"It is {n * n}.") for n in range(start, start + count)
    ]


def _write(file: str, rows: list[dict[str, Any]]) -> str:
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def _rows(file: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def _bytes(folder: str) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir())}


def _five_formats() -> list[str]:
    """Five files, the JSON lines without a final newline."""
    Path("alpaca.json").write_text(
        json.dumps([{"instruction": f"Say {n}", "input": "", "output": f"{n}!"} for n in range(20)])
    )
    sums = [{"question": f"{n}+1?", "answer": f"#### {n + 1}"} for n in range(20)]
    pq.write_table(pa.Table.from_pylist(sums), "gsm8k.parquet")
    dolly = [
        {"instruction": f"Why {n}?", "context": "", "response": f"So {n}.", "category": "open_qa"}
        for n in range(20)
    ]
    Path("dolly.jsonl").write_text("\n".join(map(json.dumps, dolly)))
    Path("chats.jsonl").write_text("\n".join(map(json.dumps, _chats(0, 20))))
    talks = [
        {
            "conversations": [
                {"from": "human", "value": f"Hi {n}"},
                {"from": "gpt", "value": "Hello"},
            ]
        }
        for n in range(20)
    ]
    Path("talks.json").write_text(json.dumps(talks))
    return ["alpaca.json", "gsm8k.parquet", "dolly.jsonl", "chats.jsonl", "talks.json"]


# ---------------------------------------------------------------- the whole


def test_five_formats_become_one(mix: Mix) -> None:
    result = mix(*_five_formats(), near=0.8, valid_share=0.1)
    assert (result["train"], result["valid"]) == (90, 10)
    assert [source["name"] for source in result["sources"]] == [
        *("alpaca", "gsm8k", "dolly", "chats", "talks")
    ]
    assert [source["valid"] for source in result["sources"]] == [2, 2, 2, 2, 2]
    rows = _rows("out/train.jsonl") + _rows("out/valid.jsonl")
    assert len(rows) == 100
    assert {row["source"] for row in rows} == {"alpaca", "gsm8k", "dolly", "chats", "talks"}
    assert {
        "messages": [
            {"role": "user", "content": "7+1?"},
            {"role": "assistant", "content": "#### 8"},
        ],
        "source": "gsm8k",
    } in rows
    assert [row["source"] for row in rows] != sorted(row["source"] for row in rows)  # shuffled
    fsio.verify_folder("out")
    assert result["next"] == "mule data check out"


def test_the_same_seed_gives_the_same_bytes(mix: Mix) -> None:
    sources = _five_formats()
    options: dict[str, Any] = {"near": 0.8, "valid_share": 0.1, "max_examples": 70}
    mix(*sources, **options)
    first = _bytes("out")
    assert set(first) == {"train.jsonl", "valid.jsonl", "mix.json", "README.md", "manifest.json"}
    mix(*sources, **options)  # replaces what mix made
    assert _bytes("out") == first
    mix(*sources, **options, seed=1)
    assert _bytes("out")["train.jsonl"] != first["train.jsonl"]
    assert _bytes("out")["valid.jsonl"] != first["valid.jsonl"]


def test_rows_read_back_equal(mix: Mix) -> None:
    calls = [
        {"type": "function", "function": {"name": "weather", "arguments": {"place": "Zürich"}}}
    ]
    turns = [
        {"role": "system", "content": "Short.\u2028 Polite.\r\n"},
        {"role": "user", "content": " \tIs it raining? 🦄"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": '{"rain": true}'},
        {"role": "assistant", "content": "Yes.\n"},
    ]
    _write("tools.jsonl", [{"messages": turns, "tools": [TOOL]}, *_chats(0, 3)])
    mix("tools.jsonl")
    before = {(item.messages, item.tools) for item in read(["tools.jsonl"])}
    after = {(item.messages, item.tools) for item in read(["out/train.jsonl"])}
    assert before == after
    assert len(after) == 4


def test_documents_keep_their_text_and_do_not_mix_with_chats(mix: Mix) -> None:
    Path("a.txt").write_text("One.\n\nTwo.\n")
    _write("b.jsonl", [{"text": "Three."}, {"text": "Four."}])
    result = mix("a.txt", "b.jsonl")
    assert result["kind"] == "documents"
    assert {row["text"] for row in _rows("out/train.jsonl")} == {
        "One.\n\nTwo.\n",
        "Three.",
        "Four.",
    }
    _write("chats.jsonl", _chats(0, 2))
    with pytest.raises(DataError, match=r"a conversation, where a.txt holds a text") as caught:
        mix("a.txt", "chats.jsonl")
    assert caught.value.hint.startswith("make two mixes")


def test_preference_pairs_are_refused(mix: Mix) -> None:
    _write("pairs.jsonl", [{"prompt": "a?", "chosen": "b", "rejected": "c"}])
    with pytest.raises(DataError, match="preference"):
        mix("pairs.jsonl")
    assert not Path("out").exists()


def test_a_long_document_in_pieces_is_made_whole(mix: Mix, monkeypatch: pytest.MonkeyPatch) -> None:
    from mule.data.sources import text

    monkeypatch.setattr(text, "MAX_CHARS", 100)
    whole = " ".join(f"word{n}" for n in range(200))
    Path("long.txt").write_text(whole)
    mix("long.txt")
    assert _rows("out/train.jsonl") == [{"text": whole, "source": "long"}]


# ---------------------------------------------------------------- duplicates and leaks


def test_duplicates_are_counted_and_shown(mix: Mix) -> None:
    same = _chat("Tell me about foxes.", LONG)
    spaced = _chat("Tell  me about foxes. ", LONG)
    near = _chat("Tell me about foxes, please.", LONG)
    other = _chat("Tell me about foxes.", "I know nothing about any foxes, I am afraid.")
    _write("a.jsonl", [same, spaced, other])
    _write("b.jsonl", [near, *_chats(0, 2)])
    result = mix("a.jsonl", "b.jsonl", near=0.8)
    assert result["removed"] == {
        "duplicate": 1,
        "near-duplicate": 1,
        "contaminated": 0,
        "cap": 0,
        "weight": 0,
        "limit": 0,
    }
    assert result["examples"]["duplicate"][0]["removed"] == "a.jsonl:2"
    assert result["examples"]["near-duplicate"][0] | {"text": ""} == {
        "removed": "b.jsonl:1",
        "because": "a.jsonl:1",
        "text": "",
    }
    assert "1 of 3 rows of b are near-duplicates" in "\n".join(result["notes"])
    card = Path("out/README.md").read_text()
    assert "| source | read | duplicate | near-duplicate | kept | train | valid |" in card
    assert "- `b.jsonl:1` because of `a.jsonl:1`: Tell me about foxes, please." in card
    assert mix("a.jsonl", "b.jsonl")["train"] == 5  # without the search


def test_decontamination(mix: Mix) -> None:
    _write("train.jsonl", [_chat("Copy", f"So: {PASSAGE.upper()}!"), *_chats(0, 4)])
    _write("exam/test.jsonl", [_chat("An exam question", PASSAGE)])
    _write("exam/train.jsonl", _chats(0, 4))  # of a folder only what is held out counts
    result = mix("train.jsonl", decontaminate=["exam"])
    assert result["removed"]["contaminated"] == 1
    example = result["examples"]["contaminated"][0]
    assert (example["removed"], example["because"]) == ("train.jsonl:1", "exam/test.jsonl:1")
    assert example["text"] == " ".join(PASSAGE.split()[:13])
    assert "Decontaminated against `exam`" in Path("out/README.md").read_text()
    with pytest.raises(UserError, match="nothing is left to train on: all 5 rows") as caught:
        mix("train.jsonl", decontaminate=["train.jsonl"])
    assert "--decontaminate" in caught.value.hint


def test_no_near_duplicate_and_no_question_is_on_both_sides(mix: Mix) -> None:
    rows = [_chat(f"Question {n // 4}?", f"{'word ' * (n % 4)} answer {n}") for n in range(80)]
    for k in range(20):  # pairs that differ in one word of 65
        question = f"Number {k}: {k}a {k}b {k}c"
        rows += [_chat(f"{question} {n}", f"{k} ".join(LONG.split()[:60])) for n in (500, 501)]
    _write("a.jsonl", rows)
    mix("a.jsonl", valid_share=0.2)

    def first_words(file: str) -> set[str]:
        return {row["messages"][0]["content"].split(":")[0] for row in _rows(file)}

    train, valid = first_words("out/train.jsonl"), first_words("out/valid.jsonl")
    assert not train & valid
    assert len(_rows("out/valid.jsonl")) == 24


# ---------------------------------------------------------------- folders with validation rows


def test_two_folders_with_validation_rows_are_merged(mix: Mix) -> None:
    for name, start in (("a", 0), ("b", 100)):
        _write(f"{name}/train.jsonl", _chats(start, 30))
        _write(f"{name}/valid.jsonl", _chats(start + 50, 10))
    leaked = _chats(155, 1)  # of b's validation rows, in the training rows of a
    _write("a/train.jsonl", _chats(0, 30) + leaked)
    result = mix("a", "b", valid_share=0.5)
    assert (result["train"], result["valid"]) == (60, 20)
    assert result["removed"]["duplicate"] == 1
    assert result["examples"]["duplicate"][0]["removed"] == "a/train.jsonl:31"
    assert {row["messages"][0]["content"] for row in _rows("out/valid.jsonl")} == {
        row["messages"][0]["content"] for row in _chats(50, 10) + _chats(150, 10)
    }


def test_a_near_duplicate_of_a_validation_row_leaves_training(mix: Mix) -> None:
    _write("a/train.jsonl", [_chat("Foxes?", f"{PASSAGE} {PASSAGE} One."), *_chats(0, 5)])
    _write("a/valid.jsonl", [_chat("Foxes?", f"{PASSAGE} {PASSAGE} Two.")])
    _write("a/test.jsonl", _chats(9, 1))
    _write("c.jsonl", _chats(20, 20))
    result = mix("a", "c.jsonl", near=0.7, valid_share=0.1)
    assert result["removed"]["near-duplicate"] == 1
    assert [source["valid"] for source in result["sources"]] == [1, 2]  # c is divided, a is not
    assert "a/test.jsonl is a test set: left out" in result["notes"][0]


# ---------------------------------------------------------------- how much


def test_caps_weights_repeats_and_the_limit(mix: Mix) -> None:
    _write("data/a.jsonl", _chats(0, 40))
    _write("data/b.jsonl", _chats(100, 10))
    a, b = "data/a.jsonl", "data/b.jsonl"

    def rows(**more: Any) -> list[int]:
        return [source["train"] for source in mix(a, b, **more)["sources"]]

    assert rows(caps={"a": 7}) == [7, 10]
    assert rows(repeats={"b.jsonl": 2}) == [40, 20]
    assert rows(weights={"data/b.jsonl": 0.5}) == [10, 10]
    assert rows(max_examples=25) == [20, 5]
    assert rows(caps={"a": 20}, repeats={"b": 3}, weights={"a": 1, "b": 3}) == [10, 30]
    made = [row["messages"][0]["content"] for row in _rows("out/train.jsonl")]
    assert sorted(made.count(text) for text in set(made)) == [1] * 10 + [3] * 10


def test_a_cap_above_what_is_there_is_a_note(mix: Mix) -> None:
    _write("a.jsonl", _chats(0, 4))
    result = mix("a.jsonl", caps={"a": 9}, max_examples=80_000)
    assert result["notes"] == [
        "the cap of 9 for a changes nothing: it has 4",
        "the limit of 80,000 examples changes nothing: there are 4",
    ]
    assert result["train"] == 4


def test_validation_rows_are_not_repeated(mix: Mix) -> None:
    _write("a.jsonl", _chats(0, 20))
    result = mix("a.jsonl", repeats={"a": 3}, valid_share=0.1)
    assert (result["train"], result["valid"]) == (54, 2)


# ---------------------------------------------------------------- refusals


def test_names_that_no_source_has(mix: Mix) -> None:
    _write("alpaca.jsonl", _chats(0, 4))
    _write("x/train.jsonl", _chats(5, 4))
    _write("y/train.jsonl", _chats(9, 4))
    sources = ("alpaca.jsonl", "x/train.jsonl", "y/train.jsonl")
    with pytest.raises(UserError, match="--cap alpacca: no source has this path") as caught:
        mix(*sources, caps={"alpacca": 3})
    assert caught.value.hint == "did you mean alpaca?"
    with pytest.raises(UserError, match="--weight 9: no source") as caught:
        mix(*sources, weights={"9": 3.0})
    assert caught.value.hint == "the sources are alpaca, x, y"
    with pytest.raises(
        UserError, match=r"several sources have this name: x/train.jsonl, y"
    ) as caught:
        mix(*sources, repeats={"train": 3})
    assert caught.value.hint == "use the whole path, as in --repeat x/train.jsonl=3"
    with pytest.raises(UserError, match=r"--cap is given twice for alpaca.jsonl"):
        mix(*sources, caps={"alpaca": 3, "alpaca.jsonl": 4})
    with pytest.raises(UserError, match="no sources"):
        mix()


def test_a_file_in_two_sources(mix: Mix) -> None:
    _write("data/a.jsonl", _chats(0, 4))
    with pytest.raises(
        UserError, match=r"data/a.jsonl is in two sources: data/a.jsonl and data"
    ) as e:
        mix("data/a.jsonl", "data")
    assert e.value.hint == "give it once; --repeat a=2 uses every row twice"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"caps": {"a": 0}}, "--cap a=0: the number must be at least 1"),
        ({"repeats": {"a": -1}}, "--repeat a=-1: the number must be at least 1"),
        ({"weights": {"a": 0.0}}, "--weight a=0: a weight is a share of the result"),
        ({"max_examples": 0}, "--max-examples 0: the number must be at least 1"),
        ({"valid_share": 1.0}, "--valid-share 1: a share is at least 0 and below 1"),
        ({"seed": -1}, "--seed -1 is negative"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        MixSettings(**settings)
    assert caught.value.message.startswith(message)
    assert caught.value.hint


def test_a_folder_that_mix_did_not_make_is_kept(mix: Mix) -> None:
    _write("a.jsonl", _chats(0, 4))
    _write("out/mine.jsonl", _chats(0, 1))
    with pytest.raises(UserError, match="--out out holds other files") as caught:
        mix("a.jsonl")
    assert caught.value.hint == "choose another folder for --out"
    assert _rows("out/mine.jsonl")
    with pytest.raises(UserError, match=r"--out a.jsonl is a file|would be replaced"):
        mix("a.jsonl", out="a.jsonl")
    with pytest.raises(UserError, match=r"--out file.txt is a file"):
        Path("file.txt").write_text("x")
        mix("a.jsonl", out="file.txt")


def test_out_and_sources_do_not_contain_each_other(mix: Mix) -> None:
    _write("data/a.jsonl", _chats(0, 4))
    with pytest.raises(UserError, match="--out data/mixed lies inside the source data"):
        mix("data", out="data/mixed")
    mix("data", out="first")
    with pytest.raises(
        UserError, match=r"would be replaced, and the source first/train.jsonl lies"
    ):
        mix("first/train.jsonl", out="first")
    assert len(_rows("first/train.jsonl")) == 4


def test_a_bad_row_leaves_the_last_mix_as_it_was(mix: Mix) -> None:
    _write("a.jsonl", _chats(0, 4))
    mix("a.jsonl")
    before = _bytes("out")
    Path("a.jsonl").write_text('{"messages": []}\n')
    with pytest.raises(DataError, match=r"a.jsonl:1"):
        mix("a.jsonl")
    assert _bytes("out") == before
    assert sorted(path.name for path in Path().iterdir()) == ["a.jsonl", "out"]


def test_too_little_memory_is_told_before_reading(
    mix: Mix, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write("a.jsonl", _chats(0, 4))
    monkeypatch.setattr(machine, "available_bytes", lambda: 10)
    with pytest.raises(
        UserError, match=r"mixing needs about 0.0 GiB of memory for 1 files"
    ) as caught:
        mix("a.jsonl")
    assert "mix fewer files at a time" in caught.value.hint


# ---------------------------------------------------------------- split


def test_split_keeps_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _write("a.jsonl", _chats(0, 90) + _chats(0, 10))
    result = data_mix.split(["a.jsonl"], out=Path("out"))
    assert (result["train"], result["valid"]) == (80, 20)
    train = {row["messages"][0]["content"] for row in _rows("out/train.jsonl")}
    valid = {row["messages"][0]["content"] for row in _rows("out/valid.jsonl")}
    assert not train & valid
    assert len(train | valid) == 90
    assert result["command"] == "mule data split a.jsonl --out out --valid-share 0.2 --seed 0"
    assert "Duplicates were kept." in Path("out/README.md").read_text()
    other = data_mix.split(["a.jsonl"], out=Path("other"), valid_share=0.5, seed=3)
    assert other["valid"] == 50
    with pytest.raises(UserError, match=r"out is divided already: it has valid.jsonl") as caught:
        data_mix.split(["out"], out=Path("again"))
    assert caught.value.hint.endswith("split its training file: out/train.jsonl")


def test_one_long_text_cannot_be_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("One text.")
    with pytest.raises(UserError, match="1 item in 1 group that must stay whole") as caught:
        data_mix.split(["a.txt"], out=Path("out"))
    assert "data.valid_share in the recipe" in caught.value.hint


# ---------------------------------------------------------------- the card, the screen


def test_the_card_says_how_to_do_it_again(mix: Mix) -> None:
    _write("my chats.jsonl", [_chat("`What` is *this*?", "<b>|A|</b>")] * 2 + _chats(0, 9))
    Path("LICENSE").write_text("MIT")
    result = mix(
        *("my chats.jsonl",),
        caps={"my chats": 9},
        weights={"my chats": 0.5},
        max_examples=8,
        valid_share=0.25,
        seed=3,
        options=ReadOptions.make("messages", threads="all"),
    )
    command = (
        "mule data mix 'my chats.jsonl' --out out --cap 'my chats=9' --weight 'my chats=0.5' "
        "--max-examples 8 --valid-share 0.25 --seed 3 --no-near data.format=messages "
        "data.threads=all"
    )
    assert result["command"] == command
    card = Path("out/README.md").read_text()
    for part in (
        "# 6 rows to train on, 2 to validate with",
        "| my chats | 11 | 1 | 1 | 1 | 8 | 6 | 2 |",
        "\\`What\\` is \\*this\\*? \\<b\\>\\|A\\|\\</b\\>",
        "Caps: my chats 9.",
        "At most 8 examples",
        "| `LICENSE` |",
        "Mule does not know the licences",
        f"```\n{command}\n```",
    ):
        assert part in card
    assert json.loads(Path("out/mix.json").read_text())["made_by"] == "mule data mix"


def test_what_the_terminal_shows(mix: Mix) -> None:
    _write("a.jsonl", _chats(0, 4) * 2)
    _write("b.jsonl", _chats(9, 5))
    result = mix("a.jsonl", "b.jsonl", caps={"a": 99})
    shown = io.StringIO()
    print_mix(Console(file=shown, width=100), result | {"notes": result["notes"] * 12})
    lines = [line.split() for line in shown.getvalue().splitlines()]
    assert ["source", "read", "duplicate", "kept", "train", "valid"] in lines
    assert ["a", "8", "4", "4", "4", "0"] in lines
    assert ["all", "13", "4", "9", "9", "0"] in lines
    assert "note: the cap of 99 for a changes nothing: it has 4" in shown.getvalue()
    assert "and 2 more notes, in the card" in shown.getvalue()
    assert "card    out/README.md" in shown.getvalue()


# ---------------------------------------------------------------- real data


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.skipif(not DATA.is_dir(), reason="needs the development data")
def test_the_usual_instruction_mix(mix: Mix) -> None:
    sources = [
        str(DATA / "alpaca" / "alpaca_en_demo.json"),
        str(DATA / "gsm8k" / "main" / "train-00000-of-00001.parquet"),
        str(DATA / "dolly" / "databricks-dolly-3k.jsonl"),
        str(DATA / "oasst" / "oasst1-en-validation.messages.jsonl"),
    ]
    result = mix(*sources, near=0.8, valid_share=0.05, max_examples=80_000)
    assert [source["read"] for source in result["sources"]] == [899, 7473, 2996, 188]
    assert [source["duplicate"] for source in result["sources"]] == [14, 0, 2, 0]
    assert result["train"] + result["valid"] == sum(s["kept"] for s in result["sources"])
    assert any("the limit of 80,000 examples changes nothing" in note for note in result["notes"])
    assert len(list(read(expand(["out"])))) == result["train"]
