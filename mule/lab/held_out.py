"""A trained model on whole held-out sets: loss, perplexity, bits per byte and per word."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mule import progress
from mule.config.schema import DataSection
from mule.data.labels import files_by_source
from mule.data.loader import ValidSet
from mule.data.prepare import RowSettings, prepare
from mule.data.shards import Shards
from mule.data.sources import read
from mule.data.sources.items import Document
from mule.data.sources.options import ReadOptions
from mule.evaluate.loss import counted, held_out_loss
from mule.models.decoder import Decoder
from mule.tokenizer import Tokenizer


def measure(
    model: Decoder,
    files: Sequence[str],
    data: DataSection,
    tokenizer: Tokenizer,
    prepared: Path,
    *,
    rows_at_once: int,
) -> dict[str, Any]:
    """`model` on all rows of the files; the last row is padded, none is dropped.

    Bits per byte and per word are the whole set's bits over the UTF-8 bytes of its text, and over
    its words between spaces as the files have them (WikiText: with its marks), so that tokenizers
    and cleaning do not matter. Of chats the bytes are those of the answers; words are not counted.
    """
    settings = RowSettings.of(data)
    shards = prepare(files, tokenizer, settings, out_dir=prepared, valid=True)
    valid = ValidSet(shards, rows_at_once)
    with progress.task("Evaluating", total=shards.num_rows, unit="rows") as bar:
        found = held_out_loss(model, counted(valid, bar), len(valid.labels))
    words = num_words(files, settings.read) if shards.kind == "text" else None
    by_source = found.by_source(valid.labels)
    return {
        "loss": found.loss,
        "perplexity": found.perplexity,
        "bits_per_byte": found.bits / max(1, num_bytes(shards, valid, tokenizer)),
        "bits_per_word": found.bits / max(1, words) if words is not None else None,
        "num_tokens": found.num_targets,
        "num_words": words,
        "by_source": {name: part.loss for name, part in by_source.items()},
    }


def num_bytes(shards: Shards, valid: ValidSet, tokenizer: Tokenizer) -> int:
    """UTF-8 bytes of what is predicted: of text all of it, of chats the trained tokens."""
    if shards.kind == "text":
        ids = [part.tokens.tolist() for part in shards.parts]
    else:
        ids = [batch.targets[batch.targets >= 0].tolist() for batch, _ in valid]
    return sum(len(tokenizer.decode(part, skip_special=True).encode()) for part in ids)


def num_words(files: Sequence[str], options: ReadOptions) -> int:
    """Words between spaces in the files as they are."""
    as_published = ReadOptions(options.format, options.columns, options.threads, "keep")
    items = read(list(files_by_source(files)), as_published)
    return sum(len(item.text.split()) for item in items if isinstance(item, Document))
