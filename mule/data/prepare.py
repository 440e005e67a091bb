"""From data files to prepared rows on disk, made once for the same content and settings."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mule import fsio, locks, progress
from mule.config.schema import DataSection
from mule.data.encode import TooLong
from mule.data.hold_out import Item, decide_split
from mule.data.labels import files_by_source
from mule.data.produce import ByteCount, Production, find_start, produce
from mule.data.shard_writer import Counts, ShardWriter
from mule.data.shards import VERSION, Shards, open_shards
from mule.data.sources import read, split_files
from mule.data.sources.files import OnBytes
from mule.data.sources.options import ReadOptions
from mule.errors import DataError, StorageError, UserError
from mule.tokenizer import Tokenizer

Paths = Sequence[str | Path]

_STALE_S = 7 * 24 * 3600.0


@dataclass(frozen=True)
class RowSettings:
    """What decides the prepared rows besides the data and the tokenizer."""

    read: ReadOptions
    max_seq_length: int
    packing: bool = True
    document_mask: bool = False
    too_long: TooLong = "drop"

    @classmethod
    def of(cls, data: DataSection) -> RowSettings:
        """As a recipe has them."""
        return cls(
            read_options(data), data.max_seq_length, data.packing, data.document_mask, data.too_long
        )


def read_options(data: DataSection) -> ReadOptions:
    """How a recipe wants its files read."""
    return ReadOptions.make(data.format, data.columns, data.threads, data.wikitext)


@dataclass(frozen=True)
class Output:
    """A folder to be; `key` is the sum of everything that decides its content."""

    folder: Path
    key: str
    valid: bool
    part: str | None = None  # of a held-out split: train or valid


@dataclass(frozen=True)
class Sources:
    """The files, and what the index says of each; `states` are their sizes and times.

    `names` is what the source of each is called.
    """

    files: list[Path]
    names: list[str]
    facts: list[dict[str, Any]]
    states: list[tuple[int, int]]

    @classmethod
    def of(cls, named: Mapping[Path, str]) -> Sources:
        """The files, with the source of each and their sums."""
        files = list(named)
        states = [_state(file) for file in files]
        total = sum(size for size, _ in states)
        with progress.task("Reading the data files", total=total, unit="B") as bar:
            sums = [fsio.sha256_file(file, bar.advance) for file in files]
        facts = [
            {"file": str(file), "bytes": size, "sha256": sha256}
            for file, (size, _), sha256 in zip(files, states, sums, strict=True)
        ]
        return cls(files, list(named.values()), facts, states)

    @property
    def num_bytes(self) -> int:
        return sum(size for size, _ in self.states)

    def check_unchanged(self) -> None:
        """DataError when a file is not what it was when its sum was taken."""
        for file, state, facts in zip(self.files, self.states, self.facts, strict=True):
            if _state(file) != state and fsio.sha256_file(file) != facts["sha256"]:
                raise DataError(
                    file,
                    None,
                    "it changed while it was read",
                    "run the same command again when nothing writes to it any more",
                )


@dataclass(frozen=True)
class Job:
    """One pass over the sources that fills the outputs; `split` is (share, seed) of a held-out."""

    tokenizer: Tokenizer
    settings: RowSettings
    sources: Sources
    outputs: tuple[Output, ...]
    split: tuple[float, int] | None = None


def prepare(
    paths: Paths,
    tokenizer: Tokenizer,
    settings: RowSettings,
    *,
    out_dir: str | Path,
    valid: bool = False,
) -> Shards:
    """Prepared rows of `paths`, reused when the same content was prepared in `out_dir` before.

    Documents become windows of max_seq_length; the last, shorter one is kept for `valid` only.
    Conversations become examples, packed into rows of max_seq_length or one a row.
    Raises DataError, naming file and line, for data that cannot be used.
    """
    sources = Sources.of(files_by_source(paths))
    key = job_key(sources, tokenizer, settings, valid, None)
    name = "valid" if valid else "train"
    output = Output(Path(out_dir) / f"{name}-{key[:16]}", key, valid)
    return fulfil(Job(tokenizer, settings, sources, (output,)))[0]


def prepare_pair(
    train: Paths,
    valid: Paths | None,
    tokenizer: Tokenizer,
    settings: RowSettings,
    *,
    valid_share: float,
    seed: int,
    out_dir: str | Path,
) -> tuple[Shards, Shards]:
    """Training and validation rows.

    Validation comes from `valid`, else from valid.* files in the training folders, else a seeded
    `valid_share` of the training data is held out.
    """
    if given := valid or valid_files(train):
        make = partial(prepare, tokenizer=tokenizer, settings=settings, out_dir=out_dir)
        pair = make(train), make(given, valid=True)
        tell_overlap(*pair)
        return pair
    if not 0 < valid_share <= 0.5:
        raise UserError(
            f"{valid_share:g} of the data cannot be held out for validation",
            "set data.valid_share between 0 and 0.5, or give data.valid files",
        )
    sources = Sources.of(files_by_source(train))
    outputs = []
    for part in ("train", "valid"):
        split = (part, valid_share, seed)
        key = job_key(sources, tokenizer, settings, part == "valid", split)
        outputs.append(Output(Path(out_dir) / f"{part}-{key[:16]}", key, part == "valid", part))
    made = fulfil(Job(tokenizer, settings, sources, tuple(outputs), (valid_share, seed)))
    return made[0], made[1]


def valid_files(train_paths: Paths) -> list[Path]:
    """The validation files that lie in the training folders."""
    folders = [path for path in train_paths if Path(path).is_dir()]
    return [file for folder in folders for file in split_files(folder, "valid")]


# ---------------------------------------------------------------- the cache


def job_key(
    sources: Sources,
    tokenizer: Tokenizer,
    settings: RowSettings,
    valid: bool,
    split: tuple[str, float, int] | None,
) -> str:
    """The sum of everything that decides the content of a prepared folder.

    Names of sources are in validation rows only: a run goes on when its training files moved.
    """
    sums = [facts["sha256"] for facts in sources.facts]
    names = [sources.names] if valid else []
    return fsio.sha256_json(
        [VERSION, sums, tokenizer.fingerprint(), asdict(settings), valid, split, *names]
    )


def fulfil(job: Job) -> list[Shards]:
    """The outputs of a job, as they were made before, or made now.

    A killed process leaves what it did, and the next one goes on there; while another process
    makes the same thing, this one waits for it.
    """
    last = job.outputs[-1]  # of a pair, the validation rows: their key has all that decides both
    root = last.folder.with_name(fsio.partial_name(f"prepare-{last.key[:16]}"))
    lock = root.with_name(f"{root.name}.lock")
    found = _found(job, tell=True)
    if found and not root.exists() and not lock.exists():
        return found
    waited: list[bool] = []

    def on_wait() -> None:
        waited.append(True)
        progress.note("another process prepares the same data: waiting for it to end")

    with locks.locked(lock, on_wait):
        if (found or waited) and (found := _found(job, tell=False)):
            shutil.rmtree(root, ignore_errors=True)  # of a process killed right after its commit
            return found
        _remove_stale(root)
        fsio.require_space(root.parent, job.sources.num_bytes, "preparing the data")
        with fsio.resumable_folders(root, *(output.folder for output in job.outputs)) as work:
            _make(job, work)
    return [open_shards(output.folder) for output in job.outputs]


def _found(job: Job, *, tell: bool) -> list[Shards] | None:
    """The outputs, if all of them are there and whole."""
    shards = []
    for output in job.outputs:
        if not output.folder.exists():
            return None
        try:
            fsio.verify_folder(output.folder)
            shards.append(open_shards(output.folder))
        except StorageError as error:
            if tell:
                what = "prepared data is damaged and is made again"
                progress.note(f"{what}: {error.message}", "warning")
            return None
        if shards[-1].index["key"] != output.key:
            return None
    return shards


def _remove_stale(root: Path) -> None:
    """Delete what was begun beside `root` long ago, for data or settings that changed since."""
    for work in root.parent.glob(fsio.partial_name("prepare-*")):
        lock = work.with_name(f"{work.name}.lock")
        if work == root or not work.is_dir() or locks.is_locked(lock):
            continue
        if time.time() - work.stat().st_mtime > _STALE_S:
            shutil.rmtree(work, ignore_errors=True)
            lock.unlink(missing_ok=True)
            progress.note(f"removed {work}: begun over a week ago and never finished")


def _state(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns


# ---------------------------------------------------------------- making them


def _make(job: Job, work: fsio.Unfinished) -> None:
    settings, sources = job.settings, job.sources

    def read_items(on_bytes: OnBytes) -> Iterable[Item]:
        return read(sources.files, settings.read, on_bytes)

    labelled = tuple(output.valid for output in job.outputs)
    start = find_start(work, job.tokenizer, labelled)
    if start is not None:
        progress.note(
            f"going on where an earlier preparation stopped, after {start.state.num_items:,} "
            f"items and {start.num_bytes / 2**20:,.1f} MiB"
        )
    split = None
    if job.split is not None and (start is None or not start.done):
        count = ByteCount()
        quiet = progress.using(progress.Silence())  # what reading notes is told by the pass below
        with count.shown("Choosing what to hold out", sources.num_bytes), quiet:
            split = decide_split(lambda: read_items(count), *job.split)
    production = Production(
        job.tokenizer,
        read_items,
        sources.num_bytes,
        dict(zip(map(str, sources.files), sources.names, strict=True)),
        labelled,
        settings.max_seq_length,
        settings.too_long,
        split,
    )
    writers, labels = produce(production, work, start)
    sources.check_unchanged()
    for writer, output in zip(writers, job.outputs, strict=True):
        finish = _finish_chat if writer.kind == "chat" else _finish_text
        facts = {"num_rows": finish(writer, output, job), **_facts(output, job)}
        if output.valid:
            facts["labels"] = [label._asdict() for label in labels]
        writer.write_index(facts)


def _finish_text(writer: ShardWriter, output: Output, job: Job) -> int:
    length = job.settings.max_seq_length
    num_rows = writer.finish_text(
        length, keep_last=output.valid, document_mask=job.settings.document_mask
    )
    if num_rows == 0:
        num_tokens = writer.counts.num_tokens
        raise DataError(
            job.sources.files[0],
            None,
            f"only {num_tokens:,} tokens in all, fewer than one row of {length:,} needs",
            f"add text, or set data.max_seq_length to at most {max(1, num_tokens - 1):,}",
        )
    return num_rows


def _finish_chat(writer: ShardWriter, output: Output, job: Job) -> int:
    counts, length = writer.counts, job.settings.max_seq_length
    num_examples = counts.num_examples + counts.num_dropped
    if counts.num_examples == 0:
        raise DataError(
            job.sources.files[0],
            None,
            f"all {num_examples:,} examples are longer than data.max_seq_length={length:,}",
            "raise data.max_seq_length, or shorten the conversations",
        )
    _tell_what_was_lost(counts, num_examples, length)
    return writer.finish_chat(length, packing=job.settings.packing)


def _tell_what_was_lost(counts: Counts, num_examples: int, length: int) -> None:
    for count, what in ((counts.num_dropped, "left out"), (counts.num_truncated, "cut off")):
        if count:
            progress.note(
                f"{count:,} of {num_examples:,} examples are longer than "
                f"data.max_seq_length={length:,} and were {what}",
                "warning",
            )


def _facts(output: Output, job: Job) -> dict[str, Any]:
    """Where prepared rows come from, for the index."""
    return {
        "key": output.key,
        "valid": output.valid,
        "row_length": job.settings.max_seq_length,
        "document_mask": job.settings.document_mask,
        "packing": job.settings.packing,
        "settings": asdict(job.settings),
        "tokenizer": job.tokenizer.fingerprint(),
        "split": [output.part, *job.split] if job.split else None,
        "sources": job.sources.facts,
    }


def tell_overlap(train: Shards, valid: Shards, what: str = "validation") -> None:
    """Warn of held-out items that are training items too; `what` they are for."""
    trained = np.concatenate([part.digests for part in train.parts])
    asked = np.concatenate([part.digests for part in valid.parts])
    count = int(np.isin(asked, trained).sum())
    if count:
        things = "conversations" if valid.kind == "chat" else "documents"
        progress.note(
            f"{count:,} of {len(asked):,} {what} {things} are in the training data, word for "
            f"word: the {what} loss will look better than the model is",
            "warning",
        )
