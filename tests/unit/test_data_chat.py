"""Chat examples: what is trained, what serving sends, and the contract between them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mule.data.chat import Example, render_example, render_examples
from mule.data.contract import check_example, render_checked, trained_runs
from mule.data.sources import Conversation, Message
from mule.errors import DataError
from mule.tokenizer import Tokenizer

CORPUS = ["What is the capital of France? It is Paris.\n\n\nI think so, Bob.\n" * 9]
TOKENIZER = Tokenizer.train(CORPUS, 330)


def _chat(*contents: str, system: str | None = None) -> Conversation:
    turns = [Message(("user", "assistant")[n % 2], text) for n, text in enumerate(contents)]
    first = [] if system is None else [Message("system", system)]
    return Conversation((*first, *turns), "a.jsonl", 7)


def _trained_texts(tokenizer: Tokenizer, example: Example) -> list[str]:
    starts, ends = trained_runs(example.trained)
    return [tokenizer.decode(example.ids[s:e]) for s, e in zip(starts, ends, strict=True)]


def _with_template(folder: Path, template: str) -> Tokenizer:
    TOKENIZER.save(folder)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return Tokenizer.load(folder)


def test_only_answers_and_their_stop_are_trained() -> None:
    chat = _chat("Capital of France?", "Paris.", "Sure?", " I think\nso", system="You are Bob.")
    example = render_example(TOKENIZER, chat)
    check_example(TOKENIZER, chat, example)
    assert (example.ids.dtype, example.trained.dtype) == (np.int32, np.bool_)
    assert _trained_texts(TOKENIZER, example) == ["Paris.<|im_end|>", " I think\nso<|im_end|>"]
    text = TOKENIZER.render_chat(chat.as_dicts(), add_generation_prompt=False)
    assert TOKENIZER.decode(example.ids) == text.removesuffix("\n")
    assert example.answers == (2, 4)
    assert example.trained[-1]


_TEXT = st.text(max_size=20) | st.sampled_from(["\n", "\n\nPa", " ", "<|im_end|>", "a<|im_start|>"])
_ANSWER = _TEXT.filter(lambda text: bool(text.strip()))


@given(st.lists(st.tuples(_TEXT, _ANSWER), min_size=1, max_size=4))
@settings(max_examples=150, deadline=None)
def test_prompts_are_what_serving_sends(turns: list[tuple[str, str]]) -> None:
    chat = _chat(*(text for turn in turns for text in turn))
    examples = render_examples(TOKENIZER, [chat])[0]
    assert [i for e in examples for i in e.answers] == [2 * n + 1 for n in range(len(turns))]
    for example in examples:
        check_example(TOKENIZER, chat, example)
    texts = [text for e in examples for text in _trained_texts(TOKENIZER, e)]
    assert texts == [answer + "<|im_end|>" for _, answer in turns]


def test_an_answer_that_would_merge_with_its_prompt_starts_a_new_example() -> None:
    """A served prompt ends in one newline; in the whole chat it is part of a token of two."""
    assert len(TOKENIZER.encode("\n\n")) == 1
    chat = _chat("What?", "\n\nParis.", "And?", "So.")
    examples = render_examples(TOKENIZER, [chat])[0]
    assert [e.answers for e in examples] == [(1,), (3,)]
    for example in examples:
        check_example(TOKENIZER, chat, example)
    with pytest.raises(DataError, match=r"a.jsonl:7: this chat template makes 2 examples"):
        render_example(TOKENIZER, chat)


def test_a_template_that_rewrites_earlier_turns(tmp_path: Path) -> None:
    """As Qwen3's: thinking is shown for the last answer only."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.last %}{{ '(think)\n' }}{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = _with_template(tmp_path, template)
    chat = _chat("What?", "Paris.", "Sure?", "Yes.", "And?", "So.")
    examples = render_examples(tokenizer, [chat])[0]
    assert [e.answers for e in examples] == [(1,), (3,), (5,)]
    for example in examples:
        check_example(tokenizer, chat, example)
    assert "(think)\nYes.<|im_end|>" == _trained_texts(tokenizer, examples[1])[0]
    assert tokenizer.decode(examples[2].ids).count("(think)") == 1


def test_typed_special_tokens_stay_text() -> None:
    chat = _chat("say <|im_end|>", "<|im_end|> and <|endoftext|>")
    example = render_example(TOKENIZER, chat)
    check_example(TOKENIZER, chat, example)
    assert np.isin(example.ids, TOKENIZER.stop_ids).sum() == 2
    assert _trained_texts(TOKENIZER, example) == ["<|im_end|> and <|endoftext|><|im_end|>"]


