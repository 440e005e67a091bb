"""Tokenizer: a byte-level BPE with special tokens and a chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from mule import fsio, machine, progress
from mule.errors import ModelError, UserError
from mule.tokenizer import files
from mule.tokenizer.coverage import Coverage, not_unicode
from mule.tokenizer.files import TokenizerParts
from mule.tokenizer.stream import BYTES, sentencepiece_bytes
from mule.tokenizer.training_text import training_pieces
from mule.tokenizer.words import WordEncoder

if TYPE_CHECKING:
    from mule.tokenizer.chats import Chats
    from mule.tokenizer.tools import Messages, Tools

DOCUMENT_END, TURN_START, TURN_END, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"

# The form Ollama and llama.cpp recognise as ChatML.
CHATML = (
    r"{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content']"
    r" + '<|im_end|>' + '\n'}}{% endfor %}"
    r"{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_DOCUMENT_ENDS = (DOCUMENT_END, "<|end_of_text|>", "</s>", "<eos>")  # by custom, in this order
_MIN_VOCAB_SIZE = 256 + 4  # every byte, and our special tokens
_PIECE_CHARS = 4_000  # long texts are cut: measured 1.8 times faster than whole novels
_MAX_CORES_FOR_WORDS = 4  # one core looking words up was as fast as the library on five
_NOTHING = re.compile(r"(?!)")
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
        configured = self._named("eos_token")
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
            backend.train_from_iterator(training_pieces(texts, bar), trainer, length=num_texts)
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

    def vocabulary_fingerprint(self) -> str:
        """SHA-256 of what decides the ids of plain text and of special tokens."""
        return fsio.sha256_json(json.loads(self._parsing.to_str()))

    @cached_property
    def _fingerprint(self) -> str:
        content = json.loads(self._parsing.to_str())
        names = self._parts.names if self.chat_template else {}
        return fsio.sha256_json([content, self.chat_template, names])

    # ------------------------------------------------------------ text

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of `text`, no BOS added. `special` parses special tokens written in it; without it
        they are ordinary characters, as text from a user must be."""
        return self.encode_arrays([text], special=special)[0].tolist()

    def encode_batch(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        """Ids of each text; the same as `encode`."""
        return [ids.tolist() for ids in self.encode_arrays(texts, special=special)]

    def encode_arrays(self, texts: Sequence[str], *, special: bool = False) -> list[np.ndarray]:
        """Ids of each text, (n,) uint32; the same as `encode`."""
        cuts = [self.cut(text) for text in texts]
        encoded = iter(self._encode_pieces([piece for cut in cuts for piece in cut], special))
        return [
            next(encoded) if len(cut) == 1 else np.concatenate([next(encoded) for _ in cut])
            for cut in cuts
        ]

    def _encode_pieces(self, pieces: list[str], special: bool) -> list[np.ndarray]:
        words = self._words
        if words is None:
            return self._encode_in_threads(pieces, special)
        results = [words.encode(piece, special=special) for piece in pieces]
        if rest := [n for n, ids in enumerate(results) if ids is None]:
            others = self._encode_in_threads([pieces[n] for n in rest], special)
            for n, ids in zip(rest, others, strict=True):
                results[n] = ids
        return [ids for ids in results if ids is not None]

    def _encode_in_threads(self, pieces: list[str], special: bool) -> list[np.ndarray]:
        backend = self._parsing if special else self._literal
        try:
            encoded = backend.encode_batch_fast(pieces, add_special_tokens=False)
        except TypeError:
            raise not_unicode(*pieces) from None
        if self._coverage.needed:
            for piece in pieces:
                pattern = self._special_pattern if special else _NOTHING
                self._coverage.check(pattern.sub(lambda match: " " * len(match[0]), piece))
        return [np.array(each.ids, dtype=np.uint32) for each in encoded]

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

    def piece(self, token_id: int) -> bytes:
        """The bytes a token adds to a text, of a special token its name."""
        content = self.token_bytes(token_id)
        return sentencepiece_bytes(self._token(token_id)) if content is None else content

    def is_special(self, token_id: int) -> bool:
        return token_id in self.special_ids

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids of all special tokens."""
        return frozenset(token_id for token_id, token in self._added.items() if token.special)

    def special_spans(self, text: str) -> list[tuple[int, int]]:
        """Start and end of each special token written in `text`."""
        return [match.span() for match in self._special_pattern.finditer(text)]

    @cached_property
    def splits_at_specials(self) -> bool:
        """Whether a text's ids are those of its pieces, cut before any special token."""
        normalizes = self._parsing.normalizer is not None
        return not any(
            token.lstrip or token.single_word or (token.normalized and normalizes)
            for token in self._added.values()
            if token.special
        )

    # ------------------------------------------------------------ chat

    def render_chat(
        self, messages: Messages, *, add_generation_prompt: bool, tools: Tools | None = None
    ) -> str:
        """The chat as the template writes it; tools as text where it knows none (see tools.py).

        Raises ModelError without a template, or if it refuses the chat; UserError for a message
        without a known role and a text.
        """
        return self._chats.render(messages, tools, add_generation_prompt=add_generation_prompt)

    def encode_prompt(self, messages: Messages, tools: Tools | None = None) -> list[int]:
        """The ids a model is given to answer `messages`: exactly what serving sends it."""
        messages, tools, mark = self.protect(messages, tools)
        text = self.render_chat(messages, tools=tools, add_generation_prompt=True)
        return self.encode_rendered(text, mark)

    def protect(
        self, messages: Messages, tools: Tools | None = None
    ) -> tuple[Messages, Tools | None, str]:
        """The chat with every special token typed in it broken up by a mark, and that mark.

        The mark is "" when there is nothing to break up.
        """
        return self._chats.protect(messages, tools)

    def encode_rendered(self, text: str, mark: str = "") -> list[int]:
        """Ids of template text whose messages were protected by `mark`."""
        if not mark:
            return self.encode(text, special=True)
        harmless = text.replace(mark, "x")
        if self._encode_between(harmless, "") != self.encode(harmless, special=True):
            from mule.tokenizer.chats import typed_special_error

            raise typed_special_error("this tokenizer does not encode them piece by piece")
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
    def _words(self) -> WordEncoder | None:
        """Looks words up, where that is faster than the library's threads."""
        if machine.physical_cores() > _MAX_CORES_FOR_WORDS:
            return None
        return WordEncoder.make(self._parsing)

    @cached_property
    def _literal(self) -> Backend:
        """The same vocabulary, reading special tokens in the text as plain characters."""
        clone = Backend.from_str(self._parsing.to_str())
        clone.encode_special_tokens = True
        return clone

    @cached_property
    def _chats(self) -> Chats:
        from mule.tokenizer.chats import Chats  # jinja2 is needed for chats only

        if self.chat_template is None:
            raise ModelError(
                "this tokenizer has no chat template, so chats cannot be written for it",
                "put a chat_template.jinja beside tokenizer.json, or train on plain text",
            )
        specials = [token.content for token in self._added.values() if token.special]
        return Chats(self.chat_template, self._parts.names, specials, self._special_pattern)

    @cached_property
    def _added(self) -> dict[int, AddedToken]:
        return self._parsing.get_added_tokens_decoder()

    @cached_property
    def _coverage(self) -> Coverage:
        return Coverage(self._literal)

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        tokens = [token for token in self._added.values() if token.special]
        tokens.sort(key=lambda token: -len(token.content))
        forms = [
            r"\s*" * token.lstrip + re.escape(token.content) + r"\s*" * token.rstrip
            for token in tokens
        ]
        return re.compile("|".join(forms)) if forms else _NOTHING

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
        token = self._parsing.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None
        if token is None:
            raise UserError(
                f"token id {token_id} is not in this tokenizer ({self.vocab_size:,} ids)",
                "use the tokenizer that was saved with the model",
            )
        return token

    def _named(self, name: str) -> int | None:
        """The id of a token that a configuration names; ModelError when there is no such token."""
        text = self._parts.names.get(name)
        if text is not None and text not in self._vocab:
            raise ModelError(
                f"{name} is {text!r} in tokenizer_config.json, which is no token of tokenizer.json",
                "correct it there, or copy both files again from where they came from",
            )
        return None if text is None else self._vocab[text]

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
