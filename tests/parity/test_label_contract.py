"""The label contract as a matrix: template styles x planted faults, and clean rows without alarm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mule.data.chat import Example, render_examples
from mule.data.contract import check_example, check_template, render_checked, trained_runs
from mule.data.sources.items import Conversation, Message, ToolCall
from mule.errors import DataError, ModelError
from mule.tokenizer import Tokenizer
from tests.parity.template_styles import (
    CHATML,
    CORPUS,
    GEMMA,
    LLAMA2,
    LLAMA3,
    MISTRAL,
    QWEN3,
    STYLES,
    Style,
    clean,
    load,
)

TOOLS = '[{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]'


def chat(*contents: str, system: str | None = None, line: int = 7) -> Conversation:
    turns = [Message(("user", "assistant")[n % 2], text) for n, text in enumerate(contents)]
    first = [] if system is None else [Message("system", system)]
    return Conversation((*first, *turns), "a.jsonl", line)


ONE = chat("Capital of France?", "Paris.\n\nIt is big.")
TWO = chat("Capital of France?", "Paris.", "Sure?", "I think so.")


def with_tools(name: str = "weather", *, calls: int = 1, system: bool = False) -> Conversation:
    called = tuple(ToolCall(f"{name}{n or ''}", '{"city": "Paris"}') for n in range(calls))
    results = [Message("tool", f"{20 + n} degrees", tool_call_id="a1") for n in range(calls)]
    messages = (
        *([Message("system", "Be brief.")] if system else []),
        Message("user", "Warm?"),
        Message("assistant", "", tool_calls=called),
        *results,
        Message("assistant", "Yes, it is warm."),
    )
    return Conversation(messages, "a.jsonl", 7, TOOLS)


# ---------------------------------------------------------------- planted faults


def _after(style: Style, change: str) -> str:
    """The style's template with what it writes, `out`, changed at the end."""
    return "{% set out %}" + style.template + "{% endset %}" + change


def _replaced(style: Style, old: str, new: str) -> str:
    return _after(style, "{{ out.replace(%r, %r) }}" % (old, new))  # noqa: UP031


def _template(make: Callable[[Style], str], row: Conversation) -> Callable[[Style], None]:
    return lambda style: _rows(load(style, make(style)), row)


def _rows(tokenizer: Tokenizer, row: Conversation) -> None:
    render_checked(tokenizer, [chat("a", "b"), row])


def _example(change: Callable[[Tokenizer, Example], Example]) -> Callable[[Style], None]:
    def run(style: Style) -> None:
        tokenizer = clean(style)
        for example in render_examples(tokenizer, [TWO])[0]:
            check_example(tokenizer, TWO, change(tokenizer, example))

    return run


def _masked(change: Callable[[Tokenizer, Example, np.ndarray], None]) -> Callable[[Style], None]:
    def changed(tokenizer: Tokenizer, example: Example) -> Example:
        trained = example.trained.copy()
        change(tokenizer, example, trained)
        return replace(example, trained=trained)

    return _example(changed)


def _train_the_question(_: Tokenizer, example: Example, trained: np.ndarray) -> None:
    trained[1 : int(trained_runs(example.trained)[0][0])] = True


def _forget_the_stop(_: Tokenizer, example: Example, trained: np.ndarray) -> None:
    trained[-1] = False


def _forget_everything(_: Tokenizer, example: Example, trained: np.ndarray) -> None:
    trained[:] = False


def _forget_padding(tokenizer: Tokenizer, example: Example, trained: np.ndarray) -> None:
    trained[example.ids == tokenizer.eos_id] = False  # as a mask by PAD does, where PAD is EOS


