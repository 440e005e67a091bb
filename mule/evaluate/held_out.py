"""The loss of several models on the same held-out rows, row by row, GGUF files among them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from mule import progress
from mule.batch import IGNORE, Batch
from mule.data.labels import Label
from mule.data.loader import Labelled, ValidSet
from mule.data.shards import Shards
from mule.errors import ModelError
from mule.evaluate.loss import HeldOutLoss, counted
from mule.evaluate.subject import Subject
from mule.generate.llamacpp import LlamaCpp
from mule.models.decoder import Decoder
from mule.models.eager import uncompiled
from mule.tokenizer import Tokenizer

_BATCH_ROWS = 4
_PROBED_CHARACTERS = 2000  # of held-out text that both tokenizers must cut alike


@dataclass(frozen=True)
class RowLosses:
    """The loss of one model on rows: of each row, and of each label."""

    by_row: HeldOutLoss
    by_label: HeldOutLoss
    labels: Sequence[Label]
    num_bytes: int

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers."""
        return self.by_row.bits / max(1, self.num_bytes)


def row_losses(
    subject: Subject, shards: Shards, tokenizer: Tokenizer, max_rows: int | None
) -> RowLosses:
    """`subject` on at most `max_rows` rows, which `tokenizer` made and reads.

    Raises ModelError where a GGUF file cuts text into other tokens.
    """
    valid = ValidSet(shards, _BATCH_ROWS, max_rows)
    num_labels = len(valid.labels)
    num_bytes = sum(
        len(tokenizer.decode(batch.targets[batch.targets >= 0].tolist()).encode())
        for batch, _ in valid
    )
    with progress.task(f"Loss: {subject.name}", total=valid.num_rows, unit="rows") as bar:
        cells = _by_row(counted(valid, bar), num_labels)
        if subject.source.gguf_file is not None:
            found = _in_llamacpp(subject, tokenizer, cells)
        else:
            found = _in_torch(subject.loaded[0], cells)
        shape = (valid.num_rows, num_labels)
        nll, counts = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.int64)
        for each, places in found:
            nll.view(-1).index_add_(0, places, each)
            counts.view(-1).index_add_(0, places, torch.ones_like(places))
    return RowLosses(
        HeldOutLoss(nll.sum(1).tolist(), counts.sum(1).tolist()),
        HeldOutLoss(nll.sum(0).tolist(), counts.sum(0).tolist()),
        valid.labels,
        num_bytes,
    )


def _by_row(batches: Iterator[Labelled], num_labels: int) -> Iterator[Labelled]:
    """The batches with labels that tell rows apart too: row * num_labels + label."""
    row = 0
    for batch, labels in batches:
        rows = torch.arange(row, row + len(labels))[:, None]
        yield Labelled(batch, rows * num_labels + labels)
        row += len(labels)


Found = tuple[torch.Tensor, torch.Tensor]  # -log p of some targets (N,) fp64, and their cells (N,)


@torch.no_grad()
def _in_torch(model: Decoder, batches: Iterator[Labelled]) -> Iterator[Found]:
    for batch, cells in batches:
        with uncompiled():
            each = model.nll_of_targets(batch.to(model.device))
        yield each.double().cpu(), cells[batch.targets != IGNORE]


# ---------------------------------------------------------------- a GGUF file


def _in_llamacpp(
    subject: Subject, tokenizer: Tokenizer, batches: Iterator[Labelled]
) -> Iterator[Found]:
    """Each document of each row from an empty cache."""
    assert subject.source.gguf_file is not None
    runtime = None
    try:
        for batch, cells in batches:
            if runtime is None:
                runtime = LlamaCpp(subject.source.gguf_file, n_ctx=batch.input_ids.shape[1] + 1)
                _check_tokens(runtime, tokenizer, batch)
            for row in range(len(cells)):
                for ids, places in _documents(batch, row):
                    logprobs = torch.tensor(runtime.log_probabilities(ids), dtype=torch.float64)
                    wanted = batch.targets[row, places] != IGNORE
                    yield -logprobs[wanted], cells[row, places][wanted]
    finally:
        if runtime is not None:
            runtime.close()


def _documents(batch: Batch, row: int) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Of each document of a row: its ids with the last target, and the places of the others."""
    segments = batch.segments[row]
    for segment in segments.unique().tolist():
        places = (segments == segment).nonzero().flatten()
        wanted = (batch.targets[row, places] != IGNORE).nonzero().flatten()
        if segment and len(wanted):
            places = places[: int(wanted.max()) + 1]
            ids = batch.input_ids[row, places].tolist()
            yield [*ids, int(batch.targets[row, places[-1]])], places


def _check_tokens(runtime: LlamaCpp, tokenizer: Tokenizer, batch: Batch) -> None:
    text = tokenizer.decode(batch.input_ids[0].tolist(), skip_special=True)[:_PROBED_CHARACTERS]
    if runtime.tokenize(text, special=False) != tokenizer.encode(text):
        raise ModelError(
            f"{runtime.subject}: cuts the held-out text into other tokens than the first model",
            "compare it with the model it was written from, or leave the file out",
        )
