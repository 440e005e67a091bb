"""Texts that cannot become ids: half characters, and those a tokenizer would drop in silence.

A BPE without bytes and without `unk` leaves out the characters it has no token for.
"""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models

from mule.errors import UserError


class Coverage:
    """Refuses texts of which a character would vanish; `needed` tells if that can happen."""

    def __init__(self, backend: Tokenizer) -> None:
        model = backend.model
        self._backend = backend
        self._known: set[str] = set()
        self.needed = (
            isinstance(model, models.BPE)
            and not isinstance(backend.decoder, decoders.ByteLevel)
            and not model.byte_fallback
            and model.unk_token is None
        )

    def check(self, text: str) -> None:
        """Raises UserError for the first character of `text`, no space, that has no token."""
        new = set(text) - self._known
        dropped = {character for character in new if not self._has_token(character)}
        if dropped:
            position, found = next((n, c) for n, c in enumerate(text) if c in dropped)
            raise UserError(
                f"this tokenizer has no token for {found!r} (U+{ord(found):04X}) at position "
                f"{position}, and would drop it without a word",
                "use a byte-level tokenizer, or remove the character from the text",
            )
        self._known |= new

    def _has_token(self, character: str) -> bool:
        """Some mark the beginning or the end of a word, so it is tried three times in a row."""
        if character.isspace():
            return True
        ids = self._backend.encode(character * 3, add_special_tokens=False).ids
        return bool(self._backend.decode(ids, skip_special_tokens=False).strip())


def not_unicode(*texts: str) -> UserError:
    """What to raise where a text cannot be written as UTF-8."""
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
