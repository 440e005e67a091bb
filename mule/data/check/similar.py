"""Rows that are the same or nearly: duplicates, contradictions, and leaks into the validation."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from hashlib import blake2b
from typing import Any

import numpy as np

from mule.data.check.findings import Finding, Place, Problem, are, counted, share_text
from mule.data.check.row import CheckRow, Part
from mule.data.clean.near import near_duplicates
from mule.data.sources.items import Document

_NEAR = 0.8  # Jaccard index of shingles from which two texts count as the same
_NEAR_LONG = 0.5  # and two long ones: a template makes short texts alike, but no articles
_LONG_CHARS = 2000  # on average
MAX_NEAR_ROWS = 200_000  # searched for near-duplicates: about a minute of work
_TRAIN_SHARE = 0.75  # of them for the training files, where held-out rows follow
_MAX_NEAR_CHARS = 200_000_000  # and a bound of the memory that holds their texts
_CHARS_OF_A_TEXT = 20_000  # the beginning of a book says whether it is the same book
_MANY_DUPLICATES = 0.05  # exact and near: some rows are learned twice
_MOSTLY_DUPLICATES = 0.5  # the data is half of what it seems
_MANY_CONFLICTS = 0.01  # rows whose prompt has another answer elsewhere
_WORTHLESS_LEAK = 0.01  # exact: one held-out row in a hundred is learned by heart
_WORTHLESS_NEAR_LEAK = 0.1  # near: what a template repeats in honest data is below this
_PARTS: tuple[Part, ...] = ("train", "valid", "test")


class Similar:
    """Digests of all rows, and the texts of as many as the near-duplicate search takes."""

    def __init__(self, *, holds_out: bool) -> None:
        """`holds_out`: rows of other parts follow the training rows."""
        self._train_share = _TRAIN_SHARE if holds_out else 1.0
        self._files: dict[str, int] = {}
        self._file, self._line, self._part = array("L"), array("q"), array("b")
        self._content, self._prompt = array("Q"), array("Q")
        self._texts: list[str] = []
        self._text_rows = array("L")
        self._num_chars = 0
        self._document: Any = None  # the digest of a document that goes on

    def add(self, row: CheckRow) -> None:
        if isinstance(row.item, Document) and not row.starts:
            self._document.update(_plain(row.item.text))
            self._content[-1] = _number(self._document)
            return
        self._document = blake2b(_plain(row.content), digest_size=8)
        self._content.append(_number(self._document))
        self._prompt.append(
            _number(blake2b(_plain(row.prompt), digest_size=8)) if row.prompt else 0
        )
        self._file.append(self._files.setdefault(row.item.file, len(self._files)))
        self._line.append(row.item.line)
        self._part.append(_PARTS.index(row.part))
        self._keep_text(row)

    def _keep_text(self, row: CheckRow) -> None:
        share = self._train_share if row.part == "train" else 1.0
        is_full = len(self._texts) >= share * MAX_NEAR_ROWS
        if is_full or self._num_chars >= share * _MAX_NEAR_CHARS:
            return
        if isinstance(row.item, Document):
            text = row.item.text[:_CHARS_OF_A_TEXT]
        else:  # a system prompt they share makes rows no duplicates
            text = "\n".join(m.content for m in row.messages if m.role != "system")
            text = text[:_CHARS_OF_A_TEXT]
        self._texts.append(text)
        self._text_rows.append(len(self._content) - 1)
        self._num_chars += len(text)

    def finish(self) -> None:
        """Search; to be called once, after the last row."""
        parts, contents, prompts = map(np.array, (self._part, self._content, self._prompt))
        trained = np.flatnonzero(parts == 0)
        pairs = _Pairs(parts, contents)
        for rows in _groups(contents):
            pairs.add_equal(rows)
        asked = trained[prompts[trained] != 0]
        for rows in (asked[group] for group in _groups(prompts[asked])):
            pairs.add_contradicting(rows)
        is_long = self._num_chars >= _LONG_CHARS * len(self._texts)
        threshold = _NEAR_LONG if is_long and not asked.size else _NEAR
        for group in near_duplicates(self._texts, threshold=threshold) if self._texts else []:
            pairs.add_near(np.array([self._text_rows[number] for number in group]))
        self._exact = self._finding(pairs.exact, "same as")
        self._near = self._finding(pairs.near, "nearly")
        self._exact_leaks = self._finding(pairs.exact_leaks, "same as")
        self._near_leaks = self._finding(pairs.near_leaks, "nearly")
        self._conflicts = self._finding(pairs.conflicts, "same prompt as")

    def _finding(self, pairs: list[tuple[int, int]], relation: str) -> Finding:
        """Each first row of a pair as a place, in the order of the files."""
        finding = Finding()
        names = list(self._files)
        for row, other in sorted(pairs):
            same_file = self._file[row] == self._file[other]
            where = "line " if same_file else f"{names[self._file[other]]}:"
            shown = f"{relation} {where}{self._line[other]}"
            finding.add(Place(names[self._file[row]], self._line[row], shown))
        return finding

    def figures(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Duplicates within the training part, and leaks of it into the others."""
        num_train, num_held = self._counts()
        duplicates = {
            "exact": self._exact.count,
            "near": self._near.count,
            "share": (self._exact.count + self._near.count) / max(1, num_train),
            "conflicts": self._conflicts.count,
            "searched": len(self._texts),
        }
        leaks = {
            "rows": num_held,
            "exact": self._exact_leaks.count,
            "near": self._near_leaks.count,
            "share": (self._exact_leaks.count + self._near_leaks.count) / max(1, num_held),
        }
        return duplicates, leaks

    def _counts(self) -> tuple[int, int]:
        num_train = self._part.count(0)
        return num_train, len(self._part) - num_train

    def problems(self) -> Iterator[Problem]:
        yield from self._about_leaks()
        yield from self._about_duplicates()
        count, total = self._conflicts.count, self._part.count(0)
        if count:
            yield Problem(
                "warning" if count > _MANY_CONFLICTS * total else "note",
                "conflict",
                f"{counted(count, 'row')} ({share_text(count, total)}) whose prompt has "
                "another answer elsewhere",
                "keep the better answer, unless several are meant: the model learns their mixture",
                self._conflicts,
            )
        if len(self._texts) < len(self._content):
            yield Problem(
                "note",
                "sampled",
                f"near-duplicates were looked for among {len(self._texts):,} of "
                f"{len(self._content):,} rows, the first of each part; exact ones among all",
                "mule data mix looks at every row",
            )

    def _about_leaks(self) -> Iterator[Problem]:
        _, num_held = self._counts()
        hint = (
            "the score on such rows shows memory, not skill: "
            "mule data mix PATH --out FOLDER takes them out of the training rows"
        )
        for finding, code, how, limit in (
            (self._exact_leaks, "leak", "also in the training files", _WORTHLESS_LEAK),
            (
                self._near_leaks,
                "near-leak",
                "nearly in the training files",
                _WORTHLESS_NEAR_LEAK,
            ),
        ):
            if finding.count:
                share, verb = share_text(finding.count, num_held), are(finding.count)
                yield Problem(
                    "error" if finding.count > limit * num_held else "warning",
                    code,
                    f"{finding.count:,} of {num_held:,} held-out rows ({share}) {verb} {how}",
                    hint,
                    finding,
                )

    def _about_duplicates(self) -> Iterator[Problem]:
        num_train, _ = self._counts()
        both = self._exact.count + self._near.count
        worse = both > _MANY_DUPLICATES * num_train
        for finding, code, how in (
            (self._exact, "duplicate", "the same as an earlier one"),
            (self._near, "near-duplicate", "nearly the same as an earlier one"),
        ):
            if finding.count:
                mostly = finding.count > _MOSTLY_DUPLICATES * num_train
                rows = f"{counted(finding.count, 'row')} ({share_text(finding.count, num_train)})"
                yield Problem(
                    "error" if mostly and code == "duplicate" else "warning" if worse else "note",
                    code,
                    f"{rows} {are(finding.count)} {how}",
                    "mule data mix PATH --out FOLDER leaves them out",
                    finding,
                )


