"""From sources to a folder with train.jsonl, valid.jsonl, the figures and the card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mule.data.clean.contamination import Evaluation
from mule.data.clean.split import related
from mule.data.clean.split import split as divide
from mule.data.mix.amounts import amounts
from mule.data.mix.output import check_out, write
from mule.data.mix.pool import Pool
from mule.data.mix.settings import MixSettings
from mule.data.mix.sources import by_source, open_sources, read_evaluation, read_sources
from mule.data.sources.items import Conversation
from mule.errors import UserError

_TOO_ALIKE = 0.8  # for two sides of a split, where near-duplicates are kept
_MUCH = 0.2  # of a source taken out as near-duplicates: worth a note
_SHUFFLE_STREAM = 2**32  # of the random numbers: the streams below are those of the sources


@dataclass(frozen=True)
class Rows:
    """Numbers of items; one stands in `train` as often as it is to be repeated."""

    train: list[int]
    valid: list[int]


def mix(
    paths: Sequence[str | Path], out: Path, settings: MixSettings, *, verb: str, command: str
) -> dict[str, Any]:
    """Make `out` from the sources; its figures, as in its mix.json.

    The steps: read, exact duplicates, near-duplicates, decontaminate, cap / repeat / weight, the
    limit of all, split, shuffle. The same sources, settings and seed give the same bytes. All items
    are in memory, up to eight times the size of their files: some millions of rows.
    Raises DataError for a bad source, UserError for settings that cannot work; `out` is then as it
    was before.
    """
    sources = open_sources(paths)
    check_out(out, sources)
    by_source(sources, "--cap", settings.caps)  # a wrong name is told before anything is read
    by_source(sources, "--repeat", settings.repeats)
    by_source(sources, "--weight", settings.weights)
    evaluation = read_evaluation(settings.decontaminate)
    read = read_sources(sources, settings.read)
    pool = Pool.of(sources, read)
    _clean(pool, settings, evaluation)
    notes = [note for source in sources for note in source.notes]
    notes += [*read.notices, *_much_alike(pool)]
    copies = _amounts(pool, settings, notes)
    rows = _shuffled(_divided(pool, copies, settings), settings.seed)
    made = {
        "made_by": verb,
        "command": command,
        "kind": "conversations" if isinstance(pool.items[0], Conversation) else "documents",
        "settings": settings.as_dict(),
        "notes": notes,
    }
    return write(out, pool, rows.train, rows.valid, made)


def split(
    paths: Sequence[str | Path], out: Path, settings: MixSettings, *, verb: str, command: str
) -> dict[str, Any]:
    """Like `mix`, but every row is kept. Raises UserError for folders that are divided already."""
    for source in open_sources(paths):
        if source.valid:
            raise UserError(
                f"{source.given} is divided already: it has {source.valid[0].name}",
                f"use it as it is, or split its training file: {source.train[0]}",
            )
    return mix(paths, out, settings, verb=verb, command=command)


# ---------------------------------------------------------------- steps


def _clean(pool: Pool, settings: MixSettings, evaluation: list[Any]) -> None:
    if settings.exact:
        pool.remove_duplicates()
    if settings.near is not None:
        pool.remove_near_duplicates(settings.near, settings.seed)
    if evaluation:
        pool.decontaminate(Evaluation(evaluation))
    if not pool.kept_for_training():
        raise UserError(
            f"nothing is left to train on: all {len(pool.items):,} rows are duplicates, or stand "
            "in the validation or evaluation sets",
            "add other sources, or leave out --decontaminate",
        )


def _much_alike(pool: Pool) -> list[str]:
    """A note for each source that loses much as near-duplicates: it may be meant to be like that."""
    notes = []
    for number, source in enumerate(pool.sources):
        counts = pool.counts(number)
        if counts["near-duplicate"] > _MUCH * counts["read"]:
            notes.append(
                f"{counts['near-duplicate']:,} of {counts['read']:,} rows of {source.name} are "
                "near-duplicates: see the card, and use --no-near if they are meant to be alike"
            )
    return notes


def _amounts(pool: Pool, settings: MixSettings, notes: list[str]) -> dict[int, int]:
    """How often each training item is to stand in the result; those left out are marked."""
    by_number: list[list[int]] = [[] for _ in pool.sources]
    for item in pool.kept_for_training():
        by_number[pool.source_of[item]].append(item)
    available = [len(numbers) for numbers in by_number]
    caps = by_source(pool.sources, "--cap", settings.caps)
    for number, cap in caps.items():
        if cap > available[number]:
            name = pool.sources[number].name
            notes.append(
                f"the cap of {cap:,} for {name} changes nothing: it has {available[number]:,}"
            )
    found = amounts(
        available,
        caps=caps,
        repeats=by_source(pool.sources, "--repeat", settings.repeats),
        weights=by_source(pool.sources, "--weight", settings.weights),
        max_examples=settings.max_examples,
    )
    limit, before = settings.max_examples, sum(amount.weighted for amount in found)
    if limit is not None and limit > before:
        notes.append(f"the limit of {limit:,} examples changes nothing: there are {before:,}")
    copies: dict[int, int] = {}
    for number, amount in enumerate(found):
        drawn = _permuted(by_number[number], settings.seed, number)
        copies |= zip(drawn, amount.copies())
        unused = [item for item in reversed(drawn) if not copies[item]]
        reasons = [reason for reason, count in amount.left_out().items() for _ in range(count)]
        for item, reason in zip(unused, reasons, strict=True):
            pool.leave_out(item, reason)
    return {item: count for item, count in copies.items() if count}


def _divided(pool: Pool, copies: dict[int, int], settings: MixSettings) -> Rows:
    """Hold out a share of the sources that have no validation rows of their own.

    What is held out stands there once. Raises UserError when nothing can be held out.
    """
    numbers = sorted(copies)
    own = {pool.source_of[number] for number in pool.kept_for_validation()}
    held: list[int] = []
    if settings.valid_share and any(pool.source_of[number] not in own for number in numbers):
        groups = _related(pool, numbers, settings)
        held = _held_out(pool, groups, own, settings)
    away = frozenset(held)
    train = [number for number in numbers if number not in away for _ in range(copies[number])]
    return Rows(train, [*pool.kept_for_validation(), *held])


def _related(pool: Pool, numbers: list[int], settings: MixSettings) -> list[list[int]]:
    """Groups of `numbers` that go to one side."""
    similar = pool.similar
    if settings.near is None or settings.near > _TOO_ALIKE:
        similar = pool.find_similar(_TOO_ALIKE, settings.seed)
    place = {number: position for position, number in enumerate(numbers)}
    groups = related(
        [pool.items[number] for number in numbers],
        [[place[number] for number in group if number in place] for group in similar],
    )
    return [[numbers[position] for position in group] for group in groups]


def _held_out(
    pool: Pool, groups: list[list[int]], own: set[int], settings: MixSettings
) -> list[int]:
    """A group with an item of a source that is divided already stays in training."""
    free = [group for group in groups if not any(pool.source_of[n] in own for n in group)]
    flat = sorted(number for group in free for number in group)
    place = {number: position for position, number in enumerate(flat)}
    strata = [f"{pool.source_of[number]} {pool.items[number].file}" for number in flat]
    _, valid = divide(
        [[place[number] for number in group] for group in free],
        strata,
        share=settings.valid_share,
        seed=settings.seed,
    )
    return [flat[position] for position in valid]


def _shuffled(rows: Rows, seed: int) -> Rows:
    return Rows(
        _permuted(rows.train, seed, _SHUFFLE_STREAM),
        _permuted(rows.valid, seed, _SHUFFLE_STREAM + 1),
    )


def _permuted(numbers: Sequence[int], seed: int, stream: int) -> list[int]:
    keys = np.random.Philox(key=[seed, stream]).random_raw(len(numbers))
    return [numbers[place] for place in np.argsort(keys, kind="stable").tolist()]
