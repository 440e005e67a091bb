"""Rows of data for a page: any part of a file, as the model reads it, with what cannot be read."""

from __future__ import annotations

import shlex
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mule.commands.data_inputs import (
    Inputs,
    Words,
    load_tokenizer,
    read_options,
    recipe_of,
    sort_words,
    throw_away_tokenizer,
)
from mule.commands.data_preview import examples_of, text_of
from mule.errors import DataError, MuleError, UserError
from mule.run import RUNS

if TYPE_CHECKING:
    from mule.config.schema import Recipe
    from mule.data.check import Part
    from mule.data.sources import Item
    from mule.data.sources.options import ReadOptions
    from mule.tokenizer import Tokenizer

_READ_CHARS = 200_000  # a longer row would take seconds to tokenize
_PIECE_TOKENS = 600  # shown of neighbouring tokens that are alike; of more, both ends
_HEAD_TOKENS, _TAIL_TOKENS = 400, 100
_MAX_PIECES = 400  # of an example
_SHOWN_CHARS = 2_000  # of what is no example: raw lines, texts of a pair
_SKIP_BYTES = 1 << 20


@dataclass(frozen=True)
class Located:
    """The files that words name, by what they are for, and the recipe; nothing is opened yet."""

    given: Words
    recipe: Recipe
    parts: Mapping[Part, Sequence[Path]]

    @property
    def files(self) -> list[tuple[Part, Path]]:
        return [(part, file) for part, files in self.parts.items() for file in files]


def locate(words: list[str]) -> Located:
    """Find the files; UserError for data of the hub, since a page fetches nothing."""
    from mule.commands.data_check import parts_of
    from mule.data.prepare import valid_files
    from mule.data.sources import expand
    from mule.data.sources.paths import is_hub_id

    given = sort_words(words)
    recipe = recipe_of(given)
    data = recipe.data
    for path in (*data.train, *(data.valid or ())):
        if is_hub_id(path):
            raise UserError(
                f"{path} is data of the hub, and a page fetches nothing",
                f"in a terminal: mule data preview {shlex.join(words)}",
            )
    valid = expand(data.valid) if data.valid else valid_files(data.train)
    return Located(given, recipe, parts_of(expand(data.train), valid, data.train))


def open_rows(located: Located, tokenizer: str | None = None, runs: Path = RUNS) -> Inputs:
    """The data and the tokenizer, with neither torch nor network.

    Of a model of the hub the copy in the cache is used; a tokenizer that is not here is replaced by
    a throw-away one, and `tokenizer_origin` says so.
    """
    recipe, parts = located.recipe, located.parts
    paths, valid = list(parts["train"]), list(parts.get("valid", ()))
    found, origin = _tokenizer(located.given, recipe, tokenizer, paths, runs)
    return Inputs(paths, valid, recipe.data, recipe, found, origin)


def _tokenizer(
    given: Words, recipe: Recipe, name: str | None, paths: list[Path], runs: Path
) -> tuple[Tokenizer, str]:
    wanted = name or recipe.tokenizer.path or recipe.model.path
    if wanted is not None and (here := _tokenizer_here(wanted, runs)) is not None:
        return load_tokenizer(here, runs), f"the tokenizer of {wanted}"
    found, origin = throw_away_tokenizer(paths, read_options(recipe.data))
    if wanted is not None:
        return found, f"{origin} ({wanted} is not on this machine)"
    if given.recipe_file and recipe.tokenizer.vocab_size:
        return found, f"{origin}; the run will train one of {recipe.tokenizer.vocab_size:,} tokens"
    return found, origin


def _tokenizer_here(name: str, runs: Path) -> str | None:
    """What to load: a path or a run as it is named, a hub model's copy in the cache, or None."""
    from mule.models.hub import hub_repo

    if Path(name).exists() or (runs / name).exists():
        return name
    repo = hub_repo(name)
    cached = repo.cached() if repo is not None else None
    return str(cached) if cached is not None and (cached / "tokenizer.json").is_file() else None


# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class Row:
    """A row of a file, counted from 0; `until` is the line of the one after it."""

    number: int
    found: Item | DataError
    until: int | None
    is_last: bool

    @property
    def line(self) -> int | None:
        return self.found.line

    def holds(self, line: int, *, is_text: bool) -> bool:
        """Whether a place is in it; in a text file a row has many lines."""
        if self.line is None or self.line == line:
            return self.line == line
        return is_text and self.line < line and (self.until is None or line < self.until)


class RowReader:
    """The rows of one file, kept open: going on costs little, going back begins anew."""

    def __init__(self, file: Path, options: ReadOptions) -> None:
        from mule.data.sources.reading import is_text

        self.file, self._options = file, options
        self.is_text = is_text(file, options)
        self._lock = threading.Lock()
        self._begin()

    def take(self, start: int, n: int) -> list[Row]:
        """The rows `start` to `start + n`, fewer at the end of the file."""
        with self._lock:
            if start < self._next or self._stamp != _stamp(self.file):
                self._begin()
            kept: list[Row] = []
            while len(kept) < n and (row := self._read()) is not None:
                if row.number >= start:
                    kept.append(row)
            return kept

    def at_lines(self, lines: Sequence[int]) -> list[Row]:
        """The rows in which these lines are."""
        with self._lock:
            self._begin()
            left, kept = set(lines), []
            while left and (row := self._read()) is not None:
                own = {line for line in left if row.holds(line, is_text=self.is_text)}
                left -= own
                if own:
                    kept.append(row)
            return kept

    def number_of(self, line: int) -> int:
        """The row in which a line is, or the one before it. UserError where there is none."""
        with self._lock:
            self._begin()
            before: Row | None = None
            while (row := self._read()) is not None:
                if row.holds(line, is_text=self.is_text):
                    return row.number
                if row.line is not None and row.line <= line:
                    before = row
            if before is None:
                raise UserError(f"{self.file} has no row at line {line:,}", "give another line")
            return before.number

    def _begin(self) -> None:
        self._stamp = _stamp(self.file)
        self._rows = _rows(_starts(self.file, self._options))
        self._next = 0

    def _read(self) -> Row | None:
        row = next(self._rows, None)
        self._next += row is not None
        return row


