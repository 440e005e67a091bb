"""Answers that follow a JSON schema, by llguidance (extra `schema`): which token may come next.

Source: llguidance 1.9, docs/json_schema.md. Properties come in the order of the schema.
"""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Callable, Sequence, Set
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mule.errors import ModelError, UserError

if TYPE_CHECKING:
    from mule.tokenizer import Tokenizer

MAX_SCHEMA_BYTES, MAX_SCHEMA_DEPTH = 65_536, 48
# A space, or a new line and an indent: without a limit a weak model writes nothing but spaces.
_OPTIONS = {"whitespace_pattern": r" |\n {0,32}", "lenient": False}
_LIMITS = {"max_grammar_size": 50_000, "initial_lexer_fuel": 1_000_000, "verbose_errors": False}
_HINT = "see docs/chat.md for what a schema may hold"


class SchemaCompiler:
    """Makes constraints for one vocabulary.

    `pieces`: the bytes of each token; of `special_ids` they are never read. `stop_ids` may end an
    answer. `encode` gives the usual ids of a text that the schema leaves no choice in.
    """

    def __init__(
        self,
        pieces: Sequence[bytes],
        *,
        special_ids: Set[int],
        stop_ids: Set[int],
        encode: Callable[[str], list[int]] | None = None,
    ) -> None:
        self._vocabulary = _Vocabulary(pieces, special_ids, stop_ids, encode)

    @classmethod
    def of_tokenizer(cls, tokenizer: Tokenizer) -> SchemaCompiler:
        """For the tokenizer of a model folder."""
        return cls(
            [_piece(tokenizer, token) for token in range(tokenizer.vocab_size)],
            special_ids=tokenizer.special_ids,
            stop_ids=frozenset(tokenizer.stop_ids),
            encode=tokenizer.encode,
        )

    def compile(self, schema: str) -> SchemaConstraint:
        """The constraint of a JSON schema, given as JSON text, for one answer.

        Raises UserError when it is no JSON, too large, or not to be compiled; and when llguidance
        is not installed.
        """
        library = _library()
        content = _checked(schema)
        try:
            grammar = library.LLMatcher.grammar_from_json_schema(content, overrides=_OPTIONS)
        except ValueError as error:
            raise _refused(error) from None
        limits = library.LLParserLimits(**_LIMITS)
        matcher = library.LLMatcher(self._vocabulary.inside, grammar, log_level=0, limits=limits)
        if not matcher.is_error():
            matcher.compute_bitmask()  # shows a schema that no answer can begin to follow
        if matcher.is_error():
            raise _refused(_reason(matcher))
        return SchemaConstraint(matcher, len(self._vocabulary.tokens))


class SchemaConstraint:
    """Where one answer stands in its schema; a Constraint of mule.generate.sampler."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size
        self.finished = False

    def allowed(self) -> npt.NDArray[np.bool_]:
        """Which tokens (vocab_size,) may come next; a stop token once the answer is complete."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._require_sound()
        return np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_)

    def accept(self, token: int) -> None:
        """Take an allowed token."""
        self._matcher.consume_token(token)
        self._require_sound()
        self.finished = self._matcher.is_stopped()

    def _require_sound(self) -> None:
        if self._matcher.is_error():
            raise ModelError(
                f"the JSON schema cannot be followed any further: {_reason(self._matcher)}",
                "simplify the schema",
            )


class _Vocabulary:
    """A vocabulary as llguidance asks for it (its TokenizerWrapper)."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(
        self,
        pieces: Sequence[bytes],
        special_ids: Set[int],
        stop_ids: Set[int],
        encode: Callable[[str], list[int]] | None,
    ) -> None:
        self.tokens, self._encode = list(pieces), encode
        self.special_token_ids = sorted(special_ids | stop_ids)
        self._stop_ids = sorted(stop_ids)
        self.eos_token_id = min(stop_ids, default=None)

    @cached_property
    def inside(self) -> Any:
        """The vocabulary as the library keeps it; a second's work for a large one."""
        return _library().LLTokenizer(self, eos_token=self._stop_ids or None)

    def __call__(self, text: str) -> list[int]:
        """Ids whose bytes are exactly those of `text`."""
        with contextlib.suppress(Exception):  # in the library it would end the process
            ids = self._encode(text) if self._encode is not None else []
            if b"".join(self.tokens[token] for token in ids) == text.encode():
                return ids
        return self.inside.greedy_tokenize(text)  # encoding added or changed a character


def _piece(tokenizer: Tokenizer, token: int) -> bytes:
    try:
        return tokenizer.piece(token)
    except UserError:
        return b""  # an id that stands for nothing


def _library() -> Any:
    try:
        return importlib.import_module("llguidance")
    except ImportError:
        raise UserError(
            "an answer by a JSON schema needs llguidance, which is not installed",
            'install the extra: pip install "mule[schema]"',
        ) from None


def _checked(schema: str) -> str:
    """The schema as plain JSON, once it is known to be of a sensible size."""
    num_bytes = len(schema.encode("utf-8", "surrogatepass"))
    if num_bytes > MAX_SCHEMA_BYTES:
        raise UserError(
            f"the JSON schema has {num_bytes:,} bytes; the most is {MAX_SCHEMA_BYTES:,}",
            "leave out descriptions and what the answer does not need",
        )
    try:
        content = json.loads(schema)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(
            f"the JSON schema is not JSON: {reason}", 'for example: {"type": "object"}'
        ) from None
    if not isinstance(content, dict):
        raise UserError(
            f"the JSON schema is {json.dumps(content)[:40]}, not an object",
            'for example: {"type": "object"}',
        )
    if (depth := _depth(content)) > MAX_SCHEMA_DEPTH:
        raise UserError(
            f"the JSON schema is nested {depth} deep; the most is {MAX_SCHEMA_DEPTH}",
            "name its parts in $defs and refer to them with $ref",
        )
    if "x-guidance" in content:
        raise UserError(
            "the JSON schema holds x-guidance, settings of the library that follows it",
            "leave x-guidance out",
        )
    return json.dumps(content)


def _depth(content: Any) -> int:
    """How many lists and objects enclose the innermost value."""
    depth, inside = 0, [content]
    while inside:
        depth += 1
        values = [v for c in inside for v in (c.values() if isinstance(c, dict) else c)]
        inside = [value for value in values if isinstance(value, dict | list)]
    return depth


def _reason(matcher: Any) -> str:
    """What the library says, without the mark of what it left out."""
    return matcher.get_error().replace("<non-verbose/>", "").strip()


def _refused(reason: object) -> UserError:
    return UserError(f"the JSON schema cannot be compiled: {reason}", _HINT)