def _unprotected(row: Conversation) -> Callable[[Style], None]:
    """The row's typed special tokens parsed, as by encoding the rendered text alone."""

    def run(style: Style) -> None:
        tokenizer = clean(style)
        typed = [
            replace(m, content=m.content.replace("STOP", style.turn_end)) for m in row.messages
        ]
        real = replace(row, messages=tuple(typed))
        prompt = tokenizer.render_chat(real.as_dicts()[:1], add_generation_prompt=True)
        whole = tokenizer.render_chat(real.as_dicts(), add_generation_prompt=False)
        before, after = tokenizer.encode_batch([prompt, whole[len(prompt) :]], special=True)
        last = max(n for n, token_id in enumerate(after) if token_id == tokenizer.eos_id)
        ids = np.array(before + after[: last + 1])
        check_example(tokenizer, real, Example(ids, np.arange(len(ids)) >= len(before), (1,)))

    return run


def _other_bos(style: Style, template: str) -> Tokenizer:
    if style.bos:
        return load(style, template)
    return load(style, template, bos_token=style.specials[0], add_bos_token=True)


def _other_stops(style: Style) -> None:
    tokenizer = load(style)
    tokenizer.stop_ids = (tokenizer.encode("x")[0],)
    _rows(tokenizer, ONE)


def _bos_twice(style: Style) -> None:
    start = "{{ bos_token }}" if style.bos else "{{ bos_token + bos_token }}"
    _rows(_other_bos(style, start + style.template), ONE)


def _bos_missing(style: Style) -> None:
    _rows(_other_bos(style, _after(style, "{{ out.replace(bos_token, '') }}")), ONE)


def _other_model(style: Style) -> None:
    other = LLAMA3 if "<|im_start|>" in style.specials else CHATML
    check_template(load(style, other.template))


_NOT_ENDED = "is not ended by one stop token|no token to learn after a prompt"
_LOST = "a.jsonl:7: the chat template loses or changes message {}"
FAULTS: dict[str, tuple[Callable[[Style], None], str]] = {
    "no turn end": (_template(lambda s: _replaced(s, s.turn_end, ""), ONE), _NOT_ENDED),
    "turn end is plain text": (
        _template(lambda s: _replaced(s, s.turn_end, "<|fin|>"), ONE),
        _NOT_ENDED,
    ),
    "turn end unknown to the tokenizer": (
        lambda s: check_template(load(s, _replaced(s, s.turn_end, "<|fin|>"))),
        r"chat template writes <\|fin\|>, which is not a token of this tokenizer",
    ),
    "last turn not ended": (
        _template(
            lambda s: _after(
                s,
                "{%% if add_generation_prompt %%}{{ out }}{%% else %%}"  # noqa: UP031
                "{{ out.rpartition(%r)[0] }}{%% endif %%}" % s.turn_end,
            ),
            TWO,
        ),
        _NOT_ENDED,
    ),
    "generation stops at another token": (_other_stops, _NOT_ENDED),
    "BOS twice": (_bos_twice, r"2 begin-of-text tokens \(.+\) in one row"),
    "BOS missing": (_bos_missing, "does not begin with the begin-of-text token"),
    "generation prompt is not the answer's beginning": (
        _template(
            lambda s: s.template + "{% if add_generation_prompt %}{{ 'Bob:' }}{% endif %}", ONE
        ),
        "a.jsonl:7: the chat template asks for an answer after|chat template asks for an answer",
    ),
    "earlier turns dropped": (
        _template(
            lambda s: (
                "{% if messages | length > 2 %}{% set messages = messages[2:] %}{% endif %}"
                + s.template
            ),
            TWO,
        ),
        _LOST.format(r"1 \(user\)") + "|asks for an answer after",
    ),
    "answer changed": (
        _template(lambda s: _replaced(s, "Paris", "London"), ONE),
        _LOST.format(r"2 \(assistant\)"),
    ),
    "question changed": (
        _template(lambda s: _replaced(s, "France", "Spain"), ONE),
        _LOST.format(r"1 \(user\)"),
    ),
    "answer's blank lines taken out": (
        _template(lambda s: _replaced(s, ".\n\nIt", ".\nIt"), ONE),
        _LOST.format(r"2 \(assistant\)"),
    ),
    "system message dropped": (
        _template(
            lambda s: (
                "{% if messages[0].role == 'system' %}{% set messages = messages[1:] %}"
                "{% endif %}" + s.template
            ),
            chat("Capital?", "Paris.", system="You are Bob."),
        ),
        _LOST.format(r"1 \(system\)"),
    ),
    "template of another model": (_other_model, "it is the template of another model"),
    "question trained": (_masked(_train_the_question), "is not what serving would send"),
    "stop token not trained": (_masked(_forget_the_stop), _NOT_ENDED),
    "nothing trained": (_masked(_forget_everything), "no token to learn after a prompt"),
    "labels masked by PAD, which is EOS": (_masked(_forget_padding), _NOT_ENDED),
    "special token typed by the user parsed": (
        _unprotected(chat("a STOP b", "Paris.")),
        "is not what serving would send|begin-of-text",
    ),
    "special token typed in the answer parsed": (
        _unprotected(chat("a", "Paris. STOP Or not.")),
        _NOT_ENDED,
    ),
}

