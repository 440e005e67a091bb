"""The check itself: one pass over every row, each looked at by every collector."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from mule import progress
from mule.data.check import languages, purpose
from mule.data.check.findings import MAX_PLACES, Finding, Place, Problem, by_severity
from mule.data.check.flaws import Flaws
from mule.data.check.languages import Languages
from mule.data.check.lengths import Lengths
from mule.data.check.personal import Personal
from mule.data.check.row import CheckRow, Part
from mule.data.check.similar import Similar
from mule.data.check.talk import Talk
from mule.data.check.unreadable import Kinds
from mule.data.sources import Row, detect, scan
from mule.data.sources.detect import Detector
from mule.data.sources.items import Document, Item, Notice
from mule.data.sources.options import ReadOptions
from mule.data.sources.reading import is_text
from mule.data.sources.rows import scan_rows
from mule.errors import DataError
from mule.tokenizer import Tokenizer

_BATCH_ROWS = 256
_BATCH_CHARS = 1_000_000  # of one batch: books are long
_ROWS_TO_DETECT = 100  # looked at to name the format, if the first ones are broken
_MAX_NOTICES = 20  # of what the readers left out
_WHOLE_FILES = ("text", "wikitext")  # formats whose line breaks are those of the file
_SEVERAL_FORMATS = "rows of several formats"  # what the reader says of them, last

Parts = Mapping[Part, Sequence[Path]]  # the training files first


@dataclass(frozen=True)
class Settings:
    """How the rows are read, what becomes of long ones, and how much is told."""

    read: ReadOptions
    max_seq_length: int
    too_long: str
    places: int = MAX_PLACES  # listed of each problem


class Survey:
    """Everything known of the rows seen so far."""

    def __init__(self, parts: Parts, tokenizer: Tokenizer, settings: Settings) -> None:
        self._parts, self._settings = parts, settings
        self._lengths = Lengths(tokenizer, settings.max_seq_length, settings.too_long)
        self._talk, self._flaws, self._personal = Talk(), Flaws(), Personal()
        self._similar = Similar(holds_out=len(parts) > 1)
        self._languages = Languages()
        self._unreadable = Kinds("unreadable")
        self._notices: list[Notice] = []
        self._files: list[dict[str, Any]] = []
        self._first_of: dict[str, Place] = {}  # kind -> its first row

    def read(self) -> None:
        """Look at every row of every file."""
        total = sum(file.stat().st_size for part in self._parts.values() for file in part)
        with progress.task("Checking", total=total, unit="bytes") as bar:
            for part, paths in self._parts.items():
                for file in paths:
                    self._read_file(file, part, bar)

    def finish(self) -> dict[str, Any]:
        """The result of the check, as `mule data check --json` prints it."""
        self._similar.finish()
        num_rows = sum(f["rows"] for f in self._files if f["part"] == "train")
        kind = self._kind()
        tokens, spoken = self._lengths.figures(), self._languages.figures()
        duplicates, leaks = self._similar.figures()
        talk = self._talk.figures()
        problems = by_severity(list(self._problems(kind, num_rows, spoken)))
        formats = {f["format"]: 0 for f in self._files if f["part"] == "train"}
        for file in (f for f in self._files if f["part"] == "train"):
            formats[file["format"]] += file["rows"]
        return {
            "ok": all(problem.severity != "error" for problem in problems),
            "rows": num_rows,
            "format": next(iter(formats)) if len(formats) == 1 else "mixed",
            "trained_token_share": self._lengths.trained_share,
            "problems": [problem.as_dict(self._settings.places) for problem in problems],
            "kind": kind,
            "files": self._files,
            "formats": formats,
            "unreadable": self._unreadable.count,
            "roles": talk.pop("roles"),
            "turns": talk.pop("turns"),
            "talk": talk,
            "tokens": tokens,
            "languages": spoken,
            "duplicates": duplicates,
            "leaks": leaks,
            "size": purpose.size_of(kind, num_rows, tokens["total"]),
        }

    def _read_file(self, file: Path, part: Part, bar: progress.Task) -> None:
        name, is_new = _format_of(file, self._settings.read), True
        facts = {"file": str(file), "part": part, "format": name, "rows": 0}
        self._files.append(facts)
        batch: list[CheckRow] = []
        num_chars = 0
        for item in self._items(file, facts, bar):
            row = CheckRow(item, part, physical=name in _WHOLE_FILES, starts=is_new)
            is_new = item.ends if isinstance(item, Document) else True
            facts["rows"] += row.starts
            self._first_of.setdefault(row.kind, row.place())
            self._look_at(row)
            batch.append(row)
            num_chars += len(row.content)
            if len(batch) >= _BATCH_ROWS or num_chars >= _BATCH_CHARS:
                self._lengths.add(batch)
                batch, num_chars = [], 0
        self._lengths.add(batch)

    def _look_at(self, row: CheckRow) -> None:
        self._flaws.add(row)
        self._personal.add(row)
        self._similar.add(row)
        self._languages.add(row)
        if row.part == "train":
            self._talk.add(row)

    def _items(self, file: Path, facts: dict[str, Any], bar: progress.Task) -> Iterator[Item]:
        """The rows that can be read; the others, and what was left out, are noted."""
        try:
            for found in scan(file, self._settings.read, bar.advance):
                if isinstance(found, DataError):
                    self._unreadable.add(found)
                    if found.what.startswith(_SEVERAL_FORMATS):
                        facts["format"] = "mixed"
                elif isinstance(found, Notice):
                    self._notices.append(found)
                else:
                    yield found
        except DataError as error:
            self._unreadable.add(error)

    def _kind(self) -> str:
        """document, conversation or preference; of several, the first."""
        return next(iter(self._first_of), "conversation")

    def _problems(self, kind: str, num_rows: int, spoken: dict[str, Any]) -> Iterator[Problem]:
        yield from self._unreadable.problems()
        yield from self._about_kinds()
        yield from self._lengths.problems()
        yield from self._similar.problems()
        yield from self._personal.problems()
        yield from self._flaws.problems()
        yield from self._talk.problems()
        yield from languages.problems(spoken)
        asked = self._settings.read.format != "auto"
        trained = (file for file in self._files if file["part"] == "train")
        formats = [(Path(file["file"]), file["format"], asked) for file in trained]
        yield from purpose.problems(kind, num_rows, formats)
        for notice in self._notices[:_MAX_NOTICES]:
            place = Place(notice.file, notice.line)
            yield Problem("note", "left-out", notice.message, "", Finding(1, [place]))

    def _about_kinds(self) -> Iterator[Problem]:
        kinds = list(self._first_of)
        if "preference" in kinds:
            yield Problem(
                "error",
                "preference",
                "preference pairs: Mule reads and checks them, but does not train on them",
                "keep the better answers as rows with prompt and completion, and train on those",
                Finding(1, [self._first_of["preference"]]),
            )
        if len(kinds) > 1:
            yield Problem(
                "error",
                "mixed-kinds",
                f"{kinds[0]}s and {kinds[1]}s in one set",
                "train on them in two runs, documents first",
                Finding(1, [self._first_of[kinds[1]]]),
            )


def _format_of(file: Path, options: ReadOptions) -> str:
    """By the first row that has a format; the reader tells of the others."""
    with contextlib.suppress(DataError):
        if is_text(file, options):
            return detect(file, options)
        detector = Detector(options)
        for row in islice(scan_rows(file), _ROWS_TO_DETECT):
            if isinstance(row, Row):
                with contextlib.suppress(DataError):
                    return detector.format_of(detector.mapped(row)).name
    return "unknown"
