"""How long the rows are in tokens, what of them is learned, and whether they keep the contract."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mule.data.chat import Example
from mule.data.check.findings import Finding, Problem, are, counted, share_text
from mule.data.check.row import CheckRow
from mule.data.check.unreadable import Kinds
from mule.data.contract import check_template, render_checked
from mule.data.sources.items import Conversation, Document
from mule.errors import DataError, MuleError
from mule.tokenizer import Tokenizer

_NEAR_EMPTY_TOKENS = 4  # a document of so few tokens teaches nothing
_LITTLE_TRAINED = 0.05  # of the tokens: most of the time would be spent on reading prompts
_UNEVEN = 20  # p99 over p50: a few rows decide the memory and the time of a step
_FIRST_BIN = 16  # tokens; every following bin is twice as wide


class Lengths:
    """Tokens of every row, by its chat template where it has messages."""

    def __init__(self, tokenizer: Tokenizer, max_seq_length: int, too_long: str) -> None:
        self._tokenizer, self._limit, self._policy = tokenizer, max_seq_length, too_long
        self.tokens = array("q")  # of each row of the training files
        self.num_trained = 0
        self._longest = 0  # tokens of the longest example
        self._is_open = False  # the last document goes on in the next row
        self._kinds: set[str] = set()
        self._too_long, self._near_empty = Finding(), Finding()
        self._broken = Kinds("contract")
        self._template: MuleError | None = None
        self._template_checked = False

    def add(self, rows: Sequence[CheckRow]) -> None:
        """A batch of rows of one file, so that encoding runs in parallel."""
        chats = [row for row in rows if isinstance(row.item, Conversation)]
        others = [row for row in rows if not isinstance(row.item, Conversation)]
        if others:
            self._add_texts(others)
        if chats and self._template_works():
            for row, examples in self._rendered(chats):
                self._add_chat(row, examples)
        elif chats:
            self._add_texts(chats)

    def _add_chat(self, row: CheckRow, examples: Sequence[Example]) -> None:
        if row.part != "train":
            return
        self._kinds.add(row.kind)
        self.tokens.append(sum(len(example.ids) for example in examples))
        self.num_trained += sum(int(example.trained.sum()) for example in examples)
        # The last token of an example is a target only: it needs no place in the row.
        longest = max(len(example.ids) for example in examples) - 1
        self._longest = max(self._longest, longest)
        if longest > self._limit:
            self._too_long.add(row.place(f"{longest:,} tokens"))

    def _add_texts(self, rows: Sequence[CheckRow]) -> None:
        rows = [row for row in rows if row.part == "train"]
        encoded = self._tokenizer.encode_batch([row.content for row in rows])
        for row, ids in zip(rows, encoded, strict=True):
            self._kinds.add(row.kind)
            if self._is_open and not row.starts:
                self.tokens[-1] += len(ids)
            else:
                self.tokens.append(len(ids))
            if isinstance(row.item, Document):
                self.num_trained += len(ids)
                self._is_open = not row.item.ends
                if row.starts and row.item.ends and len(ids) < _NEAR_EMPTY_TOKENS:
                    self._near_empty.add(row.place(row.item.text))

    def _rendered(self, rows: list[CheckRow]) -> Iterator[tuple[CheckRow, list[Example]]]:
        """Each row with its examples; a row that breaks the contract is counted instead."""
        chats = [row.item for row in rows if isinstance(row.item, Conversation)]
        try:
            yield from zip(rows, render_checked(self._tokenizer, chats), strict=True)
            return
        except MuleError:
            pass  # found again below, one by one
        for row, chat in zip(rows, chats, strict=True):
            try:
                examples = render_checked(self._tokenizer, [chat])[0]
            except DataError as error:
                self._broken.add(error)
            except MuleError as error:  # the template refuses these messages
                self._broken.add(DataError(chat.file, chat.line, error.message, error.hint))
            else:
                yield row, examples

    def _template_works(self) -> bool:
        if not self._template_checked:
            self._template_checked = True
            try:
                check_template(self._tokenizer)
            except MuleError as error:
                self._template = error
        return self._template is None

    @property
    def num_tokens(self) -> int:
        return sum(self.tokens)

    @property
    def trained_share(self) -> float | None:
        """Trained tokens over all tokens; None where nothing can be trained."""
        trainable = self.tokens and self._template is None and self._kinds != {"preference"}
        return self.num_trained / max(1, self.num_tokens) if trainable else None

    def figures(self) -> dict[str, Any]:
        if not self.tokens:
            return {"total": 0, "percentiles": {}, "histogram": [], "too_long": 0}
        lengths = np.frombuffer(self.tokens, dtype=np.int64)
        percentiles = np.percentile(lengths, (50, 90, 99), method="higher").tolist()
        return {
            "total": self.num_tokens,
            "trained": self.num_trained,
            "max_seq_length": self._limit,
            "too_long": self._too_long.count,
            "percentiles": {
                **dict(zip(("p50", "p90", "p99"), percentiles, strict=True)),
                "max": int(lengths.max()),
            },
            "histogram": _histogram(lengths),
        }

    def problems(self) -> Iterator[Problem]:
        if self._template is not None:
            yield Problem("error", "template", self._template.message, self._template.hint)
        yield from self._broken.problems()
        yield from self._about_length()
        if self._near_empty.count:
            yield Problem(
                "warning",
                "near-empty",
                f"{counted(self._near_empty.count, 'document')} of fewer than "
                f"{_NEAR_EMPTY_TOKENS} tokens",
                "remove them: there is nothing in them to learn",
                self._near_empty,
            )
        share = self.trained_share
        if share is not None and share < _LITTLE_TRAINED:
            yield Problem(
                "warning",
                "little-trained",
                f"only {share:.1%} of the tokens are learned, the rest is read as a prompt",
                "shorten system prompts and contexts, or make the answers say more",
            )

    def _about_length(self) -> Iterator[Problem]:
        count, total = self._too_long.count, len(self.tokens)
        if count:
            every = count == total
            done = {"error": "refused", "truncate": "cut off"}.get(self._policy, "left out")
            which = "every row is" if every else f"{counted(count, 'row')} "
            which += "" if every else f"({share_text(count, total)}) {are(count)}"
            yield Problem(
                "error" if every or self._policy == "error" else "warning",
                "too-long",
                f"{which} longer than data.max_seq_length={self._limit:,} and would be {done}",
                f"raise data.max_seq_length (the longest needs {self._longest:,}), "
                "or split or shorten them",
                self._too_long,
            )
        if self._kinds == {"document"} and 1 < self.num_tokens <= self._limit:
            yield Problem(
                "error",
                "too-little-text",
                f"{self.num_tokens:,} tokens in all, fewer than one row of {self._limit:,}",
                f"add text, or set data.max_seq_length to at most {self.num_tokens - 1:,}",
            )
        if self._kinds == {"conversation"} and total:
            p50, p99 = np.percentile(np.frombuffer(self.tokens, dtype=np.int64), (50, 99))
            if p99 > _UNEVEN * p50:
                yield Problem(
                    "note",
                    "uneven",
                    f"very different lengths: half the rows have at most {p50:,.0f} tokens, "
                    f"one in a hundred more than {p99:,.0f}",
                    "keep data.packing on, so that short rows cost no room",
                )


def _histogram(lengths: np.ndarray) -> list[dict[str, int]]:
    """Rows by length: `to` is included, every bin twice as wide as the one before."""
    tops = [_FIRST_BIN]
    while tops[-1] < lengths.max():
        tops.append(tops[-1] * 2)
    places = np.searchsorted(np.array(tops), lengths, side="left")
    counts = np.bincount(places, minlength=len(tops)).tolist()
    first = next(place for place, count in enumerate(counts) if count)
    return [
        {"from": tops[place - 1] + 1 if place else 0, "to": tops[place], "rows": counts[place]}
        for place in range(first, len(tops))
    ]