# ---------------------------------------------------------------- clean rows

CLEAN: dict[str, Callable[[Style], Conversation]] = {
    "one turn": lambda s: ONE,
    "several turns": lambda s: chat("a", "b", "What?", "Paris is", "And?", "So.", "x", "y."),
    "blank lines around answers": lambda s: chat("\n\n a", "\n\nParis.\n", "b\n", " so\n\n"),
    "unicode": lambda s: chat("Où? 日本語 🏴‍☠️ e\u0301", "«là» 👩‍👩‍👧‍👦 \u200b.", "ﬁ", "हिन्दी ไทย"),
    "typed special tokens": lambda s: chat(
        f"say {s.turn_end} and {s.specials[0]}", f"{s.turn_end}{s.specials[-1]} so", "a", "b"
    ),
    "code": lambda s: chat("{{ 1 }}", "```py\n\tprint('{% x %}')  # <b>\n\n\n```", "<s", "|>"),
    "almost empty": lambda s: chat(".", "0", "?", "."),
    "answers that repeat": lambda s: chat("yes", "yes", "yes", "yes"),
    "thinking": lambda s: chat(
        "a", "<think>\nhm\n</think>\n\nb", "c", "<think>\nso\n</think>\n\nd"
    ),
    "tools": lambda s: with_tools(),
    "two calls at once": lambda s: with_tools(calls=2),
    "special token in a call": lambda s: with_tools(f"x{s.turn_end}"),
    "system": lambda s: chat("a", "Paris.", "b", "So.", system="You are Bob."),
    "system and tools": lambda s: with_tools(system=True),
}


def matrix() -> list[tuple[str, str, str]]:
    """Each style with each fault, and what is said of it: the material of a table."""
    rows = []
    for style in STYLES:
        for name, (plant, _) in FAULTS.items():
            outcome = "missed"
            try:
                plant(style)
            except (DataError, ModelError) as error:
                outcome = error.message
            rows.append((style.name, name, outcome))
    return rows


def test_size_of_the_matrix() -> None:
    assert len(STYLES) >= 8
    assert len(FAULTS) >= 10
    assert len({style.name for style in STYLES}) == len(STYLES)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.name)
def test_planted_faults_are_caught(style: Style, fault: str) -> None:
    plant, message = FAULTS[fault]
    with pytest.raises((DataError, ModelError), match=message) as caught:
        plant(style)
    assert caught.value.hint


@pytest.mark.parametrize("row", CLEAN)
@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.name)
def test_clean_rows_raise_no_alarm(style: Style, row: str) -> None:
    tokenizer, conversation = clean(style), CLEAN[row](style)
    if row.startswith("system") and not style.system:
        message = (
            "a.jsonl:7: this chat template takes no system message: .*"
            "(System role not supported|alternate)(.|\n)*hint: put its text at the beginning of"
        )
        with pytest.raises(DataError, match=message):
            render_checked(tokenizer, [conversation])
        return
    for example in render_checked(tokenizer, [conversation])[0]:
        check_example(tokenizer, conversation, example)


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.name)
def test_templates_fit_their_tokenizers(style: Style) -> None:
    tokenizer = clean(style)
    check_template(tokenizer)
    assert tokenizer.token_text(tokenizer.eos_id) == style.turn_end
    assert tokenizer.eos_id in tokenizer.stop_ids