def test_batch_and_single_agree() -> None:
    chats = [_chat("a", "b"), _chat("x <|im_end|>", "y"), _chat("What is", "the\n", "c", "d")]
    for chat, (example,) in zip(chats, render_examples(TOKENIZER, chats), strict=True):
        single = render_example(TOKENIZER, chat)
        assert single.ids.tolist() == example.ids.tolist()
        assert single.trained.tolist() == example.trained.tolist()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
            "{% if add_generation_prompt %}{{ 'ANSWER' }}{% endif %}",
            "template asks for an answer after .*ANSWER' but writes the same chat as",
        ),
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}",
            "cannot render this conversation: no system here",
        ),
    ],
)
def test_templates_that_do_not_fit_are_refused_with_the_row(
    tmp_path: Path, template: str, message: str
) -> None:
    tokenizer = _with_template(tmp_path, template)
    with pytest.raises(DataError, match=f"a.jsonl:7: .*{message}"):
        render_example(tokenizer, _chat("a", "b", system="s"))


def test_batches_rendered_in_threads_are_the_same() -> None:
    from concurrent.futures import ThreadPoolExecutor

    tokenizer = Tokenizer.train(CORPUS, 330)  # nothing of it is computed yet
    batches = [
        [_chat("What is", f"it {n} <|im_end|>" * (n % 2), "x", "y")] * 3 for n in range(1, 20)
    ]
    batches = [[c for c in batch if c.messages[1].content] for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda batch: render_checked(tokenizer, batch), batches))
    for batch, groups in zip(batches, found, strict=True):
        for group, wanted in zip(groups, render_examples(TOKENIZER, batch), strict=True):
            assert [e.ids.tolist() for e in group] == [e.ids.tolist() for e in wanted]


# ---------------------------------------------------------------- the contract


def test_a_row_without_contract_names_its_line(tmp_path: Path) -> None:
    template = "{% for m in messages %}<|im_start|>{{ m.content[:5] }}<|im_end|>{% endfor %}"
    template += "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    rows = [replace(_chat("a", "b" * n), line=n) for n in range(1, 9)]
    message = "^a.jsonl:6: the chat template loses or changes message 2 .assistant.: its text 'bb"
    with pytest.raises(DataError, match=message):
        render_checked(_with_template(tmp_path, template), rows)
    assert render_checked(TOKENIZER, []) == []


def _broken(change: str) -> Example:
    example = render_example(TOKENIZER, _chat("Capital?", "Paris.", "Sure?", "Yes."))
    ids, trained = example.ids.copy(), example.trained.copy()
    if change == "nothing":
        trained[:] = False
    elif change == "prompt":
        ids[1] += 1
    elif change == "stop":
        trained[-1] = False
    elif change == "run":
        trained[trained_runs(trained)[0][0] :][:9] = False
    elif change == "first":
        trained[:] = True
    return replace(example, ids=ids, trained=trained)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("nothing", "no token to learn after a prompt"),
        ("first", "no token to learn after a prompt"),
        ("run", "1 trained runs for 2 answers"),
        ("stop", r"message 4 is not ended by one stop token \(<\|im_end\|>, <\|endoftext\|>\)"),
        ("prompt", "the prompt before message 2 is not what serving would send"),
    ],
)
def test_contract_names_what_is_broken(change: str, message: str) -> None:
    chat = _chat("Capital?", "Paris.", "Sure?", "Yes.")
    with pytest.raises(DataError, match=f"a.jsonl:7: {message}") as caught:
        check_example(TOKENIZER, chat, _broken(change))
    assert caught.value.hint


def test_a_template_without_stop_token_is_refused(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    tokenizer, chat = _with_template(tmp_path, template), _chat("a", "b")
    with pytest.raises(DataError, match="message 2 is not ended by one stop token"):
        check_example(tokenizer, chat, render_example(tokenizer, chat))


def test_two_bos_are_refused(tmp_path: Path) -> None:
    import json

    template = "{% for m in messages %}{{ bos_token }}{{ m.content }}<|im_end|>{% endfor %}"
    template += "{% if add_generation_prompt %}{{ bos_token }}{% endif %}"
    _with_template(tmp_path, template)
    config = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").unlink()
    tokenizer, chat = Tokenizer.load(tmp_path), _chat("a", "b")
    with pytest.raises(DataError, match=r"2 begin-of-text tokens \(<\|im_start\|>\) in one row"):
        check_example(tokenizer, chat, render_example(tokenizer, chat))
