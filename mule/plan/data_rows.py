"""How many rows the data of a recipe makes: of what was prepared before, or counted on a sample.

Nothing is written. numpy, pyarrow and tokenizers are imported where data is read; torch never is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mule import progress
from mule.config.schema import DataSection, Recipe

if TYPE_CHECKING:
    from mule.data.encode import Sided
    from mule.data.shards import Shards
    from mule.tokenizer import Tokenizer

_SAMPLE_BYTES, _SAMPLE_FILES = 8 << 20, 64  # read at most, evenly from the files
_TRAINED_ON_BYTES = 4 << 20  # by a tokenizer that the run will train on everything
_ROW_STEP = 64  # rows of chats are as long as the fullest needs, in such steps


@dataclass(frozen=True)
class DataRows:
    """Rows to train and validate on, as `Facts` wants them; `how` says how they are known.

    `is_exact` says that nothing was extrapolated; of a split, which rows fall on which side is.
    """

    kind: str  # text or chat
    num_rows: int
    row_length: int
    targets_per_row: float
    examples_per_row: float
    num_items: int
    isolated: bool
    num_valid_rows: int
    num_bytes: int  # of the files
    how: str
    is_prepared: bool = False
    is_exact: bool = False


def data_rows(recipe: Recipe, tokenizer: Tokenizer, root: Path, *, is_own: bool) -> DataRows:
    """Those of a recipe whose runs are below `root`; `is_own` says that the run has this tokenizer."""
    from mule.data.prepare import valid_files
    from mule.data.sources import expand

    data = recipe.data
    files = expand(data.train)
    given = [Path(file) for file in expand(data.valid)] if data.valid else valid_files(data.train)
    if is_own and (found := _prepared(recipe, files, given, tokenizer, root)):
        return found
    quiet = progress.using(progress.Silence())  # what reading notes is told when it is prepared
    with progress.task("Counting a sample of the data", total=None), quiet:
        sample = _Sample.of(files, data, tokenizer)
        held_out = _Sample.of(given, data, tokenizer) if given else None
    return _counted(recipe, sample, held_out)


def sample_texts(data: DataSection) -> Iterator[str]:
    """What a tokenizer is trained on to count with, where the run will train one on all the data."""
    from mule.data.prepare import read_options
    from mule.data.sources import Document, expand, read

    left = _TRAINED_ON_BYTES
    for item in read(expand(data.train), read_options(data)):
        texts = [item.text] if isinstance(item, Document) else [m.content for m in item.messages]
        for text in texts:
            yield text[:left]
            left -= len(text)
            if left <= 0:
                return


# ---------------------------------------------------------------- prepared before


def _prepared(
    recipe: Recipe, files: list[Path], given: list[Path], tokenizer: Tokenizer, root: Path
) -> DataRows | None:
    """Rows that a run of the same data and settings left, told by names, sizes and settings."""
    from mule.data.prepare import RowSettings
    from mule.data.shards import INDEX, open_shards
    from mule.errors import MuleError

    settings = json.loads(json.dumps(asdict(RowSettings.of(recipe.data))))
    wanted = {"settings": settings, "tokenizer": tokenizer.fingerprint()}
    found: dict[str, Shards] = {}
    for part, sources in (("train", files), ("valid", given or files)):
        sizes = sorted((str(file), file.stat().st_size) for file in sources)
        for index in sorted((root / ".prepared").glob(f"{part}-*/{INDEX}")):
            try:
                shards = open_shards(index.parent)
            except MuleError:
                continue
            facts = {key: shards.index.get(key) for key in wanted}
            own = sorted((s["file"], s["bytes"]) for s in shards.index["sources"])
            if facts == wanted and own == sizes and _is_split(shards, recipe, part, bool(given)):
                found[part] = shards
    train = found.get("train")
    if train is None:
        return None
    return DataRows(
        kind=train.kind,
        num_rows=train.num_rows,
        row_length=train.row_length,
        targets_per_row=train.num_targets / train.num_rows,
        examples_per_row=train.num_examples / train.num_rows,
        num_items=train.num_items,
        isolated=train.isolated,
        num_valid_rows=found["valid"].num_rows if "valid" in found else 0,
        num_bytes=sum(file.stat().st_size for file in files),
        how=f"prepared before, in {train.folder}",
        is_prepared=True,
        is_exact=True,
    )


def _is_split(shards: Shards, recipe: Recipe, part: str, given: bool) -> bool:
    """Whether the rows are of the split that the recipe will make."""
    split, share = shards.index.get("split"), recipe.data.valid_share
    if split is None:
        return given or share == 0 or share == "auto"
    return split[0] == part and split[2] == recipe.train.seed and share in ("auto", split[1])


# ---------------------------------------------------------------- counted


@dataclass
class _Sample:
    """What of the files was read, and what it holds; `scale` is all of them over that."""

    kind: str
    num_items: int
    num_tokens: int
    lengths: list[int]  # of chats, in inputs
    num_targets: int
    num_bytes: int
    scale: float

    @classmethod
    def of(cls, files: list[Path], data: DataSection, tokenizer: Tokenizer) -> _Sample:
        """Every n-th file from its beginning, so much of each that all get the same share."""
        total = sum(file.stat().st_size for file in files)
        some = files[:: max(1, -(-len(files) // _SAMPLE_FILES))]
        each = max(_SAMPLE_BYTES // len(some), 1)
        found = cls("text", 0, 0, [], 0, total, 1.0)
        read = sum(found._add(file, each, data, tokenizer) for file in some)
        found.scale = total / max(read, 1)
        return found

    def _add(self, file: Path, most: int, data: DataSection, tokenizer: Tokenizer) -> int:
        """Count the beginning of a file; the bytes of it that were read."""
        from mule.data.encode import State, chat_batches, encode_chat, encode_text, text_batches
        from mule.data.produce import ByteCount
        from mule.data.sources import Document

        count = ByteCount()
        items = _until(file, data, count, most)
        first = next(items, None)
        if first is None:
            return file.stat().st_size
        everything = chain([first], items)
        if isinstance(first.item, Document):
            for batch in text_batches(everything, tokenizer, State()):
                block = encode_text(tokenizer, batch)[0]
                self.num_tokens += len(block.ids)
                self.num_items += len(block.ends)
        else:
            self.kind = "chat"
            for batch in chat_batches(everything, State()):
                block = encode_chat(tokenizer, batch, data.max_seq_length, data.too_long)[0]
                ends = block.ends.tolist()
                self.lengths += [end - start - 1 for start, end in zip([0, *ends], ends)]
                self.num_tokens += len(block.ids)
                self.num_items += len(batch.conversations)
                if block.trained is not None:
                    self.num_targets += int(block.trained.sum())
        return min(max(count.total, 1), file.stat().st_size)


def _until(file: Path, data: DataSection, count: Any, most: int) -> Iterator[Sided]:
    """The items of a file until so many bytes of it were read."""
    from mule.data.encode import Sided
    from mule.data.prepare import read_options
    from mule.data.sources import read_file

    for item in read_file(file, read_options(data), count):
        yield Sided(0, item, 0 if getattr(item, "ends", True) else None, 0)
        if count.total > most:
            return


def _counted(recipe: Recipe, sample: _Sample, held_out: _Sample | None) -> DataRows:
    """The rows of all data, by what the sample holds."""
    data = recipe.data
    share = _share(data, sample) if held_out is None else 0.0
    length = data.max_seq_length
    if sample.kind == "chat":
        rows, length = _chat_rows(sample, data)
        valid = _chat_rows(held_out, data)[0] * held_out.scale if held_out else rows * share
        per_row = len(sample.lengths) / max(rows, 1), sample.num_targets / max(rows, 1)
        valid *= 1 if held_out else sample.scale
    else:
        rows = max(0, sample.num_tokens - 1) / length
        valid = held_out.num_tokens * held_out.scale / length if held_out else 0.0
        valid = valid or rows * share * sample.scale
        per_row = sample.num_items / max(rows, 1e-9), float(length)
    return DataRows(
        kind=sample.kind,
        num_rows=max(1, int(rows * sample.scale * (1 - share))),
        row_length=length,
        targets_per_row=max(1.0, per_row[1]),
        examples_per_row=max(per_row[0], 1e-9),
        num_items=max(1, round(sample.num_items * sample.scale * (1 - share))),
        isolated=sample.kind == "chat" or data.document_mask,
        num_valid_rows=max(1, round(valid)) if valid else 0,
        num_bytes=sample.num_bytes,
        how=_how(sample),
        is_exact=sample.scale <= 1.0,
    )


def _chat_rows(sample: _Sample, data: DataSection) -> tuple[float, int]:
    """Rows of the sample's chats, and their length: what the fullest needs."""
    from mule.data.pack import best_fit

    if not sample.lengths:
        return 1.0, data.max_seq_length
    if not data.packing:
        fullest, rows = max(sample.lengths), len(sample.lengths)
    else:
        order, starts = best_fit(sample.lengths, data.max_seq_length)
        in_order = [sample.lengths[i] for i in order.tolist()]
        edges = starts.tolist()
        fullest = max(sum(in_order[a:b]) for a, b in pairwise(edges))
        rows = len(edges) - 1
    return float(rows), min(data.max_seq_length, _ROW_STEP * max(1, -(-fullest // _ROW_STEP)))


def _share(data: DataSection, sample: _Sample) -> float:
    """What is held out, where no files are given for validation."""
    from mule.data.hold_out import SHARE_OF_DOCUMENTS, share_of_chats

    if data.valid_share != "auto":
        return data.valid_share
    if sample.kind == "text":
        return SHARE_OF_DOCUMENTS
    return share_of_chats(round(sample.num_items * sample.scale))


def _how(sample: _Sample) -> str:
    if sample.scale <= 1.0:
        return "every file was counted"
    return f"extrapolated from {1 / sample.scale:.2%} of the files' bytes"
