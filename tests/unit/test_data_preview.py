"""`mule data preview`: what is shown of each example, in the terminal, as a page and as JSON."""

from __future__ import annotations

import io
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mule.cli.data_page import page
from mule.cli.render_data import print_preview, visible
from mule.commands import data_preview
from mule.errors import DataError
from mule.tokenizer import Tokenizer

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Which way?"},
    {"role": "assistant", "content": "Left.\nThen right."},
    {"role": "user", "content": "Now?"},
    {"role": "assistant", "content": "Now."},
]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, *conversations: list[dict[str, str]]) -> str:
    Path(name).write_text("".join(json.dumps({"messages": m}) + "\n" for m in conversations))
    return name


def ask(question: str, answer: str = "Yes.") -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def preview(*words: str, n: int = 3) -> dict[str, Any]:
    return data_preview.run(list(words), n=n)


def shown(result: dict[str, Any], *, coloured: bool = False) -> str:
    out = io.StringIO()
    system = "standard" if coloured else None
    console = Console(
        file=out, width=80, highlight=False, color_system=system, force_terminal=coloured
    )
    print_preview(console, result)
    return out.getvalue()


# ---------------------------------------------------------------- the pieces of an example


def test_pieces_say_whose_they_are_and_whether_they_are_learned() -> None:
    (example,) = preview(write("x.jsonl", TALK))["examples"]
    assert (example["file"], example["line"], example["kind"]) == ("x.jsonl", 1, "chat")
    words = [
        (p["text"], p["trained"], p["special"], p["message"], p["role"])
        for p in example["pieces"]
        if p["message"] in (1, 2)
    ]
    assert words == [
        ("<|im_start|>", False, True, 1, "user"),
        ("user\nWhich way?", False, False, 1, "user"),
        ("<|im_end|>", False, True, 1, "user"),
        ("\n", False, False, 1, "user"),
        ("<|im_start|>", False, True, 2, "assistant"),
        ("assistant\n", False, False, 2, "assistant"),
        ("Left.\nThen right.", True, False, 2, "assistant"),
        ("<|im_end|>", True, True, 2, "assistant"),
        ("\n", False, False, 2, "assistant"),
    ]


def test_pieces_are_the_whole_sequence_and_counts_add_up() -> None:
    (example,) = preview(write("x.jsonl", TALK))["examples"]
    place = 0
    for piece in example["pieces"]:
        assert piece["start"] == place
        place += len(piece["ids"])
    assert place == example["tokens"] == sum(m["tokens"] for m in example["messages"])
    trained = sum(len(p["ids"]) for p in example["pieces"] if p["trained"])
    assert trained == example["trained"] == sum(m["trained"] for m in example["messages"])
    assert [m["role"] for m in example["messages"]] == [m["role"] for m in TALK]
    assert [m["trained"] > 0 for m in example["messages"]] == [False, False, True, False, True]


def test_examples_come_from_each_file_alike() -> None:
    write("a.jsonl", *(ask(f"a{n}") for n in range(5)))
    write("b.jsonl", ask("b0"))
    write("c.jsonl", *(ask(f"c{n}") for n in range(5)))
    result = preview("a.jsonl", "b.jsonl", "c.jsonl", n=6)
    places = [(example["file"], example["line"]) for example in result["examples"]]
    assert places == [
        *(("a.jsonl", n) for n in (1, 2, 3)),
        ("b.jsonl", 1),
        *(("c.jsonl", n) for n in (1, 2)),
    ]
    assert len(preview("a.jsonl", "c.jsonl", n=1)["examples"]) == 1


def test_an_example_that_is_too_long_is_marked_where_it_ends() -> None:
    write("x.jsonl", ask("Now?", "No " * 90))
    result = preview("x.jsonl", "data.max_seq_length=64", "data.too_long=truncate")
    (example,) = result["examples"]
    assert not example["fits"]
    assert 65 in [piece["start"] for piece in example["pieces"]]
    text = shown(result)
    assert "over data.max_seq_length=64: data.too_long=truncate" in text
    assert "✂ data.max_seq_length ends here" in text