class _Pairs:
    """(row, the row it is like) of each kind; `parts` and `contents` are those of all rows."""

    def __init__(self, parts: np.ndarray, contents: np.ndarray) -> None:
        self._parts, self._contents = parts, contents
        self.exact: list[tuple[int, int]] = []
        self.near: list[tuple[int, int]] = []
        self.exact_leaks: list[tuple[int, int]] = []
        self.near_leaks: list[tuple[int, int]] = []
        self.conflicts: list[tuple[int, int]] = []

    def add_equal(self, rows: np.ndarray) -> None:
        """Rows of the same content: repeats in training, and held-out rows that are trained on."""
        trained, held = self._divided(rows)
        if trained.size:
            first = int(trained[0])
            self.exact += [(row, first) for row in trained[1:].tolist()]
            self.exact_leaks += [(row, first) for row in held.tolist()]

    def add_near(self, rows: np.ndarray) -> None:
        """Rows of nearly the same content, leaving out what `add_equal` has told."""
        trained, held = self._divided(rows)
        if trained.size:
            _, places = np.unique(self._contents[trained], return_index=True)
            first, *others = sorted(trained[places].tolist())
            self.near += [(row, first) for row in others]
            new = ~np.isin(self._contents[held], self._contents[trained])
            self.near_leaks += [(row, first) for row in held[new].tolist()]

    def add_contradicting(self, rows: np.ndarray) -> None:
        """Training rows of the same prompt: those that answer otherwise than the first."""
        first = int(rows[0])
        different = rows[self._contents[rows] != self._contents[first]]
        self.conflicts += [(row, first) for row in different.tolist()]

    def _divided(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(training rows, held-out rows)."""
        return rows[self._parts[rows] == 0], rows[self._parts[rows] > 0]


def _plain(text: str) -> bytes:
    """The text as it counts for equality: any white space is one blank."""
    return " ".join(text.split()).encode("utf-8", "surrogatepass")


def _number(digest: Any) -> int:
    return int.from_bytes(digest.digest(), "little")


def _groups(keys: np.ndarray) -> Iterator[np.ndarray]:
    """The indices of each key that occurs more than once, ascending."""
    order = np.argsort(keys, kind="stable")
    borders = np.flatnonzero(np.diff(keys[order])) + 1
    groups = (group for group in np.split(order, borders) if len(group) > 1)
    yield from sorted(groups, key=lambda group: int(group[0]))