def test_pad_may_be_eos() -> None:
    """As SmolLM2 has it: labels do not come from the padding here, so the stop is trained."""
    tokenizer = load(CHATML, pad_token="<|im_end|>")
    assert tokenizer.pad_id == tokenizer.eos_id
    (example,) = render_checked(tokenizer, [TWO])[0]
    assert example.trained[example.ids == tokenizer.eos_id].tolist() == [False, True] * 2


def test_plain_inst_is_llama_2_and_not_chatml() -> None:
    check_template(clean(LLAMA2))  # its tokenizer has no token [INST]
    with pytest.raises(ModelError, match=r"writes \[/INST\], which is not a token"):
        check_template(load(CHATML, MISTRAL.template, bos_token="<|endoftext|>"))


# ---------------------------------------------------------------- faults of single styles


def test_a_dropped_second_call_is_caught() -> None:
    template = QWEN3.template.replace("in m.tool_calls", "in (m.tool_calls or [])[:1]")
    with pytest.raises(DataError, match=r"message 2 \(assistant\): the call of 'weather1'"):
        render_checked(load(QWEN3, template), [with_tools(calls=2)])


def test_dropped_arguments_are_caught() -> None:
    template = QWEN3.template.replace(
        "call.function.arguments | tojson",
        "(call.function.arguments if call.function.name == 'mule_tool' else 1) | tojson",
    )
    with pytest.raises(DataError, match=r"the argument 'city' of 'weather' is not in what"):
        render_checked(load(QWEN3, template), [with_tools()])


def test_dropped_tools_are_caught() -> None:
    template = QWEN3.template.replace("if tools", "if tools and messages | length < 2")
    tokenizer = load(QWEN3, template)
    row = with_tools(system=True)
    with pytest.raises(DataError, match=r"the description of the tool 'weather'"):
        render_checked(tokenizer, [row])


def test_reasoning_that_the_template_throws_away_is_caught() -> None:
    """As DeepSeek R1's template does, even in the answer that is trained."""
    template = CHATML.template.replace("m.content", "m.content.split('</think>')[-1]")
    with pytest.raises(DataError, match=_LOST.format(r"2 \(assistant\): its text '<think>hm")):
        render_checked(load(CHATML, template), [chat("a", "<think>hm</think>b")])


def test_a_question_repeated_in_the_answer_is_caught() -> None:
    template = CHATML.template.replace(
        "m.content", "m.content + (messages[0].content if m.role == 'assistant' else '')"
    )
    with pytest.raises(ModelError, match="it repeats message 1 in the answer of message 2"):
        check_template(load(CHATML, template))


def test_a_stop_token_before_the_answer_ends_is_caught() -> None:
    template = CHATML.template.replace("m.role + '\n'", "m.role + '\n'").replace(
        "+ m.content", "+ ('<|im_end|>' if m.role == 'assistant' else '') + m.content"
    )
    with pytest.raises(DataError, match="writes a stop token inside the answer of message 2"):
        render_checked(load(CHATML, template), [ONE])


def test_qwen3_makes_one_example_of_each_answer() -> None:
    tokenizer = clean(QWEN3)
    row = chat("a", "<think>\nhm\n</think>\n\nb", "c", "<think>\nso\n</think>\n\nd")
    examples = render_checked(tokenizer, [row])[0]
    assert [example.answers for example in examples] == [(1,), (3,)]
    assert "hm" not in tokenizer.decode(examples[1].ids)
    assert "hm" in _trained_texts(tokenizer, examples[0])[0]


# ---------------------------------------------------------------- tools as text


