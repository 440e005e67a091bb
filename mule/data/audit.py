"""What a run is about to learn from, in figures: rows, repetition, labels and their order.

Rows and labels are looked at as the trainer gets them, from its loader, and not as the index says
they are. All of it is bounded: at most 256 thousand tokens of rows, and the passages of at most
MAX_SCANNED_TOKENS tokens, whatever the size of the data; `scanned_share` says what part that was.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mule.batch import IGNORE
from mule.data.loader import Loader
from mule.data.passages import MAX_SCANNED_TOKENS, Passages, some_items, stretches
from mule.data.shards import Shards
from mule.tokenizer import Tokenizer

_MAX_ROWS, _MAX_TOKENS = 128, 262_144  # looked at as batches
_AT_ONCE = 16  # rows made at a time
_ORDER_STEPS, _ORDER_ROWS = 64, 4  # places looked at of an epoch's order
_FEWEST_PLACES = 32
_MAX_ITEMS, _ITEM_TOKENS = 256, 512  # of which copies are looked for


def data_facts(train: Loader, valid: Shards | None, num_steps: int) -> dict[str, Any]:
    """Sizes, and what of the items stands there more than once.

    `repeated_share` of the items read are equal to one before, `nearly_repeated_share` of those
    looked at have a near twin in the rows; the same of validation items in the training rows.
    """
    shards = train.shards
    index, digests = shards.index, _digests(shards)
    lost = index.get("num_dropped", 0), index.get("num_truncated", 0)
    return {
        "kind": shards.kind,
        "num_rows": shards.num_rows,
        "rows_per_update": train.rows_per_update,
        "row_length": shards.row_length,
        "num_tokens": shards.num_tokens,
        "num_targets": shards.num_targets,
        "num_items": len(digests),
        "num_examples": shards.num_examples,
        "num_dropped": lost[0],
        "num_truncated": lost[1],
        "num_epochs": train.epoch_of(num_steps),
        "repeated_share": 1 - len(np.unique(digests)) / max(len(digests), 1),
        "order_correlation": order_correlation(train),
        **_copies(shards, valid, digests),
    }


def label_facts(train: Loader, tokenizer: Tokenizer, num_steps: int) -> dict[str, Any]:
    """Of rows as the trainer gets them: what is trained, and whether answers end.

    `target_entropy` is that of the trained tokens' frequencies in nats: the loss of a model that
    knows no more. Shares are of tokens, of rows and of answers (runs of trained tokens).
    """
    tokens = targets = empty_rows = 0
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    lengths: list[np.ndarray] = []
    ends: list[np.ndarray] = []
    rows = _sampled_rows(train, num_steps)
    for start in range(0, len(rows), _AT_ONCE):
        batch = train.batch(rows[start : start + _AT_ONCE])
        aims, segments = batch.targets.cpu().numpy(), batch.segments.cpu().numpy()
        is_trained = aims != IGNORE
        tokens += int((segments != 0).sum())
        targets += int(is_trained.sum())
        empty_rows += int((~is_trained.any(1)).sum())
        counts += np.bincount(aims[is_trained], minlength=len(counts))[: len(counts)]
        length, last = _runs(is_trained, segments, aims)
        lengths.append(length)
        ends.append(last)
    size, last = np.concatenate(lengths), np.concatenate(ends)
    stops = np.isin(last, tokenizer.stop_ids)
    return {
        "num_sampled_rows": len(rows),
        "num_sampled_tokens": tokens,
        "trained_share": targets / max(tokens, 1),
        "empty_rows_share": empty_rows / max(len(rows), 1),
        "num_answers": len(size),
        "stopped_answers_share": float(stops.mean()) if len(stops) else None,
        "answer_tokens_median": float(np.median(size)) if len(size) else None,
        "answer_tokens_p90": float(np.quantile(size, 0.9)) if len(size) else None,
        "document_ends": int(counts[tokenizer.document_end_id]),
        "target_entropy": _entropy(counts),
    }


def order_correlation(train: Loader) -> float | None:
    """Between the places of the first epoch and the rows that stand there: 0 of a shuffled one.

    None of too few rows to tell.
    """
    per_epoch = train.num_rows // train.rows_per_update
    if per_epoch == 0:
        return None
    steps = np.unique(np.linspace(0, per_epoch - 1, min(per_epoch, _ORDER_STEPS)).astype(int))
    most = max(_ORDER_ROWS, -(-_FEWEST_PLACES // len(steps)))
    rows = [train.rows_for_step(step)[:most] for step in steps.tolist()]
    found = np.concatenate(rows).astype(np.float64)
    if len(found) < _FEWEST_PLACES or found.std() == 0:
        return None
    return float(np.corrcoef(np.arange(len(found)), found)[0, 1])


def _copies(shards: Shards, valid: Shards | None, digests: np.ndarray) -> dict[str, Any]:
    """Items that stand elsewhere too: held-out ones and training ones, looked for in one pass."""
    held = some_items(valid, _MAX_ITEMS, _ITEM_TOKENS) if valid else []
    own = some_items(shards, _MAX_ITEMS, _ITEM_TOKENS)
    passages = Passages([*held, *own])
    for tokens in stretches(shards):
        passages.look_in(tokens)
    facts: dict[str, Any] = {"scanned_share": min(1.0, MAX_SCANNED_TOKENS / shards.num_tokens)}
    near = passages.copies(range(len(held), len(held) + len(own)), least_seen=2)
    facts |= {"nearly_repeated_share": near.share, "num_judged_items": near.num_judged}
    if valid:
        asked = _digests(valid)
        leaked = passages.copies(range(len(held)), least_seen=1)
        facts |= {
            "num_valid_items": len(asked),
            "valid_repeated": int(np.isin(asked, digests).sum()),
            "valid_nearly_repeated": leaked.num_copies,
            "num_judged_valid_items": leaked.num_judged,
        }
    return facts


def _digests(shards: Shards) -> np.ndarray:
    return np.concatenate([part.digests for part in shards.parts])


def _sampled_rows(train: Loader, num_steps: int) -> np.ndarray:
    """Rows of updates that are spread over the run, or over its first epoch: one order to draw."""
    most = max(1, min(_MAX_ROWS, _MAX_TOKENS // train.shards.row_length))
    per_step = min(train.rows_per_update, max(1, most // 8))
    last = min(num_steps, -(-train.num_rows // train.rows_per_update)) - 1
    steps = np.unique(np.linspace(0, last, max(1, most // per_step)).astype(int))
    rows = np.concatenate([train.rows_for_step(step)[:per_step] for step in steps.tolist()])
    return rows[:most]


def _runs(
    is_trained: np.ndarray, segments: np.ndarray, targets: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The length and the last target of each run of trained targets inside a segment."""
    before = np.zeros_like(is_trained)
    before[:, 1:] = is_trained[:, :-1] & (segments[:, 1:] == segments[:, :-1])
    after = np.zeros_like(is_trained)
    after[:, :-1] = is_trained[:, 1:] & (segments[:, 1:] == segments[:, :-1])
    flat = np.arange(is_trained.size).reshape(is_trained.shape)
    starts, ends = flat[is_trained & ~before], flat[is_trained & ~after]
    return ends - starts + 1, targets.ravel()[ends]


def _entropy(counts: np.ndarray) -> float | None:
    shares = counts[counts > 0] / max(int(counts.sum()), 1)
    return float(-(shares * np.log(shares)).sum()) if len(shares) else None
