"""Tokenizer: a byte-level BPE with special tokens and a chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from mule import fsio, progress
from mule.errors import ModelError, UserError
from mule.tokenizer import files
from mule.tokenizer.files import TokenizerParts
from mule.tokenizer.stream import BYTES

if TYPE_CHECKING:
    from mule.tokenizer.template import ChatTemplate

DOCUMENT_END, TURN_START, TURN_END, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
ROLES = ("system", "user", "assistant", "tool")

# The form Ollama and llama.cpp recognise as ChatML.
CHATML = (
    r"{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content']"
    r" + '<|im_end|>' + '\n'}}{% endfor %}"
    r"{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_DOCUMENT_ENDS = (DOCUMENT_END, "<|end_of_text|>", "</s>", "<eos>")  # by custom, in this order
_MIN_VOCAB_SIZE = 256 + 4  # every byte, and our special tokens
_PIECE_CHARS = 16_000  # long texts are cut: measured 1.8 times faster than whole novels
_CUT = re.compile(r"(?<=\S) (?=\S)")
_CUT_PROBE = "ab cd! ef 12 gh, (ij) kl"  # a space between each two kinds of characters
_TEXT_PROBE = "mule-probe"


class Tokenizer:
    """Text <-> ids. `eos_id` ends a chat turn where there is a chat template, else a document.

    Raises ModelError when no token can end a text.
    """

    def __init__(self, parts: TokenizerParts) -> None:
        self._parts = parts
        self._parsing = parts.backend  # special tokens in the text are parsed
        self._vocab = parts.backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._vocab.values()) + 1
        self.chat_template = parts.chat_template
        self.bos_id = self._find_bos()
        self.pad_id = self._vocab.get(parts.names.get("pad_token", ""))
        ends = (self._vocab.get(text) for text in _DOCUMENT_ENDS)
        document_end = next((token_id for token_id in ends if token_id is not None), None)
        configured = self._vocab.get(parts.names.get("eos_token", ""))
        candidates = (self._find_turn_end(), configured, document_end, *parts.stop_ids)
        stops = [token_id for token_id in candidates if token_id is not None]
        if not stops:
            raise ModelError(
                "the tokenizer names no token that ends a text",
                'add "eos_token": "..." to tokenizer_config.json beside tokenizer.json',
            )
        self.eos_id: int = stops[0]
        self.document_end_id: int = self.eos_id if document_end is None else document_end
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys(stops))

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, num_texts: int | None = None
    ) -> Tokenizer:
        """A byte-level BPE with GPT-2's splitting and ChatML; smaller if the texts hold less."""
        if vocab_size < _MIN_VOCAB_SIZE:
            raise UserError(
                f"a vocabulary of {vocab_size} tokens has no room for the 256 bytes "
                "and 4 special tokens",
                f"ask for at least {_MIN_VOCAB_SIZE}",
            )
        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        specials = (DOCUMENT_END, TURN_START, TURN_END, PAD)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=[AddedToken(text, special=True, normalized=False) for text in specials],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        with progress.task("Training the tokenizer", total=num_texts, unit="texts") as bar:
            backend.train_from_iterator(_counted(texts, bar), trainer, length=num_texts)
        if (found := backend.get_vocab_size()) < vocab_size:
            progress.note(
                f"the texts hold {found:,} tokens, fewer than the {vocab_size:,} asked for"
            )
        names = {"eos_token": TURN_END, "pad_token": PAD}
        return cls(TokenizerParts(backend, names=names, chat_template=CHATML, add_bos=False))

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """From a folder with tokenizer.json or GPT-2's two files, or a tokenizer.json."""
        parts = files.read(Path(path))
        try:
            return cls(parts)
        except ModelError as error:
            raise ModelError(f"{path}: {error.message}", error.hint) from None

    def save(self, folder: str | Path, *, max_length: int | None = None) -> None:
        """Write the files that `load` and transformers' AutoTokenizer read."""
        if max_length is not None:
            self._parts.max_length = max_length
        files.write(Path(folder), self._parts, adds_bos=self.bos_id is not None)

    def fingerprint(self) -> str:
        """SHA-256 of everything that decides ids and chat text."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        content = json.loads(self._parsing.to_str())
        names = self._parts.names if self.chat_template else {}
        return fsio.sha256_json([content, self.chat_template, names])

    # ------------------------------------------------------------ text

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of `text`, no BOS added. `special` parses special tokens written in it; without it
        they are ordinary characters, as text from a user must be."""
        if len(text) > _PIECE_CHARS:
            return self.encode_batch([text], special=special)[0]
        backend = self._parsing if special else self._literal
        try:
            return backend.encode(text, add_special_tokens=False).ids
        except TypeError:
            raise _not_unicode(text) from None

    def encode_batch(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        """Ids of each text, in parallel; the same as `encode`."""
        backend = self._parsing if special else self._literal
        cuts = [self.cut(text) for text in texts]
        pieces = [piece for cut in cuts for piece in cut]
        try:
            encoded = backend.encode_batch_fast(pieces, add_special_tokens=False)
        except TypeError:
            raise _not_unicode(*texts) from None
        remaining = iter(encoded)
        results = []
        for cut in cuts:
            ids = next(remaining).ids
            for _ in cut[1:]:
                ids += next(remaining).ids
            results.append(ids)
        return results

    def cut(self, text: str) -> list[str]:
        """Pieces of a long text whose ids, joined, are the ids of the text; encode in parts."""
        return _cut(text) if self._cuttable else [text]

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """The text of `ids`. Raises UserError for an id outside the vocabulary."""
        ids = [int(token_id) for token_id in ids]
        for token_id in ids:
            self._token(token_id)
        return self._parsing.decode(ids, skip_special_tokens=skip_special)

    def token_text(self, token_id: int) -> str:
        """One token as readable text; a part of a character shows as U+FFFD."""
        return self.decode([token_id])

    def token_bytes(self, token_id: int) -> bytes | None:
        """The bytes a token stands for; None where the tokenizer is not byte-level."""
        if not self._byte_level:
            return None
        token = self._token(token_id)
        if all(character in BYTES for character in token):
            return bytes(BYTES[character] for character in token)
        return token.encode()  # an added token is written as it is

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids

    # ------------------------------------------------------------ chat

    def render_chat(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        """The chat as the template writes it. Raises ModelError without a template, or if it
        refuses; UserError for a message without a known role and a text."""
        if self.chat_template is None:
            raise ModelError(
                "this tokenizer has no chat template, so chats cannot be written for it",
                "put a chat_template.jinja beside tokenizer.json, or train on plain text",
            )
        _check_messages(messages)
        return self._template.render(messages, add_generation_prompt=add_generation_prompt)

    def encode_prompt(self, messages: list[dict[str, str]]) -> list[int]:
        """The ids a model is given to answer `messages`: exactly what serving sends it."""
        protected, mark = self.protect(messages)
        return self.encode_rendered(self.render_chat(protected, add_generation_prompt=True), mark)

    def protect(self, messages: list[dict[str, str]]) -> tuple[list[dict[str, str]], str]:
        """`messages` with every special token typed in them broken up by a mark, and that mark.

        The mark is "" when there is nothing to break up.
        """
        _check_messages(messages)
        if not any(self._special_pattern.search(m["content"]) for m in messages):
            return messages, ""
        used = set("".join(m["content"] for m in messages))
        mark = next(c for c in map(chr, range(0xE000, 0xF900)) if c not in used)

        def protected(content: str) -> str:
            broken = self._special_pattern.sub(lambda match: mark.join(match[0]), content)
            if self._special_pattern.search(broken):
                raise _typed_special_error("a special token of one character cannot be broken up")
            return broken

        marked = [{**m, "content": protected(m["content"])} for m in messages]
        prompts = messages[-1]["role"] != "assistant"
        text = self.render_chat(marked, add_generation_prompt=prompts).replace(mark, "")
        if text != self.render_chat(messages, add_generation_prompt=prompts):
            raise _typed_special_error("the chat template rewrites the messages")
        return marked, mark

    def encode_rendered(self, text: str, mark: str = "") -> list[int]:
        """Ids of template text whose messages were protected by `mark`."""
        if not mark:
            return self.encode(text, special=True)
        harmless = text.replace(mark, "x")
        if self._encode_between(harmless, "") != self.encode(harmless, special=True):
            raise _typed_special_error("this tokenizer does not encode them piece by piece")
        return self._encode_between(text, mark)

    def _encode_between(self, text: str, mark: str) -> list[int]:
        """Encode the special tokens of `text` as such and all between them as plain text."""
        ids: list[int] = []
        end = 0
        for match in self._special_pattern.finditer(text):
            ids += self.encode(text[end : match.start()].replace(mark, ""))
            ids += self.encode(match[0], special=True)
            end = match.end()
        return ids + self.encode(text[end:].replace(mark, ""))

    # ------------------------------------------------------------ inside

    @cached_property
    def _literal(self) -> Backend:
        """The same vocabulary, reading special tokens in the text as plain characters."""
        clone = Backend.from_str(self._parsing.to_str())
        clone.encode_special_tokens = True
        return clone

    @cached_property
    def _template(self) -> ChatTemplate:
        from mule.tokenizer.template import ChatTemplate  # jinja2 is needed for chats only

        assert self.chat_template is not None
        return ChatTemplate(self.chat_template, self._parts.names)

    @cached_property
    def _added(self) -> dict[int, AddedToken]:
        return self._parsing.get_added_tokens_decoder()

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(token_id for token_id, token in self._added.items() if token.special)

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        tokens = [token for token in self._added.values() if token.special]
        tokens.sort(key=lambda token: -len(token.content))
        forms = [
            r"\s*" * token.lstrip + re.escape(token.content) + r"\s*" * token.rstrip
            for token in tokens
        ]
        return re.compile("|".join(forms) or r"(?!)")  # without special tokens, match nothing

    @cached_property
    def _byte_level(self) -> bool:
        return isinstance(self._parsing.decoder, decoders.ByteLevel)

    @cached_property
    def _cuttable(self) -> bool:
        """Whether cutting before a single space changes no id: every word starts at its space."""
        normalizer, splitter = self._parsing.normalizer, self._parsing.pre_tokenizer
        if not self._byte_level or splitter is None:
            return False
        if normalizer is not None and not isinstance(normalizer, normalizers.NFC):
            return False
        if any(t.lstrip or t.rstrip or re.search(r"\s", t.content) for t in self._added.values()):
            return False
        words = splitter.pre_tokenize_str(_CUT_PROBE)
        starts = {start for _, (start, _) in words}
        return all(match.start() in starts for match in _CUT.finditer(_CUT_PROBE))

    def _token(self, token_id: int) -> str:
        token = self._parsing.id_to_token(token_id) if token_id >= 0 else None
        if token is None:
            raise UserError(
                f"token id {token_id} is not in this tokenizer ({self.vocab_size:,} ids)",
                "use the tokenizer that was saved with the model",
            )
        return token

    def _find_bos(self) -> int | None:
        named = self._vocab.get(self._parts.names.get("bos_token", ""))
        if self._parts.add_bos is not None:
            return named if self._parts.add_bos else None
        with_specials = self._parsing.encode("a", add_special_tokens=True).ids
        return with_specials[0] if with_specials[:1] == [named] else None

    def _find_turn_end(self) -> int | None:
        """The first special token after an assistant's words, as the template writes it."""
        if self.chat_template is None:
            return None
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _TEXT_PROBE}]
        try:
            text = self.render_chat(chat, add_generation_prompt=False)
        except ModelError:
            return None  # it refuses this chat; the configured token counts
        match = self._special_pattern.search(text.rpartition(_TEXT_PROBE)[2])
        return self._vocab.get(match[0].strip()) if match else None