def test_a_row_that_training_refuses_is_refused_here() -> None:
    Path("x.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    with pytest.raises(DataError, match=r"^x\.jsonl:1: "):
        preview("x.jsonl")


def test_what_to_type_next() -> None:
    write("x.jsonl", TALK)
    Tokenizer.train(["a b c"], 260).save("folder")
    result = preview("x.jsonl", "data.max_seq_length=64")
    assert result["next"] == (
        "mule data prepare x.jsonl data.max_seq_length=64 --tokenizer MODEL_FOLDER"
    )
    known = data_preview.run(["x.jsonl"], tokenizer="folder")
    assert known["next"] == "mule data prepare x.jsonl --tokenizer folder"
    assert sorted(p.name for p in Path().iterdir()) == ["folder", "x.jsonl"]  # nothing is left


# ---------------------------------------------------------------- other templates


def spans(template: str, messages: list[dict[str, str]]) -> list[list[str]]:
    """For each example the texts of its messages."""
    tokenizer = Tokenizer.train(["a b c " * 9], 400)
    tokenizer.save("folder")
    Path("folder/chat_template.jinja").write_text(template)
    result = data_preview.run([write("x.jsonl", messages)], tokenizer="folder")
    texts = []
    for example in result["examples"]:
        owned = [""] * len(example["messages"])
        for piece in example["pieces"]:
            owned[max(0, piece["message"])] += piece["text"]
        texts.append(owned)
    return texts


def test_a_template_that_refuses_chats_which_stop_early() -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}"
        "{% if messages|length == 1 %}{{ raise_exception('no') }}{% endif %}"
        "{{ '<|im_start|>rules\n' + m.content + '\n' }}"
        "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    (texts,) = spans(template, TALK[:3])
    assert texts[0] == "<|im_start|>rules\nBe brief."  # found by its words
    assert texts[1] == "\n<|im_start|>user\nWhich way?<|im_end|>\n"


def test_a_template_that_rewrites_earlier_turns_makes_several_examples() -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}"
        "{{ '<|im_start|>assistant\n' + m.content.split('</think>')[-1] + '<|im_end|>\n' }}"
        "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    messages = [*ask("a?", "<think>hm</think>One thing."), *ask("b?", "<think>so</think>Two.")]
    first, second = spans(template, messages)
    assert first[1] == "<|im_start|>assistant\n<think>hm</think>One thing.<|im_end|>"
    assert second[1] == "<|im_start|>assistant\nOne thing.<|im_end|>\n"
    assert second[2] == "<|im_start|>user\nb?<|im_end|>\n"
    assert second[3] == "<|im_start|>assistant\n<think>so</think>Two.<|im_end|>"
    result = data_preview.run(["x.jsonl"], tokenizer="folder")
    assert "example 2 of 2: the chat template rewrites earlier turns" in shown(result)


def test_what_a_template_puts_before_the_first_message_is_its_own() -> None:
    template = (
        "{{ '<|im_start|>system\\nYou are Mule.<|im_end|>\\n' }}{% for m in messages %}"
        "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    spans(template, TALK[1:3])
    result = data_preview.run(["x.jsonl"], tokenizer="folder")
    (example,) = result["examples"]
    texts = {"template": "", "user": "", "assistant": ""}
    for piece in example["pieces"]:
        texts[piece["role"]] += piece["text"]
    assert texts["template"] == "<|im_start|>system\nYou are Mule.<|im_end|>\n"
    assert texts["user"] == "<|im_start|>user\nWhich way?<|im_end|>\n"
    assert sum(m["tokens"] for m in example["messages"]) == example["tokens"]
    assert "--- added by the template · " in shown(result)


def test_tools_are_told_apart_from_the_first_message() -> None:
    call = {"name": "add", "arguments": {"a": 1}}
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    turns: list[dict[str, Any]] = [
        *ask("1 + 1?", ""),
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "Two."},
    ]
    turns[1]["tool_calls"] = [{"type": "function", "function": call}]
    Path("x.jsonl").write_text(json.dumps({"messages": turns, "tools": tools}) + "\n")
    result = preview("x.jsonl")
    (example,) = result["examples"]
    assert [m["role"] for m in example["messages"]] == [
        *("tools", "user", "assistant", "tool", "assistant"),
    ]
    first = [piece["text"] for piece in example["pieces"] if piece["message"] == 0]
    assert first[:2] == ["<|im_start|>", "user\n1 + 1?"]
    assert '<div class="who">tools<small>' in page(result)


# ---------------------------------------------------------------- documents and pairs


def test_a_document_shows_its_beginning_and_where_its_first_row_ends() -> None:
    Path("a.txt").write_text("One two three. " * 400)
    Path("b.txt").write_text("The end.")
    result = preview("a.txt", "b.txt", "data.max_seq_length=512")
    long, short = result["examples"]
    assert long["tokens"] > 1024 and long["row_ends"][:2] == [512, 1024]
    assert 512 in [piece["start"] for piece in long["pieces"]]
    assert [piece["trained"] for piece in short["pieces"]] == [False, True, True]
    assert "".join(piece["text"] for piece in short["pieces"]) == "The end.<|endoftext|>"
    text = shown(result)
    assert f"· over {len(long['row_ends']) + 1} rows of 512" in text
    assert "… 322 tokens are not shown …" in text
    assert "✂ a row that begins with this document ends here" in text
    assert f"… {long['tokens'] - 552:,} tokens are not shown …" in text
    assert "within one row of 512" in text


def test_a_very_long_document_is_not_tokenized_whole() -> None:
    Path("a.txt").write_text("One two three. " * 20_000)
    result = preview("a.txt")
    assert result["examples"][0]["more"]
    assert "a.txt:1 · more than " in shown(result)
    assert "tokens, all learned but the first" in shown(result)


