"""The near-duplicate search on 100,000 documents of 1 KB, a fifth of them edited copies of others.

    python bench/near_duplicates.py          # half a minute; needs ../shared/data

Novels in English and French are cut into pieces that overlap by half (a Jaccard index of about 0.3,
so that there is something to confuse). Copies are edited in four ways, to Jaccard indices spread
over 0.5 to 1. The true index of a pair is computed from its sets of word tuples, not by the code
that is measured.
"""

from __future__ import annotations

import datetime
import random
import resource
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from mule import __version__, fsio, machine
from mule.data.clean.near import SHINGLE_WORDS, near_duplicates
from mule.data.clean.shingles import words

ROOT = Path(__file__).resolve().parent.parent
BOOKS = ROOT.parent / "shared" / "data"
RESULTS = ROOT / "bench" / "results" / "near_duplicates.json"
NUM_TEXTS = 100_000
COPIES = 0.2
CHARS = 1000
THRESHOLD = 0.8
SEED = 0
BINS = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)


def run() -> None:
    """Measure once and write the result."""
    texts, pairs = make_texts(BOOKS, NUM_TEXTS, SEED)
    before = psutil.Process().memory_info().rss
    started_at = time.perf_counter()
    groups = near_duplicates(texts, threshold=THRESHOLD, seed=SEED)
    seconds = time.perf_counter() - started_at
    scale = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    fsio.write_json(
        RESULTS,
        {
            "bench": "near_duplicates",
            "command": "python bench/near_duplicates.py",
            "date": datetime.date.today().isoformat(),
            "mule": __version__,
            "seconds": round(seconds, 2),
            "texts": len(texts),
            "bytes": sum(len(text.encode()) for text in texts),
            "threshold": THRESHOLD,
            "seed": SEED,
            "memory_before_bytes": before,
            "peak_memory_bytes": peak,
            **judge(texts, pairs, groups),
            "machine": machine.describe(),
        },
    )
    print(RESULTS.read_text(encoding="utf-8"))


def judge(
    texts: list[str], pairs: list[tuple[int, int]], groups: list[list[int]]
) -> dict[str, Any]:
    """Recall of the planted pairs, by their true Jaccard index, and precision of the groups."""
    group_of = {index: number for number, group in enumerate(groups) for index in group}
    found: dict[float, list[bool]] = {low: [] for low in BINS}
    for original, copy in pairs:
        index = true_jaccard(texts[original], texts[copy])
        low = max((low for low in BINS if low <= index), default=None)
        if low is not None:
            found[low].append(group_of.get(original, -1) == group_of.get(copy, -2))
    alike = [hit for low in BINS if low >= THRESHOLD for hit in found[low]]
    members = [(texts[index], group) for group in groups for index in group]
    right = sum(_has_partner(text, [texts[index] for index in group]) for text, group in members)
    return {
        "planted_pairs": len(pairs),
        "planted_pairs_at_threshold": len(alike),
        "recall": sum(alike) / len(alike),
        "precision": right / max(1, len(members)),
        "groups": len(groups),
        "grouped_texts": len(members),
        "joined_by_jaccard": {
            f"{low:.2f}": {"pairs": len(hits), "joined": sum(hits)} for low, hits in found.items()
        },
    }


def true_jaccard(a: str, b: str) -> float:
    """The Jaccard index of the sets of word tuples."""
    one, other = _shingles(a), _shingles(b)
    return len(one & other) / len(one | other)


def make_texts(folder: Path, num_texts: int, seed: int) -> tuple[list[str], list[tuple[int, int]]]:
    """The shuffled texts, and where each planted pair is: (original, copy)."""
    files = sorted([*folder.glob("books-en/*.txt"), *folder.glob("books-fr/*.txt")])
    if not files:
        raise SystemExit("no books: this benchmark needs the development data beside the checkout")
    whole = [" ".join(file.read_text(encoding="utf-8-sig").split()) for file in files]
    num_copies = int(num_texts * COPIES)
    num_originals = num_texts - num_copies
    # A little closer than would do, as the end of each book is no whole piece.
    step = max(CHARS // 2, int(sum(map(len, whole)) * 0.995) // num_originals)
    pieces = [text[at : at + CHARS] for text in whole for at in range(0, len(text) - CHARS, step)]
    draw = random.Random(seed)
    draw.shuffle(pieces)
    originals = pieces[:num_originals]
    assert len(originals) == num_originals, "not enough text"
    copies = [_edited(text, pieces[-1 - n], draw) for n, text in enumerate(originals[:num_copies])]
    texts = originals + copies
    order = list(range(len(texts)))
    draw.shuffle(order)
    place = {index: position for position, index in enumerate(order)}
    pairs = [(place[n], place[len(originals) + n]) for n in range(len(copies))]
    return [texts[index] for index in order], pairs


def _edited(text: str, other: str, draw: random.Random) -> str:
    """A copy with a Jaccard index of about a number drawn from 0.5 to 1."""
    index = draw.uniform(0.5, 1.0)
    found, foreign = text.split(), other.split()
    kind = draw.choice(("replace", "cut", "append", "shorten"))
    if kind == "replace":  # each word takes five shingles with it
        for _ in range(round(len(found) * (1 - index) / (1 + index) / SHINGLE_WORDS)):
            found[draw.randrange(len(found))] = draw.choice(foreign)
        return " ".join(found)
    if kind == "cut":  # a passage is gone
        length = round(len(found) * (1 - index))
        at = draw.randrange(len(found) - length + 1)
        return " ".join(found[:at] + found[at + length :])
    if kind == "append":  # something else follows
        return " ".join(found + foreign[: round(len(found) * (1 / index - 1))])
    return " ".join(found[: round(len(found) * index)])


def _has_partner(text: str, group: list[str]) -> bool:
    others = list(group)
    others.remove(text)
    return any(true_jaccard(text, other) >= THRESHOLD for other in others)


def _shingles(text: str) -> set[tuple[str, ...]]:
    found = words(text, symbols=True)
    return set(zip(*(found[shift:] for shift in range(SHINGLE_WORDS)))) or {tuple(found)}


if __name__ == "__main__":
    run()
