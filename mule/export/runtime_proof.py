"""What llama.cpp makes of texts and chats with a file: token ids, rendered prompts, stop tokens."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Protocol

from mule.errors import ModelError
from mule.export.proof import proof_texts
from mule.export.verify_report import VerifyReport
from mule.generate.llamacpp import LlamaCpp

Message = dict[str, str]

_PROOF_CHARS = 100_000  # of each text given, for the comparison of token ids
_CHATS: list[list[Message]] = [
    [{"role": "user", "content": "Hello! Ça va ?"}],
    [
        {"role": "system", "content": "You are  brief.\n"},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": " And 2 + 2?\n\n"},
    ],
]


class ReferenceTokenizer(Protocol):
    """What mule.tokenizer.Tokenizer offers."""

    stop_ids: tuple[int, ...]
    chat_template: str | None
    vocab_size: int

    def encode(self, text: str, *, special: bool = False) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def render_chat(self, messages: list[Message], *, add_generation_prompt: bool) -> str: ...
    def encode_prompt(self, messages: list[Message]) -> list[int]: ...


def check_tokens(
    model: LlamaCpp, tokenizer: ReferenceTokenizer, texts: Sequence[str], report: VerifyReport
) -> None:
    """Every text of the corpus, and of `texts`, gets the same ids."""
    corpus = proof_texts([text[:_PROOF_CHARS] for text in texts])
    report.num_texts = len(corpus)
    wrong, known = [], Counter[str]()
    for special in (False, True):
        for text, found in zip(corpus, model.tokenize_all(corpus, special)):
            expected = tokenizer.encode(text, special=special)
            if found == expected:
                continue
            if limit := _known_limit(model, tokenizer, text, special):
                known[limit] += 1
            else:
                wrong.append((text, expected, found))
    report.notes += [f"{count} texts {limit}" for limit, count in known.items()]
    failures = []
    if wrong:
        text, expected, found = min(wrong, key=lambda each: len(each[0]))
        failures.append(
            f"{len(wrong)} of {2 * len(corpus)} texts get other ids, such as {text[:60]!r}: "
            f"{expected[:8]} in the model, {found[:8]} in the file; its tokenizer.ggml.pre or its "
            "merges are not the model's"
        )
    report.tokens_equal = report.passed("tokens", failures, f"{len(corpus)} texts, the same ids")


def _known_limit(model: LlamaCpp, tokenizer: ReferenceTokenizer, text: str, special: bool) -> str:
    """Why llama.cpp itself gives a text other ids, where that is no fault of the file."""
    expected = tokenizer.encode(text, special=special)
    composed = unicodedata.normalize("NFC", text)
    if composed != text and model.tokenize(composed, special) == expected:
        return "with loose accents get other ids: llama.cpp does not compose them (NFC)"
    prefix = model.header.metadata.get("tokenizer.ggml.add_space_prefix")
    if prefix is False and model.tokenize(f" {text}", special) == expected:
        return (
            "that no special token begins get other ids: the model puts a space before them, which "
            "llama.cpp does for no text of this file"
        )
    shorter = model.without_leading_spaces(text, special)
    if prefix and model.tokenize(shorter, special) == tokenizer.encode(shorter, special=special):
        return (
            "with a space at the beginning or after a special token get other ids: llama.cpp puts "
            "one more before it, the model does not"
        )
    return ""


def check_template(
    model: LlamaCpp,
    tokenizer: ReferenceTokenizer,
    prompts: Sequence[list[Message]],
    report: VerifyReport,
) -> None:
    """Chats become the same prompts, as ids."""
    if tokenizer.chat_template is None:
        there = model.chat_template is not None
        report.passed("template", ["the file has a chat template, the model has none"] * there)
        return
    chats = [*_CHATS, *prompts]
    failures = list(_wrong_prompts(model, tokenizer, chats))[:1]
    report.template_equal = report.passed("template", failures, f"{len(chats)} chats, the same ids")


def _wrong_prompts(
    model: LlamaCpp, tokenizer: ReferenceTokenizer, chats: Sequence[list[Message]]
) -> Iterator[str]:
    for messages in chats:
        try:
            expected = tokenizer.render_chat(messages, add_generation_prompt=True)
        except ModelError:
            continue  # the template refuses this chat, for instance its system turn
        found = model.apply_template(messages)
        ids = model.tokenize_all([found], special=True, add_bos=True)[0]
        wanted = tokenizer.encode(expected, special=True)
        if ids == wanted:
            continue
        if ids[1:] == wanted and ids[0] == model.bos_id:
            yield f"a BOS too many: llama.cpp puts token {model.bos_id} before the model's prompt"
        yield (
            f"a chat of {len(messages)} messages becomes {found[-60:]!r} in llama.cpp "
            f"and {expected[-60:]!r} in the model (ends shown)"
        )


def check_stops(model: LlamaCpp, tokenizer: ReferenceTokenizer, report: VerifyReport) -> None:
    """The tokens that end an answer of the model end one of the file."""
    failures = [
        f"{shown(tokenizer, token)} does not end a generation in the file"
        for token in tokenizer.stop_ids
        if not model.is_eog(token)
    ]
    ends = ", ".join(shown(tokenizer, token) for token in tokenizer.stop_ids)
    if model.eos_id not in tokenizer.stop_ids:
        found = "missing" if model.eos_id is None else f"token {model.eos_id}"
        failures.append(f"the file's eos is {found}; the model stops at {ends}")
    report.stops = report.passed("stops", failures, ends)


def shown(tokenizer: ReferenceTokenizer, token: int) -> str:
    return f"token {token} ({tokenizer.decode([token])!r})"
