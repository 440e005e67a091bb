"""Text from token ids as they arrive."""

from __future__ import annotations

import codecs
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mule.tokenizer.core import Tokenizer


def _byte_characters() -> dict[str, int]:
    """GPT-2's visible character for each byte. Source: openai/gpt-2 encoder.py."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(b): b for b in visible} | {chr(256 + n): b for n, b in enumerate(hidden)}


BYTES = _byte_characters()
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def sentencepiece_bytes(token: str) -> bytes:
    """The bytes of a token as SentencePiece writes it: a space as U+2581, a lone byte as <0xNN>."""
    if match := _BYTE.fullmatch(token):
        return bytes.fromhex(match[1])
    return token.replace("\u2581", " ").encode()


class StreamDecoder:
    """Text from ids one at a time; the bytes of an unfinished character are held back."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._ids: list[int] = []  # kept only where tokens have no bytes of their own
        self._num_shown = 0

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes, often ""."""
        if self._skip_special and self._tokenizer.is_special(token_id):
            return ""
        content = self._tokenizer.token_bytes(token_id)
        if content is not None:
            return self._utf8.decode(content)
        self._ids.append(token_id)
        text = self._tokenizer.decode(self._ids)
        return "" if text.endswith("\ufffd") else self._show(text)

    def flush(self) -> str:
        """What is still held back; an incomplete character becomes U+FFFD."""
        if self._ids:
            return self._show(self._tokenizer.decode(self._ids))
        return self._utf8.decode(b"", final=True)

    def _show(self, text: str) -> str:
        new, self._num_shown = text[self._num_shown :], len(text)
        return new