def _counted(texts: Iterable[str], bar: progress.Task) -> Iterable[str]:
    for text in texts:
        yield text
        bar.advance()


def _cut(text: str) -> list[str]:
    """Pieces of about _PIECE_CHARS, each cut before a single space between two words."""
    pieces = []
    start = 0
    while len(text) - start > _PIECE_CHARS:
        match = _CUT.search(text, start + _PIECE_CHARS)
        if match is None:
            break
        pieces.append(text[start : match.start()])
        start = match.start()
    return [*pieces, text[start:]]


def _check_messages(messages: list[dict[str, str]]) -> None:
    if not messages:
        raise UserError("a chat without messages", 'give [{"role": "user", "content": "..."}]')
    for number, message in enumerate(messages, start=1):
        if message.get("role") not in ROLES:
            raise UserError(
                f"message {number} has the role {message.get('role')!r}",
                f"use one of {', '.join(ROLES)}",
            )
        if not isinstance(message.get("content"), str):
            raise UserError(f"message {number} has no text", 'its "content" must be a string')


def _not_unicode(*texts: str) -> UserError:
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            found = f"\\u{ord(text[error.start]):04x}"
            return UserError(
                f"the text holds {found}, half of a character, at position {error.start}",
                "remove it: it cannot be written as UTF-8",
            )
    return UserError("only text can be encoded", "give strings")


def _typed_special_error(reason: str) -> UserError:
    return UserError(
        f"a message contains the text of a special token, and {reason}",
        "remove it from the message",
    )
