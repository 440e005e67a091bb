"""From items to prepared folders in one pass: read, encode beside it, write, and note how far."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, islice

from mule import fsio, logs, progress
from mule.data.contract import check_template
from mule.data.encode import (
    Batch,
    Sided,
    State,
    TooLong,
    chat_batches,
    encode_chat,
    encode_text,
    text_batches,
)
from mule.data.hold_out import Digests, Item, Split, sides
from mule.data.labels import Label, Labels
from mule.data.shard_writer import Block, Counts, ShardWriter, holds
from mule.data.sources.files import OnBytes
from mule.data.sources.items import Document
from mule.errors import DataError, MuleError, UserError
from mule.tokenizer import Tokenizer

_SYNC_S = 30.0  # at most this much work is lost to a kill,
_SYNC_CHARS = 64_000_000  # or this much text
_AHEAD = 3  # batches read before the oldest is written

Encode = Callable[[Batch], tuple[Block, Block]]


@dataclass(frozen=True)
class Start:
    """Where production starts: at the beginning, or behind the last line of the log.

    `num_bytes` of the sources were read; `done` says that nothing but the end is missing, and then
    `labels` are all there are.
    """

    kind: str
    state: State
    counts: tuple[Counts, ...]
    num_bytes: int
    labels: list[Label]
    done: bool


class ByteCount:
    """Bytes of the sources read so far, shown by the bar that is open."""

    def __init__(self) -> None:
        self.total = 0
        self._bar: progress.Task | None = None

    def __call__(self, count: int) -> None:
        self.total += count
        if self._bar is not None:
            self._bar.advance(count)

    @contextlib.contextmanager
    def shown(self, description: str, total: int) -> Iterator[None]:
        with progress.task(description, total=total, unit="B") as self._bar:
            yield
        self._bar = None


@dataclass(frozen=True)
class Production:
    """What decides the tokens; `read` gives the items and tells the bytes as it goes.

    `source_of` has the source of each file; `labelled` says which folders get labels.
    """

    tokenizer: Tokenizer
    read: Callable[[OnBytes], Iterable[Item]]
    num_bytes: int
    source_of: Mapping[str, str]
    labelled: tuple[bool, ...]
    max_seq_length: int
    too_long: TooLong
    split: Split | None


def find_start(
    work: fsio.Unfinished, tokenizer: Tokenizer, labelled: tuple[bool, ...]
) -> Start | None:
    """Where an unfinished production stands; None where there is nothing to go on from."""
    rows = logs.read_log(work.log)
    if not rows:
        return None
    row = rows[-1]
    counts = tuple(Counts(**count) for count in row["counts"])
    whole = all(
        holds(folder, row["kind"], tokenizer.vocab_size, count, labelled=has_labels)
        for folder, count, has_labels in zip(work.folders, counts, labelled, strict=True)
    )
    if not whole:
        return None
    labels = [Label(*label) for label in row["labels"]]
    return Start(row["kind"], State(**row["state"]), counts, row["bytes"], labels, row["done"])


def produce(
    job: Production, work: fsio.Unfinished, start: Start | None
) -> tuple[list[ShardWriter], list[Label]]:
    """Bring the folders of `work` to the end of the items; their writers, with all on the disk.

    And the labels, each at the place of its number.
    """
    for folder in work.folders:
        fsio.remove_leftovers(folder)
    if start is None:
        work.log.unlink(missing_ok=True)
    with contextlib.ExitStack() as stack:
        if start is not None and start.done:
            return _writers(stack, job, work, start), start.labels
        count, labels = ByteCount(), Labels(job.source_of)
        items = _one_kind(job.read(count))
        stack.callback(items.close)
        sided = _described(sides(items, job.split), labels)
        if start is not None:
            with count.shown("Skipping what is done", start.num_bytes):
                deque(islice(sided, start.state.num_items), maxlen=0)
        with count.shown("Tokenizing", job.num_bytes - count.total):
            if start is None:
                if (first := next(sided, None)) is None:
                    raise UserError("the data holds no text, no conversation", "add some to it")
                start = _beginning(first, work)
                sided = chain([first], sided)
            writers = _writers(stack, job, work, start)
            log = fsio.AppendLog(work.log)
            stack.callback(log.close)
            _write_all(job, start, sided, writers, _Noter(log, start.kind, writers, count, labels))
        return writers, labels.found


def _beginning(first: Sided, work: fsio.Unfinished) -> Start:
    kind = "text" if isinstance(first.item, Document) else "chat"
    return Start(kind, State(), (Counts(),) * len(work.folders), 0, [], done=False)


def _write_all(
    job: Production,
    start: Start,
    items: Iterator[Sided],
    writers: list[ShardWriter],
    noter: _Noter,
) -> None:
    encode: Encode
    if start.kind == "text":
        batches = text_batches(items, job.tokenizer, start.state)
        encode = partial(encode_text, job.tokenizer)
    else:
        check_template(job.tokenizer)
        batches = chat_batches(items, start.state)
        encode = partial(
            encode_chat,
            job.tokenizer,
            max_seq_length=job.max_seq_length,
            too_long=job.too_long,
        )
    for batch, blocks, num_bytes in _encoded(batches, encode, noter.count):
        for writer, block in zip(writers, blocks):
            writer.append(block)
        noter.wrote(batch, num_bytes)
    noter.note(done=True)


class _Noter:
    """Makes what is written durable, and then notes in the log how far it is."""

    def __init__(
        self,
        log: fsio.AppendLog,
        kind: str,
        writers: list[ShardWriter],
        count: ByteCount,
        labels: Labels,
    ) -> None:
        self.count, self._labels = count, labels
        self._log, self._kind, self._writers = log, kind, writers
        self._state, self._num_bytes = State(), 0
        self._chars, self._noted_at = 0, time.monotonic()

    def wrote(self, batch: Batch, num_bytes: int) -> None:
        self._chars += batch.num_chars
        if batch.state is None:
            return
        self._state, self._num_bytes = batch.state, num_bytes
        if self._chars >= _SYNC_CHARS or time.monotonic() - self._noted_at >= _SYNC_S:
            self.note(done=False)

    def note(self, *, done: bool) -> None:
        row = {
            "kind": self._kind,
            "state": asdict(self._state),
            "counts": [asdict(writer.sync()) for writer in self._writers],
            "bytes": self._num_bytes,
            "labels": self._labels.found,
            "done": done,
        }
        self._log.append(row)
        self._log.sync()
        self._chars, self._noted_at = 0, time.monotonic()


def _encoded(
    batches: Iterable[Batch], encode: Encode, count: ByteCount
) -> Iterator[tuple[Batch, tuple[Block, Block], int]]:
    """Each batch with its blocks, in order, encoded while the next ones are read.

    With the bytes that were read up to it. The first error in the order of the data is raised,
    wherever it arises.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="encode")
    waiting: deque[tuple[Batch, Future[tuple[Block, Block]], int]] = deque()
    try:
        try:
            for batch in batches:
                future = pool.submit(copy_context().run, encode, batch)
                waiting.append((batch, future, count.total))
                if len(waiting) > _AHEAD:
                    batch, future, num_bytes = waiting.popleft()
                    yield batch, future.result(), num_bytes
        except MuleError:
            for _, future, _ in waiting:
                future.result()
            raise
        while waiting:
            batch, future, num_bytes = waiting.popleft()
            yield batch, future.result(), num_bytes
    finally:
        pool.shutdown(cancel_futures=True)


def _writers(
    stack: contextlib.ExitStack, job: Production, work: fsio.Unfinished, start: Start
) -> list[ShardWriter]:
    size = job.tokenizer.vocab_size
    return [
        stack.enter_context(ShardWriter(folder, start.kind, size, counts, labelled=labelled))
        for folder, counts, labelled in zip(work.folders, start.counts, job.labelled, strict=True)
    ]


def _described(items: Iterable[tuple[int, Item]], labels: Labels) -> Iterator[Sided]:
    digests = Digests()
    for side, item in items:
        yield Sided(side, item, digests.of(item), labels.of(item))


def _one_kind(items: Iterable[Item]) -> Generator[Item]:
    """The items; DataError at the first that is not of the first one's kind."""
    first: Item | None = None
    for item in items:
        first = item if first is None else first
        if type(item) is not type(first):
            raise DataError(
                item.file,
                item.line,
                f"{_plural(item)}, while {first.file} holds {_plural(first)}",
                "train on documents and on conversations in two runs",
            )
        yield item


def _plural(item: Item) -> str:
    return "documents" if isinstance(item, Document) else "conversations"