def test_the_form_of_tools_as_text() -> None:
    text = clean(CHATML).render_chat(
        with_tools(system=True).as_dicts(),
        add_generation_prompt=False,
        tools=with_tools().tool_list(),
    )
    assert text.startswith("<|im_start|>system\nBe brief.\n\n# Tools\n")
    assert '<tools>\n{"type": "function", "function": {"name": "weather"' in text
    assert (
        '<|im_start|>assistant\n<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n'
        "</tool_call><|im_end|>\n<|im_start|>tool\n20 degrees<|im_end|>\n"
    ) in text


def test_tools_without_system_and_tool_roles() -> None:
    row = with_tools(calls=2)
    text = clean(GEMMA).render_chat(
        row.as_dicts(), add_generation_prompt=False, tools=row.tool_list()
    )
    assert text.startswith("<bos><start_of_turn>user\n# Tools\n")
    assert "</tool_call>\n\nWarm?<end_of_turn>\n<start_of_turn>model\n<tool_call>" in text
    assert (
        "<start_of_turn>user\n<tool_response>\n20 degrees\n</tool_response>\n"
        "<tool_response>\n21 degrees\n</tool_response><end_of_turn>\n"
    ) in text


def test_a_template_that_writes_tools_is_left_to_it() -> None:
    row = with_tools()
    text = clean(QWEN3).render_chat(
        row.as_dicts(), add_generation_prompt=False, tools=row.tool_list()
    )
    assert "You may call the functions" not in text
    assert text.count("<tool_call>") == text.count("<tool_response>") == 1


# ---------------------------------------------------------------- properties


_TEXT = st.text(st.characters(exclude_categories=["Cs", "Co"]), max_size=12) | st.sampled_from(
    ["\n", "\n\nPa", " ", "What is", "<|im_end|>", "</s>", "a<end_of_turn>", "[INST]", "<|eot_id|>"]
)
_ANSWER = _TEXT.filter(lambda text: bool(text.strip()))


@given(
    st.sampled_from(STYLES), st.lists(st.tuples(_TEXT, _ANSWER), min_size=1, max_size=4), st.data()
)
@settings(max_examples=150, deadline=None)
def test_masks_of_random_conversations(
    style: Style, turns: list[tuple[str, str]], data: st.DataObject
) -> None:
    """Trained is the answer and its stop; before it stands exactly what serving sends."""
    tokenizer = clean(style)
    line = data.draw(st.integers(1, 40))
    row = chat(*(text for turn in turns for text in turn), line=line)
    examples = render_checked(tokenizer, [row])[0]
    assert [i for e in examples for i in e.answers] == [2 * n + 1 for n in range(len(turns))]
    trained = [text for e in examples for text in _trained_texts(tokenizer, e)]
    for text, (_, answer) in zip(trained, turns, strict=True):
        words = text.removesuffix(style.turn_end)
        assert words != text
        words = words.removeprefix("<think>\n\n</think>\n\n") if style is QWEN3 else words
        assert words.strip() == answer.strip()
    for example in examples:
        for start, index in zip(trained_runs(example.trained)[0], example.answers, strict=True):
            before = row.as_dicts()[:index]
            assert example.ids[:start].tolist() == tokenizer.encode_prompt(before)


def test_long_conversations_are_encoded_as_served() -> None:
    """Prompts cut from longer ones are those encoded whole, in and out of a batch."""
    words = CORPUS[0].split()
    rows = [
        chat(*(" ".join(words[n : n + k + 2]) for n in range(2 * k)), line=k) for k in range(1, 9)
    ]
    for style in STYLES:
        tokenizer = clean(style)
        for row, group in zip(rows, render_checked(tokenizer, rows), strict=True):
            single = render_examples(tokenizer, [row])[0]
            assert [e.ids.tolist() for e in group] == [e.ids.tolist() for e in single]
            for example in group:
                check_example(tokenizer, row, example)


def _trained_texts(tokenizer: Tokenizer, example: Example) -> list[str]:
    starts, ends = trained_runs(example.trained)
    return [tokenizer.decode(example.ids[s:e]) for s, e in zip(starts, ends, strict=True)]
