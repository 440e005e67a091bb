"""From data files to prepared rows on disk, made once for the same content and settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mule import fsio, progress
from mule.data.chat import Example, render_examples
from mule.data.contract import check_example
from mule.data.hold_out import split_held_out
from mule.data.pack import best_fit
from mule.data.shards import VERSION, Shards, ShardWriter, open_shards
from mule.data.sources import Conversation, Document, expand, read, split_files
from mule.errors import DataError, StorageError, UserError
from mule.tokenizer import Tokenizer

TooLong = Literal["drop", "error", "truncate"]
Paths = Sequence[str | Path]

_BATCH_CHARS = 2_000_000  # encoded at once: bounds the memory of a long text
_BATCH_CONVERSATIONS = 512


@dataclass(frozen=True)
class _Settings:
    """What decides the prepared rows besides the data and the tokenizer."""

    format: str
    max_seq_length: int
    packing: bool
    document_mask: bool
    too_long: TooLong


@dataclass(frozen=True)
class _Job:
    """One prepared folder to be: `sources` are its files with their sums."""

    tokenizer: Tokenizer
    settings: _Settings
    sources: list[dict[str, Any]]
    out_dir: Path
    valid: bool
    split: tuple[str, float, int] | None = None  # which part of a held-out split

    @property
    def folder(self) -> Path:
        content = [
            VERSION,
            [source["sha256"] for source in self.sources],
            self.tokenizer.fingerprint(),
            asdict(self.settings),
            self.valid,
            self.split,
        ]
        name = "valid" if self.valid else "train"
        return self.out_dir / f"{name}-{fsio.sha256_json(content)[:16]}"


def prepare(
    paths: Paths,
    tokenizer: Tokenizer,
    *,
    format: str = "auto",
    max_seq_length: int,
    packing: bool = True,
    document_mask: bool = False,
    too_long: TooLong = "drop",
    out_dir: str | Path,
    valid: bool = False,
) -> Shards:
    """Prepared rows of `paths`, reused when the same content was prepared in `out_dir` before.

    Documents become windows of max_seq_length; the last, shorter one is kept for `valid` only.
    Conversations become examples, packed into rows of max_seq_length or one a row.
    Raises DataError, naming file and line, for data that cannot be used.
    """
    settings = _Settings(format, max_seq_length, packing, document_mask, too_long)
    files = expand(paths)
    job = _Job(tokenizer, settings, _sources(files), Path(out_dir), valid)
    return _cached(job, lambda: list(read(files, format)))


def prepare_pair(
    train_paths: Paths,
    valid_paths: Paths | None,
    tokenizer: Tokenizer,
    *,
    valid_share: float,
    seed: int,
    format: str = "auto",
    max_seq_length: int,
    packing: bool = True,
    document_mask: bool = False,
    too_long: TooLong = "drop",
    out_dir: str | Path,
) -> tuple[Shards, Shards]:
    """Training and validation rows.

    Validation comes from `valid_paths`, else from valid.* files in the training folders, else a
    seeded `valid_share` of the training data is held out.
    """
    settings = _Settings(format, max_seq_length, packing, document_mask, too_long)
    valid_paths = valid_paths or valid_files(train_paths)
    if valid_paths:
        make = partial(prepare, tokenizer=tokenizer, out_dir=out_dir, **asdict(settings))
        return make(train_paths), make(valid_paths, valid=True)
    if not 0 < valid_share <= 0.5:
        raise UserError(
            f"{valid_share:g} of the data cannot be held out for validation",
            "set data.valid_share between 0 and 0.5, or give data.valid files",
        )
    files = expand(train_paths)
    sources, made = _sources(files), _Once(files, format, valid_share, seed)
    jobs = [
        _Job(
            tokenizer, settings, sources, Path(out_dir), part == "valid", (part, valid_share, seed)
        )
        for part in ("train", "valid")
    ]
    return _cached(jobs[0], lambda: made.parts()[0]), _cached(jobs[1], lambda: made.parts()[1])


class _Once:
    """The two parts of a held-out split, read only if one of them is not prepared yet."""

    def __init__(self, files: list[Path], format: str, share: float, seed: int) -> None:
        self._files, self._format, self._share, self._seed = files, format, share, seed
        self._parts: tuple[list, list] | None = None

    def parts(self) -> tuple[list, list]:
        if self._parts is None:
            items = list(read(self._files, self._format))
            self._parts = split_held_out(items, self._share, self._seed)
        return self._parts


# ---------------------------------------------------------------- the cache


def _cached(job: _Job, read_items: Callable[[], list[Document | Conversation]]) -> Shards:
    folder = job.folder
    if folder.exists():
        try:
            fsio.verify_folder(folder)
            return open_shards(folder)
        except StorageError as error:
            progress.note(f"prepared data is damaged and is made again: {error.message}", "warning")
    items = read_items()
    _check_one_kind(items)
    fsio.require_space(folder.parent, sum(s["bytes"] for s in job.sources), "preparing the data")
    with fsio.atomic_folder(folder) as temporary:
        if isinstance(items[0], Document):
            _write_text(temporary, [d for d in items if isinstance(d, Document)], job)
        else:
            _write_chat(temporary, [c for c in items if isinstance(c, Conversation)], job)
    return open_shards(folder)


def _sources(files: list[Path]) -> list[dict[str, Any]]:
    sources = []
    total = sum(file.stat().st_size for file in files)
    with progress.task("Reading the data files", total=total, unit="B") as bar:
        for file in files:
            size = file.stat().st_size
            sources.append({"file": str(file), "bytes": size, "sha256": fsio.sha256_file(file)})
            bar.advance(size)
    return sources


def valid_files(train_paths: Paths) -> list[Path]:
    """The validation files that lie in the training folders."""
    folders = [path for path in train_paths if Path(path).is_dir()]
    return [file for folder in folders for file in split_files(folder, "valid")]


def _check_one_kind(items: list[Document | Conversation]) -> None:
    for item in items:
        if type(item) is not type(items[0]):
            raise DataError(
                item.file,
                item.line,
                f"{_plural(item)}, while {items[0].file} holds {_plural(items[0])}",
                "train on documents and on conversations in two runs",
            )


def _plural(item: Document | Conversation) -> str:
    return "documents" if isinstance(item, Document) else "conversations"


# ---------------------------------------------------------------- documents


def _write_text(folder: Path, documents: list[Document], job: _Job) -> None:
    tokenizer, length = job.tokenizer, job.settings.max_seq_length
    with ShardWriter(folder, "text", tokenizer.vocab_size) as writer:
        _encode_documents(writer, documents, tokenizer)
        num_windows = writer.num_tokens - 1
        num_rows = -(-num_windows // length) if job.valid else num_windows // length
        if num_rows == 0:
            raise DataError(
                documents[0].file,
                None,
                f"only {writer.num_tokens:,} tokens in all, fewer than one row of {length:,} needs",
                f"add text, or set data.max_seq_length to at most {max(1, num_windows):,}",
            )
        num_targets = min(num_windows, num_rows * length)
        if job.settings.document_mask:  # the first token of a document is nobody's target
            starts = writer.offsets()[1:]
            num_targets -= int((starts <= num_targets).sum())
        counts = {"num_rows": num_rows, "num_targets": num_targets}
        writer.finish({**counts, "num_dropped": 0, "num_truncated": 0, **_facts(job)})


def _encode_documents(writer: ShardWriter, documents: list[Document], tokenizer: Tokenizer) -> None:
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    total = sum(len(document.text) for document in documents)
    with progress.task("Tokenizing", total=total, unit="characters") as bar:
        for batch in _piece_batches(documents, tokenizer):
            encoded = tokenizer.encode_batch([piece for piece, _, _ in batch])
            for ids, (piece, is_first, is_last) in zip(encoded, batch, strict=True):
                ids = start + ids if is_first else ids
                writer.add([*ids, tokenizer.document_end_id] if is_last else ids)
                if is_last:
                    writer.end()
                bar.advance(len(piece))


def _piece_batches(
    documents: list[Document], tokenizer: Tokenizer
) -> Iterator[list[tuple[str, bool, bool]]]:
    """Batches of (piece of a document, whether it is its first, its last)."""
    batch: list[tuple[str, bool, bool]] = []
    num_chars = 0
    for document in documents:
        pieces = tokenizer.cut(document.text)
        for number, piece in enumerate(pieces):
            batch.append((piece, number == 0, number == len(pieces) - 1))
            num_chars += len(piece)
            if num_chars >= _BATCH_CHARS:
                yield batch
                batch, num_chars = [], 0
    if batch:
        yield batch


# ---------------------------------------------------------------- conversations


def _write_chat(folder: Path, conversations: list[Conversation], job: _Job) -> None:
    examples, num_dropped, num_truncated = _fitting_examples(conversations, job)
    length = job.settings.max_seq_length
    lengths = np.array([len(example.ids) - 1 for example in examples])  # the last is no input
    if job.settings.packing:
        rows = best_fit(lengths, length)
    else:
        rows = [[number] for number in range(len(examples))]
    num_targets = 0
    with ShardWriter(folder, "chat", job.tokenizer.vocab_size) as writer:
        for number in (number for row in rows for number in row):
            writer.add(examples[number].ids, examples[number].trained)
            writer.end()
            num_targets += int(examples[number].trained.sum())
        row_starts = np.cumsum([0, *(len(row) for row in rows)])
        counts = {
            "num_rows": len(rows),
            "num_targets": num_targets,
            "num_dropped": num_dropped,
            "num_truncated": num_truncated,
        }
        writer.finish({**counts, **_facts(job)}, row_starts)


def _fitting_examples(
    conversations: list[Conversation], job: _Job
) -> tuple[list[Example], int, int]:
    """The checked examples that fit a row, and how many were dropped and truncated."""
    limit = job.settings.max_seq_length + 1
    kept: list[Example] = []
    num_dropped = num_truncated = 0
    for conversation, example in _checked_examples(conversations, job.tokenizer):
        num_tokens = len(example.ids)
        if num_tokens <= limit:
            kept.append(example)
            continue
        if job.settings.too_long == "error":
            raise DataError(
                conversation.file,
                conversation.line,
                f"{num_tokens - 1:,} tokens, more than data.max_seq_length={limit - 1:,}",
                'shorten it, raise data.max_seq_length, or set data.too_long to "drop"',
            )
        if job.settings.too_long == "truncate" and example.trained[:limit].any():
            answers = example.answers  # of which the last may be lost: used by the contract only
            kept.append(Example(example.ids[:limit], example.trained[:limit], answers))
            num_truncated += 1
        else:
            num_dropped += 1
    _tell_what_was_lost(len(kept), num_dropped, num_truncated, job)
    return kept, num_dropped, num_truncated


def _checked_examples(
    conversations: list[Conversation], tokenizer: Tokenizer
) -> Iterator[tuple[Conversation, Example]]:
    with progress.task("Rendering", total=len(conversations), unit="conversations") as bar:
        for first in range(0, len(conversations), _BATCH_CONVERSATIONS):
            batch = conversations[first : first + _BATCH_CONVERSATIONS]
            for conversation, examples in zip(
                batch, render_examples(tokenizer, batch), strict=True
            ):
                for example in examples:
                    check_example(tokenizer, conversation, example)
                    yield conversation, example
                bar.advance()


def _tell_what_was_lost(num_kept: int, num_dropped: int, num_truncated: int, job: _Job) -> None:
    length, num_examples = job.settings.max_seq_length, num_kept + num_dropped
    if num_kept == 0:
        raise DataError(
            job.sources[0]["file"],
            None,
            f"all {num_examples:,} examples are longer than data.max_seq_length={length:,}",
            "raise data.max_seq_length, or shorten the conversations",
        )
    for count, what in ((num_dropped, "left out"), (num_truncated, "cut off")):
        if count:
            progress.note(
                f"{count:,} of {num_examples:,} examples are longer than "
                f"data.max_seq_length={length:,} and were {what}",
                "warning",
            )


def _facts(job: _Job) -> dict[str, Any]:
    """Where prepared rows come from, for the index."""
    return {
        "row_length": job.settings.max_seq_length,
        "document_mask": job.settings.document_mask,
        "packing": job.settings.packing,
        "tokenizer": job.tokenizer.fingerprint(),
        "split": job.split,
        "sources": job.sources,
    }
