"""The vocabulary of a GGUF file, and the texts that prove it cuts text as the model was taught."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType

from mule import fsio
from mule.errors import ModelError
from mule.tokenizer import Tokenizer

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _WORDS + r"\p{N}{1,3}" + _REST
_QWEN2 = _WORDS + r"\p{N}" + _REST
_CASES = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"  # (?i:...) written out

# Steps of the pre-tokenizer and `ignore_merges` -> llama.cpp's name for the same splitting.
_PRE_TOKENIZERS: dict[tuple[tuple[str, ...], bool], str] = {
    (("bytes, GPT-2 words",), False): "gpt-2",
    ((_GPT2, "bytes"), False): "gpt-2",
    (("single digits", "bytes, GPT-2 words"), False): "smollm",
    ((_LLAMA3, "bytes"), True): "llama-bpe",
    ((_LLAMA3, "bytes"), False): "smaug-bpe",
    ((_QWEN2, "bytes"), False): "qwen2",
}


@dataclass(frozen=True)
class TokenTable:
    """Everything of a tokenizer that goes into the file; the lists have the model's vocab size."""

    tokens: list[bytes]
    types: list[TokenType]
    merges: list[str]
    pre: str
    eos_id: int
    more_stop_ids: tuple[int, ...]
    bos_id: int
    add_bos: bool
    pad_id: int | None
    chat_template: str | None
    notes: list[str]

    def write(self, writer: GGUFWriter) -> None:
        """Add the tokenizer.* entries to a file being written."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.merges:  # an empty list cannot be written
            writer.add_token_merges(self.merges)
        writer.add_bos_token_id(self.bos_id)
        writer.add_eos_token_id(self.eos_id)
        for token, add in zip(
            self.more_stop_ids, (writer.add_eot_token_id, writer.add_eom_token_id)
        ):
            add(token)
        if self.pad_id is not None:
            writer.add_pad_token_id(self.pad_id)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(False)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def read_tokens(model_dir: Path, vocab_size: int) -> TokenTable:
    """The tokenizer of a model folder in the terms of GGUF.

    Raises ModelError when llama.cpp has no equal of it, or it does not fit the model.
    """
    file = model_dir / "tokenizer.json"
    if not file.is_file():
        raise ModelError(
            f"{model_dir}: no tokenizer.json",
            "save the tokenizer into the folder: Tokenizer.load(...).save(folder)",
        )
    raw, tokenizer = fsio.read_json(file), Tokenizer.load(model_dir)
    notes: list[str] = []
    pre = _pre_tokenizer(file, raw, notes)
    tokens, types = _table(file, raw, vocab_size, notes)
    named_bos = _named_token(model_dir, "bos_token", tokens)
    more = tokenizer.stop_ids[1:]
    if len(more) > 2:
        notes.append(f"{len(more) - 2} stop tokens more than GGUF has places for")
    return TokenTable(
        tokens=tokens,
        types=types,
        merges=[m if isinstance(m, str) else " ".join(m) for m in raw["model"]["merges"]],
        pre=pre,
        eos_id=tokenizer.eos_id,
        more_stop_ids=more[:2],
        # Without an entry llama.cpp takes token 11 for both bos and eos.
        bos_id=next(i for i in (tokenizer.bos_id, named_bos, tokenizer.eos_id) if i is not None),
        add_bos=_puts_bos_first(tokenizer),
        pad_id=tokenizer.pad_id,
        chat_template=tokenizer.chat_template,
        notes=notes,
    )


def _table(
    file: Path, raw: dict[str, Any], vocab_size: int, notes: list[str]
) -> tuple[list[bytes], list[TokenType]]:
    added = {token["id"]: token for token in raw.get("added_tokens", [])}
    texts = {index: text for text, index in raw["model"]["vocab"].items()}
    texts |= {index: token["content"] for index, token in added.items()}
    if (num_ids := max(texts) + 1) > vocab_size:
        raise ModelError(
            f"{file}: {num_ids:,} tokens, but the model has {vocab_size:,} embedding rows",
            "the tokenizer belongs to another model; put the right one into the folder",
        )
    tokens, types = [], []
    for index in range(vocab_size):
        tokens.append(texts.get(index, f"[PAD{index}]").encode())
        if index not in texts:
            types.append(TokenType.UNUSED)
        elif index not in added:
            types.append(TokenType.NORMAL)
        else:
            special = added[index]["special"]
            types.append(TokenType.CONTROL if special else TokenType.USER_DEFINED)
    for token in added.values():
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
            notes.append(
                f"{token['content']} takes spaces beside it, which llama.cpp leaves where they are"
            )
    return tokens, types


def _puts_bos_first(tokenizer: Tokenizer) -> bool:
    """Whether llama.cpp must add bos: with a chat template, only if the chats begin with it."""
    if tokenizer.bos_id is None or tokenizer.chat_template is None:
        return tokenizer.bos_id is not None
    return tokenizer.encode_prompt([{"role": "user", "content": "a"}])[0] == tokenizer.bos_id


def _named_token(model_dir: Path, name: str, tokens: list[bytes]) -> int | None:
    file = model_dir / "tokenizer_config.json"
    value = fsio.read_json(file).get(name) if file.is_file() else None
    text = value.get("content") if isinstance(value, dict) else value
    return tokens.index(text.encode()) if text and text.encode() in tokens else None


# ---------------------------------------------------------------- splitting


def _pre_tokenizer(file: Path, raw: dict[str, Any], notes: list[str]) -> str:
    model = raw["model"]
    hint = "train the model with GPT-2's, Llama 3's or Qwen 2's splitting of text"
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise ModelError(f"{file}: not a byte-level BPE, the only kind Mule writes", hint)
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise ModelError(f"{file}: {key} = {model[key]!r} has no place in a GGUF file", hint)
    _normalizer(file, raw.get("normalizer"), notes)
    steps = tuple(_steps(raw.get("pre_tokenizer") or {}))
    pre = _PRE_TOKENIZERS.get((steps, bool(model.get("ignore_merges"))))
    if pre is None:
        raise ModelError(
            f"{file}: llama.cpp has no pre-tokenizer equal to this one: "
            f"{' then '.join(steps) or 'none'}, ignore_merges={bool(model.get('ignore_merges'))}",
            hint,
        )
    return pre


def _steps(pre_tokenizer: dict[str, Any]) -> list[str]:
    """The pre-tokenizer as a list of step names; what is not understood keeps its own name."""
    kind = pre_tokenizer.get("type")
    if kind == "Sequence":
        return [step for part in pre_tokenizer["pretokenizers"] for step in _steps(part)]
    if kind == "ByteLevel" and not pre_tokenizer.get("add_prefix_space"):
        return ["bytes, GPT-2 words" if pre_tokenizer.get("use_regex", True) else "bytes"]
    if kind == "Digits" and pre_tokenizer.get("individual_digits"):
        return ["single digits"]
    behavior = (pre_tokenizer.get("behavior"), bool(pre_tokenizer.get("invert")))
    if kind == "Split" and behavior in (("Isolated", False), ("Removed", True)):
        pattern = pre_tokenizer["pattern"].get("Regex", "")
        return [pattern.replace(_CASES, "(?i:'s|'t|'re|'ve|'m|'ll|'d)")]
    return [str(pre_tokenizer)] if pre_tokenizer else []


def _normalizer(file: Path, normalizer: dict[str, Any] | None, notes: list[str]) -> None:
    if normalizer is None:
        return
    kinds = [part["type"] for part in normalizer.get("normalizers", [normalizer])]
    if any(kind != "NFC" for kind in kinds):
        raise ModelError(
            f"{file}: the normalizer {', '.join(kinds)} has no equal in llama.cpp",
            "use a tokenizer without a normalizer, or with NFC",
        )
    if kinds:
        notes.append("llama.cpp does not compose accents (NFC); text with loose ones differs")


# ---------------------------------------------------------------- proof

_SAMPLES = (
    "The quick brown fox can't jump; it'll rest. WE'RE DONE, THEY'D SAY 'tis so's.",
    "L'été, où j'étais né à Besançon, l'œuvre coûta 12 345,67 € — déjà ! « Ça va ? »",
    "def f(x: int) -> dict[str, float]:\n\tif x >= 0x1F:\n\t\treturn {'a': 1e-5}  # ok\n\n\n",
    'for(;;){a[i]+=b<<2;}//?\r\n#include <stdio.h>\r\n\r\n  $x_y->z = "%d\\n";\n',
    "3.14159 1,000,000 2026-11-21 12:34:56 007 ١٢٣ ४५६ Ⅷ ½ x² H₂O 99% #42 +33 1 23 456 7890 1234567890",
    "👍🏽 👩‍👩‍👧‍👦 🇫🇷 ☕️ ✈ 1️⃣ 😀😀😀 text🙂text ❤️‍🔥!",
    "Привет, мир! 你好，世界。こんにちは세계 שלום مرحبا नमस्ते สวัสดี γειά Ünïcödé ﬁ ǅ İı",
    "  two   three    four\t\ttab \n\n newline \r\n\u00a0nbsp\u3000wide\u2009thin \u200bzero ",
    "<|im_start|>user\nhi<|im_end|>\n<s>[INST] </s> <unk> <|endoftext|>",
    "' '' ''' 's 'S 'lL o'clock rock'n'roll \"quoted\" ... --- ___ *** ~~~ \\n \\\\ `code`",
    "e\u0301 n\u0303 a\u0308 \u1100\u1161 \u0915\u094d\u0937 \u0e01\u0e33",
)
_JOINTS = ("", " ", "  ", "\n", "\n\n", "\t", "'s", ". ", ", ", "-", "\r\n", "   \n  ")
_RANGES = (
    *((0x20, 0x7E), (0xA0, 0x24F), (0x300, 0x36F), (0x370, 0x52F), (0x590, 0x6FF)),
    *((0x900, 0xDFF), (0x1100, 0x11FF), (0x2000, 0x2BFF), (0x3000, 0x33FF), (0x4E00, 0x9FFF)),
    *((0xAC00, 0xD7A3), (0xFF00, 0xFFEF), (0x1D400, 0x1D7FF), (0x1F300, 0x1F6FF)),
)


def proof_texts(texts: Sequence[str] = (), *, num_random: int = 600, seed: int = 0) -> list[str]:
    """Texts on which two tokenizers must agree: all kinds of writing, mixtures, and `texts`."""
    rng = random.Random(seed)
    words = [word for sample in _SAMPLES for word in sample.split()]
    mixtures = []
    for number in range(num_random):
        parts = rng.choices(words, k=rng.randint(1, 12))
        if number % 2:
            parts += ["".join(_character(rng) for _ in range(rng.randint(1, 24)))]
            rng.shuffle(parts)
        mixtures.append("".join(part + rng.choice(_JOINTS) for part in parts))
    return [*_SAMPLES, *mixtures, *texts]


def _character(rng: random.Random) -> str:
    """An assigned character: the tables of others differ with the version of Unicode."""
    while True:
        character = chr(rng.randint(*rng.choice(_RANGES)))
        if unicodedata.category(character) not in ("Cn", "Cs", "Co"):
            return character