def test_short_rows_overlap_what_is_shown_anyway() -> None:
    Path("a.txt").write_text("One two three. " * 100)
    (example,) = preview("a.txt", "data.max_seq_length=16")["examples"]
    starts = [piece["start"] for piece in example["pieces"]]
    assert starts[:3] == [0, 1, 16]
    assert starts == sorted(set(starts))


def test_preferences_are_shown_as_pairs() -> None:
    pair = {"prompt": "Which way?", "chosen": "Left.", "rejected": "Go <b>away</b>."}
    Path("p.jsonl").write_text(json.dumps(pair) + "\n")
    result = preview("p.jsonl")
    text = shown(result)
    assert "p.jsonl:1 · preference pair: read and checked, not trained on" in text
    assert "--- chosen: assistant · " in text
    assert "Go <b>away</b>." in text
    assert "&lt;b&gt;away" in page(result)
    assert result["next"] == "mule data check p.jsonl"


def test_a_judged_answer_is_shown_with_its_verdict() -> None:
    row = {"messages": ask("Which way?", "Away."), "label": False}
    Path("p.jsonl").write_text(json.dumps(row) + "\n")
    text = shown(preview("p.jsonl"))
    assert "judged answer" in text
    assert "--- unwanted: assistant · " in text


# ---------------------------------------------------------------- the terminal


def test_the_terminal_without_colours_marks_everything() -> None:
    lines = shown(preview(write("x.jsonl", TALK))).splitlines()
    lines = [line.rstrip() for line in lines]
    assert lines[0].startswith("tokenizer: a throw-away tokenizer of ")
    assert lines[1] == "learned: [[like this]] · special token: «<|like this|>» · line break: ↵"
    assert lines[3].startswith("x.jsonl:1 · ")
    assert lines[3].endswith(" · fits data.max_seq_length=1,024")
    body = "\n".join(lines[4:])
    assert "--- 2 user · " in body
    assert "«<|im_start|>»user↵\nWhich way?«<|im_end|>»↵\n" in body
    assert "«<|im_start|>»assistant↵\n[[Left.↵\nThen right.«<|im_end|>»]]↵\n" in body
    assert "[[Now.«<|im_end|>»]]" in body


def test_the_terminal_colours_what_is_learned() -> None:
    text = shown(preview(write("x.jsonl", TALK)), coloured=True)
    assert "\x1b[32mNow.\x1b[0m\x1b[7;32m<|im_end|>\x1b[0m" in text
    assert "[[" not in text and "«" not in text
    assert "\x1b[7;36m 2 user \x1b[0m" in text and "Which way?" in text


def test_what_acts_on_a_terminal_is_written_out() -> None:
    assert visible("a\x1b[31m\r\n\tb\x7f\u202e\ufeff\x85") == (
        "a␛[31m␍\n\tb␡‹U+202E›‹U+FEFF›‹U+0085›"
    )
    write("x.jsonl", ask("a\x1b]0;title\x07", "\x1b[2Jgone"))
    for coloured in (False, True):
        text = shown(preview("x.jsonl"), coloured=coloured)
        assert "␛]0;title␇" in text and "␛[2Jgone" in text
        assert "\x1b]0" not in text and "\x1b[2J" not in text


def test_markup_in_the_data_stays_text() -> None:
    text = shown(preview(write("x.jsonl", ask("[bold]a[/bold]", "[red]b"))))
    assert "[bold]a[/bold]" in text and "[red]b" in text


# ---------------------------------------------------------------- the page


class Page(HTMLParser):
    """The elements of a page, and its text outside style sheets."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] != ["style"]:
            self.text += data


def test_the_page_escapes_every_text() -> None:
    attack = "</pre><script>alert(1)</script><img src=x onerror=alert(1)>&amp;'\""
    folder = Path("<b>d")
    folder.mkdir()
    write("<b>d/x.jsonl", ask(attack, attack))
    source = page(preview("<b>d/x.jsonl"))
    parsed = Page(source)
    assert not {"script", "img", "link", "iframe"} & set(parsed.tags)
    assert not [name for name in parsed.attributes if name.startswith("on")]
    assert parsed.text.count(attack) == 2
    assert "<b>d/x.jsonl:1" in parsed.text
    assert "default-src 'none'" in source
    assert "http" not in source.replace("http-equiv", "")  # it needs nothing else


def test_the_page_shows_what_the_terminal_shows() -> None:
    source = page(preview(write("x.jsonl", TALK)))
    assert "<b>Left.<s>↵</s>\nThen right.</b><b><i>&lt;|im_end|&gt;</i></b><s>↵</s>" in source
    assert "<i>&lt;|im_start|&gt;</i>user<s>↵</s>\nWhich way?" in source
    assert "prefers-color-scheme: dark" in source
    parsed = Page(source)
    assert "2 user" in parsed.text and "learned" in parsed.text
    assert "fits data.max_seq_length=1,024" in parsed.text