def _stamp(file: Path) -> tuple[int, int]:
    try:
        about = file.stat()
    except OSError as error:
        raise DataError(file, None, f"it cannot be read ({error.strerror})", "check it") from None
    return about.st_size, about.st_mtime_ns


def _rows(found: Iterable[Item | DataError]) -> Iterator[Row]:
    for number, (one, following) in enumerate(pairwise(chain(found, [None]))):
        if one is not None:
            until = None if following is None else following.line
            yield Row(number, one, until, following is None)


def _starts(file: Path, options: ReadOptions) -> Iterator[Item | DataError]:
    """Items and problems; of a document in several parts the first only."""
    from mule.data.sources import Document, Notice, scan

    goes_on = False
    for found in scan(file, options):
        if isinstance(found, Notice):
            continue  # of what is left out: the check tells it
        if isinstance(found, Document):
            goes_on, is_part = not found.ends, goes_on
            if is_part:
                continue
        yield found


# ---------------------------------------------------------------- showing


def show(inputs: Inputs, rows: Sequence[Row]) -> dict[str, Any]:
    """The rows as `mule data preview` shows them; of what is very long, the ends.

    A row's `kind` is example, unreadable (no row), refused (training would stop at it) or long.
    """
    return {
        "tokenizer": inputs.tokenizer_origin,
        "max_seq_length": inputs.data.max_seq_length,
        "too_long": inputs.data.too_long,
        "rows": [_shown(inputs, row) for row in rows],
    }


def _shown(inputs: Inputs, row: Row) -> dict[str, Any]:
    found = row.found
    told = {"number": row.number, "line": row.line, "until": row.until, "is_last": row.is_last}
    if isinstance(found, DataError):
        return told | _refusal("unreadable", found, found.file, found.line)
    if (num_chars := _num_chars(found)) > _READ_CHARS:
        message = f"{num_chars:,} characters: too many to show them as tokens here"
        return told | {
            "kind": "long",
            "message": message,
            "hint": "the check counts its tokens; data.max_seq_length decides what becomes of it",
            "raw": raw_line(Path(found.file), found.line),
        }
    try:
        examples = list(examples_of(inputs.tokenizer, found, inputs.data.max_seq_length))
    except MuleError as error:
        return told | _refusal("refused", error, found.file, found.line)
    return told | {
        "kind": "example",
        "examples": [_short(inputs.tokenizer, example) for example in examples],
    }


def _refusal(kind: str, error: MuleError, file: str, line: int | None) -> dict[str, Any]:
    message = error.what if isinstance(error, DataError) else error.message
    raw = raw_line(Path(file), line)
    return {"kind": kind, "message": message, "hint": error.hint, "raw": raw}


def _num_chars(item: Item) -> int:
    """Of a row that is tokenized whole; a document's beginning is enough."""
    from mule.data.check.row import CheckRow

    return sum(len(message.content) for message in CheckRow(item, "train").messages)


def _short(tokenizer: Tokenizer, example: dict[str, Any]) -> dict[str, Any]:
    if example["kind"] == "preference":
        parts = ("prompt", "chosen", "rejected")
        return example | {part: [_cut(message) for message in example[part]] for part in parts}
    kept = example["pieces"][:_MAX_PIECES]
    return example | {"pieces": [end for piece in kept for end in _ends(tokenizer, piece)]}


def _cut(message: dict[str, Any]) -> dict[str, Any]:
    text, left_out = message["text"], len(message["text"]) - _SHOWN_CHARS
    if left_out <= 0:
        return message
    return message | {"text": f"{text[:_SHOWN_CHARS]}\n… {left_out:,} characters are not shown …"}


def _ends(tokenizer: Tokenizer, piece: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The piece, or of a long one its head and its tail."""
    ids = piece["ids"]
    if len(ids) <= _PIECE_TOKENS:
        yield piece
        return
    head, tail = ids[:_HEAD_TOKENS], ids[-_TAIL_TOKENS:]
    yield piece | {"ids": head, "text": text_of(tokenizer, [], head)}
    yield piece | {
        "start": piece["start"] + len(ids) - len(tail),
        "ids": tail,
        "text": text_of(tokenizer, ids[: -len(tail)][-1:], tail),
    }


def raw_line(file: Path, line: int | None) -> str:
    """The beginning of a line as it stands in the file; "" where a file has no lines."""
    from mule.data.sources.files import data_suffix, open_unpacked

    if line is None or data_suffix(file) == ".parquet":
        return ""
    try:
        with open_unpacked(file) as stream:
            left = line - 1
            while left and (part := stream.readline(_SKIP_BYTES)):
                left -= part.endswith(b"\n")
            found = stream.readline(4 * _SHOWN_CHARS).decode(errors="replace")
    except DataError:
        return ""
    cut = " …" if len(found) > _SHOWN_CHARS else ""
    return found[:_SHOWN_CHARS].rstrip("\r\n") + cut
